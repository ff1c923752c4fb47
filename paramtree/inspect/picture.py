"""Draws plots with matplotlib; ``paramtree.inspect.plots`` imports this module lazily.

pyplot is not used. Names are untrusted text, so neither mathtext nor LaTeX ever interprets them.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import (
    EngFormatter,
    Formatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from paramtree.inspect.tiling import arranged, extremes, tiled

__all__ = ["Picture", "grid", "heat", "histogram", "proportion", "ratios", "wrapped"]

SMALL, NORMAL = 6, 7  # points
# The palette of Okabe and Ito, safe for colour-blind readers. Yellow marks non-finite cells in a heat
# map; it is too faint for a line.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, YELLOW, GREY = "#e69f00", "#56b4e9", "#f0e442", "0.5"
COLORS, STYLES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY), ("-", "--", ":")
HUGE = 1e300  # counts as infinite, since matplotlib subtracts limits
MOST_LINES = 40  # lines drawn between tiles


class Picture(Figure):
    """A figure outside pyplot that a notebook still renders.

    Unlike pyplot figures it is shown once and does not stay open. Until pyplot is imported, a notebook
    renders a plain ``Figure`` as text; it calls this class's ``_repr_png_``.
    """

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


def _picture(width: float, height: float) -> Picture:
    return Picture((width, height), dpi=150, layout="constrained")


def grid(columns: int, width: float, heights: Sequence[float]) -> tuple[Picture, list[Axes]]:
    """Returns a figure and its axes in rows; sizes are in inches, and a row fits its highest axes."""
    count = len(heights)
    columns = min(columns, count)
    rows = [max(heights[i : i + columns]) for i in range(0, count, columns)]
    picture = _picture(columns * width, sum(rows))
    axes = picture.subplots(len(rows), columns, squeeze=False, height_ratios=rows).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    for used in axes[:count]:
        _style(used, SMALL)
    return picture, axes[:count]


def _style(axes: Axes, size: float) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    _thin(axes, size)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_fontsize(size)


def _thin(axes: Axes, size: float = SMALL) -> None:
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(which="both", labelsize=size, width=0.5, length=2, pad=2)


def _literal(text: Text, content: str) -> None:
    """Sets a text without interpreting it as mathtext or LaTeX."""
    text.set_parse_math(False)
    text.set_usetex(False)
    text.set_text(content)


def wrapped(text: str, most: int) -> str:
    """Returns a name wrapped to lines of ``most`` characters, preferably after a separator.

    Example:
      >>> wrapped("blocks_attention_query_weight", 20).split(chr(10))
      ['blocks_attention_', 'query_weight']
    """
    lines = [""]
    for part in re.findall(r"[^_/]*[_/]*", text):
        if len(lines[-1]) + len(part) > most and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line[i : i + most] for line in lines for i in range(0, len(line), most))


def _head(axes: Axes, title: str, note: str, problem: str = "") -> None:
    """Writes the title above the axes, and a note below it, coloured if there is a problem."""
    _literal(axes.set_title("", loc="left", fontsize=NORMAL, pad=11, linespacing=1.1), title)
    text, color = ", ".join(filter(None, (note, problem))), VERMILION if problem else GREY
    axes.annotate(text, (0, 1), (0, 2.5), "axes fraction", "offset points", fontsize=SMALL, color=color)


def _blank(axes: Axes, text: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=SMALL, color=GREY)


def _not_finite(values: Any) -> tuple[Any, str]:
    """Returns a mask of the values that cannot be drawn, and a text that counts them."""
    top = HUGE if values.dtype == np.float64 else np.inf
    bad = ~(np.abs(values) < top)  # also true for NaN
    nans = int(np.isnan(values).sum()) if bad.any() else 0
    counts = {"nan": nans, "inf": int(bad.sum()) - nans}
    return bad, ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)


def histogram(
    axes: Axes, values: Any, title: str, note: str, color: str, bins: int | None, log: bool
) -> None:
    """Draws a histogram of an array of real values."""
    bad, problem = _not_finite(values)
    _head(axes, title, note, problem)
    good = values[~bad] if problem else values.ravel()
    if not good.size:
        _blank(axes, "nothing finite" if problem else "no values")
        return
    low, high = np.float64(good.min()), np.float64(good.max())
    if high - low <= max(1e-12 * max(-low, high), 1 / HUGE):  # too narrow to divide into bins
        half = abs(low) / 2 if abs(low) > 1 / HUGE else 0.5
        counts, edges = np.array([good.size]), np.array([low - half, low + half])
    else:
        bins = bins or min(60, max(5, math.ceil(2 * math.sqrt(good.size))))
        counts, edges = np.histogram(good, bins, range=(low, high))
    axes.stairs(counts, edges, fill=True, color=color, linewidth=0)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2 * counts.max())
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    if low < 0 < high:
        axes.axvline(0, color=GREY, linewidth=0.5)


def proportion(shape: Sequence[int]) -> float:
    """Returns the height of a heat map of width 1; cells are square unless the map is long."""
    rows, columns, _ = arranged(shape)
    return 0.12 if rows <= 1 else min(max(rows / columns, 0.25), 1.3)


def heat(axes: Axes, values: Any, title: str, note: str, limit: float | None) -> None:
    """Draws a heat map of an array of real values."""
    bad, problem = _not_finite(values)
    axes.set_anchor("NW")
    axes.set_box_aspect(proportion(values.shape))
    if not values.size:
        _head(axes, title, note)
        _blank(axes, "no values")
        return
    tiles = tiled(np.where(bad, 0, values) if problem else values)
    cells, block = extremes(tiles.cells)
    cells = cells.astype(np.float64)
    if block != (1, 1):
        note += ", extremes of {} x {}".format(*block)
    _head(axes, title, note, problem)
    rows, columns = tiles.cells.shape
    style: Any = {"extent": (-0.5, columns - 0.5, rows - 0.5, -0.5), "aspect": "auto"}
    style["interpolation"] = "none"  # a vector file keeps the cells
    if tiles.there is not None:
        cells = np.ma.masked_array(cells, ~extremes(tiles.there)[0])
    largest = float(np.abs(cells).max())
    top = limit or (largest if largest > 1 / HUGE else 1.0)
    image = axes.imshow(cells, cmap=matplotlib.colormaps["RdBu_r"], vmin=-top, vmax=top, **style)
    if problem:
        where = extremes(tiled(bad).cells)[0]
        axes.imshow(np.ma.masked_array(where, ~where), cmap=ListedColormap([YELLOW]), **style)
    axes.spines[:].set_visible(True)
    if tiles.tile:
        axes.set(xticks=[], yticks=[])
        for line, size, step in zip(
            (axes.axhline, axes.axvline), (rows, columns), tiles.tile, strict=True
        ):
            if size // step <= MOST_LINES:
                for at in range(step, size, step):
                    line(at - 0.5, color=GREY, linewidth=0.3)
    else:
        for size, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
            axis.set_major_locator(MaxNLocator(4, integer=True) if size != 1 else NullLocator())
    scale = axes.inset_axes((1.03, 0, 0.04, 1))  # keeps the height of the map at any aspect
    bar = axes.figure.colorbar(image, cax=scale, extend="both" if largest > top else "neither")
    marks = (-top, top) if rows == 1 else (-top, 0, top)
    bar.set_ticks(marks, labels=[Formatter.fix_minus(f"{value:.2g}") for value in marks])
    _thin(scale)


def ratios(steps: Any, names: Sequence[str], table: Any) -> Picture:
    """Draws a line for each row of a table on a logarithmic axis; non-positive values are gaps."""
    table = np.where((table > 0) & (table < HUGE), table, np.nan)
    picture = _picture(7.0, 2.8)
    axes = picture.subplots()
    _style(axes, NORMAL)
    axes.set_yscale("log")
    axes.set_ylim(np.nanmin(table, initial=5e-4) / 2, np.nanmax(table, initial=2e-3) * 2)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1e-3, color=GREY, linestyle=(0, (6, 3)), linewidth=0.8)
    axes.set_xlabel("step", fontsize=NORMAL)
    axes.set_ylabel("update / weight", fontsize=NORMAL)
    axes.margins(x=0.01)
    if steps.dtype.kind in "iu":
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    few = len(names) <= len(COLORS) * len(STYLES)
    lines, labels = [], []
    for i, (name, row) in enumerate(zip(names, table, strict=True)):
        lines += axes.plot(
            steps,
            row,
            color=COLORS[i % len(COLORS)] if few else _shade(i / (len(names) - 1)),
            linestyle=STYLES[i // len(COLORS)] if few else "-",
            linewidth=1.0 if few else 0.6,
            marker="." if len(steps) == 1 else "",
        )
        labels.append(f"{name} (none above 0)" if np.isnan(row).all() else name)
    if not few:
        _order_bar(picture, axes, labels)
        return picture
    # matplotlib drops labels that begin with an underscore, so the texts are set afterwards.
    legend = picture.legend(
        lines, ["name"] * len(lines), loc="outside right upper", fontsize=SMALL, frameon=False
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        _literal(text, label)
    return picture


def _shade(share: float) -> tuple[float, float, float, float]:
    """Returns a colour of viridis, without its pale end."""
    return matplotlib.colormaps["viridis"](0.9 * share)


def _order_bar(picture: Picture, axes: Axes, labels: Sequence[str]) -> None:
    """Adds a colour bar from the first line to the last, with some of their names."""
    last = len(labels) - 1
    shades = ListedColormap([_shade(i / last) for i in range(last + 1)])
    order = ScalarMappable(Normalize(-0.5, last + 0.5), shades)
    bar = picture.colorbar(order, ax=axes, fraction=0.04, aspect=30, pad=0.02)
    ticks = np.unique(np.linspace(0, last, 12).round().astype(int)).tolist()
    bar.set_ticks(ticks, labels=[""] * len(ticks))
    for i in ticks:
        at: Any = ("axes fraction", "data")
        text = bar.ax.annotate("", (1, i), (4, 0), at, "offset points", fontsize=SMALL, va="center")
        _literal(text, labels[i])
    _thin(bar.ax)
    bar.ax.invert_yaxis()  # first at the top, as in a legend
