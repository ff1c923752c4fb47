"""Orbax checkpoints, for trees that are sharded over devices and processes.

A ``.orbax`` path is a folder with one numbered checkpoint. Saving writes the next number and then
deletes the previous one, so the folder always has a complete checkpoint.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from paramtree.core.errors import LoadError, ParamTreeError
from paramtree.core.pytrees import is_array
from paramtree.io.checksums import Checksums
from paramtree.io.folders import discard, hidden, numbered, publish, remove_unfinished, tidy
from paramtree.io.formats.format import Content, Format
from paramtree.io.locks import Lock, hold
from paramtree.io.orbax_items import (
    LAYOUT,
    Step,
    is_checkpoint,
    is_finished,
    is_one_array,
    is_tree,
    locate,
)
from paramtree.io.processes import agree, is_first
from paramtree.io.source import Source, Stored, check_array, fail, read_layout
from paramtree.io.wire import NUMBERS, to_dtype

__all__ = ["FORMAT", "as_state", "orbax"]

_NATIVE = NUMBERS | {
    "bfloat16", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz",
}  # fmt: skip
_EMPTY, _CHECKED = "paramtree_empty", "paramtree_checksums"  # in the metadata, beside the layout
_LITTLE = 2**16  # bytes of a file that is checked when a checkpoint is opened
_TRIES = 20  # to open a checkpoint that others keep replacing
_PATIENCE = 600.0  # seconds to wait for another process that saves to the same path


def orbax() -> Any:
    """Imports Orbax.

    Raises:
      ParamTreeError: Orbax is not installed.
    """
    try:
        import orbax.checkpoint  # type: ignore[import-untyped]
    except ImportError:
        raise ParamTreeError(
            "a .orbax checkpoint needs Orbax: pip install 'paramtree[orbax]', or save as .safetensors."
        ) from None
    return orbax.checkpoint


class Orbax(Format):
    """Orbax folders, which all processes write together."""

    name = "orbax"
    endings = (".orbax",)
    native = _NATIVE
    keeps = frozenset(("layout", "slices"))
    extra = "orbax"

    def recognises(self, path: str, head: bytes) -> bool:
        return os.path.isdir(path) and is_checkpoint(path)

    def write(self, path: str, content: Content) -> None:
        """Writes arrays, each process its own shards, and the layout as metadata."""
        _write(path, content.arrays, content.layout)

    def read(self, path: str, file: Any) -> Source:
        """Opens a checkpoint that ``pt.save``, ``pt.Checkpoints`` or Orbax itself wrote."""
        return _read(path, self)


# Writing


def _write(path: str, arrays: Mapping[str, Any], layout: str) -> None:
    ocp = orbax()
    made = not os.path.lexists(path)
    os.makedirs(path, exist_ok=True)
    lock = Lock(path)
    staged = ""
    try:
        number, _, token = agree(lambda: _begin(path, lock)).partition(" ")
        staged = os.path.abspath(hidden(path, int(number), "saving", token))
        state, metadata = as_state(arrays, layout)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staged, state, custom_metadata=metadata)
            checkpointer.wait_until_finished()
        agree(lambda: _finish(path, staged, int(number)))  # the others must not read before that
    finally:
        if staged and is_first():
            remove_unfinished(staged)
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # if it is empty, as nothing was saved


def _begin(path: str, lock: Lock) -> str:
    """Takes the lock of a folder. Returns the next number in it, and a name for what is unfinished."""
    if lock.take(_PATIENCE):
        tidy(path)
    numbers = numbered(path)
    others = [folder for folder in numbers.values() if is_finished(folder) and not _is_ours(folder)]
    if is_tree(path) or others:
        raise ParamTreeError(
            f"{path} was not written: it has checkpoints that pt.save did not write "
            f"({others[0] if others else 'a tree of Orbax'}), and would delete or hide them. Choose "
            "another path, or delete the folder."
        )
    token = os.urandom(4).hex()
    return f"{max(numbers, default=-1) + 1} {token}"


def _is_ours(folder: str) -> bool:
    try:
        return is_tree(folder) and LAYOUT in locate(folder).custom
    except LoadError:
        return is_tree(folder)  # it is damaged, and saving again is the way out


def _finish(path: str, staged: str, number: int) -> str:
    earlier = numbered(path)
    publish(staged, path, number)
    for folder in earlier.values():
        if is_finished(folder) and _is_ours(folder):
            discard(folder)
    return ""


def as_state(arrays: Mapping[str, Any], layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays and the metadata for Orbax to write."""
    # Orbax cannot write empty arrays, nor a tree without arrays.
    full = {name: array for name, array in arrays.items() if np.size(array)} or {"": np.zeros(1)}
    empty = {
        name: [np.dtype(array.dtype).name, list(array.shape)]
        for name, array in arrays.items()
        if not np.size(array)
    }
    state = {name: a if hasattr(a, "dtype") else np.asarray(a) for name, a in full.items()}
    return state, {LAYOUT: layout, _EMPTY: empty, _CHECKED: True}


# Reading


@dataclass(frozen=True)
class _Tree:
    """One tree of a checkpoint: its folder, the prefix of its names, and what Orbax says of leaves."""

    folder: str
    prefix: str
    metadata: Any

    def name(self, key_path: Any) -> str:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return f"{self.prefix}/{name}" if self.prefix and name else self.prefix or name


