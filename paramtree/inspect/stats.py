"""What the values of a tree look like, by name: moments, extremes, zeros, what is not finite.

The arithmetic is done where the leaves are, and only a few numbers a leaf come back. There is one
compiled function for each shape and not one for the tree: XLA takes about 10 ms a leaf to compile,
three seconds for a transformer of 300 leaves, which have a dozen shapes among them, while a call
costs 20 microseconds. Inside a jitted function it all becomes part of that function.
"""

import contextlib
import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import absent, dtype_of, join, shape_of, short
from paramtree.core.errors import MismatchError, RuleError, suggest
from paramtree.core.names import Pattern, named
from paramtree.core.tree import ParamTree
from paramtree.inspect.distance import numeric
from paramtree.inspect.report import Column, Report, Table, count_text, float_text, plural
from paramtree.verbs.parts import taken

__all__ = [
    "NonFinite",
    "Stats",
    "find_nonfinite",
    "measurable",
    "measured",
    "measures",
    "sparkline",
    "stats",
]

MEASURES = ("mean", "std", "min", "max", "zeros")
FIELDS = ("mean", "std", "min", "max", "norm", "zeros", "nan", "inf")


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, repr=False, eq=False)
class Stats(Report):
    """Statistics of the leaves of a tree; a pytree, so a jitted function can return it.

    Every field but the first three is an array with an entry for each name, along the last axis: where
    ``scan`` has stacked those of many steps there are axes before it. What is not finite
    takes no part in ``mean``, ``std``, ``min``, ``max``, ``norm`` and ``histogram``; where nothing is
    finite they are NaN. Complex leaves are measured by their absolute values.

    Attributes:
      names: the names of the leaves, tied ones once.
      shapes: their shapes.
      dtypes: their dtypes.
      mean: the mean.
      std: the standard deviation, of the population.
      min: the least value.
      max: the greatest value.
      norm: the Euclidean norm.
      zeros: the share of zeros, from 0 to 1.
      nan: how many are NaN.
      inf: how many are infinite.
      histogram: how many are in each of the bins of equal width from ``min`` to ``max``, of shape
        (names, bins); None if no bins were asked for.

    Example:
      >>> import paramtree as pt
      >>> found = pt.stats(pt.from_tree({"a": {"w": np.arange(4.0, dtype="f4"), "b": np.zeros(2)}}))
      >>> found["a_w"]["max"], found.zeros.tolist()
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

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Returns the arrays, and what is static."""
        arrays = (*(getattr(self, field) for field in FIELDS), self.histogram)
        return arrays, (self.names, self.shapes, self.dtypes)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> "Stats":
        """Returns what was flattened."""
        return cls(*static, *arrays)

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.names:
            raise RuleError(f"stats: `{name}` is not among the names.{suggest(name, self.names)}")
        return next(row for found, row in self._rows() if found == name)

    def to_dict(self) -> dict[str, Any]:
        """Returns for each name its statistics as numbers.

        Example:
          >>> import paramtree as pt
          >>> pt.stats(pt.from_tree({"w": np.ones(2)})).to_dict()["w"]["mean"]
          1.0
        """
        return dict(self._rows())

    def _rows(self, last: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields each name's row; of statistics that ``scan`` stacked, each entry is a list."""
        arrays = {field: np.asarray(getattr(self, field)) for field in FIELDS}
        if self.histogram is not None:
            arrays["histogram"] = np.moveaxis(np.asarray(self.histogram), -1, 0)  # bins, ..., names
        if last:
            arrays = {field: self._last(field, array) for field, array in arrays.items()}
        for i, name in enumerate(self.names):
            row = {field: array[..., i] for field, array in arrays.items()}
            if self.histogram is not None:
                row["histogram"] = np.moveaxis(row["histogram"], 0, -1)
            yield name, {field: value.tolist() for field, value in row.items()}

    @staticmethod
    def _last(field: str, array: Any) -> Any:
        front = array.shape[:1] if field == "histogram" else ()
        return array.reshape(*front, -1, array.shape[-1])[..., -1, :] if array.size else array

    def table(self) -> Table:
        """Returns what is to be shown: a row for each name."""
        head = f"Statistics of {plural(len(self.names), 'leaf', 'leaves')}"
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return Table(f"{head}, being traced", (), [])
        titles = (*MEASURES, "norm", "not finite")
        columns = (Column("name"), Column("shape"), *(Column(title, True) for title in titles))
        steps = np.shape(self.mean)[:-1]
        if steps:
            head = f"{head} at {' x '.join(map(str, steps))} steps; the last of them"
        rows = []
        bad = 0
        for (name, row), shape in zip(self._rows(last=True), self.shapes, strict=True):
            odd = row["nan"] + row["inf"]
            bad += bool(odd)
            norm = float_text(row["norm"])
            line = (name, str(shape), *measures(row), norm, count_text(odd) if odd else "")
            rows.append(line if self.histogram is None else (*line, sparkline(row["histogram"])))
        if self.histogram is not None:
            columns = (*columns, Column("min to max"))
        some = plural(bad, "leaf holds", "leaves hold")
        return Table(head, columns, rows, notes=[f"{some} values that are not finite."] if bad else [])


def stats(
    tree: Any, pattern: Pattern | None = None, *, kind: str | None = None, bins: int = 0
) -> Stats:
    """Returns statistics of the leaves of a tree, by name.

    Can be called inside a jitted function, for example every few hundred steps under ``jax.lax.cond``.
    Computed in float32, or in float64 where a leaf has 64 bits: in float32 the deviation and norm of
    values beyond 1e19 are infinite. Leaves that are no numbers are left out.

    Args:
      tree: a parameter tree, its gradients, an optimiser's state, or any other pytree.
      pattern: a regular expression for whole names; None takes all.
      kind: "param" or "state" to take only these.
      bins: into how many bins to count the values of each leaf; 0 for no histogram.

    Returns:
      A ``Stats``, which prints, renders in a notebook and has ``.to_dict()``.

    Raises:
      MismatchError: there are only shapes, or arrays that were donated; all are listed.
      RuleError: the pattern matches nothing, or is not a regular expression.
      ValueError: ``bins`` is no whole number of 0 or more.

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


def _stats(verb: str, tree: Any, pattern: Pattern | None, kind: str | None, bins: int) -> Stats:
    if not isinstance(bins, int) or bins < 0:
        raise ValueError(f"{verb}: bins is 0 for no histogram, or more, but found {bins!r}.")
    flat = taken(verb, named(tree, numbers=True).tree, pattern, kind=kind)
    slots = measurable(flat)
    leaves = [flat._leaves[slot] for slot in slots]
    names = tuple(join(flat._structure.canonical[slot]) for slot in slots)
    shapes = tuple(shape_of(leaf) or () for leaf in leaves)
    dtypes = tuple(str(dtype_of(leaf) or jnp.result_type(leaf)) for leaf in leaves)
    return Stats(names, shapes, dtypes, *measured(leaves, bins))


def measurable(tree: ParamTree) -> list[int]:
    """Returns the slots of a whole tree that hold numbers.

    Raises:
      MismatchError: there are only shapes, or arrays that were donated; all are listed.
    """
    slots = [slot for slot, leaf in enumerate(tree._leaves) if numeric(leaf)]
    wrong = [
        f"`{short(join((*tree._place, *tree._structure.canonical[slot])))}` {why}"
        for slot in slots
        if (why := absent(tree._leaves[slot]))
    ]
    if wrong:
        raise MismatchError(
            f"statistics are of values, but {', '.join(wrong)}: take the tree of pt.init or "
            "pt.load, or the one that the function returned."
        )
    return slots


def measures(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns one leaf's ``MEASURES`` as text."""
    share = f"{100 * row['zeros']:.3g}%"
    return (*(float_text(row[field]) for field in MEASURES[:-1]), share)


def measured(leaves: list[Any], bins: int = 0) -> list[Any]:
    """Returns the fields of ``Stats`` for some arrays, in order, and their histograms or None."""
    each = _rows_of(leaves, bins)
    traced = any(isinstance(value, jax.core.Tracer) for row in each for value in row)
    if not traced:
        # On the host, as the leaves may be on different devices; one transfer for all.
        each = jax.device_get(each)
        for i, (floats, _) in enumerate(each):
            if not np.isfinite(floats[1]) and _chunked(leaves[i]):  # in a hurry it cannot say more
                each[i] = jax.device_get(_of_leaf(leaves[i], bins=bins, chunked=True))
    xp: Any = jnp if traced else np
    if not each:
        each = [(xp.zeros(len(_FLOATS), np.float32), xp.zeros(len(_COUNTS) + bins, np.int32))]
    widest = max((floats.dtype for floats, _ in each), key=lambda dtype: dtype.itemsize)
    floats = xp.stack([row.astype(widest) for row, _ in each])[: len(leaves)].T
    counts = xp.stack([row for _, row in each])[: len(leaves)]
    found = dict(zip((*_FLOATS, *_COUNTS), (*floats, *counts[:, : len(_COUNTS)].T), strict=True))
    return [*(found[field] for field in FIELDS), counts[:, len(_COUNTS) :] if bins else None]


def _rows_of(leaves: list[Any], bins: int) -> list[tuple[Any, Any]]:
    """Returns what ``_of_leaf`` gives for each; XLA reads a leaf with one thread, so some at a time."""
    large = [i for i, leaf in enumerate(leaves) if _chunked(leaf)]
    # Whether jax has 64 bits may be a setting of this thread alone.
    apart = [i for i in large if leaves[i].dtype.itemsize <= 4] if len(large) > 1 else []
    each: list[Any] = [None] * len(leaves)
    with ThreadPoolExecutor(_THREADS) as pool:
        for i in apart:
            each[i] = pool.submit(_waited, leaves[i], bins)
        for i in sorted(set(range(len(leaves))) - set(apart)):
            # numpy's 64-bit arrays are what a file may hold, and 1e300 in one is not infinite.
            wide = isinstance(leaves[i], np.ndarray) and leaves[i].dtype.itemsize >= 8
            with _wide_types() if wide else contextlib.nullcontext():
                chunked = _chunked(leaves[i])
                each[i] = _of_leaf(leaves[i], bins=bins, chunked=chunked, hurry=chunked)
        for i in apart:
            each[i] = each[i].result()
    return each


def _waited(leaf: Any, bins: int) -> Any:
    row = _of_leaf(leaf, bins=bins, chunked=True, hurry=True)
    return jax.block_until_ready(row)


def _wide_types() -> Any:
    """Lets jax compute with 64 bits, whatever its setting."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()  # jax before 0.8


# A leaf of four chunks or more is read chunk by chunk. A chunk has as many lanes as stay in a
# processor's cache together with what they add up.
CHUNK = 16384
# In a hurry a chunk is small and in parts that are added up among themselves first: most of the time
# went into reading and writing the sums of every lane.
_LANES, _PARTS = 1024, 8
_THREADS = 4  # more do not read memory any faster


def _chunked(leaf: Any) -> bool:
    """Whether one pass in chunks is faster than letting XLA make one of each reduction.

    On a processor XLA fuses no two of them, so they read the memory eight times. On other devices it
    does; and a leaf on several devices, or one that is being traced and may come to be, must not be
    made one long row: that would gather it.
    """
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or leaf.size < 4 * CHUNK:
        return False
    devices: Any = leaf.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


_FLOATS = ("mean", "std", "min", "max", "norm", "zeros")
_COUNTS = ("nan", "inf")
_Sums = tuple[Any, ...]  # of distances, of their squares; the least, the greatest; zeros, NaN, infinite


@partial(jax.jit, static_argnames=("bins", "chunked", "hurry"))
def _of_leaf(
    leaf: Any, *, bins: int, chunked: bool, hurry: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns ``_FLOATS`` of one array, and its ``_COUNTS`` followed by the histogram.

    In a hurry it takes for granted that all is finite. If that is wrong, the deviation is not finite.
    """
    x = jnp.asarray(leaf)
    x = x.ravel() if chunked else _real(x)
    shift = _middle(_real(x[:CHUNK]) if chunked else x)
    total, square, low, high, zeros, nan, inf = _sums(x, shift, chunked, hurry)
    finite = (x.size - nan - inf).astype(shift.dtype)  # none: the divisions give NaN
    off = total / finite
    mean = shift + off
    std = jnp.sqrt(jnp.maximum(square / finite - off * off, 0))
    norm = jnp.sqrt(finite) * jnp.hypot(mean, std)
    low, high = (jnp.where(finite > 0, end, jnp.nan) for end in (low, high))
    share = zeros.astype(shift.dtype) / max(x.size, 1)
    counts = jnp.stack([nan, inf])
    if bins:
        counts = jnp.concatenate([counts, _histogram(x, low, high, bins, chunked)])
    return jnp.stack([mean, std, low, high, norm, share]), counts


def _real(x: jax.Array) -> jax.Array:
    """Returns values as they are measured; part by part, so that no leaf is copied as a whole."""
    x = jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x
    return x.astype(jax.dtypes.canonicalize_dtype(np.float64 if x.dtype.itemsize >= 8 else np.float32))


def _middle(x: jax.Array) -> jax.Array:
    """Returns the mean of what is finite, 0 if nothing is."""
    finite = jnp.isfinite(x)
    return jnp.sum(jnp.where(finite, x, 0)) / jnp.maximum(jnp.sum(finite), 1).astype(x.dtype)


def _sums(x: jax.Array, shift: jax.Array, chunked: bool, hurry: bool) -> _Sums:
    if not chunked:
        return _reduced(_parts(x, shift))
    if hurry:
        lanes = _hurried(x, shift)
        return _add(_reduced(lanes), _reduced(_parts(_tail(x, _LANES * _PARTS), shift)))
    first = _parts(_chunk(x, 0), shift)
    lanes = jax.lax.fori_loop(
        1, x.size // CHUNK, lambda i, found: _add(found, _parts(_chunk(x, i), shift)), first
    )
    return _add(_reduced(lanes), _reduced(_parts(_tail(x), shift)))


def _hurried(x: jax.Array, shift: jax.Array) -> _Sums:
    """Returns for some lanes what ``_parts`` gives for values that are finite, added up."""

    def one(chunk: Any, part: int) -> _Sums:
        value = _chunk(x, chunk * _PARTS + part, _LANES)
        off = value - shift
        return off, off * off, value, value, (value == 0).astype(jnp.int32)

    def some(chunk: Any) -> _Sums:
        each = [one(chunk, part) for part in range(_PARTS)]
        while len(each) > 1:
            each = [_merged(a, b) for a, b in zip(each[::2], each[1::2], strict=True)]
        return each[0]

    last = x.size // (_LANES * _PARTS)
    lanes = jax.lax.fori_loop(1, last, lambda i, found: _merged(found, some(i)), some(0))
    none = jnp.zeros(1, jnp.int32)
    return (*lanes, none, none)


def _merged(a: _Sums, b: _Sums) -> _Sums:
    # A choice takes one instruction, jnp.minimum several, as it gives NaN where one of both is.
    low, high = jnp.where(b[2] < a[2], b[2], a[2]), jnp.where(b[3] > a[3], b[3], a[3])
    return a[0] + b[0], a[1] + b[1], low, high, a[4] + b[4]


def _parts(x: jax.Array, shift: jax.Array) -> _Sums:
    """Returns for each value what is to be added up.

    The squares are those of the distance from a value near the mean: were it 0, the deviation of
    numbers far from it would be lost in rounding.
    """
    finite = jnp.isfinite(x)
    nan = jnp.isnan(x)
    off = jnp.where(finite, x - shift, 0)
    ends = jnp.where(finite, x, jnp.inf), jnp.where(finite, x, -jnp.inf)
    counts = (x == 0, nan, ~(finite | nan))
    return (off, off * off, *ends, *(hit.astype(jnp.int32) for hit in counts))


def _add(a: _Sums, b: _Sums) -> _Sums:
    ends = jnp.minimum(a[2], b[2]), jnp.maximum(a[3], b[3])
    return (a[0] + b[0], a[1] + b[1], *ends, *(i + j for i, j in zip(a[4:], b[4:], strict=True)))


def _reduced(parts: _Sums) -> _Sums:
    total, square, low, high, *counts = parts
    ends = jnp.min(low, initial=jnp.inf), jnp.max(high, initial=-jnp.inf)
    return (jnp.sum(total), jnp.sum(square), *ends, *(jnp.sum(hit, dtype=jnp.int32) for hit in counts))


def _chunk(x: jax.Array, i: Any, size: int = CHUNK) -> jax.Array:
    return _real(jax.lax.dynamic_slice(x, (i * size,), (size,)))


def _tail(x: jax.Array, size: int = CHUNK) -> jax.Array:
    return _real(x[x.size // size * size :])


def _histogram(x: jax.Array, low: Any, high: Any, bins: int, chunked: bool) -> jax.Array:
    """Returns how many values are in each bin; one on an edge is in the bin above, as in numpy."""
    alike = low == high  # then numpy takes one unit around the value
    low, high = jnp.where(alike, low - 0.5, low), jnp.where(alike, high + 0.5, high)
    edges = [low + (high - low) * np.asarray(i / bins, low.dtype) for i in range(1, bins)]

    def below(values: jax.Array) -> jax.Array:
        # Comparing with every edge is faster than finding the bin and adding to it, one at a time.
        finite = jnp.isfinite(values)
        hits = [*(finite & (values < edge) for edge in edges), finite]
        return jnp.stack([jnp.sum(hit, dtype=jnp.int32) for hit in hits])

    if chunked:
        count = jax.lax.fori_loop(
            0, x.size // CHUNK, lambda i, found: found + below(_chunk(x, i)), below(_tail(x))
        )
    else:
        count = below(x)
    return jnp.diff(count, prepend=0)


def sparkline(counts: list[int]) -> str:
    """Returns a histogram as one character a bin.

    Example:
      >>> sparkline([0, 1, 4, 8, 2])
      ' ▁▄█▂'
    """
    most = max(counts, default=0)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most) if most else 0] for count in counts)


