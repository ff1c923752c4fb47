"""Laws of parametrisations, over a table of models and parametrisations."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree import parametrizations as par

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))


@dataclasses.dataclass(frozen=True)
class Doubled:
    """One of a user's own."""

    def split(self, value: Any, key: Any = None) -> Any:
        return {"half": value / 2, "again": value / 2}

    def join(self, parts: Any) -> Any:
        return parts["half"] + parts["again"]


def tied_to_decoder(p: Any, x: Any) -> Any:
    h = nn.Dense(8, use_bias=False)(p.embed, x)
    return h @ p.embed.weight.T  # the model reads the leaf itself


SHARED = nn.Dense(8, activation="tanh")


def is_first(name: str, leaf: Any) -> bool:
    return name.startswith("dense0")


MODELS: dict[str, Any] = {
    "MLP": nn.Sequential(nn.Dense(8, activation="relu"), nn.Dense(3)),
    "training": nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(3)),
    "tied": nn.Sequential(SHARED, SHARED, nn.Dense(3)),
    "function": tied_to_decoder,
    "Repeat": nn.Sequential(nn.Repeat(nn.Dense(8, activation="tanh"), 3), nn.Dense(3)),
    "Vmap": nn.Sequential(nn.Vmap(nn.Repeat(nn.Dense(8), 2), 3, in_axes=None), nn.Dense(3)),
}
KINDS: dict[str, Any] = {
    "WeightNorm": par.WeightNorm(),
    "WeightNorm of all": par.WeightNorm(axis=None),
    "WeightStandardization": par.WeightStandardization(),
    "WeightStandardization scaled": par.WeightStandardization(gain=1.7),
    "SpectralNorm": par.SpectralNorm(),
    "LoRA": par.LoRA(2),
    "Quantized": par.Quantized(),
    "Quantized to 4 bits": par.Quantized(4),
    "fake": par.Quantized(fake=True),
    "Masked": par.Masked(jnp.abs),
    "Orthogonal": par.Orthogonal(),
    "Cast": par.Cast(jnp.float32),
    "Frozen": par.Frozen(),
    "own": Doubled(),
}
EXACT = {"WeightNorm", "WeightNorm of all", "LoRA", "Masked", "Cast", "Frozen", "own", "Positive"}
# The others go through the same code, but for these models and settings.
SLOW = {"MLP", "tied", "function", "Vmap"}
SLOW |= {"WeightNorm of all", "WeightStandardization scaled", "Quantized to 4 bits", "Frozen"}
table = pytest.mark.parametrize(
    ("model", "kind"),
    [
        pytest.param(model, kind, marks=[pytest.mark.slow] if {model, kind} & SLOW else [])
        for model, kind in itertools.product(MODELS, KINDS)
    ],
)


def setup(model: str, kind: str) -> tuple[Any, Any, Any, Any]:
    net, rules = MODELS[model], {".*weight": KINDS[kind]}
    weights = {".*weight": init.Orthogonal() if kind == "Orthogonal" else init.Normal(0.5)}
    return net, rules, pt.init(net, KEY, X, rules=weights), weights


