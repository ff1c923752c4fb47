"""Saving and loading 400 MB, in a few arrays and in many: the time, and the most memory."""

import atexit
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.suite.case import Bound, Case, Measured
from benchmarks.suite.cases.init import peak

BYTES, SMALL = 400 * 2**20, 2**16
FSYNC = "safetensors and fsync"
_SWEEP = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


def folder() -> Path:
    """Returns a temporary folder that is deleted when this process ends, also if it is killed."""
    path = tempfile.mkdtemp()
    # Ends when its standard input does, which is when this process has ended.
    sweep = subprocess.Popen(
        [sys.executable, "-c", _SWEEP, path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    atexit.register(lambda: (sweep.communicate(), None))
    return Path(path)


def arrays(count: int) -> dict[str, Any]:
    """Returns so many arrays, which together have 400 MB."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    size = (BYTES if count > 1 else SMALL) // 4 // count
    made = {f"layer{i}.weight": jax.device_put(rng.random(size, np.float32)) for i in range(count)}
    jax.block_until_ready(made)
    return made


def measured(call: Callable[[], Any], before: Callable[[], Any] = os.sync) -> Measured:
    """Returns what waits for the disk, and then times a call."""

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
    """Returns the contender that loads once, a file that another process has written."""

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
        with peak() as found:
            made = jax.block_until_ready(call(path))
        del made
        return {"peak": found[0] / size}

    return contender


def our_load() -> Callable[[Path], Any]:
    import paramtree as pt

    return pt.load


def bare_load() -> Callable[[Path], Any]:
    import safetensors.flax

    return safetensors.flax.load_file


CASES = [
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
            Bound("save", "safetensors", 1.1, why=f"{FSYNC} is the floor of a save that lasts"),
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
            "The disk is waited for before each call (`os.sync`), so that none writes what another "
            "left. The bare package (`safetensors.numpy` saves, `safetensors.flax` loads) writes over "
            "the old file and does not wait for the disk, so a crash may leave half a file. paramtree "
            "writes beside it, waits (`fsync`) and renames, which sets the memory of the old file "
            "free as writing over it does. Orbax renames too."
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
            "How much the resident memory of a new process grew at most while it loaded, after it had "
            "loaded a small file; parts of a file that are mapped count."
        ),
    ),
]
