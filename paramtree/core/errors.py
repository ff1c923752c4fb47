"""The errors this library raises.

Each is also the built-in type that a user would catch, so code that knows nothing of paramtree
still does the right thing: ``hasattr`` works on a tree, ``except KeyError`` catches a missing name.
Every message names the parameter, says what was expected and what was found, and what to do.
"""

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ImmutableError",
    "LoadError",
    "MismatchError",
    "MissingError",
    "NameCollisionError",
    "ParamTreeError",
    "RuleError",
    "ScopeError",
    "suggest",
]


class ParamTreeError(Exception):
    """The base of every error raised by paramtree.

    >>> import paramtree as pt
    >>> try:
    ...     pt.from_tree({"a": 1.0})["b"]
    ... except pt.ParamTreeError as error:
    ...     print(error)
    `b` is not in the tree, which has: a.
    """

    def __str__(self) -> str:
        # KeyError would show the repr of the message, with its newlines escaped.
        return str(self.args[0]) if self.args else ""


class NameCollisionError(ParamTreeError, ValueError):
    """Two paths lead to one name: ``a_b`` then ``c``, and ``a`` then ``b_c``."""


class RuleError(ParamTreeError, KeyError, ValueError):
    """A name, pattern or rule table that does not fit the tree."""


class MismatchError(ParamTreeError, ValueError):
    """A leaf whose shape, dtype or kind is not the expected one."""


class MissingError(MismatchError, KeyError, IndexError, AttributeError):
    """A child or leaf that is not in the tree, asked for by attribute, item, path or position."""


class ScopeError(ParamTreeError, RuntimeError):
    """A layer that writes state or draws a key where its scope has no way to."""


class ImmutableError(ParamTreeError, TypeError, AttributeError):
    """An assignment to a tree, or a deletion from one."""


class LoadError(ParamTreeError, ValueError):
    """A file that cannot be read, or does not fit the tree it is read into."""


def suggest(wrong: str, known: Iterable[str], limit: int = 3) -> str:
    """Returns `` Did you mean `x`?`` for the names closest to ``wrong``, or nothing.

    Example:
      >>> suggest("wieght", ["weight", "bias"])
      ' Did you mean `weight`?'
    """
    close = close_names(wrong, list(known), limit)
    return f" Did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""


def close_names(wrong: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """Returns up to ``limit`` of the names in ``known`` that look like ``wrong``, best first."""
    # difflib costs tens of microseconds a name: on a very large tree only the names of about the
    # same length are worth it, and an error message must not take seconds.
    if len(known) > 2000:
        known = [name for name in known if abs(len(name) - len(wrong)) <= 2][:2000]
    return difflib.get_close_matches(wrong, known, limit, 0.6)