@table
def test_init_expand_and_fold_agree(model: str, kind: str) -> None:
    net, rules, params, weights = setup(model, kind)
    made = pt.reparametrize(net, rules)
    expanded = pt.expand(params, rules, KEY)
    fresh = pt.init(made, KEY, X, rules=weights)
    assert jax.tree.structure(fresh) == jax.tree.structure(expanded)
    pt.testing.assert_trees_close(fresh, expanded, rtol=1e-6, atol=1e-7)
    shapes = pt.abstract(made, X)
    assert jax.tree.structure(shapes) == jax.tree.structure(expanded)
    assert [s.shape for s in jax.tree.leaves(shapes)] == [a.shape for a in jax.tree.leaves(expanded)]
    folded = pt.fold(expanded, rules)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    if kind in EXACT or kind == "Orthogonal":
        pt.testing.assert_trees_close(folded, params, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(made(expanded, X), net(params, X), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made(expanded, X), net(folded, X), rtol=1e-4, atol=1e-4)


@table
def test_training_goes_on_and_folds_to_the_same_output(model: str, kind: str) -> None:
    net, rules, params, _ = setup(model, kind)
    made = pt.reparametrize(net, rules)
    expanded = pt.expand(params, rules, KEY)

    @jax.jit
    def step(params: Any) -> Any:
        def loss(trained: Any) -> Any:
            y, new = pt.training(made)(pt.merge(trained, rest), X, key=KEY)
            return jnp.mean(y**2), new

        trained, rest = pt.partition(params, kind="param")
        grads, new = jax.grad(loss, has_aux=True)(trained)
        moved = jax.tree.map(lambda a, g: a - 0.01 * g, trained, grads)
        return pt.merge(moved, pt.partition(new, kind="param")[1]), grads

    new, grads = step(expanded)
    assert jax.tree.structure(new) == jax.tree.structure(expanded)
    frozen = kind in ("Quantized", "Quantized to 4 bits", "Frozen")
    assert any(map(np.any, jax.tree.leaves(grads))) or frozen
    folded = pt.fold(new, rules)
    np.testing.assert_allclose(made(new, X), net(folded, X), rtol=1e-4, atol=1e-4)
    if kind == "SpectralNorm":
        assert any(
            np.any(a != b)
            for a, b in zip(
                jax.tree.leaves(pt.select(new, ".*_u")),
                jax.tree.leaves(pt.select(expanded, ".*_u")),
                strict=True,
            )
        )
    if model == "training":
        assert np.any(new.batchnorm0.running_mean != 0)


@pytest.mark.parametrize(
    "kind", sorted({*KINDS} - {"fake", "Quantized", "Quantized to 4 bits", "Frozen"})
)
def test_gradients_of_parts_are_those_of_finite_differences(kind: str) -> None:
    parametrization = KINDS[kind]
    value = jax.random.orthogonal(KEY, 3) if kind == "Orthogonal" else jax.random.normal(KEY, (4, 3))
    parts = parametrization.split(value, KEY)
    state = getattr(parametrization, "kinds", ())
    if not isinstance(parts, dict):
        parts = {"": parts}
    free = {name: part for name, part in parts.items() if name not in state}
    weights = jax.random.normal(jax.random.key(3), value.shape)

    def f(free: Any) -> Any:
        joined = parametrization.join({**parts, **free}.get("", {**parts, **free}))
        return jnp.sum(weights * jnp.sin(joined))

    assert free
    check_grads(f, (free,), 1, modes=["rev"], rtol=2e-2, atol=2e-2, eps=1e-2)


def test_equal_transforms_are_equal_and_share_jit_caches() -> None:
    traces = []

    def net(p: Any, x: Any) -> Any:
        traces.append(None)
        return nn.Dense(3)(p.a, x)

    params = pt.init(net, KEY, X)
    call = jax.jit(lambda f, p, x: f(p, x), static_argnums=0)
    rules = lambda: {".*weight": par.LoRA(2)}  # noqa: E731
    expanded = pt.expand(params, rules(), KEY)
    traces.clear()
    for _ in range(3):
        call(pt.reparametrize(net, rules()), expanded, X)
    assert len(traces) == 1
    assert par.Masked(np.ones(3)) == par.Masked(np.ones(3)) != par.Masked(np.zeros(3))


def test_a_part_of_a_model_may_be_reparametrised_inside_it() -> None:
    rules = {"weight": par.WeightNorm()}

    def model(p: Any, x: Any) -> Any:
        h = pt.reparametrize(nn.Dense(8), rules)(p.a, x)
        return nn.Repeat(pt.reparametrize(nn.Dense(8), rules), 2)(p.b, h)

    params = pt.init(model, KEY, X)
    assert list(pt.collect(params)) == [
        "a_weight_g", "a_weight_v", "a_bias", "b_weight_g", "b_weight_v", "b_bias",
    ]  # fmt: skip
    assert params.b.weight.g.shape == (2, 8, 1)
    plain = pt.fold(params, {".*weight": par.WeightNorm()})
    want = nn.Repeat(nn.Dense(8), 2)(plain.b, nn.Dense(8)(plain.a, X))
    np.testing.assert_allclose(model(params, X), want, rtol=1e-5, atol=1e-6)


def test_transforms_compose() -> None:
    net = MODELS["MLP"]
    inner, outer = {".*weight": par.WeightNorm()}, {".*weight_v": par.LoRA(2)}
    both = pt.reparametrize(pt.reparametrize(net, inner), outer)
    params = pt.init(net, KEY, X)
    expanded = pt.init(both, KEY, X)
    assert "dense0/weight/v/base" in expanded
    pt.testing.assert_trees_close(expanded, pt.expand(pt.expand(params, inner, KEY), outer, KEY))
    np.testing.assert_allclose(both(expanded, X), net(params, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        pt.training(both)(expanded, X, key=KEY)[0], net(params, X), rtol=1e-5, atol=1e-6
    )
    y, _ = pt.reparametrize(pt.training(net), inner)(pt.expand(params, inner), X, key=KEY)
    np.testing.assert_allclose(y, net(params, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gain", [None, 1.5])
def test_weights_are_standardised_by_output_and_by_copy(gain: float | None) -> None:
    net = nn.Sequential(
        nn.Conv2D(4, 3, padding=1),
        nn.Repeat(nn.Conv2D(4, 3, padding=1), 2),
        nn.Conv2DTranspose(3, 2),
    )
    x = jax.random.normal(KEY, (2, 5, 5, 3))
    params = pt.init(net, KEY, x, rules={".*weight": init.Uniform(0.5)})
    rules = {
        "conv1_weight": par.WeightStandardization(axis=1, gain=gain),
        ".*weight": par.WeightStandardization(gain=gain),
    }
    expanded = pt.expand(params, rules)
    folded = pt.fold(expanded, rules)

    def expected(weight: Any, axis: int) -> Any:
        weight = np.moveaxis(np.asarray(weight, np.float64), axis, 0)
        rows = weight.reshape(len(weight), -1)
        rows = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-6)
        rows = rows if gain is None else gain * rows / rows.shape[1] ** 0.5
        return np.moveaxis(rows.reshape(weight.shape), 0, axis)

    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    near(folded.conv0.weight, expected(params.conv0.weight, 0))
    near(folded.conv1.weight, expected(params.conv1.weight, 1))
    for copy in range(2):
        near(folded.repeat0.weight[copy], expected(params.repeat0.weight[copy], 0))
    if gain is not None:
        assert expanded.repeat0.weight.gain.shape == (2, 4, 1, 1, 1)
        assert expanded.conv1.weight.gain.shape == (1, 3, 1, 1)
        assert np.all(expanded.conv1.weight.gain == 1.5)
    np.testing.assert_allclose(
        pt.reparametrize(net, rules)(expanded, x), net(folded, x), rtol=1e-4, atol=1e-4
    )


def test_standardised_weights_of_low_precision_and_of_equal_weights() -> None:
    how = par.WeightStandardization()
    weight = 100 + jax.random.normal(KEY, (3, 50))
    half = weight.astype("bfloat16")
    found = how.join(how.split(half))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype("float32"), how.join(half.astype("float32")), atol=0.02)
    zeros = jnp.zeros((2, 3))
    value, grad = jax.value_and_grad(lambda w: (how.join(w) * jnp.arange(3.0)[None]).sum())(zeros)
    assert value == 0 and np.all(np.isfinite(grad)) and np.any(grad)


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((5, 1), 0), ((5, 1, 1), -3), ((5, 3), 2)])
def test_weights_that_have_no_variance_are_not_standardised(shape: Any, axis: int) -> None:
    tree, rules = {"weight": jnp.ones(shape)}, {"weight": par.WeightStandardization(axis=axis)}
    with pytest.raises(pt.MismatchError, match=f"two weights or more .* axis {axis}, but found shape"):
        pt.expand(tree, rules)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epsilon": 0}, "epsilon must be positive, but found 0"),
        ({"gain": 0.0}, "gain must be positive, but found 0.0"),
        ({"axis": None}, "axis must be an integer, but found None"),
    ],
)
def test_settings_that_standardise_nothing(settings: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"WeightStandardization: {text}"):
        par.WeightStandardization(**settings)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 3.0), (1.0, 0.5)])
