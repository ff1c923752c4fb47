"""Dense layers, embeddings, activations by name, dropout and flattening."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.errors import suggest
from paramtree.initializers import Initializer, Uniform, get
from paramtree.initializers.axes import of_weight
from paramtree.nn.layer import Layer
from paramtree.typing import Scope

__all__ = ["Activation", "Dense", "Dropout", "Embedding", "Flatten"]

# Keyed by the names of Gluon and jax.nn.
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "softrelu": jax.nn.softplus,
    "elu": jax.nn.elu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # as in MXNet and PyTorch
    "gelu_tanh": jax.nn.gelu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "hard_tanh": jax.nn.hard_tanh,
    "identity": jax.nn.identity,
    "leaky_relu": jax.nn.leaky_relu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "log_softmax": jax.nn.log_softmax,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
}


def as_activation(activation: Any) -> Callable[..., Any]:
    """Returns the function of an activation that is given by name or as a function.

    Raises:
      ValueError: the name is unknown.
    """
    if callable(activation):
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"no activation {activation!r}.{suggest(str(activation), _ACTIVATIONS)} The names are "
            f"{', '.join(sorted(_ACTIVATIONS))}; any function of x works too."
        )
    return _ACTIVATIONS[activation]


def is_integer(value: Any, minimum: int) -> bool:
    """Whether a value is an integer, not a boolean, of at least ``minimum``."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return integer and int(value) >= minimum


def check_integers(layer: Any, minimum: int, *settings: str) -> None:
    """Raises ValueError unless the settings are integers of at least ``minimum``, 0 or 1."""
    for setting in settings:
        if not is_integer(value := getattr(layer, setting), minimum):
            sign = "positive" if minimum else "non-negative"
            raise ValueError(
                f"{type(layer).__name__}: {setting} must be a {sign} integer, but found {value!r}."
            )


def _flat(x: Any) -> Any:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))  # not -1: the batch may be empty


class Activation(Layer):
    """Applies an activation, given by name or as a function.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> Activation("relu")({}, jnp.array([-1.0, 1.0]))
      Array([0., 1.], dtype=float32)
    """

    activation: str | Callable[..., Any]

    def __post_init__(self) -> None:
        as_activation(self.activation)

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return as_activation(self.activation)(x)

    @property
    def alias(self) -> str:
        """The activation's name, which names the layer in a ``Sequential``, as in Gluon."""
        return self.activation if isinstance(self.activation, str) else "activation"

    def __repr__(self) -> str:
        name = self.activation
        if not isinstance(name, str):
            name = getattr(name, "__name__", repr(name))
        return f"Activation({name})"


class Dense(Layer):
    """A dense layer: ``activation(x @ weight.T + bias)``.

    Its parameters are ``weight``, (units, in), and ``bias``, (units,).

    Args:
      units: the size of the output.
      activation: a name or a function; None for the identity.
      use_bias: whether to add a bias.
      flatten: whether to flatten an input of more than two dimensions to (batch, features);
        otherwise the layer acts on the last dimension.
      dtype: the parameters' dtype.
      weight_initializer: U[-0.07, 0.07] if None.
      bias_initializer: zeros by default.
      in_units: the expected size of the input; 0 accepts any size.

    Raises:
      ValueError: a size is invalid, the activation is unknown, or the input has another size.

    Example:
      >>> net = Dense(3, activation="relu")
      >>> x = jnp.ones((2, 4, 5))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 3)
    """

    units: int
    activation: str | Callable[..., Any] | None = None
    use_bias: bool = True
    flatten: bool = True
    dtype: Any = "float32"
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"
    in_units: int = 0

    def __post_init__(self) -> None:
        check_integers(self, 0, "units", "in_units")
        if self.activation is not None:
            as_activation(self.activation)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "weight_initializer", of_weight(self.weight_initializer or Uniform()))
        object.__setattr__(self, "bias_initializer", get(self.bias_initializer))

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        if x.ndim == 0:
            raise ValueError(f"{self!r} needs at least one dimension, but found a scalar.")
        if self.flatten and x.ndim > 2:
            x = _flat(x)
        size = x.shape[-1]
        if self.in_units and size != self.in_units:
            raise ValueError(f"{self!r} expects inputs of size {self.in_units}, but found {x.shape}.")
        assert self.weight_initializer is not None  # since it was made
        weight = p.param("weight", (self.units, size), self.weight_initializer, self.dtype)
        # Both are x @ weight.T. With the transpose, XLA computes a single row in a loop, which it fuses
        # with others; for more rows, the gradient of a scan would keep a copy of the weight.
        one_row = x.ndim > 1 and math.prod(x.shape[:-1]) == 1
        y = x @ weight.T if one_row else jnp.inner(x, weight)
        if self.use_bias:
            bias = p.param("bias", (self.units,), self.bias_initializer, self.dtype)
            if y.ndim > 1:  # the same as jnp.expand_dims, but much faster to trace
                bias = jax.lax.broadcast_in_dim(bias, (1,) * (y.ndim - 1) + bias.shape, (y.ndim - 1,))
            y = y + bias
        return y if self.activation is None else as_activation(self.activation)(y)

    def __repr__(self) -> str:
        last = "linear" if self.activation is None else Activation(self.activation)
        return f"Dense({self.in_units or None} -> {self.units}, {last})"


