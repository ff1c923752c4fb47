"""The recorder: the scope of a model that is being initialised.

A model runs on it once, abstractly: only shapes flow. It records what the model asks for and returns
zeros made in the model's current trace. It keeps no value, so nothing can leak from a ``scan`` or
a ``checkpoint``, and a branch may be traced once or twice.
"""

import dataclasses
import itertools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, join
from paramtree.core.errors import MismatchError, MissingError, ParamTreeError
from paramtree.core.structure import PARAM, STATE, Path, Stack, build
from paramtree.core.tree import RESERVED, ParamTree, located, unflatten
from paramtree.initializers import Initializer, get
from paramtree.verbs.tie import tie

__all__ = ["Recorder", "Spec", "record", "tie_in_recorder"]


# Reading one of these means that the model takes the scope for an array.
_OF_ARRAYS = frozenset(("T", "mT", "ndim", "shape", "dtype", "astype", "reshape", "at"))


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """A leaf that a model asks for and that is still to be computed.

    ``stack`` gives its leading axes over copies of the layer, as in ``Structure.stacks``.
    """

    shape: tuple[int, ...]
    dtype: Any
    kind: str
    initializer: Initializer
    stack: Stack = ()

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


class _Run:
    """The data that the recorders of one run share: a clock for the order, and the ties."""

    def __init__(self) -> None:
        self.clock = itertools.count()
        self.ties: dict[str, str] = {}


class Recorder:
    """The scope of a model that is being initialised: records what it asks for, returns zeros."""

    __slots__ = ("__weakref__", "_children", "_declared", "_order", "_parent", "_path", "_run",
                 "_stack", "_views")  # fmt: skip

    def __init__(self, path: Path, run: "_Run", parent: "Recorder | None" = None) -> None:
        self._path = path
        self._run = run
        self._parent = parent
        self._stack: Stack = () if parent is None else parent._stack
        self._children: dict[str, Recorder | Spec] = {}
        self._views: dict[int, Recorder] = {}
        self._order: dict[str, int] = {}
        self._declared = False

    training = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python probes for protocols
            raise AttributeError(name)
        if name in _OF_ARRAYS:
            self.__jax_array__()
        if name in RESERVED or name in ("key", "update"):
            raise ParamTreeError(
                f"`{name}` is an attribute of every tree, so `p.{name}` cannot be a child: write "
                f"p[{name!r}], or use another name."
            )
        return self[name]

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str) or not all(name.split("/")):
            raise ParamTreeError(
                f"while initialising, the children of {located(self._path)} are read by name, as in "
                f"p.hidden, p['hidden'] or p['hidden/dense'], not by {name!r}."
            )
        first, _, rest = name.partition("/")
        child = self._children.get(first)
        if child is None:
            child = self._children[first] = Recorder((*self._path, first), self._run, self)
            self._order[first] = next(self._run.clock)
        if isinstance(child, Spec):
            if rest:
                raise MismatchError(f"`{self._full(first)}` is a leaf: it has no `{rest}`.")
            return self._zeros(child)
        return child[rest] if rest else child

    def __contains__(self, name: str) -> bool:
        return name in self._children

    def param(
        self, name: str, shape: Sequence[int], initializer: Initializer, dtype: Any = jnp.float32
    ) -> jax.Array:
        """Records a parameter and returns zeros of its shape."""
        return self._note(PARAM, name, shape, initializer, dtype)

    def state(
        self, name: str, shape: Sequence[int], initializer: Initializer, dtype: Any = jnp.float32
    ) -> jax.Array:
        """Records a state and returns zeros of its shape."""
        return self._note(STATE, name, shape, initializer, dtype)

    def update(self, name: str, value: Any) -> None:
        """Checks that the state is declared; the value is discarded."""
        if not isinstance(self._children.get(name), Spec):
            raise MissingError(
                f"`{self._full(name)}` is written before it is declared: call "
                f"p.state({name!r}, shape, initializer) first."
            )

    def key(self) -> jax.Array:
        """Returns an arbitrary key, as the model is only traced."""
        return jax.random.key(0)

    def _note(self, kind: str, name: str, shape: Any, initializer: Any, dtype: Any) -> jax.Array:
        full = self._full(name)
        if not isinstance(name, str) or not name or "/" in name:
            raise ParamTreeError(
                f"{name!r} cannot name a leaf of {located(self._path)}: no '/', not empty."
            )
        try:
            sizes = tuple(operator.index(size) for size in shape)
        except TypeError:
            sizes = (-1,)
        if any(size < 0 for size in sizes):
            raise MismatchError(
                f"`{full}` is declared with shape {shape!r}; a shape is a tuple of sizes, each a "
                "non-negative integer that is known while tracing."
            )
        if not callable(initializer) and not isinstance(initializer, str):
            raise TypeError(
                f"the initializer of `{full}` is {initializer!r}; expected a function "
                "(key, shape, dtype) -> Array, such as pt.initializers.Normal(0.01)."
            )
        initializer = get(initializer)
        sizes = (*(size for _, size in self._stack), *sizes)
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        spec = Spec(sizes, dtype, kind, initializer, self._stack)
        if name not in self._children:
            self._children[name] = spec
            self._declare(name)
        child = self._children[name]
        if isinstance(child, Recorder):
            raise MismatchError(f"`{full}` is declared as a leaf, and is also a level with children.")
        if any(
            getattr(child, field) != getattr(spec, field)
            for field in ("shape", "dtype", "kind", "stack")
        ):
            old, new = (f"{s.kind} {s.shape} {jnp.dtype(s.dtype).name}" for s in (child, spec))
            raise MismatchError(
                f"`{full}` was declared as {old} and now as {new}. Two calls on one scope share its "
                "parameters: give the second call a scope of its own, or inputs of the same size."
            )
        return self._zeros(child)

    def repeated(self, count: int) -> "Recorder":
        """Returns this level as a scope whose every leaf is a stack of ``count`` copies.

        The model sees a single copy.
        """
        if count not in self._views:
            view = self._views[count] = Recorder(self._path, self._run, self._parent)
            view._children, view._order = self._children, self._order
            view._stack = (*self._stack, (len(self._path), count))
        return self._views[count]

    def _zeros(self, spec: Spec) -> jax.Array:
        # jnp.zeros would take a fifth of the time of recording a model.
        return jax.lax.broadcast(np.zeros((), spec.dtype), spec.shape[len(spec.stack) :])

    def _declare(self, name: str) -> None:
        """Orders a child by the first declaration at or below it.

        Not by the first read: in ``dense(p.out, dense(p.hidden, x))`` that would put ``out`` first.
        """
        self._order[name] = next(self._run.clock)
        level = self
        while not level._declared:
            level._declared = True
            if level._parent is not None:
                level._parent._order[level._path[-1]] = next(self._run.clock)
                level = level._parent

    def _full(self, name: object) -> str:
        return join((*self._path, str(name)))

    def __jax_array__(self) -> Any:
        raise MissingError(
            f"`{join(self._path)}` is used as an array before the model declares it: call "
            "p.param(name, shape, initializer), or the layer that it belongs to, first."
        )

    def __repr__(self) -> str:
        return f"Recorder({join(self._path)!r}: {', '.join(self._children)})"


