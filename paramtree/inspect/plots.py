"""Publication-ready plots of parameters: histograms, update-to-weight ratios, heat maps.

Each function takes a pattern and returns a ``matplotlib.figure.Figure``, which a notebook renders and
``figure.savefig("weights.pdf")`` writes. Figures are at most 7 inches wide, two columns of a paper,
with text of 6 or 7 points. This module selects and checks the data, and
``paramtree.inspect.picture`` draws it.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import describe, dtype_of, join, shape_of, short
from paramtree.core.errors import MismatchError, RuleError, suggest
from paramtree.core.rules import Patterns
from paramtree.core.tree import ParamTree, place_of
from paramtree.inspect.distance import is_key, numeric
from paramtree.inspect.measure import absent
from paramtree.verbs.collect import collect, collect_matching, flat_tree
from paramtree.verbs.from_tree import from_tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["heatmap", "histograms", "update_ratios"]


def histograms(
    tree: Any,
    pattern: Patterns = None,
    *,
    grads: Any = None,
    bins: int | None = None,
    log: bool = False,
    kind: str | None = None,
    sep: str = "_",
    panels: int = 48,
) -> "Figure":
    """Returns a figure with a histogram of the values of each matching leaf.

    Non-finite values are not drawn, but counted in a note. Complex leaves are drawn by absolute value.
    PRNG keys are skipped.

    Args:
      tree: a parameter tree of arrays, or any other pytree.
      pattern: a regular expression that matches full names; None selects all leaves.
      grads: a tree with the same names, or some of them. Each gradient gets a histogram of its own, to
        the right of its parameter's.
      bins: the number of bars; None chooses it by the size of the leaf, 60 at most.
      log: whether the counts have a logarithmic axis, which makes outliers visible.
      kind: "param" or "state" to draw only these.
      sep: the separator that joins names.
      panels: the maximum number of leaves; more are an error.

    Raises:
      RuleError: the pattern matches nothing, or more than ``panels`` leaves.
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
        _check("histograms", "bins", bins, "a positive integer", integer=True)
    leaves, titles = _leaves("histograms", tree, pattern, kind, sep, panels)
    gradients = None if grads is None else _gradients(tree, leaves, grads, sep)
    per_leaf = 1 if gradients is None else 2  # panels
    width, height = (3.4, 2.2) if len(leaves) * per_leaf == 1 else (1.75, 1.35)
    figure, grid = picture.grid(4, width, [height] * (len(leaves) * per_leaf))
    free, characters = iter(grid), round(15 * width * per_leaf)
    for (name, leaf), title in zip(leaves.items(), titles, strict=True):
        axes = next(free)
        title = picture.wrapped(title, characters)
        picture.histogram(axes, _real(leaf), title, _note(leaf), picture.BLUE, bins, log)
        if gradients is None:
            continue
        axes.set_xlabel("value", fontsize=picture.SMALL, labelpad=1)
        axes = next(free)
        if name in gradients:
            picture.histogram(axes, _real(gradients[name]), "", "", picture.VERMILION, bins, log)
            axes.set_xlabel("gradient", fontsize=picture.SMALL, labelpad=1)
        else:
            axes.set_axis_off()
    return figure