def test_lora_scales_the_change_by_alpha_over_the_rank(alpha: float | None, scale: float) -> None:
    net, rules = nn.Dense(3), {"weight": par.LoRA(2, alpha)}
    params = pt.expand(pt.init(net, KEY, X), rules, KEY)
    params = pt.replace(params, {"weight/b": jax.random.normal(KEY, (3, 2))})
    base, a, b = (np.asarray(params.weight[name]) for name in ("base", "a", "b"))
    weight = base + scale * (b @ a)
    np.testing.assert_allclose(pt.fold(params, rules).weight, weight, rtol=1e-5, atol=1e-6)
    want = np.asarray(X) @ weight.T + np.asarray(params.bias)
    np.testing.assert_allclose(pt.reparametrize(net, rules)(params, X), want, rtol=1e-5, atol=1e-5)


def test_what_is_pruned_stays_zero_while_the_rest_trains() -> None:
    net, rules = MODELS["MLP"], {".*weight": par.Masked(lambda w: jnp.abs(w) > 0.3)}
    params = pt.expand(pt.init(net, KEY, X, rules={".*weight": init.Normal(0.5)}), rules)
    made = pt.reparametrize(net, rules)
    grads = pt.grad(lambda p: (made(p, X) ** 2).sum())(params)
    trained, rest = pt.partition(params, kind="param")
    new = pt.merge(jax.tree.map(lambda a, g: a - 0.01 * g, trained, grads), rest)
    weight, mask = pt.fold(new, rules).dense0.weight, params.dense0.weight.mask
    assert 0 < np.sum(mask) < mask.size
    assert not np.any(np.asarray(weight)[~np.asarray(mask)])
    assert np.any(weight != pt.fold(params, rules).dense0.weight)


