"""A tree as a reader sees it: levels with their totals, leaves, ties, holes; and all that as text.

The outline is made once and drawn as text here and as HTML in ``paramtree.inspect.show``. A leaf
counts where its canonical name is, so the children of a level add up to its totals and what is tied
counts once. No value of an array is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding

from paramtree.core.arrays import describe, dtype_of, join, printable, shape_of, short
from paramtree.core.names import from_tree
from paramtree.core.structure import HOLE, STATE, Node
from paramtree.core.tree import ParamTree, whole
from paramtree.inspect.report import bytes_text, count_text, plural

__all__ = [
    "Leaf", "Level", "Measures", "as_tree", "contents", "lines", "opened", "outline", "text", "title",
]  # fmt: skip

DEEPEST = 100  # levels that are drawn; a browser gives up at a few hundred

Measures = Mapping[int, tuple[str, ...]]


@dataclass(slots=True)
class Leaf:
    """One leaf, alias or hole, as it is drawn.

    ``name`` is that on its level and ``full`` the one in rules. An alias has the full name of the
    leaf it leads to in ``tied``, and no size of its own. ``leaves`` is how many jax sees in its place,
    and ``note`` whatever else there is to say.
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
    """One level: its children, and what the leaves at and below it amount to."""

    name: str
    full: str
    depth: int
    children: list["Level | Leaf"] = field(default_factory=list)
    leaves: int = 0
    count: int = 0
    nbytes: int = 0
    state: int = 0  # how much of count is state
    holes: int = 0
    tied: int = 0  # names of leaves that count elsewhere

    def add(self, other: "Level | Leaf") -> None:
        """Adds a child to what there is at and below this level."""
        if isinstance(other, Level):
            self.leaves += other.leaves
            self.state += other.state
            self.holes += other.holes
            self.tied += other.tied
        else:
            is_hole, is_tied = other.slot == HOLE, bool(other.tied)
            self.holes += is_hole
            self.tied += is_tied
            self.leaves += 0 if is_hole or is_tied else other.leaves
            self.state += (other.count or 0) if other.state else 0
        self.count += other.count or 0
        self.nbytes += other.nbytes or 0


def as_tree(tree: Any) -> ParamTree:
    """Returns whatever is to be looked at as a tree of all its leaves, a leaf by itself too."""
    if isinstance(tree, ParamTree):
        return whole(tree)
    alone = tree is None or jax.tree_util.all_leaves([tree])
    return from_tree({"value": tree} if alone else tree)


def outline(tree: ParamTree) -> Level:
    """Returns the outline of a whole tree; text in it is safe to print, but not escaped for HTML."""
    structure, place = tree._structure, tree._place
    canonical = structure.canonical
    known: dict[Any, str] = {}  # texts of shapes, dtypes and shardings: a large tree has few of each
    top = Level("", short(join(place)), 0)
    # Levels below the deepest are not drawn: their leaves are drawn there by their path from there.
    stack: list[tuple[Node, Level]] = [(structure.root, top)]
    order: list[tuple[Level, Level]] = []
    while stack:
        node, level = stack.pop()
        shallow = level.depth < DEEPEST
        below = node.children.items() if shallow else _all_below(node)
        for name, found in below:
            full = join((*place, *node.path, name))
            if isinstance(found, Node):
                inner = Level(short(name), short(full), level.depth + 1)
                level.children.append(inner)
                order.append((level, inner))
                stack.append((found, inner))
                continue
            if found != HOLE and tree._leaves[found] is None:  # how other containers leave a leaf out
                found = HOLE
            made = Leaf(short(name), short(full), found)
            level.children.append(made)
            if found != HOLE:
                path = canonical[found]
                if path == (*node.path, *((name,) if shallow else name.split("/"))):
                    made.state = structure.kinds[found] == STATE
                    _fill(made, tree._leaves[found], known)
                else:
                    made.tied = short(join((*place, *path)))
            level.add(made)
    for parent, inner in reversed(order):  # every level after all those below it
        parent.add(inner)
    return top


