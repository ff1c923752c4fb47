"""Turns results into tables: statistics over turns and rounds, ratios, and bounds met or not."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.case import Bound, Case, Size

Rounds = list[dict[str, Any]]


@dataclass(frozen=True)
class Spread:
    """A statistic over all rounds, with the smallest and the largest round."""

    typical: float
    least: float
    most: float


def typical(unit: str, values: Iterable[float]) -> float:
    """Returns the minimum of times, as other load only adds to them, and the median of other values."""
    return min(values) if unit == "s" else statistics.median(values)


def turns(rounds: Rounds, number: int, size: Size, name: str, metric: str) -> list[float]:
    """Returns the values of a contender in one round; an empty list if it took no part."""
    return rounds[number].get(str(size), {}).get(name, {}).get(metric, [])


def value(case: Case, rounds: Rounds, size: Size, name: str, metric: str) -> Spread | None:
    """Returns the statistic of a contender's metric, or None if it was not measured."""
    by_round = (turns(rounds, number, size, name, metric) for number in range(len(rounds)))
    unit = case.unit_of(metric)
    values = [typical(unit, taken) for taken in by_round if taken]
    return Spread(typical(unit, values), min(values), max(values)) if values else None


def ratio(
    case: Case,
    rounds: Rounds,
    metric: str,
    size: Size,
    ours: str,
    reference: str | tuple[str, ...],
    base: Size | None = None,
) -> Spread | None:
    """Returns the ratio of ours to the best reference, over all rounds and per round.

    It is None where one was not measured, and where the reference is zero, such as the memory of a
    process that finds room in what was freed before.
    """
    names = (reference,) if isinstance(reference, str) else reference
    at = size if base is None else base

    def over(some: Rounds) -> float | None:
        mine = value(case, some, size, ours, metric)
        theirs = [spread.typical for name in names if (spread := value(case, some, at, name, metric))]
        return mine.typical / min(theirs) if mine and theirs and min(theirs) else None

    ratios = [once for by_size in rounds if (once := over([by_size])) is not None]
    overall = over(rounds)
    return Spread(overall, min(ratios), max(ratios)) if ratios and overall is not None else None


def shown(number: float, unit: str) -> str:
    """Returns a number with a suitable unit prefix."""
    if unit == "s":
        for factor, word in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if number * factor >= 1 or word == "µs":
                return f"{number * factor:.3g} {word}" if number < 1000 else f"{number:.0f} s"
    if unit == "bytes":
        if number < 2**20:
            return f"{number / 2**10:.3g} KiB"
        return f"{number / 2**20:,.0f} MiB" if number >= 100 * 2**20 else f"{number / 2**20:.3g} MiB"
    return f"{number:.3g} {unit}".strip()


def metrics(case: Case, rounds: Rounds) -> list[str]:
    """Returns the metrics that were measured, in order of appearance."""
    names: dict[str, None] = {}
    for by_size in rounds:
        for by_contender in by_size.values():
            for name in case.contenders:
                names.update(dict.fromkeys(by_contender.get(name, {})))
    return list(names)


@dataclass(frozen=True)
class Verdict:
    """A bound, and the measurement at one size."""

    bound: Bound
    size: Size
    spread: Spread | None
    unit: str

    @property
    def met(self) -> bool:
        """Whether the bound is met."""
        return self.spread is not None and self.spread.typical <= self.bound.limit

    @property
    def asked(self) -> str:
        """The text of the bound."""
        bound = self.bound
        if bound.reference is None:
            return f"at most {shown(bound.limit, self.unit)}"
        single = isinstance(bound.reference, str)
        against = bound.reference if single else f"best of {', '.join(bound.reference)}"
        at = "" if bound.base is None else f" at {bound.base}"
        return f"at most {bound.limit:g} of {against}{at}"

    @property
    def answer(self) -> str:
        """The text of the measurement."""
        if self.spread is None:
            return "not measured"
        if self.bound.reference is None:
            return span(self.spread, self.unit)
        return f"{self.spread.typical:.2f} ({self.spread.least:.2f} to {self.spread.most:.2f})"


def verdicts(case: Case, rounds: Rounds) -> list[Verdict]:
    """Returns a verdict for each bound and size."""
    sizes = {str(size): size for size in (*case.sizes, *case.smoke)}
    measured = [size for text, size in sizes.items() if any(text in by_size for by_size in rounds)]
    checked = []
    for bound in case.bounds:
        for size in measured:
            if not bound.when(size) or (bound.base is not None and bound.base not in measured):
                continue
            if bound.reference is None:
                spread = value(case, rounds, size, bound.ours, bound.metric)
            else:
                reference, base = bound.reference, bound.base
                spread = ratio(case, rounds, bound.metric, size, bound.ours, reference, base)
            checked.append(Verdict(bound, size, spread, case.unit_of(bound.metric)))
    return checked


