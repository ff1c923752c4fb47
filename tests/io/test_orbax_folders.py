"""Orbax folders of every layout are read; what pt.save writes is whole, or refused, or damaged aloud."""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paramtree as pt
from paramtree.io import checksums, folders
from paramtree.io.formats import orbax

PARAMS = {"dense": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(3)}}
OPT = ({"mu": {"w": jnp.ones((2, 3))}}, None, [])
NAMES = ["dense/b", "dense/w"]


def names(tree: Any) -> list[str]:
    return list(pt.collect(tree, sep="/"))


def managed(folder: Path, *saves: Any, **options: Any) -> Path:
    """Writes steps 1, 2, ... with Orbax's own manager."""
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step, args in enumerate(saves, 1):
            manager.save(step, args=args)
    return folder


def several() -> Any:
    return ocp.args.Composite(
        params=ocp.args.StandardSave(PARAMS),
        opt=ocp.args.PyTreeSave(OPT),
        data=ocp.args.JsonSave({"position": 7}),
        key=ocp.args.JaxRandomKeySave(jax.random.key(0)),
        ema=ocp.args.ArraySave(jnp.ones(4)),
    )


def test_a_manager_with_several_items(tmp_path: Path) -> None:
    folder = managed(tmp_path / "run", several(), several())
    for path in (folder, folder / "2"):
        tree, report = pt.load(path, report=True)
        assert names(tree) == ["ema", "opt/0/mu/w", *(f"params/{name}" for name in NAMES)]
        assert report.notes == [
            "item 'data' is no tree of arrays and is left out (JsonCheckpointHandler)",
            "item 'key' is no tree of arrays and is left out (JaxRandomKeyCheckpointHandler)",
        ]
        np.testing.assert_array_equal(tree.ema, np.ones(4))
    like = {"params": PARAMS, "opt": OPT}
    found = pt.load(folder, like=like, ignore_extra="ema")
    assert jax.tree.structure(found) == jax.tree.structure(like)
    np.testing.assert_array_equal(found["params"]["dense"]["w"], PARAMS["dense"]["w"])
    assert names(pt.peek(folder)) == names(tree)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    place = NamedSharding(mesh, P("x"))
    shardings = {"params": {"dense": {"w": place, "b": None}}, "opt": jax.tree.map(lambda _: None, OPT)}
    placed = pt.load(folder, like, ignore_extra="ema", shardings=shardings)
    assert placed["params"]["dense"]["w"].sharding == place


def test_an_item_is_read_alone(tmp_path: Path) -> None:
    folder = managed(tmp_path / "run", several())
    assert names(pt.load(folder / "1" / "params", like=PARAMS)) == NAMES
    assert names(pt.load(folder / "1" / "opt")) == ["0/mu/w"]
    assert names(pt.load(folder / "1" / "ema")) == ["array"]
    with pytest.raises(pt.LoadError, match="data: is a folder without a finished Orbax checkpoint"):
        pt.load(folder / "1" / "data")


def test_the_latest_finished_step_is_taken(tmp_path: Path) -> None:
    saves = [ocp.args.StandardSave({"a": jnp.full(2, step)}) for step in range(1, 12)]
    folder = managed(tmp_path / "run", *saves)
    (folder / "12").mkdir()
    (folder / "13.orbax-checkpoint-tmp").mkdir()
    (folder / "14" / "default.orbax-checkpoint-tmp").mkdir(parents=True)
    assert pt.load(folder)["a"][0] == 11  # not 9, by text
    with pytest.raises(pt.LoadError, match="12: is a folder without a finished Orbax checkpoint"):
        pt.load(folder / "12")
    named = managed(tmp_path / "named", *saves[:2], step_prefix="ckpt", step_format_fixed_length=6)
    assert sorted(os.listdir(named)) == ["ckpt_000001", "ckpt_000002"]
    assert pt.load(named)["a"][0] == 2
    managed(named, *saves[:3], step_prefix="eval")
    with pytest.raises(pt.LoadError, match="has the steps of several runs, ckpt_.*: name one of them"):
        pt.load(named)
    assert pt.load(named / "eval_3")["a"][0] == 3
    with pytest.raises(pt.LoadError, match="without a finished Orbax checkpoint.*it has nothing"):
        pt.load(managed(tmp_path / "empty"))


