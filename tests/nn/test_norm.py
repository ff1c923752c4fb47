"""Normalizing layers: compared with PyTorch, then running statistics under every transform."""

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from tests.helpers import x64

LAYERS = [nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm]
layers = pytest.mark.parametrize("make", LAYERS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def filled(layer, x, seed=0):
    """Returns parameters with distinct values and positive statistics."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.5, 1.5, s.shape), s.dtype), pt.abstract(layer, x)
    )


def near(found, expected, tolerance=1e-5):
    """Checks that arrays differ by at most 1e-5 of their scale."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= tolerance * max(
        1, np.abs(expected).max(initial=0)
    )


def all_near(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(near, found, expected)


def statistics(params):
    return {name: np.asarray(params[name]) for name in ("running_mean", "running_var")}


# PyTorch


def torch_norm(kind, channels, rank, groups, epsilon):
    """Returns PyTorch's layer, in double precision, for an input (batch, channels, *rank sizes)."""
    nn = pytest.importorskip("torch").nn
    number = max(rank, 1)
    batch = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    return {
        "batch": lambda: batch[number](channels, epsilon, momentum=0.3),
        "instance": lambda: instance[number](channels, epsilon, affine=True),
        "group": lambda: nn.GroupNorm(groups, channels, epsilon),
        "layer": lambda: nn.LayerNorm(channels, epsilon),
        "rms": lambda: nn.RMSNorm(channels, epsilon),
    }[kind]().double()


def our_norm(kind, axis, groups, epsilon):
    return {
        "batch": lambda: nn.BatchNorm(axis, 0.7, epsilon),
        "instance": lambda: nn.InstanceNorm(axis, epsilon, scale=True),
        "group": lambda: nn.GroupNorm(groups, epsilon, axis=axis),
        "layer": lambda: nn.LayerNorm(axis, epsilon),
        "rms": lambda: nn.RMSNorm(axis, epsilon),
    }[kind]()


TORCH = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "running_mean",
    "running_var": "running_var",
}


@pytest.mark.parametrize("kind", ["batch", "batch in training", "instance", "group", "layer", "rms"])
@settings(max_examples=8)
@given(data=st.data())
def test_values_and_gradients_are_those_of_pytorch(kind, data):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    kind, training = kind.split()[0], "training" in kind
    rank = data.draw(st.integers(1 if kind == "instance" else 0, 3))
    groups, each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    channels = groups * each
    sizes = data.draw(st.lists(st.integers(2, 3), min_size=rank, max_size=rank))
    shape = (data.draw(st.integers(2, 4)), channels, *sizes)
    axis = data.draw(st.sampled_from([1, -1]))
    # Not tiny: statistics of two values can be too small for float32.
    epsilon = data.draw(st.sampled_from([1e-3, 1e-1]))
    last = kind in ("layer", "rms")  # PyTorch normalizes over the last axis only
    x = 2 * normal(*shape) + 1
    torch_x = torch.tensor(np.moveaxis(x, 1, -1) if last else x, dtype=torch.float64)
    torch_x.requires_grad = True
    if axis == -1:
        x = np.moveaxis(x, 1, -1)
    layer, net = (
        our_norm(kind, axis, groups, epsilon),
        torch_norm(kind, channels, rank, groups, epsilon),
    )
    params = filled(layer, x)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name in TORCH:
                value.copy_(torch.tensor(np.asarray(params[TORCH[name]])))
    before = statistics(params) if kind == "batch" else {}
    net.train(training)
    weights = normal(*x.shape, seed=1)

    def objective(params, x):
        y, after = pt.training(layer)(params, x) if training else (layer(params, x), params)
        return (weights * y).sum(), (y, after)

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, (y, after)), (grads, slope) = run(params, x)

    def theirs(array):
        """Returns one of our arrays in PyTorch's layout."""
        array = np.asarray(array)
        if last:
            return array if axis == -1 else np.moveaxis(array, 1, -1)
        return np.moveaxis(array, -1, 1) if axis == -1 else array

    torch_y = net(torch_x)
    (torch_y * torch.tensor(theirs(weights).copy())).sum().backward()
    near(theirs(y), torch_y.detach())
    near(theirs(slope), torch_x.grad)
    for name, parameter in net.named_parameters():
        near(grads[TORCH[name]], parameter.grad)
    assert set(params) >= {TORCH[name] for name, _ in net.named_parameters()}
    if kind == "batch" and training:
        count = x.size // channels
        near(after.running_mean, net.running_mean)
        # PyTorch's running variance is unbiased.
        unbiased = (net.running_var.numpy() - 0.7 * before["running_var"]) / 0.3
        near(after.running_var, 0.7 * before["running_var"] + 0.3 * unbiased * (count - 1) / count)
    elif kind == "batch":
        near(after.running_var, net.running_var)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layer_norm_of_any_axis(axis):
    x = normal(3, 4, 5)
    layer = nn.LayerNorm(axis)
    params = filled(layer, x)
    moved = np.moveaxis(x, axis, -1)
    y = nn.LayerNorm()(params, moved)
    near(np.moveaxis(np.asarray(layer(params, x)), axis, -1), y)
    near(jax.vmap(nn.LayerNorm(), (None, 0))(params, moved), y)


