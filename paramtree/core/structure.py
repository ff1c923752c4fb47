"""The static half of a parameter tree: which paths there are, and which stored leaf each leads to.

A structure is flat. It lists the path of every leaf in depth-first declaration order, and beside
each path the *slot* it leads to, which is a position in the tree's tuple of leaves. That one list
carries everything a tree must never lose:

* order, because it is a sequence and not a dict that someone may sort;
* ties, because two paths may lead to one slot;
* kinds, one a slot;
* levels that hold nothing, as a path that ends in ``EMPTY``;
* holes, as a path that ends in ``HOLE``; a structure with holes remembers the whole one it came from.

Structures are interned: equal ones are one object. So they compare and hash by identity, at the
speed of a pointer, when jax looks up a compiled function, and ``tree_map(identity)`` gives back
the very same structure. Interning is weak, so a structure dies with the last tree that uses it.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from paramtree.core.errors import NameCollisionError

__all__ = [
    "EMPTY",
    "HOLE",
    "PARAM",
    "STATE",
    "Node",
    "Path",
    "Structure",
    "build",
    "build_flat",
    "picker",
]

Path = tuple[str, ...]
Picker = Callable[[Sequence[Any]], tuple[Any, ...]]

EMPTY = -1  # the path is that of a level without children
HOLE = -2  # the path is that of a leaf which select or partition left out
PARAM, STATE = "param", "state"

_interned: "weakref.WeakValueDictionary[Hashable, Structure]" = weakref.WeakValueDictionary()
_lock = threading.RLock()  # two threads that build one structure must get one object


class Node:
    """One level of a structure: child names in order, each with its slot, hole or deeper level.

    ``start`` and ``stop`` delimit the entries of ``Structure.paths`` that lie below the level.
    """

    __slots__ = ("children", "path", "start", "stop")

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self.children: dict[str, Node | int] = {}
        self.start = start
        self.stop = start


class Structure:
    """An interned, hashable description of a tree; the auxiliary data of its pytree node.

    Made by ``build`` or ``intern``, never by the constructor.

    Attributes:
      paths: the path of every entry, depth first, in declaration order.
      slots: for every entry the position of its leaf, or ``EMPTY`` or ``HOLE``. Slots are numbered
        by first appearance, so the first path of a slot is its canonical one.
      kinds: ``"param"`` or ``"state"`` for every slot.
      whole: the structure without holes that this one was taken from; itself if it has none.
      kept: the slots of ``whole`` that are here, in order.
      cache: what other rooms computed for this structure; it dies with it.
    """

    __slots__ = (
        "__weakref__",
        "_canonical",
        "_parts",
        "_root",
        "cache",
        "kept",
        "kinds",
        "paths",
        "slots",
        "whole",
    )

    paths: tuple[Path, ...]
    slots: tuple[int, ...]
    kinds: tuple[str, ...]
    whole: "Structure"
    kept: tuple[int, ...]
    cache: dict[Hashable, Any]
    _root: Node | None
    _canonical: tuple[Path, ...] | None
    _parts: "weakref.WeakValueDictionary[tuple[int, ...], Structure]"

    @staticmethod
    def intern(paths: tuple[Path, ...], slots: tuple[int, ...], kinds: tuple[str, ...]) -> "Structure":
        """Returns the one structure without holes that has these entries."""
        key = (paths, slots, kinds)
        with _lock:
            found = _interned.get(key)
            if found is None:
                found = _interned[key] = Structure._make(paths, slots, kinds)
        return found

    @staticmethod
    def _make(paths: tuple[Path, ...], slots: tuple[int, ...], kinds: tuple[str, ...]) -> "Structure":
        made = Structure()
        made.paths, made.slots, made.kinds = paths, slots, kinds
        made.whole, made.kept = made, tuple(range(len(kinds)))
        made.cache = {}
        made._root, made._canonical = None, None
        # Not in the table of all: its key would keep the whole alive for as long as a part, and the
        # whole's cache holds parts.
        made._parts = weakref.WeakValueDictionary()
        return made

    def keep(self, kept: Iterable[int]) -> "Structure":
        """Returns this structure with holes in place of every slot that is not in ``kept``."""
        whole = self.whole
        kept = tuple(self.kept[slot] for slot in kept)
        if len(kept) == len(whole.kinds):
            return whole
        with _lock:
            found = whole._parts.get(kept)
            if found is None:
                position = {slot: i for i, slot in enumerate(kept)}
                slots = tuple(s if s == EMPTY else position.get(s, HOLE) for s in whole.slots)
                found = Structure._make(whole.paths, slots, tuple(whole.kinds[s] for s in kept))
                found.whole, found.kept = whole, kept
                whole._parts[kept] = found
        return found

    @property
    def root(self) -> Node:
        """The nested levels, for reading by name."""
        if self._root is None:
            self._root = _nest(self.paths, self.slots)
        return self._root

    @property
    def canonical(self) -> tuple[Path, ...]:
        """The first path of every slot, in the order of the slots."""
        if self._canonical is None:
            first: dict[int, Path] = {}
            for path, slot in zip(self.paths, self.slots, strict=True):
                if slot >= 0:
                    first.setdefault(slot, path)
            self._canonical = tuple(first[slot] for slot in range(len(self.kinds)))
        return self._canonical

    def entries(self, node: Node | None = None) -> Iterable[tuple[Path, int]]:
        """Returns the path and slot of every leaf that is here, aliases too, below ``node``."""
        start, stop = (0, len(self.paths)) if node is None else (node.start, node.stop)
        both = zip(self.paths[start:stop], self.slots[start:stop], strict=True)
        if (
            min(self.slots[start:stop], default=0) >= 0
        ):  # mostly, and then Python takes no step for each
            return both
        return ((path, slot) for path, slot in both if slot >= 0)

    def below(self, node: Node) -> tuple["Structure", "Picker"]:
        """Returns the structure of one level by itself, and what takes its leaves out of these."""
        key = ("below", node.path)
        if key not in self.cache:
            depth, whole = len(node.path), self.whole
            span = slice(node.start, node.stop)
            items = [
                (path[depth:], None if slot == EMPTY else slot)
                for path, slot in zip(whole.paths[span], whole.slots[span], strict=True)
            ]
            structure, order = build(items, whole.kinds)
            if whole is not self:
                position = {slot: i for i, slot in enumerate(self.kept)}
                kept = [i for i, slot in enumerate(order) if slot in position]
                structure, order = structure.keep(kept), tuple(position[order[i]] for i in kept)
            self.cache[key] = structure, picker(order)
        found: tuple[Structure, Picker] = self.cache[key]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        if self.whole is self:
            return Structure.intern, (self.paths, self.slots, self.kinds)
        return Structure.keep, (self.whole, self.kept)

    def __copy__(self) -> "Structure":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Structure":
        return self

    def __repr__(self) -> str:
        # jax prints this inside its own messages about mismatched trees.
        first = ["/".join(path) for path in self.canonical]
        shown = []
        for path, slot in zip(self.paths, self.slots, strict=True):
            text = "/".join(path)
            if slot == EMPTY:
                text += "/"
            elif slot == HOLE:
                text += "=hole"
            elif first[slot] != text:
                text += f"={first[slot]}"
            if slot >= 0 and self.kinds[slot] != PARAM:
                text += f":{self.kinds[slot]}"
            shown.append(text)
        return f"({', '.join(shown)})"


def build(
    items: Iterable[tuple[Path, Hashable]], kinds: Mapping[Any, str] | Sequence[str]
) -> tuple[Structure, tuple[Any, ...]]:
    """Returns the structure of some paths, and the label of each of its slots in order.

    Args:
      items: paths in order of declaration, which need not be depth first, each with a label. Two
        paths with one label are tied; the label None stands for a level that may hold nothing.
      kinds: the kind of every label.

    Raises:
      NameCollisionError: a path is given twice, or goes on below a leaf.
    """
    top: dict[str, Any] = {}
    for path, label in items:
        level = top
        for segment in path if label is None else path[:-1]:
            level = level.setdefault(segment, {})
            if type(level) is not dict:
                raise _clash(path)
        if label is not None:
            if path[-1] in level:
                raise _clash(path)
            level[path[-1]] = (label, tuple(path))
    paths: list[Path] = []
    slots: list[int] = []
    slot_of: dict[Any, int] = {}
    # An explicit stack: depth is not limited by Python's.
    stack: list[tuple[str, Iterator[tuple[str, Any]]]] = [("", iter(top.items()))]
    while stack:
        _, children = stack[-1]
        for name, child in children:
            if type(child) is not dict:
                paths.append(child[1])
                slots.append(slot_of.setdefault(child[0], len(slot_of)))
            elif child:
                stack.append((name, iter(child.items())))
                break
            else:
                paths.append((*(above for above, _ in stack[1:]), name))
                slots.append(EMPTY)
        else:
            stack.pop()
    order = tuple(slot_of)
    structure = Structure.intern(tuple(paths), tuple(slots), tuple(kinds[label] for label in order))
    return structure, order


def build_flat(names: Sequence[str], slots: Sequence[int], kinds: Sequence[str]) -> Structure:
    """Returns the structure of one level of leaves that are not tied; ``build`` would return the same.

    Args:
      names: their names, no two alike.
      slots: where the kind of each is.
      kinds: kinds.
    """
    return Structure.intern(
        tuple(zip(names, strict=True)), tuple(range(len(names))), tuple(kinds[slot] for slot in slots)
    )


def picker(order: Sequence[int]) -> Picker:
    """Returns a function that takes the values at some positions, without a step of Python for each."""
    if len(order) < 2:
        return lambda values: tuple(values[i] for i in order)
    step = order[1] - order[0]
    if order[0] >= 0 and step > 0 and tuple(order) == tuple(range(order[0], order[-1] + 1, step)):
        span = slice(order[0], order[-1] + 1, step)
        return lambda values: tuple(values[span])
    return itemgetter(*order)


def _clash(path: Path) -> NameCollisionError:
    text = "/".join(path)
    return NameCollisionError(
        f"`{text}` is given twice, or is a leaf and also holds children. Every path leads to one "
        "leaf or to one level: rename one of the two."
    )


def _nest(paths: tuple[Path, ...], slots: tuple[int, ...]) -> Node:
    root = Node(())
    stack = [root]
    for i, (path, slot) in enumerate(zip(paths, slots, strict=True)):
        level = path if slot == EMPTY else path[:-1]
        if stack[-1].path != level:
            while stack[-1].path != level[: len(stack) - 1]:
                stack.pop().stop = i
            for segment in level[len(stack) - 1 :]:
                node = Node((*stack[-1].path, segment), i)
                stack[-1].children[segment] = node
                stack.append(node)
        if slot != EMPTY:
            stack[-1].children[path[-1]] = slot
    for node in stack:
        node.stop = len(paths)
    return root
