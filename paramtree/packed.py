"""Packed trees: the small leaves of a tree in one buffer for each dtype, under the same names.

A jitted call pays for every array that goes in and comes out, and an optimiser starts some
arithmetic for each; a net of hundreds of biases and norms spends its time on that. Packed, its
small leaves are one array to both. The model sees the tree that it knows: when a leaf is first
read, the buffer is taken apart by one ``split``, whose transpose is one concatenation, so the
gradient comes out packed as well.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from paramtree.core.arrays import describe, dtype_of, shape_of
from paramtree.core.errors import MismatchError
from paramtree.core.names import named
from paramtree.core.structure import Path, Structure
from paramtree.core.tree import ParamTree, _rebuild, register, whole
from paramtree.model.training import trace_state

__all__ = ["Packed", "pack", "unpack"]

MAX_BYTES = 65536  # see benchmarks/RESULTS.md


class Part(NamedTuple):
    """One array of a packed tree: a leaf, or a buffer of several with their shapes."""

    key: DictKey
    slots: list[int]
    shapes: list[tuple[int, ...]] | None
    dtype: Any


class Plan:
    """How the leaves of a tree are laid out; made once for a structure and what its leaves are like."""

    __slots__ = ("key", "parts", "structure")

    def __init__(self, structure: Structure, key: Any) -> None:
        alike, most = key
        self.structure, self.key = structure, key
        self.parts: list[Part] = []
        buffers: dict[Any, Part] = {}
        for slot, (shape, dtype) in enumerate(alike):
            kind = structure.kinds[slot]
            if not _fits(shape, dtype, most):
                path = DictKey("/".join(structure.canonical[slot]))
                self.parts.append(Part(path, [slot], None, dtype))
                continue
            # What is trained and what is not are apart, so an optimiser can be given either.
            if (dtype, kind) not in buffers:
                buffers[dtype, kind] = Part(DictKey(f"packed {kind} {dtype}"), [], [], dtype)
                self.parts.append(buffers[dtype, kind])
            part = buffers[dtype, kind]
            assert part.shapes is not None  # it is a buffer
            part.slots.append(slot)
            part.shapes.append(shape)

    def __reduce__(self) -> Any:
        return _plan, (self.structure, self.key)

    def __repr__(self) -> str:
        return f"packed {self.structure!r}"


def _fits(shape: Any, dtype: Any, most: int) -> bool:
    if shape is None or dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return False  # PRNG keys and other objects stay as they are
    return bool(math.prod(shape) * dtype.itemsize < most)


def _plan(structure: Structure, key: Any) -> Plan:
    cached = ("pack", key)
    if cached not in structure.cache:
        structure.cache[cached] = Plan(structure, key)
    found: Plan = structure.cache[cached]
    return found


class Packed(ParamTree):
    """A parameter tree whose small leaves lie in one buffer for each dtype; made by ``pt.pack``.

    It reads like the tree it was made from. As a pytree its leaves are the buffers and the large
    leaves, so ``jit``, ``grad``, ``tree.map`` and optax work on these.
    """

    __slots__ = ("_arrays", "_plan", "_taken")

    _plan: Plan
    _arrays: tuple[Any, ...]  # one for each part of the plan
    _taken: tuple[Any, Any] | None  # the trace in which the leaves were taken out, and they

    @staticmethod
    def make(plan: Plan, arrays: Sequence[Any], place: Path = ()) -> "Packed":
        """Returns a packed tree of some arrays, one for each part of its plan."""
        tree = object.__new__(Packed)
        for name, value in (
            ("_plan", plan),
            ("_arrays", tuple(arrays)),
            ("_structure", plan.structure),
            ("_node", None),
            ("_place", place),
            ("_taken", None),
        ):
            object.__setattr__(tree, name, value)
        return tree

    @property
    def _leaves(self) -> tuple[Any, ...]:  # type: ignore[override]  # a field of other trees
        if any(isinstance(array, jax.core.Tracer) for array in self._arrays):
            # What was taken out in one trace must not be used in another, even if the tree itself can.
            trace = trace_state()
            if self._taken is None or self._taken[0] != trace:
                self._keep(trace, self._take())
        elif self._taken is None:
            # At once, also while something else is being traced: what is traced could not be kept.
            with jax.ensure_compile_time_eval():
                self._keep(None, self._take())
        assert self._taken is not None
        leaves: tuple[Any, ...] = self._taken[1]
        return leaves

    def _keep(self, trace: Any, leaves: tuple[Any, ...]) -> None:
        object.__setattr__(self, "_taken", (trace, leaves))

    def _take(self) -> tuple[Any, ...]:
        leaves: list[Any] = [None] * len(self._structure.kinds)
        for part, array in zip(self._plan.parts, self._arrays, strict=True):
            pieces = [array] if part.shapes is None else _split(array, part)
            for slot, piece in zip(part.slots, pieces, strict=True):
                leaves[slot] = piece
        return tuple(leaves)

    def _with(self, leaves: Sequence[Any]) -> ParamTree:
        """Returns a tree of other leaves, packed by the same bound."""
        if self._taken is not None and all(a is b for a, b in zip(leaves, self._taken[1], strict=True)):
            return self
        return pack(_rebuild(self._structure, leaves, self._place), max_bytes=self._plan.key[1])

    def _view(self, node: Any) -> ParamTree:
        return _unpacked(self)._view(node)

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed.make, (self._plan, self._arrays, self._place)


def _unpacked(tree: Any) -> Any:
    if not isinstance(tree, Packed):
        return tree
    return _rebuild(tree._structure, tree._leaves, tree._place)


def _split(buffer: Any, part: Part) -> list[Any]:
    """Returns the leaves in a buffer; under ``vmap`` and the like it has more axes, before the last."""
    assert part.shapes is not None
    sizes = [math.prod(shape) for shape in part.shapes]
    have = shape_of(buffer)
    if not have or have[-1] != sum(sizes):
        raise MismatchError(
            f"the buffer `{part.key.key}` of a packed tree has {sum(sizes)} values, and there is "
            f"{describe(buffer)} in its place, so its leaves cannot be read: masks and labels go by "
            "leaf, so pt.partition the tree first and pt.pack each part, or pt.unpack it."
        )
    before = have[:-1]
    if isinstance(buffer, jax.ShapeDtypeStruct):
        dtype = buffer.dtype
        return [jax.ShapeDtypeStruct((*before, *shape), dtype) for shape in part.shapes]
    starts = itertools.accumulate(sizes, initial=0)
    if isinstance(buffer, jax.core.Tracer):
        pieces: Any = jax.lax.split(buffer, sizes, axis=len(before))
    elif isinstance(buffer, np.ndarray):
        pieces = (buffer[..., start : start + size] for start, size in zip(starts, sizes, strict=False))
    else:  # compiled, one split into hundreds takes XLA seconds; this compiles once for each size
        pieces = (
            jax.lax.dynamic_slice_in_dim(buffer, start, size, len(before))
            for start, size in zip(starts, sizes, strict=False)
        )
    return [piece.reshape(*before, *shape) for piece, shape in zip(pieces, part.shapes, strict=True)]


def _flatten(tree: Packed) -> tuple[tuple[Any, ...], Plan]:
    return tree._arrays, tree._plan


def _flatten_with_keys(tree: Packed) -> tuple[list[tuple[DictKey, Any]], Plan]:
    keys = [part.key for part in tree._plan.parts]
    return list(zip(keys, tree._arrays, strict=True)), tree._plan


register(Packed, _flatten, _flatten_with_keys, Packed.make)


def pack(tree: Any, *, max_bytes: int = MAX_BYTES) -> Packed:
    """Returns the tree with its small leaves in one buffer for each dtype and kind.

    The names, kinds and ties stay, and so does how it is read: ``net(packed, x)``, ``jax.grad``,
    ``pt.collect`` and ``pt.save`` work on it. To jit and to an optimiser it has a few arrays where
    the tree has hundreds. A leaf as large as the bound would gain nothing and stays as it is. What
    goes by leaf, such as a mask for optax, does not fit a buffer: ``pt.partition`` the tree and
    pack each part.

    Args:
      tree: a parameter tree of arrays, or any other pytree.
      max_bytes: a leaf is packed if it has fewer bytes than this.

    Returns:
      A tree of another treedef than ``tree``; its gradient is packed in the same way.

    Raises:
      ValueError: ``max_bytes`` is no whole number of 0 or more.

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
        raise ValueError(f"pack: max_bytes is a number of bytes, 0 or more, but found {max_bytes!r}.")
    source = whole(tree) if isinstance(tree, ParamTree) else named(tree).tree
    structure, leaves = source._structure, source._leaves
    alike = tuple((shape_of(leaf), _canonical(dtype_of(leaf))) for leaf in leaves)
    plan = _plan(structure, (alike, max_bytes))
    arrays = []
    for part in plan.parts:
        pieces = [leaves[slot] for slot in part.slots]
        arrays.append(pieces[0] if part.shapes is None else _joined(pieces, part))
    return Packed.make(plan, arrays, source._place)


def _canonical(dtype: Any) -> Any:
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    return jax.dtypes.canonicalize_dtype(dtype)


def _joined(pieces: Sequence[Any], part: Part) -> Any:
    if all(isinstance(piece, jax.ShapeDtypeStruct) for piece in pieces):
        size = sum(math.prod(piece.shape) for piece in pieces)
        return jax.ShapeDtypeStruct((size,), part.dtype)
    if not any(isinstance(piece, jax.core.Tracer) for piece in pieces):
        # On the host: compiled, joining hundreds of arrays takes XLA seconds.
        return jnp.asarray(np.concatenate([np.ravel(piece) for piece in pieces]), part.dtype)
    return jnp.concatenate([jnp.ravel(jnp.asarray(piece, part.dtype)) for piece in pieces])


def unpack(tree: Any) -> Any:
    """Returns the tree with every leaf an array of its own; one that is not packed as it is.

    Args:
      tree: a packed tree, or anything that holds some, such as an optimiser's state.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})
      >>> jax.tree.structure(pt.unpack(pt.pack(params))) == jax.tree.structure(params)
      True
    """
    return jax.tree.map(_unpacked, tree, is_leaf=lambda value: isinstance(value, Packed))
