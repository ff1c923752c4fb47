"""The bytes of PyTorch's tensors: views of storages, which are checked here and read later.

Large arrays in a zip file are not read but mapped, copy on write: they take memory when they are used.
"""

import math
import mmap
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from typing import Any, NamedTuple

import numpy as np

from paramtree.core.errors import LoadError
from paramtree.io.formats.tensors import Storage, Tensor
from paramtree.io.source import Stored, check_array, fail, read_into, read_part, read_span

__all__ = ["Place", "Storages", "sizes_of"]

_CHUNK = 2**16  # zipfile copies from a buffer of its own
_MAPPED, _ALIGNED = 2**16, 64  # bytes: the least that is mapped, and where jax takes memory over
_MOST = 2**62  # elements
_AXES = 32
_WASTE = 256  # times the size of the file


@dataclass
class Place:
    """Where the bytes of a storage are; ``left`` of them belong to no tensor yet.

    ``begin`` is the place in the file, or None if the member of the zip file is compressed.
    """

    size: int
    left: int
    begin: int | None = None
    member: zipfile.ZipInfo | None = None


class Storages:
    """The storages of a file, and the tensors that view them.

    Args:
      path: the file.
      file: the file, opened.
      find: returns the place of a storage.
      archive: the zip file with compressed members, if it is one.
      swapped: whether numbers are big-endian.
      size: the size of the file in bytes.
    """

    def __init__(
        self,
        path: str,
        file: BufferedReader,
        find: Callable[[Storage], Place],
        size: int,
        archive: zipfile.ZipFile | None = None,
        swapped: bool = False,
    ) -> None:
        self.path, self.file, self.find = path, file, find
        self.archive, self.swapped = archive, swapped
        self._places: dict[str, Place] = {}
        self._names: dict[Any, str] = {}  # of views
        self._waste = _WASTE * (size + 2**20)  # bytes that may be read, but are in no tensor

    def stored(self, name: str, tensor: Tensor) -> Stored | str:
        """Returns a tensor, to be read later, or the name under which it was already asked for.

        Raises:
          LoadError: it is no view of its storage.
        """
        path, where, kind = self.path, repr(name), tensor.kind
        shape, strides = sizes_of(tensor.shape), sizes_of(tensor.strides)
        if shape is None or strides is None or sizes_of((tensor.offset,)) is None:
            fail(path, where, "has a shape, strides or an offset that no array has.")
        nbytes = check_array(path, name, shape, kind.dtype)
        if tensor.problem or tensor.storage is None:
            advice = f"or leave it out with rename=[({re.escape(name)!r}, None)]"
            text = f"{tensor.problem}; {advice}."
            return Stored(shape, kind.dtype, partial(fail, path, where, text))
        view = f"shape {shape}, strides {strides} and offset {tensor.offset}"
        if len(strides) != len(shape) or min((*strides, tensor.offset)) < 0:
            fail(path, where, f"has {view}, which no tensor has: the file is damaged.")
        storage, place = tensor.storage, self._place(tensor.storage)
        first = storage.shift + tensor.offset * kind.size
        span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if span and first + span * kind.size > place.size:
            text = f"and so reaches beyond its storage of {place.size} bytes: the file is damaged"
            fail(path, where, f"has {view}, {text}.")
        strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
        flags = tensor.conjugate, tensor.negative
        known = self._names.setdefault((storage.key, kind.name, shape, strides, first, flags), name)
        if known != name:
            return known
        return self._later(where, place, _View(kind.dtype, shape, strides, first, span, *flags), nbytes)

    def _later(self, where: str, place: Place, view: "_View", nbytes: int) -> Stored:
        path, dtype, shape = self.path, view.dtype, view.shape
        self._waste -= max(0, view.span * dtype.itemsize - nbytes)
        self._waste -= view.first if place.begin is None else 0
        if self._waste < 0:
            fail(path, where, "is one of too many small parts of large storages: save its .clone().")
        expands = place.begin is None or nbytes > place.left
        place.left -= 0 if expands else nbytes
        if place.begin is not None and view.is_plain() and not self.swapped:
            begin = place.begin + view.first
            read_slice = partial(read_part, path, self.file, begin, dtype, shape)
            read = partial(read_span, path, self.file, begin, dtype, shape)
            maps = self.archive is not None and nbytes >= _MAPPED and begin % _ALIGNED == 0
            if maps and dtype != np.bool_:  # a boolean may be any byte in a file
                read = partial(self._map, begin, dtype, shape)
            return Stored(shape, dtype, read, expands, read_slice)
        return Stored(shape, dtype, partial(self._read, where, place, view), expands)

    def _map(self, begin: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        """Returns an array whose memory is that of the file, until it is written to."""
        size, left = dtype.itemsize * math.prod(shape), os.fstat(self.file.fileno()).st_size - begin
        if left < size:
            fail(self.path, "", f"{size - left} bytes of an array are missing: the file was truncated.")
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        length = begin - page + size
        mapped = mmap.mmap(self.file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
        return np.frombuffer(mapped, dtype, math.prod(shape), begin - page).reshape(shape)

    def _place(self, storage: Storage) -> Place:
        place = self._places.get(storage.key)
        if place is None:
            place = self._places[storage.key] = self.find(storage)
        if storage.shift + storage.numel * storage.kind.size > place.size:
            fail(
                self.path,
                f"the storage {storage.key!r}",
                f"has {place.size} bytes, too few for {storage.numel} of {storage.kind.name}.",
            )
        return place

    def _read(self, where: str, place: Place, view: "_View") -> np.ndarray:
        if place.begin is not None:
            begin = place.begin + view.first
            flat = read_span(self.path, self.file, begin, view.dtype, (view.span,))
        else:
            flat = self._unpacked(where, place.member, view)
        if self.swapped:
            size = view.dtype.itemsize // (2 if view.dtype.kind == "c" else 1)
            flat.view(f"u{size}").byteswap(inplace=True)
        return view.of(flat)

    def _unpacked(self, where: str, member: Any, view: "_View") -> np.ndarray:
        """Reads the span of a view from a compressed member."""
        opened: Any
        try:
            assert self.archive is not None
            with self.archive.open(member) as opened:
                for begin in range(0, view.first, _CHUNK):
                    opened.read(min(_CHUNK, view.first - begin))
                return read_into(
                    self.path, lambda to: opened.readinto(to[:_CHUNK]), view.dtype, (view.span,)
                )
        except LoadError:
            raise
        except Exception as error:  # from zipfile or zlib
            fail(self.path, where, f"cannot be read: {error or type(error).__name__}.")


def sizes_of(numbers: Any) -> tuple[int, ...] | None:
    """Returns sizes or strides, if they are as many and as large as they can be."""
    if not isinstance(numbers, tuple | list) or len(numbers) > _AXES:
        return None
    known = all(type(n) is int and -_MOST < n < _MOST for n in numbers)
    return tuple(numbers) if known else None


class _View(NamedTuple):
    """Which elements of a span of a storage are in a tensor, from the byte ``first`` on."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements; 0 for an axis of one
    first: int
    span: int
    conjugate: bool
    negative: bool

    def is_plain(self) -> bool:
        """Returns whether its elements are stored one after another, and as they are."""
        return not (self.conjugate or self.negative) and self.is_contiguous()

    def is_contiguous(self) -> bool:
        """Returns whether its elements are stored one after another."""
        inner = (math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return not self.span or all(
            n == 1 or s == size for n, s, size in zip(self.shape, self.strides, inner, strict=True)
        )

    def of(self, flat: np.ndarray) -> np.ndarray:
        """Returns the array, from the elements of the span."""
        if self.is_contiguous():
            array = flat.reshape(self.shape)
        else:
            steps = [stride * self.dtype.itemsize for stride in self.strides]
            array = np.ndarray(self.shape, self.dtype, flat.view(np.uint8).data, 0, steps).copy(
                order="C"
            )
        array = array.conj() if self.conjugate else array
        return np.negative(array) if self.negative else array
