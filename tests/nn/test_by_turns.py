"""Repeat of layers by turns, and with options that have a value for each copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn

N = 3


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def close(a, b, atol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


def big(net, *inputs):
    rules = {".*(weight|bias)": pt.initializers.Normal(0.4)}
    return pt.init(net, jax.random.key(1), *inputs, rules=rules)


# Layers by turns


def attention(window=0, **options):
    layer = nn.MultiHeadAttention(2, causal=True, window=window, **options)
    return nn.Residual(norm=nn.RMSNorm(), attend=layer)


def group(**options):
    return nn.Sequential(local=attention(2, **options), full=attention(**options))


X = normal(2, 5, 4)


def unrolled(p, x, **kwargs):
    for i in range(N):
        x = attention(2)(p[str(i)].local, x, **kwargs)
        x = attention()(p[str(i)].full, x, **kwargs)
    return x


@pytest.mark.parametrize("remat", [False, True])
def test_local_and_global_attention_by_turns(remat):
    net = nn.Repeat(group(), N, remat=remat)
    params = big(net, X)
    assert list(pt.collect(params))[:3] == [
        "local_norm_gamma", "local_attend_query_weight", "local_attend_query_bias"
    ]  # fmt: skip
    assert params.full.attend.query.weight.shape == (N, 4, 4)
    loose = pt.unstack(params, "")
    assert list(pt.collect(loose, "1_.*norm.*")) == ["1_local_norm_gamma", "1_full_norm_gamma"]
    # remat with a keyword argument, the other without
    kwargs = {"padding_mask": jnp.arange(5)[None] >= jnp.array([[0], [2]])} if remat else {}

    def value_and_grads(f, p):
        def loss(p, x):
            y = f(p, x, **kwargs)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(p, X)

    (_, y), (slopes, slope) = value_and_grads(net, params)
    (_, z), theirs = value_and_grads(unrolled, loose)
    close(y, z)
    close((pt.unstack(slopes, ""), slope), theirs, 1e-4)
    same = nn.Repeat(attention(), 2 * N)
    assert np.abs(same(pt.stack(in_turns(loose), ""), X) - y).max() > 1e-3


def in_turns(loose):
    """Returns the layers of unstacked groups under one number for each."""
    names = [(i, name) for i in range(N) for name in ("local", "full")]
    return pt.from_tree({str(k): loose[str(i)][name] for k, (i, name) in enumerate(names)})


def test_attention_and_a_recurrent_layer_by_turns():
    block = nn.Sequential(attention(), nn.Residual(nn.RMSNorm(), nn.GRU(4, layout="NTC")))
    net = nn.Repeat(block, N)
    params = big(net, X)
    assert params[1][1].l0_h2h_weight.shape == (N, 12, 4)
    loose, y = pt.unstack(params, ""), X
    for i in range(N):
        y = block(loose[str(i)], y)
    close(net(params, X), y)
    close(net(loose, X), y)
    mask = jnp.tril(jnp.ones((5, 5), bool))
    close(net(params, X, mask=mask), y)  # to the attention alone


def test_files_have_names_for_each_layer_in_turn(tmp_path):
    net = nn.Sequential(h=nn.Repeat(group(), N))
    params = big(net, X)
    loose = pt.unstack(params, "h")
    pt.save(tmp_path / "stacked.safetensors", params)
    pt.save(tmp_path / "loose.safetensors", loose)
    for file in ("stacked", "loose"):
        for like in (params, loose):
            close(pt.load(tmp_path / f"{file}.safetensors", like=like), like, 0)
    # A file that numbers all layers in one row is renamed.
    pt.save(tmp_path / "row.safetensors", pt.from_tree({"h": in_turns(loose.h)}))
    pairs = [(f"^h/{k}/", f"h/{k // 2}/{('local', 'full')[k % 2]}/") for k in range(2 * N)]
    row = pt.rename(pt.load(tmp_path / "row.safetensors"), pairs)
    close(net(row, X), net(params, X), 0)


def test_a_group_is_captured_reparametrised_tied_and_summarized():
    net = nn.Sequential(h=nn.Repeat(group(), N))
    params = big(net, X)
    y, acts = pt.capture(net, "h_(local|full)")(params, X)
    assert acts.h.local.output.shape == (N, 2, 5, 4)
    close(acts.h.full.output[-1], y)
    rules = {"h_full_attend_out_weight": pt.parametrizations.WeightNorm()}
    close(pt.reparametrize(net, rules)(pt.expand(params, rules), X), y)
    rows = pt.summary(net, params, X, flops=False).rows
    assert {"h_local", "h_full_attend_query"} <= {row.name for row in rows}
    tied = pt.tie(params, {"h/full/attend": "h/local/attend"})
    assert len(jax.tree.leaves(tied)) == len(jax.tree.leaves(params)) - 8
    loose = pt.unstack(tied, "h")
    close(net(tied, X), unrolled(loose.h, X))


def test_a_group_trains_and_decodes():
    net = nn.Repeat(group(dropout=0.5), N)
    params = big(net, X)
    key = jax.random.key(3)
    y, new = jax.jit(pt.training(net))(params, X, key=key)
    keys = jax.random.split(pt.training(lambda p: p.key())(params, key=key)[0], N)
    loose, z = pt.unstack(params, ""), X
    for i in range(N):
        z, _ = pt.training(group(dropout=0.5))(pt.from_tree(loose[str(i)].to_dict()), z, key=keys[i])
    close(y, z)
    assert np.abs(y - net(params, X)).max() > 1e-2
    cached = nn.Repeat(group(cache=6, dropout=0.5, rotary=True), N)
    params = big(cached, X)
    whole, new, ys = cached(params, X), params, []
    step = jax.jit(pt.decoding(cached))
    for size in (3, 1, 1):
        start = int(new.local.attend.cache_index[0])
        y, new = step(new, X[:, start : start + size])
        ys.append(y)
    close(jnp.concatenate(ys, 1), whole)
    assert new.full.attend.cache_index.tolist() == [5] * N


# Options by copy

RATES = np.linspace(0, 0.6, N)


def block(rate=0.0):
    return nn.Residual(nn.BatchNorm(momentum=0.5), nn.Dense(4, "tanh"), nn.DropPath(rate))


def deep(**options):
    return nn.Repeat(block(), N, by_copy={"rate": RATES}, **options)


def unrolled_training(key):
    """Returns a function of loose parameters: the blocks one after another, with the keys of copies."""

    def run(loose, x):
        keys = jax.random.split(pt.training(lambda p: p.key())(loose, key=key)[0], N)
        states = {}
        for i in range(N):
            one = pt.from_tree(loose[str(i)].to_dict(), kinds=KINDS)
            x, new = pt.training(block(float(RATES[i])))(one, x, key=keys[i])
            states[str(i)] = new.batchnorm0.running_mean
        return x, states

    return run


KINDS = {".*running.*": "state", ".*": "param"}


@pytest.mark.parametrize("remat", [False, True])
def test_stochastic_depth_with_rates_that_grow(remat):
    net, x, key = deep(remat=remat), normal(8, 4), jax.random.key(5)
    params = big(net, x)
    assert jax.tree.structure(params) == jax.tree.structure(pt.abstract(nn.Repeat(block(), N), x))
    loose = pt.unstack(params, "")

    def ours(params, x):
        y, new = pt.training(net)(params, x, key=key)
        means = pt.unstack(new, "")
        return jnp.sin(y).sum(), (y, {str(i): means[str(i)].batchnorm0.running_mean for i in range(N)})

    def theirs(loose, x):
        y, states = unrolled_training(key)(loose, x)
        return jnp.sin(y).sum(), (y, states)

    (_, found), grads = jax.jit(pt.value_and_grad(ours, has_aux=True))(params, x)
    (_, expected), slopes = pt.value_and_grad(theirs, has_aux=True)(loose, x)
    close(found, expected)
    for name, leaf in pt.collect(grads, sep="/").items():
        close(leaf, np.stack([slopes[f"{i}/{name}"] for i in range(N)]), 1e-4)
    y = net(params, x)  # inference
    for i in range(N):
        x = block()(loose[str(i)], x)
    close(y, x)


def test_each_copy_drops_at_its_rate():
    net = nn.Repeat(nn.DropPath(0.0), N, by_copy={"rate": RATES})
    x = jnp.ones((4000, 1))
    params = pt.init(net, jax.random.key(0), x)
    (_, acts), _ = pt.training(pt.capture(net))(params, x, key=jax.random.key(1))
    kept = np.asarray(acts.output1[..., 0] != 0).mean(1)  # of what the copies before have left
    np.testing.assert_allclose(kept, np.cumprod(1 - RATES), atol=0.03)
    alone, _ = pt.training(nn.Sequential(*map(nn.DropPath, RATES)))(
        pt.init(nn.Sequential(*map(nn.DropPath, RATES)), jax.random.key(0), x), x, key=jax.random.key(2)
    )
    assert set(np.unique(np.asarray(alone).round(4))) == set(
        np.unique(np.asarray(acts.output1[-1]).round(4))
    )


def test_options_by_copy_under_vmap_scan_and_bfloat16():
    net, x, key = deep(), normal(8, 4), jax.random.key(5)
    params = big(net, x)
    train = pt.training(net)
    both = jax.vmap(lambda x: train(params, x, key=key)[0])(jnp.stack([x, 2 * x]))
    close(both[1], train(params, 2 * x, key=key)[0])
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    y, _ = train(half, x.astype(jnp.bfloat16), key=key)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), train(params, x, key=key)[0], 0.3)

    def scanned(p, x):
        return pt.scan(lambda p, x, _: (net(p, x), None), p, x, length=2)[0]

    y, _ = pt.training(scanned)(params, x, key=key)
    assert np.isfinite(y).all() and y.shape == x.shape
    loose = pt.unstack(params, "")
    y, new = jax.jit(train)(loose, x, key=key)
    assert jax.tree.structure(new) == jax.tree.structure(loose)
    assert (np.asarray(y) != np.asarray(net(params, x))).any()


def test_any_keyword_argument_by_copy():
    def block(p, x, shift, row, *, on):
        return jnp.where(on, x + shift.astype(x.dtype) + row[None], x)

    values = {"on": [True, False, True], "shift": (1, 2, 3), "row": np.arange(6.0).reshape(3, 2)}
    net = nn.Repeat(block, N, by_copy=values)
    assert net.by_copy == (
        ("on", (True, False, True)), ("row", ((0.0, 1.0), (2.0, 3.0), (4.0, 5.0))), ("shift", (1, 2, 3))
    )  # fmt: skip
    x = jnp.zeros((1, 2))
    params = pt.init(net, jax.random.key(0), x)
    close(net(params, x), np.array([[1 + 0 + 3 + 4, 1 + 1 + 3 + 5]]))
    same = nn.Repeat(block, N, by_copy=dict(reversed(values.items())))
    assert (same, hash(same)) == (net, hash(net))
    assert same != nn.Repeat(block, N, by_copy={**values, "shift": (1, 2, 4)})
    text = "Repeat(\n  (3 x, rate by copy): DropPath(rate=0.0)\n)"
    assert repr(nn.Repeat(nn.DropPath(0.0), 3, by_copy={"rate": (0, 0, 0)})) == text


def test_a_keyword_argument_of_a_repeat_with_its_own():
    # It goes to the other layers alone.
    net = nn.Sequential(nn.DropPath(0.0), nn.Repeat(nn.DropPath(0.0), 2, by_copy={"rate": (0.0, 0.0)}))
    x = jnp.ones((100, 1))
    params = net.init(jax.random.key(0), x)
    y, _ = pt.training(net)(params, x, rate=0.5, key=jax.random.key(1))
    assert set(np.unique(y)) == {0.0, 2.0}
    with pytest.raises(TypeError, match="'rate' has a value for each copy already: do not give it"):
        net[1](params[1], x, rate=0.5)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.1, 0.2), r"must hold 3 numbers, but found an array of shape \(2,\)"),
        (0.1, "must hold 3 numbers, but found 0.1"),
        (np.zeros((2, 3)), r"must hold 3 numbers, but found an array of shape \(2, 3\)"),
        (("a", "b", "c"), r"must hold numbers, .*layers by turns, .*nn.Sequential\(a, b\)"),
        ((None, 0.1, 0.2), "must hold numbers, which the copies get as arrays"),
        (((1, 2), 3, 4), "must hold numbers, which the copies get as arrays"),
        ((0.1, 0.2, float("nan")), "must hold finite numbers"),
    ],
)
def test_what_is_no_option_by_copy(values, text):
    with pytest.raises(ValueError, match=rf"^Repeat: by_copy\['rate'\] {text}"):
        nn.Repeat(nn.DropPath(0.0), 3, by_copy={"rate": values})


def test_mistakes_with_options_by_copy():
    with pytest.raises(TypeError, match="no layer in it takes the keyword argument 'rat'.*`?rate"):
        nn.Repeat(block(), 3, by_copy={"rat": RATES})
    with pytest.raises(TypeError, match="no layer in it takes the keyword argument 'window'"):
        nn.Repeat(nn.Sequential(nn.MultiHeadAttention(2)), 2, by_copy={"window": (2, 0)})
    with pytest.raises(ValueError, match="is traced, .* to the call as an argument, with in_axes=0"):
        jax.jit(lambda r: nn.Repeat(block(), 3, by_copy={"rate": r}))(RATES)


def test_a_rate_that_is_given_to_drop_path():
    x = jnp.ones((100, 3))
    layer = nn.DropPath(0.9)
    params = pt.init(layer, jax.random.key(0), x)
    train = jax.jit(pt.training(layer))
    for rate in (jnp.float32(0.5), 0.5):  # jit traces both
        assert set(np.unique(train(params, x, rate=rate, key=jax.random.key(1))[0])) == {0.0, 2.0}
    assert pt.training(layer)(params, x, rate=0, key=None)[0] is x
    assert layer(params, x, rate=jnp.float32(0.5)) is x
    for rate in (1.0, 1.5, -0.1, float("nan")):
        assert np.isnan(train(params, x, rate=rate, key=jax.random.key(1))[0]).all()
        for call in (layer, pt.training(layer)):
            with pytest.raises(ValueError, match=r"DropPath: rate must be in \[0, 1\), but found"):
                call(params, x, rate=rate)
    for rate in (jnp.zeros(2), (0.1, 0.2)):
        with pytest.raises(ValueError, match="DropPath: rate must be in"):
            layer(params, x, rate=rate)


def test_a_rate_in_bfloat16_is_as_exact_as_it_can_be():
    # nn.Compute casts what its layer is given; 1 - rate in bfloat16 would be 0.9922.
    net = nn.Repeat(nn.Compute(nn.DropPath(0.0), "bfloat16"), 1, by_copy={"rate": (0.006,)})
    x = jnp.ones((50_000, 1))
    y, _ = pt.training(net)(pt.init(net, jax.random.key(0), x), x, key=jax.random.key(1))
    kept = float((y != 0).mean())
    assert y.dtype == x.dtype and abs(kept - 0.994) < 4 * (0.006 / 50_000) ** 0.5
