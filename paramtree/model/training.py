"""Models in training: they may draw random numbers and write state, and stay pure functions.

There is no mode to switch. ``pt.training(f)`` is another function than ``f``, called with the same
tree; its scope has a key to draw from and a place to write to, and the tree that comes back holds
what was written.
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
from paramtree.core.structure import STATE, Node, Path
from paramtree.core.tree import ParamTree, _flatten, _rebuild, register, whole
from paramtree.model.draw import check_key, path_key, path_words

__all__ = ["training"]


class _Session:
    """What one call under ``training`` shares among its scopes."""

    __slots__ = ("__weakref__", "draws", "leaves", "trace")

    def __init__(self, leaves: list[Any]) -> None:
        self.leaves = leaves
        self.draws: Counter[Path] = Counter()
        self.trace = trace_state()


def trace_state() -> Any:
    import jax.extend  # not at import: only training needs it

    get = getattr(jax.extend.core, "get_opaque_trace_state", None)
    return (get or jax.core.get_opaque_trace_state)()


class TrainingScope(ParamTree):
    """The scope of a model in training: reads like the tree, and can draw keys and write state."""

    __slots__ = ("_key", "_session")

    _session: _Session
    _key: jax.Array | None

    @staticmethod
    def make(
        tree: ParamTree, leaves: Sequence[Any], session: _Session, key: jax.Array | None
    ) -> "TrainingScope":
        """Returns a scope that looks at a tree's level, over these leaves."""
        scope = object.__new__(TrainingScope)
        for name, value in (
            ("_structure", tree._structure),
            ("_node", tree._node),
            ("_place", tree._place),
            ("_leaves", leaves),
            ("_session", session),
            ("_key", key),
        ):
            object.__setattr__(scope, name, value)
        return scope

    def _view(self, node: Node) -> "TrainingScope":
        return TrainingScope.make(super()._view(node), self._leaves, self._session, self._key)

    @property
    def training(self) -> bool:
        """Whether the model runs under ``pt.training``: it does."""
        return True

    def update(self, name: str, value: Any) -> None:
        """Writes new state of the same shape and dtype, which the call returns in its tree.

        Raises:
          MissingError: the state was not declared.
          MismatchError: the value has another shape or dtype.
          ScopeError: the write is inside a jax transform within the model, and cannot get out.
        """
        node = self._node or self._structure.root
        slot = node.children.get(name)
        full = join((*self._path(), name))
        if not isinstance(slot, int) or slot < 0:
            raise self._missing(node, name, slot)
        old = self._leaves[slot]
        want, have = ((shape_of(v), dtype_of(jnp.asarray(v))) for v in (old, value))
        if want != have:
            raise MismatchError(
                f"`{full}` holds {want[1]}{want[0]} and cannot be given {have[1]}{have[0]}: state "
                "keeps its shape and dtype, so that a training step is compiled only once."
            )
        session = self._session
        if self._leaves is not session.leaves or trace_state() != session.trace:
            raise ScopeError(
                f"`{full}` is written inside a jax transform (scan, cond, vmap, checkpoint, ...) "
                "within the model, and the new value cannot get out of it. Call pt.training inside "
                "the transform and return the new tree from it, or write outside of it."
            )
        session.leaves[slot] = value

    def write(self, tree: ParamTree) -> None:
        """Writes all state at and below this level, from a tree of the same form."""
        tree = whole(tree)
        for path, slot in tree._structure.entries():
            if tree._structure.kinds[slot] == STATE:
                *levels, name = path
                scope: Any = self
                for level in levels:
                    scope = scope[level]
                scope.update(name, tree._leaves[slot])

    @property
    def can_draw(self) -> bool:
        """Whether the call was given a key."""
        return self._key is not None

    def key(self) -> jax.Array:
        """Draws a PRNG key, a new one each time, from the call's key and the layer's path.

        Raises:
          ScopeError: the call was given no key.
        """
        session, path = self._session, self._path()
        if self._key is None:
            where = f"`{join(path)}`" if path else "the model"
            raise ScopeError(
                f"{where} draws random numbers, but no key was given: call "
                "pt.training(model)(params, x, key=jax.random.key(0)) with a new key each step."
            )
        session.draws[path] += 1
        return jax.random.fold_in(path_key(self._key, path_words(path)), session.draws[path])


def _flatten_scope(scope: TrainingScope) -> tuple[Any, Any]:
    # What goes through a transform as an argument keeps its session, so that a layer under
    # jax.checkpoint still drops out, and its place, so that it still draws from its own key. The
    # number of draws tells jax.jit that a second call is another one. The session is there weakly:
    # jax keeps what it compares, and would keep all the leaves.
    leaves, structure = _flatten(scope)
    session = scope._session
    static = structure, weakref.ref(session), scope._path(), session.draws.total()
    return (*leaves, scope._key), static


def _flatten_scope_with_keys(scope: TrainingScope) -> tuple[Any, Any]:
    leaves, static = _flatten_scope(scope)
    return [(jax.tree_util.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], static


def _rebuild_scope(static: Any, leaves: Any) -> TrainingScope:
    structure, session, place, _ = static
    *leaves, key = leaves
    return TrainingScope.make(_rebuild(structure, leaves, place), tuple(leaves), session(), key)


register(TrainingScope, _flatten_scope, _flatten_scope_with_keys, _rebuild_scope)


@dataclasses.dataclass(frozen=True)
class _Training:
    f: Callable[..., Any]

    def __call__(
        self, params: ParamTree, *inputs: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> tuple[Any, ParamTree]:
        if not isinstance(params, ParamTree):
            raise TypeError(
                f"pt.training(model) is called with a parameter tree first, but found "
                f"{type(params).__name__}: pt.training(model)(params, x, key=key)."
            )
        if key is not None:
            check_key(key)
        params = whole(params)
        session = _Session(list(params._leaves))
        scope = TrainingScope.make(params, session.leaves, session, key)
        output = self.f(scope, *inputs, **kwargs)
        return output, params._with(session.leaves)


def training(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a model in training: ``(params, *inputs, key=None) -> (output, params)``.

    Under it, layers may draw random numbers, from a key that depends on ``key`` and the layer's
    path, and write state; the tree that comes back holds what they wrote. Called as itself, the
    model is for inference and can do neither. Equal models give equal results here, so a jitted
    training step shares its cache.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.

    Raises:
      ScopeError: on calling: a layer draws without a key, or writes where the value cannot get out.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Dropout(0.5)
      >>> params = pt.init(net, jax.random.key(0), jnp.ones(4))
      >>> y, params = pt.training(net)(params, jnp.ones(4), key=jax.random.key(1))
      >>> sorted({float(v) for v in y} | {0.0, 2.0}), net(params, jnp.ones(2))
      ([0.0, 2.0], Array([1., 1.], dtype=float32))
    """
    return _Training(f)
