"""Arranges an array of any rank as one matrix of cells, small enough to draw."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Tiles", "arranged", "extremes", "tiled"]

MOST = 256  # cells along an axis: about the number of pixels in a panel


class Tiles(NamedTuple):
    """A matrix of cells."""

    cells: Any  # (rows, columns)
    there: Any = None  # a mask of the cells that hold a value, of the same shape; None if all do
    tile: tuple[int, int] | None = None  # the (height, width) of the tiles; None for a single matrix


def arranged(shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns the number of rows and columns of cells for an array of this shape, and of folds.

    Example:
      >>> arranged(()), arranged((3,)), arranged((16, 1, 5, 5)), arranged((32, 16, 3, 3))
      ((1, 1, 1), (1, 3, 1), (20, 20, 4), (96, 48, 1))
    """
    down, *right, height, width = (*[1] * (3 - len(shape)), *shape)
    across = math.prod(right)
    if not math.prod(shape):
        return 0, 0, 1
    tall = down * height / (across * width)
    folds = 1
    if len(shape) > 2 and across == 1:
        folds = math.ceil(math.sqrt(tall))  # makes the map about square
    elif tall > 4 and len(shape) > 2:  # not output by input channels, whose order matters
        folds = round(math.sqrt(tall))
    rows = math.ceil(down / folds)
    folds = math.ceil(down / rows)
    return rows * height, folds * across * width, folds


def tiled(array: Any) -> Tiles:
    """Returns an array as a matrix: a vector is a row, and the last two of more axes form a tile.

    Tiles go down along the first axis, and right along the others. A column of tiles much taller than
    wide is folded: it continues at the top, to the right.

    Example:
      >>> tiled(np.array([[[1, 2]], [[3, 4]], [[5, 6]], [[7, 8]]])).cells
      array([[1, 2, 5, 6],
             [3, 4, 7, 8]])
    """
    if array.ndim <= 2:
        return Tiles(np.atleast_2d(array))
    down, *right, height, width = array.shape
    rows, _, folds = arranged(array.shape)
    padded = np.zeros((folds * rows // height, math.prod(right), height, width), array.dtype)
    padded[:down] = array.reshape(down, *padded.shape[1:])
    there = None
    if len(padded) > down:
        there = np.broadcast_to((np.arange(len(padded)) < down)[:, None, None, None], padded.shape)
        there = _joined(there, folds)
    return Tiles(_joined(padded, folds), there, (height, width))


def _joined(tiles: Any, folds: int) -> Any:
    """Returns tiles of shape (down, across, height, width) as one matrix, with ``down`` folded."""
    down, across, height, width = tiles.shape
    split = tiles.reshape(folds, down // folds, across, height, width)
    return split.transpose(1, 3, 0, 2, 4).reshape(down // folds * height, folds * across * width)


def extremes(cells: Any, most: int = MOST) -> tuple[Any, tuple[int, int]]:
    """Returns a matrix of at most ``most`` rows and columns, and the size of the block behind a cell.

    A cell is the value of its block farthest from zero. Means would make all large weights look alike,
    and hide outliers.

    Example:
      >>> extremes(np.array([[1, -2, 0, 3]]), most=2)
      (array([[-2,  3]]), (1, 2))
    """
    block = tuple(math.ceil(size / most) for size in cells.shape)
    for axis, step in enumerate(block):
        if step > 1:
            starts = np.arange(0, cells.shape[axis], step)
            high = np.maximum.reduceat(cells, starts, axis)
            low = np.minimum.reduceat(cells, starts, axis)
            cells = high if cells.dtype == bool else np.where(-low > high, low, high)
    return cells, (block[0], block[1])
