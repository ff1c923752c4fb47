"""Layers: a table of all of them, tested under every transform, then tests of each layer."""

import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from tests.helpers import x64


class Row(NamedTuple):
    """A factory of a layer, and its inputs, each any pytree. Integer inputs are below 5."""

    make: Callable[[], nn.Layer]
    inputs: tuple[Any, ...]


def of(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def double(x):
    return 2 * x


def tied():
    shared = nn.Dense(5, activation="tanh")
    return nn.Sequential(shared, nn.Sequential(nn.Dense(5), shared), nn.Dense(2))


# The first word is the class. Every new layer needs a row, which all tests of the table run on.
TABLE = {
    "Activation": Row(lambda: nn.Activation("tanh"), (of(2, 5),)),
    "Activation function": Row(lambda: nn.Activation(double), (of(5),)),
    "Dense": Row(lambda: nn.Dense(3), (of(2, 5),)),
    "Dense flattening": Row(lambda: nn.Dense(3, activation="tanh"), (of(2, 2, 3),)),
    "Dense on the last axis": Row(lambda: nn.Dense(3, double, flatten=False), (of(2, 2, 5),)),
    "Dense without bias": Row(
        lambda: nn.Dense(3, use_bias=False, weight_initializer="xavier", in_units=5), (of(5),)
    ),
    "Dropout": Row(lambda: nn.Dropout(0.5), (of(2, 5),)),
    "Dropout axes": Row(lambda: nn.Dropout(0.5, axes=(1,)), (of(2, 5),)),
    "Embedding": Row(lambda: nn.Embedding(5, 3), (of(2, 4, dtype="int32"),)),
    "Flatten": Row(nn.Flatten, (of(2, 3, 4),)),
    "Lambda": Row(lambda: nn.Lambda(double), (of(2, 5),)),
    "BatchNorm": Row(nn.BatchNorm, (of(4, 3),)),
    "BatchNorm neither centered nor scaled": Row(
        lambda: nn.BatchNorm(center=False, scale=False), (of(4, 3),)
    ),
    "BatchNorm of channels first": Row(
        lambda: nn.BatchNorm(axis=1, momentum=0.5, epsilon=1e-3, in_channels=2), (of(2, 2, 3, 3),)
    ),
    "BatchNorm with global statistics": Row(
        lambda: nn.BatchNorm(use_global_stats=True, running_mean_initializer="normal"), (of(4, 3),)
    ),
    "GroupNorm": Row(lambda: nn.GroupNorm(2), (of(2, 3, 4),)),
    "GroupNorm of channels first": Row(lambda: nn.GroupNorm(center=False, axis=1), (of(2, 2, 3),)),
    "InstanceNorm": Row(nn.InstanceNorm, (of(2, 5, 2),)),
    "InstanceNorm scaled": Row(lambda: nn.InstanceNorm(axis=1, scale=True), (of(2, 2, 3, 3),)),
    "LayerNorm": Row(nn.LayerNorm, (of(2, 5),)),
    "LayerNorm of an axis": Row(lambda: nn.LayerNorm(axis=1, scale=False), (of(2, 5, 3),)),
    "RMSNorm": Row(nn.RMSNorm, (of(2, 5),)),
    "RNN": Row(lambda: nn.RNN(3), (of(4, 2, 5),)),
    "RNN tanh": Row(
        lambda: nn.RNN(3, 1, "tanh", "NTC", bidirectional=True, input_size=5), (of(2, 3, 5),)
    ),
    "LSTM": Row(lambda: nn.LSTM(3, i2h_bias_initializer="lstmbias"), (of(4, 2, 5),)),
    "LSTM two layers": Row(lambda: nn.LSTM(3, 2, dropout=0.5), (of(3, 2, 5),)),
    "GRU": Row(lambda: nn.GRU(3), (of(4, 2, 5),)),
    "GRU bidirectional": Row(lambda: nn.GRU(2, bidirectional=True), (of(3, 2, 4),)),
    "RNNCell": Row(lambda: nn.RNNCell(3), (of(2, 5), of(2, 3))),
    "LSTMCell": Row(lambda: nn.LSTMCell(3, input_size=5), (of(2, 5), (of(2, 3), of(2, 3)))),
    "GRUCell": Row(lambda: nn.GRUCell(3), (of(2, 5), [of(2, 3)])),
    "Conv1D": Row(lambda: nn.Conv1D(3, 2, 2), (of(2, 5, 2),)),
    "Conv2D": Row(lambda: nn.Conv2D(3, 2, padding=1, activation="tanh"), (of(2, 3, 3, 2),)),
    "Conv2D of channels first": Row(
        lambda: nn.Conv2D(4, (2, 1), 1, ((0, 1), (1, 2)), (1, 2), 2, "NCHW", bias_initializer="ones"),
        (of(2, 2, 3, 4),),
    ),
    "Conv2D same": Row(
        lambda: nn.Conv2D(2, 3, 2, "same", use_bias=False, in_channels=1), (of(2, 3, 4, 1),)
    ),
    "Conv3D": Row(lambda: nn.Conv3D(2, (1, 2, 2)), (of(1, 2, 2, 3, 2),)),
    "Conv2D reflecting": Row(
        lambda: nn.Conv2D(2, 3, padding=(1, 2), padding_mode="reflect"), (of(2, 3, 4, 2),)
    ),
    "Conv2D circular": Row(
        lambda: nn.Conv2D(2, 2, 2, "same", layout="NCHW", padding_mode="circular"), (of(2, 2, 3, 5),)
    ),
    "Conv1D replicating": Row(
        lambda: nn.Conv1D(2, 3, 1, ((4, 0),), 2, padding_mode="replicate"), (of(2, 3, 2),)
    ),
    "DepthwiseConv1D": Row(lambda: nn.DepthwiseConv1D(3, padding=((2, 0),)), (of(2, 5, 3),)),
    "DepthwiseConv2D": Row(
        lambda: nn.DepthwiseConv2D(2, 2, 1, depth_multiplier=2, activation="tanh"), (of(2, 3, 4, 3),)
    ),
    "DepthwiseConv2D of channels first": Row(
        lambda: nn.DepthwiseConv2D(
            3, 1, "same", layout="NCHW", use_bias=False, in_channels=2, padding_mode="circular"
        ),
        (of(2, 2, 3, 4),),
    ),
    "DepthwiseConv3D": Row(lambda: nn.DepthwiseConv3D((1, 2, 2)), (of(1, 2, 2, 3, 2),)),
    "SeparableConv1D": Row(lambda: nn.SeparableConv1D(3, 2, 2), (of(2, 5, 2),)),
    "SeparableConv2D": Row(
        lambda: nn.SeparableConv2D(4, 3, 1, 1, depth_multiplier=2, activation="tanh"), (of(2, 3, 4, 2),)
    ),
    "SeparableConv2D of channels first": Row(
        lambda: nn.SeparableConv2D(3, 2, 1, 1, (2, 1), 1, "NCHW", padding_mode="reflect"),
        (of(2, 2, 3, 4),),
    ),
    "SeparableConv3D": Row(lambda: nn.SeparableConv3D(2, (1, 2, 2)), (of(1, 2, 2, 3, 2),)),
    "Conv1DTranspose": Row(lambda: nn.Conv1DTranspose(3, 3, 2, 1, 1), (of(2, 3, 2),)),
    "Conv2DTranspose": Row(lambda: nn.Conv2DTranspose(2, 3, 2, "same"), (of(2, 2, 3, 2),)),
    "Conv2DTranspose of channels first": Row(
        lambda: nn.Conv2DTranspose(4, 2, dilation=2, groups=2, layout="NCHW", use_bias=False),
        (of(2, 2, 3, 2),),
    ),
    "Conv3DTranspose": Row(lambda: nn.Conv3DTranspose(2, 2, (1, 2, 1)), (of(1, 1, 2, 2, 2),)),
    "MaxPool1D": Row(nn.MaxPool1D, (of(2, 5, 2),)),
    "MaxPool2D": Row(lambda: nn.MaxPool2D(2, 1), (of(2, 3, 4, 2),)),
    "MaxPool2D rounding up": Row(
        lambda: nn.MaxPool2D(3, 2, 1, "NCHW", ceil_mode=True), (of(1, 2, 4, 4),)
    ),
    "MaxPool3D": Row(nn.MaxPool3D, (of(1, 2, 2, 4, 2),)),
    "AvgPool1D": Row(nn.AvgPool1D, (of(2, 5, 2),)),
    "AvgPool2D": Row(lambda: nn.AvgPool2D((2, 3), padding="same"), (of(2, 3, 4, 2),)),
    "AvgPool2D of what there is": Row(
        lambda: nn.AvgPool2D(3, 2, 1, "NCHW", True, count_include_pad=False), (of(1, 2, 4, 4),)
    ),
    "AvgPool3D": Row(nn.AvgPool3D, (of(1, 2, 2, 4, 2),)),
    "GlobalMaxPool1D": Row(nn.GlobalMaxPool1D, (of(2, 5, 3),)),
    "GlobalMaxPool2D": Row(lambda: nn.GlobalMaxPool2D("NCHW"), (of(2, 3, 2, 3),)),
    "GlobalMaxPool3D": Row(nn.GlobalMaxPool3D, (of(1, 2, 2, 3, 2),)),
    "GlobalAvgPool1D": Row(nn.GlobalAvgPool1D, (of(2, 5, 3),)),
    "GlobalAvgPool2D": Row(lambda: nn.GlobalAvgPool2D("NCHW"), (of(2, 3, 2, 3),)),
    "GlobalAvgPool3D": Row(nn.GlobalAvgPool3D, (of(1, 2, 2, 3, 2),)),
    "Bilinear": Row(lambda: nn.Bilinear(2), (of(1, 3, 2, 2),)),
    "Bilinear of channels first": Row(lambda: nn.Bilinear((1, 3), "NCHW"), (of(1, 2, 3, 2),)),
    "Upsample": Row(lambda: nn.Upsample((2, 1)), (of(1, 2, 3, 2),)),
    "Upsample bilinear": Row(lambda: nn.Upsample(2, "bilinear", "NCHW"), (of(1, 2, 3, 2),)),
    "DropPath": Row(lambda: nn.DropPath(0.5), (of(4, 2, 3),)),
    "LayerScale": Row(lambda: nn.LayerScale(0.5), (of(2, 3, 5),)),
    "GatedMLP": Row(lambda: nn.GatedMLP(6), (of(2, 3, 4),)),
    "GatedMLP with biases": Row(lambda: nn.GatedMLP(6, "gelu", True), (of(2, 4),)),
    "LearnedPositions": Row(lambda: nn.LearnedPositions(5), (of(2, 3, 4),)),
    "SinusoidalPositions": Row(nn.SinusoidalPositions, (of(2, 3, 5),)),
    "ClassToken": Row(nn.ClassToken, (of(2, 3, 4),)),
    "LeakyReLU": Row(lambda: nn.LeakyReLU(0.1), (of(2, 5),)),
    "PReLU": Row(nn.PReLU, (of(2, 5),)),
    "PReLU of each channel": Row(lambda: nn.PReLU("ones", 3, axis=1), (of(4, 3, 5),)),
    "ELU": Row(lambda: nn.ELU(0.5), (of(2, 5),)),
    "SELU": Row(nn.SELU, (of(2, 5),)),
    "GELU": Row(nn.GELU, (of(2, 5),)),
    "GELU tanh": Row(lambda: nn.GELU("tanh"), (of(2, 5),)),
    "Swish": Row(lambda: nn.Swish(2.0), (of(2, 5),)),
    "SiLU": Row(nn.SiLU, (of(2, 5),)),
    "Sequential": Row(
        lambda: nn.Sequential(
            nn.Embedding(5, 3), nn.Flatten(), nn.Dense(4, "relu"), nn.Dropout(0.5), double, nn.Dense(2)
        ),
        (of(2, 3, dtype="int32"),),
    ),
    "Sequential nested": Row(
        lambda: nn.Sequential(nn.Sequential(nn.Dense(4), nn.Activation("relu")), head=nn.Dense(2)),
        (of(2, 5),),
    ),
    "Sequential tied": Row(tied, (of(2, 5),)),
    "Sequential empty": Row(nn.Sequential, (of(2, 5),)),
    "Residual": Row(lambda: nn.Residual(nn.Dense(4, "tanh"), nn.Dense(5)), (of(2, 5),)),
    "Parallel": Row(lambda: nn.Parallel(nn.Dense(4), double), (of(2, 5),)),
    # In float32, as jit keeps more digits of bfloat16 between operations.
    "Compute": Row(lambda: nn.Compute(nn.Dense(3, "tanh"), "float32"), (of(2, 5),)),
    "Compute of a net": Row(
        lambda: nn.Compute(
            nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm(), nn.Dropout(0.5)), "float32", ".*gamma"
        ),
        (of(3, 4, dtype="int32"),),
    ),
    "Vmap": Row(lambda: nn.Vmap(nn.Dense(3, "tanh"), 4, in_axes=None), (of(2, 5),)),
    "Vmap with state, dropping": Row(
        lambda: nn.Vmap(nn.Sequential(nn.BatchNorm(), nn.Dropout(0.5)), 3), (of(3, 4, 2),)
    ),
    "Repeat": Row(lambda: nn.Repeat(nn.Dense(5, "tanh"), 3), (of(2, 5),)),
    "Repeat with state, tied and dropping": Row(
        lambda: nn.Repeat(nn.Sequential(tied(), nn.Dense(5), nn.Dropout(0.5)), 2, remat=True),
        (of(2, 5),),
    ),
    "Repeat of layers by turns": Row(
        lambda: nn.Repeat(nn.Sequential(nn.LayerNorm(), nn.RNN(5, layout="NTC")), 2),
        (of(2, 3, 5),),
    ),
    "Repeat with an option by copy": Row(
        lambda: nn.Repeat(nn.Residual(nn.Dense(5), nn.DropPath(0.0)), 2, by_copy={"rate": (0.0, 0.5)}),
        (of(4, 5),),
    ),
    "MultiHeadAttention": Row(lambda: nn.MultiHeadAttention(2), (of(2, 3, 4),)),
    "MultiHeadAttention grouped": Row(
        lambda: nn.MultiHeadAttention(2, 4, 1, causal=True, rotary=True), (of(2, 3, 4),)
    ),
    "MultiHeadAttention to a memory": Row(
        lambda: nn.MultiHeadAttention(2, 4, rotary=True, rotary_scaling=("yarn_hf", 2, 9)),
        (of(2, 3, 4), of(2, 5, 6)),
    ),
}
rows = pytest.mark.parametrize("row", TABLE)
# Rows that share their code with another: these go through jax's transforms in the slow tests.
ALIKE = {
    f"{name}{n}D" for n in (1, 3) for name in ("DepthwiseConv", "SeparableConv", "MaxPool", "AvgPool")
} | {
    f"Global{name}Pool{n}D" for n in (1, 3) for name in ("Max", "Avg")
} | {
    "Conv1DTranspose", "Conv3DTranspose", "Conv2D same", "Conv2D circular", "Conv1D replicating",
    "DepthwiseConv2D of channels first", "SeparableConv2D of channels first",
    "Conv2DTranspose of channels first", "Bilinear of channels first", "GroupNorm of channels first",
    "RNN tanh", "Dense without bias", "Dropout axes", "InstanceNorm scaled", "LayerNorm of an axis",
    "GatedMLP with biases", "PReLU of each channel", "LeakyReLU", "ELU", "SELU", "GELU tanh", "SiLU",
    "Activation function", "Sequential nested", "BatchNorm neither centered nor scaled",
    "BatchNorm of channels first", "Conv2D of channels first", "DepthwiseConv2D", "Dense flattening",
    "RNN", "LSTM", "GRU", "MultiHeadAttention", "Repeat with an option by copy",
}  # fmt: skip
transformed = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow) if row in ALIKE else row for row in TABLE]
)


