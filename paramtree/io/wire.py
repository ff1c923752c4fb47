"""Encoding leaves as arrays that a format can write, and decoding them.

An array of a dtype that the format lacks is written as bytes, with one more axis and a tag that names
the dtype. So every format that can hold the tag keeps every dtype.
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
    "NUMBERS", "check_savable", "decode", "dtype_name", "encode", "is_key", "logical", "to_dtype",
    "to_host",
]  # fmt: skip

# The names to accept: np.dtype itself accepts many other strings.
NUMBERS = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_KEY = "key:"  # prefix of the name of a PRNG implementation


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    dtype = dtype_of(leaf)
    known = dtype is None or isinstance(dtype, np.dtype)
    return not known and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def check_savable(leaf: Any) -> str:
    """Returns why a leaf cannot be saved, or an empty string."""
    if isinstance(leaf, jax.core.Tracer):
        return "is being traced: save outside of jit and grad"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "is a shape without values: initialize or load it first"
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return ""
    if not isinstance(leaf, jax.Array | np.ndarray):
        return f"is a {type(leaf).__name__}, not an array: leave it out with pt.select, or convert it"
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return "has been donated: save it before the step, or save what the step returned"
    if not is_key(leaf) and leaf.dtype.kind in "OSUMm":
        return f"has dtype {leaf.dtype}: only numbers and booleans can be saved"
    return ""


def to_host(leaf: Any) -> np.ndarray:
    """Returns a leaf as a contiguous little-endian numpy array, copied only if necessary."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        raise ParamTreeError(
            "an array is sharded over several processes, but this format is written by one: save to a "
            "path that ends in .orbax, which all processes write together"
        )
    array = np.asarray(leaf, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def encode(leaf: Any, native: Container[str]) -> tuple[Any, str]:
    """Returns the array to write for a leaf, and a tag for a dtype that is not in ``native``."""
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
    return (np.asarray(leaf).dtype if dtype is None else np.dtype(dtype)).name


def logical(shape: tuple[int, ...], dtype: Any, tag: str) -> tuple[tuple[int, ...], Any]:
    """Returns the shape and dtype of the leaf that an array encodes.

    Raises:
      ValueError: the tag does not fit the array.
    """
    if not tag:
        return shape, dtype
    if tag.startswith(_KEY):
        try:
            wrap = functools.partial(jax.random.wrap_key_data, impl=tag[len(_KEY) :])
            key = jax.eval_shape(wrap, jax.ShapeDtypeStruct(shape, dtype))
        except Exception:  # the tag may be anything, and jax raises many types
            raise ValueError(f"{dtype} of shape {shape} is not PRNG key data of {tag!r}") from None
        return key.shape, key.dtype
    decoded = to_dtype(tag)
    if dtype != np.uint8 or shape[-1:] != (decoded.itemsize,):
        raise ValueError(f"{dtype} of shape {shape} does not encode {tag}")
    return shape[:-1], decoded


def decode(array: Any, tag: str) -> Any:
    """Returns the leaf that an array encodes; see ``logical``."""
    if not tag:
        return array
    if tag.startswith(_KEY):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=tag[len(_KEY) :])
    shape, dtype = logical(array.shape, array.dtype, tag)
    flat = np.asarray(array).reshape(-1)
    return (flat != 0 if dtype == np.bool_ else flat.view(dtype)).reshape(shape)


@functools.cache
def to_dtype(name: str) -> np.dtype[Any]:
    """Returns the numeric dtype of a name, numpy's or one of ml_dtypes' small floats and integers.

    Raises:
      ValueError: there is no such numeric dtype.
    """
    small = getattr(ml_dtypes, name, None)
    if name in NUMBERS or (isinstance(small, type) and issubclass(small, np.generic)):
        return np.dtype(name if name in NUMBERS else small)
    raise ValueError(f"there is no numeric dtype {name!r}")