def _as_index(x: Any) -> Any:
    """Returns integers in a type that jax indexes with correctly: a narrow one wraps around."""
    if x.dtype.itemsize < 4:
        return jnp.asarray(x).astype(jnp.int32)
    if isinstance(x, np.ndarray) and x.dtype.itemsize > 4:  # jax makes them 32 bits, unless x64 is on
        return x.clip(0 if x.dtype.kind == "u" else -(2**31), 2**31 - 1)
    return x


class Embedding(Layer):
    """Looks up rows of a table by index. The parameter ``weight`` is (input_dim, output_dim).

    Args:
      input_dim: the number of rows.
      output_dim: the size of a row.
      dtype: the parameter's dtype.
      weight_initializer: U[-0.07, 0.07] if None.

    Returns:
      When called with integers of any shape and type: (*shape, output_dim). Indices from -input_dim to
      -1 count from the end. Indices out of range give NaN, as compiled code cannot raise.

    Example:
      >>> net = Embedding(10, 4)
      >>> ids = jnp.array([[1, 2], [3, 4]])
      >>> net(net.init(jax.random.key(0), ids), ids).shape
      (2, 2, 4)
    """

    input_dim: int
    output_dim: int
    dtype: Any = "float32"
    weight_initializer: Initializer | str | None = None

    def __post_init__(self) -> None:
        check_integers(self, 0, "input_dim", "output_dim")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "weight_initializer", of_weight(self.weight_initializer or Uniform()))

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{self!r} needs integers, but found {x.dtype}: cast the ids to int32.")
        shape = self.input_dim, self.output_dim
        x = _as_index(x)
        assert self.weight_initializer is not None  # since it was made
        return jnp.take(p.param("weight", shape, self.weight_initializer, self.dtype), x, axis=0)

    def __repr__(self) -> str:
        return f"Embedding({self.input_dim} -> {self.output_dim}, {self.dtype})"


def kept(key: Any, rate: float, shape: tuple[int, ...]) -> Any:
    """Returns a boolean mask, whose entries are false with probability ``rate``.

    Random bits are most of what dropout costs, so each word decides two entries, one by each half: the
    probability is rounded to a multiple of 2⁻¹⁶, unless that is too coarse.
    """
    if not shape or not 1 / 64 <= rate <= 63 / 64:
        return jax.random.bernoulli(key, 1 - rate, shape)
    *lead, last = shape
    words = jax.random.bits(key, (*lead, (last + 1) // 2), jnp.uint32)
    # Side by side, so that the mask is sharded as the words are.
    halves = jnp.stack([words >> 16, words & 0xFFFF], -1).reshape(*lead, 2 * words.shape[-1])
    return halves[..., :last] < round((1 - rate) * 2**16)


class Dropout(Layer):
    """Under ``pt.training``, zeros random entries and scales up the others; otherwise the identity.

    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.

    Args:
      rate: the probability of zeroing an entry, in [0, 1).
      axes: the axes along which the mask is broadcast.

    Raises:
      ValueError: ``rate`` is not in [0, 1); when called: the input lacks one of ``axes``.
      ScopeError: when called in training without a key.

    Example:
      >>> Dropout(0.5)
      Dropout(p = 0.5, axes=())
    """

    rate: float
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"Dropout: rate must be in [0, 1), but found {self.rate!r}.")
        object.__setattr__(self, "axes", tuple(self.axes))

    def __call__(self, p: Any, x: Any) -> jax.Array:
        if not p.training or self.rate == 0:
            return x
        if any(not -x.ndim <= axis < x.ndim for axis in self.axes):
            raise ValueError(f"{self!r}: axes are out of range for an input of shape {x.shape}.")
        axes = {axis % x.ndim for axis in self.axes}
        shape = tuple(1 if i in axes else size for i, size in enumerate(x.shape))
        return jnp.where(kept(p.key(), self.rate, shape), x / (1 - self.rate), jnp.zeros_like(x))

    def __repr__(self) -> str:
        return f"Dropout(p = {self.rate}, axes={self.axes})"


class Flatten(Layer):
    """Flattens the input to (batch, features).

    Example:
      >>> Flatten()({}, jnp.ones((2, 3, 4))).shape
      (2, 12)
    """

    def __call__(self, p: Any, x: Any) -> jax.Array:
        return _flat(x)

    def __repr__(self) -> str:
        return "Flatten"