def test_rows_that_are_alike_are_rows():
    assert set(TABLE) > ALIKE | TREES


# Each has another kind of tree, for what asks for the tree and not for the layer.
TREES = {
    "Dense", "BatchNorm", "Embedding", "Flatten", "Sequential empty", "Sequential tied", "LSTM two layers",
    "Compute of a net", "Vmap with state, dropping", "Repeat with state, tied and dropping",
    "MultiHeadAttention grouped",
}  # fmt: skip
kinds_of_trees = pytest.mark.parametrize(
    "row", [row if row in TREES else pytest.param(row, marks=pytest.mark.slow) for row in TABLE]
)


def normal(*shape):
    # Data comes from numpy, as jax would compile a function for every shape.
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), "float32")


def ones(*shape):
    return jnp.asarray(np.ones(shape, "float32"))


def arrays(inputs, seed=0, batch=()):
    """Returns random inputs, optionally with additional leading axes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(
            rng.integers(5, size=batch + s.shape)
            if jnp.issubdtype(s.dtype, jnp.integer)
            else rng.normal(size=batch + s.shape),
            s.dtype,
        ),
        inputs,
    )


def entry(inputs, i):
    """Returns entry i along the first axis of inputs."""
    return jax.tree.map(lambda x: np.asarray(x)[i], inputs)


@functools.cache
def setup(row):
    """Returns a layer, its parameters and inputs."""
    make, structs = TABLE[row]
    layer = make()
    return layer, pt.init(layer, jax.random.key(0), *structs), arrays(structs)


def cast(tree, dtype):
    """Returns the tree with its floating leaves cast."""

    def convert(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(np.asarray(leaf).astype(jnp.dtype(dtype)))

    return jax.tree.map(convert, tree)


def loss(layer, params, *inputs):
    """Returns a scalar that depends on every output, with a different weight for each."""
    total = jnp.zeros((), jnp.float32)
    for y in jax.tree.leaves(layer(params, *inputs)):
        weights = jnp.linspace(0.5, 1.5, y.size, dtype=jnp.float32).reshape(y.shape)
        total = total + (weights * y.astype(jnp.float32)).sum()
    return total


def close(a, b, **tolerance):
    """Checks that two trees have equal structures, shapes and dtypes, and close values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


