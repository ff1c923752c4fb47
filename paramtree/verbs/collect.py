"""A flat view of a tree by full names."""

import re
from collections.abc import Iterable
from itertools import compress
from typing import Any

from paramtree.core.errors import NameCollisionError, first_few
from paramtree.core.pytrees import Opened, open_tree
from paramtree.core.rules import Pattern, Patterns, check_kind, hits, select_slots
from paramtree.core.structure import Path, Picker, Stack, Structure, picker
from paramtree.core.tree import ParamTree, unflatten

__all__ = ["check_unique", "collect", "collect_matching", "flat_tree"]


def collect(
    tree: Any,
    pattern: Pattern | None = None,
    *,
    sep: str = "_",
    kind: str | None = None,
    aliases: bool = False,
) -> ParamTree:
    """Returns a flat tree of the leaves whose names match, in order, under their full names.

    Each stored leaf appears once, under the first of its names that matches; ``aliases=True`` lists all
    names, which are tied in the result too.

    Args:
      tree: a parameter tree, or any other pytree, whose arrays are named by their key paths.
      pattern: a regular expression for whole names or, with a "/" in it, for whole paths; or a
        predicate ``fn(name, leaf)``. None takes all.
      sep: joins the segments of each path in the result.
      kind: "param" or "state" to take only these.
      aliases: whether to list every name of a tied leaf.

    Returns:
      A flat ``ParamTree``, empty if nothing matches. Names start at ``tree``, even if it is a
      sub-tree; only the printout shows where that was.

    Raises:
      NameCollisionError: two of the paths have one name.
      RuleError: the pattern is not a regular expression.
      ValueError: ``kind`` is not a kind.

    Example:
      >>> import numpy as np, paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.zeros(2)}})
      >>> pt.collect(params, ".*weight")
      Parameter dense0_weight (shape=(2, 3), dtype=float64)
      >>> list(pt.collect(params, sep="."))
      ['dense0.weight', 'dense0.bias']
    """
    check_kind(kind)
    source = open_tree(tree)
    if isinstance(pattern, str | re.Pattern | None):
        flat, take = source.structure.cached(
            ("collect", pattern, sep, kind, aliases),
            lambda: _flat(source, pattern, sep, kind, aliases),
        )
    else:
        flat, take = _flat(source, pattern, sep, kind, aliases)
    if source.renamed:  # a scope, in which a layer must not stop training
        result: ParamTree = source.renamed(flat, take(source.leaves))
        return result
    return unflatten(flat, take(source.leaves), source.place)


def _flat(
    source: Opened, pattern: Any, sep: str, kind: str | None, aliases: bool
) -> tuple[Structure, Picker]:
    """Returns the structure of the names that match, and a picker of their leaves."""
    structure, matches = source.structure, hits(source, pattern)
    if kind is not None:
        of_kind = (structure.kinds[slot] == kind for _, slot in structure.entries())
        matches = tuple(hit and fits for hit, fits in zip(matches, of_kind, strict=True))
    names = list(compress(structure.names(sep), matches))
    taken = [slot for _, slot in compress(structure.entries(), matches)]
    if not aliases and len(structure.names(sep)) > len(structure.kinds):  # each leaf by its first name
        first = sorted(dict(zip(reversed(taken), reversed(range(len(taken))), strict=True)).values())
        names, taken = [names[i] for i in first], [taken[i] for i in first]
    if len(set(names)) < len(names):
        paths = [path for path, _ in compress(structure.entries(), matches)]
        check_unique(zip(compress(structure.names(sep), matches), paths, strict=True))
    slots = {slot: i for i, slot in enumerate(dict.fromkeys(taken))}
    stacks: tuple[Stack, ...] = ()
    if structure.stacks:  # the index of a copy can only go before a flat name
        stacks = tuple(tuple((0, size) for _, size in structure.stack_of(slot)) for slot in taken)
    flat = Structure.intern(
        tuple(zip(names, strict=True)),
        tuple(map(slots.__getitem__, taken)),
        tuple(map(structure.kinds.__getitem__, slots)),
        stacks,
    )
    return flat, picker([*slots])


def collect_matching(
    verb: str, tree: Any, pattern: Patterns, *, sep: str = "_", kind: str | None = None
) -> ParamTree:
    """Like ``collect``, for verbs in which a pattern that matches nothing is an error."""
    select_slots(open_tree(tree), pattern, kind, verb)
    return collect(tree, pattern, sep=sep, kind=kind)  # type: ignore[arg-type]


def flat_tree(values: dict[str, Any]) -> ParamTree:
    """Returns a tree of one level; unlike in ``from_tree``, "/" in a name does not start a level."""
    structure = Structure.intern(
        tuple((name,) for name in values), tuple(range(len(values))), ("param",) * len(values)
    )
    return unflatten(structure, tuple(values.values()))


def check_unique(named: Iterable[tuple[str, Path]]) -> None:
    """Raises NameCollisionError if two different paths have one name; it lists all of them."""
    first: dict[str, Path] = {}
    clashes = [
        f"`{name}` is the name of both {'/'.join(first[name])} and {'/'.join(path)}"
        for name, path in named
        if first.setdefault(name, path) != path
    ]
    if clashes:
        raise NameCollisionError(
            f'{first_few(clashes)}. Join the paths with another separator, as in sep="/", or rename '
            "one of them."
        )