def test_the_gradient_of_rounding_passes_straight_through() -> None:
    fake = par.Quantized(4, fake=True)
    weights = jax.random.normal(KEY, (4, 3))
    value = jax.random.normal(jax.random.key(1), (4, 3))
    found = jax.grad(lambda v: jnp.sum(weights * fake.join(v)))(value)
    np.testing.assert_allclose(found, weights, rtol=1e-6)
    assert np.any(fake.join(value) != value)


def test_the_first_rule_wins_and_state_is_never_split() -> None:
    net = MODELS["training"]
    params = pt.init(net, KEY, X)
    rules = {"dense0_weight": par.WeightNorm(), ".*": par.Frozen()}
    expanded = pt.expand(params, rules)
    assert set(pt.collect(expanded, kind="param")) == {"dense0_weight_g", "dense0_weight_v"}
    pt.testing.assert_trees_close(pt.fold(expanded, rules), params, rtol=1e-6, atol=1e-6)
    with pytest.raises(pt.RuleError, match="matches only state"):
        pt.expand(params, {".*running_mean": par.Frozen()})


def test_mistakes() -> None:
    net = MODELS["MLP"]
    params = pt.init(net, KEY, X)
    with pytest.raises(pt.RuleError, match="'.*weigth' matches no name; the closest are"):
        pt.expand(params, {".*weigth": par.WeightNorm()})
    with pytest.raises(pt.RuleError, match="weigth"):
        pt.init(pt.reparametrize(net, {".*weigth": par.WeightNorm()}), KEY, X)
    with pytest.raises(pt.RuleError, match=r"gives 3. Expected a parametrisation"):
        pt.reparametrize(net, {".*weight": 3})
    with pytest.raises(pt.RuleError, match=r"Expected a parametrisation, such as .*WeightNorm\(\)"):
        pt.reparametrize(net, {".*weight": par.WeightNorm})
    with pytest.raises(pt.RuleError, match=r"`dense0_weight` does not fit.*pt.expand\(params, rules\)"):
        pt.reparametrize(net, {".*weight": par.WeightNorm()})(params, X)
    with pytest.raises(TypeError, match=r"LoRA draws random numbers: pt.expand\(params, rules, key\)"):
        pt.expand(params, {".*weight": par.LoRA(2)})
    with pytest.raises(ValueError, match=r"LoRA needs a matrix, but found shape \(8,\)"):
        pt.expand(params, {".*bias": par.LoRA(2)}, KEY)
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        par.LoRA(0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("name", "parametrization", "values", "expected"),
    [
        ("bias", par.Positive(), -1.0, "have to be positive"),
        ("bias", par.WeightNorm(), 0.0, "A row of zeros has no direction"),
        ("weight", par.SpectralNorm(), 0.0, "A matrix of zeros has no norm"),
        ("weight", par.Cast("float16", "float16"), 1e6, "infinite"),
    ],
)
def test_values_that_a_parametrisation_loses_are_errors(
    stacked: bool, name: str, parametrization: Any, values: float, expected: str
) -> None:
    layer = nn.Dense(6, weight_initializer=pt.initializers.Uniform(0.5))
    net = nn.Sequential(body=nn.Repeat(layer, 2) if stacked else layer)
    x = jnp.ones((2, 6))
    params = pt.init(net, KEY, x)
    params = pt.map_named(lambda n, a: a + values if name in n else a, params)
    params = pt.replace(params, {f"body_{name}": jnp.full_like(params.body[name], values)})
    rules = {f"body_{name}": parametrization}
    with pytest.raises(pt.MismatchError, match=f"`body_{name}` is .*finite.*{expected}|{expected}"):
        pt.expand(params, rules, KEY)
    with pytest.raises(pt.MismatchError, match=rf"rule \{{'body_{name}': None\}}, before this one"):
        pt.expand(params, rules, KEY)
    advised = {f"body_{name}": None, f".*{name}|.*weight": par.Frozen()}
    assert f"body_{name}" in pt.collect(pt.expand(params, advised, KEY))


