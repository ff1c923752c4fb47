"""The model transform that reads parameters through their parametrisation."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError, ScopeError
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Rules, hits
from paramtree.core.structure import PARAM, Path
from paramtree.core.tree import ParamTree, flatten, place_of, unflatten
from paramtree.model.scope import run_of
from paramtree.model.training import TrainingModel, training
from paramtree.parametrizations.expand import check_rules, expand_levels, over_stack, state_parts
from paramtree.parametrizations.fold import Folded, folded
from paramtree.typing import P, R

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
            with _expanding(run.finishes, rules, place_of(p)):
                return self.f(_as_read(p, rules), *inputs, **kwargs)

        def update(one: Folded) -> dict[str, Any]:
            """Writes what a training call writes to parts that are state."""
            run.parametrized(one.path, one.parametrization)
            if not run.training or not hasattr(one.parametrization, "update"):
                return {}
            new: Any = over_stack(one.parametrization.update, one.stack)(one.parts)
            _check_update(one, new)
            for name, value in new.items():
                try:
                    p["/".join(one.path[len(place_of(p)) :])].update(name, value)
                except ScopeError as error:
                    raise _misplaced(error, one, place_of(p)) from None
            return dict(new)

        source = open_tree(p)
        plain = unflatten(source.structure, source.leaves, source.place)
        tree = folded(plain, rules, "reparametrize", update)
        outputs = self.f(source.rebuild(*flatten(tree)), *inputs, **kwargs)
        return jax.tree.map(
            lambda value: _unfolded(value, tree, rules),
            outputs,
            is_leaf=lambda value: isinstance(value, ParamTree),
        )


@dataclasses.dataclass
class _Expansion:
    """What remains to be done when a model is initialised: its values are expanded at some levels.

    A reparametrised part that is called on several scopes, or twice on one, is expanded once at each:
    together, as the scopes may be tied.
    """

    rules: Rules
    levels: dict[Path, None]
    is_open: bool = True

    def __call__(self, tree: ParamTree, key: Any) -> ParamTree:
        return expand_levels(tree, self.levels, self.rules, key, "reparametrize")


@contextlib.contextmanager
def _expanding(finishes: list[Any], rules: Rules, place: Path) -> Iterator[None]:
    """Asks for the expansion of a level; a call within a call with the same rules is one of its own."""
    own = (f for f in finishes if isinstance(f, _Expansion) and not f.is_open and f.rules == rules)
    one = next(own, None)
    if one is None:
        one = _Expansion(rules, {})
        finishes.append(one)
    one.levels[place] = None
    one.is_open = True
    try:
        yield
    finally:
        one.is_open = False


def _check_update(one: Folded, new: Any) -> None:
    """Raises MismatchError unless an update is one of parts that are state."""
    state = state_parts(one.parametrization, one.parts)
    if not isinstance(new, Mapping) or not set(new) <= state:
        found = list(new) if isinstance(new, Mapping) else new
        raise MismatchError(
            f"{one.parametrization!r}.update of `{join(one.path)}` returned {found!r}: expected new "
            f"values of parts that are state, {', '.join(sorted(state)) or 'of which it has none'}."
        )


def _misplaced(error: ScopeError, one: Folded, place: Path) -> ScopeError:
    """Returns the error for an update in a transform of jax, with what to write for the whole model."""
    at, scope = (place[-1], f"p[{place[-1]!r}]") if place else ("", "p")
    return ScopeError(
        f"`{join(one.path)}` is read through {one.parametrization!r}, which writes state in training, "
        "but the model is called inside a jax transform, and the value cannot get out of it. Within "
        f"jax.checkpoint: `y, new = jax.checkpoint(pt.training(model))({scope}, x)`, and then "
        f"`p.update({at!r}, new)`. For loops there is pt.scan, for copies nn.Repeat and nn.Vmap. "
        f"({error})"
    )


def _unfolded(value: Any, tree: ParamTree, rules: Rules) -> Any:
    """Returns an output of the model; a tree of its parameters would be one of the plain model.

    Raises:
      ScopeError: it is that, as of a model that calls pt.training inside.
    """
    same = isinstance(value, ParamTree) and open_tree(value).structure is flatten(tree)[0]
    if same and any(parametrization is not None for parametrization in rules.values()):
        raise ScopeError(
            "reparametrize: the model returns a tree of its parameters, in which they are not "
            "parametrised. If it is one in training, write pt.training(pt.reparametrize(f, rules))."
        )
    return value


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


def reparametrize(f: Callable[P, R], rules: Rules) -> Callable[P, R]:
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
    # Outside of these transforms the parameters would not be parametrised in what training returns.
    if isinstance(f, TrainingModel):
        model: Any = training(reparametrize(f.f, rules))
    elif hasattr(type(f), "__over__"):
        kind: Any = type(f)
        model = kind.__over__(f, lambda inner: reparametrize(inner, rules))
    else:
        model = Reparametrized(f, tuple(rules.items()))
    return model
