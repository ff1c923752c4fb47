"""Separates the numbers of an initializer from the rest, so that another number compiles nothing."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.initializers import fans, values
from paramtree.initializers.values import Initializer, Shape

__all__ = ["lift"]

# The numbers of each kind. They are those of a class, not of its subclasses, which may use others.
_NUMBERS: dict[type[Any], tuple[str, ...]] = {
    values.Constant: ("value",),
    values.Uniform: ("scale",),
    values.Normal: ("sigma",),
    values.TruncNorm: ("mean", "stdev"),
    values.Orthogonal: ("scale",),
    values.LSTMBias: ("forget_bias",),
}


@dataclass(frozen=True)
class _Kind:
    """An initializer without its numbers, which a call passes."""

    kind: type[Any]
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any, *numbers: Any) -> jax.Array:
        named = dict(zip(_NUMBERS[self.kind], numbers, strict=True))
        value: jax.Array = self.kind(**dict(self.settings), **named)(key, shape, dtype)
        return value


@dataclass(frozen=True)
class _Scaled:
    """A standard distribution times a number."""

    distribution: str

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any, factor: Any) -> jax.Array:
        if self.distribution == "normal":
            # jax's initializer, as from 0.12 on it scales within the draw, which rounds differently.
            value: jax.Array = jax.nn.initializers.normal(factor)(key, shape, dtype)
            return value
        if self.distribution == "uniform":
            return jax.random.uniform(key, shape, dtype, -1) * factor
        return jax.random.truncated_normal(key, -2, 2, shape, dtype) * factor


def lift(initializer: Initializer, shape: Shape, dtype: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns a function ``(key, shape, dtype, *numbers) -> Array`` and the numbers to pass.

    The function is equal for initializers that differ only in their numbers. The values are, bit for
    bit, those of the initializer in a compiled function: the numbers have the precision in which it
    would have computed with them. What has no numbers is returned as it is.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return initializer, ()
    kind = type(initializer)
    if kind in (fans.Xavier, fans.MSRAPrelu, fans.VarianceScaling):
        return _lift_scaled(initializer, shape, dtype)
    names = _NUMBERS.get(kind, ())
    numbers = [getattr(initializer, name) for name in names]
    if not names or not all(map(_is_number, numbers)):
        return initializer, ()
    if isinstance(initializer, values.Orthogonal):
        if len(shape) < 2:
            return initializer, ()  # raises
        dtype = values.wide(dtype)
    settings = tuple(item for item in vars(initializer).items() if item[0] not in names)
    return _Kind(kind, settings), tuple(np.asarray(number, dtype) for number in numbers)


def _lift_scaled(initializer: Any, shape: Shape, dtype: Any) -> tuple[Any, tuple[Any, ...]]:
    numbers = [v for v in vars(initializer).values() if not isinstance(v, str | tuple)]
    if not all(map(_is_number, numbers)) or 0 in shape:
        return initializer, ()
    fans.weight_axes(initializer, shape)
    scaling = initializer if isinstance(initializer, fans.VarianceScaling) else initializer.scaling()
    variance = np.asarray(scaling.scale / fans.fan(scaling, shape), dtype)
    if variance < 0:
        return initializer, ()  # all NaN
    # As in jax's variance_scaling; the last number is the deviation of the truncated normal.
    if scaling.distribution == "normal":
        factor = np.sqrt(variance)
    elif scaling.distribution == "uniform":
        factor = np.sqrt(np.asarray(3, dtype) * variance)
    else:
        factor = np.sqrt(variance) / np.asarray(0.87962566103423978, dtype)
    return _Scaled(scaling.distribution), (factor,)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # a numpy scalar would decide the precision
