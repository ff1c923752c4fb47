"""Layers that end a residual branch: stochastic depth and a learned scale."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.initializers import Constant
from paramtree.nn.layer import Layer
from paramtree.typing import Scope

__all__ = ["DropPath", "LayerScale"]


def _dropped(x: Any, rate: Any, key: Any) -> Any:
    """Returns x with examples zeroed at a rate and the others scaled up.

    The rate is in [0, 1), or an array: where that is not, all is NaN, as compiled code cannot raise.
    The mask is the same for both.
    """
    shape = x.shape[0], *[1] * (x.ndim - 1)
    if not isinstance(rate, jax.Array):
        keep = jax.random.bernoulli(key, 1 - rate, shape)
        return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
    rate = rate.astype(jnp.float32) if rate.dtype.itemsize < 4 else rate  # as the mask is drawn in it
    kept = jnp.where((rate >= 0) & (rate < 1), 1 - rate, jnp.nan)
    keep = jax.random.bernoulli(key, kept, shape)
    kept = kept.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else kept.dtype)
    return jnp.where(keep, x / kept, jnp.zeros_like(x) / kept)


class DropPath(Layer):
    """Under ``pt.training``, zeros random examples and scales up the others; otherwise the identity.

    At the end of a residual branch it is stochastic depth: Huang et al., "Deep networks with stochastic
    depth", 2016. Examples are the entries of the first axis.

    Args:
      rate: the probability of zeroing an example, in [0, 1). The others are scaled by 1 / (1 - rate).

    Returns:
      When called with ``(p, x, rate=None)``: x, or what is left of it. A rate given to the call, a
      number or an array of shape (), takes the place of the layer's: ``nn.Repeat(block, n,
      by_copy={"rate": rates})`` gives each copy of a block its own. The output is NaN if one that is
      traced is not in [0, 1), as compiled code cannot raise.

    Raises:
      ValueError: a rate is not in [0, 1); when called: the input is a scalar.
      ScopeError: when called in training without a key.

    Example:
      >>> import jax, paramtree as pt
      >>> net, x = DropPath(0.5), jnp.ones((100, 3))
      >>> params = net.init(jax.random.key(0), x)
      >>> y, _ = pt.training(net)(params, x, key=jax.random.key(1))
      >>> jnp.unique(y, axis=0).tolist(), net(params, x) is x
      ([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], True)
    """

    rate: float

    def __post_init__(self) -> None:
        self._check(self.rate)

    def _check(self, rate: Any) -> None:
        if np.ndim(rate) or (not isinstance(rate, jax.core.Tracer) and not 0 <= rate < 1):
            raise ValueError(f"DropPath: rate must be in [0, 1), but found {rate!r}.")

    def __call__(self, p: Any, x: Any, rate: Any = None) -> jax.Array:
        if x.ndim == 0:
            raise ValueError(f"{self!r} needs a first axis of examples, but found a scalar.")
        rate = self.rate if rate is None else rate
        self._check(rate)
        if not p.training or (not isinstance(rate, jax.Array) and rate == 0):
            return x
        return _dropped(x, rate, p.key())


class LayerScale(Layer):
    """Multiplies the last axis by the parameter ``gamma``, which starts small.

    Touvron et al., "Going deeper with image transformers", 2021. ``gamma`` is (size,).

    Args:
      value: what every entry of gamma starts from.
      dtype: the parameter's dtype.

    Raises:
      ValueError: ``value`` is not a finite number; when called: the input is a scalar.

    Example:
      >>> import jax
      >>> net, x = LayerScale(0.1), jnp.ones((2, 3))
      >>> params = net.init(jax.random.key(0), x)
      >>> params, net(params, x)[0]
      (Parameter gamma (shape=(3,), dtype=float32), Array([0.1, 0.1, 0.1], dtype=float32))
    """

    value: float = 1e-5
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        number = isinstance(self.value, numbers.Real) and not isinstance(self.value, bool)
        if not number or not math.isfinite(self.value):
            raise ValueError(f"LayerScale: value must be a finite number, but found {self.value!r}.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        if x.ndim == 0:
            raise ValueError(f"{self!r} needs at least one dimension, but found a scalar.")
        gamma = p.param("gamma", x.shape[-1:], Constant(self.value), self.dtype)
        return x * jnp.expand_dims(gamma, range(x.ndim - 1))

    def __repr__(self) -> str:
        return f"LayerScale({self.value})"
