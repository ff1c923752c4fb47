"""Calling a layer: it takes any form of a scope, and tells the run of that scope."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from paramtree.core.errors import suggest
from paramtree.core.tree import ParamTree
from paramtree.model.run import INFERENCE, Run
from paramtree.model.scope import NOTHING, not_a_child, run_of, scope_of

__all__ = ["called", "dealt", "keywords_of"]

F = TypeVar("F", bound=Callable[..., Any])


def called(method: F) -> F:
    """Returns a layer's ``__call__`` that takes any form of a scope, and tells its run of the call."""
    if getattr(method, "_tells_run", False):
        return method

    @functools.wraps(method)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not args:  # the scope was given by name
            named = (name for name, v in kwargs.items() if _is_scope(v))
            name = next(named, "p" if "p" in kwargs else None)
            if name is None:
                return method(self, **kwargs)
            args = (kwargs.pop(name),)
        scope, *rest = args
        if type(scope) is ParamTree:  # the usual case, which must cost nothing
            return method(self, *args, **kwargs)
        scope = _as_scope(scope)
        return run_of(scope).call(self, scope, method, rest, kwargs)

    call._tells_run = True  # type: ignore[attr-defined]  # so that it is not wrapped twice
    return call  # type: ignore[return-value]  # it has the same signature


def _is_scope(value: Any) -> bool:
    return isinstance(value, ParamTree) or hasattr(value, "__scope__")


def keywords_of(*models: Any) -> frozenset[str] | None:
    """Returns the names of the arguments that layers or models take besides p and x; None for any."""
    found = [_keywords(model) for model in models]
    return None if None in found else frozenset[str]().union(*found)


def _keywords(model: Any) -> Any:
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):  # written in C
        return None
    first = [q for q in parameters if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)][:2]
    named = [q for q in parameters if q.kind in (q.POSITIONAL_OR_KEYWORD, q.KEYWORD_ONLY)]
    own = frozenset(q.name for q in named if q not in first)
    if not any(q.kind is q.VAR_KEYWORD for q in parameters):
        return own
    inner = model._inner_keywords() if hasattr(model, "_inner_keywords") else None
    return None if inner is None else own | inner


def dealt(owner: Any, models: Sequence[Any], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns, for each layer that another is made of, those of the keyword arguments that it takes.

    Raises:
      TypeError: none takes one of them.
    """
    if not kwargs:
        return [kwargs] * len(models)
    taken = [keywords_of(model) for model in models]
    for name in kwargs:
        if not any(names is None or name in names for names in taken):
            known = sorted(frozenset[str]().union(*(names for names in taken if names)))
            raise TypeError(
                f"{type(owner).__name__}: no layer in it takes the keyword argument {name!r}."
                f"{suggest(name, known)} They take {', '.join(known) or 'none'}."
            )
    return [
        {name: value for name, value in kwargs.items() if names is None or name in names}
        for names in taken
    ]


class _Without(Run):
    """The run of a layer that is called with an empty dict."""

    def declare(self, *_: Any) -> Any:
        raise _no_scope({})


def _as_scope(value: Any) -> Any:
    """Returns the first argument of a layer as a scope.

    Raises:
      ParamTreeError: it is a method of a scope that a child has the name of.
      TypeError: it is not a scope.
    """
    if isinstance(value, ParamTree):
        return value
    if opened := getattr(value, "__scope__", None):  # a packed tree
        return opened()
    if isinstance(getattr(value, "__self__", None), ParamTree):
        raise not_a_child(value.__name__)
    if isinstance(value, functools.partial) and value.func == INFERENCE.declare:
        raise not_a_child(value.args[1])
    if hasattr(value, "param"):
        return value
    if isinstance(value, Mapping) and not value:  # enough for a layer without parameters
        return scope_of(NOTHING, _Without())
    raise _no_scope(value)


def _no_scope(value: Any) -> TypeError:
    return TypeError(
        f"a model is called with its parameters first, model(params, x), but found "
        f"{type(value).__name__} in their place. pt.init(model, key, x) makes the parameters; "
        "pt.from_tree(mapping) turns a nested mapping into a tree; a child called `training` is read "
        "by item, p['training']."
    )
