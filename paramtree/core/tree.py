"""The parameter tree: an immutable, ordered, nested mapping of names to arrays, one pytree node in all.

A tree is a flat tuple of leaves and an interned structure. Flattening returns the two without any work
for each leaf, and unflattening pairs a new tuple with the structure; so a jitted call on a tree of
thousands of leaves costs less than on a nested dict. A sub-tree is cut out of the tuple when it is read.

Only this module reads the fields of a tree. Everything else calls ``flatten`` and ``unflatten``.
"""

import functools
import json
from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from typing import Any, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

import paramtree
from paramtree.core.arrays import describe, join, printable, shape_of
from paramtree.core.errors import ImmutableError, MismatchError, MissingError, ScopeError, suggest
from paramtree.core.structure import EMPTY, HOLE, STATE, Path, Structure

__all__ = ["RESERVED", "ParamTree", "flatten", "is_flat", "located", "place_of", "read", "unflatten"]


class _Fields:
    """The fields of a tree, still assignable.

    A tree forbids assignment, and ``object.__setattr__`` would take longer than all the rest of
    unflattening. So a tree is made as this class and then becomes a ``ParamTree``.
    """

    __slots__ = ("__weakref__", "_flat", "_leaves", "_place", "_structure")

    _leaves: Sequence[Any]  # one for each slot of the structure
    _structure: Structure
    _place: Path  # the path of this level in the tree that it was read from
    _flat: bool  # whether no leaf is a container; set when first asked for


