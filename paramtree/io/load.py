"""``pt.load``: a file into a tree, all of it or an error that says all that is wrong."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from paramtree.core.arrays import dtype_of, join, printable, shape_of
from paramtree.core.names import Pattern, Rules, named
from paramtree.core.tree import ParamTree, _rebuild
from paramtree.io.matching import Item, Lookup, Rename, rename_all
from paramtree.io.peek import arranged, items_of, open_source
from paramtree.io.placing import Placing, divides
from paramtree.io.problems import Problems
from paramtree.io.restack import restack
from paramtree.io.source import Source, segments
from paramtree.io.transforms import transform_all
from paramtree.io.wire import decode
from paramtree.sharding.shardings import spread

__all__ = ["LoadReport", "load", "load_part"]


@dataclass(frozen=True)
class LoadReport:
    """What ``pt.load`` did.

    Attributes:
      path: the file.
      format: what it is: "safetensors", "params", "npz" or "orbax".
      loaded: for each name in the tree the names in the file that its value came from.
      missing: names of the tree that kept the value they had.
      ignored: names of the file that were not used.
      cast: for each name whose dtype was changed the dtype in the file.

    Example:
      >>> print(LoadReport("a.npz", "npz", {"w": ["weight"]}, [], ["step"], {}))
      a.npz (npz): 1 loaded, 0 missing, 1 ignored
        w: from weight
        step: in the file, ignored
    """

    path: str
    format: str
    loaded: dict[str, list[str]]
    missing: list[str]
    ignored: list[str]
    cast: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} loaded, {len(self.missing)} missing, {len(self.ignored)} ignored"
        lines = [f"{self.path} ({self.format}): {counts}"]
        lines += [f"  {name}: from {', '.join(origins)}" for name, origins in self.loaded.items()]
        lines += [f"  {name}: cast from {dtype}" for name, dtype in self.cast.items()]
        lines += [f"  {name}: not in the file, kept" for name in self.missing]
        lines += [f"  {name}: in the file, ignored" for name in self.ignored]
        return "\n".join(map(printable, lines))


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
) -> Any:
    r"""Returns the tree that a file holds; what the file is shows from its content.

    Reads safetensors, MXNet's ``.params``, numpy's ``.npz`` and Orbax checkpoints, never a pickle.
    Names are found in ``like`` joined with ".", "/" or "_", with the positions of layers in place of
    their names (``0.weight``), under any name of a tied leaf, and in ``.params`` by order as well.
    Nothing is returned unless all of it fits.

    Args:
      path: a file, the folder that Orbax wrote, or the ``.index.json`` of a model in several files.
      like: a tree of arrays, or of the shapes that ``pt.abstract`` gives; or any other pytree. The
        result has its structure, ties, kinds, types of arrays and shardings. Without it the tree is
        the one that was saved or, if somebody else wrote the file, one built from the names.
      rename: pairs of a regular expression and its replacement, each applied in turn to every name in
        the file with ``re.sub``, or a function of a name. None as the replacement drops the name.
      transform: a rule table from names in the tree to functions of an array, such as
        ``{".*_kernel": np.transpose}``. To split an array, return a mapping of names, in which
        ``\1`` stands for the first group of the pattern:
        ``{"(.*)_qkv": lambda a: dict(zip([r"\1_q", r"\1_k", r"\1_v"], np.split(a, 3)))}``.
        To stack several, rename them to one name; the function is then called with all of them.
      strict: False allows both missing and extra names.
      allow_missing: whether names of the tree may be missing in the file and keep their values; or
        a pattern of those that may.
      ignore_extra: whether the file may have names that the tree does not; or a pattern of those.
      cast_dtype: whether arrays of another dtype are cast to that of ``like``.
      sep: what separates the levels in names that become a tree; "/" always does.
      report: whether to return the report as well.
      shardings: where the leaves are to be: what ``pt.shardings`` makes of ``like``, or without it of
        ``pt.peek(path)``; or one sharding for all. Of a safetensors file or an Orbax checkpoint, every
        process reads the parts that its devices hold and no more.

    Returns:
      The tree; with ``report=True`` the tree and a ``pt.LoadReport``. Leaves are jax arrays, or numpy
      arrays where ``like`` has these, or where jax could not hold the dtype without 64-bit types.

    Raises:
      LoadError: the file is damaged, or does not fit ``like``: all that is missing, unexpected, or of
        another shape or dtype is listed.
      MismatchError: the shardings are those of another tree.
      RuleError: ``rename`` or ``transform`` has a pattern that matches nothing.
      FileNotFoundError: there is no such file.

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
        plan = _Plan(source, rename_all(items_of(source), rename), transform, sep)
        if like is None:
            tree, made = plan.into_names(
                rename is None and transform is None, lambda found: found, shardings
            )
        else:
            free = allow_missing or not strict, ignore_extra or not strict
            tree, made = plan.into(
                like, *free, cast_dtype, source.ordered and rename is None, shardings
            )
    return (tree, made) if report else tree


