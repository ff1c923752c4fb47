"""What a model reads its parameters from: one level of a tree, and the run that is reading it.

A ``ParamTree`` given to a model is the scope of a run for inference. Every other run has a ``Scope``:
it reads like the tree, and leaves declarations, writes and draws to its run. A verb on a scope, and
``jax.tree.map``, give a scope of the same run, so a model in training never stops training.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError, MissingError, ParamTreeError, ScopeError
from paramtree.core.pytrees import Opened
from paramtree.core.structure import PARAM, STATE, Path, Structure
from paramtree.core.tree import ParamTree, flatten, located, place_of, unflatten
from paramtree.model.run import INFERENCE

__all__ = [
    "NOTHING", "Cells", "Scope", "child", "inference", "level_of", "not_a_child",
    "run_of", "scope_of", "with_leaves", "write",
]  # fmt: skip


def inference(tree: ParamTree, name: str) -> Any:
    """Returns an attribute that a tree has as the scope of a run for inference."""
    if name in ("param", "state"):  # without a scope, which would take as long as reading
        return functools.partial(INFERENCE.declare, tree, name)
    return getattr(scope_of(tree, INFERENCE), name)


class Cells:
    """The values that the scopes of one tree show.

    Attributes:
      values: one for each leaf.
      paths: what each is, or was made from by a verb, in the tree that the model was called with.
      sources: what was there then; None if the values are the run's own.
      trace: the trace in which the scope was made.
      writable: whether the names of the scope are those of the tree.
    """

    __slots__ = ("paths", "sources", "trace", "values", "writable")

    def __init__(self, values: list[Any], paths: Sequence[Path | None], trace: Any) -> None:
        self.values, self.paths, self.trace = values, tuple(paths), trace
        self.sources: list[Any] | None = None
        self.writable = True


class _Method:
    """A method of a scope. One that is taken for a child says that such a child is read by item."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, scope: Any, owner: Any) -> Any:
        return self if scope is None else _Bound(self._function, scope)


class _Bound(functools.partial[Any]):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python probes for protocols
            raise AttributeError(name)
        raise not_a_child(self.func.__name__)


def not_a_child(name: str) -> ParamTreeError:
    """Returns the error for a method that is taken for a child."""
    return ParamTreeError(
        f"`p.{name}` is a method that every scope has, so a child of that name is read by item: write "
        f"p[{name!r}], or use another name."
    )


_FIELDS = frozenset(("_cells", "_run", "_tree", "_flat", "_leaves", "_place", "_structure"))


