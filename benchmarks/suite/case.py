"""The definition of a case. The package docstring says how to write one."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Size = int | str


class Absent(Exception):  # noqa: N818  # not an error
    """A contender cannot take part; the message says why."""


@dataclass(frozen=True)
class Timed:
    """A call to time, with an untimed preparation before each."""

    call: Callable[..., Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Measured:
    """A call that returns the value itself."""

    call: Callable[[], float]


@dataclass(frozen=True)
class Bound:
    """An upper bound on a metric of a contender.

    Attributes:
      metric: the name of the metric.
      reference: a contender, several contenders whose best counts in each round, or None for a limit in
        the unit of the case.
      limit: the largest ratio, or value, that meets the bound.
      when: whether the bound applies to a size.
      ours: the contender it applies to.
      base: the size of the reference, if it differs.
      why: the explanation in the table where the bound is not met.
    """

    metric: str
    reference: str | tuple[str, ...] | None
    limit: float
    when: Callable[[Any], bool] = lambda size: True
    ours: str = "paramtree"
    base: Size | None = None
    why: str = ""


@dataclass(frozen=True)
class Case:
    """A benchmark, for several sizes and contenders.

    Attributes:
      name: the name for ``--only``, and of the plot.
      title: the heading of its section.
      sizes: the arguments of the contenders.
      contenders: maps each name to a function of a size that sets up and returns the metrics.
      bounds: the bounds to check.
      unit: ``"s"``, ``"bytes"``, or any other text, which is shown verbatim.
      size: the unit of the sizes; the label of the plot's axis.
      rounds: the maximum number of rounds.
      turns: the number of turns per round.
      slice: the seconds of calls per turn of a metric.
      seconds: no round starts after this time.
      smoke: the sizes of the smoke run.
      packages: the peers whose versions the tables list.
      alone: whether processes run one after the other, for metrics that the set-up measures.
      cached: whether XLA may reuse what an earlier process compiled.
      limit: the timeout of a process in seconds.
      units: the units of metrics that have another.
      together: whether the many metrics of a single contender share a table, and panels of the plot.
      note: text below the heading.
    """

    name: str
    title: str
    sizes: tuple[Size, ...]
    contenders: Mapping[str, Callable[[Any], Mapping[str, Any]]]
    bounds: tuple[Bound, ...] = ()
    unit: str = "s"
    size: str = "leaves"
    rounds: int = 5
    turns: int = 15
    slice: float = 0.01
    seconds: float = 90
    smoke: tuple[Size, ...] = field(default=())
    packages: tuple[str, ...] = ()
    alone: bool = False
    cached: bool = False
    limit: float = 300
    units: Mapping[str, str] = field(default_factory=dict)
    together: bool = False
    note: str = ""

    def unit_of(self, metric: str) -> str:
        """Returns the unit of a metric."""
        return self.units.get(metric, self.unit)


def load() -> dict[str, Case]:
    """Returns all cases by name; the files in ``cases`` are loaded in alphabetical order."""
    from benchmarks.suite import cases

    loaded: dict[str, Case] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(cases.__path__)):
        for case in importlib.import_module(f"{cases.__name__}.{module}").CASES:
            if case.name in loaded:
                raise ValueError(f"two cases are called {case.name!r}: rename one")
            loaded[case.name] = case
    return loaded
