"""A model layer by layer: a row for each call, in the order of execution.

The model runs once, on shapes, with a scope that notes which layer is called where. What a row counts
is its own: no row before it has counted it, and no row within it has it. So each column adds up.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from paramtree.core.arrays import dtype_of, join, shape_of, short
from paramtree.core.errors import ParamTreeError
from paramtree.core.names import Pattern
from paramtree.core.structure import HOLE, PARAM, Path
from paramtree.core.tree import ParamTree, whole
from paramtree.inspect.flops import calls_in, count_flops, divide
from paramtree.inspect.report import Column, Report, Table, bytes_text, count_text
from paramtree.model.observe import Call, Observer
from paramtree.model.training import _Training
from paramtree.nn import Activation, Lambda, Repeat
from paramtree.verbs.parts import choose

__all__ = ["Row", "Summary", "summary"]


@dataclass
class Row:
    """One call of a layer.

    Attributes:
      name: the name of its place in the tree; empty for the whole of it.
      label: the same, from the place of the row that it is within.
      layer: what it is.
      depth: how many rows it is within.
      inputs: the arrays it was called with, as shapes.
      outputs: the arrays it returned, as shapes.
      params: how many numbers its own parameters are.
      trained: how many of these are trained.
      state: how many numbers its own state is.
      bytes: how many bytes both are.
      flops: its own floating-point operations; None if they are not known.
      tied: names that lead to leaves counted under others, and these.
      shared: whether it has leaves that a row before it has counted under the same names.
    """

    name: str
    label: str
    layer: str
    depth: int
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    params: int = 0
    trained: int = 0
    state: int = 0
    bytes: int = 0
    flops: int | None = None
    tied: dict[str, str] = field(default_factory=dict)
    shared: bool = False


@dataclass(repr=False)
class Summary(Report):
    """What ``pt.summary`` found: prints as a table, shows in a notebook, converts to plain values.

    Attributes:
      rows: one for each call of a layer, in the order of execution; the first is the whole model.
      totals: what there is of "trained" and "frozen" parameters, of "state", and in "total".
      unused: names of parameters that the output does not depend on.
    """

    rows: list[Row]
    totals: dict[str, dict[str, int | None]]
    unused: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the rows, the totals and the names that are unused, as plain values.

        Example:
          >>> import paramtree as pt
          >>> net = pt.nn.Dense(3)
          >>> x = jax.ShapeDtypeStruct((2, 4), "float32")
          >>> found = pt.summary(net, pt.abstract(net, x), x).to_dict()
          >>> found["rows"][0]["outputs"], found["totals"]["total"]["params"]
          ([{'shape': [2, 3], 'dtype': 'float32'}], 15)
        """
        rows = []
        for row in self.rows:
            plain = {**vars(row), "tied": dict(row.tied)}
            del plain["label"]
            for name in ("inputs", "outputs"):
                plain[name] = [{"shape": list(a.shape), "dtype": str(a.dtype)} for a in plain[name]]
            rows.append(plain)
        totals = {name: dict(total) for name, total in self.totals.items()}
        return {"rows": rows, "totals": totals, "unused": list(self.unused)}

    def table(self) -> Table:
        """Returns the rows and the totals as text, without the columns that would be empty."""
        totals = {name: total for name, total in self.totals.items() if any(total.values())}
        blank = [""] * len(totals)
        cells = {
            "layer": [*map(_title, self.rows), *totals],
            "input": [*(_arrays_text(row.inputs) for row in self.rows), *blank],
            "output": [*(_arrays_text(row.outputs) for row in self.rows), *blank],
        }
        for title, key, text in _NUMBERS:
            values = [getattr(row, key) for row in self.rows]
            values += [total.get(key, 0) for total in totals.values()]
            if any(values) and (key != "trained" or "frozen" in totals):
                cells[title] = ["?" if v is None else text(v) if v else "" for v in values]
        numbers = [title for title, *_ in _NUMBERS]
        lines = list(zip(*cells.values(), strict=True))
        notes = []
        if self.unused:
            more = f" and {len(self.unused) - 2} more" if len(self.unused) > 2 else ""
            notes.append(
                f"The output does not depend on {', '.join(map(short, self.unused[:2]))}{more}."
            )
        return Table(
            title="",
            columns=tuple(Column(title, number=title in numbers) for title in cells),
            rows=lines[: len(self.rows)],
            totals=lines[len(self.rows) :],
            notes=notes,
        )


