"""What a parameter tree costs beside a nested dict and a bare tuple of the same arrays.

Run with ``make bench-core``. Machines drift, so every figure is a ratio of medians taken in turn in
one process; only the first column is in microseconds. ``import`` is timed in fresh processes.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import paramtree as pt


def interleaved(cases: dict[str, Callable[[], Any]], rounds: int, inner: int) -> dict[str, float]:
    """Returns the median microseconds of one call of each case, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            for _ in range(inner):
                case()
            times[name].append((time.perf_counter() - start) / inner * 1e6)
    return {name: statistics.median(taken) for name, taken in times.items()}


def trees(leaves: int) -> dict[str, Any]:
    """Returns the same arrays as a nested dict, a tree and a tuple."""
    nested = {f"layer{i}": {"weight": jnp.zeros(2), "bias": jnp.zeros(2)} for i in range(leaves // 2)}
    tree = pt.from_tree(nested)
    return {"dict": nested, "tree": tree, "tuple": tuple(jax.tree.leaves(tree))}


@jax.jit
def first_leaf(tree: Any) -> jax.Array:
    """Returns one leaf of many: next to no work, so the time is that of the call."""
    return jax.tree.leaves(tree)[0] + 1


def row(title: str, times: dict[str, float]) -> None:
    """Prints one line of the table."""
    to_dict = times["tree"] / times["dict"]
    to_tuple = times["tree"] / times["tuple"]
    print(f"{title:32} {times['dict']:10.1f} {to_dict:10.2f} {to_tuple:10.2f}")


def import_time(rounds: int) -> float:
    """Returns the median milliseconds that ``import paramtree`` adds to ``import jax.numpy``."""
    clock = "t = time.perf_counter(); import paramtree; print(time.perf_counter() - t)"
    code = f"import time, jax, jax.numpy; {clock}"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs) * 1e3


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 200, 2000])
    args = parser.parse_args()
    print(f"{'':32} {'dict, us':>10} {'tree/dict':>10} {'tree/tuple':>10}")
    for leaves in args.sizes:
        made = trees(leaves)
        inner = max(1, 2000 // leaves)
        flatten = {name: lambda t=t: jax.tree.flatten(t) for name, t in made.items()}
        row(f"flatten, {leaves} leaves", interleaved(flatten, args.rounds, inner))
        parts = {name: jax.tree.flatten(t) for name, t in made.items()}
        unflatten = {name: lambda p=p: jax.tree.unflatten(p[1], p[0]) for name, p in parts.items()}
        row(f"unflatten, {leaves} leaves", interleaved(unflatten, args.rounds, inner))
        mapped = {name: lambda t=t: jax.tree.map(lambda x: x, t) for name, t in made.items()}
        row(f"tree.map, {leaves} leaves", interleaved(mapped, args.rounds, inner))
        dispatch = {name: lambda t=t: first_leaf(t) for name, t in made.items()}
        interleaved(dispatch, 1, 1)
        row(f"jit dispatch, {leaves} leaves", interleaved(dispatch, args.rounds, inner))
    print(f"import paramtree after jax: {import_time(7):.1f} ms")


if __name__ == "__main__":
    main()
