"""How far one step moves each parameter, as a part of its length; the picture is in ``plots``."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import absent, dtype_of, shape_of, short
from paramtree.core.errors import MismatchError, suggest
from paramtree.core.names import Pattern
from paramtree.core.structure import PARAM, build
from paramtree.core.tree import ParamTree, _rebuild
from paramtree.verbs.parts import taken
from paramtree.verbs.selection import collect

__all__ = ["flat", "update_ratios"]


def update_ratios(
    params: Any, updates: Any, pattern: Pattern | None = None, *, sep: str = "_"
) -> ParamTree:
    """Returns the length of each update divided by that of the parameter it is added to.

    With a learning rate that suits, it is about 1e-3: far below, a parameter hardly learns, and far
    above, it is thrown about. Call it in the training step, as it can be jitted, and keep what it
    returns: ``pt.plots.update_ratios`` draws a list of these.

    Args:
      params: the parameters, before or after the update.
      updates: what is added to them, a tree with the same names, as from optax; it may have fewer.
      pattern: a regular expression for whole names; None takes all.
      sep: what joins the names in the result.

    Returns:
      A flat tree with a number for each name; a tied leaf has one. An update of zeros gives 0, and
      another update of a leaf that is all zeros gives inf. Leaves that are not floating point have no
      ratio, and are left out.

    Raises:
      MismatchError: an update has no parameter of its name and shape, or one of the two has no values;
        all of these are listed.
      RuleError: the pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"weight": jnp.full(4, 2.0), "bias": jnp.zeros(2)})
      >>> updates = pt.from_tree({"weight": jnp.full(4, 0.5), "bias": jnp.zeros(2)})
      >>> pt.update_ratios(params, updates).to_dict()
      {'weight': Array(0.25, dtype=float32), 'bias': Array(0., dtype=float32)}
    """
    weights = collect(params, sep=sep, aliases=True)
    made, problems = {}, []
    for name, update in taken("update_ratios", updates, pattern, sep=sep).items():
        if name not in weights:
            hint = suggest(name, list(weights))
            problems.append(f"`{short(name)}` is not in params.{hint}")
        elif shape_of(update) != shape_of(weights[name]):
            problems.append(
                f"`{short(name)}` has shape {shape_of(weights[name])} in params, and its update "
                f"{shape_of(update)}."
            )
        elif why := absent(weights[name]):
            problems.append(f"`{short(name)}` {why} in params, so it has no values.")
        elif why := absent(update):
            problems.append(f"The update of `{short(name)}` {why}, so it has no values.")
        elif _floating(update) and _floating(weights[name]):
            made[name] = _ratio(update, weights[name])
    if problems:
        raise MismatchError(
            f"update_ratios: {' '.join(problems)} The two are one step's: "
            "updates, state = tx.update(grads, state, params)."
        )
    return flat(made)


def flat(values: Mapping[str, Any]) -> ParamTree:
    """Returns a tree of one level; unlike ``from_tree`` it takes names as they are."""
    structure, order = build([((name,), name) for name in values], dict.fromkeys(values, PARAM))
    return _rebuild(structure, tuple(values[name] for name in order))


def _floating(leaf: Any) -> bool:
    dtype = dtype_of(leaf)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def _ratio(update: Any, weight: Any) -> jax.Array:
    above, below = _length(update), _length(weight)
    dtype = max(above.dtype, below.dtype, key=lambda dtype: dtype.itemsize)
    above, below = above.astype(dtype), below.astype(dtype)
    still = above == 0
    return jnp.where(still, 0, above / jnp.where(still, 1, below))  # no 0 / 0, also where unused


def _length(array: Any) -> jax.Array:
    """Returns the Euclidean length; the square of a vanishing gradient must not be zero."""
    array = jnp.asarray(array)
    array = jnp.abs(array) if jnp.iscomplexobj(array) else array
    array = array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
    largest = jnp.max(jnp.abs(array), initial=0)
    scale = jnp.where(largest == 0, 1, largest)
    return scale * jnp.sqrt(jnp.sum((array / scale) ** 2))
