"""Keras's weights, and other arrays in HDF5: each is named by its path in the file."""

import math
import re
import zlib
from collections.abc import Sequence
from functools import partial
from io import BufferedReader
from typing import Any, NoReturn

import numpy as np

from paramtree.io.formats.format import Format
from paramtree.io.formats.hdf5 import HDF5File
from paramtree.io.formats.hdf5_messages import Chunk, Dataset, HDF5Error
from paramtree.io.layout import DEEPEST
from paramtree.io.source import (
    Slices,
    Source,
    Stored,
    check_array,
    check_name,
    fail,
    read_part,
    read_span,
    shortened,
)
from paramtree.io.transforms import natural
from paramtree.io.wire import to_dtype

__all__ = ["FORMAT"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_INTEGER, _FLOAT, _OPAQUE, _ENUM = 0, 1, 5, 8  # HDF5's classes of dtypes
# The first bit of a float and how many it has, the same of its exponent and its mantissa, and the bias.
_FLOATS = {
    (0, 16, 10, 5, 0, 10, 15): "float16",
    (0, 16, 7, 8, 0, 7, 127): "bfloat16",
    (0, 32, 23, 8, 0, 23, 127): "float32",
    (0, 64, 52, 11, 0, 52, 1023): "float64",
}
_BOOLEAN = re.compile(rb"FALSE\0+TRUE\0+\x01")  # what h5py calls the values of a boolean
_DEFLATE, _SHUFFLE = 1, 2  # HDF5's numbers of filters
_FILTERS: tuple[list[int], ...] = ([], [_SHUFFLE], [_DEFLATE], [_SHUFFLE, _DEFLATE])
# A name repeats those of its groups, and a chunk takes a few bytes in its index. A file may have this
# many letters in its names and this many chunks; more if it is large.
_LETTERS, _CHUNKS = 2**18, 2**12
_LARGE = 2**20  # bytes that a chunk may have, however small its array is


class Keras(Format):
    """Keras's ``.weights.h5``, and the ``.h5`` of older versions."""

    name = "keras"
    endings = (".weights.h5", ".h5", ".hdf5")
    keeps = frozenset(("slices",))
    writes = False

    def recognises(self, path: str, head: bytes) -> bool:
        return head.startswith(_MAGIC)

    def read(self, path: str, file: BufferedReader) -> Source:
        """Opens a file. Links to elsewhere are refused; two names of one array are a tie."""
        reader = _Reader(path, file)
        arrays = dict(reader.group(reader.root, "", 0))
        return Source(path, self, arrays, ties=reader.ties)


class _Reader:
    """Walks through the groups of a file, and checks all that they say.

    Attributes:
      root: the address of the outermost group.
      ties: further names of an array, and its first.
    """

    def __init__(self, path: str, file: BufferedReader) -> None:
        self.path, self.file = path, file
        try:
            self.hdf5 = HDF5File(file, ("layer_names", "weight_names"))
        except HDF5Error as error:
            self.fail("", f"{error}.")
        self.root = self.hdf5.root
        self.left = self.hdf5.size  # bytes of arrays that may still come
        self.letters, self.chunks = _LETTERS + self.left, _CHUNKS + self.left // 256
        self.seen: dict[int, str] = {}  # the names of arrays, and "" for groups, by address
        self.ties: dict[str, str] = {}

    def fail(self, name: str, problem: str) -> NoReturn:
        fail(self.path, repr(shortened(name, 80)) if name else "", problem)

    def group(self, at: int, name: str, depth: int) -> list[tuple[str, Stored]]:
        """Returns the arrays in a group and below it, or the array that is there instead."""
        try:
            found = self.hdf5.object(at)
        except HDF5Error as error:
            self.fail(name, f"{error}.")
        if isinstance(found, Dataset):
            if not name:
                self.fail(name, "is damaged: its root is an array.")
            self.seen[at] = name
            return [(name, self.array(found, name))]
        self.seen[at] = ""
        links = found.links
        if not found.tracked:  # they are sorted by name
            links.sort(key=lambda link: natural(link[0]))
        if order := _places(found.attributes.get("layer_names")):
            links.sort(key=lambda link: order.get(link[0], len(order)))
        arrays = []
        for key, where in links:
            below = self.below(name, key, depth)
            first = self.seen.get(where)
            if first:
                self.ties[below] = first
            elif first is None:
                arrays += self.group(where, below, depth + 1)
            else:
                self.fail(below, "is a second name of a group, which is not read.")
        if order := _places(found.attributes.get("weight_names")):
            skipped = len(name) + 1 if name else 0
            arrays.sort(key=lambda pair: order.get(pair[0][skipped:], len(order)))
        return arrays

    def below(self, name: str, key: str, depth: int) -> str:
        """Returns the name of an entry of a group."""
        joined = f"{name}/{key}" if name else key
        check_name(self.path, joined)
        self.letters -= len(joined)
        if "/" in key:
            self.fail(joined, "is damaged: no name in HDF5 has a '/'.")
        if depth >= DEEPEST:
            self.fail(joined, f"is nested deeper than {DEEPEST} levels.")
        if self.letters < 0:
            self.fail(joined, "and the names before it are longer than the file.")
        return joined

    def array(self, found: Dataset, name: str) -> Stored:
        """Returns an array, after checking that its values are in the file."""
        dtype = _dtype(found)
        if dtype is None:
            self.fail(name, "is of another dtype than numbers and booleans, which is not read.")
        if found.shape is None:
            self.fail(name, "has no value.")
        size = check_array(self.path, name, found.shape, dtype)
        if found.block is not None:
            return self.chunked(found, name, found.shape, dtype, size)
        if found.filters or (size and found.begin is None):
            self.fail(name, "has no values: they were never written.")
        begin = found.begin or 0
        if found.size != size or begin + size > self.hdf5.size:
            self.fail(name, f"has {found.size} bytes at {begin}; its shape {found.shape} needs {size}.")
        self.take(size, name)
        where = self.path, self.file, begin, dtype, found.shape
        read, part = partial(_read, *where), partial(_read_slice, *where)
        return Stored(found.shape, dtype.newbyteorder("="), read, read_slice=part)

    def take(self, size: int, name: str) -> None:
        """Counts the bytes of an array, so that no two are in one place."""
        self.left -= size
        if self.left < 0:
            self.fail(name, "and the arrays before it are larger than the file.")

    def chunked(
        self, found: Dataset, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int
    ) -> Stored:
        """Returns an array in chunks, after checking that they are all there, once."""
        block = found.block or ()
        nbytes = dtype.itemsize * math.prod(block)
        if found.filters not in _FILTERS:
            self.fail(name, f"has passed filters {found.filters}: only gzip and shuffle are read.")
        if len(block) != len(shape) or not 0 < nbytes <= max(_LARGE, 2 * size):
            self.fail(name, f"has chunks of shape {shortened(str(block), 80)}, which do not fit it.")
        expected = math.prod(-(-n // step) for n, step in zip(shape, block, strict=True))
        self.chunks -= expected
        if self.chunks < 0:
            self.fail(name, f"and the arrays before it are in too many chunks: it has {expected:,}.")
        chunks: dict[tuple[int, ...], Chunk] = {}
        try:
            for chunk in self.hdf5.chunks(found):
                inside = all(i < n for i, n in zip(chunk.at, shape, strict=True))
                if not inside:
                    continue  # what is left of a larger shape
                aligned = all(i % step == 0 for i, step in zip(chunk.at, block, strict=True))
                if not aligned or chunk.at in chunks or chunk.begin + chunk.size > self.hdf5.size:
                    self.fail(name, f"is damaged: its chunk at {chunk.at} is not in its place.")
                self.take(chunk.size, name)
                chunks[chunk.at] = chunk
        except HDF5Error as error:
            self.fail(name, f"{error}.")
        if len(chunks) != expected:
            self.fail(
                name, f"has {len(chunks):,} chunks of {expected:,}: the others were never written."
            )
        where = self.path, self.file, name, dtype, shape, block, found.filters, list(chunks.values())
        read, every = partial(_read_chunks, *where), tuple(slice(0, n) for n in shape)
        return Stored(shape, dtype.newbyteorder("="), partial(read, every), True, read)


def _places(names: Sequence[str] | None) -> dict[str, int]:
    """Returns the places of the names that Keras 2 lists in an attribute."""
    return {name: i for i, name in enumerate(names or ())}


def _dtype(found: Dataset) -> np.dtype[Any] | None:
    """Returns the dtype of an array, or None for others than numbers and booleans.

    Of bfloat16, which HDF5 does not have, Keras writes the bytes and an attribute.
    """
    number, size, flags, properties = found.kind
    order: Any = ">" if flags & 1 else "<"
    bits = int.from_bytes(properties[:2], "little"), int.from_bytes(properties[2:4], "little")
    if number == _INTEGER and size in (1, 2, 4, 8) and bits == (0, 8 * size):
        return np.dtype(f"{order}{'i' if flags & 8 else 'u'}{size}")
    if number == _FLOAT and len(properties) >= 12:
        layout = (*bits, *properties[4:8], int.from_bytes(properties[8:12], "little"))
        name = _FLOATS.get(layout)
        if name and bits[1] == 8 * size and flags >> 8 & 0xFF == bits[1] - 1 and not flags & 0x40:
            return to_dtype(name).newbyteorder(order)
    if number == _ENUM and size == 1 and flags & 0xFFFF == 2 and _BOOLEAN.search(properties):
        return np.dtype(bool)
    return (
        to_dtype("bfloat16")
        if number == _OPAQUE and size == 2 and "dtype" in found.attributes
        else None
    )


# Reading


def _read(
    path: str, file: BufferedReader, begin: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray:
    return _native(read_span(path, file, begin, dtype, shape))


def _read_slice(
    path: str,
    file: BufferedReader,
    begin: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    index: Slices,
) -> np.ndarray:
    return _native(read_part(path, file, begin, dtype, shape, index))


def _native(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_chunks(
    path: str,
    file: BufferedReader,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    block: tuple[int, ...],
    filters: Sequence[int],
    chunks: Sequence[Chunk],
    index: Slices,
) -> np.ndarray:
    """Reads a slice, without steps, of an array in chunks."""
    bounds = [dim.indices(n)[:2] for dim, n in zip(index, shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], dtype)
    for chunk in chunks:
        # For each axis: where the slice starts, where the chunk does, and what of it is wanted.
        axes = [
            (start, i, max(start, i), min(stop, i + n))
            for (start, stop), i, n in zip(bounds, chunk.at, block, strict=True)
        ]
        if any(first >= last for _, _, first, last in axes):
            continue
        values = _unfiltered(path, file, name, dtype, block, filters, chunk)
        part = values[tuple(slice(first - i, last - i) for _, i, first, last in axes)]
        out[tuple(slice(first - start, last - start) for start, _, first, last in axes)] = part
    return _native(out)


def _unfiltered(
    path: str,
    file: BufferedReader,
    name: str,
    dtype: np.dtype[Any],
    block: tuple[int, ...],
    filters: Sequence[int],
    chunk: Chunk,
) -> np.ndarray:
    """Returns the values of a chunk."""
    count = math.prod(block)
    size = count * dtype.itemsize
    used = [number for i, number in enumerate(filters) if not chunk.skipped >> i & 1]
    raw = read_span(path, file, chunk.begin, np.dtype(np.uint8), (chunk.size,))
    if _DEFLATE in used:
        try:
            raw = np.frombuffer(zlib.decompressobj().decompress(raw.data, size + 1), np.uint8)
        except zlib.error as error:
            fail(path, repr(shortened(name, 80)), f"cannot be read: {error}.")
    if len(raw) != size:
        where = repr(shortened(name, 80))
        fail(path, where, f"is damaged: its chunk at {chunk.at} has {len(raw)} bytes, not {size}.")
    if _SHUFFLE in used:
        raw = np.ascontiguousarray(raw.reshape(dtype.itemsize, count).T).reshape(-1)
    values = raw != 0 if dtype == np.bool_ else raw.view(dtype)
    return values.reshape(block)


FORMAT = Keras()