def test_one_tree_has_no_level_of_its_own(tmp_path: Path) -> None:
    items = {"params": PARAMS, "step": 3}  # as MaxText writes them
    folder = managed(tmp_path / "maxtext", ocp.args.Composite(items=ocp.args.PyTreeSave(items)))
    for path in (folder, folder / "1", folder / "1" / "items"):
        found = pt.load(path, like={"params": PARAMS, "step": 0})
        assert found["step"] == 3 and names(pt.load(path)) == [
            "params/dense/b",
            "params/dense/w",
            "step",
        ]
    texts = managed(tmp_path / "texts", ocp.args.Composite(data=ocp.args.JsonSave({"a": 1})))
    with pytest.raises(
        pt.LoadError, match="is an Orbax checkpoint without a tree of arrays: item 'data'"
    ):
        pt.load(texts)


def test_what_is_no_array_is_left_out_with_a_note(tmp_path: Path) -> None:
    ocp.PyTreeCheckpointer().save(
        tmp_path / "a", {"name": "gpt", "w": jnp.ones(2), "n": 2**40, "no": None}
    )
    tree, report = pt.load(tmp_path / "a", report=True)
    assert names(tree) == ["n", "w"] and int(tree["n"]) == 2**40
    assert report.notes == ["'name' is a text, not an array, and is left out"]


# What older versions of Orbax wrote


def without_descriptions(folder: Path) -> Path:
    """Deletes what only newer versions write."""
    for name in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "commit_success.txt"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "array_metadatas", ignore_errors=True)
    return folder


def aggregate(folder: Path, tree: Any) -> None:
    (folder / "checkpoint").write_bytes(ocp.msgpack_utils.msgpack_serialize(tree))


def placeholders() -> Any:
    return {"dense": {"w": "PLACEHOLDER://dense.w", "b": "PLACEHOLDER://dense.b"}}


def one_database(folder: Path) -> None:
    ocp.PyTreeCheckpointer(use_ocdbt=True).save(folder, PARAMS)
    aggregate(without_descriptions(folder), placeholders() | {"step": 3})


def a_folder_for_each_array(folder: Path) -> None:
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(folder, PARAMS)
    without_descriptions(folder)


def with_an_aggregate(folder: Path) -> None:
    a_folder_for_each_array(folder)
    aggregate(folder, placeholders())


def all_in_one_file(folder: Path) -> None:
    folder.mkdir()
    aggregate(folder, jax.tree.map(np.asarray, PARAMS))


def described(folder: Path) -> None:
    ocp.PyTreeCheckpointer(use_ocdbt=True, use_zarr3=True).save(folder, PARAMS)
    (folder / "_CHECKPOINT_METADATA").unlink()
    (folder / "commit_success.txt").unlink(missing_ok=True)


OLD: list[Callable[[Path], None]] = [
    one_database,
    a_folder_for_each_array,
    with_an_aggregate,
    all_in_one_file,
    described,
]


