"""What is asked of one leaf, which may be anything: its name, shape, dtype, and how to print it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "absent",
    "casts",
    "clip",
    "describe",
    "dtype_of",
    "join",
    "printable",
    "shape_of",
    "short",
]


def join(path: Sequence[str], sep: str = "_") -> str:
    """Returns the name of a path: its segments joined.

    Example:
      >>> join(("dense0", "weight"))
      'dense0_weight'
    """
    return sep.join(path)


def shape_of(leaf: Any) -> tuple[int, ...] | None:
    """Returns the shape of an array, tracer, number or anything with a shape; else None."""
    if isinstance(leaf, bool | int | float | complex):
        return ()
    shape = getattr(leaf, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) else None


def dtype_of(leaf: Any) -> Any:
    """Returns the dtype of anything that has one and a shape; else None."""
    return getattr(leaf, "dtype", None) if shape_of(leaf) is not None else None


def describe(leaf: Any) -> str:
    """Returns what to print of a leaf, on one line; it may be any object."""
    shape, dtype = shape_of(leaf), dtype_of(leaf)
    if shape is not None and dtype is not None:
        return f"shape={shape}, dtype={dtype}"
    try:
        text = " ".join(repr(leaf).split())
    except Exception:  # a leaf may be any object, and printing a tree must not fail on one
        text = type(leaf).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    r"""Returns a text with control characters spelled out: names in files are untrusted.

    Example:
      >>> printable("red\x1b[31m")
      'red\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def clip(text: str, most: int) -> str:
    """Returns a text, or the beginning of a long one and how long it is.

    Example:
      >>> clip("weight", 20), clip("w" * 1000, 20)
      ('weight', 'wwwwwwww... (1000 characters)')
    """
    return text if len(text) <= most else f"{text[: most - 12]}... ({len(text)} characters)"


def short(name: str, most: int = 100) -> str:
    r"""Returns a name as it is fit to be shown: not too long, and control characters spelled out.

    Example:
      >>> short("red\x1b[31m"), short("w" * 1000, 20)
      ('red\\x1b[31m', 'wwwwwwww... (1000 characters)')
    """
    return printable(clip(name, most))


def absent(leaf: Any) -> str:
    """Returns why the values of a leaf cannot be had, or nothing if they can, if only while tracing.

    Example:
      >>> absent(jax.ShapeDtypeStruct((2,), "float32")), absent(jnp.ones(2))
      ('is only a shape', '')
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "is only a shape"
    traced = isinstance(leaf, jax.core.Tracer)
    gone = not traced and isinstance(leaf, jax.Array) and leaf.is_deleted()
    return "was donated to a jitted function, or deleted" if gone else ""


def casts(found: Any, wanted: Any) -> bool:
    """Whether numbers of one dtype are meant when another is wanted: whole ones as any, never back.

    Example:
      >>> casts("float64", "bfloat16"), casts("int32", "float32"), casts("float32", "int32")
      (True, True, False)
    """
    if any(jnp.issubdtype(dtype, jax.dtypes.extended) for dtype in (found, wanted)):
        return False  # PRNG keys are no numbers
    found, wanted = jnp.dtype(found), jnp.dtype(wanted)
    if jnp.issubdtype(found, jnp.complexfloating):
        return bool(jnp.issubdtype(wanted, jnp.complexfloating))
    if jnp.issubdtype(found, jnp.inexact):
        return bool(jnp.issubdtype(wanted, jnp.inexact))
    whole = jnp.issubdtype(found, jnp.integer) or found == jnp.bool_
    return bool(whole and (jnp.issubdtype(wanted, jnp.number) or wanted == jnp.bool_))
