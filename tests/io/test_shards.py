"""A tree in several files with an index: whole after every kill, and read in three ways."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import paramtree as pt
from paramtree.io import opening
from paramtree.io.formats import FORMATS
from tests.catalogue import CATALOGUE

INDEX = ".index.json"


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def plain() -> pt.ParamTree:
    rng = np.random.default_rng(0)
    return pt.from_tree(
        {f"layer{i}": {"weight": rng.normal(size=(8, 4)), "bias": np.zeros(4)} for i in range(6)}
    )


@pytest.mark.parametrize("most", [1, 300, "1KB", "1GB"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_tree_comes_back_from_file_index_and_folder(tmp_path: Path, name: str, most: Any) -> None:
    tree = CATALOGUE[name]()
    file = tmp_path / "model.safetensors"
    try:
        pt.save(tmp_path / "one.npz", tree)
    except pt.ParamTreeError:
        pytest.skip("it cannot be saved at all")
    (tmp_path / "one.npz").unlink()
    pt.save(file, tree, max_shard_size=most, metadata={"by": "me"})
    index = Path(f"{file}{INDEX}")
    places = [file, tmp_path, *([index] if index.exists() else [])]
    assert index.exists() != file.exists()
    for place in places:
        found, report = pt.load(place, like=tree, report=True)
        assert same(found, tree)
        assert report.metadata == {"format": "pt", "by": "me"} and report.format == "safetensors"
        assert jax.tree.structure(pt.load(place)) == jax.tree.structure(pt.peek(place))


def test_no_file_has_more_than_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    pt.save(file, plain(), max_shard_size=600)
    listed = json.loads(Path(f"{file}{INDEX}").read_text())
    assert listed["metadata"]["total_size"] == pt.nbytes(plain())
    parts = sorted(set(listed["weight_map"].values()))
    assert len(parts) == 3 and all(len(pt.load(tmp_path / part)) for part in parts)
    assert all(pt.nbytes(pt.peek(tmp_path / part)) <= 600 for part in parts)
    from safetensors import safe_open

    with safe_open(tmp_path / parts[0], "np") as opened:  # as transformers demands
        assert opened.metadata() == {"format": "pt"}
    pt.save(file, plain(), max_shard_size=100)  # one array is larger
    assert max(pt.nbytes(pt.peek(p)) for p in tmp_path.glob("*.safetensors")) == 8 * 4 * 8


def test_what_was_saved_before_is_gone(tmp_path: Path) -> None:
    file, first, second = tmp_path / "m.safetensors", plain(), {"w": np.ones(3)}
    pt.save(file, first, max_shard_size=600)
    parts = set(tmp_path.iterdir())
    pt.save(file, first, max_shard_size=300)
    assert not parts & {*tmp_path.glob("*.safetensors")}
    pt.save(file, second)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert np.array_equal(pt.load(file)["w"], second["w"])
    pt.save(file, first, max_shard_size=600)
    assert not file.exists() and same(pt.load(file, like=first), first)
    pt.save(file, second, max_shard_size="1MB")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_files_of_others_stay(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        pt.save(tmp_path / name, {name[6:11]: np.ones(2)})
    listed = {
        "metadata": {"total_size": 32},
        "weight_map": {f"0000{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)},
    }
    (tmp_path / f"model.safetensors{INDEX}").write_text(json.dumps(listed))
    before = sorted(tmp_path.iterdir())
    assert list(pt.load(tmp_path)) == ["00001", "00002"]
    pt.save(tmp_path / "other.safetensors", plain(), max_shard_size=300)
    pt.save(tmp_path / "other.safetensors", {"w": np.ones(2)})
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "other.safetensors"])
    assert list(pt.load(tmp_path)) == ["00001", "00002"]  # a hub calls it model
    pt.save(tmp_path / "model.safetensors", {"w": np.ones(2)})  # a downloaded index is not deleted
    assert {*before} < {*tmp_path.iterdir()}
    with pytest.raises(
        pt.LoadError, match="has several models, model.safetensors, model.safetensors.i"
    ):
        pt.load(tmp_path)


def test_mistakes(tmp_path: Path) -> None:
    for wrong in ("5 bananas", 0, -1, 1.5, "GB", True):
        with pytest.raises(ValueError, match="max_shard_size is a number of bytes, or a text such as"):
            pt.save(tmp_path / "a.safetensors", plain(), max_shard_size=wrong)  # type: ignore[arg-type]
    for form in FORMATS:
        if form.writes and "shards" not in form.keeps:
            with pytest.raises(pt.ParamTreeError, match=f"{form.name} has no shards; safetensors has"):
                pt.save(tmp_path / f"a{form.endings[0]}", plain(), max_shard_size="1KB")
    assert not list(tmp_path.iterdir())
    pt.save(tmp_path / "m.safetensors", plain(), max_shard_size=600)
    part = next(tmp_path.glob("m-*-00002-of-*"))
    part.unlink()
    with pytest.raises(pt.LoadError, match=f"'{part.name}': is in the index, but not next to it"):
        pt.load(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pt.save(tmp_path / "nowhere" / "m.safetensors", plain(), max_shard_size=600)


def test_a_failure_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.safetensors"
    pt.save(file, plain(), max_shard_size=600)
    before = sorted(tmp_path.iterdir())
    from paramtree.io.formats.safetensors import Safetensors

    write, calls = Safetensors.write, []

    def failing(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(Safetensors, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        pt.save(file, {"x": np.ones((50, 50))} | plain().to_dict(), max_shard_size=300)
    assert sorted(tmp_path.iterdir()) == before and same(pt.load(file, like=plain()), plain())


# Kills and two writers

CHILD = """
import os, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
import paramtree as pt
from paramtree.io import opening