@pytest.mark.parametrize("write", OLD)
@pytest.mark.parametrize("where", [".", "7", "run_7", "7/params"])
def test_older_checkpoints_are_read(tmp_path: Path, write: Callable[[Path], None], where: str) -> None:
    (tmp_path / "run" / where).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / "run" / where)
    found = pt.load(tmp_path / "run", like=PARAMS, ignore_extra=True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert names(pt.peek(tmp_path / "run"))[:2] == NAMES
    if write is one_database:
        assert int(pt.load(tmp_path / "run")["step"]) == 3


@pytest.mark.parametrize("data", [b"\x81\xa1a", b"\x81\xa1a\xc7\x03\x01abc", b"\xdf" + bytes(9)])
def test_an_old_file_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoint").write_bytes(data)
    with pytest.raises(pt.LoadError, match="old: is not an Orbax checkpoint, or is damaged: "):
        pt.load(tmp_path / "old")
    (tmp_path / "old" / "checkpoint").write_text('model_checkpoint_path: "model"')  # TensorFlow's
    with pytest.raises(pt.LoadError, match="is a folder without a finished Orbax checkpoint"):
        pt.load(tmp_path / "old")


# What pt.save and pt.Checkpoints write


def tree() -> pt.ParamTree:
    random = np.random.default_rng(0)
    return pt.from_tree(
        {"a": random.normal(size=(64, 100)), "b": np.arange(99), "none": np.ones((0, 2))}
    )


def written(folder: Path, by: str) -> Path:
    """Writes a checkpoint, and returns the folder of its files."""
    if by == "pt.save":
        pt.save(folder / "a.orbax", tree())
        return folder / "a.orbax" / "0"
    with pt.Checkpoints(folder / "run", best="loss") as checkpoints:
        checkpoints.save(1, tree(), {"loss": 0.5})
    return folder / "run" / "1"


each_writer = pytest.mark.parametrize("by", ["pt.save", "pt.Checkpoints"])


@each_writer
def test_a_flipped_bit_in_any_file_is_noticed_and_named(tmp_path: Path, by: str) -> None:
    folder, rng = written(tmp_path, by), random.Random(0)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) >= 8
    for file in files:
        whole = file.read_bytes()
        for bit in rng.sample(range(8 * len(whole)), 4):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(pt.LoadError, match=file.name):
                pt.load(folder)
        file.write_bytes(whole[:-1])
        with pytest.raises(pt.LoadError, match=file.name):
            pt.load(folder)
        file.unlink()
        with pytest.raises(pt.LoadError, match="is missing, so the checkpoint is not complete"):
            pt.load(folder)
        file.write_bytes(whole)
    assert names(pt.load(folder)) == ["a", "b", "none"]


def test_a_large_file_is_checked_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax, "_LITTLE", 0)
    monkeypatch.setattr(checksums, "_SMALL", 0)
    monkeypatch.setattr(checksums, "_PIECE", 1000)
    folder = written(tmp_path, "pt.save")
    assert names(pt.load(folder)) == ["a", "b", "none"]
    file = max(folder.rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(pt.LoadError, match=f"{file.name}: is damaged: its checksum is not the one"):
        pt.load(folder)
    with pytest.raises(pt.LoadError, match=f"{file.name}: is damaged: its checksum is not the one"):
        pt.load(folder, like={"b": np.arange(99)}, ignore_extra=True)
    assert names(pt.peek(folder)) == ["a", "b", "none"]  # which reads no arrays


@each_writer
def test_checkpoints_without_checksums_are_read(tmp_path: Path, by: str) -> None:
    folder = written(tmp_path, by)
    (folder / checksums.CHECKSUMS).unlink()
    about = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    del about["custom_metadata"]["paramtree_checksums"]  # as earlier versions wrote it
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(about))
    assert names(pt.load(folder.parent)) == ["a", "b", "none"]
    (folder / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(pt.LoadError, match="_CHECKPOINT_METADATA: is damaged"):
        pt.load(folder.parent)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"files":{},"checksum":1}', '{"files":{"../a":[0,[0]]}}', '{"files":{"a":[1e30,[0]]}}',
     '{"files":{"a":[-1,[0]]}}', '{"files":{"a":3}}', '{"files":[]}', "[" * 9999],
)  # fmt: skip
def test_hostile_checksums(tmp_path: Path, content: str) -> None:
    folder = written(tmp_path, "pt.save")
    if content.endswith("}}"):
        text = content[len('{"files":') : -1]
        content = content[:-1] + f',"checksum":{checksums.zlib.crc32(text.encode())}}}'
    (folder / checksums.CHECKSUMS).write_text(content)
    with pytest.raises(pt.LoadError, match="paramtree.checksums.json: is damaged|a: is missing"):
        pt.load(folder)


