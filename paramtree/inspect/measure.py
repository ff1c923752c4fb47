"""Measures arrays: moments, extremes, zeros, non-finite values, histograms.

Each array is reduced on its own device to a few numbers. There is one compiled function per shape, not
one per tree: XLA takes about 10 ms to compile a leaf, three seconds for a transformer of 300 leaves,
which have only a dozen shapes, while a call takes 20 microseconds. Inside a jitted function everything
becomes part of that function.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["absent", "CHUNK", "FIELDS", "measure"]

_FLOATS = ("mean", "std", "min", "max", "norm", "zeros")
_COUNTS = ("nan", "inf")
FIELDS = (*_FLOATS, *_COUNTS)

# Leaves of four chunks or more are read chunk by chunk. A chunk and its accumulators fit in cache.
CHUNK = 16384
# The fast pass reads smaller chunks, in parts that are summed before they reach the accumulators, since
# loading and storing the accumulators takes most of the time.
_LANES, _PARTS = 1024, 8
_THREADS = 4  # more do not read memory any faster
_Sums = tuple[Any, ...]  # of offsets, of their squares; min, max; counts of zeros, NaN, infinities


def measure(leaves: list[Any], bins: int = 0) -> list[Any]:
    """Returns an array for each of ``FIELDS``, with an entry per leaf, and the histograms or None."""
    rows = _rows(leaves, bins)
    traced = any(isinstance(value, jax.core.Tracer) for row in rows for value in row)
    if not traced:
        rows = jax.device_get(rows)  # the leaves may be on different devices
        for i, (floats, _) in enumerate(rows):
            if not np.isfinite(floats[1]) and _chunked(leaves[i]):  # the fast pass did not apply
                rows[i] = jax.device_get(_of_leaf(leaves[i], bins=bins, chunked=True))
    xp: Any = jnp if traced else np
    if not rows:
        rows = [(xp.zeros(len(_FLOATS), np.float32), xp.zeros(len(_COUNTS) + bins, np.int32))]
    widest = max((floats.dtype for floats, _ in rows), key=lambda dtype: dtype.itemsize)
    floats = xp.stack([row.astype(widest) for row, _ in rows])[: len(leaves)].T
    counts = xp.stack([row for _, row in rows])[: len(leaves)]
    not_finite, histograms = xp.split(counts, [len(_COUNTS)], axis=1)
    return [*floats, *not_finite.T, histograms if bins else None]


def _rows(leaves: list[Any], bins: int) -> list[tuple[Any, Any]]:
    """Returns ``_of_leaf`` of each leaf, several at once since XLA reads a leaf with one thread."""
    large = [i for i, leaf in enumerate(leaves) if _chunked(leaf)]
    # jax's 64-bit setting may be local to this thread, so 64-bit leaves stay in it.
    pooled = [i for i in large if leaves[i].dtype.itemsize <= 4] if len(large) > 1 else []
    rows: list[Any] = [None] * len(leaves)
    with ThreadPoolExecutor(_THREADS) as pool:
        for i in pooled:
            rows[i] = pool.submit(_waited, leaves[i], bins)
        for i in sorted(set(range(len(leaves))) - set(pooled)):
            # A file may hold 64-bit arrays, where 1e300 is not infinite.
            wide = isinstance(leaves[i], np.ndarray) and leaves[i].dtype.itemsize >= 8
            with jax.enable_x64(True) if wide else contextlib.nullcontext():
                chunked = _chunked(leaves[i])
                rows[i] = _of_leaf(leaves[i], bins=bins, chunked=chunked, fast=chunked)
        for i in pooled:
            rows[i] = rows[i].result()
    return rows


def _waited(leaf: Any, bins: int) -> Any:
    return jax.block_until_ready(_of_leaf(leaf, bins=bins, chunked=True, fast=True))


def _chunked(leaf: Any) -> bool:
    """Whether one pass in chunks is faster than separate reductions.

    On CPU, XLA does not fuse the reductions, so they would read the memory eight times. A leaf that
    spans devices, or may do so when traced, must not be flattened, since that would gather it.
    """
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or leaf.size < 4 * CHUNK:
        return False
    devices: Any = leaf.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


@partial(jax.jit, static_argnames=("bins", "chunked", "fast"))
def _of_leaf(leaf: Any, *, bins: int, chunked: bool, fast: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the ``_FLOATS`` of one array, and its ``_COUNTS`` followed by the histogram.

    The fast pass assumes that all values are finite; otherwise its standard deviation is not finite.
    """
    x = jnp.asarray(leaf)
    x = x.ravel() if chunked else _real(x)
    shift = _middle(_real(x[:CHUNK]) if chunked else x)
    total, square, low, high, zeros, nan, inf = _sums(x, shift, chunked, fast)
    finite = (x.size - nan - inf).astype(shift.dtype)  # if 0, the divisions give NaN
    offset = total / finite
    mean = shift + offset
    variance = square / finite - offset * offset
    # Not a maximum, which jaxlib 0.8.1 folds to 0 where the variance of an empty array is NaN.
    std = jnp.sqrt(jnp.where(variance < 0, 0, variance))
    norm = jnp.sqrt(finite) * jnp.hypot(mean, std)
    low, high = (jnp.where(finite > 0, end, jnp.nan) for end in (low, high))
    share = zeros.astype(shift.dtype) / max(x.size, 1)
    counts = jnp.stack([nan, inf])
    if bins:
        counts = jnp.concatenate([counts, _histogram(x, low, high, bins, chunked)])
    return jnp.stack([mean, std, low, high, norm, share]), counts


