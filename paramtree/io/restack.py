"""Checkpoints of layers that are stacked, for trees where they are not, and the other way round.

``blocks.weight`` with a first axis of twelve holds what ``blocks.0.weight`` to ``blocks.11.weight``
hold. A file of either form loads into a tree of either; see ``pt.stack`` and ``pt.unstack``.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from paramtree.core.structure import Path
from paramtree.io.matching import Item, Lookup

__all__ = ["restack"]


def restack(
    items: Sequence[Item], lookup: Lookup, shapes: Sequence[Any], read: Callable[[Item], Any]
) -> list[Item]:
    """Returns the items in the form of the tree: what leads nowhere as it is, but would if it were
    a stack, or a part of one, is one.

    Args:
      items: what the file has.
      lookup: finds the leaves of the tree.
      shapes: the shape of each leaf.
      read: reads an item.
    """
    out: list[Item] = []
    parts: dict[Path, dict[int, Item]] = {}
    numbered = _without_numbers(lookup)
    for item in items:
        if any(lookup.find(name) for name in item.names):
            out.append(item)
        elif copies := _copies(item, numbered, lookup, shapes):
            out += [
                item._replace(
                    names=(".".join(path),), shape=item.shape[1:], read=partial(_part, read, item, i)
                )
                for i, path in enumerate(copies)
            ]
        elif at := _place(item, lookup):
            path, number = at
            parts.setdefault(path, {})[number] = item
        else:
            out.append(item)
    for path, group in parts.items():
        shape = shapes[lookup.slot_of[path]]
        first = group.get(0)
        alike = first is not None and all(
            i.shape == first.shape and i.dtype == first.dtype for i in group.values()
        )
        if (
            first is None
            or not alike
            or set(group) != set(range(len(group)))
            or shape != (len(group), *first.shape)
        ):
            out += group.values()
            continue
        members = [group[i] for i in range(len(group))]
        origin = ", ".join(item.origin for item in members)
        whole = partial(_whole, read, members)
        out.append(first._replace(origin=origin, names=(".".join(path),), shape=shape, read=whole))
    return out


def _part(read: Callable[[Item], Any], item: Item, i: int) -> Any:
    return read(item)[i]


def _whole(read: Callable[[Item], Any], copies: Sequence[Item]) -> Any:
    return np.stack([read(item) for item in copies])


def _without_numbers(lookup: Lookup) -> dict[str, dict[int, Path]]:
    """Returns for each name, with the number of a copy taken out, the paths of the copies."""
    found: dict[str, dict[int, Path]] = {}
    for path in lookup.slot_of:
        for i, segment in enumerate(path[:-1]):
            if _is_number(segment):
                rest = path[:i] + path[i + 1 :]
                for sep in "./_":
                    found.setdefault(sep.join(rest), {})[int(segment)] = path
    return found


def _copies(
    item: Item, numbered: dict[str, dict[int, Path]], lookup: Lookup, shapes: Sequence[Any]
) -> list[Path]:
    """Returns the paths that the parts of an item belong to, if it is a stack of all of them."""
    for name in item.names:
        paths = numbered.get(name, {})
        whole = item.shape[:1] == (len(paths),) and set(paths) == set(range(len(paths)))
        if paths and whole and all(shapes[lookup.slot_of[p]] == item.shape[1:] for p in paths.values()):
            return [paths[i] for i in range(len(paths))]
    return []


def _place(item: Item, lookup: Lookup) -> tuple[Path, int] | None:
    """Returns the path of the leaf that would be the stack of an item and others, and its number."""
    for name in item.names:
        words = re.split("[./]", name)
        for i, word in enumerate(words[:-1]):
            if _is_number(word) and (path := lookup.find(".".join(words[:i] + words[i + 1 :]))):
                return path, int(word)
    return None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 7
