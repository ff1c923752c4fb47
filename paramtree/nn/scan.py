"""A model as the body of a loop: what its run does in one iteration gets out of the loop.

The body of a scan is traced once, so it has a run of its own, with a key and state of each iteration.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from paramtree.core.arrays import shape_of
from paramtree.core.errors import MismatchError
from paramtree.core.tree import ParamTree
from paramtree.model.scope import level_of, run_of, with_leaves

__all__ = ["scan"]

C = TypeVar("C")
Y = TypeVar("Y")


def scan(
    body: Callable[[Any, C, Any], tuple[C, Y]],
    p: Any,
    carry: C,
    xs: Any = None,
    length: int | None = None,
    *,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[C, Y]:
    """Scans a model over a leading axis, as ``jax.lax.scan`` does, with shared parameters.

    Every step draws keys of its own, and state that a step writes is what the next one reads; the last
    is written to ``p``. For copies of a layer with parameters of their own there is ``nn.Repeat``.

    Args:
      body: ``body(p, carry, x) -> (carry, y)``.
      p: the scope of the body: that of the model, or one of its children.
      carry: what is passed from step to step, any pytree of fixed shapes and dtypes.
      xs: arrays with a leading axis to scan over, in any pytree; None for none.
      length: the number of steps, if there are no ``xs``.
      reverse: whether to run from the last entry to the first.
      unroll: how many steps to compile into one iteration.

    Returns:
      The last carry, and the ``y`` of all steps, stacked.

    Raises:
      TypeError: ``body`` is not callable, or ``p`` is not a scope.
      MismatchError: the ``xs`` have no common leading axis, and there is no length.

    Example:
      >>> import jax.numpy as jnp, paramtree as pt
      >>> def step(p, h, x):
      ...     h = pt.nn.Dense(3, activation="tanh")(p.cell, jnp.concatenate([h, x], -1))
      ...     return h, h
      >>> def model(p, xs):
      ...     return pt.scan(step, p, jnp.zeros((2, 3)), xs)[1]
      >>> xs = jnp.ones((5, 2, 4))
      >>> params = pt.init(model, jax.random.key(0), xs)
      >>> list(pt.collect(params)), model(params, xs).shape
      (['cell_weight', 'cell_bias'], (5, 2, 3))
    """
    if not callable(body):
        raise TypeError(
            f"pt.scan is called as pt.scan(body, p, carry, xs), but found {type(body).__name__} in "
            "place of the body."
        )
    p = p.__scope__() if hasattr(p, "__scope__") else p  # a packed tree
    if not isinstance(p, ParamTree):
        raise TypeError(f"pt.scan takes the scope second, but found {type(p).__name__}.")
    run = run_of(p)
    how: Any = {"length": length, "reverse": reverse, "unroll": unroll}
    if run.recording:
        return jax.lax.scan(lambda carry, x: body(p, carry, x), carry, xs, **how)
    level, written = level_of(p), set[int]()

    def step(state_and_carry: Any, x_and_part: Any) -> Any:
        (state, carry), (x, part) = state_and_carry, x_and_part
        inner = run.inside(with_leaves(level, state), part, fixed=True)
        carry, y = body(inner, carry, x)
        written.update(run_of(inner).results(inner))
        return (run_of(inner).results(inner, True), carry), (y, run_of(inner).outputs(inner))

    parts = run.split(p, _length(xs, length))
    first = run.inside(level, None)
    state = run_of(first).results(first, True)
    (state, carry), (ys, outputs) = jax.lax.scan(step, (state, carry), (xs, parts), **how)
    run.collect(outputs)
    run.absorb(p, {slot: state[slot] for slot in written})
    return carry, ys


def _length(xs: Any, length: int | None) -> int:
    sizes = {(shape_of(x) or (None,))[0] for x in jax.tree.leaves(xs)} | {length} - {None}
    if len(sizes) != 1 or None in sizes:
        found = ", ".join(map(str, sizes)) or "neither xs nor a length"
        raise MismatchError(f"pt.scan: expected one length for all xs, but found {found}.")
    size: Any = sizes.pop()
    return int(size)
