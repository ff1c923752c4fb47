"""A value for every leaf, by name: masks and labels, as optax takes them."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from paramtree.core.errors import RuleError, first_few
from paramtree.core.pytrees import Opened, open_tree
from paramtree.core.rules import (
    UNSET,
    Patterns,
    Rules,
    check_kind,
    check_table,
    pattern_text,
    resolve,
)
from paramtree.core.structure import picker
from paramtree.core.tree import ParamTree, unflatten

__all__ = ["check_values", "labels", "mask"]

T = TypeVar("T")


def mask(
    tree: T, rules: Patterns | Rules = None, *, kind: str | None = None, default: Any = UNSET
) -> T:
    """Returns the tree with True for the leaves that match, and False for the others.

    The mask of a parameter tree is made once for a structure and its rules: later calls return the same
    object.

    Args:
      tree: a parameter tree or any other pytree.
      rules: a pattern, or several, whose matches are True and all else False; or a rule table of
        True and False.
      kind: "param" or "state": leaves of another kind are False.
      default: the value of leaves that no pattern of a table matches.

    Returns:
      A tree of the same structure, or the same container, with False for leaves that are not arrays.

    Raises:
      RuleError: the rules do not fit the tree, or a value is neither True nor False.
      ValueError: ``kind`` is not a kind.

    Example:
      >>> import jax.numpy as jnp, paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": jnp.ones(2), "bias": jnp.ones(2)}})
      >>> pt.mask(params, ".*weight").to_dict()
      {'dense0': {'weight': True, 'bias': False}}
    """
    check_kind(kind)
    if isinstance(rules, Mapping):
        check_values("mask", rules, default, lambda value: isinstance(value, bool), "True or False")

    def values(source: Opened) -> tuple[Any, ...]:
        kinds = source.structure.kinds
        if rules is None:
            return tuple(kind in (None, own) for own in kinds)
        table: Any = rules
        if not isinstance(rules, Mapping):
            table = dict.fromkeys(rules if isinstance(rules, list | tuple) else (rules,), True)
        values = _values(source, "mask", table, default if table is rules else False)
        if kind is None:
            return values
        return tuple(value and own == kind for value, own in zip(values, kinds, strict=True))

    return _cached(tree, ("mask", _key(rules), repr(default), kind), values, False)


def labels(tree: T, rules: Rules, *, default: Any = UNSET) -> T:
    """Returns the tree with a label for every leaf, as ``optax.multi_transform`` takes it.

    The labels of a parameter tree are made once for a structure and its rules.

    Args:
      tree: a parameter tree or any other pytree.
      rules: a rule table of labels, strings or anything hashable.
      default: the label of leaves that no pattern matches, and of leaves that are not arrays.

    Raises:
      RuleError: the rules do not fit the tree, or a label is not hashable.

    Example:
      >>> import jax.numpy as jnp, paramtree as pt
      >>> params = pt.from_tree({"body": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}})
      >>> pt.labels(params, {"head_.*": "fast", ".*": "slow"}).to_dict()
      {'body': {'w': 'slow'}, 'head': {'w': 'fast'}}
    """
    check_values("labels", rules, default, _hashable, "a hashable label, such as a string")
    key = ("labels", _key(rules), default, repr(default))
    unnamed = None if default is UNSET else default
    return _cached(tree, key, lambda source: _values(source, "labels", rules, default), unnamed)


def _values(source: Opened, verb: str, rules: Rules, default: Any) -> tuple[Any, ...]:
    assigned = resolve(source, rules, f"the rules of {verb}", default=default)
    values = (*rules.values(), default)  # a leaf without a rule has the last, at -1
    return picker(assigned.rules)(values)


def _key(rules: Any) -> Any:
    """Returns a cache key for rules, which tells True from 1; None if there are predicates."""
    if isinstance(rules, Mapping):
        patterns, values = tuple(rules), tuple(rules.values())
        return (
            None
            if any(map(callable, patterns))
            else (patterns, values, *map(type, values), repr(values))
        )
    listed = tuple(rules) if isinstance(rules, list | tuple) else (rules,)
    return None if any(map(callable, listed)) or not all(map(_hashable, listed)) else (listed,)


def _cached(tree: Any, key: tuple[Any, ...], values: Any, unnamed: Any) -> Any:
    """Returns a tree of values; that of a parameter tree is cached if the rules have a key."""
    source = open_tree(tree)
    if type(tree) is not ParamTree or source.containers or key[1] is None:
        return source.restore(values(source), unnamed)
    return source.structure.cached(key, lambda: unflatten(source.structure, values(source)))


def check_values(
    verb: str, rules: Any, default: Any, good: Callable[[Any], bool], expected: str
) -> None:
    """Raises RuleError if a verb does not take some values of a table; it lists them all."""
    check_table(rules, f"the rules of {verb}")
    pairs = rules.items()
    wrong = [f"{pattern_text(pattern)} gives {value!r}" for pattern, value in pairs if not good(value)]
    if default is not UNSET and not good(default):
        wrong.append(f"the default is {default!r}")
    if wrong:
        raise RuleError(f"{verb}: {first_few(wrong)}. Expected {expected}.")


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return isinstance(value, Hashable)
