"""Flax's msgpack files: what ``flax.serialization`` writes is read bit for bit, and nothing else is."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen
from flax import traverse_util as flat_dicts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import paramtree as pt
from paramtree.command import main
from tests.helpers import x64
from tests.io import fuzz_files as fuzz
from tests.io.fuzz_files import Raw, extension, flax_array, flax_chunked, flax_leaf, msgpack
from tests.io.test_peek import Counting

quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def written(path: Path, tree: Any) -> Path:
    path.write_bytes(flax.serialization.to_bytes(tree))
    return path


def bits(array: Any) -> tuple[Any, ...]:
    array = np.asarray(array)
    return array.shape, array.dtype, array.tobytes()


def nested() -> dict[str, Any]:
    return {
        "params": {
            "dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)},
            "embed": {"w": np.arange(4, dtype=np.int8), "scale": np.float16(2.5)},
        },
        "mask": np.array([[True, False], [False, True]]),
        "none": np.zeros((0, 3)),
        "zero": np.array(7, np.uint32),
        "wave": np.array([1 + 2j, 3], np.complex64),
        "wide": np.array([1, -(2**60)]),
        "small": jnp.arange(4).astype(jnp.float8_e4m3fn),
    }


def test_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = written(tmp_path / "model.msgpack", nested())
    found, report = pt.load(path, report=True)
    assert report.format == "flax"
    wanted = flat_dicts.flatten_dict(nested(), sep="/")
    assert {name.replace("/", "_") for name in wanted} == set(pt.collect(found))
    for name, value in wanted.items():
        assert bits(found[name]) == bits(value)
    assert isinstance(found.params.dense.kernel, jax.Array)


def test_they_load_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "model.msgpack", nested())
    like = jax.tree.map(jnp.zeros_like, nested()["params"])
    found = pt.load(path, like={"params": like}, ignore_extra=True)
    assert jax.tree.structure(found) == jax.tree.structure({"params": like})
    assert bits(found["params"]["dense"]["bias"]) == bits(nested()["params"]["dense"]["bias"])
    part = pt.load(path, like=like, rename=[("params/", "")], ignore_extra=True)
    assert bits(part["embed"]["w"]) == bits(nested()["params"]["embed"]["w"])
    with pytest.raises(pt.LoadError, match=r"`params_head_w` is missing"):
        pt.load(path, like={"params": {"head": {"w": jnp.ones(2)}}}, ignore_extra=True)


def test_a_model_of_flax_and_its_statistics(tmp_path: Path) -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(11):
                x = linen.BatchNorm(use_running_average=True)(linen.Dense(3)(x))
            return x

    variables = jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 3)))
    path = written(tmp_path / "flax_model.msgpack", variables)
    found = pt.load(path)
    assert list(found.params)[-3:] == ["Dense_8", "Dense_9", "Dense_10"]  # jax sorted them as texts
    assert pt.count(found, kind="state") == 11 * 2 * 3
    assert set(pt.collect(found, kind="state")) == set(pt.collect(found, "batch_stats/.*"))
    back = pt.load(tmp_path, like=variables)  # a folder as of a hub
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        assert bits(a) == bits(b)


def test_the_order_of_a_file_that_is_not_sorted_stays(tmp_path: Path) -> None:
    tree = {"stem": np.ones(1), "body": {"10": np.ones(1), "9": np.ones(1)}, "head": np.ones(1)}
    assert list(pt.load(written(tmp_path / "a.msgpack", tree))) == ["stem", "body", "head"]
    lists = {"a": [np.full(1, i) for i in range(12)], "b": {"x_10": np.ones(1), "x_9": np.ones(1)}}
    found = pt.load(written(tmp_path / "a.msgpack", lists))
    assert list(found.a) == [str(i) for i in range(12)]
    assert list(found.b) == ["x_9", "x_10"]


def test_numbers_texts_and_nothing(tmp_path: Path) -> None:
    tree = {"n": 3, "m": -200, "big": 2**64 - 1, "f": 0.5, "b": True, "c": 1 - 2j, "none": None}
    tree |= {"about": {"name": "läyer"}, "list": [1, (2.0, np.float32(3))], "level": {}}
    path = written(tmp_path / "a.msgpack", tree)
    found, report = pt.load(path, report=True)
    assert report.metadata == {"about/name": "läyer"}
    assert {name: (a.dtype.name, a.shape) for name, a in pt.collect(found).items()} == {
        "n": ("int64", ()),
        "m": ("int64", ()),
        "big": ("uint64", ()),
        "f": ("float64", ()),
        "b": ("bool", ()),
        "c": ("complex128", ()),
        "list_0": ("int64", ()),
        "list_1_0": ("float64", ()),
        "list_1_1": ("float32", ()),
    }
    for name in ("n", "m", "big", "f", "b", "c"):
        assert np.asarray(found[name]).item() == tree[name]
    assert pt.load(path, like={"n": 0, "f": 0.0}, ignore_extra=True) == {"n": 3, "f": 0.5}


def test_keys_with_slashes_are_levels(tmp_path: Path) -> None:
    path = written(tmp_path / "a.msgpack", {"a/b": np.ones(1), "a": {"c.d": np.ones(2)}})
    assert list(pt.collect(pt.load(path))) == ["a_b", "a_c_d"]
    assert list(pt.load(path, sep="/").a) == ["b", "c.d"]
    path = written(tmp_path / "a.msgpack", {"a/b": np.ones(1), "a": {"b": np.ones(2)}})
    with pytest.raises(pt.LoadError, match="'a/b': appears twice"):
        pt.load(path)


CHUNKED = np.arange(60, dtype=np.float32).reshape(5, 4, 3)


@pytest.mark.parametrize("size", [1, 4, 24, 50, 100, 236])
def test_large_arrays_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", size)
    half, flags = jnp.arange(150).astype(jnp.bfloat16), np.arange(300) % 3 == 0
    tree = {"w": CHUNKED, "half": half, "flags": flags, "small": np.float32(1)}
    path = written(tmp_path / "a.msgpack", tree)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    found = pt.load(path)
    for name, value in tree.items():
        assert bits(found[name]) == bits(value)
    assert pt.peek(path).w.shape == (5, 4, 3)


@pytest.mark.parametrize("size", [1, 8, 100, 1000])
@pytest.mark.parametrize("spec", [("d",), (None, "d"), ("d", "e"), (None, None, "d"), ()])
def test_slices_alone_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, spec: tuple[str | None, ...]
) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", size)
    monkeypatch.setattr("paramtree.io.pieces._BLOCK", 32)
    value = np.arange(96, dtype=np.int32).reshape(4, 4, 6)
    path = written(tmp_path / "a.msgpack", {"w": value, "one": np.ones((), np.float32)})
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("d", "e"))
    shardings = {"w": NamedSharding(mesh, PartitionSpec(*spec)), "one": None}
    found = pt.load(path, like={"w": value, "one": np.float32(0)}, shardings=shardings)["w"]
    assert found.sharding == shardings["w"]
    np.testing.assert_array_equal(found, value)


def test_listing_reads_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 2**19)
    tree = {f"a{i}": {"w": np.zeros(2**18, np.float32)} for i in range(4)}
    path = written(tmp_path / "a.msgpack", tree)
    counting = Counting(monkeypatch)
    assert pt.count(pt.peek(path)) == 2**20
    assert 0 < counting.bytes < 2**17
    pt.load(path)
    assert counting.bytes > 2**22


def test_the_command_lists_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.msgpack", nested())
    assert main([str(path), "--match", "params/dense/.*"]) == 0
    assert "kernel  (2, 3)  float32" in capsys.readouterr().out
    assert main([str(path), "--convert", str(tmp_path / "a.safetensors")]) == 0
    converted = pt.load(tmp_path / "a.safetensors")
    for name, value in pt.collect(pt.load(path), sep="/").items():
        assert bits(converted[name]) == bits(value)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    """As Hugging Face's ``save_pretrained`` splits Flax models, with names joined by "/"."""
    parts = {
        "flax_model-1.msgpack": {"a": {"w": np.ones(2)}},
        "flax_model-2.msgpack": {"b": {"w": np.ones(3)}},
    }
    for part, tree in parts.items():
        written(tmp_path / part, tree)
    listed = {f"{name}/w": part for part, tree in parts.items() for name in tree}
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": listed}))
    assert {name: a.shape for name, a in pt.collect(pt.load(index)).items()} == {
        "a_w": (2,),
        "b_w": (3,),
    }


