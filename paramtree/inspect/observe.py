"""Observed runs: which layers a model calls, where, in which order and with which arrays.

There is no mode to switch on. The model runs on scopes with an observer, and a layer called on one
announces itself. On any other scope a call costs one check of the scope's type, while tracing, and
leaves nothing in the compiled program.
"""

import dataclasses
import functools
import re
import weakref
from collections.abc import Callable
from typing import Any

import jax

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, place_of
from paramtree.model.run import Run
from paramtree.model.scope import Scope, scope_of

__all__ = ["Call", "Observer", "call_of"]

_MARK = "paramtree.call:"


@dataclasses.dataclass
class Call:
    """One call of a layer; of arrays only shapes and dtypes are kept.

    Attributes:
      layer: the layer, or for the outermost call the model.
      place: the path of its scope in the tree.
      parent: the number of the call that made this one; None for the outermost.
      inputs: the arrays it was called with.
      outputs: the arrays it returned; None if it raised an error.
      reads: the paths of the parameters and states that it asked for itself, each once.
    """

    layer: Any
    place: Path
    parent: int | None
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...] | None = None
    reads: dict[Path, None] = dataclasses.field(default_factory=dict)


class Observer:
    """The calls of one observed run of a model, in order.

    Each call runs under a name scope with its number, so each equation of the jaxpr names its call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._open: list[int] = []  # the calls that have not yet returned

    def scope(self, tree: ParamTree) -> Scope:
        """Returns a scope on a tree; this observer records its calls and reads."""
        return scope_of(tree, _Observing(self))

    def call(
        self, layer: Any, place: Path, run: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a call and records it; its result or error passes through."""
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
        """Records that the innermost call asks for a leaf."""
        if self._open:
            self.calls[self._open[-1]].reads[path] = None


def call_of(equation: Any) -> int | None:
    """Returns the number of the call in which an equation was made.

    None if it names none: in an inner jaxpr, the equation that holds that jaxpr does.
    """
    numbers = re.findall(rf"{re.escape(_MARK)}(\d+)", str(equation.source_info.name_stack))
    return int(numbers[-1]) if numbers else None


def _arrays(values: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the arrays of a pytree, except those of scopes, as shapes."""
    leaves = jax.tree.leaves(values, is_leaf=lambda value: isinstance(value, ParamTree))
    return tuple(
        jax.ShapeDtypeStruct(shape_of(leaf), dtype_of(leaf))
        for leaf in leaves
        if dtype_of(leaf) is not None and not isinstance(leaf, ParamTree)
    )


class _Observing(Run):
    """An observed run for inference."""

    __slots__ = ("observer",)

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def declare(self, scope: Any, kind: str, name: str, *how: Any) -> Any:
        leaf = super().declare(scope, kind, name, *how)
        self.observer.read((*place_of(scope), name))
        return leaf

    def call(self, layer: Any, scope: Scope, method: Any, args: Any, kwargs: Any) -> Any:
        run = functools.partial(method, layer)
        return self.observer.call(layer, place_of(scope), run, scope, *args, **kwargs)

    def inside(self, tree: ParamTree, part: Any, fixed: bool = False) -> Any:
        return scope_of(tree, self)

    def token(self) -> tuple["_Token", tuple[Any, ...]]:
        # A scope that goes through a transform keeps its observer, so a layer under jax.checkpoint is
        # recorded. The reference is weak, as jax keeps static data alive.
        return _Token(weakref.ref(self.observer)), ()


@dataclasses.dataclass(frozen=True)
class _Token:
    """Makes the run of a scope that went through a transform."""

    observer: "weakref.ref[Observer]"
    keeps_place = True

    def again(self, *arrays: Any) -> _Observing | None:
        observer = self.observer()
        return None if observer is None else _Observing(observer)
