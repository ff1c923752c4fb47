"""Loading a damaged, hostile or foreign file raises a ``LoadError`` that names it, or gives a tree."""

import functools
import json
import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import paramtree as pt
from tests.io import fuzz_files as fuzz
from tests.io import fuzz_torch
from tests.io.fuzz_files import FORMATS, npy, params, u64, v2, zipped, zipped_list
from tests.io.torch_files import legacy, mapping, storage, tensor

pytestmark = pytest.mark.slow

each_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module", autouse=True)
def endless_loads_end() -> Iterator[None]:
    with fuzz.watched():
        yield


def ending(kind: str) -> str:
    return fuzz.ENDINGS.get(kind, kind)


@functools.cache
def valid(kind: str) -> dict[str, fuzz.Valid]:
    return fuzz.corpus(kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Valid files with edits


@each_format
def test_the_files_that_are_edited_are_valid(folder: Path, kind: str) -> None:
    for name, (data, likes) in valid(kind).items():
        file = folder / f"{name}.{ending(kind)}"
        file.write_bytes(data)
        assert fuzz.attempt(str(file), deep=True) is None
        assert fuzz.attempt(str(file), like=likes[0], strict=False, cast_dtype=True) is None
        assert isinstance(pt.load(file), pt.ParamTree)


@each_format
@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(
    number=st.integers(0, 99),
    edits=st.lists(st.integers(0, 99), min_size=1, max_size=3),
    seed=st.integers(0),
)
def test_an_edited_file_gives_a_tree_or_a_load_error(
    folder: Path, kind: str, number: int, edits: list[int], seed: int
) -> None:
    files, known = list(valid(kind).values()), fuzz.edits(kind)
    base = files[number % len(files)]
    note(f"{list(valid(kind))[number % len(files)]}: {[known[i % len(known)].__name__ for i in edits]}")
    rng = random.Random(seed)
    chosen = [known[i % len(known)] for i in edits]
    edited = fuzz.mutated(rng, base.data, chosen, [other.data for other in files])
    file = folder / f"edited.{ending(kind)}"
    file.write_bytes(edited)
    for options in fuzz.options_for(rng, base):
        if rng.random() < 0.1:
            problem = fuzz.attempt(str(file), most=fuzz.most_for(len(edited)), **options)
        else:
            problem = fuzz.attempt(str(file), rng.random() < 0.05, slow=fuzz.TOO_SLOW, **options)
        assert problem is None, problem


@each_format
def test_a_file_that_is_cut_off_anywhere(folder: Path, kind: str) -> None:
    data = valid(kind)["least"].data
    file = folder / f"cut.{ending(kind)}"
    for size in range(len(data)):
        file.write_bytes(data[:size])
        with pytest.raises(pt.LoadError, match=re.escape(str(file)) + r"[: ]+.{10,}"):
            pt.load(file)
    file.write_bytes(data)
    assert np.array_equal(pt.load(file).a.b, np.ones(2, np.float32))


@pytest.mark.parametrize("kind", ["safetensors", "params"])
def test_a_file_with_something_after_its_end(folder: Path, kind: str) -> None:
    file = folder / f"long.{ending(kind)}"
    file.write_bytes(valid(kind)["least"].data + b"\0")
    with pytest.raises(pt.LoadError, match=re.escape(str(file))):
        pt.load(file)


# Files that claim more than they have


@pytest.mark.parametrize(("kind", "name"), [(k, name) for k in FORMATS for name in fuzz.claims(k)])
def test_no_count_or_shape_is_believed(folder: Path, kind: str, name: str) -> None:
    data = fuzz.claims(kind)[name]()
    file = folder / f"claim.{ending(kind)}"
    file.write_bytes(data)
    ends: list[Any] = []
    problem = fuzz.attempt(str(file), slow=fuzz.TOO_SLOW, ends=ends)
    assert problem is None, problem
    problem = fuzz.attempt(str(file), most=fuzz.most_for(len(data)))
    assert problem is None, problem
    if name not in fuzz.TRUE_CLAIMS:
        assert isinstance(ends[0], pt.LoadError)


def test_what_expands_is_read_if_somebody_expects_its_shape(folder: Path) -> None:
    file = folder / "expands"
    dense = fuzz.params([fuzz.rows((2**20, 4), ())], [b"a"])
    packed = fuzz.zeros("a.npy", npy("<f4", f"({2**20}, 4)", b""), 16)
    for data in (dense, packed):
        file.write_bytes(data)
        with pytest.raises(pt.LoadError, match=r"would take 16,777,216 bytes .* like="):
            pt.load(file)
        with pytest.raises(pt.LoadError, match=r"has shape \(1048576, 4\), expected \(4,\)"):
            pt.load(file, like={"a": np.zeros(4, np.float32)})
        like = {"a": np.ones((2**20, 4), np.float32)}
        assert not pt.load(file, like=like)["a"].any()
    at = packed.rfind(b"PK\1\2") + 16  # where the checksum is
    file.write_bytes(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])
    with pytest.raises(pt.LoadError, match=r"'a\.npy': cannot be read"):
        pt.load(file, like=like)


