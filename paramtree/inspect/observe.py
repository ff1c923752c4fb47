"""The calls of a model's layers: which, where, in which order and with which arrays."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, place_of
from paramtree.inspect.looking import Looking, Watcher, looked_at
from paramtree.model.run import INFERENCE

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


class Observer(Watcher):
    """The calls of one observed run of a model, in order.

    Each call runs under a name scope with its number, so each equation of the jaxpr names its call.

    Attributes:
      calls: the calls.
      joined: what each parameter is read through, the innermost parametrisation last, by path.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.joined: dict[Path, list[Any]] = {}
        self._open: list[int] = []  # the calls that have not yet returned

    def observe(
        self, layer: Any, f: Callable[..., Any], tree: ParamTree, args: Any, kwargs: Any
    ) -> Any:
        """Returns the output of a model, whose call is the first and that of ``layer``."""
        run = Looking(INFERENCE, self)
        scope = looked_at(tree, run)

        def call() -> Any:
            return f(scope, *args, **kwargs)

        return run.watched(layer, place_of(tree), call, (*args, *kwargs.values()))

    def called(self, run: Any, place: Path, layer: Any, call: Callable[[], Any], args: Any) -> Any:
        number = len(self.calls)
        parent = self._open[-1] if self._open else None
        self.calls.append(Call(layer, place, parent, _arrays(args)))
        self._open.append(number)
        try:
            with jax.named_scope(f"{_MARK}{number}"):
                outputs = call()
        finally:
            self._open.pop()
        self.calls[number].outputs = _arrays(outputs)
        return outputs

    def declared(self, path: Path) -> None:
        if self._open:
            self.calls[self._open[-1]].reads[path] = None

    def parametrized(self, path: Path, parametrization: Any) -> None:
        self.joined.setdefault(path, []).append(parametrization)


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
