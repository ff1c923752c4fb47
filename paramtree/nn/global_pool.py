"""Global pooling: the maximum or the mean of each channel over all spatial axes."""

from typing import Any

import jax
import jax.numpy as jnp

from paramtree.nn.pool import Pooling

__all__ = [
    "GlobalAvgPool1D",
    "GlobalAvgPool2D",
    "GlobalAvgPool3D",
    "GlobalMaxPool1D",
    "GlobalMaxPool2D",
    "GlobalMaxPool3D",
]


class _GlobalPool(Pooling):
    layout: str = ""

    def __post_init__(self) -> None:
        self._check_layout()

    def __repr__(self) -> str:
        ones = (1,) * len(self._axes)
        return self._repr(ones, ones, str((0,) * len(ones)), True, True)


class _GlobalMaxPool(_GlobalPool):
    def __call__(self, p: Any, x: Any) -> jax.Array:
        self._sizes(x)
        return jnp.max(x, self._axes, keepdims=True)


class _GlobalAvgPool(_GlobalPool):
    def __call__(self, p: Any, x: Any) -> jax.Array:
        self._check_floating(x)
        self._sizes(x)
        return jnp.mean(x, self._axes, keepdims=True)


class GlobalMaxPool1D(_GlobalMaxPool):
    """The maximum of each channel: (batch, width, channels) to (batch, 1, channels).

    The layout is "NWC" or "NCW". The errors are as for ``GlobalMaxPool2D``.

    Example:
      >>> GlobalMaxPool1D()({}, jnp.ones((2, 5, 3))).shape
      (2, 1, 3)
    """

    layout: str = "NWC"


class GlobalMaxPool2D(_GlobalMaxPool):
    """The maximum of each channel: (batch, height, width, channels) to (batch, 1, 1, channels).

    If several entries are the maximum, they share the gradient.

    Args:
      layout: "NHWC" or "NCHW".

    Raises:
      ValueError: the layout is invalid; when called: the input has other axes.

    Example:
      >>> GlobalMaxPool2D()({}, jnp.ones((2, 5, 5, 3))).shape
      (2, 1, 1, 3)
    """

    layout: str = "NHWC"


class GlobalMaxPool3D(_GlobalMaxPool):
    """The maximum of each channel over depth, height and width, which keep size 1.

    The layout is "NDHWC" or "NCDHW". The errors are as for ``GlobalMaxPool2D``.

    Example:
      >>> GlobalMaxPool3D()({}, jnp.ones((2, 5, 5, 5, 3))).shape
      (2, 1, 1, 1, 3)
    """

    layout: str = "NDHWC"


class GlobalAvgPool1D(_GlobalAvgPool):
    """The mean of each channel: (batch, width, channels) to (batch, 1, channels).

    The layout is "NWC" or "NCW". The errors are as for ``GlobalAvgPool2D``.

    Example:
      >>> GlobalAvgPool1D()({}, jnp.ones((2, 5, 3))).shape
      (2, 1, 3)
    """

    layout: str = "NWC"


class GlobalAvgPool2D(_GlobalAvgPool):
    """The mean of each channel: (batch, height, width, channels) to (batch, 1, 1, channels).

    Args:
      layout: "NHWC" or "NCHW".

    Raises:
      ValueError: the layout is invalid; when called: the input has other axes.
      TypeError: when called: the input is not floating-point.

    Example:
      >>> GlobalAvgPool2D()({}, jnp.ones((2, 5, 5, 3))).shape
      (2, 1, 1, 3)
    """

    layout: str = "NHWC"


class GlobalAvgPool3D(_GlobalAvgPool):
    """The mean of each channel over depth, height and width, which keep size 1.

    The layout is "NDHWC" or "NCDHW". The errors are as for ``GlobalAvgPool2D``.

    Example:
      >>> GlobalAvgPool3D()({}, jnp.ones((2, 5, 5, 5, 3))).shape
      (2, 1, 1, 1, 3)
    """

    layout: str = "NDHWC"
