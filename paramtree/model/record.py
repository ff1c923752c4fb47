"""The run of a model that is being initialised: it records what the model asks for.

The model is traced abstractly: only shapes flow. A declared leaf reads as zeros, so the tree needs no
values. A verb on a scope needs the leaves below it, which are not known the first time; so the model is
traced again, with a tree of what it asked for before, until it asks for nothing else.
"""

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, join
from paramtree.core.errors import MismatchError, MissingError, ParamTreeError, ScopeError
from paramtree.core.structure import PARAM, Path, Stack, build
from paramtree.core.tree import ParamTree, flatten, located, place_of, unflatten
from paramtree.initializers.spec import Spec, same_initializer, spec_of
from paramtree.model.run import Run
from paramtree.model.scope import NOTHING, Scope, scope_of
from paramtree.model.traces import current_trace, flattened_for, within
from paramtree.verbs.tie import tie

__all__ = ["record"]

_MOST = 1000  # traces of one model, in case it asks for something else each time
# Reading one of these means that the model takes the scope for an array.
_OF_ARRAYS = frozenset(("T", "mT", "ndim", "shape", "dtype", "astype", "reshape", "at"))


class _Record:
    """What a model has asked for in one trace: leaves, levels and ties, and when it did."""

    def __init__(self) -> None:
        self.clock = itertools.count()
        self.specs: dict[Path, Spec] = {}
        self.levels: dict[Path, int] = {(): 0}  # in the order of their first leaf, else first read
        self.filled: set[Path] = set()
        self.ties: dict[str, str] = {}
        self.trace = current_trace()
        self.finishes: list[Any] = []  # functions of the finished tree and the key
        self.opened = False  # whether a verb saw the tree
        self.doubts: list[Exception] = []  # errors if the verbs saw all leaves
        self.passed = False  # whether a scope was an argument of a transform
        self.mapped = False  # whether that was jax.vmap

    def declare(self, path: Path, spec: Spec) -> None:
        """Records a leaf, and orders the levels above by their first leaf.

        Not by the first read: in ``dense(p.out, dense(p.hidden, x))`` that would put ``out`` first.
        """
        self.specs[path] = spec
        self.levels[path] = next(self.clock)
        for depth in range(len(path) - 1, 0, -1):
            if path[:depth] in self.filled:
                break
            self.filled.add(path[:depth])
            self.levels[path[:depth]] = next(self.clock)

    def tree(self, extra: Mapping[str, str], complete: bool = True) -> ParamTree:
        """Returns the tree of specs; one that is not complete has only the ties that it can have."""
        order = self.levels
        paths = sorted(order, key=lambda path: [order[path[:i]] for i in range(1, len(path) + 1)])
        items = [(path, path if path in self.specs else None) for path in paths if path]
        kinds = {path: spec.kind for path, spec in self.specs.items()}
        stacks = {path: spec.stack for path, spec in self.specs.items() if spec.stack}
        structure, labels = build(items, kinds, stacks)
        tree = unflatten(structure, tuple(self.specs[path] for path in labels))
        ties = {**self.ties, **extra}
        if not complete:
            ties = {
                a: b for a, b in ties.items() if {tuple(a.split("/")), tuple(b.split("/"))} <= {*paths}
            }
        return tie(tree, ties) if ties else tree


class _Reading(Run):
    __slots__ = ()

    recording = True

    def update(self, path: Path, value: Any, like: Any) -> None:
        """Discards the value."""

    def key(self, path: Path) -> jax.Array:
        """Returns an arbitrary key."""
        return jax.random.key(0)


