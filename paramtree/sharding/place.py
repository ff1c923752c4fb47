"""Arrays onto devices: the sharding of each leaf, and how a host array gets there."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from paramtree.core.arrays import shape_of
from paramtree.core.errors import MismatchError
from paramtree.core.pytrees import is_array_or_number, open_tree

__all__ = ["scatter", "spread"]


@dataclass(frozen=True)
class _Mark:
    """Stands for an array in a tree, and carries its sharding to where the names are."""

    shape: tuple[int, ...]
    sharding: Any


def spread(shardings: Any, like: Any, role: str, real: bool = True) -> list[Any]:
    """Returns the sharding, or None, of every named leaf of a tree, including numbers, in order.

    Args:
      shardings: a tree of the same structure, or a single ``jax.sharding.Sharding`` for all leaves.
      like: a tree of arrays or shapes.
      role: what messages call the shardings.
      real: whether their devices must exist.

    Raises:
      MismatchError: the structures differ, a leaf is not a sharding, or a mesh has no devices.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(like)
    by_leaf = [shardings] * len(leaves)
    if not isinstance(shardings, jax.sharding.Sharding):
        try:
            by_leaf = treedef.flatten_up_to(shardings)
        except ValueError as error:
            why = str(error).rstrip(".")
            raise MismatchError(
                f"{role} are not of the tree: {why}. Make them with pt.shardings of the tree, or of "
                "its shapes, or give one sharding for all."
            ) from None
    wrong = [s for s in by_leaf if s is not None and not isinstance(s, jax.sharding.Sharding)]
    if wrong:
        raise MismatchError(
            f"{role} have a {type(wrong[0]).__name__}, {wrong[0]!r}, where a jax.sharding.Sharding is "
            "expected. pt.shardings makes them from rules."
        )
    if real and any(isinstance(getattr(s, "mesh", None), AbstractMesh) for s in by_leaf):
        raise MismatchError(
            f"{role} are of an AbstractMesh, which has no devices: make them with pt.shardings of a "
            "jax.sharding.Mesh."
        )
    marks = [
        leaf if (shape := shape_of(leaf)) is None else _Mark(shape, sharding)
        for leaf, sharding in zip(leaves, by_leaf, strict=True)
    ]
    placed = open_tree(jax.tree.unflatten(treedef, marks), is_array_or_number)
    return [getattr(mark, "sharding", None) for mark in placed.leaves]


def scatter(value: Any, sharding: Any) -> jax.Array:
    """Returns an array of the host on the devices of a sharding; each device receives its own shard."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