class ParamTree(_Fields):
    """An immutable, ordered, nested mapping of names to arrays, registered as a pytree.

    Trees come from ``pt.init``, ``pt.abstract``, ``pt.load`` and ``pt.from_tree``. Children are read
    by attribute, item, path or position, in the order of declaration; a child that is not a leaf is a
    tree too. A tree given to a model is the *scope* from which the model reads its parameters.

    A child may have any name. Those in ``RESERVED`` are attributes of every tree, so children of these
    names are read by item: ``params["items"]``.

    Raises:
      MissingError: there is no such child (also a KeyError, IndexError and AttributeError).
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
        structure = self._structure
        child = (structure._children or structure.children()).get(name)
        if type(child) is int and child >= 0:
            return self._leaves[child]
        if child is None or child == HOLE:
            if name.startswith("__"):  # a protocol that Python probes for
                raise AttributeError(name)
            if name in ("key", "update"):  # a scope in training has them
                return functools.partial(self._refuse, name)
            raise self._missing(name, child)
        return self._level(name)

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            child = self._structure.children().get(key)
            if type(child) is int and child >= 0:
                return self._leaves[child]
            if child is None and "/" in key:
                slot = self._slots_by_path().get(key)
                if slot is not None:
                    return self._leaves[slot]
                name, _, rest = key.partition("/")
                below = self[name]
                if isinstance(below, ParamTree):
                    return below[rest]
                raise MissingError(f"`{join((*self._place, name))}` is a leaf: it has no `{rest}`.")
            if child is None or child == HOLE:
                raise self._missing(key, child)
            return self._level(key)
        if isinstance(key, int | np.integer):
            names = list(self._structure.children())
            if -len(names) <= key < len(names):
                return self[names[key]]
            raise MissingError(
                f"position {key} is not in {located(self._place)}, which has {len(names)} children: "
                f"{', '.join(names)}."
            )
        raise TypeError(
            f"a tree is read by name, path or position, not by {type(key).__name__}: "
            'tree["dense0"], tree["dense0/weight"] or tree[0].'
        )

    def _level(self, name: str) -> "ParamTree":
        structure, take = self._structure.level(name)
        return unflatten(structure, take(self._leaves), (*self._place, name))

    def _slots_by_path(self) -> dict[str, int]:
        structure = self._structure
        slots: dict[str, int] = structure.cached(
            "slots by path", lambda: {"/".join(path): slot for path, slot in structure.entries()}
        )
        return slots

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str | int):
            return False
        try:
            self[key]
        except MissingError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return (name for name, child in self._structure.children().items() if child != HOLE)

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

        A dict has no kinds, ties or stacks, and jax sorts its keys; ``pt.from_tree`` takes ``kinds``
        and ``ties`` to give them back.

        Example:
          >>> import paramtree as pt
          >>> pt.from_tree({"a": {"b": 1}}).to_dict()
          {'a': {'b': 1}}
        """
        top: dict[str, Any] = {}
        for path, slot in zip(self._structure.paths, self._structure.slots, strict=True):
            level = top
            for segment in path if slot == EMPTY else path[:-1]:
                level = level.setdefault(segment, {})
            if slot >= 0:
                level[path[-1]] = self._leaves[slot]
        return top

    # What goes wrong

    def _missing(self, name: str, child: Any) -> MissingError:
        full, names = join((*self._place, name)), self._structure.children()
        if child == HOLE:
            return MissingError(
                f"`{full}` is a hole: select or partition left it out of this tree. Read it from the "
                "tree that it was taken from, or fill the holes with pt.merge."
            )
        has = f"has: {', '.join(names)}" if names else "is empty"
        return MissingError(
            f"`{full}` is not in {located(self._place)}, which {has}.{suggest(name, names)}"
        )

    def _refuse(self, verb: str, *args: Any, **kwargs: Any) -> NoReturn:
        if verb == "key":
            problem, call = f"{located(self._place)} draws random numbers", "params, x, key=key"
        else:
            problem, call = (
                f"`{join((*self._place, *map(str, args[:1])))}` cannot be written",
                "params, x",
            )
        raise ScopeError(
            f"{problem}: the model was called for inference. Call it as `output, params = "
            f"pt.training(model)({call})`."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        full = join((*self._place, name))
        raise ImmutableError(
            f"a tree cannot be changed, so `{full}` cannot be assigned. Make a new one: "
            f'params = pt.replace(params, {{"{full}": value}}).'
        )

    def __delattr__(self, name: str) -> None:
        full = join((*self._place, name))
        raise ImmutableError(
            f"a tree cannot be changed, so `{full}` cannot be deleted. Make a tree without it: "
            f'params = pt.drop(params, "{full}"). pt.select keeps the names that a pattern matches.'
        )

    def __setitem__(self, name: str, value: Any) -> None:
        self.__setattr__(str(name), value)

    def __delitem__(self, name: str) -> None:
        self.__delattr__(str(name))

    # A scope for inference

    @property
    def training(self) -> bool:
        """Whether the model runs under ``pt.training``: False for a tree."""
        return False

    def param(self, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32) -> Any:
        """Returns the parameter ``name``, checked against the shape that the layer computes.

        Args:
          name: its name on this level.
          shape: the shape that the layer needs.
          initializer: how ``pt.init`` computes it, ``(key, shape, dtype) -> Array``; unused here.
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
        return read(self, name, shape)

    def state(self, name: str, shape: Sequence[int], initializer: Any, dtype: Any = jnp.float32) -> Any:
        """Returns the state ``name``, checked as ``param`` does. State is never trained."""
        return self.param(name, shape, initializer, dtype)

    # Printing, copying

    def __repr__(self) -> str:
        structure, first, lines = self._structure, self._structure.canonical, []
        for path, slot in structure.entries():
            word = "State" if structure.kinds[slot] == STATE else "Parameter"
            source = printable(join(self._place + first[slot]))
            tied = "" if first[slot] == path else f", tied to {source}"
            name = printable(join(self._place + path))
            lines.append(f"{word} {name} ({describe(self._leaves[slot])}{tied})")
        if holes := structure.slots.count(HOLE):
            lines.append(f"({holes} hole{'s' if holes > 1 else ''})")
        return "\n".join(lines) or "(no parameters)"

    # Rendering lives in `inspect`, which is imported lazily.

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
        return unflatten, (self._structure, tuple(self._leaves), self._place)


RESERVED = frozenset(name for name in vars(ParamTree) if not name.startswith("_"))


def unflatten(structure: Structure, leaves: Sequence[Any], place: Path = ()) -> ParamTree:
    """Returns the tree of a structure and its leaves; ``place`` is where messages say it stands."""
    tree: Any = _Fields()
    tree._leaves = leaves if type(leaves) is tuple else tuple(leaves)
    tree._structure = structure
    tree._place = place
    tree.__class__ = ParamTree
    return tree


def flatten(tree: ParamTree) -> tuple[Structure, tuple[Any, ...]]:
    """Returns the structure and the leaves of a tree: one leaf for each slot."""
    leaves: Any = tree._leaves
    return tree._structure, leaves


def read(tree: ParamTree, name: str, shape: Sequence[int], value: Any = None) -> Any:
    """Returns the leaf of a name, of the shape that a layer needs; ``value`` maps what the tree holds."""
    structure, path = tree._structure, (*tree._place, name)
    child = structure.children().get(name)
    if type(child) is not int or child < 0:
        missing = child is None or child == HOLE
        problem = (
            str(tree._missing(name, child)) if missing else f"`{join(path)}` is a level, not a leaf."
        )
        raise MissingError(
            f"the model needs a leaf `{join(path)}` of shape {tuple(shape)}: {problem} Call it with the "
            "tree that pt.init gives for this model."
        )
    leaf = tree._leaves[child] if value is None else value(tree._leaves[child])
    have = shape_of(leaf)
    if have is not None and have != tuple(shape):
        raise MismatchError(
            f"`{join(path)}` has shape {have}, but the model needs {tuple(shape)}. Either the input does "
            "not have the size that the tree was initialised for, or the tree belongs to another model: "
            "check the input's shape, or call pt.init again."
        )
    return leaf


def place_of(tree: ParamTree) -> Path:
    """Returns the path of a sub-tree in the tree that it was read from."""
    return tree._place


def located(path: Path) -> str:
    """Returns what a message calls a level."""
    return f"`{join(path)}`" if path else "the tree"


def is_flat(tree: ParamTree) -> bool:
    """Whether no leaf is itself a container, such as a tuple or another tree."""
    field: Any = _Fields._flat  # a slot, read past __getattr__
    try:
        flat: bool = field.__get__(tree)
    except AttributeError:
        all_leaves = jax.tree_util.all_leaves
        flat = all_leaves(tree._leaves) or all(
            leaf is None or all_leaves([leaf]) for leaf in tree._leaves
        )
        field.__set__(tree, flat)
    return flat


def _flatten_with_keys(tree: ParamTree) -> tuple[list[tuple[DictKey, Any]], Structure]:
    structure = tree._structure
    # One key a leaf, with its path: jax prints ['dense0/weight'], which also reads it from the tree.
    keys = structure.cached("keys", lambda: [DictKey("/".join(path)) for path in structure.canonical])
    return list(zip(keys, tree._leaves, strict=True)), structure


def _to_bytes(structure: Structure) -> bytes:
    full = structure.full
    return json.dumps([full.paths, full.slots, full.kinds, structure.kept, full.stacks]).encode()


def _from_bytes(data: Any) -> Structure:
    paths, slots, kinds, kept, stacks = json.loads(bytes(data))
    stacks = tuple(tuple(map(tuple, stack)) for stack in stacks)
    return Structure.intern(tuple(map(tuple, paths)), tuple(slots), tuple(kinds), stacks).keep(kept)


jax.tree_util.register_pytree_with_keys(
    ParamTree, _flatten_with_keys, unflatten, lambda tree: (tree._leaves, tree._structure)
)
jax.export.register_pytree_node_serialization(
    ParamTree,
    serialized_name="paramtree.ParamTree",
    serialize_auxdata=_to_bytes,
    deserialize_auxdata=_from_bytes,
)
