"""The base of all reports, which print as tables, render in notebooks and convert to plain values.

A report describes itself as a ``Table`` of text, and this module renders it with rich or as HTML. Names
may come from untrusted files, so control characters and HTML are escaped here, for all reports.
"""

import html
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from paramtree.core.arrays import short

__all__ = [
    "Column", "Report", "Table", "bytes_text", "count_text", "float_text", "plural", "rendered",
]  # fmt: skip

MOST_ROWS = 1000  # rich takes half a millisecond per row
CELL, NOTE = 100, 400  # characters


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are right-aligned."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      title: a line above the table.
      columns: the columns.
      rows: rows of text, one cell per column.
      totals: rows below a rule.
      notes: sentences below the table.
    """

    title: str
    columns: tuple[Column, ...]
    rows: list[tuple[str, ...]]
    totals: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rich(self, most: int | None = MOST_ROWS) -> Any:
        """Returns a rich renderable of all rows, or of the first ``most``."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        lines: list[Any] = [Text(short(self.title))] if self.title else []
        if self.rows or self.totals:
            table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=False)
            for column in self.columns:
                right: Any = "right" if column.number else "left"
                table.add_column(Text(column.title), justify=right, no_wrap=True)
            for row in self.rows[:most]:
                table.add_row(*(Text(short(cell)) for cell in row))
            if self.totals:
                table.add_section()
                for row in self.totals:
                    table.add_row(*(Text(short(cell)) for cell in row))
            lines.append(table)
        return Group(*lines, *(Text(short(note, NOTE)) for note in (*self._more(most), *self.notes)))

    def text(self, most: int | None = MOST_ROWS) -> str:
        """Returns the table as text of any width, with all rows or the first ``most``."""
        from rich.console import Console

        out = io.StringIO()
        # In a notebook, rich would display the text instead of writing it to the file.
        console = Console(
            file=out, width=10_000, color_system=None, legacy_windows=False, force_jupyter=False
        )
        console.print(self.rich(most))
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))

    def html(self) -> str:
        """Returns the table as self-contained HTML: no script, no style sheet, no network."""

        def row(tag: str, cells: tuple[str, ...], style: str = "") -> str:
            parts = []
            for cell, column in zip(cells, self.columns, strict=True):
                align = "right" if column.number else "left"
                parts.append(
                    f'<{tag} style="text-align:{align};padding:.15em .7em;white-space:pre;'
                    f'font-variant-numeric:tabular-nums;{style}"><bdi>{rendered(cell)}</bdi></{tag}>'
                )
            return f"<tr>{''.join(parts)}</tr>"

        head = row("th", tuple(column.title for column in self.columns), f"font-weight:600;{_RULE}")
        body = "".join(row("td", cells) for cells in self.rows[:MOST_ROWS])
        foot = "".join(
            row("td", cells, "font-weight:600;" + (_RULE_ABOVE if i == 0 else ""))
            for i, cells in enumerate(self.totals)
        )
        table = (
            f'<table style="border-collapse:collapse;border:0;margin:.4em 0">'
            f"<thead>{head}</thead><tbody>{body}{foot}</tbody></table>"
            if self.rows or self.totals
            else ""
        )
        title = f'<div style="font-weight:600">{rendered(self.title)}</div>' if self.title else ""
        notes = "".join(
            f"<div>{rendered(note, NOTE)}</div>" for note in (*self._more(MOST_ROWS), *self.notes)
        )
        return (
            f'<div class="paramtree-report" style="overflow-x:auto;font-size:13px">'
            f"{title}{table}{notes}</div>"
        )

    def _more(self, most: int | None) -> list[str]:
        more = 0 if most is None else len(self.rows) - most
        return [f"... and {more:,} more rows; .to_dict() has them all."] if more > 0 else []


_RULE = "border-bottom:1px solid rgba(128,128,128,.6);"
_RULE_ABOVE = "border-top:1px solid rgba(128,128,128,.6);"


class Report(ABC):
    """The base of what ``summary``, ``stats``, ``diff`` and ``find_nonfinite`` return."""

    @abstractmethod
    def table(self) -> Table:
        """Returns the report as a table."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain Python values."""

    def __repr__(self) -> str:
        return self.table().text()

    def __rich__(self) -> Any:
        return self.table().rich()

    def _repr_html_(self) -> str:
        return self.table().html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def rendered(text: str, most: int = CELL) -> str:
    """Returns a text as escaped, shortened HTML, without control characters.

    Example:
      >>> rendered("<b>&")
      '&lt;b&gt;&amp;'
    """
    return html.escape(short(text, most))


def count_text(count: int) -> str:
    """Returns a count with thousands separators.

    Example:
      >>> count_text(5376)
      '5,376'
    """
    return f"{count:,}"


def plural(count: int, noun: str, nouns: str) -> str:
    """Returns a count with its noun.

    Example:
      >>> plural(1, "leaf", "leaves"), plural(2000, "leaf", "leaves")
      ('1 leaf', '2,000 leaves')
    """
    return f"{count_text(count)} {noun if count == 1 else nouns}"


def bytes_text(size: float) -> str:
    """Returns a number of bytes in a suitable unit.

    Example:
      >>> bytes_text(320), bytes_text(21504), bytes_text(4 * 2**20)
      ('320 B', '21.0 KiB', '4.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:,.1f} {unit}"


def float_text(value: Any) -> str:
    """Returns a number with four significant digits.

    Example:
      >>> float_text(0.01234567), float_text(1234567.0), float_text(float("nan")), float_text(0.0)
      ('0.01235', '1.235e+06', 'nan', '0')
    """
    return f"{value:.4g}"
