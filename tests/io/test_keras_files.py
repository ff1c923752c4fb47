"""Keras's weights and other files in HDF5, which h5py writes here in Keras's layouts."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import paramtree as pt
from paramtree.command import main
from tests.io import fuzz_files as fuzz
from tests.io.test_peek import Counting

quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
LIBVERS = pytest.mark.parametrize("libver", ["earliest", "latest"])


def written(path: Path, fill: Callable[[Any], Any], **options: Any) -> Path:
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return path


def bits(array: Any) -> tuple[Any, ...]:
    array = np.asarray(array)
    return array.shape, array.dtype, array.tobytes()


def weight(i: int, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + i


def keras3(file: Any) -> None:
    """What ``model.save_weights("model.weights.h5")`` of Keras 3 writes for a net of dense layers."""
    for i in range(12):
        variables = file.create_group(f"layers/dense_{i}/vars" if i else "layers/dense/vars")
        variables["0"], variables["1"] = weight(i), weight(i, (3,))
    file.create_group("layers/dropout/vars")
    file.create_group("optimizer/vars")["0"] = np.int64(7)
    half = file["layers"].create_dataset("half/vars/0", data=np.arange(3).astype(jnp.bfloat16))
    half.attrs["dtype"] = "bfloat16"


def keras2(file: Any, kind: Any = list) -> None:
    """What ``model.save("model.h5")`` of Keras 2 writes: lists of names in attributes give the order."""
    weights = file.create_group("model_weights")
    weights.attrs["layer_names"] = kind([b"stem", b"dense_10", b"dense_9"])
    weights.attrs["keras_version"] = "2.9.0"
    for layer in ("dense_10", "dense_9", "stem"):
        names = [f"{layer}/kernel:0", f"{layer}/bias:0"]
        group = weights.create_group(layer)
        group.attrs["weight_names"] = kind([name.encode() for name in names])
        group[names[0]], group[names[1]] = weight(0), weight(1, (3,))


# What is read


@LIBVERS
def test_the_weights_of_keras_3(tmp_path: Path, libver: str) -> None:
    path = written(tmp_path / "model.weights.h5", keras3, libver=libver)
    found, report = pt.load(path, report=True)
    assert report.format == "keras"
    assert [*found.layers][:-1] == ["dense", *(f"dense_{i}" for i in range(1, 12))]
    for i in range(12):
        assert bits(found[f"layers/dense{f'_{i}' if i else ''}/vars/0"]) == bits(weight(i))
    assert bits(found["layers/half/vars/0"]) == bits(np.arange(3).astype(jnp.bfloat16))
    assert isinstance(found["layers/dense/vars/0"], jax.Array)
    assert found["optimizer/vars/0"].dtype == np.int64


@pytest.mark.parametrize("kind", [list, np.array])  # as h5py 3 and 2 write a list of bytes
def test_a_file_of_keras_2_is_in_its_order(tmp_path: Path, kind: Any) -> None:
    found = pt.load(written(tmp_path / "model.h5", lambda file: keras2(file, kind)))
    assert list(found.model_weights) == ["stem", "dense_10", "dense_9"]
    assert list(found.model_weights.stem.stem) == ["kernel:0", "bias:0"]


def test_the_order_of_creation_stays_if_it_is_known(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        for name in ("z", "a", *(f"x{i}" for i in range(12))):
            file[f"{name}/w"] = weight(0)

    names = ["z", "a", *(f"x{i}" for i in range(12))]
    assert list(pt.load(written(tmp_path / "a.h5", fill, track_order=True))) == names
    assert list(pt.load(written(tmp_path / "a.h5", fill))) == ["a", *names[2:], "z"]


def test_they_load_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "model.weights.h5", keras3)
    like = {"layers": {"dense": {"vars": [jnp.zeros((2, 3)), jnp.zeros(3)]}}}
    found = pt.load(path, like=like, ignore_extra=True)
    assert bits(found["layers"]["dense"]["vars"][1]) == bits(weight(0, (3,)))
    layer = {"weight": jnp.zeros((3, 2)), "bias": jnp.zeros(3)}
    names = [("layers/dense/vars/0", "weight"), ("layers/dense/vars/1", "bias")]
    kernels = {"weight": np.transpose}  # Keras has inputs first
    found = pt.load(path, like=layer, rename=names, transform=kernels, ignore_extra=True)
    assert bits(found["weight"]) == bits(weight(0).T.copy())


DTYPES = [order + code for code in "?bBhHiIqQefd" for order in "<>"]


@LIBVERS
def test_every_dtype_and_shape(tmp_path: Path, libver: str) -> None:
    values: dict[str, np.ndarray] = {}
    for dtype in DTYPES:
        for shape in ((), (3,), (2, 3), (0, 2)):
            values[f"{dtype}/{len(shape)}{0 in shape}"] = (
                np.arange(np.prod(shape)).reshape(shape).astype(dtype)
            )
    path = written(
        tmp_path / "a.h5",
        lambda file: [file.__setitem__(*pair) for pair in values.items()],
        libver=libver,
    )
    found = pt.load(path)
    for name, value in values.items():
        native = value.astype(value.dtype.newbyteorder("="))
        assert bits(found[name]) == bits(native)
        assert pt.peek(path)[name].dtype == native.dtype


@LIBVERS
@pytest.mark.parametrize("count", [1, 9, 60, 700, 3000])
def test_groups_of_any_size(tmp_path: Path, libver: str, count: int) -> None:
    def fill(file: Any) -> None:
        for i in range(count):
            file[f"group/number {i}"] = np.int32(i)

    found = pt.load(written(tmp_path / "a.h5", fill, libver=libver)).group
    assert list(found) == [f"number {i}" for i in range(count)]
    assert [int(a) for a in found.values()] == list(range(count))


BIG = np.arange(420, dtype=np.int32).reshape(20, 21)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swapped": {"dtype": ">i4"},
    "chunks": {"chunks": (7, 4)},
    "one chunk": {"chunks": (20, 21)},
    "gzip": {"chunks": (7, 4), "compression": "gzip"},
    "shuffle": {"chunks": (7, 4), "shuffle": True},
    "both": {"chunks": (6, 21), "shuffle": True, "compression": 9},
    "swapped in chunks": {"chunks": (7, 4), "shuffle": True, "dtype": ">i8"},
    "it may grow": {"maxshape": (None, None), "chunks": (8, 8)},
    "booleans": {"dtype": "?", "chunks": (3, 3), "compression": "gzip"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_arrays_in_chunks(tmp_path: Path, options: dict[str, Any]) -> None:
    path = written(tmp_path / "a.h5", lambda file: file.create_dataset("a", data=BIG, **options))
    wanted = BIG.astype(np.dtype(options.get("dtype", "i4")).newbyteorder("="))
    found, shapes = pt.load(path).a, pt.peek(path)
    assert bits(found) == bits(wanted)
    assert (shapes.a.shape, shapes.a.dtype) == (wanted.shape, wanted.dtype)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("d", "e"))
    for spec in (("d",), (None,), (("d", "e"),)):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        like = {"a": jnp.zeros(BIG.shape, wanted.dtype if wanted.dtype != np.int64 else np.int32)}
        found = pt.load(path, like=like, shardings=sharding, cast_dtype=True)["a"]
        assert found.sharding == sharding
        np.testing.assert_array_equal(found, wanted)


def test_one_chunk_as_newer_versions_write_it(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file.create_dataset("a", data=BIG, chunks=BIG.shape, compression="gzip", shuffle=True)
        file.create_dataset("b", data=BIG, chunks=BIG.shape)

    found = pt.load(written(tmp_path / "a.h5", fill, libver="latest"))
    assert bits(found.a) == bits(found.b) == bits(BIG)


def test_chunks_that_a_smaller_shape_has_left(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file.create_dataset("a", data=BIG, maxshape=(None, None), chunks=(8, 8))
        file["a"].resize((9, 7))

    assert bits(pt.load(written(tmp_path / "a.h5", fill)).a) == bits(BIG[:9, :7].copy())


def test_two_names_of_one_array_are_a_tie(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file["embed/w"] = weight(0)
        file["decoder/w"] = file["embed/w"]

    path = written(tmp_path / "a.h5", fill)
    assert pt.ties(pt.load(path)) == {"embed_w": "decoder_w"}
    like = {"embed": {"w": jnp.zeros((2, 3))}, "decoder": {"w": jnp.zeros((2, 3))}}
    found = pt.load(path, like=like)
    assert bits(found["embed"]["w"]) == bits(found["decoder"]["w"]) == bits(weight(0))


@quiet
@given(
    tree=st.dictionaries(
        st.text("ab1é:", min_size=1, max_size=4),
        st.dictionaries(
            st.text("ab1 ", min_size=1, max_size=3),
            st.lists(st.integers(0, 3), max_size=3),
            max_size=12,
        ),
        max_size=12,
    ),
    dtype=st.sampled_from(["<f4", ">f8", "i1", "?"]),
    libver=st.sampled_from(["earliest", "v108", "latest"]),
    track_order=st.booleans(),
)
def test_what_h5py_reads_is_what_is_loaded(
    tmp_path: Path, tree: Any, dtype: str, **options: Any
) -> None:
    def fill(file: Any) -> None:
        for group, arrays in tree.items():
            made = file.create_group(group, track_order=options["track_order"])
            for name, shape in arrays.items():
                made[name] = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)

    path = written(tmp_path / "a.h5", fill, **options)
    found = pt.collect(pt.load(path, sep=""), sep="/")
    with h5py.File(path) as file:
        wanted = {f"{g}/{n}": file[g][n][()] for g in file for n in file[g]}
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert bits(found[name]) == bits(value.astype(np.asarray(value).dtype.newbyteorder("=")))
        if options["track_order"]:
            assert list(found) == list(wanted)


# How it is read


def test_listing_reads_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(file: Any) -> None:
        for i in range(4):
            file[f"layers/dense_{i}/vars/0"] = np.zeros(2**18, np.float32)

    path = written(tmp_path / "a.weights.h5", fill)
    counting = Counting(monkeypatch)
    assert pt.count(pt.peek(path)) == 2**20
    assert 0 < counting.bytes < 2**18
    pt.load(path)
    assert counting.bytes > 2**22


def test_what_expands_is_read_if_somebody_expects_its_shape(tmp_path: Path) -> None:
    values = np.zeros(2**20, np.float32)
    path = written(tmp_path / "a.h5", lambda file: file.create_dataset("a", data=values, compression=9))
    with pytest.raises(pt.LoadError, match=r"would take 4,194,304 bytes .* like="):
        pt.load(path)
    assert not pt.load(path, like=pt.peek(path)).a.any()


def test_a_chunk_does_not_expand_without_end(tmp_path: Path) -> None:
    """The chunk of a small array that says to be where that of a large one is."""

    def fill(file: Any) -> None:
        file.create_dataset("a", data=np.zeros(2**17, np.uint8), chunks=(2**17,), compression=9)
        file.create_dataset("b", data=np.zeros(100, np.uint8), chunks=(100,), compression=9)

    path = written(tmp_path / "a.h5", fill)
    with h5py.File(path) as file:
        large, small = (file[name].id.get_chunk_info(0) for name in "ab")
    data = path.read_bytes()
    place = data.index(struct.pack("<Q", small.byte_offset))
    changed = data[:place] + struct.pack("<Q", large.byte_offset) + data[place + 8 :]
    path.write_bytes(
        changed.replace(struct.pack("<II", small.size, 0), struct.pack("<II", large.size, 0))
    )
    with pytest.raises(
        pt.LoadError, match=r"'b': is damaged: its chunk at \(0,\) has 101 bytes, not 100"
    ):
        pt.load(path)


def test_the_command_lists_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.weights.h5", keras3)
    assert main([str(path), "--match", "layers/dense/.*"]) == 0
    assert "0  (2, 3)  float32" in capsys.readouterr().out
    assert main([str(path), "--convert", str(tmp_path / "a.safetensors")]) == 0
    converted = pt.load(tmp_path / "a.safetensors")
    for name, value in pt.collect(pt.load(path), sep="/").items():
        assert bits(converted[name]) == bits(value)


@pytest.mark.parametrize("name", ["a.weights.h5", "a.h5", "A.HDF5"])
def test_keras_files_are_only_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        pt.ParamTreeError, match=r"is another library's format\. Choose one of \.safetensors"
    ):
        pt.save(tmp_path / name, pt.from_tree({"a": np.ones(2)}))


# What is not read


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "x", (4,))
    file.create_virtual_dataset("a", layout)


def compact(file: Any) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((2,))
    h5py.h5d.create(file.id, b"a", h5py.h5t.IEEE_F32LE, space, plist)


def named(file: Any) -> None:
    file["kind"] = np.dtype("f4")


def committed(file: Any) -> None:
    file["a_kind"] = np.dtype("f4")
    file.create_dataset("a", (2,), dtype=file["a_kind"])
    del file["a_kind"]


def cycle(file: Any) -> None:
    file["a/b"] = file


# fmt: off
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a soft link": (lambda file: file.__setitem__("a", h5py.SoftLink("/b")), "has 'a', a link to another name or file"),
    "an external link": (lambda file: file.__setitem__("a", h5py.ExternalLink("secret.h5", "/x")), "has 'a', a link to another name or file"),
    "a virtual array": (virtual, "'a': is virtual, with its values in other files"),
    "values elsewhere": (lambda file: file.create_dataset("a", (4,), "f4", external=[("secret", 0, 16)]), "'a': has its values in another file"),
    "a group twice": (lambda file: file.__setitem__("b", file.create_group("a")), "'b': is a second name of a group"),
    "a group in itself": (cycle, "'a/b': is a second name of a group"),
    "texts": (lambda file: file.create_dataset("a", data=["x", "y"]), "'a': is of another dtype than numbers and booleans"),
    "short texts": (lambda file: file.create_dataset("a", data=np.array([b"x"])), "'a': is of another dtype"),
    "records": (lambda file: file.create_dataset("a", (2,), "f4,f4"), "'a': is of another dtype"),
    "complex numbers": (lambda file: file.create_dataset("a", (2,), "c8"), "'a': is of another dtype"),
    "bytes": (lambda file: file.create_dataset("a", (2,), "V2"), "'a': is of another dtype"),
    "names": (lambda file: file.create_dataset("a", (2,), h5py.enum_dtype({"x": 0, "y": 1}, "i1")), "'a': is of another dtype"),
    "references": (lambda file: file.create_dataset("a", (2,), h5py.ref_dtype), "'a': is of another dtype"),
    "long doubles": (lambda file: file.create_dataset("a", (2,), np.longdouble), "'a': is of another dtype"),
    "no value": (lambda file: file.__setitem__("a", h5py.Empty("f4")), "'a': has no value"),
    "never written": (lambda file: file.create_dataset("a", (2,), "f4"), "'a': has no values: they were never written"),
    "lzf": (lambda file: file.create_dataset("a", data=BIG, compression="lzf"), r"'a': has passed filters \[32000\]: only gzip and shuffle"),
    "checksums": (lambda file: file.create_dataset("a", data=BIG, fletcher32=True), r"'a': has passed filters \[3\]: only gzip"),
    "scaled": (lambda file: file.create_dataset("a", data=BIG, scaleoffset=0), r"'a': has passed filters \[6\]: only gzip"),
    "compact": (compact, "'a': has its values in its header, which is not read"),
    "a dtype": (named, "'kind': is neither a group nor an array"),
    "a dtype that is shared": (committed, "'a': shares its dtype with another, which is not read"),
    "a climbing name": (lambda file: file.__setitem__("a\\..\\b", 1), r"'a\\\\\.\.\\\\b': is not a valid name"),
    "too deep": (lambda file: file.create_group("/".join("a" * 140)), "nested deeper than 128 levels"),
}
# fmt: on


@LIBVERS
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, libver: str
) -> None:
    fill, message = REFUSED[what]
    monkeypatch.chdir(tmp_path)  # h5py makes the files of external values
    written(tmp_path / "secret.h5", lambda file: file.__setitem__("x", np.ones(4, "f4")))
    path = written(tmp_path / "a.h5", fill, libver=libver)
    for read in (pt.load, pt.peek):
        with pytest.raises(pt.LoadError, match=f"^{path}: .*{message}"):
            read(path)


def test_chunks_that_were_never_written(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", lambda file: file.create_dataset("a", (20,), "f4", chunks=(3,)))
    with pytest.raises(pt.LoadError, match="'a': has 0 chunks of 7: the others were never written"):
        pt.load(path)


def test_chunks_in_a_list_of_newer_versions(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.h5",
        lambda file: file.create_dataset("a", data=BIG, chunks=(7, 4)),
        libver="latest",
    )
    with pytest.raises(
        pt.LoadError, match="'a': lists its chunks as in libver='latest', which is not read"
    ):
        pt.load(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda data: data[:8], "is damaged: a part of it ends too early"),
        (lambda data: data[:400], "is truncated: it has 400 bytes of"),
        (
            lambda data: data[:40] + bytes(8) + data[48:500],
            "is damaged: .* bytes at .* are past the end",
        ),
        (lambda data: data[:8] + b"\x09" + data[9:], "has a part of version 9, which is not read"),
        (lambda data: data[:13] + b"\4" + data[14:], "has addresses that are not of 8 bytes"),
        (
            lambda data: data[:24] + b"\1" + data[25:],
            "has addresses that do not start at its beginning",
        ),
        (lambda data: data.replace(b"TREE", b"TREF"), "is damaged: there is no b'TREE' at"),
        (lambda data: data.replace(b"wxyz\0", b"wx\xffz\0"), "is damaged: a name in it is not utf-8"),
        (lambda data: data.replace(b"wxyz\0", b"wx/z\0"), "is damaged: no name in HDF5 has a '/'"),
        (
            lambda data: data.replace(struct.pack("<Q", 77), struct.pack("<Q", 79)),
            "has 308 bytes at .*; its shape",
        ),
        (
            lambda data: data.replace(struct.pack("<Q", 308), struct.pack("<Q", 300)),
            "has 300 bytes at .*; its shape",
        ),
        (lambda data: data[:-400], "is truncated: it has"),
    ],
)
def test_a_damaged_file_says_where(
    tmp_path: Path, changed: Callable[[bytes], bytes], message: str
) -> None:
    path = written(tmp_path / "a.h5", lambda file: file.__setitem__("wxyz", np.ones(77, "f4")))
    assert pt.load(path).wxyz.shape == (77,)
    path.write_bytes(changed(path.read_bytes()))
    with pytest.raises(pt.LoadError, match=f"^{path}: .*{message}"):
        pt.load(path)


def test_h5py_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.weights.h5", keras3)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert pt.load(path, report=True)[1].format == "keras"


@pytest.mark.parametrize("name", fuzz.claims("keras"))
def test_no_count_or_size_is_believed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "claims.h5"
    path.write_bytes(fuzz.claims("keras")[name]())
    assert fuzz.attempt(str(path), most=fuzz.most_for(path.stat().st_size)) is None
    with pytest.raises(pt.LoadError, match=str(path)):
        pt.load(path)
