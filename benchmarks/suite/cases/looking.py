"""Inspecting a tree: its page in a notebook, and the statistics of its values."""

from collections.abc import Callable
from typing import Any

from benchmarks.suite.case import Absent, Bound, Case, Timed

SUM = "a sum"
FLOOR = "for a leaf of 17 MB two cores need 1.25 ms for all measures, and 0.8 ms for its sum: 1.56"


def wide_tree(leaves: int) -> Any:
    """Returns a tree of small arrays, ten per block."""
    import numpy as np

    import paramtree as pt

    small = np.zeros((4, 4), np.float32)
    nested = {
        f"block{i}": {f"layer{j}": {"weight": small, "bias": small[0]} for j in range(5)}
        for i in range(max(1, leaves // 10))
    }
    return pt.from_tree(nested)


def our_page(leaves: int) -> dict[str, Callable[[], Any]]:
    import jax

    import paramtree as pt

    tree = jax.device_put(wide_tree(leaves))
    return {"HTML": lambda: pt.show(tree)._repr_html_()}


def our_diff(leaves: int) -> dict[str, Callable[[], Any]]:
    import jax

    import paramtree as pt

    tree = wide_tree(leaves)
    copy, other = (jax.tree.map(lambda leaf, by=by: leaf + by, tree) for by in (0, 1))
    return {"equal values": lambda: pt.diff(tree, copy), "other values": lambda: pt.diff(tree, other)}


def our_tree(leaves: int) -> dict[str, Any]:
    import itertools

    import paramtree as pt

    nested = wide_tree(leaves).to_dict()
    leaf = nested["block0"]["layer0"]["bias"]
    numbers = itertools.count()

    def fresh() -> Any:
        return {**nested, f"extra{next(numbers)}": leaf}

    # A structure that exists already is found again, and takes as long to describe.
    return {"from_tree": Timed(pt.from_tree, before=fresh)}


def our_listing(tensors: int) -> dict[str, Any]:
    import contextlib
    import io

    from benchmarks.command import hollow
    from benchmarks.suite.cases.files import folder
    from paramtree import command

    path = str(hollow(folder() / "a.safetensors", tensors, 2**30))

    def listed() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert command.main([path]) == 0

    return {"listing": listed}


def treescope_page(leaves: int) -> dict[str, Callable[[], Any]]:
    import jax
    import treescope

    if leaves > 1000:
        raise Absent("more than 1,000 leaves take too long")
    nested = jax.device_put(wide_tree(leaves)).to_dict()
    return {"HTML": lambda: treescope.render_to_html(nested, roundtrip_mode=False)}


def values(size: str) -> list[Any]:
    """Returns 400 MB of arrays with the shapes of a transformer's."""
    import jax
    import numpy as np

    width = 64 if size == "tiny" else 1024
    blocks = 1 if size == "tiny" else 8
    rng = np.random.default_rng(0)
    shapes = [(4 * width, width), (width, 4 * width), *[(width, width)] * 4, *[(width,)] * 9]
    leaves = [
        jax.device_put(rng.standard_normal(shape, np.float32))
        for _ in range(blocks)
        for shape in shapes
    ]
    return jax.block_until_ready(leaves)


def our_stats(size: str) -> dict[str, Callable[[], Any]]:
    import paramtree as pt

    tree = pt.from_tree({f"leaf{i}": leaf for i, leaf in enumerate(values(size))})
    return {"statistics": lambda: pt.stats(tree)}


def one_pass(size: str) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    leaves = values(size)
    total = jax.jit(jnp.sum)
    return {"statistics": lambda: jax.device_get([total(leaf) for leaf in leaves])}


def by_numpy(size: str) -> dict[str, Callable[[], Any]]:
    import numpy as np

    leaves = [np.asarray(leaf) for leaf in values(size)]

    def look(x: Any) -> Any:
        finite = np.isfinite(x).all()
        return x.mean(), x.std(), x.min(), x.max(), np.linalg.norm(x), (x == 0).sum(), finite

    return {"statistics": lambda: [look(leaf) for leaf in leaves]}


CASES = [
    Case(
        name="html",
        title="The page of a tree in a notebook",
        sizes=(100, 10000, 100_000),
        contenders={"paramtree": our_page, "treescope": treescope_page},
        bounds=(
            Bound("HTML", None, 0.3, when=lambda size: size <= 10_000),
            Bound("HTML", None, 1.0, when=lambda size: size > 10_000),
        ),
        rounds=2,
        turns=5,
        slice=0.05,
        seconds=20,
        smoke=(10,),
        packages=("treescope",),
    ),
    Case(
        name="diff",
        title="Comparing two trees",
        sizes=(100, 100_000),
        contenders={"paramtree": our_diff},
        bounds=(Bound("equal values", None, 1.5), Bound("other values", None, 1.5)),
        rounds=2,
        turns=3,
        seconds=30,
        smoke=(10,),
    ),
    Case(
        name="from_tree",
        title="`from_tree` of nested dicts",
        sizes=(100, 100_000),
        contenders={"paramtree": our_tree},
        bounds=(Bound("from_tree", None, 0.5),),
        rounds=2,
        turns=3,
        seconds=30,
        smoke=(10,),
    ),
    Case(
        name="listing",
        title="Listing the tensors of a file",
        sizes=(300, 20_000),
        contenders={"paramtree": our_listing},
        bounds=(Bound("listing", None, 0.3, why="see the note"),),
        size="tensors",
        rounds=2,
        turns=3,
        seconds=30,
        smoke=(10,),
        note=(
            "From opening the file to the last line, in a process that has imported jax. Each tensor "
            "has a level of its own, so 20,000 of them are 42,000 lines. Two fifths of the time go to "
            "reading the header and checking the names and shapes of a file that may be damaged, an "
            "eighth to building the tree, and the rest to totals and text, three microseconds a line. "
            "With ten tensors to a level it takes 0.26 s."
        ),
    ),
    Case(
        name="statistics",
        title="Statistics of 400 MB",
        sizes=("8 blocks",),
        contenders={"paramtree": our_stats, SUM: one_pass, "numpy": by_numpy},
        bounds=(Bound("statistics", SUM, 1.3, why=FLOOR),),
        size="",
        rounds=2,
        turns=11,
        slice=0.1,
        seconds=30,
        smoke=("tiny",),
        note=(
            "Mean, deviation, extremes, norm, zeros, NaN and infinities of each of 120 leaves, against "
            "`jax.jit(jax.numpy.sum)` of each, and the same numbers by numpy. The floor: XLA runs such "
            "a loop on one thread and rereads memory for each reduction that it does not fuse. "
            "paramtree takes all measures in one loop over chunks that fit in the cache, several "
            "leaves at a time. A leaf of 17 MB takes one core 2.5 ms, a dozen instructions for every "
            "eight values; both cores sum it in 0.8 ms."
        ),
    ),
]
