"""How large a tree is; what is tied counts once."""

import math
from typing import Any

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.names import Pattern, named
from paramtree.verbs.parts import choose

__all__ = ["count", "nbytes"]


def count(tree: Any, pattern: Pattern | None = None, *, kind: str | None = None) -> int:
    """Returns the number of scalars in a tree, or in the leaves that match; tied leaves count once.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      pattern: a regular expression for whole names.
      kind: "param" or "state" to count only these.

    Raises:
      RuleError: the pattern matches nothing.

    Example:
      >>> import paramtree as pt, numpy as np
      >>> pt.count(pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.ones(2)}}))
      8
    """
    return sum(math.prod(shape_of(leaf) or ()) for leaf in _arrays("count", tree, pattern, kind))


def nbytes(tree: Any, pattern: Pattern | None = None, *, kind: str | None = None) -> int:
    """Returns the number of bytes of a tree's arrays, or of those that match; tied ones count once.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      pattern: a regular expression for whole names.
      kind: "param" or "state" to count only these.

    Raises:
      RuleError: the pattern matches nothing.

    Example:
      >>> import paramtree as pt, numpy as np
      >>> pt.nbytes(pt.from_tree({"bias": np.ones(2, np.float32)}))
      8
    """
    return sum(
        math.prod(shape_of(leaf) or ()) * dtype_of(leaf).itemsize
        for leaf in _arrays("nbytes", tree, pattern, kind)
    )


def _arrays(verb: str, tree: Any, pattern: Pattern | None, kind: str | None) -> list[Any]:
    source = named(tree).tree
    chosen = choose(source._structure, pattern, kind, verb)[0].slots
    return [source._leaves[slot] for slot in chosen if dtype_of(source._leaves[slot]) is not None]