def load_part(path: str | os.PathLike[str], choose: Callable[[ParamTree], ParamTree]) -> ParamTree:
    """Returns a part of the tree that a file holds; of the rest nothing is read.

    Args:
      path: the file.
      choose: returns a part of a tree, with holes for the rest. The leaves of the tree are no arrays.

    Raises:
      LoadError: the file is damaged.
    """
    with open_source(os.fspath(path)) as source:
        return _Plan(source, items_of(source), None, ".").into_names(True, choose)[0]


def _shape(item: Item) -> Any:
    return jax.ShapeDtypeStruct(item.shape, item.dtype)


class _Plan:
    """Which array goes where, and the reading of it once that is known to be right."""

    def __init__(
        self, source: Source, items: Sequence[Item], transform: Rules | None, sep: str
    ) -> None:
        self.source = source
        self.items = items
        self.transform = transform
        layout = source.layout
        self.sep = sep if layout is None else layout.sep
        self.tags = {} if layout is None else dict(zip(layout.names, layout.tags, strict=True))

    def value(self, item: Item) -> Any:
        """Returns the array of an item."""
        if item.read is not None:
            return item.read()
        return self.stored(item.origin)

    def unexpected(self, name: str) -> Any:
        """Returns an array of the file for a transform, of which nobody has said the shape."""
        if self.source.arrays[name].expands:
            self.source.check_expansion({})
        return self.stored(name)

    def stored(self, name: str) -> Any:
        """Returns an array of the file as the leaf that it stands for."""
        return decode(self.source.get(name), self.tags.get(name, ""))

    # Without a tree to fit

    def into_names(
        self, exact: bool, choose: Callable[[ParamTree], ParamTree], shardings: Any = None
    ) -> tuple[ParamTree, LoadReport]:
        """Returns what is chosen of the tree that was saved, or of one of the names in the file."""
        source = self.source
        source.check_expansion({})
        items = transform_all(self.items, self.transform, self._flat, self.unexpected)
        found = choose(arranged(source, items, self.sep, exact))
        chosen: Sequence[Item] = found._leaves
        places = self._places(shardings, _rebuild(found._structure, tuple(map(_shape, chosen))))
        self._prepare([[item] for item in chosen], places)
        placing = Placing()
        for item, place in zip(chosen, places, strict=True):
            self._place(placing, item, None, place)
        first = found._structure.canonical
        loaded = {join(path): [item.origin] for path, item in zip(first, chosen, strict=True)}
        tree = _rebuild(found._structure, placing.done())
        return tree, LoadReport(source.path, source.format, loaded, [], self._dropped(chosen), {})

    def _flat(self, name: str) -> str:
        return join(segments(self.source.path, name, self.sep))

    def _dropped(self, items: Sequence[Item]) -> list[str]:
        used = {origin for item in items for origin in item.origin.split(", ")}
        return [name for name in self.source.arrays if name not in used]

    # To their places

    def _places(self, shardings: Any, like: Any) -> list[Any]:
        """Returns the sharding of every leaf of a tree, None where it does not matter."""
        if shardings is not None:
            return spread(shardings, like, "the shardings for load")
        return [getattr(leaf, "sharding", None) for leaf in named(like, numbers=True).tree._leaves]

    def _prepare(self, givers: Sequence[Sequence[Item]], places: Sequence[Any]) -> None:
        """Tells the source what will be read."""
        self.source.prepare(
            {
                item.origin: place
                for found, place in zip(givers, places, strict=True)
                for item in found
                if item.read is None
            }
        )

    def _place(self, placing: Placing, item: Item, like: Any, place: Any) -> None:
        """Reads an array, or those parts of it that this process holds."""
        direct = item.read is None
        stored = self.source.arrays[item.origin] if direct and not self.tags.get(item.origin) else None
        dtype = item.dtype if like is None else dtype_of(like)
        if stored and stored.part and dtype is not None and divides(place, dtype):
            placing.add_parts(stored.part, stored.shape, dtype, place)
        else:
            placing.add(self.value(item), like, place, copy=not direct)

    # Into a tree

    def into(
        self,
        like: Any,
        allow_missing: Any,
        ignore_extra: Any,
        cast: bool,
        ordered: bool,
        shardings: Any = None,
    ) -> tuple[Any, LoadReport]:
        """Returns a tree like another one, with the values of the file."""
        source = self.source
        target, restore, _ = named(like, numbers=True)
        structure, leaves = target._structure, target._leaves
        lookup = Lookup(structure, self.sep)
        shapes = [shape_of(leaf) for leaf in leaves]

        def shown(name: str) -> str:
            path = lookup.find(name)
            return name.replace("/", "_").replace(self.sep or "/", "_") if path is None else join(path)

        items = transform_all(self.items, self.transform, shown, self.unexpected)
        items = restack(items, lookup, shapes, self.value)
        paths = lookup.assign(items, shapes, ordered, source.nameless)
        givers: list[list[Item]] = [[] for _ in leaves]
        extra = []
        for item, found in zip(items, paths, strict=True):
            for slot in dict.fromkeys(lookup.slot_of[path] for path in found):
                givers[slot].append(item)
            if not found:
                extra.append(item)
        problems = Problems(source.path, source.format == "params")
        missing = problems.missing(structure, leaves, givers, extra, allow_missing)
        ignored = problems.extra(extra, ignore_extra)
        for path, slot in zip(structure.canonical, range(len(leaves)), strict=True):
            for item in givers[slot]:
                problems.compare(join(path), leaves[slot], item, cast)
        problems.check()
        source.check_expansion({i.origin: i.shape for found in givers for i in found})
        places = self._places(shardings, like)
        self._prepare(givers, places)
        placing = Placing()
        loaded: dict[str, list[str]] = {}
        changed: dict[str, str] = {}
        for slot, (leaf, chosen) in enumerate(zip(leaves, givers, strict=True)):
            if not chosen:
                placing.keep(leaf)
                continue
            name = join(structure.canonical[slot])
            if len(chosen) == 1:
                self._place(placing, chosen[0], leaf, places[slot])
            else:
                value = self.value(chosen[0])
                for other in chosen[1:]:
                    problems.equal(name, chosen[0], value, other, self.value(other))
                placing.add(value, leaf, places[slot], copy=chosen[0].read is not None)
            loaded[name] = [item.origin for item in chosen]
            if dtype_of(leaf) not in (None, chosen[0].dtype):
                changed[name] = str(chosen[0].dtype)
        problems.check()
        ignored += [name for name in self._dropped(items) if name not in ignored]
        made = LoadReport(source.path, source.format, loaded, missing, ignored, changed)
        return restore(placing.done()), made
