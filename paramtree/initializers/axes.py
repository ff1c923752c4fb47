"""Finds jax's own initializers whose axes are not those of a layer's weight, (out, in, *spatial).

A function from ``jax.nn.initializers.lecun_normal()`` counts axes from the end: for it, (512, 8) has a
fan-in of 512. That is right for a model's own parameter (in, out), so ``p.param`` takes it as it is. In
a layer of this library it would scale the weight wrongly, and a rule cannot know which layout a leaf
has, so both refuse it.
"""

import functools
import inspect
from typing import Any

import jax

from paramtree.core.errors import RuleError
from paramtree.initializers.by_name import get, scaling_name
from paramtree.initializers.fans import VarianceScaling
from paramtree.initializers.values import Initializer, Shape

__all__ = ["check_rule", "of_weight"]


def of_weight(initializer: "Initializer | str", ndim: int = 2) -> Initializer:
    """Returns the initializer for the weight of a layer, (out, in, *spatial), as ``get`` does.

    Raises:
      ValueError: the name is unknown, or it is one of jax's own that takes the axes for others.
    """
    if found := _other_axes(initializer, ndim):
        text, ours, _ = found
        raise ValueError(
            f"{text} takes the last axes of a weight for (in, out), but a layer's weight is (out, in, "
            f"*spatial): write {ours}."
        )
    return get(initializer)


def check_rule(initializer: Any, name: str, shape: Shape) -> None:
    """Raises RuleError if it is one of jax's own whose axes may not be those of the leaf."""
    if found := _other_axes(initializer, len(shape)):
        text, ours, theirs = found
        raise RuleError(
            f"a rule gives {text} to `{name}`, {shape}: it takes the last axes for (in, out), but a "
            f"layer's weight is (out, in, *spatial), for which write {ours}. {theirs}"
        )


def _other_axes(initializer: Any, ndim: int) -> tuple[str, str, str] | None:
    """Returns what it is, what to write for (out, in, *spatial), and what for (*spatial, in, out)."""
    function = initializer
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    if getattr(function, "__module__", "") != _made("lecun_normal").__module__ or ndim < 2:
        return None
    made = getattr(function, "__qualname__", "")
    if made not in _QUALNAMES:
        return None
    held = inspect.getclosurevars(function).nonlocals
    keep = "If its axes are (*spatial, in, out), write {}."
    if made == _QUALNAMES[0]:
        symmetric = ndim == 2 and held.get("mode") in ("fan_avg", "fan_geo_avg")
        if (held.get("in_axis"), held.get("out_axis")) != (-2, -1) or symmetric:
            return None
        scaling = VarianceScaling(held["scale"], held["mode"], held["distribution"])
        if name := scaling_name(scaling):
            call, ours = f"jax.nn.initializers.{name}(", f'"{name}"'
        else:
            settings = f"{scaling.scale!r}, {scaling.mode!r}, {scaling.distribution!r}"
            call = f"jax.nn.initializers.variance_scaling({settings}, "
            ours = f"pt.initializers.VarianceScaling({settings})"
        theirs = f"{call}in_axis={ndim - 2}, out_axis={ndim - 1})"
        return (
            call.removesuffix(", ") + ")",
            f"{ours} or {call}in_axis=1, out_axis=0)",
            keep.format(theirs),
        )
    if ndim == 2 or (made == _QUALNAMES[1] and held.get("column_axis") != -1):
        return None
    call = f"jax.nn.initializers.{made.split('.')[0]}"
    if made == _QUALNAMES[1]:
        return f"{call}()", f"{call}(column_axis=0)", keep.format(f"{call}(column_axis={ndim - 1})")
    wrapped = f"lambda key, shape, dtype: {call}()(key, shape, dtype)"
    return f"{call}()", "pt.initializers.Orthogonal(1.0)", keep.format(wrapped)


def _made(name: str) -> Any:
    return getattr(jax.nn.initializers, name)()


_QUALNAMES = tuple(
    _made(name).__qualname__ for name in ("lecun_normal", "orthogonal", "delta_orthogonal")
)
