"""Renders a tree as HTML for notebooks: levels open and close, and ties are links.

The HTML is self-contained, without script or network, so it works in Jupyter, nbconvert and VS Code;
GitHub strips the style and leaves a readable list. Colours derive from the page, so dark themes work.
Browsers open the levels that hide the target of a link.
"""

import secrets
from dataclasses import dataclass
from html import escape
from typing import Any

import jax
import numpy as np

from paramtree.core.structure import HOLE
from paramtree.core.tree import ParamTree, flatten
from paramtree.inspect.measure import FIELDS, measure
from paramtree.inspect.outline import Leaf, Level, as_tree, contents, opened, outline, text, title
from paramtree.inspect.report import bytes_text, count_text
from paramtree.inspect.stats import MEASURES, measurable, measures, sparkline
from paramtree.inspect.treescoped import treescoped

__all__ = ["View", "page", "show"]

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
_NUMBER = ' class="pt-num"'
_HEADS = (("shape", False), ("dtype", False), ("count", True), ("bytes", True))
_STATS_HEADS = (*((field, True) for field in MEASURES), ("min to max", False))
_ODD = (("nan", "NaN"), ("inf", "infinite"))


@dataclass(frozen=True)
class View:
    """The result of ``pt.show``: text when printed, HTML in a notebook."""

    tree: ParamTree
    statistics: dict[int, dict[str, Any]] | None = None

    def __repr__(self) -> str:
        if self.statistics is None:
            return text(outline(self.tree), TEXT_ROWS)
        cells: dict[int, tuple[str, ...]] = {-1: (*MEASURES, "min to max")}
        for slot, row in self.statistics.items():
            cells[slot] = (*measures(row), f"▕{sparkline(row['histogram'])}▏")
        return text(outline(self.tree), TEXT_ROWS, cells)

    def _repr_html_(self) -> str:
        return page(outline(self.tree), self.statistics)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return treescoped(self.tree, path, subtree_renderer)


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
    slots = measurable(viewed)
    leaves = flatten(viewed)[1]
    columns = measure([leaves[slot] for slot in slots], BINS)
    if any(isinstance(column, jax.core.Tracer) for column in columns):
        raise TypeError(
            "show: values are unknown while a function is traced. Leave out stats=True, or return "
            "pt.stats(tree) from the function."
        )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    keys = (*FIELDS, "histogram")
    return View(
        viewed, {s: dict(zip(keys, row, strict=True)) for s, row in zip(slots, rows, strict=True)}
    )


def page(top: Level, statistics: dict[int, dict[str, Any]] | None = None) -> str:
    """Returns an outline as HTML, with statistics by slot."""
    return _Writer(statistics).write(top)


