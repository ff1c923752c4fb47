"""Arrays whose bytes are in several pieces of a file."""

import math
from collections.abc import Callable, Sequence
from io import BufferedReader
from typing import Any, NamedTuple

import numpy as np

from paramtree.io.source import Slices, read_into

__all__ = ["Span", "read_pieces", "read_pieces_part"]

_BLOCK = 2**22  # bytes of whole rows read at once when only some columns are wanted


class Span(NamedTuple):
    """A place in a file."""

    begin: int
    size: int


def read_pieces(
    path: str,
    file: BufferedReader,
    spans: Sequence[Span],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Reads an array whose bytes are in several places, in order."""
    return read_into(path, _through(file, spans, 0), dtype, shape)


def read_pieces_part(
    path: str,
    file: BufferedReader,
    spans: Sequence[Span],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    index: Slices,
) -> np.ndarray:
    """Reads a slice, without steps: its rows, and of these what is wanted."""
    if not shape:
        return read_pieces(path, file, spans, dtype, shape)
    start, stop, _ = index[0].indices(shape[0])
    row = dtype.itemsize * math.prod(shape[1:])
    full = all(dim.indices(n)[:2] == (0, n) for dim, n in zip(index[1:], shape[1:], strict=True))
    count = max(1, stop - start if full else _BLOCK // max(row, 1))
    blocks = []
    for first in range(start, max(stop, start + 1), count):
        rows = min(count, stop - first), *shape[1:]
        block = read_into(path, _through(file, spans, first * row), dtype, rows)
        blocks.append(block if full else block[(slice(None), *index[1:])])
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _through(file: BufferedReader, spans: Sequence[Span], start: int) -> Callable[[memoryview], int]:
    """Returns a function that reads the bytes of spans in turn, from a number of them on."""
    rest = []
    for begin, size in spans:
        skipped = min(start, size)
        start -= skipped
        rest.append(Span(begin + skipped, size - skipped))
    rest.reverse()

    def readinto(view: memoryview) -> int:
        while rest and not rest[-1].size:
            rest.pop()
        if not rest:
            return 0
        begin, size = rest.pop()
        file.seek(begin)
        count = file.readinto(view[:size])
        rest.append(Span(begin + count, size - count))
        return count

    return readinto
