"""Layers that change the size of images without parameters."""

from dataclasses import dataclass
from typing import Any

import jax

from paramtree.nn.layer import Layer
from paramtree.nn.spatial import Sizes, check_layout, on_axes, sizes_of, spatial_axes

__all__ = ["Bilinear"]


@dataclass(frozen=True, repr=False)
class Bilinear(Layer):
    """Makes images a whole number of times larger by bilinear interpolation.

    It takes (batch, height, width, channels) to (batch, scale · height, scale · width, channels),
    as ``torch.nn.Upsample(mode="bilinear")`` does: pixels are squares, and what lies beyond the
    edge repeats the edge. To start from bilinear interpolation and train it, take a transposed
    convolution: ``Conv2DTranspose(channels, 2 * s - s % 2, s, padding=s // 2, groups=channels,
    use_bias=False, weight_initializer=init.Bilinear())`` for a scale of s, which agrees with this
    layer away from the edges; at the edges its surroundings are 0.

    Args:
      scale: how many times larger: a whole number, or a tuple of one for height and width.
      layout: "NHWC" or "NCHW".

    Raises:
      ValueError: a setting that is not one; on calling: an input without these axes.

    Example:
      >>> import jax.numpy as jnp
      >>> Bilinear(2)({}, jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1))[0, 0, :, 0]
      Array([0., 1., 3., 4.], dtype=float32)
    """

    scale: Sizes
    layout: str = "NHWC"

    def __post_init__(self) -> None:
        rank = check_layout(self)
        object.__setattr__(self, "scale", on_axes(self, "scale", self.scale, rank))

    def __call__(self, p: Any, x: Any) -> Any:
        scale: Any = self.scale
        shape = list(x.shape)
        for axis, size, times in zip(spatial_axes(self.layout), sizes_of(self, x), scale, strict=True):
            shape[axis] = size * times
        return jax.image.resize(x, shape, "bilinear")

    def __repr__(self) -> str:
        return f"Bilinear(scale={self.scale}, layout={self.layout})"