# A pytree without leaves, compared by identity: scopes may go through jit and checkpoint as arguments,
# and a new recorder is always traced anew. A weak reference, as jax keeps static data alive.
_again: Any = lambda scope, _: scope()  # noqa: E731
jax.tree_util.register_pytree_node(Recorder, lambda scope: ((), weakref.ref(scope)), _again)


def tie_in_recorder(scope: Any, pairs: Sequence[tuple[str, str]]) -> None:
    """Asks a recorder for ties between paths below a scope; other scopes have their ties already."""
    if isinstance(scope, Recorder):
        prefix = "".join(f"{segment}/" for segment in scope._path)
        scope._run.ties.update((prefix + alias, prefix + source) for alias, source in pairs)


def record(
    f: Callable[..., Any], inputs: Any, kwargs: Any, extra: Mapping[str, str] | None
) -> ParamTree:
    """Returns the tree that a model asks for, with specs as its leaves."""
    run = _Run()
    scope = Recorder((), run)
    flat, treedef = jax.tree.flatten((inputs, kwargs))
    where = [i for i, leaf in enumerate(flat) if dtype_of(leaf) is not None]

    def call(arrays: list[Any]) -> None:
        values = list(flat)  # values that are not arrays, such as flags, are not traced
        for i, array in zip(where, arrays, strict=True):
            values[i] = array
        args, keywords = jax.tree.unflatten(treedef, values)
        f(scope, *args, **keywords)

    jax.eval_shape(call, [flat[i] for i in where])
    items: list[tuple[Path, Any]] = []
    specs: dict[Path, Spec] = {}
    stack: list[Recorder] = [scope]
    while stack:
        level = stack.pop()
        items.append((level._path, None))
        for name in sorted(level._children, key=level._order.__getitem__):
            child = level._children[name]
            path = (*level._path, name)
            if isinstance(child, Spec):
                specs[path] = child
            items.append((path, path if isinstance(child, Spec) else None))
        stack.extend(c for c in level._children.values() if isinstance(c, Recorder))
    kinds = {path: spec.kind for path, spec in specs.items()}
    stacks = {path: spec.stack for path, spec in specs.items() if spec.stack}
    structure, order = build(items, kinds, stacks)
    tree = unflatten(structure, tuple(specs[path] for path in order))
    return tie(tree, {**run.ties, **(extra or {})}) if run.ties or extra else tree
