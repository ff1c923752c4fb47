"""The walker: from any pytree to named leaves, and back.

``open_tree`` turns a parameter tree, a dict, an optimizer state or a module into a structure and its
leaves, and rebuilds it from other leaves. A parameter tree inside another container keeps its order,
ties, kinds, stacks and holes, and a leaf that is itself a container, such as a row of a Hessian, is
walked into. All verbs read trees through this function, so all see the same leaves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey

from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.errors import RuleError
from paramtree.core.structure import EMPTY, HOLE, PARAM, STATE, Path, Structure, build, clash, moved
from paramtree.core.tree import ParamTree, flatten, is_flat, place_of, unflatten

__all__ = ["KEEP", "Container", "Opened", "is_array", "is_array_or_number", "open_tree"]

KEEP: Any = object()  # unnamed leaves stay
_ABSENT: Any = object()  # a leaf that is left out
_LEVEL: Any = object()  # a level without children


class Container(NamedTuple):
    """A container: its type, the paths of its children, and its treedef, if jax made one."""

    type: type
    keys: tuple[Path, ...]
    form: Any


class Opened(NamedTuple):
    """A pytree as a structure and its leaves.

    Attributes:
      structure: names, ties, kinds, stacks and holes; None in a container is a hole.
      leaves: one for each slot.
      rebuild: makes the pytree from the structure, or a version of it with more holes, and its leaves;
        a third argument replaces the unnamed leaves, such as a function in a module.
      kinds: the kind of each slot; None for a leaf outside parameter trees.
      place: the path of a sub-tree, for messages.
      depths: for each path in a parameter tree inside a container, the length of the path to that tree.
      containers: the containers, by path.
      renamed: like ``rebuild``, for a structure in which paths were changed, if that differs.
      pending: a run that may still add leaves, so patterns may match later.
    """

    structure: Structure
    leaves: tuple[Any, ...]
    rebuild: Callable[..., Any]
    kinds: Sequence[str | None]
    place: Path = ()
    depths: Mapping[Path, int] = {}
    containers: Mapping[Path, Container] = {}
    renamed: Callable[..., Any] | None = None
    pending: Any = None

    def restore(self, leaves: Sequence[Any], unnamed: Any = KEEP) -> Any:
        """Returns the pytree with other leaves, one for each slot."""
        return self.rebuild(self.structure, leaves, unnamed)

    def fail(self, error: RuleError) -> None:
        """Raises an error about patterns, now or when all leaves are known."""
        if self.pending is None:
            raise error
        self.pending.doubt(error)

    def part(self, structure: Structure, take: Callable[..., Any], unnamed: Any = KEEP) -> Any:
        """Returns the pytree with some leaves only: holes in parameter trees, None elsewhere."""
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
    """Returns any pytree as a structure, which names its leaves, and the leaves.

    Args:
      tree: a parameter tree, or any other pytree.
      counts: whether a leaf outside parameter trees has a name; without it all have, even those that
        are None. In a parameter tree every leaf has a name.
      declared: whether to read mappings in their own order; jax sorts their keys.

    Raises:
      NameCollisionError: two leaves have one path, as in {"a/b": x, "a": {"b": y}}.
      RuleError: a key is empty or has an empty segment, as in "a//b".
    """
    if type(tree) is ParamTree and is_flat(tree):
        return _opened(tree)
    opener = getattr(type(tree), "__open__", None)
    return opener(tree) if opener else _Walk(counts, declared).open(tree)


def _opened(tree: ParamTree) -> Opened:
    (structure, leaves), place = flatten(tree), place_of(tree)
    return Opened(
        structure, leaves, lambda s, new, _=None: unflatten(s, new, place), structure.kinds, place
    )


class _Node(NamedTuple):
    """A value in the pytree with the labels of its children; ``rebuild`` is None for a leaf.

    ``inner`` is the structure of a parameter tree, whose children are its leaves.
    """

    value: Any
    children: Sequence[Path] = ()
    rebuild: Callable[..., Any] | None = None
    inner: Structure | None = None


class _Walk:
    """One walk over a pytree.

    The label of a value is the first path that leads to it; the aliases of a tied leaf share one.
    """

    def __init__(self, counts: Callable[[Any], bool] | None, declared: bool) -> None:
        self.counts, self.declared = counts, declared
        self.nodes: dict[Path, _Node] = {}  # a container comes before its children
        self.leaves: dict[Path, Any] = {}
        self.items: list[tuple[Path, Path | None]] = []
        self.kinds: dict[Path | None, str | None] = {}
        self.stacks: dict[Path, Any] = {}
        self.depths: dict[Path, int] = {}
        self.containers: dict[Path, Container] = {}
        self.scope: tuple[Any, Any] = (None, None)  # how to rename in it, and its pending run

    def open(self, tree: Any) -> Opened:
        # Values still to be visited, as the arguments of ``visit``.
        todo: list[tuple[Any, ...]] = [(tree, (), (), None, (), 0, self.counts is None)]
        while todo:
            todo += reversed(self.visit(*todo.pop()))
        kinds = {label: kind or PARAM for label, kind in self.kinds.items()}
        full, order = build(self.items, kinds, self.stacks)
        kept = [slot for slot, label in enumerate(order) if label in self.leaves]
        leaves = tuple(self.leaves[order[slot]] for slot in kept)

        def rebuild(part: Structure, leaves: Sequence[Any], unnamed: Any = KEEP) -> Any:
            values = {order[slot]: leaf for slot, leaf in zip(part.kept, leaves, strict=True)}
            return self.rebuilt(values, unnamed)

        place = place_of(tree) if type(tree) is ParamTree else ()
        own_kinds = tuple(self.kinds[order[slot]] for slot in kept)
        more = own_kinds, place, self.depths, self.containers, *self.scope
        return Opened(full.keep(kept), leaves, rebuild, *more)

    def visit(self, value: Any, path: Path, label: Path, *more: Any) -> list[Any]:
        """Records a value, and returns the values to visit below it.

        ``more`` is its kind, its stack, the depth of its parameter tree, and whether it has a name
        regardless of ``counts``.
        """
        kind, stack, depth, named = more
        if label in self.nodes and self.nodes[label].value is not value:
            raise clash(path)
        node, keys, children, form = self.node(value, label)
        if node.rebuild is None:
            named = named or (value is not None and self.counts is not None and self.counts(value))
            if value is not _LEVEL and value is not _ABSENT:
                self.nodes[label] = node
                if named:
                    self.leaves[label] = value
            if named or value is None:  # else a leaf without a name
                self.items.append((path or ("value",), None if value is _LEVEL else label))
                self.kinds[label] = kind
                self.stacks.update({path: stack} if stack else {})
                self.depths.update({path: depth} if depth > 0 else {})
            return []
        self.nodes[label] = node
        self.containers[path] = Container(type(value), keys, form)
        if path:
            self.items.append((path, None))
        if node.inner is None:
            more = kind, stack, depth, self.counts is None
            return [(c, path + k, label + k, *more) for c, k in zip(children, keys, strict=True)]
        full, size = node.inner.full, len(path)
        entries = zip(full.paths, full.slots, node.inner.slots, full.stacks or full.paths, strict=True)
        below = []
        for entry, slot, present, own in entries:
            child = _LEVEL if slot == EMPTY else _ABSENT if present == HOLE else children[present]
            first = label + (entry if slot == EMPTY else full.canonical[slot])
            is_state = kind == STATE or (slot != EMPTY and full.kinds[slot] == STATE)
            axes = stack or (moved(own, size) if full.stacks else ())  # type: ignore[arg-type]
            more = STATE if is_state else PARAM, axes, size or -1, True
            below.append((child, path + entry, first, *more))
        return below

    def node(self, value: Any, label: Path) -> tuple[_Node, tuple[Path, ...], Sequence[Any], Any]:
        """Returns the node of a value, the keys of its children, the children, and its treedef."""
        if isinstance(value, ParamTree) or hasattr(type(value), "__open__"):
            source = _opened(value) if type(value) is ParamTree else open_tree(value)
            structure = source.structure
            self.scope = (source.renamed, source.pending) if source.renamed else self.scope
            children = [label + structure.full.canonical[slot] for slot in structure.kept]
            return _Node(value, children, source.rebuild, structure), (), source.leaves, None
        if self.declared and isinstance(value, Mapping):
            keys = tuple(_segments([DictKey(key)]) for key in value)
            return _Node(value, (), dict), keys, tuple(value.values()), None
        if value is None or jax.tree_util.all_leaves([value]):
            return _Node(value), (), (), None
        form: Any
        flat, form = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda c: c is not value)
        keys = tuple(_segments(key_path) for key_path, _ in flat)
        node = _Node(value, [label + key for key in keys], form.unflatten)
        return node, keys, [child for _, child in flat], form

    def rebuilt(self, leaves: Mapping[Path, Any], unnamed: Any) -> Any:
        """Returns the pytree with other leaves; those without a new value are left out."""
        values: dict[Path, Any] = {}
        for label, node in reversed(self.nodes.items()):
            children = [values[child] for child in node.children]
            if node.rebuild is None:
                fallback = node.value if unnamed is KEEP or node.value is None else unnamed
                values[label] = leaves.get(label, _ABSENT) if label in self.leaves else fallback
            elif node.inner is None:
                values[label] = node.rebuild([None if c is _ABSENT else c for c in children])
            else:
                kept = [slot for slot, child in enumerate(children) if child is not _ABSENT]
                part = node.inner.keep(kept) if len(kept) < len(children) else node.inner
                values[label] = node.rebuild(part, [children[slot] for slot in kept], unnamed)
        return None if values[()] is _ABSENT else values[()]


def _segments(key_path: Iterable[Any]) -> Path:
    """Returns a key path of jax as a path."""
    path: list[str] = []
    for key in key_path:
        name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
        path += str(name).split("/")
        if not all(path):
            raise RuleError(
                f"{name!r} cannot be part of a path: a key is a name, or names joined with '/', none "
                "of them empty."
            )
    return tuple(path)
