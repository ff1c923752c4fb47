"""Gradients by name: leaves that are not selected cost no backward pass."""

from collections.abc import Callable
from typing import Any, Concatenate, Literal, overload

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of, join
from paramtree.core.errors import RuleError
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Patterns, select_slots, slots_of
from paramtree.core.structure import PARAM
from paramtree.typing import Gradient, GradientAndAux, P, R, Stateful
from paramtree.verbs.split import merge

__all__ = ["grad", "value_and_grad"]


@overload
def value_and_grad(
    fn: Callable[Concatenate[Any, P], R], wrt: Patterns = None, has_aux: bool = False
) -> Stateful[P, R]: ...
@overload
def value_and_grad(  # type: ignore[overload-cannot-match]  # it can: `def f(p, **kwargs)`
    fn: Callable[..., R], wrt: Patterns = None, has_aux: bool = False
) -> Callable[..., tuple[R, Any]]: ...
def value_and_grad(
    fn: Callable[..., Any], wrt: Patterns = None, has_aux: bool = False
) -> Callable[..., Any]:
    """Returns a function for ``fn`` and its gradient with respect to its first argument.

    ``fn(params, *args, **kwargs)`` sees all of the tree. Only the selected leaves are
    differentiated; the others are constants, and cost no backward pass and no memory.

    Args:
      fn: a function that returns a scalar, or with ``has_aux`` a pair of a scalar and anything.
      wrt: a pattern, or several, for the parameters to differentiate with respect to; state never is.
        None for all floating-point parameters.
      has_aux: whether ``fn`` returns a pair.

    Returns:
      A function of the same arguments that returns ``(value, gradient)``. The gradient is what
      ``pt.select`` gives for these leaves: holes, or None in another pytree, for all else.

    Raises:
      RuleError: when called: a pattern matches no parameter, or one that is not floating-point.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"body": {"w": jnp.float32(2)}, "head": {"w": jnp.float32(3)}})
      >>> value, grads = pt.value_and_grad(lambda p: p.body.w * p.head.w, wrt="head.*")(params)
      >>> float(value), pt.collect(grads).to_dict()
      (6.0, {'head_w': Array(2., dtype=float32)})
    """

    def value_and_gradient(params: Any, *args: Any, **kwargs: Any) -> Any:
        chosen, rest = _differentiable(params, wrt)

        def of_chosen(chosen: Any) -> Any:
            return fn(merge(chosen, rest), *args, **kwargs)

        return jax.value_and_grad(of_chosen, has_aux=has_aux)(chosen)

    return value_and_gradient


@overload
def grad(
    fn: Callable[Concatenate[Any, P], Any], wrt: Patterns = None, has_aux: Literal[False] = False
) -> Gradient[P]: ...
@overload
def grad(
    fn: Callable[Concatenate[Any, P], tuple[Any, R]], wrt: Patterns = None, *, has_aux: Literal[True]
) -> GradientAndAux[P, R]: ...
@overload
def grad(fn: Callable[..., Any], wrt: Patterns = None, has_aux: bool = False) -> Callable[..., Any]: ...
def grad(fn: Callable[..., Any], wrt: Patterns = None, has_aux: bool = False) -> Callable[..., Any]:
    """Returns a function for the gradient alone, of ``fn`` with respect to its first argument.

    Args:
      fn: a function that returns a scalar, or with ``has_aux`` a pair of a scalar and anything.
      wrt: a pattern, or several, for the parameters to differentiate with respect to. None for all
        floating-point parameters.
      has_aux: whether ``fn`` returns a pair; the result is then ``(gradient, aux)``.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"w": jnp.float32(3), "steps": jnp.int32(7)})
      >>> pt.grad(lambda p: p.w**2)(params)
      Parameter w (shape=(), dtype=float32)
      (1 hole)
    """
    value_and_gradient = value_and_grad(fn, wrt, has_aux)

    def gradient(params: Any, *args: Any, **kwargs: Any) -> Any:
        value, grads = value_and_gradient(params, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def _differentiable(params: Any, wrt: Any) -> tuple[Any, Any]:
    """Returns the leaves to differentiate with respect to, and the rest."""
    source = open_tree(params)
    structure, leaves = source.structure, source.leaves
    chosen, rest = select_slots(source, wrt, PARAM, "grad")  # state is never trained, whatever matches
    dtypes = {slot: dtype_of(leaves[slot]) for slot in chosen.slots}
    fixed = [
        slot for slot, dtype in dtypes.items() if not (dtype and jnp.issubdtype(dtype, jnp.inexact))
    ]
    if fixed and wrt is not None:
        shown = ", ".join(f"{join(structure.canonical[slot])} ({dtypes[slot]})" for slot in fixed)
        raise RuleError(
            f"grad: cannot differentiate with respect to {shown}, only to floating-point leaves. Give "
            "a pattern that leaves them out, or none, which selects all floating-point parameters."
        )
    if fixed:
        chosen, rest = slots_of(structure, set(chosen.slots) - set(fixed))
    return source.part(chosen.structure, chosen.take, None), source.part(rest.structure, rest.take)
