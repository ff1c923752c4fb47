"""Pictures of parameters, fit for a paper: histograms, update-to-weight ratios, heat maps.

Each function takes a pattern and returns a ``matplotlib.figure.Figure``, which a notebook shows and
``figure.savefig("weights.pdf")`` writes. No figure is wider than 7 inches, two columns of a paper, and
text has 6 or 7 points. This file chooses and checks what ``paramtree.inspect.picture`` draws.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import absent, describe, dtype_of, join, shape_of, short
from paramtree.core.errors import MismatchError, RuleError, suggest
from paramtree.core.names import Pattern, from_tree
from paramtree.core.tree import ParamTree
from paramtree.inspect.distance import numeric
from paramtree.inspect.update_ratios import flat
from paramtree.verbs.parts import taken
from paramtree.verbs.selection import collect

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["heatmap", "histograms", "update_ratios"]


def histograms(
    tree: Any,
    pattern: Pattern | None = None,
    *,
    grads: Any = None,
    bins: int | None = None,
    log: bool = False,
    kind: str | None = None,
    sep: str = "_",
    panels: int = 48,
) -> "Figure":
    """Returns a figure with a histogram of the values of each leaf that matches.

    Values that are not finite are not drawn, but counted in a note. Of complex numbers the absolute
    values are drawn. PRNG keys are left out.

    Args:
      tree: a parameter tree of arrays, or any other pytree.
      pattern: a regular expression for whole names; None takes all.
      grads: a tree of the same names, or of some of them. The histogram of each gradient is beside
        that of its parameter, on axes of its own.
      bins: how many bars; None for as many as suit the size of the leaf, 60 at most.
      log: whether the counts are on a logarithmic axis, where a few outliers are seen.
      kind: "param" or "state" to draw only these.
      sep: what joins the names.
      panels: for how many leaves there is room; more of them are an error.

    Raises:
      RuleError: the pattern matches nothing, or too much.
      MismatchError: a leaf has no values, such as a shape; or a gradient has no parameter.
      ImportError: matplotlib is not installed.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.zeros(2)}})
      >>> figure = pt.plots.histograms(params, ".*weight")
      >>> [axes.get_title("left") for axes in figure.axes]
      ['dense0_weight']
    """
    picture = _picture()
    if bins is not None:
        _check("histograms", "bins", bins, "a number of bars, 1 or more", whole=True)
    leaves, titles = _leaves("histograms", tree, pattern, kind, sep, panels)
    beside = None if grads is None else _gradients(tree, leaves, grads, sep)
    each = 1 if beside is None else 2  # panels a leaf
    width, height = (3.4, 2.2) if len(leaves) * each == 1 else (1.75, 1.35)
    figure, grid = picture.grid(4, width, [height] * (len(leaves) * each))
    free, room = iter(grid), round(15 * width * each)
    for (name, leaf), title in zip(leaves.items(), titles, strict=True):
        axes = next(free)
        title = picture.wrapped(title, room)
        picture.histogram(axes, _real(leaf), title, _note(leaf), picture.BLUE, bins, log)
        if beside is None:
            continue
        axes.set_xlabel("value", fontsize=picture.SMALL, labelpad=1)
        axes = next(free)
        if name in beside:
            picture.histogram(axes, _real(beside[name]), "", "", picture.VERMILION, bins, log)
            axes.set_xlabel("gradient", fontsize=picture.SMALL, labelpad=1)
        else:
            axes.set_axis_off()
    return figure


def update_ratios(
    history: Any, pattern: Pattern | None = None, *, steps: Sequence[float] | None = None
) -> "Figure":
    """Returns a figure of update-to-weight ratios over training, on a logarithmic axis.

    The dashed line is 1e-3, about where a parameter is that learns well. What is not finite or not
    above zero leaves a gap. More than 18 parameters are coloured in their order, from first to last.

    Args:
      history: what ``pt.update_ratios`` returned at each step, in a list; or, as ``jax.lax.scan``
        stacks them, one tree of arrays with an element for each step.
      pattern: a regular expression for whole names; None takes all.
      steps: the number of each step, if they are not 1, 2, 3 and so on.

    Raises:
      RuleError: the pattern matches nothing.
      MismatchError: the history is empty or not of numbers, or ``steps`` is of another length.
      ImportError: matplotlib is not installed.

    Example:
      >>> history = [{"weight": 2e-3, "bias": 1e-2}, {"weight": 1e-3, "bias": 5e-3}]
      >>> figure = update_ratios(history, "weight")
      >>> [text.get_text() for text in figure.legends[0].get_texts()]
      ['weight']
    """
    picture = _picture()
    series = _series(history, pattern)
    length = len(next(iter(series.values())))
    at = np.arange(1, length + 1) if steps is None else np.asarray(steps)
    if at.shape != (length,) or at.dtype.kind not in "iuf" or not np.isfinite(at).all():
        raise MismatchError(
            f"update_ratios: steps are {length} numbers, one for each element of the history, but "
            f"found {describe(at)}."
        )
    return picture.ratios(at, [short(name) for name in series], np.stack(list(series.values())))


def _series(history: Any, pattern: Pattern | None) -> dict[str, Any]:
    """Returns the ratio of each name at every step, nan where there is none."""
    stacked = isinstance(history, Mapping | ParamTree)
    if not stacked and (isinstance(history, str) or not isinstance(history, Iterable)):
        raise MismatchError(
            "update_ratios: the history is a list of what pt.update_ratios returned at each step, but "
            f"found {describe(history)}."
        )
    if isinstance(history, Mapping):  # its lists are of steps, and no levels of a tree
        as_array = partial(np.asarray, dtype=object)
        history = {k: as_array(v) if isinstance(v, list | tuple) else v for k, v in history.items()}
    records = [history] if stacked else list(history)
    strange = [record for record in records if not isinstance(record, Mapping | ParamTree)]
    if strange:
        raise MismatchError(
            "update_ratios: each element of the history is what pt.update_ratios returned, a mapping "
            f"of names to numbers, but {len(strange)} are not, such as {describe(strange[0])}."
        )
    trees = jax.device_get([collect(from_tree(record)) for record in records])
    rows = [dict(tree.items()) for tree in trees]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise MismatchError("update_ratios: the history is empty, so there is nothing to draw.")
    series: dict[str, Any] = {}
    problems = []
    for name in taken("update_ratios", flat(dict.fromkeys(names)), pattern):
        values = rows[0][name] if stacked else [row.get(name, np.nan) for row in rows]
        try:
            series[name] = np.asarray(values, np.float64)
            fits = series[name].ndim == 1 and series[name].size > 0
        except (TypeError, ValueError):  # no numbers, or of different shapes
            fits = False
        if not fits:
            problems.append(f"`{short(name)}` is {describe(values)}")
    lengths = {values.size for values in series.values()}
    if not problems and len(lengths) > 1:
        problems.append(f"its arrays are of {' and '.join(map(str, sorted(lengths)))} steps")
    if problems:
        raise MismatchError(
            "update_ratios: the history is a list of what pt.update_ratios returned at each step, or "
            f"such trees stacked by jax.lax.scan, but {'; '.join(problems)}."
        )
    return series


def heatmap(
    tree: Any,
    pattern: Pattern | None = None,
    *,
    limit: float | None = None,
    kind: str | None = None,
    sep: str = "_",
    panels: int = 24,
) -> "Figure":
    """Returns a figure with a heat map of each leaf that matches: blue is below zero, red above.

    A vector is a row. Where there are more than two axes, the last two are a tile, such as the kernel
    of a convolution: tiles go down along the first axis and right along the others, and a column of
    them that is much taller than wide is folded, going on at the top. Where a line has more than 256
    values, a cell stands for a block of them and shows the one that is farthest from zero. Values that
    are not finite are yellow. Of complex numbers the absolute values are drawn. PRNG keys are left out.

    Args:
      tree: a parameter tree of arrays, any other pytree, or one array.
      pattern: a regular expression for whole names, such as the name of a leaf; None takes all.
      limit: the value that has the darkest colour, for all leaves; None for each leaf's own largest.
      kind: "param" or "state" to draw only these.
      sep: what joins the names.
      panels: for how many leaves there is room; more of them are an error.

    Raises:
      RuleError: the pattern matches nothing, or too much.
      MismatchError: a leaf has no values, such as a shape.
      ImportError: matplotlib is not installed.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": np.array([[1.0, -2.0]])}})
      >>> figure = pt.plots.heatmap(params, "dense0_weight")
      >>> figure.axes[0].images[0].get_clim()
      (-2.0, 2.0)
    """
    picture = _picture()
    if limit is not None:
        _check("heatmap", "limit", limit, "the value of the darkest colour, above 0")
    leaves, titles = _leaves("heatmap", tree, pattern, kind, sep, panels)
    width, room = (3.4, 48) if len(leaves) == 1 else (7 / 3, 32)
    titles = [picture.wrapped(title, room) for title in titles]
    heights = [
        (width - 0.6) * picture.proportion(shape_of(leaf)) + 0.5 + 0.12 * title.count("\n")
        for leaf, title in zip(leaves.values(), titles, strict=True)
    ]
    figure, grid = picture.grid(3, width, heights)
    for axes, leaf, title in zip(grid, leaves.values(), titles, strict=True):
        picture.heat(axes, _real(leaf), title, _note(leaf), limit)
    return figure


# What is drawn


def _picture() -> Any:
    try:
        import matplotlib  # noqa: F401  # the rest of matplotlib may be loaded where this is blocked
    except ImportError:
        raise ImportError(
            "pt.plots draws with matplotlib, which is not installed: pip install 'paramtree[plots]'"
        ) from None
    from paramtree.inspect import picture

    return picture


def _leaves(
    verb: str, tree: Any, pattern: Pattern | None, kind: str | None, sep: str, panels: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns the leaves to draw and a title for each, which says where in the whole model it is."""
    _check(verb, "panels", panels, "for how many leaves there is room, 1 or more", whole=True)
    found = taken(verb, tree, pattern, sep=sep, kind=kind)
    leaves = _with_values(verb, found)
    if not leaves:
        what = "the tree has no arrays" if pattern is None else f"{pattern!r} matches no arrays"
        of_kind = f" of kind {kind!r}" if kind else ""
        raise RuleError(f"{verb}: {what}{of_kind} with values to draw.")
    if len(leaves) > panels:
        names = list(leaves)
        some = ", ".join(map(short, [*names[:3], "...", names[-1]]))
        raise RuleError(
            f"{verb}: there is room for {panels} leaves in a figure, and these are {len(leaves)}: "
            f"{some}. Give a pattern that matches fewer, or panels={len(leaves)}."
        )
    place = found._path()
    return leaves, [short(join((*place, name), sep)) for name in leaves]


