"""How far apart the values of two leaves are.

numpy measures leaves in host memory, block by block and in float64: nothing is compiled, and jax arrays
on the CPU are not copied. Small leaves on other devices are fetched first, which is faster than
compiling for each of their many shapes. Large leaves, which have few shapes, and leaves that span
several hosts are measured on their devices.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.verbs.alike import alike

__all__ = ["Distance", "comparable", "distances", "is_key", "numeric"]

BLOCK = 1 << 16  # elements; the intermediate results stay in cache
SMALL = 1 << 12  # elements up to which leaves are compared many at a time: numpy takes 50 µs for each
LARGE = 1 << 20  # elements from which a leaf is measured on its device


class Distance(NamedTuple):
    """How far apart two leaves are: the attributes of a ``Change`` that are numbers."""

    differing: int
    size: int
    largest: float | int | None
    relative: float | None


def comparable(a: Any, b: Any) -> bool:
    """Whether the values of two leaves can be compared element by element."""
    struct = jax.ShapeDtypeStruct
    if isinstance(a, struct) or isinstance(b, struct):
        return False
    if alike(a, b):
        return True
    same = shape_of(a) == shape_of(b)
    return same and (bool(dtype_of(a) == dtype_of(b)) or (numeric(a) and numeric(b)))


def distances(
    pairs: Iterable[tuple[Any, Any]], rtol: float = 0.0, atol: float = 0.0
) -> list[Distance | None]:
    """Returns the distance of each pair of comparable leaves; None if equal within the tolerance."""
    results: list[Any] = []
    small: dict[Any, list[_Flat]] = {}
    for i, (a, b) in enumerate(pairs):
        results.append(None)
        if a is b:
            continue
        if not numeric(a):
            results[i] = _of_objects(a, b)
        elif _on_host(a, b):
            x = a if hasattr(a, "dtype") else np.asarray(a)
            y = b if hasattr(b, "dtype") else np.asarray(b)
            size = x.size
            if size > SMALL:
                results[i] = _of_arrays(np.asarray(x), np.asarray(y), rtol, atol)
            elif size:
                small.setdefault((x.dtype, y.dtype), []).append((i, x, y, size))
        else:  # starts without waiting; the results are fetched together below
            results[i] = (a.size, _on_device(a, b, rtol, atol))
    for group in small.values():
        for part in _batches(group):
            _compare_small(part, results, rtol, atol)
    return [_fetched(*result) if type(result) is tuple else result for result in results]


def numeric(leaf: Any) -> bool:
    """Whether a leaf holds numbers or booleans."""
    dtype = dtype_of(leaf)
    if dtype is None:
        return isinstance(leaf, bool | int | float | complex) and np.asarray(leaf).dtype != object
    return _of_numbers(dtype)


@functools.lru_cache
def _of_numbers(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    dtype = dtype_of(leaf)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _on_host(a: Any, b: Any) -> bool:
    """Whether numpy compares two leaves."""
    placed, other = getattr(a, "sharding", None), getattr(b, "sharding", None)
    if placed is None or other is None:
        return True  # jax would truncate numpy's float64 to float32
    devices = placed.device_set
    if devices != other.device_set:
        return True
    if not placed.is_fully_addressable:
        return False
    return a.size < LARGE or all(device.platform == "cpu" for device in devices)


# Numeric leaves


def _parts(xp: Any, x: Any, y: Any, rtol: Any, atol: Any) -> tuple[Any, Any, Any, Any]:
    """Returns elementwise differences, exactly and as floats, which exceed the tolerance, and ``|x|``.

    ``xp`` is numpy or jax.numpy; ``|x|`` is 0 where x is not finite.
    """
    x, y = _widened(x), _widened(y)
    wide = _wide(xp, x, y)
    if x.dtype.kind == y.dtype.kind and x.dtype.kind in "iu":
        dtype = max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
        a, b = x.astype(dtype), y.astype(dtype)
        # Overflow wraps around, so as unsigned integers all differences are exact.
        far = xp.where(a > b, a - b, b - a).astype(f"uint{8 * dtype.itemsize}")
        size, reference = (xp.abs(array.astype(wide)) for array in (a, b))
        equal, off = a == b, far.astype(wide)
    else:
        a, b = x.astype(wide), y.astype(wide)
        a_nan, b_nan = xp.isnan(a), xp.isnan(b)
        equal = (a == b) | (a_nan & b_nan)
        size, reference = xp.abs(a), xp.abs(b)
        # The absolute value of a complex number with one NaN part may be infinite.
        far = off = xp.where(equal, 0, xp.where(a_nan | b_nan, xp.nan, xp.abs(a - b)))
    # An infinite y has an infinite tolerance, but nothing other than itself is close to it.
    near = xp.isfinite(off) & (off <= atol + rtol * reference)
    return far, off, ~(equal | near), xp.where(xp.isfinite(size), size, 0)


def _widened(x: Any) -> Any:
    """Returns booleans and small integers as 32-bit integers."""
    small = x.dtype == np.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4)
    signed = jnp.issubdtype(x.dtype, jnp.signedinteger)
    return x.astype(np.int32 if signed else np.uint32) if small else x


def _wide(xp: Any, *arrays: Any) -> Any:
    """Returns the dtype to compute in: float64, or in jax float32 unless an input has 64 bits."""
    if xp is np:
        return np.result_type(np.float64, *(x.dtype for x in arrays if x.dtype.kind in "fc"))
    long = any(x.dtype in (np.float64, np.complex128, np.int64, np.uint64) for x in arrays)
    is_complex = any(x.dtype.kind == "c" for x in arrays)
    return np.result_type(
        np.float64 if long else np.float32, np.complex64 if is_complex else np.float32
    )


def _of_arrays(x: np.ndarray, y: np.ndarray, rtol: float, atol: float) -> Distance | None:
    """Compares two numpy arrays block by block."""
    x, y = x.reshape(-1), y.reshape(-1)
    blocks = [slice(i, i + BLOCK) for i in range(0, x.size, BLOCK)]
    if x.dtype == y.dtype and not any((x[block] != y[block]).any() for block in blocks):
        return None
    differing, tops, apart, length = 0, [], 0.0, 0.0
    with np.errstate(all="ignore"):
        for block in blocks:
            far, off, beyond, sizes = _parts(np, x[block], y[block], rtol, atol)
            differing += int(np.count_nonzero(beyond))
            tops.append(far.max())
            apart = math.hypot(apart, _norm(*_scaled(np, off)))
            length = math.hypot(length, _norm(*_scaled(np, sizes)))
        return _distance(differing, x.size, np.max(tops), apart, length) if differing else None


_Flat = tuple[int, Any, Any, int]  # the number of a pair, its two arrays, and their size


def _batches(group: list[_Flat]) -> Iterator[list[_Flat]]:
    """Yields parts of a list that have up to a block of elements."""
    ends = np.cumsum([size for *_, size in group]) // BLOCK
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(group)]
    for start, stop in itertools.pairwise(cuts):
        yield group[start:stop]


def _compare_small(group: list[_Flat], results: list[Any], rtol: float, atol: float) -> None:
    """Compares small arrays of the same two dtypes at once, each as ``_of_arrays`` does."""
    if not group:
        return
    x, y, starts, sizes = _joined(group)
    if x.dtype == y.dtype:
        changed = np.logical_or.reduceat(x != y, starts)
        if not changed.any():
            return
        if not changed.all():
            group = list(itertools.compress(group, changed))
            x, y, starts, sizes = _joined(group)
    with np.errstate(all="ignore"):
        far, off, beyond, lengths = _parts(np, x, y, rtol, atol)
        norms = []
        for values in (off, lengths):
            tops = np.maximum.reduceat(values, starts)
            units = np.where((tops > 0) & np.isfinite(tops), tops, 1)
            squares = np.add.reduceat((values / np.repeat(units, sizes)) ** 2, starts)
            norms.append(list(map(_norm, tops.tolist(), squares.tolist())))
        counts = np.add.reduceat(beyond, starts, dtype=np.int64).tolist()
        largest = np.maximum.reduceat(far, starts)
    for pair, count, top, apart, length in zip(group, counts, largest, *norms, strict=True):
        if count:
            results[pair[0]] = _distance(count, pair[3], top, apart, length)


def _joined(group: list[_Flat]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the arrays end to end, where each starts, and their sizes."""
    _, first, second, each = zip(*group, strict=True)
    sizes = np.array(each)
    return _end_to_end(first), _end_to_end(second), np.cumsum(sizes) - sizes, sizes


