"""What a file holds, before anything is known of where it goes: names, shapes, dtypes, and how to read.

A format's reader checks everything that a file says of itself before it allocates anything, and
gives a ``Source``. No array is read until the loader has seen that all of them fit.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from paramtree.core.arrays import printable
from paramtree.core.errors import LoadError
from paramtree.io.layout import CLIMBS, DEEPEST, Layout, decode_layout

__all__ = [
    "Source", "Stored", "check_name", "check_shape", "fail", "read_into", "read_layout", "read_part",
    "read_span", "segments",
]  # fmt: skip

# What a file may expand to when nobody says which shapes to expect: compressed and sparse arrays take
# more memory than the file, and a few bytes can claim any amount.
_SLACK = 2**18
_NEAR = 4096  # bytes: a disk reads no less than a page
_CHUNK = 2**22  # bytes that may be in memory although only some of them are wanted


class Stored(NamedTuple):
    """One array of a file.

    ``read`` returns it; ``expands`` if that takes more memory than the file. ``part`` returns a part of
    it, given a slice for each dimension, and reads that part alone; None if the format has no way to.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    expands: bool = False
    part: Callable[[tuple[slice, ...]], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes the array takes in memory."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class Source:
    """The arrays of a file by name, and the structure of the tree, where the file tells it.

    ``kinds`` has the kinds that the names tell, ``nameless`` is whether the names are mere numbers,
    and ``ordered`` whether names may go by their order alone, as Gluon's do. ``parts`` are the files
    that an index lists. The files stay open until the source is left, so that all of it comes from one
    file even if that is replaced meanwhile.
    """

    path: str
    format: str
    arrays: Mapping[str, Stored]
    layout: Layout | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    nameless: bool = False
    ordered: bool = False
    parts: Sequence[str] = ()
    files: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *args: object) -> None:
        self.files.close()

    def get(self, name: str) -> Any:
        """Returns an array, read anew."""
        return self.arrays[name].read()

    def prepare(self, wanted: Mapping[str, Any]) -> None:
        """Is told which arrays will be read, and their shardings or None, before any of them is."""

    def check_expansion(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises LoadError if arrays whose shapes nobody expects would take too much memory."""
        size = sum(
            stored.nbytes
            for name, stored in self.arrays.items()
            if stored.expands and expected.get(name) != stored.shape
        )
        most = _SLACK + 2 * os.path.getsize(self.path)
        if size > most:
            fail(
                self.path,
                "",
                f"its compressed or sparse arrays would take {size:,} bytes of memory, of a file of "
                f"{os.path.getsize(self.path):,}. If the file is to be trusted, say which shapes to "
                "expect with like=, such as those that it claims, like=pt.peek(path); or write its "
                "arrays uncompressed and dense.",
            )


def fail(path: str, where: str, what: str) -> NoReturn:
    """Raises LoadError of a file and a place in it."""
    # A parser's own message may hold a name as long as the file, which would help nobody.
    what = what if len(what) <= 1000 else what[:997] + "..."
    raise LoadError(f"{path}: {printable(where + ': ' if where else '')}{printable(what)}")


def check_name(path: str, name: str) -> None:
    """Raises LoadError for a name that no tree should have: one that climbs, or has empty parts."""
    if CLIMBS.search(name):
        fail(path, repr(_short(name)), "is not a name: part of it is empty, '.' or '..'.")


def check_shape(path: str, where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Returns how many bytes an array takes; LoadError if no array can have the shape."""
    size = dtype.itemsize
    for n in shape:
        size *= max(n, 1)  # numpy counts so, an axis of 0 does not make another one harmless
    if len(shape) > 32 or any(n < 0 for n in shape) or size >= 2**62:
        fail(path, where, f"no array has shape {_short(str(shape))}.")
    return 0 if 0 in shape else size


def read_layout(path: str, where: str, text: str | None, arrays: Mapping[str, Stored]) -> Layout | None:
    """Returns the layout that a file holds, if any; LoadError if it is not that of the arrays."""
    if text is None:
        return None
    try:
        layout = decode_layout(text)
    except ValueError as error:
        fail(path, where, f"it does not describe a tree: {error}.")
    if different := sorted(set(layout.names) ^ set(arrays)):
        fail(path, where, f"it and the arrays disagree on {_short(', '.join(different))}.")
    return layout


def segments(path: str, name: str, sep: str) -> tuple[str, ...]:
    """Returns a name's path. A "/" always separates; an empty ``sep`` means that nothing else does.

    Raises:
      LoadError: a part is empty, or there are more than ``DEEPEST``.
    """
    parts = [part for text in name.split("/") for part in (text.split(sep) if sep else (text,))]
    if not all(parts) or len(parts) > DEEPEST:
        problem = "is too deep" if all(parts) else f"has an empty part between {sep or '/'!r}"
        fail(path, repr(_short(name)), f"{problem}. With another sep= or rename= it can be a path.")
    return tuple(map(sys.intern, parts))  # a large tree has few different ones


def read_span(
    path: str, file: BufferedReader, offset: int, size: int, dtype: Any, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns an array from bytes of a file, in memory that jax can use as it is.

    Raises:
      LoadError: the file has become shorter.
    """
    return read_into(path, _reader(file, offset), size, dtype, shape)


def read_into(
    path: str,
    readinto: Callable[[memoryview], int],
    size: int,
    dtype: Any,
    shape: tuple[int, ...],
    order: Literal["C", "F"] = "C",
) -> np.ndarray:
    """Returns an array from what a function reads, which may be less at a call than it is asked for."""
    span = _aligned(size)
    _fill(path, readinto, span)
    # A boolean is 0 or 1 to jax, and a file may hold any byte.
    array = span != 0 if dtype == np.bool_ else span.view(dtype)
    return array.reshape(shape, order=order)


def read_part(
    path: str,
    file: BufferedReader,
    offset: int,
    dtype: Any,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
) -> np.ndarray:
    """Returns a part of an array from a file; what lies outside is read only if it is less than a page.

    Args:
      path: what to call the file in a message.
      file: the file.
      offset: where the array begins in it.
      dtype: the dtype of the array.
      shape: the shape of the whole array.
      index: a slice, without a step, for each dimension.

    Raises:
      LoadError: the file has become shorter.
    """
    if not shape:
        return read_span(path, file, offset, dtype.itemsize, dtype, shape)
    bounds = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
    sizes = tuple(stop - start for start, stop in bounds)
    item = dtype.itemsize
    steps = [item * math.prod(shape[i + 1 :]) for i in range(len(shape))]  # bytes
    out = (
        _aligned(item * math.prod(sizes)).view(np.uint8 if dtype == np.bool_ else dtype).reshape(sizes)
    )
    if not out.size:
        return out.astype(dtype, copy=False)
    # Below the dimension ``at`` everything is read, and above it each row by itself: it is the last one
    # that is divided, or one further up if the rows lie nearly side by side.
    divided = [i for i, n in enumerate(shape) if sizes[i] < n]
    at = divided[-1] if divided else 0
    while at > 0 and (shape[at] - sizes[at]) * steps[at] < _NEAR:
        at -= 1
    inner = tuple(slice(start, stop) for start, stop in bounds[at + 1 :])
    straight = sizes[at + 1 :] == shape[at + 1 :]
    count = sizes[at] if straight else max(1, _CHUNK // steps[at])
    for lead in np.ndindex(*sizes[:at]):
        begin = offset + sum((i + b[0]) * n for i, b, n in zip(lead, bounds, steps, strict=False))
        for row in range(0, sizes[at], count):
            rows = out[lead][row : row + count]
            where = begin + (bounds[at][0] + row) * steps[at]
            if straight:
                _fill(path, _reader(file, where), rows.reshape(-1).view(np.uint8))
            else:
                block = np.empty((len(rows), *shape[at + 1 :]), out.dtype)
                _fill(path, _reader(file, where), block.reshape(-1).view(np.uint8))
                rows[...] = block[(slice(None), *inner)]
    return out != 0 if dtype == np.bool_ else out


def _reader(file: BufferedReader, offset: int) -> Callable[[memoryview], int]:
    """Returns a function that reads on from a place in a file, and no more than it is asked for."""

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
    """Returns memory for some bytes."""
    # jax takes over a buffer that begins at a multiple of 64 and copies any other: the arrays of a
    # file must not be in memory twice.
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size]


def _fill(path: str, readinto: Callable[[memoryview], int], span: np.ndarray) -> None:
    done, size = 0, len(span)
    while done < size:
        count = readinto(span.data[done:])
        if not count:
            fail(path, "", f"{size - done} bytes of an array are missing: the file has become shorter.")
        done += count


def _short(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "..."
