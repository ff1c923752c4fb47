"""Activations by name: what layers return, captured or replaced on the way, by two model transforms."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError, ParamTreeError, RuleError, ScopeError
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Patterns, check_table, compiled, no_match, pattern_text, sep_of
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, place_of, unflatten
from paramtree.inspect.looking import Looking, Watcher, looked_at, without
from paramtree.model.run import INFERENCE
from paramtree.model.scope import Scope, level_of, run_of
from paramtree.model.traces import within
from paramtree.typing import P, R
from paramtree.verbs.from_tree import from_tree

__all__ = ["capture", "intervene"]


class _Activations(Watcher):
    """What one capture or intervention looks for, and what it has found."""

    def __init__(self, rules: Mapping[Any, Any], inputs: bool, replaces: bool, base: Path = ()) -> None:
        self.rules, self.inputs, self.replaces = dict(rules), inputs, replaces
        self.base = len(base)  # names start at the tree that the model is called with
        self.used: set[int] = set()
        self.names: dict[Path, None] = {}  # all that was there to be matched

    def called(self, run: Looking, place: Path, layer: Any, call: Any, args: Any) -> Any:
        count = run.counts[place] = run.counts.get(place, -1) + 1
        number, inner = str(count or ""), run.is_within(place)
        place = place[self.base :]
        # To replace what a layer returns is not to replace what it calls on its own scope.
        named = [] if self.replaces and inner else [place]
        rule = self._rule(*named, (*place, f"output{number}"))
        if not inner:
            self.names[place] = None
        if rule is not None and self.inputs:
            self.keep(run, (*place, f"input{number}"), args[0] if len(args) == 1 else args)
        y = call()
        return y if rule is None else self._seen(run, (*place, f"output{number}"), place, y, rule)

    def sown(self, run: Looking, place: Path, name: str, value: Any) -> Any:
        if not isinstance(name, str) or not name or re.search(r"/|^(output|input)\d*$", name):
            raise ScopeError(
                f"{name!r} cannot name a value that is sown: give it a name that is not empty, without "
                "'/', and other than 'output' and 'input', which are those of the layer."
            )
        place = place[self.base :]
        path = (*place, name)
        rule = self._rule(path, *([] if self.replaces else [place]))
        self.names[path] = None
        return value if rule is None else self._seen(run, path, path, value, rule)

    def keep(self, run: Looking, path: Path, value: Any) -> None:
        """Keeps a value under a path, with a number if there is one already."""
        if made_for := within(run.trace):
            raise ScopeError(
                f"`{join(path)}` is computed inside a jax transform, {made_for[-1]}, within the model, "
                "and cannot get out of it. Use pt.scan, nn.Repeat or nn.Vmap for the loop, return the "
                "value from the transform, or capture only what is outside, by a pattern."
            )
        while path in run.found:  # sown twice
            path = (*path[:-1], f"{path[-1]}_")
        run.found[path] = value

    def check(self, verb: str) -> None:
        """Raises RuleError if a pattern has matched nothing."""
        unused = [pattern for i, pattern in enumerate(self.rules) if i not in self.used]
        if unused:
            texts = [
                pattern_text(p)
                if callable(p)
                else no_match(p, [sep_of(p).join(n) for n in self.names if n])
                for p in unused
            ]
            raise RuleError(f"{verb}: among the layers that were called, {'; '.join(texts)}.")

    def _rule(self, *paths: Path) -> Any:
        """Returns the index of the first rule that matches one of the paths, else None."""
        found = [i for i, pattern in enumerate(self.rules) if any(_matches(pattern, p) for p in paths)]
        self.used.update(found)
        return next(iter(found), None)

    def _seen(self, run: Looking, path: Path, name: Path, value: Any, rule: int) -> Any:
        if not self.replaces:
            self.keep(run, path, value)
            return value
        new = [*self.rules.values()][rule]
        new = new(join(name), value) if callable(new) else _own(new, value, run.index)
        if _forms(value) != _forms(new):
            have = f"`{join(name)}` is" if name else "the output is"
            sizes = tuple(size for _, size in run.index)
            copies = f", or {sizes} of them, one for each iteration" if sizes else ""
            raise MismatchError(
                f"intervene: {have} {_forms(value)}, and would be replaced by {_forms(new)}: give a "
                f"value of the same shape and dtype{copies}."
            )
        return new


def _matches(pattern: Any, path: Path) -> bool:
    if callable(pattern):
        return bool(pattern(join(path), None))
    return compiled(pattern).fullmatch(sep_of(pattern).join(path)) is not None


def _own(new: Any, value: Any, indices: Sequence[tuple[Any, int]]) -> Any:
    """Returns the part of a replacement for an iteration; a number fills the value."""
    if isinstance(new, int | float):
        return jax.tree.map(lambda a: jnp.full_like(a, new), value)
    sizes = tuple(size for _, size in indices)
    if sizes and _forms(new) == _forms(value, sizes):
        index = tuple(index for index, _ in indices)
        return jax.tree.map(lambda a: jnp.asarray(a)[index], new)
    return new


def _forms(value: Any, sizes: tuple[int, ...] = ()) -> Any:
    """Returns the shapes, after some axes in front, and the dtypes of a pytree."""
    return jax.tree.map(lambda a: ((*sizes, *jnp.shape(a)), jnp.result_type(a)), value)


def _run(
    f: Any, p: Any, seen: _Activations, inputs: Any, kwargs: Any, verb: str
) -> tuple[Any, ParamTree]:
    """Returns the output of a model on scopes that look, and what they have kept."""
    p = p.__scope__() if hasattr(p, "__scope__") else p  # a packed tree
    if not isinstance(p, ParamTree):
        raise TypeError(
            f"{verb}: a model is called with its parameters first, model(params, x), but found "
            f"{type(p).__name__} in their place."
        )
    recording = run_of(p).recording
    if recording and not seen.replaces:
        # First the leaves are asked for. What is captured comes from a run on those that are known: not
        # yet all the first time, and never those of a model that is reparametrised only afterwards.
        outputs = f(p, *inputs, **kwargs)
        source = open_tree(p)
        known = unflatten(source.structure, source.leaves, source.place)
        try:
            return outputs, _run(f, known, seen, inputs, kwargs, verb)[1]
        except ParamTreeError:
            return outputs, from_tree({})  # reading it is an error
    run = Looking(run_of(p), seen)
    outputs = f(looked_at(p, run), *inputs, **kwargs)
    seen.check(verb)

    def plain(value: Any) -> Any:
        """Returns a scope in the output as what it is without this transform."""
        if type(value) is not Scope or type(run_of(value)) is not Looking:
            return value
        inner = without(value)
        return level_of(inner) if run_of(inner) is INFERENCE else inner

    def all_plain(values: Any) -> Any:
        return jax.tree.map(plain, values, is_leaf=lambda value: isinstance(value, ParamTree))

    found = {"/".join(path): all_plain(value) for path, value in run.found.items()}
    return all_plain(outputs), from_tree(found)


def _base(p: Any) -> Path:
    return place_of(p) if isinstance(p, ParamTree) else ()


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model that returns activations too; made by ``pt.capture``."""

    f: Callable[..., Any]
    patterns: tuple[Any, ...]
    inputs: bool

    def __over__(self, change: Callable[[Any], Any]) -> "Captured":
        # The same transform of the model that it is changed to; transforms further in ask for it.
        return dataclasses.replace(self, f=change(self.f))

    def __call__(self, p: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, ParamTree]:
        seen = _Activations(dict.fromkeys(self.patterns), self.inputs, False, _base(p))
        return _run(self.f, p, seen, inputs, kwargs, "capture")


