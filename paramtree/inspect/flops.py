"""How many floating-point operations each call of a layer is, by XLA's own cost analysis.

The model is traced once. The equations of its jaxpr say in which call they were made, so those of one
call are lowered by themselves, and XLA counts them. Nothing is compiled. XLA counts what is inside a
loop once, however often it runs; so a scan is taken apart here, and counts as often as it runs.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax.extend.core import Literal

from paramtree.model.observe import call_of

__all__ = ["Work", "calls_in", "count_flops", "divide"]

# Equations that only hold others, and the parameter that has these; newer and older names alike.
_WRAPPERS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class Work(NamedTuple):
    """Equations of one call and how often they run, or branches of which one runs."""

    call: int
    equations: Any = None  # a jaxpr
    times: int = 1
    branches: tuple[Sequence["Work"], ...] = ()


def calls_in(jaxpr: Any) -> set[int]:
    """Returns the numbers of the calls that left an equation in a jaxpr or in those inside it."""
    found: set[int] = set()
    for equation in jaxpr.eqns:
        number = call_of(equation)
        if number is not None:
            found.add(number)
        for inner in _inside(equation):
            found |= calls_in(inner)
    return found


def divide(jaxpr: Any) -> tuple[list[bool], list[Work]]:
    """Returns which inputs the outputs of a jaxpr depend on, and the work of each call in it.

    What no output depends on is no work, as jax leaves it out when it lowers the whole.
    """
    return _Divider().divide(jaxpr, [True] * len(jaxpr.outvars), 0)


class _Divider:
    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, bool]] = {}  # by the id of a jaxpr, which lives here

    def divide(self, jaxpr: Any, wanted: Sequence[bool], call: int) -> tuple[list[bool], list[Work]]:
        """Divides a jaxpr of which some outputs are wanted; ``call`` has what does not say its own."""
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
                uses, inner = self._within(equation, outputs, number)
                work += inner
            else:
                own[number].append(equation)
            needed |= {v for v, use in zip(equation.invars, uses, strict=True) if use and _varies(v)}
        work += [Work(number, _part(jaxpr, equations)) for number, equations in own.items()]
        return [v in needed for v in jaxpr.invars], work

    def _opens(self, equation: Any) -> bool:
        """Whether an equation is taken apart: it is a scan, or has calls or scans in it."""
        name = equation.primitive.name
        if name == "scan":
            return True
        opened = name in _WRAPPERS or name in ("cond", "while")
        return opened and any(map(self._has_parts, _inside(equation)))

    def _has_parts(self, jaxpr: Any) -> bool:
        if id(jaxpr) not in self._found:
            found = any(
                call_of(equation) is not None or self._opens(equation) for equation in jaxpr.eqns
            )
            self._found[id(jaxpr)] = jaxpr, found
        return self._found[id(jaxpr)][1]

    def _within(self, equation: Any, outputs: list[bool], call: int) -> tuple[list[bool], list[Work]]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":  # a step may need what the step before made, so all of it is needed
            body = _open(params["jaxpr"])
            uses, work = self.divide(body, [True] * len(body.outvars), call)
            return uses, [one._replace(times=one.times * params["length"]) for one in work]
        if name == "cond":
            each = [self.divide(_open(branch), outputs, call) for branch in params["branches"]]
            uses = [any(some) for some in zip(*(uses for uses, _ in each), strict=True)]
            return [True, *uses], [Work(call, branches=tuple(work for _, work in each))]
        if name == "while":  # nobody knows how often it runs: once, as XLA has it
            parts = [_open(params["cond_jaxpr"]), _open(params["body_jaxpr"])]
            halves = [self.divide(part, [True] * len(part.outvars), call)[1] for part in parts]
            return [True] * len(equation.invars), [*halves[0], *halves[1]]
        return self.divide(_open(params[_WRAPPERS[name]]), outputs, call)


def count_flops(work: Sequence[Work], known: dict[Hashable, float]) -> dict[int, float]:
    """Returns the floating-point operations of each call that has work; NaN where nobody knows.

    Args:
      work: what ``divide`` found.
      known: the counts of equations so far; what is alike is lowered only once.
    """
    total: dict[int, float] = defaultdict(float)
    for call, equations, times, branches in work:
        if branches:  # the one with the most, as XLA has it
            found = max((count_flops(branch, known) for branch in branches), key=_weight)
        else:
            key = frozenset(Counter(map(_form, equations.eqns)).items())
            if key not in known:
                known[key] = _analysed(equations)
            found = {call: known[key]}
        for number, value in found.items():
            total[number] += times * value
    return total


def _weight(counts: dict[int, float]) -> float:
    total = sum(counts.values())
    return math.inf if math.isnan(total) else total


def _analysed(equations: Any) -> float:
    """Returns what XLA counts for the equations of a jaxpr."""
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equations.invars]
    run = functools.partial(jax.core.eval_jaxpr, equations, ())
    try:
        # The backends of accelerators count only what they compiled; that of a CPU need not compile.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            found: Any = jax.jit(run).lower(*inputs).cost_analysis()
    except Exception:  # of any library below: then this number is not known, but all others are
        return math.nan
    if isinstance(found, list):
        found = found[0] if found else None
    # Below 0 is XLA's way to say that it does not know a custom call.
    return math.nan if found is None else max(0.0, float(found.get("flops", 0.0)))


def _part(jaxpr: Any, reverse: Sequence[Any]) -> Any:
    """Returns some equations of a jaxpr as one that keeps all they compute."""
    equations = list(reversed(reverse))
    made = [v for equation in equations for v in equation.outvars]
    free = dict.fromkeys(v for equation in equations for v in equation.invars if _varies(v))
    known = set(made)
    inputs = [v for v in free if v not in known]
    return jaxpr.replace(constvars=[], invars=inputs, outvars=made, eqns=equations)


def _form(equation: Any) -> Hashable:
    """Returns what the count of an equation depends on."""
    avals = tuple(v.aval for v in (*equation.invars, *equation.outvars))
    params = tuple((name, _form_of(value)) for name, value in equation.params.items())
    return equation.primitive.name, avals, params


def _form_of(value: Any) -> Any:
    if hasattr(value, "eqns"):
        return tuple(map(_form, value.eqns))
    if isinstance(value, tuple | list):
        return tuple(map(_form_of, value))
    if callable(value):
        return type(value)  # such as the rule of a derivative
    return value if isinstance(value, str | int | float | None) else repr(value)


def _inside(equation: Any) -> list[Any]:
    """Returns the jaxprs that an equation has as parameters."""
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
