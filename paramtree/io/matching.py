"""Which leaf of a tree each array of a file belongs to.

Names are tried as they are: joined with ".", "/" or "_", and with the position of a layer in place
of its name, as in ``0.weight``. Gluon counts layers in the whole process and puts the name of the
network first, so its names, such as ``net_dense7_weight``, may also go by their order.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from paramtree.core.arrays import join
from paramtree.core.errors import RuleError, close_names
from paramtree.core.names import compiled, no_match
from paramtree.core.structure import Node, Path, Structure

__all__ = ["Item", "Lookup", "Rename", "rename_all"]

Rename = Sequence[tuple[Any, str | None]] | Callable[[str], str | None]


class Item(NamedTuple):
    """An array on its way into a tree.

    ``names`` are all that it has, more than one where the file knows of ties; ``origin`` is what the
    file calls it. ``read`` is None for what the source reads, else it returns the array.
    """

    origin: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], Any] | None = None


def rename_all(items: Iterable[Item], rename: Rename | None) -> list[Item]:
    """Returns the items with their names rewritten; what is renamed to None is left out.

    Raises:
      RuleError: a pattern changes nothing, or is none.
      TypeError: ``rename`` is neither pairs nor a function, or gives something else than names.
    """
    items = list(items)
    if rename is None:
        return items
    if callable(rename):
        change = rename
    else:
        change = _by_pairs(rename, [name for item in items for name in item.names])
    out = []
    for item in items:
        names = [change(name) for name in item.names]
        if wrong := [name for name in names if not isinstance(name, str | None)]:
            raise TypeError(f"rename gives {wrong[0]!r} for `{item.origin}`; expected a name or None.")
        kept = tuple(dict.fromkeys(name for name in names if name is not None))
        if kept:
            out.append(item._replace(names=kept))
    return out


def _by_pairs(pairs: Any, names: Sequence[str]) -> Callable[[str], str | None]:
    try:
        table = [(compiled(pattern), to) for pattern, to in pairs]
    except (TypeError, ValueError) as error:
        if isinstance(error, RuleError):
            raise
        raise TypeError(
            f"rename is a list of pairs (pattern, replacement), or a function of a name, not {pairs!r}."
        ) from None
    unused = dict(enumerate(pattern for pattern, _ in table))

    def change(name: str) -> str | None:
        for i, (pattern, to) in enumerate(table):
            if pattern.search(name):
                unused.pop(i, None)
                if to is None:
                    return None
                try:
                    name = pattern.sub(to, name)
                except (re.error, IndexError) as error:
                    raise RuleError(
                        f"rename: {to!r} cannot replace {pattern.pattern!r}: {error}."
                    ) from None
        return name

    known = {name: change(name) for name in names}
    if unused:
        problems = "; ".join(no_match(f".*({pattern.pattern}).*", names) for pattern in unused.values())
        raise RuleError(
            f"rename: {problems}. The patterns are searched for in the names of the file, each in what "
            "the ones before it made of a name."
        )
    return known.__getitem__


class Lookup:
    """Finds the path that a name of a file leads to in a structure."""

    def __init__(self, structure: Structure, sep: str) -> None:
        self.structure = structure
        self.slot_of = dict(structure.entries())
        self._spelled: dict[str, Path | None] = {}
        for by in dict.fromkeys((sep, ".", "/", "_")):  # what the file itself joins with goes first
            here: dict[str, Path | None] = {}
            for path in self.slot_of:
                spelling = join(path, by)
                here[spelling] = None if spelling in here else path  # two alike mean neither
            self._spelled = {**here, **self._spelled}

    def find(self, name: str) -> Path | None:
        """Returns the path of a leaf, or None."""
        if name in self._spelled:
            return self._spelled[name]
        return self._by_position(re.split("[./]", name))

    def _by_position(self, parts: Sequence[str]) -> Path | None:
        found: Node | int = self.structure.root
        path = []
        for part in parts:
            if not isinstance(found, Node):
                return None
            if part not in found.children and part.isascii() and part.isdigit() and len(part) < 10:
                part = dict(enumerate(found.children)).get(int(part), part)
            if part not in found.children:
                return None
            found = found.children[part]
            path.append(part)
        return tuple(path) if tuple(path) in self.slot_of else None

    def assign(
        self, items: Sequence[Item], shapes: Sequence[Any], ordered: bool, nameless: bool
    ) -> list[list[Path]]:
        """Returns for every item the paths that its names lead to.

        Args:
          items: what is to be placed.
          shapes: the shape of each leaf.
          ordered: names may go by their order where they lead nowhere, as Gluon's do.
          nameless: names say nothing, only the order does.
        """
        ways = [lambda name: name, *(_GLUON if ordered else ())]
        if not nameless:
            prefix = _common_prefix([name for item in items for name in item.names]) if ordered else ""
            if prefix:
                ways.append(lambda name: name.removeprefix(prefix))
            tried = [self._by(way, items) for way in ways]
            for paths in tried:
                if all(paths):
                    return paths
        if ordered and (paths := self._by_order(items, shapes, nameless)):
            return paths
        if nameless:
            return [[] for _ in items]
        return max(tried, key=lambda paths: sum(map(bool, paths)))

    def _by(self, way: Callable[[str], str], items: Sequence[Item]) -> list[list[Path]]:
        return [[path for name in item.names if (path := self.find(way(name)))] for item in items]

    def _by_order(
        self, items: Sequence[Item], shapes: Sequence[Any], nameless: bool
    ) -> list[list[Path]]:
        """Returns the paths in order if that fits: as many, of the same shapes and last names."""
        for paths in (self.structure.canonical, tuple(self.slot_of)):
            if len(paths) == len(items) and all(
                nameless
                or (item.names[0].endswith("_" + path[-1]) and shapes[self.slot_of[path]] == item.shape)
                for item, path in zip(items, paths, strict=True)
            ):
                return [[path] for path in paths]
        return []


def _common_prefix(names: Sequence[str]) -> str:
    """Returns what all names begin with, up to an underscore: the name of a whole network."""
    low, high = min(names, default=""), max(names, default="")
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: low.rfind("_", 0, same) + 1]


def _unfused(name: str) -> str:
    """Returns a recurrent layer's name for what Gluon's files call by the cells that it stands for."""
    return re.sub(
        r"(?:_unfused\.)(\d+)\.(?:([lr])_cell\.)?(?=[ih]2h_)",
        lambda found: f"{found[2] or 'l'}{found[1]}_",
        name,
    )


_GLUON = (_unfused,)


def closest(name: str, shape: tuple[int, ...] | None, items: Mapping[str, Item]) -> str:
    """Returns the name of the array that is most like a missing leaf, or nothing."""
    near = close_names(name, [n for n in items if items[n].shape == shape]) if shape else []
    near = near or close_names(name, list(items))
    return near[0] if near else ""
