"""Packed trees: the small leaves of a tree in one buffer for each dtype and kind, under the same names.

A jitted call pays for every array that goes in and comes out, and an optimizer starts some arithmetic
for each; a net of hundreds of biases and norms spends its time on that. Packed, its small leaves are
one array for both. A model sees the tree that it knows: reading a leaf splits its buffer, and the
transpose of a split is one concatenation, so the gradient comes out packed as well.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from paramtree.core.arrays import describe, dtype_of, join, shape_of
from paramtree.core.errors import MismatchError, ScopeError
from paramtree.core.pytrees import Opened, is_array, open_tree
from paramtree.core.structure import Path, Structure
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.model.scope import Scope
from paramtree.model.traces import current_trace
from paramtree.typing import Read, T

__all__ = ["Packed", "pack", "unpack"]

MAX_BYTES = 65536  # see benchmarks/RESULTS.md

Likeness = tuple[tuple[Any, Any], ...]  # the shape and dtype of each leaf


class Block(NamedTuple):
    """One array of a packed tree: a leaf, or a buffer of several with their shapes."""

    key: DictKey
    slots: list[int]
    shapes: list[tuple[int, ...]] | None


class Layout:
    """Which leaves share a buffer; equal for equal structures, shapes and dtypes."""

    __slots__ = ("_hash", "blocks", "like", "max_bytes", "structure")

    def __init__(self, structure: Structure, like: Likeness, max_bytes: int) -> None:
        self.structure, self.like, self.max_bytes = structure, like, max_bytes
        self._hash = hash((structure, like, max_bytes))
        self.blocks: list[Block] = []
        buffers: dict[Any, Block] = {}
        for slot, (shape, dtype) in enumerate(like):
            if not _fits(shape, dtype, max_bytes):
                path = DictKey("/".join(structure.canonical[slot]))
                self.blocks.append(Block(path, [slot], None))
                continue
            # Parameters and state are separate, so that an optimizer can be given either.
            kind = structure.kinds[slot]
            if (dtype, kind) not in buffers:
                buffers[dtype, kind] = Block(DictKey(f"packed {kind} {dtype}"), [], [])
                self.blocks.append(buffers[dtype, kind])
            block = buffers[dtype, kind]
            assert block.shapes is not None  # it is a buffer
            block.slots.append(slot)
            block.shapes.append(shape)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self.__reduce__() == other.__reduce__())

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        return _layout, (self.structure, self.like, self.max_bytes)

    def __repr__(self) -> str:
        return f"packed {self.structure!r}"


def _fits(shape: Any, dtype: Any, max_bytes: int) -> bool:
    if shape is None or dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return False  # PRNG keys and other objects are not packed
    return bool(math.prod(shape) * dtype.itemsize < max_bytes)


def _layout(structure: Structure, like: Likeness, max_bytes: int) -> Layout:
    key = ("pack", like, max_bytes)
    return structure.cached(key, lambda: Layout(structure, like, max_bytes))


class Packed(Read):
    """A tree whose small leaves share buffers, made by ``pt.pack``; a pytree of its own.

    It reads like the tree it was made from. As a pytree its leaves are the buffers and the large
    leaves, so ``jit``, ``grad``, ``tree.map`` and optax work on these.
    """

    __slots__ = ("__weakref__", "_arrays", "_at", "_layout", "_split")

    _layout: Layout
    _arrays: tuple[Any, ...]  # one for each block of the layout
    _at: Path
    _split: tuple[Any, Any] | None  # the trace in which the buffers were split, and the leaves

    @staticmethod
    def make(layout: Layout, arrays: Sequence[Any], place: Path = (), leaves: Any = None) -> "Packed":
        """Returns a packed tree of some arrays, one for each block of its layout."""
        tree = object.__new__(Packed)
        split = None if leaves is None else (_trace(arrays), tuple(leaves))
        fields = (("_layout", layout), ("_arrays", tuple(arrays)), ("_at", place), ("_split", split))
        for name, value in fields:
            object.__setattr__(tree, name, value)
        return tree

    def _unpacked(self) -> tuple[Any, ...]:
        # Leaves that were split in one trace must not be used in another, even if the tree can.
        trace = _trace(self._arrays)
        if self._split is None or self._split[0] != trace:
            if trace is None:
                # Eagerly, even while something else is being traced: a tracer could not be kept.
                with jax.ensure_compile_time_eval():
                    leaves = self._take()
            else:
                leaves = self._take()
            object.__setattr__(self, "_split", (trace, leaves))
        assert self._split is not None
        return self._split[1]

    def _take(self) -> tuple[Any, ...]:
        leaves: list[Any] = [None] * len(self._layout.like)
        for block, array in zip(self._layout.blocks, self._arrays, strict=True):
            pieces = [array] if block.shapes is None else _pieces(array, block)
            for slot, piece in zip(block.slots, pieces, strict=True):
                leaves[slot] = piece
        return tuple(leaves)

    def _tree(self) -> ParamTree:
        return unflatten(self._layout.structure, self._unpacked(), self._at)

    # It reads as the tree does

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Packed.__slots__:  # Python probes for protocols
            raise AttributeError(name)
        return getattr(self._tree(), name)

    def __getitem__(self, key: str | int) -> Any:
        return self._tree()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tree()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree())

    def __len__(self) -> int:
        return len(self._tree())

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(unflatten(self._layout.structure, self._layout.like, self._at), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(unflatten(self._layout.structure, self._layout.like, self._at), name)

    def __dir__(self) -> list[str]:
        return dir(self._tree())

    def __repr__(self) -> str:
        return repr(self._tree())

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed.make, (self._layout, self._arrays, self._at)

    # The walker, merge and layers

    def __open__(self) -> Opened:
        def rebuild(part: Structure, leaves: Sequence[Any], unnamed: Any = None) -> Packed:
            return _packed(part, tuple(leaves), self._layout.max_bytes, self._at, (self,))

        structure = self._layout.structure
        return Opened(structure, self._unpacked(), rebuild, structure.kinds, self._at)

    @staticmethod
    def __merge__(parts: "Sequence[Packed]", merged: ParamTree) -> "Packed":
        return _packed(*flatten(merged), parts[0]._layout.max_bytes, parts[0]._at, parts)

    def __scope__(self) -> ParamTree:
        return self._tree()


def _trace(arrays: Sequence[Any]) -> Any:
    """Returns the current trace if any of the arrays is a tracer."""
    return current_trace() if any(isinstance(array, jax.core.Tracer) for array in arrays) else None


def _pieces(buffer: Any, block: Block) -> list[Any]:
    """Returns the leaves in a buffer; under ``vmap`` it has more axes, before the last."""
    assert block.shapes is not None
    sizes = [math.prod(shape) for shape in block.shapes]
    have = shape_of(buffer)
    if not have or have[-1] != sum(sizes):
        if not is_array(buffer) and (buffer is None or jax.tree_util.all_leaves([buffer])):
            return [buffer] * len(sizes)  # one mask, label or sharding for all
        raise MismatchError(
            f"the buffer `{block.key.key}` of a packed tree has {sum(sizes)} values, but found "
            f"{describe(buffer)}, so its leaves cannot be read: pt.unpack the tree before what changes "
            "the shape of a leaf."
        )
    lead = have[:-1]
    if isinstance(buffer, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct((*lead, *shape), buffer.dtype) for shape in block.shapes]
    starts = itertools.accumulate(sizes, initial=0)
    if isinstance(buffer, jax.core.Tracer):
        pieces: Any = jax.lax.split(buffer, sizes, axis=len(lead))
    elif isinstance(buffer, np.ndarray):
        pieces = (buffer[..., start : start + size] for start, size in zip(starts, sizes, strict=False))
    else:  # compiled, one split into hundreds takes XLA seconds; this compiles once for each size
        pieces = (
            jax.lax.dynamic_slice_in_dim(buffer, start, size, len(lead))
            for start, size in zip(starts, sizes, strict=False)
        )
    return [piece.reshape(*lead, *shape) for piece, shape in zip(pieces, block.shapes, strict=True)]


def _flatten_with_keys(tree: Packed) -> tuple[list[tuple[DictKey, Any]], Layout]:
    keys = [block.key for block in tree._layout.blocks]
    return list(zip(keys, tree._arrays, strict=True)), tree._layout


_make: Any = Packed.make
jax.tree_util.register_pytree_with_keys(
    Packed, _flatten_with_keys, _make, lambda tree: (tree._arrays, tree._layout)
)


def pack(tree: Any, *, max_bytes: int = MAX_BYTES) -> Packed:
    """Returns the tree with its small leaves in one buffer for each dtype and kind.

    Names, kinds, ties and stacks stay, and so does reading: ``net(packed, x)``, ``jax.grad``,
    ``pt.training``, ``pt.collect`` and ``pt.save`` work on it. To jit and to an optimizer it has a few
    arrays where the tree has hundreds. A leaf of ``max_bytes`` or more would gain nothing and stays
    apart.

    Verbs that return a tree return a packed one: ``select`` and ``partition`` pack the part, and
    ``merge`` gives the packed tree back. A mask, label or sharding must be the same for all leaves of a
    buffer, or the verb raises; partition the tree first and pack each part.

    An optimizer sees a buffer as one vector. Those that treat every number alike give the same result:
    ``sgd``, ``adam``, ``adamw``, ``rmsprop``, ``lion``, clipping by value or by global norm. Those that
    use the shape or norm of a leaf give other numbers, so unpack the tree for them: ``lamb``, ``lars``,
    ``fromage``, ``muon``, ``adafactor``, ``sm3``, ``shampoo``-like preconditioners,
    ``adaptive_grad_clip``, ``clip_by_block_rms``, ``scale_by_trust_ratio``, and masks by ``ndim``.

    Args:
      tree: a parameter tree of arrays, or any other pytree, whose names are kept.
      max_bytes: a leaf is packed if it has fewer bytes than this.

    Returns:
      A tree of another treedef than ``tree``; its gradient is packed in the same way.

    Raises:
      ValueError: ``max_bytes`` is not a non-negative integer.
      ScopeError: ``tree`` is a scope, inside a model.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"a": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "c": jnp.ones(2)})
      >>> packed = pt.pack(params)
      >>> [leaf.shape for leaf in jax.tree.leaves(packed)], packed.a.w.shape
      ([(11,)], (2, 3))
      >>> pt.unpack(jax.tree.map(lambda leaf: leaf * 2, packed)).c
      Array([2., 2.], dtype=float32)
    """
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
        raise ValueError(f"pack: max_bytes must be a non-negative integer, but found {max_bytes!r}.")
    if isinstance(tree, Scope):
        raise ScopeError(
            "pack: a scope cannot be packed inside the model. Pack the tree that it is called with."
        )
    source = open_tree(tree, counts=None, declared=True)  # numbers and other objects too
    return _packed(source.structure, source.leaves, max_bytes, source.place, ())


def _packed(
    structure: Structure, leaves: Sequence[Any], max_bytes: int, place: Path, sources: Sequence[Packed]
) -> Packed:
    """Packs leaves. A buffer of the sources is reused if all of its leaves are present, unchanged."""
    if sources and not all(map(is_array, leaves)):
        return _of_values(structure, leaves, sources[0])
    lead, kept = _lead(structure, leaves, sources), structure.kept
    like = tuple(
        (None if (shape := shape_of(leaf)) is None else shape[len(lead) :], _canonical(dtype_of(leaf)))
        for leaf in leaves
    )
    layout = _layout(structure, like, max_bytes)
    known: dict[Any, tuple[Any, Any]] = {}  # the buffers of the sources, and the leaves in each
    for source in sources:
        split, slots = source._unpacked(), source._layout.structure.kept
        for block, array in zip(source._layout.blocks, source._arrays, strict=True):
            key = block.key, tuple(slots[slot] for slot in block.slots)
            known[key] = array, [split[slot] for slot in block.slots]
    arrays = []
    for block in layout.blocks:
        pieces = [leaves[slot] for slot in block.slots]
        array, old = known.get((block.key, tuple(kept[slot] for slot in block.slots)), (None, None))
        if block.shapes is None:
            arrays.append(pieces[0])
        elif old is not None and all(piece is leaf for piece, leaf in zip(pieces, old, strict=True)):
            arrays.append(array)
        else:
            arrays.append(_joined(pieces, like[block.slots[0]][1], lead))
    return Packed.make(layout, arrays, place, leaves)


def _lead(structure: Structure, leaves: Sequence[Any], sources: Sequence[Packed]) -> tuple[int, ...]:
    """Returns the axes that all leaves have before those of the sources' layouts, as under ``vmap``."""
    shapes = {
        slot: like[0]
        for source in sources
        for slot, like in zip(source._layout.structure.kept, source._layout.like, strict=True)
    }
    leads = set()
    for slot, leaf in zip(structure.kept, leaves, strict=True):
        have, expected = shape_of(leaf) or (), shapes.get(slot) or ()
        size = len(have) - len(expected)
        leads.add(have[:size] if size >= 0 and have[size:] == expected else None)
    return (leads.pop() if len(leads) == 1 else None) or ()