@pytest.mark.parametrize("first", ["dense0.*", "dense0/.*", re.compile("dense0.*"), is_first])
def test_none_leaves_a_parameter_as_it_is(first: Any) -> None:
    net = nn.Sequential(nn.Dense(6, activation="tanh"), nn.BatchNorm(), nn.Dense(3))
    params, rules = pt.init(net, KEY, X), {first: None, ".*weight|.*bias": par.Frozen()}
    model = pt.reparametrize(net, rules)
    expanded = pt.expand(params, rules)
    assert jax.tree.structure(expanded) == jax.tree.structure(pt.init(model, KEY, X))
    names = ["dense0_weight", "dense0_bias", "batchnorm0_gamma", "batchnorm0_beta"]
    assert list(pt.collect(expanded, kind="param")) == names
    pt.testing.assert_trees_equal(pt.fold(expanded, rules), params)
    np.testing.assert_array_equal(model(expanded, X), net(params, X))
    for call in (pt.expand, pt.fold):
        with pytest.raises(pt.RuleError, match="'dens0.*' matches no name; the closest are"):
            call(expanded, {"dens0.*": None, ".*": par.Frozen()})


def test_parts_have_names_like_all_leaves() -> None:
    """Optimisers, labels, gradients, casts, shardings and initialisers by the names of parts."""
    net, rules = MODELS["MLP"], {"dense0_weight": par.LoRA(2), "dense1_weight": par.WeightNorm()}
    model = pt.reparametrize(net, rules)
    params = pt.init(model, KEY, X)
    parts = ["dense0_weight_a", "dense0_weight_b", "dense1_weight_g"]
    pattern = ".*weight_(a|b|g)"
    grads = pt.grad(lambda p: model(p, X).sum(), wrt=pattern)(params)
    assert list(pt.collect(grads)) == parts
    assert [n for n, yes in pt.collect(pt.mask(params, pattern)).items() if yes] == parts
    labels = pt.labels(params, {pattern: "fast", ".*": "slow"})
    tx = optax.multi_transform({"fast": optax.sgd(1.0), "slow": optax.set_to_zero()}, labels)
    full = jax.grad(lambda p: model(p, X).sum())(params)
    moved = optax.apply_updates(params, tx.update(full, tx.init(params), params)[0])
    for name, leaf in pt.collect(moved).items():
        same = np.array_equal(leaf, pt.collect(params)[name])
        assert same == (name not in parts or not np.any(pt.collect(full)[name])), name
    assert "dense0_weight_base" in pt.collect(params, kind="state")
    half = pt.cast(params, {"dense1_weight_v": "bfloat16", ".*": None})
    assert half.dense1.weight.v.dtype == jnp.bfloat16 and half.dense1.weight.g.dtype == jnp.float32
    drawn = pt.reinit(params, KEY, {"dense0_weight_b": pt.initializers.One()})
    assert np.all(drawn.dense0.weight.b == 1) and not np.array_equal(model(drawn, X), model(params, X))
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:2])
    shardings = pt.shardings(params, mesh, {"dense0_weight_a": P(None, "x"), ".*": P()})
    placed = jax.device_put(params, shardings)
    assert not placed.dense0.weight.a.sharding.is_fully_replicated
    np.testing.assert_allclose(jax.jit(model)(placed, X), model(params, X), rtol=1e-5, atol=1e-6)


