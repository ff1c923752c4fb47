"""Where the arrays of a file end up: as jax arrays on devices, or as numpy arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.io.wire import is_key

__all__ = ["Placing"]


class Placing:
    """Takes the leaves of a tree one by one, and puts them on their devices all at once."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._to: dict[Any, list[int]] = {}  # the shardings, and None for the default device
        self._default = jnp.zeros(()).sharding

    def keep(self, leaf: Any) -> None:
        """Takes a leaf that stays as it is."""
        self._leaves.append(leaf)

    def add(self, value: Any, like: Any = None, copy: bool = False) -> None:
        """Takes an array that is to be like another leaf, or a jax array if jax can hold it.

        Args:
          value: a numpy array; or a jax array, which is where it belongs.
          like: an array, a shape with a dtype and perhaps a sharding, or a number.
          copy: whether somebody else may have the same memory, as a function that returned it.
        """
        dtype = getattr(like, "dtype", None)
        if not is_key(value) and dtype is not None and value.dtype != dtype:
            value, copy = _cast(value, dtype), False
        if copy:
            value = value.copy()
        if isinstance(like, bool | int | float | complex):
            value = type(like)(value.item())
        elif isinstance(like, np.generic):
            value = np.asarray(value)[()]
        elif isinstance(like, np.ndarray):
            value = np.asarray(value)
        elif isinstance(value, np.ndarray) and _holds(value.dtype):
            sharding = getattr(like, "sharding", None)
            to = None if sharding == self._default else sharding
            self._to.setdefault(to, []).append(len(self._leaves))
        self._leaves.append(value)

    def done(self) -> tuple[Any, ...]:
        """Returns the leaves, on their devices."""
        for sharding, places in self._to.items():
            # One call for all, and on a CPU no copy: jax takes over memory that is aligned.
            values = jax.device_put([self._leaves[i] for i in places], sharding)
            for i, value in zip(places, values, strict=True):
                self._leaves[i] = value
        return tuple(self._leaves)


def _holds(dtype: Any) -> bool:
    return _tried(dtype, jax.dtypes.canonicalize_dtype(np.int64) == np.int64)


@functools.cache
def _tried(dtype: Any, x64: bool) -> bool:
    try:
        return bool(jax.device_put(np.zeros((), dtype)).dtype == dtype)
    except Exception:  # jax raises several types for what it does not know
        return False


def _cast(value: Any, dtype: Any) -> Any:
    with np.errstate(all="ignore"):  # what is too large for the dtype becomes infinite
        try:
            return value.astype(dtype)
        except TypeError:  # two small floats may not know each other, and both are exact in float32
            return value.astype(np.float32).astype(dtype)
