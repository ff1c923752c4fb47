"""The static half of a parameter tree: its paths, and the stored leaf that each leads to.

A structure is flat. It lists the path of every leaf in depth-first declaration order, each with a
*slot*: a position in the tree's tuple of leaves. The list carries all that a tree must never lose:

* order, because it is a sequence, not a dict that may be sorted;
* ties, because two paths may lead to one slot;
* kinds, one for each slot;
* stacks: which leading axes of a leaf run over copies of a layer, as ``nn.Repeat`` makes them;
* levels without children, as paths that end in ``EMPTY``;
* holes, as paths that end in ``HOLE``; a structure with holes remembers the full one it came from.

Equal structures are one object, so jax compares and hashes them by identity at every jitted call. A
structure is freed with the last tree that uses it.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from paramtree.core.errors import NameCollisionError

__all__ = [
    "EMPTY", "HOLE", "PARAM", "STATE", "Path", "Picker", "Stack", "Structure", "build", "clash",
    "moved", "picker",
]  # fmt: skip

Path = tuple[str, ...]
Picker = Callable[[Sequence[Any]], tuple[Any, ...]]

# The leading axes of a leaf that run over copies of a layer. For each, the position in the path where
# the index of a copy would go if the copies had names of their own, and the number of copies.
Stack = tuple[tuple[int, int], ...]

EMPTY = -1  # the path is that of a level without children
HOLE = -2  # the path is that of a leaf that select or partition left out
PARAM, STATE = "param", "state"

_CACHED = 64  # results per structure

_interned: "weakref.WeakValueDictionary[Hashable, Structure]" = weakref.WeakValueDictionary()
_lock = threading.RLock()  # two threads that build equal structures must get one object


class Structure:
    """An interned, hashable description of a tree; the auxiliary data of its pytree node.

    Made by ``build`` or ``intern``, never by the constructor.

    Attributes:
      paths: the path of every entry, depth first, in declaration order.
      slots: for every entry the position of its leaf, or ``EMPTY`` or ``HOLE``. Slots are numbered
        by first appearance, so the first path of a slot is its canonical one.
      kinds: ``"param"`` or ``"state"`` for every slot.
      stacks: the stack of every entry; an empty tuple if nothing is stacked.
      full: the structure without holes that this one was taken from; itself if it has none.
      kept: the slots of ``full`` that are present, in order.
    """

    __slots__ = ("__weakref__", "_cache", "_canonical", "_children", "_complete", "_holed", "full",
                 "kept", "kinds", "paths", "slots", "stacks")  # fmt: skip

    def __init__(self, paths: Any, slots: Any, kinds: Any, stacks: Any) -> None:
        self.paths: tuple[Path, ...] = paths
        self.slots: tuple[int, ...] = slots
        self.kinds: tuple[str, ...] = kinds
        self.stacks: tuple[Stack, ...] = stacks
        self.full, self.kept = self, tuple(range(len(kinds)))
        self._complete = min(slots, default=0) >= 0  # then Python takes no step per leaf
        self._cache: dict[Hashable, Any] = {}
        self._children: dict[str, Any] | None = None
        self._canonical: tuple[Path, ...] | None = None
        # Structures with holes. In the global table, their keys would keep the full structure alive.
        self._holed: weakref.WeakValueDictionary[Any, Structure] = weakref.WeakValueDictionary()

    @staticmethod
    def intern(paths: Any, slots: Any, kinds: Any, stacks: Any = ()) -> "Structure":
        """Returns the one structure without holes that has these entries."""
        key = (paths, slots, kinds, stacks if any(stacks) else ())
        with _lock:
            structure = _interned.get(key)
            if structure is None:
                structure = _interned[key] = Structure(*key)
        return structure

    def keep(self, kept: Iterable[int]) -> "Structure":
        """Returns this structure with holes in place of every slot that is not in ``kept``."""
        full = self.full
        kept = tuple(self.kept[slot] for slot in kept)
        if len(kept) == len(full.kinds):
            return full
        with _lock:
            holed = full._holed.get(kept)
            if holed is None:
                position = {slot: i for i, slot in enumerate(kept)}
                slots = tuple(s if s == EMPTY else position.get(s, HOLE) for s in full.slots)
                slot_kinds = tuple(full.kinds[slot] for slot in kept)
                holed = full._holed[kept] = Structure(full.paths, slots, slot_kinds, full.stacks)
                holed.full, holed.kept = full, kept
        return holed

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns the cached result of ``make``; the oldest results make room for new ones."""
        try:
            return self._cache[key]
        except KeyError:
            value = make()
        with _lock:
            while len(self._cache) >= _CACHED:
                del self._cache[next(iter(self._cache))]
            return self._cache.setdefault(key, value)

    @property
    def canonical(self) -> tuple[Path, ...]:
        """The first path of every slot, in the order of the slots."""
        if self._canonical is None:
            first: dict[int, Path] = {}
            for path, slot in self.entries():
                first.setdefault(slot, path)
            self._canonical = tuple(first[slot] for slot in range(len(self.kinds)))
        return self._canonical

    def entries(self) -> Iterable[tuple[Path, int]]:
        """Returns the path and slot of every leaf that is present, including aliases."""
        pairs = zip(self.paths, self.slots, strict=True)
        return pairs if self._complete else ((path, slot) for path, slot in pairs if slot >= 0)

    def names(self, sep: str = "_") -> tuple[str, ...]:
        """Returns the name of every leaf that is present, in the order of ``entries``."""
        paths = self.paths if self._complete else (path for path, _ in self.entries())
        return self.cached(("names", sep), lambda: tuple(map(sep.join, paths)))

    def slots_by_path(self) -> dict[str, int]:
        """Returns the slot of every leaf that is present, by path, such as "dense0/weight"."""
        make = lambda: {"/".join(path): slot for path, slot in self.entries()}  # noqa: E731
        return self.cached("slots by path", make)

    def stack_of(self, slot: int) -> Stack:
        """Returns the stack of a slot at its canonical path."""
        make = lambda: dict(zip(reversed(self.slots), reversed(self.stacks), strict=True))  # noqa: E731
        return self.cached("stacks", make)[slot] if self.stacks else ()

    def children(self) -> dict[str, Any]:
        """Returns the children in order: slots, holes, and what ``level`` makes a level of."""
        if self._children is None:
            children: dict[str, Any] = {}
            for i, (path, slot) in enumerate(zip(self.paths, self.slots, strict=True)):
                if len(path) == 1 and slot != EMPTY:
                    children[path[0]] = slot
                else:  # entries are depth first, so those below a level are contiguous
                    start = children[path[0]].start if path[0] in children else i
                    children[path[0]] = slice(start, i + 1)
            self._children = children
        return self._children

    def level(self, name: str) -> tuple["Structure", Picker]:
        """Returns the structure of a child level, and a function that takes its leaves."""
        child = self.children()[name]
        if type(child) is slice:
            full, slots = self.full, dict[int, int]()
            below = [i for i in range(child.start, child.stop) if len(full.paths[i]) > 1]
            structure = Structure.intern(
                tuple(full.paths[i][1:] for i in below),
                tuple(s if s == EMPTY else slots.setdefault(s, len(slots))
                      for s in (full.slots[i] for i in below)),
                tuple(full.kinds[slot] for slot in slots),
                tuple(moved(full.stacks[i], -1) for i in below) if full.stacks else (),
            )  # fmt: skip
            position = {slot: i for i, slot in enumerate(self.kept)}
            kept = [i for i, slot in enumerate(slots) if slot in position]
            taken = [position[slot] for slot in slots if slot in position]
            child = self.children()[name] = structure.keep(kept), picker(taken)
        return child

    def __reduce__(self) -> tuple[Any, ...]:
        if self.full is self:
            return Structure.intern, (self.paths, self.slots, self.kinds, self.stacks)
        return Structure.keep, (self.full, self.kept)

    def __copy__(self) -> "Structure":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Structure":
        return self

    def __repr__(self) -> str:
        # jax prints this in its own messages about trees that do not match.
        shown = []
        for i, (path, slot) in enumerate(zip(self.paths, self.slots, strict=True)):
            stack = "".join(f"[{size}]" for _, size in self.stacks[i]) if self.stacks else ""
            first = self.canonical[slot] if slot >= 0 else path
            state = ":state" if slot >= 0 and self.kinds[slot] == STATE else ""
            end = {EMPTY: "/", HOLE: "=hole"}.get(slot, state)
            end = end if first == path else f"={'/'.join(first)}"
            shown.append("/".join(path) + stack + end)
        return f"({', '.join(shown)})"


