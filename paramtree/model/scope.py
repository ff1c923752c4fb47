"""What a model reads its parameters from: one level of a tree, and the run that is reading it.

A ``ParamTree`` given to a model is the scope of a plain run for inference. Every other run has a
``Scope``: it reads like the tree, and leaves reads, writes and draws to its run.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError, MissingError, ScopeError
from paramtree.core.pytrees import Opened
from paramtree.core.structure import STATE, Path, Structure
from paramtree.core.tree import ParamTree, flatten, located, place_of, unflatten

__all__ = [
    "Inference", "Run", "Scope", "check_scope", "child", "inference", "level_of", "path_of", "run_of",
    "write",
]  # fmt: skip


class Run(Protocol):
    """Why a model is called, and so what reads, writes and draws on its scope do."""

    training: bool
    leaves: Sequence[Any] | None  # the current values by slot, where they may change; else None

    def on_read(self, path: Path) -> None:
        """Records that the model asks for a leaf."""

    def update(self, path: Path, value: Any) -> None:
        """Writes state."""

    def key(self, path: Path) -> jax.Array:
        """Draws a PRNG key for a layer."""

    def flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Returns the arrays of the run, and a function that makes the run again from these."""


class Inference:
    """The run of a model that is called with a tree."""

    __slots__ = ()

    training = False
    leaves = None

    def on_read(self, path: Path) -> None:
        """Ignores reads."""

    def update(self, path: Path, value: Any) -> None:
        """Refuses to write."""
        raise ScopeError(
            f"`{join(path)}` cannot be written: the model was called for inference. Call it as "
            "`output, params = pt.training(model)(params, x)`."
        )

    def key(self, path: Path) -> jax.Array:
        """Refuses to draw."""
        raise ScopeError(
            f"{located(path)} draws random numbers, but the model was called for inference. Call it as "
            "`output, params = pt.training(model)(params, x, key=key)`."
        )

    def flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Returns no arrays, and what makes the run again."""
        return (), Inference


_INFERENCE = Inference()


def inference(tree: ParamTree, name: str) -> Any:
    """Returns an attribute that a tree has as the scope of a run for inference."""
    if name in ("param", "state"):  # without a scope, which would take as long as reading
        return functools.partial(_declared, tree)
    return getattr(Scope(tree, _INFERENCE), name)


def _declared(
    tree: ParamTree, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32
) -> Any:
    return _leaf(tree, name, shape)


def _leaf(scope: ParamTree, name: str, shape: Sequence[int]) -> Any:
    """Returns the leaf of a name; ``Scope.param`` says what is raised."""
    try:
        leaf = scope[name]
    except MissingError as error:
        leaf, problem = scope, str(error)
    else:
        problem = ""
    if isinstance(leaf, ParamTree):
        problem = problem or f"`{join((*path_of(scope), name))}` is a level, not a leaf."
        raise MissingError(
            f"the model needs a leaf `{join((*path_of(scope), name))}` of shape {tuple(shape)}: "
            f"{problem} Call it with the tree that pt.init gives for this model."
        ) from None
    have = shape_of(leaf)
    if have is not None and have != tuple(shape):
        raise MismatchError(
            f"`{join((*path_of(scope), name))}` has shape {have}, but the model needs {tuple(shape)}. "
            "Either the input does not have the size that the tree was initialised for, or the tree "
            "belongs to another model: check the input's shape, or call pt.init again."
        )
    return leaf


_FIELDS = frozenset(("_live", "_run", "_tree", "_flat", "_leaves", "_place", "_structure"))


class Scope(ParamTree):
    """One level of a tree, and the run that is reading it.

    It is an instance of ``ParamTree`` but has none of its fields: everything goes through the level.
    """

    __slots__ = ("_live", "_run", "_tree")

    _tree: ParamTree  # of values, or of slots of the run's leaves
    _run: Any
    _live: bool  # whether the tree holds slots

    def __init__(self, tree: ParamTree, run: Any, live: bool = False) -> None:
        for name, value in (("_tree", tree), ("_run", run), ("_live", live)):
            object.__setattr__(self, name, value)

    def _value(self, child: Any) -> Any:
        """Returns a child of the tree as the model sees it."""
        if type(child) is ParamTree:
            return Scope(child, self._run, self._live)
        return self._run.leaves[child] if self._live else child

    # Reading

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _FIELDS:  # Python probes for protocols
            raise AttributeError(name)
        return self._value(getattr(self._tree, name))

    def __getitem__(self, key: str | int) -> Any:
        return self._value(self._tree[key])

    def __contains__(self, key: object) -> bool:
        return key in self._tree

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def keys(self) -> Any:
        """Returns the names of the children, in order of declaration."""
        return self._tree.keys()

    def values(self) -> Any:
        """Returns the children, in order of declaration."""
        return [self[name] for name in self]

    def items(self) -> Any:
        """Returns the names and the children, in order of declaration."""
        return [(name, self[name]) for name in self]

    def to_dict(self) -> dict[str, Any]:
        """Returns the level as nested dicts."""
        return level_of(self).to_dict()

    def __repr__(self) -> str:
        return repr(level_of(self))

    def _repr_html_(self) -> str:
        return level_of(self)._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        level_of(self)._repr_pretty_(printer, cycle)

    def __reduce__(self) -> tuple[Any, ...]:
        return level_of(self).__reduce__()

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tree, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._tree, name)

    # What a model asks for

    @property
    def training(self) -> bool:
        """Whether the model runs under ``pt.training``."""
        training: bool = self._run.training
        return training

    def param(self, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32) -> Any:
        """Returns the parameter ``name``, checked against the shape that the layer computes.

        Raises:
          MissingError: the tree has no such leaf.
          MismatchError: it has another shape.
        """
        leaf = _leaf(self, name, shape)
        self._run.on_read((*place_of(self._tree), name))
        return leaf

    def state(self, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32) -> Any:
        """Returns the state ``name``, checked as ``param`` does."""
        return self.param(name, shape, initializer, dtype)

    def update(self, name: str, value: Any) -> None:
        """Writes new state of the same shape and dtype; the call returns it in its tree.

        Raises:
          MissingError: the state was not declared.
          MismatchError: the value has another shape or dtype.
          ScopeError: the model is not in training, or the write is inside a jax transform in the model.
        """
        if self._run.training:
            self._tree[name]  # raises if there is none
        self._run.update((*place_of(self._tree), name), value)

    def key(self) -> jax.Array:
        """Draws a PRNG key, a new one each time, from the call's key and the layer's path.

        Raises:
          ScopeError: the call was given no key.
        """
        key: jax.Array = self._run.key(place_of(self._tree))
        return key

    # Verbs and transforms give a scope of the same run

    def __open__(self) -> Opened:
        structure, leaves = flatten(level_of(self))
        place, run = place_of(self._tree), self._run

        def rebuild(part: Structure, leaves: Sequence[Any], unnamed: Any) -> Scope:
            return Scope(unflatten(part, leaves, place), run)

        return Opened(structure, leaves, rebuild, structure.kinds, place)


def run_of(scope: Any) -> Any:
    """Returns the run of a scope; None for a tree, which is the scope of a plain run for inference."""
    return scope._run if type(scope) is Scope else None


def level_of(scope: Any) -> ParamTree:
    """Returns the level that a scope reads, with its current values, as a tree."""
    if type(scope) is not Scope:
        tree: ParamTree = scope
        return tree
    if not scope._live:
        return scope._tree
    structure, slots = flatten(scope._tree)
    return unflatten(structure, tuple(scope._run.leaves[slot] for slot in slots), place_of(scope._tree))


def path_of(scope: Any) -> Path:
    """Returns the path of a scope in the tree that the model was called with."""
    return place_of(scope._tree if type(scope) is Scope else scope)


def check_scope(scope: Any) -> None:
    """Raises TypeError if the first argument of a layer is not a scope."""
    if not isinstance(scope, ParamTree) and not hasattr(scope, "param"):
        raise TypeError(
            f"a model is called with its parameters first, model(params, x), but found "
            f"{type(scope).__name__} in their place. pt.init(model, key, x) makes the parameters; "
            "pt.from_tree(mapping) turns a nested mapping into a tree."
        )


_NOTHING = Structure.intern((), (), ())


def child(scope: Any, name: str) -> Any:
    """Returns the child of a scope, or an empty level if the tree has none of that name.

    A layer without parameters has a level in the tree that ``pt.init`` makes, but not in one built from
    the names in a file. It still runs; a layer that needs a parameter says which.

    Raises:
      TypeError: the scope is not one.
    """
    if type(scope) is ParamTree:
        level = flatten(scope)[0].children().get(name)
        if type(level) is tuple or type(level) is slice:
            return scope[name]
        return unflatten(_NOTHING, (), (*place_of(scope), name))
    check_scope(scope)
    if type(scope) is Scope:
        return Scope(child(scope._tree, name), scope._run, scope._live)
    return scope[name]


def write(scope: Scope, tree: ParamTree) -> None:
    """Writes all state at and below the level of a scope, from a tree of the same structure."""
    structure, leaves = flatten(tree)
    for path, slot in zip(structure.canonical, range(len(leaves)), strict=True):
        if structure.kinds[slot] == STATE:
            scope._run.update((*place_of(scope._tree), *path), leaves[slot])


def _flatten(scope: Scope) -> tuple[tuple[Any, ...], Any]:
    # A scope that is an argument of a transform keeps its run, so that dropout still works under
    # jax.checkpoint, and its path, so that a layer still draws from its own key.
    structure, leaves = flatten(level_of(scope))
    more, run = scope._run.flatten()
    return (*leaves, *more), (structure, place_of(scope._tree), run)


def _flatten_with_keys(scope: Scope) -> tuple[Any, Any]:
    leaves, static = _flatten(scope)
    return [(jax.tree_util.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], static


def _unflatten(static: Any, leaves: Any) -> Any:
    structure, place, run = static
    count = len(structure.kinds)
    tree = unflatten(structure, tuple(leaves[:count]), place)
    again = run(*leaves[count:])
    return tree if again is None else Scope(tree, again)


jax.tree_util.register_pytree_with_keys(Scope, _flatten_with_keys, _unflatten, _flatten)
