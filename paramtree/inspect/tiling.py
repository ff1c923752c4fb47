"""Arrays of any number of axes as one matrix of cells, small enough to be looked at."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Tiles", "arranged", "extremes", "tiled"]

MOST = 256  # cells along an axis of a picture: about as many as a panel has pixels


class Tiles(NamedTuple):
    """A matrix of cells.

    Attributes:
      cells: (rows, columns).
      there: which cells are there, of the same shape; None if all are.
      tile: the size of the matrices that the cells are put together from; None if it is one.
    """

    cells: Any
    there: Any = None
    tile: tuple[int, int] | None = None


def arranged(shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns how many rows and columns of cells an array of this shape has, and folds.

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
        folds = math.ceil(math.sqrt(tall))  # the picture is about as wide as high
    elif tall > 4 and len(shape) > 2:  # else output by input channels, which both have a direction
        folds = round(math.sqrt(tall))
    rows = math.ceil(down / folds)
    folds = math.ceil(down / rows)
    return rows * height, folds * across * width, folds


def tiled(array: Any) -> Tiles:
    """Returns an array as a matrix: a vector is a row, and other axes than the last two are tiled.

    Matrices go downwards along the first axis, and to the right along those after it. A column of them
    that is much taller than wide is folded: it goes on at the top, to the right.

    Example:
      >>> tiled(np.array([[[1, 2]], [[3, 4]], [[5, 6]], [[7, 8]]])).cells
      array([[1, 2, 5, 6],
             [3, 4, 7, 8]])
    """
    if array.ndim <= 2:
        return Tiles(np.atleast_2d(array))
    down, *right, height, width = array.shape
    rows, _, folds = arranged(array.shape)
    whole = np.zeros((folds * rows // height, math.prod(right), height, width), array.dtype)
    whole[:down] = array.reshape(down, *whole.shape[1:])
    there = None
    if len(whole) > down:
        there = np.broadcast_to((np.arange(len(whole)) < down)[:, None, None, None], whole.shape)
        there = _laid(there, folds)
    return Tiles(_laid(whole, folds), there, (height, width))


def _laid(matrices: Any, folds: int) -> Any:
    """Returns (down, across, height, width) as one matrix in which ``down`` is folded."""
    down, across, height, width = matrices.shape
    split = matrices.reshape(folds, down // folds, across, height, width)
    return split.transpose(1, 3, 0, 2, 4).reshape(down // folds * height, folds * across * width)


def extremes(cells: Any, most: int = MOST) -> tuple[Any, tuple[int, int]]:
    """Returns a matrix of at most so many rows and columns, and of how many values each cell is.

    A cell is the value of its block that is farthest from zero. A mean would be the same grey for
    every large weight, and hide the few values that stand out.

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
