"""What is at which path of a tree, whatever the tree is made of.

A parameter tree, a dict, an optimiser's state with parameter trees inside of it: each is put down as
one dictionary from paths to leaves, with what there is to know of them, so that any two trees can be
compared path by path.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from paramtree.core.arrays import describe, short
from paramtree.core.errors import NameCollisionError
from paramtree.core.names import key_segments
from paramtree.core.structure import EMPTY, HOLE, Path
from paramtree.core.tree import ParamTree, whole

__all__ = ["LEFT_OUT", "LEVEL", "Contents", "Entry"]


class Sign:
    """What stands where there is no leaf."""

    def __init__(self, text: str) -> None:
        self.text = text


LEVEL, LEFT_OUT = Sign("a level that holds nothing"), Sign("a hole")


class Entry(NamedTuple):
    """What is at a path."""

    leaf: Any  # or a sign
    kind: str | None  # None where leaves have no kinds
    owner: Path  # the first path that leads to the leaf

    @property
    def there(self) -> bool:
        """Whether it is a leaf."""
        return not isinstance(self.leaf, Sign)

    def __str__(self) -> str:
        return describe(self.leaf) if self.there else self.leaf.text


class Container(NamedTuple):
    """What holds the entries below a path."""

    type: type
    keys: list[Path]
    form: Any  # what jax knows of it, without what it holds; None for a parameter tree


_Item = tuple[Path, Any, str | None, Path | None]  # a path, what is there, its kind and its owner


class Contents:
    """What is at which path of a tree, in order, and what holds it."""

    def __init__(self, tree: Any) -> None:
        self.entries: dict[Path, Entry] = {}
        self.containers: dict[Path, Container] = {}
        stack: list[_Item] = [((), tree, None, None)]
        while stack:
            path, value, kind, owner = stack.pop()
            if value is None:  # what other containers hold where a leaf is left out
                value = LEFT_OUT
            below = self._below(path, value)
            if below is None:
                path = path or ("value",)  # a leaf by itself
                if path in self.entries:
                    shown = short("/".join(path), 200)
                    raise NameCollisionError(
                        f"two leaves have one path, {shown}, and trees are compared by path: rename "
                        "one of them."
                    )
                self.entries[path] = Entry(value, kind, owner or path)
            elif below:
                stack.extend(reversed(below))
            elif path:
                stack.append((path, LEVEL, None, None))

    def _below(self, path: Path, value: Any) -> list[_Item] | None:
        """Returns what a container holds, with paths from the top; None for a leaf."""
        if isinstance(value, ParamTree):
            self.containers[path] = Container(type(value), [], None)
            tree = whole(value)
            here, full = tree._structure, tree._structure.whole
            first = full.canonical
            leaves = {**dict(enumerate(tree._leaves)), HOLE: LEFT_OUT}
            entries = zip(full.paths, full.slots, here.slots, strict=True)
            return [
                ((*path, *entry), LEVEL, None, None)
                if slot == EMPTY
                else ((*path, *entry), leaves[now], full.kinds[slot], (*path, *first[slot]))
                for entry, slot, now in entries
            ]
        if isinstance(value, jax.Array | np.ndarray | Sign) or jax.tree_util.all_leaves([value]):
            return None
        flat, form = jax.tree_util.tree_flatten_with_path(
            value, is_leaf=lambda below: below is not value
        )
        keys = [key_segments(key_path) for key_path, _ in flat]
        self.containers[path] = Container(type(value), keys, form)
        return [((*path, *key), below, None, None) for key, (_, below) in zip(keys, flat, strict=True)]
