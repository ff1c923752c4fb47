"""``pt.peek`` returns the tree of ``pt.load``, with shapes in place of values."""

import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import paramtree as pt
from paramtree.core.tree import flatten
from paramtree.io.wire import is_key
from tests.catalogue import CATALOGUE, leaf, same, siblings, tied, trees
from tests.helpers import x64

GOLD = Path(__file__).parents[1] / "data" / "gluon"

quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def saved(path: Path, tree: Any) -> Path:
    try:
        pt.save(path, tree)
    except pt.NameCollisionError:
        pt.save(path, tree, sep="/")
    return path


def check(path: Path) -> None:
    """Checks that peek agrees with load, and that loading into the peeked tree gives the same."""
    tree, whole = pt.peek(path), pt.load(path)
    assert flatten(tree)[0] is flatten(whole)[0]
    for found, expected in zip(flatten(tree)[1], flatten(whole)[1], strict=True):
        assert isinstance(found, jax.ShapeDtypeStruct)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    again = pt.load(path, like=tree)
    assert [type(a) for a in flatten(again)[1]] == [type(a) for a in flatten(whole)[1]]
    if not any(map(is_key, flatten(whole)[1])):
        assert same(again, whole)


@quiet
@given(tree=trees())
@pytest.mark.parametrize("ending", ["safetensors", "npz", "params"])
def test_peek_is_load_without_values(tmp_path: Path, ending: str, tree: pt.ParamTree) -> None:
    check(saved(tmp_path / f"a.{ending}", tree))


@pytest.mark.parametrize("name", CATALOGUE)
def test_orbax_is_peeked_at_too(tmp_path: Path, name: str) -> None:
    check(saved(tmp_path / "a.orbax", CATALOGUE[name]()))


@pytest.mark.parametrize("ending", ["safetensors", "npz", "orbax"])
def test_dtypes_are_those_of_the_leaves(tmp_path: Path, ending: str) -> None:
    tree = pt.from_tree(
        {
            "f": np.ones(2),
            "i": np.ones(2, np.int64),
            "c": np.ones(2, np.complex128),
            "h": jnp.ones((2, 3), jnp.bfloat16),
            "small": jnp.ones(3, jnp.float8_e4m3fn),
            "nibble": jnp.ones(3, jnp.int4),
            "b": jnp.array(True),
            "none": jnp.ones((0, 3)),
            "key": jax.random.key(0),
            "keys": jax.random.split(jax.random.key(0, impl="rbg"), 2),
        }
    )
    path = saved(tmp_path / f"a.{ending}", tree)
    check(path)
    found = pt.peek(path)
    assert [a.dtype for a in flatten(found)[1]] == [a.dtype for a in flatten(tree)[1]]
    with x64():
        check(path)
        assert found.f.dtype == pt.peek(path).f.dtype == np.float64


@pytest.mark.parametrize("path", sorted(GOLD.glob("*.params")), ids=lambda path: path.name)
def test_the_files_of_mxnet(path: Path) -> None:
    check(path)


@pytest.mark.parametrize("path", sorted(GOLD.glob("*.npz")), ids=lambda path: path.name)
def test_the_files_of_numpy(path: Path) -> None:
    check(path)


def test_an_index_of_several_files(tmp_path: Path) -> None:
    pt.save(tmp_path / "1.safetensors", pt.from_tree({"a": {"w": leaf(1)}}))
    pt.save(tmp_path / "2.safetensors", pt.from_tree({"b": {"w": leaf(2, (2, 3))}}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.w": "1.safetensors", "b.w": "2.safetensors"}}))
    check(index)
    assert pt.peek(index).b.w.shape == (2, 3)


def test_names_become_levels_as_in_load(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"x_y/z": np.ones(2)})
    assert list(pt.peek(tmp_path / "a.npz")) == ["x_y"]
    assert pt.peek(tmp_path / "a.npz", sep="_").x.y.z.shape == (2,)


def test_a_part_can_be_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", tied())
    part = pt.select(pt.peek(path), "block.*")
    assert same(pt.load(path, like=part, ignore_extra=True), pt.select(tied(), "block.*"))


class Counting:
    """Counts the bytes read from opened files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0

        counting = self

        def opened(path: Any, mode: str, *args: Any) -> Any:

            class Raw(io.FileIO):
                def readinto(self, buffer: Any) -> int | None:
                    found = super().readinto(buffer)
                    counting.bytes += found or 0
                    return found

            return io.BufferedReader(Raw(path, mode.replace("b", "")))

        for module in ("opening",):
            monkeypatch.setattr(sys.modules[f"paramtree.io.{module}"], "open", opened, raising=False)
        if hasattr(os, "preadv"):  # which bypasses the file object
            preadv = os.preadv

            def counted(*args: Any) -> int:
                found = preadv(*args)
                counting.bytes += found
                return found

            monkeypatch.setattr(os, "preadv", counted)


@pytest.mark.parametrize("ending", ["safetensors", "npz", "params"])
def test_the_arrays_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    tree = pt.from_tree({f"a{i}": np.zeros(2**18, np.float32) for i in range(4)})
    path = saved(tmp_path / f"a.{ending}", tree)
    counting = Counting(monkeypatch)
    assert pt.count(pt.peek(path)) == 2**20
    assert 0 < counting.bytes < 2**17
    pt.load(path)
    assert counting.bytes > 2**22


def test_no_array_is_read_or_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.orbax", siblings())
    from paramtree.io.formats.orbax import _Checkpoint

    def refuse(*args: Any) -> None:
        raise AssertionError("an array is read")

    monkeypatch.setattr(_Checkpoint, "get", refuse)
    monkeypatch.setattr(_Checkpoint, "prepare", refuse)
    assert pt.count(pt.peek(path)) == pt.count(siblings())
    with pytest.raises(AssertionError, match="an array is read"):
        pt.load(path)


def test_what_would_expand_can_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, w=np.zeros(2**20, np.float32))
    with pytest.raises(pt.LoadError, match="pass the expected shapes as like=, such as its own"):
        pt.load(path)
    assert pt.peek(path).w.shape == (2**20,)
    assert not pt.load(path, like=pt.peek(path)).w.any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"", "is empty"),
        ("a.safetensors", struct.pack("<Q", 9) + b'{"a": 1}}', "damaged"),
        ("a.params", (GOLD / "mlp.params").read_bytes()[:-200], "is truncated"),
        ("a.txt", b"some words", "is neither safetensors"),
    ],
)
def test_a_damaged_file_fails_as_in_load(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    messages = []
    for read in (pt.peek, pt.load):
        with pytest.raises(pt.LoadError, match=message) as caught:
            read(tmp_path / name)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_objects_of_numpy_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(pt.LoadError, match="without pickle"):
        pt.peek(tmp_path / "a.npz")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.npz"):
        pt.peek(tmp_path / "a.npz")
