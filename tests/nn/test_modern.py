"""Layers of modern nets against PyTorch or their formulas in numpy: outputs, gradients, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def value_and_grads(layer, params, x):
    """Returns the output, and the gradients of its sum with a different weight for each entry."""
    y = layer(params, x)
    weights = normal(*y.shape, seed=9)
    grads = jax.jit(jax.grad(lambda p, x: (weights * layer(p, x)).sum(), (0, 1)))(params, x)
    return y, weights, grads


# DropPath


def dropped(layer, x, key):
    return pt.training(layer)(layer.init(key, x), x, key=key)[0]


def test_drop_path_drops_whole_examples(key):
    x = normal(1000, 2, 3)
    y = np.asarray(dropped(nn.DropPath(0.3), x, key))
    kept = (y != 0).any((1, 2))
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / 1000)
    close(y[kept], x[kept] / 0.7)
    assert not y[~kept].any()
    grad = jax.grad(lambda x: dropped(nn.DropPath(0.3), x, key).sum())(x)
    close(grad, np.broadcast_to(kept[:, None, None], x.shape) / np.float32(0.7))


@pytest.mark.parametrize("shape", [(20,), (20, 3), (20, 2, 3, 4)], ids=str)
def test_drop_path_of_any_rank(shape, key):
    y = np.asarray(dropped(nn.DropPath(0.5), np.ones(shape, "float32"), key)).reshape(20, -1)
    assert {tuple(row) for row in y} == {(0.0,) * y.shape[1], (2.0,) * y.shape[1]}


def test_drop_path_does_nothing_in_inference_or_at_rate_0(key):
    x = normal(3, 4)
    layer = nn.DropPath(0.9)
    assert layer(layer.init(key, x), x) is x
    zero = nn.DropPath(0)
    assert pt.training(zero)(zero.init(key, x), x)[0] is x


def test_drop_path_needs_a_key_and_names_the_layer(key):
    net = nn.Sequential(nn.Dense(4), nn.DropPath(0.5))
    params = net.init(key, normal(3, 4))
    with pytest.raises(pt.ScopeError, match="`droppath0` draws random numbers"):
        pt.training(net)(params, normal(3, 4))


def test_drop_path_in_copies(key):
    x = np.ones((64, 3), "float32")
    net = nn.Repeat(nn.DropPath(0.5), 2)
    assert set(np.unique(dropped(net, x, key))) == {0.0, 4.0}  # each copy draws its own
    net = nn.Vmap(nn.DropPath(0.5), 2, in_axes=None)
    one, other = np.asarray(dropped(net, x, key))
    assert (one != other).any()


# GatedMLP


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", jnp.tanh], ids=["silu", "gelu", "tanh"])
def test_gated_mlp(activation, use_bias, key):
    x = normal(2, 3, 4)
    layer = nn.GatedMLP(6, activation, use_bias, weight_initializer=init.Normal(0.5))
    params = layer.init(key, x)
    names = ["weight", "bias"] if use_bias else ["weight"]
    assert list(pt.collect(params)) == [f"{d}_{n}" for d in ("gate", "up", "down") for n in names]
    assert params.gate.weight.shape == params.up.weight.shape == (6, 4)
    assert params.down.weight.shape == (4, 6)
    params = jax.tree.map(lambda w: jnp.asarray(normal(*w.shape, seed=w.size)), params)
    y, weights, grads = value_and_grads(layer, params, x)

    def dense(p, x):
        y = x @ np.asarray(p.weight, "float64").T
        return y + np.asarray(p.bias, "float64") if use_bias else y

    erf = np.vectorize(math.erf)
    functions = {
        "silu": lambda a: a / (1 + np.exp(-a)),
        "gelu": lambda a: a * (1 + erf(a / 2**0.5)) / 2,
    }
    act = functions.get(activation, np.tanh)

    def reference(p, x):
        return dense(p.down, act(dense(p.gate, x)) * dense(p.up, x))

    close(y, reference(params, x))
    # Central differences of the formula in double precision, along a random direction.
    step, direction = 1e-5, normal(*x.shape, seed=3).astype("float64")
    ends = [(weights * reference(params, x + s * step * direction)).sum() for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose((np.asarray(grads[1]) * direction).sum(), slope, rtol=1e-4)


def test_gated_mlp_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 4)
    layer = nn.GatedMLP(6)
    params = jax.tree.map(lambda s: jnp.asarray(normal(*s.shape, seed=s.size)), pt.abstract(layer, x))
    y, weights, (grads, slope) = value_and_grads(layer, params, x)
    leaves = [torch.tensor(np.asarray(w), requires_grad=True) for w in (x, *jax.tree.leaves(params))]
    given, gate, up, down = leaves
    linear = torch.nn.functional.linear
    found = linear(torch.nn.functional.silu(linear(given, gate)) * linear(given, up), down)
    close(y, found.detach())
    (torch.tensor(weights) * found).sum().backward()
    for ours, leaf in zip((slope, *jax.tree.leaves(grads)), leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-5, atol=1e-4)


# LayerScale


def test_layer_scale(key):
    x = normal(2, 3, 4)
    params = nn.LayerScale().init(key, x)
    np.testing.assert_array_equal(params.gamma, np.full(4, 1e-5, "float32"))
    params = pt.from_tree({"gamma": normal(4, seed=1)})
    y, weights, (grads, slope) = value_and_grads(nn.LayerScale(), params, x)
    close(y, x * params.gamma)
    close(grads.gamma, (weights * x).sum((0, 1)))
    close(slope, weights * params.gamma)


def test_a_block_of_a_transformer(key):
    def block():
        return nn.Sequential(
            nn.Residual(nn.RMSNorm(), nn.MultiHeadAttention(2), nn.LayerScale(), nn.DropPath(0.2)),
            nn.Residual(nn.RMSNorm(), nn.GatedMLP(8), nn.LayerScale(), nn.DropPath(0.2)),
        )

    net = nn.Sequential(
        nn.ClassToken(), nn.LearnedPositions(8), nn.SinusoidalPositions(), nn.Repeat(block(), 3)
    )
    x = normal(2, 5, 4)
    params = net.init(key, x)
    assert net(params, x).shape == (2, 6, 4)
    y, after = jax.jit(pt.training(net))(params, x, key=key)
    assert y.shape == (2, 6, 4)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert params[3][0][2].gamma.shape == (3, 4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.DropPath(0.5),
        nn.LayerScale(2.0),
        nn.GatedMLP(6),
        nn.LearnedPositions(5),
        nn.SinusoidalPositions(),
    ],
    ids=repr,
)
def test_copies(layer, key):
    x = normal(2, 3, 4)
    net, all_of = nn.Repeat(layer, 2), nn.Vmap(layer, 2, in_axes=None)
    params = net.init(key, x)
    assert jax.tree.structure(all_of.init(key, x)) == jax.tree.structure(params)
    one, other = (pt.from_tree(jax.tree.map(lambda w, i=i: w[i], params.to_dict())) for i in (0, 1))
    close(net(params, x), layer(other, layer(one, x)))
    close(all_of(params, x), np.stack([layer(one, x), layer(other, x)]))


# Positions


def test_learned_positions(key):
    layer, x = nn.LearnedPositions(5), normal(2, 3, 4)
    assert layer.init(key, x).weight.shape == (5, 4)
    params = pt.from_tree({"weight": normal(5, 4, seed=1)})
    y, weights, (grads, slope) = value_and_grads(layer, params, x)
    close(y, x + params.weight[:3])
    close(slope, weights)
    close(grads.weight[:3], weights.sum(0))
    assert not grads.weight[3:].any()
    assert layer(params, normal(2, 5, 4)).shape == (2, 5, 4)
    with pytest.raises(
        ValueError, match=r"LearnedPositions\(5\) has 5 positions, but found a length of 6"
    ):
        layer(params, normal(2, 6, 4))


@pytest.mark.parametrize("layer", [nn.LearnedPositions(7), nn.SinusoidalPositions()], ids=repr)
def test_positions_by_example_and_of_pieces(layer: nn.Layer) -> None:
    x = normal(2, 5, 4)
    params = pt.init(layer, jax.random.key(0), x)
    whole = layer(params, x)
    close(layer(params, x, jnp.arange(5)), whole)
    positions = jnp.array([[0, 0, 1, 2, 3], [3, 4, 2, 6, 0]])
    got = jax.jit(layer)(params, x, positions)
    row = layer(params, jnp.zeros((1, 7, 4)))[0]
    close(got, x + row[positions])
    # A model that decodes has to say where a piece lies.
    steps = pt.decoding(layer)
    with pytest.raises(pt.ScopeError, match="counts from 0 in every call, but the model decodes"):
        steps(params, x[:, 3:])
    y, _ = steps(params, x[:, 3:], 3 + jnp.arange(2))
    close(y, whole[:, 3:])
    for wrong in (jnp.arange(4), jnp.zeros((1, 5), int), jnp.arange(5.0)):
        with pytest.raises(ValueError, match=r"needs positions \(length,\) or \(batch, length\)"):
            layer(params, x, wrong)


def test_a_position_that_has_no_vector_is_nan() -> None:
    layer, x = nn.LearnedPositions(3), normal(1, 3, 4)
    params = pt.init(layer, jax.random.key(0), x)
    y = layer(params, x, jnp.array([-1, 2, 3]))
    assert jnp.isnan(y).all(2).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("length", "size", "base"), [(50, 6, 1e4), (3, 5, 100), (1, 1, 1e4), (0, 4, 2)]
)
def test_sinusoidal_positions(length, size, base):
    x = normal(2, length, size)
    layer = nn.SinusoidalPositions(base)
    y, weights, (_, slope) = value_and_grads(layer, pt.from_tree({}), x)
    expected = np.zeros((length, size))
    for t in range(length):
        for k in range(size):
            angle = t / base ** (2 * (k // 2) / size)
            expected[t, k] = math.cos(angle) if k % 2 else math.sin(angle)
    close(y, x + expected)
    close(slope, weights)


def test_class_token(key):
    layer, x = nn.ClassToken(), normal(2, 3, 4)
    assert layer.init(key, x).token.shape == (1, 4)
    params = pt.from_tree({"token": normal(1, 4, seed=1)})
    y, weights, (grads, slope) = value_and_grads(layer, params, x)
    close(y[:, 1:], x)
    close(y[:, 0], np.broadcast_to(params.token, (2, 4)))
    close(grads.token, weights[:, 0].sum(0, keepdims=True))
    close(slope, weights[:, 1:])


# Upsample


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("scale", [1, 2, 3, (1, 4)], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_upsample_is_that_of_pytorch(mode, scale, layout):
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 4, 5)
    layer = nn.Upsample(scale, mode, layout)
    last = layout == "NHWC"
    y, weights, (_, slope) = value_and_grads(
        layer, pt.from_tree({}), x.transpose(0, 2, 3, 1) if last else x
    )
    y, weights, slope = (np.moveaxis(a, -1, 1) if last else a for a in (y, weights, slope))
    given = torch.tensor(x, requires_grad=True)
    options = {"align_corners": False} if mode == "bilinear" else {}
    found = torch.nn.Upsample(scale_factor=scale, mode=mode, **options)(given)
    close(y, found.detach())
    (torch.tensor(weights) * found).sum().backward()
    close(slope, given.grad)


def test_upsample_repeats_or_interpolates():
    x = normal(1, 2, 3, 2)
    y = nn.Upsample((2, 3))({}, x)
    np.testing.assert_array_equal(y, x.repeat(2, 1).repeat(3, 2))
    np.testing.assert_array_equal(nn.Upsample(2, "bilinear")({}, x), nn.Bilinear(2)({}, x))


# Errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        *((lambda r=r: nn.DropPath(r), r"DropPath: rate must be in \[0, 1\), but found") for r in (1, -0.1)),
        (lambda: nn.DropPath(float("nan")), "DropPath: rate .* found nan"),
        (lambda: nn.GatedMLP(0), "GatedMLP: hidden must be a positive integer, but found 0"),
        (lambda: nn.GatedMLP(2.5), "GatedMLP: hidden .* found 2.5"),
        (lambda: nn.GatedMLP(4, "slu"), "no activation 'slu'"),
        (lambda: nn.LayerScale(float("inf")), "LayerScale: value must be a finite number, but found inf"),
        (lambda: nn.LayerScale("ones"), "LayerScale: value .* found 'ones'"),
        (lambda: nn.LearnedPositions(0), "LearnedPositions: length must be a positive integer"),
        (lambda: nn.SinusoidalPositions(1), "SinusoidalPositions: base must be .* above 1, but found 1"),
        (lambda: nn.SinusoidalPositions(math.inf), "SinusoidalPositions: base .* found inf"),
        (lambda: nn.Upsample(1.5), "Upsample: scale must be a positive integer or a tuple of 2"),
        (lambda: nn.Upsample(2, "cubic"), "Upsample: mode must be 'nearest' or 'bilinear'.* 'cubic'"),
        (lambda: nn.Upsample(2, layout="NCW"), "Upsample: layout must be 'NHWC' or 'NCHW'"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_inputs_of_another_rank_or_dtype(key):
    scalar = jnp.float32(1)
    for layer in (nn.DropPath(0.5), nn.LayerScale(), nn.GatedMLP(3)):
        with pytest.raises(ValueError, match="but found a scalar"):
            layer.init(key, scalar)
    for layer in (nn.LearnedPositions(5), nn.SinusoidalPositions(), nn.ClassToken()):
        with pytest.raises(
            ValueError, match=r"needs an input \(batch, length, size\), but found shape"
        ):
            layer.init(key, normal(2, 3))
        with pytest.raises(
            TypeError, match="needs floating-point numbers, but found int32: put an nn.E"
        ):
            layer.init(key, jnp.ones((1, 2, 3), "int32"))
    with pytest.raises(ValueError, match=r"Upsample.* needs an input \(batch, height, width, channels"):
        nn.Upsample(2).init(key, normal(2, 3))


def test_reprs():
    assert repr(nn.DropPath(0.1)) == "DropPath(rate=0.1)"
    assert repr(nn.GatedMLP(8)) == "GatedMLP(8, Activation(silu))"
    assert repr(nn.LayerScale()) == "LayerScale(1e-05)"
    assert repr(nn.Upsample(2)) == "Upsample(scale=(2, 2), mode=nearest, layout=NHWC)"


# Keyword arguments of layers made of layers


class Shift(nn.Layer):
    """Adds a parameter and what it is given by keyword."""

    def __call__(self, p, x, shift=None, *, factor=None):
        x = x + p.param("bias", x.shape[-1:], init.One())[None]
        x = x if shift is None else x + shift
        return x if factor is None else factor * x


class Scaled(nn.Layer):
    def __call__(self, p, x, factor=1.0):
        return factor * x


def test_a_keyword_argument_goes_to_every_layer_that_takes_it(key):
    x = jnp.zeros((2, 3))
    net = nn.Sequential(nn.Dense(3, weight_initializer="zeros"), Shift(), abs, Scaled(), Shift())
    params = net.init(key, x)
    close(net(params, x), 2 + np.zeros((2, 3)))
    close(net(params, x, shift=2.0), 1 + 2 + 1 + 2 + np.zeros((2, 3)))
    close(jax.jit(net)(params, x, factor=2.0), ((1 * 2) * 2 + 1) * 2 + np.zeros((2, 3)))
    assert same_tree(net.init(key, x, shift=jnp.ones((2, 3))), params)
    y, _ = pt.training(net)(params, x, shift=2.0, key=key)
    close(y, net(params, x, shift=2.0))
    close(net[1:](params, x, shift=2.0), net(params, x, shift=2.0))


def same_tree(a, b):
    close_leaves = all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    return jax.tree.structure(a) == jax.tree.structure(b) and close_leaves


def test_keyword_arguments_go_through_nested_layers(key):
    x, shift = jnp.zeros((2, 3)), jnp.full((2, 3), 2.0)
    block = nn.Residual(nn.Sequential(nn.Activation("relu"), Shift()))
    for net in (nn.Repeat(block, 2), nn.Repeat(block, 2, remat=True)):
        params = net.init(key, x, shift=shift)
        one = 2 * (0 + 1 + 2)  # x + relu(x) + 1 + shift, of 0 and then of 3
        close(net(params, x, shift=shift), one + 1 + 2 + np.zeros((2, 3)))
        close(net(pt.unstack(pt.from_tree({"net": params}), "net").net, x, shift=shift), 9 + 0 * x)
        outer = nn.Sequential(nn.Dense(3), net)
        assert outer(outer.init(key, x), x, shift=shift).shape == (2, 3)
        slope = jax.grad(lambda s, net=net, params=params: net(params, x, shift=s).sum())(shift)
        close(slope, np.full((2, 3), 3.0))  # the first copy's counts twice
    both = nn.Parallel(Shift(), Scaled(), abs)
    y = both(both.init(key, x), x, shift=shift, factor=2.0)
    close(y, np.concatenate([np.full((2, 3), 6.0), np.zeros((2, 6))], 1))
    many = nn.Vmap(Shift(), 4, in_axes=None)
    params = many.init(key, x, shift=shift)
    close(many(params, x, shift=shift), np.full((4, 2, 3), 3.0))
    close(
        many(pt.unstack(pt.from_tree({"net": params}), "net").net, x, shift=shift),
        3 + np.zeros((4, 2, 3)),
    )


def test_positional_and_keyword_arguments_of_repeat(key):
    def block(p, x, rate, *, shift):
        return x * rate + shift

    net = nn.Repeat(block, 2, in_axes=0)
    x = jnp.ones((2,))
    params = net.init(key, x, jnp.array([2.0, 3.0]), shift=1.0)
    close(net(params, x, jnp.array([2.0, 3.0]), shift=1.0), (2 + 1) * 3 + 1 + np.zeros(2))


def test_a_mask_in_a_sequential(key):
    net = nn.Sequential(nn.RMSNorm(), nn.Residual(nn.MultiHeadAttention(2)), nn.GatedMLP(6))
    x, mask = jnp.asarray(normal(2, 3, 4)), jnp.array([True, True, False])[None, None, None]
    params = net.init(key, x, mask=mask)
    y = net(params, x, mask=mask)
    other = net(params, x.at[:, 2].set(7.0), mask=mask)
    close(y[:, :2], other[:, :2])
    assert np.abs(net(params, x) - y).max() > 0


def test_a_keyword_argument_that_no_layer_takes(key):
    x = jnp.ones((2, 3))
    inner = nn.Sequential(nn.Dense(3), Shift())
    for net in (
        inner,
        nn.Residual(inner),
        nn.Parallel(inner),
        nn.Repeat(inner, 2),
        nn.Vmap(inner, 2, None),
    ):
        params = net.init(key, x)
        name = type(net).__name__
        text = f"{name}: no layer in it takes the keyword argument 'shfit'.*`?shift.*take factor, shift"
        with pytest.raises(TypeError, match=text):
            net(params, x, shfit=1.0)
    with pytest.raises(TypeError, match="'shift'. They take none"):
        nn.Sequential(nn.Dense(3), abs)(pt.from_tree({}), x, shift=1.0)
    with pytest.raises(TypeError, match="positional argument"):
        inner(inner.init(key, x), x, 1.0)  # keywords only


def test_a_layer_that_takes_any_keyword_argument(key):
    class Rest(nn.Layer):
        def __call__(self, p, x, **kwargs):
            return x + sum(kwargs.values())

    class Plain(nn.Sequential):  # takes none, unlike its base
        def __call__(self, p, x):
            return super().__call__(p, x)

    x = jnp.zeros((2, 3))
    net = nn.Sequential(Rest(), nn.Sequential(Rest()), Plain(Shift()), Scaled())
    y = net(net.init(key, x), x, one=1.0, factor=2.0)
    close(y, ((1 + 2) * 2 + 1) * 2 + np.zeros((2, 3)))


# Embedding


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint64"])
@pytest.mark.parametrize("rows", [7, 100, 200, 300])
def test_no_index_reads_another_row(rows, dtype, key):
    layer = nn.Embedding(rows, 2)
    params = layer.init(key, jnp.zeros((1,), "int32"))
    table = np.asarray(params.weight)
    info = np.iinfo(dtype)
    ids = [0, rows - 1, rows, -1, -rows, -rows - 1, 127, 255, 2**31, 2**32, 2**32 + 1, -(2**32)]
    ids = np.array([i for i in ids if info.min <= i <= info.max], dtype)
    expected = np.array(
        [table[i] if -rows <= i < rows else [np.nan] * 2 for i in ids.tolist()], "float32"
    )
    np.testing.assert_array_equal(layer(params, ids), expected)
    if info.bits <= 32:
        for call in (layer, jax.jit(layer)):
            np.testing.assert_array_equal(call(params, jnp.asarray(ids)), expected)
