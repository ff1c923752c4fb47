"""Ties: several paths that lead to one stored leaf.

A tie is a fact of the structure, not of the values, so nothing that happens to the leaves can lose it.
A gradient of a tied leaf is the sum over its uses because there is only one leaf to differentiate, and
an optimizer keeps one slot for it for the same reason.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, RuleError, first_few, suggest
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Pattern, hits, no_match
from paramtree.core.structure import Path, Structure
from paramtree.core.tree import ParamTree, flatten
from paramtree.verbs.assemble import check_no_holes, for_trees, take_apart

__all__ = ["tie", "ties", "untie"]

_on_trees = for_trees("as only its structure can hold ties")


@_on_trees
def ties(tree: ParamTree, *, sep: str = "_") -> dict[str, str]:
    """Returns the canonical name of the leaf that each alias leads to.

    Args:
      tree: a parameter tree.
      sep: what joins the names; with "/" they are paths, as ``pt.tie`` and ``pt.init`` take them.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"embed": {"weight": np.ones(2)}, "decoder": {"weight": np.ones(2)}})
      >>> pt.ties(pt.tie(params, {"decoder": "embed"}))
      {'decoder_weight': 'embed_weight'}
    """
    structure, _ = flatten(tree)
    first = structure.canonical
    return {
        join(path, sep): join(first[slot], sep)
        for path, slot in structure.entries()
        if first[slot] != path
    }


@_on_trees
def tie(tree: ParamTree, pairs: Mapping[str, str]) -> ParamTree:
    """Returns the tree with some paths leading to the leaves of others; the source's value stays.

    Args:
      tree: a parameter tree without holes.
      pairs: paths of leaves or of whole levels, ``{alias: source}``, such as
        ``{"decoder/weight": "embed/weight"}`` or ``{"dense2": "dense1"}``.

    Returns:
      A tree in which each alias and its source are one stored leaf. The first of the two in the
      tree's order is its canonical name.

    Raises:
      RuleError: a path is unknown, is tied to itself, to a level that holds it or in a circle, or
        a leaf to a level, or two levels do not have the same leaves. One error lists all.
      ParamTreeError: the tree has holes.
      MismatchError: the two leaves differ in shape, dtype, kind or stack; all are listed.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"a": {"w": np.ones(2)}, "b": {"w": np.zeros(2)}})
      >>> params = pt.tie(params, {"b": "a"})
      >>> params.b.w is params.a.w
      True
    """
    check_no_holes(tree, "tie")
    draft = take_apart(tree)
    structure, leaves = flatten(tree)
    if not isinstance(pairs, Mapping):
        raise RuleError(f"tie takes a mapping of paths, {{alias: source}}, but found {pairs!r}.")
    problems: list[str] = []
    target: dict[Path, list[Path]] = {}
    for alias, source in pairs.items():
        try:
            _point(structure, _path(structure, alias), _path(structure, source), target)
        except RuleError as error:
            problems.append(str(error))
            if len(problems) == 20:  # to find close names takes milliseconds
                break
    if problems:
        raise RuleError(f"tie: {first_few(problems, ' ')}")
    slot_of = dict(structure.entries())
    ends = {path: _follow(path, target, slot_of) for path in target}
    sizes = {entry.path: tuple(size for _, size in entry.stack) for entry in draft.entries}
    for path, end in ends.items():
        sides = [
            (shape_of(leaves[slot]), dtype_of(leaves[slot]), structure.kinds[slot], sizes[p])
            for p in (path, end)
            for slot in (slot_of[p],)
        ]
        for word, a, b in zip(("shapes", "dtypes", "kinds", "stacks"), *sides, strict=True):
            if a != b:
                problems.append(f"`{join(path)}` and `{join(end)}` have different {word}, {a} and {b}")
                break
    if problems:
        raise MismatchError(f"tie: {first_few(problems)}. Only leaves that match can be tied.")
    return draft.assembled(
        entry._replace(label=slot_of[ends[entry.path]]) if entry.path in ends else entry
        for entry in draft.entries
    )


@_on_trees
def untie(tree: ParamTree, pattern: Pattern | None = None) -> ParamTree:
    """Returns the tree with a leaf of its own for every tied name that matches, a copy of the value.

    Names of the same leaf that do not match stay tied to each other.

    Args:
      tree: a parameter tree without holes.
      pattern: a pattern for tied names; None unties all.

    Raises:
      RuleError: the pattern matches no tied name.
      ParamTreeError: the tree has holes.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"a": {"w": np.ones(2)}, "b": {"w": np.zeros(2)}})
      >>> params = pt.untie(pt.tie(params, {"b": "a"}), "b_w")
      >>> params.b.w is params.a.w, params.b.w
      (False, array([1., 1.]))
    """
    check_no_holes(tree, "untie")
    draft = take_apart(tree)
    structure, leaves = flatten(tree)
    source = open_tree(tree)._replace(structure=structure, leaves=leaves)
    paths: dict[int, list[Path]] = {}
    for path, slot in structure.entries():
        paths.setdefault(slot, []).append(path)
    loose = {
        path
        for (path, slot), hit in zip(structure.entries(), hits(source, pattern), strict=True)
        if hit and len(paths[slot]) > 1
    }
    if not loose and pattern is not None:
        tied = [join(path) for path, slot in structure.entries() if len(paths[slot]) > 1]
        among = f" The tied names are: {first_few(tied, ', ')}." if tied else " Nothing is tied."
        raise RuleError(f"untie: {no_match(pattern, tied)}.{among}")
    entries = []
    values: dict[Any, Any] = {}
    used: set[Any] = set()
    for entry in draft.entries:
        old: Any = entry.label
        label = entry.path if entry.path in loose else old
        entries.append(entry._replace(label=label))
        if old is not None and label not in values:
            # The first to take the value has the array itself, the others copies: a buffer that is in
            # a tree twice could not be donated.
            values[label] = _copied(draft.leaves[old]) if old in used else draft.leaves[old]
            draft.kinds[label] = draft.kinds[old]
            used.add(old)
    return draft._replace(leaves=values).assembled(entries)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jnp.copy(leaf)
    return np.copy(leaf) if isinstance(leaf, np.ndarray) else leaf


def _path(structure: Structure, text: str) -> Path:
    if not isinstance(text, str):
        raise RuleError(f"a path is a string such as 'decoder/weight', but found {text!r}.")
    by_text: dict[str, Path] = structure.cached(
        "levels and leaves",
        lambda: {
            "/".join(path[:i]): path[:i] for path in structure.paths for i in range(1, len(path) + 1)
        },
    )
    if text not in by_text:
        for path in by_text.values():
            if join(path) == text:
                raise RuleError(f"`{text}` is a name; tie takes paths: write '{'/'.join(path)}'.")
        raise RuleError(f"`{text}` is not a path in the tree.{suggest(text, by_text)}")
    return by_text[text]


def _point(structure: Structure, alias: Path, source: Path, target: dict[Path, list[Path]]) -> None:
    """Records that every leaf at or below ``alias`` is to be that of ``source``."""
    alias_text, source_text = "/".join(alias), "/".join(source)
    short = min(len(alias), len(source))
    if alias == source:
        raise RuleError(f"`{alias_text}` cannot be tied to itself.")
    if alias[:short] == source[:short]:
        raise RuleError(f"`{alias_text}` and `{source_text}` cannot be tied: one holds the other.")
    below = [_below(structure, path) for path in (alias, source)]
    if below[0].keys() != below[1].keys():
        nodes = ["a leaf" if () in paths else "a level" for paths in below]
        if nodes[0] != nodes[1]:
            shown = f"`{alias_text}` is {nodes[0]} and `{source_text}` {nodes[1]}"
            raise RuleError(f"{shown}: tie like to like.")
        only = [
            ", ".join("/".join((*path, *rest)) for rest in below[i] if rest not in below[1 - i])
            for i, path in enumerate((alias, source))
        ]
        lacking = "; ".join(f"only {text}" for text in only if text)
        raise RuleError(f"`{alias_text}` and `{source_text}` do not have the same leaves: {lacking}.")
    for rest in below[0]:
        target.setdefault((*alias, *rest), []).append((*source, *rest))


def _below(structure: Structure, path: Path) -> dict[Path, None]:
    """Returns the paths of the leaves at or below a path, relative to it, in order."""

    def make() -> dict[Path, dict[Path, None]]:  # of all levels at once: a search for each is quadratic
        below: dict[Path, dict[Path, None]] = {}
        for entry, _ in structure.entries():
            for depth in range(1, len(entry) + 1):
                below.setdefault(entry[:depth], {})[entry[depth:]] = None
        return below

    below: dict[Path, dict[Path, None]] = structure.cached("below", make)
    return below.get(path, {})


def _follow(alias: Path, target: dict[Path, list[Path]], slot_of: dict[Path, int]) -> Path:
    """Returns the path at the end of a chain of ties; where chains meet, they must end alike."""
    seen = [alias]
    for path in seen:  # grows while it is walked
        seen += [source for source in target.get(path, ()) if source not in seen]
    ends = [path for path in seen if path not in target]
    shown = "/".join(alias)
    if not ends:
        circle = " -> ".join("/".join(path) for path in (*seen, alias))
        raise RuleError(f"tie: the ties go in a circle, {circle}: remove one of them.")
    if len({slot_of[end] for end in ends}) > 1:
        different = " and ".join("/".join(end) for end in ends)
        raise RuleError(f"tie: `{shown}` is tied twice, to different leaves, {different}.")
    return ends[0]
