"""Fuzzing ``pt.load`` with damaged and hostile files: each must give a tree or a ``LoadError``.

As a command: ``python tests/io/fuzz_files.py --format all --inputs 200000 --seed 0``. An input is a
valid file with a few edits, some of raw bytes and some aware of the format. It depends only on the
seed, the format and its number, so ``--only NUMBER`` reproduces it. A problem is printed once for each
place in the source; ``--keep FOLDER`` keeps its file.

Problems are exceptions other than ``LoadError``, messages that do not name the file, warnings, loads
that take longer than a second or more memory than a small multiple of the file, booleans that are
neither 0 nor 1, and trees that cannot be printed, saved or loaded again.
"""

import argparse
import contextlib
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import unittest.mock
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import paramtree as pt
from paramtree.core.structure import build
from paramtree.core.tree import flatten, unflatten

if not __package__:  # run as a command
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.io import fuzz_torch

FORMATS = ("safetensors", "params", "npz", "torch", "flax", "keras")
ENDINGS = {
    "torch": "pt",
    "flax": "msgpack",
    "keras": "weights.h5",
}  # where the format is called otherwise
SLOW, TOO_SLOW = 5.0, 20.0  # seconds, long enough for a busy machine: only a hang fails
MIB = 2**20

# fmt: off
INTS = [
    0, 1, 2, 3, 7, 8, 255, 256, 4096, 65535, 65536, 2**20, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**40, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63),
]
NAMES = [
    "", ".", "..", "../x", "/etc/x", "a/../b", "a/./b", "a//b", "a/", "/", "a", "a.b", "a.b.c", "a\0b", "\0",
    "\ud800", "\xe9", "\xb2", "1\xb2", "\xb2/\xb3", "\u0663", "w\n", "\x1b[31m", "0", "00", "1e9", "-1",
    "a\\..\\b", "C:\\x", "__metadata__", "paramtree", "paramtree.json", "dense0", "dense0.weight",
    "dense0_weight", "dense0/weight", "0.weight", "arg:a", "aux:a", "arg:", "aux:arg:a", "\u202eb",
    "\U0001f600", "_", "x" * 300, "y" * 70_000, ".".join("ab" * 1200), "/".join("c" * 1001), "__class__",
    "data.pkl",
]
TAGS = [
    "bfloat16", "int4", "uint4", "int2", "uint2", "float4_e2m1fn", "float6_e2m3fn", "float8_e4m3", "bool",
    "float32", "complex64", "complex256", "longdouble", "clongdouble", "object", "O", "|O", "V4", "void",
    "void32", "void0", "V0", "U", "str", "str32", "S0", "M8[s]", "m8", "datetime64[s]", "a", "a4", "f4,f4",
    "(2,)f4", "finfo", "__doc__", "__file__", "__name__", "", " ", ">f4", "Bool", "int", "generic", "\0",
    "key:", "key:rbg", "key:threefry2x32", "key:unsafe_rbg", "key:nonesuch", "f4" * 20_000,
]
CODES = [
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U16", "I16", "F16",
    "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64", "F4", "F6_E2M3", "F6_E3M2", "X", "",
]
SEPS = [".", "/", "_", "", "..", "\0", " ", "ab", "\ud800", "s" * 1000]
DESCRS = [
    "<f4", ">f4", "|b1", "<f8", "<i4", "|u1", "|O", "O", "<U3", "|S2", "|V4", "<M8[s]", "<m8", "<c8", "<c32",
    "<f16", "<f2", "=f4", "f", "a", "<f4,<f4", "(3,)f4", "", "?", "|b", "<u8", "\0", "x" * 300, "float32",
    "bool", "|i0", "|S0", "|V0",
]
SHAPES = [
    "()", "(2,)", "(0,)", "(4, 3)", "(-1,)", "(2**62,)", "(2,", "[2]", "2", "(1.5,)", "(True,)", "('a',)",
    "(0, 1099511627776)", "(4611686018427387904, 4, 0)", "(1,)*40", f"({'1, ' * 40})", "None",
    "(99999999999999999999,)", f"(0x{'f' * 9000},)", "(" * 200 + ")" * 200, "(1099511627776,)",
]
HEADERS = [  # of .npy
    b"", b"[]", b"{", b"{}", b"()", b"\xff\n", b"'" + b"\\z" * 9 + b"'", b"{'descr': '<f4'}", b"1" * 9999, b"\0",
    b"(" * 5000, b"-" * 5000 + b"1", b"{1: 2}", b" " * 20_000, b"__import__('os')", b"{[]: 1}", b"[" * 99,
    b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", b"{'descr': None}",
]
# fmt: on


# A small tree of every kind of leaf, and the valid files


def varied(native: bool = False) -> pt.ParamTree:
    """A tree with ties, kinds, empty arrays, scalars and, unless ``native``, all sorts of dtypes."""
    rng = np.random.default_rng(0)
    leaves: dict[str, Any] = {
        "embed/weight": rng.normal(size=(4, 3)).astype(np.float32),
        "dense0/weight": rng.normal(size=(2, 3)).astype(np.float32),
        "dense0/bias": jnp.ones(2),
        "norm/mean": np.arange(3.0, dtype=np.float32),
        "step": np.array(7, np.int32),
        "none": np.zeros((0, 3), np.float32),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "mask": np.array([True, False, True]),
        "wide": np.array([1, -(2**40)]),
    }
    if not native:
        leaves["quarter"] = jnp.arange(3).astype(jnp.float8_e4m3fn)
        leaves["eighth"] = jnp.arange(5).astype(jnp.int4)
        leaves["wave"] = np.array([1 + 2j], np.complex64)
    items: list[tuple[tuple[str, ...], str | None]] = [(tuple(p.split("/")), p) for p in leaves]
    items[3:3] = [(("levels", "below"), None)]
    items.append((("decoder", "weight"), "embed/weight"))
    kinds = {path: "state" if path in ("norm/mean", "step") else "param" for path in leaves}
    structure, order = build(items, kinds)
    return unflatten(structure, tuple(leaves[label] for label in order))


def with_holes(tree: pt.ParamTree) -> pt.ParamTree:
    kept = range(1, len(flatten(tree)[1]), 2)
    return unflatten(flatten(tree)[0].keep(kept), tuple(flatten(tree)[1][i] for i in kept))


def small() -> pt.ParamTree:
    """A minimal tree."""
    return pt.from_tree({"a": {"b": np.ones(2, np.float32)}})


def keys() -> pt.ParamTree:
    return pt.from_tree({"a": jax.random.split(jax.random.key(0), 3), "b": jax.random.key(1)})


def flat(tree: pt.ParamTree) -> dict[str, np.ndarray]:
    """Arrays by name; a tied one under both names, with different values."""
    tree = pt.untie(tree)
    found = {name: np.array(leaf) for name, leaf in pt.collect(tree, sep=".").items()}
    found["decoder.weight"] = np.full_like(found["decoder.weight"], np.nan)
    return found


class Valid(NamedTuple):
    """A valid file, and the trees to load it and its edited copies into."""

    data: bytes
    likes: tuple[pt.ParamTree, ...]


