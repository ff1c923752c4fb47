"""``pt.peek``: the format and the tree of a file, from its headers alone."""

import contextlib
import os
from collections.abc import Sequence
from io import BufferedReader

import jax

from paramtree.core.errors import NameCollisionError
from paramtree.core.structure import PARAM, Stack, build
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.io.formats import mxnet, npz, orbax, safetensors
from paramtree.io.matching import Item
from paramtree.io.source import Source, fail, segments
from paramtree.io.transforms import natural
from paramtree.io.wire import logical

__all__ = ["arranged", "items_of", "open_source", "peek"]


def peek(path: str | os.PathLike[str], *, sep: str = ".") -> ParamTree:
    """Returns the tree in a file, with shapes and dtypes in place of the arrays.

    Reads only headers, so even a file of many gigabytes takes milliseconds and almost no memory. The
    tree has the order, ties, kinds and holes that ``pt.load`` returns. Pass it, or a selection of it,
    to ``pt.load``: ``pt.load(path, like=pt.select(pt.peek(path), "head_.*"), ignore_extra=True)``.

    Args:
      path: a file, folder or index, as for ``pt.load``.
      sep: the separator of levels in names when a tree is built from them; "/" always separates too.

    Returns:
      A tree of ``jax.ShapeDtypeStruct``s with the dtypes of the file, including 64-bit ones.

    Raises:
      LoadError: the file is damaged, or its format is not supported.
      FileNotFoundError: the file does not exist.

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
    structure, items = flatten(tree)
    return unflatten(structure, [jax.ShapeDtypeStruct(item.shape, item.dtype) for item in items])


_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def open_source(path: str) -> Source:
    """Opens a file of any supported format. Use it in a ``with`` statement.

    Raises:
      LoadError: the file is damaged, or its format is not supported.
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
    problem = "is neither safetensors, .params nor .npz, nor an Orbax folder."
    if not head:
        problem = "is empty."
    elif head[:1] == b"\x80" or path.lower().endswith(_PICKLED):
        problem = npz.PICKLE
    elif head.startswith(b"\x93NUMPY"):
        problem = "holds one array without a name. Write it with numpy.savez."
    elif head.startswith(b"\x89HDF"):
        problem = "is an HDF5 file, as Keras writes. Save its arrays as .npz."
    return fail(path, "", problem)


def items_of(source: Source) -> list[Item]:
    """Returns an item for each array of a source, with all its names and decoded shape and dtype."""
    layout, arrays = source.layout, source.arrays
    if layout is None:  # the safetensors package sorts by dtype and name
        ordered = sorted(arrays, key=natural) if source.format == "safetensors" else arrays
        aliases, tags = {name: [name] for name in ordered}, dict[str, str]()
    else:
        aliases, tags = layout.aliases(), layout.tags
    items = []
    stacks: dict[str, Stack] = {}
    if layout is not None and layout.structure.stacks:
        stacks = {name: layout.structure.stack_of(slot) for slot, name in enumerate(layout.names)}
    for name, names in aliases.items():
        try:
            shape, dtype = logical(arrays[name].shape, arrays[name].dtype, tags.get(name, ""))
        except ValueError as error:
            fail(source.path, repr(name), f"{error}.")
        items.append(Item(name, tuple(names), shape, dtype, stack=stacks.get(name)))
    return items


def arranged(source: Source, items: Sequence[Item], sep: str, exact: bool = True) -> ParamTree:
    """Returns the tree of a file, with an item in place of each array.

    ``exact`` says that the items are the file's own, so that its recorded layout applies.
    """
    layout, kinds = source.layout, dict(source.kinds)
    if layout is not None:
        if exact:
            return unflatten(layout.structure, items)
        kinds = dict(zip(layout.names, layout.structure.kinds, strict=True))
    names = [(name, label) for label, item in enumerate(items) for name in item.names]
    entries = [(segments(source.path, name, sep), label) for name, label in names]
    try:
        structure, order = build(entries, [kinds.get(item.origin, PARAM) for item in items])
    except NameCollisionError as error:
        fail(source.path, "the names", f"do not form a tree: {error}")
    return unflatten(structure, [items[label] for label in order])
