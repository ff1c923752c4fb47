"""The rows of a summary: which calls they stand for, what they count, and their text."""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from paramtree.core.arrays import dtype_of, join, shape_of
from paramtree.core.structure import PARAM, Path
from paramtree.core.tree import ParamTree, flatten, place_of
from paramtree.inspect.capture import Captured, Intervened
from paramtree.inspect.observe import Call
from paramtree.inspect.report import some
from paramtree.model.training import TrainingModel
from paramtree.nn import Activation, Lambda, Repeat, Vmap
from paramtree.nn.decoding import DecodingModel
from paramtree.parametrizations.reparametrize import Reparametrized

__all__ = ["Row", "arrays_text", "count_leaves", "model_text", "rows_of", "title", "unwrapped"]

_TRANSFORMS = {
    TrainingModel: "training",
    DecodingModel: "decoding",
    Reparametrized: "reparametrize",
    Captured: "capture",
    Intervened: "intervene",
}


@dataclass
class Row:
    """One call of a layer."""

    name: str  # the layer's name in the tree; empty for the model itself
    label: str  # the name relative to the enclosing row
    layer: str  # the type of the layer, as text
    depth: int  # the number of enclosing rows
    inputs: tuple[Any, ...]  # the shapes of the arguments that are arrays
    outputs: tuple[Any, ...]  # the shapes of the results that are arrays
    params: int = 0  # the number of scalars in its own parameters
    trained: int = 0  # the number of these that are trained
    state: int = 0  # the number of scalars in its own state
    bytes: int = 0  # the bytes of both
    flops: int | None = None  # its own floating-point operations; None if unknown
    tied: dict[str, str] = field(default_factory=dict)  # its aliases, each with the name that counts
    shared: bool = False  # whether an earlier row has counted some of its leaves under the same names
    # Its parameters that are read through parametrisations, and those, the innermost last.
    parametrized: dict[str, str] = field(default_factory=dict)


def unwrapped(f: Any) -> Any:
    """Returns the model inside a jitted, partial or otherwise wrapped or transformed function."""
    f = inspect.unwrap(f)
    if isinstance(f, functools.partial):
        return unwrapped(f.func)
    return unwrapped(f.f) if type(f) in _TRANSFORMS else f


def model_text(f: Any) -> str:
    """Returns the type of a model as text, with its transforms."""
    f = inspect.unwrap(f)
    if isinstance(f, functools.partial):
        return model_text(f.func)
    verb = _TRANSFORMS.get(type(f))
    return f"{verb}({model_text(f.f)})" if verb else _layer_text(f)


def _kept(calls: Sequence[Call], traced: set[int]) -> list[int]:
    """Returns the calls that are part of the program, given those with equations in its jaxpr.

    jax traces some functions more than once, such as the body of a scan whose carry changes its type,
    and keeps the last trace. So a call without equations is dropped if an equal call has some,
    and a call that raised is dropped too, in case the model caught the exception.
    """
    for number in range(len(calls) - 1, 0, -1):  # children come after their parents
        parent = calls[number].parent
        if number in traced and parent is not None:
            traced.add(parent)

    def form(call: Call) -> Any:
        return type(call.layer), call.place, call.inputs, call.outputs

    alive = {form(calls[number]) for number in traced}
    kept: dict[int, None] = {}
    for number, call in enumerate(calls):
        live = number in traced or form(call) not in alive
        if live and call.outputs is not None and (call.parent is None or call.parent in kept):
            kept[number] = None
    return list(kept)


def rows_of(calls: Sequence[Call], traced: set[int], base: Path) -> dict[int, Row]:
    """Returns a row for each call in the program, by its number; the counts are still zero."""
    rows: dict[int, Row] = {}
    for number in _kept(calls, traced):
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