def capture(
    f: Callable[P, R], pattern: Patterns = ".*", inputs: bool = False
) -> Callable[P, tuple[R, ParamTree]]:
    """Returns a model that returns activations too: ``(params, *inputs) -> (output, activations)``.

    The activations are a tree of the outputs of the layers whose names match, as ``path/output``. A
    further call on the same scope is ``path/output1``, and so on; so is that of a layer which another
    layer calls on its own scope. What a model sows under a layer that matches, with
    ``p.sow(name, value)``, is ``path/name``. In ``nn.Repeat``, ``nn.Vmap`` and ``pt.scan`` they are
    stacked along a first axis. Nothing is paid where nothing is captured.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``, also one made by another transform.
      pattern: a pattern, or several, for the names of layers, or of their outputs, such as
        ``dense0_output``; the name of the model itself is empty.
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
    captured: Any = Captured(f, patterns, inputs)
    return captured


class Intervened:
    """A model with replaced activations; made by ``pt.intervene``."""

    def __init__(self, f: Callable[..., Any], rules: Mapping[Any, Any]) -> None:
        self.f, self.rules = f, dict(rules)

    def __over__(self, change: Callable[[Any], Any]) -> "Intervened":
        return Intervened(change(self.f), self.rules)

    def __call__(self, p: Any, *inputs: Any, **kwargs: Any) -> Any:
        seen = _Activations(self.rules, False, True, _base(p))
        return _run(self.f, p, seen, inputs, kwargs, "intervene")[0]

    def _identity(self) -> Any:
        # Arrays are compared by identity, as they may be traced.
        plain = {
            p: v if callable(v) or isinstance(v, int | float) else id(v) for p, v in self.rules.items()
        }
        return self.f, *((pattern, type(value), value) for pattern, value in plain.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervened) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def intervene(f: Callable[P, R], rules: Mapping[Any, Any]) -> Callable[P, R]:
    """Returns a model in which the outputs of some layers, or sown values, are replaced on the way.

    The gradient with respect to an activation is that of ``jax.grad`` with respect to what is added to
    it here. A value that is a stack, as ``pt.capture`` gives it, is taken copy by copy, and one of the
    shape of a copy is that of all. To change one copy alone, ``pt.unstack`` the parameters.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``, also one made by another transform.
      rules: patterns to arrays, numbers, or functions ``fn(name, value)`` of the value that would be
        there; the first that matches wins. A pattern matches the name of a layer, for all calls from
        outside of it; of an output as ``pt.capture`` gives it, such as ``blocks_output1`` for what a
        ``nn.Repeat`` calls; or of a sown value.

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
    intervened: Any = Intervened(f, rules)
    return intervened