def _real(x: jax.Array) -> jax.Array:
    """Returns values in the type they are measured in; called per chunk, to avoid copying a leaf."""
    x = jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x
    return x.astype(jax.dtypes.canonicalize_dtype(np.float64 if x.dtype.itemsize >= 8 else np.float32))


def _middle(x: jax.Array) -> jax.Array:
    """Returns the mean of the finite values; 0 if there are none."""
    finite = jnp.isfinite(x)
    return jnp.sum(jnp.where(finite, x, 0)) / jnp.maximum(jnp.sum(finite), 1).astype(x.dtype)


def _sums(x: jax.Array, shift: jax.Array, chunked: bool, fast: bool) -> _Sums:
    if not chunked:
        return _reduced(_terms(x, shift))
    size, not_finite = (_LANES * _PARTS, [jnp.zeros(1, jnp.int32)] * 2) if fast else (CHUNK, [])

    def sums(i: Any) -> _Sums:
        return _fast_terms(x, i, shift) if fast else _terms(_chunk(x, i), shift)

    lanes = jax.lax.fori_loop(1, x.size // size, lambda i, lanes: _add(lanes, sums(i)), sums(0))
    return _add(_reduced((*lanes, *not_finite)), _reduced(_terms(_tail(x, size), shift)))


def _fast_terms(x: jax.Array, chunk: Any, shift: jax.Array) -> _Sums:
    """Returns the sums of each lane over the parts of a chunk, for finite values."""
    parts: list[_Sums] = []
    for part in range(_PARTS):
        value = _chunk(x, chunk * _PARTS + part, _LANES)
        offset = value - shift
        parts.append((offset, offset * offset, value, value, (value == 0).astype(jnp.int32)))
    while len(parts) > 1:
        parts = [_add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _terms(x: jax.Array, shift: jax.Array) -> _Sums:
    """Returns the terms of the sums for each value.

    Squares are of offsets from a value near the mean. Squares of the values themselves would lose the
    standard deviation of values far from zero to rounding.
    """
    finite = jnp.isfinite(x)
    nan = jnp.isnan(x)
    offset = jnp.where(finite, x - shift, 0)
    ends = jnp.where(finite, x, jnp.inf), jnp.where(finite, x, -jnp.inf)
    counts = (x == 0, nan, ~(finite | nan))
    return (offset, offset * offset, *ends, *(hit.astype(jnp.int32) for hit in counts))


def _add(a: _Sums, b: _Sums) -> _Sums:
    # jnp.where is one instruction; jnp.minimum takes several, to propagate NaN.
    ends = jnp.where(b[2] < a[2], b[2], a[2]), jnp.where(b[3] > a[3], b[3], a[3])
    return (a[0] + b[0], a[1] + b[1], *ends, *(i + j for i, j in zip(a[4:], b[4:], strict=True)))


def _reduced(lanes: _Sums) -> _Sums:
    total, square, low, high, *counts = lanes
    ends = jnp.min(low, initial=jnp.inf), jnp.max(high, initial=-jnp.inf)
    return (jnp.sum(total), jnp.sum(square), *ends, *(jnp.sum(hit, dtype=jnp.int32) for hit in counts))


def _chunk(x: jax.Array, i: Any, size: int = CHUNK) -> jax.Array:
    return _real(jax.lax.dynamic_slice(x, (i * size,), (size,)))


def _tail(x: jax.Array, size: int = CHUNK) -> jax.Array:
    return _real(x[x.size // size * size :])


def _histogram(x: jax.Array, low: Any, high: Any, bins: int, chunked: bool) -> jax.Array:
    """Returns the number of values in each bin; a value on an edge is in the upper bin, as in numpy."""
    equal = low == high  # numpy then takes a range of 1 around the value
    low, high = jnp.where(equal, low - 0.5, low), jnp.where(equal, high + 0.5, high)
    edges = [low + (high - low) * np.asarray(i / bins, low.dtype) for i in range(1, bins)]

    def below(values: jax.Array) -> jax.Array:
        # Comparing with every edge is faster than scattering into bins.
        finite = jnp.isfinite(values)
        hits = [*(finite & (values < edge) for edge in edges), finite]
        return jnp.stack([jnp.sum(hit, dtype=jnp.int32) for hit in hits])

    if chunked:
        count = jax.lax.fori_loop(
            0, x.size // CHUNK, lambda i, count: count + below(_chunk(x, i)), below(_tail(x))
        )
    else:
        count = below(x)
    return jnp.diff(count, prepend=0)


def absent(leaf: Any) -> str:
    """Returns why a leaf has no values to read, or an empty string if it has; tracers have values."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "is only a shape"
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    gone = is_array and leaf.is_deleted()
    return "was donated to a jitted function, or deleted" if gone else ""