def test_what_expands_is_not_given_to_a_transform_either(folder: Path) -> None:
    file = folder / "expands"
    file.write_bytes(fuzz.zeros("a.npy", npy("<f4", f"({2**20}, 4)", b""), 16))
    options = {"like": {"a": np.ones((1, 4), np.float32)}, "transform": {"a": lambda a: a[:1]}}
    problem = fuzz.attempt(str(file), most=fuzz.most_for(file.stat().st_size), **options)
    assert problem is None, problem


# One file for each kind of damage


def tensors(*entries: tuple[str, dict[str, Any]], data: bytes = bytes(8), **more: Any) -> bytes:
    """Returns a safetensors file with the given header, which may repeat names."""
    pairs = [f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in (*entries, *more.items())]
    text = "{" + ",".join(pairs) + "}"
    return u64(len(text)) + text.encode() + data


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def layout(**changes: Any) -> dict[str, str]:
    """Returns the metadata of a tree with one leaf, a/b, with some fields changed."""
    text = {
        "version": 1,
        "sep": ".",
        "paths": [["a", "b"]],
        "slots": [0],
        "kinds": ["param"],
        "kept": [0],
    }
    text |= {"names": ["a.b"], "dtypes": {}} | changes
    return {"paramtree": json.dumps(text)}


def with_layout(**changes: Any) -> bytes:
    return tensors(("__metadata__", layout(**changes)), ("a.b", entry()))


two = npy("<f4", "(2,)", bytes(8))

