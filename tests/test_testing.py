"""Assertions fail if and only if they should, and name every leaf."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paramtree as pt
from paramtree import testing
from tests.catalogue import leaf, siblings, tied, trees
from tests.verbs.test_diff import CHANGES, form


def failure(call: Any) -> str:
    with pytest.raises(AssertionError, match=r"^assert_\w+: ") as raised:
        call()
    return str(raised.value)


def passes(call: Any, *args: Any, **options: Any) -> bool:
    try:
        call(*args, **options)
    except AssertionError:
        return False
    return True


@given(tree=trees(), change=st.sampled_from(sorted(CHANGES)))
def test_shapes_match_if_and_only_if_check_match_passes(tree, change):
    other = CHANGES[change](tree)
    assert passes(testing.assert_shapes_match, tree, other) == (form(tree) == form(other))


@given(tree=trees(), change=st.sampled_from(sorted(set(CHANGES) - {"shapes only"})))
def test_trees_are_equal_if_and_only_if_alike_in_form_and_values(tree, change):
    other = CHANGES[change](tree)
    equal = form(tree) == form(other) and all(
        map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(other))
    )
    assert passes(testing.assert_trees_equal, tree, other) == equal
    assert passes(testing.assert_trees_close, tree, other) == equal


@given(
    values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5),
    off=st.floats(-1, 1, width=32),
    rtol=st.sampled_from([0.0, 1e-3, 0.5]),
    atol=st.sampled_from([0.0, 0.1]),
)
def test_trees_are_close_as_chex_sees_it(values, off, rtol, atol):
    expected = {"w": np.array(values, np.float32)}
    actual = {"w": expected["w"] + np.float32(off)}
    far = np.abs(actual["w"].astype(np.float64) - expected["w"])
    limit = atol + rtol * np.abs(expected["w"].astype(np.float64))
    if np.any(np.abs(far - limit) <= 1e-5 * limit + 1e-40):
        return  # chex computes it in float32
    theirs = passes(chex.assert_trees_all_close, actual, expected, rtol=rtol, atol=atol)
    assert passes(testing.assert_trees_close, actual, expected, rtol=rtol, atol=atol) == theirs


def test_every_leaf_that_is_off_is_named() -> None:
    expected = pt.from_tree(
        {"w": leaf(1, (2, 3)), "b": leaf(2), "h": jnp.ones(2, jnp.bfloat16), "n": np.int8([1, -128]), "act": "relu",
         "key": jax.random.key(0), "lr": 0.5, "same": leaf(4), "c": jnp.complex64(1 + 1j)}
    )  # fmt: skip
    actual = pt.from_tree(
        {"w": leaf(1, (2, 3)).at[1, 2].set(1.1), "b": leaf(2, (3,)), "h": jnp.ones(2, jnp.bfloat16) * 1.5,
         "n": np.int8([1, 127]), "act": "gelu", "key": jax.random.key(1), "lr": 0.25, "same": leaf(4),
         "c": jnp.complex64(1 + 2j)}
    )  # fmt: skip
    lines = [
        "  `b`: expected shape (2,), found (3,).",
        "  `w`: 1 of 6 elements off, largest difference 0.1; at [1, 2] it is 1.1, expected 1.0.",
        "  `h`: 2 of 2 elements off, largest difference 0.5; at [0] it is 1.5, expected 1.",
        "  `n`: 1 of 2 elements off, largest difference 255; at [1] it is 127, expected -128.",
        "  `act`: 1 of 1 elements off; it is 'gelu', expected 'relu'.",
        "  `key`: 1 of 1 elements off.",
        "  `lr`: 1 of 1 elements off, largest difference 0.25; it is 0.25, expected 0.5.",
        "  `c`: 1 of 1 elements off, largest difference 1; it is (1+2j), expected (1+1j).",
    ]
    assert failure(lambda: testing.assert_trees_equal(actual, expected)).split("\n") == [
        "assert_trees_equal: actual is not what was expected:", *lines
    ]  # fmt: skip
    assert failure(lambda: testing.assert_trees_close(actual, expected, rtol=0.01, atol=0.2)).split("\n") == [
        "assert_trees_close: actual is not what was expected (rtol=0.01, atol=0.2):",
        lines[0], *lines[2:]
    ]  # fmt: skip


def test_the_element_that_is_shown_is_off_by_most_for_what_is_tolerated() -> None:
    expected = {"w": np.array([1000.0, 1.0, np.nan])}
    actual = {"w": np.array([1001.0, 1.5, np.nan])}
    assert failure(lambda: testing.assert_trees_close(actual, expected, rtol=0.01)).endswith(
        "`w`: 1 of 3 elements off, largest difference 1; at [1] it is 1.5, expected 1.0."
    )
    lost = {"w": np.array([1001.0, np.nan, np.nan])}
    assert failure(lambda: testing.assert_trees_close(lost, expected)).endswith(
        "`w`: 2 of 3 elements off, largest difference nan; at [1] it is nan, expected 1.0."
    )


def test_what_is_equal_to_what() -> None:
    testing.assert_trees_equal({"w": jnp.array([jnp.nan, -0.0])}, {"w": np.float32([np.nan, 0])})
    testing.assert_trees_close({"w": jnp.ones(2)}, {"w": jnp.ones(2) + 1e-7})
    assert "`w`: 2 of 2 elements off" in failure(
        lambda: testing.assert_trees_close({"w": jnp.ones(2)}, {"w": jnp.ones(2) + 1e-5})
    )
    assert "`w`: expected dtype bfloat16, found float32." in failure(
        lambda: testing.assert_trees_close({"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.bfloat16)})
    )
    assert "the tree: expected dict, found ParamTree." in failure(
        lambda: testing.assert_trees_equal(siblings(), siblings().to_dict())
    )
    for bad in (-1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="^rtol must be a non-negative number"):
            testing.assert_trees_close({}, {}, rtol=bad)


def test_values_are_not_taken_for_equal_where_there_are_only_shapes() -> None:
    shapes = jax.eval_shape(lambda: tied())
    for call in (testing.assert_trees_close, testing.assert_trees_equal, testing.assert_only_changed):
        message = failure(lambda call=call: call(shapes, shapes))
        assert "some leaves are only shapes; pt.testing.assert_shapes_match compares those" in message
        assert "  `block_a_w` has no values." in message
    testing.assert_shapes_match(shapes, tied())  # as advised


def test_all_finite() -> None:
    good = {
        "a": jnp.ones(3),
        "i": jnp.arange(3),
        "s": "text",
        "k": jax.random.key(0),
        "h": jnp.ones(2, jnp.bfloat16),
    }
    testing.assert_all_finite(good)
    testing.assert_all_finite(pt.from_tree({}))
    bad = {**good, "a": jnp.array([jnp.nan, jnp.inf, 1.0]), "h": -jnp.inf * good["h"]}
    assert failure(lambda: testing.assert_all_finite(bad)) == (
        "assert_all_finite: 2 of 3 leaves are not finite:\n"
        "  `a`: 1 NaN and 1 infinite of 3.\n"
        "  `h`: 0 NaN and 2 infinite of 2."
    )
    testing.assert_all_finite(bad, "i")


def test_only_what_is_trained_changes() -> None:
    params = tied()
    step = jax.tree.map(lambda x: x - 0.1, pt.select(params, "decoder_bias|block.*"))
    after = pt.merge(step, pt.select(params, "embed.*"))
    testing.assert_only_changed(params, after, "decoder_bias|block.*")
    testing.assert_only_changed(
        params, after, ["decoder_bias", "block_c.*"]
    )  # by any name of a tied leaf
    assert failure(lambda: testing.assert_only_changed(params, after, "decoder.*|block_a_w")) == (
        "assert_only_changed: expected exactly the leaves that match 'decoder.*|block_a_w' to change:\n"
        "  `embed_weight` has not changed.\n"
        "  `block_a_b` has changed: 2 of 2 elements off, largest difference 0.1."
    )
    assert failure(lambda: testing.assert_only_changed(params, after)) == (
        "assert_only_changed: expected all leaves to change:\n  `embed_weight` has not changed."
    )
    assert "after does not match before:\n  `decoder_bias`: expected shape" in failure(
        lambda: testing.assert_only_changed(
            params, pt.map_named(lambda name, x: jnp.ones(9), params, "decoder_bias")
        )
    )
    testing.assert_only_changed({"a": leaf(0), "b": leaf(1)}, {"a": leaf(0), "b": leaf(2)}, "b")
    with pytest.raises(pt.RuleError, match="'nothing' matches no name"):
        testing.assert_only_changed(params, after, "nothing")
    with pytest.raises(TypeError, match="assert_only_changed compares values, which are unknown while"):
        jax.jit(lambda p: testing.assert_only_changed(p, p))(params)


def test_names_of_others_are_printed_harmlessly() -> None:
    name = "\x1b[31m" + "w" * 1000
    for call in (
        lambda: testing.assert_trees_equal({name: leaf(0)}, {name: leaf(1)}),
        lambda: testing.assert_only_changed({name: leaf(0)}, {name: leaf(0)}),
        lambda: testing.assert_all_finite({name: leaf(0) * jnp.nan}),
        lambda: testing.assert_trees_equal(
            {name: jax.ShapeDtypeStruct((), jnp.int32)}, {name: jnp.int32(0)}
        ),
    ):
        message = failure(call)
        assert "\x1b" not in message and "\\x1b[31mwww" in message
        assert len(message) < 500


# In jitted functions


def test_shapes_match_while_tracing() -> None:
    jax.jit(lambda p: testing.assert_shapes_match(p, siblings()))(siblings())
    with pytest.raises(AssertionError, match="`dense3_bias`: expected shape"):
        jax.jit(lambda p: testing.assert_shapes_match(p, siblings()))(
            pt.map_named(lambda name, x: jnp.ones(9), siblings(), "dense3_bias")
        )


def test_chex_checks_traced_values() -> None:
    @chex.chexify
    @jax.jit
    def step(actual: Any, expected: Any) -> Any:
        testing.assert_trees_close(actual, expected, rtol=0.1)
        testing.assert_all_finite(actual)
        return actual

    def run(actual: Any, expected: Any) -> None:
        step(actual, expected)
        step.wait_checks()

    params = pt.from_tree({"dense0": {"w": leaf(1), "key": jax.random.key(0), "n": jnp.int32(1)}})
    run(params, params)
    run(params, pt.replace(params, {"dense0_w": leaf(1) * 1.05}))
    for name, value in (
        ("dense0_w", leaf(2)),
        ("dense0_key", jax.random.key(1)),
        ("dense0_n", jnp.int32(2)),
    ):
        with pytest.raises(AssertionError, match=f"differ in leaves.*{name}"):
            run(params, pt.replace(params, {name: value}))
    infinite = pt.replace(params, {"dense0_w": leaf(1) * jnp.inf})
    with pytest.raises(AssertionError, match="non-finite value: .*dense0_w"):
        run(infinite, infinite)
    with pytest.raises(AssertionError, match="`dense0_w`: expected shape"):
        step(params, pt.map_named(lambda name, x: jnp.ones(3), params, "dense0_w"))
    with pytest.raises(RuntimeError, match=r"@chex.chexify"):
        jax.jit(lambda p: testing.assert_trees_close(p, p))(params)


@contextmanager
def disabled() -> Iterator[None]:
    chex.disable_asserts()
    try:
        yield
    finally:
        chex.enable_asserts()


def test_they_are_turned_off_with_those_of_chex() -> None:
    bad = {"w": leaf(1) * jnp.nan}
    calls = [
        lambda: testing.assert_trees_close(bad, {}), lambda: testing.assert_trees_equal(bad, {}),
        lambda: testing.assert_shapes_match(bad, {}), lambda: testing.assert_all_finite(bad),
        lambda: testing.assert_only_changed(bad, {}),
    ]  # fmt: skip
    assert len(calls) == len(testing.__all__)
    with disabled():
        for call in calls:
            call()
    for call in calls:
        failure(call)


def test_chex_is_loaded_by_the_first_assertion_only() -> None:
    code = (
        "import sys, paramtree as pt; pt.testing; print('chex' in sys.modules); "
        "pt.testing.assert_trees_equal({}, {}); print('chex' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.findall("True|False", run.stdout) == ["False", "True"]


def test_a_pattern_that_matches_nothing_is_no_success() -> None:
    with pytest.raises(pt.RuleError, match="assert_all_finite: 'wieght' matches no name; the closest"):
        pt.testing.assert_all_finite({"weight": jnp.full(2, jnp.nan)}, "wieght")
