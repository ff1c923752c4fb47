"""How far the values of two leaves are apart.

What a processor can read, numpy measures, a block at a time and in float64: nothing is compiled, and
jax's arrays on a processor are read where they are. So it goes with small leaves of other devices too,
as compiling for each of their many shapes takes longer than fetching them. Only large ones, of which
the shapes are few, and those that are spread over several hosts, are measured where they are.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, shape_of

__all__ = ["Distance", "comparable", "distances", "numeric"]

BLOCK = 1 << 16  # elements: what is computed from them stays in a processor's cache
LARGE = 1 << 20  # elements from which on a leaf is measured where it is


class Distance(NamedTuple):
    """How far two leaves are apart.

    Attributes:
      differing: how many elements differ by more than is tolerated.
      size: of how many.
      largest: the largest absolute difference of all; NaN if one has a NaN where the other has none,
        None for what is no number.
      relative: the Euclidean norm of the difference, divided by that of what is finite in the first.
    """

    differing: int
    size: int
    largest: float | int | None
    relative: float | None


def comparable(one: Any, other: Any) -> bool:
    """Whether two leaves have values that can be compared one by one."""
    if isinstance(one, jax.ShapeDtypeStruct) or isinstance(other, jax.ShapeDtypeStruct):
        return False
    if shape_of(one) != shape_of(other):
        return False
    return bool(dtype_of(one) == dtype_of(other)) or (numeric(one) and numeric(other))


def distances(
    pairs: Iterable[tuple[Any, Any]], rtol: float = 0.0, atol: float = 0.0
) -> list[Distance | None]:
    """Returns how far comparable leaves are apart; None for two that are equal as far as tolerated."""
    found: list[Any] = []
    for one, other in pairs:
        if not numeric(one):
            found.append(_of_others(one, other))
        elif one is other:
            found.append(None)
        elif _on_host(one, other):
            found.append(_of_arrays(np.asarray(one), np.asarray(other), rtol, atol))
        else:  # started, and waited for when all are
            found.append((one.size, _on_device(one, other, rtol, atol)))
    return [_fetched(*each) if type(each) is tuple else each for each in found]


def numeric(leaf: Any) -> bool:
    """Whether a leaf is made of numbers or truth values."""
    dtype = dtype_of(leaf)
    if dtype is None:
        return isinstance(leaf, bool | int | float | complex) and np.asarray(leaf).dtype != object
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))


def _on_host(one: Any, other: Any) -> bool:
    """Whether numpy is to compare two leaves."""
    if not (isinstance(one, jax.Array) and isinstance(other, jax.Array)):
        return True  # also because jax would make float32 of numpy's float64
    devices: Any = one.sharding.device_set
    if devices != other.sharding.device_set:
        return True
    if not one.is_fully_addressable:
        return False
    return one.size < LARGE or all(device.platform == "cpu" for device in devices)


# Numbers


def _parts(xp: Any, x: Any, y: Any, rtol: Any, atol: Any) -> tuple[Any, Any, Any, Any]:
    """Returns how far apart numbers are, exactly and as floats, if that is too far, and the sizes of x.

    Args:
      xp: numpy or jax.numpy.
      x: numbers.
      y: as many numbers.
      rtol: what is tolerated, in terms of y.
      atol: what is tolerated.
    """
    x, y = _widened(x), _widened(y)
    wide = _wide(xp, x, y)
    if x.dtype.kind == y.dtype.kind and x.dtype.kind in "iu":
        whole = max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
        a, b = x.astype(whole), y.astype(whole)
        # As unsigned the difference of any two is exact: what overflows comes round.
        far = xp.where(a > b, a - b, b - a).astype(f"uint{8 * whole.itemsize}")
        size, reference = (xp.abs(each.astype(wide)) for each in (a, b))
        equal, off = a == b, far.astype(wide)
    else:
        a, b = x.astype(wide), y.astype(wide)
        nan, other_nan = xp.isnan(a), xp.isnan(b)
        equal = (a == b) | (nan & other_nan)
        size, reference = xp.abs(a), xp.abs(b)
        # Of a complex number with a part that is NaN the absolute value may be infinite.
        far = off = xp.where(equal, 0, xp.where(nan | other_nan, xp.nan, xp.abs(a - b)))
    # Nothing is near to infinity, though a tolerance in terms of it is infinite.
    near = xp.isfinite(off) & (off <= atol + rtol * reference)
    return far, off, ~(equal | near), xp.where(xp.isfinite(size), size, 0)


def _widened(x: Any) -> Any:
    """Returns truth values and small whole numbers as numbers of 32 bits."""
    if jnp.issubdtype(x.dtype, jnp.signedinteger) and x.dtype.itemsize < 4:
        return x.astype(np.int32)
    if (jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4) or x.dtype == np.bool_:
        return x.astype(np.uint32)
    return x


def _wide(xp: Any, *arrays: Any) -> Any:
    """Returns the dtype to compute in: float64, or float32 where jax has not been given more."""
    kinds = {x.dtype.kind for x in arrays}
    if xp is np:
        return np.result_type(np.float64, *(x.dtype for x in arrays if x.dtype.kind in "fc"))
    long = any(x.dtype in (np.float64, np.complex128, np.int64, np.uint64) for x in arrays)
    if "c" in kinds:
        return np.dtype(np.complex128 if long else np.complex64)
    return np.dtype(np.float64 if long else np.float32)


def _of_arrays(x: np.ndarray, y: np.ndarray, rtol: float, atol: float) -> Distance | None:
    """Compares two numpy arrays, a block at a time."""
    x, y = x.reshape(-1), y.reshape(-1)
    blocks = [slice(i, i + BLOCK) for i in range(0, x.size, BLOCK)]
    if x.dtype == y.dtype and not any((x[block] != y[block]).any() for block in blocks):
        return None
    differing, tops, apart, size = 0, [], 0.0, 0.0
    with np.errstate(all="ignore"):
        for block in blocks:
            far, off, beyond, sizes = _parts(np, x[block], y[block], rtol, atol)
            differing += int(np.count_nonzero(beyond))
            tops.append(far.max())
            apart = math.hypot(apart, _norm(*_scaled(np, off)))
            size = math.hypot(size, _norm(*_scaled(np, sizes)))
        return _distance(differing, x.size, np.max(tops), apart, size) if differing else None


@jax.jit
def _on_device(x: Any, y: Any, rtol: Any, atol: Any) -> tuple[Any, ...]:
    """Compares two arrays of jax, where they are."""
    far, off, beyond, sizes = _parts(jnp, x, y, rtol, atol)
    # More than an int32 can count are counted nearly.
    count = jnp.sum(beyond, dtype=jnp.int32 if x.size < 2**31 else jnp.float32)
    return count, jnp.max(far, initial=0), _scaled(jnp, off), _scaled(jnp, sizes)


def _fetched(size: int, found: tuple[Any, ...]) -> Distance | None:
    differing, top, apart, of = jax.device_get(found)
    return _distance(int(differing), size, top, _norm(*apart), _norm(*of)) if differing else None


def _scaled(xp: Any, values: Any) -> tuple[Any, Any]:
    """Returns the largest value, and the sum of squares in terms of it, which does not overflow."""
    top = xp.max(values, initial=0)
    unit = xp.where((top > 0) & xp.isfinite(top), top, 1)
    return top, xp.sum((values / unit) ** 2)


def _norm(top: Any, squares: Any) -> float:
    return float(top) * math.sqrt(float(squares)) if math.isfinite(top) else float(top)


def _distance(differing: int, of: int, top: Any, apart: float, size: float) -> Distance:
    largest = int(top) if top.dtype.kind == "u" else float(top)
    relative = math.nan if math.isnan(largest) else apart / size if size else math.inf
    return Distance(differing, of, largest, relative)


# Everything else


def _of_others(one: Any, other: Any) -> Distance | None:
    """Compares what is not made of numbers: keys, strings, dates, and any object."""
    dtype = dtype_of(one)
    if dtype is None:
        return None if _same(one, other) else Distance(1, 1, None, None)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        words = [np.asarray(jax.random.key_data(leaf)) for leaf in (one, other)]
        unequal = np.any(words[0] != words[1], axis=-1)
    elif dtype == jax.dtypes.float0:
        return None  # all of them are zero
    else:
        x, y = np.asarray(one), np.asarray(other)
        if x.dtype == object:  # anything: also arrays, of which numpy would ask whether they are true
            pairs = zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)
            unequal = np.array([not _same(*pair) for pair in pairs])
        else:
            unequal = np.asarray((x != y) & ~((x != x) & (y != y)))  # what is not a time is not itself
    count = int(np.count_nonzero(unequal))
    return Distance(count, unequal.size, None, None) if count else None


def _same(one: Any, other: Any) -> bool:
    try:
        if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
            return np.array_equal(one, other)
        return one is other or bool(one == other) or bool(one != one and other != other)
    except Exception:  # a leaf may be any object, and what cannot be compared is not known to be equal
        return False
