"""Checkpoints and Orbax folders whose writer is killed: one whole checkpoint every time."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import paramtree as pt
from tests.io.test_killed_saves import generation, whole_generation

pytestmark = pytest.mark.slow

pytest.importorskip("fcntl")  # without it leftovers are not cleaned up

SIZE = 2**16

# A process that has imported everything and forks for each writer, as importing takes longer than saving.
# It starts jax only after the fork, since its threads do not survive one.
CHILD = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
import orbax.checkpoint
import paramtree as pt
pt.Checkpoints
from tests.io.test_killed_saves import generation
def save_path(path, number):
    while True:
        pt.save(path, generation(number, {SIZE}))
        number += 1
def save_steps(path, number):
    checkpoints = pt.Checkpoints(path, keep=2, best="loss")
    while True:
        for step in range(number, number + 3):
            checkpoints.save(step, generation(step, {SIZE}), {{"loss": step % 5}})
        checkpoints.save(step, generation(step, {SIZE}), {{"loss": step % 5}}, overwrite=True)
        number += 3
print("ready", flush=True)
for line in sys.stdin:
    path, number = line.split()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Orbax says that what was killed is deleted
        pt.save(path + ".warm/a.orbax", generation(0, 2))
        os.write(1, b"begun\\n")
        (save_path if path.endswith(".orbax") else save_steps)(path, int(number))
    print(child, flush=True)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


@contextlib.contextmanager
def forker() -> Iterator[Callable[[Path, int, float], None]]:
    """Yields a function that lets a process write to a path, and kills it after some time."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        stdin=pipe,
        stdout=pipe,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        asked, answers = process.stdin, process.stdout
        assert answers.readline() == "ready\n"

        def save_until_killed(path: Path, number: int, seconds: float) -> None:
            print(path, number, file=asked, flush=True)
            lines = {answers.readline(), answers.readline()}  # in any order
            child = int((lines - {"begun\n"}).pop())
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            assert answers.readline() == "dead\n"

        yield save_until_killed
        asked.close()


MOST = 500  # kills: on a busy machine, few of a hundred saves get far


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_a_hundred_killed_saves_leave_a_whole_folder_every_time(tmp_path: Path) -> None:
    rng, file, number, interrupted = random.Random(0), tmp_path / "a.orbax", 1, 0
    pt.save(file, generation(number, SIZE))
    with forker() as save_until_killed:
        for kill in range(MOST):
            if kill >= 100 and interrupted >= 10 and number >= 10:
                break
            save_until_killed(file, number + 1, rng.uniform(0, 0.15))
            found = whole_generation(file, SIZE)
            assert found >= number
            number = found
            interrupted += any("saving" in name for name in hidden(file))
    assert interrupted >= 10 and number >= 10
    pt.save(file, generation(number + 1, SIZE))
    assert hidden(file) == [] and len(os.listdir(file)) == 1
    print(f"{interrupted} of {kill} kills met a save under way; {number} saves were finished")


def test_a_hundred_killed_runs_leave_whole_checkpoints_every_time(tmp_path: Path) -> None:
    rng, folder, last, interrupted = random.Random(1), tmp_path / "run", 0, 0
    with forker() as save_until_killed:
        for kill in range(MOST):
            if kill >= 100 and interrupted >= 10 and last >= 10:
                break
            save_until_killed(folder, last + 1, rng.uniform(0, 0.6))
            reader = pt.Checkpoints(folder, best="loss")
            steps = reader.steps
            assert steps == sorted(steps) and max(steps, default=0) >= last
            for step in steps:
                assert whole_generation_of(reader.load(step=step)) == step
            assert not steps or reader.best in steps
            last = max(steps, default=0)
            interrupted += any("saving" in name for name in hidden(folder))
    assert interrupted >= 10 and last >= 10
    with pt.Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(last + 1, {"a": np.ones(2)})
    assert hidden(folder) == [] and os.listdir(folder) == [str(last + 1)]
    print(f"{interrupted} of {kill} kills met a save under way; {last} steps were finished")


def whole_generation_of(tree: pt.ParamTree) -> int:
    """Returns the number of a tree; fails if it mixes two."""
    number = int(np.asarray(next(iter(tree.values())))[0, 0])
    expected = generation(number, SIZE)
    assert list(tree) == list(expected)
    assert all(np.array_equal(np.asarray(tree[name]), values) for name, values in expected.items())
    return number
