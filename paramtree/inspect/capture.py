"""Activations by name: what layers return, captured or replaced on the way.

Both are model transforms. The model runs on scopes whose run passes everything on to the run that it
would have, and looks at the calls of layers.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError, RuleError, ScopeError
from paramtree.core.rules import Patterns, check_table, compiled, no_match, pattern_text, sep_of
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, place_of
from paramtree.model.run import INFERENCE, Run
from paramtree.model.scope import Scope, level_of, run_of, scope_of
from paramtree.model.traces import current_trace, flattened_for, within
from paramtree.verbs.from_tree import from_tree

__all__ = ["capture", "intervene"]


class _Look:
    """What one transform looks for, and what it has found."""

    def __init__(self, rules: Mapping[Any, Any], inputs: bool, replaces: bool) -> None:
        self.rules, self.inputs, self.replaces = dict(rules), inputs, replaces
        self.used: set[int] = set()
        self.names: dict[Path, None] = {}  # all that was there to be matched

    def rule(self, path: Path, *more: Path) -> Any:
        """Returns the index of the first rule that matches one of the paths, else None."""
        self.names.update(dict.fromkeys((path, *more)))
        for i, pattern in enumerate(self.rules):
            for one in (path, *more):
                name = (sep_of(pattern) if not callable(pattern) else "_").join(one)
                if pattern(name, None) if callable(pattern) else compiled(pattern).fullmatch(name):
                    self.used.add(i)
                    return i
        return None

    def check(self, verb: str) -> None:
        """Raises RuleError if a pattern has matched nothing."""
        unused = [pattern for i, pattern in enumerate(self.rules) if i not in self.used]
        if unused:
            texts = [
                pattern_text(p) if callable(p) else no_match(p, [sep_of(p).join(n) for n in self.names])
                for p in unused
            ]
            raise RuleError(f"{verb}: among the layers that were called, {'; '.join(texts)}.")


class _Looking(Run):
    """A run that passes everything on to another, and looks at calls."""

    __slots__ = ("__weakref__", "_counts", "_index", "_inner", "_look", "_open", "_trace", "found")

    def __init__(
        self, inner: Any, look: _Look, index: tuple[Any, ...] = (), counts: Any = None
    ) -> None:
        self._inner, self._look, self._index = inner, look, index
        self._open: list[tuple[Any, Path]] = []
        self._counts: dict[Path, int] = {} if counts is None else counts  # of calls, by place
        self._trace = current_trace()
        self.found: dict[Path, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def training(self) -> bool:  # type: ignore[override]  # the base has it as a constant
        return bool(self._inner.training)

    def call(self, layer: Any, scope: Scope, method: Any, args: Any, kwargs: Any) -> Any:
        # Outside of this, the run of a transform further out sees what this one returns.
        looked = functools.partial(self._looked, method)
        return self._inner.call(layer, scope, looked, args, kwargs)

    def _looked(self, method: Any, layer: Any, scope: Scope, *args: Any, **kwargs: Any) -> Any:
        place = place_of(scope)
        if self._open and self._open[-1][0] is layer and self._open[-1][1] == place:
            return method(layer, scope, *args, **kwargs)  # its own method again, through super()
        count = self._counts[place] = self._counts.get(place, -1) + 1
        rule, number = self._look.rule(place), str(count or "")
        self._open.append((layer, place))
        try:
            if rule is not None and self._look.inputs:
                self._keep((*place, f"input{number}"), args[0] if len(args) == 1 else args)
            y = method(layer, scope, *args, **kwargs)
        finally:
            self._open.pop()
        return y if rule is None else self._seen((*place, f"output{number}"), place, y, rule)

    def sow(self, scope: Any, name: str, value: Any) -> Any:
        path = (*place_of(scope), name)
        rule = self._look.rule(path, *([] if self._look.replaces else [place_of(scope)]))
        value = value if rule is None else self._seen(path, path, value, rule)
        return self._inner.sow(scope, name, value)

    def _seen(self, path: Path, name: Path, value: Any, rule: int) -> Any:
        if not self._look.replaces:
            self._keep(path, value)
            return value
        new = [*self._look.rules.values()][rule]
        new = new(join(name), value) if callable(new) else self._own(new, value, name)
        shapes = [jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), v) for v in (value, new)]
        if shapes[0] != shapes[1]:
            raise MismatchError(
                f"intervene: `{join(name)}` is {shapes[0]}, and would be replaced by {shapes[1]}: give "
                "a value of the same shape and dtype, or in a stack one for each copy."
            )
        return new

    def _own(self, new: Any, value: Any, name: Path) -> Any:
        """Returns the part of a replacement for this iteration; a number fills the value."""
        if isinstance(new, int | float):
            return jax.tree.map(lambda a: jnp.full_like(a, new), value)
        if shape_of(new) != shape_of(value) and self._index:
            for index in self._index:
                new = jax.tree.map(lambda a, i=index: jnp.asarray(a)[i], new)
        return new

    def _keep(self, path: Path, value: Any) -> None:
        if made_for := within(self._trace):
            raise ScopeError(
                f"`{join(path)}` is computed inside a jax transform, {made_for[-1]}, within the model, "
                "and cannot get out of it. Use pt.scan, nn.Repeat or nn.Vmap for the loop, return the "
                "value from the transform, or capture only what is outside, by a pattern."
            )
        while path in self.found:  # sown twice
            path = (*path[:-1], f"{path[-1]}_")
        self.found[path] = value

    # Delegation: what the base class would answer itself

    def child(self, scope: Scope, key: Any) -> Any:
        return self._inner.child(scope, key)

    attribute = child

    def names(self, scope: Scope) -> ParamTree:
        names: ParamTree = self._inner.names(scope)
        return names

    def declare(self, scope: Any, *args: Any, **kwargs: Any) -> Any:
        return self._inner.declare(scope, *args, **kwargs)

    def update(self, path: Path, value: Any, like: Any) -> Any:
        return self._inner.update(path, value, like)

    def key(self, path: Path) -> jax.Array:
        key: jax.Array = self._inner.key(path)
        return key

    def sources(self, paths: Sequence[Path | None]) -> Any:
        return self._inner.sources(paths)

    def reading(self, cells: Any, chosen: Sequence[int]) -> None:
        self._inner.reading(cells, chosen)

    def split(self, scope: Any, n: int) -> Any:
        return self._inner.split(scope, n), jnp.arange(n)

    def inside(self, tree: ParamTree, part: Any, fixed: bool = False) -> Any:
        inner, index = (None, None) if part is None else part
        scope = self._inner.inside(tree, inner, fixed)
        own = () if index is None else (*self._index, index)
        run = _Looking(run_of(scope), self._look, own, self._counts)
        if type(scope) is Scope:
            return Scope(scope._tree, scope._cells, run)
        return scope_of(scope, run)

    def results(self, scope: Any, all_state: bool = False) -> dict[int, Any]:
        results: dict[int, Any] = self._inner.results(_without(scope), all_state)
        return results

    def absorb(self, scope: Any, results: Mapping[int, Any]) -> None:
        self._inner.absorb(scope, results)

    def outputs(self, scope: Any) -> Any:
        return scope._run._inner.outputs(_without(scope)), scope._run.found

    def collect(self, outputs: Any) -> None:
        inner, found = outputs
        self._inner.collect(inner)
        for path, value in found.items():
            self._keep(path, value)

    def around(self, run: Any) -> Any:
        run = _Looking(self._inner.around(run), self._look, self._index, self._counts)
        run.found = self.found
        return run

    def sealed(self) -> Any:
        return self

    def pending(self) -> Any:
        return None

    def token(self) -> tuple[Any, tuple[Any, ...]]:
        token, arrays = self._inner.token()
        return _Token(token, weakref.ref(self), flattened_for() != "tree.map"), arrays


def _without(scope: Scope) -> Any:
    return Scope(scope._tree, scope._cells, scope._run._inner)


@dataclasses.dataclass(frozen=True)
class _Token:
    token: Any
    run: "weakref.ref[_Looking]"
    keeps_place: bool

    def again(self, *arrays: Any) -> Any:
        inner, run = self.token.again(*arrays), self.run()
        if inner is None or run is None:
            return inner
        again = _Looking(inner, run._look, run._index, run._counts)
        again.found, again._trace = run.found, run._trace
        return again


def _run(f: Any, p: Any, look: _Look, inputs: Any, kwargs: Any, verb: str) -> tuple[Any, ParamTree]:
    """Returns the output of a model on scopes that look, and what they have kept."""
    p = p.__scope__() if hasattr(p, "__scope__") else p  # a packed tree
    if not isinstance(p, ParamTree):
        raise TypeError(
            f"{verb}: a model is called with its parameters first, model(params, x), but found "
            f"{type(p).__name__} in their place."
        )
    if run_of(p).recording:  # a model that is being initialised has no activations
        return f(p, *inputs, **kwargs), from_tree({})
    run = _Looking(run_of(p), look)
    scope = Scope(p._tree, p._cells, run) if type(p) is Scope else scope_of(p, run)
    outputs = f(scope, *inputs, **kwargs)
    look.check(verb)

    def plain(value: Any) -> Any:
        """Returns a scope in the output as what it is without this transform."""
        if type(value) is not Scope or type(run_of(value)) is not _Looking:
            return value
        inner = _without(value)
        return level_of(inner) if run_of(inner) is INFERENCE else inner

    outputs = jax.tree.map(plain, outputs, is_leaf=lambda value: isinstance(value, ParamTree))
    return outputs, from_tree({"/".join(path): value for path, value in run.found.items()})


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model that returns activations too; made by ``pt.capture``."""

    f: Callable[..., Any]
    patterns: tuple[Any, ...]
    inputs: bool

    def __call__(self, p: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, ParamTree]:
        look = _Look(dict.fromkeys(self.patterns), self.inputs, replaces=False)
        return _run(self.f, p, look, inputs, kwargs, "capture")


