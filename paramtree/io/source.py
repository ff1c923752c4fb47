"""The contents of a file: names, shapes, dtypes, and functions that read the arrays.

The reader of each format checks every claim of a file before it allocates memory, and returns a
``Source``. The loader reads arrays only after checking that all of them fit.
"""

import contextlib
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, NamedTuple, NoReturn

import numpy as np

from paramtree.core.arrays import printable
from paramtree.core.errors import LoadError
from paramtree.io.layout import CLIMBS, DEEPEST, Layout, decode_layout

__all__ = [
    "Slices", "Source", "Stored", "check_array", "check_name", "check_shape", "fail", "read_into",
    "read_layout", "read_part", "read_span", "segments", "shortened",
]  # fmt: skip

# Compressed and sparse arrays take more memory than the file, and a few bytes can claim any amount:
# without known shapes, a file may expand to twice its size and this many bytes.
_SLACK = 2**18
_PAGE = 4096  # bytes: a disk reads no less
_PLAIN = re.compile(r"\w[\w.]*").fullmatch  # what most names are
_CHUNK = 2**22  # bytes read at once when only some of them are wanted

Slices = tuple[slice, ...]  # one for each dimension


class Stored(NamedTuple):
    """One array of a file.

    ``read`` returns it; ``expands`` says that it may take more memory than its bytes in the file.
    ``read_slice`` reads only the given slice of each dimension; None if the format cannot.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    expands: bool = False
    read_slice: Callable[[Slices], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """The size of the array in memory, in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Source(contextlib.AbstractContextManager["Source"]):
    """The arrays of a file by name, and the structure of the tree if the file records it.

    ``kinds`` are the kinds that names imply, ``nameless`` says that the names are just numbers,
    ``ordered`` that names may be matched by order, as Gluon's, and ``unordered`` that the order of the
    names means nothing. ``ties`` maps further names of an array to its first. ``metadata`` are texts of
    the file's own, ``notes`` are remarks for the report, and ``parts`` the files that an index lists.
    Files stay open until the source is closed, so replacing one meanwhile has no effect.
    """

    path: str
    format: Any  # a Format
    arrays: Mapping[str, Stored]
    layout: Layout | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    nameless: bool = False
    ordered: bool = False
    unordered: bool = False
    ties: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    parts: Sequence[str] = ()
    files: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __exit__(self, *args: object) -> None:
        self.files.close()

    def get(self, name: str) -> Any:
        """Reads an array."""
        return self.arrays[name].read()

    def prepare(self, wanted: Mapping[str, Any]) -> None:
        """Announces which arrays ``get`` will read, with their shardings or None."""

    def check_expansion(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises LoadError if arrays of unexpected shapes would take too much memory."""
        size = sum(
            stored.nbytes
            for name, stored in self.arrays.items()
            if stored.expands and expected.get(name) != stored.shape
        )
        if size > _SLACK and size > _SLACK + 2 * os.path.getsize(self.path):
            fail(
                self.path,
                "",
                f"its compressed or sparse arrays would take {size:,} bytes of memory, from a file of "
                f"{os.path.getsize(self.path):,}. If you trust it, pass the expected shapes as like=, "
                "such as its own, like=pt.peek(path); or write its arrays uncompressed and dense.",
            )


def fail(path: str, where: str, problem: str) -> NoReturn:
    """Raises LoadError for a problem in a file, ``where`` in it."""
    shown = printable(shortened(problem, 1000))  # it may quote a long name
    raise LoadError(f"{path}: {printable(where + ': ' if where else '')}{shown}")


def shortened(text: str, most: int) -> str:
    """Returns a text, or the beginning of a long one and three dots."""
    return text if len(text) <= most else text[: most - 3] + "..."


def check_name(path: str, name: str) -> None:
    """Raises LoadError for a name with segments that are empty, or that lead out of a folder."""
    if not _PLAIN(name) and CLIMBS.search(name):
        fail(path, repr(shortened(name, 80)), "is not a valid name: a segment is empty, '.' or '..'.")


def check_shape(path: str, where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Returns the size of an array in bytes. Raises LoadError if no array can have the shape."""
    size = _bytes(shape, dtype.itemsize)
    if size is None:
        fail(path, where, f"no array can have shape {shortened(str(shape), 80)}.")
    return size


@functools.lru_cache
def _bytes(shape: tuple[int, ...], itemsize: int) -> int | None:
    # As in numpy, an axis of 0 does not make a huge one valid.
    size = itemsize * math.prod(max(n, 1) for n in shape)
    if len(shape) > 32 or any(n < 0 for n in shape) or size >= 2**62:
        return None
    return 0 if 0 in shape else size


def check_array(path: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Returns the size of an array in bytes, after ``check_name`` and ``check_shape``."""
    if not _PLAIN(name):
        check_name(path, name)
    size = _bytes(shape, dtype.itemsize)  # a file may have many arrays
    return check_shape(path, repr(name), shape, dtype) if size is None else size


def read_layout(path: str, where: str, text: str | None, arrays: Mapping[str, Stored]) -> Layout | None:
    """Returns the layout in a file, if any. Raises LoadError if it does not match the arrays."""
    if text is None:
        return None
    try:
        layout = decode_layout(text)
    except ValueError as error:
        fail(path, where, f"it does not describe a tree: {error}.")
    if different := sorted(set(layout.names) ^ set(arrays)):
        fail(path, where, f"it and the arrays disagree on {shortened(', '.join(different), 80)}.")
    return layout


def segments(path: str, name: str, sep: str) -> tuple[str, ...]:
    """Splits a name into a path, at ``sep`` and at "/"; an empty ``sep`` splits at "/" only.

    Raises:
      LoadError: a segment is empty, or there are more than ``DEEPEST``.
    """
    if sep and "/" not in name:
        parts = name.split(sep)
    else:
        parts = [part for text in name.split("/") for part in (text.split(sep) if sep else (text,))]
    if not all(parts) or len(parts) > DEEPEST:
        problem = "is nested too deep" if all(parts) else f"has an empty segment between {sep or '/'!r}"
        fail(path, repr(shortened(name, 80)), f"{problem}. Pass another sep=, or rename= it.")
    return tuple(map(sys.intern, parts))  # even a large tree has few distinct segments


def read_span(
    path: str, file: BufferedReader, offset: int, dtype: Any, shape: tuple[int, ...]
) -> np.ndarray:
    """Reads an array from a file into memory that jax can use without a copy."""
    return read_into(path, _reader(file, offset), dtype, shape)


def read_into(
    path: str, readinto: Callable[[memoryview], int], dtype: Any, shape: tuple[int, ...]
) -> np.ndarray:
    """Reads an array with a function that may return fewer bytes per call than requested."""
    span = _aligned(dtype.itemsize * math.prod(shape))
    _fill(path, readinto, span)
    # jax assumes that a boolean is 0 or 1, but a file may hold any byte.
    return (span != 0 if dtype == np.bool_ else span.view(dtype)).reshape(shape)


def read_part(
    path: str, file: BufferedReader, offset: int, dtype: Any, shape: tuple[int, ...], index: Slices
) -> np.ndarray:
    """Reads a slice, without steps, of an array in a file. It skips any gap of a page or more."""
    if not shape:
        return read_span(path, file, offset, dtype, shape)
    bounds = [dim.indices(n)[:2] for dim, n in zip(index, shape, strict=True)]
    sizes = tuple(stop - start for start, stop in bounds)
    strides = [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]  # bytes
    span = _aligned(dtype.itemsize * math.prod(sizes))
    out = span.view(np.uint8 if dtype == np.bool_ else dtype).reshape(sizes)
    if not out.size:
        return out.astype(dtype, copy=False)
    # Dimensions after ``axis`` are read in full and those before it index by index. It is the last
    # sliced one, or an earlier one if the gaps between rows are smaller than a page.
    sliced = [i for i, n in enumerate(shape) if sizes[i] < n]
    axis = sliced[-1] if sliced else 0
    while axis > 0 and (shape[axis] - sizes[axis]) * strides[axis] < _PAGE:
        axis -= 1
    inner = tuple(slice(start, stop) for start, stop in bounds[axis + 1 :])
    contiguous = sizes[axis + 1 :] == shape[axis + 1 :]
    count = sizes[axis] if contiguous else max(1, _CHUNK // strides[axis])
    for lead in np.ndindex(*sizes[:axis]):
        begin = offset + sum((i + b[0]) * n for i, b, n in zip(lead, bounds, strides, strict=False))
        for row in range(0, sizes[axis], count):
            rows = out[lead][row : row + count]
            where = begin + (bounds[axis][0] + row) * strides[axis]
            if contiguous:
                _fill(path, _reader(file, where), rows.reshape(-1).view(np.uint8))
            else:
                block = np.empty((len(rows), *shape[axis + 1 :]), out.dtype)
                _fill(path, _reader(file, where), block.reshape(-1).view(np.uint8))
                rows[...] = block[(slice(None), *inner)]
    return out != 0 if dtype == np.bool_ else out


def _reader(file: BufferedReader, offset: int) -> Callable[[memoryview], int]:
    """Returns a function that reads sequentially from an offset, without reading ahead."""

    def readinto(view: memoryview) -> int:
        nonlocal offset
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [view], offset)
        else:
            file.seek(offset)
            count = file.readinto(view)
        offset += count
        return count

    return readinto


def _aligned(size: int) -> np.ndarray:
    """Returns a buffer aligned to 64 bytes, which jax takes over where it would copy any other."""
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size]


def _fill(path: str, readinto: Callable[[memoryview], int], span: np.ndarray) -> None:
    """Reads into the whole of a buffer. Raises LoadError if the file was truncated."""
    done, size = 0, len(span)
    while done < size:
        count = readinto(span.data[done:])
        if not count:
            fail(path, "", f"{size - done} bytes of an array are missing: the file was truncated.")
        done += count