class Scope(ParamTree):
    """One level of a tree, and the run that is reading it.

    It is an instance of ``ParamTree`` but has none of its fields: everything goes through the level.
    """

    __slots__ = ("_cells", "_run", "_tree")

    _tree: ParamTree  # of positions in the cells
    _cells: Cells
    _run: Any

    def __init__(self, tree: ParamTree, cells: Cells, run: Any) -> None:
        for name, value in (
            ("_tree", tree),
            ("_cells", cells),
            ("_run", run),
            ("_place", place_of(tree)),
        ):
            object.__setattr__(self, name, value)

    def _value(self, child: Any) -> Any:
        """Returns a child of the tree as the model sees it."""
        if type(child) is ParamTree:
            return Scope(child, self._cells, self._run)
        self._run.reading(self._cells, (child,))
        return self._cells.values[child]

    # Reading

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _FIELDS:  # Python probes for protocols
            raise AttributeError(f"{name!r} is private; a child of that name is read as p[{name!r}].")
        return self._run.attribute(self, name)

    def __getitem__(self, key: str | int) -> Any:
        return self._run.child(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._run.names(self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._run.names(self))

    keys, values, items = map(_Method, (ParamTree.keys, ParamTree.values, ParamTree.items))

    @_Method
    def to_dict(self) -> dict[str, Any]:
        """Returns the level as nested dicts."""
        return level_of(self).to_dict()

    def __repr__(self) -> str:
        return repr(level_of(self))

    def __jax_array__(self) -> Any:
        raise MissingError(
            f"`{join(place_of(self))}` is used as an array before the model declares it, or is a "
            "level: call p.param(name, shape, initializer), or the layer that it belongs to, first."
        )

    def __copy__(self) -> "Scope":
        return self

    def __deepcopy__(self, memo: Any) -> "Scope":
        return self

    def __reduce__(self) -> Any:
        raise ScopeError(
            "a scope belongs to one call of a model and cannot be pickled: pickle the parameters that "
            "the model is called with."
        )

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
        return self._run.declare(self, PARAM, name, shape, initializer, dtype)

    def state(self, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32) -> Any:
        """Returns the state ``name``, checked as ``param`` does."""
        return self._run.declare(self, STATE, name, shape, initializer, dtype)

    @_Method
    def update(self, name: str, value: Any) -> None:
        """Writes new state, or that of a level; ``pt.Scope`` says how."""
        path = (*place_of(self), *name.split("/")) if name else place_of(self)
        old = self if not name else self._tree[name] if self._run.training else None
        if isinstance(value, ParamTree) and (old is None or isinstance(old, ParamTree)):
            write(self[name] if name else self, value)
        elif isinstance(old, ParamTree):
            raise MissingError(f"`{join(path)}` is a level: write a tree to it.")
        else:
            self._write(old, path, value)

    def _write(self, cell: Any, path: Path, value: Any) -> None:
        if cell is None:  # there is no such cell yet, or the run refuses to write
            self._run.update(path, value, None)
            return
        self._run.reading(self._cells, (cell,))
        origin = self._cells.paths[cell]
        if origin is None or not self._cells.writable:
            raise ScopeError(
                f"`{join(path)}` cannot be written: a verb has given this scope other paths than those "
                "of the tree that the model was called with. Change the paths of the parameters before "
                "the call."
            )
        written = self._run.update(origin, value, self._cells.values[cell])
        if self._cells.sources is not None:
            self._cells.values[cell], self._cells.sources[cell] = value, written

    @_Method
    def key(self) -> jax.Array:
        """Draws a PRNG key, a new one each time, from the call's key and the layer's path.

        jax also keeps the traces of branches: give the scope as an operand to one that is used twice.

        Raises:
          ScopeError: the call was given no key, or the draw would be repeated, as in a scan.
        """
        key: jax.Array = self._run.key(place_of(self))
        return key

    @_Method
    def sow(self, name: str, value: Any) -> Any:
        """Shows a value, any pytree, to ``pt.capture`` and ``pt.intervene``; returns it, or another."""
        return self._run.sow(self, name, value)

    # Verbs and transforms give a scope of the same run

    def __open__(self) -> Opened:
        structure, cells = flatten(self._tree)
        place, run = place_of(self), self._run
        run.reading(self._cells, cells)
        paths = [self._cells.paths[cell] for cell in cells]

        def rebuild(part: Structure, leaves: Sequence[Any], unnamed: Any = None) -> Scope:
            known = {path: paths[slot] for path, slot in structure.entries()}
            if None in paths:
                origins = tuple(known.get(path) for path in part.canonical)
            else:  # a hole may be filled again, by merge
                origins = tuple(known.get(path, (*place, *path)) for path in part.canonical)
            return scope_of(unflatten(part, tuple(leaves), place), run, origins)

        def renamed(part: Structure, leaves: Sequence[Any]) -> Scope:
            known = {id(leaf): path for leaf, path in zip(own, paths, strict=True)}
            tree = unflatten(part, tuple(leaves), place)
            scope = scope_of(tree, run.sealed(), [known.get(id(leaf)) for leaf in leaves])
            scope._cells.writable = False
            return scope

        own = tuple(self._cells.values[cell] for cell in cells)
        return Opened(
            structure, own, rebuild, structure.kinds, place, renamed=renamed, pending=run.pending()
        )


def scope_of(tree: ParamTree, run: Any, paths: Sequence[Path | None] | None = None) -> Scope:
    """Returns the scope of a run on a tree; ``paths`` says where each of its leaves is written to."""
    structure, leaves = flatten(tree)
    place = place_of(tree)
    if paths is None:
        paths = tuple((*place, *path) for path in structure.canonical)
    sources, trace = run.sources(paths)
    cells = Cells(list(leaves), paths, trace)
    cells.sources = sources
    return Scope(unflatten(structure, tuple(range(len(leaves))), place), cells, run)


def run_of(scope: Any) -> Any:
    """Returns the run of a scope."""
    return scope._run if type(scope) is Scope else INFERENCE


def level_of(scope: Any) -> ParamTree:
    """Returns the level that a scope reads, with its current values, as a tree."""
    if type(scope) is not Scope:
        tree: ParamTree = scope
        return tree
    structure, cells = flatten(scope._tree)
    values = scope._cells.values
    return unflatten(structure, tuple(values[cell] for cell in cells), place_of(scope))


def with_leaves(tree: ParamTree, new: Mapping[int, Any]) -> ParamTree:
    """Returns a tree with other leaves in some slots."""
    structure, leaves = flatten(tree)
    return unflatten(structure, [new.get(i, leaf) for i, leaf in enumerate(leaves)], place_of(tree))


def write(scope: Scope, tree: Any, slots: Iterable[int] | None = None) -> None:
    """Writes the state of a level, or some slots, from a tree of the same structure."""
    structure, leaves = flatten(level_of(tree))
    if type(tree) is Scope:
        tree._run.reading(tree._cells, flatten(tree._tree)[1])
    own, cells = flatten(scope._tree)
    if structure is not own and scope._run.training:
        raise MismatchError(
            f"{located(place_of(scope))} cannot be given a tree of another structure: write the tree "
            "that `y, new = pt.training(layer)(scope, x)` has returned for this level."
        )
    state = (slot for slot, kind in enumerate(structure.kinds) if kind == STATE)
    for slot in state if slots is None else slots:
        cell = cells[slot] if scope._run.training else None
        scope._write(cell, (*place_of(scope), *structure.canonical[slot]), leaves[slot])


NOTHING = unflatten(Structure.intern((), (), ()), ())  # an empty tree


def child(scope: Any, name: str) -> Any:
    """Returns the child of a scope, or an empty level if the tree has none of that name.

    A layer without parameters has a level in the tree that ``pt.init`` makes, but not in one built from
    the names in a file. It still runs; a layer that needs a parameter says which.
    """
    if type(scope) is ParamTree:
        level = flatten(scope)[0].children().get(name)
        if type(level) is tuple or type(level) is slice:
            return scope[name]
        return unflatten(*flatten(NOTHING), (*place_of(scope), name))
    if type(scope) is Scope and not scope._run.recording:
        return Scope(child(scope._tree, name), scope._cells, scope._run)
    return scope[name]


@dataclasses.dataclass(frozen=True)
class _Static:
    """What jax keeps of a scope.

    A trace is kept for one place; but ``jax.tree.map`` takes scopes of one structure at two places.
    """

    structure: Structure
    place: Path
    paths: tuple[Path | None, ...]
    token: Any

    def __eq__(self, other: Any) -> bool:
        same = type(other) is _Static and self.structure is other.structure
        if not same or self.token != other.token:
            return False
        return not self.token.keeps_place or (self.place, self.paths) == (other.place, other.paths)

    def __hash__(self) -> int:
        return hash((self.structure, self.token))


def _flatten(scope: Scope) -> tuple[tuple[Any, ...], Any]:
    # A scope that is an argument of a transform keeps its run, so that dropout still works under
    # jax.checkpoint, and its path, so that a layer still draws from its own key.
    structure, cells = flatten(scope._tree)
    values, paths = scope._cells.values, scope._cells.paths
    scope._run.reading(scope._cells, cells)
    token, arrays = scope._run.token()
    static = _Static(structure, place_of(scope), tuple(paths[c] for c in cells), token)
    return (*(values[cell] for cell in cells), *arrays), static


def _flatten_with_keys(scope: Scope) -> tuple[Any, Any]:
    leaves, static = _flatten(scope)
    names = [*map("/".join, static.structure.canonical), "key"]
    return list(zip(map(jax.tree_util.DictKey, names), leaves, strict=False)), static


def _unflatten(static: Any, leaves: Any) -> Any:
    leaves, count = tuple(leaves), len(static.structure.kinds)
    tree = unflatten(static.structure, leaves[:count], static.place)
    run = static.token.again(*leaves[count:])
    return tree if run is None else scope_of(tree, run, static.paths)


jax.tree_util.register_pytree_with_keys(Scope, _flatten_with_keys, _unflatten, _flatten)
