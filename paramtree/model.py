"""Models are functions of a scope and inputs; this room runs them to make, remake or train trees.

``init`` runs a model once on a ``Recorder``, abstractly, so that only shapes flow. The recorder
notes what the model asks for and answers with zeros made on the spot, in whatever trace the model
is in; as it keeps no value, nothing can leak from a ``scan`` or a ``checkpoint``, and a branch may
be traced once or twice. Then every leaf is computed, each from a key of its own that depends only
on the root key and the leaf's path.
"""

import dataclasses
import functools
import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.errors import MismatchError, MissingError, ParamTreeError, RuleError, ScopeError
from paramtree.names import Rules, named, resolve
from paramtree.structure import PARAM, STATE, Node, Path, Structure, build
from paramtree.ties import tie
from paramtree.tree import ParamTree, _flatten, _rebuild, dtype_of, join, register, shape_of, whole

__all__ = ["Recorder", "abstract", "init", "reinit", "training"]

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


class Spec(NamedTuple):
    """What a model asked for: a leaf that is still to be computed."""

    shape: tuple[int, ...]
    dtype: Any
    kind: str
    initializer: Initializer


class Recorder:
    """The scope of a model that is being initialised: notes what it asks for, answers with zeros."""

    __slots__ = ("_children", "_path", "_ties")

    # A pytree without leaves, compared by identity: scopes may go through jit and checkpoint as
    # arguments, and a new recorder is always traced anew.

    def __init__(self, path: Path = (), ties: dict[str, str] | None = None) -> None:
        self._path = path
        self._children: dict[str, Recorder | Spec] = {}
        self._ties: dict[str, str] = {} if ties is None else ties

    training = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a protocol that somebody probes for
            raise AttributeError(name)
        if hasattr(ParamTree, name):
            raise ParamTreeError(
                f"`{name}` is an attribute of every tree, so `p.{name}` cannot be a child: write "
                f"p[{name!r}], or use another name."
            )
        return self[name]

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str) or not all(name.split("/")):
            raise ParamTreeError(
                f"while initialising, the children of {self._shown()} are read by name, as in "
                f"p.hidden, p['hidden'] or p['hidden/dense'], not by {name!r}."
            )
        here, _, rest = name.partition("/")
        found = self._children.get(here)
        if found is None:
            found = self._children[here] = Recorder((*self._path, here), self._ties)
        if isinstance(found, Spec):
            if rest:
                raise MismatchError(f"`{self._full(here)}` is a leaf: it has no `{rest}`.")
            return jnp.zeros(found.shape, found.dtype)
        return found[rest] if rest else found

    def __contains__(self, name: str) -> bool:
        return name in self._children

    def param(
        self, name: str, shape: Sequence[int], initializer: Initializer, dtype: Any = jnp.float32
    ) -> jax.Array:
        """Notes a parameter and returns zeros of its shape."""
        return self._note(PARAM, name, shape, initializer, dtype)

    def state(
        self, name: str, shape: Sequence[int], initializer: Initializer, dtype: Any = jnp.float32
    ) -> jax.Array:
        """Notes a state and returns zeros of its shape."""
        return self._note(STATE, name, shape, initializer, dtype)

    def update(self, name: str, value: Any) -> None:
        """Checks that the state exists; the value is of no use yet."""
        if not isinstance(self._children.get(name), Spec):
            raise MissingError(
                f"`{self._full(name)}` is written before it is declared: call "
                f"p.state({name!r}, shape, initializer) first."
            )

    def key(self) -> jax.Array:
        """Returns some key: the model is only being traced."""
        return jax.random.key(0)

    def _note(self, kind: str, name: str, shape: Any, initializer: Any, dtype: Any) -> jax.Array:
        full = self._full(name)
        if not isinstance(name, str) or not name or "/" in name:
            raise ParamTreeError(f"{name!r} cannot name a leaf of {self._shown()}: no '/', not empty.")
        try:
            sizes = tuple(operator.index(size) for size in shape)
        except TypeError:
            sizes = (-1,)
        if any(size < 0 for size in sizes):
            raise MismatchError(
                f"`{full}` is declared with shape {shape!r}; a shape is a tuple of sizes, each a "
                "whole number that is known while tracing."
            )
        if not callable(initializer):
            raise TypeError(
                f"the initializer of `{full}` is {initializer!r}; expected a function "
                "(key, shape, dtype) -> Array, such as pt.initializers.Normal(0.01)."
            )
        spec = Spec(sizes, jax.dtypes.canonicalize_dtype(dtype), kind, initializer)
        found = self._children.setdefault(name, spec)
        if isinstance(found, Recorder):
            raise MismatchError(f"`{full}` is declared as a leaf, and is also a level with children.")
        if found[:3] != spec[:3]:
            old, new = (f"{s.kind} {s.shape} {jnp.dtype(s.dtype).name}" for s in (found, spec))
            raise MismatchError(
                f"`{full}` was declared as {old} and now as {new}. Two calls on one scope share its "
                "parameters: give the second call a scope of its own, or inputs of the same size."
            )
        return jnp.zeros(found.shape, found.dtype)

    def _full(self, name: object) -> str:
        return join((*self._path, str(name)))

    def _shown(self) -> str:
        return f"`{join(self._path)}`" if self._path else "the tree"

    def __jax_array__(self) -> Any:
        raise MissingError(
            f"`{join(self._path)}` is used as an array before the model declares it: call "
            "p.param(name, shape, initializer), or the layer that it belongs to, first."
        )

    def __repr__(self) -> str:
        return f"Recorder({join(self._path)!r}: {', '.join(self._children)})"


