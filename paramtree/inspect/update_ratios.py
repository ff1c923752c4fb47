"""How far one step moves each parameter relative to its norm; ``plots`` draws it."""

from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of, shape_of, short
from paramtree.core.errors import MismatchError, suggest
from paramtree.core.rules import Patterns
from paramtree.core.tree import ParamTree
from paramtree.inspect.measure import absent
from paramtree.verbs.collect import collect, collect_matching, flat_tree

__all__ = ["update_ratios"]


def update_ratios(params: Any, updates: Any, pattern: Patterns = None, *, sep: str = "_") -> ParamTree:
    """Returns the norm of each update divided by the norm of its parameter.

    With a suitable learning rate the ratio is about 1e-3: far below, a parameter hardly learns, and far
    above, training is unstable. The function can be jitted. Call it in the training step and collect
    the results; ``pt.plots.update_ratios`` draws a list of them.

    Args:
      params: the parameters, before or after the update.
      updates: the updates, as from optax: a tree with the same names, or some of them.
      pattern: a regular expression that matches full names; None selects all leaves.
      sep: the separator that joins names in the result.

    Returns:
      A flat tree with one number per name; a tied leaf has one. A zero update gives 0, and a nonzero
      update of a zero leaf gives inf. Leaves that are not floating-point are left out.

    Raises:
      MismatchError: an update has no parameter of its name and shape, or one of them has no values; all
        are listed.
      RuleError: the pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"weight": jnp.full(4, 2.0), "bias": jnp.zeros(2)})
      >>> updates = pt.from_tree({"weight": jnp.full(4, 0.5), "bias": jnp.zeros(2)})
      >>> pt.update_ratios(params, updates).to_dict()
      {'weight': Array(0.25, dtype=float32), 'bias': Array(0., dtype=float32)}
    """
    weights = collect(params, sep=sep, aliases=True)
    ratios, problems = {}, []
    for name, update in collect_matching("update_ratios", updates, pattern, sep=sep).items():
        if name not in weights:
            hint = suggest(name, list(weights))
            problems.append(f"`{short(name)}` is not in params.{hint}")
        elif shape_of(update) != shape_of(weights[name]):
            problems.append(
                f"`{short(name)}` has shape {shape_of(weights[name])} in params, but its update has "
                f"{shape_of(update)}."
            )
        elif why := absent(weights[name]):
            problems.append(f"`{short(name)}` {why} in params, so it has no values.")
        elif why := absent(update):
            problems.append(f"The update of `{short(name)}` {why}, so it has no values.")
        elif _floating(update) and _floating(weights[name]):
            ratios[name] = _ratio(update, weights[name])
    if problems:
        raise MismatchError(
            f"update_ratios: {' '.join(problems)} Pass the params and updates of one step: "
            "updates, state = tx.update(grads, state, params)."
        )
    return flat_tree(ratios)


def _floating(leaf: Any) -> bool:
    dtype = dtype_of(leaf)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def _ratio(update: Any, weight: Any) -> jax.Array:
    step, size = _norm(update), _norm(weight)
    dtype = max(step.dtype, size.dtype, key=lambda dtype: dtype.itemsize)
    step, size = step.astype(dtype), size.astype(dtype)
    still = step == 0
    return jnp.where(still, 0, step / jnp.where(still, 1, size))  # never 0 / 0, for jax_debug_nans


def _norm(array: Any) -> jax.Array:
    """Returns the Euclidean norm, scaled so that squares neither underflow nor overflow."""
    array = jnp.asarray(array)
    array = jnp.abs(array) if jnp.iscomplexobj(array) else array
    array = array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
    largest = jnp.max(jnp.abs(array), initial=0)
    scale = jnp.where(largest == 0, 1, largest)
    return scale * jnp.sqrt(jnp.sum((array / scale) ** 2))