# Gluon


def test_repr_is_in_the_form_of_gluon():
    text = (Path(__file__).parents[1] / "data" / "gluon" / "convbn.json").read_text()
    printed = json.loads(text)["repr"]
    for scale, channels in ((True, 8), (False, 6)):
        assert f" {nn.BatchNorm(axis=1, scale=scale, in_channels=channels)!r}\n" in printed
    assert repr(nn.BatchNorm(axis_name="batch")) == (
        "BatchNorm(axis=-1, eps=1e-05, momentum=0.9, fix_gamma=False, use_global_stats=False, "
        "in_channels=None, axis_name='batch')"
    )
    assert (
        repr(nn.LayerNorm()) == "LayerNorm(eps=1e-05, axis=-1, center=True, scale=True, in_channels=0)"
    )
    assert repr(nn.InstanceNorm(1, in_channels=3)) == (
        "InstanceNorm(eps=1e-05, axis=1, center=True, scale=False, in_channels=3)"
    )
    assert repr(nn.GroupNorm(2)) == (
        "GroupNorm(eps=1e-05, num_groups=2, center=True, scale=True, axis=-1, in_channels=0)"
    )
    assert repr(nn.RMSNorm()) == "RMSNorm(eps=1e-06, axis=-1, in_channels=0)"


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (
            nn.BatchNorm,
            "axis=-1 momentum=0.9 epsilon=1e-05 center=True scale=True use_global_stats=False "
            "beta_initializer='zeros' gamma_initializer='ones' running_mean_initializer='zeros' "
            "running_variance_initializer='ones' in_channels=0 axis_name=None dtype='float32'",
        ),
        (
            nn.LayerNorm,
            "axis=-1 epsilon=1e-05 center=True scale=True beta_initializer='zeros' "
            "gamma_initializer='ones' in_channels=0 dtype='float32'",
        ),
        (
            nn.InstanceNorm,
            "axis=-1 epsilon=1e-05 center=True scale=False beta_initializer='zeros' "
            "gamma_initializer='ones' in_channels=0 dtype='float32'",
        ),
        (
            nn.GroupNorm,
            "num_groups=1 epsilon=1e-05 center=True scale=True beta_initializer='zeros' "
            "gamma_initializer='ones' in_channels=0 axis=-1 dtype='float32'",
        ),
        (nn.RMSNorm, "axis=-1 epsilon=1e-06 gamma_initializer='ones' in_channels=0 dtype='float32'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_arguments_are_in_the_order_of_gluon(make, arguments):
    parameters = inspect.signature(make).parameters.values()
    assert [f"{p.name}={p.default!r}" for p in parameters] == arguments.split()


def test_batch_norm_has_all_four_arrays_whatever_it_uses():
    x = normal(4, 3)
    for center in (True, False):
        for scale in (True, False):
            layer = nn.BatchNorm(center=center, scale=scale)
            params = filled(layer, x)
            assert list(params) == ["gamma", "beta", "running_mean", "running_var"]
            trained = ["gamma"] * scale + ["beta"] * center
            assert list(pt.collect(params, kind="param")) == trained
            gamma, beta, mean, variance = map(np.asarray, params.values())
            y = (x - mean) / np.sqrt(variance + 1e-5)
            near(layer(params, x), (gamma if scale else 1) * y + (beta if center else 0))


@pytest.mark.parametrize("make", [nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm])
def test_the_others_have_gamma_and_beta_whatever_they_use(make):
    x = normal(4, 5, 3)
    plain = make(center=False, scale=False)
    params = filled(plain, x)
    assert list(params) == ["gamma", "beta"]
    assert not list(pt.collect(params, kind="param"))
    both = make(center=True, scale=True)
    y = plain(params, x)
    near(both(params, x), params.gamma[None, None] * y + params.beta[None, None])
    near(make(scale=True, center=False)(params, x), params.gamma[None, None] * y)
    near(np.asarray(y).mean(), 0, 1e-6)
    assert list(pt.collect(both.init(jax.random.key(0), x), kind="param")) == ["gamma", "beta"]


def test_initializers(key):
    layer = nn.BatchNorm(
        beta_initializer=init.Constant(1),
        gamma_initializer=init.Constant(2),
        running_mean_initializer=init.Constant(3),
        running_variance_initializer=init.Constant(4),
    )
    params = layer.init(key, normal(2, 3))
    assert [float(leaf[0]) for leaf in params.values()] == [2, 1, 3, 4]
    assert nn.RMSNorm(gamma_initializer="zeros").init(key, normal(2, 3)).gamma.tolist() == [0, 0, 0]


# Running statistics


@pytest.mark.parametrize("momentum", [0.9, 0.0, 1.0])
def test_running_statistics_over_several_steps(momentum, key):
    layer = nn.BatchNorm(axis=1, momentum=momentum)
    data = [3 * normal(5, 2, 4, seed=i) + i for i in range(4)]
    params = layer.init(key, data[0])
    mean, variance = np.zeros(2), np.ones(2)
    for x in data:
        y, params = pt.training(layer)(params, x)
        near(y, (x - x.mean((0, 2), keepdims=True)) / x.std((0, 2), keepdims=True), 2e-5)
        mean = momentum * mean + (1 - momentum) * x.mean((0, 2))
        variance = momentum * variance + (1 - momentum) * x.var((0, 2))
        near(params.running_mean, mean)
        near(params.running_var, variance)
    # Inference uses them and leaves them unchanged.
    x = normal(1, 2, 4, seed=9)
    expected = (x - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5)
    near(layer(params, x), expected)
    near(jax.jit(layer)(params, x[:, :, :1]), expected[:, :, :1])


def test_a_sequential_trains_and_brings_its_statistics_back(key):
    net = nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Activation("relu"), nn.BatchNorm(), nn.Dense(1))
    x = normal(32, 5)
    target = np.tanh(x[:, :1] * x[:, 1:2])
    params = net.init(key, x)
    kinds = {name: pt.collect(params, kind=name) for name in ("param", "state")}
    assert list(kinds["state"]) == [
        f"batchnorm{i}_running_{what}" for i in range(2) for what in ("mean", "var")
    ]
    assert list(params.batchnorm0) == ["gamma", "beta", "running_mean", "running_var"]
    optimizer = optax.sgd(0.1, momentum=0.9)
    traces = []

    def step(params, state):
        traces.append(0)

        def objective(params):
            y, after = pt.training(net)(params, x)
            return ((y - target) ** 2).mean(), after

        (value, params), grads = pt.value_and_grad(objective, has_aux=True)(params)
        assert "running_mean" not in grads.batchnorm0  # a hole: state has no gradient
        trained, rest = pt.partition(params, list(kinds["param"]))
        updates, state = optimizer.update(grads, state, trained)
        return value, pt.merge(optax.apply_updates(trained, updates), rest), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    state = optimizer.init(pt.partition(params, list(kinds["param"]))[0])
    structure = jax.tree.structure(params)
    values = []
    for _ in range(40):
        given_params = params
        value, params, state = jitted(params, state)
        values.append(float(value))
    assert given_params.batchnorm0.running_mean.is_deleted()
    assert traces == [0]
    assert jax.tree.structure(params) == structure
    assert values[-1] < values[0] / 3
    for bn in (params.batchnorm0, params.batchnorm1):
        assert np.abs(bn.running_mean).max() > 0.1
        assert bn.running_var.dtype == jnp.float32
    # After many steps the running statistics are close to the batch's.
    y, _ = pt.training(net)(params, x)
    assert np.abs(np.asarray(net(params, x) - y)).max() < 0.3
    assert not np.array_equal(net(params, x), y)