def corpus(kind: str) -> dict[str, Valid]:
    """Valid files of a format by description; deterministic."""
    if kind in ("flax", "keras"):
        files = flax_files() if kind == "flax" else keras_files()
        likes = varied(kind == "keras"), small()
        return {name: Valid(data, likes) for name, data in files.items()}
    if kind == "torch":
        return {name: Valid(data, (small(), varied())) for name, data in fuzz_torch.files().items()}
    whole, least, one = varied(kind == "params"), small(), varied(kind == "params").dense0
    same_time = unittest.mock.patch("time.localtime", return_value=time.gmtime(10**9))
    with tempfile.TemporaryDirectory() as folder, same_time:
        path = f"{folder}/file.{kind}"

        def saved(tree: pt.ParamTree, **options: Any) -> bytes:
            pt.save(path, tree, **options)
            return pathlib.Path(path).read_bytes()

        files = {
            "whole": Valid(saved(whole), (whole, one)),
            "holes": Valid(saved(with_holes(whole)), (with_holes(whole),)),
            "slashes": Valid(saved(one, sep="/"), (one, whole)),
            "least": Valid(saved(least), (least,)),
            "untied": Valid(
                saved(pt.replace(pt.untie(whole), {"decoder_weight": np.ones((4, 3))})), (whole,)
            ),
            "empty": Valid(saved(pt.from_tree({})), (least,)),
        }
        if kind == "safetensors":
            from safetensors.numpy import save

            files["keys"] = Valid(saved(keys()), (keys(),))
            files["plain"] = Valid(save(_known(flat(whole))), (whole,))
            files["metadata"] = Valid(save(_known(flat(whole)), {"format": "pt"}), (whole,))
            files["single"] = Valid(save({"a.b": np.ones(2, np.float32)}), (least,))
        if kind == "npz":
            files["keys"] = Valid(saved(keys()), (keys(),))
            for name, write in {"savez": np.savez, "compressed": np.savez_compressed}.items():
                buffer = io.BytesIO()
                write(buffer, **{k: v for k, v in flat(varied(True)).items() if k != "half"})
                files[name] = Valid(buffer.getvalue(), (whole,))
            odd = {"a.b": npy("<f4", "(2,)", bytes(8), version=(2, 0)), "c": npy(">f8", "()", bytes(8))}
            odd["d"] = npy("<i2", "(2, 3)", bytes(12), fortran="True", version=(3, 0))
            files["odd"] = Valid(zipped({f"{k}.npy": (v, True) for k, v in odd.items()}), (least,))
        if kind == "params":
            files |= {name: Valid(data, (whole, least)) for name, data in handmade().items()}
    return files


def _known(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a if a.dtype.name != "int4" else a.view(np.int8) for name, a in arrays.items()}


