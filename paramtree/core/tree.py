"""The parameter tree: an immutable, ordered, nested mapping of names to arrays, one pytree node in all.

A tree is a flat tuple of leaves and an interned structure. Flattening hands out the two as they
are, with no work per leaf, and unflattening puts a new tuple beside the structure; that is why a
jitted call on a tree of thousands of leaves costs less than on a nested dict. A sub-tree is a view
of the same tuple that knows its level, and is cut out only when it is itself flattened.
"""

import json
from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

import paramtree
from paramtree.core.arrays import describe, join, printable, shape_of
from paramtree.core.errors import ImmutableError, MismatchError, MissingError, ScopeError, suggest
from paramtree.core.structure import HOLE, STATE, Node, Path, Structure

__all__ = ["ParamTree", "check_scope", "child", "register", "whole"]


class _Fields:
    """The fields of a tree, still assignable.

    A tree forbids assignment, and going round that with ``object.__setattr__`` would cost more
    than all the rest of unflattening. So a tree is made as this and then becomes a ``ParamTree``.
    """

    __slots__ = ("__weakref__", "_leaves", "_node", "_place", "_structure")

    _leaves: Sequence[Any]  # one for each slot of the structure
    _structure: Structure
    _node: Node | None  # the level that a sub-tree looks at; None for a whole tree
    _place: Path  # where a whole tree stood in the tree it was cut from