def _of_values(structure: Structure, values: Sequence[Any], source: Packed) -> Packed:
    """Packs values that are not arrays, such as a mask, in the layout of a packed tree.

    Raises:
      MismatchError: the leaves of a buffer have different values.
    """
    full = source._layout.structure.kept
    slot_of = {slot: i for i, slot in enumerate(full)}
    like = tuple(source._layout.like[slot_of[slot]] for slot in structure.kept)
    layout = _layout(structure, like, source._layout.max_bytes)
    arrays = []
    for block in layout.blocks:
        first = values[block.slots[0]]
        unlike = [slot for slot in block.slots if values[slot] is not first and values[slot] != first]
        if unlike:
            names = [join(structure.canonical[slot]) for slot in (block.slots[0], unlike[0])]
            raise MismatchError(
                f"`{names[0]}` and `{names[1]}` share the buffer `{block.key.key}` of a packed tree, "
                f"and get different values, {first!r} and {values[unlike[0]]!r}: pt.partition the tree "
                "first and pt.pack each part, or pt.unpack it."
            )
        arrays.append(first)
    return Packed.make(layout, arrays, source._at)


def _canonical(dtype: Any) -> Any:
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    canonical = jax.dtypes.canonicalize_dtype(dtype)
    exact = canonical == dtype or jnp.issubdtype(dtype, jnp.inexact)
    return canonical if exact else None  # integers that jax cannot hold keep an array of their own