def moved(stack: Stack, by: int) -> Stack:
    """Returns the stack of a path that gains (or loses) segments at its beginning."""
    return tuple((max(0, position + by), size) for position, size in stack)


def build(
    items: Iterable[tuple[Path, Hashable]],
    kinds: Mapping[Any, str] | Sequence[str],
    stacks: Mapping[Path, Stack] | None = None,
) -> tuple[Structure, tuple[Any, ...]]:
    """Returns the structure of some paths, and the label of each of its slots in order.

    Args:
      items: paths in order of declaration, not necessarily depth first, each with a label. Two paths
        with one label are tied; the label None marks a level, which may have no children.
      kinds: the kind of every label.
      stacks: the stacks of the paths that have any.

    Raises:
      NameCollisionError: a path is given twice, or continues below a leaf.
    """
    top: dict[str, Any] = {}
    for path, label in items:
        level = top
        for segment in path if label is None else path[:-1]:
            level = level.setdefault(segment, {})
            if type(level) is not dict:
                raise clash(path)
        if label is not None:
            if path[-1] in level:
                raise clash(path)
            level[path[-1]] = (label, tuple(path))
    paths: list[Path] = []
    slots: list[int] = []
    slot_of: dict[Any, int] = {}
    # An explicit stack: depth is not limited by Python's recursion.
    todo: list[tuple[str, Iterator[tuple[str, Any]]]] = [("", iter(top.items()))]
    while todo:
        _, children = todo[-1]
        for name, child in children:
            if type(child) is not dict:
                paths.append(child[1])
                slots.append(slot_of.setdefault(child[0], len(slot_of)))
            elif child:
                todo.append((name, iter(child.items())))
                break
            else:
                paths.append((*(above for above, _ in todo[1:]), name))
                slots.append(EMPTY)
        else:
            todo.pop()
    by_entry = tuple(stacks.get(path, ()) for path in paths) if stacks else ()
    order = tuple(slot_of)
    slot_kinds = tuple(kinds[label] for label in order)
    return Structure.intern(tuple(paths), tuple(slots), slot_kinds, by_entry), order


def picker(order: Sequence[int]) -> Picker:
    """Returns a function that takes the values at some positions, with no step of Python per value."""
    if len(order) < 2:
        return lambda values: tuple(values[i] for i in order)
    step = order[1] - order[0]
    if order[0] >= 0 and step > 0 and tuple(order) == tuple(range(order[0], order[-1] + 1, step)):
        span = slice(order[0], order[-1] + 1, step)
        return lambda values: tuple(values[span])
    return itemgetter(*order)


def clash(path: Path) -> NameCollisionError:
    """Returns the error for a path that is taken."""
    return NameCollisionError(
        f"`{'/'.join(path)}` is given twice, or is a leaf and also has children. Every path leads to "
        "one leaf or to one level: rename one of the two."
    )