def count_leaves(
    tree: ParamTree,
    calls: Sequence[Call],
    rows: dict[int, Row],
    trained: set[int],
    joined: Mapping[Path, Sequence[Any]],
) -> dict[str, dict[str, int | None]]:
    """Counts each stored leaf on the first row that reads it, and returns the totals.

    ``joined`` has the parametrisations that parameters are read through.
    """
    (structure, leaves), base = flatten(tree), len(place_of(tree))
    slots = dict(structure.entries())
    reads: list[tuple[int, Path]] = []
    for number in rows:
        for path in (read[base:] for read in calls[number].reads):
            # What is read through a parametrisation is stored as the leaves of a level.
            parts = [path] if path in slots else [p for p in slots if p[: len(path)] == path]
            reads += [(number, part) for part in parts]
    innermost: dict[Path, int] = {}
    for number in rows:
        place = calls[number].place[base:]
        if place not in innermost or calls[number].parent == innermost[place]:
            innermost[place] = number
    # Leaves read as attributes, or not at all, belong to the innermost layer at their place.
    declared = {path for _, path in reads}
    for path in slots:
        if path not in declared:
            levels = (path[:i] for i in range(len(path) - 1, -1, -1))
            reads.append((next(innermost[level] for level in levels if level in innermost), path))
    totals = {
        "trained": {"params": 0, "trained": 0, "bytes": 0},
        "frozen": {"params": 0, "bytes": 0},
        "state": {"state": 0, "bytes": 0},
    }
    first: dict[int, Path] = {}
    through: dict[int, dict[str, str]] = {}
    for path, slot in slots.items() if joined else ():
        for owner in (place_of(tree) + path[:i] for i in range(1, len(path) + 1)):
            if owner in joined:
                hows = ", ".join(type(how).__name__ for how in joined[owner])
                through.setdefault(slot, {})[join(owner[base:])] = hows
    for number, path in reads:
        row, slot = rows[number], slots[path]
        if slot in first:
            if first[slot] == path:
                row.shared = True
            else:
                row.tied[join(path)] = join(first[slot])
            continue
        first[slot] = path
        row.parametrized.update(through.get(slot, {}))
        leaf = leaves[slot]
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
    sums = {name: sum(getattr(row, name) for row in rows.values()) for name in names}
    known = [row.flops for row in rows.values() if row.flops is not None]
    flops = sum(known) if len(known) == len(rows) else None
    return {**totals, "total": {**sums, "flops": flops}}


def title(row: Row) -> str:
    """Returns the label of a row, indented by its depth, with its ties."""
    text = "  " * row.depth + (f"{row.label}: {row.layer}" if row.label else row.layer)
    for how in dict.fromkeys(row.parametrized.values()):
        names = [name for name, other in row.parametrized.items() if other == how]
        stem = f"{row.name}_" if row.name else ""
        text += f" ({some([name.removeprefix(stem) for name in names], 2)}: {how})"
    if row.tied:
        text += f" (tied to {_first_text(row)})"
    return f"{text} (shared)" if row.shared else text


def _first_text(row: Row) -> str:
    """Returns the name of the leaf that a row is tied to, or of the layer if all its leaves are."""
    start = len(row.name) + 1 if row.name else 0
    stems = {first.removesuffix(name[start:]) for name, first in row.tied.items()}
    first, *more = row.tied.values()
    if more and len(stems) == 1 and (stem := stems.pop()).endswith("_"):
        return stem[:-1]
    return f"{first} +{len(more)}" if more else first


def _layer_text(layer: Any) -> str:
    name: str = getattr(layer, "__name__", type(layer).__name__)
    if isinstance(layer, Activation | Lambda):  # their arguments say what they do
        text = repr(layer)
        return text if len(text) <= 30 else name
    return f"{name}({layer.n} x)" if isinstance(layer, Repeat | Vmap) else name


def arrays_text(arrays: Sequence[Any]) -> str:
    """Returns the type of the first array, as in jaxprs, and the number of further arrays."""
    if not arrays:
        return ""
    first = jax.core.ShapedArray(arrays[0].shape, arrays[0].dtype).str_short(short_dtypes=True)
    return f"{first} +{len(arrays) - 1}" if len(arrays) > 1 else first
