"""The parameter tree: an immutable, ordered, nested mapping of names to arrays, and one pytree node.

A tree is a flat tuple of leaves and an interned structure. Flattening returns the two with no work per
leaf, and unflattening pairs a new tuple with the structure; so a jitted call on a tree of thousands
of leaves costs less than on a nested dict. Reading a sub-tree cuts it out of the tuple.

Only this module reads the fields of a tree. Everything else calls ``flatten`` and ``unflatten``.
"""

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey

import paramtree
from paramtree.core.arrays import describe, join, printable
from paramtree.core.errors import ImmutableError, MissingError, first_few, suggest
from paramtree.core.structure import EMPTY, HOLE, STATE, Path, Structure
from paramtree.typing import Read

__all__ = ["RESERVED", "ParamTree", "flatten", "is_flat", "located", "place_of", "unflatten"]

_lazy: Any = paramtree  # loads its public names on first use
# Reading one of these from a tree reads it from the scope of an inference run. So does `key` or
# `update`, unless a child has that name; such a run refuses both.
_OF_SCOPES = frozenset(("param", "state", "training"))
RESERVED = _OF_SCOPES | {"items", "keys", "values", "to_dict"}  # children read by item only


class _Fields(Read):
    """The fields of a tree, still assignable.

    A tree forbids assignment, and ``object.__setattr__`` would take longer than all the rest of
    unflattening. So a tree is made as this class and then becomes a ``ParamTree``.
    """

    __slots__ = ("__weakref__", "_flat", "_leaves", "_place", "_structure")  # see `is_flat`

    _leaves: Sequence[Any]  # one for each slot of the structure
    _structure: Structure
    _place: Path  # the path of this level in the tree that it was read from