# fmt: off
DAMAGED = {
    "safetensors": {
        "no length": (b"\0\0\0\0\0\0\0\0{", "damaged"),
        "a header that is no JSON": (u64(2) + b"{]", "damaged"),
        "a header of bad utf-8": (u64(11) + b'{"\xff\xfe":{}}', "damaged"),
        "a lone surrogate": (u64(13) + b'{"\\ud800":{}}', "damaged"),
        "arrays that overlap": (tensors(a=entry(), b=entry(4, 12), data=bytes(12)), "damaged"),
        "arrays with a gap": (tensors(a=entry(), b=entry(12, 20), data=bytes(20)), "damaged"),
        "an array that ends before it begins": (tensors(a=entry(8, 0)), "damaged"),
        "an array at a negative place": (tensors(a=entry(-8, 0)), "damaged"),
        "an array past the end": (tensors(a=entry(0, 2**63 - 1)), "damaged"),
        "a shape for other bytes": (tensors(a=entry(shape=(3,))), "damaged"),
        "a negative axis": (tensors(a=entry(shape=(-2,))), "damaged"),
        "an unknown dtype": (tensors(a=entry(dtype="F31")), "damaged"),
        "a dtype that jax does not have": (tensors(a=entry(dtype="F4", shape=(16,))), "'a': has dtype F4"),
        "too many axes": (tensors(a=entry(shape=[1] * 40, end=4), data=bytes(4)), "'a': no array can have shape"),
        "no layout": (tensors(__metadata__={"paramtree": "?"}, a=entry()), "metadata 'paramtree': .* not JSON"),
        "a layout of nothing": (tensors(__metadata__={"paramtree": "{}"}, a=entry()), "no version"),
        "a later layout": (with_layout(version=2), "version 2, and this paramtree reads version 1"),
        "a deep layout": (tensors(__metadata__={"paramtree": "[" * 9999}, a=entry()), "metadata 'paramtree'"),
        "a layout of other arrays": (with_layout(names=["a.c"]), r"disagree on a\.b, a\.c"),
        "a layout of more arrays": (with_layout(kept=[0, 1]), "metadata 'paramtree'.*leaves"),
        "a layout of a slot too many": (with_layout(slots=[1]), "slots"),
        "a layout of a negative slot": (with_layout(slots=[-2]), "slots"),
        "a layout of a path twice": (with_layout(paths=[["a"], ["a"]], slots=[0, 0]), "given twice"),
        "a layout of a leaf with leaves": (with_layout(paths=[["a"], ["a", "b"]], slots=[0, 0]), "given twice"),
        "a layout of a path that climbs": (with_layout(paths=[["..", "b"]]), "not a list of names"),
        "a layout of no path": (with_layout(paths=[[]]), "not a list of names"),
        "a layout of a path too deep": (with_layout(paths=[["a"] * 2000]), "not a list of names"),
        "a layout of a strange kind": (with_layout(kinds=["frozen"]), "kind"),
        "a layout of an unknown dtype": (with_layout(dtypes={"0": "float31"}), r"'a\.b': there is no numeric dtype"),
        "a layout of objects": (with_layout(dtypes={"0": "object"}), r"'a\.b': .*dtype.*'object'|'a\.b': 'object' is not a dtype"),
        "a layout of another dtype": (with_layout(dtypes={"0": "int4"}), r"'a\.b': float32 .* does not encode int4"),
        "a layout of no keys": (with_layout(dtypes={"0": "key:threefry2x32"}), r"'a\.b': float32 .* is not PRNG key data"),
    },
    "params": {
        "nothing but a magic": (u64(0x112), "the header: is truncated: needs 16 bytes, but 8 are left"),
        "an axis below zero": (params([v2(2).replace(u64(2), u64(-2), 1)], [b"a"]), "array 0: no array can have shape"),
        "too many axes": (params([fuzz._V3 + bytes(4) + b"\x40\0\0\0"], []), "array 0: has 64 axes"),
        "an unknown dtype": (params([v2(2, dtype=13)], [b"a"]), "array 0: has an unknown dtype, number 13"),
        "an unknown storage": (params([fuzz._V2 + b"\3\0\0\0"], []), "array 0: has an unknown storage type, 3"),
        "a name of bad utf-8": (params([v2(2)], [b"\xff"]), "name 0: is not utf-8"),
        "fewer names": (params([v2(2), v2(2)], [b"a"]), "the names: there are 1 for 2 arrays"),
        "a name twice": (params([v2(2), v2(2)], [b"arg:a", b"aux:a"]), "'aux:a': appears twice"),
        "more after the end": (params([v2(2)], [b"a"]) + b"!", "1 bytes follow the end"),
        "a row that is not there": (params([fuzz.rows((4, 2), (1, 4))], [b"a"]), "array 0: .*indices do not fit"),
        "a negative row": (params([fuzz.rows((4, 2), (-1,))], [b"a"]), "array 0: .*indices do not fit"),
        "a column that is not there": (params([fuzz.csr(columns=(0, 3))], [b"a"]), "array 0: .*indices"),
        "rows that go back": (params([fuzz.csr(starts=(0, 3, 2))], [b"a"]), "array 0: .*indices"),
        "csr of one axis": (params([fuzz.csr((6,))], [b"a"]), "array 0: .*indices"),
    },
    "npz": {
        "a pickle inside": (zipped({"a.npy": (npy("|O", "()", pickle.dumps(1)), False)}), "'a.npy': has dtype object"),
        "text": (zipped({"a.npy": (npy("<U2", "()", bytes(8)), False)}), "'a.npy': has dtype <U2"),
        "no zip": (b"PK\3\4" + bytes(100), "damaged"),
        "a shape of booleans": (zipped({"a.npy": (npy("<f4", "(True,)", bytes(4)), False)}), r"'a\.npy': "),
        "no .npy": (zipped({"a.npy": (b"some text", False)}), "damaged"),
        "another member": (zipped({"readme.txt": (b"some text", False)}), r"'readme\.txt': .*not a \.npy"),
        "a header that is no literal": (zipped({"a.npy": (fuzz.npy_of(b"exit()", b""), False)}), "damaged"),
        "a header of brackets": (zipped({"a.npy": (fuzz.npy_of(b"(" * 900, b""), True)}), "damaged"),
        "a header that is too long": (zipped({"a.npy": (fuzz.npy_of(b" " * 20_000, b""), True)}), "damaged|header"),
        "a shape for other bytes": (zipped({"a.npy": (npy("<f4", "(3,)", bytes(8)), False)}), "'a.npy': has"),
        "a negative axis": (zipped({"a.npy": (npy("<f4", "(-2,)", bytes(8)), False)}), "'a.npy': no array can have shape"),
        "a shape of words": (zipped({"a.npy": (npy("<f4", "('a',)", bytes(8)), False)}), "damaged"),
        "a name twice": (zipped_list([("a.npy", two, False), ("a.npy", two, True)]), "'a': appears twice"),
        "a name of bad utf-8": (zipped({"\xe9.npy": (two, False)}).replace("\xe9".encode(), b"\xff\xff"), "damaged"),
        "a layout of other arrays": (
            zipped({"b.npy": (two, False), "paramtree.json": (layout()["paramtree"].encode(), False)}),
            r"paramtree\.json: .*disagree on a\.b, b",
        ),
        "a wrong checksum": (zipped({"a.npy": (two, False)}).replace(bytes(8), b"\1" * 8, 1), "'a.npy'"),
        "an encrypted member": (
            zipped({"a.npy": (two, False)}).replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"),
            "'a.npy': is encrypted",
        ),
        "another compression": (
            zipped({"a.npy": (two, False)}).replace(b"PK\1\2\x14\3\x14\0\0\0\0", b"PK\1\2\x14\3\x14\0\0\0\x0c"),
            "'a.npy': is .* compressed with an unsupported method",
        ),
    },
}
# fmt: on


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind in DAMAGED for what in DAMAGED[kind]])
def test_a_damaged_file_says_where(folder: Path, kind: str, what: str) -> None:
    data, message = DAMAGED[kind][what]
    file = folder / f"damaged.{ending(kind)}"
    file.write_bytes(data)
    with pytest.raises(pt.LoadError, match=f"(?s)^{re.escape(str(file))}: .*{message}"):
        pt.load(file)


