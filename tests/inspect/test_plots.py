"""Plots agree with numpy on the same arrays, and leave no figure open."""

import io
import pickle
import struct
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as pyplot
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import paramtree as pt
from paramtree.core.tree import place_of
from paramtree.inspect.tiling import arranged, extremes, tiled
from tests.catalogue import CATALOGUE, leaf, trees
from tests.helpers import x64

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def drawn(figure: Any) -> Any:
    """Returns a figure after laying out and drawing everything in it once."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


def titles(figure: Any) -> list[str]:
    return [axes.get_title("left").replace("\n", "") for axes in figure.axes]


def notes(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def bars(axes: Any) -> tuple[np.ndarray, np.ndarray]:
    values, edges, _ = axes.patches[0].get_data()
    return values, edges


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Any:
    yield
    assert pyplot.get_fignums() == []


# Histograms


@pytest.mark.parametrize("shape", [(1000,), (16, 3, 5, 5), (40, 7), (5,)])
@pytest.mark.parametrize("bins", [None, 1, 17])
def test_bars_match_numpy(shape, bins) -> None:
    values = normal(*shape)
    figure = pt.plots.histograms({"w": jnp.asarray(values)}, bins=bins)
    counts, edges = bars(figure.axes[0])
    expected, at = np.histogram(values.astype(np.float64), len(counts))
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(edges, at, rtol=1e-12)
    assert len(counts) == (bins or min(60, max(5, int(np.ceil(2 * np.sqrt(values.size))))))


@pytest.mark.parametrize("name", CATALOGUE)
def test_each_stored_leaf_has_one_panel_in_order(name) -> None:
    tree = CATALOGUE[name]()
    flat = pt.collect(tree, sep="/")
    if not len(flat):
        with pytest.raises(
            pt.RuleError, match="histograms: the tree has no arrays with values to draw"
        ):
            pt.plots.histograms(tree)
        return
    place = [*place_of(tree)]
    for draw, most in ((pt.plots.histograms, 80), (pt.plots.heatmap, 80)):
        figure = draw(tree, sep="/", panels=most)
        assert len(figure.axes) == len(flat)
        names = ["/".join([*place, path]) for path in flat]
        assert [t for t, full in zip(titles(figure), names, strict=True) if len(full) <= 100] == [
            full for full in names if len(full) <= 100
        ]
        assert [notes(axes)[0] for axes in figure.axes] == [str(x.shape) for x in flat.values()]


def test_a_view_is_titled_by_its_place_in_the_model() -> None:
    tree = pt.from_tree({"net": {"dense0": {"weight": leaf(1, (2, 2))}}})
    assert titles(pt.plots.heatmap(tree.net.dense0, "weight")) == ["net_dense0_weight"]
    assert titles(pt.plots.histograms(tree.net, sep="/")) == ["net/dense0/weight"]


def test_non_finite_values_are_counted_and_not_drawn() -> None:
    assert notes(pt.plots.heatmap({"w": np.array([1.7e308 + 1.7e308j])}).axes[0]) == [
        "(1,), absolute values, 1 inf"
    ]
    values = np.array([1.0, 2.0, 3.0, np.nan, np.nan, np.inf, -np.inf, 1.7e308], np.float64)
    figure = pt.plots.histograms({"w": values, "x": values[3:]})
    counts, edges = bars(figure.axes[0])
    assert counts.sum() == 3 and (edges[0], edges[-1]) == (1, 3)
    assert notes(figure.axes[0]) == ["(8,), 2 nan, 3 inf"]
    assert notes(figure.axes[1]) == ["(5,), 2 nan, 3 inf", "nothing finite"]
    assert not figure.axes[1].patches
    drawn(figure)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (np.zeros(4), -0.5, 0.5),
        (np.full(4, 42.0), 21, 63),
        (np.float32(-2), -3, -1),
        (np.array([1e-310, 3e-310]), -0.5, 0.5),
        (np.array([1, 1 + 2e-16]), 0.5, 1.5),
    ],
)
def test_equal_values_are_one_bar_around_them(values, low, high) -> None:
    counts, edges = bars(drawn(pt.plots.histograms({"w": values})).axes[0])
    assert counts.tolist() == [np.size(values)]
    np.testing.assert_allclose(edges, [low, high])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([True, False, True]), [1.0, 0, 1]),
        (np.array([-(2**63), 2**63 - 1]), [-(2.0**63), 2.0**63]),
        (np.array([3 + 4j, 0]), [5.0, 0]),
        (jnp.array([1, 2.5], jnp.bfloat16), [1.0, 2.5]),
        (jnp.array([0.5, 2], jnp.float8_e4m3fn), [0.5, 2.0]),
        (np.array([6e4, -6e4], np.float16), [6e4, -6e4]),
        (3.5, [3.5]),
        (np.array([3.4e38, -3.4e38], np.float32), [3.4e38, -3.4e38]),
    ],
    ids=str,
)
def test_all_numeric_dtypes(array, expected) -> None:
    figure = drawn(pt.plots.histograms({"w": array} if np.ndim(array) else pt.from_tree({"w": array})))
    counts, edges = bars(figure.axes[0])
    if len(expected) > 1:
        np.testing.assert_allclose([edges[0], edges[-1]], sorted(expected)[:: len(expected) - 1])
    assert counts.sum() == len(expected)
    image = drawn(pt.plots.heatmap(pt.from_tree({"w": array}))).axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), [expected], rtol=1e-6)
    np.testing.assert_allclose(image.get_clim(), np.array([-1, 1]) * np.abs(expected).max())


def test_empty_leaves_are_marked_and_keys_skipped() -> None:
    tree = {"a": jnp.zeros((0, 3)), "b": jax.random.key(0), "c": jnp.zeros((2, 0, 3))}
    for draw in (pt.plots.histograms, pt.plots.heatmap):
        figure = drawn(draw(tree))
        assert titles(figure) == ["a", "c"]
        assert [notes(axes)[-1] for axes in figure.axes] == ["no values", "no values"]


def test_gradients_are_drawn_next_to_their_parameters() -> None:
    tree = jax.tree.map(lambda x: x + 1, CATALOGUE["kinds"]())
    grads = pt.grad(lambda p: (p.bn.gamma**2).sum())(tree)
    figure = pt.plots.histograms(tree, grads=grads)
    assert titles(figure) == ["bn_gamma", "", "bn_mean", "", "bn_var", ""]
    assert [axes.axison for axes in figure.axes] == [True, True, True, False, True, False]
    assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["value", "gradient"]
    (_, of_value), (_, of_gradient) = bars(figure.axes[0]), bars(figure.axes[1])
    np.testing.assert_allclose(of_gradient, 2 * of_value)  # around 2 * gamma, half as wide as that
    assert [axes.patches[0].get_facecolor() for axes in figure.axes[:2]] == [
        pytest.approx((0, 0x72 / 255, 0xB2 / 255, 1)),
        pytest.approx((0xD5 / 255, 0x5E / 255, 0, 1)),
    ]


def test_the_gradient_of_a_tied_leaf_is_found_under_each_name() -> None:
    tree = CATALOGUE["tied across levels"]()
    grads = jax.grad(lambda p: (p.decoder.weight**2).sum())(tree)
    figure = pt.plots.histograms(tree, "decoder_.*", grads=grads)
    assert titles(figure)[::2] == ["decoder_weight", "decoder_bias"]
    loose = jax.tree.map(jnp.asarray, pt.untie(tree)).to_dict()
    assert titles(pt.plots.histograms(tree, grads=loose))[::2] == list(pt.collect(tree))


def test_gradients_of_another_tree_are_refused() -> None:
    tree = {"a": np.ones(2), "b": np.ones((2, 3)), "n": np.ones(2, int)}
    message = (
        r"grads does not match the tree. `b` has shape \(2, 3\), its gradient \(3, 2\). "
        r"`weight` is not in the tree."
    )
    with pytest.raises(pt.MismatchError, match=message):
        pt.plots.histograms(tree, grads={"a": np.ones(2), "b": np.ones((3, 2)), "weight": np.ones(2)})
    with pytest.raises(pt.MismatchError, match="has no gradient for any of the leaves: .* are a."):
        pt.plots.histograms(tree, "a", grads={"b": np.ones((2, 3))})
    zero = np.zeros(2, jax.dtypes.float0)
    with pytest.raises(pt.MismatchError, match="has no gradient for any of the leaves"):
        pt.plots.histograms(tree, "n", grads={"n": zero})
    figure = pt.plots.histograms(tree, "[an]", grads={"a": np.ones(2), "n": zero})
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]


def test_counts_may_be_logarithmic() -> None:
    figure = drawn(pt.plots.histograms({"w": np.append(np.zeros(999), 1.0)}, log=True, bins=2))
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylim() == (0.5, 2 * 999)


# Ratios


def tree_of(scale: float) -> pt.ParamTree:
    layers = {
        f"dense{i}": {"weight": normal(3, 2) * scale, "bias": normal(3) * scale} for i in range(11)
    }
    return jax.tree.map(jnp.asarray, pt.from_tree(layers))


def test_ratios_are_ratios_of_norms_in_tree_order() -> None:
    params, updates = tree_of(1), tree_of(1e-3)
    ratios = jax.jit(pt.update_ratios)(params, updates)
    assert list(ratios) == list(pt.collect(params)) and list(ratios)[4:6] == [
        "dense2_weight",
        "dense2_bias",
    ]
    for name, ratio in ratios.items():
        norms = [np.linalg.norm(np.asarray(pt.collect(t)[name]).ravel()) for t in (updates, params)]
        np.testing.assert_allclose(ratio, norms[0] / norms[1], rtol=1e-5)
    assert list(pt.update_ratios(params, updates, "dense1_.*")) == ["dense1_weight", "dense1_bias"]
    assert list(pt.update_ratios(params, updates, "dense1_.*", sep="/")) == [
        "dense1/weight",
        "dense1/bias",
    ]


@given(trees())
@settings(max_examples=30)
def test_the_ratio_of_a_scaled_tree_is_the_scale(tree) -> None:
    grown = jax.tree.map(lambda x: jnp.abs(jnp.asarray(x).astype(jnp.float32)) + 1, tree)
    share = jax.tree.map(lambda x: x / 4, grown)
    ratios = pt.update_ratios(grown, share, sep="/")
    assert list(ratios) == list(pt.collect(tree, sep="/"))
    for (name, ratio), x in zip(ratios.items(), pt.collect(tree, sep="/").values(), strict=True):
        np.testing.assert_allclose(ratio, 0.25 if np.size(x) else 0, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("update", "weight", "ratio"),
    [
        (np.zeros(3), np.zeros(3), 0),
        (np.zeros(3), np.ones(3), 0),
        (np.ones(3), np.zeros(3), np.inf),
        (np.full(3, 1e-30), np.full(3, 1e-27), 1e-3),  # the squares would be 0
        (np.full(3, 1e30), np.full(3, 1e33), 1e-3),  # and here infinite
        (np.full(3, np.nan), np.ones(3), np.nan),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0),
        (np.float32(2), np.float32(-4), 0.5),
    ],
)
def test_ratios_at_the_edges(update, weight, ratio) -> None:
    params, updates = {"w": jnp.asarray(weight, jnp.float32)}, {"w": jnp.asarray(update, jnp.float32)}
    np.testing.assert_allclose(pt.update_ratios(params, updates)["w"], ratio, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(pt.update_ratios)(params, updates)["w"], ratio, rtol=1e-6)


def test_zeros_produce_no_intermediate_nan() -> None:
    with jax.debug_nans(True):
        assert pt.update_ratios({"w": jnp.zeros(2)}, {"w": jnp.zeros(2)})["w"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "complex64"])
def test_ratios_of_other_dtypes(dtype) -> None:
    ratio = pt.update_ratios({"w": jnp.full(4, 2, dtype)}, {"w": jnp.full(4, 0.5, "float32")})["w"]
    assert ratio.dtype == jnp.float32 and ratio == 0.25
    with x64():
        wide = pt.update_ratios({"w": jnp.full(4, 2.0, dtype)}, {"w": np.full(4, 0.5)})["w"]
    assert wide.dtype == np.float64 and np.asarray(wide) == 0.25


def test_only_floating_point_leaves_have_ratios() -> None:
    tree = {"w": jnp.ones(2), "n": jnp.arange(2), "key": jax.random.key(0), "b": jnp.ones(3)}
    updates = {"w": jnp.ones(2), "n": np.zeros(2, jax.dtypes.float0), "key": None, "b": None}
    assert list(pt.update_ratios(tree, updates)) == ["w"]
    params = CATALOGUE["kinds"]()
    grads = pt.grad(lambda p: p.bn.gamma.sum())(params)
    tx = optax.sgd(0.5)
    part = pt.select(params, kind="param")
    moved, _ = tx.update(grads, tx.init(part), part)
    assert pt.update_ratios(params, moved).to_dict() == {"bn_gamma": np.inf}  # gamma is 0 there


def test_a_tied_leaf_has_one_ratio() -> None:
    tree = CATALOGUE["tied across levels"]()
    assert list(pt.update_ratios(tree, tree)) == list(pt.collect(tree))
    assert list(pt.update_ratios(tree, tree, "decoder_w.*")) == ["decoder_weight"]
    loose = pt.untie(tree)
    assert list(pt.update_ratios(tree, loose)) == list(pt.collect(loose))


def test_updates_of_another_tree_are_refused() -> None:
    message = (
        r"update_ratios: `dense_wieght` is not in params. Did you mean `dense_weight`\? "
        r"`x` has shape \(2,\) in params, but its update has \(3,\). Pass the params and updates of one step"
    )
    params = {"dense": {"weight": np.ones(2)}, "x": np.ones(2)}
    with pytest.raises(pt.MismatchError, match=message):
        pt.update_ratios(params, {"dense": {"wieght": np.ones(2)}, "x": np.ones(3)})
    with pytest.raises(pt.RuleError, match="'y' matches no name"):
        pt.update_ratios(params, params, "y")
    with pytest.raises(pt.MismatchError, match=r"`a\\x1b` is not in params"):
        pt.update_ratios(params, {"a\x1b": np.ones(2)})


def test_a_step_that_returns_ratios_is_traced_once_and_its_history_is_drawn() -> None:
    traces = []

    @jax.jit
    def step(params: Any) -> Any:
        traces.append(1)
        updates = jax.tree.map(lambda x: -0.01 * x, params)
        return optax.apply_updates(params, updates), pt.update_ratios(params, updates)

    params, history = tree_of(1), []
    for _ in range(4):
        params, ratios = step(params)
        history.append(ratios)
    assert len(traces) == 1
    figure = drawn(pt.plots.update_ratios(history, ".*[0-9]_weight"))
    lines = figure.axes[0].lines
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"dense{i}_weight" for i in range(11)
    ]
    assert len(lines) == 12
    for line in lines[1:]:
        assert line.get_xdata().tolist() == [1, 2, 3, 4]
        np.testing.assert_allclose(line.get_ydata(), 0.01, rtol=1e-5)
    assert set(lines[0].get_ydata()) == {1e-3} and figure.axes[0].get_yscale() == "log"
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12

    _, stacked = jax.lax.scan(lambda p, _: step(p), tree_of(1), None, length=4)
    both = [drawn(pt.plots.update_ratios(h, steps=[0, 10, 20, 30])) for h in (stacked, history)]
    for line, same in zip(both[0].axes[0].lines, both[1].axes[0].lines, strict=True):
        np.testing.assert_allclose(line.get_ydata(), same.get_ydata(), rtol=1e-5)
        np.testing.assert_array_equal(line.get_xdata(), same.get_xdata())
    assert both[0].axes[0].lines[1].get_xdata().tolist() == [0, 10, 20, 30]


def test_many_lines_are_coloured_in_their_order() -> None:
    names = [f"layer{i}_$w$" for i in range(40)]
    figure = drawn(pt.plots.update_ratios([dict.fromkeys(names, 1e-3), dict.fromkeys(names, 2e-3)]))
    assert not figure.legends
    axes, bar = figure.axes
    assert len({line.get_color() for line in axes.lines[1:]}) == 40
    shown = notes(bar)
    assert shown[0] == names[0] and shown[-1] == names[-1]
    assert shown == sorted(shown, key=names.index) and len(shown) == 12


def test_values_without_a_logarithm_are_gaps() -> None:
    history = [{"a": 0.0, "b": np.inf}, {"a": 0.1, "b": np.nan}, {"b": -1.0}, {"a": 0.2, "c": 1e-9}]
    figure = drawn(pt.plots.update_ratios(history))
    lines = figure.axes[0].lines[1:]
    np.testing.assert_array_equal(lines[0].get_ydata(), [np.nan, 0.1, np.nan, 0.2])
    assert np.isnan(lines[1].get_ydata()).all()
    np.testing.assert_array_equal(lines[2].get_ydata(), [np.nan] * 3 + [1e-9])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b (none above 0)", "c"]
    low, high = figure.axes[0].get_ylim()
    assert low < 1e-9 and high > 0.2


def test_one_step_is_drawn_as_points() -> None:
    for history in ([{"a": 1e-3}], {"a": [1e-3]}):
        line = drawn(pt.plots.update_ratios(history)).axes[0].lines[1]
        assert line.get_marker() == "." and line.get_ydata().tolist() == [1e-3]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "the history is empty"),
        ([{}], "the history is empty"),
        ({}, "the history is empty"),
        (3, "must be a list of the results of pt.update_ratios, but found 3"),
        ("abc", "but found 'abc'"),
        ([1.0], "each element .* a mapping of names to numbers, but 1 are not, such as 1.0"),
        ([{"a": np.ones(2)}, {"a": np.ones(3)}], "`a` is "),
        ([{"a": 1.0}, {"a": "x"}], r"`a` is \[1.0, 'x'\]"),
        ({"a": 1.0}, "`a` is 1.0"),
        ({"a": [1.0], "b": [1.0, 2.0]}, "its arrays have 1 and 2 steps"),
        ({"a": [], "b": [1j]}, r"`a` is .*; `b` is "),
    ],
)
def test_a_history_of_something_else_is_refused(history, message) -> None:
    with pytest.raises(pt.MismatchError, match=f"update_ratios: .*{message}"):
        pt.plots.update_ratios(history)


@pytest.mark.parametrize("steps", [[1], [1, np.nan], ["a", "b"], [[1, 2]], 2, [1j, 2]])
def test_bad_steps_are_refused(steps) -> None:
    with pytest.raises(pt.MismatchError, match="steps must be 2 finite numbers, one per element"):
        pt.plots.update_ratios([{"a": 1.0}, {"a": 2.0}], steps=steps)


# Heat maps


def test_the_colours_of_a_heat_map_are_symmetric_about_zero() -> None:
    values = normal(6, 4) + 5
    figure = drawn(pt.plots.heatmap({"w": values}))
    axes = figure.axes[0]
    image = axes.images[0]
    np.testing.assert_array_equal(image.get_array(), values)
    np.testing.assert_allclose(image.get_clim(), [-values.max(), values.max()])
    middle = image.cmap(image.norm(0))
    assert all(abs(channel - middle[0]) < 0.01 for channel in middle[:3])  # white, or nearly
    blue, red = image.cmap(0.0), image.cmap(1.0)
    assert blue[2] > 2 * blue[0] and red[0] > 2 * red[2]
    assert axes.yaxis_inverted()  # row 0 is at the top
    assert axes.get_box_aspect() == pytest.approx(1.3)
    assert len(axes.child_axes) == 1  # the scale


def test_a_limit_holds_for_all_leaves() -> None:
    figure = drawn(pt.plots.heatmap({"a": normal(3, 3), "b": 9 * normal(3, 3)}, limit=0.5))
    assert [axes.images[0].get_clim() for axes in figure.axes] == [(-0.5, 0.5)] * 2
    assert drawn(pt.plots.heatmap({"z": np.zeros((2, 2))})).axes[0].images[0].get_clim() == (-1, 1)


def test_non_finite_cells_are_yellow() -> None:
    values = normal(4, 5)
    values[1, 2], values[3, 0] = np.nan, -np.inf
    axes = drawn(pt.plots.heatmap({"w": values})).axes[0]
    base, over = axes.images
    assert np.isfinite(np.asarray(base.get_array())).all()
    assert np.argwhere(~np.ma.getmaskarray(over.get_array())).tolist() == [[1, 2], [3, 0]]
    assert over.cmap(0)[:3] == pytest.approx((0xF0 / 255, 0xE4 / 255, 0x42 / 255))
    assert notes(axes) == ["(4, 5), 1 nan, 1 inf"]
    assert notes(drawn(pt.plots.heatmap({"w": np.full((2, 2), np.nan)})).axes[0]) == ["(2, 2), 4 nan"]


def test_a_single_array_is_drawn_too() -> None:
    assert (
        drawn(pt.plots.heatmap(jnp.eye(3))).axes[0].images[0].get_array().tolist() == np.eye(3).tolist()
    )
    assert bars(pt.plots.histograms(jnp.arange(9.0)).axes[0])[0].sum() == 9


@pytest.mark.parametrize(
    ("shape", "cells"),
    [
        ((), (1, 1)),
        ((7,), (1, 7)),
        ((3, 4), (3, 4)),
        ((16, 1, 5, 5), (20, 20)),
        ((32, 16, 3, 3), (96, 48)),
        ((64, 3, 7, 7), (13 * 7, 5 * 3 * 7)),
        ((13, 1, 3, 3), (12, 12)),
        ((2, 96, 96), (96, 192)),
        ((8, 4, 3, 3, 3), (24, 36)),
    ],
)
def test_every_value_is_in_one_cell(shape, cells) -> None:
    values = np.arange(1, np.prod(shape, dtype=int) + 1).reshape(shape)
    tiles = tiled(values)
    assert tiles.cells.shape == cells == arranged(shape)[:2]
    there = np.ones(cells, bool) if tiles.there is None else tiles.there
    assert sorted(tiles.cells[there]) == sorted(values.ravel())
    if len(shape) > 2:
        height, width = shape[-2:]
        assert tiles.tile == (height, width)
        np.testing.assert_array_equal(tiles.cells[:height, :width], values[(0,) * (len(shape) - 2)])
        below = tiles.cells[height : 2 * height, :width]
        if cells[0] > height:
            np.testing.assert_array_equal(below, values[1][(0,) * (len(shape) - 3)])
    drawn(pt.plots.heatmap({"w": values.astype(np.float32)}))


def test_missing_tiles_are_blank() -> None:
    image = drawn(pt.plots.heatmap({"w": np.ones((13, 1, 3, 3))})).axes[0].images[0]
    assert np.ma.getmaskarray(image.get_array()).sum() == 3 * 9


def test_a_large_leaf_shows_the_extreme_of_each_block() -> None:
    values = np.zeros((1000, 3000), np.float32)
    values[777, 5], values[0, 2999] = -7, 3
    values[500, 1500] = np.nan
    axes = drawn(pt.plots.heatmap({"w": values})).axes[0]
    cells = np.asarray(axes.images[0].get_array())
    assert cells.shape == (250, 250) and cells[194, 0] == -7 and cells[0, 249] == 3
    assert np.count_nonzero(cells) == 2
    assert notes(axes) == ["(1000, 3000), extremes of 4 x 12, 1 nan"]
    assert np.argwhere(~np.ma.getmaskarray(axes.images[1].get_array())).tolist() == [[125, 125]]
    assert axes.images[0].get_extent() == [-0.5, 2999.5, 999.5, -0.5]


def test_extremes_match_numpy() -> None:
    values = normal(11, 7)
    cells, block = extremes(values, most=4)
    assert block == (3, 2) and cells.shape == (4, 4)
    for i, j in np.ndindex(4, 4):
        part = values[3 * i : 3 * i + 3, 2 * j : 2 * j + 2].ravel()
        assert cells[i, j] == part[np.abs(part).argmax()]


# Names, errors, figures


def test_names_are_drawn_literally() -> None:
    names = ["$\\frac{$", "a$b$c", "_hidden", "100%", "\\begin{x}", "<b>&", "#1~^{}"]
    tree = pt.from_tree(dict.fromkeys(names, np.ones((2, 2))))
    with pyplot.rc_context({"text.usetex": True}):  # which would run LaTeX on them
        figures = [
            pt.plots.histograms(tree),
            pt.plots.heatmap(tree),
            pt.plots.update_ratios([dict.fromkeys(names, 1.0)]),
        ]
        labels = figures[2].legends[0].get_texts()
    assert titles(figures[0]) == titles(figures[1]) == [text.get_text() for text in labels] == names
    for text in [*labels, *(axes._left_title for figure in figures[:2] for axes in figure.axes)]:
        assert not text.get_parse_math() and not text.get_usetex()
    with pyplot.rc_context({"text.usetex": False}):
        names = ["$\\frac{$", "a$b$c", "_hidden"]
        for draw in (pt.plots.histograms, pt.plots.heatmap):
            drawn(draw(pt.from_tree(dict.fromkeys(names, np.ones((2, 2))))))


def test_control_characters_and_very_long_names() -> None:
    tree = pt.from_tree({"a\x1b[31m\nb": np.ones(2), "long_" * 100: np.ones(2), "x" * 90: np.ones(2)})
    figure = drawn(pt.plots.histograms(tree))
    assert titles(figure)[0] == "a\\x1b[31m\\nb"
    assert titles(figure)[1].endswith("... (500 characters)")
    lines = [axes.get_title("left").split("\n") for axes in figure.axes]
    assert len(lines[1]) > 2 and all(len(line) <= 26 for title in lines for line in title)
    labels = pt.plots.update_ratios([dict.fromkeys(["long_" * 100 + "a", "long_" * 100 + "b"], 1.0)])
    assert len(labels.legends[0].get_texts()) == 2  # two lines though they look alike


DRAWN = [pt.plots.histograms, pt.plots.heatmap]


@pytest.mark.parametrize("draw", DRAWN)
def test_bad_calls_are_refused(draw) -> None:
    tree = pt.from_tree({"dense0": {"weight": np.ones((2, 2))}, "dense1": {"weight": np.ones((2, 2))}})
    with pytest.raises(
        pt.RuleError, match="'dense' matches no whole name, only a part of dense0_weight"
    ):
        draw(tree, "dense")
    with pytest.raises(pt.RuleError, match=r"'\(' is not a regular expression"):
        draw(tree, "(")
    with pytest.raises(pt.RuleError, match="a figure holds at most 1 leaves, but 2 match: .* panels=2"):
        draw(tree, panels=1)
    for panels in (0, True, 2.0, None):
        with pytest.raises(ValueError, match="panels must be a positive integer, not"):
            draw(tree, panels=panels)
    with pytest.raises(pt.RuleError, match=f"{draw.__name__}: the tree has no arrays of kind 'state'"):
        draw(tree, kind="state")
    with pytest.raises(pt.RuleError, match="'.*key' matches no arrays with values to draw"):
        draw({"key": jax.random.key(0)}, ".*key")
    with pytest.raises(ValueError, match="kind is 'param', 'state' or None"):
        draw(tree, kind="weights")
    with pytest.raises(pt.NameCollisionError, match='sep="/"'):
        draw(CATALOGUE["colliding names"]())


@pytest.mark.parametrize("bins", [0, -1, 2.5, True, "10"])
def test_bad_bins_are_refused(bins) -> None:
    with pytest.raises(ValueError, match="histograms: bins must be a positive integer, not"):
        pt.plots.histograms({"a": np.ones(2)}, bins=bins)


@pytest.mark.parametrize("limit", [0, -1.0, np.nan, np.inf, True, "1"])
def test_bad_limits_are_refused(limit) -> None:
    with pytest.raises(ValueError, match="heatmap: limit must be a positive number, not"):
        pt.plots.heatmap({"a": np.ones(2)}, limit=limit)


@pytest.mark.parametrize("draw", DRAWN)
def test_all_leaves_without_values_are_named(draw) -> None:
    donated = jnp.ones(2)
    donated.delete()
    tree = pt.from_tree(
        {
            "a": jax.ShapeDtypeStruct((2,), jnp.float32),
            "b": donated,
            "c": "text",
            "d": np.array(["x"]),
            "e": np.ones(2),
        }
    )
    message = (
        f"{draw.__name__}: some leaves have no values. `a` is only a shape: .*; `b` was donated .*: .*; "
        "`c` is not an array of numbers: 'text'; `d` is not an array of numbers: .*"
    )
    with pytest.raises(pt.MismatchError, match=message):
        draw(tree)
    with pytest.raises(pt.MismatchError, match="`w` is traced: draw it outside of jit"):
        jax.jit(lambda w: draw({"w": w}))(jnp.ones(2))


@pytest.mark.parametrize("call", [*DRAWN, lambda tree: pt.plots.update_ratios([tree])])
def test_without_matplotlib_the_error_says_what_to_install(call, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'paramtree\[plots\]'"):
        call({"w": np.ones(())})


@pytest.mark.parametrize("count", [1, 5])
def test_a_figure_renders_at_its_size(count) -> None:
    tree = {f"w{i}": normal(4, 4) for i in range(count)}
    for figure in (
        pt.plots.histograms(tree),
        pt.plots.histograms(tree, grads=tree),
        pt.plots.heatmap(tree),
        pt.plots.update_ratios([dict.fromkeys(tree, 1.0)]),
    ):
        assert isinstance(figure, pyplot.Figure) and figure.get_figwidth() <= 7
        image = figure._repr_png_()
        width, height = struct.unpack(">II", image[16:24])
        assert (width, height) == tuple(int(inches * 150) for inches in figure.get_size_inches())


def test_pictures_are_deterministic_and_survive_pickling() -> None:
    tree = {"a": normal(4, 4), "b": normal(3)}
    image = pt.plots.heatmap(tree)._repr_png_()
    assert pt.plots.heatmap(tree)._repr_png_() == image
    assert pickle.loads(pickle.dumps(pt.plots.heatmap(tree)))._repr_png_() == image


def test_pyplot_is_not_loaded_and_matplotlib_only_for_a_picture() -> None:
    code = """if True:
        import sys
        import numpy as np
        import paramtree as pt
        draw = pt.plots.heatmap
        assert "matplotlib" not in sys.modules
        assert draw(np.eye(3))._repr_png_().startswith(b"\\x89PNG")
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ratios_say_which_leaves_have_no_values() -> None:
    gone = jnp.ones(2)
    gone.delete()
    params = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jnp.ones(2)}
    with pytest.raises(
        pt.MismatchError, match="`a` is only a shape in params.*The update of `b` was donated"
    ):
        pt.update_ratios(params, {"a": jnp.ones(2), "b": gone})


def test_swapped_arguments_are_an_error() -> None:
    with pytest.raises(
        pt.RuleError, match="a pattern is a regular expression in a string.*of type dict"
    ):
        pt.plots.heatmap("w", {"w": jnp.ones(2)})  # type: ignore[arg-type]
