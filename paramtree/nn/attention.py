"""Attention: every position of one sequence looks at positions of another, or of the same."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.tree import check_scope, child
from paramtree.initializers import Initializer, Uniform, Zero, get
from paramtree.nn.basic import Dense, _size
from paramtree.nn.layer import Layer

__all__ = ["MultiHeadAttention", "rotate"]


def rotate(x: Any, positions: Any, base: float = 10_000.0) -> Any:
    """Returns vectors turned by angles that grow with their positions.

    The product of two turned vectors depends on how far apart they are, not on where. Su et al.,
    "RoFormer: enhanced transformer with rotary position embedding", 2021; the first half of a vector
    is paired with the second, as in GPT-NeoX and Llama.

    Args:
      x: (..., length, heads, size); the size is even.
      positions: whole numbers, (length,).
      base: how much slower the last pair turns than the first.

    Example:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> rotate(x, jnp.array([0, 1]))[0, :, 0].round(2)
      Array([[ 1.        ,  1.        ],
             [-0.29999998,  1.38      ]], dtype=float32)
    """
    half = x.shape[-1] // 2
    rates = jnp.power(jnp.float32(base), -jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions.astype(jnp.float32)[:, None] * rates[None, :])[:, None, :]
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    shape = (1,) * (x.ndim - 3) + cos.shape
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@dataclasses.dataclass(frozen=True, repr=False)
class MultiHeadAttention(Layer):
    """Multi-head attention, of a sequence over itself or over another one.

    Vaswani et al., "Attention is all you need", 2017. It has four dense layers, ``query``, ``key``,
    ``value`` and ``out``. What it computes between them is ``jax.nn.dot_product_attention``.

    With ``cache`` it keeps, under ``pt.training``, the keys and values of all positions so far as
    state, so that a sequence can be given in pieces: one token at a time when sampling. The state
    is ``cache_key`` and ``cache_value``, (batch, cache, kv_heads, head size), and ``cache_index``, how
    many positions it holds. Called for inference it attends within ``x``, and leaves the cache alone.
    Layers hold settings, never arrays, so a net to sample from may be another one than that which was
    trained: with a cache, and without dropout, which ``pt.training`` would turn on.

    Args:
      num_heads: how many heads.
      units: the size of the output, and of all heads together; that of the input if 0.
      num_kv_heads: how many heads of keys and values; each serves ``num_heads / num_kv_heads`` heads of
        queries (Ainslie et al., 2023). As many as ``num_heads`` if 0.
      use_bias: whether the dense layers have biases.
      causal: whether a position sees only itself and those before it.
      rotary: whether queries and keys are turned by their positions, see ``rotate``.
      cache: how many positions the cache can hold; 0 for none. One that is full gives NaN, as
        compiled code cannot raise an error.
      dtype: the parameters' dtype.
      weight_initializer: U[-0.07, 0.07] if None.
      bias_initializer: zeros by default.

    Returns:
      On calling with ``(p, x, memory=None, mask=None)``: (batch, length, units). ``x`` is (batch,
      length, size), and ``memory``, what is attended to, (batch, other length, any size); None is x.
      ``mask`` is boolean: (batch, other length) to hide padding, or anything that broadcasts to
      (batch, heads, length, other length); True is to be seen.

    Raises:
      ValueError: sizes that do not divide, or inputs or masks of the wrong shape.

    Example:
      >>> net = MultiHeadAttention(2, causal=True)
      >>> x = jnp.ones((1, 5, 8))
      >>> params = net.init(jax.random.key(0), x)
      >>> list(params), net(params, x).shape
      (['query', 'key', 'value', 'out'], (1, 5, 8))
    """

    num_heads: int
    units: int = 0
    num_kv_heads: int = 0
    use_bias: bool = True
    causal: bool = False
    rotary: bool = False
    cache: int = 0
    dtype: Any = "float32"
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"

    def __post_init__(self) -> None:
        for name in ("num_heads", "units", "num_kv_heads", "cache"):
            _size("MultiHeadAttention", name, getattr(self, name))
        if not self.num_heads or self.units % self.num_heads:
            raise ValueError(
                f"MultiHeadAttention: units, {self.units}, are shared evenly by num_heads, "
                f"{self.num_heads}, of 1 or more."
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"MultiHeadAttention: each of num_kv_heads, {self.num_kv_heads}, serves as many of "
                f"num_heads, {self.num_heads}: the one must divide the other."
            )
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "weight_initializer", get(self.weight_initializer or Uniform()))
        object.__setattr__(self, "bias_initializer", get(self.bias_initializer))

    def __call__(self, p: Any, x: Any, memory: Any = None, mask: Any = None) -> Any:
        check_scope(p)
        other = x if memory is None else memory
        if x.ndim != 3 or other.ndim != 3 or x.shape[0] != other.shape[0]:
            raise ValueError(
                f"{self!r} takes (batch, length, size) twice, but found {x.shape} and {other.shape}."
            )
        units = self.units or x.shape[-1]
        size = units // self.num_heads
        if units % self.num_heads or (self.rotary and size % 2):
            even = " of an even size" if self.rotary else ""
            raise ValueError(f"{self!r}: {units} units do not make {self.num_heads} heads{even}.")
        kv_heads = self.num_kv_heads or self.num_heads
        query = self._heads(p, "query", x, self.num_heads, size)
        key = self._heads(p, "key", other, kv_heads, size)
        value = self._heads(p, "value", other, kv_heads, size)
        mask = self._mask(mask, x, other)
        causal = self.causal
        if self.cache:
            if memory is not None:
                raise ValueError(f"{self!r} has a cache of its own sequence, and takes no memory.")
            query, key, value, mask, causal = self._cached(p, query, key, value, mask)
        elif self.rotary:
            query = rotate(query, jnp.arange(x.shape[1]))
            key = rotate(key, jnp.arange(other.shape[1]))
        # It promotes within itself, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
        return self._dense(units)(child(p, "out"), y.reshape(*x.shape[:2], units))

    def _dense(self, units: int) -> Dense:
        return Dense(
            units,
            use_bias=self.use_bias,
            flatten=False,
            dtype=self.dtype,
            weight_initializer=self.weight_initializer,
            bias_initializer=self.bias_initializer,
        )

    def _heads(self, p: Any, name: str, x: Any, heads: int, size: int) -> Any:
        y = self._dense(heads * size)(child(p, name), x)
        return y.reshape(*x.shape[:2], heads, size)

    def _mask(self, mask: Any, x: Any, other: Any) -> Any:
        if mask is None:
            return None
        full = x.shape[0], self.num_heads, x.shape[1], other.shape[1]
        if mask.dtype != jnp.bool_:
            raise ValueError(f"{self!r}: the mask is boolean, True is to be seen, not {mask.dtype}.")
        if mask.ndim == 2 and mask.shape == (full[0], full[3]):
            return mask[:, None, None, :]
        fits = mask.ndim == 4 and all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))
        if not fits:
            raise ValueError(
                f"{self!r}: the mask is (batch, other length) or broadcasts to (batch, heads, length, "
                f"other length), here {full[::3]} or {full}, but found {mask.shape}."
            )
        return mask

    def _cached(self, p: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        """Returns what to attend with: all that the cache holds, this call's positions among it."""
        batch, length, heads, size = key.shape
        shape = (batch, self.cache, heads, size)
        keys = p.state("cache_key", shape, Zero(), key.dtype)
        values = p.state("cache_value", shape, Zero(), value.dtype)
        index = p.state("cache_index", (), Zero(), jnp.int32)
        if not p.training:
            positions = jnp.arange(length)
            if self.rotary:
                query, key = rotate(query, positions), rotate(key, positions)
            return query, key, value, mask, self.causal
        if mask is not None:
            raise ValueError(f"{self!r}: with a cache, the sequences of a batch have no padding.")
        positions = index + jnp.arange(length, dtype=jnp.int32)
        if self.rotary:
            query, key = rotate(query, positions), rotate(key, positions)
        at = (0, index, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, key, at)
        values = jax.lax.dynamic_update_slice(values, value, at)
        p.update("cache_key", keys)
        p.update("cache_value", values)
        p.update("cache_index", index + jnp.int32(length))
        last = positions if self.causal else jnp.full_like(positions, positions[-1])
        seen = jnp.arange(self.cache)[None, :] <= last[:, None]
        full = positions[-1] >= self.cache
        query = jnp.where(full, jnp.full_like(query, jnp.nan), query)
        return query, keys, values, seen[None, None], False

    def __repr__(self) -> str:
        options = [
            f"{self.units or None}",
            f"heads={self.num_heads}",
            *([f"kv_heads={self.num_kv_heads}"] if self.num_kv_heads else []),
            *(name for name in ("causal", "rotary") if getattr(self, name)),
            *([f"cache={self.cache}"] if self.cache else []),
        ]
        return f"MultiHeadAttention({', '.join(options)})"
