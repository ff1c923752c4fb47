"""Types for annotations: what a model reads from, and what transforms return.

They hold no code. Transforms keep the arguments of a model and what it returns, and give a tree back as
the type that they are given: a ``ParamTree``, a packed tree, or a scope.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import jax

__all__ = ["Gradient", "GradientAndAux", "InTraining", "P", "R", "Read", "Scope", "Stateful", "T"]

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

Draw = Callable[[jax.Array, tuple[int, ...], Any], jax.Array] | str  # an initializer, or its name


class Scope(Protocol):
    """What a model reads its parameters from: the type of ``p`` in ``model(p, x)``.

    For inference it is the ``ParamTree`` that the model is called with; in every other run, an object
    that reads like it. Children are read by attribute, item, path or position; a child is an array or
    a scope. It is a protocol, for annotations alone.

    Example:
      >>> import jax, jax.numpy as jnp, paramtree as pt
      >>> def model(p: pt.Scope, x: jax.Array) -> jax.Array:
      ...     scale = p.param("scale", (), pt.initializers.One())
      ...     return scale * pt.nn.Dense(2)(p.out, x)
      >>> list(pt.collect(pt.init(model, jax.random.key(0), jnp.ones((3, 4)))))
      ['scale', 'out_weight', 'out_bias']
    """

    @property
    def training(self) -> bool:
        """Whether the model runs under ``pt.training``."""

    def param(self, name: str, shape: Sequence[int], initializer: Draw, dtype: Any = ...) -> jax.Array:
        """Returns the parameter ``name``, checked against the shape that the layer computes.

        Raises:
          MissingError: the tree has no such leaf.
          MismatchError: it has another shape.
        """

    def state(self, name: str, shape: Sequence[int], initializer: Draw, dtype: Any = ...) -> jax.Array:
        """Returns the state ``name``, checked as ``param`` does."""

    def update(self, name: str, value: Any) -> None:
        """Writes new state; the call under ``pt.training`` returns it in its tree.

        Args:
          name: a state, or a level; "" is the level of the scope itself.
          value: an array of the same shape and dtype; for a level, the tree that ``pt.training`` of a
            layer has returned for it, whose state is written.

        Raises:
          MissingError: the state was not declared.
          MismatchError: the value has another shape or dtype.
          ScopeError: the model is not in training, or the write is inside a jax transform in the model.
        """

    def key(self) -> jax.Array:
        """Draws a PRNG key, a new one each time, from the call's key and the layer's path.

        Raises:
          ScopeError: the call was given no key, or the draw would be repeated, as in a scan.
        """

    def sow(self, name: str, value: T) -> T:
        """Shows a value, any pytree, to ``pt.capture`` and ``pt.intervene``; returns it, or another."""

    def __getattr__(self, name: str) -> Any: ...

    def __getitem__(self, key: str | int) -> Any: ...

    def __contains__(self, key: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...


class Read:
    """Names that every tree offers to the model that reads it, unless a child has that name."""

    __slots__ = ()

    param: Any
    state: Any
    training: Any
    update: Any
    key: Any
    sow: Any


class InTraining(Protocol[R_co]):
    """A model in training. Python has no type for a model's arguments with a ``key`` among them."""

    def __call__(
        self, params: T, /, *inputs: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> tuple[R_co, T]: ...


class Stateful(Protocol[P, R_co]):
    """A function that returns its result and a tree: the new state, or the gradient."""

    def __call__(self, params: T, /, *inputs: P.args, **kwargs: P.kwargs) -> tuple[R_co, T]: ...


class Gradient(Protocol[P]):
    """The gradient of a function with respect to its first argument, of whose type it is."""

    def __call__(self, params: T, /, *args: P.args, **kwargs: P.kwargs) -> T: ...


class GradientAndAux(Protocol[P, R_co]):
    """The gradient, and what the function returns beside its value."""

    def __call__(self, params: T, /, *args: P.args, **kwargs: P.kwargs) -> tuple[T, R_co]: ...
