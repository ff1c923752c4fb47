"""Statistics agree with numpy in double precision; leaves with non-finite values are named."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import paramtree as pt
from paramtree.inspect.measure import CHUNK, FIELDS
from tests.catalogue import CATALOGUE, tied, with_holes


def expected(array: Any, bins: int = 0) -> dict[str, Any]:
    """Returns numpy's statistics of the finite values."""
    wide = np.asarray(array)
    wide = np.abs(wide) if wide.dtype.kind == "c" else wide
    wide = wide.astype(np.float64).ravel()
    fine = wide[np.isfinite(wide)]
    row: dict[str, Any] = dict.fromkeys(FIELDS, np.nan)
    if fine.size:
        row |= {"mean": fine.mean(), "std": fine.std(), "min": fine.min(), "max": fine.max()}
    row["norm"] = np.linalg.norm(fine) if fine.size else np.nan
    row["zeros"] = (wide == 0).mean() if wide.size else 0.0
    row |= {"nan": int(np.isnan(wide).sum()), "inf": int(np.isinf(wide).sum())}
    if bins:
        row["histogram"] = np.histogram(fine, bins)[0].tolist() if fine.size else [0] * bins
    return row


def check(row: dict[str, Any], wanted: dict[str, Any], scale: float) -> None:
    for field in ("nan", "inf", "histogram"):
        assert row.get(field) == wanted.get(field), field
    for field in ("mean", "std", "min", "max", "norm", "zeros"):
        tolerance = scale * 3e-5 if field in ("mean", "std") else 0.0
        np.testing.assert_allclose(row[field], wanted[field], rtol=2e-6, atol=tolerance, err_msg=field)


