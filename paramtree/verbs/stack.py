"""Stacked leaves, or a named leaf for each copy: the two forms of a repeated layer.

``nn.Repeat`` stacks the parameters of its copies along a first axis, which is what a scan needs.
Unstacked, copy 2 of ``blocks/dense0/weight`` is ``blocks/2/dense0/weight``: a name of its own, to
inspect, to train differently, to save, or to match with a rule.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError, MissingError, ParamTreeError, first_few, suggest
from paramtree.core.structure import EMPTY, Path, Stack
from paramtree.core.tree import ParamTree, flatten, is_flat
from paramtree.verbs.assemble import Draft, Entry, check_no_holes, for_trees, take_apart
from paramtree.verbs.compare import differences, lines

__all__ = ["axis_of", "stack", "unstack"]

_on_trees = for_trees("whose levels are stacks of copies", moves=True)


def axis_of(stack: Stack, position: int) -> int | None:
    """Returns the axis of a leaf, the outermost if several, over the copies of the level at a depth.

    A leaf without a stack in the structure may still be one, along its first axis.
    """
    if not stack:
        return 0
    return next((axis for axis, (at, _) in enumerate(stack) if at == position), None)


@_on_trees
def unstack(tree: ParamTree, path: str) -> ParamTree:
    """Returns the tree with a name for each copy in a stack of layers.

    Where stacks are nested, the axis that the level was repeated along is split; a tree that was not
    made by ``pt.init``, and so does not know its stacks, is split along the first axis.

    Args:
      tree: a parameter tree, of arrays or of shapes.
      path: the level, such as "blocks" or "encoder/blocks".

    Returns:
      A tree in which the level has children "0", "1", ..., each with the names that it had. Ties in the
      level are ties in each copy.

    Raises:
      MissingError: there is no such level.
      MismatchError: the leaves below it are not stacks of one size.
      ParamTreeError: a leaf below it is tied to one elsewhere, or the tree has holes.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"blocks": {"w": np.arange(6.0).reshape(3, 2)}, "head": np.ones(2)})
      >>> pt.unstack(params, "blocks")
      Parameter blocks_0_w (shape=(2,), dtype=float64)
      Parameter blocks_1_w (shape=(2,), dtype=float64)
      Parameter blocks_2_w (shape=(2,), dtype=float64)
      Parameter head (shape=(2,), dtype=float64)
    """
    draft, at = _level(tree, path, "unstack")
    below = _below(draft, at, path)
    axes = {entry.label: axis_of(entry.stack, len(at)) for entry in below if entry.label is not None}
    sizes = {
        label: None if axis is None else (shape_of(draft.leaves[label]) or ())[axis : axis + 1]
        for label, axis in axes.items()
    }
    known = {
        entry.label: entry.stack[axis][1:]
        for entry in below
        if entry.stack and (axis := axes[entry.label]) is not None
    }
    odd = any(sizes[label] != size for label, size in known.items())
    if odd or len({*sizes.values()}) != 1 or () in sizes.values() or None in sizes.values():
        names = {entry.label: join(entry.path) for entry in reversed(below)}
        shown = [f"`{names[label]}` {shape_of(draft.leaves[label])}" for label in sizes]
        raise MismatchError(
            f"unstack: the leaves below `{path}` are not stacks of one size: "
            f"{', '.join(shown) or 'there are none'}. Name the level of an nn.Repeat."
        )
    count = next(size[0] for size in sizes.values() if size)
    entries: list[Entry] = []
    for entry in draft.entries:
        if entry.path[: len(at)] != at:
            entries.append(entry)
        elif entry is below[0]:
            entries += [_copy(copied, at, i, axes) for i in range(count) for copied in below]
    for label, axis in axes.items():
        kind, leaf = draft.kinds.pop(label), draft.leaves.pop(label)
        draft.kinds.update({(label, i): kind for i in range(count)})
        draft.leaves.update({(label, i): _slice(leaf, axis or 0, i) for i in range(count)})
    return draft.assembled(entries)


def _copy(entry: Entry, at: Path, i: int, axes: dict[Any, int | None]) -> Entry:
    """Returns the entry of copy ``i`` of a stacked leaf."""
    path = (*at, str(i), *entry.path[len(at) :])
    if entry.label is None:
        return Entry(path, None)
    rest = [pair for axis, pair in enumerate(entry.stack) if axis != axes[entry.label]]
    inner = [(position + (position >= len(at)), size) for position, size in rest]
    return Entry(path, (entry.label, i), tuple(inner))


@_on_trees
def stack(tree: ParamTree, path: str) -> ParamTree:
    """Returns the tree with the children "0", "1", ... of a level stacked; the inverse of ``unstack``.

    Args:
      tree: a parameter tree, of arrays or of shapes.
      path: the level whose children are copies of one another.

    Raises:
      MissingError: there is no such level.
      MismatchError: its children are not numbered, or differ in names, shapes, dtypes, kinds or ties.
      ParamTreeError: a leaf below it is tied to one elsewhere, or the tree has holes.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"blocks": [{"w": np.zeros(2)}, {"w": np.ones(2)}]})
      >>> pt.stack(params, "blocks").blocks.w
      array([[0., 0.],
             [1., 1.]])
    """
    draft, at = _level(tree, path, "stack")
    depth = len(at)
    below = _below(draft, at, path)
    copies: dict[str, list[Entry]] = {}
    for entry in below:
        if len(entry.path) == depth + 1 and entry.label is not None:
            raise MismatchError(f"stack: `{'/'.join(entry.path)}` is a leaf, not a copy of a layer.")
        copies.setdefault(entry.path[depth] if len(entry.path) > depth else "", []).append(entry)
    if list(copies) != [str(i) for i in range(len(copies))]:
        raise MismatchError(
            f"stack: the children of `{path}` are {first_few([*copies], ', ')}; expected copies "
            "0, 1, 2, ..."
        )
    level = tree[path] if path else tree
    unlike = [
        f"`{path}/{i}` is not like `{path}/0`:\n" + "\n".join(lines(mismatches))
        for i in copies
        if (mismatches := differences(level["0"], level[i]))
    ]
    if unlike:
        raise MismatchError("\n".join(["stack: only copies of one layer can be stacked.", *unlike]))
    first, count = copies["0"], len(copies)
    counts = Counter(label for copy in copies.values() for label in {entry.label for entry in copy})
    if shared := {label for label, times in counts.items() if times > 1} - {None}:
        names = sorted({f"`{join(entry.path)}`" for entry in below if entry.label in shared})
        raise ParamTreeError(
            f"stack: {first_few(names, ', ')} are tied, and copies in a stack cannot share a leaf: "
            "pt.untie them first."
        )
    rows = {row[0].label: row for row in zip(*copies.values(), strict=True) if row[0].label is not None}
    for label, row in rows.items():
        axis = sum(position <= depth for position, _ in row[0].stack)
        draft.leaves[label] = _stacked([draft.leaves[entry.label] for entry in row], axis)
    entries = []
    for entry in draft.entries:
        if entry.path[:depth] != at:
            entries.append(entry)
        elif entry is below[0]:
            entries += [_joined(copy, depth, count) for copy in first]
    return draft.assembled(entries)


def _joined(entry: Entry, depth: int, count: int) -> Entry:
    """Returns the entry of a stack, from that of its first copy."""
    path = entry.path[:depth] + entry.path[depth + 1 :]
    if entry.label is None:
        return Entry(path, None)
    outer = [pair for pair in entry.stack if pair[0] <= depth]
    inner = [(position - 1, size) for position, size in entry.stack if position > depth]
    return Entry(path, entry.label, (*outer, (depth, count), *inner))


def _level(tree: Any, path: str, verb: str) -> tuple[Draft, Path]:
    """Returns a tree taken apart, and the path of a level in it."""
    check_no_holes(tree, verb)
    if not isinstance(path, str):
        raise TypeError(f"{verb} takes the path of a level, such as 'blocks', but found {path!r}.")
    if not is_flat(tree):
        raise MismatchError(f"{verb} takes a tree of arrays, but a leaf of it is itself a container.")
    structure, _ = flatten(tree)
    entries = zip(structure.paths, structure.slots, strict=True)
    levels = {"/".join(p[:i]) for p, s in entries for i in range(1, len(p) + (s == EMPTY))}
    if path and path not in levels:
        raise MissingError(f"{verb}: `{path}` is not a level of the tree.{suggest(path, levels)}")
    return take_apart(tree), tuple(path.split("/")) if path else ()


def _below(draft: Draft, at: Path, path: str) -> list[Entry]:
    """Returns the entries below a level; none of their leaves may have a name outside of it."""
    below = [entry for entry in draft.entries if entry.path[: len(at)] == at]
    outside = {entry.label for entry in draft.entries if entry.path[: len(at)] != at}
    inside: dict[Any, str] = {}
    for entry in below:
        inside.setdefault(entry.label, join(entry.path))
    tied = [f"`{name}`" for label, name in inside.items() if label is not None and label in outside]
    if tied:
        raise ParamTreeError(
            f"{first_few(tied, ', ')} has names below `{path}` and elsewhere, and a tie cannot lead "
            "into one copy of many: pt.untie it first."
        )
    return below


def _slice(leaf: Any, axis: int, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[:axis] + leaf.shape[axis + 1 :], leaf.dtype)
    copy = leaf[(slice(None),) * axis + (i,)]
    # A view of numpy's would keep all copies alive, and see them change.
    return np.array(copy) if isinstance(leaf, np.ndarray) else copy


def _stacked(leaves: Sequence[Any], axis: int) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (*first.shape[:axis], len(leaves), *first.shape[axis:])
        return jax.ShapeDtypeStruct(shape, first.dtype)
    return np.stack(leaves, axis) if isinstance(first, np.ndarray) else jnp.stack(leaves, axis)
