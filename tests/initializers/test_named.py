"""jax's initializers by name, with the axes of weights (out, in, *spatial), and those with other axes."""

import functools
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

K = jax.random.key(0)
I = jax.nn.initializers  # noqa: E741
SCALES = {
    "lecun": (1, "in"),
    "he": (2, "in"),
    "kaiming": (2, "in"),
    "glorot": (1, "avg"),
    "xavier": (1, "avg"),
}
NAMES = [f"{kind}_{how}" for kind in SCALES for how in ("normal", "uniform")]
names = pytest.mark.parametrize("name", NAMES)


def spec(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# A layer, its input, the shape of its weight, fan-in and fan-out.
LAYERS: dict[str, Any] = {
    "dense": (nn.Dense, (512,), spec(1, 8), (512, 8), 8, 512),
    "conv": (nn.Conv2D, (64, 3), spec(1, 8, 8, 3), (64, 3, 3, 3), 27, 576),
    "conv 1": (nn.Conv1D, (64, 5), spec(1, 8, 6), (64, 6, 5), 30, 320),
    "depthwise": (
        functools.partial(nn.Conv2D, groups=256), (256, 3), spec(1, 8, 8, 256), (256, 1, 3, 3), 9, 2304,
    ),
    "embedding": (nn.Embedding, (500, 16), spec(3, dtype="int32"), (500, 16), 16, 500),
}  # fmt: skip


def deviation(name: str, fan_in: float, fan_out: float) -> float:
    scale, fan = SCALES[name.split("_")[0]]
    return math.sqrt(scale / (fan_in if fan == "in" else (fan_in + fan_out) / 2))


def close(weight: Any, name: str, fan_in: float, fan_out: float) -> None:
    expected = deviation(name, fan_in, fan_out)
    assert abs(float(np.std(weight)) / expected - 1) < 5 / math.sqrt(weight.size), name
    bound = expected * (math.sqrt(3) if name.endswith("uniform") else 2 / 0.8796)
    assert np.abs(weight).max() < bound * 1.001


@names
@pytest.mark.parametrize("layer", LAYERS)
def test_a_name_has_the_fan_of_a_layers_weight(layer: str, name: str) -> None:
    make, args, x, shape, fan_in, fan_out = LAYERS[layer]
    net = make(*args, weight_initializer=name)
    weight = pt.init(net, K, x).weight
    assert weight.shape == shape
    close(weight, name, fan_in, fan_out)
    plain = pt.init(make(*args), jax.random.key(5), x)
    by_rule = pt.init(make(*args), K, x, rules={"weight": name})
    np.testing.assert_array_equal(by_rule.weight, weight)
    np.testing.assert_array_equal(pt.reinit(plain, K, {"weight": name}).weight, weight)


@names
def test_a_name_draws_what_jax_draws_with_these_axes(name: str) -> None:
    theirs = getattr(I, name)(in_axis=1, out_axis=0)
    for shape in ((30, 20), (6, 4, 3, 2)):
        np.testing.assert_array_equal(
            init.get(name)(K, shape, jnp.float32), theirs(K, shape, jnp.float32)
        )


@names
def test_a_name_is_hashable_equal_readable_and_pickled(name: str) -> None:
    one, two = init.get(name), init.get(name.upper())
    assert one == two
    assert hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == one
    assert repr(one).startswith("VarianceScaling(scale=")
    assert nn.Dense(4, weight_initializer=name) == nn.Dense(4, weight_initializer=one)
    equal = {other for other in NAMES if init.get(other) == one}
    alias = {"he": "kaiming", "kaiming": "he", "glorot": "xavier", "xavier": "glorot"}
    kind, how = name.split("_")
    assert equal == {name, f"{alias.get(kind, kind)}_{how}"}


def test_other_names() -> None:
    assert init.get("truncated_normal") == init.TruncNorm()
    assert init.get("variance_scaling") == init.get("lecun_normal") == init.VarianceScaling()
    with pytest.raises(
        ValueError, match=r"no initializer 'he'\. The names are zeros, .*xavier_uniform\."
    ):
        init.get("he")
    with pytest.raises(ValueError, match="mode must be one of 'fan_in', .* not 'in'"):
        init.VarianceScaling(mode="in")
    with pytest.raises(ValueError, match="distribution must be one of .* not 'gaussian'"):
        init.VarianceScaling(distribution="gaussian")


@names
def test_a_name_needs_two_dimensions(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"needs a shape .* at least two dimensions, but found \(4,\)"
    ) as info:
        pt.init(nn.Dense(4, bias_initializer=name), K, spec(1, 3))
    assert "`bias`" in "".join(info.value.__notes__)
    assert init.get(name)(K, (0, 4), jnp.float32).shape == (0, 4)


@pytest.mark.parametrize("make", [nn.Repeat, nn.Vmap])
def test_copies_in_a_stack_are_not_a_fan(make: Any) -> None:
    net, x = make(nn.Dense(64, weight_initializer="he_normal"), 8), jnp.ones((8, 2, 64))
    x = x if make is nn.Vmap else x[0]
    params = pt.init(net, K, x)
    assert params.weight.shape == (8, 64, 64)
    close(params.weight, "he_normal", 64, 64)
    again = pt.reinit(pt.reinit(params, K, {"weight": "zeros"}), K, {"weight": "he_normal"})
    np.testing.assert_array_equal(again.weight, params.weight)
    explicit = I.he_normal(in_axis=1, out_axis=0)
    pt.testing.assert_trees_close(pt.reinit(params, K, {"weight": explicit}), params, rtol=1e-5)
    with pytest.raises(pt.RuleError, match=r"to `weight`, \(64, 64\)"):
        pt.reinit(params, K, {"weight": I.he_normal()})


# Stacks by declaration


@pytest.mark.parametrize(
    "make",
    [
        lambda axis: init.Xavier("gaussian", "in", 2.0, batch_axis=axis),
        lambda axis: init.MSRAPrelu("in", 0.0, batch_axis=axis),
        lambda axis: init.VarianceScaling(2.0, "fan_in", "normal", batch_axis=axis),
    ],
    ids=["xavier", "msraprelu", "scaling"],
)
def test_batch_axis(make: Any) -> None:
    assert make(0) == make([0]) == make((0,)) != make(())
    assert hash(make(0)) == hash(make([0]))
    for shape, axis in [((8, 64, 32), 0), ((64, 32, 8), -1), ((2, 4, 64, 32), (0, 1))]:
        weight = pt.init(lambda p, s=shape, a=axis: p.param("w", s, make(a)), K).w
        assert abs(float(weight.std()) / math.sqrt(2 / 32) - 1) < 0.05
        np.testing.assert_allclose(
            make(axis)(K, shape, jnp.float32).std(), math.sqrt(2 / 32), rtol=0.05
        )
    weight = make(0)(K, (8, 64, 4, 3, 3), jnp.float32)
    np.testing.assert_allclose(weight.std(), math.sqrt(2 / 36), rtol=0.05)
    without = make(())(K, (8, 64, 64), jnp.float32)
    np.testing.assert_allclose(without.std(), math.sqrt(2 / 64**2), rtol=0.05)
    with pytest.raises(ValueError, match="at least two dimensions besides batch_axis"):
        make(0)(K, (8, 64), jnp.float32)
    with pytest.raises(ValueError, match=r"the shape \(8, 64\) has no axis \(5,\)"):
        make(5)(K, (8, 64), jnp.float32)


# jax's own, with the axes (in, out)

OTHER = {
    "lecun_normal": I.lecun_normal(), "lecun_uniform": I.lecun_uniform(), "he_normal": I.he_normal(),
    "he_uniform": I.he_uniform(),
}  # fmt: skip
USES: dict[str, Any] = {
    "dense": lambda f: nn.Dense(512, weight_initializer=f),
    "conv": lambda f: nn.Conv2D(64, 3, weight_initializer=f),
    "transposed": lambda f: nn.Conv2DTranspose(64, 3, weight_initializer=f),
    "embedding": lambda f: nn.Embedding(5, 4, weight_initializer=f),
    "lstm": lambda f: nn.LSTM(4, h2h_weight_initializer=f),
    "cell": lambda f: nn.GRUCell(4, i2h_weight_initializer=f),
    "attention": lambda f: nn.MultiHeadAttention(2, weight_initializer=f),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("use", USES)
def test_a_layer_refuses_the_axes_of_others(use: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"takes the last axes of a weight for \(in, out\)") as info:
        USES[use](OTHER[name])
    advice = f'write "{name}" or jax.nn.initializers.{name}(in_axis=1, out_axis=0).'
    assert advice in str(info.value)
    USES[use](name)
    USES[use](getattr(I, name)(in_axis=1, out_axis=0))


@pytest.mark.parametrize("wrap", [functools.partial, jax.jit])
def test_a_wrapped_one_is_found(wrap: Any) -> None:
    with pytest.raises(ValueError, match='write "he_normal"'):
        nn.Dense(4, weight_initializer=wrap(I.he_normal()))


def test_a_scaling_without_a_name() -> None:
    with pytest.raises(ValueError, match="takes the last axes") as info:
        nn.Dense(4, weight_initializer=I.variance_scaling(3.0, "fan_out", "normal"))
    assert "write pt.initializers.VarianceScaling(3.0, 'fan_out', 'normal') or jax." in str(info.value)
    assert "variance_scaling(3.0, 'fan_out', 'normal', in_axis=1, out_axis=0)" in str(info.value)


def test_the_mean_of_fans_of_a_matrix_has_no_order() -> None:
    weight = pt.init(nn.Dense(512, weight_initializer=I.glorot_normal()), K, spec(1, 8)).weight
    close(weight, "glorot_normal", 8, 512)
    with pytest.raises(ValueError, match='write "glorot_normal"'):
        nn.Conv1D(4, 3, weight_initializer=I.glorot_normal())


def test_orthogonal_kernels() -> None:
    nn.Dense(4, weight_initializer=I.orthogonal())
    with pytest.raises(ValueError, match=r"write jax\.nn\.initializers\.orthogonal\(column_axis=0\)"):
        nn.Conv2D(4, 3, weight_initializer=I.orthogonal())
    net = nn.Conv2D(4, 3, weight_initializer=I.orthogonal(column_axis=0))
    rows = np.reshape(pt.init(net, K, spec(1, 8, 8, 2)).weight, (4, -1))
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)
    with pytest.raises(ValueError, match=r"write pt\.initializers\.Orthogonal\(1\.0\)"):
        nn.Conv2D(4, 3, weight_initializer=I.delta_orthogonal())


@pytest.mark.parametrize(
    "give",
    [
        lambda f: {"weight": f},
        lambda f: {".*": init.Mixed(["weight", ".*"], [f, "zeros"])},
        lambda f: {".*": init.Load({"bias": np.zeros(6)}, f)},
    ],
    ids=["alone", "mixed", "load"],
)
def test_rules_refuse_the_axes_of_others(give: Any) -> None:
    layer, x = nn.Dense(6), spec(1, 8)
    for f in OTHER.values():
        for use in (
            lambda f=f: pt.init(layer, K, x, rules=give(f)),
            lambda f=f: pt.reinit(pt.init(layer, K, x), K, give(f)),
        ):
            with pytest.raises(pt.RuleError, match=r"to `weight`, \(6, 8\): it takes") as info:
                use()
            assert "(in_axis=1, out_axis=0). If its axes are (*spatial, in, out), write" in str(
                info.value
            )
            assert "(in_axis=0, out_axis=1)." in str(info.value)
    pt.init(layer, K, x, rules=give(I.he_normal(in_axis=0, out_axis=1)))


def test_a_models_own_parameter_may_have_these_axes() -> None:
    def model(p: Any) -> None:
        p.param("w", (8, 512), I.lecun_normal())
        p.param("kernel", (3, 3, 3, 64), I.lecun_normal())

    params = pt.init(model, K)
    close(params.w, "lecun_normal", 8, 512)
    close(params.kernel, "lecun_normal", 27, 576)
    assert init.get(OTHER["he_normal"]) is OTHER["he_normal"]
