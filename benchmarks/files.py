"""Saving and loading beside the bare safetensors package: ratios of times, and peaks of memory.

Prints, for some hundred megabytes in a few and in many arrays, the median over rounds of what this
library takes over what the package takes for the same arrays in the same round. Ours fsyncs. The peak
of memory is how much a new process grew while loading, over the size of the arrays.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.flax
import safetensors.numpy

import paramtree as pt


def seconds(call: Callable[[], Any]) -> float:
    os.sync()  # an fsync also waits for what others have written just before
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def compare(folder: Path, megabytes: int, count: int, rounds: int) -> None:
    size = megabytes * 2**20 // 4 // count
    rng = np.random.default_rng(0)
    leaves = {f"layer{i}.weight": rng.random(size, np.float32) for i in range(count)}
    flat = {name: jax.device_put(leaf) for name, leaf in leaves.items()}
    tree = pt.from_tree({name.replace(".", "/"): leaf for name, leaf in flat.items()})
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    host = {name: np.asarray(leaf) for name, leaf in flat.items()}
    calls: dict[str, list[Callable[[], Any]]] = {
        "save": [lambda: pt.save(ours, tree), lambda: safetensors.numpy.save_file(host, theirs)],
        "load": [lambda: pt.load(ours), lambda: safetensors.flax.load_file(theirs)],
        "load, like": [lambda: pt.load(ours, like=tree), lambda: safetensors.flax.load_file(theirs)],
        "load, to numpy": [lambda: pt.load(ours), lambda: safetensors.numpy.load_file(theirs)],
    }
    times: dict[str, list[list[float]]] = {what: [] for what in calls}
    for _ in range(rounds):
        for what, both in calls.items():
            times[what].append([seconds(call) for call in both])
    for what, pairs in times.items():
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        shown = f"{mine * 1e3:8.0f} ms {other * 1e3:8.0f} ms  ratio {mine / other:.2f}"
        print(f"{what:15} {count:5} arrays {shown}")


PEAK = """
import sys, jax, jax.numpy as jnp, paramtree as pt, safetensors.flax
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
pt.load, jax.device_put(jnp.zeros(3)).block_until_ready()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
jax.block_until_ready((pt.load if sys.argv[1] == "ours" else safetensors.flax.load_file)(sys.argv[2]))
print(status("VmHWM") - before)
"""


def peak(who: str, path: Path) -> float:
    run = subprocess.run(
        [sys.executable, "-c", PEAK, who, str(path)], capture_output=True, text=True, check=True
    )
    return int(run.stdout) / path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; a temporary one if not given"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        for count in (24, 1000):
            compare(folder, args.megabytes, count, args.rounds)
            if Path("/proc/self/clear_refs").exists():
                for who in ("ours", "theirs"):
                    most = peak(who, folder / f"{who}.safetensors")
                    print(f"peak of memory, {who}: {most:.2f} of the data")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