def test_flax_files_are_only_read(tmp_path: Path) -> None:
    message = r"a\.msgpack was not written: \.msgpack is another library's format.* \.safetensors"
    with pytest.raises(pt.ParamTreeError, match=message):
        pt.save(tmp_path / "a.msgpack", {"a": np.ones(2)})


# Any tree

DTYPES = [
    *"?bBhHiIqQefdFD",
    *(getattr(ml_dtypes, name) for name in ("bfloat16", "float8_e5m2", "int4")),
]


@st.composite
def leaves(draw: st.DrawFn) -> Any:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3
    array = values.astype(dtype)
    return draw(st.sampled_from([array, np.asfortranarray(array), array[()] if not shape else array]))


KEYS = st.text("ab_1é", min_size=1, max_size=3)
TREES = st.recursive(
    leaves() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.booleans(),
    lambda below: st.dictionaries(KEYS, below, max_size=3) | st.lists(below, max_size=3),
    max_leaves=8,
)


@quiet
@given(tree=st.dictionaries(KEYS, TREES, max_size=4), size=st.sampled_from([4, 9, 2**30]))
def test_what_flax_restores_is_what_is_loaded(tmp_path: Path, tree: dict[str, Any], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", size)
        path = written(tmp_path / "a.msgpack", tree)
    restored = flat_dicts.flatten_dict(flax.serialization.msgpack_restore(path.read_bytes()), sep="/")
    with x64():
        found = pt.collect(pt.load(path, sep=""), sep="/")
    assert set(found) == set(restored)
    for name, value in restored.items():
        assert bits(found[name]) == bits(value)
    shapes = pt.collect(pt.peek(path, sep=""), sep="/")
    assert {name: (a.shape, a.dtype) for name, a in shapes.items()} == {
        name: bits(value)[:2] for name, value in restored.items()
    }


# Other files

ODD = msgpack({"b": flax_leaf(np.ones(2, "f"))})


@pytest.mark.parametrize(
    ("name", "content", "flax_file"),
    [
        ("a.dat", ODD, True),
        ("a.dat", b"\x81\xa1b" + flax_leaf(np.ones(2, "f")), True),
        ("a.dat", b"\x80", True),
        ("a.dat", b"\xdf\0\0\0\1" + msgpack(5) + flax_leaf(np.ones(2)), False),
        ("a.msgpack", b"\xdf\0\0\0\1" + msgpack(5) + flax_leaf(np.ones(2)), True),
        ("a.msgpack", b"\x93\1\2\3", False),
        ("a.dat", pickle.dumps({"a": 1}), False),
        ("a.dat", b"\x89PNG\r\n\x1a\n" + bytes(99), False),
        ("a.dat", b"\x81\xa3\xff\xfe\xfd" + bytes(9), False),
        ("a.dat", b"\x81", False),
        ("a.dat", b"\x81\xdb", False),
    ],
)
def test_what_is_taken_for_flax(tmp_path: Path, name: str, content: bytes, flax_file: bool) -> None:
    from paramtree.io.formats.flax import FORMAT

    assert FORMAT.recognises(str(tmp_path / name), content[:512]) == flax_file
    (tmp_path / name).write_bytes(content)
    if flax_file:
        assert pt.load(tmp_path / name, report=True)[1].format == "flax"


def at(value: Any) -> Raw:
    return msgpack({"a": value})


whole, one = np.arange(6, dtype=np.int16), flax_leaf(np.ones(2, "f"))
pieces = flax_chunked(whole, 4)
# fmt: off
DAMAGED: dict[str, tuple[bytes, str]] = {
    "no map": (b"\xdf", "the root: is truncated: needs 4 bytes, but 0 are left"),
    "fewer entries": (msgpack({"a": one, "b": one})[:-len(one) - 6], "'a': is truncated"),
    "more after the end": (at(one) + b"!", "at byte .*: 1 bytes follow the end"),
    "a number as a dtype": (at(flax_array((2,), 3, bytes(8))), "'a': is damaged: expected a dtype, found a number"),
    "another dtype": (at(flax_array((2,), "object", bytes(16))), "'a': has dtype 'object': only numbers and booleans"),
    "a key of PRNG": (at(flax_array((2,), "key<fry>", bytes(8))), "'a': has dtype 'key<fry>': only numbers"),
    "a shape for other bytes": (at(flax_array((3,), "float32", bytes(8))), r"'a': has 8 bytes; its shape \(3,\) needs 12"),
    "a negative axis": (at(flax_array((-2,), "float32", bytes(8))), "'a': no array can have shape"),
    "a shape of floats": (at(flax_array((2.0,), "float32", bytes(8))), "'a': has an axis of length 2.0"),
    "a shape of flags": (at(flax_array((True,), "float32", bytes(4))), "'a': has an axis of length True"),
    "no shape": (at(flax_array(None, "float32", bytes(8))), "'a': is damaged: expected a shape, found a nothing"),
    "too many axes": (at(flax_array((1,) * 33, "float32", bytes(4))), "'a': has 33 axes"),
    "no bytes": (at(flax_array((2,), "float32", "12345678")), "'a': is damaged: expected the bytes of an array, found a text"),
    "an array of two parts": (at(extension(1, msgpack(((2,), "float32")))), "'a': is damaged: an array is its shape, its dtype"),
    "an array that is too long": (at(extension(1, msgpack(((2,), "float32", bytes(8))) + b"!")), "'a': is damaged: it is not as long"),
    "half a complex number": (at(extension(2, msgpack((1.0,)))), "'a': is damaged: it is not the two parts of a complex"),
    "a complex number of texts": (at(extension(2, msgpack(("a", "b")))), "'a': is damaged: expected two numbers, found a text"),
    "a key of bytes": (msgpack({b"a": one, "b": 1})[:20] + b"", "the root: has a key that is a bytes, not a name"),
    "an empty key": (msgpack({"a": {"": one}}), "'a/': is not a valid name"),
    "a climbing key": (msgpack({"..": one}), r"'\.\.': is not a valid name"),
    "a key twice": (b"\x82" + (msgpack("a") + one) * 2, "'a': appears twice"),
    "a text of bad utf-8": (at(Raw(b"\xa1\xff")), "'a': has a text that is not utf-8"),
    "a byte that is not used": (at(Raw(b"\xc1")), "'a': is damaged: it begins with a byte that msgpack does not have"),
    "too deep": (b"\x81\xa1a" * 200 + b"\x80", "'a/a/a.*: is nested deeper than 128 levels"),
    "too many numbers": (at([0] * 10_000), "'a/4.*': and those before it are too many single numbers"),
    "no pieces": (at(pieces | {"chunks": {}}), "'a': is damaged: it has no pieces"),
    "pieces of other dtypes": (at(pieces | {"chunks": {"0": flax_leaf(whole), "1": one}}), "'a': is damaged: it has no pieces, or they do not fit"),
    "pieces of two axes": (at(pieces | {"chunks": {"0": flax_leaf(np.ones((2, 3)))}}), "'a': is damaged: it has no pieces, or they do not fit"),
    "pieces out of order": (at(pieces | {"chunks": {"1": one, "0": one}}), "'a': is damaged: the pieces of the array are not numbered in order"),
    "a piece that is a number": (at(pieces | {"chunks": {"0": 3}}), "'a': is damaged: expected a piece of an array, found a number"),
    "a piece that is no array": (at(pieces | {"chunks": {"0": extension(2, bytes(9))}}), "'a': is damaged: a piece of the array is none"),
    "pieces for another shape": (at(pieces | {"shape": {"0": 7}}), r"'a': has 12 bytes; its shape \(7,\) needs 14"),
    "something else among the pieces": (at(pieces | {"more": {}}), "'a': is damaged: 'more' is among the pieces"),
}
# fmt: on


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_says_where(tmp_path: Path, what: str) -> None:
    content, message = DAMAGED[what]
    path = tmp_path / "damaged.msgpack"
    path.write_bytes(content)
    for read in (pt.load, pt.peek):
        with pytest.raises(pt.LoadError, match=rf"^{path}: {message}"):
            read(path)


def test_what_is_no_array_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    path.write_bytes(
        msgpack(
            {"a": one, "b": b"abc", "c": extension(9, b"x"), 5: Raw(b"\xca" + struct.pack(">f", 0.1))}
        )
    )
    found, report = pt.load(path, report=True)
    assert list(found) == ["a", "5"]
    assert found["5"] == np.float32(0.1)
    assert report.notes == [
        "b: 3 bytes that are no array, left out",
        "c: an extension of type 9, left out",
    ]


@pytest.mark.parametrize("name", fuzz.claims("flax"))
def test_no_count_or_size_is_believed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "claims.msgpack"
    path.write_bytes(fuzz.claims("flax")[name]())
    assert fuzz.attempt(str(path), most=fuzz.most_for(path.stat().st_size)) is None
    with pytest.raises(pt.LoadError, match=str(path)):
        pt.load(path)
