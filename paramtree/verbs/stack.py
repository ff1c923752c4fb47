"""One stacked leaf, or as many named ones: the two forms of layers that are repeated.

``nn.Repeat`` keeps the parameters of its copies stacked along a first axis, which is what a scan
needs. Unstacked, copy 2 of ``blocks/dense0/weight`` is ``blocks/2/dense0/weight``: a name of its own,
to look at, to train differently, to save, or to give rules by rank to.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError, MissingError, ParamTreeError, suggest
from paramtree.core.structure import EMPTY, HOLE, Path, Structure, build
from paramtree.core.tree import ParamTree, _rebuild, whole
from paramtree.verbs.compare import differences, lines

__all__ = ["stack", "unstack"]


def unstack(tree: ParamTree, path: str) -> ParamTree:
    """Returns the tree with the leaves below a level taken apart along their first axis.

    Args:
      tree: a parameter tree, of arrays or of shapes.
      path: the level, such as "blocks" or "encoder/blocks".

    Returns:
      A tree in which the level has children "0", "1", ..., each of the form that it had. Ties within
      the level are ties within each copy.

    Raises:
      MissingError: there is no such level.
      MismatchError: the leaves below it do not all have a first axis of one size.
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
    tree, structure, at = _level(tree, path, "unstack")
    inside = _inside(structure, at, path)
    sizes = {join(structure.canonical[slot]): shape_of(tree._leaves[slot]) for slot in inside}
    firsts = {shape[:1] if shape else () for shape in sizes.values()}
    if len(firsts) != 1 or () in firsts:
        shown = ", ".join(f"`{name}` {shape}" for name, shape in sizes.items()) or "none"
        raise MismatchError(
            f"unstack: the leaves below `{path}` do not have a first axis of one size: {shown}. Name "
            "the level of an nn.Repeat."
        )
    ((count,),) = firsts
    items: list[tuple[Path, Hashable]] = []
    spread = False
    for entry, slot in zip(structure.paths, structure.slots, strict=True):
        if entry[: len(at)] != at:
            items.append((entry, None if slot == EMPTY else (slot, None)))
        elif not spread:
            spread = True
            for i in range(count):
                items += [
                    ((*at, str(i), *below[len(at) :]), None if s == EMPTY else (s, i))
                    for below, s in zip(structure.paths, structure.slots, strict=True)
                    if below[: len(at)] == at
                ]
    kinds = {(s, i): structure.kinds[s] for _, (s, i) in _labelled(items)}
    made, order = build(items, kinds)
    leaves = [tree._leaves[s] if i is None else _part(tree._leaves[s], i) for s, i in order]
    return _rebuild(made, tuple(leaves), tree._place)


def stack(tree: ParamTree, path: str) -> ParamTree:
    """Returns the tree with the children "0", "1", ... of a level put together: undoes ``unstack``.

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
    tree, structure, at = _level(tree, path, "stack")
    inside = _inside(structure, at, path)
    depth = len(at)
    copies: dict[str, list[tuple[Path, int]]] = {}
    for entry, slot in zip(structure.paths, structure.slots, strict=True):
        if entry[:depth] == at:
            if len(entry) <= depth + 1 and slot != EMPTY:
                raise MismatchError(f"stack: `{'/'.join(entry)}` is a leaf, not a copy of a layer.")
            copies.setdefault(entry[depth] if len(entry) > depth else "", []).append(
                (entry[depth + 1 :], slot)
            )
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
    first = copies["0"]
    slots = [[slot for _, slot in copy] for copy in copies.values()]
    items: list[tuple[Path, Hashable]] = []
    done = False
    for entry, slot in zip(structure.paths, structure.slots, strict=True):
        if slot not in inside and entry[:depth] != at:
            items.append((entry, None if slot == EMPTY else slot))
        elif not done:
            done = True
            items += [((*at, *below), None if s == EMPTY else s) for below, s in first]
    made, order = build(items, structure.kinds)
    column = {copy[0]: copy for copy in zip(*slots, strict=True) if copy[0] != EMPTY}
    leaves = [
        _together([tree._leaves[s] for s in column[slot]]) if slot in column else tree._leaves[slot]
        for slot in order
    ]
    return _rebuild(made, tuple(leaves), tree._place)


def _level(tree: Any, path: str, verb: str) -> tuple[ParamTree, Structure, Path]:
    if not isinstance(tree, ParamTree):
        raise TypeError(f"{verb} takes a parameter tree, but found {type(tree).__name__}.")
    tree = whole(tree)
    structure = tree._structure
    if HOLE in structure.slots:
        raise ParamTreeError(f"{verb}: the tree has holes. Fill them with pt.merge first.")
    at = tuple(path.split("/")) if path else ()
    levels = {"/".join(p[:i]) for p, s in zip(structure.paths, structure.slots, strict=True)
              for i in range(1, len(p) + (s == EMPTY))}  # fmt: skip
    if path and path not in levels:
        raise MissingError(f"{verb}: `{path}` is not a level of the tree.{suggest(path, levels)}")
    return tree, structure, at


def _inside(structure: Structure, at: Path, path: str) -> set[int]:
    """Returns the slots below a level; none of them may also be reached from outside."""
    slots: dict[bool, set[int]] = {True: set(), False: set()}
    for entry, slot in structure.entries():
        slots[entry[: len(at)] == at].add(slot)
    if both := slots[True] & slots[False]:
        names = ", ".join(f"`{join(structure.canonical[slot])}`" for slot in sorted(both))
        raise ParamTreeError(
            f"{names} has names below `{path}` and elsewhere, and a tie cannot lead into one copy of "
            "many: pt.untie it first."
        )
    return slots[True]


def _labelled(items: Sequence[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    return [item for item in items if item[1] is not None]


def _part(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    # A copy: a view of numpy's would keep all copies alive, and see them change.
    return np.array(leaf[i]) if isinstance(leaf, np.ndarray) else leaf[i]


def _together(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (len(leaves), *first.shape)
        return jax.ShapeDtypeStruct(shape, first.dtype)
    return np.stack(leaves) if isinstance(first, np.ndarray) else jnp.stack(leaves)
