"""Models in training: they may draw random numbers and write state, and stay pure functions.

There is no mode to switch. ``pt.training(f)`` is a new function, called with the same tree as ``f``.
Its scope can draw keys and write state, and the returned tree holds what was written.
"""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, ScopeError
from paramtree.core.pytrees import open_tree
from paramtree.core.structure import STATE, Path
from paramtree.core.tree import ParamTree, flatten, located, place_of, unflatten
from paramtree.initializers.draw import check_key, path_key, path_words
from paramtree.model.run import Run
from paramtree.model.scope import Cells, Scope, level_of, run_of, with_state, write
from paramtree.model.traces import current_trace, for_tree_function, replayed, within

__all__ = ["TrainingModel", "training"]


class _Call:
    """The data that the scopes of one call under ``training`` share."""

    __slots__ = ("__weakref__", "draws", "leaves", "slots", "trace")

    def __init__(self, leaves: list[Any], slots: dict[Path, int]) -> None:
        self.leaves, self.slots = leaves, slots
        self.draws: Counter[Path] = Counter()
        self.trace = current_trace()


class Training(Run):
    """The run of a model in training."""

    __slots__ = ("_call", "_trace", "key_of_call")

    training = True

    def __init__(self, call: _Call, key: Any, trace: Any) -> None:
        self._call, self.key_of_call = call, key
        self._trace = trace  # in which the scope was made

    def update(self, path: Path, value: Any, like: Any) -> Any:
        """Writes state; for its errors see ``Scope.update``."""
        call, name, at = self._call, join(path), path[-2] if len(path) > 1 else "block"
        slot = call.slots.get(path, -1)
        if slot < 0:
            raise ScopeError(
                f"`{name}` cannot be written: it is no leaf of the tree that the model was called "
                "with, so the call cannot return it. Insert it into the parameters before the call."
            )
        old = call.leaves[slot]
        want, have, shown = ((shape_of(v), dtype_of(jnp.asarray(v))) for v in (old, value, like))
        if have == shown and all(d and jnp.issubdtype(d, jnp.floating) for d in (want[1], have[1])):
            value, have = value.astype(want[1]), (have[0], want[1])  # the scope shows it in this dtype
        if want != have:
            raise MismatchError(
                f"`{name}` holds {want[1]}{want[0]} and cannot be given {have[1]}{have[0]}: state "
                "keeps its shape and dtype, so that a training step is compiled only once."
            )
        if kind := next(iter(within(call.trace)[::-1]), ""):
            raise ScopeError(
                f"`{name}` is written inside a jax transform, {kind}, within the model, and the value "
                "cannot get out of it. Call pt.training inside the transform and return the new tree "
                f"from it: `y, new = {kind.split()[0]}(pt.training(layer))(p[{at!r}], x)`, and then "
                f"`p.update({at!r}, new)`. {_LOOPS}"
            )
        call.leaves[slot] = value
        return value

    def sources(self, paths: Sequence[Path | None]) -> list[Any]:
        """Returns the values that the call has now at some paths."""
        slots, leaves = self._call.slots, self._call.leaves
        return [leaves[slots[path]] if path in slots else None for path in paths]

    def check_fresh(self, cells: Cells, chosen: Sequence[int]) -> None:
        """Raises ScopeError if state was written since a verb made these values from it."""
        slots, leaves = self._call.slots, self._call.leaves
        for cell in chosen:
            path = cells.paths[cell]
            if path in slots and leaves[slots[path]] is not cells.sources[cell]:
                raise ScopeError(
                    f"`{join(path)}` was written after a verb, such as pt.cast, made this scope, which "
                    "still shows the old value. Apply the verb again after the write, or call the "
                    "layers that share this state on one scope."
                )

    def key(self, path: Path) -> jax.Array:
        """Draws a key; for its errors see ``Scope.key``."""
        call = self._call
        if self.key_of_call is None:
            where = located(path) if path else "the model"
            raise ScopeError(
                f"{where} draws random numbers, but no key was given: call "
                "pt.training(model)(params, x, key=jax.random.key(0)) with a new key each step."
            )
        if kind := replayed(within(self._trace), False) or replayed(within(call.trace), True):
            raise ScopeError(
                f"{located(path)} draws random numbers inside a jax transform, {kind}, within the "
                f"model, which would repeat the same numbers. {_instead(kind, path)}"
            )
        call.draws[path] += 1
        return jax.random.fold_in(path_key(self.key_of_call, path_words(path)), call.draws[path])

    def split(self, scope: Any, n: int) -> Any:
        """Returns a key for each iteration, if there is a key."""
        return None if self.key_of_call is None else jax.random.split(scope.key(), n)

    def inside(self, tree: ParamTree, part: Any) -> Any:
        """Returns the scope of a call of its own."""
        return _begin(tree, part)[0]

    def results(self, scope: Any) -> Any:
        """Returns the state."""
        structure, leaves = flatten(level_of(scope))
        return [leaf for leaf, kind in zip(leaves, structure.kinds, strict=True) if kind == STATE]

    def absorb(self, scope: Any, results: Sequence[Any]) -> None:
        """Writes the state."""
        if results:
            write(scope, with_state(level_of(scope), results))

    def token(self) -> tuple["_Token", tuple[Any, ...]]:
        """Returns what makes the run again, and the key."""
        # The number of draws tells jax.jit that a second call differs from the first. The reference is
        # weak: jax keeps static data alive, and with it would keep all the leaves. For the same reason
        # the key is an argument of a transform; but for jax.tree.map it is no leaf.
        call, hidden = self._call, for_tree_function()
        key = self.key_of_call if hidden else None
        token = _Token(weakref.ref(call), call.draws.total(), current_trace(), self._trace, key)
        return token, () if hidden or self.key_of_call is None else (self.key_of_call,)


