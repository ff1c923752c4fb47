"""Assertions for tests of models: each names every leaf that is not as it should be.

They are those of chex, with names. Within a jitted function under ``chex.chexify``, values are
checked by chex itself; ``chex.disable_asserts()`` turns these off as well. A test that passes two
trees says what it expects last, as in chex and numpy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import describe, dtype_of, join, short
from paramtree.core.names import Pattern, named
from paramtree.inspect.diff import check_readable, check_tolerances, only_shape
from paramtree.inspect.distance import Distance, comparable, distances, numeric
from paramtree.inspect.report import float_text
from paramtree.inspect.stats import find_nonfinite
from paramtree.verbs.compare import Pair, compare, differences, lines
from paramtree.verbs.parts import choose, taken

__all__ = [
    "assert_all_finite",
    "assert_only_changed",
    "assert_shapes_match",
    "assert_trees_close",
    "assert_trees_equal",
]


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """Asserts that two trees are alike, and their values nearly equal.

    Structure, shapes and dtypes must be the same, as in ``pt.check_match``. An element is off if
    ``|actual - expected| > atol + rtol * |expected|``; a NaN is equal to a NaN in the same place, but
    for traced values, which chex compares. What is no number must be equal.

    Args:
      actual: a parameter tree or any other pytree.
      expected: what it should be.
      rtol: what is tolerated in relation to what is expected.
      atol: what is tolerated.

    Raises:
      AssertionError: they differ; every leaf that does is listed, with its largest difference.

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
    _assert_alike("assert_trees_close", actual, expected, rtol, atol)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Asserts that two trees are alike, and their values equal.

    As ``assert_trees_close`` with no tolerance: NaNs in the same place are equal, and so are 0 and -0.

    Args:
      actual: a parameter tree or any other pytree.
      expected: what it should be.

    Raises:
      AssertionError: they differ; every leaf that does is listed, with its largest difference.

    Example:
      >>> import paramtree as pt
      >>> params = pt.from_tree({"w": np.ones(2)})
      >>> pt.testing.assert_trees_equal(jax.tree.map(lambda leaf: leaf + 0, params), params)
    """
    __tracebackhide__ = True
    _assert_alike("assert_trees_equal", actual, expected, 0.0, 0.0)


def assert_shapes_match(actual: Any, expected: Any) -> None:
    """Asserts that two trees have one structure, and leaves of the same shapes and dtypes.

    ``pt.check_match`` as an assertion; values are not looked at, so either may be of shapes only.

    Args:
      actual: a parameter tree or any other pytree.
      expected: what it should be like.

    Raises:
      AssertionError: they differ; all that does is listed.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Dense(2)
      >>> params = pt.init(net, jax.random.key(0), jnp.ones((1, 3)))
      >>> pt.testing.assert_shapes_match(params, pt.abstract(net, jnp.ones((5, 3))))
    """
    __tracebackhide__ = True
    if _enabled():
        _fail("assert_shapes_match: actual is not like expected", lines(differences(expected, actual)))


def assert_all_finite(tree: Any, pattern: Pattern | None = None) -> None:
    """Asserts that no leaf holds NaN or infinity.

    Args:
      tree: a parameter tree, gradients, or any other pytree.
      pattern: a regular expression for whole names; None checks all.

    Raises:
      AssertionError: some do; every leaf is listed, with how many.
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
    flat = taken("assert_all_finite", tree, pattern)
    if _traced(flat):
        _chex().assert_tree_all_finite({name: leaf for name, leaf in flat.items() if numeric(leaf)})
        return
    found = find_nonfinite(tree, pattern)
    _fail(
        f"assert_all_finite: {len(found.found)} of {found.searched} leaves are not finite",
        [
            f"  {_name(name)}: {row['nan']} NaN and {row['inf']} infinite of {row['size']}."
            for name, row in found.found.items()
        ],
    )