def same(a, b):
    """Whether two trees have equal structures and values."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def described(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def pruned(tree):
    """Returns nested dicts without empty levels, as loaded from a file of names."""
    if not isinstance(tree, dict):
        return tree
    below = {name: pruned(value) for name, value in tree.items()}
    return {name: value for name, value in below.items() if not isinstance(value, dict) or value}


class Counting:
    """A function that counts its calls, traced or eager."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x


# The table


def test_every_public_layer_has_a_row():
    public = {name: getattr(nn, name) for name in dir(nn) if not name.startswith("_")}
    layers = {n for n, v in public.items() if isinstance(v, type) and issubclass(v, nn.Layer)}
    assert {row.split()[0] for row in TABLE} == layers - {"Layer"}
    for row, (make, _) in TABLE.items():
        assert type(make()).__name__ == row.split()[0]


@rows
def test_init(row, key):
    make, structs = TABLE[row]
    _, params, inputs = setup(row)
    assert isinstance(params, pt.ParamTree)
    assert same(pt.init(make(), key, *structs), params)
    assert same(pt.init(make(), key, *inputs), params)
    assert same(make().init(key, *inputs), params)
    traced = jax.eval_shape(lambda key: pt.init(make(), key, *structs), key)
    assert jax.tree.structure(traced) == jax.tree.structure(params)


@transformed
def test_abstract_agrees_with_real(row):
    make, structs = TABLE[row]
    layer, params, inputs = setup(row)
    abstract = pt.abstract(make(), *structs)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(described(params))
    output = jax.eval_shape(layer, abstract, *structs)
    assert jax.tree.leaves(output) == jax.tree.leaves(described(layer(params, *inputs)))


@rows
def test_jit_equals_eager(row):
    layer, params, inputs = setup(row)
    y = layer(params, *inputs)
    close(jax.jit(layer)(params, *inputs), y)


@functools.cache
def value_and_grad(row):
    layer, params, inputs = setup(row)
    return jax.jit(jax.value_and_grad(functools.partial(loss, layer)))(params, *inputs)


@transformed
def test_grad(row):
    _, params, _ = setup(row)
    _, grads = value_and_grad(row)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.leaves(described(grads)) == jax.tree.leaves(described(params))
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(pt.collect(grads, kind="param")):  # state may be unused
        assert np.any(leaf)


@transformed
def test_vmap_equals_a_loop(row):
    layer, params, _ = setup(row)
    inputs = arrays(TABLE[row].inputs, seed=1, batch=(3,))
    mapped = jax.jit(jax.vmap(lambda *x: layer(params, *x)))(*inputs)
    loop = [layer(params, *entry(inputs, i)) for i in range(3)]
    close(mapped, jax.tree.map(lambda *y: np.stack(y), *loop))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.slow) if row in ALIKE else row
        for row, (make, inputs) in TABLE.items()
        if jax.tree.leaves(pt.abstract(make(), *inputs))
    ],
)
def test_vmap_over_parameters(row):
    layer, params, inputs = setup(row)
    other = jax.tree.map(lambda w: w + 1, params)
    both = jax.tree.map(lambda *w: np.stack(w), params, other)
    y = jax.jit(jax.vmap(lambda p: layer(p, *inputs)))(both)
    each = [layer(params, *inputs), layer(other, *inputs)]
    close(y, jax.tree.map(lambda *y: np.stack(y), *each))


@transformed
def test_scan_equals_a_loop(row):
    layer, params, _ = setup(row)
    inputs = arrays(TABLE[row].inputs, seed=2, batch=(3,))
    scanned = jax.lax.scan(lambda c, x: (c, layer(c, *x)), params, inputs)
    assert same(scanned[0], params)
    loop = [layer(params, *entry(inputs, i)) for i in range(3)]
    close(scanned[1], jax.tree.map(lambda *y: np.stack(y), *loop))


def outputs_of(layer, params, *inputs):
    """Returns the shapes and dtypes of a layer's output in training and of its gradient."""
    key = jax.random.key(1)
    y, after = jax.eval_shape(lambda p, *x: pt.training(layer)(p, *x, key=key), params, *inputs)
    return y, after, jax.eval_shape(jax.grad(functools.partial(loss, layer)), params, *inputs)


@transformed
def test_bfloat16(row):
    layer, params, inputs = setup(row)
    half, data = cast(params, "bfloat16"), cast(inputs, "bfloat16")
    y = jax.jit(layer)(half, *data)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(y))
    close(cast(y, "float32"), layer(params, *inputs), rtol=0.05, atol=0.05)
    trained, after, grads = outputs_of(layer, half, *data)
    assert jax.tree.leaves(trained) == jax.tree.leaves(described(y))
    assert jax.tree.leaves(after) == jax.tree.leaves(grads) == jax.tree.leaves(described(half))


@transformed
def test_x64(row):
    make, structs = TABLE[row]
    layer, params, inputs = setup(row)
    expected = layer(params, *inputs)
    with x64():
        layer = make()
        made = jax.eval_shape(lambda key: pt.init(layer, key, *structs), jax.random.key(0))
        # Enabling 64 bits does not change a layer's dtype.
        assert jax.tree.leaves(made) == jax.tree.leaves(described(params))
        y = jax.eval_shape(layer, params, *inputs)
        assert jax.tree.leaves(y) == jax.tree.leaves(described(expected))
        wide, data = cast(params, "float64"), cast(inputs, "float64")
        y = jax.jit(layer)(wide, *data)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(y))
        trained, after, grads = outputs_of(layer, wide, *data)
        assert jax.tree.leaves(trained) == jax.tree.leaves(described(y))
        assert jax.tree.leaves(after) == jax.tree.leaves(grads) == jax.tree.leaves(described(wide))
        close(cast(y, "float32"), expected)


@transformed
def test_checkpoint(row):
    layer, params, inputs = setup(row)
    remat = jax.checkpoint(layer)
    checked = jax.jit(jax.value_and_grad(functools.partial(loss, remat)))(params, *inputs)
    close(checked, value_and_grad(row))


# The leak checker traces everything anew; the rows are those with state, draws, copies and a cache.
OFTEN = {"Dense", "BatchNorm", "Dropout", "MultiHeadAttention", "LSTM", "Repeat"}


@pytest.mark.parametrize(
    "row", [row if row in OFTEN else pytest.param(row, marks=pytest.mark.slow) for row in TABLE]
)
def test_no_tracer_leaks(row, key):
    layer, params, inputs = setup(row)
    remat = jax.checkpoint(layer)
    with jax.checking_leaks():
        pt.abstract(layer, *inputs)
        jax.eval_shape(lambda key: pt.init(layer, key, *inputs), key)
        jax.eval_shape(lambda p, *x: layer(p, *x), params, *inputs)
        jax.eval_shape(lambda p, *x: remat(p, *x), params, *inputs)
        jax.eval_shape(jax.grad(lambda p, *x: loss(layer, p, *x)), params, *inputs)
        jax.eval_shape(jax.vmap(lambda *x: layer(params, *x)), *jax.tree.map(lambda x: x[None], inputs))
        jax.eval_shape(lambda p, k, *x: pt.training(layer)(p, *x, key=k), params, key, *inputs)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit], ids=["checkpoint", "jit"])
def test_no_tracer_leaks_from_a_transform_of_a_layer_in_training(wrap, key):
    layer, params, inputs = setup("Dropout")
    model = wrap(layer)
    with jax.checking_leaks():
        jax.eval_shape(lambda p, k, *x: pt.training(model)(p, *x, key=k), params, key, *inputs)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit], ids=["checkpoint", "jit"])
def test_training_keeps_no_parameters_alive(wrap, key):
    layer, params, inputs = setup("Dense")
    model = wrap(layer)
    alive = []
    for _ in range(3):
        current = jax.tree.map(lambda w: w + 1, params)
        alive.append(weakref.ref(current.weight))
        pt.training(model)(current, *inputs, key=key)
        del current
    gc.collect()
    assert [ref() is not None for ref in alive] == [False] * 3


@rows
def test_save_and_load(row, tmp_path):
    layer, params, inputs = setup(row)
    pt.save(tmp_path / "layer.safetensors", params)
    assert same(pt.load(tmp_path / "layer.safetensors", like=pt.abstract(layer, *inputs)), params)
    assert same(pt.load(tmp_path / "layer.safetensors"), params)


@transformed
def test_training(row, key):
    layer, params, inputs = setup(row)
    y, after = pt.training(layer)(params, *inputs, key=key)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert jax.tree.leaves(described(y)) == jax.tree.leaves(described(layer(params, *inputs)))
    run = jax.jit(pt.training(layer))
    close(run(params, *inputs, key=key), (y, after))


@transformed
def test_a_sub_tree_is_a_scope_as_well(row, key):
    layer, params, inputs = setup(row)

    def model(p, *x):
        return layer(p.outer.inner, *x)

    nested = pt.abstract(model, *TABLE[row].inputs)
    assert jax.tree.structure(nested.outer.inner) == jax.tree.structure(params)
    filled = jax.tree.unflatten(jax.tree.structure(nested), jax.tree.leaves(params))
    expected = layer(params, *inputs)
    close(model(filled, *inputs), expected)
    close(layer(filled.outer.inner, *inputs), expected)
    close(jax.jit(layer)(filled.outer.inner, *inputs), expected)
    close(model(pt.from_tree({"outer": {"inner": params}}), *inputs), expected)


