"""MXNet's ``.params``: a list of arrays and a list of their names, little-endian.

The layout follows ``NDArray::Save`` and ``NDArray::Load``. Dense arrays are written byte for byte as
MXNet does; all four versions can be read, dense and sparse.
"""

import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from io import BufferedReader
from typing import Any

import numpy as np

from paramtree.core.structure import STATE
from paramtree.io.atomic import replacing
from paramtree.io.formats.format import Content, Format
from paramtree.io.source import Source, Stored, check_name, check_shape, fail, read_span
from paramtree.io.wire import to_dtype, to_host

__all__ = ["FORMAT"]

_MAGIC = struct.pack("<Q", 0x112)
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DTYPES = [  # indexed by MXNet's type code
    "float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool", "int16", "uint16",
    "uint32", "uint64", "bfloat16",
]  # fmt: skip
_DENSE, _ROWS, _CSR = 0, 1, 2  # storage types; also the number of index arrays
_CPU = (1, 0)  # device type and number


class Params(Format):
    """MXNet's ``.params``. A tied array is in it under each of its names."""

    name = "params"
    endings = (".params",)
    native = frozenset(_DTYPES)

    def recognises(self, path: str, head: bytes) -> bool:
        return head.startswith(_MAGIC)

    def write(self, path: str, content: Content) -> None:
        """Writes arrays, in version 2, which every MXNet reads.

        It cannot hold scalars or empty arrays; if there are any, all arrays are written in version 3,
        as by MXNet in its numpy mode.
        """
        host = {name: to_host(array) for name, array in content.arrays.items()}
        magic = _V2 if all(array.size and array.ndim for array in host.values()) else _V3
        with replacing(path) as new, open(new, "wb") as file:
            file.write(_MAGIC + struct.pack("<QQ", 0, len(host)))
            for array in host.values():
                head = struct.pack(f"<Iii{array.ndim}q", magic, _DENSE, array.ndim, *array.shape)
                file.write(head + struct.pack("<iii", *_CPU, _DTYPES.index(array.dtype.name)))
                file.write(array.reshape(-1).view(np.uint8).data)
            file.write(struct.pack("<Q", len(host)))
            for name in host:
                encoded = name.encode()
                file.write(struct.pack("<Q", len(encoded)) + encoded)

    def read(self, path: str, file: BufferedReader) -> Source:
        """Opens a file, also of an older version, and with sparse arrays.

        The prefixes ``arg:`` and ``aux:`` of an exported model are removed; ``aux:`` marks state.
        Arrays without names are named by their index.
        """
        reader = _Reader(path, file)
        reader.take(16, "the header")
        # An array takes at least 12 bytes: its version, storage type and number of axes.
        stored = [_array(reader, f"array {i}") for i in range(reader.count("the arrays", 12))]
        names = []
        for i in range(reader.count("the names", 8)):
            where = f"name {i}"
            try:
                names.append(reader.take(reader.count(where, 1), where).decode())
            except UnicodeDecodeError:
                fail(path, where, "is not utf-8.")
        if reader.left:
            fail(path, f"at byte {file.tell()}", f"{reader.left} bytes follow the end.")
        if names and len(names) != len(stored):
            fail(path, "the names", f"there are {len(names)} for {len(stored)} arrays.")
        arrays: dict[str, Stored] = {}
        kinds = {}
        for i, array in enumerate(stored):
            full = names[i] if names else str(i)
            name = full.removeprefix("arg:").removeprefix("aux:")
            check_name(path, name)
            if name in arrays:
                fail(path, repr(full), "appears twice.")
            arrays[name] = array
            if full.startswith("aux:"):
                kinds[name] = STATE
        return Source(path, self, arrays, kinds=kinds, nameless=not names, ordered=True)


class _Reader:
    """Reads a file sequentially and checks every size against the bytes left."""

    def __init__(self, path: str, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.left = os.fstat(file.fileno()).st_size

    def advance(self, size: int, where: str) -> None:
        """Counts the next bytes as read."""
        if size > self.left:
            fail(self.path, where, f"is truncated: needs {size} bytes, but {self.left} are left.")
        self.left -= size

    def take(self, size: int, where: str) -> bytes:
        """Returns the next bytes."""
        self.advance(size, where)
        return self.file.read(size)

    def later(self, size: int, dtype: Any, shape: Any, where: str) -> Callable[[], np.ndarray]:
        """Skips an array, and returns a function that reads it."""
        self.advance(size, where)
        begin = self.file.tell()
        self.file.seek(size, os.SEEK_CUR)
        return partial(read_span, self.path, self.file, begin, dtype, shape)

    def numbers(self, code: str, where: str) -> tuple[int, ...]:
        """Returns numbers in a format of ``struct``."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), where))

    def count(self, where: str, least: int) -> int:
        """Returns the number of entries that follow, of at least ``least`` bytes each."""
        (count,) = self.numbers("Q", where)
        if count * least > self.left:
            fail(self.path, where, f"the file claims {count}, but only {self.left} bytes are left.")
        return count

    def shape(self, where: str, code: str = "q", ndim: int | None = None) -> tuple[int, ...] | None:
        """Returns a shape; None if it is unknown, which marks an array without a value."""
        if ndim is None:
            (ndim,) = self.numbers("i", where)
        if ndim == -1:
            return None
        if not 0 <= ndim <= 32:
            fail(self.path, where, f"has {ndim} axes.")
        return self.numbers(f"{ndim}{code}", where)

    def dtype(self, where: str) -> np.dtype[Any]:
        """Returns a dtype, from its type code."""
        (number,) = self.numbers("i", where)
        if not 0 <= number < len(_DTYPES):
            fail(self.path, where, f"has an unknown dtype, number {number}.")
        return to_dtype(_DTYPES[number])


# An array that never got a value.
_NONE = Stored((0,), np.dtype(np.float32), partial(np.zeros, 0, np.float32))


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
        # Version 0 starts with the number of axes. A 0 would be a scalar, which only version 3 has.
        shape = reader.shape(where, "I", magic if 0 < magic < 2**31 else -2)
    if shape is None or (not shape and magic != _V3):
        return _NONE
    reader.numbers("ii", where)  # device type and number
    dtype = reader.dtype(where)
    size = check_shape(reader.path, where, shape, dtype)
    if not stype:
        return Stored(shape, dtype, reader.later(size, dtype, shape, where))
    index = [(reader.dtype(where), reader.shape(where)) for _ in range(stype)]
    parts = []
    for part_dtype, dims in [(dtype, storage), *index]:
        if dims is None:
            fail(reader.path, where, "is sparse, but one of its arrays has no shape.")
        size = check_shape(reader.path, where, dims, part_dtype)
        parts.append(reader.later(size, part_dtype, dims, where))
    dense = _dense_rows if stype == _ROWS else _dense_csr
    return Stored(shape, dtype, partial(_dense, reader.path, where, shape, parts, dense), expands=True)


def _dense(
    path: str, where: str, shape: tuple[int, ...], parts: Sequence[Callable[[], Any]], fill: Any
) -> np.ndarray:
    """Returns a sparse array as a dense one."""
    data, *index = (read() for read in parts)
    if any(i.ndim != 1 or i.dtype.kind not in "iu" for i in index):
        fail(path, where, "is sparse, but its indices are not lists of integers.")
    dense = np.zeros(shape, data.dtype)
    if not fill(dense, data, *index):
        fail(path, where, f"is sparse, but its indices do not fit its shape {shape}.")
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


FORMAT = Params()