@dataclass(frozen=True)
class _Checkpoint(Source):
    """An Orbax checkpoint. All arrays are read in one call, each directly onto its devices.

    ``apart`` are the names of arrays that ``Stored.read`` reads.
    """

    trees: tuple[_Tree, ...] = ()
    apart: frozenset[str] = frozenset()
    checksums: Checksums | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        if name in self.apart:
            return self.arrays[name].read()
        if name not in self.values:
            self.prepare({name: None})
        return self.values.pop(name)

    def prepare(self, wanted: Mapping[str, Any]) -> None:
        if wanted and self.checksums is not None:
            self.checksums.check_rest(lambda: self._restore(wanted))

    def _restore(self, wanted: Mapping[str, Any]) -> None:
        ocp = orbax()
        for tree in self.trees:

            def target(key_path: Any, meta: Any, tree: _Tree = tree) -> Any:
                name = tree.name(key_path)
                if name not in wanted or name in self.apart or not is_array(meta):
                    return ocp.PLACEHOLDER
                return jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=wanted[name])

            targets = jax.tree_util.tree_map_with_path(target, tree.metadata, is_leaf=is_array)
            if all(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(targets)):
                continue
            try:
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                    args = ocp.checkpoint_utils.construct_restore_args(targets)
                    restored = checkpointer.restore(
                        tree.folder, args=ocp.args.PyTreeRestore(item=targets, restore_args=args)
                    )
            except Exception as error:  # from tensorstore, protobuf, json or Orbax itself
                fail(self.path, "", f"cannot be read: {_first_line(error)}.")
            flat, _ = jax.tree_util.tree_flatten_with_path(restored)
            for key_path, value in flat:
                if (name := tree.name(key_path)) in wanted:  # older versions give numbers as such
                    self.values[name] = value if is_array(value) else np.asarray(value)


def _read(path: str, form: Format) -> Source:
    for _ in range(_TRIES):
        try:
            with contextlib.ExitStack() as files:
                step = locate(path)
                if (descriptor := hold(step.folder)) is not None:  # it stays until it is read
                    files.callback(os.close, descriptor)
                source = _open(path, form, locate(step.folder))
                source.files.enter_context(files.pop_all())
                return source
        except FileNotFoundError:
            if not os.path.exists(path):
                raise
    return fail(path, "", "is replaced by another process again and again: load it when that is done.")


def _open(path: str, form: Format, step: Step) -> Source:
    checksums = Checksums(path, step.folder, bool(step.custom.get(_CHECKED)))
    checksums.check(_describes)
    arrays: dict[str, Stored] = {}
    apart: set[str] = set()
    notes = list(step.notes)
    trees = []
    try:
        for prefix, folder in step.trees.items():
            tree, old = _tree_of(folder, prefix)
            trees.append(tree)
            for name, leaf in old.items():
                arrays[name] = Stored(leaf.shape, leaf.dtype, partial(np.asarray, leaf))
                apart.add(name)
            flat, _ = jax.tree_util.tree_flatten_with_path(tree.metadata, is_leaf=is_array)
            for key_path, meta in flat:
                name = tree.name(key_path)
                if not is_array(meta):
                    notes.append(f"{name!r:.80} is a text, not an array, and is left out")
                elif name:
                    shape, dtype = tuple(meta.shape), np.dtype(meta.dtype)
                    arrays[name] = Stored(shape, dtype, partial(np.zeros, shape, dtype))
                    if not check_array(path, name, shape, dtype):
                        apart.add(name)
        empty = step.custom.get(_EMPTY, {})
        for name, (code, shape) in empty.items():
            dtype = to_dtype(code)
            if check_array(path, name, tuple(shape), dtype):
                fail(path, repr(name), "is listed as empty, but its shape is not.")
            arrays[name] = Stored(tuple(shape), dtype, partial(np.zeros, shape, dtype))
            apart.add(name)
    except LoadError:
        raise
    except Exception as error:  # from tensorstore, protobuf, json or Orbax itself
        checksums.check(lambda name, size: True)  # which name the file
        fail(path, "", f"is not an Orbax checkpoint, or is damaged: {_first_line(error)}.")
    layout = read_layout(path, f"the metadata {LAYOUT!r}", step.custom.get(LAYOUT), arrays)
    return _Checkpoint(
        path,
        form,
        arrays,
        layout,
        notes=notes,
        trees=tuple(trees),
        apart=frozenset(apart),
        checksums=checksums,
    )


def _tree_of(folder: str, prefix: str) -> tuple[_Tree, dict[str, np.ndarray]]:
    """Returns a tree and, if nothing describes its leaves, as in old ones, their values by name."""
    ocp = orbax()
    from etils import epath  # type: ignore[import-untyped]  # Orbax's own

    if os.path.exists(os.path.join(folder, "_METADATA")) and not is_one_array(folder):
        metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree
        return _Tree(folder, prefix, metadata), {}
    in_one = os.path.exists(os.path.join(folder, "manifest.ocdbt"))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=in_one)
    args = ocp.args.PyTreeRestore()
    if is_one_array(folder):
        handler = ocp.ArrayCheckpointHandler()
        args = ocp.args.ArrayRestore(restore_args=ocp.RestoreArgs(restore_type=np.ndarray))
    with ocp.Checkpointer(handler) as checkpointer:
        values = checkpointer.restore(folder, args=args)
    tree = _Tree(folder, prefix, None)
    flat, _ = jax.tree_util.tree_flatten_with_path(values)
    found = {tree.name(key_path): np.asarray(value) for key_path, value in flat}
    return tree, {name: array for name, array in found.items() if array.dtype.kind not in "OSU"}


def _describes(name: str, size: int) -> bool:
    """Whether a file describes arrays, or is so small that it may; others have only values."""
    return size < _LITTLE or "d" not in name.split("/")[-2:-1]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


FORMAT = Orbax()