@kinds_of_trees
def test_a_tree_of_names_alone_will_do(row, key):
    layer, params, inputs = setup(row)
    names = pt.from_tree(pruned(params.to_dict()))
    assert len(jax.tree.leaves(names)) >= len(jax.tree.leaves(params))
    for f in (layer, jax.jit(layer), jax.checkpoint(layer)):
        close(f(names, *inputs), layer(params, *inputs))
    trained, after = pt.training(layer)(names, *inputs, key=key)
    assert same(trained, pt.training(layer)(params, *inputs, key=key)[0])
    remat = pt.training(jax.checkpoint(layer))
    if same(after, names):
        close(remat(names, *inputs, key=key)[0], trained)
    else:
        with pytest.raises(pt.ScopeError, match="is written inside a jax transform"):
            remat(names, *inputs, key=key)


@rows
def test_equal_settings_are_equal_layers(row):
    make = TABLE[row].make
    layer = make()
    assert make() is not layer
    for other in (make(), pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):
        assert type(other) is type(layer)
        assert other == layer
        assert hash(other) == hash(layer)
        assert repr(other) == repr(layer)
    assert layer != 3
    others = [TABLE[name].make() for name in TABLE if name != row]
    assert layer not in others
    assert pt.training(layer) == pt.training(make())


@rows
def test_a_pickled_layer_runs_on_the_same_parameters(row, key):
    layer, params, inputs = setup(row)
    restored = pickle.loads(pickle.dumps(layer))
    assert same(pt.init(restored, key, *inputs), params)
    assert same(restored(params, *inputs), layer(params, *inputs))


@rows
def test_immutable(row):
    layer = TABLE[row].make()
    for name in [field.name for field in dataclasses.fields(layer)] or ["units"]:
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(layer, name, 1)


@rows
def test_repr(row):
    layer = TABLE[row].make()
    assert repr(layer) == repr(TABLE[row].make())
    assert repr(layer).split("(")[0] == row.split()[0]
    assert " at 0x" not in repr(layer)


def test_repr_is_in_the_form_of_gluon():
    assert repr(nn.Dense(256, activation="relu")) == "Dense(None -> 256, Activation(relu))"
    assert repr(nn.Dense(10, in_units=20)) == "Dense(20 -> 10, linear)"
    assert repr(nn.Dense(10, activation=double)) == "Dense(None -> 10, Activation(double))"
    assert repr(nn.Dropout(0.3)) == "Dropout(p = 0.3, axes=())"
    assert repr(nn.Dropout(0.3, axes=[1, 2])) == "Dropout(p = 0.3, axes=(1, 2))"
    assert repr(nn.Embedding(10, 4)) == "Embedding(10 -> 4, float32)"
    assert repr(nn.Activation("relu")) == "Activation(relu)"
    assert repr(nn.Activation(double)) == "Activation(double)"
    assert repr(nn.Flatten()) == "Flatten"
    assert repr(nn.Lambda(double)) == "Lambda(double)"


@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (
            nn.Dense,
            "units activation=None use_bias=True flatten=True dtype='float32' "
            "weight_initializer=None bias_initializer='zeros' in_units=0",
        ),
        (nn.Embedding, "input_dim output_dim dtype='float32' weight_initializer=None"),
        (nn.Dropout, "rate axes=()"),
        (nn.Activation, "activation"),
        (nn.Flatten, ""),
    ],
    ids=["Dense", "Embedding", "Dropout", "Activation", "Flatten"],
)
def test_arguments_are_in_the_order_of_gluon(layer, arguments):
    parameters = inspect.signature(layer).parameters.values()
    assert [parameter.name for parameter in parameters] == [
        text.split("=")[0] for text in arguments.split()
    ]
    for parameter, text in zip(parameters, arguments.split(), strict=True):
        default = parameter.default
        if "=" not in text:
            assert default is inspect.Parameter.empty
        elif parameter.name == "bias_initializer":
            assert init.get(default) == init.Zero()
        else:
            assert repr(default) == text.split("=")[1]


def test_a_layer_of_ones_own(key):
    @dataclasses.dataclass(frozen=True)
    class Scale(nn.Layer):
        start: float = 1.0

        def __call__(self, p, x):
            return p.param("scale", (), init.Constant(self.start)) * x

    net = nn.Sequential(nn.Dense(3), Scale(2.0), nn.Sequential(Scale()), Scale(4.0))
    params = net.init(key, ones(2, 5))
    assert list(params) == ["dense0", "scale0", "sequential0", "scale1"]
    assert params.scale1.scale == 4
    assert params[2][0].scale == 1
    assert net[1] == Scale(2.0)
    expected = 8 * nn.Dense(3)(params.dense0, ones(2, 5))
    np.testing.assert_allclose(net(params, ones(2, 5)), expected, rtol=1e-6)


def test_a_layer_needs_a_call():
    class Nothing(nn.Layer):
        pass

    with pytest.raises(TypeError, match=r"Nothing is a Layer without a __call__\(self, p, x\): define"):
        Nothing()(pt.from_tree({}), 0)
    with pytest.raises(TypeError, match=r"Nothing is a Layer without a __call__\(self, p, x\): define"):
        Nothing()(pt.from_tree({}), 0, 1, mask=2)  # as a layer with such inputs is called


@pytest.mark.parametrize(
    "layer", [nn.Dense(3), nn.Embedding(3, 2), nn.Sequential(nn.Dense(3))], ids=repr
)
def test_parameters_come_first(layer, key):
    x = jnp.ones((2, 5), jnp.int32 if isinstance(layer, nn.Embedding) else jnp.float32)
    for wrong in ({}, x, None):
        with pytest.raises(TypeError, match=r"its parameters first, model\(params, x\), but found"):
            layer(wrong, x)
    layer(pt.init(layer, key, x), x)


def test_rules_and_ties_go_through_a_layers_init(key):
    net = nn.Sequential(nn.Dense(5), nn.Dense(5))
    params = net.init(key, of(2, 5), rules={".*bias": init.One()}, ties={"dense1": "dense0"})
    assert (params.dense1.bias == 1).all()
    assert pt.ties(params) == {"dense1_weight": "dense0_weight", "dense1_bias": "dense0_bias"}


# Dense


def test_dense(key):
    x = normal(4, 5)
    layer = nn.Dense(3, bias_initializer="normal")
    params = layer.init(key, x)
    assert params.weight.shape == (3, 5)
    assert params.bias.shape == (3,)
    assert list(params) == ["weight", "bias"]
    expected = np.asarray(x) @ np.asarray(params.weight).T + np.asarray(params.bias)
    np.testing.assert_allclose(layer(params, x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(params, np.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_dense_flatten(key):
    x = normal(2, 4, 5)
    flat, last = nn.Dense(3), nn.Dense(3, flatten=False)
    params = flat.init(key, x)
    assert params.weight.shape == (3, 20)
    close(flat(params, x), flat(params, x.reshape(2, 20)))
    params = last.init(key, x)
    assert params.weight.shape == (3, 5)
    assert last(params, x).shape == (2, 4, 3)
    close(last(params, x)[1], last(params, x[1]))
    assert pt.init(flat, key, of(2, 2, 3, 4)).weight.shape == (3, 24)


def test_dense_without_bias(key):
    x = normal(2, 5)
    layer = nn.Dense(3, use_bias=False)
    params = layer.init(key, x)
    assert list(params) == ["weight"]
    close(layer(params, x), x @ params.weight.T)


@pytest.mark.parametrize("flatten", [True, False])
def test_dense_on_one_dimension(flatten, key):
    x = normal(5)
    layer = nn.Dense(3, activation="relu", flatten=flatten)
    params = layer.init(key, x)
    assert layer(params, x).shape == (3,)
    close(layer(params, x), layer(params, x[None])[0])


def test_dense_on_a_scalar(key):
    with pytest.raises(ValueError, match=r"Dense\(None -> 3, linear\) needs at least one dimension"):
        nn.Dense(3).init(key, jnp.float32(1))


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (0, 2, 3, 4)], ids=str)
def test_an_empty_batch(shape, key):
    x, one = ones(*shape), ones(1, *shape[1:])
    for net in (nn.Dense(3), nn.Sequential(nn.Flatten(), nn.Dense(3, "relu"))):
        params = net.init(key, one)
        assert net(params, x).shape == (0, 3)
        assert jax.jit(net)(params, x).shape == (0, 3)
        assert jax.tree.structure(pt.abstract(net, x)) == jax.tree.structure(params)
        grads = jax.grad(lambda p, net=net: net(p, x).sum())(params)
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_dense_on_the_last_axis_of_an_empty_batch(key):
    net = nn.Dense(3, flatten=False)
    assert net(net.init(key, ones(0, 4, 5)), ones(0, 4, 5)).shape == (0, 4, 3)


def test_dense_checks_the_input_size(key):
    layer = nn.Dense(4, in_units=20)
    for x in (ones(2, 3), ones(2, 20, 2)):
        with pytest.raises(ValueError, match=r"Dense\(20 -> 4, linear\) expects inputs of size 20"):
            layer.init(key, x)
    assert layer.init(key, ones(2, 4, 5)).weight.shape == (4, 20)
    params = nn.Dense(4).init(key, ones(2, 20))
    with pytest.raises(pt.MismatchError, match=r"`weight` has shape \(4, 20\).* needs \(4, 3\)"):
        nn.Dense(4)(params, ones(2, 3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Dense(-1), "Dense: units must be a non-negative integer, but found -1"),
        (lambda: nn.Dense(2.5), "Dense: units must be .* found 2.5"),
        (lambda: nn.Dense("relu"), "Dense: units must be .* found 'relu'"),
        (lambda: nn.Dense(True), "Dense: units must be .* found True"),
        (lambda: nn.Dense(3, in_units=-2), "Dense: in_units must be .* found -2"),
        (lambda: nn.Embedding(-1, 2), "Embedding: input_dim must be .* found -1"),
        (lambda: nn.Embedding(3, None), "Embedding: output_dim must be .* found None"),
    ],
    ids=["negative", "float", "string", "bool", "in_units", "input_dim", "output_dim"],
)
def test_sizes_are_integers(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_settings_spelled_differently_are_equal():
    assert nn.Dense(3, dtype="bfloat16") == nn.Dense(3, dtype=jnp.bfloat16)
    assert nn.Dense(3) == nn.Dense(3, dtype=jnp.float32, weight_initializer=init.Uniform(0.07))
    assert nn.Dropout(0.5, axes=[1]) == nn.Dropout(0.5, axes=(1,))
    assert hash(nn.Dropout(0.5, axes=[1])) == hash(nn.Dropout(0.5, axes=(1,)))
    different = [nn.Dense(3), nn.Dense(4), nn.Dense(3, "relu"), nn.Dense(3, use_bias=False)]
    different += [nn.Dense(3, flatten=False), nn.Dense(3, dtype="float16"), nn.Dense(3, in_units=3)]
    different += [nn.Dense(3, weight_initializer="normal"), nn.Dense(3, bias_initializer="ones")]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    "layer", [nn.Dense(3, dtype="bfloat16"), nn.Embedding(5, 3, "bfloat16")], ids=repr
)
def test_parameters_have_the_layers_dtype(layer, key):
    x = jnp.ones((2, 5), jnp.int32 if isinstance(layer, nn.Embedding) else jnp.bfloat16)
    params = layer.init(key, x)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert layer(params, x).dtype == jnp.bfloat16