def test_a_layer_called_twice_on_one_scope_counts_both_batches(key):
    def model(p, a, b):
        layer = nn.BatchNorm()
        return layer(p.bn, a), layer(p.bn, b)

    a, b = normal(4, 3), 5 + normal(6, 3)
    params = pt.init(model, key, a, b)
    _, after = pt.training(model)(params, a, b)
    near(after.bn.running_mean, 0.9 * 0.1 * a.mean(0) + 0.1 * b.mean(0))


def test_global_statistics_are_used_and_kept_in_training():
    layer = nn.BatchNorm(use_global_stats=True)
    x = normal(4, 3)
    params = filled(layer, x)
    y, after = pt.training(layer)(params, x)
    near(y, layer(params, x))
    near(y, nn.BatchNorm()(params, x))
    assert all(after[name] is params[name] for name in params)


def test_a_batch_of_one_has_no_variance_and_an_empty_one_no_statistics(key):
    layer = nn.BatchNorm()
    params = filled(layer, normal(1, 3))
    y, after = pt.training(layer)(params, normal(1, 3))
    near(y, params.beta[None])
    near(after.running_var, 0.9 * params.running_var)
    assert layer(params, normal(0, 3)).shape == (0, 3)
    assert jax.tree.structure(pt.abstract(layer, normal(0, 3))) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=r"BatchNorm\(.*\) cannot train on an empty batch"):
        pt.training(layer)(params, normal(0, 3))


