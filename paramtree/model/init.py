"""Initialises the parameters of a model.

A model is a function of a scope and inputs. ``init`` records the leaves it asks for and computes them;
``reinit`` computes some leaves again, by the same rules and from the same keys.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, RuleError
from paramtree.core.pytrees import Opened, open_tree
from paramtree.core.rules import Rules, resolve
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.initializers import get
from paramtree.model.draw import check_key, draw
from paramtree.model.record import Spec, record
from paramtree.sharding.place import spread

__all__ = ["abstract", "init", "reinit"]

T = TypeVar("T")


def abstract(
    f: Callable[..., Any], *inputs: Any, ties: Mapping[str, str] | None = None, **kwargs: Any
) -> ParamTree:
    """Returns the shapes and dtypes of a model's parameters for some inputs.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      *inputs: arrays, ``jax.ShapeDtypeStruct``s, or anything else that the model takes.
      ties: paths to tie, ``{alias: source}``, as in ``pt.tie``.
      **kwargs: passed on to the model.

    Returns:
      The tree that ``pt.init`` would give, of ``jax.ShapeDtypeStruct``s. Nothing is computed.

    Example:
      >>> import paramtree as pt
      >>> pt.abstract(pt.nn.Dense(3), jax.ShapeDtypeStruct((2, 20), "float32"))
      Parameter weight (shape=(3, 20), dtype=float32)
      Parameter bias (shape=(3,), dtype=float32)
    """
    return _shapes(record(f, inputs, kwargs, ties))


def init(
    f: Callable[..., Any],
    key: jax.Array,
    *inputs: Any,
    rules: Rules | None = None,
    ties: Mapping[str, str] | None = None,
    shardings: Any = None,
    **kwargs: Any,
) -> ParamTree:
    """Returns freshly initialised parameters for a model; sizes are inferred from the inputs.

    The model is traced, not run. Every leaf's key comes from ``key`` and the leaf's path alone, so
    adding, removing or reordering other layers never changes it. Works under ``jax.jit`` and
    ``jax.vmap`` too.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      key: a PRNG key, from ``jax.random.key``.
      *inputs: arrays, ``jax.ShapeDtypeStruct``s, or anything else that the model takes.
      rules: patterns to initializers, which override those of the layers.
      ties: paths to tie, ``{alias: source}``, as in ``pt.tie``.
      shardings: where to put the leaves: the result of ``pt.shardings`` for ``pt.abstract`` of the
        model, or one sharding for all. Every device computes its own shard, and the values are the
        same on every mesh. (Orthogonal weights are computed on one device and then sharded.)
      **kwargs: passed on to the model.

    Raises:
      TypeError: ``key`` is not a PRNG key.
      RuleError: a rule matches nothing, or does not give an initializer.
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
    tree = record(f, inputs, kwargs, ties)
    structure, specs = flatten(tree)
    if rules is not None:
        chosen = _initializers(open_tree(_shapes(tree)), rules)
        specs = tuple(
            dataclasses.replace(spec, initializer=rule or spec.initializer)
            for spec, rule in zip(specs, chosen, strict=True)
        )
    places = None if shardings is None else spread(shardings, _shapes(tree), "the shardings for init")
    return unflatten(structure, draw(structure.canonical, specs, key, places))


def _shapes(tree: ParamTree) -> ParamTree:
    structure, specs = flatten(tree)
    return unflatten(structure, tuple(spec.abstract() for spec in specs))


def reinit(tree: T, key: jax.Array, rules: Rules) -> T:
    """Returns the tree with new values for the leaves whose names match; the others stay.

    The new values are exactly those of ``pt.init`` with the same key and these rules. In a stack, as
    ``nn.Repeat`` makes it, each copy is initialised by itself.

    Args:
      tree: a parameter tree, or any other pytree.
      key: a PRNG key, from ``jax.random.key``.
      rules: patterns to initializers; the first that matches a name wins.

    Raises:
      TypeError: ``key`` is not a PRNG key.
      RuleError: a pattern matches nothing or has no initializer.
      MismatchError: a leaf is not an array, or not a stack of the sizes in the structure.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp
      >>> params = pt.from_tree({"dense0": {"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}})
      >>> params = pt.reinit(params, jax.random.key(0), {".*bias": pt.initializers.Constant(42)})
      >>> params.dense0.bias
      Array([42., 42.], dtype=float32)
    """
    check_key(key)
    source = open_tree(tree)
    structure, leaves = source.structure, list(source.leaves)
    chosen = _initializers(source, rules)
    slots = [slot for slot, rule in enumerate(chosen) if rule is not None]
    specs = []
    for slot in slots:
        shape, dtype, stack = shape_of(leaves[slot]), dtype_of(leaves[slot]), structure.stack_of(slot)
        name = join(structure.canonical[slot])
        if shape is None or dtype is None:
            raise MismatchError(f"reinit: `{name}` is a {type(leaves[slot]).__name__}, not an array.")
        sizes = tuple(size for _, size in stack)
        if shape[: len(sizes)] != sizes:
            raise MismatchError(
                f"reinit: `{name}` has shape {shape}, but is a stack of {sizes} copies, which are its "
                "first axes. Where jax.vmap has put another axis first, reinit under jax.vmap as well."
            )
        specs.append(Spec(shape, dtype, structure.kinds[slot], chosen[slot], stack))
    paths = [structure.canonical[slot] for slot in slots]
    for slot, leaf in zip(slots, draw(paths, specs, key), strict=True):
        leaves[slot] = leaf
    return source.restore(leaves)


def _initializers(source: Opened, rules: Rules) -> tuple[Any, ...]:
    """Returns the initializer that the rules give to each slot, None where they give none."""
    assigned = resolve(source, rules, "the initializer rules", default=None)
    wrong = [
        f"{p!r} gives {v!r}" for p, v in rules.items() if not callable(v) and not isinstance(v, str)
    ]
    if wrong:
        raise RuleError(
            f"the initializer rules do not give initializers: {'; '.join(wrong)}. Expected functions "
            "(key, shape, dtype) -> Array, such as pt.initializers.Constant(42)."
        )
    values = tuple(get(value) for value in rules.values())
    return tuple(None if i < 0 else values[i] for i in assigned.rules)
