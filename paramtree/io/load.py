"""``pt.load``: loads a file into a tree, or raises one error that lists every problem."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax

from paramtree.core.arrays import describe, dtype_of, join, shape_of
from paramtree.core.pytrees import is_array_or_number, open_tree
from paramtree.core.rules import Pattern, Rules
from paramtree.core.structure import Structure
from paramtree.core.tree import ParamTree, flatten, unflatten
from paramtree.io.matching import Item, Lookup, Rename, rename_all
from paramtree.io.opening import open_source
from paramtree.io.peek import arranged, items_of
from paramtree.io.placing import LossyCastError, Placing, divides
from paramtree.io.problems import LoadReport, Problems
from paramtree.io.progress import progress as progress_bar
from paramtree.io.restack import restack
from paramtree.io.source import Source, segments
from paramtree.io.transforms import transform_all
from paramtree.io.wire import decode
from paramtree.sharding.place import spread
from paramtree.typing import T

__all__ = ["LoadOptions", "load", "load_part"]


class LoadOptions(TypedDict, total=False):
    """The options of ``pt.load`` that its result's type does not depend on."""

    rename: Rename | None
    transform: Rules | None
    strict: bool
    allow_missing: bool | Pattern
    ignore_extra: bool | Pattern
    cast_dtype: bool
    sep: str
    shardings: Any
    mismatched: str
    progress: bool | None


Path = str | os.PathLike[str]


@overload
def load(
    path: Path, like: None = None, *, report: Literal[False] = False, **options: Unpack[LoadOptions]
) -> ParamTree: ...
@overload
def load(
    path: Path, like: None = None, *, report: Literal[True], **options: Unpack[LoadOptions]
) -> tuple[ParamTree, LoadReport]: ...
@overload
def load(
    path: Path, like: T, *, report: Literal[False] = False, **options: Unpack[LoadOptions]
) -> T: ...
@overload
def load(
    path: Path, like: T, *, report: Literal[True], **options: Unpack[LoadOptions]
) -> tuple[T, LoadReport]: ...
def load(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    rename: Rename | None = None,
    transform: Rules | None = None,
    strict: bool = True,
    allow_missing: bool | Pattern = False,
    ignore_extra: bool | Pattern = False,
    cast_dtype: bool = False,
    sep: str = ".",
    report: bool = False,
    shardings: Any = None,
    mismatched: str = "error",
    progress: bool | None = None,
) -> Any:
    r"""Loads a tree from a file. The format is recognized from the content.

    Reads safetensors, MXNet's ``.params``, numpy's ``.npz``, Orbax checkpoints, PyTorch's ``.pt``,
    ``.pth`` and ``.bin``, Flax's ``.msgpack`` and Keras's ``.h5``; nothing in a file is run.
    Names in the file match leaves of ``like`` if joined with ".", "/" or "_", with positions in place
    of layer names (``0.weight``), under any name of a tied leaf, and in ``.params`` also by order.
    The ``module.`` that PyTorch's DataParallel puts before names may be missing in ``like``. The large
    arrays of a ``.pt`` are mapped, and take memory when they are used: while they are, replace the
    file as ``pt.save`` does, and do not write over it, as ``torch.save`` would.
    If anything does not fit, nothing is loaded. A pattern of names matches a whole name, or a whole
    path if it contains "/", as ``"encoder/.*"``; only those of ``rename`` match parts of names.

    Args:
      path: a file, an Orbax folder, or the ``.index.json`` of a model split into several files.
      like: a tree of arrays, a tree of shapes as ``pt.abstract`` returns, or any other pytree. The
        result has its structure, ties, kinds, array types and shardings. Without it the result is
        the tree that was saved or, for files from other libraries, a tree built from the names.
      rename: pairs of a regular expression and its replacement, each applied in turn to every name in
        the file with ``re.sub``, or a function of a name. None as the replacement drops the name.
      transform: a rule table from names in the tree to functions of an array, such as
        ``{".*_kernel": np.transpose}``. To split an array, return a mapping of names to arrays, with
        ``\1`` for the first group of the pattern:
        ``{"(.*)_qkv": lambda a: dict(zip([r"\1_q", r"\1_k", r"\1_v"], np.split(a, 3)))}``.
        To combine arrays, rename them to the same name; the function is called with all of them, in the
        order of their names in the file, in which ``layer2`` comes before ``layer10``.
      strict: False allows both missing and extra names.
      allow_missing: whether leaves that are not in the file keep their values; or a pattern of leaves
        that may be missing.
      ignore_extra: whether to skip names that the tree does not have; or a pattern of names to skip.
      cast_dtype: whether to cast arrays to the dtypes of ``like``.
      sep: the separator of levels in names when a tree is built from them; "/" always separates too.
      report: whether to return a report as well.
      shardings: the shardings of the leaves: ``pt.shardings`` of ``like``, or of ``pt.peek(path)``
        without ``like``; or one sharding for all. From safetensors and Orbax, each process reads only
        the slices that its devices hold.
      mismatched: "keep" keeps the value of ``like`` where the file has another shape, such as a new
        head; the report lists these leaves.
      progress: whether to show a progress bar; None does on a terminal, after a second.

    Returns:
      The tree; with ``report=True`` the tree and a ``pt.LoadReport``. Leaves are jax arrays, or numpy
      arrays where ``like`` has them or where the dtype needs jax's 64-bit mode.

    Raises:
      LoadError: the file is damaged or does not fit ``like``; all missing and unexpected names and
        mismatched shapes and dtypes are listed.
      MismatchError: the shardings do not fit the tree.
      RuleError: ``rename`` or ``transform`` has a pattern that matches nothing, or a pattern is not a
        regular expression.
      FileNotFoundError: the file does not exist.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp, tempfile
      >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
      >>> params = pt.from_tree({"dense0": {"weight": jnp.ones((2, 3)), "bias": jnp.zeros(2)}})
      >>> pt.save(file, params)
      >>> pt.load(file, like=params).dense0.bias
      Array([0., 0.], dtype=float32)
      >>> pt.load(file, rename=[("dense0", "head")])
      Parameter head_weight (shape=(2, 3), dtype=float32)
      Parameter head_bias (shape=(2,), dtype=float32)
    """
    with open_source(os.fspath(path)) as source:
        loader = _Loader(source, rename, transform, sep, progress)
        if like is None:
            result = loader.saved_tree(shardings)
        else:
            if mismatched not in ("error", "keep"):
                raise ValueError(f"mismatched is 'error' or 'keep', not {mismatched!r}.")
            lenient = allow_missing or not strict, ignore_extra or not strict
            keep = mismatched == "keep"
            result = loader.tree_like(like, *lenient, cast_dtype, shardings, keep)
    return result if report else result[0]


