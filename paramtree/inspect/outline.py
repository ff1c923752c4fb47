"""The outline of a tree: levels with totals, leaves, ties and holes; and its rendering as text.

``paramtree.inspect.show`` renders the same outline as HTML. A leaf counts at its canonical name, so the
children of a level add up to its totals and tied leaves count once. No array value is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding

from paramtree.core.arrays import describe, dtype_of, join, printable, shape_of, short
from paramtree.core.pytrees import open_tree
from paramtree.core.structure import EMPTY, HOLE, STATE, Path
from paramtree.core.tree import ParamTree, flatten, is_flat, place_of, unflatten
from paramtree.inspect.report import bytes_text, count_text, plural

__all__ = [
    "Leaf", "Level", "Measures", "as_tree", "contents", "lines", "opened", "outline", "text", "title",
]  # fmt: skip

DEEPEST = 100  # levels drawn; browsers fail at a few hundred

Measures = Mapping[int, tuple[str, ...]]


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
    nbytes: int | None = None
    leaves: int = 1
    state: bool = False
    tied: str = ""
    note: str = ""


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

    def add(self, child: "Level | Leaf") -> None:
        """Adds a child to the totals of this level."""
        if isinstance(child, Level):
            self.leaves += child.leaves
            self.state += child.state
            self.holes += child.holes
            self.tied += child.tied
        else:
            is_hole, is_tied = child.slot == HOLE, bool(child.tied)
            self.holes += is_hole
            self.tied += is_tied
            self.leaves += 0 if is_hole or is_tied else child.leaves
            self.state += (child.count or 0) if child.state else 0
        self.count += child.count or 0
        self.nbytes += child.nbytes or 0


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
    for path, inner in reversed(levels.items()):  # children before their parents
        if path:
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
    leaf.shape = texts.get(shape) or texts.setdefault(shape, str(shape))
    leaf.dtype = texts.get(dtype) or texts.setdefault(dtype, str(dtype))
    if all(isinstance(size, int) for size in shape):  # jax.export has symbolic sizes
        leaf.count = math.prod(shape)
        leaf.nbytes = leaf.count * dtype.itemsize
    if isinstance(value, jax.core.Tracer):
        leaf.note = "traced"
        return
    sharding = getattr(value, "sharding", None)
    if sharding is not None:
        if sharding not in texts:
            texts[sharding] = _sharding_text(sharding)
        leaf.note = texts[sharding]


def _sharding_text(sharding: Any) -> str:
    """Returns a text for a sharding over several devices; empty for a single device."""
    named = isinstance(sharding, NamedSharding)
    devices = sharding.mesh.size if named else sharding.num_devices
    if devices == 1:
        return ""
    if named:
        axes = ", ".join("+".join(a) if isinstance(a, tuple) else str(a) for a in sharding.spec)
        return printable(f"P({axes}) on {devices} devices")
    return f"{type(sharding).__name__} on {devices} devices"


def title(level: Level, what: str = "ParamTree") -> str:
    """Returns the title line of an outline."""
    parts = [plural(level.leaves, "leaf", "leaves")]
    parts.append(plural(level.count - level.state, "parameter", "parameters"))
    if level.state:
        parts.append(f"{count_text(level.state)} of state")
    parts.append(bytes_text(level.nbytes))
    if level.holes:
        parts.append(plural(level.holes, "hole", "holes"))
    at = f" {level.full}" if level.full else ""
    return f"{what}{at}: {', '.join(parts)}"


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


def text(top: Level, most: int | None = None, measures: Measures | None = None) -> str:
    """Returns the outline as text, in full or cut to about ``most`` lines."""
    return "\n".join(lines(top, most, measures))


def lines(top: Level, most: int | None = None, measures: Measures | None = None) -> Iterator[str]:
    """Yields the lines of ``text`` one by one, since the full text may be large.

    Args:
      top: the outline.
      most: the approximate number of lines; None for all.
      measures: extra cells by slot, the same number for each; slot -1 holds their headings.
    """
    open_ids = opened(top, most)
    heading = (measures or {}).get(-1, ())
    blank = ("",) * len(heading)
    rows: list[tuple[str, ...]] = [("", "", "", "", "", *heading, "")] if heading else []
    # Each item: what to draw, the guides to its left, and those to the left of its children.
    stack: list[tuple[Level | Leaf | str, str, str]] = []
    _push(stack, top, "", most)
    while stack:
        item, here, below = stack.pop()
        if isinstance(item, str):
            rows.append((here + item, "", "", "", "", *blank, ""))
        elif isinstance(item, Leaf):
            more = blank if item.tied else (measures or {}).get(item.slot, blank)
            count = "" if item.count is None else count_text(item.count)
            size = "" if item.nbytes is None else bytes_text(item.nbytes)
            cells = (item.shape, item.dtype, count, size, *more, _remark(item))
            rows.append((here + item.name, *cells))
        else:
            is_open = id(item) in open_ids
            sizes = (count_text(item.count), bytes_text(item.nbytes)) if item.count else ("", "")
            note = "" if is_open and item.children else contents(item)
            rows.append((here + item.name, "", "", *sizes, *blank, note))
            if is_open:
                _push(stack, item, below, most)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(6 + len(heading))]
    yield title(top)
    for row in rows:
        left = (f"{cell:<{width}}" for cell, width in zip(row[:3], widths, strict=False))
        right = (f"{cell:>{width}}" for cell, width in zip(row[3:-1], widths[3:], strict=False))
        yield "  ".join((*left, *right, row[-1])).rstrip()


def contents(level: Level) -> str:
    """Returns the leaves, ties and holes at and below a level, as text."""
    parts = [
        plural(level.leaves, "leaf", "leaves") if level.leaves else "",
        f"{count_text(level.tied)} tied" if level.tied else "",
        plural(level.holes, "hole", "holes") if level.holes else "",
    ]
    return ", ".join(part for part in parts if part) or "empty"


def _push(stack: list[Any], level: Level, guides: str, most: int | None) -> None:
    """Pushes a level's children onto the stack, first on top, and cuts a long list after ``most``."""
    shown: list[Level | Leaf | str] = list(level.children)
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"... {count_text(len(shown) - most)} more"]
    for i in range(len(shown) - 1, -1, -1):
        last = i == len(shown) - 1
        here, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        stack.append((shown[i], guides + here, guides + below))


def _remark(leaf: Leaf) -> str:
    """Returns the remark after a leaf's size."""
    if leaf.slot == HOLE:
        return "hole"
    if leaf.tied:
        return f"= {leaf.tied}"
    return ", ".join(part for part in ("state" if leaf.state else "", leaf.note) if part)
