"""Leaves that are still to be computed, and whether two initializers would compute the same."""

import dataclasses
import functools
import operator
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.errors import MismatchError
from paramtree.core.structure import Stack
from paramtree.initializers.by_name import get
from paramtree.initializers.values import Initializer

__all__ = ["Spec", "same_initializer", "spec_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """A leaf that a model asks for and that is still to be computed.

    ``stack`` gives its leading axes over copies of the layer, as in ``Structure.stacks``.
    """

    shape: tuple[int, ...]
    dtype: Any
    kind: str
    initializer: Initializer
    stack: Stack = ()

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.kind} {self.shape} {jnp.dtype(self.dtype).name}"


def spec_of(name: str, kind: str, shape: Any, initializer: Any, dtype: Any, stack: Stack = ()) -> Spec:
    """Returns the spec of a leaf as a model declares it, for each copy in a stack.

    Raises:
      MismatchError: the shape is not one.
      TypeError: the initializer is not one.
    """
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = (-1,)
    if any(size < 0 for size in sizes):
        raise MismatchError(
            f"`{name}` is declared with shape {shape!r}; a shape is a tuple of sizes, each a "
            "non-negative integer that is known while tracing."
        )
    if not callable(initializer) and not isinstance(initializer, str):
        raise TypeError(
            f"the initializer of `{name}` is {initializer!r}; expected a function "
            "(key, shape, dtype) -> Array, such as pt.initializers.Normal(0.01)."
        )
    sizes = (*(size for _, size in stack), *sizes)
    return Spec(sizes, jax.dtypes.canonicalize_dtype(dtype), kind, get(initializer), stack)


def same_initializer(a: Any, b: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether two initializers, or the values that they hold, are the same.

    Example:
      >>> make = lambda scale: lambda key, shape, dtype: scale * jax.random.normal(key, shape, dtype)
      >>> same_initializer(make(1.0), make(1.0)), same_initializer(make(1.0), make(2.0))
      (True, False)
    """
    if a is b or type(a) is not type(b) or (id(a), id(b)) in seen:
        return type(a) is type(b)
    seen = seen | {(id(a), id(b))}  # a recursive function holds itself
    if isinstance(a, types.FunctionType):
        held = [
            (f.__defaults__, f.__kwdefaults__, *(cell.cell_contents for cell in f.__closure__ or ()))
            for f in (a, b)
        ]
        return a.__code__ == b.__code__ and same_initializer(held[0], held[1], seen)
    if isinstance(a, functools.partial):
        return same_initializer((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), seen)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same_initializer(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_initializer(a[key], b[key], seen) for key in a)
    if isinstance(a, np.ndarray | jax.Array):
        return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a, b))
    return bool(a == b)