class ParamTree(_Fields):
    """An immutable, ordered, nested mapping of names to arrays, registered as a pytree.

    Trees come from ``pt.init``, ``pt.abstract``, ``pt.load`` and ``pt.from_tree``. Children are read by
    attribute, item, path or position, in the order of declaration; a child that is not a leaf is a tree
    too. A tree given to a model is the *scope* that it reads its parameters from. A child may have any
    name; one called ``param``, ``state``, ``training``, ``items``, ``keys``, ``values`` or ``to_dict``,
    which are attributes of every tree, is read by item.

    Raises:
      MissingError: there is no such child (also a KeyError, IndexError and AttributeError).
      ImmutableError: the tree is assigned to or deleted from (also a TypeError and AttributeError).

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

    def __getattr__(self, name: str) -> Any:
        if name in _OF_SCOPES:
            return _lazy._scope(self, name)
        child = self._structure.children().get(name)
        if type(child) is int and child >= 0:
            return self._leaves[child]
        if type(child) is tuple or type(child) is slice:
            return self._level(name, child)
        if name.startswith("__"):  # a protocol that Python probes for
            raise AttributeError(name)
        if name in ("key", "sow", "update"):
            return _lazy._scope(self, name)
        raise self._missing(name, child)

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            child = self._structure.children().get(key)
            if type(child) is int and child >= 0:
                return self._leaves[child]
            if child is None and "/" in key:
                slot = self._structure.slots_by_path().get(key)
                if slot is not None:
                    return self._leaves[slot]
                name, _, rest = key.partition("/")
                level = self[name]
                if isinstance(level, ParamTree):
                    return level[rest]
                raise MissingError(f"`{join((*self._place, name))}` is a leaf: it has no `{rest}`.")
            if child is None or child == HOLE:
                raise self._missing(key, child)
            return self._level(key, child)
        if isinstance(key, int | np.integer):
            names = list(self._structure.children())
            if -len(names) <= key < len(names):
                return self[names[key]]
            raise MissingError(
                f"position {key} is not in {located(self._place)}, which has {len(names)} children: "
                f"{first_few(names, ', ')}."
            )
        raise TypeError(
            f"a tree is read by name, path or position, not by {type(key).__name__}: "
            'tree["dense0"], tree["dense0/weight"] or tree[0].'
        )

    def _level(self, name: str, child: Any) -> "ParamTree":
        structure, take = child if type(child) is tuple else self._structure.level(name)
        return unflatten(structure, take(self._leaves), (*self._place, name))

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str | int) and (self[key], True)[1]
        except MissingError:
            return False

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
        """Returns the names and the children, in order of declaration."""
        return ItemsView(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the tree as nested dicts, without its holes; tied names hold the same array.

        A dict has no kinds, ties or stacks, and jax sorts its keys; ``pt.from_tree`` takes ``kinds``
        and ``ties`` to give them back.
        """
        top: dict[str, Any] = {}
        for path, slot in zip(self._structure.paths, self._structure.slots, strict=True):
            level = top
            for segment in path if slot == EMPTY else path[:-1]:
                level = level.setdefault(segment, {})
            if slot >= 0:
                level[path[-1]] = self._leaves[slot]
        return top

    def _missing(self, name: str, child: Any) -> MissingError:
        full, names = join((*self._place, name)), list(self._structure.children())
        if child == HOLE:
            return MissingError(
                f"`{full}` is a hole: select or partition left it out of this tree. Read it from the "
                "tree that it was taken from, or fill the holes with pt.merge."
            )
        has, hint = f"has: {first_few(names, ', ')}" if names else "is empty", suggest(name, names)
        return MissingError(f"`{full}` is not in {located(self._place)}, which {has}.{hint}")

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

    def __repr__(self) -> str:
        structure, first, lines = self._structure, self._structure.canonical, []
        for path, slot in structure.entries():
            word = "State" if structure.kinds[slot] == STATE else "Parameter"
            name, source = (printable(join(self._place + p)) for p in (path, first[slot]))
            tied = "" if first[slot] == path else f", tied to {source}"
            lines.append(f"{word} {name} ({describe(self._leaves[slot])}{tied})")
        if holes := structure.slots.count(HOLE):
            lines.append(f"({holes} hole{'s' if holes > 1 else ''})")
        return "\n".join(lines) or "(no parameters)"

    # Rendering lives in `inspect`, which is imported lazily.

    def _repr_html_(self) -> str:
        return _lazy.show(self)._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        _lazy.show(self)._repr_pretty_(printer, cycle)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return _lazy.show(self).__treescope_repr__(path, subtree_renderer)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_OF_SCOPES, *self]

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return unflatten, (self._structure, tuple(self._leaves), self._place)


def unflatten(structure: Structure, leaves: Iterable[Any], place: Path = ()) -> ParamTree:
    """Returns the tree of a structure and its leaves; ``place`` is its path in messages."""
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


def place_of(tree: ParamTree) -> Path:
    """Returns the path of a sub-tree in the tree that it was read from."""
    return tree._place


def located(path: Path) -> str:
    """Returns a level as messages show it."""
    return f"`{join(path)}`" if path else "the tree"


_FLAT: Any = vars(_Fields)["_flat"]  # the slot, which is read past __getattr__


def is_flat(tree: ParamTree) -> bool:
    """Whether no leaf is itself a container, such as a tuple or another tree."""
    try:
        flat: bool = _FLAT.__get__(tree)
    except AttributeError:
        all_leaves, leaves = jax.tree_util.all_leaves, tree._leaves
        flat = all_leaves(leaves) or all(leaf is None or all_leaves([leaf]) for leaf in leaves)
        _FLAT.__set__(tree, flat)
    return flat


def _flatten_with_keys(tree: ParamTree) -> tuple[list[tuple[DictKey, Any]], Structure]:
    structure = tree._structure
    # One key per leaf, its path: jax prints ['dense0/weight'], which also reads it from the tree.
    keys = structure.cached("keys", lambda: [DictKey("/".join(path)) for path in structure.canonical])
    return list(zip(keys, tree._leaves, strict=True)), structure


jax.tree_util.register_pytree_with_keys(
    ParamTree, _flatten_with_keys, unflatten, lambda tree: (tree._leaves, tree._structure)
)
