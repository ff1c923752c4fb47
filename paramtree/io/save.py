"""``pt.save``: saves a tree in the format given by the file extension."""

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from paramtree.core.arrays import describe, join
from paramtree.core.errors import MismatchError, ParamTreeError
from paramtree.core.pytrees import is_array_or_number, open_tree
from paramtree.core.structure import Structure
from paramtree.core.tree import ParamTree
from paramtree.io import formats
from paramtree.io.formats.format import Content, Format
from paramtree.io.layout import DEEPEST, LONGEST_SEP, encode_layout, odd_parts
from paramtree.io.progress import progress as progress_bar
from paramtree.io.progress import written
from paramtree.io.shards import bytes_of, forget, nbytes_of, write_shards
from paramtree.io.wire import check_savable, dtype_name, encode, is_key
from paramtree.nn.layer import Layer
from paramtree.verbs.collect import check_unique

__all__ = ["content_of", "keeps", "save"]

_SHOWN = 20  # problems in one message
# Endings of formats that only other libraries write.
_OTHERS = (".pkl", ".pickle", ".ckpt", ".gguf", ".onnx", ".npy", ".json", ".tar", ".gz")


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    sep: str = ".",
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    progress: bool | None = None,
) -> None:
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
      metadata: texts to save with it, for safetensors; ``pt.peek(path, report=True)`` shows them.
      max_shard_size: the bytes after which another file is begun, such as "5GB", for safetensors. If
        there are several, an index, ``path.index.json``, is written in place of ``path``;
        ``pt.load(path)`` reads it, as do ``pt.load`` of the index and of its folder.
      progress: whether to show a progress bar; None does on a terminal, with rich, after a second.

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
    path = path.rstrip(os.sep) or path
    form = _format_of(path)
    most = None if max_shard_size is None else bytes_of(max_shard_size)
    content = content_of(path, tree, sep, form, metadata)
    total = sum(map(nbytes_of, content.arrays.values()))
    what = f"saving {os.path.basename(path.rstrip(os.sep))}"
    with progress_bar(what, total, progress, partial(written, path)) as count:
        if most is not None:
            write_shards(path, form, content, most, count)
            return
        form.write(path, content)
        if "shards" in form.keeps:
            forget(path)


def keeps(path: str, what: str) -> bool:
    """Returns whether the format that a file is saved in keeps something, such as "metadata"."""
    return what in _format_of(path).keeps


def _format_of(path: str) -> Format:
    """Returns the format that an ending names."""
    ending = os.path.splitext(path)[1].lower()
    form = next((form for form in formats.FORMATS if ending in form.endings), None)
    if ending in _OTHERS or (form and not form.writes):
        writable = ", ".join(form.endings[0] for form in formats.FORMATS if form.writes)
        raise ParamTreeError(
            f"{path} was not written: {ending} is another library's format. Choose one of {writable}."
        )
    return form or formats.DEFAULT


def content_of(
    path: str, tree: Any, sep: str, form: Format, metadata: Mapping[str, str] | None = None
) -> Content:
    """Returns what a format writes of a tree.

    A tied leaf has one name, its first, but all of its names in a format without a layout.

    Raises:
      NameCollisionError: two paths join to one name.
      MismatchError: it is no tree, or some leaves cannot be saved; all are listed.
    """
    _check_tree(path, tree)
    source = open_tree(tree, lambda leaf: leaf is not None and not _is_function(leaf), declared=True)
    structure, layouts = source.structure, "layout" in form.keeps
    _check_names(structure, sep)
    problems = []
    for leaf, where in zip(source.leaves, structure.canonical, strict=True):
        problem = check_savable(leaf)
        if not problem and not layouts and (is_key(leaf) or dtype_name(leaf) not in form.native):
            lacks = f"has dtype {leaf.dtype}, which {form.endings[0]} does not have"
            problem = f"{lacks}: save as .safetensors"
        if problem:
            problems.append(f"`{join(where)}` {problem}")
    if problems:
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise MismatchError(f"{path} was not written: {'; '.join(problems[:_SHOWN])}{more}.")
    encoded = [encode(leaf, form.native) for leaf in source.leaves]
    names = [join(where, sep) for where in structure.canonical]
    arrays = {name: array for name, (array, _) in zip(names, encoded, strict=True)}
    if not layouts:
        arrays = {join(where, sep): encoded[slot][0] for where, slot in structure.entries()}
    layout = encode_layout(structure, names, [tag for _, tag in encoded], sep) if layouts else ""
    return Content(arrays, layout, structure, _checked(path, form, metadata))


def _checked(path: str, form: Format, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Returns texts to save.

    Raises:
      TypeError: they are no mapping of texts to texts.
      ParamTreeError: the format does not keep them.
    """
    metadata = {} if metadata is None else metadata
    texts = isinstance(metadata, Mapping) and all(map(_is_text, [*metadata, *metadata.values()]))
    if not texts:
        raise TypeError(f"metadata is a mapping of texts to texts, not {metadata!r}.")
    if metadata and "metadata" not in form.keeps:
        keeping = ", ".join(form.name for form in formats.FORMATS if "metadata" in form.keeps)
        raise ParamTreeError(f"{path} was not written: {form.name} has no metadata; {keeping} has.")
    return dict(metadata)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # half a character


def _check_tree(path: str, tree: Any) -> None:
    """Raises MismatchError if something is saved in place of a tree, or would be left out of one."""
    if isinstance(tree, ParamTree) or hasattr(type(tree), "__open__"):
        return
    if tree is None or (jax.tree_util.all_leaves([tree]) and not is_array_or_number(tree)):
        what = f"the layer or function {describe(tree)}" if callable(tree) else describe(tree)
        raise MismatchError(
            f"{path} was not written: expected a tree of arrays, such as the parameters that pt.init "
            f"returns, but found {what}."
        )
    for where, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Layer):
            name = jax.tree_util.keystr(where, simple=True, separator="_")
            raise MismatchError(
                f"{path} was not written: `{name}` is the layer {describe(leaf)}, not its parameters."
            )


def _is_function(leaf: Any) -> bool:
    """Returns whether a leaf is code, as in modules of other libraries: there is nothing to save."""
    return callable(leaf) and not is_array_or_number(leaf)


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
