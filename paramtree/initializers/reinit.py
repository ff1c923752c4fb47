"""New values for the leaves of a tree, by the rules and from the keys that ``pt.init`` would use."""

from typing import Any, TypeVar

import jax

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, RuleError, first_few
from paramtree.core.pytrees import Opened, open_tree
from paramtree.core.rules import Rules, resolve
from paramtree.initializers.axes import check_rule
from paramtree.initializers.by_name import get
from paramtree.initializers.draw import draw
from paramtree.initializers.keys import check_key
from paramtree.initializers.spec import Spec

__all__ = ["initializers_of", "reinit"]

T = TypeVar("T")


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
      RuleError: a pattern matches nothing or has no initializer, or gives one of jax's own that takes
        the axes of weights (out, in, *spatial) for others, as ``lecun_normal()``. ``"lecun_normal"``
        or ``lecun_normal(in_axis=1, out_axis=0)`` is right.
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
    chosen = initializers_of(source, rules)
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


def initializers_of(source: Opened, rules: Rules) -> tuple[Any, ...]:
    """Returns the initializer that the rules give to each slot, None where they give none."""
    assigned = resolve(source, rules, "the initializer rules", default=None)
    wrong = [
        f"{p!r} gives {v!r}" for p, v in rules.items() if not callable(v) and not isinstance(v, str)
    ]
    if wrong:
        raise RuleError(
            f"the initializer rules do not give initializers: {first_few(wrong)}. Expected functions "
            "(key, shape, dtype) -> Array, such as pt.initializers.Constant(42)."
        )
    values = tuple(get(value) for value in rules.values())
    for slot, i in enumerate(assigned.rules):
        shape = shape_of(source.leaves[slot])
        if i >= 0 and shape is not None:
            single = shape[len(source.structure.stack_of(slot)) :]
            check_rule(values[i], join(source.structure.canonical[slot]), single)
    return tuple(None if i < 0 else values[i] for i in assigned.rules)
