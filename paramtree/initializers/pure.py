"""Checks that an initializer is pure: what it computes depends on its arguments alone."""

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import join
from paramtree.core.structure import Path
from paramtree.initializers.spec import Spec

__all__ = ["check_pure"]


def check_pure(paths: Sequence[Path], specs: Sequence[Spec], key: jax.Array) -> None:
    """Raises ValueError if an initializer of a user gives other values in a second call with one key.

    Each is checked once, for the first leaf that it computes: it is traced twice, not run, and the
    computations and constants must be equal. Random numbers of numpy are such constants.
    """
    shaped = jax.ShapeDtypeStruct(key.shape, key.dtype)
    seen: set[int] = set()
    for path, spec in zip(paths, specs, strict=True):
        initializer = spec.initializer
        if id(initializer) in seen:
            continue
        seen.add(id(initializer))
        function = _unwrapped(initializer)
        if _is_known(function) or not _is_new(initializer):
            continue
        try:
            one, two = (_trace(function, spec, shaped) for _ in range(2))
        except Exception:  # the call itself raises it, or it cannot be traced
            continue
        if one[0] != two[0] or not all(map(_same, one[1], two[1])):
            raise ValueError(
                f"the initializer of `{join(path)}`, {initializer!r}, gives other values in a second "
                "call with the same key. Leaves of one initializer, shape and dtype share a compiled "
                "function, so that they would be equal: draw from the key, as in "
                "jax.random.normal(key, shape, dtype), not from numpy.random or random."
            )
        if mark := _marks(initializer):
            mark.clear()


def _unwrapped(initializer: Any) -> Any:
    """Returns the function in a ``jax.jit``, which would return its first trace again."""
    return inspect.unwrap(initializer) if hasattr(initializer, "__wrapped__") else initializer


def _is_known(initializer: Any) -> bool:
    """Whether it is from this library or from jax."""
    while isinstance(initializer, functools.partial):
        initializer = initializer.func
    owner = initializer if inspect.isfunction(initializer) else type(initializer)
    return str(owner.__module__).split(".")[0] in ("jax", "paramtree")


def _trace(function: Any, spec: Spec, key: Any) -> tuple[str, list[Any]]:
    """Returns the computation as text, without addresses, and its constants."""
    closed = jax.make_jaxpr(lambda key: function(key, spec.shape, spec.dtype))(key)
    return re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr)), closed.consts


def _same(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _is_new(initializer: Any) -> bool:
    mark = _marks(initializer)
    return mark is None or bool(mark)


def _marks(initializer: Any) -> list[None] | None:
    """Returns a list that is emptied once the initializer is checked; None where it has no hash."""
    try:
        return _mark(initializer)
    except TypeError:
        return None


@functools.lru_cache(maxsize=1024)
def _mark(initializer: Any) -> list[None]:
    return [None]
