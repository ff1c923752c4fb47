"""How two trees differ in structure, shapes, dtypes and values.

Structure is compared as in ``pt.check_match``, except that container types are ignored: a tree can be
compared with a nested dict or a file, by name.
"""

import math
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import describe, dtype_of, short
from paramtree.core.errors import ParamTreeError
from paramtree.inspect.distance import Distance, comparable, distances
from paramtree.inspect.report import Report, Table, plural
from paramtree.verbs.compare import Difference, Pair, compare, sides
from paramtree.verbs.uncollected import uncollected

__all__ = ["Change", "Diff", "check_tolerances", "diff", "measured", "only_shape"]


class Change(NamedTuple):
    """A leaf whose values differ.

    Attributes:
      name: the name of the leaf.
      differing: the number of elements that differ by more than the tolerance.
      size: the number of elements.
      largest: the largest absolute difference; NaN if exactly one side is NaN somewhere, None if the
        leaf is not numeric.
      relative: ``‖a - b‖ / ‖a‖``, with the finite elements of a in the norm; None if not numeric.
      a: the value in the first tree as text, if the leaf has a single element.
      b: the value in the second tree, likewise.
    """

    name: str
    differing: int
    size: int
    largest: float | int | None
    relative: float | None
    a: str | None = None
    b: str | None = None


