"""Saves that are killed, fail or run concurrently leave one complete file, and nothing else."""

import contextlib
import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paramtree as pt

pytestmark = pytest.mark.slow

pytest.importorskip("fcntl")  # without it leftovers are not cleaned up

FORMATS = ("safetensors", "npz", "params")
each_format = pytest.mark.parametrize("kind", FORMATS)

MIB = 2**18  # of float32


def generation(number: int, size: int = MIB) -> pt.ParamTree:
    """Returns a tree filled with a number, with names and shapes that depend on its parity."""
    names = {"embed": 2, "head": 1, "bias": 1} if number % 2 else {"first": 1, "last": 2}
    return pt.from_tree({k: np.full((count, size), number, np.float32) for k, count in names.items()})


def whole_generation(file: Path, size: int = MIB) -> int:
    """Returns the number of the tree in a file; fails if the file mixes two trees."""
    tree = pt.load(file)
    number = int(np.asarray(next(iter(tree.values())))[0, 0])
    expected = generation(number, size)
    assert list(tree) == list(expected)
    for name, values in expected.items():
        assert np.array_equal(np.asarray(tree[name]), values)
    return number


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


# A process that has imported paramtree and forks for each save, as importing takes longer than saving.
# It saves only numpy arrays, since jax's threads do not survive a fork.
CHILD = """
import os, sys, warnings
warnings.simplefilter("ignore")
import paramtree as pt
from tests.io.test_killed_saves import generation
for path in sys.argv[1:]:
    pt.save(path, generation(1))
print("ready", flush=True)
for line in sys.stdin:
    path, number = line.split()
    child = os.fork()
    if not child:
        number = int(number)
        while True:
            pt.save(path, generation(number))
            number += 1
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@contextlib.contextmanager
def forker(*files: Path) -> Iterator[Any]:
    """Saves to files, and yields a function that saves to one and kills the save after some time."""
    root, pipe = Path(__file__).parents[2], subprocess.PIPE
    command = [sys.executable, "-c", CHILD, *map(str, files)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=root, text=True) as process:
        assert process.stdin and process.stdout
        asked, answers = process.stdin, process.stdout
        assert answers.readline() == "ready\n"

        def save_until_killed(file: Path, number: int, seconds: float) -> None:
            print(file, number, file=asked, flush=True)
            child = int(answers.readline())
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            assert answers.readline() == "dead\n"

        yield save_until_killed
        asked.close()


def test_a_hundred_killed_saves_leave_a_whole_file_every_time(tmp_path: Path) -> None:
    rng = random.Random(0)
    files = {kind: tmp_path / kind / f"model.{kind}" for kind in FORMATS}
    numbers = dict.fromkeys(FORMATS, 1)
    for file in files.values():
        file.parent.mkdir()
    interrupted = dict.fromkeys(FORMATS, 0)
    with forker(*files.values()) as save_until_killed:
        for i in range(102):
            kind = FORMATS[i % 3]
            file = files[kind]
            save_until_killed(file, numbers[kind] + 1, rng.uniform(0, 0.03))
            number = whole_generation(file)
            assert number >= numbers[kind]
            numbers[kind] = number
            left = leftovers(file.parent)
            assert len(left) <= 1  # the previous one was deleted, or the save had not begun
            assert all(name.startswith(f".{file.name}.unfinished-") for name in left)
            interrupted[kind] += len(left)
    assert sum(interrupted.values()) >= 10  # otherwise no save was killed while writing
    assert sum(numbers.values()) >= 10  # otherwise every save was killed before writing
    for kind, file in files.items():
        pt.save(file, generation(numbers[kind]))
        assert os.listdir(file.parent) == [file.name]


# Leftovers


# Saves to each path in turn, and kills itself just before the rename.
KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import paramtree as pt
from tests.io.test_killed_saves import generation
os.replace = lambda new, path: os.kill(os.getpid(), signal.SIGKILL)
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        pt.save(path, generation(1, 2))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_leftovers_of_the_dead_are_cleaned_away_and_nothing_else(tmp_path: Path) -> None:
    files = [tmp_path / kind / f"model.{kind}" for kind in FORMATS]
    for file in files:
        file.parent.mkdir()
    command = [sys.executable, "-c", KILLED, *map(str, files), *map(str, files)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    for file in files:
        (dead,) = leftovers(file.parent)  # the second save deleted the leftovers of the first
        others = [f".{file.name}", f"other{file.suffix}", dead.replace("model", "other")]
        for other in others:
            file.with_name(other).touch()
        assert not file.exists()
        pt.save(file, generation(2, 2))
        assert sorted(os.listdir(file.parent)) == sorted([file.name, *others])
        assert whole_generation(file, 2) == 2


@each_format
def test_a_save_that_is_under_way_is_left_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"model.{kind}"
    replace, errors = os.replace, []
    there, go_on = threading.Event(), threading.Event()

    def slow_replace(new: str, path: str) -> None:
        if threading.current_thread() is slow:
            there.set()
            go_on.wait(20)
        replace(new, path)

    def save() -> None:
        try:
            pt.save(file, generation(1, 2))
        except BaseException as error:
            errors.append(error)
            there.set()

    monkeypatch.setattr(os, "replace", slow_replace)
    slow = threading.Thread(target=save)
    slow.start()
    there.wait(20)
    for number in (2, 3):
        pt.save(file, generation(number, 2))
        assert whole_generation(file, 2) == number
        assert len(leftovers(tmp_path)) == 1
    go_on.set()
    slow.join()
    assert errors == []
    assert whole_generation(file, 2) == 1
    assert os.listdir(tmp_path) == [file.name]


def failing(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "no space left on device")


@each_format
@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"model.{kind}"
    pt.save(file, generation(1, 2))
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing)
        with pytest.raises(OSError, match="no space left"):
            pt.save(file, generation(2, 2))
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]
    pt.save(file, generation(2, 2))
    assert whole_generation(file, 2) == 2


@each_format
def test_a_save_that_is_interrupted_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    file = tmp_path / f"model.{kind}"
    pt.save(file, generation(1, 2))
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pt.save(file, generation(2, 2))
    assert whole_generation(file, 2) == 1
    assert os.listdir(tmp_path) == [file.name]


@each_format
def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(tmp_path: Path, kind: str) -> None:
    import resource

    file = tmp_path / f"model.{kind}"
    pt.save(file, generation(1, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # fails like a full disk
    try:
        with pytest.raises(OSError, match="(?i)too large"):
            pt.save(file, generation(2, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert whole_generation(file, 2) == 1
    assert os.listdir(tmp_path) == [file.name]


@each_format
def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"model.{kind}"
    calls: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def seen_replace(new: str, path: str) -> None:
        calls.append(("replace", os.stat(new).st_ino))
        assert whole_generation(Path(new), 2) == 1
        replace(new, path)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    pt.save(file, generation(1, 2))
    made = file.stat().st_ino
    assert calls[-3:] == [("fsync", made), ("replace", made), ("fsync", tmp_path.stat().st_ino)]


# Where the file goes


@each_format
def test_a_missing_folder_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pt.save(tmp_path / "nowhere" / f"model.{kind}", generation(1, 2))
    assert os.listdir(tmp_path) == []


@each_format
def test_a_folder_in_the_place_of_the_file_stays(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"model.{kind}"
    folder.mkdir()
    with pytest.raises(OSError, match=f"model.{kind}"):
        pt.save(folder, generation(1, 2))
    assert list(tmp_path.iterdir()) == [folder]
    assert folder.is_dir()


@each_format
def test_the_mode_is_that_of_the_old_file_or_what_the_umask_leaves(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"model.{kind}"
    before = os.umask(0o027)
    try:
        pt.save(file, generation(1, 2))
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        file.chmod(0o604)
        pt.save(file, generation(2, 2))
        assert stat.S_IMODE(file.stat().st_mode) == 0o604
    finally:
        os.umask(before)
    assert whole_generation(file, 2) == 2


@each_format
def test_a_link_stays_a_link(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / f"step1.{kind}", tmp_path / f"latest.{kind}"
    link.symlink_to(Path("elsewhere") / target.name)
    for number in (1, 2):  # the link dangles at first
        pt.save(link, generation(number, 2))
        assert link.is_symlink()
        assert not target.is_symlink()
        assert whole_generation(target, 2) == whole_generation(link, 2) == number
    assert os.listdir(target.parent) == [target.name]
    assert sorted(os.listdir(tmp_path)) == sorted(["elsewhere", link.name])


@each_format
def test_other_hard_links_keep_the_old_file(tmp_path: Path, kind: str) -> None:
    file, kept = tmp_path / f"model.{kind}", tmp_path / f"kept.{kind}"
    pt.save(file, generation(1, 2))
    kept.hardlink_to(file)
    pt.save(file, generation(2, 2))
    assert (whole_generation(kept, 2), whole_generation(file, 2)) == (1, 2)


@each_format
def test_a_path_may_be_relative_or_long(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "x" * (254 - len(kind)) + f".{kind}"  # the longest name allowed
    for path in (f"model.{kind}", name):
        pt.save(path, generation(1, 2))
        assert whole_generation(Path(path), 2) == 1
    assert len(os.listdir(tmp_path)) == 2


# Concurrent saves


@each_format
def test_saves_at_the_same_time_leave_one_whole_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"model.{kind}"
    pt.save(file, generation(1, 1000))
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def save(first: int) -> None:
        try:
            start.wait()
            for i in range(25):
                pt.save(file, generation(first + 2 * i, 1000))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(first,)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert whole_generation(file, 1000) in (49, 50)
    assert os.listdir(tmp_path) == [file.name]


@each_format
def test_a_file_that_is_replaced_while_it_is_loaded_is_the_old_or_the_new_one(
    tmp_path: Path, kind: str
) -> None:
    file = tmp_path / f"model.{kind}"
    pt.save(file, generation(2, 1000))
    stop = threading.Event()

    def save() -> None:
        number = 4
        while not stop.is_set():
            pt.save(file, generation(number, 1000))  # with equal names, so only the values differ
            number += 2

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(100):
            values = {float(v) for leaf in pt.load(file).values() for v in np.unique(np.asarray(leaf))}
            assert len(values) == 1
    finally:
        stop.set()
        thread.join()