@dataclass(frozen=True, repr=False, eq=False)
class NonFinite(Report):
    """The leaves that hold NaN or infinity; false if there are none.

    Attributes:
      found: for each such name its size and how many of it are NaN and infinite.
      searched: how many leaves were looked at.
    """

    found: dict[str, dict[str, int]]
    searched: int

    def __bool__(self) -> bool:
        return bool(self.found)

    def to_dict(self) -> dict[str, Any]:
        """Returns for each name ``{"size": ..., "nan": ..., "inf": ...}``."""
        return dict(self.found)

    def table(self) -> Table:
        """Returns what is to be shown: a row for each name."""
        columns = (Column("name"), *(Column(title, True) for title in ("size", "nan", "inf")))
        rows = [(name, *map(count_text, row.values())) for name, row in self.found.items()]
        some = plural(self.searched, "leaf", "leaves")
        return Table(f"Not finite: {count_text(len(rows))} of {some}", columns if rows else (), rows)


def find_nonfinite(tree: Any, pattern: Pattern | None = None) -> NonFinite:
    """Returns the names of the leaves that hold NaN or infinity, and how many.

    Args:
      tree: a parameter tree, its gradients, an optimiser's state, or any other pytree.
      pattern: a regular expression for whole names; None takes all.

    Returns:
      A report that is true if there are any, prints, renders in a notebook and has ``.to_dict()``.

    Raises:
      TypeError: the values are being traced and not known yet.
      MismatchError: there are only shapes, or arrays that were donated.
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
    found = _stats("find_nonfinite", tree, pattern, None, 0)
    if any(isinstance(value, jax.core.Tracer) for value in (found.nan, found.inf)):
        raise TypeError(
            "find_nonfinite reports values, which are not known while a function is being traced: "
            "call it outside, or return pt.stats(tree) from the function and look at its .nan and .inf."
        )
    odd: dict[str, dict[str, int]] = {}
    for name, shape, nan, inf in zip(found.names, found.shapes, found.nan, found.inf, strict=True):
        if nan or inf:
            odd[name] = {"size": int(np.prod(shape)), "nan": int(nan), "inf": int(inf)}
    return NonFinite(odd, len(found.names))