def span(spread: Spread, unit: str) -> str:
    """Returns a statistic with its range."""
    return f"{shown(spread.typical, unit)} ({shown(spread.least, unit)} to {shown(spread.most, unit)})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def together(case: Case, rounds: Rounds, sizes: list[Size]) -> str:
    """Returns a table with a row for each metric of the one contender, and a column for each size."""
    [name] = case.contenders
    rows = []
    for metric in metrics(case, rounds):
        unit = case.unit_of(metric)
        spreads = [value(case, rounds, size, name, metric) for size in sizes]
        rows.append([metric, *(shown(spread.typical, unit) if spread else "" for spread in spreads)])
    return table(["", *(f"{size} {case.size}" for size in sizes)], rows)


def section(case: Case, result: dict[str, Any], plotted: bool, ratios: bool = True) -> str:
    """Returns the section of a case."""
    rounds: Rounds = result["rounds"]
    parts = [f"### {case.title}"]
    if case.note:
        parts.append(case.note.strip())
    if plotted:
        parts.append(f"![{case.title}](plots/{case.name}.svg)")
    sizes = list(dict.fromkeys(size for by_size in rounds for size in by_size))
    if case.together:
        parts.append(together(case, rounds, sizes))
    for metric in () if case.together else metrics(case, rounds):
        rows = []
        for size in sizes:
            for name in case.contenders:
                spread = value(case, rounds, size, name, metric)
                if spread is None:
                    continue
                against = ratio(case, rounds, metric, size, name, "paramtree")
                unit = case.unit_of(metric)
                low_high = f"{shown(spread.least, unit)} to {shown(spread.most, unit)}"
                cells = [size, name, shown(spread.typical, unit), low_high]
                if ratios:
                    cells.append(
                        "" if against is None or name == "paramtree" else f"{against.typical:.2f}"
                    )
                rows.append(cells)
        header = [case.size, "contender", metric, "its rounds"]
        parts.append(table([*header, "over paramtree"] if ratios else header, rows))
    if checked := verdicts(case, rounds):
        rows = [
            [row.bound.metric, row.bound.ours, str(row.size), row.asked, row.answer, met(row)]
            for row in checked
        ]
        parts.append(table(["bound on", "of", case.size, "asked", "found", ""], rows))
    for name, why in result["absent"].items():
        parts.append(f"Left out: {name} ({why}).")
    for name, why in result["errors"].items():
        parts.append(f"Failed: {name} ({why}).")
    parts.append(f"{len(rounds)} rounds of {case.turns if not case.alone else 1} turns.")
    return "\n\n".join(parts)


def met(verdict: Verdict) -> str:
    """Returns "met", or "not met" with the reason."""
    if verdict.met:
        return "met"
    return f"**not met**{': ' if verdict.bound.why else ''}{verdict.bound.why}"


def machine_text(machine: dict[str, Any]) -> str:
    """Returns the description of a machine as a Markdown list."""
    return "\n".join(f"- {key}: {text}" for key, text in machine.items())


def document(cases: dict[str, Case], results: list[dict[str, Any]], plotted: set[str]) -> str:
    """Returns the text of RESULTS.md; bounds are checked on the first machine's results."""
    first, *rest = results
    parts = [
        "# Benchmarks",
        "Written by `make bench`; `benchmarks/suite` documents the method. Timings on shared machines "
        "drift and are noisy, so compare ratios. Contenders take turns of a few milliseconds, in new "
        "processes in every round. Times are the minimum over all rounds, memory and ratios the "
        "median, each with the smallest and the largest round.",
        "## The machine",
        machine_text(first["machine"]),
        "## Which bounds are met",
    ]
    rows = []
    for name, result in first["cases"].items():
        if name in cases:
            for row in verdicts(cases[name], result["rounds"]):
                metric = f"{name}: {row.bound.metric}"
                rows.append([metric, row.bound.ours, str(row.size), row.asked, row.answer, met(row)])
    parts.append(table(["what", "of", "size", "asked", "found", ""], rows))
    parts.append("## Case by case")
    for name, result in first["cases"].items():
        if name in cases:
            parts.append(section(cases[name], result, name in plotted))
    for result_set in rest:
        parts.append(f"## On {result_set['machine'].get('device', 'another machine')}")
        parts.append(machine_text(result_set["machine"]))
        for name, result in result_set["cases"].items():
            if name in cases:
                parts.append(section(cases[name], result, False))
    return "\n\n".join(parts) + "\n"