def named_like(kind: str, *names: str) -> bytes:
    """Returns a file without a layout, with an array for each name."""
    if kind == "flax":
        return fuzz.msgpack({name: fuzz.flax_leaf(np.zeros(2, np.float32)) for name in names})
    if kind == "keras":
        return hdf5_named(*names)
    if kind == "params":
        return params([v2(2)] * len(names), [name.encode() for name in names])
    if kind == "torch":
        return fuzz_torch.named(*names)
    if kind == "npz":
        return zipped_list([(f"{name}.npy", two, False) for name in names])
    entries = [(name, entry(8 * i, 8 * i + 8)) for i, name in enumerate(names)]
    return tensors(*entries, data=bytes(8 * len(names)))


def hdf5_named(*names: str) -> bytes:
    """Returns a file with an array for each name, also for names that h5py does not write."""
    written = {name: "~" * len(name.encode()) if name in CLIMBING else name for name in names}
    made = fuzz.hdf5(
        lambda file: [file.create_dataset(n, data=np.zeros(2, "f4")) for n in written.values()]
    )
    for name, instead in written.items():
        made = made.replace(b"\0%s\0" % instead.encode(), b"\0%s\0" % name.encode())
    return made


CLIMBING = ["", "..", ".", "../x", "/x", "a/../b", "a//b", "a/", "..\\x", "a/./b", "\0", "a\0/b"]


