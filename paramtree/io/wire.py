"""Leaves as arrays that a format can write, and back.

A format has the dtypes that it has. Any other is written as bytes, with one more axis, beside the
name of its dtype; so every dtype comes back as it went, in every format that has a place for that
name.
"""

import functools
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from paramtree.core.arrays import dtype_of
from paramtree.core.errors import ParamTreeError

__all__ = [
    "NUMBERS",
    "check_savable",
    "decode",
    "dtype_name",
    "encode",
    "is_key",
    "logical",
    "to_dtype",
    "to_host",
]

# Those of numpy, whose own look-up of names takes much else.
NUMBERS = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_KEY = "key:"  # before the name of a PRNG implementation


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys, typed ones, which are no numbers."""
    dtype = dtype_of(leaf)
    if dtype is None or isinstance(dtype, np.dtype):
        return False
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def check_savable(leaf: Any) -> str:
    """Returns what is wrong with a leaf that is to be saved, or nothing."""
    if isinstance(leaf, jax.core.Tracer):
        return "is being traced: save outside of jit and grad"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "is a shape without values: initialise or load it first"
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return ""
    if not isinstance(leaf, jax.Array | np.ndarray):
        return f"is a {type(leaf).__name__}, no array: take it out with pt.select, or convert it"
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return "has been donated: save it before, or save what the step returned"
    if not is_key(leaf) and leaf.dtype.kind in "OSUMm":
        return f"has dtype {leaf.dtype}, and only numbers and booleans are saved"
    return ""


def to_host(leaf: Any) -> np.ndarray:
    """Returns a leaf as a numpy array, contiguous and little-endian; a copy only where it must be."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        raise ParamTreeError(
            "is spread over several processes, and one file is written by one: save to a path that "
            "ends in .orbax, which all processes write together"
        )
    array = np.asarray(leaf, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def encode(leaf: Any, native: Container[str]) -> tuple[Any, str]:
    """Returns what to write for a leaf, and the name of its dtype if that tells more than the array."""
    if is_key(leaf):
        return jax.random.key_data(leaf), f"{_KEY}{jax.random.key_impl(leaf)}"
    name = dtype_name(leaf)
    if name in native:
        return leaf, ""
    array = to_host(leaf)
    as_bytes = np.frombuffer(array.tobytes(), np.uint8)
    return as_bytes.reshape(*array.shape, array.dtype.itemsize), name


def dtype_name(leaf: Any) -> str:
    """Returns the name of the dtype of an array or a number."""
    dtype = getattr(leaf, "dtype", None)
    return _name_of(np.asarray(leaf).dtype if dtype is None else np.dtype(dtype))


@functools.cache
def _name_of(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which numpy puts together anew each time


def logical(shape: tuple[int, ...], dtype: Any, tag: str) -> tuple[tuple[int, ...], Any]:
    """Returns the shape and dtype of the leaf that an array was written for.

    Raises:
      ValueError: no leaf is written as such an array.
    """
    if not tag:
        return shape, dtype
    if tag.startswith(_KEY):
        data = jax.ShapeDtypeStruct(shape, dtype)
        try:
            key = jax.eval_shape(
                lambda bits: jax.random.wrap_key_data(bits, impl=tag[len(_KEY) :]), data
            )
        except Exception:  # jax raises what it likes, and the tag may be anything
            raise ValueError(f"these are no PRNG keys of {tag!r}") from None
        return key.shape, key.dtype
    meant = to_dtype(tag)
    if dtype != np.uint8 or shape[-1:] != (meant.itemsize,):
        raise ValueError(f"{dtype} of shape {shape} holds no {tag}")
    return shape[:-1], meant


def decode(array: Any, tag: str) -> Any:
    """Returns the leaf that an array was written for; see ``logical``."""
    if not tag:
        return array
    if tag.startswith(_KEY):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=tag[len(_KEY) :])
    shape, dtype = logical(array.shape, array.dtype, tag)
    flat = np.asarray(array).reshape(-1)
    return (flat != 0 if dtype == np.bool_ else flat.view(dtype)).reshape(shape)


@functools.cache
def to_dtype(name: str) -> np.dtype[Any]:
    """Returns the dtype of a name, numpy's or one of the small floats and integers that jax has.

    Raises:
      ValueError: there is none of that name, or it is not one of numbers.
    """
    found = getattr(ml_dtypes, name, None)
    if name in NUMBERS or (isinstance(found, type) and issubclass(found, np.generic)):
        return np.dtype(name if name in NUMBERS else found)
    raise ValueError(f"there is no dtype of numbers {name!r}")
