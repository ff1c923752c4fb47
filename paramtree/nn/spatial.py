"""Helpers for layers with spatial axes: layouts, settings per axis, padding.

A layout is a string with a letter for each axis of the data: N for batch, C for channels, and D, H
and W for depth, height and width, the spatial axes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

__all__ = [
    "Padding",
    "Sizes",
    "check_integer",
    "check_layout",
    "on_axes",
    "padding_of",
    "pairs_for",
    "shown_padding",
    "sizes_of",
    "spatial_axes",
]

Sizes = int | Sequence[int]
Padding = int | str | Sequence[int | tuple[int, int]]

_LAYOUTS = ("NWC", "NCW", "NHWC", "NCHW", "NDHWC", "NCDHW")
_WORDS = {"N": "batch", "D": "depth", "H": "height", "W": "width", "C": "channels"}


def check_layout(layer: Any) -> int:
    """Returns the number of spatial axes; raises ValueError if the layer's layout does not have it."""
    # A dataclass keeps the default of a field as a class attribute: "NHWC" for Conv2D.
    default = type(layer).layout
    known = [layout for layout in _LAYOUTS if len(layout) == len(default)]
    if layer.layout not in known:
        raise ValueError(
            f"{type(layer).__name__}: layout must be {known[0]!r} or {known[1]!r}, but found "
            f"{layer.layout!r}."
        )
    return len(default) - 2


def _is_integer(value: Any, minimum: int) -> bool:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return integer and int(value) >= minimum


def check_integer(layer: Any, setting: str, value: Any, minimum: int) -> None:
    """Raises ValueError unless a setting is an integer of at least ``minimum``, 0 or 1."""
    if not _is_integer(value, minimum):
        sign = "positive" if minimum else "non-negative"
        raise ValueError(
            f"{type(layer).__name__}: {setting} must be a {sign} integer, but found {value!r}."
        )


def on_axes(layer: Any, setting: str, value: Any, rank: int, minimum: int = 1) -> tuple[int, ...]:
    """Returns a setting for each axis, repeating a single number; raises ValueError if invalid."""
    values = value if isinstance(value, tuple | list) else (value,) * rank
    if len(values) != rank or not all(_is_integer(number, minimum) for number in values):
        sign = "positive" if minimum else "non-negative"
        raise ValueError(
            f"{type(layer).__name__}: {setting} must be a {sign} integer or a tuple of {rank}, but "
            f"found {value!r}."
        )
    return tuple(int(number) for number in values)


def padding_of(layer: Any, value: Any, rank: int) -> tuple[tuple[int, int], ...] | str:
    """Returns the padding (low, high) of each axis, or "same"; raises ValueError if invalid."""
    if isinstance(value, str) and value.lower() in ("same", "valid"):
        return "same" if value.lower() == "same" else ((0, 0),) * rank
    pads = value if isinstance(value, tuple | list) else (value,) * rank
    pairs = tuple(tuple(pad) if isinstance(pad, tuple | list) else (pad, pad) for pad in pads)
    if len(pairs) != rank or not all(len(p) == 2 and all(_is_integer(n, 0) for n in p) for p in pairs):
        raise ValueError(
            f"{type(layer).__name__}: padding must be a non-negative integer, a tuple of {rank} "
            f"integers or pairs (low, high), or 'same' or 'valid', but found {value!r}."
        )
    return tuple((int(low), int(high)) for low, high in pairs)


def shown_padding(padding: Any) -> str:
    """Returns padding as Gluon prints it: one number per axis if both ends are equal."""
    if isinstance(padding, str) or any(low != high for low, high in padding):
        return str(padding)
    return str(tuple(low for low, _ in padding))


def pairs_for(
    padding: Any, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns padding as pairs, computing "same" from the input's sizes."""
    if padding == "same":
        padding = lax.padtype_to_pads(sizes, windows, strides, "SAME")
    return [(int(low), int(high)) for low, high in padding]


def spatial_axes(layout: str) -> tuple[int, ...]:
    """Returns the positions of the spatial axes."""
    return tuple(i for i, letter in enumerate(layout) if letter not in "NC")


def sizes_of(layer: Any, x: Any) -> tuple[int, ...]:
    """Returns an input's spatial sizes; raises ValueError for missing, excess or empty axes."""
    layout: str = layer.layout
    words = f"({', '.join(_WORDS[letter] for letter in layout)})"
    if x.ndim != len(layout):
        hint = " x[None] adds a batch axis." if x.ndim == len(layout) - 1 else ""
        raise ValueError(
            f"{layer!r} needs an input {words} for layout {layout}, but found shape {x.shape}.{hint}"
        )
    sizes = tuple(x.shape[axis] for axis in spatial_axes(layout))
    if 0 in sizes:
        raise ValueError(
            f"{layer!r} needs an input {words} without empty spatial axes, but found shape {x.shape}."
        )
    return sizes