def npy(
    descr: str, shape: str, data: bytes, *, fortran: str = "False", version: tuple[int, int] = (1, 0)
) -> bytes:
    """An .npy file, whose header may be wrong."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"
    return npy_of(text.encode("utf-8", "surrogateescape"), data, version)


def npy_of(text: bytes, data: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def zipped(members: dict[str, tuple[bytes, bool]]) -> bytes:
    """A zip file of members, each with a flag for compression."""
    return zipped_list([(name, data, packed) for name, (data, packed) in members.items()])


def zipped_list(members: list[tuple[str, bytes, bool]]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as file:
        warnings.simplefilter("ignore")  # duplicate names
        for name, data, packed in members:
            info = zipfile.ZipInfo(name, (2001, 9, 9, 1, 46, 40))
            info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            file.writestr(info, data)
    return buffer.getvalue()


def dims(*shape: int) -> bytes:
    return struct.pack(f"<i{len(shape)}q", len(shape), *shape)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *(n % 2**64 for n in numbers))


_V1, _V2, _V3 = (struct.pack("<I", 0xF993FAC8 + i) for i in range(3))
_CPU_F4 = struct.pack("<iii", 1, 0, 0)
_I8 = struct.pack("<i", 6)


def params(arrays: list[bytes], names: list[bytes]) -> bytes:
    """A .params file of encoded arrays and names."""
    listed = b"".join(u64(len(name)) + name for name in names)
    return u64(0x112, 0, len(arrays)) + b"".join(arrays) + u64(len(names)) + listed


def v2(*shape: int, dtype: int = 0, size: int = 4) -> bytes:
    head = _V2 + struct.pack("<i", 0) + dims(*shape) + struct.pack("<iii", 1, 0, dtype)
    return head + bytes(range(1, 1 + size * math.prod(shape)))


def rows(shape: tuple[int, ...] = (4, 2), index: tuple[int, ...] = (1, 3)) -> bytes:
    """A row-sparse array."""
    data = np.ones((len(index), *shape[1:]), np.float32)
    head = _V2 + struct.pack("<i", 1) + dims(*data.shape) + dims(*shape) + _CPU_F4
    return head + _I8 + dims(len(index)) + data.tobytes() + np.array(index, np.int64).tobytes()


def csr(
    shape: tuple[int, ...] = (2, 3), starts: tuple[int, ...] = (0, 1, 2), columns: Any = (0, 2)
) -> bytes:
    head = _V2 + struct.pack("<i", 2) + dims(len(columns)) + dims(*shape) + _CPU_F4
    head += _I8 + dims(len(starts)) + _I8 + dims(len(columns))
    index = np.array([*starts, *columns], np.int64).tobytes()
    return head + np.ones(len(columns), np.float32).tobytes() + index


def handmade() -> dict[str, bytes]:
    """Files in .params format as other versions of MXNet write them."""
    f4 = np.arange(6, dtype=np.float32).tobytes()
    v0 = struct.pack("<III", 2, 2, 3) + _CPU_F4 + f4
    v1 = _V1 + dims(2, 3) + _CPU_F4 + f4
    v3 = _V3 + struct.pack("<i", 0) + dims() + _CPU_F4 + bytes(4)
    v3_empty = _V3 + struct.pack("<i", 0) + dims(0, 3) + _CPU_F4
    nothing = _V2 + struct.pack("<ii", 0, 0)
    return {
        "v0": params([v0, v0], [b"a", b"b"]),
        "v1": params([v1], [b"dense0_weight"]),
        "v3": params([v3, v3_empty, v2(2)], [b"s", b"e", b"a.b"]),
        "rows": params([rows(), v2(2)], [b"r", b"a.b"]),
        "csr": params([csr(), v2(2)], [b"c", b"a.b"]),
        "nameless": params([v2(2)], []),
        "exported": params([v2(2), v2(3)], [b"arg:net_dense7_weight", b"aux:net_norm0_mean"]),
        "gluon": params([v2(2, 3), v2(2)], [b"net0_dense3_weight", b"net0_dense3_bias"]),
        "none": params([nothing], [b"a"]),
        "dtypes": params(
            [v2(2, dtype=i, size=s) for i, s in enumerate([4, 8, 2, 1, 4, 1, 8, 1, 2, 2, 4, 8, 2])],
            [b"t%d" % i for i in range(13)],
        ),
    }


# Flax's files: a packer that packs what it is told


class Raw(bytes):
    """Bytes that are in msgpack already."""


def msgpack(value: Any, wide: bool = False) -> Raw:
    """A value in msgpack: its shortest form if it is small, else or if ``wide`` the longest."""
    if isinstance(value, Raw):
        return value
    if value is None or isinstance(value, bool):
        return Raw({None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value])
    if isinstance(value, float):
        return Raw(b"\xcb" + struct.pack(">d", value))
    if isinstance(value, int):
        small = 0 <= value < 128 and not wide
        long = (b"\xd3" if value < 0 else b"\xcf") + struct.pack(">Q", value % 2**64)
        return Raw([value] if small else long)
    if isinstance(value, bytes):
        return Raw(_counted(len(value), 0xC4, 255 if not wide else 0, 0xC6) + value)
    if isinstance(value, str):
        data = utf8(value)
        return Raw(_counted(len(data), 0xA0, 31 if not wide else -1, 0xDB) + data)
    first, long = (0x80, 0xDF) if isinstance(value, dict) else (0x90, 0xDD)
    parts = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
    inside = b"".join(msgpack(part, wide) for part in parts)
    return Raw(_counted(len(value), first, 15 if not wide else -1, long) + inside)


def _counted(size: int, first: int, most: int, long: int) -> bytes:
    """What begins a value of a size: one byte or two if it is small, else five."""
    if size > most:
        return struct.pack(">BI", long, size)
    return bytes([first + size]) if first < 0xC0 else bytes([first, size])


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def extension(code: int, data: bytes) -> Raw:
    return Raw(_counted(len(data), 0xC7, 255, 0xC9) + bytes([code % 256]) + data)


def flax_array(shape: Any, dtype: Any, data: Any, code: int = 1) -> Raw:
    """An array as Flax encodes it, whose parts may be wrong."""
    return extension(code, msgpack((shape, dtype, data)))


def flax_leaf(array: Any) -> Raw:
    array = np.asarray(array)
    return flax_array(array.shape, array.dtype.name, array.tobytes())


def flax_chunked(array: np.ndarray, size: int) -> dict[str, Any]:
    """An array in pieces of a number of elements."""
    pieces = [array.reshape(-1)[i : i + size] for i in range(0, array.size, size)]
    shape = {str(i): n for i, n in enumerate(array.shape)}
    parts = {str(i): flax_leaf(piece) for i, piece in enumerate(pieces)}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": parts}


def flax_files() -> dict[str, bytes]:
    def nested(tree: pt.ParamTree) -> dict[str, Any]:
        return {
            name: nested(leaf) if isinstance(leaf, pt.ParamTree) else flax_leaf(leaf)
            for name, leaf in tree.items()
        }

    odd = {"n": 3, "m": -3, "f": 0.5, "t": True, "none": None, "text": "some", "list": [1, [2, {}]]}
    odd |= {"big": 2**64 - 1, "low": -(2**63), "c": extension(2, msgpack((1.0, 2.0))), "bytes": b"abc"}
    odd |= {
        "x": extension(9, b"abc"),
        "s": flax_array((), "float16", b"ab", 3),
        5: Raw(b"\xca\0\0\0\0"),
    }
    return {
        "whole": msgpack(nested(varied())),
        "least": msgpack(nested(small())),
        "wide": msgpack(nested(small()), wide=True),
        "odd": msgpack(odd),
        "empty": b"\x80",
        "chunked": msgpack({"a": {"b": flax_chunked(np.arange(12, dtype=np.int16).reshape(3, 4), 5)}}),
        "state": msgpack({"params": odd, "batch_stats": {"a.b": flax_leaf(np.ones(3))}}),
    }


# Keras's files, in both of HDF5's generations


def hdf5(fill: Callable[[Any], Any], **options: Any) -> bytes:
    """A file that a function fills."""
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        fill(file)
    return buffer.getvalue()


def keras_files() -> dict[str, bytes]:
    def keras3(file: Any) -> None:  # as model.save_weights of Keras 3
        for layer, width in {"dense": 3, "dense_1": 2}.items():
            for group in ("layers", "optimizer"):
                file[f"{group}/{layer}/vars/0"] = np.ones((width, 2), np.float32)
                file[f"{group}/{layer}/vars/1"] = np.arange(2.0)
        file.create_group("layers/dropout/vars")
        half = file.create_dataset("half", data=np.arange(3).astype(jnp.bfloat16))
        half.attrs["dtype"] = "bfloat16"
        file["mask"], file["step"], file["none"] = (
            np.array([True, False]),
            np.int64(7),
            np.zeros((0, 3)),
        )
        file["swapped"] = np.arange(3, dtype=">i4")
        file["tied"] = file["step"]

    def keras2(file: Any) -> None:  # as model.save of Keras 2
        file.attrs["layer_names"] = [b"dense_1", b"dense"]
        file.attrs["keras_version"] = "2.9.0"
        for layer in ("dense", "dense_1"):
            names = [f"{layer}/kernel:0", f"{layer}/bias:0"]
            file.create_group(layer).attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                file[f"{layer}/{name}"] = np.ones(2, np.float32)

    def packed(file: Any) -> None:
        values = np.arange(300, dtype=np.int32).reshape(20, 15)
        file.create_dataset("gzip", data=values, compression="gzip", shuffle=True)
        file.create_dataset("chunks", data=values, chunks=(7, 4))
        file.create_dataset("grows", data=values, maxshape=(None, 15), chunks=(8, 15))
        file.create_dataset("grows2", data=values, maxshape=(None, None), chunks=(8, 8))

    def one(file: Any) -> None:
        file["a/b"] = np.ones(2, np.float32)

    return {
        "whole": hdf5(keras3),
        "latest": hdf5(keras3, libver="latest", track_order=True),
        "keras2": hdf5(keras2),
        "packed": hdf5(packed),
        "one chunk": hdf5(
            lambda file: file.create_dataset("a/b", data=np.ones(2, "f4"), chunks=(2,), compression=1),
            libver="latest",
        ),
        "least": hdf5(one),
        "empty": hdf5(lambda file: None),
        "many": hdf5(lambda file: [file.create_group(f"g{i}") for i in range(40)]),
        "many, latest": hdf5(
            lambda file: [file.create_group(f"g{i}") for i in range(40)], libver="latest"
        ),
    }


# Edits of bytes: functions of a random generator, a file, and other files to splice in

Edit = Callable[[random.Random, bytes, list[bytes]], bytes]


def _place(rng: random.Random, data: bytes) -> int:
    """A random position, often in the first kilobyte, where headers are."""
    return rng.randrange(min(len(data), rng.choice([64, 1024, 2**40])) or 1)


def flip(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if out:
            out[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at, size = _place(rng, data), rng.choice([1, 2, 4, 16])
    fill = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size), b"9" * size, b"\x80" * size])
    return data[:at] + fill + data[at + size :]


def truncate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data[: rng.choice([_place(rng, data), -1 - rng.randrange(40)])]


def insert(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = rng.choice([0, len(data), _place(rng, data)])
    return data[:at] + rng.randbytes(rng.choice([1, 2, 4, 8, 100])) + data[at:]


def delete(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice([1, 2, 4, 8, 100]) :]


def duplicate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at, size, to = _place(rng, data), rng.choice([1, 4, 8, 64, 500]), _place(rng, data)
    return data[:to] + data[at : at + size] * rng.choice([1, 1, 2, 20]) + data[to:]


def integer(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Replaces 2, 4 or 8 bytes by an interesting number, or adds or subtracts 1."""
    at, size = _place(rng, data), rng.choice([2, 4, 4, 8, 8])
    if rng.random() < 0.5:
        at -= at % 4
    number = rng.choice([*INTS, len(data), len(data) + 1, len(data) - 1])
    if rng.random() < 0.3:
        number = int.from_bytes(data[at : at + size], "little") + rng.choice([-1, 1, -8, 8])
    return data[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def splice(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: _place(rng, data)] + other[_place(rng, other) :]


BLIND: list[Edit] = [flip, overwrite, truncate, insert, delete, duplicate, integer, splice]


def edit_json(rng: random.Random, value: Any, strings: list[str]) -> Any:
    """Changes one value in a JSON document."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        copied: Any = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        what = rng.randrange(10)
        if what == 0:
            del copied[key]
        elif what == 1 and isinstance(copied, list):
            copied.insert(rng.randrange(len(copied) + 1), rng.choice(copied))
        elif what == 2 and isinstance(copied, list):
            rng.shuffle(copied)
        elif what == 3 and isinstance(copied, dict):
            copied[rng.choice(strings)] = copied.pop(key)
        else:
            copied[key] = edit_json(rng, value[key], strings)
        return copied
    if isinstance(value, str) and rng.random() < 0.8:
        return rng.choice(strings)
    if isinstance(value, int) and rng.random() < 0.8:
        return rng.choice([*INTS, value + 1, value - 1])
    nested: Any = 0
    for _ in range(rng.choice([1, 3, 5000])):
        nested = [nested]
    choices = [None, True, 1.5, float("nan"), "", [], {}, [[]], [""], {"": 0}, nested, 10**400, -0.0]
    return rng.choice([*choices, [value], [value, value], rng.choice(strings), rng.choice(INTS)])


def to_json(rng: random.Random, value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        text = "[" * 5000
    return text.encode("utf-8", "surrogatepass")


def edit_layout(rng: random.Random, text: str) -> str:
    """Changes a value or two in the layout of a tree."""
    try:
        layout = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for _ in range(rng.choice([1, 1, 2])):
        what = rng.randrange(6)
        if not isinstance(layout, dict):
            break
        if what == 0 and isinstance(layout.get("dtypes"), dict):
            slot = rng.choice([str(rng.randrange(14)), *layout["dtypes"]])
            layout["dtypes"] = layout["dtypes"] | {slot: rng.choice(TAGS)}
        elif what == 1:
            layout["sep"] = rng.choice(SEPS)
        elif what == 2 and isinstance(layout.get("paths"), list) and layout["paths"]:
            path = rng.choice(layout["paths"])
            if isinstance(path, list) and path:
                path[rng.randrange(len(path))] = rng.choice(NAMES)
        elif what == 3 and isinstance(layout.get("slots"), list) and layout["slots"]:
            layout["slots"][rng.randrange(len(layout["slots"]))] = rng.choice(
                [-2, -1, 0, 1, 2, 99, True]
            )
        else:
            layout = edit_json(rng, layout, NAMES + TAGS)
    return to_json(rng, layout).decode("utf-8", "surrogatepass")


# Edits that know safetensors: the length of the header, the header in JSON, and the arrays


class _Header(NamedTuple):
    """The header as pairs, which allow duplicate keys, and the arrays after it."""

    pairs: list[tuple[str, Any]]
    data: bytes


def _parse(file: bytes) -> _Header | None:
    end = 8 + int.from_bytes(file[:8], "little")
    try:
        header = json.loads(file[8:end])
    except (ValueError, RecursionError):
        return None
    return _Header(list(header.items()), file[end:]) if isinstance(header, dict) else None


def _unparse(rng: random.Random, header: _Header) -> bytes:
    text = b"{" + b",".join(to_json(rng, k) + b":" + to_json(rng, v) for k, v in header.pairs) + b"}"
    if rng.random() < 0.8:
        text += b" " * (-len(text) % 8)
    return u64(len(text)) + text + header.data


def header_entry(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes the name, dtype, shape or offset of an array in the header."""
    parsed = _parse(file)
    if not parsed or not parsed.pairs:
        return flip(rng, file, others)
    pairs, i = list(parsed.pairs), rng.randrange(len(parsed.pairs))
    name, entry = pairs[i]
    entry = dict(entry) if isinstance(entry, dict) else {}
    what = rng.randrange(9)
    if what < 2:
        pairs[i] = (rng.choice(NAMES), entry)
    elif what == 2:
        pairs.append((rng.choice([name, *NAMES]), entry))
    elif what == 3:
        del pairs[i]
    elif what == 4:
        pairs[i] = (name, entry | {"dtype": rng.choice(CODES)})
    elif what == 5:
        old = entry.get("data_offsets")
        begin, end = old[:2] if isinstance(old, list) and len(old) > 1 else (0, 0)
        number = rng.choice([*INTS, len(parsed.data)])
        offsets = rng.choice(
            [[end, begin], [number, end], [begin, number], [begin, end + 4], [begin - 4, end]]
        )
        pairs[i] = (name, entry | {"data_offsets": offsets})
    elif what == 6:
        old = entry.get("shape")
        shape = list(old) if isinstance(old, list) else []
        choices = [shape[::-1], [*shape, 1], [1] * rng.choice([31, 32, 33, 70]) + shape, [0, *shape]]
        choices += [[rng.choice(INTS), *shape], [0, rng.choice(INTS)], [rng.choice(INTS)], []]
        pairs[i] = (name, entry | {"shape": rng.choice(choices)})
    elif what == 7:
        pairs = edit_json(rng, dict(pairs), NAMES + CODES)
        pairs = list(pairs.items()) if isinstance(pairs, dict) else []
    else:
        rng.shuffle(pairs)
    return _unparse(rng, _Header(pairs, parsed.data))


def header_array(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Adds an array of any name, dtype and shape, with a correct header entry."""
    parsed = _parse(file)
    if not parsed:
        return integer(rng, file, others)
    shape = rng.choice(
        [[], [1], [3], [2, 2], [0], [0, 2**40], [2**31, 0, 2**31], [1] * 32, [1] * 33, [1] * 64]
    )
    size = math.prod(shape) * 8
    data = rng.choice([rng.randbytes(size), b"\xff" * size, bytes(size)])
    code = rng.choice(CODES)
    bits = re.search(r"\d+", code)
    size = -(-math.prod(shape) * int(bits[0] if bits else 8) // 8)
    begin = len(parsed.data)
    entry = {"dtype": code, "shape": shape, "data_offsets": [begin, begin + size]}
    return _unparse(
        rng, _Header([*parsed.pairs, (rng.choice(NAMES), entry)], parsed.data + data[:size])
    )


def header_layout(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes the layout in the metadata, or other metadata."""
    parsed = _parse(file)
    if not parsed:
        return overwrite(rng, file, others)
    pairs = dict(parsed.pairs)
    metadata = pairs.get("__metadata__")
    if isinstance(metadata, dict) and isinstance(metadata.get("paramtree"), str) and rng.random() < 0.9:
        pairs["__metadata__"] = metadata | {"paramtree": edit_layout(rng, metadata["paramtree"])}
    else:
        choices = [metadata, {"paramtree": "{}"}, {"paramtree": ""}, {"a": "b"}, {"paramtree": 1}]
        pairs["__metadata__"] = edit_json(rng, rng.choice(choices), NAMES)
    return _unparse(rng, _Header(list(pairs.items()), parsed.data))


def renamed(rng: random.Random, text: str) -> tuple[str, str, str]:
    """Returns a layout in which one name is replaced, with the old and the new name."""
    layout, new = json.loads(text), rng.choice(NAMES)
    i = rng.randrange(len(layout["names"]))
    old, layout["names"][i] = layout["names"][i], new
    if rng.random() < 0.5:
        layout["paths"] = [
            new.split(layout["sep"]) if path == old.split(layout["sep"]) else path
            for path in layout["paths"]
        ]
    if rng.random() < 0.3:
        layout["dtypes"][str(i)] = rng.choice(TAGS)
    return to_json(rng, layout).decode("utf-8", "surrogatepass"), old, new


def header_rename(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Renames an array in both header and layout, or drops the layout."""
    parsed = _parse(file)
    if not parsed:
        return flip(rng, file, others)
    pairs = dict(parsed.pairs)
    try:
        text, old, new = renamed(rng, pairs["__metadata__"]["paramtree"])
        if rng.random() < 0.3:
            del pairs["__metadata__"]
        else:
            pairs["__metadata__"] = {"paramtree": text}
        pairs[new] = pairs.pop(old)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pairs.pop("__metadata__", None)
    return _unparse(rng, _Header(list(pairs.items()), parsed.data))


def header_bytes(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Puts bytes that are not JSON into the header, and corrects its length."""
    end = min(8 + int.from_bytes(file[:8], "little"), len(file))
    at = rng.randrange(9, end) if end > 9 else 8
    junk = rng.choice(
        [b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\0", b'"', b"}", b"[" * 3000, b"\\u0000", b"1e999"]
    )
    cut = rng.choice([0, 1, 4])
    return u64(end - 8 + len(junk) - cut) + file[8:at] + junk + file[at + cut :]


# Edits that know .params: most of the file is rewritten, with occasional wrong fields


def _dim(rng: random.Random) -> int:
    return rng.choice([1, 2, 3]) if rng.random() < 0.8 else rng.choice([0, 0, *INTS]) % 2**64 - 2**63


def random_array(rng: random.Random) -> bytes:
    """An array of any version with mostly correct fields."""
    rare = lambda right, wrong: right if rng.random() < 0.93 else rng.choice(wrong)  # noqa: E731
    numbers = [n for n in INTS if -(2**31) <= n < 2**31]
    shape = tuple(rng.choice([1, 2, 3]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3])))
    shape = rare(shape, [(0,), (0, 2**40), (2**62, 4), (-1,), (2**31, 2**31, 0), (1,) * 32, (1,) * 33])
    dtype = rare(rng.randrange(13), [13, -1, 99, 2**31 - 1])
    item = [4, 8, 2, 1, 4, 1, 8, 1, 2, 2, 4, 8, 2][dtype % 13]
    size = math.prod(shape) * item
    data = rng.randbytes(rare(size if 0 <= size < 1000 else 8, [0, 1, size % 50 + 1]))
    device = struct.pack("<iii", rare(1, numbers), rare(0, numbers), dtype)
    version = rng.randrange(10)
    if version == 0:
        shape32 = [n % 2**32 for n in shape]
        return (
            struct.pack(f"<I{len(shape)}I", rare(len(shape), [31, 33, 2**31, 2**32 - 1]), *shape32)
            + device
            + data
        )
    shaped = struct.pack("<i", rare(len(shape), [-1, -2, 33, 2**31 - 1])) + struct.pack(
        f"<{len(shape)}q", *shape
    )
    if version == 1:
        return _V1 + shaped + device + data
    magic = rng.choice([_V2, _V3])
    if version < 7:
        return magic + struct.pack("<i", rare(0, [3, -1, 2**31 - 1])) + shaped + device + data
    if version < 9:
        index = [rare(rng.randrange(4), [4, -1, 2**62]) for _ in range(rng.randrange(4))]
        made = rows((rare(4, [0, 1, 2**40, -1, 2**61]), *rng.choice([(), (2,), (2, 2)])), tuple(index))
        return magic + made[4:]
    starts = [0, rng.randrange(3), 2]
    starts[rng.randrange(3)] = rare(starts[1], [-1, 1, 3, 2**62])
    columns = [rare(rng.randrange(3), [3, -1, 2**40]) for _ in range(rare(2, [0, 1, 3]))]
    wide = (rare(2, [1, 3, 2**40]), rare(3, [0, 1, 2**40]))
    return csr(rare(wide, [(6,), (2, 3, 1)]), tuple(starts), columns)


def random_params(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """A new file of arrays with mostly correct fields."""
    names = [b"a.b", b"dense0.weight", b"dense0.bias", b"embed.weight", b"decoder.weight", b"b_c", b"x"]
    arrays = [random_array(rng) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    chosen = rng.sample(names, len(arrays)) if rng.random() < 0.8 else []
    if chosen and rng.random() < 0.3:
        chosen[0] = rng.choice(NAMES).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        chosen.append(b"\xff\xfe")
    return params(arrays, chosen)


def rename_params(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Replaces a name in the file, and corrects its length."""
    found = list(re.finditer(rb"[a-z0-9:._]{1,40}", file))
    if not found:
        return insert(rng, file, others)
    old = rng.choice(found[-8:])
    begin, end = old.span()
    if int.from_bytes(file[begin - 8 : begin], "little") != end - begin or begin < 8:
        return flip(rng, file, others)
    new = rng.choice(NAMES).encode("utf-8", "surrogatepass")
    new = rng.choice([new, b"\xff", b"arg:" + new, b"aux:" + new, b"net0_" + new])
    return file[: begin - 8] + u64(len(new)) + new + file[end:]


# Edits that know .npz: the members, their .npy headers, and the fields of the zip file


def _members(file: bytes) -> list[tuple[str, bytes, bool]] | None:
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as opened:
            infos = opened.infolist()
            if sum(info.file_size for info in infos) > MIB:
                return None
            return [(i.filename, opened.read(i), i.compress_type != 0) for i in infos]
    except Exception:  # damaged by an earlier edit
        return None


def npz_header(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes the header of an array, and sometimes the length of its data."""
    members = _members(file)
    if not members:
        return integer(rng, file, others)
    i = rng.randrange(len(members))
    name, old, packed = members[i]
    begin = old.find(b"\n") + 1
    data = rng.choice([old[begin:], b"", rng.randbytes(4), bytes(100)])
    descr, shape = rng.choice(DESCRS), rng.choice(SHAPES)
    version = rng.choice([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9), (0, 0)])
    fortran = rng.choice(["False", "True", "1", "None", "'x'"])
    new = npy(descr, shape, data, fortran=fortran, version=version)
    if rng.random() < 0.3:
        new = npy_of(rng.choice(HEADERS), data, version)
    elif rng.random() < 0.3 and begin:
        sized = {
            "|b1": "(3,)",
            "|u1": "(3,)",
            "<f2": "()",
            ">i2": "(1,)",
            "<f4": "(0, 5)",
            "<i8": "(1, 1)",
        }
        descr, shape = rng.choice(list(sized.items()))
        count = math.prod(json.loads(shape.replace("(", "[").replace(",)", "]").replace(")", "]")))
        new = npy(descr, shape, rng.randbytes(count * np.dtype(descr).itemsize))
    members[i] = (name, new, rng.choice([packed, packed, not packed]))
    return zipped_list(members)


def npz_members(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Renames, adds, duplicates, drops or changes a member of a correct zip file."""
    members = _members(file)
    if not members:
        return flip(rng, file, others)
    i = rng.randrange(len(members))
    name, data, packed = members[i]
    what = rng.randrange(6)
    new = rng.choice([*NAMES, "paramtree.json", "data.pkl", "x/data.pkl"])
    new = new.encode("utf-8", "replace").decode()[:60_000] + rng.choice([".npy", ".npy", ""])
    if what == 0:
        members[i] = (new, data, packed)
    elif what == 1:
        members.append((rng.choice([name, new]), data, packed))
    elif what == 2:
        del members[i]
    elif what == 3:
        members[i] = (name, data, not packed)
    else:
        members[i] = (name, rng.choice(BLIND)(rng, data, others), packed)
    return zipped_list(members)


def npz_layout(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes the layout of the tree."""
    members = _members(file)
    index = [i for i, member in enumerate(members or []) if member[0] == "paramtree.json"]
    if not members or not index:
        return npz_members(rng, file, others)
    name, data, packed = members[index[0]]
    with contextlib.suppress(UnicodeDecodeError):
        data = edit_layout(rng, data.decode()).encode("utf-8", "surrogatepass")
    members[index[0]] = (name, data, packed)
    return zipped_list(members)


def npz_rename(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Renames an array in both zip file and layout, or drops the layout."""
    members = {name: (data, packed) for name, data, packed in _members(file) or []}
    try:
        layout = members.pop("paramtree.json")[0].decode()
        text, old, new = renamed(rng, layout)
        members[f"{new[:60_000]}.npy"] = members.pop(f"{old}.npy")
        if rng.random() < 0.7:
            members["paramtree.json"] = text.encode("utf-8", "surrogatepass"), False
        return zipped(members)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return flip(rng, file, others)


_FIELDS = {  # the offset and size of the fields of the three records of a zip file
    b"PK\3\4": [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
    b"PK\1\2": [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)],
    b"PK\5\6": [(4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
}


def zip_field(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes a field of a record of the zip file."""
    magic = rng.choice(list(_FIELDS))
    found = [m.start() for m in re.finditer(re.escape(magic), file)]
    if not found:
        return integer(rng, file, others)
    out, at = bytearray(file), rng.choice(found)
    for _ in range(rng.choice([1, 1, 2])):
        offset, size = rng.choice(_FIELDS[magic])
        old = int.from_bytes(out[at + offset : at + offset + size], "little")
        new = rng.choice(
            [*INTS, 8, 12, 14, 20, 45, 99, 0x800, old + 1, old - 1, old ^ 1, old ^ 0x800, *found]
        )
        out[at + offset : at + offset + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(out)


# Edits that know msgpack: new maps with occasional wrong fields, lengths and names


def random_flax(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """A new file of arrays with mostly correct fields."""
    rare = lambda right, *wrong: right if rng.random() < 0.9 else rng.choice(wrong)  # noqa: E731

    def array() -> Any:
        shape = tuple(rng.choice([1, 2, 3]) for _ in range(rng.choice([0, 1, 1, 2, 3])))
        dtype = rng.choice(["float32", "bfloat16", "bool", "int8", "complex64", "float64", "int4"])
        size = math.prod(shape) * np.dtype(getattr(jnp, dtype, dtype)).itemsize
        data = rng.randbytes(rare(size, 0, 1, size + 1, 100))
        shape = rare(
            shape, (0,), (0, 2**40), (2**62, 4), (-1,), (1,) * 33, 3, None, (1.5,), ("a",), shape[::-1]
        )
        dtype = rare(dtype, *TAGS, b"float32", None, 3)
        if rng.random() < 0.2:
            pieces = flax_chunked(np.arange(6, dtype=np.int16).reshape(2, 3), rng.choice([1, 4, 9]))
            if rng.random() < 0.5:
                pieces = edit_json(rng, {**pieces, "chunks": {**pieces["chunks"]}}, NAMES)
            return pieces
        made = flax_array(
            shape, dtype, rare(data, "text", None, 3), rare(rng.choice([1, 3]), 0, 2, 9, -1)
        )
        return rare(
            made,
            Raw(made[:-1]),
            Raw(made + b"\0"),
            Raw(b"\xc1"),
            rng.choice(INTS),
            0.5,
            "text",
            b"",
            None,
        )

    def level(depth: int) -> Any:
        names = [rare(f"w{i}", *NAMES, i, -1, 1.5, None, b"a") for i in range(rng.randrange(4))]
        entries = {name: level(depth + 1) if rng.random() < 0.3 else array() for name in names}
        return entries if depth < 1 or rng.random() < 0.8 else list(entries.values())

    try:
        return msgpack(level(0))
    except RecursionError:
        return b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0"


def flax_length(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes the length, count or kind of a value."""
    marks = [i for i, byte in enumerate(file) if 0x80 <= byte < 0xE0]
    if not marks:
        return flip(rng, file, others)
    at = rng.choice(marks)
    size = rng.choice([1, 1, 2, 4])
    number = rng.choice([*INTS, len(file), len(file) - at])
    new = (number % 2 ** (8 * size)).to_bytes(size, "big")
    if rng.random() < 0.5:
        return file[:at] + bytes([rng.randrange(0x80, 0xE0)]) + file[at + 1 :]
    return file[: at + 1] + new + file[at + 1 + size :]


def flax_rename(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Replaces a short text, and corrects its length."""
    found = [m for m in re.finditer(rb"[\xa1-\xbf][a-z_0-9]+", file) if len(m[0]) > m[0][0] - 0xA0]
    if not found:
        return insert(rng, file, others)
    match = rng.choice(found)
    end = match.start() + 1 + match[0][0] - 0xA0
    return file[: match.start()] + msgpack(rng.choice([*NAMES, *TAGS])) + file[end:]


# Edits that know HDF5: the fields after a signature, and files that h5py writes with odd contents


def hdf5_field(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes a number after one of the signatures, or in the headers of the objects."""
    found = [
        m.end() for m in re.finditer(rb"TREE|HEAP|SNOD|OHDR|OCHK|FRHP|FHDB|FAHD|EAHD|GCOL|BTHD", file)
    ]
    found += [m.start() for m in re.finditer(rb"\x01\x00[\x01-\x20]\x00\x01\x00\x00\x00", file)]
    if not found:
        return integer(rng, file, others)
    at, size = (
        rng.choice(found) + rng.choice([0, 1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48]),
        rng.choice([1, 2, 4, 8]),
    )
    number = rng.choice([*INTS, len(file), *found])
    return file[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + file[at + size :]


def random_hdf5(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """A new file, in which some things are not read."""
    import h5py

    def fill(made: Any) -> None:
        for i in range(rng.randrange(1, 5)):
            name, values = (
                f"{rng.choice('abc')}/w{i}",
                np.arange(rng.choice([0, 1, 12]), dtype=rng.choice("fdibH")),
            )
            what = rng.randrange(14)
            options: dict[str, Any] = {}
            if what == 0:
                made[name] = rng.choice(
                    [h5py.SoftLink("/c/w0"), h5py.ExternalLink("/etc/passwd", "/x")]
                )
            elif what == 1:
                layout = h5py.VirtualLayout((4,), "f4")
                layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
                made.create_virtual_dataset(name, layout)
            elif what == 2:
                made.create_dataset(name, (4,), "f4", external=[("/etc/passwd", 0, 16)])
            elif what == 3:
                odd = [
                    "O",
                    "f4,f4",
                    "(2,)f4",
                    "S3",
                    "V5",
                    "c8",
                    h5py.string_dtype(),
                    h5py.ref_dtype,
                    np.longdouble,
                ]
                made.create_dataset(
                    name, (3,), dtype=h5py.string_dtype() if (d := rng.choice(odd)) == "O" else d
                )
            elif what == 4:
                made[name] = h5py.Empty("f4")
            elif what == 5:
                made.create_dataset(
                    name, (rng.choice([3, 2**20, 2**40]),), "f4", **rng.choice([{}, {"chunks": (3,)}])
                )
            elif what == 6:
                made[name] = made
            elif what == 7:
                made[name] = np.dtype("f4")
            elif what == 8:
                made[
                    rng.choice(NAMES).replace("\0", "").encode("utf-8", "surrogatepass")[:60_000]
                    or b"x"
                ] = values
            else:
                if len(values) > 1:
                    options = rng.choice(
                        [{}, {"compression": "gzip"}, {"compression": "lzf"}, {"fletcher32": True}]
                    )
                    options |= rng.choice([{}, {"chunks": (5,)}, {"maxshape": (None,)}])
                made.create_dataset(name, data=values, **options)

    try:
        return hdf5(fill, libver=rng.choice(["earliest", "latest"]), track_order=rng.random() < 0.3)
    except (ValueError, OSError, RuntimeError, TypeError, KeyError):  # it may not write a name
        return hdf5_field(rng, file, others)


KNOWING: dict[str, list[Edit]] = {
    "flax": [random_flax, random_flax, flax_length, flax_rename],
    "keras": [hdf5_field, hdf5_field, random_hdf5],
    "torch": [*fuzz_torch.EDITS, zip_field, npz_members],
    "safetensors": [header_entry, header_array, header_layout, header_rename, header_bytes],
    "params": [random_params, random_params, rename_params, integer],
    "npz": [npz_header, npz_members, npz_layout, npz_rename, zip_field],
}


def edits(kind: str) -> list[Edit]:
    """The edits for a format; those that know it are as frequent as the blind ones."""
    return [*BLIND, *KNOWING[kind], *KNOWING[kind]]


def mutated(rng: random.Random, base: bytes, chosen: list[Edit], others: list[bytes]) -> bytes:
    """Returns a file after some edits."""
    for edit in chosen:
        base = edit(rng, base, others)[: 2 * MIB]
    return base


# Checking a load


class Problem(NamedTuple):
    """What went wrong, and the place in the source that identifies it."""

    kind: str
    place: str
    text: str


class Stopped(BaseException):
    """A load took too long. No ``except Exception`` catches it."""


def _stop(*_: Any) -> None:
    raise Stopped


def _places(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/paramtree/" in f.filename.replace(os.sep, "/")]
    shown = [f"{pathlib.Path(f.filename).name}:{f.lineno} {f.name}" for f in (*frames[-1:], *ours[-1:])]
    return " <- ".join(dict.fromkeys(shown))


def attempt(
    path: str,
    deep: bool = False,
    slow: float = SLOW,
    most: int | None = None,
    ends: list[Any] | None = None,
    again: bool = False,
    **options: Any,
) -> Problem | None:
    """Loads a file, and returns the problem with the outcome, if any.

    Args:
      path: the file.
      deep: whether to save a loaded tree and load it again.
      slow: the time limit in seconds.
      most: the limit of memory that Python and numpy allocate, in bytes. Measuring it slows the load,
        so the time limit does not apply then.
      ends: collects the tree or the ``LoadError``.
      again: whether this is the second measurement of memory, which decides.
      options: options of ``pt.load``.
    """
    end: Any = None
    problem, took, peak = None, 0.0, 0
    _stop_after(2 * TOO_SLOW)
    if most is not None:
        tracemalloc.start()
    begin = time.perf_counter()
    try:
        end = pt.load(path, report=True, **options)
    except pt.LoadError as error:
        end = error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also from Rust
        problem = _exception(error)
    finally:
        took = time.perf_counter() - begin
        _stop_after(0)
        if most is not None:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    if ends is not None:
        ends.append(end[0] if isinstance(end, tuple) else end)
    if problem is not None:
        return problem
    if isinstance(end, pt.LoadError):
        if path not in str(end):
            return Problem("a message without the path", _places(end), str(end))
        if unprintable(str(end)):
            return Problem("a message that cannot be printed", _places(end), ascii(str(end)))
    else:
        tree, report = end
        if unprintable(str(report)):
            return Problem("a report that cannot be printed", "", ascii(str(report)[:300]))
        try:
            _use(tree, path if deep else "")
        except Exception as error:
            return _exception(error)
    where = _places(end) if isinstance(end, pt.LoadError) else "a tree"
    if most is not None and peak > most and not again:
        # A file needs its memory on every load; one-time allocations, such as an import for a message or
        # another thread, do not count.
        return attempt(path, deep, slow, most, again=True, **options)
    if most is not None and peak > most:
        return Problem("memory", where, f"{peak:,} bytes, where at most {most:,} are expected")
    return Problem("slow", where, f"took {took:.2f} s") if most is None and took > slow else None


def _exception(error: BaseException) -> Problem:
    return Problem(type(error).__name__, _places(error), ascii(str(error)[:300]))


def unprintable(text: str) -> bool:
    """Whether a text has characters that are unsafe to print, as hostile names may."""
    return bool(re.search(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", text))


def _stop_after(seconds: float) -> None:
    if signal.getsignal(signal.SIGALRM) is _stop:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # repeats, as code may swallow an exception


def _use(tree: Any, path: str) -> None:
    """Raises if a loaded tree cannot be used."""
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype == np.bool_ and leaf.size:
            assert np.asarray(leaf).view(np.uint8).max() <= 1, "a boolean is neither 0 nor 1"
        elif leaf.dtype.name == "int4":
            assert np.all(np.abs(np.asarray(leaf).astype(int)) <= 8), "an int4 is out of range"
    if not path:
        return
    repr(tree)
    assert len(list(flatten(tree)[0].entries())) == len(pt.collect(tree, sep="\0", aliases=True))
    for where, slot in flatten(tree)[0].entries():
        assert tree["/".join(where)] is flatten(tree)[1][slot], "a leaf is not found under its path"
    again = path + ".again"
    try:
        pt.save(again, tree, sep="/")
    except pt.ParamTreeError:  # such as a name with too many segments for this separator
        return
    loaded = pt.load(again)
    assert flatten(loaded)[0] is flatten(tree)[0]
    for a, b in zip(flatten(loaded)[1], flatten(tree)[1], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def options_for(rng: random.Random, valid: Valid) -> list[dict[str, Any]]:
    """The options to load one input with: none and, half of the time, into a tree."""
    if rng.random() < 0.5:
        return [{}]
    like = rng.choice(valid.likes)
    loose = {"like": like, "strict": False, "cast_dtype": rng.random() < 0.5}
    return [{}, loose, {"like": like}]


def most_for(size: int) -> int:
    """The peak memory in bytes that loading a file of some size may take."""
    return 2 * size + MIB


# Files of a megabyte or less that claim to hold far more


def claims(kind: str) -> dict[str, Callable[[], bytes]]:
    """Functions that create files with absurd counts and shapes, which must be rejected."""
    filler = bytes(MIB)
    if kind == "safetensors":

        def made(entries: dict[str, Any], data: bytes = filler) -> bytes:
            text = json.dumps(entries).encode()
            return u64(len(text)) + text + data

        def entry(*shape: int, end: int = MIB) -> dict[str, Any]:
            return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}

        return {
            "shape": lambda: made({"a": entry(2**60)}),
            "shapes that overflow": lambda: made({"a": entry(2**62, 4)}),
            "end": lambda: made({"a": entry(2**40, end=2**42)}),
            "one place for all": lambda: made({f"a{i}": entry(2**18) for i in range(1000)}),
            "zero and huge": lambda: made({"a": entry(0, 2**62, 2**62, end=0)}, b""),
            "header": lambda: u64(2**40) + b"{" + filler,
            "header at the limit": lambda: u64(100_000_000) + b"{" + filler,
            "deep names": lambda: made({f"a{i}{'.a' * 999}": entry(0, end=0) for i in range(500)}, b""),
            "separator": separator_bomb,
        }
    if kind == "params":
        v3, f4 = _V3 + struct.pack("<i", 0), _CPU_F4
        deep = [b"a%d" % i + b".a" * 999 for i in range(400)]
        return {
            "arrays": lambda: u64(0x112, 0, 2**60) + filler,
            "names": lambda: u64(0x112, 0, 0, 2**61) + filler,
            "a name": lambda: u64(0x112, 0, 0, 1, 2**63) + filler,
            "shape": lambda: params([v3 + dims(2**40) + f4 + filler], [b"a"]),
            "shapes that overflow": lambda: params([v3 + dims(2**62, 4) + f4 + filler], [b"a"]),
            "zero and huge": lambda: params([v3 + dims(0, 2**62, 2**62) + f4], [b"a"]),
            "rows": lambda: params([rows((2**40, 2), (1,))], [b"a"]),
            "rows of nothing": lambda: params([rows((2**30, 1), ())], [b"a"]),
            "csr": lambda: params([csr((2, 2**32))], [b"a"]),
            "sparse, often": lambda: params(
                [rows((2**17, 2), ())] * 99, [b"a%d" % i for i in range(99)]
            ),
            "nothing, very often": lambda: params([bytes(4)] * (MIB // 4), []),
            "deep names": lambda: params([v2(1)] * len(deep), deep),
        }
    if kind == "flax":
        nothing, deeper = bytes(8), Raw(b"")
        for _ in range(100):
            deeper = msgpack(
                {"x" * 100: deeper or {f"a{i}": flax_leaf(np.ones(1)) for i in range(999)}}
            )
        return {
            "shape": lambda: msgpack({"a": flax_array((2**40,), "float32", filler)}),
            "shapes that overflow": lambda: msgpack({"a": flax_array((2**62, 4), "float32", filler)}),
            "zero and huge": lambda: msgpack({"a": flax_array((0, 2**62, 2**62), "float32", b"")}),
            "entries": lambda: b"\xdf\xff\xff\xff\xff" + filler,
            "a list": lambda: b"\x81\xa1a\xdd\xff\xff\xff\xff" + filler,
            "a text": lambda: b"\x81\xa1a\xdb\xff\xff\xff\xff" + filler,
            "an extension": lambda: b"\x81\xa1a\xc9\xff\xff\xff\xff\x01" + filler,
            "numbers, very often": lambda: b"\x81\xa1a\xdd" + struct.pack(">I", MIB) + filler,
            "maps in maps": lambda: b"\x81\xa1a" * (MIB // 3) + nothing,
            "lists in lists": lambda: b"\x81\xa1a" + b"\x91" * MIB + nothing,
            "names that repeat": lambda: bytes(deeper),
            "pieces": lambda: msgpack(
                {"a": flax_chunked(np.ones(4), 2) | {"shape": {"0": 2**20, "1": 2**20}}}
            ),
        }
    if kind == "keras":
        return keras_claims()
    if kind == "torch":
        return fuzz_torch.claims()
    return {
        "zeros": lambda: zeros("a.npy", npy("<f4", f"({2**28},)", b""), 1024),
        "a header": lambda: zeros("a.npy", b"\x93NUMPY\2\0" + struct.pack("<I", 2**30), 1024),
        "a layout": lambda: zeros("paramtree.json", b"{", 1024),
        "stored, of a huge size": stored_bomb,
        "stored, of a huge header": lambda: stored_bomb(b"\x93NUMPY\2\0" + struct.pack("<I", 2**30)),
        "overlapping": overlapping,
        "separator": lambda: separator_bomb("npz"),
    }


def keras_claims() -> dict[str, Callable[[], bytes]]:
    def empty(shape: tuple[int, ...], **options: Any) -> Callable[[], bytes]:
        return lambda: hdf5(lambda file: file.create_dataset("a", shape, "f4", **options))

    def changed(made: Callable[[], bytes], old: bytes, new: bytes) -> Callable[[], bytes]:
        return lambda: made().replace(old, new)

    def deep(file: Any) -> None:
        group = file
        for _ in range(100):
            group = group.create_group("x" * 100)
        for i in range(999):
            group[f"a{i}"] = np.float32(1)

    def shared(file: Any) -> None:
        for i in range(300):
            file[f"a{i}"] = np.zeros(2**17 + i, np.uint8) if i == 0 else np.zeros(100 + i, np.uint8)

    def overlap() -> bytes:
        """Small arrays that say they are where the large one is, and as long."""
        import h5py

        data = bytearray(hdf5(shared))
        with h5py.File(io.BytesIO(bytes(data)), "r") as file:
            places = [(file[f"a{i}"].id.get_offset(), len(file[f"a{i}"])) for i in range(300)]
        for begin, size in places[1:]:
            for old, new in (
                (u64(begin, size), u64(*places[0])),
                (u64(size, size), u64(places[0][1]) * 2),
            ):
                at = data.find(old)
                data[at : at + 16] = new
        return bytes(data)

    def gzip(file: Any) -> None:
        file.create_dataset(
            "a", (2**28,), "u1", chunks=(2**20,), compression="gzip", compression_opts=9
        )
        file["a"][:] = 0

    plain = lambda: hdf5(lambda file: file.create_dataset("a", data=np.ones(77, "f4")))  # noqa: E731
    return {
        "never written": empty((2**40,)),
        "chunks, never written": empty((2**40,), chunks=(2**10,)),
        "large chunks": empty((2**29,), chunks=(2**29,)),
        "zeros": lambda: hdf5(gzip),
        "small chunks": lambda: hdf5(
            lambda file: file.create_dataset("a", data=np.zeros(2**14, "u1"), chunks=(1,))
        ),
        "shape": changed(plain, u64(77), u64(2**40)),
        "shape and size": changed(lambda: plain().replace(u64(308), u64(2**42)), u64(77), u64(2**40)),
        "names that repeat": lambda: hdf5(deep),
        "overlapping": overlap,
    }


# Claims that are strange but true: such files may load.
TRUE_CLAIMS = frozenset(["nothing, very often", "deep names", "separator"])


def separator_bomb(kind: str = "safetensors") -> bytes:
    """A tree of deep paths with a separator of 50,000 characters."""
    paths = [[f"w{i}", *("a" for _ in range(300))] for i in range(20)]
    count = len(paths)
    layout = {"version": 1, "sep": "s" * 50_000, "paths": paths, "slots": list(range(count))}
    layout |= {"kinds": ["param"] * count, "kept": list(range(count)), "dtypes": {}}
    layout["names"] = [f"w{i}" for i in range(count)]
    text = json.dumps(layout)
    if kind == "npz":
        arrays = {f"w{i}.npy": (npy("<f4", "()", bytes(4)), False) for i in range(count)}
        return zipped(arrays | {"paramtree.json": (text.encode(), False)})
    header: dict[str, Any] = {"__metadata__": {"paramtree": text}}
    for i in range(count):
        header[f"w{i}"] = {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]}
    encoded = json.dumps(header).encode()
    return u64(len(encoded)) + encoded + bytes(4 * count)


def zeros(name: str, head: bytes, count: int) -> bytes:
    """A zip file of one compressed member: a header, then ``count`` MiB of zeros."""
    first, rest = zlib.compressobj(9, wbits=-15), zlib.compressobj(9, wbits=-15)
    block = rest.compress(bytes(MIB)) + rest.flush(zlib.Z_FULL_FLUSH)  # a full flush resets the state
    data = first.compress(head) + first.flush(zlib.Z_FULL_FLUSH) + block * count + rest.flush()
    crc = zlib.crc32(head)
    for _ in range(count):
        crc = zlib.crc32(bytes(MIB), crc)
    encoded, length = name.encode(), len(head) + count * MIB
    common = (20, 0, 8, 0, 33, crc, len(data), length, len(encoded), 0)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *common) + encoded + data
    record = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *common, 0, 0, 0, 0, 0) + encoded
    return local + record + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(record), len(local), 0)


def stored_bomb(start: bytes = b"") -> bytes:
    """An uncompressed array that the zip file says has 4 GB, without any of its data."""
    start = start or npy("|u1", "(4000000000,)", b"")
    file = bytearray(zipped({"a.npy": (start, False)}))
    size = struct.pack("<II", *[len(start) + 4_000_000_000] * 2)
    for magic, offset in ((b"PK\3\4", 18), (b"PK\1\2", 20)):
        at = file.find(magic) + offset
        file[at : at + 8] = size
    return bytes(file)


def overlapping(count: int = 300, size: int = MIB) -> bytes:
    """Uncompressed arrays, each containing the next one, up to a large one."""
    out = bytearray()  # built back to front
    tail, records, members = bytes(size), [], []
    for i in range(count):
        name = b"a%d.npy" % i
        data = npy("|u1", f"({len(tail)},)", b"") + tail
        head = struct.pack(
            "<4s5H3I2H",
            b"PK\3\4",
            20,
            0,
            0,
            0,
            33,
            zlib.crc32(data),
            len(data),
            len(data),
            len(name),
            0,
        )
        members.append((name, zlib.crc32(data), len(data)))
        tail = head + name + data
        records.append(len(tail))
    out += tail
    directory = bytearray()
    for (name, crc, length), end in zip(members, records, strict=True):
        where = len(tail) - end
        numbers = (20, 20, 0, 0, 0, 33, crc, length, length, len(name), 0, 0, 0, 0, 0, where)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers) + name
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), len(out), 0)
    return bytes(out + directory + end)


# The command


def fast_folder() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Allows stopping a load that hangs."""
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


class Fuzzer:
    """Inputs of one format, and the problems they caused."""

    def __init__(self, kind: str, seed: int, folder: str, keep: str = "") -> None:
        self.kind, self.seed, self.keep = kind, seed, keep
        self.files = corpus(kind)
        self.bases = list(self.files.values())
        self.others = [valid.data for valid in self.bases]
        self.strange = [v.data for f in FORMATS if f != kind for v in corpus(f).values()]
        self.edits = edits(kind)
        self.path = f"{folder}/input.{ENDINGS.get(kind, kind)}"
        self.found: dict[tuple[str, str], int] = {}
        self.trees = 0

    def made(self, number: int) -> tuple[bytes, list[dict[str, Any]], random.Random]:
        """Returns an input and the options to load it with."""
        rng = random.Random(f"{self.seed} {self.kind} {number}")
        valid = rng.choice(self.bases)
        chosen = [rng.choice(self.edits) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        others = self.strange if rng.random() < 0.05 else self.others
        return mutated(rng, valid.data, chosen, others), options_for(rng, valid), rng

    def run(self, number: int, say: bool = True) -> list[Problem]:
        """Loads an input, and records and prints its problems."""
        data, ways, rng = self.made(number)
        with open(self.path, "wb") as file:
            file.write(data)
        problems = []
        ends: list[Any] = []
        for options in ways:
            if rng.random() < 0.1:
                problem = attempt(self.path, most=most_for(len(data)), **options)
            else:
                problem = attempt(self.path, rng.random() < 0.05, ends=ends, **options)
            if problem is not None:
                problems.append(problem)
                self.note(
                    problem, data, f"number {number}, with {', '.join(options) or 'nothing'}", say
                )
        self.trees += any(isinstance(end, pt.ParamTree) for end in ends)
        return problems

    def note(self, problem: Problem, data: bytes, label: str, say: bool = True) -> None:
        key = problem.kind, problem.place
        self.found[key] = self.found.get(key, 0) + 1
        if self.found[key] > 1 or not say:
            return
        print(
            f"{self.kind}: {problem.kind} at {problem.place}\n  {label}: {problem.text[:500]}",
            flush=True,
        )
        if self.keep:
            os.makedirs(self.keep, exist_ok=True)
            name = re.sub(r"\W+", "-", f"{self.kind}-{label.split(',')[0]}-{problem.kind}")
            pathlib.Path(self.keep, name).write_bytes(data)

    def run_claims(self) -> None:
        for name, make in claims(self.kind).items():
            data = make()
            with open(self.path, "wb") as file:
                file.write(data)
            problem = attempt(self.path) or attempt(self.path, most=most_for(len(data)))
            if problem is not None:
                problem = problem._replace(place=f"{problem.place} claims: {name}")
                self.note(problem, data, f"claims: {name}")


def resident() -> tuple[int, int]:
    """Returns the current and peak memory of the process on Linux, elsewhere zeros."""
    try:
        text = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return 0, 0
    now, most = (re.search(rf"{field}:\s+(\d+)", text) for field in ("VmRSS", "VmHWM"))
    return (int(now[1]) * 1024, int(most[1]) * 1024) if now and most else (0, 0)


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--format", choices=[*FORMATS, "all"], default="all")
    parser.add_argument("--inputs", type=int, default=200_000, help="for each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run only the input of this number")
    parser.add_argument("--keep", default="", help="a folder for the files that cause problems")
    parser.add_argument("--seconds", type=float, default=math.inf, help="the limit for each format")
    options = parser.parse_args()
    warnings.simplefilter("error")
    formats = FORMATS if options.format == "all" else (options.format,)
    bad = 0
    folder = tempfile.mkdtemp(prefix="fuzz_files-", dir=fast_folder())  # stays after a crash
    with watched():
        for kind in formats:
            bad += _run(Fuzzer(kind, options.seed, folder, options.keep), options)
    shutil.rmtree(folder)
    return 1 if bad else 0


def _run(fuzzer: Fuzzer, options: argparse.Namespace) -> int:
    for valid in fuzzer.bases:  # compile and import everything first
        pathlib.Path(fuzzer.path).write_bytes(valid.data)
        pt.load(fuzzer.path)
    if options.only is not None:
        fuzzer.run(options.only)
        return len(fuzzer.found)
    fuzzer.run_claims()
    begin, number, batch = time.perf_counter(), 0, 500
    while number < options.inputs and time.perf_counter() - begin < options.seconds:
        forget_peak()
        before = resident()[0]
        stop = min(number + batch, options.inputs)
        for i in range(number, stop):
            fuzzer.run(i)
        if (grown := resident()[1] - before) > 64 * MIB and number:
            problem = Problem("memory of the process", "", f"grew by {grown:,} bytes at a time")
            fuzzer.note(problem, b"", f"numbers {number} to {stop}")
        number = stop
    took = time.perf_counter() - begin
    print(
        f"{fuzzer.kind}: {number:,} inputs in {took:.0f} s, {number / took:,.0f} per second; "
        f"{fuzzer.trees:,} loaded as a tree; "
        f"{len(fuzzer.found)} kinds of problem, {sum(fuzzer.found.values())} occurrences",
        flush=True,
    )
    return len(fuzzer.found)


if __name__ == "__main__":
    sys.exit(main())
