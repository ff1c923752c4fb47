"""Loading stacked layers into a tree of separate layers, and separate layers into a stacked tree.

``blocks.weight`` with a first axis of size 12 corresponds to ``blocks.0.weight`` to
``blocks.11.weight``. Either form loads into the other; see ``pt.stack`` and ``pt.unstack``. A tree of
``pt.init`` knows which axis runs over which copies; in other trees it is the first.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from paramtree.core.structure import Path, Stack
from paramtree.io.matching import Item, Lookup, is_too_deep

__all__ = ["restack"]

_NESTED = 3  # stacks in stacks whose copies have numbers in one name

Index = tuple[int, ...]


def restack(
    items: Sequence[Item],
    lookup: Lookup,
    shapes: Sequence[Any],
    read: Callable[[Item], Any],
    read_slice: Callable[[Item], Callable[[Any], Any] | None],
) -> list[Item]:
    """Returns the items, stacked or unstacked where only that makes their names match the tree.

    Args:
      items: the arrays of the file.
      lookup: finds leaves of the tree.
      shapes: the shapes of its leaves.
      read: reads an item.
      read_slice: returns the function that reads a slice of an item, if there is one.
    """
    structure = lookup.structure
    stacks = dict(zip(structure.paths, structure.stacks, strict=True)) if structure.stacks else {}
    out: list[Item] = []
    groups: dict[tuple[Path, Index], dict[Index, Item]] = {}
    unnumbered = _unnumbered(lookup, stacks)
    for item in items:
        if any(lookup.find(name, item.loose, positions=False) for name in item.names):
            out.append(item)
        elif copies := _copies(item, unnumbered, lookup, shapes):
            whole = _Once(partial(read, item), len(copies))
            for axes, index, path in copies:
                slices = partial(_slice, whole, read_slice(item), len(item.shape), axes, index)
                shape = shapes[lookup.slot_of[path]]
                out.append(replace(item, names=(".".join(path),), shape=shape, read=slices))
        elif position := _position_in_stack(item, lookup, stacks):
            path, axes, index = position
            groups.setdefault((path, axes), {})[index] = item
        else:
            out.append(item)
    for (path, axes), group in groups.items():
        first = next(iter(group.values()))
        sizes = tuple(max(numbers) + 1 for numbers in zip(*group, strict=True))
        shape = shapes[lookup.slot_of[path]]
        alike = len({(item.shape, item.dtype) for item in group.values()}) == 1
        complete = len(group) == np.prod(sizes) and alike
        if not complete or shape != _inserted(first.shape, axes, sizes):
            out += group.values()
            continue
        layers = [group[index] for index in np.ndindex(sizes)]
        origin = ", ".join(item.origin for item in layers)
        stacked = partial(_stack, read, layers, axes, sizes)
        out.append(replace(first, origin=origin, names=(".".join(path),), shape=shape, read=stacked))
    return out


def _inserted(shape: tuple[int, ...], axes: Index, sizes: Index) -> tuple[int, ...]:
    full = list(shape)
    for axis, size in zip(axes, sizes, strict=True):
        full.insert(axis, size)
    return tuple(full)


class _Once:
    """Reads an array once for several uses, and drops it after the last."""

    def __init__(self, read: Callable[[], Any], uses: int) -> None:
        self._read, self._left, self._array = read, uses, None

    def __call__(self) -> Any:
        array = self._read() if self._array is None else self._array
        self._left -= 1
        self._array = array if self._left > 0 else None
        return array


def _slice(whole: _Once, read_slice: Any, ndim: int, axes: Index, index: Index) -> Any:
    """Returns one copy of a stack, of which nothing else is read if the format can do that."""
    if read_slice is None:
        return np.asarray(np.moveaxis(whole(), axes, range(len(axes)))[index])
    bounds = [slice(None)] * ndim
    for axis, i in zip(axes, index, strict=True):
        bounds[axis] = slice(i, i + 1)
    return np.squeeze(read_slice(tuple(bounds)), axes)


def _stack(read: Callable[[Item], Any], copies: Sequence[Item], axes: Index, sizes: Index) -> Any:
    arrays = np.stack([read(item) for item in copies])
    return np.moveaxis(arrays.reshape(*sizes, *arrays.shape[1:]), range(len(axes)), axes)


def _numbers(words: Sequence[str]) -> Iterator[tuple[Index, Index, list[str]]]:
    """Yields some numbers among words: their places, the numbers, and the words without them."""
    numbers = (word.isascii() and word.isdigit() and len(word) < 7 for word in words[:-1])
    where = [i for i, is_number in enumerate(numbers) if is_number]
    for count in range(1, min(len(where), _NESTED) + 1):
        for places in itertools.combinations(where, count):
            rest = [word for i, word in enumerate(words) if i not in places]
            yield places, tuple(int(words[i]) for i in places), rest


_Unnumbered = dict[str, dict[Index, dict[Index, tuple[Index, Path]]]]


def _unnumbered(lookup: Lookup, stacks: dict[Path, Stack]) -> _Unnumbered:
    """Maps each name without numbers of copies, for each choice of numbers, to the paths of the copies.

    With each path come the axes of the stack that its numbers index.
    """
    names: _Unnumbered = {}
    for path in lookup.slot_of:
        for places, numbers, rest in _numbers(path):
            axes = _axes_among(stacks.get(path, ()), places)
            for sep in "./_":
                copies = names.setdefault(sep.join(rest), {}).setdefault(places, {})
                copies[numbers] = axes, path
    return names


def _copies(
    item: Item, unnumbered: _Unnumbered, lookup: Lookup, shapes: Sequence[Any]
) -> list[tuple[Index, Index, Path]]:
    """Returns the axes, index and path of each copy if the item is a stack, else nothing.

    Where copies of two levels fit and the file does not say which level it stacks, neither is taken.
    """
    for name in item.names:
        fitting = []
        for places, copies in unnumbered.get(name, {}).items():
            sizes = tuple(max(numbers) + 1 for numbers in zip(*copies, strict=True))
            known = None if item.stack is None else _axes(item.stack, places)
            rows = [
                (axes if item.stack is None else known, index, path)
                for index, (axes, path) in copies.items()
            ]
            if len(copies) == np.prod(sizes) and all(
                axes is not None and item.shape == _inserted(shapes[lookup.slot_of[path]], axes, sizes)
                for axes, _, path in rows
            ):
                fitting.append(rows)
        if len(fitting) == 1:
            return fitting[0]  # type: ignore[return-value]  # there are axes
    return []


def _axes(stack: Stack, places: Index) -> Index | None:
    """Returns the axes of a stack that run over the numbers at some places of a path."""
    axes: list[int] = []
    for removed, place in enumerate(places):
        after = axes[-1] if axes else -1
        free = (a for a, (at, _) in enumerate(stack) if a > after and at == place - removed)
        axis = next(free, None)
        if axis is None:
            return None
        axes.append(axis)
    return tuple(axes)


def _axes_among(stack: Stack, places: Index) -> Index:
    """Returns the axes over numbers at some places of a path that is itself that of a stack."""
    return tuple(i + sum(at <= place for at, _ in stack) for i, place in enumerate(places))


def _position_in_stack(
    item: Item, lookup: Lookup, stacks: dict[Path, Stack]
) -> tuple[Path, Index, Index] | None:
    """Returns the path of the stacked leaf that the item is a copy in, with its axes and index."""
    spelled = [(name, "[./]") for name in item.names]
    spelled += [(name, "[./_]") for name in item.names if item.loose]
    guesses: dict[tuple[Path, Index, Index], None] = {}
    for name, seps in spelled:
        if is_too_deep(name):
            continue
        for places, numbers, rest in _numbers(re.split(seps, name)):
            path = lookup.find(".".join(rest), item.loose)
            if path is None:
                continue
            if stack := stacks.get(path):
                axes = _axes(stack, places)
                if axes is not None:
                    return path, axes, numbers
            elif path == lookup.find(".".join(rest), item.loose, positions=False):
                guesses[path, _axes_among(item.stack or (), places), numbers] = None
    # Where the tree does not say which level it stacks, two levels may fit: neither is taken.
    return next(iter(guesses)) if len(guesses) == 1 else None
