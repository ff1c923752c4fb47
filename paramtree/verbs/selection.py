"""Verbs that read and set leaves by name."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import compress
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import casts, dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, RuleError
from paramtree.core.names import Pattern, check_unique, compiled, find, match, named, names, resolve
from paramtree.core.structure import Path, build, build_flat, picker
from paramtree.core.tree import ParamTree, _rebuild

__all__ = ["collect", "map_named", "replace"]

T = TypeVar("T")


def collect(
    tree: Any,
    pattern: Pattern | None = None,
    *,
    sep: str = "_",
    kind: str | None = None,
    aliases: bool = False,
) -> ParamTree:
    """Returns a flat tree of the leaves whose names match, in order, under their full names.

    Each stored leaf appears once, under the first of its names that matches; ``aliases=True`` gives all
    names, as a tree in which they are not tied would need them.

    Args:
      tree: a parameter tree, or any other pytree, whose arrays are named by their key paths.
      pattern: a regular expression for whole names, joined with ``_``; None takes all.
      sep: what joins the names in the result.
      kind: "param" or "state" to take only these.
      aliases: give every name of a tied leaf, tied in the result too.

    Returns:
      A flat ``ParamTree``, empty if nothing matches. Names start at ``tree``, also where that is a
      sub-tree; only printing shows its place as well.

    Raises:
      NameCollisionError: two of the paths join to one name.
      RuleError: the pattern is not a regular expression.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.zeros(2)}})
      >>> pt.collect(params, ".*weight")
      Parameter dense0_weight (shape=(2, 3), dtype=float64)
      >>> list(pt.collect(params, sep="."))
      ['dense0.weight', 'dense0.bias']
    """
    source = named(tree).tree
    structure = source._structure
    if pattern is not None and type(pattern).__hash__ is None:  # a list, which no cache can look up
        compiled(pattern)
    key = ("collect", pattern, sep, kind, aliases)
    if key not in structure.cache:
        entries = zip(structure.entries(), names(structure, sep), strict=True)
        taken: dict[Hashable, tuple[str, Path]] = {}
        slots: list[int] = []
        for (path, slot), name in compress(entries, match(structure, pattern, kind)):
            if aliases or slot not in taken:
                taken[path if aliases else slot] = name, path
                slots.append(slot)
        check_unique(taken.values())
        found = [name for name, _ in taken.values()]
        if aliases:
            flat, order = build(
                [((name,), slot) for name, slot in zip(found, slots, strict=True)], structure.kinds
            )
        else:
            flat, order = build_flat(found, slots, structure.kinds), tuple(slots)
        structure.cache[key] = flat, picker(order)
    flat, take = structure.cache[key]
    return _rebuild(flat, take(source._leaves), source._place)


def replace(tree: T, values: Mapping[str, Any] | ParamTree) -> T:
    """Returns the tree with new values for some names; all the rest stays, ties too.

    Numbers, lists and numpy arrays become arrays of the leaf's dtype; jax arrays are taken as
    they are, whatever their dtype.

    Args:
      tree: a parameter tree or any other pytree.
      values: exact names, or paths such as "dense0/weight", to arrays of the same shapes; a path of a
        level may have a tree of new values, such as one that was loaded.

    Raises:
      RuleError: a name is not in the tree (all are listed, with the closest ones), or two names of
        one tied leaf get different arrays.
      MismatchError: an array has another shape than the leaf, or is no array; all are listed.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"bias": jnp.zeros(2)}})
      >>> pt.replace(params, {"dense0_bias": params.dense0.bias + 1}).dense0.bias
      Array([1., 1.], dtype=float32)
      >>> pt.replace(params, {"dense0": pt.from_tree({"bias": jnp.ones(2)})}).dense0.bias
      Array([1., 1.], dtype=float32)
    """
    if not isinstance(values, Mapping | ParamTree):
        raise RuleError(f"replace takes a mapping of names to arrays, but found {values!r}.")
    source, restore, _ = named(tree)
    leaves = list(source._leaves)
    given: dict[int, tuple[str, Any]] = {}
    problems = []
    flat = dict(_flat(values))
    for name, slot in find(source._structure, flat, "replace").items():
        value, old = flat[name], leaves[slot]
        if slot in given and not _equal(given[slot][1], value):
            raise RuleError(
                f"replace: `{given[slot][0]}` and `{name}` are tied, one leaf, and get different "
                "arrays: give one of them, or pt.untie them first."
            )
        given[slot] = name, value
        try:
            leaves[slot] = _fitted(value, old)
        except MismatchError as error:
            problems.append(f"`{name}` {error}")
    if problems:
        raise MismatchError(f"replace: {'; '.join(problems)}.")
    return restore(tuple(leaves))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the names and paths of new values, with trees among them spread out."""
    for name, value in values.items():
        if isinstance(value, Mapping | ParamTree):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are known to be the same array; that of two traced ones is not known."""
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    return dtype_of(a) == dtype_of(b) and np.array_equal(a, b)


def _fitted(value: Any, old: Any) -> Any:
    """Returns a new value for a leaf as an array of the leaf's dtype, if it is not a jax array."""
    expected, dtype = shape_of(old), dtype_of(old)
    if expected is None:
        return value
    have = shape_of(value)
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct) and value is not None:
        try:
            found = np.asarray(value)
            have = found.shape
        except ValueError:  # a list of rows of different lengths
            found = np.asarray(None)
        if dtype is not None and casts(found.dtype, dtype):
            value = found.astype(dtype) if isinstance(old, np.ndarray) else jnp.asarray(found, dtype)
        elif dtype is not None:
            have = None
    if have != expected:
        shown = f"is a {type(value).__name__}" if have is None else f"has shape {have}"
        raise MismatchError(
            f"has shape {expected} and dtype {dtype}, and the new value {shown}: reshape or "
            f"cast it, or fill with jnp.full({expected}, value)"
        )
    return value