# Activations

FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "softrelu": lambda x: np.log1p(np.exp(x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "log_sigmoid": lambda x: -np.log1p(np.exp(-x)),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "identity": lambda x: x,
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
    "log_softmax": lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_by_name(name, key):
    x = np.linspace(-7, 7, 30, dtype="float32").reshape(5, 6)
    layer = nn.Activation(name)
    params = layer.init(key, x)
    np.testing.assert_allclose(jax.jit(layer)(params, x), FORMULAS[name](x), rtol=1e-4, atol=1e-5)
    half = jax.ShapeDtypeStruct(x.shape, "bfloat16")
    assert jax.eval_shape(layer, params, half).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["relu", "sigmoid", "softmax"])
def test_dense_activates(name, key):
    x = np.linspace(-7, 7, 30, dtype="float32").reshape(5, 6)
    layer = nn.Dense(4, activation=name)
    params = layer.init(key, x)
    linear = np.asarray(x) @ np.asarray(params.weight).T
    np.testing.assert_allclose(layer(params, x), FORMULAS[name](linear), rtol=1e-4, atol=1e-5)


def test_other_activations():
    x = jnp.linspace(-3, 3, 20)
    close(nn.Activation("selu")(pt.from_tree({}), x), jax.nn.selu(x))
    close(nn.Activation("gelu")(pt.from_tree({}), x), jax.nn.gelu(x, approximate=False))
    close(nn.Activation("gelu_tanh")(pt.from_tree({}), x), jax.nn.gelu(x))


def test_activations_as_functions(key):
    x = jnp.linspace(-3, 3, 10).reshape(2, 5)
    by_name, by_function = nn.Dense(4, activation="tanh"), nn.Dense(4, activation=jnp.tanh)
    params = by_name.init(key, x)
    close(by_function(params, x), by_name(params, x))
    assert by_function != by_name
    assert by_function == nn.Dense(4, activation=jnp.tanh)
    close(nn.Activation(double)(pt.from_tree({}), x), 2 * x)


def test_an_activation_without_a_name_has_a_repr():
    leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)
    for layer in (nn.Activation(leaky), nn.Dense(3, leaky), nn.Lambda(leaky)):
        assert "leaky_relu" in repr(layer)


@pytest.mark.parametrize("use", [nn.Activation, lambda name: nn.Dense(3, activation=name)])
@pytest.mark.parametrize(
    ("wrong", "right"), [("rleu", "relu"), ("Relu", "relu"), ("sigmod", "sigmoid")]
)
def test_an_unknown_activation_suggests_close_names(use, wrong, right):
    with pytest.raises(ValueError, match=f"no activation '{wrong}'. Did you mean .*`{right}`") as info:
        use(wrong)
    assert "any function of x" in str(info.value)
    use(right)


def test_an_unknown_activation_lists_the_names():
    with pytest.raises(ValueError, match="no activation 'zzz'. The names are .*relu.*tanh"):
        nn.Activation("zzz")
    with pytest.raises(ValueError, match="no activation 3"):
        nn.Dense(4, activation=3)


# Flatten and Lambda


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3), (2,), (1, 1, 1, 1)], ids=str)
def test_flatten(shape, key):
    x = normal(*shape)
    y = nn.Flatten()(nn.Flatten().init(key, x), x)
    np.testing.assert_array_equal(y, np.asarray(x).reshape(shape[0], -1))


def test_lambda(key):
    x = jnp.arange(4.0)
    layer = nn.Lambda(double)
    np.testing.assert_array_equal(layer(layer.init(key, x), x), 2 * np.arange(4))
    assert layer == nn.Lambda(double)
    assert layer != nn.Lambda(jnp.tanh)
    assert nn.Sequential(double)[0] == layer


# Sequential


def all_sorts():
    return nn.Sequential(
        nn.Dense(6),
        nn.Dropout(0.5),
        nn.Activation("relu"),
        nn.Dense(4),
        nn.Flatten(),
        double,
        nn.Sequential(nn.Dense(4), nn.Dropout(0.1)),
        nn.Activation("tanh"),
        nn.Activation("relu"),
        nn.Activation(double),
        lambda x: x + 1,
        nn.Sequential(),
        head=nn.Dense(2),
    )


ALL_SORTS = ["dense0", "dropout0", "relu0", "dense1", "flatten0", "lambda0", "sequential0", "tanh0"]
ALL_SORTS += ["relu1", "activation0", "lambda1", "sequential1", "head"]


def test_names_count_each_alias(key):
    net = all_sorts()
    params = net.init(key, of(2, 5))
    assert list(net.names) == ALL_SORTS
    assert list(params) == ALL_SORTS
    assert list(params.sequential0) == ["dense0", "dropout0"]
    assert list(pt.collect(params)) == [
        f"{layer}_{leaf}"
        for layer in ("dense0", "dense1", "sequential0_dense0", "head")
        for leaf in ("weight", "bias")
    ]


def test_positions_agree_with_structural_names(key):
    net = all_sorts()
    params = net.init(key, of(2, 5))
    assert len(params) == len(net) == len(ALL_SORTS)
    for i, name in enumerate(ALL_SORTS):
        assert list(params[i]) == list(params[name])
        assert jax.tree.structure(params[i]) == jax.tree.structure(params[name])
        assert net[i] is net[name]
    assert params[0].weight is params.dense0.weight
    assert params[3].weight is params.dense1.weight
    assert params[6][0].bias is params.sequential0.dense0.bias
    assert params[-1].bias is params.head.bias
    assert list(params[1]) == []


def test_more_than_ten_keep_their_order(key):
    net = nn.Sequential(*[nn.Dense(2) for _ in range(12)])
    params = net.init(key, of(1, 2))
    assert list(params) == [f"dense{i}" for i in range(12)]
    assert params[10].weight is params.dense10.weight


def test_sequential_computes_one_after_another(key):
    x = normal(3, 5)
    net = all_sorts()
    params = net.init(key, x)
    y = x
    for i, layer in enumerate(net):
        y = layer(params[i], y)
    close(net(params, x), y)
    assert list(net) == list(net.layers)


def test_named_children_come_last(key):
    net = nn.Sequential(nn.Dense(4), body=nn.Dense(3, "relu"), act=jnp.tanh, head=nn.Dense(2))
    params = net.init(key, of(2, 5))
    assert list(params) == ["dense0", "body", "act", "head"]
    assert [params[i].weight.shape for i in (0, 1, 3)] == [(4, 5), (3, 4), (2, 3)]
    assert net["act"] == nn.Lambda(jnp.tanh)
    assert net["head"] is net[-1]


@pytest.mark.parametrize("name", ["items", "training", "param", "key", "layers", "names", "shared"])
def test_a_child_may_be_called_like_an_attribute_of_the_tree(name, key):
    x = ones(2, 5)
    net = nn.Sequential(**{name: nn.Dense(3)})
    params = net.init(key, x)
    assert list(params) == [name]
    close(net(params, x), nn.Dense(3)(params[name], x))


