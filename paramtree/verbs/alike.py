"""Leaves that are alike: of one shape and dtype."""

from typing import Any, NamedTuple

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.tree import ParamTree, flatten, is_flat

__all__ = ["Pair", "alike", "alike_pairs", "dtype_name"]


class Pair(NamedTuple):
    """Two leaves of one name."""

    name: str
    first: Any
    second: Any


def alike(leaf: Any, other: Any) -> bool:
    """Whether two leaves have one shape and dtype; other objects are always alike."""
    if leaf is other:
        return True
    if shape_of(leaf) != shape_of(other):
        return False
    dtype = getattr(leaf, "dtype", None)
    same = dtype is not None and dtype is getattr(other, "dtype", None)  # most often one object
    return same or dtype_name(leaf) == dtype_name(other)


def dtype_name(leaf: Any) -> str | None:
    """Returns the name of a leaf's dtype, or of the type of a number; None for other objects."""
    if shape_of(leaf) is None:
        return None
    dtype = dtype_of(leaf)
    return type(leaf).__name__ if dtype is None else str(dtype)


def alike_pairs(a: Any, b: Any) -> list[Pair] | None:
    """Returns the leaves of two parameter trees that are equal to jax; None for all others."""
    if not (type(a) is type(b) is ParamTree and is_flat(a) and is_flat(b)):
        return None
    (structure, first), (other, second) = flatten(a), flatten(b)
    if structure is not other or not all(map(alike, first, second)):
        return None
    names = list(map(join, structure.canonical))
    every = structure.full.names()
    if len(set(every)) < len(every) or any(leaf is None for leaf in (*first, *second)):
        return None
    return list(map(Pair, names, first, second))
