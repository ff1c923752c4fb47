"""The shape and dtype of any object that may be a leaf, and how messages print text."""

from collections.abc import Sequence
from typing import Any

__all__ = ["clip", "describe", "dtype_of", "join", "printable", "shape_of", "short"]


def join(path: Sequence[str], sep: str = "_") -> str:
    """Returns the name of a path: ``dense0_weight`` for ``("dense0", "weight")``."""
    return sep.join(path)


def shape_of(leaf: Any) -> tuple[int, ...] | None:
    """Returns the shape of an array, tracer, number or anything with a shape; else None."""
    shape = getattr(leaf, "shape", None)
    if isinstance(shape, tuple):
        return shape if type(shape) is tuple else tuple(shape)
    return () if isinstance(leaf, bool | int | float | complex) else None


def dtype_of(leaf: Any) -> Any:
    """Returns the dtype of anything that has a dtype and a shape; else None."""
    return getattr(leaf, "dtype", None) if shape_of(leaf) is not None else None


def describe(leaf: Any) -> str:
    """Returns a one-line description of a leaf, which may be any object."""
    shape, dtype = shape_of(leaf), dtype_of(leaf)
    if shape is not None and dtype is not None:
        return f"shape={shape}, dtype={dtype}"
    try:
        text = " ".join(repr(leaf).split())
    except Exception:  # printing a tree must not fail because one leaf cannot be printed
        text = type(leaf).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    r"""Returns the text with control characters escaped: names in files are untrusted.

    Example:
      >>> printable("red\x1b[31m")
      'red\\x1b[31m'
    """
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if text.isprintable() else "".join(escaped)


def clip(text: str, most: int) -> str:
    """Returns a text; a long one is cut and followed by its length.

    Example:
      >>> clip("weight", 20), clip("w" * 1000, 20)
      ('weight', 'wwwwwwww... (1000 characters)')
    """
    return text if len(text) <= most else f"{text[: most - 12]}... ({len(text)} characters)"


def short(name: str, most: int = 100) -> str:
    r"""Returns a name as messages show it: clipped, with control characters escaped.

    Example:
      >>> short("red\x1b[31m"), short("w" * 1000, 20)
      ('red\\x1b[31m', 'wwwwwwww... (1000 characters)')
    """
    return name if len(name) <= most and name.isprintable() else printable(clip(name, most))
