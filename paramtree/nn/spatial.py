"""The base of layers with spatial axes: layouts, settings per axis, padding.

A layout is a string with a letter for each axis of the data: N for batch, C for channels, and D, H
and W for depth, height and width, the spatial axes.
"""

from collections.abc import Sequence
from typing import Any

from jax import lax

from paramtree.nn.basic import is_integer
from paramtree.nn.layer import Layer

Sizes = int | Sequence[int]
Padding = int | str | Sequence[int | tuple[int, int]]

_LAYOUTS = ("NWC", "NCW", "NHWC", "NCHW", "NDHWC", "NCDHW")
_WORDS = {"N": "batch", "D": "depth", "H": "height", "W": "width", "C": "channels"}


class Spatial(Layer):
    """Base of layers with spatial axes. Subclasses declare ``layout`` and the settings per axis."""

    layout = ""

    @property
    def _axes(self: Any) -> tuple[int, ...]:
        """The positions of the spatial axes."""
        return tuple(i for i, letter in enumerate(self.layout) if letter not in "NC")

    def _check_layout(self: Any) -> None:
        # The default of a field is a class attribute: "NHWC" for Conv2D.
        known = [layout for layout in _LAYOUTS if len(layout) == len(type(self).layout)]
        if self.layout not in known:
            raise ValueError(
                f"{type(self).__name__}: layout must be {known[0]!r} or {known[1]!r}, but found "
                f"{self.layout!r}."
            )

    def _spread(self: Any, *settings: str, minimum: int = 1) -> None:
        """Replaces settings by one integer per axis, repeating a single number."""
        for setting in settings:
            value, rank = getattr(self, setting), len(self._axes)
            values = value if isinstance(value, tuple | list) else (value,) * rank
            if len(values) != rank or not all(is_integer(number, minimum) for number in values):
                sign = "positive" if minimum else "non-negative"
                raise ValueError(
                    f"{type(self).__name__}: {setting} must be a {sign} integer or a tuple of {rank}, "
                    f"but found {value!r}."
                )
            object.__setattr__(self, setting, tuple(int(number) for number in values))

    def _spread_padding(self: Any) -> None:
        """Replaces the padding by a pair (low, high) per axis, or by "same"."""
        value, rank = self.padding, len(self._axes)
        if isinstance(value, str) and value.lower() in ("same", "valid"):
            padding: Any = "same" if value.lower() == "same" else ((0, 0),) * rank
        else:
            pads = value if isinstance(value, tuple | list) else (value,) * rank
            pairs = [tuple(pad) if isinstance(pad, tuple | list) else (pad, pad) for pad in pads]
            valid = all(len(pair) == 2 and all(is_integer(n, 0) for n in pair) for pair in pairs)
            if len(pairs) != rank or not valid:
                raise ValueError(
                    f"{type(self).__name__}: padding must be a non-negative integer, a tuple of {rank} "
                    f"integers or pairs (low, high), or 'same' or 'valid', but found {value!r}."
                )
            padding = tuple((int(low), int(high)) for low, high in pairs)
        object.__setattr__(self, "padding", padding)

    def _pads(self: Any, sizes: Sequence[int], windows: Sequence[int]) -> list[tuple[int, int]]:
        """Returns the padding as pairs, computing "same" from the sizes."""
        padding = self.padding
        if padding == "same":
            padding = lax.padtype_to_pads(sizes, windows, self.strides, "SAME")
        return [(int(low), int(high)) for low, high in padding]

    def _sizes(self: Any, x: Any) -> tuple[int, ...]:
        """Returns an input's spatial sizes; raises ValueError for missing, excess or empty axes."""
        words = f"({', '.join(_WORDS[letter] for letter in self.layout)})"
        if x.ndim != len(self.layout):
            hint = " x[None] adds a batch axis." if x.ndim == len(self.layout) - 1 else ""
            raise ValueError(
                f"{self!r} needs an input {words} for layout {self.layout}, but found shape {x.shape}."
                f"{hint}"
            )
        sizes = tuple(x.shape[axis] for axis in self._axes)
        if 0 in sizes:
            raise ValueError(
                f"{self!r} needs an input {words} without empty spatial axes, but found shape "
                f"{x.shape}."
            )
        return sizes


def shown_padding(padding: Any) -> str:
    """Returns padding as Gluon prints it: one number per axis if both ends are equal."""
    if isinstance(padding, str) or any(low != high for low, high in padding):
        return str(padding)
    return str(tuple(low for low, _ in padding))