@dataclasses.dataclass(frozen=True)
class _Token:
    """Makes the run of a scope that went through a transform."""

    call: "weakref.ref[_Call]"
    draws: int
    flattened: Any = dataclasses.field(compare=False)  # the trace in which that was done
    made: Any = dataclasses.field(compare=False)  # the trace in which the scope was made
    key: Any = dataclasses.field(compare=False)  # unless it is among the arrays

    def again(self, key: Any = None) -> Training | None:
        call, trace = self.call(), current_trace()
        if call is None:
            return None
        # In one trace, as in jax.tree.map, the scope does not become an argument.
        made = self.made if trace == self.flattened else trace
        return Training(call, self.key if key is None else key, made)


_LOOPS = "For loops there is pt.scan(body, p, carry, xs); for copies of a layer, nn.Repeat and nn.Vmap."


def _instead(kind: str, path: Path) -> str:
    """Returns what to write instead of a draw or a write in a transform."""
    if kind in ("scan", "fori_loop", "while_body", "while_cond"):
        return _LOOPS
    if kind in ("vmap", "shard_map"):
        return f"{_LOOPS} Or call the layer on the whole batch."
    if kind.startswith(("jit", "pjit", "checkpoint", "remat")):
        name = path[-1] if path else "block"
        return f"Give the scope as an argument, as in `{kind.split()[0]}(layer)(p[{name!r}], x)`."
    return "Draw the key outside, with p.key(), and pass it in."


def _begin(params: Any, key: jax.Array | None) -> tuple[Any, _Call, Any]:
    """Returns the scope of a new call, its data, and the opened tree."""
    source = open_tree(params)
    structure, place = source.structure, source.place
    slots = {(*place, *path): slot for path, slot in structure.entries()}
    call = _Call(list(source.leaves), slots)
    cells = Cells(call.leaves, [(*place, *path) for path in structure.canonical])
    tree = unflatten(structure, tuple(range(len(call.leaves))), place)
    return Scope(tree, cells, Training(call, key, call.trace)), call, source


@dataclasses.dataclass(frozen=True)
class TrainingModel:
    """A model in training; made by ``pt.training``."""

    f: Callable[..., Any]

    def __call__(
        self, params: Any, *inputs: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        if not isinstance(params, ParamTree) and not hasattr(type(params), "__open__"):
            raise TypeError(
                f"pt.training(model) is called with a parameter tree first, but found "
                f"{type(params).__name__}: pt.training(model)(params, x, key=key)."
            )
        if key is not None:
            check_key(key)
        run = run_of(params)
        if run.recording:  # a model that is being initialised is not yet in training
            return self.f(params, *inputs, **kwargs), params
        if key is None and run.training and run.key_of_call is not None:
            key = run.key(place_of(params))
        scope, call, source = _begin(params, key)
        output = self.f(scope, *inputs, **kwargs)
        return output, source.restore(call.leaves)


def training(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a model in training: ``(params, *inputs, key=None) -> (output, params)``.

    In training, layers may draw random numbers, from keys that depend on ``key`` and their paths, and
    write state; the returned tree holds what they wrote. The model itself is for inference and can do
    neither. ``training`` of equal models is equal, so jitted training steps share a cache.

    Within a model in training, ``y, new = jax.checkpoint(pt.training(layer))(p.block, x)`` calls a
    layer that writes state in a transform, and ``p.update("block", new)`` writes that state. The key
    may be left out there.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.

    Raises:
      ScopeError: when called: a layer draws without a key, or draws or writes where a jax transform
        would repeat or lose that.
      TypeError: when called: ``params`` is not a parameter tree, or ``key`` not a PRNG key.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Dropout(0.5)
      >>> params = pt.init(net, jax.random.key(0), jnp.ones(4))
      >>> y, params = pt.training(net)(params, jnp.ones(4), key=jax.random.key(1))
      >>> sorted({float(v) for v in y} | {0.0, 2.0}), net(params, jnp.ones(2))
      ([0.0, 2.0], Array([1., 1.], dtype=float32))
    """
    return TrainingModel(f)
