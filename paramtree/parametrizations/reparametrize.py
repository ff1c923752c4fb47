"""The model transform that reads parameters through their parametrisation."""

import dataclasses
from collections.abc import Callable
from typing import Any

from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Rules
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
            return self.f(p, *inputs, **kwargs)

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


def reparametrize(f: Callable[..., Any], rules: Rules) -> Callable[..., Any]:
    """Returns a model that reads the parameters that match through a parametrisation.

    What ``f`` reads as ``dense0.weight`` is computed from what its parametrisation stores, in every
    kind of run, also where the model reads leaves itself, on tied leaves and in stacks. Transforms of
    equal models with equal rules are equal, so they share jit caches.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      rules: patterns to parametrisations, as in ``pt.parametrizations``; the first that matches the
        name of a parameter wins, and state is never split.

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