@each_format
@pytest.mark.parametrize("name", CLIMBING)
def test_names_that_climb(folder: Path, kind: str, name: str) -> None:
    if (kind in ("npz", "keras") and "\0" in name) or (kind == "keras" and not name):
        pytest.skip("a name in a zip file or in HDF5 ends at a NUL, and in HDF5 it has a letter")
    file = folder / f"climbing.{ending(kind)}"
    file.write_bytes(named_like(kind, "fine", name))
    with pytest.raises(pt.LoadError, match=f"^{re.escape(f'{file}: {name!r}')}: is not a valid name"):
        pt.load(file)


@each_format
@pytest.mark.parametrize("names", [("a.b", "a/b"), ("a", "a.b"), ("a/b/c", "a.b")])
def test_names_that_make_no_tree(folder: Path, kind: str, names: tuple[str, ...]) -> None:
    file = folder / f"colliding.{ending(kind)}"
    file.write_bytes(named_like(kind, *names))
    start = f"^{re.escape(str(file))}: the names: do not form a tree: `a"
    with pytest.raises(pt.LoadError, match=start):
        pt.load(file)


@each_format
@pytest.mark.parametrize(
    ("name", "problem"),
    [(".".join("a" * 1001), "is nested too deep"), ("a..b", "has an empty segment between '.'")],
)
def test_names_that_make_no_path(folder: Path, kind: str, name: str, problem: str) -> None:
    file = folder / f"deep.{ending(kind)}"
    file.write_bytes(named_like(kind, name))
    with pytest.raises(
        pt.LoadError, match=rf"^{re.escape(str(file))}: 'a\.[ab.]+': {re.escape(problem)}"
    ):
        pt.load(file)


@each_format
@pytest.mark.parametrize(
    "name", ["\xb2", "1\xb2", "\u0663", "\U0001f600", " ", "-1", "00", "%s", "{x}", "[b]"]
)
def test_odd_names_are_names(folder: Path, kind: str, name: str) -> None:
    file = folder / f"odd.{ending(kind)}"
    file.write_bytes(named_like(kind, name, "w"))
    assert set(pt.load(file)) == {name, "w"}
    like = pt.from_tree({"w": np.ones(2, np.float32), name: np.ones(2, np.float32)})
    assert set(pt.load(file, like=like)) == {name, "w"}


@each_format
@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "\x7f", "\x9b2J", "\u2028"])
def test_names_are_printed_without_their_effects(folder: Path, kind: str, name: str) -> None:
    file = folder / f"escapes.{ending(kind)}"
    file.write_bytes(named_like(kind, name, f"{name}.x"))
    for like in (None, {"w": np.ones(2)}):
        with pytest.raises(pt.LoadError) as raised:
            pt.load(file, like)
        assert name not in str(raised.value)
        assert ascii(name)[1:-1] in str(raised.value)


# Files of other formats


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", b"", "is empty"),
        ("empty.safetensors", b"", "is empty"),
        ("notes.txt", b"weights and biases\n" * 9, "is neither safetensors, "),
        ("short", b"{", "is neither"),
        ("model.pt", pickle.dumps({"a": 1}), "is a pickle"),
        ("model.pth", pickle.dumps({"a": 1}, 0), "is a pickle"),
        (
            "model.pt",
            zipped({"model/data.pkl": (b"", False), "model/data/0": (b"", False)}),
            "is not a file of torch.save, or is damaged",
        ),
        ("model", pickle.dumps({"a": 1}), "is a pickle"),
        ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "has addresses that are not of 8 bytes"),
        ("model.msgpack", b"\x93\1\2\3", "is neither"),
        ("array.npy", two, "holds one array without a name"),
        ("archive.gz", b"\x1f\x8b\x08" + bytes(99), "is compressed by gzip"),
    ],
)
def test_other_files_are_told_apart(folder: Path, name: str, data: bytes, message: str) -> None:
    file = folder / name
    file.write_bytes(data)
    with pytest.raises(pt.LoadError, match=f"^{re.escape(str(file))}: {message}"):
        pt.load(file)


def test_a_pickle_is_not_run(folder: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "touched",)

    danger = pickle.dumps(Hostile())
    pickle.loads(danger)
    assert (folder / "touched").exists()
    (folder / "touched").unlink()
    inside = zipped({"a.npy": (npy("|O", "()", danger), False)})
    for data in (
        danger,
        inside,
        zipped({"x/data.pkl": (danger, False)}),
        zipped({"a.npy": (danger, False)}),
    ):
        file = folder / "danger.npz"
        file.write_bytes(data)
        with pytest.raises(pt.LoadError, match="pickle|damaged"):
            pt.load(file)
        assert not (folder / "touched").exists()


