"""Activations that have settings or a parameter; ``Activation`` takes the others by name."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.tree import check_scope
from paramtree.initializers import Constant, Initializer, get
from paramtree.nn.layer import Layer
from paramtree.nn.spatial import whole

__all__ = ["ELU", "GELU", "SELU", "LeakyReLU", "PReLU", "SiLU", "Swish"]

_QUARTER = Constant(0.25)  # Gluon's default; it is immutable, so all may have it in common


@dataclass(frozen=True, repr=False)
class LeakyReLU(Layer):
    """x where it is positive, and else ``alpha`` x.

    Args:
      alpha: the slope below 0.

    Raises:
      ValueError: a negative slope.

    Example:
      >>> LeakyReLU(0.1)({}, jnp.array([-1.0, 1.0]))
      Array([-0.1,  1. ], dtype=float32)
    """

    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"LeakyReLU: alpha is a slope of 0 or more, but found {self.alpha!r}.")

    def __call__(self, p: Any, x: Any) -> Any:
        return jax.nn.leaky_relu(x, self.alpha)

    def __repr__(self) -> str:
        return f"LeakyReLU({self.alpha})"


@dataclass(frozen=True, repr=False)
class PReLU(Layer):
    """x where it is positive, and else ``alpha`` x, with a slope that is trained.

    The parameter ``alpha`` is (in_channels,). He et al., "Delving deep into rectifiers", 2015.

    Args:
      alpha_initializer: the slope to start from, 0.25 by default.
      in_channels: how many slopes there are: 1 for all the input, or one for each channel.
      axis: where the channels are: the last axis, as the layouts of this library have it; Gluon's
        are on axis 1.
      dtype: the parameter's dtype.

    Raises:
      ValueError: a setting that is not one; on calling: an input without so many channels.

    Example:
      >>> net = PReLU(in_channels=3)
      >>> x = -jnp.ones((2, 3))
      >>> net(net.init(jax.random.key(0), x), x)[0]
      Array([-0.25, -0.25, -0.25], dtype=float32)
    """

    alpha_initializer: Initializer | str = _QUARTER
    in_channels: int = 1
    axis: int = -1
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        if not whole(self.in_channels, 1):
            raise ValueError(
                f"PReLU: in_channels is a whole number of 1 or more, but found {self.in_channels!r}."
            )
        object.__setattr__(self, "alpha_initializer", get(self.alpha_initializer))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def __call__(self, p: Any, x: Any) -> Any:
        check_scope(p)
        shape = [1] * x.ndim
        if self.in_channels > 1:
            if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.in_channels:
                raise ValueError(
                    f"{self!r} expects inputs of {self.in_channels} channels on axis {self.axis}, but "
                    f"found the shape {x.shape}."
                )
            shape[self.axis] = self.in_channels
        alpha = p.param("alpha", (self.in_channels,), self.alpha_initializer, self.dtype)
        return jnp.where(x >= 0, x, alpha.reshape(shape) * x)

    def __repr__(self) -> str:
        text = [] if self.in_channels == 1 else [f"in_channels={self.in_channels}"]
        text += [] if self.axis == -1 else [f"axis={self.axis}"]
        return f"PReLU({', '.join(text)})" if text else "PReLU"


@dataclass(frozen=True)
class ELU(Layer):
    """x where it is positive, and else ``alpha`` (exp(x) - 1).

    Clevert et al., "Fast and accurate deep network learning by exponential linear units", 2016.

    Args:
      alpha: what -ELU(x) tends to for large negative x.

    Example:
      >>> f"{ELU()({}, -1.0):.4f}"
      '-0.6321'
    """

    alpha: float = 1.0

    def __call__(self, p: Any, x: Any) -> Any:
        return jax.nn.elu(x, self.alpha)


@dataclass(frozen=True, repr=False)
class SELU(Layer):
    """An ``ELU`` scaled such that means and variances settle at 0 and 1 from layer to layer.

    Klambauer et al., "Self-normalizing neural networks", 2017.

    Example:
      >>> f"{SELU()({}, -1.0):.4f}"
      '-1.1113'
    """

    def __call__(self, p: Any, x: Any) -> Any:
        return jax.nn.selu(x)

    def __repr__(self) -> str:
        return "SELU"


@dataclass(frozen=True)
class GELU(Layer):
    """x Φ(x), with Φ the cumulative distribution function of the normal distribution.

    Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Args:
      approximation: "erf" for the function itself, "tanh" for the paper's approximation, which is
        what ``jax.nn.gelu`` and ``Activation("gelu_tanh")`` compute.

    Raises:
      ValueError: another approximation.

    Example:
      >>> f"{GELU()({}, -1.0):.4f}"
      '-0.1587'
    """

    approximation: str = "erf"

    def __post_init__(self) -> None:
        if self.approximation not in ("erf", "tanh"):
            raise ValueError(
                f"GELU: approximation is 'erf' or 'tanh', but found {self.approximation!r}."
            )

    def __call__(self, p: Any, x: Any) -> Any:
        return jax.nn.gelu(x, approximate=self.approximation == "tanh")


@dataclass(frozen=True)
class Swish(Layer):
    """x sigmoid(``beta`` x).

    Ramachandran et al., "Searching for activation functions", 2017.

    Args:
      beta: how steep the sigmoid is.

    Example:
      >>> f"{Swish(2.0)({}, -1.0):.4f}"
      '-0.1192'
    """

    beta: float = 1.0

    def __call__(self, p: Any, x: Any) -> Any:
        return x * jax.nn.sigmoid(self.beta * x)


@dataclass(frozen=True, repr=False)
class SiLU(Layer):
    """x sigmoid(x): ``Swish`` without a setting.

    Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Example:
      >>> f"{SiLU()({}, -1.0):.4f}"
      '-0.2689'
    """

    def __call__(self, p: Any, x: Any) -> Any:
        return jax.nn.silu(x)

    def __repr__(self) -> str:
        return "SiLU"
