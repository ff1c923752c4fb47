"""The walker: what the leaves of any pytree are, what they are called, and how to get it back.

``open_tree`` turns a parameter tree, a dict, an optimizer state or a module into a structure and its
leaves, and knows how to put other leaves in their places. A parameter tree in another container keeps its
order, ties, kinds, stacks and holes there, and a leaf that is itself a container, such as a row of a
Hessian, is walked into. All verbs read trees through this function, so all see the same leaves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.errors import RuleError
from paramtree.core.structure import (
    EMPTY,
    HOLE,
    PARAM,
    STATE,
    Path,
    Picker,
    Stack,
    Structure,
    build,
    moved,
)  # fmt: skip
from paramtree.core.tree import ParamTree, flatten, is_flat, place_of, unflatten

__all__ = ["KEEP", "Container", "Opened", "is_array", "is_array_or_number", "key_segments", "open_tree"]

KEEP: Any = object()  # leaves without a name stay
_ABSENT: Any = object()  # a leaf that is left out


class Container(NamedTuple):
    """A container: its type, the paths of its children, and what else jax compares of it."""

    type: type
    keys: tuple[Path, ...]
    form: Any


class Opened(NamedTuple):
    """A pytree as a structure and its leaves.

    Attributes:
      structure: names, ties, kinds, stacks and holes; None in a container is a hole.
      leaves: one for each slot.
      rebuild: makes the pytree of a structure, or a part of it, and its leaves; a third argument
        replaces the leaves without a name, such as a function in a module.
      kinds: the kind of each slot; None for a leaf outside of parameter trees.
      place: the path of a sub-tree, for messages.
      depths: for a path in a parameter tree in a container, how many segments lead to that tree.
      containers: the containers by path.
    """

    structure: Structure
    leaves: tuple[Any, ...]
    rebuild: Callable[..., Any]
    kinds: Sequence[str | None]
    place: Path = ()
    depths: Mapping[Path, int] = {}
    containers: Mapping[Path, Container] = {}

    def restore(self, leaves: Sequence[Any], unnamed: Any = KEEP) -> Any:
        """Returns the pytree with other leaves, one for each slot."""
        return self.rebuild(self.structure, leaves, unnamed)

    def part(self, structure: Structure, take: Picker, unnamed: Any = KEEP) -> Any:
        """Returns the pytree with some leaves: holes in parameter trees, None in other containers."""
        return self.rebuild(structure, take(self.leaves), unnamed)


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype."""
    return dtype_of(leaf) is not None


def is_array_or_number(leaf: Any) -> bool:
    """Whether a leaf has a shape, as arrays and Python's numbers have."""
    return shape_of(leaf) is not None


def open_tree(
    tree: Any, counts: Callable[[Any], bool] | None = is_array, declared: bool = False
) -> Opened:
    """Returns the leaves of any pytree under their names.

    Args:
      tree: a parameter tree, or any other pytree.
      counts: which leaves outside of parameter trees have names; None for all, None included. In a
        parameter tree all have.
      declared: whether mappings are read in their own order, instead of jax's, which sorts the keys.

    Raises:
      NameCollisionError: two leaves have one path, as in {"a/b": x, "a": {"b": y}}.
      RuleError: a key is empty or has an empty part, as "a//b".
    """
    opener = getattr(type(tree), "__open__", None)
    if opener is not None:
        opened: Opened = opener(tree)
        return opened
    if type(tree) is ParamTree and is_flat(tree):
        structure, leaves = flatten(tree)
        place = place_of(tree)
        return Opened(
            structure,
            leaves,
            lambda part, leaves, _: unflatten(part, leaves, place),
            structure.kinds,
            place,
        )
    return _Walk(counts, declared).open(tree)


class _Node(NamedTuple):
    """A value of the pytree: a leaf, or a container with the numbers of its children.

    ``inner`` is the structure of a parameter tree, whose children are its leaves; the children of
    other containers have ``keys``.
    """

    value: Any
    named: bool = False
    rebuild: Callable[..., Any] | None = None
    inner: Structure | None = None
    keys: tuple[Path, ...] = ()
    form: Any = None
    children: tuple[int, ...] = ()


