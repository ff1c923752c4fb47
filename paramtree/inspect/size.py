"""How large a tree is; what is tied counts once."""

import math
from typing import Any

from paramtree.leaf import dtype_of, shape_of
from paramtree.names import Pattern
from paramtree.selection import collect

__all__ = ["count", "nbytes"]


def count(tree: Any, pattern: Pattern | None = None, *, kind: str | None = None) -> int:
    """Returns the number of scalars in a tree, or in the leaves that match; tied leaves count once.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      pattern: a regular expression for whole names.
      kind: "param" or "state" to count only these.

    Example:
      >>> import paramtree as pt, numpy as np
      >>> pt.count(pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.ones(2)}}))
      8
    """
    return sum(math.prod(shape_of(leaf) or ()) for leaf in _arrays(tree, pattern, kind))


def nbytes(tree: Any, pattern: Pattern | None = None, *, kind: str | None = None) -> int:
    """Returns the number of bytes of a tree's arrays, or of those that match; tied ones count once.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      pattern: a regular expression for whole names.
      kind: "param" or "state" to count only these.

    Example:
      >>> import paramtree as pt, numpy as np
      >>> pt.nbytes(pt.from_tree({"bias": np.ones(2, np.float32)}))
      8
    """
    return sum(
        math.prod(shape_of(leaf) or ()) * dtype_of(leaf).itemsize
        for leaf in _arrays(tree, pattern, kind)
    )


def _arrays(tree: Any, pattern: Pattern | None, kind: str | None) -> list[Any]:
    leaves = collect(tree, pattern, sep="/", kind=kind).values()
    return [leaf for leaf in leaves if dtype_of(leaf) is not None]