def update_ratios(
    history: Any, pattern: Patterns = None, *, steps: Sequence[float] | None = None
) -> "Figure":
    """Returns a figure of update-to-weight ratios over training, on a logarithmic axis.

    The dashed line marks 1e-3, a typical ratio for a parameter that learns well. Values that are not
    finite and positive leave a gap. More than 18 parameters are coloured by their order.

    Args:
      history: a list of the results of ``pt.update_ratios``, one per step; or these stacked by
        ``jax.lax.scan`` into one tree.
      pattern: a regular expression that matches full names; None selects all.
      steps: the step numbers; 1, 2, 3, ... by default.

    Raises:
      RuleError: the pattern matches nothing.
      MismatchError: the history is empty or not numeric, or the length of ``steps`` does not match it.
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
            f"update_ratios: steps must be {length} finite numbers, one per element of the history, "
            f"but found {describe(at)}."
        )
    return picture.ratios(at, [short(name) for name in series], np.stack(list(series.values())))


def _series(history: Any, pattern: Patterns) -> dict[str, Any]:
    """Returns the ratios of each name at every step, NaN where a step has none."""
    stacked = isinstance(history, Mapping | ParamTree)
    if not stacked and (isinstance(history, str) or not isinstance(history, Iterable)):
        raise MismatchError(
            "update_ratios: the history must be a list of the results of pt.update_ratios, but "
            f"found {describe(history)}."
        )
    if isinstance(history, Mapping):  # its lists hold steps, not levels of a tree
        as_array = partial(np.asarray, dtype=object)
        history = {k: as_array(v) if isinstance(v, list | tuple) else v for k, v in history.items()}
    records = [history] if stacked else list(history)
    invalid = [record for record in records if not isinstance(record, Mapping | ParamTree)]
    if invalid:
        raise MismatchError(
            "update_ratios: each element of the history must be a result of pt.update_ratios, a "
            f"mapping of names to numbers, but {len(invalid)} are not, such as {describe(invalid[0])}."
        )
    trees = jax.device_get([collect(from_tree(record)) for record in records])
    rows = [dict(tree.items()) for tree in trees]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise MismatchError("update_ratios: the history is empty; there is nothing to draw.")
    series: dict[str, Any] = {}
    problems = []
    for name in collect_matching("update_ratios", flat_tree(dict.fromkeys(names)), pattern):
        values = rows[0][name] if stacked else [row.get(name, np.nan) for row in rows]
        try:
            series[name] = np.asarray(values, np.float64)
            fits = series[name].ndim == 1 and series[name].size > 0
        except (TypeError, ValueError):  # not numeric, or ragged
            fits = False
        if not fits:
            problems.append(f"`{short(name)}` is {describe(values)}")
    lengths = {values.size for values in series.values()}
    if not problems and len(lengths) > 1:
        problems.append(f"its arrays have {' and '.join(map(str, sorted(lengths)))} steps")
    if problems:
        raise MismatchError(
            "update_ratios: the history must be a list of the results of pt.update_ratios, or these "
            f"stacked by jax.lax.scan, but {'; '.join(problems)}."
        )
    return series


def heatmap(
    tree: Any,
    pattern: Patterns = None,
    *,
    limit: float | None = None,
    kind: str | None = None,
    sep: str = "_",
    panels: int = 24,
) -> "Figure":
    """Returns a figure with a heat map of each matching leaf: blue is negative, red positive.

    A vector is a row. With more than two axes, the last two form a tile, such as a convolution kernel:
    tiles go down along the first axis and right along the others, and a column of tiles much taller
    than wide is folded, continuing at the top. Above 256 rows or columns, a cell shows the value of its
    block farthest from zero. Non-finite values are yellow. Complex leaves are drawn by absolute value.
    PRNG keys are skipped.

    Args:
      tree: a parameter tree of arrays, any other pytree, or one array.
      pattern: a regular expression that matches full names; None selects all leaves.
      limit: the value of the darkest colour for all leaves; None takes each leaf's largest value.
      kind: "param" or "state" to draw only these.
      sep: the separator that joins names.
      panels: the maximum number of leaves; more are an error.

    Raises:
      RuleError: the pattern matches nothing, or more than ``panels`` leaves.
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
        _check("heatmap", "limit", limit, "a positive number")
    leaves, titles = _leaves("heatmap", tree, pattern, kind, sep, panels)
    width, characters = (3.4, 48) if len(leaves) == 1 else (7 / 3, 32)
    titles = [picture.wrapped(title, characters) for title in titles]
    heights = [
        (width - 0.6) * picture.proportion(shape_of(leaf)) + 0.5 + 0.12 * title.count("\n")
        for leaf, title in zip(leaves.values(), titles, strict=True)
    ]
    figure, grid = picture.grid(3, width, heights)
    for axes, leaf, title in zip(grid, leaves.values(), titles, strict=True):
        picture.heat(axes, _real(leaf), title, _note(leaf), limit)
    return figure


# Selecting and checking the data


def _picture() -> Any:
    try:
        import matplotlib  # noqa: F401  # fails even if submodules are loaded
    except ImportError:
        raise ImportError(
            "pt.plots draws with matplotlib, which is not installed: pip install 'paramtree[plots]'"
        ) from None
    from paramtree.inspect import picture

    return picture