def load_part(path: str | os.PathLike[str], choose: Callable[[ParamTree], ParamTree]) -> ParamTree:
    """Loads selected leaves of a file, and reads no others.

    Args:
      path: the file.
      choose: returns the tree with holes for unselected leaves. It must not look at the leaves.

    Raises:
      LoadError: the file is damaged.
    """
    with open_source(os.fspath(path)) as source:
        return _Loader(source, None, None, ".").saved_tree(None, choose, flat=True)[0]


class _Loader:
    """Matches the arrays of a file to leaves, checks them all, then reads them."""

    def __init__(
        self,
        source: Source,
        rename: Rename | None,
        transform: Rules | None,
        sep: str,
        shown: bool | None = None,
    ) -> None:
        layout = source.layout
        self.source, self.rename, self.transform, self.shown = source, rename, transform, shown
        self.items = rename_all(items_of(source), rename)
        self.sep, self.tags = (sep, dict[str, str]()) if layout is None else (layout.sep, layout.tags)
        self.problems = Problems(source.path, source.ordered, self.sep)

    def value(self, item: Item) -> Any:
        """Returns the array of an item."""
        if item.read is not None:
            return item.read()
        return decode(self.source.get(item.origin), self.tags.get(item.origin, ""))

    def slices(self, item: Item) -> Callable[[Any], Any] | None:
        """Returns the function that reads a slice of an item as it is, if there is one."""
        whole = item.read is not None or item.origin in self.tags
        return None if whole else self.source.arrays[item.origin].read_slice

    def untrusted(self, item: Item) -> Any:
        """Returns an array for a transform, whose shape ``like`` cannot vouch for."""
        if self.source.arrays[item.origin].expands:
            self.source.check_expansion({})
        return self.value(item)

    def saved_tree(
        self,
        shardings: Any,
        choose: Callable[[ParamTree], ParamTree] = lambda tree: tree,
        flat: bool = False,
    ) -> tuple[ParamTree, LoadReport]:
        """Returns the chosen leaves of the saved tree, or of a tree built from the names."""
        source = self.source
        source.check_expansion({})

        def shown(name: str, by: str) -> str:
            return join(segments(source.path, name, self.sep), by)

        items = transform_all(self.items, self.transform, shown, self.untrusted)
        exact = self.rename is None and self.transform is None
        structure, chosen = flatten(choose(arranged(source, items, self.sep, exact, flat)))
        shapes = [jax.ShapeDtypeStruct(item.shape, item.dtype) for item in chosen]
        like, groups = unflatten(structure, shapes), [[item] for item in chosen]
        leaves, loaded, _ = self.read(like, shardings, structure, [None] * len(chosen), groups)
        report = LoadReport.of(source, loaded=loaded, ignored=self.dropped(chosen))
        return unflatten(structure, leaves), report

    def tree_like(
        self,
        like: Any,
        allow_missing: Any,
        ignore_extra: Any,
        cast: bool,
        shardings: Any,
        keep: bool,
    ) -> tuple[Any, LoadReport]:
        """Returns ``like`` with the values of the file."""
        if jax.tree_util.all_leaves([like]) and not is_array_or_number(like):
            expected = "a tree of arrays or shapes, such as pt.abstract(net, x)"
            raise TypeError(f"like= is {describe(like)}; expected {expected}.")
        source, problems = self.source, self.problems
        target = open_tree(like, is_array_or_number)
        structure, leaves = target.structure, target.leaves
        lookup = Lookup(structure, self.sep)
        shapes = [shape_of(leaf) for leaf in leaves]
        items = transform_all(self.items, self.transform, lookup.shown, self.untrusted)
        items = restack(items, lookup, shapes, self.value, self.slices)
        ordered = source.ordered and self.rename is None
        paths = lookup.assign(items, shapes, ordered, source.nameless)
        groups: list[list[Item]] = [[] for _ in leaves]
        for item, item_paths in zip(items, paths, strict=True):
            for slot in dict.fromkeys(lookup.slot_of[path] for path in item_paths):
                groups[slot].append(item)
        extra = [item for item, item_paths in zip(items, paths, strict=True) if not item_paths]
        missing = problems.missing(structure, leaves, groups, extra, allow_missing)
        ignored = problems.extra(extra, ignore_extra) + self.dropped(items)
        kept: dict[str, tuple[int, ...]] = {}
        for path, leaf, group in zip(structure.canonical, leaves, groups, strict=True):
            shape = shape_of(leaf)
            if keep and shape is not None and any(item.shape != shape for item in group):
                kept[join(path)] = problems.keep(join(path), leaf, group)
                group.clear()
            for item in group:
                problems.compare(join(path), leaf, item, cast)
        problems.check()
        source.check_expansion({item.origin: item.shape for group in groups for item in group})
        values, loaded, casts = self.read(like, shardings, structure, leaves, groups)
        report = LoadReport.of(
            source, loaded=loaded, missing=missing, ignored=ignored, cast=casts, kept=kept
        )
        return target.restore(values), report

    def read(
        self, like: Any, shardings: Any, structure: Structure, leaves: Any, groups: list[list[Item]]
    ) -> tuple[tuple[Any, ...], dict[str, list[str]], dict[str, str]]:
        """Returns the leaves with the values of their items, and what a report says of these."""
        placements = [getattr(leaf, "sharding", None) for leaf in leaves]
        if shardings is not None:
            placements = spread(shardings, like, "the shardings for load")
        pairs = zip(groups, placements, strict=True)
        wanted = ((item, sharding) for group, sharding in pairs for item in group if item.read is None)
        placing = Placing()
        # The arrays of an Orbax checkpoint are read here, in one call.
        self.source.prepare({item.origin: sharding for item, sharding in wanted})
        sizes = [_nbytes(group[0]) if group else 0 for group in groups]
        what = f"loading {os.path.basename(self.source.path.rstrip(os.sep))}"
        bar = progress_bar(what, sum(sizes), self.shown)
        loaded: dict[str, list[str]] = {}
        casts: dict[str, str] = {}
        every = zip(structure.canonical, leaves, groups, placements, sizes, strict=True)
        with bar as count:
            for path, leaf, group, sharding, size in every:
                if not group:
                    placing.keep(leaf)
                    continue
                name, first = join(path), group[0]
                slices = self.slices(first) if len(group) == 1 else None
                dtype = first.dtype if leaf is None else dtype_of(leaf)
                try:
                    if slices and dtype is not None and divides(sharding, dtype):
                        placing.add_sharded(slices, first.shape, dtype, sharding)
                    else:
                        value = self.value(first)
                        for alias in group[1:]:
                            self.problems.equal(name, first, value, alias, self.value(alias))
                        placing.add(value, leaf, sharding, copy=first.read is not None)
                except LossyCastError as error:
                    self.problems.lossy(name, first, str(error))
                    placing.keep(leaf)
                loaded[name] = [item.origin for item in group]
                if dtype not in (None, first.dtype):
                    casts[name] = str(first.dtype)
                count(size)
        self.problems.check()
        return placing.done(), loaded, casts

    def dropped(self, items: Sequence[Item]) -> list[str]:
        """Returns the names in the file that no item came from."""
        used = {name for item in items for name in (item.origin, *item.origin.split(", "))}
        return [name for name in self.source.arrays if name not in used]


def _nbytes(item: Item) -> int:
    return int(math.prod(item.shape) * getattr(item.dtype, "itemsize", 8))
