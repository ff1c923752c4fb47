"""What a file says before any array of it is read: its format, and the tree that its names make."""

import contextlib
import os
from collections.abc import Sequence
from io import BufferedReader

import jax

from paramtree.core.errors import NameCollisionError
from paramtree.core.structure import PARAM, build
from paramtree.core.tree import ParamTree, _rebuild
from paramtree.io.formats import mxnet, npz, orbax, safetensors
from paramtree.io.matching import Item
from paramtree.io.source import Source, fail, segments
from paramtree.io.transforms import natural
from paramtree.io.wire import logical

__all__ = ["arranged", "items_of", "open_source", "peek"]


def peek(path: str | os.PathLike[str], *, sep: str = ".") -> ParamTree:
    """Returns the tree that a file holds, with shapes and dtypes in place of the arrays.

    Only headers are read, so many gigabytes take milliseconds, and no memory. The tree has the order,
    ties, kinds and holes that ``pt.load`` gives it. It can be the ``like`` of ``pt.load``, in part too:
    ``pt.load(path, like=pt.select(pt.peek(path), "head_.*"), ignore_extra=True)``.

    Args:
      path: a file, folder or index, as for ``pt.load``.
      sep: what separates the levels in names that become a tree; "/" always does.

    Returns:
      A tree of ``jax.ShapeDtypeStruct``s, with the dtypes that are in the file, 64-bit ones too.

    Raises:
      LoadError: the file is damaged, or of no format that is read here.
      FileNotFoundError: there is no such file.

    Example:
      >>> import numpy as np, paramtree as pt, tempfile
      >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
      >>> pt.save(file, pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.zeros(2)}}))
      >>> peek(file)
      Parameter dense0_weight (shape=(2, 3), dtype=float64)
      Parameter dense0_bias (shape=(2,), dtype=float64)
      >>> pt.count(peek(file))
      8
    """
    with open_source(os.fspath(path)) as source:
        tree = arranged(source, items_of(source), sep)
    shapes = [jax.ShapeDtypeStruct(item.shape, item.dtype) for item in tree._leaves]
    return _rebuild(tree._structure, shapes)


_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def open_source(path: str) -> Source:
    """Returns what a file holds, of whatever format it is; it is to be used in a ``with`` statement.

    Raises:
      LoadError: it is of no format that is read here, or damaged.
    """
    if os.path.isdir(path):
        return orbax.read(path)
    with contextlib.ExitStack() as files:
        if path.endswith(safetensors.INDEX):
            source = safetensors.read_index(path, files)
        else:
            source = _read(path, files.enter_context(open(path, "rb")))
        source.files.enter_context(files.pop_all())
        return source


def _read(path: str, file: BufferedReader) -> Source:
    head = file.read(16)
    file.seek(0)
    if head.startswith(mxnet.MAGIC):
        return mxnet.read(path, file)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return npz.read(path, file)
    if head[8:9] == b"{":
        return safetensors.read(path, file)
    what = "is neither safetensors, .params nor .npz, and no folder of Orbax."
    if not head:
        what = "is empty."
    elif head[:1] == b"\x80" or path.lower().endswith(_PICKLED):
        what = npz.PICKLE
    elif head.startswith(b"\x93NUMPY"):
        what = "holds one array without a name: write it with numpy.savez."
    elif head.startswith(b"\x89HDF"):
        what = "is an HDF5 file, as Keras writes them: save its arrays as .npz."
    return fail(path, "", what)


def items_of(source: Source) -> list[Item]:
    """Returns the arrays of a source with all their names, as the leaves that they stand for."""
    layout = source.layout
    if layout is None:
        names = list(source.arrays)
        if source.format == "safetensors":  # the package writes them in the order of the alphabet
            names.sort(key=natural)
        return [
            Item(name, (name,), source.arrays[name].shape, source.arrays[name].dtype) for name in names
        ]
    items = []
    for (name, names), tag in zip(layout.aliases().items(), layout.tags, strict=True):
        stored = source.arrays[name]
        try:
            shape, dtype = logical(stored.shape, stored.dtype, tag)
        except ValueError as error:
            fail(source.path, repr(name), f"{error}.")
        items.append(Item(name, tuple(names), shape, dtype))
    return items


def arranged(source: Source, items: Sequence[Item], sep: str, exact: bool = True) -> ParamTree:
    """Returns the tree of a file, with an item in place of each array.

    Args:
      source: the file.
      items: what is to be in the tree.
      sep: what separates the levels in the names.
      exact: whether the items are those of the file, so that the tree is the one that was saved, if the
        file tells it.
    """
    layout, kinds = source.layout, dict(source.kinds)
    if layout is not None:
        if exact:
            return _rebuild(layout.structure, items)
        kinds = dict(zip(layout.names, layout.structure.kinds, strict=True))
    entries = [
        (segments(source.path, name, sep), label)
        for label, item in enumerate(items)
        for name in item.names
    ]
    try:
        structure, order = build(entries, [kinds.get(item.origin, PARAM) for item in items])
    except NameCollisionError as error:
        fail(source.path, "the names", f"make no tree: {error}")
    return _rebuild(structure, [items[label] for label in order])
