"""Writes the outline of a tree as HTML.

Every row is a grid of its own with the same columns, as wide as the longest cell in characters, and
only the name is indented. So all rows are aligned, at every depth and width, and the browser lays out
only those that it shows: a table would be measured as a whole, and its rows could not be folded.
"""

import secrets
from html import escape
from typing import Any

import numpy as np

from paramtree.core.structure import HOLE
from paramtree.inspect.outline import Leaf, Level, Value, contents, opened, title
from paramtree.inspect.stats import MEASURES, measures
from paramtree.inspect.style import STYLE

__all__ = ["page"]

GROUP = 100  # more children than this are grouped
OPEN_ROWS = 40  # rows visible at first
# In characters. The browser cuts what is longer, and the whole is in the tooltip.
INDENT = 2
NAME = 60  # of a name and its indentation
LEAST = 14  # that every name has, if the page is narrow
CELL = 32
NOTE = 20  # that every remark has, if the page is narrow

_HEADS = ("shape", "dtype", "count", "bytes")
_HISTOGRAM = "min to max"
_GROUP_DEPTH = -1


def page(top: Level, statistics: dict[int, dict[str, Any]] | None = None) -> str:
    """Returns an outline as HTML, with statistics by slot."""
    return _Page(top, statistics).text()


class _Page:
    """One page; the ids in it are unique in a notebook."""

    def __init__(self, top: Level, statistics: dict[int, dict[str, Any]] | None) -> None:
        self.top, self.open_ids = top, opened(top, OPEN_ROWS)
        self.statistics = statistics
        self.prefix = f"pt{secrets.token_hex(4)}-"
        self.heads = (*_HEADS, *MEASURES, _HISTOGRAM) if statistics is not None else _HEADS
        self.widths = list(map(len, self.heads))
        self.name, self.note, self.deepest = LEAST, 0, 0
        self.names: dict[str, tuple[str, int]] = {}  # as HTML, with their widths
        self.values: dict[Value, str] = {}  # the cells of a value as HTML
        self.sources: set[int] = set()  # slots that links lead to
        self.rows: list[str] = []

    def text(self) -> str:
        self.find_sources(self.top)
        self.write(self.top, 0)
        indent = INDENT * (self.deepest + 1)
        widest = max(NAME, indent + LEAST)
        name, note = min(self.name, widest), min(self.note, NOTE)
        least = min(name, indent + LEAST)
        columns = " ".join(f"{width}ch" for width in self.widths)
        style = (
            f"--pt-columns:minmax({least}ch,{name}ch) {columns} minmax({note}ch,1fr);--pt-level:0;"
            f"--pt-gaps:{len(self.widths) + 1};--pt-least:{least + sum(self.widths) + note}ch;"
            f"--pt-most:{name + sum(self.widths) + min(self.note, widest)}ch"
        )
        out = [
            f'<div class="paramtree" style="{style}">{STYLE}',
            f'<div class="pt-title">{escape(title(self.top))}</div>',
        ]
        if self.top.children:
            heads = "".join(f" <span>{head}</span>" for head in self.heads)
            out.append(f'<div class="pt-row pt-head"><span></span>{heads}</div>')
        return "\n".join([*out, *self.rows, "</div>"])

    def find_sources(self, level: Level) -> None:
        for child in level.children:
            if isinstance(child, Level):
                if child.tied:
                    self.find_sources(child)
            elif child.tied:
                self.sources.add(child.slot)

    def write(self, level: Level, depth: int) -> None:
        """Writes the rows below a level; many children are grouped."""
        children: list[Level | Leaf] = level.children
        if len(children) > GROUP and level.depth != _GROUP_DEPTH:
            children = [_group(children[i : i + GROUP]) for i in range(0, len(children), GROUP)]
        longest = 0
        for child in children:
            html, width = self.names.get(child.name) or self.named(child.name)
            if width > longest:
                longest = width
            full = child.full
            full = full if full.isidentifier() else escape(full)
            if isinstance(child, Leaf):
                self.leaf(child, f'<span title="{full}">{html}</span>')
                continue
            name = f'<b title="{full}">{html}</b>'
            _, _, count, size = child.cells()
            sizes = f" {self.cell(2, count)} {self.cell(3, size)}" if count else ""
            row = f"{name}{sizes} {self.noted(contents(child))}"
            if not child.children:
                self.rows.append(f'<div class="pt-row">{row}</div>')
                continue
            is_open = " open" if id(child) in self.open_ids else ""
            group = ' class="pt-group"' if child.depth == _GROUP_DEPTH else ""
            style = f'style="--pt-level:{depth + 1}"'
            self.rows.append(f"<details{group} {style}{is_open}><summary>{row}</summary>")
            self.write(child, depth + 1)
            self.rows.append("</details>")
        self.deepest = max(self.deepest, depth)
        self.name = max(self.name, INDENT * (depth + 1) + longest)

    def leaf(self, leaf: Leaf, name: str) -> None:
        """Writes the row of a leaf."""
        value = leaf.value
        cells = self.values.get(value)
        if cells is None:
            texts = enumerate(value.cells())
            cells = "".join(f" {self.cell(i, text)}" for i, text in texts) if value.shape else ""
            self.values[value] = cells
        place, more, note, words = "", "", "", 0
        if leaf.slot in self.sources and not leaf.tied:
            place = f' id="{self.prefix}{leaf.slot}"'
        if self.statistics and leaf.slot in self.statistics and not leaf.tied:
            more, note, words = self.measured(self.statistics[leaf.slot])
        if leaf.tied:
            link = f'= <a href="#{self.prefix}{leaf.slot}">{_isolated(leaf.tied)}</a>'
            note = f" {self.noted(f'= {leaf.tied}', link)}"
        elif leaf.slot == HOLE:
            note = f" {self.noted('hole', '<i>hole</i>')}"
        elif value.note or leaf.state or note:
            tag = '<span class="pt-tag">state</span> ' if leaf.state else ""
            text = f"{'state  ' if leaf.state else ''}{value.note}{' ' * words}"
            note = f" {self.noted(text, f'{note}{tag}{_isolated(value.note)}')}"
        self.rows.append(f'<div class="pt-row"{place}>{name}{cells}{more}{note}</div>')

    def measured(self, row: dict[str, Any]) -> tuple[str, str, int]:
        """Returns the cells of statistics, a remark on values that are not finite, and its width."""
        texts = enumerate(measures(row), start=len(_HEADS))
        cells = "".join(f" {self.cell(i, text)}" for i, text in texts)
        odd = (("nan", "NaN"), ("inf", "infinite"))
        found = ", ".join(f"{row[key]:,} {word}" for key, word in odd if row[key])
        remark = f'<span class="pt-bad">{found}</span> ' if found else ""
        return f"{cells} {_bars(row['histogram'])}", remark, len(found) + 2

    def named(self, name: str) -> tuple[str, int]:
        # In scripts of Asia a character may be two wide.
        width = len(name) if name.isascii() else 2 * len(name)
        return self.names.setdefault(name, (_isolated(name), width))

    def cell(self, column: int, text: str) -> str:
        """Returns a cell, for which its column is wide enough, unless it is cut."""
        if len(text) > self.widths[column]:
            self.widths[column] = min(len(text), CELL)
        tooltip = f' title="{escape(text)}"' if len(text) > CELL else ""
        return f"<span{tooltip}>{escape(text)}</span>"

    def noted(self, text: str, html: str = "") -> str:
        """Returns the cell of a remark, given as text and if need be as HTML."""
        self.note = max(self.note, len(text))
        tooltip = f' title="{escape(text)}"' if len(text) > NOTE else ""
        return f'<span class="pt-note"{tooltip}>{html or escape(text)}</span>'


def _group(children: list[Level | Leaf]) -> Level:
    """Returns a range of children as a closed level."""
    group = Level(f"{children[0].name} ... {children[-1].name}", (), _GROUP_DEPTH, children)
    for child in children:
        group.add(child)
    return group


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