def generation(number):
    size = 3 + number % 3
    return {f"a{i}": np.full((size, 4000), number, np.float32) for i in range(size)}

path, number = sys.argv[1], int(sys.argv[2])
pt.save(path, generation(number), max_shard_size="100KB")
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    number += 1
    one = number % 4 == 0
    pt.save(path, generation(number), max_shard_size=None if one else "100KB")
"""


def whole(file: Path) -> int:
    """Returns the number of the model in a file or its shards; fails if it mixes two."""
    tree = pt.load(file)
    number = int(np.asarray(tree["a0"])[0, 0])
    size = 3 + number % 3
    assert list(tree) == [f"a{i}" for i in range(size)]
    for leaf in tree.values():
        assert np.array_equal(np.asarray(leaf), np.full((size, 4000), number, np.float32))
    return number


def start(file: Path, number: int, count: int) -> Any:
    command = [sys.executable, "-c", CHILD, str(file), str(number), str(count)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_a_single_file_clears_the_shards_of_a_save_that_was_killed(tmp_path: Path) -> None:
    file, copy = tmp_path / "m.safetensors", tmp_path / "copy.safetensors.index.json"
    shard = "m-0123abcd-0000{}-of-00002.safetensors"
    for i in (1, 2):
        (tmp_path / shard.format(i)).write_bytes(b"part")
    copy.write_text(json.dumps({"weight_map": {"w": shard.format(2)}}))
    pt.save(file, {"w": np.ones(2)})
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {file.name, copy.name, shard.format(2)}


@pytest.mark.slow
def test_a_hundred_kills_leave_a_whole_model_every_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    rng, file, last, seen = random.Random(0), tmp_path / "m.safetensors", 0, set()
    fork = CHILD.replace("for _ in range(int(sys.argv[3])):", "while True:")
    script = f"""
import os, sys
sys.argv = ["", {str(file)!r}, "0", "0"]
exec({CHILD!r})
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.argv[2] = line.strip()
        exec({fork!r})
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""
    pipe = subprocess.PIPE
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=pipe, stdout=pipe, cwd=root, text=True
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        for kill in range(500):  # on a busy machine, few of a hundred saves are finished
            if kill >= 100 and last > 10 and len(seen) > 1:
                break
            print(last + 1, file=process.stdin, flush=True)
            child = next(line for line in process.stdout if line.strip().isdigit())
            time.sleep(rng.uniform(0, 0.06))
            os.kill(int(child), signal.SIGKILL)
            next(line for line in process.stdout if line == "dead\n")
            number = whole(file)
            assert number >= last
            seen.add((number > last, len(list(tmp_path.iterdir())) > 1))
            last = number
        process.stdin.close()
    assert last > 10 and len(seen) > 1
    pt.save(file, {"w": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["m.safetensors"]


@pytest.mark.slow
def test_two_writers_leave_a_whole_model_at_every_moment(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    file = tmp_path / "m.safetensors"
    writers = [start(file, 1000 * i, 25) for i in (1, 2)]
    numbers = set()
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        while any(writer.poll() is None for writer in writers):
            numbers.add(whole(file))
        assert [writer.wait() for writer in writers] == [0, 0]
    assert whole(file) in (1025, 2025) and len(numbers) > 5


def test_shards_saved_while_one_file_is_saved_are_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramtree.io.formats.safetensors import Safetensors

    file, newer = tmp_path / "m.safetensors", {"w": np.arange(1000.0)}
    pt.save(file, plain(), max_shard_size=600)
    write = Safetensors.write

    def overtaken(self: Any, *args: Any) -> None:
        write(self, *args)
        monkeypatch.undo()
        pt.save(file, newer | {"v": np.ones(3)}, max_shard_size=600)  # as another process

    monkeypatch.setattr(Safetensors, "write", overtaken)
    pt.save(file, plain())
    assert np.array_equal(pt.load(file)["w"], newer["w"])


@pytest.mark.parametrize("look", [1, 2])
def test_an_index_that_goes_while_it_is_read_leads_to_the_newer_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    file, looks = tmp_path / "m.safetensors", []
    read = opening._index

    def overtaken(path: str) -> Any:
        looks.append(path)
        if len(looks) == look:
            pt.save(file, plain())  # as another process, which deletes the index
        found = read(path)
        if len(looks) == 1:
            pt.save(file, {"w": np.ones(999)}, max_shard_size=600)  # which deletes the shards
            pt.save(file, {"w": np.ones(999), "v": np.ones(3)}, max_shard_size=600)
        return found

    monkeypatch.setattr(opening, "_index", overtaken)
    for place in (file, tmp_path, Path(f"{file}.index.json")):
        pt.save(file, {"w": np.ones(1000), "v": np.ones(3)}, max_shard_size=600)
        looks.clear()
        if place.name.endswith(".json"):
            with pytest.raises(FileNotFoundError, match="index.json"):
                pt.load(place)
        else:
            assert same(pt.load(place, like=plain()), plain())
        assert len(looks) >= look


def test_a_missing_file_whose_index_would_have_too_long_a_name_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file"):
        pt.load(tmp_path / f"{'a' * 240}.npz")


def test_a_link_in_a_folder_that_leads_nowhere_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "1")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        pt.load(tmp_path)


def test_a_model_saved_as_one_file_between_two_looks_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pt.save(tmp_path / "m.safetensors", plain())
    look, looks = opening._open_file, []

    def late(*args: Any) -> Any:
        looks.append(args)
        if len(looks) == 1:
            raise FileNotFoundError  # it was an index and its shards a moment ago
        return look(*args)

    monkeypatch.setattr(opening, "_open_file", late)
    assert same(pt.load(tmp_path / "m.safetensors", like=plain()), plain()) and len(looks) == 2
