"""Initializers that compute values from a key, a shape and a dtype.

Any function of these three is an initializer. It must be pure, and equal for equal arguments: leaves of
one initializer, shape and dtype share one compiled function, so that random numbers have to come from
the key. Formulas and defaults follow MXNet Gluon. For initializers that depend on a fan, see ``fans``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Initializer = Callable[[jax.Array, Shape, Any], jax.Array]


@dataclass(frozen=True)
class Zero:
    """All zeros.

    Example:
      >>> Zero()(jax.random.key(0), (2,), jnp.float32)
      Array([0., 0.], dtype=float32)
    """

    fill = 0

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jax.nn.initializers.zeros(key, shape, dtype)


@dataclass(frozen=True)
class One:
    """All ones.

    Example:
      >>> One()(jax.random.key(0), (2,), jnp.float32)
      Array([1., 1.], dtype=float32)
    """

    fill = 1

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jax.nn.initializers.ones(key, shape, dtype)


@dataclass(frozen=True, eq=False)
class Constant:
    """A single value, or an array that broadcasts to the shape.

    Args:
      value: a number, or an array.

    Raises:
      ValueError: when called: the array does not broadcast to the shape.

    Example:
      >>> Constant(42)(jax.random.key(0), (2,), jnp.float32)
      Array([42., 42.], dtype=float32)
    """

    value: Any

    @property
    def eager(self) -> bool:
        """Whether the value is an array, which is copied rather than compiled in as a constant."""
        return np.ndim(self.value) > 0

    @property
    def fill(self) -> Any:
        """The value if it is a Python number; None for arrays and tracers."""
        return self.value if isinstance(self.value, bool | int | float | complex) else None

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.value, dtype), shape)

    def _identity(self) -> tuple[Any, ...]:
        value = np.asarray(self.value)
        return type(self), value.shape, value.dtype, value.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


@dataclass(frozen=True)
class Uniform:
    """Draws from U[-scale, scale]. The default initializer of weights.

    Example:
      >>> bool(abs(Uniform()(jax.random.key(0), (100,), jnp.float32)).max() <= 0.07)
      True
    """

    scale: float = 0.07

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.scale, self.scale)


@dataclass(frozen=True)
class Normal:
    """Draws from N(0, sigma²).

    Example:
      >>> Normal(0.01)(jax.random.key(0), (2, 3), jnp.float32).shape
      (2, 3)
    """

    sigma: float = 0.01

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jax.nn.initializers.normal(self.sigma)(key, shape, dtype)


@dataclass(frozen=True)
class TruncNorm:
    """Draws from N(mean, stdev²), truncated at two standard deviations from the mean.

    Example:
      >>> bool(abs(TruncNorm(0, 1)(jax.random.key(0), (100,), jnp.float32)).max() <= 2)
      True
    """

    mean: float = 0.0
    stdev: float = 0.01

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jax.nn.initializers.truncated_normal(self.stdev)(key, shape, dtype) + self.mean


@dataclass(frozen=True)
class Orthogonal:
    """A matrix (shape[0], prod(shape[1:])) with orthogonal rows or columns of length ``scale``.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", 2013.

    Args:
      scale: the common singular value.
      rand_type: the distribution of the matrix to orthogonalize: "uniform" (U[-1, 1]) or "normal".

    Example:
      >>> w = Orthogonal(1.0)(jax.random.key(0), (2, 5), jnp.float32)
      >>> bool(jnp.allclose(w @ w.T, jnp.eye(2), atol=1e-5))
      True
    """

    scale: float = 1.414
    rand_type: str = "uniform"

    def __post_init__(self) -> None:
        check_choice("rand_type", self.rand_type, ("uniform", "normal"))

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(f"{self!r} needs at least two dimensions, but found shape {shape}.")
        matrix = shape[0], math.prod(shape[1:])
        if self.rand_type == "normal":
            flat = jax.nn.initializers.orthogonal(self.scale)(key, matrix, wide(dtype))
        else:
            base = jax.random.uniform(key, matrix, wide(dtype), -1.0, 1.0)
            left, _, right = jnp.linalg.svd(base, full_matrices=False)
            flat = self.scale * (left if left.shape == matrix else right)
        return flat.reshape(shape).astype(dtype)


@dataclass(frozen=True)
class Bilinear:
    """Fills every channel of a weight (out, in, height, width) with the bilinear upsampling kernel.

    With f = ⌈width / 2⌉ and c = (2f - 1 - f mod 2) / 2f, the value at (y, x) is
    (1 - abs(x / f - c)) (1 - abs(y / f - c)).

    Example:
      >>> Bilinear()(jax.random.key(0), (1, 1, 2, 2), jnp.float32).tolist()
      [[[[1.0, 0.0], [0.0, 0.0]]]]
    """

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if len(shape) != 4:
            raise ValueError(f"Bilinear needs a shape (out, in, height, width), but found {shape}.")
        f = math.ceil(shape[3] / 2)
        c = (2 * f - 1 - f % 2) / (2 * f)
        y, x = (1 - abs(np.arange(size) / f - c) for size in shape[2:])
        return jnp.broadcast_to(jnp.asarray(np.outer(y, x), dtype), shape)


@dataclass(frozen=True)
class LSTMBias:
    """Zeros except for the forget gate, the second quarter of an LSTM's bias (gates i, f, g, o).

    Jozefowicz et al., "An empirical exploration of recurrent network architectures", 2015.

    Example:
      >>> LSTMBias()(jax.random.key(0), (8,), jnp.float32).tolist()
      [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """

    forget_bias: float = 1.0

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if len(shape) != 1 or shape[0] % 4:
            raise ValueError(f"LSTMBias needs a vector of four equal gates, but found shape {shape}.")
        size = shape[0] // 4
        return jnp.zeros(shape, dtype).at[size : 2 * size].set(self.forget_bias)


def wide(dtype: Any) -> Any:
    """Returns the dtype for matrix decompositions, which do not support half precision."""
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError if a setting is none of the choices."""
    if value not in choices:
        raise ValueError(f"{setting} must be one of {', '.join(map(repr, choices))}, not {value!r}.")
