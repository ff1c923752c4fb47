"""Arrays onto devices: which sharding each leaf has, and how an array of the host gets there."""

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
    """Stands for an array in a tree, to carry its sharding to where the names are."""

    shape: tuple[int, ...]
    sharding: Any


def spread(shardings: Any, like: Any, what: str, real: bool = True) -> list[Any]:
    """Returns the sharding of every leaf of a tree with a name, numbers too, in order; None for some.

    Args:
      shardings: a tree of the same structure, or a single ``jax.sharding.Sharding`` for all leaves.
      like: a tree of arrays or shapes.
      what: what a message calls the shardings.
      real: whether they must be of devices that exist.

    Raises:
      MismatchError: the structures differ, a leaf is not a sharding, or a mesh has no devices.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(like)
    each = [shardings] * len(leaves)
    if not isinstance(shardings, jax.sharding.Sharding):
        try:
            each = treedef.flatten_up_to(shardings)
        except ValueError as error:
            why = str(error).rstrip(".")
            raise MismatchError(
                f"{what} are not of the tree: {why}. Make them with pt.shardings of the tree, or of "
                "its shapes, or give one sharding for all."
            ) from None
    wrong = [one for one in each if one is not None and not isinstance(one, jax.sharding.Sharding)]
    if wrong:
        raise MismatchError(
            f"{what} have a {type(wrong[0]).__name__}, {wrong[0]!r}, where a jax.sharding.Sharding is "
            "expected. pt.shardings makes them from rules."
        )
    if real and any(isinstance(getattr(one, "mesh", None), AbstractMesh) for one in each):
        raise MismatchError(
            f"{what} are of an AbstractMesh, which has no devices: make them with pt.shardings of a "
            "jax.sharding.Mesh."
        )
    marks = [
        leaf if (shape := shape_of(leaf)) is None else _Mark(shape, one)
        for leaf, one in zip(leaves, each, strict=True)
    ]
    placed = open_tree(jax.tree.unflatten(treedef, marks), is_array_or_number)
    return [getattr(mark, "sharding", None) for mark in placed.leaves]


def scatter(value: Any, sharding: Any) -> jax.Array:
    """Returns an array of the host on the devices of a sharding; each device receives its own shard."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