@pytest.mark.parametrize("name", ["a/b", "", "/", "a/"])
def test_a_name_that_is_no_segment_is_refused_or_works(name, key):
    x = ones(2, 5)
    try:
        net = nn.Sequential(**{name: nn.Dense(3)})
        params = net.init(key, x)
    except (ValueError, pt.ParamTreeError):
        return
    assert net(params, x).shape == (2, 3)


def test_names_never_clash_unnoticed():
    # An alias that ends in a digit may collide with the counter of another alias.
    class Dense1(nn.Layer):
        def __call__(self, p, x):
            return p.param("weight", (2, 2), init.One()) @ x

    with contextlib.suppress(ValueError):
        net = nn.Sequential(*[nn.Dense(2) for _ in range(11)], Dense1())
        assert len(set(net.names)) == len(net)


def test_a_name_given_twice():
    with pytest.raises(ValueError, match="two children named dense0: .* named dense0, relu0") as info:
        nn.Sequential(nn.Dense(3), nn.Activation("relu"), dense0=nn.Dense(2))
    assert "Choose other names for the keyword arguments" in str(info.value)
    nn.Sequential(nn.Dense(3), nn.Activation("relu"), head=nn.Dense(2))
    nn.Sequential(nn.Dense(3), dense1=nn.Dense(2))


@pytest.mark.parametrize(
    ("child", "shown"),
    [
        (3, "3"),
        (None, "None"),
        ("relu", "'relu'"),
        (nn.Dense, "Dense"),
        ([nn.Dense(3)], r"\[Dense\(None -> 3, linear\)\]"),
    ],
    ids=["number", "None", "string", "class", "list"],
)
def test_a_child_that_is_not_callable(child, shown):
    with pytest.raises(
        TypeError, match=f"child 1 of a Sequential is {shown}; expected a layer"
    ) as info:
        nn.Sequential(nn.Flatten(), child)
    assert "nn.Sequential(*layers)" in str(info.value)
    with pytest.raises(TypeError, match=f"child head of a Sequential is {shown}"):
        nn.Sequential(nn.Flatten(), head=child)
    nn.Sequential(*[nn.Dense(3)])


def test_indexing():
    net = all_sorts()
    assert net[0] == nn.Dense(6)
    assert net[-1] == nn.Dense(2)
    assert net["sequential0"][0] == nn.Dense(4)
    with pytest.raises(KeyError, match="no child `dens0`.* Did you mean `dense0`"):
        net["dens0"]
    with pytest.raises(IndexError, match="out of range"):
        net[99]


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 13])
def test_slices_run_on_the_whole_tree(cut, key):
    x = normal(2, 5)
    net = all_sorts()
    params = net.init(key, x)
    first, second = net[:cut], net[cut:]
    assert isinstance(first, nn.Sequential)
    assert first.names + second.names == net.names
    for f, g in ((first, second), (jax.jit(first), jax.jit(second))):
        close(g(params, f(params, x)), net(params, x))
    assert first == net[:cut]
    assert hash(first) == hash(net[:cut])
    assert net[:] == net


def test_a_slice_starts_from_the_same_values(key):
    net = all_sorts()
    whole, part = net.init(key, of(2, 5)), net[:4].init(key, of(2, 5))
    assert list(part) == ALL_SORTS[:4]
    assert same(part.dense1, whole.dense1)
    assert list(net[3:].init(key, of(2, 6))) == ALL_SORTS[3:]


def test_a_slice_of_every_other_layer(key):
    net = nn.Sequential(nn.Dense(5), double, nn.Dense(5), double)
    params = net.init(key, x := ones(2, 5))
    assert net[::2].names == ("dense0", "dense1")
    close(4 * net[::2](params, x), net(params, x), rtol=1e-4)
    assert net[::-1].names == ("lambda1", "dense1", "lambda0", "dense0")


def test_a_slice_shows_the_names_that_it_keeps():
    net = nn.Sequential(nn.Dense(5), nn.Dropout(0.5), nn.Dense(2), head=nn.Dense(1))
    assert repr(net[:2]) == (
        "Sequential(\n  (0): Dense(None -> 5, linear)\n  (1): Dropout(p = 0.5, axes=())\n)"
    )
    assert "(dense1): Dense(None -> 2, linear)" in repr(net[2:])
    assert "(head): Dense(None -> 1, linear)" in repr(net[2:])


def test_nesting(key):
    x = normal(2, 5)
    flat = nn.Sequential(nn.Dense(4, "relu"), nn.Dense(3, "relu"), nn.Dense(2))
    deep = nn.Sequential(
        nn.Sequential(nn.Dense(4, "relu"), nn.Sequential(nn.Dense(3, "relu"))), nn.Dense(2)
    )
    params = deep.init(key, x)
    assert list(pt.collect(params, ".*weight")) == [
        "sequential0_dense0_weight",
        "sequential0_sequential0_dense0_weight",
        "dense0_weight",
    ]
    moved = jax.tree.unflatten(jax.tree.structure(flat.init(key, x)), jax.tree.leaves(params))
    close(flat(moved, x), deep(params, x))


def test_plain_functions_of_x(key):
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    net = nn.Sequential(jnp.tanh, lambda x: x[:, :2], functools.partial(jnp.sum, axis=1), abs)
    params = net.init(key, x)
    assert list(params) == ["lambda0", "lambda1", "lambda2", "lambda3"]
    assert jax.tree.leaves(params) == []
    np.testing.assert_allclose(net(params, x), np.abs(np.tanh(x)[:, :2].sum(1)), rtol=1e-6)


def test_an_empty_sequential(key):
    x = ones(2, 3)
    net = nn.Sequential()
    params = net.init(key, x)
    assert len(net) == len(params) == 0
    assert net(params, x) is x
    assert repr(net) == "Sequential(\n)"


def test_repr_of_nets_is_that_of_gluon():
    def block(size):
        return nn.Sequential(
            nn.Dense(32, activation="relu", in_units=size), nn.Dense(16, activation="relu", in_units=32)
        )

    net = nn.Sequential(
        nn.Sequential(block(20), block(16), block(16), block(16)), nn.Dense(10, in_units=16)
    )
    assert repr(net) == (
        "Sequential(\n"
        "  (0): Sequential(\n"
        "    (0): Sequential(\n"
        "      (0): Dense(20 -> 32, Activation(relu))\n"
        "      (1): Dense(32 -> 16, Activation(relu))\n"
        "    )\n"
        "    (1): Sequential(\n"
        "      (0): Dense(16 -> 32, Activation(relu))\n"
        "      (1): Dense(32 -> 16, Activation(relu))\n"
        "    )\n"
        "    (2): Sequential(\n"
        "      (0): Dense(16 -> 32, Activation(relu))\n"
        "      (1): Dense(32 -> 16, Activation(relu))\n"
        "    )\n"
        "    (3): Sequential(\n"
        "      (0): Dense(16 -> 32, Activation(relu))\n"
        "      (1): Dense(32 -> 16, Activation(relu))\n"
        "    )\n"
        "  )\n"
        "  (1): Dense(16 -> 10, linear)\n"
        ")"
    )


def test_repr_of_all_sorts():
    net = nn.Sequential(
        nn.Embedding(9, 4), nn.Flatten(), double, nn.Activation("relu"), head=nn.Dense(2)
    )
    assert repr(net) == (
        "Sequential(\n"
        "  (0): Embedding(9 -> 4, float32)\n"
        "  (1): Flatten\n"
        "  (2): Lambda(double)\n"
        "  (3): Activation(relu)\n"
        "  (head): Dense(None -> 2, linear)\n"
        ")"
    )


# The same instance twice


def dense(*names):
    """Returns the ties of dense layers written as alias:source."""
    pairs = (name.split(":") for name in names)
    return {f"{a}_{leaf}": f"{s}_{leaf}" for a, s in pairs for leaf in ("weight", "bias")}


def shared_nets():
    """Yields nets with the expected ties of their parameters."""
    d, e = nn.Dense(5, "tanh"), nn.Dense(5, "tanh")
    inner = nn.Sequential(d, d)
    yield "flat", nn.Sequential(d, e, d), dense("dense2:dense0")
    yield "thrice", nn.Sequential(d, d, d), dense("dense1:dense0", "dense2:dense0")
    yield "equal, not the same", nn.Sequential(d, e, nn.Dense(5, "tanh")), {}
    yield "down", nn.Sequential(d, nn.Sequential(e, d)), dense("sequential0_dense1:dense0")
    yield "up", nn.Sequential(nn.Sequential(e, d), d), dense("dense0:sequential0_dense1")
    yield (
        "across",
        nn.Sequential(nn.Sequential(d), nn.Sequential(e, d)),
        dense("sequential1_dense1:sequential0_dense0"),
    )
    yield (
        "inside and outside",
        nn.Sequential(d, inner),
        dense("sequential0_dense0:dense0", "sequential0_dense1:dense0"),
    )
    yield (
        "a net twice",
        nn.Sequential(once := nn.Sequential(d, e), once),
        dense("sequential1_dense0:sequential0_dense0", "sequential1_dense1:sequential0_dense1"),
    )
    yield (
        "a net that ties, twice",
        nn.Sequential(inner, inner),
        dense(
            "sequential0_dense1:sequential0_dense0",
            "sequential1_dense0:sequential0_dense0",
            "sequential1_dense1:sequential0_dense0",
        ),
    )
    yield (
        "a net that ties, twice and deeper",
        nn.Sequential(d, nn.Sequential(inner), inner),
        dense(
            "sequential0_sequential0_dense0:dense0",
            "sequential0_sequential0_dense1:dense0",
            "sequential1_dense0:dense0",
            "sequential1_dense1:dense0",
        ),
    )
    yield "by name", nn.Sequential(d, head=d), dense("head:dense0")
    relu = nn.Activation("relu")
    yield "without parameters", nn.Sequential(relu, d, relu, nn.Sequential(relu)), {}


