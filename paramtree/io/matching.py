"""Matching the arrays of a file to the leaves of a tree.

A name matches a path joined with ".", "/" or "_", or one with positions in place of layer names, as in
``0.weight``. Gluon numbers layers per process and prefixes the name of the network, so its names, such
as ``net_dense7_weight``, are also matched by order.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paramtree.core.arrays import join
from paramtree.core.errors import RuleError, close_names
from paramtree.core.rules import compiled, pattern_text, sep_of
from paramtree.core.structure import Path, Stack, Structure
from paramtree.io.layout import DEEPEST
from paramtree.verbs.restructure import rewriter

__all__ = ["Item", "Lookup", "Rename", "closest", "is_too_deep", "name_pattern", "rename_all"]

_PARALLEL = "module."  # what PyTorch's DataParallel puts before every name

Rename = Sequence[tuple[Any, str | None]] | Callable[[str], str | None]


@dataclass(slots=True)  # frozen, it would take three times as long to make
class Item:
    """An array on its way into a tree.

    ``names`` are all its names, several if the file records ties; ``origin`` is its name in the file.
    ``read`` returns the array; None means that the source reads it. ``stack`` is that of the first
    name; None means that the file does not say. ``loose`` says that levels in the names may be joined
    with "_" in places, as in those that a transform made.
    """

    origin: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], Any] | None = None
    stack: Stack | None = None
    loose: bool = False


def rename_all(items: Iterable[Item], rename: Rename | None) -> list[Item]:
    """Returns the items with their names rewritten, without those renamed to None.

    Raises:
      RuleError: a pattern is not a regular expression, or matches no name.
      TypeError: ``rename`` is neither pairs nor a function, or returns something other than a name.
    """
    items = list(items)
    if rename is None:
        return items
    every = [name for item in items for name in item.names]
    change = rename if callable(rename) else rewriter(rename, every, "rename")
    out = []
    for item in items:
        names = [change(name) for name in item.names]
        if wrong := [name for name in names if not isinstance(name, str | None)]:
            raise TypeError(f"rename returned {wrong[0]!r} for `{item.origin}`, not a name or None.")
        kept = tuple(dict.fromkeys(name for name in names if name is not None))
        if kept:
            out.append(replace(item, names=kept, stack=item.stack if kept == item.names else None))
    return out


def name_pattern(pattern: Any) -> tuple[re.Pattern[str], str]:
    """Returns a compiled pattern, and what joins the segments of the names that it matches.

    Raises:
      RuleError: it is not a regular expression in a string.
    """
    if callable(pattern):
        raise RuleError(
            f"{pattern_text(pattern)} cannot select arrays of a file, which are read later: use a "
            "regular expression, as in '.*weight'."
        )
    return compiled(pattern), sep_of(pattern)


class Lookup:
    """Finds the path in a structure that a name in a file refers to."""

    def __init__(self, structure: Structure, sep: str) -> None:
        self.structure, self.sep = structure, sep
        self.slot_of = dict(structure.entries())
        self._spelled: dict[str, Path | None] = {}
        for by in dict.fromkeys((sep, ".", "/", "_")):  # the file's own separator comes first
            spelled: dict[str, Path | None] = {}
            for path in self.slot_of:
                name = join(path, by)
                spelled[name] = None if name in spelled else path  # an ambiguous name matches nothing
            self._spelled = {**spelled, **self._spelled}

    def find(self, name: str, loose: bool = False, positions: bool = True) -> Path | None:
        """Returns the path of the leaf with a name, or with positions for layers, or None."""
        path = self._find(name, loose, positions)
        if path is None and name.startswith(_PARALLEL):
            path = self._find(name.removeprefix(_PARALLEL), loose, positions)
        return path

    def _find(self, name: str, loose: bool, positions: bool) -> Path | None:
        if name in self._spelled:
            return self._spelled[name]
        if loose and (joined := re.sub("[./]", "_", name)) in self._spelled:
            return self._spelled[joined]
        if not positions or is_too_deep(name):
            return None
        return self._by_position(re.split("[./]", name))

    def shown(self, name: str, by: str) -> str:
        """Returns what patterns match: the path that a name refers to, or its own levels, joined."""
        path = self.find(name)
        return name.replace("/", by).replace(self.sep or "/", by) if path is None else join(path, by)

    def _by_position(self, parts: Sequence[str]) -> Path | None:
        path: list[str] = []
        structure = self.structure
        for i, name in enumerate(parts):
            children = structure.children()
            # Where children are numbers, another number is no position.
            if name not in children and _is_number(name) and not any(map(_is_number, children)):
                name = dict(enumerate(children)).get(int(name), name)
            if name not in children:
                return None
            path.append(name)
            if isinstance(children[name], int):
                return tuple(path) if i + 1 == len(parts) and tuple(path) in self.slot_of else None
            structure, _ = structure.level(name)
        return None

    def assign(
        self, items: Sequence[Item], shapes: Sequence[Any], ordered: bool, nameless: bool
    ) -> list[list[Path]]:
        """Returns for each item the paths that its names refer to.

        Names in ``ordered`` files, as Gluon's, also match by order; ``nameless`` files only do so.
        """
        spellings: list[Callable[[str], str]] = [] if nameless else [lambda name: name]
        if ordered and not nameless:
            names = sorted(name for item in items for name in item.names) or [""]
            both = enumerate(zip(names[0], names[-1], strict=False))
            common = next((i for i, (a, b) in both if a != b), len(names[0]))
            network = names[0][: names[0].rfind("_", 0, common) + 1]  # Gluon's name of the network
            spellings += [_unfused, lambda name: name.removeprefix(network)]
        attempts = [
            [
                [path for name in item.names if (path := self.find(spell(name), item.loose))]
                for item in items
            ]
            for spell in spellings
        ]
        for paths in attempts:
            if all(paths):
                return paths
        none: list[list[Path]] = [[] for _ in items]
        named = max(attempts, key=lambda paths: sum(map(bool, paths)), default=none)
        by_order = self._by_order(items, shapes, nameless) if ordered else []
        # Names that match say more than the order, but for Gluon's, with a counter of the process.
        agree = all(
            not known or paths[0] in known or re.search("[0-9]", item.names[0])
            for item, known, paths in zip(items, named, by_order, strict=False)
        )
        return by_order if by_order and agree else named

    def _by_order(
        self, items: Sequence[Item], shapes: Sequence[Any], nameless: bool
    ) -> list[list[Path]]:
        """Returns the paths in order if their number, shapes and last segments match; else nothing."""
        for paths in (self.structure.canonical, tuple(self.slot_of)):
            if len(paths) == len(items) and all(
                nameless
                or (item.names[0].endswith("_" + path[-1]) and shapes[self.slot_of[path]] == item.shape)
                for item, path in zip(items, paths, strict=True)
            ):
                return [[path] for path in paths]
        return []


def is_too_deep(name: str) -> bool:
    """Returns whether a name has more levels than any leaf: to split it would take much memory."""
    return sum(map(name.count, "./_")) > 8 * DEEPEST


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def _unfused(name: str) -> str:
    """Returns the parameter name of a recurrent layer for the name of a cell in a Gluon file."""
    cell = r"_unfused\.(\d+)\.(?:([lr])_cell\.)?(?=[ih]2h_)"
    return re.sub(cell, lambda match: f"{match[2] or 'l'}{match[1]}_", name)


def closest(name: str, shape: tuple[int, ...] | None, items: Mapping[str, Item]) -> str:
    """Returns the name of the array closest to a missing leaf, or an empty string."""
    near = close_names(name, [n for n in items if items[n].shape == shape]) if shape else []
    return next(iter(near or close_names(name, list(items))), "")