SIZES = [0, 1, 7, CHUNK - 1, 4 * CHUNK, 4 * CHUNK + 1, 5 * CHUNK - 3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("center", [0.0, 300.0])
@pytest.mark.parametrize("bad", [(), (np.nan,), (np.inf, -np.inf, np.nan, np.nan)])
def test_statistics_match_numpy(size: int, center: float, bad: tuple[float, ...]) -> None:
    rng = np.random.default_rng(size)
    array = (rng.standard_normal(size) + center).astype(np.float32)
    array[: size // 9] = 0
    array[: len(bad)] = bad[:size]
    rng.shuffle(array)
    both = pt.from_tree({"host": array, "device": jnp.asarray(array)})
    report = pt.stats(both, bins=0)
    for name in ("host", "device"):
        check(report[name], expected(array), center + 4.0)


@pytest.mark.parametrize("size", [3, 1000, 4 * CHUNK + 5])
def test_histograms_match_numpy(size: int) -> None:
    # Integers and a power of two of bins make every edge exact.
    array = np.random.default_rng(size).integers(0, 17, size).astype(np.float32)
    array[:2] = 0, 16
    report = pt.stats({"a": jnp.asarray(array)}, bins=8)
    assert report.to_dict()["a"]["histogram"] == np.histogram(array, 8)[0].tolist()


SHAPES = st.sampled_from([(), (0,), (5,), (2, 3), (1, 4, 2)])
REAL = st.sampled_from([np.float32, np.float16, np.int32, np.uint8, np.bool_])


@given(
    arrays(REAL, SHAPES, elements={"allow_subnormal": False, "max_value": 100, "min_value": 0})
    | arrays(np.complex64, SHAPES, elements=st.sampled_from([0, 1, -2j, 3 + 4j]))
    | arrays(np.float32, (6,), elements=st.sampled_from([0.0, 1.0, -2.0, np.nan, np.inf, -np.inf]))
)
@settings(max_examples=100)
def test_any_dtype_and_shape(array: Any) -> None:
    check(pt.stats({"a": array}, bins=1)["a"], expected(array, 1), 200.0)


def test_bfloat16_and_small_floats() -> None:
    values = np.array([0.0, 1.5, -2.0, 4.0], np.float32)
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        row = pt.stats({"a": jnp.asarray(values).astype(dtype)})["a"]
        check(row, expected(values), 4.0)


def test_numpys_64_bits_are_not_lost() -> None:
    tree = pt.from_tree(
        {"f": np.array([1e300, -1e300, 1.0]), "i": np.array([2**53, 0]), "s": np.float32(1)}
    )
    report = pt.stats(tree)
    assert report["f"]["max"] == 1e300 and report["f"]["inf"] == 0
    assert report["i"]["max"] == 2.0**53
    assert report.dtypes == ("float64", "int64", "float32")
    assert not pt.find_nonfinite(tree)


def test_large_leaves_are_read_in_parallel_and_again_if_not_finite() -> None:
    rng = np.random.default_rng(0)
    arrays_ = {f"l{i}": rng.standard_normal(4 * CHUNK + 9 * i).astype(np.float32) for i in range(6)}
    arrays_["l2"][5] = np.nan
    arrays_["l3"][-1] = np.inf
    arrays_["l4"] *= np.float32(1e30)  # its squares are not finite, its values are
    tree: dict[str, Any] = {name: jnp.asarray(array) for name, array in arrays_.items()}
    tree["l5"] = tree["l5"].astype(jnp.bfloat16)
    arrays_["l5"] = np.asarray(tree["l5"]).astype(np.float32)
    report = pt.stats(tree).to_dict()
    huge = report.pop("l4")
    for name, row in report.items():
        check(row, expected(arrays_[name]), 4.0)
    assert huge["max"] == arrays_["l4"].max() and huge["inf"] == huge["nan"] == 0


def test_a_deviation_far_from_zero_is_not_lost() -> None:
    array = np.random.default_rng(0).standard_normal(6 * CHUNK).astype(np.float32) + np.float32(4096)
    assert pt.stats({"a": jnp.asarray(array)})["a"]["std"] == pytest.approx(
        array.std(dtype=float), 1e-4
    )


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_tree_has_statistics_by_its_names(name: str) -> None:
    tree = CATALOGUE[name]()
    try:
        flat = pt.collect(tree)
    except pt.NameCollisionError:
        with pytest.raises(pt.NameCollisionError, match="is the name of both"):
            pt.stats(tree)
        return
    numbers = [n for n, a in flat.items() if hasattr(a, "dtype") and a.dtype.kind in "fiubcV"]
    assert [n for n in pt.stats(tree).names if n in numbers] == list(pt.stats(tree).names)
    assert repr(pt.stats(tree)) and pt.stats(tree)._repr_html_()


def test_a_tied_leaf_is_measured_once_and_a_hole_not() -> None:
    names = ("embed_weight", "block_a_w", "block_a_b", "decoder_bias")
    assert pt.stats(tied()).names == names
    assert pt.stats(with_holes(tied(), [1, 3])).names == names[1::2]
    assert pt.stats(tied().decoder).names == ("weight", "bias")


def test_a_pattern_and_a_kind_choose() -> None:
    net = pt.nn.Sequential(pt.nn.Dense(2), pt.nn.BatchNorm())
    params = pt.init(net, jax.random.key(0), jnp.ones((2, 3)))
    assert pt.stats(params, ".*weight").names == ("dense0_weight",)
    assert pt.stats(params, kind="state").names == ("batchnorm0_running_mean", "batchnorm0_running_var")


def test_a_jitted_step_returns_statistics_and_is_traced_once() -> None:
    traces = 0

    @jax.jit
    def step(params: Any) -> Any:
        nonlocal traces
        traces += 1
        return jax.tree.map(lambda leaf: leaf * 2, params), pt.stats(params, ".*w", bins=4)

    params = pt.from_tree({"a": {"w": jnp.arange(4.0)}, "b": jnp.ones(2)})
    after, inside = step(params)
    step(after)
    assert traces == 1
    assert inside.to_dict() == pt.stats(params, ".*w", bins=4).to_dict()


def test_statistics_work_under_cond() -> None:
    @jax.jit
    def step(params: Any, count: Any) -> Any:
        shapes = jax.eval_shape(pt.stats, params)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(count % 2 == 0, pt.stats, lambda _: nothing, params)

    params = pt.from_tree({"a": jnp.ones(3)})
    assert step(params, 2)["a"]["mean"] == 1.0
    assert step(params, 3)["a"]["mean"] == 0.0


def test_leaves_of_one_shape_share_a_compiled_function() -> None:
    from paramtree.inspect.measure import _of_leaf

    _of_leaf.clear_cache()
    tree = pt.from_tree({f"l{i}": {"w": jnp.full((3, 2), i), "b": jnp.zeros(3)} for i in range(20)})
    pt.stats(tree)
    pt.stats(jax.tree.map(lambda leaf: leaf + 1, tree))
    assert _of_leaf._cache_size() == 2


def test_an_optimisers_state_has_statistics_too() -> None:
    params = pt.from_tree({"a": {"w": jnp.ones(3)}})
    report = pt.stats(optax.trace(0.9).init(params))
    assert len(report.names) == 1 and report.names[0].endswith("a_w")


def test_shapes_have_no_statistics() -> None:
    shapes = pt.abstract(pt.nn.Dense(2), jnp.ones((1, 3)))
    with pytest.raises(
        pt.MismatchError,
        match="`weight` is only a shape, `bias` is only a shape: pass the tree from pt.init",
    ):
        pt.stats(shapes)
    with pytest.raises(pt.MismatchError, match="`weight` is only a shape"):
        pt.show(shapes, stats=True)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="bins must be a non-negative integer, but found -1"):
        pt.stats({"a": jnp.ones(2)}, bins=-1)
    with pytest.raises(ValueError, match="found 2.5"):
        pt.stats({"a": jnp.ones(2)}, bins=2.5)  # type: ignore[arg-type]
    with pytest.raises(pt.RuleError, match="stats: 'wieght' matches no name; the closest are weight"):
        pt.stats({"weight": jnp.ones(2)}, "wieght")
    with pytest.raises(pt.RuleError, match="find_nonfinite: 'wieght' matches no name"):
        pt.find_nonfinite({"weight": jnp.ones(2)}, "wieght")
    with pytest.raises(pt.RuleError, match="`weigth` is not among the names. Did you mean `weight`"):
        pt.stats({"weight": jnp.ones(2)})["weigth"]
    with pytest.raises(pt.RuleError, match="not a regular expression"):
        pt.stats({"weight": jnp.ones(2)}, "(")


def test_non_numeric_leaves_are_left_out() -> None:
    tree = pt.from_tree(
        {"key": jax.random.key(0), "f": jax.nn.relu, "s": "text", "n": 3, "a": jnp.ones(2)}
    )
    assert pt.stats(tree).names == ("n", "a")
    assert pt.stats({}).names == ()
    assert pt.stats({}, bins=3).histogram.shape == (0, 3)


def test_leaves_with_bad_values_are_found_and_counted() -> None:
    tree = pt.from_tree(
        {
            "a": jnp.array([1.0, jnp.nan, jnp.inf]),
            "b": jnp.ones((2, 2)),
            "c": jnp.full((2, 2), -jnp.inf),
        }
    )
    report = pt.find_nonfinite(tree)
    assert report
    assert report.to_dict() == {
        "a": {"size": 3, "nan": 1, "inf": 1},
        "c": {"size": 4, "nan": 0, "inf": 4},
    }
    assert repr(report).startswith("Not finite: 2 of 3 leaves\n")
    fine = pt.find_nonfinite(tree, "b")
    assert not fine and repr(fine) == "Not finite: 0 of 1 leaf"
    assert fine.to_dict() == {}


def test_values_that_are_traced_cannot_be_reported_but_statistics_can() -> None:
    def check(tree: Any) -> Any:
        with pytest.raises(TypeError, match="return pt.stats.tree. from the function"):
            pt.find_nonfinite(tree)
        with pytest.raises(TypeError, match="Leave out stats=True"):
            pt.show(tree, stats=True)
        assert repr(pt.stats(tree)) == "Statistics of 1 leaf, traced"
        return pt.stats(tree)

    assert jax.jit(check)({"a": jnp.array([jnp.nan])}).nan.tolist() == [1]


def test_statistics_of_many_steps_can_be_stacked() -> None:
    params = pt.from_tree({"a": jnp.arange(3.0), "b": {"w": jnp.ones(2)}})

    def step(tree: Any, _: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * 2, tree), pt.stats(tree, bins=2)

    _, log = jax.lax.scan(step, params, None, 3)
    assert log["a"]["max"] == [2.0, 4.0, 8.0]
    assert log.to_dict()["b_w"]["mean"] == [1.0, 2.0, 4.0]
    assert log["a"]["histogram"] == [[1, 2]] * 3
    assert repr(log).startswith("Statistics of 2 leaves at 3 steps; the last is shown\n")
    last = jax.tree.map(lambda leaf: leaf * 4, params)
    assert repr(log).splitlines()[1:] == repr(pt.stats(last, bins=2)).splitlines()[1:]


def test_python_numbers_are_measured_and_donated_arrays_are_named() -> None:
    assert pt.find_nonfinite({"loss": float("nan"), "x": jnp.ones(2)}).to_dict()["loss"]["nan"] == 1
    gone = jnp.ones(3)
    gone.delete()
    for check in (pt.stats, pt.find_nonfinite, lambda tree: pt.show(tree, stats=True)):
        with pytest.raises(
            pt.MismatchError, match="`b_w` was donated to a jitted function, or deleted"
        ):
            check({"a": jnp.ones(2), "b": {"w": gone}})
