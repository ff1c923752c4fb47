"""Plots of the results: one file per case, one panel per metric."""

from pathlib import Path
from typing import Any

from benchmarks.suite.case import Case
from benchmarks.suite.report import Rounds, metrics, value

COLORS = {"paramtree": "#d62728", "paramtree packed": "#ff7f0e", "dict": "#1f77b4", "tuple": "#7f7f7f"}
LINES = 7  # of a panel with several metrics
LABELS = {"s": "seconds", "bytes": "bytes"}


def draw_together(case: Case, rounds: Rounds, panels: list[str], path: Path) -> None:
    """Draws the metrics of the one contender as lines, some in each panel, and linear growth."""
    from matplotlib import pyplot

    [name] = case.contenders
    groups = [panels[start : start + LINES] for start in range(0, len(panels), LINES)]
    down = -(-len(groups) // 3)
    figure, axes = pyplot.subplots(
        down, 3, figsize=(12.6, 3.6 * down), squeeze=False, layout="constrained", sharey=True
    )
    for axis, group in zip(axes.flat, groups, strict=False):
        ends = []
        for metric in group:
            spreads = [(size, value(case, rounds, size, name, metric)) for size in case.sizes]
            points = [(size, spread.typical) for size, spread in spreads if spread]
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, linewidth=1.2, label=metric)
            ends.append(points[-1])
        size, most = max(ends, key=lambda end: end[1])
        axis.plot([size / 10, size], [most / 10, most], "k:", linewidth=1, label="linear")
        axis.set(xscale="log", yscale="log", xlabel=case.size, ylabel=LABELS.get(case.unit, case.unit))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(groups) :]:
        axis.remove()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw(
    case: Case, result: dict[str, Any], path: Path, only: str | None = None, title: str = ""
) -> bool:
    """Draws a case over its sizes, or as bars; returns False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "paramtree"  # makes the file reproducible
    from matplotlib import pyplot

    rounds = result["rounds"]
    panels = [metric for metric in metrics(case, rounds) if only in (None, metric)]
    sizes = [size for size in case.sizes if any(str(size) in by_size for by_size in rounds)]
    if not panels or not sizes:
        return False
    if case.together:
        draw_together(case, rounds, panels, path)
        return True
    lines = len(sizes) > 1 and all(isinstance(size, int) for size in sizes)
    columns = min(3, len(panels))
    down = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        down,
        columns,
        figsize=(max(5.5, 4.2 * columns), 3.6 * down),
        squeeze=False,
        layout="constrained",
    )
    for axis, metric in zip(axes.flat, panels, strict=False):
        axis.set_title(title or f"{case.title}: {metric}", fontsize=9)
        unit = case.unit_of(metric)
        colors = iter(["#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#000000"] * 3)
        for name in case.contenders:
            color = COLORS.get(name) or next(colors)
            spreads = [(size, value(case, rounds, size, name, metric)) for size in sizes]
            points = [(size, spread) for size, spread in spreads if spread]
            if not points:
                continue
            style = {"color": color, "label": name, "linewidth": 2.2 if name == "paramtree" else 1.2}
            middle = [spread.typical for _, spread in points]
            low = [spread.typical - spread.least for _, spread in points]
            high = [spread.most - spread.typical for _, spread in points]
            if lines:
                axis.errorbar(
                    [size for size, _ in points], middle, [low, high], marker="o", ms=3, **style
                )
            else:
                labels = [f"{name}, {size}" if len(sizes) > 1 else name for size, _ in points]
                axis.barh(labels, middle, xerr=[low, high], color=color)
        if lines:
            axis.set(xscale="log", yscale="log", xlabel=case.size, ylabel=LABELS.get(unit, unit))
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        else:
            axis.invert_yaxis()
            axis.set_xlabel(LABELS.get(unit, unit))
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
