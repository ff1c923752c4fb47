"""Turning the arrays of a file into leaves: jax arrays on their devices, or numpy arrays."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.io.source import Slices
from paramtree.io.wire import is_key
from paramtree.sharding.place import scatter

__all__ = ["LossyCastError", "Placing", "divides"]


class LossyCastError(Exception):
    """Values do not fit another dtype; the message says which."""


class Placing:
    """Collects the leaves of a tree one by one, and transfers them to their devices together."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._pending: dict[Any, list[int]] = {}  # leaves by sharding, None for the default device
        self._default = jnp.zeros(()).sharding

    def keep(self, leaf: Any) -> None:
        """Adds a leaf unchanged."""
        self._leaves.append(leaf)

    def add(self, value: Any, like: Any = None, sharding: Any = None, copy: bool = False) -> None:
        """Adds an array, with the type and dtype of ``like``; without it as a jax array if possible.

        Without a sharding it goes to the default device, or stays on the host if ``like`` is a numpy
        array. ``copy`` is for memory that may be shared, for example by a user's function.

        Raises:
          LossyCastError: a value does not fit the dtype.
        """
        dtype = getattr(like, "dtype", None)
        if is_key(value) and sharding is not None:
            value = jax.device_put(value, sharding)
        elif not is_key(value) and dtype is not None and value.dtype != dtype:
            value, copy = _cast(value, dtype), False
        if copy:
            value = value.copy()
        if isinstance(like, bool | int | float | complex):
            number = value.item()
            value = type(like)(number)
            if value != number and number == number:
                raise LossyCastError(f"is {number}, which a {type(like).__name__} cannot hold")
        elif isinstance(like, np.generic):
            value = np.asarray(value)[()]
        elif isinstance(like, np.ndarray) and sharding is None:
            value = np.asarray(value)
        elif isinstance(value, np.ndarray) and _holds(value.dtype):
            if divides(sharding):
                value = scatter(value, sharding)  # now, to free the host memory
            else:
                key = None if sharding == self._default else sharding
                self._pending.setdefault(key, []).append(len(self._leaves))
        self._leaves.append(value)

    def add_sharded(self, read: Callable[[Slices], Any], shape: Any, dtype: Any, sharding: Any) -> None:
        """Adds an array, cast to the dtype, by reading each slice that this process holds, once.

        Raises:
          LossyCastError: a value does not fit the dtype.
        """

        @functools.cache
        def read_once(bounds: tuple[tuple[int | None, int | None], ...]) -> Any:
            return _cast(read(tuple(itertools.starmap(slice, bounds))), dtype)

        def callback(index: Any) -> Any:  # slices are not hashable before Python 3.12
            return read_once(tuple((dim.start, dim.stop) for dim in index))

        self._leaves.append(jax.make_array_from_callback(shape, sharding, callback))

    def done(self) -> tuple[Any, ...]:
        """Returns the leaves, on their devices."""
        for sharding, indices in self._pending.items():
            # One call for all; on a CPU jax takes over aligned memory without a copy.
            values = jax.device_put([self._leaves[i] for i in indices], sharding)
            for i, value in zip(indices, values, strict=True):
                self._leaves[i] = value
        return tuple(self._leaves)


def _holds(dtype: Any) -> bool:  # whether a jax array can have the dtype
    return _holds_if(dtype, jax.dtypes.canonicalize_dtype(np.int64) == np.int64)


@functools.cache
def _holds_if(dtype: Any, x64: bool) -> bool:
    try:
        return bool(jax.device_put(np.zeros((), dtype)).dtype == dtype)
    except Exception:  # jax raises several types for unsupported dtypes
        return False


def divides(sharding: Any, dtype: Any = np.float32) -> bool:
    """Whether a sharding spans several devices and jax can hold the dtype."""
    return sharding is not None and len(sharding.device_set) > 1 and _holds(dtype)


def _cast(value: Any, dtype: Any) -> Any:
    """Returns an array in another dtype.

    Raises:
      LossyCastError: an integer is out of its range, or a finite number would be infinite.
    """
    value, dtype = np.asarray(value), np.dtype(dtype)
    with np.errstate(all="ignore"):  # overflow gives infinity, which is found below
        try:
            cast = value.astype(dtype, copy=False)
        except TypeError:  # some pairs of small floats have no cast, but float32 holds both exactly
            cast = value.astype(np.float32).astype(dtype)
    if cast is value or not value.size:
        return cast
    if _is_integer(value.dtype) and _is_integer(dtype):
        wide = value.dtype if value.dtype.kind in "iub" else np.dtype(np.int32)
        lost = (cast.astype(wide) != value.astype(wide)) | ((cast.astype(wide) < 0) != (value < 0))
    elif np.can_cast(value.dtype, dtype, "safe"):
        return cast
    else:
        before, after = _measurable(value), _measurable(cast)
        lost = (np.isfinite(before) & ~np.isfinite(after)) | (np.isnan(before) != np.isnan(after))
        most = _largest(dtype)
        lost |= (np.abs(before) > most) if most is not None else np.isinf(before) & ~np.isinf(after)
    if count := int(np.count_nonzero(lost)):
        worst = value.reshape(-1)[np.flatnonzero(lost)[0]]
        raise LossyCastError(
            f"has {count:,} of {value.size:,} values that {dtype} cannot hold, such as {worst}"
        )
    return cast


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iub" or jnp.issubdtype(dtype, jnp.integer)


def _measurable(value: Any) -> Any:
    """Returns an array as one that numpy can compare; a float of eight bits fits into one of 32."""
    return value if value.dtype.kind in "fciub" else value.astype(np.float32)


def _largest(dtype: np.dtype[Any]) -> float | None:
    """Returns the largest number of a dtype that has no infinity, and saturates; else None."""
    if dtype.kind in "fciub" or _is_integer(dtype):
        return None
    if np.isfinite(np.asarray(np.inf, np.float32).astype(dtype).astype(np.float32)):
        return float(jnp.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return None