register(
    Recorder, lambda scope: ((), scope), lambda scope: ((), scope), lambda scope, _: scope
)


def tie_in_recorder(scope: Any, pairs: Sequence[tuple[str, str]]) -> None:
    """Asks for ties between paths below a scope; only a recorder has use for it."""
    if isinstance(scope, Recorder):
        prefix = "".join(f"{segment}/" for segment in scope._path)
        scope._ties.update((prefix + alias, prefix + source) for alias, source in pairs)


def _record(
    f: Callable[..., Any], inputs: Any, kwargs: Any, extra: Mapping[str, str] | None
) -> ParamTree:
    """Returns the tree that a model asks for, with specs as its leaves."""
    scope = Recorder()
    flat, treedef = jax.tree.flatten((inputs, kwargs))
    where = [i for i, leaf in enumerate(flat) if dtype_of(leaf) is not None]

    def run(arrays: list[Any]) -> None:
        values = list(flat)  # what is not an array, such as a flag, stays what it is
        for i, array in zip(where, arrays, strict=True):
            values[i] = array
        args, keywords = jax.tree.unflatten(treedef, values)
        f(scope, *args, **keywords)

    jax.eval_shape(run, [flat[i] for i in where])
    items: list[tuple[Path, Any]] = []
    specs: dict[Path, Spec] = {}
    stack: list[Recorder] = [scope]
    while stack:
        level = stack.pop()
        items.append((level._path, None))
        for name, found in level._children.items():
            path = (*level._path, name)
            if isinstance(found, Spec):
                specs[path] = found
            items.append((path, path if isinstance(found, Spec) else None))
        stack.extend(c for c in level._children.values() if isinstance(c, Recorder))
    structure, order = build(items, {path: spec.kind for path, spec in specs.items()})
    tree = _rebuild(structure, tuple(specs[path] for path in order))
    return tie(tree, {**scope._ties, **(extra or {})}) if scope._ties or extra else tree


