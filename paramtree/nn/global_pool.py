"""Global pooling: the maximum or the mean of each channel over all spatial axes."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from paramtree.nn.pool import Pooling, check_floating
from paramtree.nn.spatial import check_layout, sizes_of, spatial_axes

__all__ = [
    "GlobalAvgPool1D",
    "GlobalAvgPool2D",
    "GlobalAvgPool3D",
    "GlobalMaxPool1D",
    "GlobalMaxPool2D",
    "GlobalMaxPool3D",
]


@dataclass(frozen=True, repr=False)
class _GlobalPool(Pooling):
    layout: str = ""

    def __post_init__(self) -> None:
        check_layout(self)

    def _axes(self, x: Any) -> tuple[int, ...]:
        sizes_of(self, x)
        return spatial_axes(self.layout)

    def __repr__(self) -> str:
        rank = len(self.layout) - 2
        ones = (1,) * rank
        return self._repr(ones, ones, str((0,) * rank), True, True)


@dataclass(frozen=True, repr=False)
class _GlobalMaxPool(_GlobalPool):
    def __call__(self, p: Any, x: Any) -> Any:
        return jnp.max(x, self._axes(x), keepdims=True)


@dataclass(frozen=True, repr=False)
class _GlobalAvgPool(_GlobalPool):
    def __call__(self, p: Any, x: Any) -> Any:
        check_floating(self, x)
        return jnp.mean(x, self._axes(x), keepdims=True)


@dataclass(frozen=True, repr=False)
class GlobalMaxPool1D(_GlobalMaxPool):
    """The maximum of each channel: (batch, width, channels) to (batch, 1, channels).

    Args:
      layout: "NWC" or "NCW".

    Raises:
      ValueError: as for ``GlobalMaxPool2D``.

    Example:
      >>> GlobalMaxPool1D()({}, jnp.ones((2, 5, 3))).shape
      (2, 1, 3)
    """

    layout: str = "NWC"


@dataclass(frozen=True, repr=False)
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


@dataclass(frozen=True, repr=False)
class GlobalMaxPool3D(_GlobalMaxPool):
    """The maximum of each channel over depth, height and width, which keep size 1.

    Args:
      layout: "NDHWC" or "NCDHW".

    Raises:
      ValueError: as for ``GlobalMaxPool2D``.

    Example:
      >>> GlobalMaxPool3D()({}, jnp.ones((2, 5, 5, 5, 3))).shape
      (2, 1, 1, 1, 3)
    """

    layout: str = "NDHWC"


@dataclass(frozen=True, repr=False)
class GlobalAvgPool1D(_GlobalAvgPool):
    """The mean of each channel: (batch, width, channels) to (batch, 1, channels).

    Args:
      layout: "NWC" or "NCW".

    Raises:
      ValueError, TypeError: as for ``GlobalAvgPool2D``.

    Example:
      >>> GlobalAvgPool1D()({}, jnp.ones((2, 5, 3))).shape
      (2, 1, 3)
    """

    layout: str = "NWC"


@dataclass(frozen=True, repr=False)
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


@dataclass(frozen=True, repr=False)
class GlobalAvgPool3D(_GlobalAvgPool):
    """The mean of each channel over depth, height and width, which keep size 1.

    Args:
      layout: "NDHWC" or "NCDHW".

    Raises:
      ValueError, TypeError: as for ``GlobalAvgPool2D``.

    Example:
      >>> GlobalAvgPool3D()({}, jnp.ones((2, 5, 5, 5, 3))).shape
      (2, 1, 1, 1, 3)
    """

    layout: str = "NDHWC"