def test_a_folder_that_is_no_checkpoint(folder: Path) -> None:
    (folder / "checkpoint" / "0").mkdir(parents=True)
    (folder / "checkpoint" / "0" / "weights").write_bytes(b"\0")
    with pytest.raises(
        pt.LoadError, match="checkpoint: is a folder without a finished Orbax checkpoint"
    ):
        pt.load(folder / "checkpoint")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "is not an index"),
        (b"\xff{}", "is not an index"),
        (b"[]", "is not an index"),
        (b"{}", "is not an index"),
        (b"[" * 9999, "is not an index"),
        (b'{"weight_map": [1]}', "is not an index"),
        (b'{"weight_map": {"a": [1]}}', "is not an index"),
        (b'{"weight_map": {"a": "part", "b": 1}}', "is not an index"),
        (b'{"weight_map": {"a": 1}}', "1: is not the name of a file next to the index"),
        (b'{"weight_map": {"a": "../part"}}', "'../part': is not the name of a file next to the index"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "'/etc/passwd': is not the name of a file"),
        (b'{"weight_map": {"a": "..\\\\part"}}', "is not the name of a file next to the index"),
        (b'{"weight_map": {"a": ".."}}', "'..': is not the name of a file next to the index"),
        (b'{"weight_map": {"a": "part\\u0000"}}', "is not the name of a file next to the index"),
        (b'{"weight_map": {"a": "missing"}}', "'missing': is in the index, but not next to it"),
        (b'{"weight_map": {"a": "\\ud800"}}', r"'\\ud800': is in the index, but not next to it"),
        (b'{"weight_map": {"a": "part", "b": "part"}}', "'b': .*in the index, but not in the files"),
        (b'{"weight_map": {"a": "part", "b": "broken"}}', "broken: is not a safetensors file"),
        (b'{"weight_map": {"a": "m.index.json"}}', "m.index.json: is not a safetensors file"),
    ],
)
def test_an_index_that_lists_what_it_should_not(folder: Path, index: bytes, message: str) -> None:
    below = folder / "split"
    below.mkdir(exist_ok=True)
    for part in (below / "part", folder / "part"):
        part.write_bytes(tensors(a=entry()))
    (below / "broken").write_bytes(tensors(a=entry())[:-1])
    file = below / "m.index.json"
    file.write_bytes(index)
    with pytest.raises(pt.LoadError, match=f"^{re.escape(str(below))}/.*{message}") as raised:
        pt.load(file)
    assert not fuzz.unprintable(str(raised.value))
    file.write_bytes(b'{"weight_map": {"a": "part"}}')
    assert pt.load(file).a.shape == (2,)


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pt.load(folder / "nowhere")


