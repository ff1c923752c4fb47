"""The outline of a tree: levels with totals, leaves, ties and holes; and its rendering as text.

``paramtree.inspect.show`` renders the same outline as HTML. A leaf counts at its canonical name, so the
children of a level add up to its totals and tied leaves count once. No array value is read.
"""

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding

from paramtree.core.arrays import describe, dtype_of, join, printable, shape_of, short
from paramtree.core.pytrees import open_tree
from paramtree.core.structure import EMPTY, HOLE, STATE, Path
from paramtree.core.tree import ParamTree, flatten, is_flat, place_of, unflatten
from paramtree.inspect.report import bytes_text, plural

__all__ = ["Leaf", "Level", "as_tree", "contents", "lines", "opened", "outline", "title"]

DEEPEST = 100  # levels drawn; browsers fail at a few hundred

# The parts of the parametrisations of the library; a star marks state. A tree does not store which of
# its levels are parameters in parts, so those with just these leaves are called by them.
_PARTS = {
    ("g", "v"): "WeightNorm",
    ("weight", "u*", "v*"): "SpectralNorm",
    ("base*", "a", "b"): "LoRA",
    ("integers*", "scale*"): "Quantized",
    ("value", "mask*"): "Masked",
    ("base*", "skew"): "Orthogonal",
    ("frozen*",): "Frozen",
}


@dataclass(slots=True)
class Leaf:
    """One leaf, alias or hole, as it is drawn.

    ``name`` is its name within its level, ``full`` the name that rules match. ``tied`` is the full name
    of the leaf that an alias leads to; an alias has no size. ``leaves`` is how many leaves jax sees in
    its place, and ``note`` is any further remark.
    """

    name: str
    full: str
    slot: int
    shape: str = ""
    dtype: str = ""
    count: int | None = None
    nbytes: int = 0
    leaves: int = 0
    state: bool = False
    tied: str = ""
    note: str = ""

    def cells(self) -> tuple[str, str, str, str]:
        """Returns the shape, the dtype, the count and the bytes as text."""
        sizes = ("", "") if self.count is None else (f"{self.count:,}", bytes_text(self.nbytes))
        return self.shape, self.dtype, *sizes


@dataclass(slots=True)
class Level:
    """One level: its children, and the totals of the leaves at and below it."""

    name: str
    full: str
    depth: int
    children: list["Level | Leaf"] = field(default_factory=list)
    leaves: int = 0
    count: int = 0
    nbytes: int = 0
    state: int = 0  # the share of count that is state
    holes: int = 0
    tied: int = 0  # aliases of leaves that count elsewhere
    note: str = ""  # which parametrisation its leaves are the parts of

    def add(self, child: "Level | Leaf") -> None:
        """Adds a child to the totals of this level."""
        self.leaves += child.leaves
        self.count += child.count or 0
        self.nbytes += child.nbytes
        self.state += child.state if isinstance(child, Level) else child.state * (child.count or 0)
        self.holes += child.holes if isinstance(child, Level) else child.slot == HOLE
        self.tied += child.tied if isinstance(child, Level) else bool(child.tied)

    def cells(self) -> tuple[str, str, str, str]:
        """Returns cells as those of a leaf."""
        sizes = (f"{self.count:,}", bytes_text(self.nbytes)) if self.count else ("", "")
        return "", "", *sizes


def as_tree(tree: Any) -> ParamTree:
    """Returns any pytree, or a single leaf, as a parameter tree."""
    if type(tree) is ParamTree and is_flat(tree):
        return tree
    source = open_tree(tree, counts=None, declared=True)
    return unflatten(source.structure, source.leaves, source.place)


def outline(tree: ParamTree) -> Level:
    """Returns the outline of a tree; its text is printable, but not escaped for HTML."""
    (structure, leaves), place = flatten(tree), place_of(tree)
    texts: dict[Any, str] = {}  # of shapes, dtypes and shardings, which repeat in a large tree
    top = Level("", short(join(place)), 0)
    levels: dict[Path, Level] = {(): top}
    for path, child in zip(structure.paths, structure.slots, strict=True):
        # The deepest level drawn lists all leaves below it by their relative paths.
        above = (path if child == EMPTY else path[:-1])[:DEEPEST]
        for depth in range(len(above) + 1):
            if above[:depth] not in levels:
                inner = Level(short(above[depth - 1]), short(join(place + above[:depth])), depth)
                levels[above[: depth - 1]].children.append(inner)
                levels[above[:depth]] = inner
        if child == EMPTY:
            continue
        # In other containers None marks a hole.
        slot = HOLE if child == HOLE or leaves[child] is None else child
        leaf = Leaf(short("/".join(path[len(above) :])), short(join(place + path)), slot)
        levels[above].children.append(leaf)
        if slot != HOLE:
            first = structure.canonical[slot]
            if path == first:
                leaf.state = structure.kinds[slot] == STATE
                _fill(leaf, leaves[slot], texts)
            else:
                leaf.tied = short(join(place + first))
        levels[above].add(leaf)
    kinds = structure.kinds
    for path, inner in reversed(levels.items()):  # children before their parents
        if path:
            parts = [c for c in inner.children if isinstance(c, Leaf) and c.slot != HOLE]
            names = (f"{c.name}{'*' if kinds[c.slot] == STATE else ''}" for c in parts)
            inner.note = _PARTS.get(tuple(names), "") if len(parts) == len(inner.children) else ""
            levels[path[:-1]].add(inner)
    return top


