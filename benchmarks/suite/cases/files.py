"""Saving and loading 400 MB, in few or many arrays: time and peak memory."""

import atexit
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.suite.case import Absent, Bound, Case, Measured
from benchmarks.suite.cases.init import peak

BYTES, SMALL = 400 * 2**20, 2**16
FSYNC = "safetensors and fsync"
_SWEEP = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


def folder() -> Path:
    """Returns a temporary folder that is deleted when this process ends, even if it is killed."""
    path = tempfile.mkdtemp()
    # Its standard input closes when this process ends.
    sweep = subprocess.Popen(
        [sys.executable, "-c", _SWEEP, path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    atexit.register(lambda: (sweep.communicate(), None))
    return Path(path)


def arrays(count: int) -> dict[str, Any]:
    """Returns ``count`` arrays, 400 MB in total."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    size = (BYTES if count > 1 else SMALL) // 4 // count
    leaves = {f"layer{i}.weight": jax.device_put(rng.random(size, np.float32)) for i in range(count)}
    return jax.block_until_ready(leaves)


def measured(call: Callable[[], Any], before: Callable[[], Any] = os.sync) -> Measured:
    """Returns a measurement that waits for the disk and then times a call."""

    def once() -> float:
        import jax

        before()
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        taken = time.perf_counter() - start
        del result
        return taken

    return Measured(once)


def ours(count: int) -> dict[str, Measured]:
    import paramtree as pt

    tree = pt.from_tree({name.replace(".", "/"): leaf for name, leaf in arrays(count).items()})
    path = folder() / "ours.safetensors"
    pt.save(path, tree)
    return {
        "save": measured(lambda: pt.save(path, tree)),
        "load": measured(lambda: pt.load(path)),
        "load, like": measured(lambda: pt.load(path, like=tree)),
    }


def bare(count: int, sync: bool = False) -> dict[str, Measured]:
    import numpy as np
    import safetensors.flax
    import safetensors.numpy

    host = {name: np.asarray(leaf) for name, leaf in arrays(count).items()}
    path = folder() / "theirs.safetensors"

    def save() -> None:
        safetensors.numpy.save_file(host, path)
        if sync:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    save()
    load = measured(lambda: safetensors.flax.load_file(path))
    return (
        {"save": measured(save)} if sync else {"save": measured(save), "load": load, "load, like": load}
    )


def orbax(count: int) -> dict[str, Measured]:
    import logging

    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    tree = arrays(count)
    path = folder() / "theirs"
    checkpointer = ocp.PyTreeCheckpointer()
    restore = ocp.checkpoint_utils.construct_restore_args(tree)
    checkpointer.save(path, tree, force=True)
    jax.block_until_ready(checkpointer.restore(path, restore_args=restore))
    return {
        "save": measured(lambda: checkpointer.save(path, tree, force=True)),
        "load": measured(lambda: checkpointer.restore(path, restore_args=restore)),
    }


_WRITE = """
import sys, numpy as np, safetensors.numpy
count, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
made = {f"layer{i}": np.full(size // 4 // count, i, np.float32) for i in range(count)}
safetensors.numpy.save_file(made, path)
"""


def memory_to_load(load: Callable[[], Callable[[Path], Any]]) -> Callable[[int], dict[str, float]]:
    """Returns a contender that loads once, from a file written by another process."""

    def contender(count: int) -> dict[str, float]:
        import jax
        import jax.numpy as jnp

        path, small = (folder() / "a.safetensors" for _ in range(2))
        size = BYTES if count > 1 else SMALL
        for file, bytes_ in ((path, size), (small, SMALL)):
            subprocess.run(
                [sys.executable, "-c", _WRITE, str(count), str(bytes_), str(file)], check=True
            )
        call = load()
        jax.block_until_ready((call(small), jnp.zeros(3)))
        with peak() as growth:
            leaves = jax.block_until_ready(call(path))
        del leaves
        return {"peak": growth[0] / size}

    return contender


def our_load() -> Callable[[Path], Any]:
    import paramtree as pt

    return pt.load


def bare_load() -> Callable[[Path], Any]:
    import safetensors.flax

    return safetensors.flax.load_file


_WRITE_TORCH = """
import sys, numpy as np, safetensors.numpy, torch
count, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
made = {f"layer{i}.weight": np.full(size // 4 // count, i, np.float32) for i in range(count)}
safetensors.numpy.save_file(made, folder + "/a.safetensors")
torch.save({name: torch.from_numpy(array) for name, array in made.items()}, folder + "/a.pt")
"""
_LOAD_TORCH = """
import sys, torch
from benchmarks.suite.cases.init import peak
path, small = sys.argv[1:]
torch.load(small, weights_only=True)
with peak() as growth:
    kept = torch.load(path, weights_only=True)
print(growth[0])
"""


def torch_files(count: int) -> Path:
    """Returns a folder with the same arrays in ``a.safetensors`` and ``a.pt``."""
    try:
        import torch  # noqa: F401  # only to know; another process uses it
    except ImportError:
        raise Absent("torch is not installed") from None
    path, size = folder(), BYTES if count > 1 else SMALL
    subprocess.run([sys.executable, "-c", _WRITE_TORCH, str(count), str(size), str(path)], check=True)
    return path


def torch_over(count: int) -> dict[str, float]:
    """Returns the time to load a ``.pt``, over that from safetensors, and the peak over torch's."""
    import jax

    import paramtree as pt

    files, small = torch_files(count), torch_files(1)
    with peak() as growth:
        leaves = jax.block_until_ready(pt.load(files / "a.pt"))
    del leaves
    times: dict[str, list[float]] = {"a.pt": [], "a.safetensors": []}
    for _ in range(7):
        for name, taken in times.items():
            taken.append(measured(lambda name=name: pt.load(files / name), lambda: None).call())
    command = [sys.executable, "-c", _LOAD_TORCH, str(files / "a.pt"), str(small / "a.pt")]
    theirs = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "load, of safetensors": min(times["a.pt"]) / min(times["a.safetensors"]),
        "peak, of torch.load": growth[0] / max(1, theirs),
    }


CASES = [
    Case(
        name="torch_files",
        title="Loading 400 MB from a file of PyTorch",
        sizes=(24, 200, 1000),
        contenders={"paramtree": torch_over},
        bounds=(
            Bound("load, of safetensors", None, 1.2, why="reading a pickle takes 0.1 ms per tensor"),
            Bound("peak, of torch.load", None, 0.5, why="jax holds what it has loaded"),
        ),
        unit="x",
        size="arrays",
        rounds=2,
        turns=1,
        seconds=60,
        smoke=(1,),
        packages=("safetensors", "torch"),
        note=(
            "The same arrays in a `.pt` and in a `.safetensors` file, by turns in one process; and the "
            "growth of resident memory over that of `torch.load(weights_only=True)` in another. Where "
            "torch is not installed there is no row."
        ),
    ),
    Case(
        name="files",
        title="Saving and loading 400 MB",
        sizes=(24, 1000),
        contenders={
            "paramtree": ours,
            "safetensors": bare,
            FSYNC: lambda count: bare(count, sync=True),
            "Orbax": orbax,
        },
        bounds=(
            Bound("save", "safetensors", 1.1, why=f"{FSYNC} is the floor of a durable save"),
            Bound("load", "safetensors", 1.1),
            Bound("load, like", "safetensors", 1.1),
        ),
        size="arrays",
        rounds=2,
        turns=3,
        seconds=60,
        smoke=(1,),
        packages=("safetensors", "orbax-checkpoint"),
        note=(
            "Each call starts after `os.sync`, so that it does not pay for another's writes. The bare "
            "package (`safetensors.numpy` saves, `safetensors.flax` loads) overwrites the old file and "
            "does not wait for the disk, so a crash may leave half a file. paramtree writes a new "
            "file, waits (`fsync`) and renames it, which frees the old file's memory as overwriting "
            "does. Orbax renames too."
        ),
    ),
    Case(
        name="files_memory",
        title="The most memory that loading 400 MB takes, over its size",
        sizes=(24, 1000),
        contenders={"paramtree": memory_to_load(our_load), "safetensors": memory_to_load(bare_load)},
        bounds=(Bound("peak", "safetensors", 1.0),),
        unit="x",
        size="arrays",
        rounds=2,
        seconds=20,
        smoke=(1,),
        packages=("safetensors",),
        turns=1,
        note=(
            "The peak growth of a new process's resident memory during the load, after it has loaded a "
            "small file; mapped pages of the file count."
        ),
    ),
]