def capture(
    f: Callable[..., Any], pattern: Patterns = ".*", inputs: bool = False
) -> Callable[..., Any]:
    """Returns a model that returns activations too: ``(params, *inputs) -> (output, activations)``.

    The activations are a tree of the outputs of the layers whose names match, as ``path/output``. A
    further call on the same scope is ``path/output1``, and so on; so is that of a layer which another
    layer calls on its own scope. What a model sows under a layer that matches, with
    ``p.sow(name, value)``, is ``path/name``. In ``nn.Repeat``, ``nn.Vmap`` and ``pt.scan`` they are
    stacked along a first axis. Nothing is paid where nothing is captured.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``, also one made by another transform.
      pattern: a pattern, or several, for the names of layers; that of the model itself is empty.
      inputs: whether to keep the inputs too, as ``path/input``.

    Raises:
      RuleError: when called: a pattern matches no layer.
      ScopeError: when called: a value cannot get out of a jax transform in the model.

    Example:
      >>> import jax, jax.numpy as jnp, paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Dense(3, activation="relu"), pt.nn.Dense(2))
      >>> x = jnp.ones((4, 5))
      >>> params = pt.init(net, jax.random.key(0), x)
      >>> y, acts = pt.capture(net, "dense.*")(params, x)
      >>> acts
      Parameter dense0_output (shape=(4, 3), dtype=float32)
      Parameter dense1_output (shape=(4, 2), dtype=float32)
    """
    patterns = tuple(pattern) if isinstance(pattern, list | tuple) else (pattern,)
    for one in patterns:
        if not callable(one):
            compiled(one)  # raises if it is no pattern
    return Captured(f, patterns, inputs)