def abstract(
    f: Callable[..., Any], *inputs: Any, ties: Mapping[str, str] | None = None, **kwargs: Any
) -> ParamTree:
    """Returns the shapes and dtypes of the parameters that a model has for some inputs.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      *inputs: arrays, ``jax.ShapeDtypeStruct``s, or anything else the model takes.
      ties: paths to tie, ``{alias: source}``, as in ``pt.tie``.
      **kwargs: passed on to the model.

    Returns:
      The tree that ``pt.init`` would give, of ``jax.ShapeDtypeStruct``s. Nothing is computed.

    Example:
      >>> import paramtree as pt
      >>> pt.abstract(pt.nn.Dense(3), jax.ShapeDtypeStruct((2, 20), "float32"))
      Parameter weight (shape=(3, 20), dtype=float32)
      Parameter bias (shape=(3,), dtype=float32)
    """
    tree = _record(f, inputs, kwargs, ties)
    leaves = tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in tree._leaves)
    return _rebuild(tree._structure, leaves)


def init(
    f: Callable[..., Any],
    key: jax.Array,
    *inputs: Any,
    rules: Rules | None = None,
    ties: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> ParamTree:
    """Returns freshly initialised parameters for a model; sizes are inferred from the inputs.

    The model is traced, not run. Every leaf's key comes from ``key`` and the leaf's path alone, so
    adding, removing or reordering other layers never changes it. Works under ``jax.jit`` and
    ``jax.vmap`` too.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      key: a PRNG key, from ``jax.random.key``.
      *inputs: arrays, ``jax.ShapeDtypeStruct``s, or anything else the model takes.
      rules: patterns to initializers, for leaves that are not to use their layer's own.
      ties: paths to tie, ``{alias: source}``, as in ``pt.tie``.
      **kwargs: passed on to the model.

    Raises:
      TypeError: ``key`` is not a PRNG key.
      RuleError: a rule matches nothing, or is not an initializer.
      MismatchError: the model declares one leaf in two ways, or an initializer returns something
        else than it was asked for.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Dense(4, activation="relu"), pt.nn.Dense(2))
      >>> x = jnp.ones((5, 3))
      >>> params = pt.init(net, jax.random.key(0), x, rules={".*bias": pt.initializers.One()})
      >>> params
      Parameter dense0_weight (shape=(4, 3), dtype=float32)
      Parameter dense0_bias (shape=(4,), dtype=float32)
      Parameter dense1_weight (shape=(2, 4), dtype=float32)
      Parameter dense1_bias (shape=(2,), dtype=float32)
      >>> params.dense1.bias
      Array([1., 1.], dtype=float32)
    """
    _check_key(key)
    tree = _record(f, inputs, kwargs, ties)
    specs: Sequence[Spec] = tree._leaves
    initializers = [spec.initializer for spec in specs]
    if rules is not None:
        chosen = _initializers(tree._structure, rules)
        initializers = [rule or own for rule, own in zip(chosen, initializers, strict=True)]
    slots = range(len(specs))
    return _rebuild(tree._structure, _draw(tree._structure, slots, initializers, specs, key))


def reinit(tree: Any, key: jax.Array, rules: Rules) -> Any:
    """Returns the tree with new values for the leaves whose names match; the others stay.

    Gives exactly the values that ``pt.init`` with the same key and these rules gives to them.

    Args:
      tree: a parameter tree, or any other pytree.
      key: a PRNG key, from ``jax.random.key``.
      rules: patterns to initializers; the first that matches a name counts.

    Raises:
      RuleError: a pattern matches nothing or has no initializer.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}})
      >>> params = pt.reinit(params, jax.random.key(0), {".*bias": pt.initializers.Constant(42)})
      >>> params.dense0.bias
      Array([42., 42.], dtype=float32)
    """
    _check_key(key)
    source, restore = named(tree)
    chosen = _initializers(source._structure, rules)
    leaves = list(source._leaves)
    slots = [slot for slot, rule in enumerate(chosen) if rule is not None]
    specs = []
    for slot in slots:
        shape, dtype = shape_of(leaves[slot]), dtype_of(leaves[slot])
        if shape is None or dtype is None:
            name = join(source._structure.canonical[slot])
            raise MismatchError(f"reinit: `{name}` is a {type(leaves[slot]).__name__}, no array.")
        specs.append(Spec(shape, dtype, PARAM, chosen[slot]))
    drawn = _draw(source._structure, slots, [chosen[slot] for slot in slots], specs, key)
    for slot, leaf in zip(slots, drawn, strict=True):
        leaves[slot] = leaf
    return restore(tuple(leaves))


def _initializers(structure: Structure, rules: Rules) -> tuple[Initializer | None, ...]:
    chosen = resolve(structure, rules, default=None, what="the initializer rules")
    wrong = [f"{p!r} gives {v!r}" for p, v in rules.items() if not callable(v)]
    if wrong:
        raise RuleError(
            f"the initializer rules do not give initializers: {'; '.join(wrong)}. Expected functions "
            "(key, shape, dtype) -> Array, such as pt.initializers.Constant(42)."
        )
    return chosen


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise TypeError(
            f"expected a PRNG key, such as jax.random.key(0), but found {type(key).__name__}. The "
            "order is pt.init(model, key, *inputs)."
        )


def path_words(path: Path) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Returns the 64-bit hash of a path as two words, uint32[2], the same in every process.

    The segments are joined with "/", which none of them holds, so ("a", "bc") and ("ab", "c") differ.
    """
    digest = hashlib.blake2b("/".join(path).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, dtype=">u4").astype(np.uint32)


def path_key(key: jax.Array, words: Any) -> jax.Array:
    """Returns the key of a leaf: both words of its path's hash, folded into the root key."""
    return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])


