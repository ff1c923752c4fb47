"""What it takes to resolve a pattern on a large tree: the first time, and again.

Beside it, what ``flatten_dict`` of Flax and ``re`` take for the same names, in the same process.
"""

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

import paramtree as pt


def milliseconds(call: Callable[[], Any]) -> float:
    """Returns how long one call takes."""
    gc.collect()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Prints a line a verb."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    nested = {
        f"layer{i}": {"weight": np.float32(i), "bias": np.float32(i)} for i in range(args.leaves // 2)
    }

    def by_hand() -> Any:
        flat = flatten_dict(nested, sep="_")
        return {name: leaf for name, leaf in flat.items() if re.fullmatch(".*weight", name)}

    verbs: dict[str, Callable[[Any], Any]] = {
        "collect": lambda t: pt.collect(t, ".*weight"),
        "mask": lambda t: pt.mask(t, ".*weight"),
        "labels": lambda t: pt.labels(t, {".*weight": "a", ".*": "b"}),
        "select": lambda t: pt.select(t, ".*weight"),
        "partition": lambda t: pt.partition(t, ".*weight"),
    }
    hand, first, again = [], {verb: [] for verb in verbs}, {verb: [] for verb in verbs}
    for _ in range(args.rounds):
        hand.append(milliseconds(by_hand))
        for verb, call in verbs.items():
            tree = pt.from_tree(nested)
            first[verb].append(milliseconds(lambda call=call, tree=tree: call(tree)))
            start = time.perf_counter()
            for _ in range(5):
                call(tree)
            again[verb].append((time.perf_counter() - start) / 5 * 1e3)
            del tree  # and with it all that was resolved for its structure
    base = statistics.median(hand)
    print(f"flatten_dict and re, {args.leaves} leaves: {base:.0f} ms")
    for verb in verbs:
        once, twice = statistics.median(first[verb]), statistics.median(again[verb])
        print(f"{verb:10} first {once:6.0f} ms ({once / base:.2f} of that), again {twice:.2f} ms")


if __name__ == "__main__":
    main()