def _joined(pieces: Sequence[Any], dtype: Any, lead: tuple[int, ...]) -> Any:
    sizes = [math.prod(piece.shape[len(lead) :]) for piece in pieces]
    if all(isinstance(piece, jax.ShapeDtypeStruct) for piece in pieces):
        return jax.ShapeDtypeStruct((*lead, sum(sizes)), dtype)
    shaped = [(piece, (*lead, size)) for piece, size in zip(pieces, sizes, strict=True)]
    if not any(isinstance(piece, jax.core.Tracer) for piece in pieces):
        # On the host: compiled, joining hundreds of arrays takes XLA seconds.
        host = [np.reshape(np.asarray(piece), shape) for piece, shape in shaped]
        return jnp.asarray(np.concatenate(host, axis=-1), dtype)
    traced = [jnp.reshape(jnp.asarray(piece, dtype), shape) for piece, shape in shaped]
    return jnp.concatenate(traced, axis=-1)


@overload
def unpack(tree: Packed) -> ParamTree: ...
@overload
def unpack(tree: T) -> T: ...
def unpack(tree: Any) -> Any:
    """Returns the tree with every leaf an array of its own; a tree that is not packed is unchanged.

    Args:
      tree: a packed tree, or a container of packed trees, such as an optimizer state.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})
      >>> jax.tree.structure(pt.unpack(pt.pack(params))) == jax.tree.structure(params)
      True
    """
    if isinstance(tree, Scope):
        return tree
    return jax.tree.map(
        lambda value: value._tree() if isinstance(value, Packed) else value,
        tree,
        is_leaf=lambda value: isinstance(value, Packed),
    )
