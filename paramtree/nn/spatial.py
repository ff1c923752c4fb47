"""What the layers over space have in common: layouts, settings for each axis, padding.

A layout is a string with a letter for each axis of the data: N is the batch, C the channels, and
D, H and W are depth, height and width, the axes in space.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

__all__ = [
    "Padding",
    "Sizes",
    "check_layout",
    "on_axes",
    "padding_of",
    "pairs_for",
    "shown_padding",
    "sizes_of",
    "spatial_axes",
    "whole",
]

Sizes = int | Sequence[int]
Padding = int | str | Sequence[int | tuple[int, int]]

_LAYOUTS = ("NWC", "NCW", "NHWC", "NCHW", "NDHWC", "NCDHW")
_WORDS = {"N": "batch", "D": "depth", "H": "height", "W": "width", "C": "channels"}


def check_layout(layer: Any) -> int:
    """Returns how many axes in space a layer has; raises ValueError if its layout has not so many."""
    # A dataclass keeps the default of a field as an attribute of the class: "NHWC" for Conv2D.
    default = type(layer).layout
    known = [layout for layout in _LAYOUTS if len(layout) == len(default)]
    if layer.layout not in known:
        raise ValueError(
            f"{type(layer).__name__}: layout is {known[0]!r} or {known[1]!r}, but found "
            f"{layer.layout!r}."
        )
    return len(default) - 2


def whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number that is not too small."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        return False
    return int(value) >= least


def on_axes(layer: Any, what: str, value: Any, rank: int, least: int = 1) -> tuple[int, ...]:
    """Returns a setting for each axis; a single number is for all of them.

    Raises:
      ValueError: anything but whole numbers, or not one for each axis.
    """
    each = value if isinstance(value, tuple | list) else (value,) * rank
    if len(each) != rank or not all(whole(number, least) for number in each):
        raise ValueError(
            f"{type(layer).__name__}: {what} is a whole number of {least} or more, or a tuple of "
            f"{rank}, but found {value!r}."
        )
    return tuple(int(number) for number in each)


def padding_of(layer: Any, value: Any, rank: int) -> tuple[tuple[int, int], ...] | str:
    """Returns the padding (low, high) of each axis, or "same".

    Raises:
      ValueError: anything else than such a padding.
    """
    if isinstance(value, str) and value.lower() in ("same", "valid"):
        return "same" if value.lower() == "same" else ((0, 0),) * rank
    each = value if isinstance(value, tuple | list) else (value,) * rank
    pairs = tuple(tuple(pad) if isinstance(pad, tuple | list) else (pad, pad) for pad in each)
    if len(pairs) != rank or not all(len(p) == 2 and whole(p[0], 0) and whole(p[1], 0) for p in pairs):
        raise ValueError(
            f"{type(layer).__name__}: padding is a whole number of 0 or more, or a tuple of {rank} "
            f"numbers or pairs (low, high), or 'same' or 'valid', but found {value!r}."
        )
    return tuple((int(low), int(high)) for low, high in pairs)


def shown_padding(padding: Any) -> str:
    """Returns padding as Gluon prints it: a number for each axis, if it is the same at both ends."""
    if isinstance(padding, str) or any(low != high for low, high in padding):
        return str(padding)
    return str(tuple(low for low, _ in padding))


def pairs_for(
    padding: Any, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns padding as pairs; "same" depends on the size of the input."""
    if padding == "same":
        padding = lax.padtype_to_pads(sizes, windows, strides, "SAME")
    return [(int(low), int(high)) for low, high in padding]


def spatial_axes(layout: str) -> tuple[int, ...]:
    """Returns where the axes in space are."""
    return tuple(i for i, letter in enumerate(layout) if letter not in "NC")


def sizes_of(layer: Any, x: Any) -> tuple[int, ...]:
    """Returns the sizes of an input in space.

    Raises:
      ValueError: the input has not the axes of the layer's layout, or nothing along one of them.
    """
    layout: str = layer.layout
    words = f"({', '.join(_WORDS[letter] for letter in layout)})"
    if x.ndim != len(layout):
        one = " x[None] adds an axis for a batch of one." if x.ndim == len(layout) - 1 else ""
        raise ValueError(
            f"{layer!r} needs an input {words}, as its layout is {layout}, but found the shape "
            f"{x.shape}.{one}"
        )
    sizes = tuple(x.shape[axis] for axis in spatial_axes(layout))
    if 0 in sizes:
        raise ValueError(
            f"{layer!r} needs an input {words} that is empty along no axis but the batch, but found "
            f"the shape {x.shape}."
        )
    return sizes
