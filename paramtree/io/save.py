"""``pt.save``: saves a tree in the format given by the file extension."""

import os
from collections.abc import Container
from typing import Any

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError, ParamTreeError
from paramtree.core.pytrees import is_array_or_number, open_tree
from paramtree.core.structure import Structure
from paramtree.io.formats import mxnet, npz, orbax, safetensors
from paramtree.io.layout import DEEPEST, LONGEST_SEP, encode_layout, odd_parts
from paramtree.io.wire import check_savable, dtype_name, encode, is_key
from paramtree.verbs.collect import check_unique

__all__ = ["flattened", "save"]

_WRITERS = {".npz": npz, ".orbax": orbax, ".params": mxnet}
_OTHERS = (
    ".pt", ".pth", ".bin", ".pkl", ".pickle", ".h5", ".hdf5", ".msgpack", ".gguf", ".onnx", ".npy",
    ".json",
)  # fmt: skip


def save(path: str | os.PathLike[str], tree: Any, *, sep: str = ".") -> None:
    """Saves a tree in the format given by the file extension.

    ``.npz`` is numpy's format, ``.orbax`` an Orbax folder for trees sharded over devices and processes,
    and ``.safetensors`` or any extension not listed here is safetensors. These keep order, ties, kinds,
    holes and every dtype, store a tied leaf once, and can be read by their own packages. ``.params`` is
    MXNet's format. It has only names and arrays, so a tied leaf is stored under each of its names.

    The write is atomic: if the process is killed, the old file is still intact.

    Args:
      path: the file to write; an existing one is replaced.
      tree: a parameter tree, a sub-tree (its names start at the sub-tree), or any other pytree of
        arrays and numbers.
      sep: the separator of names in the file, as in ``dense0.weight``.

    Raises:
      NameCollisionError: two paths join to one name.
      MismatchError: some leaves cannot be saved, such as shapes, tracers or strings; all are listed.
      ParamTreeError: the extension belongs to another library, or the format cannot hold the tree.
      OSError: the folder is missing or full.

    Example:
      >>> import numpy as np, paramtree as pt, tempfile
      >>> from safetensors.numpy import load_file
      >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
      >>> pt.save(file, pt.from_tree({"dense0": {"bias": np.zeros(2)}}))
      >>> load_file(file)
      {'dense0.bias': array([0., 0.])}
    """
    path = os.fspath(path)
    extension = os.path.splitext(path)[1].lower()
    if extension in _OTHERS:
        formats = ".safetensors, .npz, .orbax or .params"
        raise ParamTreeError(f"{path}: {extension} is another library's format. Choose {formats}.")
    writer: Any = _WRITERS.get(extension, safetensors)
    writer.write(path, *flattened(path, tree, sep, writer.NATIVE))


def flattened(path: str, tree: Any, sep: str, native: Container[str]) -> tuple[dict[str, Any], str]:
    """Returns the arrays to write by name, and the layout to rebuild the tree from.

    A tied leaf has one name, its first, but all of its names for MXNet, which has no layout.

    Raises:
      NameCollisionError: two paths join to one name.
      MismatchError: some leaves cannot be saved; all are listed.
    """
    source = open_tree(tree, is_array_or_number, declared=True)
    structure = source.structure
    _check_names(structure, sep)
    problems = []
    for leaf, where in zip(source.leaves, structure.canonical, strict=True):
        problem = check_savable(leaf)
        if not problem and native is mxnet.NATIVE and (is_key(leaf) or dtype_name(leaf) not in native):
            problem = f"has dtype {leaf.dtype}, which .params does not have: save as .safetensors"
        if problem:
            problems.append(f"`{join(where)}` {problem}")
    if problems:
        raise MismatchError(f"{path} was not written: {'; '.join(problems)}.")
    encoded = [encode(leaf, native) for leaf in source.leaves]
    names = [join(where, sep) for where in structure.canonical]
    layout = encode_layout(structure, names, [tag for _, tag in encoded], sep)
    if native is mxnet.NATIVE:
        return {join(where, sep): encoded[slot][0] for where, slot in structure.entries()}, layout
    return {name: array for name, (array, _) in zip(names, encoded, strict=True)}, layout


def _check_names(structure: Structure, sep: str) -> None:
    if not isinstance(sep, str) or not 0 < len(sep) <= LONGEST_SEP or "\0" in sep:
        raise ParamTreeError(f"sep={sep!r} cannot separate names in a file: use '.' or '/'.")
    check_unique((join(path, sep), path) for path in structure.paths)
    if odd := odd_parts(structure.paths):
        name = join(next(path for path in structure.paths if odd[0] in path), "/")[:200]
        raise ParamTreeError(f"`{name}` has the segment {odd[0]!r}, which is not allowed in a file.")
    if deep := [path for path in structure.paths if len(path) > DEEPEST]:
        name = join(deep[0], "/")[:200]
        raise ParamTreeError(f"`{name}` is nested deeper than the {DEEPEST} levels of a file.")