@each_format
def test_a_file_that_becomes_shorter_while_it_is_read(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paramtree.io.load as loading

    file = folder / f"shrinking.{ending(kind)}"
    values = np.ones(2**16, np.float32)
    if kind == "torch":
        body = mapping({"a": tensor(storage("0", 2**16), (2**16,))})
        file.write_bytes(legacy(body, {"0": (2**16, bytes(2**18))}))
    elif kind == "flax":
        file.write_bytes(fuzz.msgpack({"a": fuzz.flax_leaf(values)}))
    elif kind == "keras":
        file.write_bytes(fuzz.hdf5(lambda made: made.create_dataset("a", data=values)))
    else:
        pt.save(file, pt.from_tree({"a": values}))
    opened = loading.open_source

    def shrink(path: str) -> Any:
        source = opened(path)
        with open(path, "r+b") as file:
            file.truncate(2**17)
        return source

    monkeypatch.setattr(loading, "open_source", shrink)
    with pytest.raises(pt.LoadError, match=re.escape(str(file))):
        pt.load(file)


# Values that no file may produce


def hdf5_booleans(data: bytes, **options: Any) -> bytes:
    """Returns a file with an array of booleans, whose bytes are others than 0 and 1."""
    values = np.frombuffer(b"TFTF", np.int8) == ord("T")
    places: list[int] = []

    def fill(file: Any) -> None:
        found = file.create_dataset("a", data=values, **options).id
        file.flush()
        places.append(found.get_chunk_info(0).byte_offset if options else found.get_offset())

    made = fuzz.hdf5(fill)
    return made[: places[0]] + data + made[places[0] + len(data) :]


@each_format
def test_a_boolean_is_0_or_1_whatever_the_file_holds(folder: Path, kind: str) -> None:
    data = bytes([0, 1, 2, 255])
    made = {
        "safetensors": lambda: [
            tensors(a=entry(0, 4, (4,), "BOOL"), data=data),
            tensors(
                ("__metadata__", layout(paths=[["a"]], names=["a"], dtypes={"0": "bool"})),
                ("a", entry(0, 4, (4, 1), "U8")),
                data=data,
            ),
        ],
        "params": lambda: [params([v2(4, dtype=7, size=1)[:-4] + data], [b"a"])],
        "flax": lambda: [fuzz.msgpack({"a": fuzz.flax_array((4,), "bool", data)})],
        "keras": lambda: [hdf5_booleans(data, **options) for options in ({}, {"chunks": (4,)})],
        "torch": lambda: fuzz_torch.booleans(data),
        "npz": lambda: [
            zipped({"a.npy": (npy("|b1", "(4,)", data), packed)}) for packed in (False, True)
        ],
    }
    file = folder / f"booleans.{ending(kind)}"
    for content in made[kind]():
        file.write_bytes(content)
        for like in (None, {"a": np.zeros(4, bool)}):
            values = np.asarray(jax.tree.leaves(pt.load(file, like))[0])
            assert values.dtype == np.bool_
            assert values.view(np.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("tag", fuzz.TAGS, ids=lambda tag: ascii(tag)[:30])
def test_any_dtype_in_a_layout_gives_a_tree_or_a_load_error(folder: Path, tag: str) -> None:
    file = folder / "tagged.safetensors"
    for size in (0, 1, 2, 4, 8, 16, 32):
        for code, width in (("U8", 1), ("U32", 4)):
            array = entry(0, 2 * size * width, (2, size), code)
            text = layout(paths=[["a"]], names=["a"], dtypes={"0": tag})
            data = bytes(range(2 * size)) * width
            file.write_bytes(tensors(("__metadata__", text), ("a", array), data=data))
            for like in ({}, {"like": pt.from_tree({"a": np.zeros(2)}), "cast_dtype": True}):
                problem = fuzz.attempt(str(file), deep=True, slow=fuzz.TOO_SLOW, **like)
                assert problem is None, problem


def test_any_dtype_for_any_other_gives_a_tree_or_a_load_error(folder: Path) -> None:
    small = [name for name in vars(ml_dtypes) if re.match(r"b?float\d|u?int\d", name)]
    dtypes = dict.fromkeys(
        np.dtype(getattr(ml_dtypes, name, name)) for name in [*small, *"?bBhHiIqQefdFD"]
    )
    leaves = [jax.random.key(0)]
    for dtype in dtypes:
        if dtype.name in small and dtype.itemsize == 1:
            leaves.append(np.arange(256).astype(np.uint8).view(dtype))
            continue
        extremes = np.array([0, 1, -1, 1e30, -1e300, np.inf, np.nan])
        with np.errstate(all="ignore"):
            leaves.append(extremes.astype(dtype))
    assert len(leaves) > 20
    files = [folder / f"extremes{i}.safetensors" for i in range(len(leaves))]
    for file, leaf in zip(files, leaves, strict=True):
        pt.save(file, {"a": leaf})
    problems = []
    for file, leaf in zip(files, leaves, strict=True):
        for other in leaves:
            like = {"a": jax.ShapeDtypeStruct(leaf.shape, other.dtype)}
            if problem := fuzz.attempt(str(file), like=like, cast_dtype=True):
                problems.append(
                    f"{leaf.dtype} to {other.dtype}: {problem.kind} at {problem.place}: {problem.text}"
                )
    assert not problems, "\n".join(problems)
