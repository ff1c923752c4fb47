"""The size of a tree, with tied leaves counted once."""

import math
from typing import Any

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.pytrees import is_array, open_tree
from paramtree.core.rules import Patterns, select_slots

__all__ = ["count", "nbytes"]


def count(tree: Any, pattern: Patterns = None, *, kind: str | None = None) -> int:
    """Returns the number of scalars in a tree or its matching leaves; tied leaves count once.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      pattern: a regular expression that matches full names; None selects all leaves.
      kind: "param" or "state" to count only these.

    Raises:
      RuleError: the pattern matches nothing.

    Example:
      >>> import paramtree as pt, numpy as np
      >>> pt.count(pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.ones(2)}}))
      8
    """
    return sum(math.prod(shape_of(leaf) or ()) for leaf in _arrays("count", tree, pattern, kind))


def nbytes(tree: Any, pattern: Patterns = None, *, kind: str | None = None) -> int:
    """Returns the number of bytes in a tree or its matching leaves; tied leaves count once.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      pattern: a regular expression that matches full names; None selects all leaves.
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


def _arrays(verb: str, tree: Any, pattern: Patterns, kind: str | None) -> list[Any]:
    source = open_tree(tree)
    chosen, _ = select_slots(source, pattern, kind, verb)
    return [leaf for leaf in chosen.take(source.leaves) if is_array(leaf)]
