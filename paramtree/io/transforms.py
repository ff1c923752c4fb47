"""Applying user functions to the arrays of a file: transposes, splits, stacks."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.errors import RuleError
from paramtree.core.rules import Rules, no_match
from paramtree.io.matching import Item, name_pattern

__all__ = ["natural", "transform_all"]

_NUMBERS = 32  # of one name are sorted as numbers; a hostile one may have thousands


def transform_all(
    items: Sequence[Item], table: Rules | None, shown: Callable[..., str], get: Callable[[Item], Any]
) -> list[Item]:
    r"""Returns the items with the functions of a rule table applied.

    Args:
      items: the arrays of the file. Items that ``rename`` gave the same name go to one call.
      table: a rule table from full names to functions. A function takes the array, or the arrays in
        natural order of their names in the file. It returns an array, or a mapping of names to arrays
        in which ``\1`` is the first group of the pattern.
      shown: returns what patterns match for a name of an item: its levels, joined with "_" or "/".
      get: reads an item.

    Raises:
      RuleError: a pattern matches nothing, a value is not a function, or a result is not an array.
    """
    if table is None:
        return list(items)
    if not isinstance(table, Mapping) or not all(map(callable, table.values())):
        raise RuleError(f"transform is {table!r}; expected a mapping of patterns to functions.")
    rules = [(*name_pattern(pattern), fn) for pattern, fn in table.items()]
    groups: dict[str, list[Item]] = {}
    for item in _by_rule(items, rules, shown):
        groups.setdefault(item.names[0], []).append(item)
    seps = {sep for _, sep, _ in rules}
    known = {sep: [shown(name, sep) for item in items for name in item.names] for sep in seps}
    if unused := [(p, known[sep]) for p, sep, _ in rules if not any(map(p.fullmatch, known[sep]))]:
        raise RuleError(f"transform: {'; '.join(no_match(*pair) for pair in unused)}.")
    out: list[Item] = []
    for group in groups.values():
        matches: list[tuple[re.Match[str], str]] = []  # of each name, and its path
        fn: Any = None
        for pattern, sep, function in rules:
            shown_names = [(pattern.fullmatch(shown(n, sep)), shown(n, "/")) for n in group[0].names]
            matches = [(match, path) for match, path in shown_names if match]
            if matches:
                fn = function
                break
        if not matches:
            out += group
            continue
        group = sorted(group, key=lambda item: natural(item.origin))
        origin = ", ".join(item.origin for item in group)
        try:
            result = fn(*map(get, group))
        except Exception as error:
            error.add_note(f"in the transform {matches[0][0].re.pattern!r} of {origin}")
            raise
        out += _results(result, matches, replace(group[0], origin=origin))
    return out


def _by_rule(items: Sequence[Item], rules: Sequence[Any], shown: Callable[..., str]) -> Iterator[Item]:
    """Yields the items, and one for each name of an array whose names different rules match."""

    def rule(name: str) -> int | None:
        found = (i for i, (p, sep, _) in enumerate(rules) if p.fullmatch(shown(name, sep)))
        return next(found, None)

    for item in items:
        if len(item.names) == 1 or len({*map(rule, item.names)}) == 1:
            yield item
        else:
            yield from (replace(item, names=(name,)) for name in item.names)


_NUMBER = re.compile(r"([0-9]{1,18})")


def natural(name: str) -> list[Any]:
    """Returns a sort key that puts ``layer2`` before ``layer10``."""
    parts: list[Any] = _NUMBER.split(name, maxsplit=_NUMBERS)  # text and numbers by turns
    parts[1::2] = map(int, parts[1::2])
    return parts


def _results(result: Any, matches: Sequence[tuple[re.Match[str], str]], item: Item) -> list[Item]:
    match = matches[0][0]
    if not isinstance(result, Mapping):
        return [_with(item, result, match)]
    try:
        return [
            _with(replace(item, names=names, loose=True), value, match)
            for name, value in result.items()
            for names in [tuple(dict.fromkeys(_expanded(name, *one) for one in matches))]
        ]
    except (re.error, IndexError, TypeError) as error:
        pattern = match.re.pattern
        raise RuleError(f"the transform {pattern!r} returned an invalid name: {error}.") from None


def _expanded(template: str, match: re.Match[str], path: str) -> str:
    r"""Returns the name that a template stands for, with the levels of the name that was matched.

    ``path`` is that name with "/" between levels, where the match may have "_". An underscore next to a
    group separates levels if the character at that end of the group does: in ``h/0/qkv``, matched as
    ``h_0_qkv`` by ``(.*)_qkv``, ``\1_q`` is ``h/0/q``.
    """
    out, done, above = "", 0, False
    for group in re.finditer(r"\\(?:g<(\w+)>|([1-9][0-9]?))", template):
        number: Any = group[1] or group[2]
        begin, end = match.span(int(number) if number.isdigit() else number)
        literal = match.expand(template[done : group.start()])
        literal = f"/{literal[1:]}" if above and literal.startswith("_") else literal
        if literal.endswith("_") and begin > 0 and path[begin - 1 : begin] == "/":
            literal = f"{literal[:-1]}/"
        out += literal + (path[begin:end] if begin >= 0 else "")
        done, above = group.end(), begin >= 0 and path[end : end + 1] == "/"
    literal = match.expand(template[done:])
    return out + (f"/{literal[1:]}" if above and literal.startswith("_") else literal)


def _with(item: Item, value: Any, match: re.Match[str]) -> Item:
    shape, dtype = shape_of(value), dtype_of(value)
    if shape is None or dtype is None:
        raise RuleError(
            f"the transform {match.re.pattern!r} of {item.origin} returned a {type(value).__name__}; "
            "expected an array, or a mapping of names to arrays."
        )
    if isinstance(value, np.generic):
        value = np.asarray(value)
    return replace(item, shape=shape, dtype=dtype, read=lambda: value, stack=None)