def map_named(
    fn: Callable[[str, Any], Any] | Mapping[Pattern, Callable[[str, Any], Any]],
    tree: T,
    pattern: Pattern | None = None,
) -> T:
    """Returns the tree with ``fn(name, leaf)`` in place of every leaf, or of those that match.

    A tied leaf is mapped once, under the first of its names that matches.

    Args:
      fn: a function of name and leaf, or a rule table of such functions; leaves that no pattern
        matches stay. The tree may also come first, as in the other verbs.
      tree: a parameter tree or any other pytree.
      pattern: maps only the leaves with a matching name.

    Raises:
      RuleError: a pattern matches nothing.
      TypeError: ``fn`` is not callable.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": 2.0 * np.ones(2), "bias": np.ones(2)}})
      >>> pt.map_named(lambda name, leaf: leaf / 2, params, ".*weight").dense0.weight
      array([1., 1.])
    """
    if not _is_functions(fn) and _is_functions(tree):
        swapped: Any = tree, fn
        fn, tree = swapped
    if not _is_functions(fn):
        raise TypeError(
            f"map_named takes a function of name and leaf, or a mapping of patterns to such "
            f"functions, but found {fn!r}."
        )
    source, restore, _ = named(tree)
    structure = source._structure
    table = fn if isinstance(fn, Mapping) else {".*" if pattern is None else pattern: fn}
    if not structure.kinds and pattern is None and not isinstance(fn, Mapping):
        return tree
    chosen = resolve(structure, table, default=None, what="the patterns of map_named")
    first = first_names(source, tuple(table))
    leaves = [
        leaf if use is None else use(first[slot], leaf)
        for slot, (use, leaf) in enumerate(zip(chosen, source._leaves, strict=True))
    ]
    return restore(tuple(leaves))


def _is_functions(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(map(callable, value.values()))
    return callable(value) and jax.tree_util.all_leaves([value])


def first_names(tree: ParamTree, patterns: tuple[Pattern, ...]) -> dict[int, str]:
    """Returns for each slot the first of its names that a pattern matches."""
    structure = tree._structure
    first: dict[int, str] = {}
    for pattern in patterns:
        for (path, slot), hit in zip(structure.entries(), match(structure, pattern), strict=True):
            if hit:
                first.setdefault(slot, join(path))
    return first
