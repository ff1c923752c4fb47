"""Floating-point leaves in other dtypes, by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import resolve
from paramtree.verbs.labels import check_values

__all__ = ["cast", "casts"]

T = TypeVar("T")


def cast(tree: T, rules: Any) -> T:
    """Returns the tree with its floating-point leaves in other dtypes, by name.

    Integers, booleans and PRNG keys stay, and so do leaves that no pattern matches.

    Args:
      tree: a parameter tree of arrays or shapes, or any other pytree.
      rules: one floating dtype for all, or a rule table of them, in which None leaves a leaf unchanged.

    Raises:
      RuleError: the rules do not fit the tree, or a value is neither a floating dtype nor None.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"norm": {"gamma": jnp.ones(2)}, "w": jnp.ones(2)})
      >>> pt.cast(params, {"norm.*": None, ".*": jnp.bfloat16})
      Parameter norm_gamma (shape=(2,), dtype=float32)
      Parameter w (shape=(2,), dtype=bfloat16)
    """
    source = open_tree(tree)
    table = rules if isinstance(rules, Mapping) else {".*": rules}
    check_values(
        "cast", table, None, _floating_or_none, "a floating dtype such as jnp.bfloat16, or None"
    )
    if table is not rules:
        return source.restore([_in_dtype(leaf, rules) for leaf in source.leaves])
    assigned = resolve(source, rules, "the dtype rules", default=None)
    dtypes = (*rules.values(), None)  # a leaf without a rule has the last, at -1
    leaves = zip(source.leaves, assigned.rules, strict=True)
    return source.restore([_in_dtype(leaf, dtypes[i]) for leaf, i in leaves])


def _in_dtype(leaf: Any, dtype: Any) -> Any:
    have = dtype_of(leaf)
    if dtype is None or have is None or not jnp.issubdtype(have, jnp.floating) or have == dtype:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    return leaf.astype(dtype)


def _floating_or_none(value: Any) -> bool:
    try:
        return value is None or bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False


def casts(source: Any, target: Any) -> bool:
    """Whether values of one dtype are accepted where another is expected.

    Integers may become floats, and floats complex numbers, not the reverse.

    Example:
      >>> casts("float64", "bfloat16"), casts("int32", "float32"), casts("float32", "int32")
      (True, True, False)
    """
    if any(jnp.issubdtype(dtype, jax.dtypes.extended) for dtype in (source, target)):
        return False  # PRNG keys are not numbers
    source, target = jnp.dtype(source), jnp.dtype(target)
    if jnp.issubdtype(source, jnp.complexfloating):
        return bool(jnp.issubdtype(target, jnp.complexfloating))
    if jnp.issubdtype(source, jnp.inexact):
        return bool(jnp.issubdtype(target, jnp.inexact))
    exact = jnp.issubdtype(source, jnp.integer) or source == jnp.bool_
    return bool(exact and (jnp.issubdtype(target, jnp.number) or target == jnp.bool_))
