"""The errors that paramtree raises.

Each is also the built-in type that a user would catch, so ``hasattr`` works on a tree and ``except
KeyError`` catches a missing name. Every message names the parameter and what to do about it.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "ImmutableError", "LoadError", "MismatchError", "MissingError", "NameCollisionError",
    "ParamTreeError", "RuleError", "ScopeError", "close_names", "first_few", "suggest",
]  # fmt: skip


class ParamTreeError(Exception):
    """The base of every error raised by paramtree.

    >>> import paramtree as pt
    >>> pt.from_tree({"a": 1.0})["b"]
    Traceback (most recent call last):
    paramtree.core.errors.MissingError: `b` is not in the tree, which has: a.
    """

    def __str__(self) -> str:
        # KeyError would show the repr of the message, with its newlines escaped.
        return str(self.args[0]) if self.args else ""


class NameCollisionError(ParamTreeError, ValueError):
    """Two paths share one name: ``a_b`` then ``c``, and ``a`` then ``b_c``."""


class RuleError(ParamTreeError, KeyError, ValueError):
    """A name, pattern or rule table that does not fit the tree."""


class MismatchError(ParamTreeError, ValueError):
    """A leaf whose shape, dtype or kind is not the expected one."""


class MissingError(MismatchError, KeyError, IndexError, AttributeError):
    """A child or leaf that the tree does not have, read by attribute, item, path or position."""


class ScopeError(ParamTreeError, RuntimeError):
    """A layer writes state or draws a key where that cannot be, or would be repeated or lost."""


class ImmutableError(ParamTreeError, TypeError, AttributeError):
    """An assignment to a tree, or a deletion from one."""


class LoadError(ParamTreeError, ValueError):
    """A file that cannot be read, or that does not fit the tree it is loaded into."""


def first_few(found: Sequence[object], sep: str = "; ", show: Callable[..., str] = str) -> str:
    """Returns the first twenty problems as text, and how many more there are."""
    more = [f"and {len(found) - 20:,} more"] if len(found) > 20 else []
    return sep.join([*map(show, found[:20]), *more])


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Returns `` Did you mean `x`?`` for the names closest to ``wrong``, or an empty string."""
    close = close_names(wrong, list(known))
    return f" Did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""


def close_names(wrong: str, known: Sequence[str]) -> list[str]:
    """Returns up to three of the names in ``known`` that resemble ``wrong``, best first."""
    if len(known) > 2000:  # difflib takes 30 µs a name, and a message must not take seconds
        known = [name for name in known if abs(len(name) - len(wrong)) <= 2][:2000]
    return difflib.get_close_matches(wrong, known)