@pytest.mark.parametrize("make", [nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)], ids=str)
def test_empty_inputs(make, shape):
    layer = make()
    params = filled(layer, normal(2, 4, 3))
    assert layer(params, normal(*shape)).shape == shape
    grads = jax.grad(lambda p: layer(p, normal(*shape)).sum())(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


# Precision


@layers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_of_low_precision_are_computed_in_float32(make, dtype):
    layer = make()
    # The squares overflow float16, and bfloat16 has too few digits for the deviations.
    x = jnp.asarray(600 + 10 * normal(8, 40, 3), dtype)
    params = filled(layer, x)
    run = pt.training(layer)
    (y, after), (expected, exact) = run(params, x), run(params, x.astype("float32"))
    assert y.dtype == x.dtype
    near(y.astype("float32"), expected, 1e-2)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        near(a, b)
    assert layer(params, x).dtype == x.dtype


def test_a_tree_that_was_cast_keeps_its_dtype():
    layer = nn.BatchNorm()
    x = jnp.asarray(normal(4, 3), "bfloat16")
    params = pt.cast(filled(layer, x), {".*": "bfloat16"})
    y, after = pt.training(layer)(params, x)
    assert {leaf.dtype for leaf in (y, *jax.tree.leaves(after))} == {jnp.dtype("bfloat16")}


def test_the_dtype_is_that_of_gamma_and_beta(key):
    params = nn.BatchNorm(dtype="bfloat16").init(key, normal(4, 3))
    assert [leaf.dtype for leaf in params.values()] == ["bfloat16", "bfloat16", "float32", "float32"]
    with x64():
        x = jnp.asarray(normal(4, 3), "float64")
        params = nn.BatchNorm(dtype="float64").init(key, x)
        assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float64")}
        y, after = pt.training(nn.BatchNorm())(params, x)
        assert {leaf.dtype for leaf in (y, *after.values())} == {jnp.dtype("float64")}


@pytest.mark.parametrize("make", [nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm])
def test_a_large_mean_costs_few_digits(make):
    layer = make(scale=True)
    x = normal(8, 4, 6)
    params = filled(layer, x)
    run = pt.training(layer)
    far = np.float32(4096) + x
    near(run(params, far)[0], run(params, far - np.float32(4096))[0], 1e-3)


# Mapped axes


def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch(key):
    plain, mapped = nn.BatchNorm(axis=1), nn.BatchNorm(axis=1, axis_name="batch")
    x = normal(12, 3, 2) * np.arange(1, 13, dtype="float32")[:, None, None]
    params = filled(plain, x)
    assert jax.tree.structure(pt.abstract(mapped, x)) == jax.tree.structure(params)
    weights = normal(*x.shape, seed=1)

    def of(layer):
        def objective(params, x, weights):
            y, after = pt.training(layer)(params, x)
            return (weights * y).sum(), (y, after)

        return objective

    def split(params, x, weights):
        run = jax.vmap(of(mapped), (None, 0, 0), (0, (0, None)), axis_name="batch")
        total, (y, after) = run(params, *(a.reshape(4, 3, 3, 2) for a in (x, weights)))
        return total.sum(), (y.reshape(x.shape), after)

    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, x, weights)
        for f in (split, of(plain))
    )
    all_near(found, expected)
    # Without axis_name each slice uses its own statistics and returns its own tree.
    y, after = jax.vmap(pt.training(plain), (None, 0))(params, x.reshape(4, 3, 3, 2))
    assert np.abs(y.reshape(x.shape) - expected[0][1][0]).max() > 0.1
    assert after.running_mean.shape == (4, 3)
    own = x.reshape(4, 3, 3, 2).mean((1, 3))
    near(after.running_mean, 0.9 * np.asarray(params.running_mean) + 0.1 * own)


