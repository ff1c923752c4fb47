"""PyTorch's files: those that torch wrote, and hand-made ones that it never would. Nothing in them runs."""

import contextlib
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import paramtree as pt
from paramtree.io.load import load_part
from paramtree.io.opening import open_source
from tests.io import torch_files as made
from tests.io.torch_files import (
    call,
    get,
    group,
    listed,
    mapping,
    name,
    number,
    put,
    storage,
    tensor,
    text,
)

GOLD = Path(__file__).parents[1] / "data" / "torch"
FILES = sorted(path.name for path in GOLD.iterdir() if path.suffix != ".npz")
READ = [name for name in FILES if name != "whole_module.pt"]
EIGHT = struct.pack("<2f", 1.5, -2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def gold(name: str) -> dict[str, np.ndarray]:
    with np.load((GOLD / name).with_suffix(".npz")) as opened:
        return dict(opened)


def arrays(path: Path | str) -> dict[str, np.ndarray]:
    """Returns all arrays by all their names."""
    with open_source(str(path)) as source:
        found = {key: stored.read() for key, stored in source.arrays.items()}
        for key, stored in source.arrays.items():
            assert (found[key].dtype, found[key].shape) == (stored.dtype, stored.shape)
        return found | {alias: found[first] for alias, first in source.ties.items()}


# Files that torch wrote


def test_there_are_gold_files() -> None:
    assert len(FILES) == 7


@pytest.mark.parametrize("name", READ)
def test_the_arrays_are_those_of_torch(name: str) -> None:
    found = arrays(GOLD / name)
    wide = {"bf16": ml_dtypes.bfloat16, "f8": ml_dtypes.float8_e4m3fn}  # numpy keeps them as float32
    expected = {key: array for key, array in gold(name).items() if key not in ("x", "y", "tokens")}
    assert set(expected) <= set(found)
    for key, array in expected.items():
        if key in wide:
            assert found[key].dtype == wide[key]
            found[key] = found[key].astype(np.float32)
        np.testing.assert_array_equal(found[key], array, strict=True)
        assert found[key].tobytes() == array.tobytes()
    assert name == "checkpoint.pth" or set(expected) == set(found)


@pytest.mark.parametrize("name", ["tied.pt", "tied_legacy.pt"])
def test_one_view_under_two_names_is_a_tie(name: str) -> None:
    tree = pt.load(GOLD / name)
    assert pt.ties(tree) == {"head_weight": "embed_weight"}
    assert tree.head.weight is tree.embed.weight
    loose = pt.load(GOLD / name, like=pt.untie(tree))
    assert not pt.ties(loose)
    np.testing.assert_array_equal(loose.head.weight, loose.embed.weight)


def test_a_checkpoint_is_its_numbers_texts_and_levels() -> None:
    tree, report = pt.load(GOLD / "checkpoint.pth", report=True)
    assert report.format == "torch" and report.metadata == {"name": "run"} and not report.notes
    assert (int(tree.epoch), float(tree.best)) == (3, 0.25)
    group = tree["optimizer/param_groups/0"]
    assert group.lr.dtype == np.float64 and group.amsgrad.dtype == np.bool_
    assert [int(i) for i in group.params.values()] == [0, 1, 2, 3, 4]
    assert tree["optimizer/state/0/exp_avg"].shape == (4, 3, 3, 3)
    assert "maximize" in group and "foreach" not in group  # None is left out
    assert tree.args.layers["1"] == gold_layers()[1]


def gold_layers() -> list[int]:
    with open_source(str(GOLD / "checkpoint.pth")) as source:
        return [int(source.get(f"args.layers.{i}")) for i in range(2)]


def test_a_state_dict_loads_into_a_tree_by_name() -> None:
    wanted = gold("module.bin")
    inside = {key.removeprefix("module."): array for key, array in wanted.items()}
    like = nested({key: jax.ShapeDtypeStruct(a.shape, a.dtype) for key, a in inside.items()})
    tree = pt.load(GOLD / "module.bin", like=like)  # without the prefix of DataParallel
    for key, array in inside.items():
        np.testing.assert_array_equal(tree[key.replace(".", "/")], array)
    pairs = [("^model.", "")]
    tree = pt.load(GOLD / "checkpoint.pth", like=like, rename=pairs, ignore_extra=True)
    np.testing.assert_array_equal(tree["4/weight"], gold("checkpoint.pth")["model.4.weight"])
    with pytest.raises(pt.LoadError, match="`4_weight` is missing; the closest .* `model.4.weight`"):
        pt.load(GOLD / "checkpoint.pth", like=like, ignore_extra=True)
    doubled = pt.load(GOLD / "module.bin", like=like, transform={"4_bias": lambda a: a * 2})
    np.testing.assert_array_equal(doubled["4/bias"], 2 * inside["4.bias"])


def nested(entries: dict[str, Any]) -> pt.ParamTree:
    tree: dict[str, Any] = {}
    for key, leaf in entries.items():
        *path, last = key.split(".")
        level = tree
        for part in path:
            level = level.setdefault(part, {})
        level[last] = leaf
    return pt.from_tree(tree)


def test_a_whole_module_is_refused_and_the_message_says_what_to_save() -> None:
    message = r"holds no dict of arrays, but a pickled torch\.nn\.modules\.container\.Sequential.*"
    message += r"torch\.save\(model\.state_dict\(\), path\)"
    for read in (pt.load, pt.peek):
        with pytest.raises(pt.LoadError, match=message):
            read(GOLD / "whole_module.pt")


@pytest.mark.parametrize("name", READ)
def test_peek_load_part_and_a_conversion_agree(tmp_path: Path, name: str) -> None:
    tree, shapes = pt.load(GOLD / name), pt.peek(GOLD / name)
    assert jax.tree.structure(tree) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(tree), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    some = next(iter(pt.collect(tree)))
    part = load_part(GOLD / name, lambda tree: pt.select(tree, re.escape(some)))
    np.testing.assert_array_equal(pt.collect(part)[some], pt.collect(tree)[some])
    pt.save(tmp_path / "a.safetensors", tree)
    again = pt.load(tmp_path / "a.safetensors")
    assert pt.ties(again) == pt.ties(tree) and list(pt.collect(again)) == list(pt.collect(tree))
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert leaf.dtype == other.dtype and np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def test_the_command_lists_and_converts(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paramtree", *arguments]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)

    listed = run(str(GOLD / "tied.pt"))
    assert listed.returncode == 0 and "= embed_weight" in listed.stdout
    out = tmp_path / "out.safetensors"
    assert run(str(GOLD / "tied.pt"), "--convert", str(out)).returncode == 0
    assert pt.ties(pt.load(out)) == {"head_weight": "embed_weight"}
    refused = run(str(GOLD / "whole_module.pt"))
    assert refused.returncode == 2 and "state_dict()" in refused.stderr


@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
def test_it_is_not_written(tmp_path: Path, ending: str) -> None:
    with pytest.raises(
        pt.ParamTreeError, match=f".{ending} is another library's format. Choose one of"
    ):
        pt.save(tmp_path / f"a.{ending}", {"a": jnp.ones(2)})


def test_an_index_of_several_files_is_one_model(tmp_path: Path) -> None:
    for i in range(2):
        body = mapping({f"{k}{i}": tensor(storage("0", 2), (2,)) for k in "ab"})
        (tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin").write_bytes(
            made.zipped(body, {"0": EIGHT})
        )
    index = tmp_path / "pytorch_model.bin.index.json"
    parts = [f'"{k}{i}": "pytorch_model-0000{i + 1}-of-00002.bin"' for i in range(2) for k in "ab"]
    index.write_text('{"weight_map": {' + ",".join(parts) + "}}")
    for path in (index, tmp_path):
        assert pt.ties(pt.load(path)) == {"b0": "a0", "b1": "a1"}
    index.write_text('{"weight_map": {' + ",".join(p for p in parts if "a" not in p[:3]) + "}}")
    assert list(pt.collect(pt.load(index))) == ["b0", "b1"]  # the tie's first name is not listed


# Dtypes, views and storages


KINDS = {
    "Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
    "Half": "float16", "Float": "float32", "Double": "float64", "BFloat16": "bfloat16",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
LATER = [
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float32", "bool",
]  # fmt: skip


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", [*KINDS, *LATER])
def test_every_dtype_in_both_byte_orders(file: Path, kind: str, order: str) -> None:
    code = KINDS.get(kind, kind)
    dtype = np.dtype(getattr(ml_dtypes, code, code))
    data = np.arange(6 * dtype.itemsize, dtype=np.uint8).tobytes()
    data = bytes(byte % 2 for byte in data) if code == "bool" else data
    expected = np.frombuffer(data, dtype).reshape(3, 2)
    if order == "big":
        item = dtype.itemsize // (2 if dtype.kind == "c" else 1)
        data = np.frombuffer(data, f"u{item}").byteswap().tobytes()
    where = storage("k", 6, kind) if kind in KINDS else storage("k", len(data), "Untyped")
    options = {} if kind in KINDS else {"dtype": kind}
    body = mapping(
        {
            "plain": tensor(where, (3, 2), **options),
            "turned": tensor(where, (2, 3), (1, 2), **options),
            "tail": tensor(where, (2,), (1,), 4, **options),
        }
    )
    file.write_bytes(made.zipped(body, {"k": data}, order=order))
    found = arrays(file)
    for key, array in {"plain": expected, "turned": expected.T, "tail": expected[2]}.items():
        assert found[key].dtype == dtype and found[key].tobytes() == array.tobytes()
    if order == "little":
        count = len(data) if kind in LATER else 6
        file.write_bytes(made.legacy(body, {"k": (count, data)}))
        assert arrays(file)["turned"].tobytes() == expected.T.tobytes()
        file.write_bytes(made.zipped(body, {"k": data}, packed=True))
        assert {k: a.tobytes() for k, a in arrays(file).items()} == {
            k: a.tobytes() for k, a in found.items()
        }


def test_a_boolean_is_0_or_1_whatever_the_file_holds(file: Path) -> None:
    body = mapping(
        {"a": tensor(storage("0", 4, "Bool"), (4,)), "b": tensor(storage("0", 4, "Bool"), (2,), (2,))}
    )
    for packed in (False, True):
        file.write_bytes(made.zipped(body, {"0": bytes([0, 1, 2, 255])}, packed=packed))
        found = arrays(file)
        assert found["a"].view(np.uint8).tolist() == [0, 1, 1, 1]
        assert found["b"].view(np.uint8).tolist() == [0, 1]


def test_views_overlap_expand_and_end_anywhere(file: Path) -> None:
    data = np.arange(12, dtype=np.float32)
    where = storage("0", 12)
    body = mapping({
        "all": tensor(where, (3, 4)),
        "same": tensor(where, (3, 4)),
        "row": tensor(where, (4,), (1,), 4),
        "column": tensor(where, (3,), (4,), 1),
        "expanded": tensor(where, (2, 4), (0, 1), 8),
        "diagonal": tensor(where, (3,), (5,)),
        "windows": tensor(where, (10, 3), (1, 1)),
        "one": tensor(where, (1, 1), (7, 99), 11),
        "scalar": tensor(where, (), (), 11),
        "empty": tensor(where, (0, 3), (3, 1), 500),
        "flat": tensor(where, (12,)),
    })  # fmt: skip
    for content in (
        made.zipped(body, {"0": data.tobytes()}),
        made.legacy(body, {"0": (12, data.tobytes())}),
    ):
        file.write_bytes(content)
        found = arrays(file)
        grid = data.reshape(3, 4)
        expected = {
            "all": grid, "same": grid, "row": grid[1], "column": grid[:, 1],
            "expanded": np.stack([grid[2]] * 2), "diagonal": grid[range(3), range(3)],
            "windows": np.lib.stride_tricks.sliding_window_view(data, 3),
            "one": data[11:].reshape(1, 1), "scalar": data[11], "empty": data[:0].reshape(0, 3), "flat": data,
        }  # fmt: skip
        assert list(found) == [*(key for key in expected if key != "same"), "same"]
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array, strict=True)
        with open_source(str(file)) as source:
            assert source.ties == {"same": "all"}
            part = source.arrays["all"].read_slice
            assert part is not None and source.arrays["column"].read_slice is None
            np.testing.assert_array_equal(part((slice(1, 3), slice(2, 4))), grid[1:, 2:])


def test_what_torch_does_to_numbers_when_it_reads_them(file: Path) -> None:
    data = np.array([1 + 2j, -3j], np.complex64)
    where = storage("0", 2, "ComplexFloat")
    flags = {flag: mapping({flag: b"\x88"}) for flag in ("conj", "neg")}
    body = mapping({flag: tensor(where, (2,), metadata=flags[flag]) for flag in flags})
    file.write_bytes(made.zipped(body, {"0": data.tobytes()}))
    found = arrays(file)
    np.testing.assert_array_equal(found["conj"], data.conj(), strict=True)
    np.testing.assert_array_equal(found["neg"], -data, strict=True)
    file.write_bytes(made.zipped(made.small(metadata=flags["conj"]), {"0": EIGHT}))
    with pytest.raises(pt.LoadError, match="is the conjugate or the negative of one that has none"):
        pt.load(file)


UTILS = "torch._utils"
REFUSED = {
    "complex32": (tensor(storage("0", 2, "ComplexHalf"), (2,)), "has dtype complex32, which jax lacks"),
    "qint8": (
        call(name(UTILS, "_rebuild_qtensor"), storage("0", 8, "QInt8"), number(0), made.sizes(8), made.sizes(1)),
        r"is quantized, as qint8: save its \.dequantize\(\)",
    ),
    "bits": (tensor(storage("0", 8, "Untyped"), (8,), dtype="quint4x2"), "has dtype quint4x2, whose numbers share"),
    "unknown": (tensor(storage("0", 8, "Untyped"), (8,), dtype="int3"), "has dtype torch.int3"),
    "sparse": (
        call(
            name(UTILS, "_rebuild_sparse_tensor"),
            call(name("torch.serialization", "_get_layout"), text("torch.sparse_coo")),
            group(tensor(storage("0", 2), (1, 1)), tensor(storage("0", 2), (1,)), made.sizes(4)),
        ),
        r"is sparse, as torch.sparse_coo: save its \.to_dense\(\)",
    ),
    "meta": (
        call(name(UTILS, "_rebuild_meta_tensor_no_storage"), name("torch", "float32"), made.sizes(3), made.sizes(1), b"\x89"),
        "is on the device 'meta' and has no values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_jax_lacks_is_listed_and_refused_when_it_is_read(file: Path, what: str) -> None:
    value, message = REFUSED[what]
    file.write_bytes(
        made.zipped(mapping({"w.x": value, "fine": tensor(storage("0", 2), (2,))}), {"0": EIGHT})
    )
    assert "w_x" in pt.collect(pt.peek(file))
    with pytest.raises(
        pt.LoadError, match=f"'w.x': {message}.*; or leave it out with rename="
    ) as raised:
        pt.load(file)
    advice = re.search(r"rename=(\[.*\])", str(raised.value))
    assert advice
    pattern = re.search(r"'(.*)'", advice[1])
    assert pattern
    tree = pt.load(file, rename=[(pattern[1].replace("\\\\", "\\"), None)])  # the suggested fix
    np.testing.assert_array_equal(tree.fine, [1.5, -2])


def test_parameters_subclasses_and_attributes_are_tensors(file: Path) -> None:
    plain = tensor(storage("0", 2), (2,))
    rebuild = group(
        *([storage("0", 2), number(0), made.sizes(2), made.sizes(1), b"\x89", made.ORDERED])
    )
    body = mapping({
        "parameter": call(name(UTILS, "_rebuild_parameter"), plain, b"\x88", made.ORDERED),
        "stateful": call(name(UTILS, "_rebuild_parameter_with_state"), plain, b"\x88", made.ORDERED, b"}"),
        "attributes": call(
            name("torch._tensor", "_rebuild_from_type_v2"), name(UTILS, "_rebuild_tensor_v2"),
            name("torch.nn.parameter", "Buffer"), rebuild, b"}",
        ),
        "moved": call(name(UTILS, "_rebuild_device_tensor_from_cpu_tensor"), plain, name("torch", "float32"), text("xla:0"), b"\x89"),
        "old": call(name(UTILS, "_rebuild_tensor"), storage("0", 2), number(0), made.sizes(2), made.sizes(1)),
    })  # fmt: skip
    file.write_bytes(made.zipped(body, {"0": EIGHT}))
    found = arrays(file)
    assert len(found) == 5
    for array in found.values():
        assert array.tobytes() == EIGHT


# Plain values


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(file: Path, protocol: int) -> None:
    import argparse
    import collections
    import types

    values = {
        "int": 3, "low": -(2**63), "high": 2**64 - 1, "float": 0.1, "bool": True, "complex": 1 + 2j,
        "text": "caf\xe9 \u4e2d", "none": None, "empty": {}, "list": [1, [2.5, "x"]], "tuple": (1, 2, 3, 4),
        "ordered": collections.OrderedDict(a=1), "default": collections.defaultdict(list, a=2),
        "space": argparse.Namespace(lr=0.5, name="n"), "simple": types.SimpleNamespace(b=3),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3), "swapped": np.arange(3, dtype=">f8"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "scalar": np.float32(2.5),
        "mask": np.array([True, False]), "nothing": np.zeros((0, 2), np.float32),
        "days": np.array(["2001-01-01"], "M8[D]"), "objects": np.array([None, {}], object),
        "bytes": b"abc\xff", "set": {1, 2}, "frozen": frozenset([3]), "huge": 2**70, "slice": slice(3),
        1: 30, 2.5: 20, None: 40, (1, 2): 50,
    }  # fmt: skip
    content = pickle.dumps(values, protocol)
    file.write_bytes(made.archive({"x/data.pkl": content}))
    with open_source(str(file)) as source:
        found = {key: source.get(key) for key in source.arrays}
        assert source.metadata == {"text": "caf\xe9 \u4e2d", "list.1.1": "x", "space.name": "n"}
        notes = "\n".join(source.notes)
    expected = {
        "int": 3, "low": -(2**63), "high": np.uint64(2**64 - 1), "float": 0.1, "bool": True, "complex": 1 + 2j,
        "list.0": 1, "list.1.0": 2.5, **{f"tuple.{i}": i + 1 for i in range(4)}, "ordered.a": 1, "default.a": 2,
        "space.lr": 0.5, "simple.b": 3, "2.5": 20, "1": 30, "None": 40,
        "array": values["array"], "swapped": np.arange(3.0), "fortran": values["fortran"],
        "scalar": np.float32(2.5), "mask": values["mask"], "nothing": values["nothing"],
    }  # fmt: skip
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], np.asarray(value), strict=True)
    for left in (
        "days",
        "objects",
        "bytes",
        "set",
        "frozen",
        "huge",
        "slice",
        "the top level: 1 entries",
    ):
        assert re.search(rf"^{left}\b.* left out", notes, re.MULTILINE), (left, notes)


def test_a_checkpoint_without_arrays_says_what_it_has(file: Path) -> None:
    body = mapping({"model": name("models.yolo", "Model") + b")\x81}b"})
    file.write_bytes(made.zipped(body))
    message = r"holds no arrays\. model: models\.yolo\.Model is left out, as nothing in a file is run.*state_dict"
    with pytest.raises(pt.LoadError, match=message):
        pt.load(file)
    file.write_bytes(made.zipped(b"}"))
    assert not pt.collect(pt.load(file))


def test_a_single_array_has_no_name(file: Path) -> None:
    file.write_bytes(made.zipped(tensor(storage("0", 2), (2,)), {"0": EIGHT}))
    with pytest.raises(pt.LoadError, match="holds one array without a name: save a dict"):
        pt.load(file)


# Files that would run code


class Marked:
    """What a hostile pickle would leave behind."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ran"
        self.modules = set(sys.modules)

    def check(self) -> None:
        assert not self.path.exists()
        new = set(sys.modules) - self.modules
        assert not {m for m in new if not m.startswith(("numpy", "jax", "paramtree", "encodings"))}, new


def attacks(target: str) -> dict[str, bytes]:
    """Pickles that create a file if they are run, each in another way."""
    code = text(f"open({target!r}, 'w').close()")
    touch = text(f"touch {target}")
    system, run = name("os", "system"), name("builtins", "exec")
    stack = text("os") + text("system") + b"\x93"
    other = name("wsgiref.simple_server", "WSGIServer")  # an import that nothing else makes
    return {
        "global": system + group(touch) + b"R",
        "stack global": stack + group(touch) + b"R",
        "exec": run + group(code) + b"R",
        "eval": name("builtins", "eval") + group(text(f"open({target!r}, 'w').close()")) + b"R",
        "python 2": name("__builtin__", "eval") + group(code) + b"R",
        "inst": b"(" + code + b"ibuiltins\nexec\n",
        "obj": b"(" + system + touch + b"o",
        "newobj": system + group(touch) + b"\x81",
        "newobj with names": system + group(touch) + b"}\x92",
        "build": name("code", "InteractiveInterpreter") + b")R" + mapping({"__setstate__": system}) + b"b" + touch + b"b",
        "import": other + b")\x81",
        "getattr": call(name("builtins", "getattr"), name("os", "system"), text("__call__")) + group(touch) + b"R",
        "reconstruct": call(name("copyreg", "_reconstructor"), system, name("builtins", "object"), b"N"),
        "dotted": name("torch", "serialization.os.system") + group(touch) + b"R",
        "a tensor's function": call(name("torch._tensor", "_rebuild_from_type_v2"), system, name("torch", "Tensor"), group(touch), b"}"),
        "storage bytes": call(name("torch.storage", "_load_from_bytes"), b"C\x05" + b"cos\n."),
        "extension": b"\x82\x01" + group(touch) + b"R",
        "codec": call(name("_codecs", "encode"), touch, text("rot13")),
        "dtype": call(name("numpy", "dtype"), name("os", "system"), b"\x88", b"\x88"),
        "hook": call(name("collections", "defaultdict"), system, listed()) + text("k") + b"N" + b"s",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["top", "beside", "key", "list", "legacy", "sys_info"])
@pytest.mark.parametrize("what", attacks(""))
def test_nothing_in_a_file_is_run_or_imported(tmp_path: Path, what: str, place: str) -> None:
    bad = attacks(str(tmp_path / "ran"))[what]
    good = tensor(storage("0", 2), (2,))
    body = mapping({"a": good, "bad": bad})
    content = {
        "top": made.zipped(bad, {"0": EIGHT}),
        "beside": made.zipped(body, {"0": EIGHT}),
        "key": made.zipped(b"}(" + text("a") + good + bad + number(1) + b"u", {"0": EIGHT}),
        "list": made.zipped(listed(good, bad), {"0": EIGHT}),
        "legacy": made.legacy(body, {"0": (2, EIGHT)}),
        "sys_info": made.legacy(body, {"0": (2, EIGHT)}).replace(made.program(b"}"), made.program(bad)),
    }[place]
    file = tmp_path / "model.pt"
    file.write_bytes(content)
    marked = Marked(tmp_path)
    for read in (pt.peek, pt.load):
        with contextlib.suppress(pt.LoadError):
            assert len(pt.collect(read(file))) <= 2
        marked.check()


def test_the_attacks_are_attacks(tmp_path: Path) -> None:
    ran = []
    for what, bad in attacks(str(tmp_path / "ran")).items():
        with contextlib.suppress(Exception):  # many end with an error afterwards
            pickle.loads(made.program(bad))
        if (tmp_path / "ran").exists():
            ran.append(what)
            (tmp_path / "ran").unlink()
    assert {"global", "stack global", "exec", "eval", "python 2", "inst", "obj", "getattr"} <= set(ran)


def test_what_is_left_out_is_in_the_report(file: Path) -> None:
    body = mapping(
        {"a": tensor(storage("0", 2), (2,)), "bad": name("os", "system") + group(text("x")) + b"R"}
    )
    file.write_bytes(made.zipped(body, {"0": EIGHT}))
    tree, report = pt.load(file, report=True)
    assert list(pt.collect(tree)) == ["a"]
    assert report.notes == ["bad: os.system is left out, as nothing in a file is run."]
    assert report.notes[0] in str(report)


# Damage


def two(value: bytes, data: bytes = EIGHT) -> bytes:
    return made.zipped(mapping({"w": value}), {"0": data})


HUGE = 2**61
WHERE = storage("0", 2)
# fmt: off
DAMAGED: dict[str, tuple[bytes, str]] = {
    "a shape beyond the storage": (two(tensor(WHERE, (3,))), r"'w': has shape \(3,\).*reaches beyond its storage of 8 bytes"),
    "an offset beyond it": (two(tensor(WHERE, (2,), (1,), 1)), "reaches beyond"),
    "strides beyond it": (two(tensor(WHERE, (2,), (2,))), "reaches beyond"),
    "expanded beyond it": (two(tensor(WHERE, (9, 2), (0, 2))), "reaches beyond"),
    "a huge stride": (two(tensor(WHERE, (2,), (HUGE,))), "reaches beyond"),
    "a huge offset": (two(tensor(WHERE, (1,), (1,), HUGE)), "reaches beyond"),
    "a negative stride": (two(tensor(WHERE, (2,), (-1,), 1)), "which no tensor has"),
    "a negative offset": (two(tensor(WHERE, (2,), (1,), -1)), "which no tensor has"),
    "a negative size": (two(tensor(WHERE, (-1,), (1,))), r"no array can have shape \(-1,\)"),
    "two negative sizes": (two(tensor(WHERE, (-1, -2), (1, 1))), "no array can have shape"),
    "a huge size": (two(tensor(WHERE, (HUGE, 4), (0, 0))), "no array can have shape"),
    "zero and huge": (two(tensor(WHERE, (0, HUGE, HUGE), (0, 0, 0))), "no array can have shape"),
    "beyond all numbers": (two(tensor(WHERE, (2**1000,), (1,))), "has a shape, strides or an offset that no array has"),
    "too many axes": (two(tensor(WHERE, (1,) * 40)), "has a shape, strides or an offset"),
    "fewer strides": (two(tensor(WHERE, (1, 2), (1,))), "which no tensor has"),
    "a shape of texts": (two(call(name(UTILS, "_rebuild_tensor"), WHERE, number(0), group(text("a")), made.sizes(1))), "that no array has"),
    "a shape of booleans": (two(call(name(UTILS, "_rebuild_tensor"), WHERE, number(0), group(b"\x88"), made.sizes(1))), "that no array has"),
    "no storage": (two(call(name(UTILS, "_rebuild_tensor"), text("0"), number(0), made.sizes(1), made.sizes(1))), "a tensor has no storage"),
    "no arguments": (two(call(name(UTILS, "_rebuild_tensor"))), "damaged.*missing"),
    "a storage that is not there": (two(tensor(storage("1", 2), (2,))), "the storage '1': is not in the file"),
    "a storage out of the folder": (two(tensor(storage("../data.pkl", 2), (2,))), "is not in the file"),
    "a storage of more": (two(tensor(storage("0", 3), (2,))), "the storage '0': has 8 bytes, too few for 3 of float32"),
    "a storage of too many": (two(tensor(storage("0", 2**70), (2,))), "a storage has a wrong number"),
    "a storage of a negative number": (two(tensor(storage("0", -1), (2,))), "a storage has a wrong number"),
    "a storage of an unknown type": (two(tensor(storage("0", 2, "Strange"), (2,))), "unknown type, torch.StrangeStorage"),
    "an identifier of nothing": (two(text("x") + b"Q"), "something that is no storage"),
    "no dict": (made.zipped(number(3)), "holds no dict of arrays, but a pickled int"),
    "nothing": (made.zipped(b""), "damaged"),
    "two things": (made.zipped(b"}}"), "damaged"),
    "no end": (made.archive({"a/data.pkl": b"\x80\x02}"}), "pickle exhausted before seeing STOP"),
    "an unknown opcode": (made.zipped(b"\xff"), "opcode .* unknown"),
    "a later protocol": (made.archive({"a/data.pkl": b"\x80\x06}."}), "its protocol is 6, and 5 is the newest"),
    "an empty stack": (made.zipped(b"}0000"), "damaged"),
    "no mark": (made.zipped(b"}u"), "damaged"),
    "a memo of nothing": (made.zipped(get(3)), "damaged: 3"),
    "a memo too far": (made.zipped(b"}p99999999999999\n"), "the memo has no place"),
    "a name that is no text": (made.zipped(b"NN\x93"), "the name of an object is not a text"),
    "an odd number of parts": (made.zipped(b"}(N" + b"u"), "damaged"),
    "items of a number": (made.zipped(number(1) + b"(NNu"), "sets items of a int"),
    "an append to a dict": (made.zipped(b"}Na"), "appends to a Entries"),
    "the state of a number": (made.zipped(number(1) + b"Nb"), "damaged"),
    "buffers elsewhere": (made.zipped(b"\x97"), "refers to buffers outside"),
    "a long text": (made.zipped(b"X\xff\xff\xff\xff"), "damaged"),
    "a longer text": (made.zipped(b"\x8d" + b"\xff" * 7 + b"\x7f"), "damaged"),
    "the longest text": (made.zipped(b"\x8d" + b"\xff" * 8), "damaged"),
    "long bytes": (made.zipped(b"\x8e" + b"\xff" * 7 + b"\x7f"), "damaged"),
    "a long number": (made.zipped(b"\x8b\xff\xff\xff\x7f"), "damaged"),
    "a negative number of bytes": (made.zipped(b"\x8b\xff\xff\xff\xff"), "damaged"),
    "a text that is no utf-8": (made.zipped(b"X\1\0\0\0\xff"), "damaged"),
    "digits without end": (made.zipped(b"I" + b"9" * 9000 + b"\n"), "damaged"),
    "a name twice": (made.zipped(b"}(" + text("a") + mapping({"b": number(1)}) + text("a.b") + number(2) + b"u"), "'a.b': appears twice"),
    "an odd name": (made.zipped(mapping({"../x": number(1)})), "is not a valid name"),
    "no name": (made.zipped(mapping({"": number(1)})), "is not a valid name"),
    "a surrogate": (made.zipped(mapping({"\ud800": number(1)})), "is not a valid name"),
    "no pickle": (made.archive({"a/data/0": b""}), "is not a .npy file"),
    "another byte order": (made.zipped(b"}", order="middle"), "'archive/byteorder': is b'middle', not little or big"),
    "no legacy magic": (made.program(number(1)), "is a pickle, but not one of torch.save's. A pickle is not run"),
    "another pickle": (pickle.dumps({"a": 1}), "is a pickle, but not one"),
    "a pickle in text": (pickle.dumps({"a": 1}, 0), "is a pickle, but not one"),
    "another legacy version": (made.legacy(b"}").replace(made.program(number(1001)), made.program(number(1002))), "unknown version"),
    "a legacy storage cut off": (made.legacy(made.small(), {"0": (2, EIGHT)})[:-1], "'0': has 2 elements, but 7 bytes are left"),
    "a legacy storage of a huge size": (made.legacy(made.small(), {"0": (HUGE, EIGHT)}), "but 8 bytes are left"),
    "a legacy storage of a negative size": (made.legacy(made.small(), {"0": (-1, EIGHT)}), "but 8 bytes are left"),
    "a legacy storage that is not listed": (made.legacy(made.small()), "the storage '0': is not in the file"),
    "a legacy storage of no tensor": (made.legacy(b"}", {"0": (2, EIGHT)}), "or one that belongs to no tensor"),
    "numpy's array of fewer bytes": (
        two(call(name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88"), b"C\4abcd")),
        "'w': has 4 bytes; its shape needs 8",
    ),
    "a tar file": (b"sys_info".ljust(257, b"\0") + b"ustar\0" + bytes(300), "is a tar file, as torch wrote before"),
}
# fmt: on


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_says_what_is_wrong(file: Path, what: str) -> None:
    data, message = DAMAGED[what]
    file.write_bytes(data)
    with pytest.raises(pt.LoadError, match=f"(?s)^{re.escape(str(file))}: .*{message}"):
        pt.load(file)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_file_that_is_cut_off_anywhere(file: Path, container: str) -> None:
    body = made.small()
    data = (
        made.zipped(body, {"0": EIGHT}) if container == "zip" else made.legacy(body, {"0": (2, EIGHT)})
    )
    for size in [0, *range(2, len(data))]:  # the first byte alone is an empty dict of Flax
        file.write_bytes(data[:size])
        with pytest.raises(pt.LoadError, match=re.escape(str(file)) + r"[: ]+.{8,}"):
            pt.load(file)
    file.write_bytes(data)
    np.testing.assert_array_equal(pt.load(file).a.b, [1.5, -2])


def test_the_directory_of_a_zip_file_is_not_believed(file: Path) -> None:
    data = made.zipped(made.small(), {"0": EIGHT})
    at = data.rfind(b"PK\1\2") + 42  # where the last member is
    for where in (0, 1, len(data), 2**31):
        file.write_bytes(data[:at] + struct.pack("<I", where) + data[at + 4 :])
        with pytest.raises(
            pt.LoadError, match="not where the directory|damaged|is not in the file|too few"
        ):
            pt.load(file)


# Bombs


def shared_lists(depth: int, width: int, leaf: bytes) -> bytes:
    """A list of lists of lists, each of which has the one before many times."""
    out = leaf + put(0)
    for level in range(depth):
        out += b"0" + b"](" + get(level) * width + b"e" + put(level + 1)
    return out


def itself() -> bytes:
    return b"]" + put(0) + b"(" + get(0) * 9 + b"e"


def collisions(count: int) -> bytes:
    """A dict whose keys have one hash, and an array."""
    keys = b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, count))
    return b"}(" + keys + text("a") + number(1) + b"u"


BOMBS: dict[str, bytes] = {
    "lists of lists": made.zipped(shared_lists(60, 40, b"K\1")),
    "lists of nothing": made.zipped(shared_lists(60, 40, b"]")),
    "lists of tensors": made.zipped(shared_lists(60, 40, tensor(storage("0", 2), (2,))), {"0": EIGHT}),
    "a list of itself": made.zipped(itself()),
    "a dict of itself": made.zipped(b"}" + put(0) + text("a") + get(0) + b"s"),
    "deep lists": made.zipped(b"]" * 200_000 + b"a" * 199_999),
    "deep tuples": made.zipped(b")" + b"\x85" * 200_000),
    "deep tuples as a key": made.zipped(b"})" + b"\x85" * 200_000 + b"Ns"),
    "deep tuples as an identifier": made.zipped(b")" + b"\x85" * 200_000 + b"Q"),
    "wide tuples as a key": made.zipped(b"}" + shared_lists(60, 40, b"]").replace(b"](", b"(").replace(b"e", b"t") + b"Ns"),
    "wide tuples as a protocol": made.legacy(b"}").replace(
        made.program(number(1001)),
        made.program(shared_lists(60, 40, b"]").replace(b"](", b"(").replace(b"e", b"t")),
    ),
    "keys of one hash": made.zipped(collisions(100_000)),
    "long names again and again": made.zipped(text("x" * 100_000) + put(0) + b"0](" + (get(0) * 2 + b"\x93") * 20_000 + b"e"),
    "a long key again and again": made.zipped(text("x" * 100_000) + put(0) + b"0](" + (b"}" + get(0) + b"K\1s") * 20_000 + b"e"),
    "a long key of nothing": made.zipped(text("x" * 100_000) + put(0) + b"0](" + (b"}" + get(0) + b"Ns") * 20_000 + b"e"),
    "sizes again and again": made.zipped(
        b"](" + b"N" * 50_000 + b"e" + put(0) + b"0" + name("torch", "Size") + put(1) + b"0](" + (get(1) + get(0) + b"\x85R") * 20_000 + b"e"
    ),
    "bytes again and again": made.zipped(
        text("x" * 100_000) + put(0) + b"0" + name("_codecs", "encode") + put(1) + b"0](" + (get(1) + get(0) + b"\x85R") * 20_000 + b"e"
    ),
    "states again and again": made.zipped(
        mapping({f"{i}": b"N" for i in range(20_000)}) + put(0) + b"0" + name("argparse", "Namespace") + put(1)
        + b"0](" + (get(1) + b")R" + get(0) + b"b") * 20_000 + b"e"
    ),
    "marks": made.zipped(b"(" * 300_000 + b"}"),
    "numbers": made.zipped(b"](" + b"K\1" * 300_000 + b"e"),
    "tensors": made.zipped(tensor(storage("0", 2), (2,)) + put(0) + b"0](" + get(0) * 100_000 + b"e", {"0": EIGHT}),
    "a packed pickle": made.archive({"a/data.pkl": made.program(text("x" * 2**26))}, packed=True),
    "a huge storage, packed": made.zipped(mapping({"a": tensor(storage("0", 2**24), (2**24,))}), {"0": bytes(2**26)}, packed=True),
    "expanded": made.zipped(mapping({"a": tensor(storage("0", 2), (2**28, 2), (0, 1))}), {"0": EIGHT}),
    "one storage for all": made.zipped(
        mapping({f"a{i}": tensor(storage("0", 2**16), (2**16 - i,)) for i in range(500)}), {"0": bytes(2**18)}
    ),
    "wide views": made.zipped(
        mapping({f"a{i}": tensor(storage("0", 2**16), (2,), (2**16 - 1 - i,)) for i in range(9000)}), {"0": bytes(2**18)}
    ),
}  # fmt: skip


HARMLESS = ("numbers", "marks", "keys of one hash")


@pytest.mark.slow
@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_does_not_go_off(file: Path, what: str) -> None:
    file.write_bytes(BOMBS[what])
    tracemalloc.start()
    if what in HARMLESS:
        pt.load(file)
    else:
        with pytest.raises(pt.LoadError, match=re.escape(str(file))):
            pt.load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # An opcode of a byte makes an object of a hundred, so what a pickle makes is bounded in its size.
    assert peak < 110 * min(file.stat().st_size, 2**20) + 2**21


def test_what_expands_is_read_if_somebody_expects_its_shape(file: Path) -> None:
    body = mapping({"a": tensor(storage("0", 2), (2**18, 2), (0, 1))})
    file.write_bytes(made.zipped(body, {"0": EIGHT}))
    with pytest.raises(pt.LoadError, match="would take 2,097,152 bytes of memory.*like="):
        pt.load(file)
    tree = pt.load(file, like={"a": jax.ShapeDtypeStruct((2**18, 2), np.float32)})
    np.testing.assert_array_equal(tree["a"][-1], [1.5, -2])


# Against torch itself


def random_state(torch: Any, seed: int) -> dict[str, Any]:
    """A state dict of views of a few storages."""
    rng = np.random.default_rng(seed)
    names = [
        "float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool", "complex64",
        "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64",
    ]  # fmt: skip
    shapes = [(), (1,), (3,), (4, 6), (2, 3, 4), (0,), (0, 4), (5, 1)]

    def base() -> Any:
        dtype, shape = getattr(torch, str(rng.choice(names))), shapes[rng.integers(len(shapes))]
        count = int(np.prod(shape)) * dtype.itemsize
        values = torch.tensor(rng.integers(0, 2 if dtype == torch.bool else 256, count))
        data = torch.empty(count, dtype=torch.uint8).copy_(values)
        return data.view(dtype).reshape(shape)

    changes: list[Any] = [
        lambda t: t.transpose(0, -1) if t.ndim > 1 else t,
        lambda t: t[1:] if t.ndim and len(t) > 1 else t,
        lambda t: t[..., ::2] if t.ndim else t,
        lambda t: t.expand(3, *t.shape),
        lambda t: t[0] if t.ndim and len(t) else t,
        lambda t: t.conj() if t.is_complex() else t,
        lambda t: torch.nn.Parameter(t, requires_grad=False) if t.is_floating_point() else t,
        lambda t: t,
    ]
    pool = [base() for _ in range(3)]
    state = {}
    for i in range(rng.integers(1, 8)):
        value = pool[rng.integers(3)]
        for _ in range(rng.integers(3)):
            value = changes[rng.integers(len(changes))](value)
        state[f"layer{i}.weight"] = value
    return state


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_random_state_dicts_of_torch(file: Path, new: bool) -> None:
    torch = pytest.importorskip("torch")
    for seed in range(100):
        state = random_state(torch, seed)
        try:
            torch.save(state, file, _use_new_zipfile_serialization=new)
        except RuntimeError:  # legacy files lack some
            continue
        found = arrays(file)
        assert set(found) == set(state)
        for key, value in state.items():
            whole = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach().resolve_conj())
            raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
            assert found[key].dtype.name == str(value.dtype).removeprefix("torch.")
            assert found[key].shape == tuple(value.shape) and found[key].tobytes() == raw
        with open_source(str(file)) as source:
            for alias, first in source.ties.items():
                assert state[alias].data_ptr() == state[first].data_ptr()


def test_a_saved_optimizer_and_module_of_torch(file: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LSTM(4, 5))
    net(torch.ones(2, 3))[0].sum().backward()
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.step()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}, file)
    tree, report = pt.load(file, report=True)
    assert not report.notes and int(tree.step) == 7
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(tree["net/" + key.replace(".", "/")], value.numpy())
    np.testing.assert_array_equal(
        tree["optimizer/state/0/exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"].numpy()
    )
    torch.save(net, file)
    with pytest.raises(pt.LoadError, match="Sequential, which only its own code can read"):
        pt.load(file)
    torch.save(net.state_dict(), file, pickle_protocol=4)
    assert len(pt.collect(pt.load(file))) == 6


def test_large_arrays_are_mapped_and_never_written_to(tmp_path: Path) -> None:
    size = 2**18
    values = np.arange(size, dtype=np.float32)
    whole = made.tensor(made.storage("0", size), (512, 512))
    few = made.tensor(made.storage("1", 2), (2,))
    for pad in range(64):  # torch aligns its storages
        body = made.mapping({"w": whole, "b": few, "text": made.text("x" * pad)})
        data = made.zipped(body, {"0": values.tobytes(), "1": values[:2].tobytes()})
        begin = data.index(values[:100].tobytes())
        if begin % 64 == 0:
            break
    assert begin % 64 == 0
    file = tmp_path / "m.pt"
    file.write_bytes(data)
    for like in (None, {"w": np.zeros((512, 512), np.float32), "b": np.zeros(2, np.float32)}):
        loaded = pt.load(file, like=like)
        step = jax.jit(lambda tree: jax.tree.map(lambda a: a * 2, tree), donate_argnums=0)
        changed = step(jax.tree.map(jnp.asarray, loaded))
        np.testing.assert_array_equal(np.asarray(changed["w"]).ravel(), 2 * values)
        if like is not None:
            loaded["w"][:] = 7  # a numpy array may be written to
        assert file.read_bytes() == data
        np.testing.assert_array_equal(np.asarray(pt.load(file)["w"]).ravel(), values)
    file.write_bytes(data[: begin + 1000])
    with pytest.raises(pt.LoadError, match=r"m\.pt"):
        pt.load(file)