class Recording(_Reading):
    """The run of a model that is being initialised.

    Its scopes show a tree of what the model asked for in the trace before, if there was one.
    """

    __slots__ = ("_record", "_stack")

    def __init__(self, record: _Record, stack: Stack = ()) -> None:
        self._record, self._stack = record, stack

    def attribute(self, scope: Scope, key: Any) -> Any:
        """Returns a child, unless a level is taken for an array or is probed by a notebook."""
        if key in _OF_ARRAYS and (*place_of(scope), key) not in self._record.levels:
            scope.__jax_array__()
        if key.startswith(("_repr_", "_ipython_")):
            raise AttributeError(key)
        return self.child(scope, key)

    def child(self, scope: Scope, key: Any) -> Any:
        """Returns a level, or a leaf that was declared."""
        place = place_of(scope)
        if not isinstance(key, str) or not all(key.split("/")):
            raise ParamTreeError(
                f"while initialising, the children of {located(place)} are read by name, as in "
                f"p.hidden, p['hidden'] or p['hidden/dense'], not by {key!r}."
            )
        first, _, rest = key.partition("/")
        path = (*place, first)
        if path in self._record.specs:
            if rest:
                raise MismatchError(f"`{join(path)}` is a leaf: it has no `{rest}`.")
            return self._value(scope, first, self._record.specs[path])
        if path not in self._record.levels:
            self._record.levels[path] = next(self._record.clock)
        known = flatten(scope._tree)[0].children().get(first)
        below = (
            scope._tree[first] if type(known) in (tuple, slice) else unflatten(*flatten(NOTHING), path)
        )
        child = Scope(below, scope._cells, self)
        return child[rest] if rest else child

    def names(self, scope: Scope) -> ParamTree:
        """Returns a level with what the model has asked for so far."""
        place = place_of(scope)
        below = (path for path in self._record.levels if path[: len(place)] == place != path)
        names = dict.fromkeys(path[len(place)] for path in below)
        structure, leaves = build([((name,), name) for name in names], dict.fromkeys(names, PARAM))
        return unflatten(structure, leaves, place)

    def declare(
        self, scope: Any, kind: str, name: str, shape: Any, initializer: Any, dtype: Any = jnp.float32
    ) -> Any:  # fmt: skip
        """Records a leaf and returns zeros of its shape."""
        place = place_of(scope)
        if not isinstance(name, str) or not name or "/" in name:
            raise ParamTreeError(f"{name!r} cannot name a leaf of {located(place)}: no '/', not empty.")
        path = (*place, name)
        spec = spec_of(join(path), kind, shape, initializer, dtype, self._stack)
        old = self._record.specs.get(path)
        if old is None:
            if path in self._record.levels:
                raise MismatchError(
                    f"`{join(path)}` is declared as a leaf, and is also a level with children."
                )
            self._record.declare(path, spec)
        elif dataclasses.replace(old, initializer=spec.initializer) != spec:
            raise MismatchError(
                f"`{join(path)}` was declared as {old} and now as {spec}. Two calls on one scope share "
                "its parameters: give the second call a scope of its own, or inputs of the same size."
            )
        elif not same_initializer(old.initializer, spec.initializer):
            raise MismatchError(
                f"`{join(path)}` was declared with the initializer {old.initializer!r} and now with "
                f"{spec.initializer!r}. Two calls on one scope share its parameters: give both the "
                "same initializer, or the second call a scope of its own."
            )
        return self._value(scope, name, spec)

    def _value(self, scope: Scope, name: str, spec: Spec) -> Any:
        known = flatten(scope._tree)[0].children().get(name)
        if known is not None:  # a verb may have changed it, or left it out
            return scope._value(scope._tree[name])
        # jnp.zeros would take a fifth of the time of recording a model.
        return jax.lax.broadcast(np.zeros((), spec.dtype), spec.shape[len(spec.stack) :])

    def repeated(self, scope: Scope, count: int) -> Scope:
        """Returns a level as a scope whose every leaf is a stack of ``count`` copies.

        The model sees a single copy.
        """
        tree = jax.tree.map(lambda cell: scope._cells.values[cell][0], scope._tree)
        run = Recording(self._record, (*self._stack, (len(place_of(scope)), count)))
        return scope_of(unflatten(*flatten(tree), place_of(scope)), run)

    def update(self, path: Path, value: Any, like: Any) -> None:
        """Checks that the state is declared; the value is discarded."""
        if path not in self._record.specs:
            raise MissingError(
                f"`{join(path)}` is written before it is declared: call "
                f"p.state({path[-1]!r}, shape, initializer) first."
            )

    def tie(self, scope: Any, pairs: Mapping[str, str]) -> None:
        """Asks for ties between paths below a scope."""
        prefix = "".join(f"{segment}/" for segment in place_of(scope))
        self._record.ties.update((prefix + alias, prefix + source) for alias, source in pairs.items())

    @property
    def finishes(self) -> list[Any]:
        """The functions to apply to the tree of values, with the key, the last one first."""
        return self._record.finishes

    def pending(self) -> "Recording":
        """Returns the run, in which patterns that match nothing yet may match later."""
        self._record.opened = True
        return self

    def doubt(self, error: Exception) -> None:
        """Notes an error that holds only if all leaves are known."""
        self._record.doubts.append(error)

    def sealed(self) -> Run:
        """Returns a run that reads what is known; the model cannot ask for more by other names."""
        return _Reading()

    def structural(self, verb: str, scope: Scope, *args: Any) -> Any:
        """Does what a verb that changes paths or ties does, as far as that is possible.

        Raises:
          ScopeError: it is not.
        """
        if verb == "tie":
            self.tie(scope, args[0])
        elif verb not in ("untie", "ties"):
            raise ScopeError(
                f"{verb}: the tree is not yet known while the model is being initialised. Initialise "
                f"the model without pt.{verb}, and call pt.{verb} on its parameters before the call."
            )
        return {} if verb == "ties" else scope

    def token(self) -> tuple["_Token", tuple[Any, ...]]:
        """Returns what makes the run again."""
        self._record.passed, keeps_place = True, flattened_for() != "tree.map"
        return _Token(weakref.ref(self._record), self._stack, keeps_place, current_trace()), ()


