"""Models in training: they may draw random numbers and write state, and stay pure functions.

There is no mode to switch. ``pt.training(f)`` is a new function, called with the same tree as ``f``.
Its scope can draw keys and write state, and the returned tree holds what was written.
"""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, ScopeError
from paramtree.core.pytrees import open_tree
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, located, unflatten
from paramtree.model.draw import check_key, path_key, path_words
from paramtree.model.scope import Scope

__all__ = ["Training", "TrainingModel", "trace_state", "training"]


def trace_state() -> Any:
    """Returns a value that identifies jax's current trace."""
    import jax.extend  # not at import: only training needs it

    get = getattr(jax.extend.core, "get_opaque_trace_state", None)
    return (get or jax.core.get_opaque_trace_state)()


class _Call:
    """The data that the scopes of one call under ``training`` share."""

    __slots__ = ("__weakref__", "draws", "leaves", "slots", "trace")

    def __init__(self, leaves: list[Any], slots: dict[Path, int]) -> None:
        self.leaves, self.slots = leaves, slots
        self.draws: Counter[Path] = Counter()
        self.trace = trace_state()


class Training:
    """The run of a model in training."""

    __slots__ = ("_call", "_key")

    training = True

    def __init__(self, call: _Call, key: jax.Array | None) -> None:
        self._call, self._key = call, key

    @property
    def leaves(self) -> list[Any]:
        """The current values of all leaves."""
        return self._call.leaves

    @property
    def can_draw(self) -> bool:
        """Whether the call was given a key."""
        return self._key is not None

    def on_read(self, path: Path) -> None:
        """Ignores reads."""

    def update(self, path: Path, value: Any) -> None:
        """Writes state; for its errors see ``Scope.update``."""
        call, name = self._call, join(path)
        slot = call.slots[path]
        old = call.leaves[slot]
        want, have = ((shape_of(v), dtype_of(jnp.asarray(v))) for v in (old, value))
        if want != have:
            raise MismatchError(
                f"`{name}` holds {want[1]}{want[0]} and cannot be given {have[1]}{have[0]}: state "
                "keeps its shape and dtype, so that a training step is compiled only once."
            )
        if trace_state() != call.trace:
            raise ScopeError(
                f"`{name}` is written inside a jax transform (scan, cond, vmap, checkpoint, ...) "
                "within the model, and the new value cannot get out of it. Call pt.training inside "
                "the transform and return the new tree from it, or write outside of it."
            )
        call.leaves[slot] = value

    def key(self, path: Path) -> jax.Array:
        """Draws a key; for its errors see ``Scope.key``."""
        draws = self._call.draws
        if self._key is None:
            where = located(path) if path else "the model"
            raise ScopeError(
                f"{where} draws random numbers, but no key was given: call "
                "pt.training(model)(params, x, key=jax.random.key(0)) with a new key each step."
            )
        draws[path] += 1
        return jax.random.fold_in(path_key(self._key, path_words(path)), draws[path])

    def flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Returns the key, and a function that makes the run again."""
        # The number of draws tells jax.jit that a second call differs from the first. The reference is
        # weak: jax keeps static data alive, and with it would keep all the leaves.
        return (self._key,), _Again(weakref.ref(self._call), self._call.draws.total())


@dataclasses.dataclass(frozen=True)
class _Again:
    """Makes the run of a scope that went through a transform."""

    call: "weakref.ref[_Call]"
    draws: int

    def __call__(self, key: Any) -> Training | None:
        call = self.call()
        return None if call is None else Training(call, key)


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
        source = open_tree(params)
        structure, place = source.structure, source.place
        slots = {(*place, *path): slot for path, slot in structure.entries()}
        call = _Call(list(source.leaves), slots)
        scope = Scope(
            unflatten(structure, tuple(range(len(source.leaves))), place), Training(call, key), True
        )
        output = self.f(scope, *inputs, **kwargs)
        return output, source.restore(call.leaves)


def training(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a model in training: ``(params, *inputs, key=None) -> (output, params)``.

    In training, layers may draw random numbers, from keys that depend on ``key`` and their paths, and
    write state; the returned tree holds what they wrote. The model itself is for inference and can do
    neither. ``training`` of equal models is equal, so jitted training steps share a cache.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.

    Raises:
      ScopeError: when called: a layer draws without a key, or writes inside a jax transform.
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