def _end_to_end(arrays: Sequence[Any]) -> np.ndarray:
    """Returns the elements of arrays of one dtype, whatever their shapes."""
    dtype = arrays[0].dtype
    if dtype.kind in "biufc":
        # Their buffers are read in a third of the time that numpy takes to make jax arrays its own.
        with contextlib.suppress(BufferError, TypeError, ValueError, RuntimeError):
            return np.frombuffer(b"".join(arrays), dtype)
    return np.concatenate(arrays, axis=None)  # not in host memory, or not in order


@jax.jit
def _on_device(x: Any, y: Any, rtol: Any, atol: Any) -> tuple[Any, ...]:
    """Compares two jax arrays on their devices."""
    far, off, beyond, sizes = _parts(jnp, x, y, rtol, atol)
    # Beyond the range of int32 the count is approximate.
    count = jnp.sum(beyond, dtype=jnp.int32 if x.size < 2**31 else jnp.float32)
    return count, jnp.max(far, initial=0), _scaled(jnp, off), _scaled(jnp, sizes)


def _fetched(size: int, result: tuple[Any, ...]) -> Distance | None:
    differing, top, apart, length = jax.device_get(result)
    return _distance(int(differing), size, top, _norm(*apart), _norm(*length)) if differing else None


def _scaled(xp: Any, values: Any) -> tuple[Any, Any]:
    """Returns the largest value, and the sum of squares in units of it, which does not overflow."""
    top = xp.max(values, initial=0)
    unit = xp.where((top > 0) & xp.isfinite(top), top, 1)
    return top, xp.sum((values / unit) ** 2)


