"""Statistics of the leaves of a tree by name; ``paramtree.inspect.measure`` computes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import dtype_of, join, shape_of, short
from paramtree.core.errors import MismatchError, RuleError, suggest
from paramtree.core.pytrees import is_array_or_number, open_tree
from paramtree.core.rules import Patterns
from paramtree.core.tree import ParamTree, flatten, place_of, unflatten
from paramtree.inspect.distance import numeric
from paramtree.inspect.measure import FIELDS, absent, measure
from paramtree.inspect.report import Report, Table, plural
from paramtree.verbs.collect import collect_matching

__all__ = ["NonFinite", "Stats", "find_nonfinite", "measurable", "measures", "sparkline", "stats"]

MEASURES = ("mean", "std", "min", "max", "zeros")


@dataclass(frozen=True, repr=False, eq=False)
class Stats(Report):
    """Statistics of the leaves of a tree; a pytree, so a jitted function can return it.

    All fields after the first three are arrays whose last axis runs over the names; ``scan`` stacks
    steps along axes in front. Non-finite values are excluded from ``mean``, ``std``, ``min``, ``max``,
    ``norm`` and ``histogram``; without finite values the first five are NaN. Complex leaves are
    measured by absolute value.

    Attributes:
      names: the names of the leaves, each tied leaf once.
      shapes: their shapes.
      dtypes: their dtypes.
      mean: the mean.
      std: the population standard deviation.
      min: the minimum.
      max: the maximum.
      norm: the Euclidean norm.
      zeros: the fraction of zeros, from 0 to 1.
      nan: the number of NaNs.
      inf: the number of infinities.
      histogram: counts in bins of equal width from ``min`` to ``max``, of shape (names, bins); None if
        ``bins`` was 0.

    Example:
      >>> import paramtree as pt
      >>> report = pt.stats(pt.from_tree({"a": {"w": np.arange(4.0, dtype="f4"), "b": np.zeros(2)}}))
      >>> report["a_w"]["max"], report.zeros.tolist()
      (3.0, [0.25, 1.0])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    mean: Any
    std: Any
    min: Any
    max: Any
    norm: Any
    zeros: Any
    nan: Any
    inf: Any
    histogram: Any = None

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.names:
            raise RuleError(f"stats: `{name}` is not among the names.{suggest(name, self.names)}")
        return next(row for row_name, row in self._rows() if row_name == name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the statistics of each name as numbers."""
        return dict(self._rows())

    def _rows(self, last: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields a row for each name; its entries are lists if ``scan`` stacked the statistics."""
        step = (-1,) * (np.ndim(self.mean) - 1) if last else ()
        arrays = {field: np.moveaxis(np.asarray(getattr(self, field)), -1, 0) for field in FIELDS}
        if self.histogram is not None:
            arrays["histogram"] = np.moveaxis(np.asarray(self.histogram), -2, 0)  # names, ..., bins
        for i, name in enumerate(self.names):
            yield name, {field: array[i][step].tolist() for field, array in arrays.items()}

    def table(self) -> Table:
        head = f"Statistics of {plural(len(self.names), 'leaf', 'leaves')}"
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return Table(f"{head}, traced", (), [])
        numbers = (*MEASURES, "norm", "not finite")
        columns = ("name", "shape", *numbers, *(() if self.histogram is None else ("min to max",)))
        steps = np.shape(self.mean)[:-1]
        if steps:
            head = f"{head} at {' x '.join(map(str, steps))} steps; the last is shown"
        rows, bad = [], 0
        for (name, row), shape in zip(self._rows(last=True), self.shapes, strict=True):
            nonfinite = row["nan"] + row["inf"]
            bad += bool(nonfinite)
            counts = f"{nonfinite:,}" if nonfinite else ""
            spark = () if self.histogram is None else (sparkline(row["histogram"]),)
            rows.append((name, str(shape), *measures(row), f"{row['norm']:.4g}", counts, *spark))
        note = f"{plural(bad, 'leaf holds', 'leaves hold')} non-finite values."
        return Table(head, columns, rows, numbers, notes=[note] if bad else [])


jax.tree_util.register_pytree_node(
    Stats,
    lambda made: (
        [getattr(made, field) for field in (*FIELDS, "histogram")],
        (made.names, made.shapes, made.dtypes),
    ),
    lambda static, arrays: Stats(*static, *arrays),
)


def stats(tree: Any, pattern: Patterns = None, *, kind: str | None = None, bins: int = 0) -> Stats:
    """Returns statistics of the leaves of a tree, by name.

    Works inside a jitted function, for example every few hundred steps under ``jax.lax.cond``. Computes
    in float32, or float64 for 64-bit leaves; in float32 the standard deviation and norm of values
    beyond 1e19 are infinite. Non-numeric leaves are left out.

    Args:
      tree: a parameter tree, its gradients, an optimiser's state, or any other pytree.
      pattern: a regular expression that matches full names; None selects all leaves.
      kind: "param" or "state" to select only these.
      bins: the number of histogram bins; 0 for no histogram.

    Returns:
      A ``Stats``, which prints as a table, renders in a notebook and has ``.to_dict()``.

    Raises:
      MismatchError: leaves are only shapes, or were donated; all are listed.
      RuleError: the pattern matches nothing, or is not a regular expression.
      ValueError: ``bins`` is not a non-negative integer.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": jnp.arange(6.0), "bias": jnp.zeros(2)}})
      >>> pt.stats(params, bins=8)
      Statistics of 2 leaves
      name            shape   mean     std   min   max   zeros    norm   not finite   min to max
      ──────────────────────────────────────────────────────────────────────────────────────────
      dense0_weight   (6,)     2.5   1.708     0     5   16.7%   7.416                ██ ██ ██
      dense0_bias     (2,)       0       0     0     0    100%       0                    █
    """
    return _stats("stats", tree, pattern, kind, bins)


def _stats(verb: str, tree: Any, pattern: Patterns, kind: str | None, bins: int) -> Stats:
    if not isinstance(bins, int) or bins < 0:
        raise ValueError(f"{verb}: bins must be a non-negative integer, but found {bins!r}.")
    source = open_tree(tree, is_array_or_number)
    named = unflatten(source.structure, source.leaves, source.place)
    flat = collect_matching(verb, named, pattern, kind=kind)
    leaves = measurable(flat)
    names = tuple(join(flatten(flat)[0].canonical[slot]) for slot in leaves)
    shapes = tuple(shape_of(leaf) or () for leaf in leaves.values())
    dtypes = tuple(str(dtype_of(leaf) or jnp.result_type(leaf)) for leaf in leaves.values())
    return Stats(names, shapes, dtypes, *measure(list(leaves.values()), bins))


def measurable(tree: ParamTree) -> dict[int, Any]:
    """Returns the leaves of a complete tree that are numbers, by slot; raises if any has no values."""
    structure, leaves = flatten(tree)
    numbers = {slot: leaf for slot, leaf in enumerate(leaves) if numeric(leaf)}
    missing = [
        f"`{short(join((*place_of(tree), *structure.canonical[slot])))}` {why}"
        for slot, leaf in numbers.items()
        if (why := absent(leaf))
    ]
    if missing:
        raise MismatchError(
            f"statistics need values, but {', '.join(missing)}: pass the tree from pt.init or pt.load, "
            "or the one that the jitted function returned."
        )
    return numbers


def measures(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the ``MEASURES`` of one leaf as text."""
    return (*(f"{row[field]:.4g}" for field in MEASURES[:-1]), f"{100 * row['zeros']:.3g}%")


def sparkline(counts: list[int]) -> str:
    """Returns a histogram as one character per bin, as in ▂▁▄█▂."""
    most = max(counts, default=0)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most) if most else 0] for count in counts)


@dataclass(frozen=True, repr=False, eq=False)
class NonFinite(Report):
    """The leaves that hold NaN or infinity; false if there are none.

    Attributes:
      found: for each such name, its size and its numbers of NaNs and infinities.
      searched: the number of leaves searched.
    """

    found: dict[str, dict[str, int]]
    searched: int

    def __bool__(self) -> bool:
        return bool(self.found)

    def to_dict(self) -> dict[str, Any]:
        """Returns ``{"size": ..., "nan": ..., "inf": ...}`` for each name."""
        return dict(self.found)

    def table(self) -> Table:
        rows = [(name, *map("{:,}".format, row.values())) for name, row in self.found.items()]
        title = f"Not finite: {len(rows):,} of {plural(self.searched, 'leaf', 'leaves')}"
        return Table(title, ("name", "size", "nan", "inf"), rows, numbers=("size", "nan", "inf"))


def find_nonfinite(tree: Any, pattern: Patterns = None) -> NonFinite:
    """Returns the names of the leaves that hold NaN or infinity, with counts.

    Args:
      tree: a parameter tree, its gradients, an optimiser's state, or any other pytree.
      pattern: a regular expression that matches full names; None selects all leaves.

    Returns:
      A report, true if there are any, that prints, renders in a notebook and has ``.to_dict()``.

    Raises:
      TypeError: the values are traced.
      MismatchError: leaves are only shapes, or were donated; all are listed.
      RuleError: the pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> grads = pt.from_tree({"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(3)})
      >>> pt.find_nonfinite(grads)
      Not finite: 1 of 2 leaves
      name   size   nan   inf
      ───────────────────────
      a         2     1     0
    """
    report = _stats("find_nonfinite", tree, pattern, None, 0)
    if any(isinstance(value, jax.core.Tracer) for value in (report.nan, report.inf)):
        raise TypeError(
            "find_nonfinite reports values, which are unknown while a function is traced. Call it "
            "outside, or return pt.stats(tree) from the function and look at its .nan and .inf."
        )
    rows = zip(report.names, report.shapes, report.nan, report.inf, strict=True)
    found = {
        name: {"size": int(np.prod(shape)), "nan": int(nan), "inf": int(inf)}
        for name, shape, nan, inf in rows
        if nan or inf
    }
    return NonFinite(found, len(report.names))
