"""Max and average pooling over one, two and three spatial axes."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paramtree.nn.spatial import Padding, Sizes, Spatial, shown_padding

__all__ = ["AvgPool1D", "AvgPool2D", "AvgPool3D", "MaxPool1D", "MaxPool2D", "MaxPool3D"]


class Pooling(Spatial):
    """Base of all pooling layers."""

    alias = "pool"  # as in Gluon, all pooling layers in a `Sequential` share one counter

    def _repr(self, size: Any, stride: Any, padding: str, ceil_mode: bool, global_pool: bool) -> str:
        kind = "max" if "Max" in type(self).__name__ else "avg"
        return (
            f"{type(self).__name__}(size={size}, stride={stride}, padding={padding}, "
            f"ceil_mode={ceil_mode}, global_pool={global_pool}, pool_type={kind}, layout={self.layout})"
        )

    def _check_floating(self, x: Any) -> None:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                f"{self!r} needs floating-point numbers to average, but found {x.dtype}: cast the "
                "input to float32."
            )


class _Pool(Pooling):
    pool_size: Sizes = 2
    strides: Sizes | None = None
    padding: Padding = 0
    layout: str = ""
    ceil_mode: bool = False

    def __post_init__(self: Any) -> None:
        self._check_layout()
        if self.strides is None:
            object.__setattr__(self, "strides", self.pool_size)
        self._spread("pool_size", "strides")
        self._spread_padding()
        same = self.padding == "same"
        if not same and any(max(p) >= k for p, k in zip(self.padding, self.pool_size, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: padding must be less than pool_size, so that no window is all "
                f"padding, but found padding={shown_padding(self.padding)}, pool_size={self.pool_size}."
            )

    def _geometry(self: Any, x: Any) -> list[tuple[int, ...]]:
        """Returns (axis, size, window, stride, window count, low, high) for each spatial axis."""
        sizes = self._sizes(x)
        pads = self._pads(sizes, self.pool_size)
        geometry: list[tuple[int, ...]] = []
        for axis, size, window, stride, (low, high) in zip(
            self._axes, sizes, self.pool_size, self.strides, pads, strict=True
        ):
            last = size + low + high - window  # where the last window may start
            count = (-(-last // stride) if self.ceil_mode else last // stride) + 1
            if self.ceil_mode and (count - 1) * stride >= size + low:
                count -= 1  # this window would contain only padding
            if count < 1:
                raise ValueError(
                    f"{self!r}: the windows are larger than an input of shape {x.shape} plus padding."
                )
            geometry.append((axis, size, window, stride, count, low, high))
        return geometry

    def _reduce(self, x: Any, start: Any, function: Any, geometry: Sequence[tuple[int, ...]]) -> Any:
        windows, steps, pads = [1] * x.ndim, [1] * x.ndim, [(0, 0)] * x.ndim
        for axis, size, window, stride, count, low, _ in geometry:
            high = max((count - 1) * stride + window - size - low, 0)  # the last window may need more
            windows[axis], steps[axis], pads[axis] = window, stride, (low, high)
        return lax.reduce_window(x, start, function, windows, steps, pads)

    def __repr__(self) -> str:
        pads = shown_padding(self.padding)
        return self._repr(self.pool_size, self.strides, pads, self.ceil_mode, False)


class _MaxPool(_Pool):
    def __call__(self, p: Any, x: Any) -> jax.Array:
        x, geometry = jnp.asarray(x), self._geometry(x)
        lowest = np.array(-math.inf if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.integer):
            lowest = np.array(np.iinfo(x.dtype).min, x.dtype)
        # On CPU the gradient of a reduce_window is select-and-scatter, which takes 6 to 20 times as
        # long as comparing, except for large windows: comparisons grow in number with the window.
        if any(window > (8 if stride >= window else 16) for _, _, window, stride, *_ in geometry):
            return self._reduce(x, lowest, lax.max, geometry)
        return _compared(x, lowest, tuple(geometry))


@functools.partial(jax.jit, static_argnums=2, inline=True)  # one call where the layer is not under jit
def _compared(x: Any, lowest: Any, geometry: tuple[tuple[int, ...], ...]) -> Any:
    """Returns the first maximum of every window, by comparing the entries one after another."""
    # The last axis first: of equal entries in different rows, that of the first row is kept.
    for axis, size, window, stride, count, low, _ in reversed(geometry):
        reach = (count - 1) * stride + 1  # from the start of the first window to that of the last
        high = reach + window - 1 - size - low
        if low or high > 0:
            x = lax.pad(x, lowest, [(low, high, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])
        greatest = lax.slice_in_dim(x, 0, reach, stride, axis)
        for i in range(1, window):
            y = lax.slice_in_dim(x, i, i + reach, stride, axis)
            # NaN wins. Of equal entries the earlier one gets all of the gradient.
            greatest = jnp.where((y > greatest) | (y != y), y, greatest)
        x = greatest
    return x


class _AvgPool(_Pool):
    count_include_pad: bool = True

    def __call__(self, p: Any, x: Any) -> jax.Array:
        x, geometry = jnp.asarray(x), self._geometry(x)
        self._check_floating(x)
        # Half-precision sums stop growing at a few hundred, so sum in single precision.
        wide = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
        total = self._reduce(x.astype(wide), np.zeros((), wide), lax.add, geometry)
        divisor = np.ones([1] * x.ndim, wide)
        for axis, size, window, stride, count, low, high in geometry:
            # Entries beyond the padding never count towards the mean.
            begin = np.arange(count) * stride - low
            end = np.minimum(begin + window, size + high)
            if not self.count_include_pad:
                begin, end = np.maximum(begin, 0), np.minimum(end, size)
            lengths = end - begin
            if (lengths == lengths[0]).all():
                lengths = lengths[:1]  # the usual case; keeps the array out of the compiled program
            axes = [i for i in range(x.ndim) if i != axis]
            divisor = divisor * np.expand_dims(lengths.astype(wide), axes)
        return (total / divisor).astype(x.dtype)

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.count_include_pad else f"{text[:-1]}, count_include_pad=False)"


class MaxPool1D(_MaxPool):
    """Max pooling over sequences (batch, width, channels): ``MaxPool2D`` with one spatial axis.

    The layout is "NWC" or "NCW". All other settings and the errors are as for ``MaxPool2D``.

    Example:
      >>> MaxPool1D()({}, jnp.array([[[1.0], [3.0], [2.0], [0.0]]])).ravel()
      Array([3., 2.], dtype=float32)
    """

    layout: str = "NWC"


class MaxPool2D(_MaxPool):
    """Max pooling over images: the maximum of every window, per channel.

    It maps (batch, height, width, channels) to (batch, new height, new width, channels). An axis of
    size n has ⌊(n + low + high - pool_size) / stride⌋ + 1 windows. If several entries of a window are
    the maximum, the first of them gets the gradient, as in PyTorch.

    Args:
      pool_size: the windows' size; this and the next settings are a number or one number per axis.
      strides: the step from one window to the next; ``pool_size`` if None.
      padding: the number of entries to add at both ends of an axis, or a pair (low, high); they are
        never the maximum. "valid" is 0, and "same" gives ⌈n / stride⌉ windows.
      layout: "NHWC" or "NCHW".
      ceil_mode: whether to round the number of windows up instead of down. The last window may then
        extend beyond the padding, but not start there, as in PyTorch. (MXNet keeps such windows.)

    Raises:
      ValueError: a setting is invalid, or the padding is as large as a window; when called: the input
        has other axes, or is smaller than a window.

    Example:
      >>> MaxPool2D(pool_size=3, strides=2, padding=1)({}, jnp.ones((2, 28, 28, 8))).shape
      (2, 14, 14, 8)
    """

    layout: str = "NHWC"


class MaxPool3D(_MaxPool):
    """Max pooling over volumes or videos (batch, depth, height, width, channels), as ``MaxPool2D``.

    The layout is "NDHWC" or "NCDHW". All other settings and the errors are as for ``MaxPool2D``.

    Example:
      >>> MaxPool3D((1, 2, 2))({}, jnp.ones((2, 4, 6, 8, 3))).shape
      (2, 4, 3, 4, 3)
    """

    layout: str = "NDHWC"


class AvgPool1D(_AvgPool):
    """Average pooling over sequences (batch, width, channels): ``AvgPool2D`` with one spatial axis.

    The layout is "NWC" or "NCW". All other settings and the errors are as for ``AvgPool2D``.

    Example:
      >>> AvgPool1D()({}, jnp.array([[[1.0], [3.0], [2.0], [0.0]]])).ravel()
      Array([2., 1.], dtype=float32)
    """

    layout: str = "NWC"


class AvgPool2D(_AvgPool):
    """Average pooling over images: the mean of every window, per channel.

    Shapes and numbers of windows are as for ``MaxPool2D``. Half precision is summed in float32.

    Args:
      pool_size, strides, padding, ceil_mode: as for ``MaxPool2D``.
      layout: "NHWC" or "NCHW".
      count_include_pad: whether the mean includes the padding, as zeros. Entries beyond the padding,
        which ``ceil_mode`` may add to the last window, never count.

    Raises:
      ValueError: as for ``MaxPool2D``.
      TypeError: when called: the input is not floating-point.

    Example:
      >>> x = jnp.ones((1, 2, 2, 1))
      >>> AvgPool2D(padding=1)({}, x).ravel()
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
      >>> AvgPool2D(padding=1, count_include_pad=False)({}, x).ravel()
      Array([1., 1., 1., 1.], dtype=float32)
    """

    layout: str = "NHWC"


class AvgPool3D(_AvgPool):
    """Average pooling over volumes or videos (batch, depth, height, width, channels), as ``AvgPool2D``.

    The layout is "NDHWC" or "NCDHW". All other settings and the errors are as for ``AvgPool2D``.

    Example:
      >>> AvgPool3D((1, 2, 2))({}, jnp.ones((2, 4, 6, 8, 3))).shape
      (2, 4, 3, 4, 3)
    """

    layout: str = "NDHWC"