def test_an_example_at_a_time_over_two_mapped_axes():
    layer = nn.BatchNorm(axis_name=["rows", "columns"])
    assert layer == nn.BatchNorm(axis_name=("rows", "columns"))
    x = normal(2, 5, 3)
    params = filled(layer, x[0, 0])
    run = jax.vmap(pt.training(layer), (None, 0), (0, None), axis_name="columns")
    run = jax.vmap(run, (None, 0), (0, None), axis_name="rows")
    y, after = run(params, x)
    expected = pt.training(nn.BatchNorm())(params, x)
    all_near((y, after), expected)


def test_only_training_needs_the_mapped_axis(key):
    layer = nn.BatchNorm(axis_name="batch")
    x = normal(4, 3)
    params = layer.init(key, x)
    near(layer(params, x), nn.BatchNorm()(params, x))
    with pytest.raises(
        NameError, match=r"BatchNorm\(.*\) averages over .* 'batch' in training"
    ) as info:
        pt.training(layer)(params, x)
    assert "jax.vmap(step, axis_name='batch')" in str(info.value)
    jax.vmap(pt.training(layer), (None, 0), axis_name="batch")(params, x)  # what the text says to do


# Transforms


def model(p, xs):
    """Normalizes several batches in a scan."""
    return jax.lax.scan(lambda carry, x: (carry, nn.BatchNorm()(p.bn, x)), 0, xs)[1]


def by_hand(xs, params):
    """Returns the outputs of all batches, and the tree after the last one."""
    ys = []
    for x in xs:
        y, params = pt.training(nn.BatchNorm())(params, x)
        ys.append(y)
    return jnp.stack(ys), params


def test_a_write_within_a_scan_says_what_to_do(key):
    xs = normal(3, 4, 2)
    params = pt.init(model, key, xs)
    assert model(params, xs).shape == xs.shape
    with pytest.raises(
        pt.ScopeError, match="`bn_running_mean` is written inside a jax transform"
    ) as info:
        pt.training(model)(params, xs)
    assert "Call pt.training inside the transform and return the new tree from it" in str(info.value)

    # What the text says to do.
    def step(params, x):
        y, params = pt.training(nn.BatchNorm())(params, x)
        return params, y

    after, ys = jax.jit(lambda params, xs: jax.lax.scan(step, params, xs))(params.bn, xs)
    all_near((ys, after), by_hand(xs, params.bn))


def test_a_write_within_a_part_of_a_model_under_checkpoint(key):
    layer = nn.BatchNorm()

    def wrong(p, x):
        return jnp.tanh(jax.checkpoint(layer)(p.bn, x))

    def right(p, x):
        if not p.training:
            return jnp.tanh(layer(p.bn, x))
        y, new = jax.checkpoint(pt.training(layer))(p.bn, x)  # returns the new tree
        for name in ("running_mean", "running_var"):
            p.bn.update(name, new[name])
        return jnp.tanh(y)

    x = normal(4, 2)
    params = pt.init(right, key, x)
    near(wrong(params, x), right(params, x))
    with pytest.raises(pt.ScopeError, match="`bn_running_mean` is written inside .* checkpoint"):
        pt.training(wrong)(params, x)

    def objective(params, model):
        y, after = pt.training(model)(params, x)
        return (y**2).sum(), after

    def plain(p, x):
        return jnp.tanh(layer(p.bn, x))

    run = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=1)
    all_near(run(params, right), run(params, plain))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: f])
def test_a_whole_model_in_training_under_a_transform(wrap, key):
    net = nn.Sequential(nn.Dense(4), nn.BatchNorm(), nn.Dropout(0.5))
    x = normal(6, 3)
    params = net.init(key, x)

    def objective(params):
        y, after = wrap(pt.training(net))(params, x, key=key)
        return (y**3).sum(), after

    def directly(params):
        y, after = pt.training(net)(params, x, key=key)
        return (y**3).sum(), after

    found = jax.value_and_grad(objective, has_aux=True)(params)
    all_near(found, jax.value_and_grad(directly, has_aux=True)(params))
    assert np.abs(found[0][1].batchnorm0.running_mean).max() > 0


