"""Renders a tree as HTML for notebooks: levels open and close, and ties are links.

The HTML is self-contained, without script or network, so it works in Jupyter, nbconvert and VS Code;
GitHub strips the style and leaves a readable list. Colours derive from the page, so dark themes work.
Browsers open the levels that hide the target of a link.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import jax
import numpy as np

from paramtree.core.arrays import join, short
from paramtree.core.structure import EMPTY, HOLE
from paramtree.core.tree import ParamTree, flatten, place_of
from paramtree.inspect.measure import FIELDS, measure
from paramtree.inspect.outline import Leaf, Level, as_tree, contents, lines, opened, outline, title
from paramtree.inspect.stats import MEASURES, measurable, measures, sparkline

__all__ = ["View", "show"]

BINS = 16
GROUP = 100  # more children than this are grouped
OPEN_ROWS = 40  # rows visible at first
TEXT_ROWS = 200

# All rows share one grid: only the first column is indented, and the others have fixed widths, so they
# align across levels without a table. Greys are the text colour at reduced opacity.
_STYLE = """<style>
.paramtree{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
color:inherit;overflow-x:auto;padding:2px 0 6px}
.paramtree>div,.paramtree>details{min-width:62em;max-width:80em}
.paramtree.pt-wide>div,.paramtree.pt-wide>details{min-width:98em;max-width:120em}
.paramtree summary,.paramtree .pt-row{display:grid;box-sizing:border-box;column-gap:1em;
grid-template-columns:minmax(9em,1fr) 10em 6em 8em 6.5em 16em;
border-bottom:1px solid rgba(128,128,128,.18);padding:1px 0;white-space:nowrap}
.paramtree.pt-wide summary,.paramtree.pt-wide .pt-row{
grid-template-columns:minmax(9em,1fr) 10em 6em 8em 6.5em 6.2em 6.2em 6.2em 6.2em 4.2em 64px 16em}
.paramtree details details{margin-left:1.2em}
.paramtree .pt-row{padding-left:1em}
.paramtree details>.pt-row{margin-left:1.2em}
.paramtree summary{cursor:pointer;list-style:none}
.paramtree summary::-webkit-details-marker{display:none}
.paramtree summary:hover,.paramtree .pt-row:hover{background:rgba(128,128,128,.12)}
.paramtree summary>:first-child::before{content:"\\25b8";display:inline-block;width:1em;opacity:.6}
.paramtree details[open]>summary>:first-child::before{content:"\\25be"}
.paramtree .pt-name{overflow:hidden;text-overflow:ellipsis}
.paramtree summary .pt-name{font-weight:600}
.paramtree .pt-head{opacity:.7}
.paramtree .pt-title{padding:1px 0 4px}
.paramtree .pt-num{text-align:right;font-variant-numeric:tabular-nums}
.paramtree .pt-dim{opacity:.7}
.paramtree .pt-note{overflow:hidden;text-overflow:ellipsis}
.paramtree .pt-bad{font-weight:700;background:rgba(225,60,40,.3);border-radius:3px;padding:0 .35em}
.paramtree .pt-tag{border:1px solid rgba(128,128,128,.6);border-radius:3px;padding:0 .35em;
font-size:11px}
.paramtree a{color:inherit;text-decoration:underline dotted}
.paramtree :target{background:rgba(255,190,0,.35)}
.paramtree svg{display:block;height:1.3em;width:64px;fill:currentColor;opacity:.65}
</style>"""
_GROUP_DEPTH = -1
_EMPTY = "<span></span> "
_NUMBER = ' class="pt-num"'
_HEADS = (("shape", ""), ("dtype", ""), ("count", _NUMBER), ("bytes", _NUMBER))
_STATS_HEADS = (*((field, _NUMBER) for field in MEASURES), ("min to max", ""))


@dataclass(frozen=True)
class View:
    """The result of ``pt.show``: text when printed, HTML in a notebook."""

    tree: ParamTree
    statistics: dict[int, dict[str, Any]] | None = None

    def __repr__(self) -> str:
        cells: dict[int, tuple[str, ...]] = {}
        if self.statistics is not None:
            cells[-1] = (*MEASURES, "min to max")
            for slot, row in self.statistics.items():
                cells[slot] = (*measures(row), f"▕{sparkline(row['histogram'])}▏")
        return "\n".join(lines(outline(self.tree), TEXT_ROWS, cells))

    def _repr_html_(self) -> str:
        return _Writer(outline(self.tree), self.statistics).page()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return _for_treescope(self.tree).__treescope_repr__(path, subtree_renderer)


def show(tree: Any, *, stats: bool = False) -> View:
    """Returns a view of a tree: a text outline, or in a notebook an outline with collapsible levels.

    A parameter tree at the end of a notebook cell renders in the same way; ``show`` also takes any
    other pytree, and adds statistics. Array values are read only for statistics.

    Args:
      tree: a parameter tree of arrays, shapes or tracers, or any other pytree.
      stats: adds mean, standard deviation, extremes, fraction of zeros, non-finite counts, and a
        histogram from minimum to maximum.

    Raises:
      NameCollisionError: two leaves share a path, as in {"a/b": x, "a": {"b": y}}.
      RuleError: a key of a mapping is empty, or has an empty segment, as in "a//b".
      MismatchError: statistics need values, but the tree has only shapes.
      TypeError: statistics need values, but these are traced.

    Example:
      >>> import paramtree as pt
      >>> pt.show({"dense0": {"weight": np.ones((2, 3), "f4"), "bias": np.zeros(2, "f4")}})
      ParamTree: 2 leaves, 8 parameters, 32 B
      └─ dense0                      8  32 B
         ├─ weight  (2, 3)  float32  6  24 B
         └─ bias    (2,)    float32  2   8 B
    """
    viewed = as_tree(tree)
    if not stats:
        return View(viewed)
    leaves = measurable(viewed)
    columns = dict(zip((*FIELDS, "histogram"), measure(list(leaves.values()), BINS), strict=True))
    if any(isinstance(column, jax.core.Tracer) for column in columns.values()):
        raise TypeError(
            "show: values are unknown while a function is traced. Leave out stats=True, or return "
            "pt.stats(tree) from the function."
        )
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return View(viewed, {slot: dict(zip(columns, next(rows), strict=True)) for slot in leaves})


class _Writer:
    """Writes one outline as HTML, with statistics by slot and ids that are unique on the page."""

    def __init__(self, top: Level, statistics: dict[int, dict[str, Any]] | None) -> None:
        self.top, self.open_ids = top, opened(top, OPEN_ROWS)
        self.wide, self.statistics = statistics is not None, statistics or {}
        self.prefix = f"pt{secrets.token_hex(4)}-"
        self.skip = _EMPTY * len(_STATS_HEADS) if self.wide else ""

    def page(self) -> str:
        out = [
            f'<div class="paramtree{" pt-wide" if self.wide else ""}">',
            _STYLE,
            f'<div class="pt-title"><b>{escape(title(self.top))}</b></div>',
        ]
        if self.top.children:
            heads = _HEADS + _STATS_HEADS if self.wide else _HEADS
            cells = "".join(f"<span{kind}>{head}</span> " for head, kind in heads)
            out.append(f'<div class="pt-row pt-head">{_EMPTY}{cells}<span></span></div>')
        return "\n".join([*out, *self.rows(self.top), "</div>"])

    def rows(self, level: Level) -> Iterator[str]:
        """Yields the rows below a level; many children are grouped."""
        children: list[Level | Leaf] = level.children
        if len(children) > GROUP and level.depth != _GROUP_DEPTH:
            children = [_group(children[i : i + GROUP]) for i in range(0, len(children), GROUP)]
        for child in children:
            name = f'<span class="pt-name" title="{escape(child.full)}">{_isolated(child.name)}</span>'
            if isinstance(child, Leaf):
                yield self.leaf(child, name)
                continue
            end = f'{self.skip}<span class="pt-note pt-dim">{contents(child)}</span>'
            if not child.children:
                yield f'<div class="pt-row"><b>{name}</b> {_cells(child)}{end}</div>'
                continue
            is_open = " open" if id(child) in self.open_ids else ""
            yield f"<details{is_open}><summary>{name} {_cells(child)}{end}</summary>"
            yield from self.rows(child)
            yield "</details>"

    def leaf(self, leaf: Leaf, name: str) -> str:
        place, more = "", self.skip
        if leaf.slot == HOLE:
            note = '<i class="pt-dim">hole</i>'
        elif leaf.tied:
            note = f'= <a href="#{self.prefix}{leaf.slot}">{_isolated(leaf.tied)}</a>'
        else:
            place = f' id="{self.prefix}{leaf.slot}"'
            note = _isolated(leaf.note)
            if leaf.state:
                note = f'<span class="pt-tag">state</span> {note}'
            if row := self.statistics.get(leaf.slot):
                numbers = "".join(f"<span{_NUMBER}>{text}</span> " for text in measures(row))
                more = numbers + _bars(row["histogram"])
                odd = (("nan", "NaN"), ("inf", "infinite"))
                if found := ", ".join(f"{row[key]:,} {word}" for key, word in odd if row[key]):
                    note = f'<span class="pt-bad">{found}</span> {note}'
        return (
            f'<div class="pt-row"{place}>{name} {_cells(leaf)}{more}'
            f'<span class="pt-note">{note}</span></div>'
        )


def _group(children: list[Level | Leaf]) -> Level:
    """Returns a range of children as a closed level."""
    group = Level(f"{children[0].name} ... {children[-1].name}", "", _GROUP_DEPTH, children)
    for child in children:
        group.add(child)
    return group


def _cells(item: Level | Leaf) -> str:
    shape, dtype, count, size = item.cells()
    types = f'<span class="pt-dim">{escape(shape)}</span> <span class="pt-dim">{escape(dtype)}</span> '
    sizes = f"<span{_NUMBER}>{count}</span> <span{_NUMBER}>{size}</span> "
    sized = item.children if isinstance(item, Level) else shape
    return (types if shape else _EMPTY * 2) + (sizes if sized else _EMPTY * 2)


def _isolated(name: str) -> str:
    """Returns escaped text, isolated so that right-to-left text does not reorder its surroundings."""
    return escape(name) if name.isascii() else f"<bdi>{escape(name)}</bdi>"


def _bars(counts: list[int]) -> str:
    """Returns a histogram as an SVG of one path."""
    most = max(counts, default=0)
    if not most:
        return "<span></span>"
    heights = 20 - np.rint(20 * np.asarray(counts) / most).astype(int)
    path = "".join(f"V{height}h1" for height in heights)
    return (
        f'<svg viewBox="0 0 {len(counts)} 20" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram"><path d="M0 20{path}V20z"/></svg>'
    )


# treescope draws the levels and arrays; ties and holes, which only the tree knows, are remarks.


class _Remark(str):
    __repr__ = str.__str__


class _Drawn(dict[str, Any]):
    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope.repr_lib import render_dictionary_wrapper  # type: ignore[import-untyped]

        return render_dictionary_wrapper(
            object_type=ParamTree, wrapped_dict=dict(self), path=path, subtree_renderer=subtree_renderer
        )


def _for_treescope(tree: ParamTree) -> _Drawn:
    (structure, leaves), place = flatten(tree), place_of(tree)
    top = _Drawn()
    for entry, slot in zip(structure.paths, structure.slots, strict=True):
        level, segments = top, [short(segment, 200) for segment in entry]
        for segment in segments if slot == EMPTY else segments[:-1]:
            level = level.setdefault(segment, _Drawn())
        if slot == HOLE or (slot >= 0 and leaves[slot] is None):
            level[segments[-1]] = _Remark("<hole>")
        elif slot >= 0:
            first = structure.canonical[slot]
            tied = _Remark(f"<tied to {short(join(place + first), 200)}>")
            level[segments[-1]] = leaves[slot] if first == entry else tied
    return top
