"""Summarizes a model layer by layer, with a row for each call in execution order.

The model is traced once, with a scope that records which layer is called where. A row counts only what
no earlier row and no row within it counts, so each column adds up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from paramtree.core.arrays import dtype_of, join
from paramtree.core.errors import ParamTreeError
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Patterns, select_slots
from paramtree.core.structure import HOLE, PARAM
from paramtree.core.tree import ParamTree, unflatten
from paramtree.inspect.flops import calls_in, count_flops, split_by_call
from paramtree.inspect.observe import Observer
from paramtree.inspect.report import Report, Table, bytes_text, some, with_unit
from paramtree.inspect.rows import Row, arrays_text, count_leaves, model_text, rows_of, title, unwrapped

__all__ = ["Summary", "summary"]

_NUMBERS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("params", "trained", "state"), "{:,}".format),
    "bytes": bytes_text,
    "FLOPs": partial(with_unit, step=1000, units=("", "k", "M", "G", "T", "P")),
}


@dataclass(repr=False)
class Summary(Report):
    """The result of ``pt.summary``: prints as a table, renders in a notebook, converts to plain values.

    Attributes:
      rows: one row for each call of a layer, in execution order; the first is the model itself.
      totals: counts for "trained" and "frozen" parameters, for "state", and in "total".
      unused: the names of parameters that the output does not depend on.
    """

    rows: list[Row]
    totals: dict[str, dict[str, int | None]]
    unused: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the rows, the totals and the unused names as plain values.

        Example:
          >>> import paramtree as pt
          >>> net = pt.nn.Dense(3)
          >>> x = jax.ShapeDtypeStruct((2, 4), "float32")
          >>> report = pt.summary(net, pt.abstract(net, x), x).to_dict()
          >>> report["rows"][0]["outputs"], report["totals"]["total"]["params"]
          ([{'shape': [2, 3], 'dtype': 'float32'}], 15)
        """
        rows = []
        for row in self.rows:
            plain = {**vars(row), "tied": dict(row.tied), "parametrized": dict(row.parametrized)}
            del plain["label"]
            for name in ("inputs", "outputs"):
                plain[name] = [{"shape": list(a.shape), "dtype": str(a.dtype)} for a in plain[name]]
            rows.append(plain)
        totals = {name: dict(total) for name, total in self.totals.items()}
        return {"rows": rows, "totals": totals, "unused": list(self.unused)}

    def table(self) -> Table:
        totals = {name: total for name, total in self.totals.items() if any(total.values())}
        blank = [""] * len(totals)
        cells = {
            "layer": [*map(title, self.rows), *totals],
            "input": [*(arrays_text(row.inputs) for row in self.rows), *blank],
            "output": [*(arrays_text(row.outputs) for row in self.rows), *blank],
        }
        for heading, text in _NUMBERS.items():
            key = heading.lower()
            values = [getattr(row, key) for row in self.rows]
            values += [total.get(key, 0) for total in totals.values()]
            if any(values) and (key != "trained" or "frozen" in totals):
                cells[heading] = ["?" if v is None else text(v) if v else "" for v in values]
        lines = list(zip(*cells.values(), strict=True))
        return Table(
            title="",
            columns=list(cells),
            rows=lines[: len(self.rows)],
            numbers=_NUMBERS,
            totals=lines[len(self.rows) :],
            notes=[f"The output does not depend on {some(self.unused, 2)}."] if self.unused else [],
        )


