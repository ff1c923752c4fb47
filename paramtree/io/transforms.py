"""Functions from the arrays of a file to those of a tree: transposes, splits, stacks."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.errors import RuleError
from paramtree.core.names import Rules, compiled, no_match
from paramtree.io.matching import Item

__all__ = ["natural", "transform_all"]


def transform_all(
    items: Sequence[Item], table: Rules | None, shown: Callable[[str], str], read: Callable[[str], Any]
) -> list[Item]:
    r"""Returns the items with the functions of a rule table applied.

    Args:
      items: what the file has. Several of one name, which ``rename`` can make, are given to one call.
      table: patterns of whole names to functions; the first that matches counts. A function takes the
        array, or the arrays in the natural order of the file's names, and returns an array, or a
        mapping of names to arrays in which ``\1`` is what the first group of the pattern matched.
      shown: the name that the patterns are to match for a name of an item.
      read: reads an array by the name that the file gives it.

    Raises:
      RuleError: a pattern matches nothing, or gives no function, or a function no arrays.
    """
    if table is None:
        return list(items)
    if not isinstance(table, Mapping) or not all(map(callable, table.values())):
        raise RuleError(f"transform is a mapping of patterns to functions of an array, not {table!r}.")
    rules = [(compiled(pattern), fn) for pattern, fn in table.items()]
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.names[0], []).append(item)
    known = [shown(name) for item in items for name in item.names]
    if unused := [p.pattern for p, _ in rules if not any(map(p.fullmatch, known))]:
        raise RuleError(f"transform: {'; '.join(no_match(pattern, known) for pattern in unused)}.")
    out: list[Item] = []
    for group in groups.values():
        matches = ((p.fullmatch(shown(name)), fn) for p, fn in rules for name in group[0].names)
        found, fn = next(((found, fn) for found, fn in matches if found), (None, None))
        if found is None or fn is None:
            out += group
            continue
        group = sorted(group, key=lambda item: natural(item.origin))
        origin = ", ".join(item.origin for item in group)
        try:
            result = fn(*(read(item.origin) for item in group))
        except Exception as error:
            error.add_note(f"in the transform {found.re.pattern!r} of {origin}")
            raise
        out += _results(result, found, group[0]._replace(origin=origin))
    return out


def natural(name: str) -> list[Any]:
    """Returns a key that sorts ``layer2`` before ``layer10``."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def _results(result: Any, found: re.Match[str], item: Item) -> list[Item]:
    if not isinstance(result, Mapping):
        return [_with(item, result, found)]
    try:
        return [
            _with(item._replace(names=(found.expand(name),)), value, found)
            for name, value in result.items()
        ]
    except (re.error, IndexError, TypeError) as error:
        raise RuleError(
            f"the transform {found.re.pattern!r} gives names that are none: {error}."
        ) from None


def _with(item: Item, value: Any, found: re.Match[str]) -> Item:
    shape, dtype = shape_of(value), dtype_of(value)
    if shape is None or dtype is None:
        raise RuleError(
            f"the transform {found.re.pattern!r} of {item.origin} gives a {type(value).__name__}; "
            "expected an array, or a mapping of names to arrays."
        )
    if isinstance(value, np.generic):
        value = np.asarray(value)
    return item._replace(shape=shape, dtype=dtype, read=lambda: value)