def test_files_of_parts_load_by_name_and_into_the_plain_model(tmp_path: Any) -> None:
    net, rules = MODELS["MLP"], {".*weight": par.LoRA(2)}
    params = pt.init(net, KEY, X)
    expanded = pt.expand(params, rules, KEY)
    for ending in ("safetensors", "npz"):
        pt.save(tmp_path / f"m.{ending}", expanded)
        again = pt.load(tmp_path / f"m.{ending}")
        assert jax.tree.structure(pt.load(tmp_path / f"m.{ending}", like=expanded)) == (
            jax.tree.structure(expanded)
        )
        folded = pt.fold(again, rules)
        pt.testing.assert_trees_close(pt.collect(folded), pt.collect(params), rtol=1e-6, atol=1e-6)
    with pytest.raises(pt.LoadError, match="dense0_weight"):
        pt.load(tmp_path / "m.npz", like=params)


def test_a_parameter_given_as_an_initialiser_is_the_whole_one() -> None:
    net, rules = MODELS["MLP"], {".*weight": par.WeightNorm()}
    by_name = {"dense0_weight": pt.initializers.Normal(2.0)}
    one = pt.init(pt.reparametrize(net, rules), KEY, X, rules=by_name)
    other = pt.expand(pt.init(net, KEY, X, rules=by_name), rules)
    pt.testing.assert_trees_equal(one, other)


def test_quantised_leaves_are_saved_counted_and_loaded(tmp_path: Any) -> None:
    net, rules = MODELS["MLP"], {".*weight": par.Quantized()}
    params = pt.expand(pt.init(net, KEY, X), rules)
    assert params.dense0.weight.integers.dtype == jnp.int8
    pt.save(tmp_path / "m.safetensors", params)
    again = pt.load(tmp_path / "m.safetensors", like=params)
    pt.testing.assert_trees_close(again, params)
    assert pt.nbytes(params) < 0.5 * pt.nbytes(pt.fold(params, rules))


def test_dicts_and_packed_trees() -> None:
    net, rules = MODELS["MLP"], {".*weight": par.WeightNorm()}
    params = pt.init(net, KEY, X)
    as_dict = pt.expand(params.to_dict(), rules)
    assert set(as_dict["dense0"]["weight"]) == {"g", "v"}
    assert set(pt.fold(as_dict, rules)["dense0"]) == {"weight", "bias"}
    packed = pt.pack(pt.expand(params, rules))
    np.testing.assert_allclose(
        pt.reparametrize(net, rules)(packed, X), net(params, X), rtol=1e-5, atol=1e-6
    )


def test_a_model_is_initialised_with_the_dtypes_that_it_will_read() -> None:
    """Under strict promotion a half-precision input needs half-precision weights while recording too."""
    net = nn.Sequential(
        nn.Dense(4), nn.Repeat(nn.Dense(4), 2), nn.Vmap(nn.Dense(4), 3, in_axes=None), out=nn.Dense(3)
    )
    x, cast = X.astype("bfloat16"), {".*": par.Cast("bfloat16")}
    model = pt.reparametrize(net, cast)
    params = pt.init(model, KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert jax.tree.structure(params) == jax.tree.structure(pt.init(net, KEY, X))
    pt.testing.assert_trees_equal(params, pt.expand(pt.init(net, KEY, X), cast))
    assert model(params, x).dtype == jnp.bfloat16
    nested = pt.reparametrize(model, {".*weight": par.WeightNorm()})
    assert nested(pt.init(nested, KEY, x), x).dtype == jnp.bfloat16

    traces = []

    def part(p: Any, x: Any) -> Any:
        traces.append(p)
        return nn.Dense(2)(p.head, model(p.body, x))

    whole = pt.reparametrize(part, {"head.*": par.Cast("bfloat16")})
    assert whole(pt.init(whole, KEY, x), x).dtype == jnp.bfloat16
    with pytest.raises(pt.RuleError, match="'haed.*' matches no name; the closest are head"):
        pt.init(pt.reparametrize(part, {"haed.*": par.Cast("bfloat16")}), KEY, x)
    assert len(traces) < 20


def test_a_plain_number_is_folded_as_an_array_is(key):
    rules = {"w": pt.parametrizations.Frozen()}
    tree = {"w": np.ones(3, np.float32), "x": 1.0}
    assert pt.fold(pt.expand(pt.from_tree(tree), rules, key), rules).x == 1.0