@dataclass(frozen=True, repr=False)
class Diff(Report):
    """The differences between two trees; false if there are none.

    Attributes:
      differences: the differences in structure, shapes and dtypes.
      changes: the leaves whose values differ: non-numeric ones first, then new NaNs, then the others
        by decreasing relative change.
      compared: the number of leaves whose values were compared.
      shapes_only: the number of leaves that have only a shape in one of the trees.
    """

    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    compared: int
    shapes_only: int

    def __bool__(self) -> bool:
        return bool(self.differences or self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the structural differences as a list and the changed values by name."""
        rows = [change._asdict() for change in self.changes]
        return {
            "structure": [difference._asdict() for difference in self.differences],
            "values": {row.pop("name"): row for row in rows},
            "compared": self.compared,
            "shapes_only": self.shapes_only,
        }

    def table(self) -> Table:
        numbers = ("elements", "largest", "relative")
        columns = ("name", "difference", "a", "b", *numbers)
        rows = [(d.name or "(the tree)", d.what, *sides(d), "", "", "") for d in self.differences] + [
            (
                change.name,
                "value",
                change.a or "",
                change.b or "",
                f"{change.differing:,} of {change.size:,}",
                *("" if v is None else f"{v:.4g}" for v in (change.largest, change.relative)),
            )
            for change in self.changes
        ]
        filled = [any(row[i] for row in rows) for i in range(len(columns))]
        note = f"Values were not compared for {_leaves(self.shapes_only)} with only a shape."
        return Table(
            self._title(),
            list(compress(columns, filled)),
            [tuple(compress(row, filled)) for row in rows],
            numbers,
            notes=[note] if self.shapes_only else [],
        )

    def _title(self) -> str:
        if not self:
            return f"No difference in {_leaves(self.compared + self.shapes_only)}"
        parts = []
        if self.differences:
            parts.append(f"{len(self.differences):,} in structure, shapes and dtypes")
        if self.compared:
            parts.append(f"{len(self.changes):,} of {_leaves(self.compared)} in value")
        return f"Differences: {', '.join(parts)}"


def _leaves(count: int) -> str:
    return plural(count, "leaf", "leaves")


def diff(a: Any, b: Any, *, rtol: float = 0.0, atol: float = 0.0) -> Diff:
    """Returns how two trees differ: missing and extra leaves, shapes, dtypes, ties, kinds and values.

    Leaves are matched by name, relative to the two trees even if they are sub-trees. Container types
    are ignored; ``pt.check_match`` compares them too, and works under ``jit``. An element differs if
    ``|a - b| > atol + rtol * |b|``; NaNs in the same position are equal. Leaves of equal shape are
    compared even if their dtypes differ, and a tied leaf once. Non-numeric leaves are compared with
    ``==``, PRNG keys by their data.

    Args:
      a: a parameter tree or any other pytree.
      b: another, such as the same model after a step, or the contents of a file.
      rtol: the tolerance relative to b.
      atol: the absolute tolerance.

    Returns:
      A ``Diff``. It is true if there is a difference, prints as a table, renders in a notebook, and has
      ``.to_dict()``. Structural differences come first, then values by decreasing relative change.

    Raises:
      TypeError: the values are traced.
      ParamTreeError: a leaf was donated to a jitted function or deleted; all are listed.
      NameCollisionError: two leaves of a tree share a path, as in {"a/b": x, "a": {"b": y}}.
      ValueError: a tolerance is not a non-negative number.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": jnp.ones((2, 3)), "bias": jnp.zeros(2)}})
      >>> other = pt.replace(params, {"dense0_weight": params.dense0.weight.at[0, 0].add(0.5)})
      >>> pt.diff(params, other)
      Differences: 1 of 2 leaves in value
      name            difference   elements   largest   relative
      ──────────────────────────────────────────────────────────
      dense0_weight   value          1 of 6       0.5     0.2041
      >>> bool(pt.diff(params, params)), bool(pt.diff(params, other, atol=1.0))
      (False, False)
    """
    check_tolerances(rtol, atol)
    with uncollected():
        differences, pairs = compare(a, b)
        compared = measured("diff", pairs, rtol, atol)
        changes = [Change(pair.name, *far, *_shown(pair, far.size)) for pair, far in compared if far]
        return Diff(
            tuple(difference for difference in differences if difference.what != "container"),
            tuple(sorted(changes, key=_rank)),
            len(compared),
            sum(map(only_shape, pairs)),
        )


def check_tolerances(rtol: Any, atol: Any) -> None:
    """Raises ValueError unless both tolerances are non-negative numbers."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, int | float | np.number) or not value >= 0:
            raise ValueError(f"{name} must be a non-negative number, but found {value!r}.")


def measured(verb: str, pairs: list[Pair], rtol: Any, atol: Any) -> list[tuple[Pair, Distance | None]]:
    """Returns the comparable pairs with their distances; raises if values are traced or gone."""
    types = {type(leaf) for _, *leaves in pairs for leaf in leaves}
    if any(issubclass(one, jax.core.Tracer) for one in types):
        raise TypeError(
            f"{verb} compares values, which are unknown while a function is traced. "
            "pt.check_match(a, b) compares structure, shapes and dtypes, and works under jit."
        )
    arrays = {one for one in types if issubclass(one, jax.Array)}
    if gone := [name for name, *pair in pairs for x in pair if type(x) in arrays and x.is_deleted()]:
        shown = ", ".join(f"`{short(name)}`" for name in dict.fromkeys(gone))
        raise ParamTreeError(
            f"{verb}: the values of {shown} are gone: they were donated to a jitted function or "
            "deleted. Compare before that call, or do not donate them."
        )
    pairs = [pair for pair in pairs if comparable(pair.first, pair.second)]
    far = distances([(pair.first, pair.second) for pair in pairs], float(rtol), float(atol))
    return list(zip(pairs, far, strict=True))


def only_shape(pair: Pair) -> bool:
    """Whether one of two leaves is only a shape."""
    struct = jax.ShapeDtypeStruct
    return isinstance(pair.first, struct) or isinstance(pair.second, struct)


def _rank(change: Change) -> tuple[int, float]:
    if change.relative is None or math.isnan(change.relative):
        return int(change.relative is not None), 0.0
    return 2, -change.relative


def _shown(pair: Pair, size: int) -> tuple[str | None, str | None]:
    """Returns the values of two single-element leaves as text; None for larger leaves."""
    return (_value(pair.first), _value(pair.second)) if size == 1 else (None, None)


def _value(leaf: Any) -> str | None:
    if dtype_of(leaf) is None:
        return describe(leaf)
    if isinstance(leaf, jax.Array) and (
        not leaf.is_fully_addressable or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ):
        return None
    return describe(np.asarray(leaf).item())
