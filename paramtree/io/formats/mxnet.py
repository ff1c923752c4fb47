"""MXNet's ``.params``: a list of arrays and a list of their names, little-endian.

The layout is that of ``NDArray::Save`` and ``NDArray::Load``. Dense arrays are written as MXNet
writes them, byte for byte; all four versions are read, dense and sparse.
"""

import os
import struct
from collections.abc import Mapping
from functools import partial
from io import BufferedReader
from typing import Any

import numpy as np

from paramtree.core.structure import STATE
from paramtree.io.atomic import replacing
from paramtree.io.source import Source, Stored, check_name, check_shape, fail, read_span
from paramtree.io.wire import to_dtype, to_host

__all__ = ["MAGIC", "NATIVE", "read", "write"]

MAGIC = struct.pack("<Q", 0x112)
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
# By number. fmt: off
_DTYPES = [
    "float32",
    "float64",
    "float16",
    "uint8",
    "int32",
    "int8",
    "int64",
    "bool",
    "int16",
    "uint16",
    "uint32",
    "uint64",
    "bfloat16",
]
# fmt: on
NATIVE = frozenset(_DTYPES)
_DENSE, _ROWS, _CSR = 0, 1, 2  # storage types, which are also how many index arrays there are
_CPU = (1, 0)  # device type and number


