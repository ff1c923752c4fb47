"""How two trees differ: in structure, shapes and dtypes, and in the values that both have.

Structure is compared as by ``pt.check_match``, but for the types of the containers: a tree and a
nested dict, or a tree and a file, are compared by name.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import absent, describe, dtype_of, shape_of, short
from paramtree.core.errors import ParamTreeError
from paramtree.inspect.distance import comparable, distances
from paramtree.inspect.report import Column, Report, Table, count_text, float_text, plural
from paramtree.verbs.compare import Difference, Pair, compare, sides

__all__ = ["Change", "Diff", "check_readable", "check_tolerances", "diff", "only_shape"]


class Change(NamedTuple):
    """A leaf whose values differ.

    Attributes:
      name: its name.
      differing: how many elements differ by more than is tolerated.
      size: how many elements there are.
      largest: the largest absolute difference; NaN if only one of the two is NaN somewhere, None for
        what is no number.
      relative: ``‖a - b‖ / ‖a‖``, of what is finite in a; None for what is no number.
      a: the value in the first tree, as text, if it is a single one.
      b: the value in the second tree.
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
    """How two trees differ; false if they do not.

    Attributes:
      differences: what differs in structure, shapes and dtypes.
      changes: the leaves whose values differ, those that changed most in relation to their size
        first; before them what is no number and what became NaN.
      compared: of how many leaves the values were compared.
      shapes_only: how many leaves have only a shape in one of the trees.
    """

    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    compared: int
    shapes_only: int

    def __bool__(self) -> bool:
        return bool(self.differences or self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the differences in structure as a list, and those in value by name."""
        values = {change.name: change._asdict() for change in self.changes}
        for row in values.values():
            del row["name"]
        return {
            "structure": [difference._asdict() for difference in self.differences],
            "values": values,
            "compared": self.compared,
            "shapes_only": self.shapes_only,
        }

    def table(self) -> Table:
        """Returns what is to be shown: a row for each difference."""
        columns = (
            Column("name"),
            Column("difference"),
            Column("a"),
            Column("b"),
            *(Column(title, number=True) for title in ("elements", "largest", "relative")),
        )
        rows = [(d.name or "(the tree)", d.what, *sides(d), "", "", "") for d in self.differences] + [
            (
                change.name,
                "value",
                change.a or "",
                change.b or "",
                f"{count_text(change.differing)} of {count_text(change.size)}",
                *("" if v is None else float_text(v) for v in (change.largest, change.relative)),
            )
            for change in self.changes
        ]
        # Columns that have nothing to say are left out.
        used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
        notes = []
        if self.shapes_only:
            notes = [f"No values were compared of {_leaves(self.shapes_only)} with only a shape."]
        return Table(
            self._title(),
            tuple(columns[i] for i in used),
            [tuple(row[i] for i in used) for row in rows],
            notes=notes,
        )

    def _title(self) -> str:
        if not self:
            return f"No difference in {_leaves(self.compared + self.shapes_only)}"
        parts = []
        if self.differences:
            parts.append(f"{count_text(len(self.differences))} in structure, shapes and dtypes")
        if self.compared:
            parts.append(f"{count_text(len(self.changes))} of {_leaves(self.compared)} in value")
        return f"Differences: {', '.join(parts)}"


def _leaves(count: int) -> str:
    return plural(count, "leaf", "leaves")


def diff(a: Any, b: Any, *, rtol: float = 0.0, atol: float = 0.0) -> Diff:
    """Returns how two trees differ: what is missing or extra, shapes, dtypes, ties, kinds and values.

    Leaves are compared by name, from the top of the two trees, also where these are sub-trees. The
    types of the containers do not matter; for that, and for use while jax is tracing, there is
    ``pt.check_match``. An element differs if ``|a - b| > atol + rtol * |b|``; a NaN is equal to a NaN
    in the same place. Leaves of one shape are compared also where their dtypes differ, and a tied
    leaf once. What is no number is compared with ``==``, and of keys their data.

    Args:
      a: a parameter tree or any other pytree.
      b: another, such as the same model after a step, or what was loaded from a file.
      rtol: what is tolerated in relation to b.
      atol: what is tolerated.

    Returns:
      A ``Diff``, which is true if there is a difference, prints, renders in a notebook, and has
      ``.to_dict()``. What differs in structure is first, then values, the largest change first.

    Raises:
      TypeError: the values are being traced, and not known yet.
      ParamTreeError: a leaf was donated to a jitted function and is deleted; all are listed.
      NameCollisionError: two leaves of one tree have one path, as those of
        {"a/b": x, "a": {"b": y}}.
      ValueError: a tolerance is negative, or no number.

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
    found, pairs = compare(a, b)
    check_readable("diff", [(pair.name, leaf) for pair in pairs for leaf in (pair.first, pair.second)])
    read = [pair for pair in pairs if comparable(pair.first, pair.second)]
    apart = distances([(pair.first, pair.second) for pair in read], float(rtol), float(atol))
    changes = [
        Change(pair.name, *distance, *_shown(pair))
        for pair, distance in zip(read, apart, strict=True)
        if distance is not None
    ]
    return Diff(
        tuple(difference for difference in found if difference.what != "container"),
        tuple(sorted(changes, key=_smallness)),
        len(read),
        sum(only_shape(pair) for pair in pairs),
    )


def check_tolerances(rtol: Any, atol: Any) -> None:
    """Raises ValueError for what is no tolerance."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, int | float | np.number) or not value >= 0:
            raise ValueError(f"{name} is a number of 0 or more, but found {value!r}.")


def check_readable(verb: str, leaves: list[tuple[str, Any]]) -> None:
    """Raises for values that are not there: not yet, or no longer."""
    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in leaves):
        raise TypeError(
            f"{verb} compares values, which are not known while a function is being traced: "
            "pt.check_match(a, b) compares structure, shapes and dtypes, also there."
        )
    gone = [
        name for name, leaf in leaves if absent(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    if gone:
        shown = ", ".join(f"`{short(name)}`" for name in dict.fromkeys(gone))
        raise ParamTreeError(
            f"{verb}: the values of {shown} are gone: they were donated to a jitted function, or "
            "deleted. Compare before the call, or call without donation."
        )


def only_shape(pair: Pair) -> bool:
    """Whether one of two leaves has no values."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in (pair.first, pair.second))


def _smallness(change: Change) -> tuple[bool, bool, float]:
    relative = change.relative
    unknown = relative is None or math.isnan(relative)
    return not unknown, relative is not None, 0.0 if unknown or relative is None else -relative


def _shown(pair: Pair) -> tuple[str | None, str | None]:
    """Returns the values of two leaves that have only one each."""
    if math.prod(shape_of(pair.first) or ()) != 1:
        return None, None
    first, second = (_value(leaf) for leaf in (pair.first, pair.second))
    return first, second


def _value(leaf: Any) -> str | None:
    if dtype_of(leaf) is None:
        return describe(leaf)
    if isinstance(leaf, jax.Array) and (
        not leaf.is_fully_addressable or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ):
        return None
    return describe(np.asarray(leaf).item())