def _leaves(
    verb: str, tree: Any, pattern: Patterns, kind: str | None, sep: str, panels: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns the leaves to draw, and a title for each: its full name in the model."""
    _check(verb, "panels", panels, "a positive integer", integer=True)
    selected = collect_matching(verb, tree, pattern, sep=sep, kind=kind)
    leaves = _with_values(verb, selected)
    if not leaves:
        reason = "the tree has no arrays" if pattern is None else f"{pattern!r} matches no arrays"
        of_kind = f" of kind {kind!r}" if kind else ""
        raise RuleError(f"{verb}: {reason}{of_kind} with values to draw.")
    if len(leaves) > panels:
        names = list(leaves)
        some = ", ".join(map(short, [*names[:3], "...", names[-1]]))
        raise RuleError(
            f"{verb}: a figure holds at most {panels} leaves, but {len(leaves)} match: {some}. Give a "
            f"pattern that matches fewer, or panels={len(leaves)}."
        )
    place = place_of(selected)
    return leaves, [short(join((*place, name), sep)) for name in leaves]


def _with_values(verb: str, selected: Mapping[str, Any] | ParamTree) -> dict[str, Any]:
    """Returns the leaves except PRNG keys; raises MismatchError if one cannot be drawn."""
    leaves = {name: leaf for name, leaf in selected.items() if not is_key(leaf)}
    problems = []
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.core.Tracer):
            problems.append(f"`{short(name)}` is traced: draw it outside of jit")
        elif why := absent(leaf):
            problems.append(f"`{short(name)}` {why}: draw the result of pt.init or of the step")
        elif not numeric(leaf):
            problems.append(f"`{short(name)}` is not an array of numbers: {describe(leaf)}")
    if problems:
        raise MismatchError(f"{verb}: some leaves have no values. {'; '.join(problems)}.")
    return leaves


def _gradients(tree: Any, leaves: Mapping[str, Any], grads: Any, sep: str) -> dict[str, Any]:
    """Returns the gradients of the leaves that have one."""
    params, gradients = (collect(each, sep=sep, aliases=True) for each in (tree, grads))
    problems = []
    for name, gradient in gradients.items():
        if name not in params:
            problems.append(f"`{short(name)}` is not in the tree.{suggest(name, list(params))}")
        elif shape_of(params[name]) != shape_of(gradient):
            problems.append(
                f"`{short(name)}` has shape {shape_of(params[name])}, "
                f"its gradient {shape_of(gradient)}."
            )
    if problems:
        raise MismatchError(f"histograms: grads does not match the tree. {' '.join(problems)}")
    # The gradient of an integer leaf has dtype float0, and no values.
    drawn = {
        name: gradients[name]
        for name in leaves
        if name in gradients and dtype_of(gradients[name]) != jax.dtypes.float0
    }
    if not drawn:
        raise MismatchError(
            "histograms: grads has no gradient for any of the leaves: omit it, or select leaves that "
            f"have one. The leaves are {', '.join(map(short, list(leaves)[:10]))}."
        )
    return _with_values("histograms: grads", drawn)


def _real(leaf: Any) -> Any:
    """Returns the values of a leaf as float32 or float64, which matplotlib can draw."""
    values = np.asarray(leaf)
    with np.errstate(over="ignore"):  # overflow gives inf, which is counted
        if jnp.issubdtype(values.dtype, jnp.complexfloating):
            values = np.abs(values)
        if values.dtype in (np.float32, np.float64):
            return values
        # float16 differences would overflow, and the most negative integer has no absolute value.
        small = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize < 4
        return values.astype(np.float32 if small else np.float64)


def _note(leaf: Any) -> str:
    dtype = dtype_of(leaf)
    size = str(shape_of(leaf))
    absolute = dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)
    return f"{size}, absolute values" if absolute else size


def _check(verb: str, name: str, value: Any, expected: str, integer: bool = False) -> None:
    """Raises ValueError unless a value is a positive, finite number, or integer."""
    types = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if not isinstance(value, types) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{verb}: {name} must be {expected}, not {value!r}.")
