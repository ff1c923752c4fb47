"""Counts the floating-point operations of each layer call, with XLA's cost analysis.

The model is traced once. Each equation of its jaxpr names the call that made it; the equations of one
call are lowered together, and XLA counts them without compiling. XLA counts the body of a loop once,
so scans are opened here and counted once per iteration.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend.core import Literal

from paramtree.inspect.observe import call_of

__all__ = ["Work", "calls_in", "count_flops", "split_by_call"]

# Primitives that wrap one jaxpr; names of new and old jax versions.
_WRAPPERS = ("jit", "pjit", "checkpoint", "remat2", "closed_call", "core_call", "custom_jvp_call",
             "custom_vjp_call")  # fmt: skip


class Work(NamedTuple):
    """Equations of one call and how often they run, or branches, only one of which runs."""

    call: int
    equations: Any = None  # a jaxpr
    times: int = 1
    branches: tuple[Sequence["Work"], ...] = ()


def calls_in(jaxpr: Any) -> set[int]:
    """Returns the numbers of the calls with an equation in a jaxpr, or in one nested in it."""
    numbers: set[int] = set()
    for equation in jaxpr.eqns:
        number = call_of(equation)
        if number is not None:
            numbers.add(number)
        for inner in _inner_jaxprs(equation):
            numbers |= calls_in(inner)
    return numbers


def split_by_call(jaxpr: Any) -> tuple[list[bool], list[Work]]:
    """Returns which inputs the outputs of a jaxpr depend on, and the work of each call in it.

    Equations that no output depends on are left out, as jax drops them when it lowers the program.
    """
    return _Splitter().split(jaxpr, [True] * len(jaxpr.outvars), 0)


class _Splitter:
    def __init__(self) -> None:
        self._opened: dict[Any, bool] = {}  # by jaxpr: whether it contains calls or scans

    def split(self, jaxpr: Any, wanted: Sequence[bool], call: int) -> tuple[list[bool], list[Work]]:
        """Splits a jaxpr, given which outputs are needed; unmarked equations belong to ``call``."""
        needed = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and _varies(v)}
        own: dict[int, list[Any]] = defaultdict(list)
        work: list[Work] = []
        for equation in reversed(jaxpr.eqns):
            outputs = [v in needed for v in equation.outvars]
            if not any(outputs) and not equation.effects:
                continue
            number = call_of(equation)
            number = call if number is None else number
            uses = [True] * len(equation.invars)
            if self._opens(equation):
                uses, inner = self._open_equation(equation, outputs, number)
                work += inner
            else:
                own[number].append(equation)
            needed |= {v for v, use in zip(equation.invars, uses, strict=True) if use and _varies(v)}
        work += [Work(number, _sub_jaxpr(jaxpr, equations)) for number, equations in own.items()]
        return [v in needed for v in jaxpr.invars], work

    def _opens(self, equation: Any) -> bool:
        """Whether to look inside an equation: it is a scan, or contains calls or scans."""
        name = equation.primitive.name
        opened = name in (*_WRAPPERS, "cond", "while")
        return name == "scan" or (opened and any(map(self._has_calls, _inner_jaxprs(equation))))

    def _has_calls(self, jaxpr: Any) -> bool:
        if jaxpr not in self._opened:
            self._opened[jaxpr] = any(
                call_of(eqn) is not None or self._opens(eqn) for eqn in jaxpr.eqns
            )
        return self._opened[jaxpr]

    def _open_equation(
        self, equation: Any, outputs: list[bool], call: int
    ) -> tuple[list[bool], list[Work]]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":  # a step may read anything that the previous step carries
            body = _open(params["jaxpr"])
            uses, work = self.split(body, [True] * len(body.outvars), call)
            return uses, [item._replace(times=item.times * params["length"]) for item in work]
        if name == "cond":
            branches = [self.split(_open(branch), outputs, call) for branch in params["branches"]]
            uses = [any(flags) for flags in zip(*(uses for uses, _ in branches), strict=True)]
            return [True, *uses], [Work(call, branches=tuple(work for _, work in branches))]
        if name == "while":  # the trip count is unknown; XLA counts one iteration
            bodies = [_open(params["cond_jaxpr"]), _open(params["body_jaxpr"])]
            work = [w for body in bodies for w in self.split(body, [True] * len(body.outvars), call)[1]]
            return [True] * len(equation.invars), work
        return self.split(_inner_jaxprs(equation)[0], outputs, call)


def count_flops(work: Sequence[Work], known: dict[Hashable, float]) -> dict[int, float]:
    """Returns the floating-point operations of each call that has work; NaN where unknown.

    ``known`` caches the counts, so that equal sets of equations are lowered once.
    """
    total: dict[int, float] = defaultdict(float)
    for call, equations, times, branches in work:
        if branches:  # like XLA, count the most expensive branch
            counts = max((count_flops(branch, known) for branch in branches), key=_weight)
        else:
            key = frozenset(Counter(map(_form, equations.eqns)).items())
            if key not in known:
                known[key] = _analysed(equations)
            counts = {call: known[key]}
        for number, count in counts.items():
            total[number] += times * count
    return total


def _weight(counts: dict[int, float]) -> float:
    total = sum(counts.values())
    return math.inf if math.isnan(total) else total


def _analysed(equations: Any) -> float:
    """Returns XLA's count of the operations in a jaxpr; NaN if it has none."""
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equations.invars]
    run = functools.partial(jax.core.eval_jaxpr, equations, ())
    try:
        # The CPU backend analyses without compiling; those of accelerators do not.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            analysis: Any = jax.jit(run).lower(*inputs).cost_analysis()
        # XLA reports a negative count for custom calls it does not know.
        return max(0.0, float(analysis.get("flops", 0.0)))
    except Exception:  # from any backend, or without an analysis; only this count becomes unknown
        return math.nan


def _sub_jaxpr(jaxpr: Any, reverse: Sequence[Any]) -> Any:
    """Returns a jaxpr of some equations, given in reverse order, that outputs all their results."""
    equations = list(reversed(reverse))
    outputs = [v for equation in equations for v in equation.outvars]
    read = dict.fromkeys(v for equation in equations for v in equation.invars if _varies(v))
    bound = set(outputs)
    inputs = [v for v in read if v not in bound]
    return jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=equations)


def _form(equation: Any) -> Hashable:
    """Returns a hashable key of everything the count of an equation depends on."""
    avals = tuple(v.aval for v in (*equation.invars, *equation.outvars))
    params = tuple((name, _form_of(value)) for name, value in equation.params.items())
    return equation.primitive.name, avals, params


def _form_of(value: Any) -> Any:
    if hasattr(value, "eqns"):
        return tuple(map(_form, value.eqns))
    if isinstance(value, tuple | list):
        return tuple(map(_form_of, value))
    if callable(value):
        return type(value)  # such as a custom derivative rule
    return value if isinstance(value, str | int | float | None) else repr(value)


def _inner_jaxprs(equation: Any) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation."""
    values = [
        value
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, tuple | list) else (parameter,))
    ]
    return [_open(value) for value in values if hasattr(value, "eqns")]


def _open(jaxpr: Any) -> Any:
    """Returns a jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _varies(atom: Any) -> bool:
    return not isinstance(atom, Literal)
