"""Convolutions, pooling, resizing and activations agree with PyTorch's, in outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paramtree as pt
from paramtree import nn
from tests.nn.test_conv import (
    CONVS,
    EMPTY,
    FIRST,
    LAST,
    TRANSPOSES,
    channels_first,
    close,
    convolutions,
    data,
    each,
    in_layout,
)

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
F = torch.nn.functional


def check(layer, reference, x, **params):
    """Checks the outputs and all gradients of a layer; x and the reference are channels-first."""
    leaves = [torch.tensor(value, requires_grad=True) for value in (x, *params.values())]
    expected = reference(*leaves)
    slope = data(*expected.shape, seed=1)
    expected.backward(torch.tensor(slope))

    @jax.jit
    def run(params, x, slope):
        y, back = jax.vjp(layer, params, x)
        return y, *back(slope)

    tree = pt.from_tree(params)
    y, grads, grad = run(tree, in_layout(layer, x), in_layout(layer, slope))
    close(channels_first(layer, y), expected.detach())
    close(channels_first(layer, grad), leaves[0].grad)
    for name, leaf in zip(params, leaves[1:], strict=True):
        close(grads[name], leaf.grad)
    return y


def torch_settings(settings):
    names = ["padding", "output_padding", "dilation", "groups"]
    return {"stride": settings["strides"]} | {n: settings[n] for n in names if n in settings}


@settings(max_examples=25)
@given(convolutions())
def test_convolutions_agree_with_torch(case):
    rank, shape, given = case
    layer = CONVS[rank](**given)
    params = {"weight": data(layer.channels, shape[1] // layer.groups, *layer.kernel_size, seed=2)}
    if layer.use_bias:
        params["bias"] = data(layer.channels, seed=3)
    theirs = functools.partial(getattr(F, f"conv{rank}d"), **torch_settings(given))
    check(layer, theirs, data(*shape), **params)


@settings(max_examples=25)
@given(convolutions(transposed=True))
def test_transposed_convolutions_agree_with_torch(case):
    rank, shape, given = case
    layer = TRANSPOSES[rank](**given)
    params = {"weight": data(shape[1], layer.channels // layer.groups, *layer.kernel_size, seed=2)}
    if layer.use_bias:
        params["bias"] = data(layer.channels, seed=3)
    theirs = functools.partial(getattr(F, f"conv_transpose{rank}d"), **torch_settings(given))
    check(layer, theirs, data(*shape), **params)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", (2, 1, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layouts", [FIRST, LAST], ids=["first", "last"])
def test_padding_modes_agree_with_torch(mode, padding, rank, layouts):
    kernel, dilation, sizes = (4, 2, 3)[:rank], (1, 3, 2)[:rank], (5, 4, 6)[:rank]
    padding = padding if padding == "same" else padding[:rank]
    theirs = getattr(torch.nn, f"Conv{rank}d")(
        4, 6, kernel, padding=padding, dilation=dilation, groups=2, padding_mode=mode
    )
    layer = CONVS[rank](6, kernel, 1, padding, dilation, 2, layout=layouts[rank], padding_mode=mode)
    params = {"weight": data(6, 2, *kernel, seed=2), "bias": data(6, seed=3)}

    def reference(x, weight, bias):
        return torch.func.functional_call(theirs, {"weight": weight, "bias": bias}, x)

    check(layer, reference, data(2, 4, *sizes), **params)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layouts", [FIRST, LAST], ids=["first", "last"])
def test_depthwise_convolutions_agree_with_torch(rank, layouts):
    layer = getattr(nn, f"DepthwiseConv{rank}D")(3, 2, 1, depth_multiplier=2, layout=layouts[rank])
    conv = getattr(F, f"conv{rank}d")
    params = {"weight": data(6, 1, *[3] * rank, seed=2), "bias": data(6, seed=3)}
    check(
        layer,
        lambda x, w, b: conv(x, w, b, stride=2, padding=1, groups=3),
        data(2, 3, *(5, 4, 6)[:rank]),
        **params,
    )


@pytest.mark.parametrize("padding", ["same", ((2, 0), (1, 3)), (1, (0, 2))], ids=str)
def test_padding_that_differs_between_the_ends(padding):
    pairs = {"same": (1, 1, 1, 1), (1, (0, 2)): (0, 2, 1, 1)}.get(padding, (1, 3, 2, 0))
    layer = nn.Conv2D(2, 3, 1, padding)
    check(
        layer,
        lambda x, w, b: F.conv2d(F.pad(x, pairs), w, b),
        data(1, 2, 4, 5),
        weight=data(2, 2, 3, 3),
        bias=data(2),
    )


@st.composite
def poolings(draw):
    """Returns a rank, a channels-first input shape, and the settings of a pooling layer."""
    rank = draw(st.integers(1, 3))
    given = {
        "pool_size": each(draw, rank, 1, 4),
        "strides": draw(st.sampled_from([None, each(draw, rank, 1, 4)])),
        "layout": draw(st.sampled_from([FIRST[rank], LAST[rank]])),
        "ceil_mode": draw(st.booleans()),
    }
    given["padding"] = tuple(draw(st.integers(0, size // 2)) for size in given["pool_size"])
    sizes = [  # avg_pool3d rejects inputs smaller than a window, even with padding
        max(size - 2 * pad * (rank < 3), 1) + draw(st.integers(0, 4))
        for size, pad in zip(given["pool_size"], given["padding"], strict=True)
    ]
    return rank, (draw(st.integers(1, 2)), draw(st.integers(1, 2)), *sizes), given


@settings(max_examples=20)
@given(poolings())
def test_max_pooling_agrees_with_torch(case):
    rank, shape, given = case
    layer = getattr(nn, f"MaxPool{rank}D")(**given)
    pool = getattr(F, f"max_pool{rank}d")
    settings = layer.pool_size, layer.strides, given["padding"]
    x = np.round(data(*shape))  # many entries are equal, and the first one of them gets the gradient
    check(layer, lambda x: pool(x, *settings, ceil_mode=layer.ceil_mode), x)


@settings(max_examples=20)
@given(poolings(), st.booleans())
def test_mean_pooling_agrees_with_torch(case, count):
    rank, shape, given = case
    layer = getattr(nn, f"AvgPool{rank}D")(**given, count_include_pad=count)
    pool = getattr(F, f"avg_pool{rank}d")
    settings = layer.pool_size, layer.strides, given["padding"], layer.ceil_mode, count
    check(layer, lambda x: pool(x, *settings), data(*shape))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layouts", [FIRST, LAST], ids=["first", "last"])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_global_pooling_agrees_with_torch(rank, layouts, kind):
    layer = getattr(nn, f"Global{kind.title()}Pool{rank}D")(layouts[rank])
    pool = getattr(F, f"adaptive_{kind}_pool{rank}d")
    y = check(layer, lambda x: pool(x, 1), data(2, 3, *[4, 3, 2][:rank]))
    assert y.ndim == rank + 2


@pytest.mark.parametrize("padding", [((1, 0), (0, 2)), "same"], ids=str)
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pooling_with_padding_that_differs_between_the_ends(padding, kind):
    pairs = (0, 1, 1, 1) if padding == "same" else (0, 2, 1, 0)
    layer = {"max": nn.MaxPool2D, "avg": nn.AvgPool2D}[kind]((3, 3), 2, padding)
    value, pool = {"max": (-np.inf, F.max_pool2d), "avg": (0, F.avg_pool2d)}[kind]
    check(layer, lambda x: pool(F.pad(x, pairs, value=value), 3, 2), data(1, 2, 5, 6))


@pytest.mark.parametrize("scale", [1, 2, 3, (2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_bilinear_agrees_with_torch(scale, layout):
    both = (scale, scale) if isinstance(scale, int) else scale
    layer = nn.Bilinear(scale, layout)
    up = torch.nn.Upsample(scale_factor=both, mode="bilinear")
    y = check(layer, up, data(2, 3, 4, 5))
    assert channels_first(layer, y).shape == (2, 3, 4 * both[0], 5 * both[1])


@pytest.mark.parametrize(
    ("layer", "reference"),
    [
        (nn.LeakyReLU(0.1), lambda x: F.leaky_relu(x, 0.1)),
        (nn.LeakyReLU(0), F.relu),
        (nn.ELU(), F.elu),
        (nn.ELU(0.3), lambda x: F.elu(x, 0.3)),
        (nn.SELU(), F.selu),
        (nn.GELU(), F.gelu),
        (nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
        (nn.Swish(), F.silu),
        (nn.Swish(2.0), lambda x: x * torch.sigmoid(2 * x)),
        (nn.SiLU(), F.silu),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Layer) else "torch",
)
def test_activations_agree_with_torch(layer, reference):
    x = np.linspace(-6, 6, 40, dtype="float32").reshape(5, 8)

    @jax.jit
    def run(x):
        return jax.vjp(lambda x: layer(EMPTY, x), x)[1](jnp.ones_like(x))[0], layer(EMPTY, x)

    leaf = torch.tensor(x, requires_grad=True)
    expected = reference(leaf)
    expected.sum().backward()
    grad, y = run(x)
    close(y, expected.detach())
    close(grad, leaf.grad)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("axis", [-1, 1])
def test_prelu_agrees_with_torch(channels, axis):
    layer = nn.PReLU(in_channels=channels, axis=axis)
    x, alpha = data(2, 3, 4), data(channels, seed=1)
    theirs = torch.tensor(x, requires_grad=True), torch.tensor(alpha, requires_grad=True)
    expected = F.prelu(*theirs)
    expected.sum().backward()

    @jax.jit
    def run(params, x):
        y, back = jax.vjp(layer, params, x)
        return y, *back(jnp.ones_like(y))

    turn = functools.partial(np.moveaxis, source=1, destination=axis)
    y, grads, grad = run(pt.from_tree({"alpha": alpha}), turn(x))
    close(y, turn(expected.detach().numpy()))
    close(grad, turn(theirs[0].grad.numpy()))
    close(grads.alpha, theirs[1].grad)