def _all_below(node: Node) -> Iterator[tuple[str, int]]:
    """Yields the leaves at and below a level, by their paths from there."""
    stack: list[tuple[str, Node]] = [("", node)]
    while stack:
        prefix, level = stack.pop()
        for name, found in level.children.items():
            if isinstance(found, Node):
                stack.append((f"{prefix}{name}/", found))
            else:
                yield prefix + name, found


def _fill(made: Leaf, leaf: Any, known: dict[Any, str]) -> None:
    shape, dtype = shape_of(leaf), dtype_of(leaf)
    if shape is None or dtype is None:
        inside = jax.tree.leaves(leaf)
        made.leaves = len(inside)
        # Of a container, as jax.tree.map may put in a leaf's place, the values are not to be read.
        whole_leaf = not inside or inside[0] is leaf
        kind = f"{type(leaf).__name__} of {plural(len(inside), 'leaf', 'leaves')}"
        made.note = printable(describe(leaf)) if whole_leaf else kind
        return
    made.shape = known.get(shape) or known.setdefault(shape, str(shape))
    made.dtype = known.get(dtype) or known.setdefault(dtype, str(dtype))
    if all(isinstance(size, int) for size in shape):  # not yet known to a function that is exported
        made.count = math.prod(shape)
        made.nbytes = made.count * dtype.itemsize
    if isinstance(leaf, jax.core.Tracer):
        made.note = "traced"
        return
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        if sharding not in known:
            known[sharding] = _sharding_text(sharding)
        made.note = known[sharding]


def _sharding_text(sharding: Any) -> str:
    """Returns how an array lies on several devices; nothing if it is on one."""
    named = isinstance(sharding, NamedSharding)
    devices = sharding.mesh.size if named else sharding.num_devices
    if devices == 1:
        return ""
    if named:
        axes = ", ".join("+".join(a) if isinstance(a, tuple) else str(a) for a in sharding.spec)
        return printable(f"P({axes}) on {devices} devices")
    return f"{type(sharding).__name__} on {devices} devices"


def title(level: Level, what: str = "ParamTree") -> str:
    """Returns one line about a whole tree."""
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
    """Returns which levels to open, by ``id``: all of a depth, as long as ``most`` rows suffice."""
    open_ids: set[int] = set()
    depth, rows = [top], 0
    while depth:
        rows += sum(len(level.children) for level in depth)
        if most is not None and rows > most and depth != [top]:
            break
        open_ids.update(map(id, depth))
        depth = [below for level in depth for below in level.children if isinstance(below, Level)]
    return open_ids


def text(top: Level, most: int | None = None, measures: Measures | None = None) -> str:
    """Returns the outline as lines of text, all of it or about ``most`` lines."""
    return "\n".join(lines(top, most, measures))


def lines(top: Level, most: int | None = None, measures: Measures | None = None) -> Iterator[str]:
    """Yields the lines of ``text``, which in one piece may be large.

    Args:
      top: the outline.
      most: about how many lines; None for all.
      measures: more cells for some slots, all of them as many; those of the slot -1 are a heading.
    """
    open_ids = opened(top, most)
    heading = (measures or {}).get(-1, ())
    blank = ("",) * len(heading)
    rows: list[tuple[str, ...]] = [("", "", "", "", "", *heading, "")] if heading else []
    # Each item: what to draw, and the guides to its left.
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
    """Returns how much is at and below a level."""
    parts = [
        plural(level.leaves, "leaf", "leaves") if level.leaves else "",
        f"{count_text(level.tied)} tied" if level.tied else "",
        plural(level.holes, "hole", "holes") if level.holes else "",
    ]
    return ", ".join(part for part in parts if part) or "empty"


def _push(stack: list[Any], level: Level, guides: str, most: int | None) -> None:
    """Puts a level's children on the stack, the first on top; of very many only the first."""
    shown: list[Level | Leaf | str] = list(level.children)
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"... {count_text(len(shown) - most)} more"]
    for i in range(len(shown) - 1, -1, -1):
        last = i == len(shown) - 1
        here, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        stack.append((shown[i], guides + here, guides + below))


def _remark(leaf: Leaf) -> str:
    """Returns what is to be said of a leaf beside its size."""
    if leaf.slot == HOLE:
        return "hole"
    if leaf.tied:
        return f"= {leaf.tied}"
    return ", ".join(part for part in ("state" if leaf.state else "", leaf.note) if part)