def assert_only_changed(
    before: Any, after: Any, pattern: Pattern | list[Pattern] | None = None
) -> None:
    """Asserts that the leaves whose names match have changed, each in some value, and no others.

    What a test of a training step asks: that what is trained moves, and that what is frozen does not.

    Args:
      before: a parameter tree or any other pytree.
      after: the tree after the step.
      pattern: a regular expression for whole names, or several; None for all.

    Raises:
      AssertionError: one has not changed, or another has, or the trees are not alike; all are listed.
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
    _fail(f"{verb}: after is not like before", lines(differences(before, after)))
    first, second = (named(tree).tree for tree in (before, after))
    structure = first._structure
    names = [join(path) for path in structure.canonical]
    chosen = set(choose(structure, pattern, None, verb)[0].slots)
    pairs = list(map(Pair, names, first._leaves, second._leaves))
    wrong = []
    for slot, (pair, distance) in enumerate(_apart(verb, pairs)):  # alike, so none is left out
        if slot in chosen and distance is None:
            wrong.append(f"  {_name(pair.name)} has not changed.")
        elif slot not in chosen and distance is not None:
            wrong.append(f"  {_name(pair.name)} has changed: {_off(distance)}.")
    meant = "all leaves" if pattern is None else f"exactly the leaves that match {pattern!r}"
    _fail(f"{verb}: expected {meant} to change", wrong)


def _assert_alike(verb: str, actual: Any, expected: Any, rtol: float, atol: float) -> None:
    __tracebackhide__ = True
    check_tolerances(rtol, atol)
    if not _enabled():
        return
    tolerated = f" (rtol={rtol:g}, atol={atol:g})" if rtol or atol else ""
    head = f"{verb}: actual is not what was expected{tolerated}"
    wrong = lines(differences(expected, actual))
    pairs = compare(actual, expected)[1]
    traced = [pair for pair in pairs if _traced(pair.first, pair.second)]
    known = [pair for pair in pairs if not _traced(pair.first, pair.second)]
    wrong += [
        f"  {_name(pair.name)}: {_off(distance)}{_worst(pair, rtol)}."
        for pair, distance in _apart(verb, known, rtol, atol)
        if distance is not None
    ]
    _fail(head, wrong)
    if traced:
        first, second = ({pair.name: _words(pair[i]) for pair in traced} for i in (1, 2))
        _chex().assert_trees_all_close(first, second, rtol=rtol, atol=atol)


def _apart(
    verb: str, pairs: list[Pair], rtol: float = 0.0, atol: float = 0.0
) -> list[tuple[Pair, Distance | None]]:
    """Returns leaves that can be compared, with how far apart they are; all must have values."""
    __tracebackhide__ = True
    check_readable(verb, [(pair.name, leaf) for pair in pairs for leaf in (pair.first, pair.second)])
    shapes = [pair.name for pair in pairs if only_shape(pair)]
    _fail(
        f"{verb}: there are only shapes, which pt.testing.assert_shapes_match compares",
        [f"  {_name(name)} has no values." for name in shapes],
    )
    pairs = [pair for pair in pairs if comparable(pair.first, pair.second)]
    found = distances([(pair.first, pair.second) for pair in pairs], float(rtol), float(atol))
    return list(zip(pairs, found, strict=True))


def _chex() -> Any:
    import chex  # type: ignore[import-untyped]

    return chex


def _enabled() -> bool:
    """Whether chex has not been told to disable assertions."""
    try:
        _chex().assert_equal(0, 1)
    except AssertionError:
        return True
    return False


def _fail(head: str, wrong: list[str]) -> None:
    __tracebackhide__ = True
    if wrong:
        raise AssertionError("\n".join([f"{head}:", *wrong]))


def _traced(*trees: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def _words(leaf: Any) -> Any:
    """Returns an array, of a key its data."""
    dtype = dtype_of(leaf)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def _name(name: str) -> str:
    return f"`{short(name, 200)}`"


def _off(distance: Distance) -> str:
    count = f"{distance.differing} of {distance.size} elements"
    largest = distance.largest
    return f"{count} off" + ("" if largest is None else f", largest difference {float_text(largest)}")


def _worst(pair: Pair, rtol: float) -> str:
    """Returns where two leaves are off by most, in terms of what is tolerated, and by what."""
    if not numeric(pair.first):
        one, other = (describe(leaf) for leaf in pair[1:])
        return f"; it is {one}, expected {other}" if dtype_of(pair.first) is None else ""
    x, y = (np.asarray(leaf) for leaf in pair[1:])
    with np.errstate(all="ignore"):
        a, b = (each.astype(np.complex128 if each.dtype.kind == "c" else np.float64) for each in (x, y))
        excess = np.where(
            (a == b) | (np.isnan(a) & np.isnan(b)), -np.inf, np.abs(a - b) - rtol * np.abs(b)
        )
        index = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), x.shape)
    place = f"at {[int(i) for i in index]} " if index else ""
    return f"; {place}it is {x[index]!s}, expected {y[index]!s}"
