"""Layers that resize images without parameters."""

from typing import Any

import jax

from paramtree.nn.spatial import Sizes, Spatial
from paramtree.typing import Scope

__all__ = ["Bilinear", "Upsample"]


class _Resize(Spatial):
    """Base of layers that upsample by integer factors, ``scale``."""

    def _resized(self: Any, x: Any, mode: str) -> Any:
        shape = list(x.shape)
        for axis, size, factor in zip(self._axes, self._sizes(x), self.scale, strict=True):
            shape[axis] = size * factor
        return jax.image.resize(x, shape, mode)


class Upsample(_Resize):
    """Upsamples images by an integer factor, like ``torch.nn.Upsample``.

    It maps (batch, height, width, channels) to (batch, scale · height, scale · width, channels).

    Args:
      scale: the factor, an integer, or a tuple (height, width) of integers.
      mode: "nearest" to repeat every pixel, or "bilinear" to interpolate, as ``Bilinear`` does.
      layout: "NHWC" or "NCHW".

    Raises:
      ValueError: a setting is invalid; when called: the input has other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1)
      >>> Upsample(2)({}, x)[0, 0, :, 0], Upsample(2, "bilinear")({}, x)[0, 0, :, 0]
      (Array([0., 0., 4., 4.], dtype=float32), Array([0., 1., 3., 4.], dtype=float32))
    """

    scale: Sizes
    mode: str = "nearest"
    layout: str = "NHWC"

    def __post_init__(self) -> None:
        if self.mode not in ("nearest", "bilinear"):
            raise ValueError(
                f"Upsample: mode must be 'nearest' or 'bilinear', but found {self.mode!r}."
            )
        self._check_layout()
        self._spread("scale")

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return self._resized(x, self.mode)

    def __repr__(self) -> str:
        return f"Upsample(scale={self.scale}, mode={self.mode}, layout={self.layout})"


class Bilinear(_Resize):
    """Upsamples images by an integer factor with bilinear interpolation.

    It maps (batch, height, width, channels) to (batch, scale · height, scale · width, channels),
    like ``torch.nn.Upsample(mode="bilinear")``: edge pixels are repeated beyond the edge. To train the
    interpolation, use ``Conv2DTranspose(channels, 2 * s - s % 2, s, padding=s // 2, groups=channels,
    use_bias=False, weight_initializer=init.Bilinear())`` for a scale of s. It starts equal to this
    layer except at the edges, where it pads with zeros.

    Args:
      scale: the factor, an integer, or a tuple (height, width) of integers.
      layout: "NHWC" or "NCHW".

    Raises:
      ValueError: a setting is invalid; when called: the input has other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> Bilinear(2)({}, jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1))[0, 0, :, 0]
      Array([0., 1., 3., 4.], dtype=float32)
    """

    scale: Sizes
    layout: str = "NHWC"

    def __post_init__(self) -> None:
        self._check_layout()
        self._spread("scale")

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        return self._resized(x, "bilinear")

    def __repr__(self) -> str:
        return f"Bilinear(scale={self.scale}, layout={self.layout})"
