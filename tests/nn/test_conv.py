"""Convolutions, pooling, resizing and activations; test_conv_torch.py compares them with PyTorch's."""

import dataclasses
import functools
import inspect
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

FIRST = {1: "NCW", 2: "NCHW", 3: "NCDHW"}
LAST = {1: "NWC", 2: "NHWC", 3: "NDHWC"}
CONVS = {1: nn.Conv1D, 2: nn.Conv2D, 3: nn.Conv3D}
TRANSPOSES = {1: nn.Conv1DTranspose, 2: nn.Conv2DTranspose, 3: nn.Conv3DTranspose}
EMPTY = pt.from_tree({})


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def ones(*shape, dtype="float32"):
    return jnp.asarray(np.ones(shape, dtype))


def close(a, b):
    """Checks for equality up to 1e-5 of the maximum."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max(initial=0)))


def in_layout(layer, x):
    """Returns a channels-first array in the layer's layout."""
    return np.moveaxis(x, 1, -1) if layer.layout.endswith("C") else x


def channels_first(layer, x):
    """Returns an array of the layer's layout as channels-first."""
    return np.moveaxis(np.asarray(x), -1, 1) if layer.layout.endswith("C") else np.asarray(x)


# Convolutions


def each(draw, rank, low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(rank))


@st.composite
def convolutions(draw, transposed=False):
    """Returns a rank, a channels-first input shape, and the settings of a convolution."""
    rank = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    settings = {
        "channels": groups * draw(st.integers(1, 2)),
        "kernel_size": each(draw, rank, 1, 3),
        "strides": each(draw, rank, 1, 3),
        "padding": each(draw, rank, 0, 3),
        "dilation": each(draw, rank, 1, 2),
        "groups": groups,
        "layout": draw(st.sampled_from([FIRST[rank], LAST[rank]])),
        "use_bias": draw(st.booleans()),
    }
    sizes = []
    for axis in range(rank):
        k, s, p, d = (settings[n][axis] for n in ("kernel_size", "strides", "padding", "dilation"))
        window = d * (k - 1) + 1
        # The minimum size that gives an output of size 1.
        least = 1 + max(-(-(2 * p + 1 - window) // s), 0) if transposed else max(window - 2 * p, 1)
        sizes.append(least + draw(st.integers(0, 3)))
    if transposed:
        pairs = zip(settings["strides"], settings["dilation"], strict=True)
        settings["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in pairs)
    return rank, (draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), *sizes), settings


@settings(max_examples=15)
@given(convolutions(), st.sampled_from(["same", "valid", "pairs"]))
def test_a_transposed_convolution_is_the_transpose(case, padding):
    rank, shape, given = case
    pairs = tuple((pad, pad // 2) for pad in given["padding"])
    given |= {"use_bias": False, "padding": pairs if padding == "pairs" else padding}
    sizes, more = [], []
    for n, k, s, d, (low, high) in zip(
        shape[2:], given["kernel_size"], given["strides"], given["dilation"], pairs, strict=True
    ):
        # The strategy makes n + 2 low at least a window. Entries beyond the last window do not affect
        # the output, so the transpose needs output_padding; "same" restores multiples of the stride.
        sizes.append({"same": n * s, "valid": n + 2 * low, "pairs": n + low - high}[padding])
        more.append(0 if padding == "same" else (n + 2 * low - d * (k - 1) - 1) % s)
    conv = CONVS[rank](**given)
    x = in_layout(conv, np.zeros((*shape[:2], *sizes), "float32"))
    weight = data(conv.channels, shape[1] // conv.groups, *conv.kernel_size)
    tree = pt.from_tree({"weight": weight})
    y = data(*jax.eval_shape(conv, tree, x).shape, seed=1)
    (expected,) = jax.jit(lambda y: jax.linear_transpose(lambda x: conv(tree, x), x)(y))(y)
    transposed = TRANSPOSES[rank](**given | {"channels": shape[1], "output_padding": tuple(more)})
    close(jax.jit(transposed)(tree, y), expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2), (2, 3), (5, 2), (1, 2)])
def test_same_padding_is_that_of_jax(kernel, stride):
    layer = nn.Conv1D(3, kernel, stride, "same", use_bias=False)
    back = nn.Conv1DTranspose(3, kernel, stride, "SAME", use_bias=False)
    x, weight = data(2, 7, 3), data(3, 3, kernel)
    tree = pt.from_tree({"weight": weight})
    y = layer(tree, x)
    assert y.shape == (2, -(-7 // stride), 3)
    numbers = ("NWC", "OIW", "NWC")
    close(y, jax.lax.conv_general_dilated(x, weight, (stride,), "SAME", dimension_numbers=numbers))
    y = back(tree, x)
    assert y.shape == (2, 7 * stride, 3)
    expected = jax.lax.conv_transpose(
        x, weight, (stride,), "SAME", dimension_numbers=numbers, transpose_kernel=True
    )
    close(y, expected)


MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # PyTorch's names, and numpy's


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("layer", "shape", "pads"),
    [
        (nn.Conv1D(2, 3, 2, ((4, 1),), 2), (2, 5, 3), [(4, 1)]),
        (nn.Conv2D(2, 3, 1, (1, 2), layout="NCHW"), (2, 3, 4, 3), [(1, 1), (2, 2)]),
        (nn.Conv2D(4, (2, 4), (1, 2), "same", groups=2), (1, 3, 5, 2), [(0, 1), (1, 2)]),
        (nn.Conv3D(2, (1, 2, 3), padding=(0, 1, 2)), (1, 2, 3, 3, 2), [(0, 0), (1, 1), (2, 2)]),
        (nn.DepthwiseConv2D(3, 1, 1, depth_multiplier=2), (1, 3, 4, 2), [(1, 1), (1, 1)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Layer) else "",
)
def test_what_a_convolution_pads_with(layer, shape, pads, mode, key):
    plain = dataclasses.replace(layer, padding=0)  # on what numpy pads
    layer = dataclasses.replace(layer, padding_mode=mode)
    x = data(*shape)
    axis = layer.layout.index("C")
    widths = [(0, 0), *pads]
    widths.insert(axis, (0, 0))
    rows = np.pad(np.arange(x.size).reshape(shape), widths, MODES[mode])
    params = jax.tree.map(lambda w: data(*w.shape, seed=1), pt.abstract(layer, x))

    @functools.partial(jax.jit, static_argnums=0)
    def run(layer, params, x):
        y, back = jax.vjp(layer, params, x)
        return y, *back(y**2)

    y, grads, grad = run(layer, params, x)
    expected, other, padded = run(plain, params, x.ravel()[rows])
    close(y, expected)
    jax.tree.map(close, grads, other)
    close(grad, np.bincount(rows.ravel(), np.asarray(padded).ravel(), x.size).reshape(shape))


def test_a_convolution_of_size_1_needs_no_padding(key):
    x = data(1, 3, 3, 2)
    layer = nn.Conv2D(4, 1, padding_mode="reflect")
    params = layer.init(key, x)
    close(layer(params, x), nn.Conv2D(4, 1)(params, x))


@pytest.mark.parametrize(
    ("mode", "padding", "shape", "text"),
    [
        (
            "reflect",
            3,
            (1, 3, 5, 1),
            r"size 3 by 2 at most, .* padding \(3, 3\) for axis 1 of shape \(1, 3,",
        ),
        (
            "reflect",
            (0, 5),
            (1, 3, 5, 1),
            r"size 5 by 4 at most, .* padding \(0, 5\) for axis 2 of shape",
        ),
        ("circular", ((0, 4), 0), (1, 3, 5, 1), r"size 3 by 3 at most, .*\(0, 4\), .* axis 1 of shape"),
        ("reflect", 1, (1, 1, 5, 1), "size 1 by 0 at most, "),
    ],
)
def test_padding_that_the_input_is_too_small_for(mode, padding, shape, text, key):
    net = nn.Sequential(nn.Conv2D(2, 1), nn.Conv2D(2, 2, 1, padding, padding_mode=mode))
    with pytest.raises(ValueError, match=f"Conv2D.* of `conv1`: padding_mode='{mode}' .* {text}"):
        net.init(key, ones(*shape))
    for advised in ("replicate", "zeros"):
        nn.Conv2D(2, 2, 1, padding, padding_mode=advised).init(key, ones(*shape))
    layer = nn.Conv2D(2, 2, 1, padding, padding_mode=mode)
    layer.init(key, ones(1, 6, 6, 1))
    with pytest.raises(ValueError, match=rf"padding_mode={mode}\): padding_mode="):  # of no level
        layer.init(key, ones(*shape))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_depthwise_convolution_is_one_of_each_channel(layout):
    layer = nn.DepthwiseConv2D(2, depth_multiplier=3, layout=layout, activation="tanh")
    x = data(2, 4, 5, 3) if layout == "NHWC" else data(2, 3, 4, 5)
    params = pt.from_tree({"weight": data(9, 1, 2, 2), "bias": data(9, seed=1)})
    assert pt.abstract(layer, x).weight.shape == params.weight.shape
    axis = layout.index("C")
    single = nn.Conv2D(3, 2, layout=layout, activation="tanh")
    each = [
        single(jax.tree.map(lambda w, i=i: w[3 * i : 3 * i + 3], params), x.take([i], axis))
        for i in range(3)
    ]
    close(layer(params, x), np.concatenate(each, axis))
    whole = nn.Conv2D(9, 2, groups=3, layout=layout, activation="tanh")
    one, other = pt.abstract(layer, x), pt.abstract(whole, x)
    assert jax.tree.structure(one) == jax.tree.structure(
        other
    )  # so files of one are those of the other
    assert jax.tree.leaves(one) == jax.tree.leaves(other)
    close(whole(params, x), layer(params, x))


def test_a_separable_convolution_is_two(key):
    layer = nn.SeparableConv2D(
        4, 3, 2, 1, depth_multiplier=2, activation="relu", bias_initializer="normal"
    )
    x = data(2, 5, 6, 3)
    params = layer.init(key, x)
    assert list(pt.collect(params)) == ["depthwise_weight", "pointwise_weight", "pointwise_bias"]
    net = nn.Sequential(
        nn.DepthwiseConv2D(3, 2, 1, depth_multiplier=2, use_bias=False),
        nn.Conv2D(4, 1, activation="relu"),
    )
    other = pt.from_tree({"conv0": params.depthwise, "conv1": params.pointwise})
    close(layer(params, x), net(other, x))
    assert np.any(layer(params, x) == 0) and np.any(layer(params, x) != 0)


def test_a_depthwise_kernel_is_scaled_by_its_own_inputs(key):
    x = jax.ShapeDtypeStruct((1, 8, 8, 512), "float32")
    weight = nn.DepthwiseConv2D(3, weight_initializer="lecun_normal").init(key, x).weight
    assert abs(np.std(weight) - 1 / 3) < 0.02  # one channel of 3 x 3
    params = nn.SeparableConv2D(64, 3, weight_initializer="lecun_normal").init(key, x)
    assert abs(np.std(params.depthwise.weight) - 1 / 3) < 0.02
    assert abs(np.std(params.pointwise.weight) - 512**-0.5) < 0.002


# Pooling


def test_the_greatest_of_booleans():
    x = np.array([False, False, True, False, True, True]).reshape(1, 6, 1)
    assert nn.MaxPool1D(padding=1)(EMPTY, x).ravel().tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bfloat16", "float16"])
def test_the_greatest_of_other_dtypes(dtype):
    x = np.arange(16).reshape(1, 4, 4, 1) - (0 if dtype == "uint8" else 20)
    x = jnp.asarray(x, dtype)
    y = jax.jit(nn.MaxPool2D(2, padding=1))(EMPTY, x)
    assert y.dtype == dtype
    ends = np.ix_([0, 2, 3], [0, 2, 3])  # the last entry of each window, which is the maximum
    np.testing.assert_array_equal(y[0, :, :, 0], np.asarray(x)[0, :, :, 0][ends])
    y = nn.GlobalMaxPool2D()(EMPTY, x)
    assert y.dtype == dtype
    assert y.item() == x.max()


@pytest.mark.parametrize("layer", [nn.AvgPool1D(4096), nn.GlobalAvgPool1D()], ids=repr)
def test_means_of_half_precision_are_exact(layer):
    for dtype in ("bfloat16", "float16"):
        x = ones(1, 4096, 2, dtype=dtype) * jnp.asarray(17, dtype)
        y = layer(EMPTY, x)
        assert y.dtype == dtype
        assert (y == 17).all()


@pytest.mark.parametrize("layer", [nn.AvgPool2D(), nn.GlobalAvgPool2D()], ids=repr)
def test_means_of_integers(layer):
    x = ones(1, 2, 2, 1, dtype="int32")
    with pytest.raises(TypeError, match="floating-point numbers to average, .* int32: cast .* float32"):
        layer(EMPTY, x)
    assert layer(EMPTY, x.astype("float32")).item() == 1  # what the text says to do


@pytest.mark.parametrize("layer", [nn.MaxPool1D(), nn.AvgPool1D(), nn.GlobalMaxPool1D()], ids=repr)
@pytest.mark.parametrize("pair", [(0, np.nan), (np.nan, 0), (np.nan, np.nan)], ids=str)
def test_pooling_shows_nan(layer, pair):
    x = np.array([*pair, 1, 2], "float32").reshape(1, 4, 1)
    y = layer(EMPTY, x).ravel()
    assert np.isnan(y[0]) and not np.isnan(y[1:]).any()


def windows_of(layer, x):
    """Returns the positions of the entries of each window, in row-major order, by window."""
    batch, *sizes, channels = x.shape
    _, *counts, _ = jax.eval_shape(lambda x: layer(EMPTY, x), x).shape
    found = {}
    for place in np.ndindex(batch, *counts, channels):
        axes = []
        for i, size in enumerate(sizes):
            start = place[1 + i] * layer.strides[i] - layer.padding[i][0]
            axes.append(range(max(start, 0), min(start + layer.pool_size[i], size)))
        found[place] = [(place[0], *entry, place[-1]) for entry in itertools.product(*axes)]
    return found


MAX_POOLS = [
    (nn.MaxPool1D(), 5),
    (nn.MaxPool1D(9), 20),  # by lax.reduce_window
    (nn.MaxPool1D(9, 1, 4), 12),
    (nn.MaxPool1D(17, 1), 20),  # by lax.reduce_window
    (nn.MaxPool2D(), 6, 5),
    (nn.MaxPool2D(3, 2, 1), 8, 7),
    (nn.MaxPool2D((2, 3), (3, 1), ((0, 1), (2, 0)), ceil_mode=True), 6, 6),
    (nn.MaxPool3D(2, (2, 1, 2)), 4, 3, 4),
]


@pytest.mark.parametrize("case", MAX_POOLS, ids=lambda case: repr(case[0]))
def test_the_first_of_equal_entries_gets_the_gradient(case):
    layer, *sizes = case
    x = np.random.default_rng(0).integers(0, 3, (2, *sizes, 2)).astype("float32")  # many are equal
    y = np.asarray(layer(EMPTY, x))
    slope = data(*y.shape, seed=1)
    grad = jax.jit(lambda x, slope: jax.vjp(lambda x: layer(EMPTY, x), x)[1](slope)[0])(x, slope)
    expected = np.zeros_like(x)
    for place, entries in windows_of(layer, x).items():
        first = entries[np.argmax([x[entry] for entry in entries])]
        assert y[place] == x[first]
        expected[first] += slope[place]
    close(grad, expected)


def test_maxima_have_derivatives_of_every_kind():
    layer = nn.MaxPool1D(3, 2, 1)
    x, tangent = np.random.default_rng(0).integers(0, 3, (2, 8, 2)).astype("float32"), data(2, 8, 2)

    @jax.jit
    def derivatives(x, tangent):
        def f(x):
            return (layer(EMPTY, x) ** 3).sum()

        pool = functools.partial(layer, EMPTY)
        y, moved = jax.jvp(pool, (x,), (tangent,))
        (expected,) = jax.vjp(pool, x)[1](6 * y * moved)
        first = jax.jvp(f, (x,), (tangent,))[1], (jax.grad(f)(x) * tangent).sum()
        second = jax.jvp(jax.grad(f), (x,), (tangent,))[1], expected
        mapped = jax.vmap(jax.grad(lambda x: f(x[None])))(x), jax.grad(f)(x)
        return first, second, mapped

    for found, expected in derivatives(x, tangent):
        close(found, expected)


def test_all_maxima_of_a_global_pool_share_the_gradient():
    grad = jax.grad(lambda x: nn.GlobalMaxPool1D()(EMPTY, x).sum())(ones(1, 4, 1))
    assert grad.ravel().tolist() == [0.25] * 4


# Resizing


@pytest.mark.parametrize("s", [2, 3, 4])
def test_a_transposed_convolution_can_start_as_bilinear(s, key):
    layer = nn.Conv2DTranspose(
        2,
        2 * s - s % 2,
        s,
        s // 2,
        groups=2,
        use_bias=False,
        weight_initializer=init.Bilinear(),
    )
    x = data(1, 5, 6, 2)
    params = layer.init(key, x)
    y, expected = layer(params, x), nn.Bilinear(s)(EMPTY, x)
    assert y.shape == expected.shape == (1, 5 * s, 6 * s, 2)
    close(y[:, s:-s, s:-s], expected[:, s:-s, s:-s])


# Activations


def test_prelu_has_its_parameter(key):
    x = ones(2, 3)
    assert nn.PReLU().init(key, x).alpha.tolist() == [0.25]
    params = nn.PReLU("ones", 3, dtype="bfloat16").init(key, x.astype("bfloat16"))
    assert (params.alpha.shape, params.alpha.dtype) == ((3,), jnp.bfloat16)
    assert nn.PReLU()(nn.PReLU().init(key, x), jnp.float32(-4)) == -1
    with pytest.raises(ValueError, match=r"expects 4 channels on axis -1, but found shape \(2, 3\)"):
        nn.PReLU(in_channels=4).init(key, x)
    with pytest.raises(ValueError, match="expects 3 channels on axis 2, but found"):
        nn.PReLU(in_channels=3, axis=2).init(key, x)


# Layouts, names, printed forms


def test_a_layout_is_the_order_of_the_data_alone(key):
    def make(first):
        layout = "NCHW" if first else "NHWC"
        return nn.Sequential(
            nn.Conv2D(4, 3, padding=1, layout=layout, activation="relu"),
            nn.MaxPool2D(layout=layout),
            nn.Conv2DTranspose(2, 2, 2, layout=layout),
            nn.AvgPool2D(2, 1, layout=layout),
            nn.Bilinear(2, layout),
            nn.GlobalMaxPool2D(layout),
        )

    x = data(2, 6, 8, 3)
    turned = np.moveaxis(x, -1, 1)
    params = make(False).init(key, x)
    other = pt.abstract(make(True), turned)
    assert jax.tree.structure(other) == jax.tree.structure(params)
    assert [leaf.shape for leaf in jax.tree.leaves(other)] == [w.shape for w in jax.tree.leaves(params)]
    y = jax.jit(make(False))(params, x)
    close(np.moveaxis(jax.jit(make(True))(params, turned), 1, -1), y)


def test_names_in_a_sequential(key):
    net = nn.Sequential(
        nn.Conv2D(4, 3, layout="NCHW"),
        nn.MaxPool2D(layout="NCHW"),
        nn.Conv2DTranspose(4, 2, layout="NCHW", use_bias=False),
        nn.AvgPool2D(layout="NCHW"),
        nn.PReLU(),
        nn.GlobalAvgPool2D("NCHW"),
        nn.Flatten(),
        nn.Dense(2),
    )
    params = net.init(key, ones(1, 3, 12, 12))
    assert list(params) == ["conv0", "pool0", "conv1", "pool1", "prelu0", "pool2", "flatten0", "dense0"]
    assert [(name, leaf.shape) for name, leaf in pt.collect(params).items()] == [
        ("conv0_weight", (4, 3, 3, 3)),
        ("conv0_bias", (4,)),
        ("conv1_weight", (4, 4, 2, 2)),
        ("prelu0_alpha", (1,)),
        ("dense0_weight", (2, 4)),
        ("dense0_bias", (2,)),
    ]
    for rank in (1, 2, 3):
        for name in (f"Conv{rank}D", f"Conv{rank}DTranspose"):
            assert getattr(nn, name)(1, 1).alias == "conv"
        for name in (f"{kind}Pool{rank}D" for kind in ("Max", "Avg", "GlobalMax", "GlobalAvg")):
            assert getattr(nn, name)().alias == "pool"


def test_repr_is_that_of_gluon():
    gold = json.loads((Path(__file__).parents[1] / "data" / "gluon" / "convbn.json").read_text())[
        "repr"
    ]
    lines = [line.split(": ", 1)[1] for line in gold.splitlines()[1:-1]]
    layers = {
        0: nn.Conv2D(8, 3, padding=1, activation="relu", in_channels=3, layout="NCHW"),
        2: nn.MaxPool2D(layout="NCHW"),
        3: nn.Conv2D(6, 3, 2, use_bias=False, in_channels=8, layout="NCHW"),
        6: nn.GlobalAvgPool2D(layout="NCHW"),
    }
    for i, layer in layers.items():
        assert repr(layer) == lines[i]


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv1D(8, 3), "Conv1D(None -> 8, kernel_size=(3,), stride=(1,))"),
        (
            nn.Conv2D(8, 3, padding=((0, 1), 2), dilation=(1, 2), groups=2),
            "Conv2D(None -> 8, kernel_size=(3, 3), stride=(1, 1), padding=((0, 1), (2, 2)), "
            "dilation=(1, 2), groups=2)",
        ),
        (
            nn.Conv3D(8, 1, padding="SAME", activation=jnp.tanh),
            "Conv3D(None -> 8, kernel_size=(1, 1, 1), stride=(1, 1, 1), padding=same, Activation(tanh))",
        ),
        (
            nn.Conv2DTranspose(8, 3, 2, output_padding=(0, 1), groups=2, in_channels=4, use_bias=False),
            "Conv2DTranspose(4 -> 8, kernel_size=(3, 3), stride=(2, 2), output_padding=(0, 1), groups=2, "
            "bias=False)",
        ),
        (
            nn.Conv1D(8, 3, padding=1, padding_mode="circular"),
            "Conv1D(None -> 8, kernel_size=(3,), stride=(1,), padding=(1,), padding_mode=circular)",
        ),
        (
            nn.DepthwiseConv2D(3, in_channels=4, depth_multiplier=2),
            "DepthwiseConv2D(4 -> 8, kernel_size=(3, 3), stride=(1, 1), depth_multiplier=2)",
        ),
        (
            nn.SeparableConv1D(8, 3, activation="relu"),
            "SeparableConv1D(None -> 8, kernel_size=(3,), stride=(1,), Activation(relu))",
        ),
        (
            nn.AvgPool1D(3, 2, 1, ceil_mode=True, count_include_pad=False),
            "AvgPool1D(size=(3,), stride=(2,), padding=(1,), ceil_mode=True, global_pool=False, "
            "pool_type=avg, layout=NWC, count_include_pad=False)",
        ),
        (
            nn.GlobalMaxPool3D(),
            "GlobalMaxPool3D(size=(1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0), ceil_mode=True, "
            "global_pool=True, pool_type=max, layout=NDHWC)",
        ),
        (nn.Bilinear(2), "Bilinear(scale=(2, 2), layout=NHWC)"),
        (nn.LeakyReLU(0.1), "LeakyReLU(0.1)"),
        (nn.PReLU(), "PReLU"),
        (nn.PReLU(in_channels=3, axis=1), "PReLU(in_channels=3, axis=1)"),
        (nn.ELU(), "ELU(alpha=1.0)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Layer) else "",
)
def test_repr(layer, text):
    assert repr(layer) == text


CONV = "channels kernel_size strides padding dilation groups layout activation use_bias"
CONV += " weight_initializer bias_initializer in_channels dtype"


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        ("Conv1D Conv2D Conv3D", CONV + " padding_mode"),
        (
            "Conv1DTranspose Conv2DTranspose Conv3DTranspose",
            CONV.replace("padding", "padding output_padding"),
        ),
        (
            "SeparableConv1D SeparableConv2D SeparableConv3D",
            CONV.replace("groups", "depth_multiplier") + " padding_mode",
        ),
        (
            "DepthwiseConv1D DepthwiseConv2D DepthwiseConv3D",
            CONV.replace("channels ", "", 1).replace("groups", "depth_multiplier") + " padding_mode",
        ),
        ("MaxPool1D MaxPool2D MaxPool3D", "pool_size strides padding layout ceil_mode"),
        ("AvgPool1D AvgPool2D", "pool_size strides padding layout ceil_mode count_include_pad"),
        ("GlobalMaxPool1D GlobalAvgPool3D", "layout"),
        ("PReLU", "alpha_initializer in_channels axis dtype"),
        ("GELU", "approximation"),
    ],
    ids=lambda text: text.split()[0],
)
def test_arguments_are_in_the_order_of_gluon(names, arguments):
    for name in names.split():
        assert list(inspect.signature(getattr(nn, name)).parameters) == arguments.split()


def test_settings_spelled_differently_are_equal():
    same = [
        nn.Conv2D(3, 3, padding=1),
        nn.Conv2D(3, (3, 3), [1, 1], ((1, 1), 1), dtype=jnp.float32),
        nn.Conv2D(np.int64(3), np.int32(3), padding=[1, 1], weight_initializer=init.Uniform()),
    ]
    assert len(set(same)) == len({repr(layer) for layer in same}) == 1
    assert nn.Conv2D(3, 3, padding="VALID") == nn.Conv2D(3, 3)
    assert nn.MaxPool2D() == nn.MaxPool2D((2, 2), 2, "valid")
    assert nn.Bilinear(2) == nn.Bilinear([2, 2])
    assert nn.Conv1D(3, 3) != nn.Conv2D(3, 3)
    assert nn.MaxPool1D() != nn.AvgPool1D()


# Inputs of other kinds


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2D(4, 3, 2, 1, groups=2), (2, 3, 4)),
        (nn.Conv2DTranspose(4, 3, 2, 1, 1, groups=2), (8, 10, 4)),
        (nn.Conv2D(4, 3, padding=2, padding_mode="reflect"), (6, 7, 4)),
        (nn.SeparableConv2D(4, 3, 1, "same", padding_mode="circular"), (4, 5, 4)),
        (nn.MaxPool2D(2), (2, 2, 2)),
        (nn.AvgPool2D(3, 2, 1), (2, 3, 2)),
        (nn.GlobalMaxPool2D(), (1, 1, 2)),
        (nn.GlobalAvgPool2D(), (1, 1, 2)),
        (nn.Bilinear(2), (8, 10, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Layer) else "",
)
def test_an_empty_batch(layer, shape, key):
    x = ones(0, 4, 5, 2)
    params = layer.init(key, x)
    y, grads = jax.jit(jax.value_and_grad(lambda p, x: layer(p, x).sum(), argnums=(0, 1)))(params, x)
    assert y == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))
    assert layer(params, x).shape == (0, *shape)


