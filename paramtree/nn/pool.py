"""Pooling over one, two and three axes in space: the greatest entry or the mean of every window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from paramtree.nn.layer import Layer
from paramtree.nn.spatial import (
    Padding,
    Sizes,
    check_layout,
    on_axes,
    padding_of,
    pairs_for,
    shown_padding,
    sizes_of,
    spatial_axes,
)

__all__ = ["AvgPool1D", "AvgPool2D", "AvgPool3D", "MaxPool1D", "MaxPool2D", "MaxPool3D"]


class _Pooling(Layer):
    """What all pooling layers have in common."""

    layout: str

    @property
    def alias(self) -> str:
        """What a ``Sequential`` calls it: all pooling layers share one counter, as in Gluon."""
        return "pool"

    def _shown(self, size: Any, stride: Any, padding: str, ceil_mode: bool, everywhere: bool) -> str:
        kind = "max" if "Max" in type(self).__name__ else "avg"
        return (
            f"{type(self).__name__}(size={size}, stride={stride}, padding={padding}, "
            f"ceil_mode={ceil_mode}, global_pool={everywhere}, pool_type={kind}, layout={self.layout})"
        )


def _check_floating(layer: Layer, x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{layer!r} takes the mean of floating-point numbers, but found {x.dtype}: cast the input "
            "to float32."
        )


@dataclass(frozen=True, repr=False)
class _Pool(_Pooling):
    pool_size: Sizes = 2
    strides: Sizes | None = None
    padding: Padding = 0
    layout: str = ""
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        rank = check_layout(self)
        strides = self.pool_size if self.strides is None else self.strides
        size = on_axes(self, "pool_size", self.pool_size, rank)
        object.__setattr__(self, "pool_size", size)
        object.__setattr__(self, "strides", on_axes(self, "strides", strides, rank))
        padding: Any = padding_of(self, self.padding, rank)
        if padding != "same" and any(max(p) >= k for p, k in zip(padding, size, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: padding is less than pool_size, or a window would see nothing "
                f"but padding; found padding={shown_padding(padding)}, pool_size={size}."
            )
        object.__setattr__(self, "padding", padding)

    def _plan(self, x: Any) -> list[tuple[int, int, int, int, int, int]]:
        """Returns (axis, entries, windows, low, high, high for lax) for each axis in space."""
        sizes = sizes_of(self, x)
        size: Any = self.pool_size
        strides: Any = self.strides
        pads = pairs_for(self.padding, sizes, size, strides)
        plan = []
        for axis, n, window, stride, (low, high) in zip(
            spatial_axes(self.layout), sizes, size, strides, pads, strict=True
        ):
            room = n + low + high - window
            count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
            if self.ceil_mode and (count - 1) * stride >= n + low:
                count -= 1  # it would start where there is nothing but padding
            if count < 1:
                raise ValueError(
                    f"{self!r}: the windows are larger than an input of the shape {x.shape} with its "
                    "padding."
                )
            # What lax needs there for the last window, which may reach further than the padding.
            reach = max((count - 1) * stride + window - n - low, 0)
            plan.append((axis, n, count, low, high, reach))
        return plan

    def _reduce(self, x: Any, start: Any, function: Any, plan: Sequence[tuple[int, ...]]) -> Any:
        windows, steps, pads = [1] * x.ndim, [1] * x.ndim, [(0, 0)] * x.ndim
        size: Any = self.pool_size
        strides: Any = self.strides
        for (axis, _, _, low, _, reach), window, stride in zip(plan, size, strides, strict=True):
            windows[axis], steps[axis], pads[axis] = window, stride, (low, reach)
        return lax.reduce_window(x, start, function, windows, steps, pads)

    def __repr__(self) -> str:
        padding = shown_padding(self.padding)
        return self._shown(self.pool_size, self.strides, padding, self.ceil_mode, False)


@dataclass(frozen=True, repr=False)
class _MaxPool(_Pool):
    def __call__(self, p: Any, x: Any) -> Any:
        x, plan = jnp.asarray(x), self._plan(x)
        integer = jnp.issubdtype(x.dtype, jnp.integer)
        lowest = np.iinfo(x.dtype).min if integer else -math.inf
        return self._reduce(x, np.array(lowest, x.dtype), lax.max, plan)


@dataclass(frozen=True, repr=False)
class _AvgPool(_Pool):
    count_include_pad: bool = True

    def __call__(self, p: Any, x: Any) -> Any:
        x, plan = jnp.asarray(x), self._plan(x)
        _check_floating(self, x)
        # Sums of half precision stop growing at a few hundred, so they are in single precision.
        wide = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
        total = self._reduce(x.astype(wide), np.zeros((), wide), lax.add, plan)
        places = np.ones([1] * x.ndim, wide)
        size: Any = self.pool_size
        strides: Any = self.strides
        for (axis, n, count, low, high, _), window, stride in zip(plan, size, strides, strict=True):
            # How many places of each window count: those beyond the padding never do.
            begin = np.arange(count) * stride - low
            end = np.minimum(begin + window, n + high)
            if not self.count_include_pad:
                begin, end = np.maximum(begin, 0), np.minimum(end, n)
            along = end - begin
            if (along == along[0]).all():
                along = along[:1]  # mostly so, and then no array becomes part of the program
            others = [other for other in range(x.ndim) if other != axis]
            places = places * np.expand_dims(along.astype(wide), others)
        return (total / places).astype(x.dtype)

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.count_include_pad else f"{text[:-1]}, count_include_pad=False)"


@dataclass(frozen=True, repr=False)
class MaxPool1D(_MaxPool):
    """The greatest entry of every window: ``MaxPool2D`` with one axis in space.

    It takes (batch, width, channels) to (batch, new width, channels).

    Args:
      pool_size, strides, padding, ceil_mode: as for ``MaxPool2D``.
      layout: "NWC" or "NCW".

    Raises:
      ValueError: as ``MaxPool2D`` does.

    Example:
      >>> MaxPool1D()({}, jnp.array([[[1.0], [3.0], [2.0], [0.0]]])).ravel()
      Array([3., 2.], dtype=float32)
    """

    layout: str = "NWC"


@dataclass(frozen=True, repr=False)
class MaxPool2D(_MaxPool):
    """The greatest entry of every window, channel by channel.

    It takes (batch, height, width, channels) to (batch, new height, new width, channels). Along an
    axis of n entries there are ⌊(n + low + high - pool_size) / stride⌋ + 1 windows. Where several
    entries are the greatest, one of them gets the gradient.

    Args:
      pool_size: the windows' size; here and below a number, or a tuple of one for each axis.
      strides: the step from one window to the next; None for ``pool_size``, side by side.
      padding: how many places to add at both ends, which are never the greatest; a pair (low, high)
        for an axis where they differ; "valid" is 0, and "same" gives ⌈n / stride⌉ windows.
      layout: "NHWC" or "NCHW".
      ceil_mode: whether to round the number of windows up, not down. Then the last window may reach
        beyond the padding; one that would start there is left out, as in PyTorch. (MXNet keeps it.)

    Raises:
      ValueError: a setting that is not one, or padding as large as the windows; on calling: an input
        without these axes, or smaller than a window.

    Example:
      >>> MaxPool2D(pool_size=3, strides=2, padding=1)({}, jnp.ones((2, 28, 28, 8))).shape
      (2, 14, 14, 8)
    """

    layout: str = "NHWC"


@dataclass(frozen=True, repr=False)
class MaxPool3D(_MaxPool):
    """The greatest entry of every window: ``MaxPool2D`` with three axes in space.

    It takes (batch, depth, height, width, channels) to an output with these axes.

    Args:
      pool_size, strides, padding, ceil_mode: as for ``MaxPool2D``.
      layout: "NDHWC" or "NCDHW".

    Raises:
      ValueError: as ``MaxPool2D`` does.

    Example:
      >>> MaxPool3D((1, 2, 2))({}, jnp.ones((2, 4, 6, 8, 3))).shape
      (2, 4, 3, 4, 3)
    """

    layout: str = "NDHWC"


@dataclass(frozen=True, repr=False)
class AvgPool1D(_AvgPool):
    """The mean of every window: ``AvgPool2D`` with one axis in space.

    It takes (batch, width, channels) to (batch, new width, channels).

    Args:
      pool_size, strides, padding, ceil_mode, count_include_pad: as for ``AvgPool2D``.
      layout: "NWC" or "NCW".

    Raises:
      ValueError, TypeError: as ``AvgPool2D`` does.

    Example:
      >>> AvgPool1D()({}, jnp.array([[[1.0], [3.0], [2.0], [0.0]]])).ravel()
      Array([2., 1.], dtype=float32)
    """

    layout: str = "NWC"


@dataclass(frozen=True, repr=False)
class AvgPool2D(_AvgPool):
    """The mean of every window, channel by channel.

    Shapes and the number of windows are as for ``MaxPool2D``. Half precision is summed in single.

    Args:
      pool_size, strides, padding, ceil_mode: as for ``MaxPool2D``.
      layout: "NHWC" or "NCHW".
      count_include_pad: whether padding counts as zeros; without it the mean is of what there is.
        What a window has beyond the padding, as it may with ``ceil_mode``, never counts.

    Raises:
      ValueError: as ``MaxPool2D`` does.
      TypeError: on calling: an input of whole numbers.

    Example:
      >>> x = jnp.ones((1, 2, 2, 1))
      >>> AvgPool2D(padding=1)({}, x).ravel()
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
      >>> AvgPool2D(padding=1, count_include_pad=False)({}, x).ravel()
      Array([1., 1., 1., 1.], dtype=float32)
    """

    layout: str = "NHWC"


@dataclass(frozen=True, repr=False)
class AvgPool3D(_AvgPool):
    """The mean of every window: ``AvgPool2D`` with three axes in space.

    It takes (batch, depth, height, width, channels) to an output with these axes.

    Args:
      pool_size, strides, padding, ceil_mode, count_include_pad: as for ``AvgPool2D``.
      layout: "NDHWC" or "NCDHW".

    Raises:
      ValueError, TypeError: as ``AvgPool2D`` does.

    Example:
      >>> AvgPool3D((1, 2, 2))({}, jnp.ones((2, 4, 6, 8, 3))).shape
      (2, 4, 3, 4, 3)
    """

    layout: str = "NDHWC"