def test_a_mapped_write_within_a_model(key):
    def mapped(p, xs):
        return jax.vmap(lambda x: nn.BatchNorm()(p.bn, x))(xs)

    xs = normal(3, 4, 2)
    params = pt.init(mapped, key, xs)
    with pytest.raises(pt.ScopeError, match="`bn_running_mean` is written inside a jax transform"):
        pt.training(mapped)(params, xs)


def test_inference_writes_nothing_anywhere(key):
    xs = normal(3, 4, 2)
    params = pt.init(model, key, xs)
    before = statistics(params.bn)
    for f in (model, jax.jit(model), jax.checkpoint(model)):
        f(params, xs)
    jax.vmap(nn.BatchNorm(), (None, 0))(params.bn, xs)
    for name, value in before.items():
        np.testing.assert_array_equal(params.bn[name], value)


# Errors


@layers
def test_invalid_inputs(make, key):
    layer = make(axis=1, in_channels=3)
    x = normal(2, 3, 4)
    params = layer.init(key, x)
    name = make.__name__
    with pytest.raises(TypeError, match=rf"{name}\(.* needs floating-point numbers, but found int32"):
        layer(params, x.astype("int32"))
    with pytest.raises(ValueError, match=rf"{name}\(.* expects 3 channels on axis 1, .* \(2, 4, 3\)"):
        layer(params, x.swapaxes(1, 2))
    with pytest.raises(ValueError, match=rf"{name}\(.* finds no axis 5 in .* shape \(2, 3, 4\)"):
        make(axis=5)(params, x)
    with pytest.raises(pt.MismatchError, match=r"`gamma` has shape \(3,\), but the model needs \(4,\)"):
        make()(params, x)
    with pytest.raises(TypeError, match="its parameters first"):
        layer({}, x)


def test_inputs_without_the_axes_that_it_takes():
    for layer, shape, least in ((nn.InstanceNorm(), (2, 3), 3), (nn.GroupNorm(), (3,), 2)):
        with pytest.raises(ValueError, match=f"needs at least {least} dimensions, but found") as info:
            layer.init(jax.random.key(0), normal(*shape))
        assert str(shape) in str(info.value)
    for layer in (nn.InstanceNorm(axis=0), nn.GroupNorm(axis=-3)):
        with pytest.raises(ValueError, match="axis cannot be the first, which is the batch"):
            layer.init(jax.random.key(0), normal(2, 3, 4))
    with pytest.raises(ValueError, match=r"GroupNorm\(.*num_groups=3.*\) cannot divide 4 channels"):
        nn.GroupNorm(3).init(jax.random.key(0), normal(2, 4))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: nn.BatchNorm(momentum=1.5),
            r"BatchNorm: momentum must be in \[0, 1\], .* found 1.5",
        ),
        (lambda: nn.BatchNorm(in_channels=-1), "BatchNorm: in_channels must be .* found -1"),
        (lambda: nn.LayerNorm(axis=(1, 2)), r"LayerNorm: axis must be a single .* found \(1, 2\)"),
        (lambda: nn.LayerNorm(axis=True), "LayerNorm: axis must be a single integer, .* found True"),
        (
            lambda: nn.RMSNorm(epsilon=-1e-5),
            "RMSNorm: epsilon must be non-negative, .* found -1e-05",
        ),
        (lambda: nn.GroupNorm(0), "GroupNorm: num_groups must be positive, but found 0"),
        (lambda: nn.GroupNorm(2.0), "GroupNorm: num_groups must be .* found 2.0"),
        (lambda: nn.InstanceNorm(gamma_initializer="one"), "no initializer 'one'. The names are"),
    ],
)
def test_invalid_settings(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_settings_spelled_differently_are_equal():
    assert nn.BatchNorm() == nn.BatchNorm(beta_initializer=init.Zero(), dtype=jnp.float32)
    different = [nn.BatchNorm(), nn.BatchNorm(1), nn.BatchNorm(scale=False), nn.BatchNorm(momentum=0.5)]
    different += [
        nn.LayerNorm(),
        nn.InstanceNorm(),
        nn.InstanceNorm(scale=True),
        nn.BatchNorm(axis_name="i"),
    ]
    assert len(set(different)) == len(different)
