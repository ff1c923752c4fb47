"""Activations with settings or a parameter; ``Activation`` provides the others by name."""

from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.initializers import Constant, Initializer, get
from paramtree.nn.basic import check_integers
from paramtree.nn.layer import Layer
from paramtree.typing import Scope

__all__ = ["ELU", "GELU", "SELU", "LeakyReLU", "PReLU", "SiLU", "Swish"]


class LeakyReLU(Layer):
    """x where x ≥ 0, and ``alpha`` x elsewhere.

    Args:
      alpha: the slope for negative x.

    Raises:
      ValueError: ``alpha`` is negative.

    Example:
      >>> LeakyReLU(0.1)({}, jnp.array([-1.0, 1.0]))
      Array([-0.1,  1. ], dtype=float32)
    """

    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"LeakyReLU: alpha must be non-negative, but found {self.alpha!r}.")

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return jax.nn.leaky_relu(x, self.alpha)

    def __repr__(self) -> str:
        return f"LeakyReLU({self.alpha})"


class PReLU(Layer):
    """x where x ≥ 0, and ``alpha`` x elsewhere, with a trainable slope.

    The parameter ``alpha`` is (in_channels,). He et al., "Delving deep into rectifiers", 2015.

    Args:
      alpha_initializer: 0.25 by default.
      in_channels: the number of slopes: 1 shared by all channels, or one per channel.
      axis: the channel axis, by default the last one; in Gluon it is axis 1.
      dtype: the parameter's dtype.

    Raises:
      ValueError: a setting is invalid; when called: the input has another number of channels.

    Example:
      >>> net = PReLU(in_channels=3)
      >>> x = -jnp.ones((2, 3))
      >>> net(net.init(jax.random.key(0), x), x)[0]
      Array([-0.25, -0.25, -0.25], dtype=float32)
    """

    alpha_initializer: Initializer | str = field(default=Constant(0.25))
    in_channels: int = 1
    axis: int = -1
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        check_integers(self, 1, "in_channels")
        object.__setattr__(self, "alpha_initializer", get(self.alpha_initializer))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        shape = [1] * x.ndim
        if self.in_channels > 1:
            if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.in_channels:
                raise ValueError(
                    f"{self!r} expects {self.in_channels} channels on axis {self.axis}, but found "
                    f"shape {x.shape}."
                )
            shape[self.axis] = self.in_channels
        alpha = p.param("alpha", (self.in_channels,), self.alpha_initializer, self.dtype)
        return jnp.where(x >= 0, x, alpha.reshape(shape) * x)

    def __repr__(self) -> str:
        text = [] if self.in_channels == 1 else [f"in_channels={self.in_channels}"]
        text += [] if self.axis == -1 else [f"axis={self.axis}"]
        return f"PReLU({', '.join(text)})" if text else "PReLU"


class ELU(Layer):
    """x where x is positive, and ``alpha`` (exp(x) - 1) elsewhere.

    Clevert et al., "Fast and accurate deep network learning by exponential linear units", 2016.

    Args:
      alpha: the output tends to -alpha for large negative x.

    Example:
      >>> f"{ELU()({}, -1.0):.4f}"
      '-0.6321'
    """

    alpha: float = 1.0

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return jax.nn.elu(x, self.alpha)


class SELU(Layer):
    """A scaled ``ELU`` that drives the mean and variance of activations towards 0 and 1.

    Klambauer et al., "Self-normalizing neural networks", 2017.

    Example:
      >>> f"{SELU()({}, -1.0):.4f}"
      '-1.1113'
    """

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return jax.nn.selu(x)

    def __repr__(self) -> str:
        return "SELU"


class GELU(Layer):
    """x Φ(x), with Φ the cumulative distribution function of the standard normal distribution.

    Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Args:
      approximation: "erf" for the exact function, or "tanh" for the paper's approximation, as in
        ``jax.nn.gelu`` and ``Activation("gelu_tanh")``.

    Raises:
      ValueError: the approximation is unknown.

    Example:
      >>> f"{GELU()({}, -1.0):.4f}"
      '-0.1587'
    """

    approximation: str = "erf"

    def __post_init__(self) -> None:
        if self.approximation not in ("erf", "tanh"):
            raise ValueError(
                f"GELU: approximation must be 'erf' or 'tanh', but found {self.approximation!r}."
            )

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return jax.nn.gelu(x, approximate=self.approximation == "tanh")


class Swish(Layer):
    """x sigmoid(``beta`` x).

    Ramachandran et al., "Searching for activation functions", 2017.

    Args:
      beta: the steepness of the sigmoid.

    Example:
      >>> f"{Swish(2.0)({}, -1.0):.4f}"
      '-0.1192'
    """

    beta: float = 1.0

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return x * jax.nn.sigmoid(self.beta * x)


class SiLU(Layer):
    """x sigmoid(x), which is ``Swish(1.0)``.

    Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Example:
      >>> f"{SiLU()({}, -1.0):.4f}"
      '-0.2689'
    """

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return jax.nn.silu(x)

    def __repr__(self) -> str:
        return "SiLU"