def summary(
    f: Callable[..., Any],
    params: ParamTree,
    *inputs: Any,
    trainable: Patterns = None,
    flops: bool = True,
    **kwargs: Any,
) -> Summary:
    """Returns a layer-by-layer summary of a model, with a row for each call in execution order.

    Rows of inner layers are indented. A layer does not count what its inner layers count; tied leaves,
    and the leaves of a layer that is called twice, count where they come first. So every column adds up
    to its total. Parameters of a plain function count on the row of the layer or model that calls it.

    The model is traced once, for inference, and nothing is computed. Shapes are those a layer sees:
    without the mapped axis under ``jax.vmap``, and of one step in a scan. A row names what it reads
    through a parametrisation. A model under ``pt.training`` has the rows and operations of training.

    Floating-point operations are those of XLA's cost analysis before optimization: the product of an
    m x k and a k x n matrix has 2 m k n, an addition one per element, ``exp`` none. Mapped axes and the
    iterations of a scan, as in ``nn.Repeat`` and ``nn.LSTM``, count in full; XLA itself would count a
    scan once. A while loop counts one iteration, a ``cond`` its most expensive branch.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      params: its parameters, or their shapes from ``pt.abstract``.
      *inputs: arrays, ``jax.ShapeDtypeStruct`` objects, or any other input of the model.
      trainable: a regular expression that matches full names of parameters, or several; all others
        count as frozen. None trains all.
      flops: whether to count floating-point operations; this takes most of the time, about 10 ms per
        kind of layer.
      **kwargs: keyword arguments for the model.

    Raises:
      TypeError: the model is not callable, or ``params`` is not a parameter tree.
      ParamTreeError: the tree has holes.
      RuleError: a pattern of ``trainable`` matches no parameter.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Dense(256, activation="relu"), pt.nn.Dense(10))
      >>> x = jax.ShapeDtypeStruct((2, 20), "float32")
      >>> pt.summary(net, pt.abstract(net, x), x)
      layer             input        output       params      bytes    FLOPs
      ──────────────────────────────────────────────────────────────────────
      Sequential        f32[2,20]    f32[2,10]
        dense0: Dense   f32[2,20]    f32[2,256]    5,376   21.0 KiB   21.5 k
        dense1: Dense   f32[2,256]   f32[2,10]     2,570   10.0 KiB   10.3 k
      <BLANKLINE>
      trained                                      7,946   31.0 KiB
      total                                        7,946   31.0 KiB   31.8 k
    """
    _check(f, params)
    source = open_tree(params)
    structure, tree_leaves, place = source.structure, source.leaves, source.place
    flat, treedef = jax.tree.flatten((inputs, kwargs))
    # Other leaves and inputs, such as flags, are not traced.
    arrays = {i: leaf for i, leaf in enumerate((*tree_leaves, *flat)) if dtype_of(leaf) is not None}
    observer = Observer()

    def call(traced: dict[int, Any]) -> Any:
        values = [traced.get(i, value) for i, value in enumerate((*tree_leaves, *flat))]
        args, keywords = jax.tree.unflatten(treedef, values[len(tree_leaves) :])
        tree = unflatten(structure, values[: len(tree_leaves)], place)
        in_order = {name: keywords[name] for name in kwargs}
        outputs = observer.observe(unwrapped(f), f, tree, args, in_order)
        return _results(outputs, traced)

    jaxpr = jax.make_jaxpr(call)(arrays).jaxpr
    uses, work = split_by_call(jaxpr)
    rows = rows_of(observer.calls, calls_in(jaxpr), place)
    rows[0].layer = model_text(f)
    if flops:
        counts = count_flops(work, {})
        for number, row in rows.items():
            count = counts.get(number, 0.0)
            row.flops = None if math.isnan(count) else round(count)
    trained = set(select_slots(source, trainable, PARAM, "summary")[0].slots)
    totals = count_leaves(
        unflatten(structure, tree_leaves, place), observer.calls, rows, trained, observer.joined
    )
    unused = [
        join(structure.canonical[i])
        for i, used in zip(arrays, uses, strict=True)
        if not used and i < len(tree_leaves) and structure.kinds[i] == PARAM
    ]
    return Summary(list(rows.values()), totals, unused)


def _results(outputs: Any, traced: dict[int, Any]) -> list[Any]:
    """Returns the arrays in an output; a tree in it counts only what is new, such as state."""
    given = set(map(id, traced.values()))
    results: list[Any] = []
    for value in jax.tree.leaves(outputs, is_leaf=lambda value: isinstance(value, ParamTree)):
        leaves = jax.tree.leaves(value)
        results += [a for a in leaves if not (isinstance(value, ParamTree) and id(a) in given)]
    return [leaf for leaf in results if dtype_of(leaf) is not None]


def _check(f: Any, params: Any) -> None:
    """Raises an error if the first argument is not a model, or the second not a complete tree."""
    if isinstance(f, type) or not callable(f):
        found = f"the class {f.__name__}" if isinstance(f, type) else type(f).__name__
        raise TypeError(
            f"summary takes a model first, pt.summary(model, params, x), but found {found}. Make an "
            "instance of a layer, as in nn.Dense(10)."
        )
    if not isinstance(params, ParamTree) and not hasattr(type(params), "__open__"):
        raise TypeError(
            "summary takes the parameters second, pt.summary(model, params, x), but found "
            f"{type(params).__name__}. pt.abstract(model, x) gives their shapes, and "
            "pt.from_tree(mapping) converts a nested mapping to a tree."
        )
    structure = open_tree(params).structure
    if HOLE in structure.slots:
        holes = structure.slots.count(HOLE)
        raise ParamTreeError(
            f"summary takes a complete tree, but {holes} of the {len(structure.slots)} leaves of this "
            "one are holes. Fill them with pt.merge; to count trained parameters, pass the complete "
            "tree and trainable=pattern."
        )
