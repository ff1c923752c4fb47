"""The cache of attention: a sequence that grows piece by piece, or a memory that is stored once.

A layer's state says which of the two it holds: only that of a memory has ``cache_mask``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError, ScopeError
from paramtree.core.tree import place_of
from paramtree.initializers import Constant, Zero
from paramtree.model.scope import run_of
from paramtree.nn.decoding import writes

__all__ = ["Cache", "holds_memory"]


def holds_memory(layer: Any, p: Any, memory: Any, padding: Any) -> bool:
    """Whether the cache of a layer is that of a memory, which a call stores, or reads if it has none.

    Raises:
      ScopeError: the call is for inference, and would read a memory.
      ValueError: the cache is of the other kind, or there is padding without a memory.
    """
    if not layer.cache:
        return False
    if memory is not None:
        if "cache_index" in p and "cache_mask" not in p:
            raise ValueError(
                f"{layer!r} caches its own sequence: call it without memory. The layer that caches a "
                "memory is one that pt.init calls with a memory."
            )
        return True
    if "cache_mask" not in p:
        return False
    if not writes(p) and not run_of(p).recording:
        raise ScopeError(
            f"{layer!r} holds a memory in its cache, which only calls under pt.decoding and "
            "pt.training read: give it the memory."
        )
    if padding is not None:
        raise ValueError(
            f"{layer!r} holds a memory in its cache, with its padding: give the padding_mask in the "
            "call that gives the memory."
        )
    return True


class Cache:
    """What a layer has stored: keys and values, (batch, cache, kv_heads, size).

    Attributes:
      index: the number of positions of ``x`` so far; for a memory, since it was given, and else -1.
      mask: for a memory, boolean, (batch, cache): where there are keys that are no padding.
    """

    def __init__(self, layer: Any, p: Any, key: Any, value: Any, of_memory: bool) -> None:
        """Declares the state; the keys and values give its dtypes and the other sizes."""
        self.layer, self.p, self.parts = layer, p, list[Any]()
        shape = (key.shape[0], layer.cache, *key.shape[2:])
        for name, new in (("key", key), ("value", value)):
            dtype = new.dtype if layer.cache_dtype is None else layer.cache_dtype
            old = p.state(f"cache_{name}", shape, Zero(), dtype)
            if writes(p) and layer.cache_dtype is None and old.dtype != new.dtype:
                path = join((*place_of(p), f"cache_{name}"))
                raise MismatchError(
                    f"{layer!r}: `{path}` holds {old.dtype}, but the {name}s are {new.dtype}: cast the "
                    "cache as the parameters and the input, or set cache_dtype, so that they are cast."
                )
            self.parts.append(old)
        self.index = p.state("cache_index", (), Constant(-1) if of_memory else Zero(), jnp.int32)
        self.mask: Any = None
        if of_memory:
            self.mask = p.state("cache_mask", shape[:2], Zero(), jnp.bool_)

    def extend(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any, Any]:
        """Appends to a sequence; returns queries, keys, values and a mask for attention to it."""
        places = self.index + jnp.arange(key.shape[1], dtype=jnp.int32)
        self._write(key, value, self.index)
        self.p.update("cache_index", self.index + jnp.int32(key.shape[1]))
        last = places if self.layer.causal else jnp.full_like(places, places[-1])
        query = jnp.where(places[-1] >= self.layer.cache, jnp.nan, query)
        return query, *self._read(key.dtype, value.dtype), self._seen(places, last)

    def remember(self, query: Any, key: Any, value: Any, padding: Any) -> tuple[Any, Any]:
        """Stores a memory in place of any other; returns its keys and values as they are stored."""
        batch, length = key.shape[:2]
        self._write(self._padded(key), self._padded(value), jnp.int32(0))
        mask = jnp.ones((batch, length), bool) if padding is None else padding
        self.p.update("cache_mask", self._padded(jnp.broadcast_to(mask, (batch, length))))
        self.p.update("cache_index", jnp.int32(query.shape[1]))
        key, value = self._read(key.dtype, value.dtype)
        return key[:, :length], value[:, :length]

    def recall(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any, Any]:
        """Returns queries, keys, values and a mask for attention to the memory that is stored.

        The keys and values that are given are empty.
        """
        places = self.index + jnp.arange(query.shape[1], dtype=jnp.int32)
        self.p.update("cache_index", self.index + jnp.int32(query.shape[1]))
        last = places if self.layer.causal else jnp.full_like(places, self.layer.cache)
        mask = self._seen(places, last) & self.mask[:, None, None, :]
        key, value = self._read(key.dtype, value.dtype)
        return query, key, jnp.where(self.index < 0, jnp.nan, value), mask

    def _write(self, key: Any, value: Any, start: Any) -> None:
        self.parts = [
            jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, 0, 0))
            for old, new in zip(self.parts, (key, value), strict=True)
        ]
        self.p.update("cache_key", self.parts[0])
        self.p.update("cache_value", self.parts[1])

    def _read(self, *dtypes: Any) -> tuple[Any, Any]:
        key, value = (part.astype(dtype) for part, dtype in zip(self.parts, dtypes, strict=True))
        return key, value

    def _padded(self, x: Any) -> Any:
        """Returns something of each position of a memory, for all places; the others are zero."""
        rest = self.layer.cache - x.shape[1]
        return jnp.pad(x, [(0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2)])

    def _seen(self, places: Any, last: Any) -> Any:
        """Returns which places of the cache queries at given places see, up to the last of each."""
        keys = jnp.arange(self.layer.cache, dtype=jnp.int32)[None, :]
        mask = keys <= last[:, None]
        if self.layer.window:
            mask = mask & (jnp.abs(places[:, None] - keys) < self.layer.window)
        return mask[None, None]
