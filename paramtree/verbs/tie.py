"""Ties: several paths that lead to one stored leaf.

A tie is a fact of the structure, not of the values, so nothing that is done to the leaves can
lose it: a gradient of a tied leaf is the sum over its uses because there is only one leaf to
differentiate, and an optimiser keeps one slot for it for the same reason.
"""

from collections.abc import KeysView, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, ParamTreeError, RuleError, suggest
from paramtree.core.names import Pattern, match, names, no_match
from paramtree.core.structure import EMPTY, Node, Path, Structure, build
from paramtree.core.tree import ParamTree, _rebuild, whole

__all__ = ["tie", "ties", "untie"]


def ties(tree: ParamTree, *, sep: str = "_") -> dict[str, str]:
    """Returns the name of every alias with the name of the leaf that it leads to.

    Args:
      tree: a parameter tree.
      sep: what joins the names; with "/" they are paths, as ``pt.tie`` and ``pt.init`` take them.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"embed": {"weight": np.ones(2)}, "decoder": {"weight": np.ones(2)}})
      >>> pt.ties(pt.tie(params, {"decoder": "embed"}))
      {'decoder_weight': 'embed_weight'}
    """
    structure = whole(_checked(tree, "ties"))._structure
    first = structure.canonical
    return {
        join(path, sep): join(first[slot], sep)
        for path, slot in structure.entries()
        if first[slot] != path
    }


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
        a leaf to a level, or two levels do not have the same children. One error lists all.
      MismatchError: the two leaves differ in shape, dtype or kind; all are listed.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"a": {"w": np.ones(2)}, "b": {"w": np.zeros(2)}})
      >>> params = pt.tie(params, {"b": "a"})
      >>> params.b.w is params.a.w
      True
    """
    tree = whole(_checked(tree, "tie"))
    structure = _without_holes(tree, "tie")
    problems: list[str] = []
    target: dict[Path, list[Path]] = {}
    for alias, source in pairs.items():
        try:
            _point(structure, _path(structure, alias), _path(structure, source), target)
        except RuleError as error:
            problems.append(str(error))
    if problems:
        raise RuleError(f"tie: {' '.join(problems)}")
    slot_of = dict(structure.entries())
    ends = {path: _follow(path, target, slot_of) for path in target}
    for path, end in ends.items():
        if reason := _difference(structure, tree._leaves, slot_of[path], slot_of[end]):
            problems.append(f"`{join(path)}` and `{join(end)}` have {reason}")
    if problems:
        raise MismatchError(f"tie: {'; '.join(problems)}. Only equals can share one leaf.")
    items = [
        (path, None if slot == EMPTY else slot_of[ends.get(path, path)])
        for path, slot in zip(structure.paths, structure.slots, strict=True)
    ]
    tied, order = build(items, structure.kinds)
    return _rebuild(tied, tuple(tree._leaves[slot] for slot in order), tree._place)


def untie(tree: ParamTree, pattern: Pattern | None = None) -> ParamTree:
    """Returns the tree with a leaf of its own for every tied name that matches, a copy of the value.

    Names of the same leaf that do not match stay tied to each other.

    Args:
      tree: a parameter tree without holes.
      pattern: a regular expression for whole names; None unties all.

    Raises:
      RuleError: the pattern matches no tied name.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"a": {"w": np.ones(2)}, "b": {"w": np.zeros(2)}})
      >>> params = pt.untie(pt.tie(params, {"b": "a"}), "b_w")
      >>> params.b.w is params.a.w, params.b.w
      (False, array([1., 1.]))
    """
    tree = whole(_checked(tree, "untie"))
    structure = _without_holes(tree, "untie")
    entries = list(structure.entries())
    count: dict[int, int] = {}
    for _, slot in entries:
        count[slot] = count.get(slot, 0) + 1
    loose = {
        path
        for (path, slot), hit in zip(entries, match(structure, pattern), strict=True)
        if hit and count[slot] > 1
    }
    if not loose and pattern is not None:
        tied = [name for name, (_, s) in zip(names(structure), entries, strict=True) if count[s] > 1]
        among = f" The tied names are: {', '.join(tied)}." if tied else " Nothing is tied."
        raise RuleError(f"untie: {no_match(pattern, tied)}.{among}")
    kinds: dict[Any, str] = dict(enumerate(structure.kinds))
    items: list[tuple[Path, Any]] = []
    for path, slot in zip(structure.paths, structure.slots, strict=True):
        label: Any = None if slot == EMPTY else slot
        if path in loose and slot != EMPTY:
            label = path
            kinds[path] = structure.kinds[slot]
        items.append((path, label))
    slot_of = dict(entries)
    untied, order = build(items, kinds)
    used: set[int] = set()
    leaves = []
    for label in order:
        slot = label if isinstance(label, int) else slot_of[label]
        # The first to take the value has the array itself, the others copies: a buffer that is
        # in the tree twice could not be donated.
        leaves.append(_copied(tree._leaves[slot]) if slot in used else tree._leaves[slot])
        used.add(slot)
    return _rebuild(untied, tuple(leaves), tree._place)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jnp.copy(leaf)
    return np.copy(leaf) if isinstance(leaf, np.ndarray) else leaf


def _checked(tree: Any, verb: str) -> ParamTree:
    if not isinstance(tree, ParamTree):
        raise TypeError(
            f"{verb} takes a parameter tree, as only its structure can hold ties, but found "
            f"{type(tree).__name__}: pt.from_tree(tree) makes one."
        )
    return tree


def _without_holes(tree: ParamTree, verb: str) -> Structure:
    structure = tree._structure
    if structure.whole is not structure:
        raise ParamTreeError(
            f"{verb}: the tree has holes, left by select or partition. Fill them with pt.merge first."
        )
    return structure


def _path(structure: Structure, text: str) -> Path:
    if not isinstance(text, str):
        raise RuleError(f"a path is a string such as 'decoder/weight', but found {text!r}.")
    by_text = structure.cache.get("by_text")
    if by_text is None:
        by_text = {
            "/".join(path[:i]): path[:i] for path in structure.paths for i in range(1, len(path) + 1)
        }
        structure.cache["by_text"] = by_text
    if text not in by_text:
        for path in by_text.values():
            if join(path) == text:
                raise RuleError(f"`{text}` is a name; tie takes paths: write '{'/'.join(path)}'.")
        raise RuleError(f"`{text}` is not a path in the tree.{suggest(text, by_text)}")
    found: Path = by_text[text]
    return found


def _point(structure: Structure, alias: Path, source: Path, target: dict[Path, list[Path]]) -> None:
    """Notes that every leaf at or below ``alias`` is to be the one of ``source``."""
    here, there = "/".join(alias), "/".join(source)
    short = min(len(alias), len(source))
    if alias == source:
        raise RuleError(f"`{here}` cannot be tied to itself.")
    if alias[:short] == source[:short]:
        raise RuleError(f"`{here}` and `{there}` cannot be tied: one holds the other.")
    below = [_below(structure, path) for path in (alias, source)]
    if below[0] != below[1]:
        kind = ["a leaf" if () in part else "a level" for part in below]
        if kind[0] != kind[1]:
            raise RuleError(f"`{here}` is {kind[0]} and `{there}` {kind[1]}: tie like to like.")
        only = [
            ", ".join("/".join((*path, *rest)) for rest in below[i] if rest not in below[1 - i])
            for i, path in enumerate((alias, source))
        ]
        lacking = "; ".join(f"only {text}" for text in only if text)
        raise RuleError(f"`{here}` and `{there}` do not have the same leaves: {lacking}.")
    for rest in below[0]:
        target.setdefault((*alias, *rest), []).append((*source, *rest))


def _below(structure: Structure, path: Path) -> KeysView[Path]:
    """Returns the paths of the leaves at or below a path, relative to it."""
    found: Node | int = structure.root
    for segment in path:
        assert isinstance(found, Node)  # the path was looked up, so it leads somewhere
        found = found.children[segment]
    if not isinstance(found, Node):
        return {(): None}.keys()
    return {entry[len(path) :]: None for entry, _ in structure.entries(found)}.keys()


def _follow(alias: Path, target: dict[Path, list[Path]], slot_of: dict[Path, int]) -> Path:
    """Returns the path at the end of a chain of ties; where chains meet, they must end alike."""
    seen = [alias]
    for path in seen:  # grows while it is walked
        seen += [source for source in target.get(path, ()) if source not in seen]
    ends = [path for path in seen if path not in target]
    shown = "/".join(alias)
    if not ends:
        circle = " -> ".join("/".join(path) for path in (*seen, alias))
        raise RuleError(f"tie: the ties go in a circle, {circle}: take one of them out.")
    if len({slot_of[end] for end in ends}) > 1:
        different = " and ".join("/".join(end) for end in ends)
        raise RuleError(f"tie: `{shown}` is tied twice, to different leaves, {different}.")
    return ends[0]


def _difference(structure: Structure, leaves: Any, one: int, other: int) -> str:
    for word, a, b in (
        ("shapes", shape_of(leaves[one]), shape_of(leaves[other])),
        ("dtypes", dtype_of(leaves[one]), dtype_of(leaves[other])),
        ("kinds", structure.kinds[one], structure.kinds[other]),
    ):
        if a != b:
            return f"different {word}, {a} and {b}"
    return ""