def _fill(leaf: Leaf, value: Any, texts: dict[Any, str]) -> None:
    shape, dtype = shape_of(value), dtype_of(value)
    if shape is None or dtype is None:
        inner = jax.tree.leaves(value)
        leaf.leaves = len(inner)
        # jax.tree.map may put a container in a leaf's place; describing it would read its arrays.
        is_leaf = not inner or inner[0] is value
        container = f"{type(value).__name__} of {plural(len(inner), 'leaf', 'leaves')}"
        leaf.note = printable(describe(value)) if is_leaf else container
        return
    leaf.leaves = 1
    leaf.shape = texts.get(shape) or texts.setdefault(shape, str(shape))
    leaf.dtype = texts.get(dtype) or texts.setdefault(dtype, str(dtype))
    if all(isinstance(size, int) for size in shape):  # jax.export has symbolic sizes
        leaf.count = math.prod(shape)
        leaf.nbytes = leaf.count * dtype.itemsize
    if isinstance(value, jax.core.Tracer):
        leaf.note = "traced"
    elif (sharding := getattr(value, "sharding", None)) is not None:
        if sharding not in texts:
            texts[sharding] = _sharding_text(sharding)
        leaf.note = texts[sharding]


def _sharding_text(sharding: Any) -> str:
    """Returns a text for a sharding over several devices; empty for a single device."""
    if sharding.num_devices == 1:
        return ""
    spec = type(sharding).__name__
    if isinstance(sharding, NamedSharding):
        axes = ("+".join(a) if isinstance(a, tuple) else str(a) for a in sharding.spec)
        spec = f"P({', '.join(axes)})"
    return printable(f"{spec} on {sharding.num_devices} devices")


def title(level: Level) -> str:
    """Returns the title line of an outline."""
    parts = (
        plural(level.leaves, "leaf", "leaves"),
        plural(level.count - level.state, "parameter", "parameters"),
        f"{level.state:,} of state" if level.state else "",
        bytes_text(level.nbytes),
        plural(level.holes, "hole", "holes") if level.holes else "",
    )
    at = f" {level.full}" if level.full else ""
    return f"ParamTree{at}: {', '.join(filter(None, parts))}"


def contents(level: Level) -> str:
    """Returns what a level is, and the leaves, ties and holes at and below it, as text."""
    parts = (
        level.note,
        plural(level.leaves, "leaf", "leaves") if level.leaves else "",
        f"{level.tied:,} tied" if level.tied else "",
        plural(level.holes, "hole", "holes") if level.holes else "",
    )
    return ", ".join(filter(None, parts)) or "empty"


def opened(top: Level, most: int | None) -> set[int]:
    """Returns the ids of the levels to open: all down to the depth that fits in ``most`` rows."""
    open_ids: set[int] = set()
    levels, rows = [top], 0
    while levels:
        rows += sum(len(level.children) for level in levels)
        if most is not None and rows > most and levels != [top]:
            break
        open_ids.update(map(id, levels))
        levels = [child for level in levels for child in level.children if isinstance(child, Level)]
    return open_ids


def lines(
    top: Level, most: int | None = None, measures: Mapping[int, tuple[str, ...]] | None = None
) -> Iterator[str]:
    """Yields about ``most`` lines of an outline, with extra cells by slot; -1 has their headings."""
    measures, open_ids = measures or {}, opened(top, most)
    heading = measures.get(-1, ())
    blank = ("",) * len(heading)
    rows: list[tuple[str, ...]] = [("", "", "", "", "", *heading, "")] if heading else []
    for item, guides in _drawn(top, "", most, open_ids):
        if isinstance(item, str):
            rows.append((guides + item, "", "", "", "", *blank, ""))
        elif isinstance(item, Leaf):
            more = blank if item.tied else measures.get(item.slot, blank)
            rows.append((guides + item.name, *item.cells(), *more, _remark(item)))
        else:
            note = item.note if id(item) in open_ids and item.children else contents(item)
            rows.append((guides + item.name, *item.cells(), *blank, note))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(6 + len(heading))]
    yield title(top)
    for row in rows:
        left = (f"{cell:<{width}}" for cell, width in zip(row[:3], widths, strict=False))
        right = (f"{cell:>{width}}" for cell, width in zip(row[3:-1], widths[3:], strict=False))
        yield "  ".join((*left, *right, row[-1])).rstrip()


def _drawn(
    level: Level, guides: str, most: int | None, open_ids: Container[int]
) -> Iterator[tuple[Level | Leaf | str, str]]:
    """Yields what to draw below a level and the guides to its left; cuts a list after ``most``."""
    shown: list[Level | Leaf | str] = list(level.children)
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"... {len(shown) - most:,} more"]
    for i, child in enumerate(shown, start=1):
        here, below = ("└─ ", "   ") if i == len(shown) else ("├─ ", "│  ")
        yield child, guides + here
        if isinstance(child, Level) and id(child) in open_ids:
            yield from _drawn(child, guides + below, most, open_ids)


def _remark(leaf: Leaf) -> str:
    if leaf.slot == HOLE:
        return "hole"
    if leaf.tied:
        return f"= {leaf.tied}"
    return ", ".join(filter(None, ("state" if leaf.state else "", leaf.note)))
