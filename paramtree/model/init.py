"""Initialises the parameters of a model: records the leaves that it asks for, and computes them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Rules
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.initializers.draw import draw
from paramtree.initializers.keys import check_key
from paramtree.initializers.reinit import initializers_of
from paramtree.model.record import record
from paramtree.sharding.place import spread

__all__ = ["abstract", "init"]


def abstract(
    f: Callable[..., Any], /, *inputs: Any, ties: Mapping[str, str] | None = None, **kwargs: Any
) -> ParamTree:
    """Returns the shapes and dtypes of a model's parameters for some inputs.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      *inputs: arrays, ``jax.ShapeDtypeStruct`` objects, or anything else that the model takes.
      ties: paths to tie, ``{alias: source}``, as in ``pt.tie``.
      **kwargs: passed on to the model.

    Returns:
      The tree that ``pt.init`` would give, of ``jax.ShapeDtypeStruct`` objects. Nothing is computed.

    Example:
      >>> import paramtree as pt
      >>> pt.abstract(pt.nn.Dense(3), jax.ShapeDtypeStruct((2, 20), "float32"))
      Parameter weight (shape=(3, 20), dtype=float32)
      Parameter bias (shape=(3,), dtype=float32)
    """
    tree, finishes = record(f, inputs, kwargs, ties)
    tree = _shapes(tree)
    for finish in finishes:
        tree = finish(tree, jax.random.key(0))
    return tree


def init(
    f: Callable[..., Any],
    key: jax.Array,
    /,
    *inputs: Any,
    rules: Rules | None = None,
    ties: Mapping[str, str] | None = None,
    shardings: Any = None,
    **kwargs: Any,
) -> ParamTree:
    """Returns freshly initialised parameters for a model; sizes are inferred from the inputs.

    The model is traced, not run, also under ``jax.jit`` and ``jax.vmap``. Every leaf's key comes from
    ``key`` and the leaf's path alone, so other layers never change it.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      key: a PRNG key, from ``jax.random.key``.
      *inputs: arrays, ``jax.ShapeDtypeStruct`` objects, or anything else that the model takes.
      rules: patterns to initializers, which override those of the layers.
      ties: paths to tie, ``{alias: source}``, as in ``pt.tie``.
      shardings: where to put the leaves: the result of ``pt.shardings`` for ``pt.abstract`` of the
        model, or one sharding for all. Every device computes its own shard, and the values are the
        same on every mesh. (Orthogonal weights are computed on one device and then sharded.)
      **kwargs: passed on to the model.

    Raises:
      TypeError: ``key`` is not a PRNG key.
      RuleError: a rule matches nothing, or does not give an initializer that fits.
      ValueError: an initializer is not pure: a second call with the same key gives other values.
      MismatchError: the model declares one leaf in two ways, an initializer returns another shape or
        dtype than requested, or the shardings are those of another tree.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp
      >>> net = pt.nn.Sequential(pt.nn.Dense(4, activation="relu"), pt.nn.Dense(2))
      >>> x = jnp.ones((5, 3))
      >>> params = pt.init(net, jax.random.key(0), x, rules={".*bias": pt.initializers.One()})
      >>> params
      Parameter dense0_weight (shape=(4, 3), dtype=float32)
      Parameter dense0_bias (shape=(4,), dtype=float32)
      Parameter dense1_weight (shape=(2, 4), dtype=float32)
      Parameter dense1_bias (shape=(2,), dtype=float32)
      >>> params.dense1.bias
      Array([1., 1.], dtype=float32)
    """
    check_key(key)
    tree, finishes = record(f, inputs, kwargs, ties)
    structure, specs = flatten(tree)
    if rules is not None:
        chosen = initializers_of(open_tree(_shapes(tree)), rules)
        specs = tuple(
            dataclasses.replace(spec, initializer=rule or spec.initializer)
            for spec, rule in zip(specs, chosen, strict=True)
        )
    if not finishes:
        places = shardings and spread(shardings, _shapes(tree), "the shardings for init")
        return unflatten(structure, draw(structure.canonical, specs, key, places))
    tree = unflatten(structure, draw(structure.canonical, specs, key))
    for finish in finishes:
        tree = finish(tree, key)
    return tree if shardings is None else jax.device_put(tree, shardings)


def _shapes(tree: ParamTree) -> ParamTree:
    structure, specs = flatten(tree)
    return unflatten(structure, tuple(spec.abstract() for spec in specs))
