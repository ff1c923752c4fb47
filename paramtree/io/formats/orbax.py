"""Orbax checkpoints, for trees that are sharded over devices and processes.

A ``.orbax`` path is a folder with one numbered checkpoint. Saving writes the next number and then
deletes the previous one, so the folder always has a complete checkpoint.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from paramtree.core.errors import LoadError, ParamTreeError
from paramtree.core.pytrees import is_array
from paramtree.io.atomic import sync
from paramtree.io.formats.format import Content, Format
from paramtree.io.source import Source, Stored, check_array, fail, read_layout
from paramtree.io.wire import NUMBERS, to_dtype

__all__ = ["FORMAT", "as_state", "orbax"]

_NATIVE = NUMBERS | {
    "bfloat16", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz",
}  # fmt: skip
_LAYOUT, _EMPTY = "paramtree", "paramtree_empty"
_MARK = "_CHECKPOINT_METADATA"
_ITEM = "default"  # the folder of the arrays in a step of Orbax's CheckpointManager


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
        return os.path.isdir(path) and (
            bool(_numbers(path)) or os.path.exists(os.path.join(path, _MARK))
        )

    def write(self, path: str, content: Content) -> None:
        """Writes arrays, each process its own shards, and the layout as metadata."""
        _write(path, content.arrays, content.layout)

    def read(self, path: str, file: Any) -> Source:
        """Opens a checkpoint that ``pt.save``, ``pt.Checkpoints`` or Orbax itself wrote."""
        return _read(path, self)


def _write(path: str, arrays: Mapping[str, Any], layout: str) -> None:
    ocp = orbax()
    os.makedirs(path, exist_ok=True)
    numbers = _numbers(path)
    new = os.path.abspath(os.path.join(path, str(max(numbers, default=-1) + 1)))
    state, metadata = as_state(arrays, layout)
    with ocp.StandardCheckpointer() as checkpointer:
        unfinished = f"{new}.unfinished"
        checkpointer.save(unfinished, state, force=True, custom_metadata=metadata)
        checkpointer.wait_until_finished()
    if jax.process_index() == 0:
        for root, _, files in os.walk(unfinished):
            for file in files:
                sync(os.path.join(root, file))
            sync(root)
        os.rename(unfinished, new)
        sync(path)
        for number in numbers:
            shutil.rmtree(os.path.join(path, str(number)), ignore_errors=True)
    if jax.process_count() > 1:  # the other processes must not read or save before it is renamed
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(new)


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
    return state, {_LAYOUT: layout, _EMPTY: empty}


def _numbers(path: str) -> list[int]:
    return [
        int(name)
        for name in os.listdir(path)
        if name.isascii() and name.isdigit() and os.path.exists(os.path.join(path, name, _MARK))
    ]


@dataclass(frozen=True)
class _Checkpoint(Source):
    """An Orbax checkpoint. All arrays are read in one call, each directly onto its devices."""

    at: str = ""
    tree: Any = None
    values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        stored = self.arrays[name]
        if not stored.nbytes:
            return stored.read()
        if name not in self.values:
            self.prepare({name: None})
        return self.values.pop(name)

    def prepare(self, wanted: Mapping[str, Any]) -> None:
        ocp = orbax()

        def target(key_path: Any, meta: Any) -> Any:
            name = _name(key_path)
            if name not in wanted:
                return ocp.PLACEHOLDER
            return jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=wanted[name])

        targets = jax.tree_util.tree_map_with_path(target, self.tree, is_leaf=is_array)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                args = ocp.checkpoint_utils.construct_restore_args(targets)
                restored = checkpointer.restore(
                    self.at, args=ocp.args.PyTreeRestore(item=targets, restore_args=args)
                )
        except Exception as error:  # from tensorstore, protobuf, json or Orbax itself
            fail(self.path, "", f"cannot be read: {_first_line(error)}.")
        flat, _ = jax.tree_util.tree_flatten_with_path(restored)
        self.values.update((_name(k), value) for k, value in flat if _name(k) in wanted)


def _read(path: str, form: Format) -> Source:
    ocp = orbax()
    from etils import epath  # type: ignore[import-untyped]  # Orbax's own

    numbers = _numbers(path)
    at = os.path.abspath(os.path.join(path, str(max(numbers)))) if numbers else os.path.abspath(path)
    if not os.path.exists(os.path.join(at, _MARK)):
        fail(path, "", "is a folder without a finished Orbax checkpoint.")
    arrays: dict[str, Stored] = {}
    try:
        with open(os.path.join(at, _MARK), encoding="utf-8") as file:
            custom: dict[str, Any] = json.load(file).get("custom_metadata") or {}
        if os.path.isdir(os.path.join(at, _ITEM)):  # CheckpointManager uses a subfolder
            at = os.path.join(at, _ITEM)
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(at)).tree
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array)
        found = [(_name(key_path), meta.shape, np.dtype(meta.dtype)) for key_path, meta in flat]
        empty = custom.get(_EMPTY, {})
        found += [(name, shape, to_dtype(code)) for name, (code, shape) in empty.items()]
        for name, shape, dtype in found:
            if name == "":
                continue
            if check_array(path, name, tuple(shape), dtype) and name in empty:
                fail(path, repr(name), "is listed as empty, but its shape is not.")
            # Only empty arrays are read like this; the checkpoint reads all others.
            arrays[name] = Stored(tuple(shape), dtype, partial(np.zeros, shape, dtype))
        text = custom.get(_LAYOUT)
    except LoadError:
        raise
    except Exception as error:  # from tensorstore, protobuf, json or Orbax itself
        fail(path, "", f"is not an Orbax checkpoint, or is damaged: {_first_line(error)}.")
    layout = read_layout(path, f"the metadata {_LAYOUT!r}", text, arrays)
    return _Checkpoint(path, form, arrays, layout, at=at, tree=tree)


def _name(key_path: Any) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


FORMAT = Orbax()