def test_a_batch_of_any_size_can_be_exported(key):
    net = nn.Sequential(
        nn.Conv2D(4, 3, padding="same"),
        nn.SeparableConv2D(3, 3, 1, 2, padding_mode="reflect"),
        nn.Conv2D(3, 3, padding="valid"),
        nn.AvgPool2D(3, 2, 1, ceil_mode=True),
        nn.MaxPool2D(),
        nn.Conv2DTranspose(3, 2, 2),
        nn.Bilinear(2),
        nn.GlobalAvgPool2D(),
    )
    (batch,) = jax.export.symbolic_shape("batch")
    params = net.init(key, of := jax.ShapeDtypeStruct((batch, 8, 8, 3), "float32"))
    exported = jax.export.export(jax.jit(lambda x: net(params, x)))(of)
    x = data(5, 8, 8, 3)
    close(exported.call(x), net(params, x))


def test_a_convolution_promotes_as_a_product_does(key):
    for layer in (nn.Conv1D(2, 3), nn.Conv1DTranspose(2, 3)):
        params = layer.init(key, x := ones(1, 5, 2))
        for dtype in ("bfloat16", "uint8", "int32"):
            with pytest.raises(ValueError, match="dtype_promotion=strict"):
                layer(params, x.astype(dtype))
            with jax.numpy_dtype_promotion("standard"):
                y = layer(params, x.astype(dtype))
            assert y.dtype == jnp.float32
            close(y, layer(params, x))
        assert layer(params, np.ones((1, 5, 2))).dtype == jnp.float32