def _norm(top: Any, squares: Any) -> float:
    return float(top) * math.sqrt(float(squares)) if math.isfinite(top) else float(top)


def _distance(differing: int, size: int, top: Any, apart: float, length: float) -> Distance:
    largest = int(top) if top.dtype.kind == "u" else float(top)
    relative = math.nan if math.isnan(largest) else apart / length if length else math.inf
    return Distance(differing, size, largest, relative)


# Non-numeric leaves


def _of_objects(a: Any, b: Any) -> Distance | None:
    """Compares PRNG keys, strings, dates and arbitrary objects."""
    dtype = dtype_of(a)
    if dtype is None:
        return None if _same(a, b) else Distance(1, 1, None, None)
    if is_key(a):
        x, y = (np.asarray(jax.random.key_data(leaf)) for leaf in (a, b))
        unequal = np.any(x != y, axis=-1)
    elif dtype == jax.dtypes.float0:
        return None  # float0 has no values
    else:
        x, y = np.asarray(a), np.asarray(b)
        if x.dtype == object:  # elements may be arrays, whose truth value is an error in numpy
            pairs = zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)
            unequal = np.array([not _same(*pair) for pair in pairs])
        else:
            unequal = np.asarray((x != y) & ~((x != x) & (y != y)))  # NaT != NaT
    count = int(np.count_nonzero(unequal))
    return Distance(count, unequal.size, None, None) if count else None


def _same(a: Any, b: Any) -> bool:
    try:
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return np.array_equal(a, b)
        return a is b or bool(a == b) or bool(a != a and b != b)
    except Exception:  # arbitrary objects may fail to compare; such leaves count as different
        return False
