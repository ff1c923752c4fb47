"""Finding leaves by name: the first call resolves the pattern, later calls look it up."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.suite.case import Bound, Case, Timed

PATTERN = ".*weight"


def nested(leaves: int) -> dict[str, Any]:
    """Returns a nested dict of numpy scalars, two per layer, which are quick to make."""
    import numpy as np

    leaf = np.float32(0)
    return {f"layer{i}": {"weight": leaf, "bias": leaf} for i in range(leaves // 2)}


def ours(size: int) -> dict[str, Any]:
    import paramtree as pt

    base = nested(size)
    numbers: Iterator[int] = itertools.count()
    tree = pt.from_tree(base)

    def fresh() -> Any:
        # A new structure, since resolved patterns are cached per structure.
        return pt.from_tree({**base, f"extra{next(numbers)}": base["layer0"]["bias"]})

    return {
        "collect, first": Timed(lambda new: pt.collect(new, PATTERN), before=fresh),
        "collect, again": lambda: pt.collect(tree, PATTERN),
        "mask, first": Timed(lambda new: pt.mask(new, PATTERN), before=fresh),
        "mask, again": lambda: pt.mask(tree, PATTERN),
        "partition, first": Timed(lambda new: pt.partition(new, PATTERN), before=fresh),
        "partition, again": lambda: pt.partition(tree, PATTERN),
        "labels, first": Timed(lambda new: pt.labels(new, {PATTERN: 1, ".*": 0}), before=fresh),
        "labels, again": lambda: pt.labels(tree, {PATTERN: 1, ".*": 0}),
    }


def by_hand(size: int) -> dict[str, Any]:
    from flax.traverse_util import flatten_dict, unflatten_dict

    base = nested(size)

    def collect() -> Any:
        flat = flatten_dict(base, sep="_")
        return {name: leaf for name, leaf in flat.items() if re.fullmatch(PATTERN, name)}

    def mask() -> Any:
        flat = flatten_dict(base)
        return unflatten_dict(
            {path: re.fullmatch(PATTERN, "_".join(path)) is not None for path in flat}
        )

    # Nothing is cached, so the first and later calls are the same.
    return {metric: work for verb, call in (("collect", collect), ("mask", mask))
            for metric, work in ((f"{verb}, first", Timed(lambda _, call=call: call(), before=int)),
                                  (f"{verb}, again", call))}  # fmt: skip


CASES = [
    Case(
        name="names",
        title='`collect(".*weight")` and `mask`',
        sizes=(400, 10_000, 100_000),
        contenders={"paramtree": ours, "flatten_dict and re": by_hand},
        bounds=tuple(
            bound
            for verb in ("collect", "mask")
            for bound in (
                Bound(f"{verb}, first", "flatten_dict and re", 0.8),
                Bound(f"{verb}, again", None, 1e-3),
            )
        ),
        rounds=2,
        turns=3,
        smoke=(400,),
        packages=("flax",),
        note=(
            "The first call on a structure matches the pattern against every name; later calls, on any "
            "tree with that structure, look up the result. By hand: Flax's `flatten_dict` and "
            "`re.fullmatch`, plus `unflatten_dict` for the mask."
        ),
    )
]
