"""The gated feed-forward block of transformers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.initializers import Initializer, Uniform, get
from paramtree.initializers.axes import of_weight
from paramtree.model.scope import child
from paramtree.nn.basic import Activation, Dense, as_activation, check_integers
from paramtree.nn.layer import Layer
from paramtree.typing import Scope

__all__ = ["GatedMLP"]


class GatedMLP(Layer):
    """A gated multilayer perceptron: ``down(activation(gate(x)) * up(x))``, of the input's size.

    Shazeer, "GLU variants improve transformer", 2020: SwiGLU with the activation "silu", as in Llama,
    and GEGLU with "gelu". The children ``gate``, ``up`` and ``down`` are dense layers that act on the
    last axis.

    Args:
      hidden: the size of the hidden layer.
      activation: a name or a function.
      use_bias: whether the dense layers have biases.
      dtype: the parameters' dtype.
      weight_initializer: U[-0.07, 0.07] if None.
      bias_initializer: zeros by default.

    Raises:
      ValueError: ``hidden`` is not a positive integer, or the activation is unknown; when called: the
        input is a scalar.

    Example:
      >>> import jax
      >>> net, x = GatedMLP(16), jnp.ones((2, 5, 4))
      >>> params = net.init(jax.random.key(0), x)
      >>> params
      Parameter gate_weight (shape=(16, 4), dtype=float32)
      Parameter up_weight (shape=(16, 4), dtype=float32)
      Parameter down_weight (shape=(4, 16), dtype=float32)
      >>> net(params, x).shape
      (2, 5, 4)
    """

    hidden: int
    activation: str | Callable[..., Any] = "silu"
    use_bias: bool = False
    dtype: Any = "float32"
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"

    def __post_init__(self) -> None:
        check_integers(self, 1, "hidden")
        as_activation(self.activation)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "weight_initializer", of_weight(self.weight_initializer or Uniform()))
        object.__setattr__(self, "bias_initializer", get(self.bias_initializer))

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        if x.ndim == 0:
            raise ValueError(f"{self!r} needs at least one dimension, but found a scalar.")
        gate = self._dense(p, "gate", x, self.hidden, self.activation)
        up = self._dense(p, "up", x, self.hidden)
        return self._dense(p, "down", gate * up, x.shape[-1])

    def _dense(self, p: Any, name: str, x: Any, units: int, activation: Any = None) -> Any:
        layer = Dense(
            units,
            activation,
            use_bias=self.use_bias,
            flatten=False,
            dtype=self.dtype,
            weight_initializer=self.weight_initializer,
            bias_initializer=self.bias_initializer,
        )
        return layer(child(p, name), x)

    def __repr__(self) -> str:
        bias = ", use_bias=True" if self.use_bias else ""
        return f"GatedMLP({self.hidden}, {Activation(self.activation)}{bias})"
