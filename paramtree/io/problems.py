"""All that can be wrong when a file is to become a tree, told in one error."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from paramtree.core.arrays import casts, dtype_of, join, printable, shape_of
from paramtree.core.errors import LoadError
from paramtree.core.names import compiled
from paramtree.core.structure import Path, Structure
from paramtree.io.matching import Item, closest

__all__ = ["Problems"]


class Problems:
    """Everything that is wrong with a file, collected so that one error can tell all of it."""

    def __init__(self, path: str, deduplicated: bool) -> None:
        self.path = path
        self.deduplicated = deduplicated
        self.lines: list[str] = []
        self.advice: dict[str, None] = {}

    def add(self, line: str, advice: str) -> None:
        self.lines.append(printable(line))
        self.advice[advice] = None

    def check(self) -> None:
        """Raises LoadError if there is a problem."""
        if self.lines:
            shown = "".join(f"\n  {line}" for line in self.lines)
            advice = "".join(f"\n{line}" for line in self.advice)
            raise LoadError(f"{self.path} does not fit the tree:{shown}{advice}")

    def missing(
        self,
        structure: Structure,
        leaves: Sequence[Any],
        givers: Sequence[Sequence[Item]],
        extra: Sequence[Item],
        allowed: Any,
    ) -> list[str]:
        """Returns the missing names that may be missing, and notes the others."""
        fine = []
        unexpected = {item.names[0]: item for item in extra}
        aliases: dict[int, list[Path]] = {}
        for path, slot in structure.entries():
            aliases.setdefault(slot, []).append(path)
        hints = max(1, 20_000 // (len(unexpected) + 1))  # each comparison takes a while
        for slot, (leaf, found) in enumerate(zip(leaves, givers, strict=True)):
            if found or shape_of(leaf) is None:
                continue
            names = [join(path) for path in aliases[slot]]
            if not any(_allows(allowed, name) for name in names):
                near = (
                    closest(join(structure.canonical[slot], "."), shape_of(leaf), unexpected)
                    if hints
                    else ""
                )
                hints -= bool(hints)
                hint = f"; the closest unexpected name is `{_printable(near)}`" if near else ""
                self.add(f"`{names[0]}` is missing{hint}.", _MISSING)
                if self.deduplicated:
                    self.advice[_DEDUPLICATED] = None
            elif isinstance(leaf, jax.ShapeDtypeStruct):
                self.add(f"`{names[0]}` is missing, and `like` has no value for it.", _NO_VALUE)
            else:
                fine.append(names[0])
        return fine

    def extra(self, extra: Sequence[Item], allowed: Any) -> list[str]:
        """Returns the extra names that may be there, and notes the others."""
        fine = []
        for item in extra:
            spelled = {item.origin, *item.names}
            spelled |= {re.sub("[./]", "_", name) for name in spelled}
            if any(_allows(allowed, name) for name in spelled):
                fine.append(item.origin)
            else:
                now = "" if item.origin in item.names else f", renamed to `{item.names[0]}`,"
                self.add(f"`{_printable(item.origin)}`{now} is unexpected.", _EXTRA)
        return fine

    def compare(self, name: str, leaf: Any, item: Item, cast: bool) -> None:
        """Notes a shape or dtype that is not that of the leaf."""
        origin = "" if item.origin == name else f", from `{_printable(item.origin)}`,"
        shape, dtype = shape_of(leaf), dtype_of(leaf)
        if isinstance(dtype, np.dtype):
            dtype = dtype.newbyteorder("=")
        if shape is None:
            self.add(
                f"`{name}`{origin} has no place: `like` has a {type(leaf).__name__} there.", _SHAPE
            )
        elif item.shape != shape:
            self.add(f"`{name}`{origin} has shape {item.shape}, expected {shape}.", _SHAPE)
        if dtype is None or item.dtype == dtype:
            return
        if not cast:
            self.add(f"`{name}`{origin} has dtype {item.dtype}, expected {dtype}.", _DTYPE)
        elif not casts(item.dtype, dtype):
            self.add(f"`{name}`{origin} has dtype {item.dtype}, which does not cast to {dtype}.", _CAST)

    def equal(self, name: str, item: Item, value: Any, other: Item, found: Any) -> None:
        """Notes two names of a tied leaf that have different values."""
        if item.origin == other.origin or _same(value, found):
            return
        both = f"`{_printable(item.origin)}` and `{_printable(other.origin)}`"
        self.add(f"{both} are one leaf, `{name}`, and differ{_distance(value, found)}.", _TIED)


_MISSING = "allow_missing=True keeps the values of `like`; rename= says what the file calls a name."
_DEDUPLICATED = (
    "If Gluon saved it deduplicated, tied arrays are in it once, under their last name: load into "
    "pt.tie(like, {alias: source}), and pt.untie the result if it is to be untied."
)
_NO_VALUE = "Only shapes were given: give a tree of values, from pt.init, to keep some of them."
_EXTRA = "ignore_extra=True leaves out what the tree has no place for."
_SHAPE = "transform= can bring an array into another shape; or the file is of another model."
_DTYPE = "cast_dtype=True casts to the dtypes of `like`."
_CAST = "Only numbers that are whole, or become less exact, are cast: use transform=."
_TIED = "One leaf has one value: drop one name with rename=, or load into pt.untie(like)."


def _allows(allowed: Any, name: str) -> bool:
    return bool(allowed) if isinstance(allowed, bool) else bool(compiled(allowed).fullmatch(name))


def _printable(name: str) -> str:
    text = printable(name)
    return text if len(text) <= 200 else text[:197] + "..."


def _same(a: Any, b: Any) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = (np.asarray(v) if isinstance(v, np.ndarray) else v for v in (a, b))
    return bool(np.array_equal(x, y) or (isinstance(x, np.ndarray) and x.tobytes() == y.tobytes()))


def _distance(a: Any, b: Any) -> str:
    if a.shape != b.shape:
        return f" in shape: {a.shape} and {b.shape}"
    if a.dtype != b.dtype:
        return f" in dtype: {a.dtype} and {b.dtype}"
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        x, y = (np.asarray(v).astype(wide) for v in (a, b))
        far = np.abs(x - y)
    most = np.max(far, initial=0, where=~np.isnan(far))
    return f" in {np.count_nonzero(x != y)} of {x.size} elements, by at most {most:.3g}"