@pytest.mark.parametrize("case", [name for name, _, _ in shared_nets()])
def test_the_same_instance_is_a_tie(case, key):
    net, ties = next((net, ties) for name, net, ties in shared_nets() if name == case)
    x = normal(2, 5)
    params = net.init(key, x)
    assert pt.ties(params) == ties
    assert jax.tree.structure(pt.abstract(net, x)) == jax.tree.structure(params)
    for alias, source in ties.items():
        named = pt.collect(params, aliases=True)
        assert named[alias] is named[source]
    names = len(pt.collect(params, aliases=True))
    assert len(jax.tree.leaves(params)) == names - len(ties)
    grads = jax.grad(lambda p: net(p, x).sum())(params)
    untied = jax.grad(lambda p: net(p, x).sum())(pt.untie(params)) if ties else grads
    flat = pt.collect(untied, aliases=True)
    for name, grad in pt.collect(grads).items():
        total = sum((flat[alias] for alias, source in ties.items() if source == name), flat[name])
        np.testing.assert_allclose(grad, total, rtol=1e-5, atol=1e-6)
    restored = pickle.loads(pickle.dumps(net))
    assert restored == net
    assert pt.ties(restored.init(key, x)) == ties
    assert pt.ties(copy.deepcopy(net).init(key, x)) == ties


def test_what_layers_have_in_common_without_a_sequential_is_no_tie(key):
    default = nn.Dense(5)

    @dataclasses.dataclass(frozen=True)
    class Residual(nn.Layer):
        body: nn.Layer = default  # a default is the same instance for all

        def __call__(self, p, x):
            return x + self.body(p.body, x)

    twice = nn.Sequential(Residual(), residual := Residual(), residual)
    params = twice.init(key, of(2, 5))
    assert pt.ties(params) == {
        "residual2_body_weight": "residual1_body_weight",
        "residual2_body_bias": "residual1_body_bias",
    }


def test_nets_that_share_differently_are_different():
    nets = [net for _, net, _ in shared_nets()]
    assert len(set(nets)) == len(nets)
    d, e, f = (nn.Dense(5) for _ in range(3))
    partitions = [(d, d, d), (d, d, e), (d, e, d), (d, e, e), (d, e, f)]
    assert len({nn.Sequential(*layers) for layers in partitions}) == 5
    assert len({nn.Sequential(a, nn.Sequential(b, c)) for a, b, c in partitions}) == 5
    # The outer net includes the ties of the inner net.
    assert nn.Sequential(nn.Sequential(d, d)) != nn.Sequential(nn.Sequential(d, e))
    assert nn.Sequential(d, d) == nn.Sequential(e, e)
    assert hash(nn.Sequential(d, d)) == hash(nn.Sequential(e, e))


def test_sharing_survives_a_slice(key):
    d = nn.Dense(5)
    net = nn.Sequential(nn.Dense(5), d, d, nn.Dense(2))
    params = net.init(key, x := ones(2, 5))
    assert pt.ties(net[1:3].init(key, x)) == dense("dense2:dense1")
    assert pt.ties(net[2:].init(key, x)) == {}
    close(net[2:](params, net[:2](params, x)), net(params, x))


def test_sharing_inside_a_model(key):
    def model(p, x):
        d = nn.Dense(5)
        return nn.Sequential(d, nn.Sequential(d))(p.body, nn.Dense(5)(p.stem, x))

    params = pt.init(model, key, of(2, 5))
    assert pt.ties(params) == dense("body_sequential0_dense0:body_dense0")


# Compilation


def test_equal_nets_share_compiled_code(key):
    counting = Counting()

    def make():
        d = nn.Dense(5)
        return nn.Sequential(d, nn.Dropout(0.5), d, counting, nn.Sequential(nn.Dense(2, "relu")))

    x = ones(2, 5)
    nets = [make() for _ in range(3)]  # jax drops compiled code together with its function
    params = nets[0].init(key, x)
    counting.calls = 0
    for net in nets:
        jax.jit(net)(params, x)
    assert counting.calls == 1
    runs = [pt.training(net) for net in nets]
    for run in runs:
        jax.jit(run)(params, x, key=key)
    assert counting.calls == 2
    jax.jit(nets[1])(jax.tree.map(lambda w: w + 1, params), x)
    assert counting.calls == 2
    other = nets[0][:4]
    jax.jit(other)(params, x)
    assert counting.calls == 3


def test_sub_trees_of_one_form_share_compiled_code(key):
    counting = Counting()
    block = nn.Sequential(nn.Dense(5), counting)
    net = nn.Sequential(*[nn.Sequential(nn.Dense(5), counting) for _ in range(3)])
    params = net.init(key, x := ones(2, 5))
    counting.calls = 0
    run = jax.jit(block)
    for i in range(3):
        x = run(params[i], x)
    assert counting.calls == 1


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (2, 4), (1, 3, 4)])
def test_one_row_and_many_are_the_same_product(shape, key):
    layer, x = nn.Dense(3, flatten=False), normal(*shape)
    params = pt.reinit(pt.init(layer, key, x), key, {".*": init.Normal(1.0)})
    weight, bias = map(np.asarray, (params.weight, params.bias))
    np.testing.assert_allclose(layer(params, x), np.asarray(x) @ weight.T + bias, rtol=1e-5, atol=1e-6)
    many = jnp.broadcast_to(x, (5, *shape))
    np.testing.assert_allclose(
        jax.vmap(lambda x: layer(params, x))(many)[3], layer(params, x), rtol=1e-5
    )
    grads = pt.grad(lambda p: (layer(p, x) ** 2).sum())(params)
    rows, y = x.reshape(-1, 4), layer(params, x).reshape(-1, 3)
    np.testing.assert_allclose(grads.weight, 2 * y.T @ rows, rtol=1e-4, atol=1e-5)


def test_a_training_step_is_traced_once(key):
    counting = Counting()
    net = nn.Sequential(
        nn.Dense(8, "relu"), nn.Dropout(0.5), counting, d := nn.Dense(8), d, nn.Dense(1)
    )
    x, y = normal(16, 5), ones(16, 1)
    params = net.init(key, x)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    @jax.jit
    def step(params, state, key):
        def objective(params):
            output, params = pt.training(net)(params, x, key=key)
            return ((output - y) ** 2).mean(), params

        (value, params), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    structure = jax.tree.structure(params)
    state = optimizer.init(params)
    counting.calls = 0
    values = []
    for k in jax.random.split(key, 5):
        params, state, value = step(params, state, k)
        values.append(float(value))
    assert counting.calls == 1
    assert jax.tree.structure(params) == structure
    assert params.dense2.weight is params.dense1.weight
    assert values[-1] < values[0]


# Dropout


def dropped(layer, x, key, params=None):
    """Returns the output in training."""
    params = layer.init(key, x) if params is None else params
    return pt.training(layer)(params, x, key=key)[0]


def test_dropout_does_nothing_in_inference(key):
    x = normal(4, 5)
    for rate in (0.0, 0.5, 0.99):
        layer = nn.Dropout(rate)
        assert layer(layer.init(key, x), x) is x
    net = nn.Sequential(nn.Dropout(0.9), double)
    close(jax.jit(net)(net.init(key, x), x), 2 * x)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(rate, key):
    x = jnp.full((200, 200), 3.0)
    y = np.asarray(dropped(nn.Dropout(rate), x, key))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 3 / (1 - rate), rtol=1e-5)
    error = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error
    assert abs(y.mean() - 3) < 5 * 3 * error / (1 - rate)
    # Neither rows nor columns share a mask.
    for axis in (0, 1):
        share = kept.mean(axis)
        assert np.abs(share - (1 - rate)).max() < 6 * np.sqrt(rate * (1 - rate) / 200)


@pytest.mark.parametrize("axes", [(0,), (1,), (-1,), (0, 2), (-3, -2, 2)], ids=str)
def test_dropout_axes_share_their_fate(axes, key):
    x = ones(12, 11, 10)
    y = np.asarray(dropped(nn.Dropout(0.5, axes=axes), x, key))
    assert set(np.unique(y)) <= {0.0, 2.0}
    shared = {axis % 3 for axis in axes}
    for axis in range(3):
        constant = (y == np.take(y, [0], axis)).all()
        assert constant == (axis in shared)


