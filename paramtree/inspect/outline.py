"""The outline of a tree: levels with totals, leaves, ties and holes; and its rendering as text.

``paramtree.inspect.show`` renders the same outline as HTML. A leaf counts at its canonical name, so the
children of a level add up to its totals and tied leaves count once. No array value is read.
"""

import functools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding

from paramtree.core.arrays import describe, join, printable, short
from paramtree.core.pytrees import open_tree
from paramtree.core.structure import EMPTY, HOLE, STATE, Path
from paramtree.core.tree import ParamTree, flatten, is_flat, place_of, unflatten
from paramtree.inspect.report import bytes_text, plural

__all__ = ["Leaf", "Level", "Value", "as_tree", "contents", "lines", "opened", "outline", "title"]

DEEPEST = 100  # levels drawn; browsers fail at a few hundred
TOOLTIP = 1000  # characters of a full name

Cells = tuple[str, str, str, str]  # of a shape, a dtype, a count and bytes

# The parts of the parametrisations of the library; a star marks state. A tree does not store which of
# its levels are parameters in parts, so those with just these leaves are called by them.
_PARTS = {
    ("g", "v"): "WeightNorm",
    ("v", "gain"): "WeightStandardization",
    ("weight", "u*", "v*"): "SpectralNorm",
    ("base*", "a", "b"): "LoRA",
    ("integers*", "scale*"): "Quantized",
    ("value", "mask*"): "Masked",
    ("base*", "skew"): "Orthogonal",
    ("frozen*",): "Frozen",
}
# The first name and the number of parts: most levels are ruled out by these.
_BEGINNINGS = {(parts[0].removesuffix("*"), len(parts)) for parts in _PARTS}


@dataclass(slots=True, eq=False)
class Value:
    """What is in the place of a leaf, as text; leaves that look the same share one.

    ``leaves`` is how many leaves jax sees there, and ``note`` is any further remark.
    """

    shape: str = ""
    dtype: str = ""
    count: int | None = None
    nbytes: int = 0
    leaves: int = 0
    note: str = ""

    def cells(self) -> Cells:
        """Returns the shape, the dtype, the count and the bytes as text."""
        sizes = ("", "") if self.count is None else (f"{self.count:,}", bytes_text(self.nbytes))
        return self.shape, self.dtype, *sizes


_NOTHING = Value()  # in the place of a hole or an alias


@dataclass(slots=True)
class Leaf:
    """One leaf, alias or hole, as it is drawn.

    ``name`` is its name within its level. ``tied`` is the full name of the leaf that an alias leads to;
    an alias has no size.
    """

    name: str
    path: Path
    slot: int
    value: Value = _NOTHING
    state: bool = False
    tied: str = ""

    @property
    def full(self) -> str:
        """The name that rules match."""
        return short(join(self.path), TOOLTIP)

    @property
    def count(self) -> int | None:
        """The number of scalars, if it is known."""
        return self.value.count

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.value.nbytes


@dataclass(slots=True)
class Level:
    """One level: its children, and the totals of the leaves at and below it."""

    name: str
    path: Path
    depth: int
    children: list["Level | Leaf"] = field(default_factory=list)
    leaves: int = 0
    count: int = 0
    nbytes: int = 0
    state: int = 0  # the share of count that is state
    holes: int = 0
    tied: int = 0  # aliases of leaves that count elsewhere
    note: str = ""  # which parametrisation its leaves are the parts of

    @property
    def full(self) -> str:
        """The name of the level."""
        return short(join(self.path), TOOLTIP)

    def add(self, child: "Level | Leaf") -> None:
        """Adds a child to the totals of this level."""
        what = child if isinstance(child, Level) else child.value
        size = what.count or 0
        self.leaves += what.leaves
        self.count += size
        self.nbytes += what.nbytes
        if isinstance(child, Level):
            self.state += child.state
            self.holes += child.holes
            self.tied += child.tied
        else:
            self.state += size if child.state else 0
            self.holes += child.slot == HOLE
            self.tied += bool(child.tied)

    def cells(self) -> Cells:
        """Returns cells as those of a leaf."""
        return _cells_of(self.count, self.nbytes)


@functools.lru_cache(1024)  # a large tree has many levels alike
def _cells_of(count: int, nbytes: int) -> Cells:
    return ("", "", f"{count:,}", bytes_text(nbytes)) if count else ("", "", "", "")


def as_tree(tree: Any) -> ParamTree:
    """Returns any pytree, or a single leaf, as a parameter tree."""
    if type(tree) is ParamTree and is_flat(tree):
        return tree
    source = open_tree(tree, counts=None, declared=True)
    return unflatten(source.structure, source.leaves, source.place)


