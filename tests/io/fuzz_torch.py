"""What fuzzing knows of PyTorch's files: valid ones, edits of them, and claims; see ``fuzz_files``."""

import io
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.io import torch_files as made
from tests.io.torch_files import (
    archive,
    call,
    get,
    group,
    listed,
    mapping,
    name,
    number,
    put,
    real,
    sizes,
    storage,
    tensor,
    text,
)  # fmt: skip

GOLD = Path(__file__).parents[1] / "data" / "torch"
MIB = 2**20
HUGE = [
    0,
    1,
    2,
    3,
    255,
    256,
    65535,
    2**31 - 1,
    2**32,
    2**40,
    2**61,
    2**62,
    2**63,
    2**64,
    2**1000,
    -1,
    -2,
    -(2**40),
]
NAMES = [
    "", ".", "..", "../x", "a", "a.b", "a/b", "a..b", "a\0b", "\ud800", "\x1b[31m", "0", "module.a.b", "dense0.weight",
    "\u202eb", "x" * 300, ".".join("ab" * 300),
]  # fmt: skip
GLOBALS = [
    ("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "float32"), ("torch", "qint8"),
    ("torch", "Size"), ("torch", "device"), ("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_sparse_tensor"), ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("numpy.core.multiarray", "scalar"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"), ("_codecs", "encode"), ("builtins", "complex"), ("argparse", "Namespace"),
    ("numpy._core.numeric", "_frombuffer"), ("copyreg", "_reconstructor"), ("collections", "defaultdict"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"), ("torch", "FloatStorage"), ("torch.storage", "UntypedStorage"),
]  # fmt: skip
KINDS = [
    ("Float", 4), ("Double", 8), ("Half", 2), ("BFloat16", 2), ("Long", 8), ("Int", 4), ("Bool", 1), ("Byte", 1),
    ("ComplexFloat", 8), ("QInt8", 1), ("ComplexHalf", 4), ("Untyped", 1), ("Strange", 4),
]  # fmt: skip
EIGHT = struct.pack("<2f", 1, 1)

Edit = Callable[[random.Random, bytes, list[bytes]], bytes]


def files() -> dict[str, bytes]:
    """Valid files by description."""
    found = {path.name: path.read_bytes() for path in GOLD.iterdir() if path.suffix != ".npz"}
    del found["whole_module.pt"]  # it is not loaded
    where = storage("0", 2)
    many = mapping({
        "a.b": tensor(where, (2,)), "tie": tensor(where, (2,)), "turned": tensor(where, (2, 1), (1, 2)),
        "wide": tensor(where, (3, 2), (0, 1)), "n": number(3), "f": real(0.5), "t": b"\x88", "none": b"N",
        "text": text("some"), "list": listed(number(1), listed()), "inert": name("a", "B") + b")\x81}b",
        "half": tensor(storage("1", 4, "Untyped"), (2,), dtype="bfloat16"), "dtype": name("torch", "int8"),
        "scalar": call(name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88"), b"C\x08" + bytes(8)),
    })  # fmt: skip
    data = {"0": EIGHT, "1": b"abcd"}
    return found | {
        "least": made.zipped(made.small(), {"0": EIGHT}),
        "packed": made.zipped(many, data, packed=True),
        "many": made.zipped(many, data),
        "big": made.zipped(many, data, order="big"),
        "old": made.legacy(many, {"0": (2, EIGHT), "1": (4, b"abcd")}),
        "empty": made.zipped(b"}"),
    }


# Edits


def _members(file: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as opened:
            if sum(info.file_size for info in opened.infolist()) > MIB:
                return {}
            return {info.filename: opened.read(info) for info in opened.infolist()}
    except Exception:  # damaged by an earlier edit
        return {}


def _ops(data: bytes) -> list[tuple[int, int, str]]:
    """Returns where the opcodes of a pickle begin and end, and their names."""
    try:
        found = [(at or 0, opcode.name) for opcode, _, at in pickletools.genops(data)]
    except Exception:  # damaged by an earlier edit
        return []
    ends = [*(at for at, _ in found[1:]), (found[-1][0] + 1) if found else 0]
    return [(at, end, opcode) for (at, opcode), end in zip(found, ends, strict=True)]


def _edited(rng: random.Random, data: bytes) -> bytes:
    """Returns a pickle with a few opcodes changed."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        ops = _ops(data)
        if not ops:
            return data
        begin, end, opcode = rng.choice(ops)
        old, what = data[begin:end], rng.randrange(10)
        if "INT" in opcode and "UNI" not in opcode and what < 7:
            new = rng.choice(
                [number(rng.choice(HUGE)), number(rng.randrange(9)), b"\x88", b"N", text("3")]
            )
        elif opcode == "GLOBAL" and what < 7:
            new = name(*rng.choice(GLOBALS))
        elif "UNICODE" in opcode and what < 6:
            new = text(rng.choice([*NAMES, "0", "1", "storage", "module"]))
        elif opcode in ("BINPUT", "BINGET", "LONG_BINGET") and what < 7:
            new = old[:1] + bytes([rng.randrange(40)]) + old[2:]
        elif what == 7:
            new = b""
        elif what == 8:
            new = old * rng.choice([2, 2, 3, 50])
        else:
            new = bytes([rng.choice(list(map(ord, [op.code for op in pickletools.opcodes])))]) + old[1:]
        if rng.random() < 0.1:  # move it
            other = rng.choice(ops)[0]
            data = data[:other] + old + data[other:]
        else:
            data = data[:begin] + new + data[end:]
    return data


def edit_pickle(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes opcodes of a pickle in either container."""
    members = _members(file)
    main = next((member for member in members if member.endswith("data.pkl")), None)
    if main is not None:
        return archive(members | {main: _edited(rng, members[main])}, packed=rng.random() < 0.1)
    begins, at = [], 0
    while ops := _ops(file[at:]):
        begins.append((at, at + ops[-1][1]))
        at += ops[-1][1]
    if not begins:
        return file[:-1]
    begin, end = begins[3] if len(begins) > 3 and rng.random() < 0.7 else rng.choice(begins)
    return file[:begin] + _edited(rng, file[begin:end]) + file[end:]


def edit_members(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Changes, renames, adds or drops a member of a zip file, or a storage of an old one."""
    members = _members(file)
    if not members:
        at = max(0, len(file) - rng.choice([8, 16, 24, 40, 100]))
        return (
            file[:at]
            + struct.pack("<q", rng.choice([n for n in HUGE if abs(n) < 2**63]))
            + file[at + 8 :]
        )
    member = rng.choice(list(members))
    data, what = members[member], rng.randrange(6)
    if what == 0:
        members[member] = rng.choice(
            [data[:-1], data + b"\0", b"", data * 2, rng.randbytes(9), b"big", b"little"]
        )
    elif what == 1:
        del members[member]
    elif what == 2:
        folder = member.rpartition("/")[0]
        new = rng.choice(
            [f"{folder}/0", f"{folder}/1", "data.pkl", "x/data.pkl", "../data/0", f"{folder}/byteorder"]
        )
        members[new] = members.pop(member)
    elif what == 3:
        members["archive/byteorder"] = rng.choice([b"big", b"little", b"", b"\xff", b"big\0"])
    else:
        return archive(members, packed=True)
    return archive(members, packed=rng.random() < 0.2)


def random_value(rng: random.Random, depth: int = 0) -> bytes:
    """A value with mostly correct fields."""
    rare = lambda right, *wrong: right if rng.random() < 0.93 else rng.choice(wrong)  # noqa: E731
    what = rng.randrange(14)
    if what == 0 and depth < 3:
        return listed(*(random_value(rng, depth + 1) for _ in range(rng.randrange(4))))
    if what in (1, 2) and depth < 3:
        keys = [rare(f"w{i}", *NAMES) for i in range(rng.randrange(4))]
        return mapping({key: random_value(rng, depth + 1) for key in keys})
    if what == 3:
        plain = [
            number(rng.choice(HUGE)),
            real(0.5),
            b"\x88",
            b"N",
            text("x"),
            b")",
            b"\x8f",
            name(*rng.choice(GLOBALS)),
        ]
        return rng.choice(plain)
    if what == 4:
        arguments = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))] if depth < 3 else []
        return call(name(*rng.choice(GLOBALS)), *arguments)
    if what == 5:
        code, size = rng.choice(
            [("f8", 8), ("<i4", 4), (">i2", 2), ("b1", 1), ("c8", 8), ("O8", 8), ("f16", 16)]
        )
        dtype = call(name("numpy", "dtype"), text(rare(code, "f4,f4", "O", "\0")), b"\x89", b"\x88")
        data = b"C" + bytes([size]) + rng.randbytes(rare(size, size, 4) if size < 17 else size)
        data = b"C" + bytes([len(data) - 2]) + data[2:]
        if rng.random() < 0.5:
            return call(name("numpy.core.multiarray", "scalar"), dtype, data)
        state = group(
            number(1), rare(sizes(1), sizes(-1), sizes(2), sizes(1, 1), number(1)), dtype, b"\x89", data
        )
        return (
            call(
                name("numpy.core.multiarray", "_reconstruct"),
                name("numpy", "ndarray"),
                sizes(0),
                b"C\1b",
            )
            + state
            + b"b"
        )
    kind, size = rng.choice(KINDS)
    shape = tuple(rng.choice([1, 2, 3]) for _ in range(rng.choice([0, 1, 1, 2, 3])))
    shape = rare(shape, (0,), (0, 2**40), (2**62, 4), (-1,), (1,) * 33, (2**31, 2**31), (100, 100))
    strides = rare(
        None, (1,), (0,) * len(shape), (2,) * len(shape), (-1,), (2**61,) * len(shape), shape
    )
    where = storage(rare(str(rng.randrange(2)), "2", "../data.pkl", ""), rare(64 // size, *HUGE), kind)
    dtype = (
        rare(rng.choice(["uint16", "float8_e4m3fn", "bfloat16"]), "int3", "qint8")
        if kind == "Untyped"
        else ""
    )
    flags = rare(b"", mapping({"conj": b"\x88"}), mapping({"neg": b"\x88"}), b"N", number(3))
    made_tensor = tensor(where, shape, strides, rare(0, 1, 3, *HUGE), dtype, flags)
    return rare(
        made_tensor,
        call(name("torch._utils", "_rebuild_parameter"), made_tensor, b"\x88", made.ORDERED),
    )


def random_file(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """A new file of either container."""
    body = mapping({f"x{i}": random_value(rng) for i in range(rng.randrange(1, 4))})
    data = {str(i): rng.randbytes(64) for i in range(2)}
    if rng.random() < 0.3:
        counts = [rng.choice([8, 16, 32, 64]) for _ in data]
        return made.legacy(
            body, {key: (n, raw) for (key, raw), n in zip(data.items(), counts, strict=True)}
        )
    return made.zipped(
        body, data, packed=rng.random() < 0.2, order=rng.choice(["little", "little", "big"])
    )


def swap_names(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """Replaces a name of a function by one of the same length or another."""
    found = list(re.finditer(rb"c([a-z._]+)\n([A-Za-z0-9_]+)\n", file))
    if not found:
        return file[1:]
    match = rng.choice(found)
    return file[: match.start()] + name(*rng.choice(GLOBALS)) + file[match.end() :]


EDITS: list[Edit] = [
    edit_pickle,
    edit_pickle,
    edit_pickle,
    edit_members,
    random_file,
    random_file,
    swap_names,
]


def named(*names: str) -> bytes:
    """A file with an array of eight bytes for each name."""
    return made.zipped(mapping({key: tensor(storage("0", 2), (2,)) for key in names}), {"0": EIGHT})


def booleans(data: bytes) -> list[bytes]:
    """Files with an array of booleans, in both containers."""
    body = mapping({"a": tensor(storage("0", len(data), "Bool"), (len(data),))})
    return [made.zipped(body, {"0": data}), made.legacy(body, {"0": (len(data), data)})]


# Claims


def shared(depth: int, width: int, leaf: bytes) -> bytes:
    """Lists of lists, each of which has the one before many times."""
    out = leaf + put(0)
    for level in range(depth):
        out += b"0](" + get(level) * width + b"e" + put(level + 1)
    return out


def claims() -> dict[str, Callable[[], bytes]]:
    """Functions that make files with absurd counts and shapes, which are to be refused."""
    filler = {"0": bytes(MIB)}

    def one(
        shape: tuple[int, ...], strides: Any = None, numel: int = MIB // 4, **options: Any
    ) -> Callable[[], bytes]:
        body = mapping({"a": tensor(storage("0", numel), shape, strides)})
        return lambda: made.zipped(body, filler, **options)

    def views(
        count: int, shape: tuple[int, ...], strides: tuple[int, ...], step: int
    ) -> Callable[[], bytes]:
        where = storage("0", MIB // 4)
        return lambda: made.zipped(
            mapping({f"a{i}": tensor(where, shape, strides, i * step) for i in range(count)}), filler
        )

    return {
        "shape": one((2**40,)),
        "shapes that overflow": one((2**62, 4)),
        "zero and huge": one((0, 2**62, 2**62)),
        "expanded": one((2**30, 4), (0, 1)),
        "a storage": one((2**40,), numel=2**40),
        "zeros": lambda: made.zipped(
            mapping({"a": tensor(storage("0", 2**26), (2**26,))}), {"0": bytes(2**28)}, packed=True
        ),
        "one storage for all": views(1000, (MIB // 4 - 1000,), (1,), 1),
        "a packed pickle": lambda: archive({"a/data.pkl": made.program(text("x" * 2**26))}, packed=True),
        "a legacy storage": lambda: made.legacy(made.small(), {"0": (2**61, bytes(MIB))}),
        "a text": lambda: made.legacy(b"\x8d" + struct.pack("<Q", 2**40) + bytes(MIB)),
        "bytes": lambda: made.zipped(b"\x8e" + struct.pack("<Q", 2**40) + bytes(MIB)),
        "a number": lambda: made.zipped(b"\x8b\xff\xff\xff\x7f" + bytes(MIB)),
        "a frame": lambda: made.zipped(b"\x95" + struct.pack("<Q", 2**60) + bytes(MIB)),
        "lists of lists": lambda: made.zipped(mapping({"a": shared(60, 30, b"]")}), filler),
        "long names": lambda: made.zipped(
            text("x" * 50_000) + put(0) + b"0](" + (b"}" + get(0) + b"K\1s") * 900 + b"e", filler
        ),
    }  # fmt: skip
