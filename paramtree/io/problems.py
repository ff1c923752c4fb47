"""What loading has done, or every mismatch between a file and a tree in one error."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from paramtree.core.arrays import dtype_of, join, printable, shape_of
from paramtree.core.errors import LoadError
from paramtree.core.structure import Path, Structure
from paramtree.io.matching import Item, closest, name_pattern
from paramtree.io.source import Source, shortened
from paramtree.io.wire import is_key
from paramtree.verbs.cast import casts

__all__ = ["LoadReport", "Problems"]


@dataclass(frozen=True)
class LoadReport:
    """What ``pt.load`` did.

    Attributes:
      path: the file.
      format: the name of its format, such as "safetensors".
      loaded: the names in the file that each leaf was loaded from, by the name of the leaf.
      missing: names of leaves that are not in the file and kept their values.
      ignored: names in the file that were not used.
      cast: the dtype in the file of each leaf that was cast, by the name of the leaf.
      kept: the shape in the file of each leaf that kept its value because its shape is another.
      metadata: texts in the file that are not paramtree's own.
      notes: remarks, such as what a pickle asked for and was not made.

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
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, **found: Any) -> "LoadReport":
        """Returns the report of a source, in which nothing was loaded if nothing else is given."""
        empty: dict[str, Any] = {"loaded": {}, "missing": [], "ignored": [], "cast": {}}
        about = {"metadata": dict(source.metadata), "notes": list(source.notes)}
        return cls(source.path, source.format.name, **{**empty, **about, **found})

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dict of plain Python values."""
        return asdict(self)

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} loaded, {len(self.missing)} missing, {len(self.ignored)} ignored"
        lines = [f"{self.path} ({self.format}): {counts}"]
        lines += [f"  {name}: from {', '.join(origins)}" for name, origins in self.loaded.items()]
        lines += [f"  {name}: cast from {dtype}" for name, dtype in self.cast.items()]
        lines += [f"  {name}: shape {shape} in the file, kept" for name, shape in self.kept.items()]
        lines += [f"  {name}: not in the file, kept" for name in self.missing]
        lines += [f"  {name}: in the file, ignored" for name in self.ignored]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(map(printable, lines))


class Problems:
    """Collects the mismatches between a file and a tree, to raise them as one error."""

    def __init__(self, path: str, deduplicated: bool, sep: str) -> None:
        self.path, self.deduplicated, self.sep = path, deduplicated, sep
        self.lines: list[str] = []
        self.count = 0
        self.advice: dict[str, None] = {}

    def add(self, line: str, advice: str) -> None:
        """Records a problem, and what to do about it."""
        self.count += 1
        if self.count <= _SHOWN:
            self.lines.append(printable(line))
        self.advice[advice] = None

    def check(self) -> None:
        """Raises LoadError if there is a problem."""
        if self.lines:
            shown = "".join(f"\n  {line}" for line in self.lines)
            if self.count > _SHOWN:
                shown += f"\n  and {self.count - _SHOWN:,} more."
            advice = "".join(f"\n{line}" for line in self.advice)
            raise LoadError(f"{self.path} does not fit the tree:{shown}{advice}")

    def missing(
        self,
        structure: Structure,
        leaves: Sequence[Any],
        matches: Sequence[Sequence[Item]],
        extra: Sequence[Item],
        allowed: Any,
    ) -> list[str]:
        """Returns the missing names that are allowed, and records the others as problems."""
        accepted = []
        pattern, sep = _allowed(allowed)
        unexpected = {item.names[0]: item for item in extra}
        aliases: dict[int, list[Path]] = {}
        for path, slot in structure.entries():
            aliases.setdefault(slot, []).append(path)
        hints = max(1, 20_000 // (len(unexpected) + 1))  # finding a close name is slow
        for slot, (leaf, items) in enumerate(zip(leaves, matches, strict=True)):
            if items or shape_of(leaf) is None:
                continue
            path = structure.canonical[slot]
            if not any(pattern.fullmatch(join(alias, sep)) for alias in aliases[slot]):
                near = closest(join(path, "."), shape_of(leaf), unexpected) if hints else ""
                hints -= bool(hints)
                hint = f"; the closest unexpected name is `{_printable(near)}`" if near else ""
                self.add(f"`{join(path)}` is missing{hint}.", _MISSING)
                if self.deduplicated:
                    self.advice[_DEDUPLICATED] = None
            elif isinstance(leaf, jax.ShapeDtypeStruct):
                self.add(f"`{join(path)}` is missing, and `like` has no value for it.", _NO_VALUE)
            else:
                accepted.append(join(path))
        return accepted

    def extra(self, extra: Sequence[Item], allowed: Any) -> list[str]:
        """Returns the extra names that are allowed, and records the others as problems."""
        accepted = []
        pattern, sep = _allowed(allowed)
        levels = "[./]" if sep == "_" else re.escape(self.sep or "/")
        for item in extra:
            spelled = {item.origin, *item.names}
            spelled |= {re.sub(levels, sep, name) for name in spelled}
            if any(map(pattern.fullmatch, spelled)):
                accepted.append(item.origin)
            else:
                renamed = (
                    "" if item.origin in item.names else f", renamed to `{_printable(item.names[0])}`,"
                )
                self.add(f"`{_printable(item.origin)}`{renamed} is unexpected.", _EXTRA)
        return accepted

    def compare(self, name: str, leaf: Any, item: Item, cast: bool) -> None:
        """Records a shape or dtype that differs from that of the leaf."""
        origin = "" if item.origin == name else f", from `{_printable(item.origin)}`,"
        shape, dtype = shape_of(leaf), dtype_of(leaf)
        if isinstance(dtype, np.dtype):
            dtype = dtype.newbyteorder("=")
        if shape is None:
            kind = type(leaf).__name__
            self.add(f"`{name}`{origin} does not fit: `like` has a {kind} there, not an array.", _SHAPE)
        elif item.shape != shape:
            self.add(f"`{name}`{origin} has shape {item.shape}, expected {shape}.", _SHAPE)
        if isinstance(leaf, bool | int | float | complex):
            known = item.dtype if isinstance(item.dtype, np.dtype) else None
            if (
                known is None
                or not casts(known, type(leaf))
                or (known == np.bool_) != (type(leaf) is bool)
            ):
                number = type(leaf).__name__
                self.add(f"`{name}`{origin} has dtype {item.dtype}, expected Python's {number}.", _CAST)
            return
        if dtype is None or item.dtype == dtype:
            return
        if not cast and not _is_number(item, leaf):
            self.add(f"`{name}`{origin} has dtype {item.dtype}, expected {dtype}.", _DTYPE)
        elif not casts(item.dtype, dtype):
            self.add(f"`{name}`{origin} has dtype {item.dtype}, which does not cast to {dtype}.", _CAST)

    def lossy(self, name: str, item: Item, problem: str) -> None:
        """Records values that do not fit the dtype of their leaf."""
        origin = "" if item.origin == name else f", from `{_printable(item.origin)}`,"
        self.add(f"`{name}`{origin} {problem}.", _LOSSY)

    def keep(self, name: str, leaf: Any, items: Sequence[Item]) -> tuple[int, ...]:
        """Returns the shape in the file of a leaf that keeps its value, which it needs to have."""
        item = next(item for item in items if item.shape != shape_of(leaf))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            self.add(
                f"`{name}` has shape {item.shape}, not {leaf.shape}, and `like` has no value.",
                _NO_VALUE,
            )
        return item.shape

    def equal(self, name: str, item: Item, value: Any, alias: Item, alias_value: Any) -> None:
        """Records two names of a tied leaf that have different values."""
        if item.origin != alias.origin and (difference := _difference(value, alias_value)):
            both = f"`{_printable(item.origin)}` and `{_printable(alias.origin)}`"
            self.add(f"{both} are tied to one leaf, `{name}`, but differ in {difference}.", _TIED)


_SHOWN = 20  # problems in one message

_MISSING = "allow_missing=True keeps the values of `like`; rename= rewrites the names in the file."
_DEDUPLICATED = (
    "A file that Gluon deduplicated has each tied array once, under its last name: load into "
    "pt.tie(like, {alias: source}), and pt.untie the result for separate arrays."
)
_NO_VALUE = "`like` has only shapes there: pass a tree of values, as from pt.init, to keep them."
_EXTRA = "ignore_extra=True skips names that the tree does not have."
_SHAPE = "transform= can change the shape of an array; or the file is of a different model."
_DTYPE = "cast_dtype=True casts to the dtypes of `like`."
_CAST = "Floats are not cast to integers, nor complex numbers to real ones: use transform=."
_LOSSY = "Load into a tree of a wider dtype, or use transform= to change the values."
_TIED = "A tied leaf has one value: drop one name with rename=, or load into pt.untie(like)."


def _is_number(item: Item, leaf: Any) -> bool:
    """Returns whether a single integer may become another integer, as a saved number of Python's."""
    return item.shape == () and all(
        isinstance(dtype, np.dtype) and dtype.kind in "iu" for dtype in (item.dtype, dtype_of(leaf))
    )


def _allowed(names: Any) -> tuple[re.Pattern[str], str]:
    """Returns ``name_pattern`` of an option, in which True means all names, and False none."""
    if isinstance(names, bool):
        names = ".*" if names else "(?!)"
    return name_pattern(names)


def _printable(name: str) -> str:
    return shortened(printable(name), 200)


def _difference(a: Any, b: Any) -> str:
    """Returns what two arrays differ in, or an empty string."""
    if a.shape != b.shape:
        return f"shape: {a.shape} and {b.shape}"
    if a.dtype != b.dtype:
        return f"dtype: {a.dtype} and {b.dtype}"
    x, y = (np.asarray(jax.random.key_data(array) if is_key(array) else array) for array in (a, b))
    if np.array_equal(x, y) or x.tobytes() == y.tobytes():
        return ""
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        far = np.abs(x.astype(wide) - y.astype(wide))
    most = np.max(far, initial=0, where=~np.isnan(far))
    return f"{np.count_nonzero(x != y)} of {x.size} elements, by at most {most:.3g}"
