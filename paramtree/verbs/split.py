"""Trees partitioned by name and merged again, such as into trained and frozen leaves."""

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError, first_few
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Patterns, select_slots
from paramtree.core.structure import Structure, picker
from paramtree.core.tree import ParamTree, flatten, place_of, unflatten
from paramtree.verbs.compare import bare, differences, lines

__all__ = ["merge", "partition", "select"]

T = TypeVar("T")


def select(tree: T, pattern: Patterns = None, *, kind: str | None = None) -> T:
    """Returns the tree with only the leaves whose names match; the others are left out.

    A tied leaf is included if any of its names matches.

    Args:
      tree: a parameter tree or any other pytree.
      pattern: a regular expression for whole names or, with a "/" in it, for whole paths; a predicate
        ``fn(name, leaf)``; or several of these. None takes all.
      kind: "param" or "state" to take only these.

    Returns:
      The same structure with holes; in other containers the leaves left out are None.

    Raises:
      RuleError: a pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"body": {"w": 1.0}, "head": {"w": 2.0}})
      >>> pt.select(params, "head/.*")
      Parameter head_w (2.0)
      (1 hole)
    """
    source = open_tree(tree)
    chosen, _ = select_slots(source, pattern, kind, "select")
    return source.part(chosen.structure, chosen.take, None)


def partition(tree: T, pattern: Patterns = None, *, kind: str | None = None) -> tuple[T, T]:
    """Returns the leaves whose names match, and all others, as two parts for ``merge``.

    Args:
      tree: a parameter tree or any other pytree.
      pattern: a regular expression for whole names or, with a "/" in it, for whole paths; a predicate
        ``fn(name, leaf)``; or several of these. None takes all.
      kind: "param" or "state" to take only these.

    Raises:
      RuleError: a pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"body": {"w": 1.0}, "head": {"w": 2.0}})
      >>> trainable, frozen = pt.partition(params, "head_.*")
      >>> list(pt.collect(trainable)), list(pt.collect(frozen))
      (['head_w'], ['body_w'])
      >>> jax.tree.structure(pt.merge(trainable, frozen)) == jax.tree.structure(params)
      True
    """
    source = open_tree(tree)
    chosen, rest = select_slots(source, pattern, kind, "partition")
    return source.part(chosen.structure, chosen.take, None), source.part(rest.structure, rest.take)


def merge(*trees: T) -> T:
    """Returns one tree from its parts: leaves left out of one come from the others.

    Args:
      *trees: parts of one tree, from ``partition`` or ``select``, in any order.

    Returns:
      The tree with the identical structure that the parts were taken from; a leaf that no part has is
      still left out.

    Raises:
      MismatchError: the parts come from different trees, or have a leaf in common; all are listed.
      TypeError: there are no parts.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"a": 1.0, "b": 2.0})
      >>> pt.merge(pt.select(params, "b"), pt.select(params, "a"))
      Parameter a (1.0)
      Parameter b (2.0)
    """
    if not trees:
        raise TypeError("merge takes the parts of a tree, as in pt.merge(trainable, frozen).")
    doubled: list[str] = []
    merged: T = _merged(trees, trees, doubled)
    if doubled:
        raise MismatchError(
            f"merge: more than one part has {first_few(doubled, ', ')}. Take each leaf from one part."
        )
    return merged


def _merged(parts: Sequence[Any], trees: Sequence[Any], doubled: list[str]) -> Any:
    """Merges parts of one level; ``doubled`` collects the names that more than one of them has."""
    if all(type(part) is ParamTree for part in parts):
        return _merged_trees(parts, trees, doubled)
    if all(hasattr(type(part), "__open__") or isinstance(part, ParamTree) for part in parts):
        opened = [open_tree(part) for part in parts]
        plain = [unflatten(source.structure, source.leaves, source.place) for source in opened]
        merged = _merged_trees(plain, trees, doubled)
        if hasattr(type(parts[0]), "__merge__") and len({*map(type, parts)}) == 1:
            return type(parts[0]).__merge__(parts, merged)
        scope = next((source for source in opened if source.renamed), opened[0])
        return scope.rebuild(*flatten(merged))
    flat = [jax.tree_util.tree_flatten_with_path(part, is_leaf=_is_unit) for part in parts]
    treedef: Any = flat[0][1]
    if any(other != treedef for _, other in flat):
        raise _unlike(trees)
    leaves = []
    for entries in zip(*(entries for entries, _ in flat), strict=True):
        present = [leaf for _, leaf in entries if leaf is not None]
        if len(present) > 1 and _is_unit(present[0]):
            leaves.append(_merged(present, trees, doubled))
            continue
        if len(present) > 1:
            doubled.append(jax.tree_util.keystr(entries[0][0]))
        leaves.append(present[0] if present else None)
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _is_unit(value: Any) -> bool:
    return value is None or isinstance(value, ParamTree) or hasattr(type(value), "__open__")


def _merged_trees(parts: Sequence[ParamTree], trees: Sequence[Any], doubled: list[str]) -> ParamTree:
    structures, leaves = zip(*map(flatten, parts), strict=True)
    full: Structure = structures[0].full
    if any(structure.full is not full for structure in structures):
        raise _unlike(trees)
    together = list(itertools.chain.from_iterable(leaves))

    def order() -> tuple[Structure, Any, list[list[int]]]:
        slots = list(itertools.chain.from_iterable(structure.kept for structure in structures))
        by_slot: dict[int, list[int]] = {}
        for i in sorted(range(len(slots)), key=slots.__getitem__):
            by_slot.setdefault(slots[i], []).append(i)
        shared = [rows for rows in by_slot.values() if len(rows) > 1]
        return full.keep(by_slot), picker([rows[0] for rows in by_slot.values()]), shared

    merged, take, shared = full.cached(("merge", tuple(s.kept for s in structures)), order)
    for rows in shared:  # a leaf that is a container may itself be partitioned
        values = [together[i] for i in rows]
        if jax.tree_util.all_leaves(values):
            slot = list(itertools.chain.from_iterable(s.kept for s in structures))[rows[0]]
            doubled.append(join(full.canonical[slot]))
        else:
            together[rows[0]] = _merged(values, trees, doubled)
    return unflatten(merged, take(together), place_of(parts[0]))


def _unlike(parts: Sequence[Any]) -> MismatchError:
    """Returns the error for parts of different trees; it lists all differences."""
    first, *others = map(bare, parts)
    shown = []
    for i, other in enumerate(others, 2):
        if mismatches := differences(first, other):
            shown += [f"part {i} is not like the first:", *lines(mismatches)]
    return MismatchError(
        "\n".join(["merge: the parts differ in structure.", *shown])
        + "\nMerge the parts that partition or select made of one tree."
    )
