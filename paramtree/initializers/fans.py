"""Initializers whose scale depends on a fan, the number of inputs or outputs of a layer.

Weights have shape ``(out, in, *spatial)``: with k the product of the spatial sizes, fan-in is
``shape[1] * k`` and fan-out is ``shape[0] * k``. A leaf that is a stack of weights, (copies, out, in,
*spatial), needs ``batch_axis=0``; those of ``nn.Repeat`` and ``nn.Vmap`` are drawn copy by copy anyway.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.initializers.values import Shape, check_choice

__all__ = ["MSRAPrelu", "VarianceScaling", "Xavier"]

Axes = int | Sequence[int]


@dataclass(frozen=True)
class VarianceScaling:
    """jax's ``variance_scaling`` for weights ``(out, in, *spatial)``: the variance is scale / fan.

    The names of jax's initializers stand for these: ``"lecun_normal"`` is ``VarianceScaling()``, the
    scale of ``"he_normal"`` is 2, and ``"glorot_normal"`` has the mode "fan_avg". ``"lecun_uniform"``
    and so on draw from the uniform distribution.

    Args:
      scale: the variance times the fan.
      mode: "fan_in", "fan_out", or their mean "fan_avg" or geometric mean "fan_geo_avg".
      distribution: "truncated_normal", "normal" or "uniform".
      batch_axis: the axes over copies; the other axes are (out, in, *spatial).

    Raises:
      ValueError: a mode or distribution is unknown; when called: the shape has fewer than two
        dimensions besides ``batch_axis``.

    Example:
      >>> w = VarianceScaling()(jax.random.key(0), (512, 8), jnp.float32)
      >>> bool(abs(w.std() - math.sqrt(1 / 8)) < 0.02)
      True
    """

    scale: float = 1.0
    mode: str = "fan_in"
    distribution: str = "truncated_normal"
    batch_axis: Axes = ()

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("fan_in", "fan_out", "fan_avg", "fan_geo_avg"))
        check_choice("distribution", self.distribution, ("truncated_normal", "normal", "uniform"))
        object.__setattr__(self, "batch_axis", _tuple(self.batch_axis))

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        axes = weight_axes(self, shape)
        if 0 in shape:
            return jnp.zeros(shape, dtype)  # jax would divide by a fan of 0
        mode: Any = self.mode
        distribution: Any = self.distribution
        batch = [axis for axis in range(len(shape)) if axis not in axes]
        draw = jax.nn.initializers.variance_scaling(
            self.scale, mode, distribution, in_axis=axes[1], out_axis=axes[0], batch_axis=batch
        )
        return draw(key, shape, dtype)


@dataclass(frozen=True)
class Xavier:
    """Draws from U[-s, s] or N(0, s²) with s = √(magnitude / factor), where the factor is a fan.

    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010.

    Args:
      rnd_type: "uniform" or "gaussian".
      factor_type: "in" for fan-in, "out" for fan-out, "avg" for their mean.
      magnitude: 3 gives Glorot's scale.
      batch_axis: the axes over copies; the other axes are (out, in, *spatial).

    Raises:
      ValueError: a type is unknown; when called: the shape has fewer than two dimensions besides
        ``batch_axis``.

    Example:
      >>> w = Xavier()(jax.random.key(0), (30, 20), jnp.float32)
      >>> bool(abs(w).max() <= math.sqrt(3 / 25))
      True
    """

    rnd_type: str = "uniform"
    factor_type: str = "avg"
    magnitude: float = 3.0
    batch_axis: Axes = ()

    def __post_init__(self) -> None:
        check_choice("rnd_type", self.rnd_type, ("uniform", "gaussian"))
        check_choice("factor_type", self.factor_type, ("avg", "in", "out"))
        object.__setattr__(self, "batch_axis", _tuple(self.batch_axis))

    def scaling(self) -> VarianceScaling:
        """Returns the same as a ``VarianceScaling``."""
        # jax draws from U[-s, s] with s = √(3 scale / fan), or normally with variance scale / fan.
        scale = self.magnitude / 3 if self.rnd_type == "uniform" else self.magnitude
        kind = self.rnd_type.replace("gaussian", "normal")
        return VarianceScaling(scale, f"fan_{self.factor_type}", kind, self.batch_axis)

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        weight_axes(self, shape)
        return self.scaling()(key, shape, dtype)


@dataclass(frozen=True)
class MSRAPrelu:
    """Gaussian ``Xavier`` with magnitude 2 / (1 + slope²), for layers followed by a PReLU.

    He et al., "Delving deep into rectifiers", 2015.

    Example:
      >>> MSRAPrelu()(jax.random.key(0), (2, 3), jnp.float32).shape
      (2, 3)
    """

    factor_type: str = "avg"
    slope: float = 0.25
    batch_axis: Axes = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_axis", _tuple(self.batch_axis))

    def scaling(self) -> VarianceScaling:
        """Returns the same as a ``VarianceScaling``."""
        magnitude = 2 / (1 + self.slope**2)
        return Xavier("gaussian", self.factor_type, magnitude, self.batch_axis).scaling()

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        weight_axes(self, shape)
        return self.scaling()(key, shape, dtype)


def weight_axes(initializer: Any, shape: Shape) -> list[int]:
    """Returns the axes that are not over copies: of out, of in, and spatial ones.

    Raises:
      ValueError: there are fewer than two, or the shape has no such axis over copies.
    """
    if any(not -len(shape) <= axis < len(shape) for axis in initializer.batch_axis):
        raise ValueError(f"{initializer!r}: the shape {shape} has no axis {initializer.batch_axis}.")
    batch = [axis % len(shape) for axis in initializer.batch_axis]
    axes = [axis for axis in range(len(shape)) if axis not in batch]
    if len(axes) < 2:
        besides = " besides batch_axis" if batch else ""
        raise ValueError(
            f"{initializer!r} needs a shape (out, in, ...) with at least two dimensions{besides}, but "
            f"found {shape}: use another initializer for vectors such as biases."
        )
    return axes


def fan(scaling: VarianceScaling, shape: Shape) -> float:
    """Returns the fan of a shape, as jax computes it."""
    first, second, *spatial = (shape[axis] for axis in weight_axes(scaling, shape))
    size = math.prod(spatial)
    fan_in, fan_out = float(second * size), float(first * size)
    fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    return fans.get(scaling.mode, (fan_in * fan_out) ** 0.5)


def _tuple(axes: Axes) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