def test_parameters_have_the_layers_dtype(key):
    for layer in (nn.Conv1D(2, 3, dtype="bfloat16"), nn.Conv1DTranspose(2, 3, dtype=jnp.bfloat16)):
        params = layer.init(key, x := ones(1, 5, 2, dtype="bfloat16"))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
        assert layer(params, x).dtype == jnp.bfloat16


# Errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Conv2D(0, 3), "Conv2D: channels must be a positive integer, but found 0"),
        (lambda: nn.Conv2D(True, 3), "Conv2D: channels must be .* found True"),
        (lambda: nn.Conv2D(3, 0), "Conv2D: kernel_size must be a positive .* tuple of 2, but found 0"),
        (lambda: nn.Conv2D(3, (3,)), r"Conv2D: kernel_size must be .* found \(3,\)"),
        (lambda: nn.Conv1D(3, (3, 3)), r"Conv1D: kernel_size must be .* a tuple of 1, .* \(3, 3\)"),
        (lambda: nn.Conv2D(3, 3, 1.5), "Conv2D: strides must be .* found 1.5"),
        (lambda: nn.Conv2D(3, 3, dilation=0), "Conv2D: dilation must be .* found 0"),
        (lambda: nn.Conv2D(3, 3, padding=-1), "Conv2D: padding must be .* found -1"),
        (lambda: nn.Conv2D(3, 3, padding="full"), "Conv2D: padding must .*'same' or 'valid'.* 'full'"),
        (lambda: nn.Conv2D(3, 3, padding=((1, 2, 3), 0)), "Conv2D: padding must be .*pairs"),
        (lambda: nn.Conv2D(3, 3, layout="NCW"), "Conv2D: layout must be 'NHWC' or 'NCHW', .* 'NCW'"),
        (lambda: nn.Conv2D(3, 3, groups=0), "Conv2D: groups must be a positive integer, .* found 0"),
        (lambda: nn.Conv2D(3, 3, groups=2), "Conv2D: channels must .* by groups=2, but found 3"),
        (lambda: nn.Conv2D(4, 3, groups=2, in_channels=3), "in_channels must .* groups=2, .* found 3"),
        (lambda: nn.Conv2D(3, 3, in_channels=-3), "Conv2D: in_channels must be a non-neg.* found -3"),
        (lambda: nn.Conv2D(3, 3, activation="rleu"), "no activation 'rleu'. Did you mean .*`relu`"),
        (lambda: nn.Conv2D(3, 3, 1, 1, padding_mode="refelct"), "padding_mode .* mean `reflect`"),
        (
            lambda: nn.Conv2D(3, 3, 1, 1, padding_mode=None),
            "padding_mode must be one of 'zeros', .* None",
        ),
        (
            lambda: nn.Conv2D(3, 3, padding_mode="reflect"),
            "'reflect' .* padding=0 pads nothing: give a",
        ),
        (lambda: nn.Conv1D(3, 2, 1, "valid", padding_mode="circular"), "padding=0 pads nothing"),
        (
            lambda: nn.DepthwiseConv2D(3, depth_multiplier=0),
            "DepthwiseConv2D: depth_multiplier must be",
        ),
        (lambda: nn.DepthwiseConv1D((3, 3)), "DepthwiseConv1D: kernel_size must be .* a tuple of 1"),
        (lambda: nn.SeparableConv2D(0, 3), "SeparableConv2D: channels must be a positive integer"),
        (lambda: nn.SeparableConv2D(3, 3, 0), "SeparableConv2D: strides must be .* found 0"),
        (lambda: nn.SeparableConv2D(3, 3, padding_mode="reflect"), "SeparableConv2D: .* pads nothing"),
        (lambda: nn.Conv1DTranspose(3, 3, 2, 0, 2), r"output_padding must be less .* found .*\(2,\)"),
        (lambda: nn.Conv1DTranspose(3, 3, 2, 0, -1), "output_padding must be a non-negative integer"),
        (lambda: nn.Conv1DTranspose(3, 3, 2, "same", 1), "leave out output_padding"),
        (lambda: nn.MaxPool2D(0), "MaxPool2D: pool_size must be .* found 0"),
        (lambda: nn.MaxPool2D(2, 0), "MaxPool2D: strides must be .* found 0"),
        (lambda: nn.MaxPool2D(2, padding=2), r"padding must be less than pool_size.* padding=\(2, 2\)"),
        (lambda: nn.AvgPool2D(2, 2, 0, True, "NHWC"), "AvgPool2D: layout must be .* found True"),
        (lambda: nn.GlobalAvgPool1D("NHWC"), "GlobalAvgPool1D: layout must be 'NWC' or 'NCW'"),
        (lambda: nn.Bilinear(1.5), "Bilinear: scale must be .* found 1.5"),
        (lambda: nn.Bilinear(2, "NWC"), "Bilinear: layout must be"),
        (lambda: nn.LeakyReLU(-0.1), "LeakyReLU: alpha must be non-negative, but found -0.1"),
        (lambda: nn.PReLU(in_channels=0), "PReLU: in_channels must be .* found 0"),
        (lambda: nn.GELU("relu"), "GELU: approximation must be 'erf' or 'tanh', but found 'relu'"),
    ],
)
def test_invalid_settings(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("layer", "shape", "text"),
    [
        (
            nn.Conv2D(3, 3),
            (28, 28, 1),
            r"needs an input \(batch, height, width, channels\) for layout NHWC, but found shape "
            r"\(28, 28, 1\). x\[None\] adds",
        ),
        (nn.Conv1D(3, 3, layout="NCW"), (2, 3), r"\(batch, channels, width\) for layout NCW"),
        (nn.Conv2D(3, 3), (1, 1, 28, 28, 1), r"found shape \(1, 1, 28, 28, 1\)\.\n"),
        (nn.Conv2D(3, 3, in_channels=3), (1, 3, 8, 8), r"expects 3 channels, but found 8 on axis 3"),
        (nn.Conv2D(4, 3, groups=2), (1, 8, 8, 3), r"divisible by groups=2, but found 3 on axis 3"),
        (nn.Conv2D(4, 3), (1, 8, 8, 0), "needs a positive number of channels .* found 0"),
        (nn.Conv2D(4, 3, dilation=2), (1, 8, 4, 1), r"kernel \(5, 5\) is larger .* padding \(0, 0\)"),
        (nn.Conv2D(4, 3, padding=3), (1, 0, 4, 1), "without empty spatial axes, but found"),
        (nn.DepthwiseConv2D(3), (1, 8, 8, 0), "needs a positive number of channels .* found 0"),
        (
            nn.DepthwiseConv2D(3, in_channels=2),
            (1, 8, 8, 3),
            "expects 2 channels, but found 3 on axis 3",
        ),
        (nn.DepthwiseConv1D(3), (8, 3), r"needs an input \(batch, width, .* x\[None\] adds"),
        (nn.Conv1DTranspose(4, 2, padding=3), (1, 5, 1), r"padding \(3,\) leaves an empty output"),
        (nn.MaxPool1D(4), (1, 3, 1), "windows are larger than an input of shape"),
        (nn.AvgPool2D(), (4, 4, 1), r"needs an input \(batch, .* x\[None\] adds"),
        (nn.AvgPool2D(), (1, 4, 0, 1), "without empty spatial axes"),
        (nn.GlobalMaxPool2D(), (4, 1), r"needs an input \(batch, height"),
        (nn.GlobalAvgPool1D(), (4, 0, 1), "without empty spatial axes"),
        (nn.Bilinear(2), (4, 4, 1), r"needs an input \(batch, height"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Layer) else "",
)
def test_inputs_that_do_not_fit(layer, shape, text, key):
    with pytest.raises(ValueError, match=text) as info:
        layer.init(key, ones(*shape))
    assert type(layer).__name__ in str(info.value)
    if "x[None]" in str(info.value):  # what the text says to do
        layer.init(key, ones(*shape)[None])


def test_parameters_come_first():
    for layer in (nn.Conv2D(3, 3), nn.Conv2DTranspose(3, 3), nn.PReLU()):
        with pytest.raises(TypeError, match=r"its parameters first, model\(params, x\), but found"):
            layer(ones(1, 4, 4, 1), EMPTY)