class ParamTree(_Fields):
    """An immutable, ordered, nested mapping of names to arrays, registered as a pytree.

    Trees come from ``pt.init``, ``pt.abstract``, ``pt.load`` and ``pt.from_tree``. Children are read
    by attribute, item, path or position, in the order in which they were declared; a child that is
    not a leaf is a tree too. A tree is also the *scope* from which a model reads its parameters.

    Raises:
      MissingError: reading a child that is not there (also a KeyError, IndexError, AttributeError).
      ImmutableError: assigning to the tree or deleting from it (also a TypeError, AttributeError).

    Example:
      >>> import paramtree as pt
      >>> tree = pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.zeros(2)}})
      >>> tree.dense0.weight is tree["dense0"]["weight"] is tree["dense0/weight"] is tree[0][0]
      True
      >>> tree
      Parameter dense0_weight (shape=(2, 3), dtype=float64)
      Parameter dense0_bias (shape=(2,), dtype=float64)
      >>> list(tree.dense0), "dense0/bias" in tree, len(tree)
      (['weight', 'bias'], True, 1)
    """

    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "ParamTree is not called directly: pt.init(model, key, x) makes one for a model and "
            "pt.from_tree(mapping) one from a nested mapping or any other pytree."
        )

    # Reading

    def __getattr__(self, name: str) -> Any:
        node = self._node or self._structure._root or self._structure.root
        found = node.children.get(name)
        if type(found) is int and found >= 0:
            return self._leaves[found]
        if found is None or found == HOLE:
            if name.startswith("__"):  # a protocol that somebody probes for
                raise AttributeError(name)
            raise self._missing(node, name, found)
        return self._view(found)

    def __getitem__(self, key: str | int) -> Any:
        node = self._node or self._structure.root
        if isinstance(key, str):
            found = node.children.get(key)
            if type(found) is int and found >= 0:
                return self._leaves[found]
            if found is None and "/" in key:
                here, _, rest = key.partition("/")
                below = self[here]
                if isinstance(below, ParamTree):
                    return below[rest]
                name = join((*self._path(), here))
                raise MissingError(f"`{name}` is a leaf: it has no `{rest}`.")
            if found is None or found == HOLE:
                raise self._missing(node, key, found)
            return self._view(found)
        if isinstance(key, int | np.integer):
            names = list(node.children)
            if -len(names) <= key < len(names):
                return self[names[key]]
            raise MissingError(
                f"position {key} is not in {_where(self._path())}, which has {len(names)} children: "
                f"{', '.join(names)}."
            )
        raise TypeError(
            f"a tree is read by name, path or position, not by {type(key).__name__}: "
            'tree["dense0"], tree["dense0/weight"] or tree[0].'
        )

    def _view(self, node: Any) -> "ParamTree":
        view: Any = _Fields()
        view._leaves = self._leaves
        view._structure = self._structure
        view._node = node
        view._place = self._place
        view.__class__ = ParamTree
        return view

    def _with(self, leaves: Sequence[Any]) -> "ParamTree":
        """Returns this level by itself with other leaves."""
        structure = self._structure if self._node is None else self._structure.below(self._node)[0]
        return _rebuild(structure, leaves, self._path())

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str | int):
            return False
        try:
            self[key]
        except MissingError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        for name, found in (self._node or self._structure.root).children.items():
            if found != HOLE:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> KeysView[str]:
        """Returns the names of the children, in order of declaration."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:
        """Returns the children, in order of declaration."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:
        """Returns the names and the children, in order of declaration.

        Example:
          >>> import paramtree as pt
          >>> [(name, leaf) for name, leaf in pt.from_tree({"b": 1, "a": 2}).items()]
          [('b', 1), ('a', 2)]
        """
        return ItemsView(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the tree as nested dicts, without its holes; tied names hold the same array.

        Example:
          >>> import paramtree as pt
          >>> pt.from_tree({"a": {"b": 1}}).to_dict()
          {'a': {'b': 1}}
        """
        top: dict[str, Any] = {}
        node = self._node or self._structure.root
        stack = [(node, top)]
        while stack:
            node, into = stack.pop()
            for name, found in node.children.items():
                if isinstance(found, Node):
                    into[name] = {}
                    stack.append((found, into[name]))
                elif found >= 0:
                    into[name] = self._leaves[found]
        return top

    # Its place, and what goes wrong

    def _path(self) -> Path:
        return self._place if self._node is None else self._place + self._node.path

    def _missing(self, node: Node, name: str, found: Any) -> MissingError:
        full = join((*self._path(), name))
        if found == HOLE:
            return MissingError(
                f"`{full}` is a hole: select or partition left it out of this tree. Read it from the "
                "tree that it was taken from, or fill the holes with pt.merge."
            )
        has = f"has: {', '.join(node.children)}" if node.children else "is empty"
        hint = suggest(name, node.children)
        return MissingError(f"`{full}` is not in {_where(self._path())}, which {has}.{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        full = join((*self._path(), name))
        raise ImmutableError(
            f"a tree cannot be changed, so `{full}` cannot be assigned. Make a new one: "
            f'params = pt.replace(params, {{"{full}": value}}).'
        )

    def __delattr__(self, name: str) -> None:
        full = join((*self._path(), name))
        raise ImmutableError(
            f"a tree cannot be changed, so `{full}` cannot be deleted. Make a tree without it: "
            "pt.select keeps the names that a pattern matches, and pt.from_tree builds a tree from "
            "any mapping."
        )

    def __setitem__(self, name: str, value: Any) -> None:
        self.__setattr__(str(name), value)

    def __delitem__(self, name: str) -> None:
        self.__delattr__(str(name))

    # A scope, for reading only

    @property
    def training(self) -> bool:
        """Whether the model runs under ``pt.training``: may draw random numbers and write state."""
        return False

    def param(self, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32) -> Any:
        """Returns the parameter ``name``, checked against the shape that the layer computes.

        Args:
          name: its name on this level.
          shape: the shape that the layer needs.
          initializer: how ``pt.init`` makes it, ``(key, shape, dtype) -> Array``; not used here.
          dtype: the dtype that ``pt.init`` gives it; a tree that was cast may hold another.

        Raises:
          MissingError: the tree has no such leaf.
          MismatchError: the leaf has another shape.

        Example:
          >>> import paramtree as pt
          >>> tree = pt.from_tree({"scale": np.float32(3.0)})
          >>> tree.param("scale", (), pt.initializers.One())
          np.float32(3.0)
        """
        node = self._node or self._structure.root
        found = node.children.get(name)
        if type(found) is not int or found < 0:
            error = self._missing(node, name, found)
            full = join((*self._path(), name))
            problem = f"`{full}` is a level, not a leaf." if isinstance(found, Node) else str(error)
            raise MissingError(
                f"the model needs a leaf `{full}` of shape {tuple(shape)}: {problem} Call it with the "
                "tree that pt.init gives for this model."
            )
        leaf = self._leaves[found]
        have = shape_of(leaf)
        if have is not None and have != tuple(shape):
            full = join((*self._path(), name))
            raise MismatchError(
                f"`{full}` has shape {have}, but the model needs {tuple(shape)}. Either the input is "
                "not of the size that the tree was initialised for, or the tree belongs to another "
                "model: check the input's shape, or call pt.init again."
            )
        return leaf

    def state(self, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32) -> Any:
        """Returns the state ``name``, checked as in ``param``. State is never trained."""
        return self.param(name, shape, initializer, dtype)

    def update(self, name: str, value: Any) -> None:
        """Writes new state; only under ``pt.training``.

        Raises:
          ScopeError: always, as this scope is for reading.
        """
        raise ScopeError(
            f"`{join((*self._path(), name))}` cannot be written: the model was called for inference. "
            "Call it as `output, params = pt.training(model)(params, x)`."
        )

    def key(self) -> jax.Array:
        """Draws a PRNG key; only under ``pt.training`` with a key.

        Raises:
          ScopeError: always, as this scope is for reading.
        """
        raise ScopeError(
            f"{_where(self._path())} draws random numbers, but the model was called for inference. "
            "Call it as `output, params = pt.training(model)(params, x, key=key)`."
        )

    # Printing, copying

    def __repr__(self) -> str:
        structure, node = self._structure, self._node
        first = structure.canonical
        lines = []
        for path, slot in structure.entries(node):
            word = "State" if structure.kinds[slot] == STATE else "Parameter"
            tied = (
                "" if first[slot] == path else f", tied to {printable(join(self._place + first[slot]))}"
            )
            name = printable(join(self._place + path))
            lines.append(f"{word} {name} ({describe(self._leaves[slot])}{tied})")
        span = slice(None) if node is None else slice(node.start, node.stop)
        if holes := structure.slots[span].count(HOLE):
            lines.append(f"({holes} hole{'s' if holes > 1 else ''})")
        return "\n".join(lines) or "(no parameters)"

    # What draws a tree stands above it, and is loaded when somebody looks.

    def _repr_html_(self) -> str:
        return paramtree.show(self)._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        paramtree.show(self)._repr_pretty_(printer, cycle)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return paramtree.show(self).__treescope_repr__(path, subtree_renderer)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def __reduce__(self) -> tuple[Any, ...]:
        leaves, structure = _flatten(self)
        return _rebuild, (structure, leaves, self._path())


def _rebuild(structure: Structure, leaves: Sequence[Any], place: Path = ()) -> ParamTree:
    tree: Any = _Fields()
    tree._leaves = leaves if type(leaves) is tuple else tuple(leaves)
    tree._structure = structure
    tree._node = None
    tree._place = place
    tree.__class__ = ParamTree
    return tree


def _flatten(tree: ParamTree) -> tuple[Sequence[Any], Structure]:
    if tree._node is None:
        return tree._leaves, tree._structure
    structure, take = tree._structure.below(tree._node)
    return take(tree._leaves), structure


def _flatten_with_keys(tree: ParamTree) -> tuple[list[tuple[DictKey, Any]], Structure]:
    leaves, structure = _flatten(tree)
    keys = structure.cache.get("keys")
    if keys is None:
        # One key a leaf, with the whole path in it: jax prints it as ['dense0/weight'], which is
        # also what reads the leaf from the tree.
        keys = structure.cache["keys"] = [DictKey("/".join(path)) for path in structure.canonical]
    return list(zip(keys, leaves, strict=True)), structure


def whole(tree: ParamTree) -> ParamTree:
    """Returns the tree itself, or a sub-tree cut out of the tree that it views."""
    if tree._node is None:
        return tree
    return tree._with(_flatten(tree)[0])


def check_scope(scope: Any) -> None:
    """Raises TypeError if what a layer was called with first is not a scope."""
    if not isinstance(scope, ParamTree) and not hasattr(scope, "param"):
        raise TypeError(
            f"a model is called with its parameters first, model(params, x), but found "
            f"{type(scope).__name__} in their place. pt.init(model, key, x) makes the parameters; "
            "pt.from_tree(mapping) turns a nested mapping into a tree."
        )


def child(scope: Any, name: str) -> Any:
    """Returns the child of a scope, or an empty one where the tree has no place of that name.

    A layer without parameters has a place in the tree that ``pt.init`` makes, but not in one that
    was built from the names in a file. It runs all the same; a layer that does need a parameter
    then says which.

    Raises:
      TypeError: the scope is not one.
    """
    check_scope(scope)
    if not isinstance(scope, ParamTree):
        return scope[name]
    node = scope._node or scope._structure.root
    found = node.children.get(name)
    return scope._view(found if isinstance(found, Node) else Node((*node.path, name), node.stop))


def _where(path: Path) -> str:
    return f"`{join(path)}`" if path else "the tree"


def _to_bytes(structure: Structure) -> bytes:
    whole = structure.whole
    entries = [whole.paths, whole.slots, whole.kinds, structure.kept]
    return json.dumps(entries).encode()


def _from_bytes(data: Any) -> Structure:
    paths, slots, kinds, kept = json.loads(bytes(data))
    return Structure.intern(tuple(map(tuple, paths)), tuple(slots), tuple(kinds)).keep(kept)


def register(cls: type, flatten: Any, flatten_with_keys: Any, unflatten: Any) -> None:
    """Registers a scope as a pytree node."""
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


register(ParamTree, _flatten, _flatten_with_keys, _rebuild)
jax.export.register_pytree_node_serialization(
    ParamTree,
    serialized_name="paramtree.ParamTree",
    serialize_auxdata=_to_bytes,
    deserialize_auxdata=_from_bytes,
)