class _Walk:
    """One walk over a pytree: down, to number its values; then along all paths, to name them."""

    def __init__(self, counts: Callable[[Any], bool] | None, declared: bool) -> None:
        self.counts, self.declared = counts, declared
        self.nodes: list[_Node] = []
        self.depths: dict[Path, int] = {}
        self.containers: dict[Path, Container] = {}

    def open(self, tree: Any) -> Opened:
        self._number(tree)
        items, kinds, stacks = self._name()
        full, order = build(items, {label: kind or PARAM for label, kind in kinds.items()}, stacks)
        kept = [slot for slot, label in enumerate(order) if type(label) is int]
        leaves = tuple(self.nodes[order[slot]].value for slot in kept)

        def rebuild(part: Structure, leaves: Sequence[Any], unnamed: Any = KEEP) -> Any:
            values = {order[slot]: leaf for slot, leaf in zip(part.kept, leaves, strict=True)}
            return self._rebuild(values, unnamed)

        place = place_of(tree) if isinstance(tree, ParamTree) else ()
        found = tuple(kinds[order[slot]] for slot in kept)
        return Opened(full.keep(kept), leaves, rebuild, found, place, self.depths, self.containers)

    def _number(self, tree: Any) -> None:
        """Appends a node for every value, after that of the container that holds it."""
        todo: list[tuple[Any, bool, list[int]]] = [(tree, False, [])]
        numbers: list[list[int]] = []
        while todo:
            value, inside, siblings = todo.pop()
            siblings.append(len(self.nodes))
            node, children = self._node(value, inside)
            self.nodes.append(node)
            numbers.append([])
            todo += [(child, node.inner is not None, numbers[-1]) for child in reversed(children)]
        self.nodes = [
            node._replace(children=tuple(n)) for node, n in zip(self.nodes, numbers, strict=True)
        ]

    def _node(self, value: Any, inside: bool) -> tuple[_Node, Sequence[Any]]:
        """Returns the node of a value and its children; ``inside`` says that a parameter tree has it."""
        if isinstance(value, ParamTree) or hasattr(type(value), "__open__"):
            if type(value) is ParamTree and not is_flat(value):
                (structure, leaves), place = flatten(value), place_of(value)
                return _Node(
                    value, rebuild=lambda s, ls, _: unflatten(s, ls, place), inner=structure
                ), leaves
            opened = open_tree(value)
            return _Node(value, rebuild=opened.rebuild, inner=opened.structure), opened.leaves
        every = inside or self.counts is None
        if value is None:
            return _Node(None, named=every), ()
        if self.declared and isinstance(value, Mapping):
            return _Node(value, rebuild=dict, keys=tuple(map(_split, value))), tuple(value.values())
        if jax.tree_util.all_leaves([value]):
            return _Node(value, named=every or self.counts(value)), ()  # type: ignore[misc]
        flat, form = jax.tree_util.tree_flatten_with_path(
            value, is_leaf=lambda below: below is not value
        )
        keys = tuple(key_segments(key_path) for key_path, _ in flat)
        return _Node(value, rebuild=form.unflatten, keys=keys, form=form), [child for _, child in flat]

    def _name(self) -> tuple[list[tuple[Path, Any]], dict[Any, str | None], dict[Path, Stack]]:
        """Returns what ``build`` takes: paths with labels, kinds and stacks.

        The label of a leaf is its number, so that aliases have one label even where the tied leaf is a
        container. The labels of holes are tuples.
        """
        items: list[tuple[Path, Any]] = []
        kinds: dict[Any, str | None] = {}
        stacks: dict[Path, Stack] = {}
        # A number or label, and what leads to it: path, kind, stack, and the depth of its tree.
        todo: list[tuple[Any, Path, str | None, Stack, int]] = [(0, (), None, (), 0)]
        while todo:
            label, path, kind, stack, depth = todo.pop()
            node = self.nodes[label] if type(label) is int else None
            if node is not None and node.rebuild is not None:
                self.containers[path] = Container(type(node.value), node.keys, node.form)
                if path:
                    items.append((path, None))
                if node.inner is None:
                    below = [*zip(node.children, node.keys, strict=True)]
                    todo += [(child, path + key, kind, stack, depth) for child, key in reversed(below)]
                    continue
                full, size = node.inner.full, len(path)
                entries = zip(
                    full.paths, full.slots, node.inner.slots, full.stacks or full.paths, strict=True
                )
                for entry, slot, here, own in reversed([*entries]):
                    below = (
                        None
                        if slot == EMPTY
                        else (label, slot)
                        if here == HOLE
                        else node.children[here]
                    )
                    is_state = kind == STATE or (slot != EMPTY and full.kinds[slot] == STATE)
                    own_stack = moved(own, size) if full.stacks else ()
                    todo.append(
                        (below, path + entry, STATE if is_state else PARAM, stack or own_stack, size)
                    )
                continue
            if node is not None and not node.named:
                if node.value is not None:
                    continue  # it has no name
                label = (label,)
            path = path or ("value",)
            items.append((path, label))
            kinds[label] = kind
            if stack:
                stacks[path] = stack
            if depth:
                self.depths[path] = depth
        return items, kinds, stacks

    def _rebuild(self, leaves: Mapping[int, Any], unnamed: Any) -> Any:
        """Returns the pytree with other leaves, by number; named ones that are not given are left out."""
        values: list[Any] = [None] * len(self.nodes)
        for number in range(len(self.nodes) - 1, -1, -1):  # a container comes before its children
            node = self.nodes[number]
            children = [values[child] for child in node.children]
            if node.rebuild is None:
                other = node.value if unnamed is KEEP or node.value is None else unnamed
                values[number] = leaves.get(number, _ABSENT) if node.named else other
            elif node.inner is None:
                values[number] = node.rebuild(
                    [None if child is _ABSENT else child for child in children]
                )
            else:
                kept = [slot for slot, child in enumerate(children) if child is not _ABSENT]
                part = node.inner.keep(kept) if len(kept) < len(children) else node.inner
                values[number] = node.rebuild(part, [children[slot] for slot in kept], unnamed)
        return None if values[0] is _ABSENT else values[0]


def key_segments(key_path: Iterable[Any]) -> Path:
    """Returns the path that a key path of jax stands for."""
    path: list[str] = []
    for key in key_path:
        match key:
            case DictKey() | FlattenedIndexKey():
                path.extend(_split(key.key))
            case GetAttrKey():
                path.append(key.name)
            case SequenceKey():
                path.append(str(key.idx))
            case _:
                path.extend(_split(key))
    return tuple(path)


def _split(key: object) -> Path:
    segments = tuple(str(key).split("/"))
    if not all(segments):
        raise RuleError(
            f"{key!r} cannot be part of a path: a key is a name, or names joined with '/', none empty."
        )
    return segments