@dataclasses.dataclass(frozen=True)
class _Token:
    """Makes the run of a scope that went through a transform."""

    record: "weakref.ref[_Record]"
    stack: Stack
    keeps_place: bool
    flattened: Any = dataclasses.field(compare=False)

    def again(self, *arrays: Any) -> Recording | None:
        record = self.record()
        if record is None:
            return None
        if current_trace() == self.flattened:  # by jax.tree.map, which must see the leaves
            record.opened = True
        elif within(self.flattened)[-1:] == ["vmap"]:
            record.mapped = True
        return Recording(record, self.stack)


def record(
    f: Callable[..., Any], inputs: Any, kwargs: Any, extra: Mapping[str, str] | None
) -> tuple[ParamTree, list[Any]]:
    """Returns the tree of specs that a model asks for, and functions to apply to its values."""
    flat, treedef = jax.tree.flatten((inputs, kwargs))
    where = [i for i, leaf in enumerate(flat) if dtype_of(leaf) is not None]
    records: list[_Record] = []

    def call(arrays: list[Any], known: ParamTree) -> None:
        values = list(flat)  # values that are not arrays, such as flags, are not traced
        for i, array in zip(where, arrays, strict=True):
            values[i] = array
        args, keywords = jax.tree.unflatten(treedef, values)
        records.append(_Record())
        f(scope_of(known, Recording(records[-1])), *args, **keywords)

    known = NOTHING
    lenient, error = False, None  # a model in which a verb saw too little may mix dtypes
    before: dict[Any, int] = {}
    last = _MOST - 1
    for i in range(_MOST):
        promotion = jax.numpy_dtype_promotion("standard") if lenient else contextlib.nullcontext()
        shapes = jax.tree.map(Spec.abstract, known)
        try:
            with promotion:  # a new function each time, as jax caches what it has traced
                jax.eval_shape(functools.partial(call), [flat[i] for i in where], shapes)
            error = None
        except Exception as exception:
            error = exception
        again = any(record.opened or record.mapped for record in records)
        if error and not again:
            break
        tree = records[-1].tree(extra or {}, error is None)
        if (not again or _shapes(tree) == _shapes(known)) and (error or not lenient):
            break
        known, lenient = tree, error is not None
        # A model that asks for the same again goes round in a circle: the end of it is known.
        if (period := i - before.setdefault((_shapes(known), lenient), i)) and last == _MOST - 1:
            last = i + (last - i) % period
        if i == last:
            break
    if str(error).startswith("vmap ") and records and records[-1].passed:  # its message about axes
        raise ScopeError(
            "the scope is an argument that jax.vmap maps, which declares one copy of each leaf: use "
            "nn.Vmap(layer, n) for copies with parameters of their own, or close over the scope, as in "
            "jax.vmap(lambda x: layer(p.block, x))(xs), to share them."
        ) from error
    problem = next(iter(records[-1].doubts), error) if records else error
    if problem is not None:
        raise problem
    return tree, records[-1].finishes[::-1]


def _shapes(tree: ParamTree) -> Any:
    structure, specs = flatten(tree)
    return structure, tuple((spec.shape, spec.dtype) for spec in specs)
