"""The base of all reports, which print as tables, render in notebooks and convert to plain values.

A report describes itself as a ``Table`` of text, and this module renders it with rich or as HTML. Names
may come from untrusted files, so control characters and HTML are escaped here, for all reports.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from paramtree.core.arrays import short
from paramtree.inspect.style import STYLE

__all__ = ["Report", "Table", "bytes_text", "plural", "some", "with_unit"]

MOST_ROWS = 1000  # rich takes half a millisecond per row
# Characters: of a note, of a tooltip, and from which a cell may be cut.
NOTE, TOOLTIP, CUT = 400, 1000, 24


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]]
    numbers: Collection[str] = ()  # the columns that are right-aligned
    totals: list[tuple[str, ...]] = field(default_factory=list)  # rows below a rule
    notes: list[str] = field(default_factory=list)  # sentences below the table

    def rich(self, most: int | None = MOST_ROWS) -> Any:
        """Returns a rich renderable of all rows, or of the first ``most``."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        lines: list[Any] = [Text(short(self.title))] if self.title else []
        if self.rows or self.totals:
            table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
            for column, side in zip(self.columns, self._sides(), strict=True):
                table.add_column(Text(column), justify=side, no_wrap=True)
            for rows in (self.rows[:most], self.totals):
                for row in rows:
                    table.add_row(*(Text(short(cell)) for cell in row))
                table.add_section()
            lines.append(table)
        return Group(*lines, *(Text(note) for note in self._notes(most)))

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
        """Returns the table as self-contained HTML: no script, no network."""
        kinds = [' class="pt-number"' if side == "right" else "" for side in self._sides()]

        def row(tag: str, texts: Sequence[str]) -> str:
            parts = []
            for text, kind in zip(texts, kinds, strict=True):
                # The browser cuts a long text.
                tip = f' title="{escape(short(text, TOOLTIP))}"' if len(text) > CUT else ""
                parts.append(f"<{tag}{kind}{tip}><bdi>{escape(short(text))}</bdi></{tag}>")
            return f"<tr>{''.join(parts)}</tr>"

        title = f'<div class="pt-title">{escape(short(self.title))}</div>' if self.title else ""
        table = ""
        if self.rows or self.totals:
            body = "\n".join(row("td", texts) for texts in self.rows[:MOST_ROWS])
            foot = "\n".join(row("td", texts) for texts in self.totals)
            head = row("th", self.columns)
            table = f"<table><thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
        notes = "".join(
            f'<div class="pt-remark">{escape(note)}</div>' for note in self._notes(MOST_ROWS)
        )
        return f'<div class="paramtree-report">{STYLE}{title}{table}{notes}</div>'

    def _sides(self) -> list[Any]:
        return ["right" if column in self.numbers else "left" for column in self.columns]

    def _notes(self, most: int | None) -> list[str]:
        more = 0 if most is None else len(self.rows) - most
        left_out = [f"... and {more:,} more rows; .to_dict() has them all."] if more > 0 else []
        return [short(note, NOTE) for note in (*left_out, *self.notes)]


class Report(ABC):
    """The base of what ``summary``, ``stats``, ``diff`` and ``find_nonfinite`` return: a dataclass."""

    @abstractmethod
    def table(self) -> Table:
        """Returns the report as a table."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain Python values."""
        report: Any = self
        return asdict(report)

    def __repr__(self) -> str:
        return self.table().text()

    def __rich__(self) -> Any:
        return self.table().rich()

    def _repr_html_(self) -> str:
        return self.table().html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def some(names: Sequence[str], most: int) -> str:
    """Returns the first names, and the number of the others, as in a, b, c and 2 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(short, names[:most])) + more


def plural(count: int, noun: str, nouns: str) -> str:
    """Returns a count with its noun, as in 1 leaf or 2,000 leaves."""
    return f"{count:,} {noun if count == 1 else nouns}"


def bytes_text(size: float) -> str:
    """Returns a number of bytes in a suitable unit, as in 320 B or 21.0 KiB."""
    return with_unit(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def with_unit(number: float, step: int, units: Sequence[str]) -> str:
    """Returns a number in the largest unit in which it is at least 1; each is ``step`` of the last.

    Example:
      >>> with_unit(320, 1000, ("", "k", "M")), with_unit(8192, 1000, ("", "k", "M"))
      ('320', '8.2 k')
    """
    for unit in units:
        if number < step or unit == units[-1]:
            break
        number /= step
    return f"{number:,.1f} {unit}" if unit != units[0] else f"{number:.0f} {unit}".rstrip()
