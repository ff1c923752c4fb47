"""Where the arrays of a file end up: as jax arrays on devices, or as numpy arrays."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.io.wire import is_key
from paramtree.sharding.shardings import scatter

__all__ = ["Placing", "divides"]


class Placing:
    """Takes the leaves of a tree one by one, and puts them on their devices all at once."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._to: dict[Any, list[int]] = {}  # the shardings, and None for the default device
        self._default = jnp.zeros(()).sharding

    def keep(self, leaf: Any) -> None:
        """Takes a leaf that stays as it is."""
        self._leaves.append(leaf)

    def add(self, value: Any, like: Any = None, place: Any = None, copy: bool = False) -> None:
        """Takes an array that is to be like another leaf, or a jax array if jax can hold it.

        Args:
          value: a numpy array; or a jax array, which is where it belongs.
          like: an array, a shape with a dtype, or a number.
          place: a sharding; None for a numpy array if ``like`` is one, or else the default device.
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
        elif isinstance(like, np.ndarray) and place is None:
            value = np.asarray(value)
        elif isinstance(value, np.ndarray) and _holds(value.dtype):
            if divides(place):
                value = scatter(value, place)  # at once, for its memory
            else:
                to = None if place == self._default else place
                self._to.setdefault(to, []).append(len(self._leaves))
        self._leaves.append(value)

    def add_parts(
        self, read: Callable[[tuple[slice, ...]], Any], shape: Any, dtype: Any, place: Any
    ) -> None:
        """Takes an array that is read part by part, each once, and only those of this process.

        Args:
          read: returns a part, given a slice for each dimension.
          shape: that of the array.
          dtype: what to cast it to.
          place: its sharding.
        """

        @functools.cache
        def read_once(bounds: tuple[tuple[int | None, int | None], ...]) -> Any:
            return _in_dtype(read(tuple(itertools.starmap(slice, bounds))), dtype)

        def part(index: Any) -> Any:  # a slice has no hash before Python 3.12
            return read_once(tuple((one.start, one.stop) for one in index))

        self._leaves.append(jax.make_array_from_callback(shape, place, part))

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


def divides(place: Any, dtype: Any = np.float32) -> bool:
    """Whether arrays of a dtype can go to a sharding, and it is over several devices."""
    return place is not None and len(place.device_set) > 1 and _holds(dtype)


def _in_dtype(value: Any, dtype: Any) -> Any:
    return value if value.dtype == dtype else _cast(value, dtype)


def _cast(value: Any, dtype: Any) -> Any:
    with np.errstate(all="ignore"):  # what is too large for the dtype becomes infinite
        try:
            return value.astype(dtype)
        except TypeError:  # two small floats may not know each other, and both are exact in float32
            return value.astype(np.float32).astype(dtype)
