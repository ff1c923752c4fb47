"""Assertions for tests of models; each names every leaf that fails.

They mirror those of chex, with names. Inside a jitted function under ``chex.chexify``, chex checks the
values; ``chex.disable_asserts()`` disables these assertions too. The expected tree comes second, as in
chex and numpy.
"""

from typing import Any

import jax
import jax.numpy as jnp  # noqa: F401  # in the examples
import numpy as np

from paramtree.core.arrays import describe, dtype_of, join, short
from paramtree.core.errors import first_few
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import Patterns, select_slots
from paramtree.inspect.diff import check_tolerances, measured, only_shape
from paramtree.inspect.distance import Distance, is_key, numeric
from paramtree.inspect.stats import find_nonfinite
from paramtree.verbs.collect import collect_matching
from paramtree.verbs.compare import Pair, compare, differences, lines

__all__ = [
    "assert_all_finite", "assert_only_changed", "assert_shapes_match", "assert_trees_close",
    "assert_trees_equal",
]  # fmt: skip


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """Asserts that two trees have the same structure and nearly equal values.

    Structure, shapes and dtypes must match, as in ``pt.check_match``. An element is off if
    ``|actual - expected| > atol + rtol * |expected|``; NaNs in the same position are equal, except in
    traced values, which chex compares. Non-numeric leaves must be equal.

    Args:
      actual: a parameter tree or any other pytree.
      expected: the expected tree.
      rtol: the tolerance relative to the expected value.
      atol: the absolute tolerance.

    Raises:
      AssertionError: the trees differ; every differing leaf is listed, with its largest difference.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"dense0": {"weight": np.ones((2, 3)), "bias": np.zeros(2)}})
      >>> pt.testing.assert_trees_close(params, params)
      >>> other = pt.replace(params, {"dense0_bias": np.array([0.0, 0.5])})
      >>> pt.testing.assert_trees_close(params, other)
      Traceback (most recent call last):
      AssertionError: assert_trees_close: actual is not what was expected (rtol=1e-06, atol=0):
        `dense0_bias`: 1 of 2 elements off, largest difference 0.5; at [1] it is 0.0, expected 0.5.
    """
    __tracebackhide__ = True
    _assert_close("assert_trees_close", actual, expected, rtol, atol)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Asserts that two trees have the same structure and equal values.

    Like ``assert_trees_close`` with zero tolerance: NaNs in the same position are equal, and so are 0
    and -0.

    Args:
      actual: a parameter tree or any other pytree.
      expected: the expected tree.

    Raises:
      AssertionError: the trees differ; every differing leaf is listed, with its largest difference.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"w": np.ones(2)})
      >>> pt.testing.assert_trees_equal(jax.tree.map(lambda leaf: leaf + 0, params), params)
    """
    __tracebackhide__ = True
    _assert_close("assert_trees_equal", actual, expected, 0.0, 0.0)


def assert_shapes_match(actual: Any, expected: Any) -> None:
    """Asserts that two trees have the same structure, shapes and dtypes.

    ``pt.check_match`` as an assertion. Values are not read, so either tree may hold only shapes.

    Args:
      actual: a parameter tree or any other pytree.
      expected: a tree with the expected structure.

    Raises:
      AssertionError: the trees differ; all differences are listed.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Dense(2)
      >>> params = pt.init(net, jax.random.key(0), jnp.ones((1, 3)))
      >>> pt.testing.assert_shapes_match(params, pt.abstract(net, jnp.ones((5, 3))))
    """
    __tracebackhide__ = True
    if _enabled():
        head = "assert_shapes_match: actual does not match expected"
        _fail(head, lines(differences(expected, actual)))


def assert_all_finite(tree: Any, pattern: Patterns = None) -> None:
    """Asserts that no leaf holds NaN or infinity.

    Args:
      tree: a parameter tree, gradients, or any other pytree.
      pattern: a regular expression that matches full names; None checks all leaves.

    Raises:
      AssertionError: some do; every such leaf is listed, with counts.
      RuleError: the pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> pt.testing.assert_all_finite(pt.from_tree({"a": np.array([1.0, np.nan]), "b": np.ones(2)}))
      Traceback (most recent call last):
      AssertionError: assert_all_finite: 1 of 2 leaves are not finite:
        `a`: 1 NaN and 0 infinite of 2.
    """
    __tracebackhide__ = True
    if not _enabled():
        return
    flat = collect_matching("assert_all_finite", tree, pattern)
    if _traced(flat):
        _chex().assert_tree_all_finite({name: leaf for name, leaf in flat.items() if numeric(leaf)})
        return
    report = find_nonfinite(tree, pattern)
    _fail(
        f"assert_all_finite: {len(report.found)} of {report.searched} leaves are not finite",
        [
            f"  {_name(name)}: {row['nan']} NaN and {row['inf']} infinite of {row['size']}."
            for name, row in report.found.items()
        ],
    )


def assert_only_changed(before: Any, after: Any, pattern: Patterns = None) -> None:
    """Asserts that every leaf that matches has changed in some value, and that no other leaf has.

    This tests a training step: trained parameters move, and frozen ones do not.

    Args:
      before: a parameter tree or any other pytree.
      after: the tree after the step.
      pattern: a regular expression that matches full names, or several; None for all leaves.

    Raises:
      AssertionError: a matching leaf has not changed, another leaf has, or the structures differ; all
        are listed.
      RuleError: a pattern matches nothing.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"body": {"w": np.ones(2)}, "head": {"w": np.ones(2)}})
      >>> after = pt.map_named(lambda name, leaf: leaf - 0.1, params, "head_.*")
      >>> pt.testing.assert_only_changed(params, after, "head_.*")
    """
    __tracebackhide__ = True
    if not _enabled():
        return
    verb = "assert_only_changed"
    _fail(f"{verb}: after does not match before", lines(differences(before, after)))
    first, second = open_tree(before), open_tree(after)
    names = [join(path) for path in first.structure.canonical]
    chosen = set(select_slots(first, pattern, None, verb)[0].slots)
    pairs = list(map(Pair, names, first.leaves, second.leaves))
    failures = []
    for slot, (pair, distance) in enumerate(_compared(verb, pairs)):  # all pairs are comparable here
        if slot in chosen and distance is None:
            failures.append(f"  {_name(pair.name)} has not changed.")
        elif slot not in chosen and distance is not None:
            failures.append(f"  {_name(pair.name)} has changed: {_off(distance)}.")
    expected = "all leaves" if pattern is None else f"exactly the leaves that match {pattern!r}"
    _fail(f"{verb}: expected {expected} to change", failures)


def _assert_close(verb: str, actual: Any, expected: Any, rtol: float, atol: float) -> None:
    __tracebackhide__ = True
    check_tolerances(rtol, atol)
    if not _enabled():
        return
    tolerated = f" (rtol={rtol:g}, atol={atol:g})" if rtol or atol else ""
    head = f"{verb}: actual is not what was expected{tolerated}"
    failures = lines(differences(expected, actual))
    pairs = compare(actual, expected)[1]
    traced = [pair for pair in pairs if _traced(pair.first, pair.second)]
    known = [pair for pair in pairs if not _traced(pair.first, pair.second)]
    failures += [
        f"  {_name(pair.name)}: {_off(distance)}{_worst(pair, rtol)}."
        for pair, distance in _compared(verb, known, rtol, atol)
        if distance is not None
    ]
    _fail(head, failures)
    if traced:
        first, second = ({pair.name: _array(pair[i]) for pair in traced} for i in (1, 2))
        _chex().assert_trees_all_close(first, second, rtol=rtol, atol=atol)


def _compared(
    verb: str, pairs: list[Pair], rtol: float = 0.0, atol: float = 0.0
) -> list[tuple[Pair, Distance | None]]:
    """Returns the comparable pairs with their distances; fails if a leaf is only a shape."""
    __tracebackhide__ = True
    compared = measured(verb, pairs, rtol, atol)
    _fail(
        f"{verb}: some leaves are only shapes; pt.testing.assert_shapes_match compares those",
        [f"  {_name(pair.name)} has no values." for pair in pairs if only_shape(pair)],
    )
    return compared


def _chex() -> Any:
    import chex  # type: ignore[import-untyped]

    return chex


def _enabled() -> bool:
    """Whether the assertions of chex are enabled."""
    try:
        _chex().assert_equal(0, 1)
    except AssertionError:
        return True
    return False


def _fail(head: str, failures: list[str]) -> None:
    __tracebackhide__ = True
    if failures:
        raise AssertionError(f"{head}:\n{first_few(failures, chr(10))}")


def _traced(*trees: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def _array(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _name(name: str) -> str:
    return f"`{short(name, 200)}`"


def _off(distance: Distance) -> str:
    largest = "" if distance.largest is None else f", largest difference {distance.largest:.4g}"
    return f"{distance.differing} of {distance.size} elements off{largest}"


def _worst(pair: Pair, rtol: float) -> str:
    """Returns the element that exceeds the tolerance most, as text."""
    if not numeric(pair.first):
        actual, expected = (describe(leaf) for leaf in pair[1:])
        return f"; it is {actual}, expected {expected}" if dtype_of(pair.first) is None else ""
    x, y = (np.asarray(leaf) for leaf in pair[1:])
    with np.errstate(all="ignore"):
        a, b = (v.astype(np.complex128 if v.dtype.kind == "c" else np.float64) for v in (x, y))
        excess = np.where(
            (a == b) | (np.isnan(a) & np.isnan(b)), -np.inf, np.abs(a - b) - rtol * np.abs(b)
        )
        index = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), x.shape)
    place = f"at {[int(i) for i in index]} " if index else ""
    return f"; {place}it is {x[index]!s}, expected {y[index]!s}"
