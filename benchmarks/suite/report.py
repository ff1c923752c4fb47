"""From the results to tables: what counts of many turns, ratios, and which bounds are met."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.case import Bound, Case, Size

Rounds = list[dict[str, Any]]


@dataclass(frozen=True)
class Spread:
    """What counts of all rounds, with the smallest and the largest round."""

    typical: float
    least: float
    most: float


def typical(case: Case, values: Iterable[float]) -> float:
    """Returns the least of times, as others can only add to them, and the median of all else."""
    return min(values) if case.unit == "s" else statistics.median(values)


def turns(rounds: Rounds, number: int, size: Size, name: str, metric: str) -> list[float]:
    """Returns the values of a contender in one round, none if it took no part."""
    return rounds[number].get(str(size), {}).get(name, {}).get(metric, [])


def value(case: Case, rounds: Rounds, size: Size, name: str, metric: str) -> Spread | None:
    """Returns what a contender took."""
    every = (turns(rounds, number, size, name, metric) for number in range(len(rounds)))
    found = [typical(case, values) for values in every if values]
    return Spread(typical(case, found), min(found), max(found)) if found else None


def ratio(
    case: Case,
    rounds: Rounds,
    metric: str,
    size: Size,
    ours: str,
    reference: str | tuple[str, ...],
    base: Size | None = None,
) -> Spread | None:
    """Returns ours over the best of the references, of all rounds and within each."""
    names = (reference,) if isinstance(reference, str) else reference
    at = size if base is None else base

    def over(some: Rounds) -> float | None:
        mine = value(case, some, size, ours, metric)
        others = [found.typical for name in names if (found := value(case, some, at, name, metric))]
        return mine.typical / min(others) if mine and others else None

    found = [one for each in rounds if (one := over([each])) is not None]
    every = over(rounds)
    return Spread(every, min(found), max(found)) if found and every is not None else None


def shown(number: float, unit: str) -> str:
    """Returns a number in a unit that suits it."""
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
    found: dict[str, None] = {}
    for one in rounds:
        for by_size in one.values():
            for name in case.contenders:
                found.update(dict.fromkeys(by_size.get(name, {})))
    return list(found)


@dataclass(frozen=True)
class Verdict:
    """A bound, and what was found at one size."""

    bound: Bound
    size: Size
    found: Spread | None
    unit: str

    @property
    def met(self) -> bool:
        """Whether the bound is met."""
        return self.found is not None and self.found.typical <= self.bound.limit

    @property
    def asked(self) -> str:
        """What is asked, in words."""
        bound = self.bound
        if bound.reference is None:
            return f"at most {shown(bound.limit, self.unit)}"
        one = isinstance(bound.reference, str)
        against = bound.reference if one else f"best of {', '.join(bound.reference)}"
        at = "" if bound.base is None else f" at {bound.base}"
        return f"at most {bound.limit:g} of {against}{at}"

    @property
    def answer(self) -> str:
        """What was found, in words."""
        if self.found is None:
            return "not measured"
        if self.bound.reference is None:
            return span(self.found, self.unit)
        return f"{self.found.typical:.2f} ({self.found.least:.2f} to {self.found.most:.2f})"


def verdicts(case: Case, rounds: Rounds) -> list[Verdict]:
    """Returns what was found for each bound and size."""
    sizes = {str(size): size for size in (*case.sizes, *case.smoke)}
    measured = [size for text, size in sizes.items() if any(text in one for one in rounds)]
    found = []
    for bound in case.bounds:
        for size in measured:
            if not bound.when(size) or (bound.base is not None and bound.base not in measured):
                continue
            if bound.reference is None:
                have = value(case, rounds, size, bound.ours, bound.metric)
            else:
                have = ratio(case, rounds, bound.metric, size, bound.ours, bound.reference, bound.base)
            found.append(Verdict(bound, size, have, case.unit))
    return found


def span(found: Spread, unit: str) -> str:
    """Returns what counts, with its spread."""
    return f"{shown(found.typical, unit)} ({shown(found.least, unit)} to {shown(found.most, unit)})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def section(case: Case, result: dict[str, Any], plotted: bool, ratios: bool = True) -> str:
    """Returns the section of a case."""
    rounds: Rounds = result["rounds"]
    parts = [f"### {case.title}"]
    if case.note:
        parts.append(case.note.strip())
    if plotted:
        parts.append(f"![{case.title}](plots/{case.name}.svg)")
    sizes = list(dict.fromkeys(size for one in rounds for size in one))
    for metric in metrics(case, rounds):
        rows = []
        for size in sizes:
            for name in case.contenders:
                found = value(case, rounds, size, name, metric)
                if found is None:
                    continue
                against = ratio(case, rounds, metric, size, name, "paramtree")
                low_high = f"{shown(found.least, case.unit)} to {shown(found.most, case.unit)}"
                cells = [size, name, shown(found.typical, case.unit), low_high]
                if ratios:
                    cells.append(
                        "" if against is None or name == "paramtree" else f"{against.typical:.2f}"
                    )
                rows.append(cells)
        header = [case.size, "contender", metric, "its rounds"]
        parts.append(table([*header, "over paramtree"] if ratios else header, rows))
    if checked := verdicts(case, rounds):
        rows = [
            [one.bound.metric, one.bound.ours, str(one.size), one.asked, one.answer, met(one)]
            for one in checked
        ]
        parts.append(table(["bound on", "of", case.size, "asked", "found", ""], rows))
    for name, why in result["absent"].items():
        parts.append(f"Left out: {name} ({why}).")
    for name, why in result["errors"].items():
        parts.append(f"Failed: {name} ({why}).")
    parts.append(f"{len(rounds)} rounds of {case.turns if not case.alone else 1} turns.")
    return "\n\n".join(parts)


def met(verdict: Verdict) -> str:
    """Returns whether a bound is met, and else why not."""
    if verdict.met:
        return "met"
    return f"**not met**{': ' if verdict.bound.why else ''}{verdict.bound.why}"


def machine_text(machine: dict[str, Any]) -> str:
    """Returns the description of a machine, a line each."""
    return "\n".join(f"- {key}: {text}" for key, text in machine.items())


def document(cases: dict[str, Case], results: list[dict[str, Any]], plotted: set[str]) -> str:
    """Returns the whole of RESULTS.md; the first of the results is the one with the bounds."""
    first, *others = results
    parts = [
        "# Benchmarks",
        "Written by `make bench`; `benchmarks/suite` says how it measures. Numbers on shared machines "
        "drift and are disturbed, so the ratios count, and of times the least: contenders take turns "
        "of a few milliseconds, in new processes in every round, and what is given is the least of "
        "all (of memory and of ratios the median), with the smallest and the largest round.",
        "## The machine",
        machine_text(first["machine"]),
        "## Which bounds are met",
    ]
    rows = []
    for name, result in first["cases"].items():
        if name in cases:
            for one in verdicts(cases[name], result["rounds"]):
                what = f"{name}: {one.bound.metric}"
                rows.append([what, one.bound.ours, str(one.size), one.asked, one.answer, met(one)])
    parts.append(table(["what", "of", "size", "asked", "found", ""], rows))
    parts.append("## Case by case")
    for name, result in first["cases"].items():
        if name in cases:
            parts.append(section(cases[name], result, name in plotted))
    for other in others:
        parts.append(f"## On {other['machine'].get('device', 'another machine')}")
        parts.append(machine_text(other["machine"]))
        for name, result in other["cases"].items():
            if name in cases:
                parts.append(section(cases[name], result, False))
    return "\n\n".join(parts) + "\n"
