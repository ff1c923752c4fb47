"""Layers that add positions, or a token, to sequences."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.initializers import Initializer, Uniform, get
from paramtree.initializers.axes import of_weight
from paramtree.nn.basic import check_integers
from paramtree.nn.decoding import check_counting
from paramtree.nn.layer import Layer
from paramtree.typing import Scope

__all__ = ["ClassToken", "LearnedPositions", "SinusoidalPositions"]


def _check(layer: Layer, x: Any) -> None:
    if x.ndim != 3:
        raise ValueError(f"{layer!r} needs an input (batch, length, size), but found shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{layer!r} needs floating-point numbers, but found {x.dtype}: put an nn.Embedding before "
            "it if these are ids."
        )


def _positions(layer: Layer, p: Any, x: Any, positions: Any) -> Any:
    """Returns the positions of x, (length,) or (batch, length), which count from 0 if none are given.

    Raises:
      ScopeError: there are none, and the model decodes: x may be a later piece of the sequence.
      ValueError: they are no integers, or have another shape.
    """
    if positions is None:
        check_counting(layer, p)
        return jnp.arange(x.shape[1], dtype=jnp.int32)
    positions = jnp.asarray(positions)
    shapes = (x.shape[1],), x.shape[:2]
    if positions.shape not in shapes or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"{layer!r} needs positions (length,) or (batch, length) of integers, here {shapes[0]} or "
            f"{shapes[1]}, but found {positions.dtype}{positions.shape}."
        )
    return positions


class LearnedPositions(Layer):
    """Adds a learned vector to each position of a sequence.

    The parameter ``weight`` is (length, size). Gehring et al., "Convolutional sequence to sequence
    learning", 2017.

    Args:
      length: the length of the longest sequence. Shorter ones get the first vectors.
      dtype: the parameter's dtype.
      weight_initializer: U[-0.07, 0.07] if None.

    Returns:
      When called with ``(p, x, positions=None)``, x (batch, any length, size): the sum, of the shape of
      x. The positions are integers, (length,) or (batch, length), and count from 0 if None. The sum is
      NaN at one that is negative or ``length`` and more, as compiled code cannot raise.

    Raises:
      ValueError: ``length`` is not a positive integer; when called: the input or the positions have
        other axes, or the input is longer and has no positions.
      TypeError: when called: the input is not floating-point.
      ScopeError: when called without positions under ``pt.decoding``, where x may be a later piece.

    Example:
      >>> import jax
      >>> net, x = LearnedPositions(10), jnp.ones((2, 5, 4))
      >>> params = net.init(jax.random.key(0), x)
      >>> params.weight.shape, net(params, x).shape
      ((10, 4), (2, 5, 4))
    """

    length: int
    dtype: Any = "float32"
    weight_initializer: Initializer | str | None = None

    def __post_init__(self) -> None:
        check_integers(self, 1, "length")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "weight_initializer", of_weight(self.weight_initializer or Uniform()))

    def __call__(self, p: Scope, x: Any, positions: Any = None) -> jax.Array:
        _check(self, x)
        length, size = x.shape[1:]
        assert self.weight_initializer is not None  # since it was made
        weight = p.param("weight", (self.length, size), self.weight_initializer, self.dtype)
        places = _positions(self, p, x, positions)
        if positions is None:
            if length > self.length:
                raise ValueError(
                    f"{self!r} has {self.length} positions, but found a length of {length}."
                )
            return x + weight[None, :length]
        inside = (places >= 0) & (places < self.length)
        rows = jnp.where(inside[..., None], weight[jnp.where(inside, places, 0)], jnp.nan)
        return x + (rows if rows.ndim == 3 else rows[None])

    def __repr__(self) -> str:
        return f"LearnedPositions({self.length})"


class SinusoidalPositions(Layer):
    """Adds sines and cosines of the positions to a sequence.

    Entry 2i of position t is ``sin(t / base ** (2i / size))``, and entry 2i + 1 its cosine. Vaswani et
    al., "Attention is all you need", 2017.

    Args:
      base: the wavelengths grow geometrically from 2π towards 2π · base.

    Returns:
      When called with ``(p, x, positions=None)``, x (batch, length, size): the sum, of the shape of x.
      The positions are integers, (length,) or (batch, length), and count from 0 if None.

    Raises:
      ValueError: ``base`` is not a finite number above 1; when called: the input or the positions have
        other axes.
      TypeError: when called: the input is not floating-point.
      ScopeError: when called without positions under ``pt.decoding``, where x may be a later piece.

    Example:
      >>> y = SinusoidalPositions()({}, jnp.zeros((1, 2, 4)))
      >>> (100 * y[0]).round()
      Array([[  0., 100.,   0., 100.],
             [ 84.,  54.,   1., 100.]], dtype=float32)
    """

    base: float = 10_000.0

    def __post_init__(self) -> None:
        if not 1 < self.base < math.inf:
            raise ValueError(
                f"SinusoidalPositions: base must be a finite number above 1, but found {self.base!r}."
            )

    def __call__(self, p: Any, x: Any, positions: Any = None) -> jax.Array:
        _check(self, x)
        size = x.shape[2]
        places = _positions(self, p, x, positions).astype(jnp.float32)
        pairs = jnp.arange((size + 1) // 2, dtype=jnp.float32)
        rates = jnp.exp(pairs * jnp.float32(-2 * math.log(self.base) / max(size, 1)))
        places = places if places.ndim == 2 else places[None]
        angles = places[..., None] * rates[None, None]
        table = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)
        return x + table.reshape(*places.shape, 2 * len(pairs))[..., :size].astype(x.dtype)


class ClassToken(Layer):
    """Puts a learned vector in front of a sequence, as a place for what is known of the whole.

    The parameter ``token`` is (1, size). Devlin et al., "BERT: pre-training of deep bidirectional
    transformers", 2019; Dosovitskiy et al., "An image is worth 16x16 words", 2021.

    Args:
      dtype: the parameter's dtype.
      token_initializer: U[-0.07, 0.07] if None.

    Returns:
      When called with ``(p, x)``, x (batch, length, size): (batch, 1 + length, size).

    Raises:
      ValueError: when called: the input has other axes.
      TypeError: when called: the input is not floating-point.

    Example:
      >>> import jax
      >>> net, x = ClassToken(), jnp.ones((2, 5, 4))
      >>> params = net.init(jax.random.key(0), x)
      >>> params.token.shape, net(params, x).shape
      ((1, 4), (2, 6, 4))
    """

    dtype: Any = "float32"
    token_initializer: Initializer | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "token_initializer", get(self.token_initializer or Uniform()))

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        _check(self, x)
        batch, _, size = x.shape
        assert self.token_initializer is not None  # since it was made
        token = p.param("token", (1, size), self.token_initializer, self.dtype)
        return jnp.concatenate([jnp.broadcast_to(token[None], (batch, 1, size)), x], 1)

    def __repr__(self) -> str:
        return "ClassToken"
