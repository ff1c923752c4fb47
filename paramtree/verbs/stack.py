"""One stacked leaf, or as many leaves with names: the two forms of a repeated layer.

``nn.Repeat`` stacks the parameters of its copies along a first axis, which is what a scan needs.
Unstacked, copy 2 of ``blocks/dense0/weight`` is ``blocks/2/dense0/weight``: a name of its own, to
inspect, to train differently, to save, or to match with a rule.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError, MissingError, ParamTreeError, suggest
from paramtree.core.structure import EMPTY, Path, Stack
from paramtree.core.tree import ParamTree, flatten
from paramtree.verbs.assemble import Entry, Parts, check_no_holes, for_trees, take_apart
from paramtree.verbs.compare import differences, lines

__all__ = ["axis_of", "stack", "unstack"]

_on_trees = for_trees("whose levels are stacks of copies")


def axis_of(stack: Stack, position: int) -> int | None:
    """Returns which axis of a leaf runs over the copies of the level at some depth, the outermost one.

    A leaf that is not known to be stacked may be a stack all the same, along its first axis.
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
    parts, at = _level(tree, path, "unstack")
    below = _below(parts, at, path)
    axes = {entry.label: axis_of(entry.stack, len(at)) for entry in below if entry.label is not None}
    sizes = {
        label: None if axis is None else (shape_of(parts.leaves[label]) or ())[axis : axis + 1]
        for label, axis in axes.items()
    }
    if len({*sizes.values()}) != 1 or () in sizes.values() or None in sizes.values():
        names = {entry.label: join(entry.path) for entry in reversed(below)}
        shown = [f"`{names[label]}` {shape_of(parts.leaves[label])}" for label in sizes]
        raise MismatchError(
            f"unstack: the leaves below `{path}` are not stacks of one size: "
            f"{', '.join(shown) or 'there are none'}. Name the level of an nn.Repeat."
        )
    count = next(size[0] for size in sizes.values() if size)
    entries: list[Entry] = []
    for entry in parts.entries:
        if entry.path[: len(at)] != at:
            entries.append(entry)
        elif entry is below[0]:
            entries += [_copy(copied, at, i, axes) for i in range(count) for copied in below]
    for label, axis in axes.items():
        kind, leaf = parts.kinds.pop(label), parts.leaves.pop(label)
        parts.kinds.update({(label, i): kind for i in range(count)})
        parts.leaves.update({(label, i): _slice(leaf, axis or 0, i) for i in range(count)})
    return parts.assembled(entries)


def _copy(entry: Entry, at: Path, i: int, axes: dict[Any, int | None]) -> Entry:
    """Returns the entry of copy ``i`` of a stacked leaf."""
    path = (*at, str(i), *entry.path[len(at) :])
    if entry.label is None:
        return Entry(path, None)
    rest = [each for axis, each in enumerate(entry.stack) if axis != axes[entry.label]]
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
    parts, at = _level(tree, path, "stack")
    depth = len(at)
    below = _below(parts, at, path)
    copies: dict[str, list[Entry]] = {}
    for entry in below:
        if len(entry.path) == depth + 1 and entry.label is not None:
            raise MismatchError(f"stack: `{'/'.join(entry.path)}` is a leaf, not a copy of a layer.")
        copies.setdefault(entry.path[depth] if len(entry.path) > depth else "", []).append(entry)
    if list(copies) != [str(i) for i in range(len(copies))]:
        raise MismatchError(
            f"stack: the children of `{path}` are {', '.join(copies)}; expected copies 0, 1, 2, ..."
        )
    level = tree[path] if path else tree
    unlike = [
        f"`{path}/{i}` is not like `{path}/0`:\n" + "\n".join(lines(found))
        for i in copies
        if (found := differences(level["0"], level[i]))
    ]
    if unlike:
        raise MismatchError("\n".join(["stack: only copies of one layer can be stacked.", *unlike]))
    first, count = copies["0"], len(copies)
    rows = {row[0].label: row for row in zip(*copies.values(), strict=True) if row[0].label is not None}
    for label, row in rows.items():
        axis = sum(position <= depth for position, _ in row[0].stack)
        parts.leaves[label] = _stacked([parts.leaves[entry.label] for entry in row], axis)
    entries = []
    for entry in parts.entries:
        if entry.path[:depth] != at:
            entries.append(entry)
        elif entry is below[0]:
            entries += [_joined(copy, depth, count) for copy in first]
    return parts.assembled(entries)


def _joined(entry: Entry, depth: int, count: int) -> Entry:
    """Returns the entry of a stack, from that of its first copy."""
    path = entry.path[:depth] + entry.path[depth + 1 :]
    if entry.label is None:
        return Entry(path, None)
    outer = [each for each in entry.stack if each[0] <= depth]
    inner = [(position - 1, size) for position, size in entry.stack if position > depth]
    return Entry(path, entry.label, (*outer, (depth, count), *inner))


def _level(tree: Any, path: str, verb: str) -> tuple[Parts, Path]:
    """Returns a tree taken apart, and the path of a level in it."""
    check_no_holes(tree, verb)
    structure, _ = flatten(tree)
    entries = zip(structure.paths, structure.slots, strict=True)
    levels = {"/".join(p[:i]) for p, s in entries for i in range(1, len(p) + (s == EMPTY))}
    if path and path not in levels:
        raise MissingError(f"{verb}: `{path}` is not a level of the tree.{suggest(path, levels)}")
    return take_apart(tree), tuple(path.split("/")) if path else ()


def _below(parts: Parts, at: Path, path: str) -> list[Entry]:
    """Returns the entries below a level; none of their leaves may have a name outside of it."""
    below = [entry for entry in parts.entries if entry.path[: len(at)] == at]
    outside = {entry.label for entry in parts.entries if entry.path[: len(at)] != at}
    inside: dict[Any, str] = {}
    for entry in below:
        inside.setdefault(entry.label, join(entry.path))
    tied = [f"`{name}`" for label, name in inside.items() if label is not None and label in outside]
    if tied:
        raise ParamTreeError(
            f"{', '.join(tied)} has names below `{path}` and elsewhere, and a tie cannot lead into one "
            "copy of many: pt.untie it first."
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