def test_dropout_axes_that_the_input_does_not_have(key):
    for axis in (2, 5, -3):
        with pytest.raises(ValueError, match=r"axes are out of range for an input of shape \(3, 4\)"):
            dropped(nn.Dropout(0.5, axes=(axis,)), ones(3, 4), key)


def test_dropout_of_rate_0_needs_no_key(key):
    x = ones(3, 4)
    net = nn.Sequential(nn.Dropout(0), nn.Dropout(0.0, axes=(1,)))
    y, _ = pt.training(net)(net.init(key, x), x)
    assert y is x


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, 1.5, float("nan")])
def test_dropout_rates(rate):
    with pytest.raises(ValueError, match=r"Dropout: rate must be in \[0, 1\), but found"):
        nn.Dropout(rate)


def test_dropout_without_a_key_names_the_layer(key):
    x = ones(3, 4)
    net = nn.Sequential(nn.Dense(4), nn.Sequential(nn.Dropout(0), nn.Dropout(0.5)))
    params = net.init(key, x)
    for f in (pt.training(net), jax.jit(pt.training(net))):
        with pytest.raises(pt.ScopeError, match="`sequential0_dropout1` draws random numbers") as info:
            f(params, x)
        assert "key=jax.random.key(0)" in str(info.value)
        f(params, x, key=jax.random.key(0))  # what the text says to do
    names = pt.from_tree(pruned(params.to_dict()))
    with pytest.raises(pt.ScopeError, match="`sequential0_dropout1` draws random numbers"):
        pt.training(net)(names, x)


def test_dropout_masks_differ(key):
    x = ones(8, 8)

    def model(p, x):
        drop, other = nn.Dropout(0.5), nn.Sequential(d := nn.Dropout(0.5), d)
        y = [drop(p.a, x), drop(p.a, x), drop(p.b, x), drop(p.a, x), other[0](p.net.x, x)]
        return jnp.stack([*y, nn.Dropout(0.5)(p.net.dropout0, x)])

    params = pt.init(model, key, x)
    masks = np.asarray(dropped(model, x, key, params)).reshape(6, -1)
    assert len({mask.tobytes() for mask in masks}) == 6
    correlation = np.corrcoef(masks)
    assert np.abs(correlation - np.eye(6)).max() < 5 / 8
    assert same(dropped(model, x, key, params), dropped(model, x, key, params))
    other = dropped(model, x, jax.random.key(1), params)
    assert not any((a == b).all() for a, b in zip(masks, np.asarray(other).reshape(6, -1), strict=True))


@pytest.mark.parametrize("rate", [0.001, 1 / 64, 0.1, 0.5, 0.9, 0.999])
def test_dropout_drops_at_its_rate_and_each_entry_for_itself(rate, key):
    x = ones(300, 301)  # an odd number, as entries share words in twos
    mask = np.asarray(dropped(nn.Sequential(nn.Dropout(rate)), x, key)) != 0
    assert abs(mask.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / mask.size)
    for one, other in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
        if 0.05 < rate < 0.95:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / 300
    # The mean over rows and over columns varies as that of independent entries does.
    for axis, count in ((0, 300), (1, 301)):
        expected = rate * (1 - rate) / count
        assert 0.6 < mask.mean(axis).var() / expected < 1.5


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 1), (1, 3)], ids=str)
def test_dropout_of_any_shape(shape, key):
    y = np.asarray(dropped(nn.Sequential(nn.Dropout(0.5)), ones(*shape), key))
    assert y.shape == shape and set(np.unique(y)) <= {0.0, 2.0}


def test_the_same_dropout_twice_draws_twice(key):
    x = ones(20, 20)
    net = nn.Sequential(d := nn.Dropout(0.5), d, nn.Sequential(d))
    y = np.asarray(dropped(net, x, key))
    assert set(np.unique(y)) == {0.0, 8.0}
    assert abs((y != 0).mean() - 1 / 8) < 5 * np.sqrt(7 / 64 / 400)


def test_a_mask_depends_on_the_layers_path_alone(key):
    x = ones(8, 8)
    alone = nn.Sequential(nn.Dropout(0.5))
    among = nn.Sequential(abs, nn.Dropout(0.5), nn.Activation("relu"), more=abs)
    assert same(dropped(alone, x, key), dropped(among, x, key))


def test_dropout_under_jit_and_vmap(key):
    x = ones(5, 8, 8)
    net = nn.Sequential(nn.Dropout(0.5))
    params = net.init(key, x[0])
    run = pt.training(net)
    one = run(params, x[0], key=key)[0]
    close(jax.jit(run)(params, x[0], key=key)[0], one)
    keys = jax.random.split(key, 5)
    own = jax.vmap(lambda x, k: run(params, x, key=k)[0])(x, keys)
    close(own, np.stack([run(params, x[i], key=keys[i])[0] for i in range(5)]))
    assert len({np.asarray(y).tobytes() for y in own}) == 5
    shared = jax.vmap(lambda x: run(params, x, key=key)[0])(x)
    close(shared, np.stack([one] * 5))


def test_dropout_under_scan(key):
    x = ones(5, 8, 8)
    net = nn.Sequential(nn.Dropout(0.5))
    params = net.init(key, x[0])
    keys = jax.random.split(key, 5)
    run = pt.training(net)

    def step(params, xk):
        y, params = run(params, xk[0], key=xk[1])
        return params, y

    after, y = jax.lax.scan(step, params, (x, keys))
    assert same(after, params)
    close(y, np.stack([run(params, x[i], key=keys[i])[0] for i in range(5)]))
    assert len({np.asarray(one).tobytes() for one in y}) == 5


def test_dropout_under_checkpoint_recomputes_the_same_mask(key):
    x = normal(8, 8) + 5
    net = nn.Sequential(nn.Dropout(0.5), jnp.exp, nn.Dropout(0.5))
    params = net.init(key, x)

    def remat(p, x):
        return jax.checkpoint(net)(p, x)

    def total(model):
        return lambda x: pt.training(model)(params, x, key=key)[0].sum()

    value, slope = jax.jit(jax.value_and_grad(total(net)))(x)
    close(jax.jit(jax.value_and_grad(total(remat)))(x), (value, slope))
    close(jax.grad(total(remat))(x), slope)
    assert 0 < (slope == 0).mean() < 1


def test_the_gradient_of_what_is_dropped_is_0(key):
    x = ones(8, 8)
    layer = nn.Dropout(0.5)
    y = dropped(layer, x, key)
    grad = jax.grad(lambda x: dropped(layer, x, key).sum())(x)
    np.testing.assert_array_equal(grad, y)


# Embedding


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((2, 3), dtype) for dtype in ("int8", "uint8", "int16", "int32", "uint32")),
        *((shape, "int32") for shape in ((), (3,), (0,))),
    ],
)
def test_embedding(shape, dtype, key):
    ids = np.random.default_rng(0).integers(7, size=shape).astype(dtype)
    layer = nn.Embedding(7, 4)
    params = layer.init(key, ids)
    assert list(params) == ["weight"]
    assert params.weight.shape == (7, 4)
    for given in (ids, jnp.asarray(ids)):
        y = layer(params, given)
        assert y.shape == (*shape, 4)
        np.testing.assert_array_equal(y, np.asarray(params.weight)[ids.astype("int64")])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_embedding_takes_integers(dtype, key):
    layer = nn.Embedding(7, 4)
    ids = jnp.ones((2, 3), dtype)
    with pytest.raises(TypeError, match=rf"Embedding\(7 -> 4, float32\) needs integers.* {dtype}"):
        layer.init(key, ids)
    params = layer.init(key, ids.astype("int32"))  # what the text says to do
    with pytest.raises(TypeError, match="cast the ids to int32"):
        layer(params, ids)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_index_out_of_range_gives_nan(wrap, key):
    layer = nn.Embedding(7, 4)
    params = layer.init(key, jnp.array([0]))
    y = wrap(layer)(params, jnp.array([6, 7, 1000, -8]))
    assert jnp.isfinite(y[0]).all()
    assert jnp.isnan(y[1:]).all()


def test_embedding_adds_the_gradients_of_repeated_ids(key):
    layer = nn.Embedding(5, 2)
    ids = jnp.array([[1, 3, 1], [1, 0, 3]])
    params = layer.init(key, ids)
    weights = normal(2, 3, 2)
    grad = jax.grad(lambda p: (weights * layer(p, ids)).sum())(params).weight
    expected = np.zeros((5, 2), "float32")
    np.add.at(expected, np.asarray(ids), np.asarray(weights))
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
    assert not grad[2].any()
    assert not grad[4].any()


def test_an_embedding_ties_to_its_decoder_without_a_transpose(key):
    def model(p, ids):
        x = nn.Embedding(7, 4)(p.embed, ids)
        return nn.Dense(7, use_bias=False, flatten=False)(p.decoder, x)

    ids = jnp.array([[1, 2, 3]])
    params = pt.init(model, key, ids, ties={"decoder/weight": "embed/weight"})
    assert params.decoder.weight is params.embed.weight
    logits = model(params, ids)
    close(logits, params.embed.weight[ids] @ params.embed.weight.T)
    grads = jax.grad(lambda p: model(p, ids).sum())(params)
    assert len(jax.tree.leaves(grads)) == 1