def summary(
    f: Callable[..., Any],
    params: ParamTree,
    *inputs: Any,
    trainable: Pattern | Sequence[Pattern] | None = None,
    flops: bool = True,
    **kwargs: Any,
) -> Summary:
    """Returns what a model is made of: a row for each call of a layer, in the order of execution.

    Rows within a layer's are indented below it. A row's numbers are its own: a tied leaf counts
    where it comes first, and so do the leaves of a layer that is called twice; a layer that calls
    others has only what they have not. So every column adds up to its total. Parameters of a function
    that is no layer are on the row of the layer, or of the model, that called it.

    The model is traced once, for inference, and nothing is computed. Shapes are those that a layer
    sees: under ``jax.vmap`` without the mapped axis, in a scan those of one step. A model under
    ``pt.training`` is a single row.

    The floating-point operations are those of XLA's cost analysis before it optimises: a product of
    an m x k and a k x n matrix has 2 m k n, an addition one for each number, ``exp`` none. They are all
    that the program does in a call, mapped or repeated. What is in a scan, as in ``nn.Repeat`` and
    ``nn.LSTM``, counts as often as it runs, where XLA itself would count it once; in a while loop it
    counts once, and of the branches of a ``cond`` only that with the most.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.
      params: its parameters, or their shapes from ``pt.abstract``.
      *inputs: arrays, ``jax.ShapeDtypeStruct``s, or anything else the model takes.
      trainable: a regular expression for whole names of parameters, or several; the others are
        counted as frozen. All are trained if None.
      flops: whether to count floating-point operations, which takes most of the time: some 10 ms for
        each kind of layer.
      **kwargs: passed on to the model.

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
    tree = whole(params)
    flat, treedef = jax.tree.flatten((inputs, kwargs))
    where = [i for i, leaf in enumerate(flat) if dtype_of(leaf) is not None]
    arrays = [i for i, leaf in enumerate(tree._leaves) if dtype_of(leaf) is not None]
    observer = Observer()
    model = _unwrapped(f)

    def call(leaves: list[Any], given: list[Any]) -> Any:
        both = list(tree._leaves), list(flat)  # what is no array, such as a flag, stays what it is
        for values, places, new in zip(both, (arrays, where), (leaves, given), strict=True):
            for i, value in zip(places, new, strict=True):
                values[i] = value
        args, keywords = jax.tree.unflatten(treedef, both[1])
        scope = observer.scope(tree._with(both[0]))
        in_order = {name: keywords[name] for name in kwargs}
        outputs = observer.call(model, tree._place, f, scope, *args, **in_order)
        return [leaf for leaf in jax.tree.leaves(outputs) if dtype_of(leaf) is not None]

    traced = jax.make_jaxpr(call)([tree._leaves[i] for i in arrays], [flat[i] for i in where])
    uses, work = divide(traced.jaxpr)
    kept = _kept(observer.calls, calls_in(traced.jaxpr))
    rows = _rows(observer.calls, kept, tree._place)
    if flops:
        counts = count_flops(work, {})
        for number, row in rows.items():
            count = counts.get(number, 0.0)
            row.flops = None if math.isnan(count) else round(count)
    trained = set(choose(tree._structure, trainable, PARAM, "summary")[0].slots)
    totals = _count(tree, observer.calls, rows, trained)
    kinds, canonical = tree._structure.kinds, tree._structure.canonical
    unused = [
        join(canonical[slot])
        for slot, used in zip(arrays, uses, strict=False)
        if not used and kinds[slot] == PARAM
    ]
    return Summary(list(rows.values()), totals, unused)


def _check(f: Any, params: Any) -> None:
    """Raises an error if there is no model, or no whole tree."""
    if isinstance(f, type) or not callable(f):
        found = f"the class {f.__name__}" if isinstance(f, type) else type(f).__name__
        raise TypeError(
            f"summary takes a model first, pt.summary(model, params, x), but found {found} in its "
            "place; a layer is made first, as in nn.Dense(10)."
        )
    if not isinstance(params, ParamTree):
        raise TypeError(
            "summary takes the parameters second, pt.summary(model, params, x), but found "
            f"{type(params).__name__} in their place. pt.abstract(model, x) gives their shapes, and "
            "pt.from_tree(mapping) turns a nested mapping into a tree."
        )
    structure = whole(params)._structure
    if HOLE in structure.slots:
        left = structure.slots.count(HOLE)
        raise ParamTreeError(
            f"summary takes a whole tree, but {left} of the {len(structure.slots)} leaves of this one "
            "are left out. Fill the holes with pt.merge; to count what is trained, give the whole tree "
            "and trainable=pattern."
        )


def _unwrapped(f: Any) -> Any:
    """Returns the model that a jitted, partial or otherwise wrapped function stands for."""
    f = inspect.unwrap(f)
    return _unwrapped(f.func) if isinstance(f, functools.partial) else f


# The rows


def _kept(calls: Sequence[Call], found: set[int]) -> list[int]:
    """Returns the calls that are part of the program.

    jax traces some functions more than once, such as the body of a scan whose carry changes its type,
    and keeps the last trace. So a call that left nothing behind is dropped if one like it did, and so
    is one that raised an error which the model caught.
    """
    for number in range(len(calls) - 1, 0, -1):  # what is within a call comes after it
        parent = calls[number].parent
        if number in found and parent is not None:
            found.add(parent)

    def form(call: Call) -> Any:
        return type(call.layer), call.place, call.inputs, call.outputs

    alive = {form(calls[number]) for number in found}
    kept: dict[int, None] = {}
    for number, call in enumerate(calls):
        part = number in found or form(call) not in alive
        if part and call.outputs is not None and (call.parent is None or call.parent in kept):
            kept[number] = None
    return list(kept)


def _rows(calls: Sequence[Call], kept: Sequence[int], base: Path) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    for number in kept:
        call = calls[number]
        above = base if call.parent is None else calls[call.parent].place
        label = call.place[len(above) :] if call.place[: len(above)] == above else call.place
        rows[number] = Row(
            name=join(call.place[len(base) :]),
            label=join(label),
            layer=_layer_text(call.layer),
            depth=0 if call.parent is None else rows[call.parent].depth + 1,
            inputs=call.inputs,
            outputs=call.outputs or (),
        )
    return rows


def _count(
    tree: ParamTree, calls: Sequence[Call], rows: dict[int, Row], trained: set[int]
) -> dict[str, dict[str, int | None]]:
    """Counts each stored leaf on the row where it comes first, and returns the totals."""
    structure, base = tree._structure, len(tree._place)
    slots = dict(structure.entries())
    reads = [(number, path[base:]) for number in rows for path in calls[number].reads]
    innermost: dict[Path, int] = {}
    for number in rows:
        place = calls[number].place[base:]
        if place not in innermost or calls[number].parent == innermost[place]:
            innermost[place] = number
    # Leaves may also be read as attributes, or not at all: then they belong to where they are.
    asked = {path for _, path in reads}
    for path in slots:
        if path not in asked:
            levels = (path[:i] for i in range(len(path) - 1, -1, -1))
            reads.append((next(innermost[level] for level in levels if level in innermost), path))
    totals = {
        "trained": {"params": 0, "trained": 0, "bytes": 0},
        "frozen": {"params": 0, "bytes": 0},
        "state": {"state": 0, "bytes": 0},
    }
    first: dict[int, Path] = {}
    for number, path in reads:
        row, slot = rows[number], slots[path]
        if slot in first:
            if first[slot] == path:
                row.shared = True
            else:
                row.tied[join(path)] = join(first[slot])
            continue
        first[slot] = path
        leaf = tree._leaves[slot]
        dtype = dtype_of(leaf)
        if dtype is None:
            continue
        size = math.prod(shape_of(leaf) or ())
        kind = structure.kinds[slot]
        total = totals["state" if kind != PARAM else "trained" if slot in trained else "frozen"]
        own = {"params" if kind == PARAM else "state": size, "bytes": size * dtype.itemsize}
        if slot in trained:
            own["trained"] = size
        for name, value in own.items():
            total[name] += value
            setattr(row, name, getattr(row, name) + value)
    names = ("params", "trained", "state", "bytes")
    whole = {name: sum(getattr(row, name) for row in rows.values()) for name in names}
    known = [row.flops for row in rows.values() if row.flops is not None]
    flops = sum(known) if len(known) == len(rows) else None
    return {**totals, "total": {**whole, "flops": flops}}


# The text


def _title(row: Row) -> str:
    text = "  " * row.depth + (f"{row.label}: {row.layer}" if row.label else row.layer)
    if row.tied:
        text += f" (tied to {_first_text(row)})"
    return f"{text} (shared)" if row.shared else text


def _first_text(row: Row) -> str:
    """Returns the name that one leaf of a row is tied to, or that of the layer for several."""
    start = len(row.name) + 1 if row.name else 0
    stems = {first.removesuffix(name[start:]) for name, first in row.tied.items()}
    first, *more = row.tied.values()
    if more and len(stems) == 1 and (stem := stems.pop()).endswith("_"):
        return stem[:-1]
    return f"{first} +{len(more)}" if more else first


def _layer_text(layer: Any) -> str:
    if isinstance(layer, _Training):  # its scope tells nothing, so all of it is this row
        return f"training({_layer_text(_unwrapped(layer.f))})"
    name: str = getattr(layer, "__name__", type(layer).__name__)
    if isinstance(layer, Activation | Lambda):  # they are nothing but what they are given
        text = repr(layer)
        return text if len(text) <= 30 else name
    return f"{name}({layer.n} x)" if isinstance(layer, Repeat) else name


def _arrays_text(arrays: Sequence[Any]) -> str:
    """Returns the first of some arrays, in the spelling of jaxprs, and how many more there are."""
    if not arrays:
        return ""
    sizes = ",".join(map(str, arrays[0].shape))
    more = f" +{len(arrays) - 1}" if len(arrays) > 1 else ""
    return f"{_dtype_text(str(arrays[0].dtype))}[{sizes}]{more}"


def _dtype_text(name: str) -> str:
    """Returns a dtype as in jaxprs.

    Example:
      >>> _dtype_text("bfloat16"), _dtype_text("uint8"), _dtype_text("bool")
      ('bf16', 'u8', 'bool')
    """
    for long, brief in (("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        name = name.replace(long, brief)
    return name


def flops_text(count: float) -> str:
    """Returns a number of operations with a unit of a thousand, a million, ...

    Example:
      >>> flops_text(320), flops_text(8192), flops_text(1.7e9)
      ('320', '8.2 k', '1.7 G')
    """
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000 or unit == "P":
            break
        count /= 1000
    return f"{count:.0f}" if not unit else f"{count:,.1f} {unit}"


_NUMBERS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("params", "params", count_text),
    ("trained", "trained", count_text),
    ("state", "state", count_text),
    ("bytes", "bytes", bytes_text),
    ("FLOPs", "flops", flops_text),
)