def test_orbax_reads_the_items_of_checkpoints(tmp_path: Path) -> None:
    written(tmp_path, "pt.Checkpoints")
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        assert list(manager.all_steps()) == [1] and manager.best_step() == 1
        found = manager.restore(1, args=ocp.args.StandardRestore())
    np.testing.assert_array_equal(found["b"], np.arange(99))
    assert names(pt.load(tmp_path / "run" / "1" / "default")) == ["a", "b", "none"]


def test_saving_does_not_delete_checkpoints_of_others(tmp_path: Path) -> None:
    run = managed(tmp_path / "run.orbax", ocp.args.StandardSave(PARAMS))
    written(tmp_path, "pt.Checkpoints").parent.rename(tmp_path / "ours.orbax")
    ocp.PyTreeCheckpointer().save(tmp_path / "one.orbax", PARAMS)
    ocp.PyTreeCheckpointer().save(tmp_path / "steps.orbax" / "3", PARAMS)
    for name in ("run", "ours", "one", "steps"):
        path = tmp_path / f"{name}.orbax"
        before = sorted(path.rglob("*"))
        with pytest.raises(
            pt.ParamTreeError, match=f"{name}.orbax was not written: it has checkpoints that"
        ):
            pt.save(path, tree())
        assert sorted(path.rglob("*")) == before
    assert names(pt.load(run)) == NAMES
    mine = tmp_path / "mine.orbax" / "2024"
    mine.mkdir(parents=True)
    (mine / "photo.png").write_bytes(b"x")
    for _ in range(2):
        pt.save(mine.parent, tree())
    assert (mine / "photo.png").exists() and names(pt.load(mine.parent)) == ["a", "b", "none"]


def test_two_that_save_to_one_path_both_succeed_and_the_last_one_wins(tmp_path: Path) -> None:
    file, errors, start = tmp_path / "a.orbax", [], threading.Barrier(3)

    def save(number: int) -> None:
        try:
            start.wait()
            for _ in range(3):
                pt.save(file, {"a": np.full(1000, number), f"only{number}": np.ones(1)})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if file.exists() and any(name.isdigit() for name in os.listdir(file)):
            found = pt.load(file)  # a reader never meets a part
            assert f"only{int(found['a'][0])}" in found and len(set(np.asarray(found["a"]))) == 1
    for thread in threads:
        thread.join()
    assert errors == []
    assert pt.load(file)["a"].shape == (1000,) and "8" in os.listdir(file)
    pt.save(file, tree())  # deletes what was being read, too
    assert os.listdir(file) == ["9"]


def test_one_that_waits_too_long_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax, "_PATIENCE", 0.1)
    pt.save(tmp_path / "a.orbax", tree())
    lock = orbax.Lock(str(tmp_path / "a.orbax"))
    assert lock.take()
    with pytest.raises(
        pt.ParamTreeError, match=rf"a.orbax was not written: this process \({os.getpid()}\)"
    ):
        pt.save(tmp_path / "a.orbax", tree())
    lock.release()
    pt.save(tmp_path / "a.orbax", tree())
    assert os.listdir(tmp_path / "a.orbax") == ["1"]


def test_a_save_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space left on device")

    pt.save(tmp_path / "a.orbax", {"a": np.ones(2)})
    for where in ("write_checksums", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(folders, where, full)
            for path in ("a.orbax", "new.orbax"):
                with pytest.raises(OSError, match="no space left"):
                    pt.save(tmp_path / path, tree())
        assert os.listdir(tmp_path) == ["a.orbax"]  # also no empty folder
        assert os.listdir(tmp_path / "a.orbax") == ["0"]
    assert pt.load(tmp_path / "a.orbax")["a"][0] == 1
