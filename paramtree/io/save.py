"""``pt.save``: a tree into a file, in the format that its name asks for."""

import contextlib
import os
from collections.abc import Container
from typing import Any

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError, ParamTreeError
from paramtree.core.names import check_unique, from_tree, named
from paramtree.core.structure import Structure
from paramtree.core.tree import ParamTree
from paramtree.io.formats import mxnet, npz, orbax, safetensors
from paramtree.io.layout import DEEPEST, LONGEST_SEP, encode_layout, odd_parts
from paramtree.io.wire import check_savable, dtype_name, encode, is_key

__all__ = ["flattened", "save"]

_WRITERS = {".safetensors": safetensors, ".npz": npz, ".orbax": orbax}
# fmt: off
_OTHERS = (
    ".pt", ".pth", ".bin", ".pkl", ".pickle", ".h5", ".hdf5", ".msgpack", ".gguf", ".onnx", ".npy",
    ".json",
)
# fmt: on


def save(path: str | os.PathLike[str], tree: Any, *, sep: str = ".") -> None:
    """Saves a tree, in the format that the path ends in.

    ``.safetensors``, or an ending that is not listed here: safetensors. ``.npz``: numpy's. ``.orbax``:
    a folder that Orbax writes, for trees that are sharded over devices and processes. These keep order,
    ties, kinds, holes and every dtype, store a tied leaf once, and are read by their own packages too.
    ``.params``: MXNet's, which has names and arrays only; a tied leaf is in it under all its names.

    At every moment the old file or the new one is there, whole, even if the process is killed.

    Args:
      path: where to; a file that is there is replaced.
      tree: a parameter tree or a sub-tree, whose names then start there; or any other pytree, of which
        the arrays and numbers are saved.
      sep: what joins the names in the file, as in ``dense0.weight``.

    Raises:
      NameCollisionError: two paths join to one name.
      MismatchError: leaves that cannot be saved, such as shapes, tracers and strings; all are listed.
      ParamTreeError: the format is another library's, or has no way to write the tree.
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
        raise ParamTreeError(
            f"{path}: files that end in {extension} are another library's. Choose .safetensors, .npz, "
            ".orbax or .params."
        )
    if extension == ".params":
        source = _as_tree(tree)
        structure = source._structure
        _check_names(structure, sep)
        slots = [(join(path, sep), slot) for path, slot in structure.entries()]
        arrays, _ = _encoded(path, structure, source._leaves, mxnet.NATIVE)
        mxnet.write(path, {name: arrays[slot] for name, slot in slots})
        return
    writer = _WRITERS.get(extension, safetensors)
    writer.write(path, *flattened(path, tree, sep, writer.NATIVE))


def flattened(path: str, tree: Any, sep: str, native: Container[str]) -> tuple[dict[str, Any], str]:
    """Returns the arrays to write by name, and the layout that makes them a tree again.

    Raises:
      NameCollisionError: two paths join to one name.
      MismatchError: leaves that cannot be saved; all are listed.
    """
    source = _as_tree(tree)
    structure = source._structure
    _check_names(structure, sep)
    arrays, tags = _encoded(path, structure, source._leaves, native)
    names = [join(path, sep) for path in structure.canonical]
    layout = encode_layout(structure, names, tags, sep)
    return dict(zip(names, arrays, strict=True)), layout


def _as_tree(tree: Any) -> ParamTree:
    """Returns any pytree as a tree of its arrays; parameter trees in it keep their ties and kinds."""
    found = named(tree, numbers=True)
    if found.foreign:
        with contextlib.suppress(ParamTreeError, TypeError):  # holes in a tree within, or one leaf
            made = from_tree(tree)
            if len(made._leaves) == len(found.tree._leaves):  # else some are no arrays
                return made
    return found.tree


def _check_names(structure: Structure, sep: str) -> None:
    if not isinstance(sep, str) or not 0 < len(sep) <= LONGEST_SEP or "\0" in sep:
        raise ParamTreeError(f"sep is what joins names in the file, such as '.' or '/', not {sep!r}.")
    check_unique((join(path, sep), path) for path in structure.paths)
    if odd := odd_parts(structure.paths):
        paths = [path for path in structure.paths if odd[0] in path]
        raise ParamTreeError(
            f"`{join(paths[0], '/')[:200]}` has a part {odd[0]!r}: no file may have such."
        )
    for path in structure.paths:
        if len(path) > DEEPEST:
            raise ParamTreeError(
                f"`{join(path, '/')[:200]}` is deeper than {DEEPEST} levels: no file may be."
            )


def _encoded(
    path: str, structure: Structure, leaves: Any, native: Container[str]
) -> tuple[list[Any], list[str]]:
    """Returns what to write for each leaf, and what its dtype is if the format cannot say it."""
    problems = []
    for leaf, where in zip(leaves, structure.canonical, strict=True):
        problem = check_savable(leaf)
        if not problem and native is mxnet.NATIVE and (is_key(leaf) or dtype_name(leaf) not in native):
            problem = f"has dtype {leaf.dtype}, which .params does not have: save as .safetensors"
        if problem:
            problems.append(f"`{join(where)}` {problem}")
    if problems:
        raise MismatchError(f"{path} was not written: {'; '.join(problems)}.")
    pairs = [encode(leaf, native) for leaf in leaves]
    return [array for array, _ in pairs], [tag for _, tag in pairs]