def outline(tree: ParamTree) -> Level:
    """Returns the outline of a tree; its text is printable, but not escaped for HTML."""
    (structure, leaves), place = flatten(tree), place_of(tree)
    values: dict[Any, Value] = {}  # what is alike repeats in a large tree
    names: dict[str, str] = {}  # of segments, likewise
    top = Level("", place, 0)
    levels: dict[Path, Level] = {(): top}
    canonical, kinds = structure.canonical, structure.kinds

    def level_at(above: Path) -> Level:
        found = levels.get(above)
        if found is None:
            outer = level_at(above[:-1])
            found = levels[above] = Level(short(above[-1]), place + above, len(above))
            outer.children.append(found)
        return found

    above: Path = ()
    level = top
    for path, child in zip(structure.paths, structure.slots, strict=True):
        # The deepest level drawn lists all leaves below it by their relative paths.
        here = (path if child == EMPTY else path[:-1])[:DEEPEST]
        if here != above:
            above, level = here, level_at(here)
        if child == EMPTY:
            continue
        # In other containers None marks a hole.
        slot = HOLE if child == HOLE or leaves[child] is None else child
        last = path[-1] if len(path) == len(above) + 1 else "/".join(path[len(above) :])
        name = names.get(last) or names.setdefault(last, short(last))
        leaf = Leaf(name, place + path, slot)
        level.children.append(leaf)
        if slot != HOLE:
            first = canonical[slot]
            if path is first or path == first:
                leaf.state = kinds[slot] == STATE
                leaf.value = _value(leaves[slot], values)
            else:
                leaf.tied = short(join(place + first))
        level.add(leaf)
    for path, inner in reversed(levels.items()):  # children before their parents
        if path:
            inner.note = _parametrization(inner.children)
            levels[path[:-1]].add(inner)
    return top


def _parametrization(children: list[Level | Leaf]) -> str:
    """Returns the name of the parametrisation that some children are the parts of, if they are."""
    if not children or (children[0].name, len(children)) not in _BEGINNINGS:
        return ""
    leaves = [child for child in children if isinstance(child, Leaf) and child.slot != HOLE]
    parts = tuple(leaf.name + "*" * leaf.state for leaf in leaves)
    return _PARTS.get(parts, "") if len(parts) == len(children) else ""


def _value(leaf: Any, values: dict[Any, Value]) -> Value:
    """Returns what is in the place of a leaf, from ``values`` if it has its like."""
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    if dtype is None or not isinstance(shape, tuple):
        inner = jax.tree.leaves(leaf)
        # jax.tree.map may put a container in a leaf's place; describing it would read its arrays.
        is_leaf = not inner or inner[0] is leaf
        container = f"{type(leaf).__name__} of {plural(len(inner), 'leaf', 'leaves')}"
        return Value(leaves=len(inner), note=printable(describe(leaf)) if is_leaf else container)
    traced = isinstance(leaf, jax.core.Tracer)
    sharding = None if traced else getattr(leaf, "sharding", None)
    key = shape, dtype, sharding, traced
    value = values.get(key)
    if value is None:
        note = "traced" if traced else ""
        value = values[key] = Value(str(tuple(shape)), str(dtype), leaves=1, note=note)
        if all(isinstance(size, int) for size in shape):  # jax.export has symbolic sizes
            value.count = math.prod(shape)
            value.nbytes = value.count * dtype.itemsize
        if sharding is not None:
            value.note = _sharding_text(sharding)
    return value


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
    at = f" {short(join(level.path))}" if level.path else ""
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


Drawn = tuple[Level | Leaf | str, str]


def lines(
    top: Level, most: int | None = None, measures: Mapping[int, tuple[str, ...]] | None = None
) -> Iterator[str]:
    """Yields about ``most`` lines of an outline, with extra cells by slot; -1 has their headings."""
    measures, open_ids = measures or {}, opened(top, most)
    heading = measures.get(-1, ())
    blank = ("",) * len(heading)
    rows: list[tuple[str, ...]] = [("", "", "", "", "", *heading, "")] if heading else []
    cells: dict[Value, Cells] = {}
    drawn: list[Drawn] = []
    _draw(top, "", most, open_ids, drawn)
    for item, guides in drawn:
        if isinstance(item, Leaf):
            value = item.value
            texts = cells.get(value) or cells.setdefault(value, value.cells())
            more = blank if item.tied else measures.get(item.slot, blank)
            rows.append((guides + item.name, *texts, *more, _remark(item)))
        elif isinstance(item, Level):
            note = item.note if id(item) in open_ids and item.children else contents(item)
            rows.append((guides + item.name, *item.cells(), *blank, note))
        else:
            rows.append((guides + item, "", "", "", "", *blank, ""))
    yield title(top)
    if not rows:
        return
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(map(len, set(column))) for column in columns]
    sides = ["-"] * 3 + [""] * (len(widths) - 3)
    line = "  ".join(f"%{side}{width or ''}s" for side, width in zip(sides, widths, strict=True))
    line += "  %s"
    for row in rows:
        yield (line % row).rstrip()


def _draw(
    level: Level, guides: str, most: int | None, open_ids: Container[int], drawn: list[Drawn]
) -> None:
    """Adds what to draw below a level and the guides to its left; cuts a list after ``most``."""
    shown: Sequence[Level | Leaf | str] = level.children
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"... {len(shown) - most:,} more"]
    here, below, last = f"{guides}├─ ", f"{guides}│  ", len(shown)
    for i, child in enumerate(shown, start=1):
        if i == last:
            here, below = f"{guides}└─ ", f"{guides}   "
        drawn.append((child, here))
        if isinstance(child, Level) and id(child) in open_ids:
            _draw(child, below, most, open_ids, drawn)


def _remark(leaf: Leaf) -> str:
    if leaf.slot == HOLE:
        return "hole"
    if leaf.tied:
        return f"= {leaf.tied}"
    note = leaf.value.note
    return (f"state, {note}" if note else "state") if leaf.state else note
