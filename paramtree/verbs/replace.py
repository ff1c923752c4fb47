"""New values for the leaves of a tree, by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, NameCollisionError, RuleError, first_few, suggest
from paramtree.core.pytrees import Opened, open_tree
from paramtree.core.rules import Patterns, resolve
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree
from paramtree.verbs.cast import casts

__all__ = ["map_named", "replace"]

T = TypeVar("T")


def replace(tree: T, values: Mapping[str, Any] | ParamTree) -> T:
    """Returns the tree with new values for some names; all else stays, including ties.

    Numbers, lists and numpy arrays become arrays of the leaf's dtype; jax arrays keep their dtype.

    Args:
      tree: a parameter tree or any other pytree.
      values: exact names, or paths such as "dense0/weight", to arrays of the same shapes; the path of a
        level may be given a tree of new values, such as a loaded one.

    Raises:
      RuleError: a name is not in the tree (all are listed, with the closest ones), or two names of one
        tied leaf get different arrays.
      MismatchError: a value is not an array of the leaf's shape, or its dtype cannot hold the value;
        all are listed.
      NameCollisionError: a name is that of two different leaves: give their paths.

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
    source = open_tree(tree)
    flat = dict(_spread(values))
    leaves = list(source.leaves)
    named: dict[int, str] = {}
    problems, tied = [], []
    for name, slot in _find(source, flat).items():
        if slot in named:
            if not _equal(flat[named[slot]], flat[name]):
                tied.append(
                    f"`{named[slot]}` and `{name}` are tied, one leaf, and get different arrays"
                )
            continue
        named[slot] = name
        try:
            leaves[slot] = fitted(flat[name], leaves[slot])
        except MismatchError as error:
            problems.append(f"`{name}` {error}")
    if tied:
        raise RuleError(f"replace: {first_few(tied)}. Give one of the names, or pt.untie them first.")
    if problems:
        raise MismatchError(f"replace: {first_few(problems)}.")
    return source.restore(leaves)


def _spread(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the names and paths of new values, with trees among them flattened."""
    for name, value in values.items():
        if isinstance(value, Mapping | ParamTree):
            yield from _spread(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _find(source: Opened, names: Iterable[str]) -> dict[str, int]:
    """Returns the slots of exact names or paths.

    Raises:
      RuleError: some are not in the tree; it lists them all with the closest names.
      NameCollisionError: a name is that of two paths with different leaves.
    """

    def index() -> dict[str, dict[int, Path]]:
        slots: dict[str, dict[int, Path]] = {}
        for path, slot in structure.entries():
            slots.setdefault(join(path), {})[slot] = path
        # A path is never ambiguous: "a_b" is the leaf of that path, even if a/b has that name.
        return {**slots, **{join(path, "/"): {slot: path} for path, slot in structure.entries()}}

    structure = source.structure
    by_name: dict[str, dict[int, Path]] = structure.cached("by name", index)
    names = list(names)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        known = structure.names()
        text = "`{}` is not a name in the tree.{}".format
        lines = first_few(unknown, " ", lambda name: text(name, suggest(str(name), known)))
        source.fail(RuleError(f"replace: {lines}"))
        names = [name for name in names if name in by_name]
    for name in names:
        if len(by_name[name]) > 1:
            paths = " and ".join("/".join(path) for path in by_name[name].values())
            raise NameCollisionError(f"replace: `{name}` is the name of both {paths}; give the path.")
    return {name: next(iter(by_name[name])) for name in names}


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are known to be the same array; for two tracers that is not known."""
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    return dtype_of(a) == dtype_of(b) and np.array_equal(a, b)


def fitted(value: Any, leaf: Any) -> Any:
    """Returns a new value for a leaf; anything but a jax array is cast to the leaf's dtype.

    Raises:
      MismatchError: it has another shape or dtype, or holds integers that the dtype cannot.
    """
    expected, dtype = shape_of(leaf), dtype_of(leaf)
    if expected is None:
        return value
    have, problem = shape_of(value), ""
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct) and value is not None:
        try:
            array = np.asarray(value)
        except ValueError:  # a list of rows of different lengths
            array = np.asarray(None)
        have = array.shape
        if dtype is not None and casts(array.dtype, dtype):
            with np.errstate(all="ignore"):
                cast = array.astype(dtype)
            problem = _overflow(array, cast)
            value = cast if isinstance(leaf, np.ndarray) else jnp.asarray(cast)
        elif dtype is not None:
            have = None
    if have != expected or problem:
        shown = f"is a {type(value).__name__}" if have is None else f"has shape {have}{problem}"
        advice = f"reshape or cast it, or fill with jnp.full({expected}, value)"
        if problem:
            advice = "give a jax array of a wider dtype, which replaces the leaf's"
        raise MismatchError(
            f"has shape {expected} and dtype {dtype}, and the new value {shown}: {advice}"
        )
    return value


def _overflow(array: Any, cast: Any) -> str:
    """Returns the message about values that a dtype cannot hold, or an empty string."""
    integers = jnp.issubdtype(cast.dtype, jnp.integer)
    if integers or cast.dtype == np.bool_:
        limits: Any = jnp.iinfo(cast.dtype) if integers else None  # type: ignore[no-untyped-call]
        low, high = (int(limits.min), int(limits.max)) if integers else (0, 1)
        outside = array.size and (array.min() < low or array.max() > high)
        return f" with values outside of {low} to {high}" if outside else ""
    lost = np.isfinite(array) & ~np.isfinite(cast)
    return f" with values outside of the range of {cast.dtype}" if lost.any() else ""


def map_named(
    fn: Callable[[str, Any], Any] | Mapping[Any, Callable[[str, Any], Any]],
    tree: T,
    pattern: Patterns = None,
) -> T:
    """Returns the tree with ``fn(name, leaf)`` in place of every leaf, or of those that match.

    A tied leaf is mapped once, under the first of its names that matches.

    Args:
      fn: a function of name and leaf, or a rule table of such functions; leaves that no pattern
        matches stay. The tree may also come first, as in the other verbs.
      tree: a parameter tree or any other pytree.
      pattern: a pattern, or several: maps only the leaves that match.

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
    source = open_tree(tree)
    if pattern is None and callable(fn):
        mapped = map(fn, map(join, source.structure.canonical), source.leaves)
        return source.restore(tuple(mapped))
    listed = pattern if isinstance(pattern, list | tuple) else (pattern,)
    table = fn if isinstance(fn, Mapping) else dict.fromkeys(listed, fn)
    assigned = resolve(source, table, "the patterns of map_named", default=None)
    functions = tuple(table.values())
    rows = zip(assigned.rules, assigned.names, source.leaves, strict=True)
    return source.restore([leaf if i < 0 else functions[i](name, leaf) for i, name, leaf in rows])


def _is_functions(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(map(callable, value.values()))
    return callable(value) and jax.tree_util.all_leaves([value])