def write(path: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays of native dtypes.

    Version 2, which every MXNet reads, has no arrays without axes or elements; where there are such,
    all arrays are of version 3, as MXNet itself writes them in its numpy mode.
    """
    host = {name: to_host(array) for name, array in arrays.items()}
    magic = _V2 if all(array.size and array.ndim for array in host.values()) else _V3
    with replacing(path) as new, open(new, "wb") as file:
        file.write(MAGIC + struct.pack("<QQ", 0, len(host)))
        for array in host.values():
            head = struct.pack(f"<Iii{array.ndim}q", magic, _DENSE, array.ndim, *array.shape)
            file.write(head + struct.pack("<iii", *_CPU, _DTYPES.index(array.dtype.name)))
            file.write(array.reshape(-1).view(np.uint8).data)
        file.write(struct.pack("<Q", len(host)))
        for name in host:
            encoded = name.encode()
            file.write(struct.pack("<Q", len(encoded)) + encoded)


def read(path: str, file: BufferedReader) -> Source:
    """Returns what a file holds.

    ``arg:`` and ``aux:`` before a name, as in an exported model, are taken off, and ``aux:`` makes it
    state. Arrays without names are called by their numbers.

    Raises:
      LoadError: the file is damaged.
    """
    reader = _Reader(path, file)
    reader.take(16, "the beginning")
    # The least that an array takes: version, kind of storage, and that it has no axes.
    found = [_array(reader, f"array {i}") for i in range(reader.count("the arrays", 12))]
    names = []
    for i in range(reader.count("the names", 8)):
        where = f"name {i}"
        try:
            names.append(reader.take(reader.count(where, 1), where).decode())
        except UnicodeDecodeError:
            fail(path, where, "is not utf-8.")
    if reader.left:
        fail(path, f"at byte {file.tell()}", f"{reader.left} bytes come after the end.")
    if names and len(names) != len(found):
        fail(path, "the names", f"are {len(names)}, of {len(found)} arrays.")
    arrays: dict[str, Stored] = {}
    kinds = {}
    for i, stored in enumerate(found):
        full = names[i] if names else str(i)
        name = full.removeprefix("arg:").removeprefix("aux:")
        check_name(path, name)
        if name in arrays:
            fail(path, repr(full), "is there twice.")
        arrays[name] = stored
        if full.startswith("aux:"):
            kinds[name] = STATE
    return Source(path, "params", arrays, kinds=kinds, nameless=not names, ordered=True)


class _Reader:
    """A file that is read from front to back, never further than it goes."""

    def __init__(self, path: str, file: BufferedReader) -> None:
        self.path = path
        self.file = file
        self.left = os.fstat(file.fileno()).st_size

    def take(self, size: int, where: str) -> bytes:
        """Returns the next bytes."""
        if size > self.left:
            fail(
                self.path, where, f"needs {size} bytes, and {self.left} are left: the file is cut off."
            )
        self.left -= size
        return self.file.read(size)

    def skip(self, size: int, where: str) -> int:
        """Passes over some bytes, and returns where they begin."""
        begin = self.file.tell()
        if size > self.left:
            fail(self.path, where, f"has {size} bytes, and {self.left} are left: the file is cut off.")
        self.left -= size
        self.file.seek(size, os.SEEK_CUR)
        return begin

    def numbers(self, code: str, where: str) -> tuple[int, ...]:
        """Returns some numbers, of a format of ``struct``."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), where))

    def count(self, where: str, least: int) -> int:
        """Returns a number of things that take at least some bytes each."""
        (count,) = self.numbers("Q", where)
        if count * least > self.left:
            fail(self.path, where, f"{count} are announced, and {self.left} bytes are left.")
        return count

    def shape(self, where: str, code: str = "q", ndim: int | None = None) -> tuple[int, ...] | None:
        """Returns a shape; None if it is unknown, which is how an array says that it is none."""
        if ndim is None:
            (ndim,) = self.numbers("i", where)
        if ndim == -1:
            return None
        if not 0 <= ndim <= 32:
            fail(self.path, where, f"has {ndim} axes.")
        return self.numbers(f"{ndim}{code}", where)

    def dtype(self, where: str) -> np.dtype[Any]:
        """Returns a dtype."""
        (number,) = self.numbers("i", where)
        if not 0 <= number < len(_DTYPES):
            fail(self.path, where, f"has an unknown dtype, number {number}.")
        return to_dtype(_DTYPES[number])


# An array that was never given a value.
_NONE = Stored((0,), np.dtype(np.float32), partial(np.zeros, 0, np.float32))
_Part = tuple[int, np.dtype[Any], tuple[int, ...]]  # where the data begin, their dtype and shape


def _array(reader: _Reader, where: str) -> Stored:
    (magic,) = reader.numbers("I", where)
    stype, storage = _DENSE, None
    if magic in (_V2, _V3):
        (stype,) = reader.numbers("i", where)
        if stype not in (_DENSE, _ROWS, _CSR):
            fail(reader.path, where, f"has an unknown storage type, {stype}.")
        storage = reader.shape(where) if stype else None
    if magic in (_V1, _V2, _V3):
        shape = reader.shape(where)
    else:
        # All zeros would be an array without axes, which no version but the third has.
        shape = reader.shape(where, "I", magic if 0 < magic < 2**31 else -2)
    if shape is None or (not shape and magic != _V3):
        return _NONE
    reader.numbers("ii", where)  # the device that it was on
    dtype = reader.dtype(where)
    size = check_shape(reader.path, where, shape, dtype)
    if not stype:
        begin = reader.skip(size, where)
        return Stored(
            shape, dtype, partial(read_span, reader.path, reader.file, begin, size, dtype, shape)
        )
    index = [(reader.dtype(where), reader.shape(where)) for _ in range(stype)]
    parts: list[_Part] = []
    for kind, dims in [(dtype, storage), *index]:
        if dims is None:
            fail(reader.path, where, "is sparse, and a part of it has no shape.")
        begin = reader.skip(check_shape(reader.path, where, dims, kind), where)
        parts.append((begin, kind, dims))
    dense = _dense_rows if stype == _ROWS else _dense_csr
    return Stored(shape, dtype, partial(_dense, reader, where, shape, parts, dense), expands=True)


def _dense(
    reader: _Reader, where: str, shape: tuple[int, ...], parts: list[_Part], fill: Any
) -> np.ndarray:
    """Returns a sparse array as a dense one."""
    path, file = reader.path, reader.file
    data, *index = (
        read_span(path, file, begin, check_shape(path, where, dims, kind), kind, dims)
        for begin, kind, dims in parts
    )
    if any(i.ndim != 1 or i.dtype.kind not in "iu" for i in index):
        fail(path, where, "is sparse, and its indices are not lists of whole numbers.")
    dense = np.zeros(shape, data.dtype)
    if not fill(dense, data, *index):
        fail(path, where, f"is sparse, and its indices do not fit its shape {shape}.")
    return dense


def _dense_rows(dense: np.ndarray, data: np.ndarray, rows: np.ndarray) -> bool:
    fits = data.shape == (len(rows), *dense.shape[1:])
    if not fits or dense.ndim == 0 or np.any((rows < 0) | (rows >= len(dense))):
        return False
    dense[rows] = data
    return True


def _dense_csr(dense: np.ndarray, data: np.ndarray, starts: np.ndarray, columns: np.ndarray) -> bool:
    if dense.ndim != 2 or len(starts) != len(dense) + 1 or data.shape != columns.shape:
        return False
    if starts[0] != 0 or starts[-1] != len(data) or np.any(starts[1:] < starts[:-1]):
        return False
    if np.any((columns < 0) | (columns >= dense.shape[1])):
        return False
    rows = np.repeat(np.arange(len(dense)), (starts[1:] - starts[:-1]).astype(np.int64))
    dense[rows, columns] = data
    return True
