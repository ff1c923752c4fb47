"""Models in training: they may draw random numbers and write state, and stay pure functions.

There is no mode to switch. ``pt.training(f)`` is a new function, called with the same tree as ``f``.
Its scope can draw keys and write state, and the returned tree holds what was written.
"""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, ScopeError
from paramtree.core.pytrees import Opened, open_tree
from paramtree.core.structure import STATE, Path
from paramtree.core.tree import ParamTree, located, place_of, unflatten
from paramtree.initializers.keys import check_key, draw_key
from paramtree.model.run import Run
from paramtree.model.scope import Cells, Scope, level_of, run_of, with_leaves, write
from paramtree.model.traces import current_trace, flattened_for, replayed, within
from paramtree.typing import InTraining, R

__all__ = ["TrainingModel", "training"]


class _Call:
    """The data that the scopes of one call under ``training`` share."""

    __slots__ = ("__weakref__", "closed", "draws", "fixed", "leaves", "place", "slots", "states",
                 "trace", "words", "written")  # fmt: skip

    def __init__(self, source: Opened, fixed: bool) -> None:
        structure, self.place, self.fixed = source.structure, source.place, fixed
        self.leaves = list(source.leaves)
        self.slots = {(*self.place, *path): slot for path, slot in structure.entries()}
        self.states = {slot for slot, kind in enumerate(structure.kinds) if kind == STATE}
        self.written: set[int] = set()
        self.closed: dict[int, str] = {}  # state that was read in a function whose trace jax keeps
        self.draws, self.words = Counter[Path](), dict[int, Path]()
        self.trace = current_trace()


