"""Layers and nets that compute in another dtype than their parameters have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn

BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def close(a, b, rtol=0.05, atol=0.05):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, "float32"), np.asarray(y, "float32"), rtol, atol)


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def block():
    return nn.Residual(nn.LayerNorm(), nn.Dense(4, "tanh", weight_initializer="xavier"), nn.BatchNorm())


X = normal(6, 4)


def test_a_net_computes_as_if_all_were_cast():
    net = nn.Sequential(block(), nn.Dropout(0.5), nn.Dense(2))
    half = nn.Compute(net, "bfloat16")
    params = half.init(jax.random.key(0), X)
    close(params, net.init(jax.random.key(0), X), 0, 0)
    assert jax.tree.structure(pt.abstract(half, X)) == jax.tree.structure(params)
    cast = pt.reparametrize(net, {".*": pt.parametrizations.Cast("bfloat16")})

    def by_hand(p, x):
        return cast(p, x.astype(BF16)).astype(F32)

    def grads(model):
        return pt.grad(lambda p: jnp.sin(model(p, X)).sum())(params)

    for wrap in (lambda f: f, jax.jit):
        close(wrap(half)(params, X), wrap(by_hand)(params, X), 0, 0)
    ours = grads(half)
    close(ours, grads(by_hand), 0, 0)
    assert dtypes(ours) == {F32}
    close(ours, grads(net))
    assert half(params, X).dtype == F32 and half(params, X.astype(BF16)).dtype == BF16
    assert np.abs(half(params, X) - net(params, X)).max() > 0
    train = jax.jit(pt.training(half))
    y, new = train(params, X, key=jax.random.key(1))
    z, expected = jax.jit(pt.training(by_hand))(params, X, key=jax.random.key(1))
    close((y, new), (z, expected), 0, 0)
    mean = new[0][2].running_mean
    assert mean.dtype == F32 and np.abs(mean - params[0][2].running_mean).max() > 1e-3


def test_a_layer_within_a_net():
    net = nn.Sequential(nn.Dense(8), nn.Compute(nn.Dense(4, "tanh"), jnp.bfloat16), nn.Dense(2))
    plain = nn.Sequential(nn.Dense(8), nn.Dense(4, "tanh"), nn.Dense(2))
    assert net.names == plain.names
    params = net.init(jax.random.key(0), X)
    close(params, plain.init(jax.random.key(0), X), 0, 0)
    y, acts = pt.capture(net, ["dense1", "dense2"], inputs=True)(params, X)
    assert acts.dense1.output.dtype == acts.dense2.input.dtype == y.dtype == F32
    assert (acts.dense1.input.dtype, acts.dense1.output1.dtype) == (F32, BF16)
    close(y, plain(params, X))
    rows = pt.summary(net, params, X, flops=False).rows
    assert [row.layer for row in rows if row.name == "dense1"] == ["Compute", "Dense"]
    assert sum(row.params for row in rows) == pt.count(params)
    y = pt.intervene(net, {"dense1": lambda name, h: h * 0})(params, X)
    close(y, jnp.broadcast_to(params.dense2.bias, y.shape))
    # Within a net in bfloat16, one layer in float32.
    net = nn.Compute(
        nn.Sequential(nn.Dense(8), head=nn.Compute(nn.Dense(2), F32)), BF16, keep="head_.*"
    )
    y, acts = pt.capture(net, ".*")(net.init(jax.random.key(0), X), X)
    assert (acts.dense0.output.dtype, acts.head.output.dtype, acts.head.output1.dtype) == (
        BF16,
        BF16,
        F32,
    )


def test_some_parameters_are_kept():
    seen = {}

    def net(p, x):
        x = nn.LayerNorm()(p.norm, nn.Dense(4)(p.dense, x))
        seen.update({name: leaf.dtype for name, leaf in pt.collect(p).items()})
        return x

    half = nn.Compute(net, BF16, keep="norm.*")
    params = half.init(jax.random.key(0), X)
    assert dtypes(params) == {F32}
    close(half(params, X), net(params, X))
    half(params, X)
    assert seen == {
        "dense_weight": BF16, "dense_bias": BF16, "norm_gamma": F32, "norm_beta": F32
    }  # fmt: skip
    with pytest.raises(pt.RuleError, match="`?nrm"):
        nn.Compute(net, BF16, keep="nrm.*")(params, X)


def test_inputs_and_outputs_of_other_kinds():
    tokens = jnp.array([[1, 2], [0, 3]])
    layer = nn.Compute(nn.Embedding(5, 4), BF16)
    params = layer.init(jax.random.key(0), tokens)
    y = layer(params, tokens)
    assert y.dtype == F32
    close(y, params.weight.astype(BF16).astype(F32)[tokens], 0, 0)

    def model(p, x, scale, *, shift, on):
        assert x["a"].dtype == shift.dtype == BF16 and x["ids"].dtype == jnp.int32
        assert scale == 2.0 and on is True
        return {"y": x["a"] * scale + shift, "ids": x["ids"], "on": x["a"] > 0}

    x = {"a": X, "ids": jnp.arange(3), "none": None}
    layer = nn.Compute(model, BF16)
    y = layer(pt.from_tree({}), x, 2.0, shift=np.ones((6, 4)), on=True)
    assert {name: leaf.dtype for name, leaf in y.items()} == {"y": F32, "ids": jnp.int32, "on": bool}
    net = nn.Sequential(
        nn.Compute(nn.Activation("tanh"), BF16), nn.Compute(nn.MultiHeadAttention(2), BF16)
    )
    x, padding = normal(2, 3, 4), jnp.array([[True, True, False]])
    params = net.init(jax.random.key(0), x)
    expected = net[1].layer(params[1], jnp.tanh(x), padding_mask=padding)
    close(net(params, x, padding_mask=padding), expected)
    with pytest.raises(
        TypeError, match="Compute: no layer in it takes the keyword argument 'msk'.*`?mask"
    ):
        net[1](params[1], x, msk=padding)


def test_it_goes_with_copies_and_other_transforms():
    net = nn.Compute(nn.Repeat(block(), 3, remat=True), BF16)
    inside = nn.Repeat(nn.Compute(block(), BF16), 3)
    params = net.init(jax.random.key(0), X)
    close(inside.init(jax.random.key(0), X), params, 0, 0)
    for model in (net, inside):
        y, new = jax.jit(pt.training(model))(params, X)
        assert y.dtype == F32 and jax.tree.structure(new) == jax.tree.structure(params)
        assert dtypes(new) == {F32}
        close(y, pt.training(net.layer)(params, X)[0], 0.1, 0.1)
        loose = pt.unstack(params, "")
        close(model(loose, X), model(params, X), 0.02, 0.02)
        assert dtypes(pt.grad(lambda p, model=model: model(p, X).sum())(params)) == {F32}
    many = nn.Vmap(nn.Compute(nn.Dense(3), BF16), 2, in_axes=None)
    y = many(many.init(jax.random.key(0), X), X)
    assert (y.shape, y.dtype) == ((2, 6, 3), F32)
    close(jax.vmap(net, (None, 0))(params, jnp.stack([X, 2 * X]))[1], net(params, 2 * X))
    rules = {"dense0_weight": pt.parametrizations.WeightNorm()}
    close(pt.reparametrize(net, rules)(pt.expand(params, rules), X), net(params, X))
    expanded = pt.init(pt.reparametrize(net, rules), jax.random.key(0), X)
    close(expanded, pt.expand(params, rules), 1e-6, 1e-6)
    close(net(pt.pack(params), X), net(params, X), 0.01, 0.01)
    remat = jax.checkpoint(pt.training(net))(params, X)
    close(remat, pt.training(net)(params, X))
    two = nn.Compute(nn.Sequential(nn.Dense(4), nn.Dense(4)), BF16)
    tied = pt.tie(two.init(jax.random.key(0), X), {"dense1": "dense0"})
    assert len(jax.tree.leaves(pt.grad(lambda p: two(p, X).sum())(tied))) == 2


def test_decoding_with_a_cache():
    attend = nn.MultiHeadAttention(2, causal=True, cache=4, dropout=0.5)
    net, x = nn.Compute(nn.Residual(attend), BF16), normal(2, 3, 4)
    params = net.init(jax.random.key(0), x)
    assert params[0].cache_key.dtype == BF16 and params[0].query.weight.dtype == F32
    step, ys, new = jax.jit(pt.decoding(net)), [], params
    for i in range(3):
        y, new = step(new, x[:, i : i + 1])
        ys.append(y)
    close(jnp.concatenate(ys, 1), net(params, x))
    assert int(new[0].cache_index) == 3


def test_settings_and_mistakes():
    layer = nn.Compute(nn.Dense(3), "bfloat16")
    assert layer == nn.Compute(nn.Dense(3), jnp.bfloat16) != nn.Compute(nn.Dense(3), "float16")
    assert repr(layer) == "Compute(Dense(None -> 3, linear), bfloat16)"
    assert repr(nn.Compute(nn.Flatten(), "float32", "a")) == "Compute(Flatten, float32, keep='a')"
    assert nn.Sequential(nn.Compute(lambda p, x: x, "float16"), layer).names == ("compute0", "dense0")
    for wrong in ("int8", "bf16", 3, None):
        with pytest.raises(
            ValueError, match="Compute: compute_dtype must be a floating dtype .* found"
        ):
            nn.Compute(nn.Dense(3), wrong)
    with pytest.raises(TypeError, match="the layer of a Compute is 3; expected a layer"):
        nn.Compute(3, "bfloat16")
    params = layer.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match=r"returns a parameter tree.* pt.training\(nn.Compute\(net"):
        nn.Compute(pt.training(nn.Dense(3)), "bfloat16")(params, X)
    with pytest.raises(TypeError, match="model is called with its parameters first"):
        layer(X, X)
