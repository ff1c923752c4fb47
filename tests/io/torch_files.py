"""Files of PyTorch, written without it: an assembler of pickles, and both containers.

A pickle is put together from its opcodes, so that it can say what torch never would.
"""

import io
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C


# Pickles


def name(module: str, attribute: str) -> bytes:
    """A function or a class."""
    return f"c{module}\n{attribute}\n".encode("utf-8", "surrogatepass")


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """An integer of any size, in the shortest form."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def group(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def sizes(*values: int) -> bytes:
    return group(*map(number, values))


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def mapping(entries: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


ORDERED = call(name("collections", "OrderedDict"))


def storage(key: str, numel: int, kind: str = "Float", *more: bytes) -> bytes:
    module = "torch.storage" if kind == "Untyped" else "torch"
    parts = name(module, f"{kind}Storage"), text(key), text("cpu"), number(numel)
    return group(text("storage"), *parts, *more) + b"Q"


def tensor(
    where: bytes,
    shape: Iterable[int],
    strides: Iterable[int] | None = None,
    offset: int = 0,
    dtype: str = "",
    metadata: bytes = b"",
) -> bytes:
    """A view of a storage; without strides it is contiguous."""
    shape = tuple(shape)
    if strides is None:
        steps = [1]
        for size in reversed(shape[1:]):
            steps.insert(0, steps[0] * size)
        strides = steps[: len(shape)]
    arguments = [where, number(offset), sizes(*shape), sizes(*strides), b"\x89", ORDERED]
    arguments += [name("torch", dtype)] if dtype else []
    function = "_rebuild_tensor_v3" if dtype else "_rebuild_tensor_v2"
    return call(name("torch._utils", function), *arguments, *([metadata] if metadata else []))


def program(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


# Containers


def zipped(
    body: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    packed: bool = False,
    order: str = "little",
) -> bytes:
    """A file of torch since 1.6, around the body of a pickle."""
    members = {"archive/data.pkl": program(body), "archive/byteorder": order.encode()}
    members |= {f"archive/data/{key}": data for key, data in (storages or {}).items()}
    return archive(members, packed)


def archive(members: Mapping[str, bytes], packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as file:
        warnings.simplefilter("ignore")  # duplicate names
        for member, data in members.items():
            info = zipfile.ZipInfo(member, (2001, 9, 9, 1, 46, 40))
            info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            file.writestr(info, data)
    return buffer.getvalue()


def legacy(body: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None) -> bytes:
    """A file of torch before 1.6; a storage is its number of elements, and bytes."""
    known: Mapping[str, tuple[int, bytes]] = storages or {}
    head = program(number(MAGIC)) + program(number(1001)) + program(b"}")
    data = b"".join(struct.pack("<q", count) + raw for count, raw in known.values())
    return head + program(body) + program(listed(*map(text, known))) + data


def small(shape: Iterable[int] = (2,), **options: Any) -> bytes:
    """The body of a dict with one tensor of eight bytes, which are the storage "0"."""
    return mapping({"a.b": tensor(storage("0", 2), shape, **options)})