def _compute(
    initializer: Initializer, shape: tuple[int, ...], dtype: Any, key: jax.Array, words: Any
) -> jax.Array:
    value = jnp.asarray(initializer(path_key(key, words), shape, dtype))
    floats = jnp.issubdtype(value.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    if value.shape != shape or (value.dtype != dtype and not floats):
        raise MismatchError(
            f"the initializer {initializer!r} gave {value.dtype}{value.shape}, but "
            f"{jnp.dtype(dtype).name}{shape} was asked for"
        )
    return value.astype(dtype)


# One function for all leaves that share initializer, shape and dtype: the path comes in as data.
_compiled = jax.jit(_compute, static_argnums=(0, 1, 2))


def _draw(
    structure: Structure,
    slots: Sequence[int],
    initializers: Sequence[Initializer],
    specs: Sequence[Spec],
    key: jax.Array,
) -> tuple[Any, ...]:
    """Computes leaves: each by itself, or, when traced, those that are alike in one loop."""
    groups: dict[Any, list[int]] = {}
    calls = []
    for i, (slot, initializer, spec) in enumerate(zip(slots, initializers, specs, strict=True)):
        path = structure.canonical[slot]
        by_name = getattr(initializer, "for_name", None)
        try:
            call = (initializer if by_name is None else by_name(join(path))), spec.shape, spec.dtype
            calls.append((path, call))
            groups.setdefault(call, []).append(i)
        except TypeError:  # an initializer that cannot be hashed
            groups[i] = [i]
        except ParamTreeError:
            raise
    leaves: list[Any] = [None] * len(calls)
    traced = isinstance(key, jax.core.Tracer)
    for members in groups.values():
        words = np.stack([path_words(calls[i][0]) for i in members])
        path, call = calls[members[0]]
        try:
            if len(members) > 1 and traced:
                # XLA would compile the same random bits once a leaf; in a loop it does so once.
                stacked = jax.lax.map(functools.partial(_compute, *call, key), words)
                for i, leaf in zip(members, stacked, strict=True):
                    leaves[i] = leaf
                continue
            for i, two in zip(members, words, strict=True):
                path = calls[i][0]
                leaves[i] = _one(call, key, two)
        except MismatchError as error:
            raise MismatchError(f"`{join(path)}`: {error}.") from None
        except (TypeError, ValueError) as error:
            error.add_note(f"while initialising `{join(path)}` with shape {call[1]} by {call[0]!r}")
            raise
    return tuple(leaves)


def _one(call: Any, key: jax.Array, words: Any) -> jax.Array:
    if getattr(call[0], "eager", False):  # holds an array, which a compiled function would copy in
        return jnp.array(_compute(*call, key, words))
    try:
        hash(call[0])
    except TypeError:
        return jnp.array(_compute(*call, key, words))
    return _compiled(*call, key, words)


# Training


class _Session:
    """What one call under ``training`` shares among its scopes."""

    __slots__ = ("draws", "key", "leaves", "trace")

    def __init__(self, leaves: list[Any], key: jax.Array | None) -> None:
        self.leaves = leaves
        self.key = key
        self.draws: Counter[Path] = Counter()
        self.trace = _trace_state()


def _trace_state() -> Any:
    import jax.extend  # not at import: only training needs it

    get = getattr(jax.extend.core, "get_opaque_trace_state", None)
    return (get or jax.core.get_opaque_trace_state)()


class TrainingScope(ParamTree):
    """The scope of a model in training: reads like the tree, and can draw keys and write state."""

    __slots__ = ("_session",)

    _session: _Session

    @staticmethod
    def make(structure: Structure, leaves: Any, session: _Session, place: Path) -> "TrainingScope":
        scope = object.__new__(TrainingScope)
        for name, value in (
            ("_structure", structure),
            ("_leaves", leaves),
            ("_session", session),
            ("_place", place),
            ("_node", None),
        ):
            object.__setattr__(scope, name, value)
        return scope

    def _view(self, node: Node) -> "TrainingScope":
        view = TrainingScope.make(self._structure, self._leaves, self._session, self._place)
        object.__setattr__(view, "_node", node)
        return view

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
        if self._leaves is not session.leaves or _trace_state() != session.trace:
            raise ScopeError(
                f"`{full}` is written inside a jax transform (scan, cond, vmap, checkpoint, ...) "
                "within the model, and the new value cannot get out of it. Call pt.training inside "
                "the transform and return the new tree from it, or write outside of it."
            )
        session.leaves[slot] = value

    def key(self) -> jax.Array:
        """Draws a PRNG key, a new one each time, from the call's key and the layer's path.

        Raises:
          ScopeError: the call was given no key.
        """
        session, path = self._session, self._path()
        if session.key is None:
            where = f"`{join(path)}`" if path else "the model"
            raise ScopeError(
                f"{where} draws random numbers, but no key was given: call "
                "pt.training(model)(params, x, key=jax.random.key(0)) with a new key each step."
            )
        session.draws[path] += 1
        return jax.random.fold_in(path_key(session.key, path_words(path)), session.draws[path])


def _flatten_scope(scope: TrainingScope) -> tuple[Any, Any]:
    leaves, structure = _flatten(scope)
    return tuple(leaves), (structure, scope._session, scope._path())


def _rebuild_scope(static: Any, leaves: Any) -> TrainingScope:
    structure, session, place = static
    return TrainingScope.make(structure, tuple(leaves), session, place)


register(
    TrainingScope,
    _flatten_scope,
    lambda scope: (
        list(zip(map(jax.tree_util.SequenceKey, range(10**9)), _flatten(scope)[0])),
        _flatten_scope(scope)[1],
    ),
    _rebuild_scope,
)


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
            _check_key(key)
        params = whole(params)
        session = _Session(list(params._leaves), key)
        scope = TrainingScope.make(params._structure, session.leaves, session, params._place)
        output = self.f(scope, *inputs, **kwargs)
        return output, _rebuild(params._structure, tuple(session.leaves), params._place)


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