class _Writer:
    """Writes the rows of one outline, with ids that are unique on the page."""

    def __init__(self, statistics: dict[int, dict[str, Any]] | None) -> None:
        self.statistics = statistics
        self.prefix = f"pt{secrets.token_hex(4)}-"
        self.skip = "" if statistics is None else "<span></span> " * len(_STATS_HEADS)

    def write(self, top: Level) -> str:
        heads = _HEADS if self.statistics is None else _HEADS + _STATS_HEADS
        cells = "".join(f"<span{_NUMBER if number else ''}>{head}</span> " for head, number in heads)
        out = [
            f'<div class="paramtree{"" if self.statistics is None else " pt-wide"}">',
            _STYLE,
            f'<div class="pt-title"><b>{escape(title(top))}</b></div>',
        ]
        if top.children:
            out.append(f'<div class="pt-row pt-head"><span></span> {cells}<span></span></div>')
        open_ids = opened(top, OPEN_ROWS)
        stack: list[Level | Leaf | str] = ["</div>"]
        _push(stack, top)
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                out.append(item)
            elif isinstance(item, Leaf):
                out.append(self._leaf(item))
            elif not item.children:
                out.append(self._empty(item))
            else:
                out.append(self._summary(item, id(item) in open_ids))
                stack.append("</details>")
                _push(stack, item)
        return "\n".join(out)

    def _summary(self, level: Level, is_open: bool) -> str:
        sizes = (count_text(level.count), bytes_text(level.nbytes)) if level.count else ("", "")
        return (
            f"<details{' open' if is_open else ''}><summary>{_name(level.name, level.full)} "
            f"<span></span> <span></span> {_number(sizes[0])}{_number(sizes[1])}{self.skip}"
            f'<span class="pt-note pt-dim">{contents(level)}</span></summary>'
        )

    def _empty(self, level: Level) -> str:
        cells = "<span></span> " * len(_HEADS)
        return (
            f'<div class="pt-row"><b>{_name(level.name, level.full)}</b> {cells}{self.skip}'
            f'<span class="pt-note pt-dim">empty</span></div>'
        )

    def _leaf(self, leaf: Leaf) -> str:
        cells, place, more = "<span></span> " * len(_HEADS), "", self.skip
        if leaf.slot == HOLE:
            note = '<i class="pt-dim">hole</i>'
        elif leaf.tied:
            note = f'= <a href="#{self.prefix}{leaf.slot}">{_isolated(leaf.tied)}</a>'
        else:
            place = f' id="{self.prefix}{leaf.slot}"'
            note = _isolated(leaf.note) if leaf.note else ""
            if leaf.state:
                note = f'<span class="pt-tag">state</span> {note}'
            if leaf.shape:
                sizes = ("", "")
                if leaf.count is not None:
                    sizes = (count_text(leaf.count), bytes_text(leaf.nbytes or 0))
                cells = (
                    f'<span class="pt-dim">{escape(leaf.shape)}</span> '
                    f'<span class="pt-dim">{escape(leaf.dtype)}</span> '
                    f"{_number(sizes[0])}{_number(sizes[1])}"
                )
            if row := (self.statistics or {}).get(leaf.slot):
                more = "".join(map(_number, measures(row))) + _bars(row["histogram"])
                if odd := ", ".join(f"{count_text(row[k])} {word}" for k, word in _ODD if row[k]):
                    note = f'<span class="pt-bad">{odd}</span> {note}'
        return (
            f'<div class="pt-row"{place}>{_name(leaf.name, leaf.full)} {cells}{more}'
            f'<span class="pt-note">{note}</span></div>'
        )


def _push(stack: list[Any], level: Level) -> None:
    """Pushes a level's children onto the stack, first on top, in groups if there are many."""
    children: list[Level | Leaf] = level.children
    if len(children) > GROUP and level.depth != _GROUP_DEPTH:
        children = [_group(children[i : i + GROUP]) for i in range(0, len(children), GROUP)]
    stack.extend(reversed(children))


def _group(children: list[Level | Leaf]) -> Level:
    """Returns a range of children as a closed level."""
    name = f"{children[0].name} ... {children[-1].name}"
    group = Level(name, "", _GROUP_DEPTH, children)
    for child in children:
        group.add(child)
    return group


def _name(name: str, full: str) -> str:
    return f'<span class="pt-name" title="{escape(full)}">{_isolated(name)}</span>'


def _isolated(name: str) -> str:
    """Returns escaped text, isolated so that right-to-left text does not reorder its surroundings."""
    return escape(name) if name.isascii() else f"<bdi>{escape(name)}</bdi>"


def _number(text: str) -> str:
    return f"<span{_NUMBER}>{text}</span> "


def _bars(counts: list[int]) -> str:
    """Returns a histogram as an SVG of one path."""
    most = max(counts, default=0)
    if not most:
        return "<span></span>"
    heights = [20 - round(20 * count / most) for count in np.asarray(counts).tolist()]
    path = "".join(f"V{height}h1" for height in heights)
    return (
        f'<svg viewBox="0 0 {len(counts)} 20" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram"><path d="M0 20{path}V20z"/></svg>'
    )
