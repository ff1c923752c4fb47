"""Multi-head attention and rotary position embeddings."""

from typing import Any

import jax
import jax.numpy as jnp

from paramtree.initializers import Initializer, Uniform, Zero, get
from paramtree.model.scope import child
from paramtree.nn.basic import Dense, check_integers
from paramtree.nn.layer import Layer

__all__ = ["MultiHeadAttention", "rotate"]


def rotate(x: Any, positions: Any, base: float = 10_000.0) -> Any:
    """Returns x with rotary position embeddings applied.

    The dot product of two rotated vectors depends only on their distance. Su et al., "RoFormer:
    enhanced transformer with rotary position embedding", 2021. The first half of each vector is paired
    with the second half, as in GPT-NeoX and Llama.

    Args:
      x: (..., length, heads, size), of an even size.
      positions: integers, (length,).
      base: the wavelengths grow geometrically from 2π towards 2π · base.

    Example:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> rotate(x, jnp.array([0, 1]))[0, :, 0].round(2)
      Array([[ 1.        ,  1.        ],
             [-0.29999998,  1.38      ]], dtype=float32)
    """
    half = x.shape[-1] // 2
    rates = jnp.power(jnp.float32(base), -jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions.astype(jnp.float32)[:, None] * rates[None, :])[:, None, :]
    angles = angles.reshape((1,) * (x.ndim - 3) + angles.shape)
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class MultiHeadAttention(Layer):
    """Multi-head attention, of a sequence to itself or to another sequence.

    Vaswani et al., "Attention is all you need", 2017. Its four dense layers are ``query``, ``key``,
    ``value`` and ``out``; in between it calls ``jax.nn.dot_product_attention``.

    With ``cache``, a call under ``pt.training`` stores keys and values as state, so a sequence can be
    processed in pieces, such as one token at a time when sampling. The state is ``cache_key`` and
    ``cache_value``, (batch, cache, kv_heads, head size), and ``cache_index``, the number of cached
    positions. A call for inference attends within ``x`` and ignores the cache. Dropout is also active
    under ``pt.training``: sample from a second net, with a cache and without dropout, on the same
    parameters.

    Args:
      num_heads: the number of heads.
      units: the size of the output, and of all heads together; 0 for the input's size.
      num_kv_heads: the number of heads for keys and values, each shared by ``num_heads /
        num_kv_heads`` query heads (Ainslie et al., 2023); 0 for ``num_heads``.
      use_bias: whether the dense layers have biases.
      causal: whether a position attends only to itself and to earlier positions.
      rotary: whether to apply ``rotate`` to queries and keys.
      cache: the maximum number of cached positions; 0 for no cache. The output is NaN once the cache
        overflows, as compiled code cannot raise.
      dtype: the parameters' dtype.
      weight_initializer: U[-0.07, 0.07] if None.
      bias_initializer: zeros by default.

    Returns:
      When called with ``(p, x, memory=None, mask=None)``: (batch, length, units). ``x`` is (batch,
      length, size). It attends to ``memory``, (batch, memory length, any size), or to itself if None.
      ``mask`` is boolean, True where attention is allowed: (batch, memory length) to mask padding, or
      anything that broadcasts to (batch, heads, length, memory length).

    Raises:
      ValueError: sizes do not divide, or an input or mask has the wrong shape.

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
        check_integers(self, 0, "num_heads", "units", "num_kv_heads", "cache")
        if not self.num_heads or self.units % self.num_heads:
            raise ValueError(
                "MultiHeadAttention: num_heads must be positive and divide units, but found "
                f"num_heads={self.num_heads} and units={self.units}."
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                "MultiHeadAttention: num_kv_heads must divide num_heads, but found "
                f"num_kv_heads={self.num_kv_heads} and num_heads={self.num_heads}."
            )
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "weight_initializer", get(self.weight_initializer or Uniform()))
        object.__setattr__(self, "bias_initializer", get(self.bias_initializer))

    def __call__(self, p: Any, x: Any, memory: Any = None, mask: Any = None) -> Any:
        source = x if memory is None else memory
        if x.ndim != 3 or source.ndim != 3 or x.shape[0] != source.shape[0]:
            raise ValueError(
                f"{self!r} needs x and memory (batch, length, size), but found {x.shape} and "
                f"{source.shape}."
            )
        units = self.units or x.shape[-1]
        size = units // self.num_heads
        if units % self.num_heads or (self.rotary and size % 2):
            heads = f"{self.num_heads} heads{' of an even size' if self.rotary else ''}"
            raise ValueError(f"{self!r} cannot divide {units} units into {heads}.")
        kv_heads = self.num_kv_heads or self.num_heads
        query = self._dense(p, "query", x, units).reshape(*x.shape[:2], self.num_heads, size)
        key, value = (
            self._dense(p, name, source, kv_heads * size).reshape(*source.shape[:2], kv_heads, size)
            for name in ("key", "value")
        )
        mask = self._mask(mask, x, source)
        causal = self.causal
        if self.cache:
            if memory is not None:
                raise ValueError(f"{self!r} caches its own sequence: call it without memory.")
            query, key, value, mask, causal = self._cached(p, query, key, value, mask)
        elif self.rotary:
            query = rotate(query, jnp.arange(x.shape[1]))
            key = rotate(key, jnp.arange(source.shape[1]))
        # dot_product_attention promotes dtypes internally, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
        return self._dense(p, "out", y.reshape(*x.shape[:2], units), units)

    def _dense(self, p: Any, name: str, x: Any, units: int) -> Any:
        layer = Dense(
            units,
            use_bias=self.use_bias,
            flatten=False,
            dtype=self.dtype,
            weight_initializer=self.weight_initializer,
            bias_initializer=self.bias_initializer,
        )
        return layer(child(p, name), x)

    def _mask(self, mask: Any, x: Any, source: Any) -> Any:
        if mask is None:
            return None
        full = x.shape[0], self.num_heads, x.shape[1], source.shape[1]
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"{self!r} needs a boolean mask (True means attend), but found {mask.dtype}."
            )
        if mask.ndim == 2 and mask.shape == (full[0], full[3]):
            return mask[:, None, None, :]
        if mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True)):
            raise ValueError(
                f"{self!r} needs a mask (batch, memory length), here {full[::3]}, or broadcastable to "
                f"(batch, heads, length, memory length), here {full}, but found {mask.shape}."
            )
        return mask

    def _cached(self, p: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        """Returns query, keys, values, mask and causal for attention to the updated cache."""
        batch, length, heads, size = key.shape
        shape = (batch, self.cache, heads, size)
        keys = p.state("cache_key", shape, Zero(), key.dtype)
        values = p.state("cache_value", shape, Zero(), value.dtype)
        index = p.state("cache_index", (), Zero(), jnp.int32)
        if p.training and mask is not None:
            raise ValueError(f"{self!r} has a cache, which does not support padding: pass no mask.")
        positions = (index if p.training else 0) + jnp.arange(length, dtype=jnp.int32)
        if self.rotary:
            query, key = rotate(query, positions), rotate(key, positions)
        if not p.training:
            return query, key, value, mask, self.causal
        at = (0, index, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, key, at)
        values = jax.lax.dynamic_update_slice(values, value, at)
        p.update("cache_key", keys)
        p.update("cache_value", values)
        p.update("cache_index", index + jnp.int32(length))
        last = positions if self.causal else jnp.full_like(positions, positions[-1])
        mask = jnp.arange(self.cache)[None, :] <= last[:, None]
        query = jnp.where(positions[-1] >= self.cache, jnp.nan, query)
        return query, keys, values, mask[None, None], False

    def __repr__(self) -> str:
        options = [
            f"{self.units or None}",
            f"heads={self.num_heads}",
            *([f"kv_heads={self.num_kv_heads}"] if self.num_kv_heads else []),
            *(name for name in ("causal", "rotary") if getattr(self, name)),
            *([f"cache={self.cache}"] if self.cache else []),
        ]
        return f"MultiHeadAttention({', '.join(options)})"