def _with_values(verb: str, found: Mapping[str, Any] | ParamTree) -> dict[str, Any]:
    """Returns the leaves without PRNG keys; raises MismatchError for what can never be drawn."""
    problems = []
    leaves = {}
    for name, leaf in found.items():
        dtype = dtype_of(leaf)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            continue
        if isinstance(leaf, jax.core.Tracer):
            problems.append(f"`{short(name)}` is traced: draw outside of jit")
        elif why := absent(leaf):
            problems.append(f"`{short(name)}` {why}: draw what pt.init or the step returned")
        elif not numeric(leaf):
            problems.append(f"`{short(name)}` is not an array of numbers: {describe(leaf)}")
        leaves[name] = leaf
    if problems:
        raise MismatchError(f"{verb}: some leaves have no values. {'; '.join(problems)}.")
    return leaves


def _gradients(tree: Any, leaves: Mapping[str, Any], grads: Any, sep: str) -> dict[str, Any]:
    """Returns the gradients of those leaves that have one."""
    every = dict(collect(tree, sep=sep, aliases=True).items())
    found = dict(collect(grads, sep=sep, aliases=True).items())
    problems = []
    for name, gradient in found.items():
        if name not in every:
            problems.append(f"`{short(name)}` is not in the tree.{suggest(name, list(every))}")
        elif shape_of(every[name]) != shape_of(gradient):
            problems.append(
                f"`{short(name)}` has shape {shape_of(every[name])}, its gradient {shape_of(gradient)}."
            )
    if problems:
        raise MismatchError(f"histograms: grads are not those of the tree. {' '.join(problems)}")
    # The gradient by an integer has the dtype float0, and no values.
    beside = {
        name: found[name]
        for name in leaves
        if name in found and dtype_of(found[name]) != jax.dtypes.float0
    }
    if not beside:
        raise MismatchError(
            "histograms: grads has a gradient of none of the leaves: leave it out, or take a pattern "
            f"of names that have one. The leaves are {', '.join(map(short, list(leaves)[:10]))}."
        )
    return _with_values("histograms: grads", beside)


def _real(leaf: Any) -> Any:
    """Returns the values of a leaf as real numbers that numpy and matplotlib know."""
    values = np.asarray(leaf)
    with np.errstate(over="ignore"):  # what is too large is infinite, and counted as such
        if jnp.issubdtype(values.dtype, jnp.complexfloating):
            values = np.abs(values)
        if values.dtype in (np.float32, np.float64):
            return values
        # float16 too: differences of its values overflow, and the least integer has no absolute value.
        small = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize < 4
        return values.astype(np.float32 if small else np.float64)


def _note(leaf: Any) -> str:
    dtype = dtype_of(leaf)
    size = str(shape_of(leaf))
    absolute = dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)
    return f"{size}, absolute values" if absolute else size


def _check(verb: str, name: str, value: Any, what: str, whole: bool = False) -> None:
    """Raises ValueError for a number that is not above zero, or not whole."""
    good = isinstance(value, int | np.integer) or (not whole and isinstance(value, float | np.floating))
    if not good or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{verb}: {name} is {what}, not {value!r}.")
