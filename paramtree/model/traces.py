"""Which jax transforms a model is in: what is traced once but runs many times must not draw or write.

A trace knows what it is made for, and the trace that it is in. The body of a scan or a map is traced
once for all its iterations, so all would draw one key. ``jit`` and ``checkpoint`` keep the trace of a
function, so what a second call would draw or write is lost, unless the scope is an argument.
"""

import sys
import weakref
from collections.abc import Sequence
from typing import Any

from paramtree.compat import take_current_trace

__all__ = ["current_trace", "flattened_for", "replayed", "within"]

# What a trace is made for, in the words of jax's debug information. These run what they trace once.
_ONCE = ("cond", "switch", "custom_jvp", "custom_vjp", "grad")
_KEPT = ("jit", "pjit", "checkpoint", "remat")  # these keep their traces
_WORDS = {"BatchTrace": "vmap", "JVPTrace": "grad", "LinearizeTrace": "grad", "JaxprTrace": "grad"}
_FLATTENING = tuple(f"jax._src.{name}" for name in ("tree_util", "flattree", "api_util", "util"))


def current_trace() -> Any:
    """Returns a weak reference to jax's current trace."""
    with take_current_trace()() as trace:
        return weakref.ref(trace)


def flattened_for() -> str:
    """Returns what a pytree is flattened for: "jit", also for a checkpoint, "tree.map", or "".

    Only the first of these may find other leaves than parameters.
    """
    frame: Any = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith("paramtree.model."):
        frame = frame.f_back
    if not frame.f_globals.get("__name__", "").startswith("jax"):
        return "jit"  # compiled code, which has no frame
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_FLATTENING):
        if frame.f_code.co_name in ("tree_map", "tree_map_with_path"):
            return "tree.map"
        frame = frame.f_back
    module = "" if frame is None else frame.f_globals.get("__name__", "")
    return "jit" if module in ("jax._src.pjit", "jax._src.ad_checkpoint") else ""


def within(outer: Any) -> list[str]:
    """Returns what the traces inside a trace are made for, from the inside out."""
    trace, made_for = current_trace()(), list[str]()
    while trace is not None and trace is not outer():
        kind = type(trace).__name__
        frame = getattr(trace, "frame", None)
        if frame is not None:
            kind = str(getattr(getattr(frame, "debug_info", None), "traced_for", kind))
        made_for.append(_WORDS.get(kind, kind))
        trace = getattr(trace, "parent_trace", None)
    return made_for if trace is not None else [*made_for, "another trace"]


def replayed(made_for: Sequence[str], argument: bool) -> str:
    """Returns the first transform that would repeat what is done in it, or an empty string.

    ``argument`` says that the scope is an argument of those of ``jit`` and ``checkpoint``.
    """
    harmless = (*_ONCE, *_KEPT) if argument else _ONCE
    return next((kind for kind in made_for if not kind.startswith(harmless)), "")
