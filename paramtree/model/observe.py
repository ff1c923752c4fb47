"""Models that are looked at: a scope that notes which layer is called, where and with what.

Nothing is switched on for that. The model runs on another kind of scope, which carries an observer
wherever it goes, and a layer that is called on one announces itself. On any other scope a call costs
a look at the scope's type, while tracing, and leaves nothing in the program.
"""

import dataclasses
import functools
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.structure import Node, Path
from paramtree.core.tree import ParamTree, _flatten, _flatten_with_keys, _rebuild, register

__all__ = ["Call", "ObservedScope", "Observer", "announced", "call_of"]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "paramtree.call:"


@dataclasses.dataclass
class Call:
    """One call of a layer; of arrays only shapes and dtypes are kept.

    Attributes:
      layer: the layer, or for the outermost call the model.
      place: where its scope is in the tree.
      parent: the number of the call that it is part of; None for the outermost.
      inputs: what it was called with.
      outputs: what it returned; None if it raised an error.
      reads: the paths of the parameters and states that it asked for itself, each once.
    """

    layer: Any
    place: Path
    parent: int | None
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...] | None = None
    reads: dict[Path, None] = dataclasses.field(default_factory=dict)


class Observer:
    """What one run of a model on observed scopes tells: its calls, in order.

    Each call runs under a name scope with its number, so an equation of the jaxpr says whose it is.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._open: list[int] = []  # the calls that have not yet returned

    def scope(self, tree: ParamTree) -> "ObservedScope":
        """Returns a tree as a scope that tells this observer."""
        return ObservedScope.make(tree, self)

    def call(
        self, layer: Any, place: Path, run: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a call and notes it; what it returns or raises is left as it is."""
        parent = self._open[-1] if self._open else None
        if parent is not None:
            outside = self.calls[parent]
            if outside.layer is layer and outside.place == place:
                return run(*args, **kwargs)  # its own method again, through super()
        number = len(self.calls)
        call = Call(layer, place, parent, _arrays([*args, *kwargs.values()]))
        self.calls.append(call)
        self._open.append(number)
        try:
            with jax.named_scope(f"{_MARK}{number}"):
                outputs = run(*args, **kwargs)
        finally:
            self._open.pop()
        call.outputs = _arrays(outputs)
        return outputs

    def read(self, path: Path) -> None:
        """Notes that the innermost call asks for a leaf."""
        if self._open:
            self.calls[self._open[-1]].reads[path] = None


def call_of(equation: Any) -> int | None:
    """Returns the number of the call in which an equation was made.

    None if it does not say: in a jaxpr within another that is the call of the equation outside.
    """
    numbers = re.findall(rf"{re.escape(_MARK)}(\d+)", str(equation.source_info.name_stack))
    return int(numbers[-1]) if numbers else None


def _arrays(values: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the arrays of a pytree as shapes, without those of scopes."""
    leaves = jax.tree.leaves(values, is_leaf=lambda value: isinstance(value, ParamTree))
    return tuple(
        jax.ShapeDtypeStruct(shape_of(leaf), dtype_of(leaf))
        for leaf in leaves
        if dtype_of(leaf) is not None
    )


class ObservedScope(ParamTree):
    """A scope for reading only that tells an observer what happens on it and below it."""

    __slots__ = ("_observer",)

    _observer: Observer

    @staticmethod
    def make(tree: ParamTree, observer: Observer) -> "ObservedScope":
        """Returns a scope that looks at a tree's level."""
        scope = object.__new__(ObservedScope)
        for name in ("_leaves", "_structure", "_node", "_place"):
            object.__setattr__(scope, name, getattr(tree, name))
        object.__setattr__(scope, "_observer", observer)
        return scope

    def _view(self, node: Node) -> "ObservedScope":
        return ObservedScope.make(super()._view(node), self._observer)

    def _with(self, leaves: Sequence[Any]) -> "ObservedScope":
        return ObservedScope.make(super()._with(leaves), self._observer)

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns the parameter, as every tree does, and tells that it was asked for."""
        leaf = super().param(name, *args, **kwargs)
        self._observer.read((*self._path(), name))
        return leaf


# What goes through a transform as an argument keeps its observer and its place: a layer under
# jax.checkpoint is seen, and is not taken for one elsewhere whose trace jax has kept. The observer is
# there weakly, as jax keeps what it compares.


def _static(scope: ObservedScope) -> Any:
    return _flatten(scope)[1], weakref.ref(scope._observer), scope._path()


def _rebuild_scope(static: Any, leaves: Any) -> ParamTree:
    structure, observer, place = static
    tree = _rebuild(structure, leaves, place)
    return tree if observer() is None else ObservedScope.make(tree, observer())


register(
    ObservedScope,
    lambda scope: (_flatten(scope)[0], _static(scope)),
    lambda scope: (_flatten_with_keys(scope)[0], _static(scope)),
    _rebuild_scope,
)


def announced(method: F) -> F:
    """Returns a layer's ``__call__`` as one that announces itself on an observed scope."""
    if getattr(method, "_announced", False):
        return method

    @functools.wraps(method)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        scope = args[0] if args else next(filter(_observed, kwargs.values()), None)
        if type(scope) is not ObservedScope:
            return method(self, *args, **kwargs)
        run = functools.partial(method, self)
        return scope._observer.call(self, scope._path(), run, *args, **kwargs)

    call._announced = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]  # it has the same signature


def _observed(value: Any) -> bool:
    return type(value) is ObservedScope