class Training(Run):
    """The run of a model in training."""

    __slots__ = ("_call", "_closed", "_trace", "key_of_call")

    training = True

    def __init__(self, call: _Call, key: Any, trace: Any, closed: str = "") -> None:
        self._call, self.key_of_call = call, key
        self._trace = trace  # in which the scope was made, or became an argument
        self._closed = closed  # the transform in which it was closed over before that

    def update(self, path: Path, value: Any, like: Any) -> Any:
        """Writes state; for its errors see ``pt.Scope``."""
        call, name = self._call, join(path)
        slot = call.slots.get(path, -1)
        if slot < 0 or (call.fixed and slot not in call.states):
            what = "no leaf of the tree that the model was called with" if slot < 0 else "a parameter"
            raise ScopeError(
                f"`{name}` cannot be written, as it is {what}: a model writes what it declares with "
                "p.state, and what is in the tree that it is called with."
            )
        old, value = call.leaves[slot], jnp.asarray(value)
        want, have, shown = ((shape_of(v), dtype_of(v)) for v in (old, value, like))
        if have == shown and all(d and jnp.issubdtype(d, jnp.floating) for d in (want[1], have[1])):
            value, have = value.astype(want[1]), (have[0], want[1])  # the scope shows it in this dtype
        if want != have:
            raise MismatchError(
                f"`{name}` holds {want[1]}{want[0]} and cannot be given {have[1]}{have[0]}: state "
                "keeps its shape and dtype, so that a training step is compiled only once."
            )
        if kind := next(iter(within(call.trace)[::-1]), ""):
            root = len(path) <= len(call.place) + 1  # a layer on the scope of the whole call
            at, layer = ("", "p") if root else (path[-2], f"p[{path[-2]!r}]")
            how = f"`y, new = {kind.split()[0]}(pt.training(layer))({layer}, x)`, and then "
            raise ScopeError(
                f"`{name}` is written inside a jax transform, {kind}, within the model, and the value "
                "cannot get out of it. Call pt.training inside the transform and return the new tree "
                f"from it: {how if kind.startswith(('jit', 'checkpoint')) else ''}"
                f"`p.update({at!r}, new)`. {_LOOPS}"
            )
        if slot in call.closed:
            raise ScopeError(
                f"`{name}` is written after it was read inside a jax transform, {call.closed[slot]}, "
                "by a function that closes over the scope. jax keeps the trace of that function, which "
                "would go on reading the old value: give the scope to it as an argument."
            )
        call.leaves[slot] = value
        call.written.add(slot)
        return value

    def sources(self, paths: Sequence[Path | None]) -> tuple[list[Any], Any]:
        """Returns the values that the call has now at some paths, and the current trace."""
        slots, leaves = self._call.slots, self._call.leaves
        return [leaves[slots[path]] if path in slots else None for path in paths], current_trace()

    def reading(self, cells: Cells, chosen: Sequence[int]) -> None:
        """Checks that the chosen values are not older than what a verb made them from.

        Notes what a function closes over whose trace jax keeps: it must not be written later.
        """
        call = self._call
        if not call.states and not call.written:
            return
        slots = [(cell, call.slots.get(cells.paths[cell] or (), -1)) for cell in chosen]
        state = [(cell, slot) for cell, slot in slots if slot in call.states or slot in call.written]
        for cell, slot in state:
            if cells.sources is not None and call.leaves[slot] is not cells.sources[cell]:
                raise ScopeError(
                    f"`{join(cells.paths[cell] or ())}` was written after a verb, such as pt.cast, or "
                    "another call made this scope, which still shows the old value. Apply the verb "
                    "again after the write, or call the layers that share this state on one scope."
                )
        kind = replayed(within(cells.trace), False) if state else ""
        if kind and kind != "vmap":
            call.closed.update((slot, kind) for _, slot in state)

    def key(self, path: Path) -> jax.Array:
        """Draws a key; for its errors see ``Scope.key``."""
        call = self._call
        if self.key_of_call is None:
            raise ScopeError(
                f"{located(path) if path else 'the model'} draws random numbers, but no key was given: "
                "call pt.training(model)(params, x, key=jax.random.key(0)) with a new key each step."
            )
        if kind := self._closing() or replayed(within(call.trace), True):
            raise ScopeError(
                f"{located(path)} draws random numbers inside a jax transform, {kind}, within the "
                f"model, which would repeat the same numbers. {_instead(kind, path)}"
            )
        call.draws[path] += 1
        return draw_key(self.key_of_call, (*path, str(call.draws[path])), call.words)

    def _closing(self) -> str:
        """Returns the transform that keeps the trace of a function which closes over the scope."""
        return self._closed or replayed(within(self._trace), False)

    def split(self, scope: Any, n: int) -> Any:
        """Returns a key for each iteration, if there is a key."""
        return None if self.key_of_call is None else jax.random.split(scope.key(), n)

    def inside(self, tree: ParamTree, part: Any, fixed: bool = False) -> Any:
        """Returns the scope of a call of its own."""
        return _begin(tree, part, fixed)[0]

    def results(self, scope: Any, all_state: bool = False) -> dict[int, Any]:
        """Returns the state that was written, by slot, or all."""
        call = scope._run._call
        slots = call.states if all_state else call.written
        return {slot: call.leaves[slot] for slot in sorted(slots)}

    def absorb(self, scope: Any, results: Mapping[int, Any]) -> None:
        """Writes state."""
        write(scope, with_leaves(level_of(scope), results), results)

    def token(self) -> tuple["_Token", tuple[Any, ...]]:
        """Returns what makes the run again, and the key if it is to be an argument."""
        # The number of draws tells jax.jit that a second call differs from the first. The reference is
        # weak: jax keeps static data alive, and with it would keep all the leaves. For the same reason
        # the key is an argument.
        call, purpose = self._call, flattened_for()
        argument = purpose == "jit" and self.key_of_call is not None
        how = (self._closing(), None) if argument else (self._closed, self.key_of_call)
        token = _Token(
            weakref.ref(call), call.draws.total(), argument, purpose != "tree.map", self._trace, *how
        )
        return token, (self.key_of_call,) if argument else ()


@dataclasses.dataclass(frozen=True)
class _Token:
    """Makes the run of a scope that went through a transform."""

    call: "weakref.ref[_Call]"
    draws: int
    argument: bool  # whether the key is an argument, and so the scope is
    keeps_place: bool
    made: Any = dataclasses.field(compare=False)  # the trace in which the scope was made
    closed: str = dataclasses.field(compare=False)
    key: Any = dataclasses.field(compare=False)  # unless it is an argument

    def again(self, *key: Any) -> Training | None:
        call = self.call()
        if call is None:
            return None
        if not self.argument or not key:
            return Training(call, self.key, self.made, self.closed)
        return Training(call, key[0], current_trace(), self.closed)


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


def _begin(params: Any, key: Any, fixed: bool, around: Any = None) -> tuple[Any, _Call, Any]:
    """Returns the scope of a new call, in which only state may change if it is fixed, and its data."""
    source = open_tree(params)
    call, structure = _Call(source, fixed), source.structure
    cells = Cells(call.leaves, [(*call.place, *path) for path in structure.canonical], call.trace)
    tree = unflatten(structure, tuple(range(len(call.leaves))), call.place)
    run = Training(call, key, call.trace)
    return Scope(tree, cells, around.around(run) if around else run), call, source


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
        scope, call, source = _begin(params, key, fixed=run.training, around=run)
        output = self.f(scope, *inputs, **kwargs)
        return output, source.restore(call.leaves)


def training(f: Callable[..., R]) -> InTraining[R]:
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
    model: Any = TrainingModel(f)
    return model
