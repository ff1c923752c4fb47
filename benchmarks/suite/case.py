"""What a case of the suite is. The package's docstring says how to write one."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Size = int | str


class Absent(Exception):  # noqa: N818  # it is no error
    """A contender cannot take part, and why."""


@dataclass(frozen=True)
class Timed:
    """A call to time, with what must be made anew before each."""

    call: Callable[..., Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Measured:
    """A call that returns the value itself."""

    call: Callable[[], float]


@dataclass(frozen=True)
class Bound:
    """What a metric of a contender must reach.

    Attributes:
      metric: the name of the metric.
      reference: a contender, several of which the best of a round counts, or None for a limit in the
        unit of the case.
      limit: the largest ratio, or value, that meets the bound.
      when: the sizes for which it is asked.
      ours: the contender that it is asked of.
      base: the size at which the reference is taken, if not at the same.
      why: said in the table where it is not met; the floor.
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
    """One thing that is measured, for several sizes and contenders.

    Attributes:
      name: what ``--only`` takes; also the name of its plot.
      title: the heading of its section.
      sizes: what the contenders are called with.
      contenders: for each name a function of a size that sets up and returns the metrics.
      bounds: what is asked.
      unit: ``"s"`` or ``"bytes"``, or anything else, which is shown as it is.
      size: what a size counts; the label of the plot's axis.
      rounds: how many rounds there are at most.
      turns: how many turns a round has.
      slice: how many seconds of calls there are in a turn of a metric.
      seconds: no new round begins after this time.
      smoke: the sizes of the smoke run.
      packages: the peers whose versions the table gives.
      alone: whether processes run one after the other, for what a set-up itself measures.
      cached: whether XLA may reuse what an earlier process compiled.
      limit: the seconds after which a process is given up.
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
    note: str = ""


def load() -> dict[str, Case]:
    """Returns all cases by name, from the files in ``cases``, in the order of their names."""
    from benchmarks.suite import cases

    found: dict[str, Case] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(cases.__path__)):
        for case in importlib.import_module(f"{cases.__name__}.{module}").CASES:
            if case.name in found:
                raise ValueError(f"two cases are called {case.name!r}: rename one")
            found[case.name] = case
    return found