class Intervened:
    """A model with replaced activations; made by ``pt.intervene``."""

    def __init__(self, f: Callable[..., Any], rules: Mapping[Any, Any]) -> None:
        self.f, self.rules = f, dict(rules)

    def __call__(self, p: Any, *inputs: Any, **kwargs: Any) -> Any:
        return _run(self.f, p, _Look(self.rules, False, replaces=True), inputs, kwargs, "intervene")[0]

    def _identity(self) -> Any:
        # Arrays are compared by identity, as they may be traced.
        return self.f, *((p, v if callable(v) else id(v)) for p, v in self.rules.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervened) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def intervene(f: Callable[..., Any], rules: Mapping[Any, Any]) -> Callable[..., Any]:
    """Returns a model in which the outputs of some layers, or sown values, are replaced on the way.

    The gradient with respect to an activation is that of ``jax.grad`` with respect to what is added to
    it here. A value that is a stack, as ``pt.capture`` gives it, is taken copy by copy.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``, also one made by another transform.
      rules: patterns, for names of layers or of sown values, to arrays, numbers, or functions
        ``fn(name, value)`` of the value that would be there; the first that matches wins.

    Raises:
      RuleError: ``rules`` is not a table, or when called: a pattern matches nothing.
      MismatchError: when called: a value has another shape or dtype than what it replaces.

    Example:
      >>> import jax, jax.numpy as jnp, paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Dense(3, activation="relu"), pt.nn.Dense(2))
      >>> x = jnp.ones((4, 5))
      >>> params = pt.init(net, jax.random.key(0), x)
      >>> pt.intervene(net, {"dense0": lambda name, h: h * 0})(params, x)[0]
      Array([0., 0.], dtype=float32)
    """
    check_table(rules, "the rules of intervene")
    for one in rules:
        if not callable(one):
            compiled(one)  # raises if it is no pattern
    return Intervened(f, rules)
