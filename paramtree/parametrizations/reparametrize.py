"""The model transform that reads parameters through their parametrisation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Rules, hits
from paramtree.core.structure import PARAM
from paramtree.core.tree import ParamTree, flatten, place_of, unflatten
from paramtree.model.scope import run_of
from paramtree.parametrizations.expand import Folded, check_rules, expand_level, folded, over_stack

__all__ = ["reparametrize"]


@dataclasses.dataclass(frozen=True)
class Reparametrized:
    """A model whose parameters are parametrised; made by ``pt.reparametrize``."""

    f: Callable[..., Any]
    rules: tuple[tuple[Any, Any], ...]

    def __call__(self, p: Any, *inputs: Any, **kwargs: Any) -> Any:
        p = p.__scope__() if hasattr(p, "__scope__") else p  # a packed tree
        if not isinstance(p, ParamTree):
            raise TypeError(
                f"a model is called with its parameters first, model(params, x), but found "
                f"{type(p).__name__} in their place."
            )
        run, rules = run_of(p), dict(self.rules)
        if run.recording:
            run.finish(lambda tree, key: expand_level(tree, place_of(p), rules, key, "reparametrize"))
            return self.f(_as_read(p, rules), *inputs, **kwargs)

        def update(one: Folded) -> dict[str, Any]:
            """Writes what a training call writes to parts that are state."""
            run.parametrized(one.path, one.parametrization)
            if not run.training or not hasattr(one.parametrization, "update"):
                return {}
            new: dict[str, Any] = over_stack(one.parametrization.update, one.stack)(one.parts)
            for name, value in new.items():
                p["/".join(one.path[len(place_of(p)) :])].update(name, value)
            return new

        source = open_tree(p)
        plain = unflatten(source.structure, source.leaves, source.place)
        tree = folded(plain, rules, "reparametrize", update)
        return self.f(source.rebuild(*flatten(tree)), *inputs, **kwargs)


def _as_read(scope: Any, rules: Rules) -> Any:
    """Returns the scope of a model being initialised, with leaves in the dtypes that it will read."""
    source = open_tree(scope)
    structure, leaves = source.structure, list(source.leaves)
    chosen: dict[int, Any] = {}
    for pattern, parametrization in reversed([*rules.items()]):  # so that the first wins
        for (_, slot), hit in zip(structure.entries(), hits(source, pattern), strict=True):
            if hit and structure.kinds[slot] == PARAM:
                chosen[slot] = parametrization
    for slot, parametrization in chosen.items():
        if parametrization is not None:
            read = _read_abstractly(parametrization, leaves[slot], structure.stack_of(slot))
            leaves[slot] = leaves[slot].astype(read.dtype)
    return source.restore(leaves)


def _read_abstractly(parametrization: Any, leaf: Any, stack: Any) -> Any:
    def read(value: Any) -> Any:
        return parametrization.join(parametrization.split(value, jax.random.key(0)))

    try:
        return jax.eval_shape(over_stack(read, stack), leaf)
    except Exception:  # expand says later what does not fit, with the name
        return leaf


def reparametrize(f: Callable[..., Any], rules: Rules) -> Callable[..., Any]:
    """Returns a model that reads the parameters that match through a parametrisation.

    What ``f`` reads as ``dense0.weight`` is computed from what its parametrisation stores, in every
    kind of run, also where the model reads leaves itself, on tied leaves and in stacks. Transforms of
    equal models with equal rules are equal, so they share jit caches.

    Some parts are state: an optimizer gets ``pt.select(params, kind="param")``, and the gradient is
    that of ``pt.grad``, or of the first part of ``pt.partition(params, kind="param")``.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      rules: patterns to parametrisations, as in ``pt.parametrizations``, or to None, which leaves a
        parameter as it is; the first that matches the name of a parameter wins. State is never split.

    Returns:
      A model. Its parameters are ``pt.expand(params, rules, key)`` of those of ``f``, which is also
      what ``pt.init`` of it gives; ``pt.fold(params, rules)`` gives those of ``f`` back.

    Raises:
      RuleError: a value is not a parametrisation, or when called: a pattern matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Dense(3), pt.nn.Dense(2))
      >>> x = jnp.ones((4, 5))
      >>> params = pt.init(net, jax.random.key(0), x)
      >>> rules = {"dense0_weight": pt.parametrizations.LoRA(rank=2)}
      >>> lora = pt.reparametrize(net, rules)
      >>> expanded = pt.expand(params, rules, jax.random.key(1))
      >>> list(pt.collect(expanded, "dense0.*"))
      ['dense0_weight_base', 'dense0_weight_a', 'dense0_weight_b', 'dense0_bias']
      >>> bool((lora(expanded, x) == net(params, x)).all())
      True
    """
    check_rules(rules)
    if not callable(f):
        raise TypeError(f"reparametrize takes a model first, but found {type(f).__name__}.")
    return Reparametrized(f, tuple(rules.items()))
