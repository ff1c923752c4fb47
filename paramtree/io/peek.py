"""``pt.peek``: the format and the tree of a file, from its headers alone."""

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from paramtree.core.errors import LoadError, NameCollisionError
from paramtree.core.structure import PARAM, Stack, build
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.io.matching import Item
from paramtree.io.opening import open_source
from paramtree.io.problems import LoadReport
from paramtree.io.source import Source, fail, segments
from paramtree.io.transforms import natural
from paramtree.io.wire import logical
from paramtree.verbs.uncollected import uncollected

__all__ = ["arranged", "items_of", "peek"]


@overload
def peek(
    path: str | os.PathLike[str], *, sep: str = ".", report: Literal[False] = False
) -> ParamTree: ...
@overload
def peek(
    path: str | os.PathLike[str], *, sep: str = ".", report: Literal[True]
) -> tuple[ParamTree, LoadReport]: ...
@uncollected()
def peek(path: str | os.PathLike[str], *, sep: str = ".", report: bool = False) -> Any:
    """Returns the tree in a file, with shapes and dtypes in place of the arrays.

    Reads only headers, so even a file of many gigabytes takes milliseconds and almost no memory. The
    tree has the order, ties, kinds and holes that ``pt.load`` returns. Pass it, or a selection of it,
    to ``pt.load``: ``pt.load(path, like=pt.select(pt.peek(path), "head_.*"), ignore_extra=True)``.

    Args:
      path: a file, folder or index, as for ``pt.load``.
      sep: the separator of levels in names when a tree is built from them; "/" always separates too.
      report: whether to return a ``pt.LoadReport`` as well, with the format and its metadata.

    Returns:
      A tree of ``jax.ShapeDtypeStruct`` objects with the dtypes of the file, 64-bit ones too. If the
      names do not form a tree, as ``m.weight`` and ``m.weight.absmax``, it has a single level.

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
        tree = arranged(source, items_of(source), sep, flat=True)
    structure, items = flatten(tree)
    struct = functools.cache(jax.ShapeDtypeStruct)  # a large file has few distinct shapes
    shapes = unflatten(structure, [struct(item.shape, item.dtype) for item in items])
    return (shapes, LoadReport.of(source)) if report else shapes


def items_of(source: Source) -> list[Item]:
    """Returns an item for each array of a source, with all its names and decoded shape and dtype."""
    layout, arrays = source.layout, source.arrays
    if layout is None:
        ordered = sorted(arrays, key=natural) if source.unordered else arrays
        aliases, tags = {name: [name] for name in ordered}, dict[str, str]()
        for alias, name in source.ties.items():
            aliases[name].append(alias)
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


def arranged(
    source: Source, items: Sequence[Item], sep: str, exact: bool = True, flat: bool = False
) -> ParamTree:
    """Returns the tree of a file, with an item in place of each array.

    ``exact`` says that the items are the file's own, so that its recorded layout applies; ``flat`` that
    names which form no tree may be those of a single level.
    """
    layout, kinds = source.layout, dict(source.kinds)
    if layout is not None:
        if exact:
            return unflatten(layout.structure, items)
        kinds = dict(zip(layout.names, layout.structure.kinds, strict=True))
    names = [(name, label) for label, item in enumerate(items) for name in item.names]
    all_kinds = [PARAM] * len(items)
    if kinds:  # a transform may have combined several arrays
        origins = [(item.origin, *item.origin.split(", ")) for item in items]
        all_kinds = [next((kinds[o] for o in several if o in kinds), PARAM) for several in origins]
    try:
        entries = [(segments(source.path, name, sep), label) for name, label in names]
        structure, order = build(entries, all_kinds)
    except (NameCollisionError, LoadError) as error:
        if not flat:
            if isinstance(error, LoadError):
                raise
            fail(
                source.path,
                "the names",
                f"do not form a tree: {error} rename= changes them, and sep='' keeps whole names "
                "without '/'.",
            )
        structure, order = build([((name,), label) for name, label in names], all_kinds)
    return unflatten(structure, [items[label] for label in order])
