"""Shows a tree: text when printed, and in a notebook HTML whose levels open and close.

The HTML is self-contained, without script or network, so it works in Jupyter, nbconvert and VS Code;
GitHub strips the style and leaves a readable list. Browsers open the levels that hide the target of a
link.
"""

from dataclasses import dataclass
from typing import Any

import jax

from paramtree.core.arrays import join, short
from paramtree.core.structure import EMPTY, HOLE
from paramtree.core.tree import ParamTree, flatten, place_of
from paramtree.inspect.measure import FIELDS, measure
from paramtree.inspect.outline import as_tree, lines, outline
from paramtree.inspect.page import page
from paramtree.inspect.stats import MEASURES, measurable, measures, sparkline
from paramtree.verbs.uncollected import uncollected

__all__ = ["View", "show"]

BINS = 16
GROUP = 100  # more children than this are grouped
OPEN_ROWS = 40  # rows visible at first
TEXT_ROWS = 200


@dataclass(frozen=True)
class View:
    """The result of ``pt.show``: text when printed, HTML in a notebook."""

    tree: ParamTree
    statistics: dict[int, dict[str, Any]] | None = None

    def __repr__(self) -> str:
        cells: dict[int, tuple[str, ...]] = {}
        if self.statistics is not None:
            cells[-1] = (*MEASURES, "min to max")
            for slot, row in self.statistics.items():
                cells[slot] = (*measures(row), f"▕{sparkline(row['histogram'])}▏")
        return "\n".join(lines(outline(self.tree), TEXT_ROWS, cells))

    def _repr_html_(self) -> str:
        with uncollected():
            return page(outline(self.tree), self.statistics)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return _for_treescope(self.tree).__treescope_repr__(path, subtree_renderer)


def show(tree: Any, *, stats: bool = False) -> View:
    """Returns a view of a tree: a text outline, or in a notebook an outline with collapsible levels.

    A parameter tree at the end of a notebook cell renders in the same way; ``show`` also takes any
    other pytree, and adds statistics. Array values are read only for statistics.

    Args:
      tree: a parameter tree of arrays, shapes or tracers, or any other pytree.
      stats: adds mean, standard deviation, extremes, fraction of zeros, non-finite counts, and a
        histogram from minimum to maximum.

    Raises:
      NameCollisionError: two leaves share a path, as in {"a/b": x, "a": {"b": y}}.
      RuleError: a key of a mapping is empty, or has an empty segment, as in "a//b".
      MismatchError: statistics need values, but the tree has only shapes.
      TypeError: statistics need values, but these are traced.

    Example:
      >>> import numpy as np, paramtree as pt
      >>> pt.show({"dense0": {"weight": np.ones((2, 3), "f4"), "bias": np.zeros(2, "f4")}})
      ParamTree: 2 leaves, 8 parameters, 32 B
      └─ dense0                      8  32 B
         ├─ weight  (2, 3)  float32  6  24 B
         └─ bias    (2,)    float32  2   8 B
    """
    viewed = as_tree(tree)
    if not stats:
        return View(viewed)
    leaves = measurable(viewed)
    columns = dict(zip((*FIELDS, "histogram"), measure(list(leaves.values()), BINS), strict=True))
    if any(isinstance(column, jax.core.Tracer) for column in columns.values()):
        raise TypeError(
            "show: values are unknown while a function is traced. Leave out stats=True, or return "
            "pt.stats(tree) from the function."
        )
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return View(viewed, {slot: dict(zip(columns, next(rows), strict=True)) for slot in leaves})


# treescope draws the levels and arrays; ties and holes, which only the tree knows, are remarks.


class _Remark(str):
    __repr__ = str.__str__


class _Drawn(dict[str, Any]):
    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope.repr_lib import render_dictionary_wrapper  # type: ignore[import-untyped]

        return render_dictionary_wrapper(
            object_type=ParamTree, wrapped_dict=dict(self), path=path, subtree_renderer=subtree_renderer
        )


def _for_treescope(tree: ParamTree) -> _Drawn:
    (structure, leaves), place = flatten(tree), place_of(tree)
    top = _Drawn()
    for entry, slot in zip(structure.paths, structure.slots, strict=True):
        level, segments = top, [short(segment, 200) for segment in entry]
        for segment in segments if slot == EMPTY else segments[:-1]:
            level = level.setdefault(segment, _Drawn())
        if slot == HOLE or (slot >= 0 and leaves[slot] is None):
            level[segments[-1]] = _Remark("<hole>")
        elif slot >= 0:
            first = structure.canonical[slot]
            tied = _Remark(f"<tied to {short(join(place + first), 200)}>")
            level[segments[-1]] = leaves[slot] if first == entry else tied
    return top
