"""Attention against PyTorch's, its masks, grouped keys, rotary positions and cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn
from paramtree.nn import attend

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=atol)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def big(layer, *inputs):
    rules = {".*(weight|bias)": pt.initializers.Normal(0.5)}
    return pt.init(layer, jax.random.key(1), *inputs, rules=rules)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [None, "padding", "causal"])
def test_outputs_and_gradients_are_those_of_pytorch(cross, masked):
    torch = pytest.importorskip("torch")
    x, memory = normal(2, 5, 8), normal(2, 7, 8)
    layer = nn.MultiHeadAttention(4, causal=masked == "causal" and not cross)
    given = (x, memory) if cross else (x,)
    params = big(layer, *given)
    other = memory if cross else x
    mask = (
        np.arange(other.shape[1])[None, :] < np.array([[other.shape[1]], [3]])
        if masked == "padding"
        else None
    )

    theirs = torch.nn.MultiheadAttention(8, 4, batch_first=True)
    tensors = {name: torch.tensor(np.asarray(leaf)) for name, leaf in pt.collect(params).items()}
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([tensors[f"{n}_weight"] for n in ("query", "key", "value")])
        )
        theirs.in_proj_bias.copy_(torch.cat([tensors[f"{n}_bias"] for n in ("query", "key", "value")]))
        theirs.out_proj.weight.copy_(tensors["out_weight"])
        theirs.out_proj.bias.copy_(tensors["out_bias"])
    q, kv = torch.tensor(x, requires_grad=True), torch.tensor(other, requires_grad=True)
    kv = kv if cross else q
    options = {}
    if mask is not None:
        options["key_padding_mask"] = torch.tensor(~mask)
    if layer.causal:
        options["attn_mask"] = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    y, _ = theirs(q, kv, kv, need_weights=False, **options)
    (y**2).sum().backward()

    def loss(params, x, memory):
        out = layer(params, x, memory if cross else None, padding_mask=mask)
        return (out**2).sum(), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, memory)
    close(out, y.detach())
    close(grads[1], q.grad, 1e-4)
    in_proj = theirs.in_proj_weight.grad.numpy()
    for name, rows in zip(("query", "key", "value"), np.split(in_proj, 3), strict=True):
        close(grads[0][name].weight, rows, 1e-4)
    close(grads[0].out.weight, theirs.out_proj.weight.grad, 1e-4)


def test_grouped_keys_are_repeated_keys(key):
    x = normal(2, 5, 8)
    layer = nn.MultiHeadAttention(4, num_kv_heads=2)
    params = big(layer, x)
    assert params["key"].weight.shape == (4, 8)
    wide = {
        name: jnp.repeat(params[name][w].reshape(2, 2, *params[name][w].shape[1:]), 2, axis=0).reshape(
            8, *params[name][w].shape[1:]
        )
        for name in ("key", "value")
        for w in ("weight",)
    }
    full = pt.init(nn.MultiHeadAttention(4), key, x)
    full = pt.replace(full, {"query": params["query"], "out": params["out"]})
    full = pt.replace(full, {f"{name}/weight": leaf for name, leaf in wide.items()})
    biases = {f"{n}/bias": jnp.repeat(params[n].bias.reshape(2, 2), 2, axis=0).reshape(8) for n in wide}
    close(layer(params, x), nn.MultiHeadAttention(4)(pt.replace(full, biases), x))


def test_rotary_positions_matter_only_by_their_distance():
    x = normal(1, 6, 2, 8)
    q, k = nn.rotate(x, jnp.arange(6)), nn.rotate(x[::-1], jnp.arange(6))
    far, also = nn.rotate(x, jnp.arange(6) + 40), nn.rotate(x[::-1], jnp.arange(6) + 40)
    close(jnp.einsum("bqhd,bkhd->bhqk", q, k), jnp.einsum("bqhd,bkhd->bhqk", far, also), 1e-4)
    close(jnp.linalg.norm(q, axis=-1), np.linalg.norm(x, axis=-1))
    close(nn.rotate(x, jnp.zeros(6, jnp.int32)), x)
    plain, turned = nn.MultiHeadAttention(2), nn.MultiHeadAttention(2, rotary=True)
    y = normal(1, 5, 8)
    params = big(plain, y)
    close(plain(params, y[:, ::-1])[:, ::-1], plain(params, y))
    assert np.abs(np.asarray(turned(params, y[:, ::-1])[:, ::-1] - turned(params, y))).max() > 1e-3


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("pieces", [(1,) * 6, (4, 1, 1), (6,)])
def test_a_sequence_in_pieces_is_the_sequence(rotary, pieces):
    x = normal(2, 6, 8)
    layer = nn.MultiHeadAttention(4, num_kv_heads=2, causal=True, rotary=rotary)
    params = big(layer, x)
    cached = dataclasses.replace(layer, cache=8)
    state = pt.replace(pt.init(cached, jax.random.key(0), x[:, :1]), params)
    assert list(pt.collect(state, kind="state")) == ["cache_key", "cache_value", "cache_index"]
    step = jax.jit(pt.training(cached))
    outputs, start = [], 0
    for size in pieces:
        y, state = step(state, x[:, start : start + size])
        outputs.append(y)
        start += size
    close(jnp.concatenate(outputs, axis=1), layer(params, x))
    assert int(state.cache_index) == 6
    close(cached(state, x), layer(params, x))  # inference leaves the cache alone

    def scanned(state, x):  # the parameter tree is the scan's carry
        def body(state, token):
            y, state = pt.training(cached)(state, token[:, None])
            return state, y[:, 0]

        return jax.lax.scan(body, state, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    fresh = pt.replace(pt.init(cached, jax.random.key(0), x[:, :1]), params)
    close(jax.jit(scanned)(fresh, x), layer(params, x))


def test_a_full_cache_gives_nan_and_nothing_before():
    x = normal(1, 3, 4)
    layer = nn.MultiHeadAttention(2, causal=True, cache=2)
    params = big(layer, x[:, :1])
    for i in range(3):
        y, params = pt.training(layer)(params, x[:, i : i + 1])
        assert bool(jnp.isnan(y).all()) == (i == 2)


def test_sizes_that_do_not_fit(key):
    x = normal(2, 3, 6)
    for make, text in (
        (lambda: nn.MultiHeadAttention(0), "num_heads must be positive .* found num_heads=0 and"),
        (lambda: nn.MultiHeadAttention(4, 6), "divide units, but found num_heads=4 and units=6"),
        (
            lambda: nn.MultiHeadAttention(4, num_kv_heads=3),
            "must divide num_heads, but found num_kv_heads=3 and num_heads=4",
        ),
        (lambda: nn.MultiHeadAttention(4).init(key, x), "cannot divide 6 units into 4 heads"),
        (lambda: nn.MultiHeadAttention(2, rotary=True).init(key, x), "2 heads of an even size"),
        (
            lambda: nn.MultiHeadAttention(2).init(key, x[0]),
            r"needs x and memory \(batch, length, size\), but found \(3, 6\)",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    assert (
        repr(nn.MultiHeadAttention(4, 8, 2, causal=True, cache=3))
        == "MultiHeadAttention(8, heads=4, kv_heads=2, causal, cache=3)"
    )
    assert nn.MultiHeadAttention(2) == nn.MultiHeadAttention(2, bias_initializer=pt.initializers.Zero())


# Every option against a plain formula

SCALINGS = {
    "linear": ("linear", 3.0),
    "ntk": ("ntk", 3.0),
    "yarn": ("yarn", 3.0, 40),
    "yarn_hf": ("yarn_hf", 3.0, 40),
}
OPTIONS = {
    "causal": {"causal": True},
    "grouped": {"num_kv_heads": 2},
    "units": {"units": 24},
    "head_size": {"head_size": 6},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "window": {"window": 2},
    "qkv_bias": {"qkv_bias": False},
    "out_bias": {"out_bias": False},
    "qk_norm": {"qk_norm": True},
    "rotary": {"rotary": True, "rotary_base": 50.0},
    "fraction": {"rotary": True, "rotary_fraction": 0.5, "head_size": 8},
    **{name: {"rotary": True, "rotary_scaling": scaling} for name, scaling in SCALINGS.items()},
}
B, T, H = 3, 3, 4  # as many examples as positions, which must not matter
INPUTS = {
    "mask2": {"mask": RNG.random((T, T)) < 0.6},
    "mask3": {"mask": RNG.random((B, T, T)) < 0.6},
    "mask4": {"mask": RNG.random((B, H, T, T)) < 0.6},
    "mask1": {"mask": RNG.random((1, H, 1, T)) < 0.6},
    "padding": {"padding_mask": np.arange(T)[None] < np.array([[3], [1], [2]])},
    "bias2": {"bias": normal(T, T)},
    "bias4": {"bias": normal(1, H, T, T)},
    "positions": {"positions": np.array([[0, 1, 0], [5, 6, 7], [0, 0, 1]], np.int32), "rotary": True},
}
ALL = {**OPTIONS, **INPUTS}


def yarn_of_hugging_face(dim, base, factor, length):
    """The rates as Transformers and the paper's authors compute them: pair by pair, by its index."""
    fast, slow = (dim * np.log(length / (n * 2 * np.pi)) / (2 * np.log(base)) for n in (32, 1))
    low, high = max(np.floor(fast), 0), min(np.ceil(slow), dim - 1)
    if low == high:
        high += 0.001
    rates = []
    for i in range(dim // 2):
        ramp = min(max((i - low) / (high - low), 0), 1)
        plain = 1 / base ** (2 * i / dim)
        rates.append(plain / factor * ramp + plain * (1 - ramp))
    return np.array(rates)


def turned(x, positions, base=1e4, fraction=1.0, scaling=None):
    """Rotates pairs as complex numbers."""
    n = int(x.shape[-1] * fraction) // 2
    if scaling and scaling[0] == "ntk" and n > 1:
        base *= scaling[1] ** (2 * n / (2 * n - 2))
    rates = base ** (-np.arange(n) / n)
    gain = 1.0
    if scaling and scaling[0] == "linear":
        rates = rates / scaling[1]
    if scaling and scaling[0] == "yarn":
        ratio = scaling[2] * rates / (2 * np.pi)
        gamma = np.where(ratio < 1, 0, np.where(ratio > 32, 1, (ratio - 1) / 31))
        rates = (1 - gamma) * rates / scaling[1] + gamma * rates
    if scaling and scaling[0] == "yarn_hf":
        rates = yarn_of_hugging_face(2 * n, base, *scaling[1:])
    if scaling and scaling[0].startswith("yarn"):
        gain = 0.1 * np.log(scaling[1]) + 1
    angles = np.broadcast_to(positions, x.shape[:2])[:, :, None, None] * rates[None, None, None]
    cos, sin = gain * np.cos(angles).astype("f4"), gain * np.sin(angles).astype("f4")
    a, b = x[..., :n], x[..., n : 2 * n]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, x[..., 2 * n :]], -1)


def plain(layer, p, x, memory=None, mask=None, padding_mask=None, bias=None, positions=None, kept=None):
    """Multi-head attention, written out."""
    other = x if memory is None else memory

    def dense(name, x):
        y = jnp.einsum("bti,oi->bto", x, p[name].weight)
        return y + p[name].bias[None, None] if "bias" in p[name] else y

    q, k, v = dense("query", x), dense("key", other), dense("value", other)
    size = q.shape[-1] // layer.num_heads
    q, k, v = (y.reshape(*y.shape[:2], -1, size) for y in (q, k, v))
    if layer.qk_norm:
        q, k = (
            y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * p[n].gamma[None, None, None]
            for y, n in ((q, "query_norm"), (k, "key_norm"))
        )
    rows, columns = np.arange(q.shape[1]), np.arange(k.shape[1])
    if layer.rotary:
        how = layer.rotary_base, layer.rotary_fraction, layer.rotary_scaling
        own = rows if positions is None else positions
        q, k = turned(q, own, *how), turned(k, own if memory is None else columns, *how)
    k, v = (jnp.repeat(y, layer.num_heads // y.shape[2], axis=2) for y in (k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (layer.scale or 1 / np.sqrt(size))
    if layer.softcap:
        logits = layer.softcap * jnp.tanh(logits / layer.softcap)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias, logits.shape)
    seen = np.ones(logits.shape, bool)
    distance = rows[:, None] - columns[None, :]
    if layer.causal:
        seen = seen & (distance >= 0)
    if layer.window:
        seen = seen & (abs(distance) < layer.window)
    if padding_mask is not None:
        seen = seen & padding_mask[:, None, None, :]
    if mask is not None:
        seen = seen & (mask[:, None] if mask.ndim == 3 else mask)
    logits = jnp.where(seen, logits, -1e30)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    if kept is not None:
        weights = jnp.where(kept, weights, 0.0) / (1 - layer.dropout)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return dense("out", y.reshape(*y.shape[:2], -1))


def made(*names, **more):
    """Returns a layer, its inputs by name, and parameters."""
    settings = {}
    for name in names:
        settings.update(ALL[name])
    settings.update(more)
    given = {k: settings.pop(k) for k in ("mask", "padding_mask", "bias", "positions") if k in settings}
    layer = nn.MultiHeadAttention(H, **settings)
    x = normal(B, T, 16)
    return layer, x, given, big(layer, x)


def same(layer, params, x, given, compared=None, **also):
    def loss(f):
        def of(params, x, bias):
            how = given if bias is None else {**given, "bias": bias}
            y = f(params, x, how)
            return (jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

        return jax.value_and_grad(of, (0, 1, 2), has_aux=True)

    ours = compared or (lambda params, x, how: layer(params, x, **how))
    bias = given.get("bias")
    (_, y), grads = loss(ours)(params, x, bias)
    (_, z), expected = loss(lambda p, x, how: plain(layer, p, x, **how, **also))(params, x, bias)
    close(y, z)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        close(one, other, 1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_the_plain_formula(name):
    layer, x, given, params = made(name)
    same(layer, params, x, given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_pairs_of_options_are_the_plain_formula(name):
    for other in [*ALL][[*ALL].index(name) + 1 :: 11]:  # a part of the pairs, others for each name
        if not {k for k in ALL[name] if k != "rotary"} & set(ALL[other]):
            layer, x, given, params = made(name, other)
            same(layer, params, x, given)


@pytest.mark.parametrize("names", [(), ("softcap", "grouped"), ("causal", "rotary", "mask3", "bias4")])
def test_dropout_zeroes_probabilities(names, monkeypatch):
    layer, x, given, params = made(*names, dropout=0.25)
    kept = RNG.random((B, H, T, T)) < 0.75
    asked = []

    def mask(key, rate, shape):
        asked.append((rate, shape))
        return jnp.asarray(kept)

    same(layer, params, x, given)  # inference
    monkeypatch.setattr(attend, "kept", mask)

    def trained(params, x, how):
        return pt.training(layer)(params, x, **how, key=jax.random.key(0))[0]

    same(layer, params, x, given, trained, kept=kept)
    assert set(asked) == {(0.25, (B, H, T, T))}


def test_dropout_needs_a_key_and_differs_by_it():
    layer, x, _, params = made(dropout=0.5)
    with pytest.raises(pt.ScopeError, match="draws random numbers, but no key was given"):
        pt.training(layer)(params, x)
    a, b, again = (pt.training(layer)(params, x, key=jax.random.key(i))[0] for i in (0, 1, 0))
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(a, again)


@pytest.mark.parametrize("names", [("softcap",), ("qk_norm", "grouped"), ("rotary", "window"), ()])
def test_attention_to_a_memory_and_under_vmap(names):
    layer, x, _, params = made(*names)
    memory = normal(B, 5, 16)
    mask, bias = RNG.random((B, T, 5)) < 0.7, normal(T, 5)
    y = layer(params, x, memory, mask, bias=bias)
    close(y, plain(layer, params, x, memory, mask, bias=bias))
    alone = jax.vmap(lambda x, m, k: layer(params, x[None], m[None], k[None], bias=bias)[0])
    close(alone(x, memory, mask), y)


@pytest.mark.parametrize(
    "names",
    [
        ("softcap",),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("rotary", "qk_norm", "window", "bias4"), marks=pytest.mark.slow),
    ],
)
def test_bfloat16(names):
    layer, x, given, params = made(*names)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    given = {k: jnp.asarray(v, jnp.bfloat16) if k == "bias" else v for k, v in given.items()}

    def loss(params):
        y = layer(params, jnp.asarray(x, jnp.bfloat16), **given)
        return y.astype(jnp.float32).sum(), y

    grads, y = jax.grad(loss, has_aux=True)(small)
    with jax.numpy_dtype_promotion("standard"):  # the gradient of jax's attention needs it
        of_jax, y_of_jax = jax.grad(loss, has_aux=True)(small)
    for ours, theirs in zip(*map(jax.tree.leaves, ((grads, y), (of_jax, y_of_jax))), strict=True):
        most = float(jnp.abs(theirs).max())
        close(ours.astype(jnp.float32), theirs.astype(jnp.float32), 0.02 * most)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    close(y.astype(jnp.float32), layer(params, x, **given), 0.2)


@pytest.mark.parametrize("names", [("softcap", "rotary", "mask4"), ("window", "bias2", "qk_norm")])
def test_strict_promotion(names):
    layer, x, given, params = made(*names, dropout=0.5, causal=True)
    with jax.numpy_dtype_promotion("strict"):
        layer(params, x, **given)
        pt.training(layer)(params, x, **given, key=jax.random.key(0))


def test_the_functional_attention_of_pytorch():
    torch = pytest.importorskip("torch")
    for options in ({}, {"causal": True}, {"scale": 0.7}, {"num_kv_heads": 2}):
        layer, x, _, params = made(**options)
        q, k, v = (
            torch.tensor(np.asarray(nn.Dense(leaf.weight.shape[0], flatten=False)(leaf, x)))
            .reshape(B, T, -1, 4)
            .transpose(1, 2)
            for leaf in (params["query"], params["key"], params["value"])
        )
        attention = torch.nn.functional.scaled_dot_product_attention
        for mask in (None, RNG.random((B, 1, T, T)) < 0.5):
            if mask is not None and (layer.causal or not mask.any(-1).all()):
                continue
            y = attention(
                q, k, v, None if mask is None else torch.tensor(mask), 0.0, layer.causal,
                scale=layer.scale, enable_gqa=True,
            )  # fmt: skip
            y = y.transpose(1, 2).reshape(B, T, -1).numpy()
            close(layer(params, x, mask=mask), nn.Dense(16, flatten=False)(params["out"], y))


# Masks


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_mask_means_the_same_for_every_batch_size(batch):
    x = normal(batch, 3, 8)
    layer = nn.MultiHeadAttention(2)
    params = big(layer, x)
    lower = np.tril(np.ones((3, 3), bool))
    whole = dataclasses.replace(layer, causal=True)(params, x)
    for mask in (lower, lower[None], np.stack([lower] * batch), lower[None, None]):
        close(layer(params, x, mask=mask), whole)
    padding = np.array([[True, True, False]] * batch)
    close(layer(params, x, padding_mask=padding), layer(params, x, x[:, :2]))
    both = layer(params, x, mask=lower, padding_mask=padding)
    close(both, layer(params, x, mask=lower[None] & padding[:, None]))
    close(layer(params, x, mask=padding[:1]), layer(params, x, x[:, :2]))  # an axis of size 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"mask": np.ones((2, 3), bool)}, r"a mask \(query, key\), here \(3, 3\) or .*found \(2, 3\)"),
        ({"mask": np.ones((2, 3), bool)}, r"\(batch, key\) is given as padding_mask"),
        ({"mask": np.ones((2, 2, 3), bool)}, r"\(batch, query, key\), here \(2, 3, 3\)"),
        ({"mask": np.ones((2, 3, 3, 3), bool)}, r"heads, query, key\), here \(2, 4, 3, 3\)"),
        ({"mask": np.ones(3, bool)}, r"needs a mask .* found \(3,\)"),
        ({"mask": np.ones((3, 3))}, r"a boolean mask \(True means attend\), but found float64"),
        ({"padding_mask": np.ones((3, 3), bool)}, r"padding_mask \(batch, key\), here \(2, 3\)"),
        ({"padding_mask": np.ones((2, 3), int)}, r"a boolean padding_mask"),
        ({"padding_mask": np.ones((2, 1, 1, 3), bool)}, r"padding_mask .* found \(2, 1, 1, 3\)"),
        ({"bias": np.ones((4, 3, 3), "f4")}, r"a bias .* found \(4, 3, 3\)\. Add the axis"),
        ({"bias": np.ones((3, 4), "f4")}, r"a bias \(query, key\), here \(3, 3\)"),
        ({"bias": np.ones((3, 3), bool)}, r"a floating bias, but found bool: .* given as mask"),
        ({"positions": np.arange(3)}, "has no use for positions"),
    ],
)
def test_what_is_no_mask(given, text):
    x = normal(2, 3, 8)
    layer = nn.MultiHeadAttention(4)
    with pytest.raises(ValueError, match=rf"^MultiHeadAttention\(None, heads=4\).*{text}"):
        layer(big(layer, x), x, **given)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": -1}, "window must be a non-negative integer"),
        ({"softcap": -1.0}, "softcap must be a positive number, or 0 for no cap, but found -1.0"),
        ({"softcap": float("inf")}, "softcap must be"),
        ({"scale": 0}, "scale must be a positive number or None, but found 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), but found 1.0"),
        ({"dropout": True}, "dropout must be"),
        ({"rotary_base": 5.0}, "rotary_base=5.0 has no effect without rotary=True"),
        ({"rotary_fraction": 0.5}, "rotary_fraction=0.5 has no effect without"),
        ({"rotary_scaling": ("linear", 2)}, "rotary_scaling=.* has no effect without"),
        ({"rotary": True, "rotary_fraction": 1.5}, r"fraction must be in \(0, 1\], but found 1.5"),
        ({"rotary": True, "rotary_base": 0}, "base must be a positive number, but found 0"),
        ({"rotary": True, "rotary_scaling": ("linera", 2)}, r"one of \('linear', factor\), .*'linera'"),
        ({"rotary": True, "rotary_scaling": ("yarn", 2)}, r"\('yarn', factor, original_length\)"),
        ({"rotary": True, "rotary_scaling": ("ntk", 0.5)}, "numbers of at least 1"),
        (
            {"rotary": True, "rotary_base": 1, "rotary_scaling": ("yarn_hf", 2, 9)},
            r"rotary base of \('yarn_hf', 2, 9\) must be above 1, but found 1",
        ),
        ({"rotary": True, "rotary_scaling": "yarn"}, "scaling must be None or one of"),
        ({"rotary": True, "head_size": 3}, "heads of an even size, .* found size 3"),
        ({"rotary": True, "head_size": 6, "rotary_fraction": 0.5}, "size 6, of which .* rotate 3"),
        ({"rotary": True, "units": 12}, "found size 3"),
        ({"cache_dtype": "bfloat16"}, "cache_dtype='bfloat16' has no effect without a cache"),
        ({"cache": 2, "cache_dtype": "int8"}, "must be a floating dtype, but found int8"),
        ({"implementation": "flash"}, "None, 'xla' or 'cudnn', but found 'flash'"),
        ({"implementation": "cudnn", "softcap": 5.0}, "'cudnn' cannot compute softcap=5.0"),
        ({"num_kv_heads": 3}, "must divide num_heads"),
    ],
)
def test_options_that_make_no_sense(options, text):
    with pytest.raises(ValueError, match=f"^MultiHeadAttention: .*{text}"):
        nn.MultiHeadAttention(4, **options)


def test_options_are_shown_compared_and_given_to_jax():
    layer = nn.MultiHeadAttention(4, head_size=8, window=3, rotary=True, softcap=5.0, dropout=0.1)
    text = "MultiHeadAttention(None, heads=4, head_size=8, window=3, rotary, softcap=5.0, dropout=0.1)"
    assert repr(layer) == text
    yarn = nn.MultiHeadAttention(4, rotary=True, rotary_scaling=["yarn", 4, 64])
    assert yarn == nn.MultiHeadAttention(4, rotary=True, rotary_scaling=("yarn", 4, 64))
    assert hash(yarn) != hash(nn.MultiHeadAttention(4, rotary=True))
    x = normal(2, 3, 8)
    params = big(nn.MultiHeadAttention(4), x)
    xla = nn.MultiHeadAttention(4, implementation="xla")
    close(xla(params, x), nn.MultiHeadAttention(4)(params, x))
    names = pt.collect(pt.abstract(nn.MultiHeadAttention(2, qk_norm=True, qkv_bias=False), x))
    assert list(names) == [
        *("query_weight", "key_weight", "value_weight", "query_norm_gamma", "key_norm_gamma"),
        *("out_weight", "out_bias"),
    ]
    assert names.query_norm_gamma.shape == (4,)


def test_rotate_takes_pairs_and_positions_of_each_example():
    x = normal(2, 3, 1, 6)
    for size in (1, 5):
        with pytest.raises(ValueError, match=rf"rotate turns pairs.*\(2, 3, 1, {size}\)"):
            nn.rotate(x[..., :size], jnp.arange(3))
    with pytest.raises(ValueError, match=r"positions of shape \(3,\) or \(2, 3\) .* found \(2,\)"):
        nn.rotate(x, jnp.arange(2))
    with pytest.raises(ValueError, match="rotary scaling must be"):
        nn.rotate(x, jnp.arange(3), scaling=("linear",))
    each = nn.rotate(x, jnp.array([[0, 1, 2], [7, 8, 9]]))
    close(each[1], nn.rotate(x[1], jnp.arange(7, 10)))
    close(nn.rotate(x, jnp.arange(3) * 4, scaling=("linear", 4)), nn.rotate(x, jnp.arange(3)))


@pytest.mark.parametrize(
    ("size", "base", "factor", "length"),
    [(128, 1e4, 4, 4096), (64, 1.5e5, 32, 4096), (128, 1e6, 4, 32768), (8, 1e4, 2, 7), (4, 50.0, 3, 5), (2, 3, 1, 1)],
)  # fmt: skip
def test_yarn_of_the_paper_and_of_hugging_face(size, base, factor, length):
    x, at = normal(1, 3, 1, size), jnp.array([0, 1, 100])
    for kind in ("yarn", "yarn_hf"):
        scaling = (kind, factor, length)
        close(nn.rotate(x, at, base, scaling=scaling), turned(x, at[None], base, 1.0, scaling), 1e-4)
    if size >= 64:
        one, other = (nn.rotate(x, at, base, scaling=(k, factor, length)) for k in ("yarn", "yarn_hf"))
        assert np.abs(one - other).max() > 0.1


def test_packed_and_left_padded_sequences_are_the_sequences_alone():
    layer, x, _, params = made("rotary", "causal")
    one, two = normal(1, 3, 16), normal(1, 2, 16)
    packed = jnp.concatenate([one, two], 1)
    example = np.array([0, 0, 0, 1, 1])
    y = layer(params, packed, mask=example[:, None] == example, positions=np.array([0, 1, 2, 0, 1]))
    close(y[:, :3], layer(params, one))
    close(y[:, 3:], layer(params, two))
    padded = jnp.concatenate([jnp.zeros((1, 2, 16)), one], 1)
    positions = np.maximum(np.arange(5) - 2, 0)[None]
    y = layer(params, padded, padding_mask=np.arange(5)[None] >= 2, positions=positions)
    close(y[:, 2:], layer(params, one))


# The cache


CACHED = {
    "grouped": {"num_kv_heads": 2},
    "window": {"window": 3},
    "rotary": {"rotary": True, "rotary_scaling": ("yarn", 2, 16)},
    "capped": {"softcap": 2.0, "qk_norm": True},
    "all": {"num_kv_heads": 1, "window": 4, "rotary": True, "softcap": 2.0, "head_size": 6},
}


@pytest.mark.parametrize(
    ("name", "sizes", "transform"),
    [
        ("rotary", (4, 1, 2), pt.decoding),
        ("all", (4, 1, 2), pt.decoding),
        *(
            pytest.param(n, (4, 1, 2), pt.decoding, marks=pytest.mark.slow)
            for n in ("grouped", "window", "capped")
        ),
        pytest.param("all", (1,) * 7, pt.training, marks=pytest.mark.slow),
    ],
)
def test_pieces_with_masks_and_positions_are_the_whole(name, sizes, transform):
    x, length, cache = normal(2, 7, 8), 7, 9
    layer = nn.MultiHeadAttention(4, causal=True, cache=cache, **CACHED[name])
    fresh = big(layer, x)
    mask, padding = RNG.random((2, 7, 7)) < 0.7, np.arange(7)[None] >= np.array([[0], [2]])
    mask = mask | np.eye(7, dtype=bool)
    bias = normal(1, 4, 7, 7)
    positions = np.maximum(np.arange(7)[None] - np.array([[0], [2]]), 0)
    for given in ({}, {"mask": mask, "bias": bias}, {"padding_mask": padding, "positions": positions}):
        if "positions" in given and not layer.rotary:
            del given["positions"]
        whole = layer(fresh, x, **given)
        wide = {  # as many keys as the cache has places
            k: v if k == "positions" else np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, cache - length)])
            for k, v in given.items()
        }
        params, start = fresh, 0
        for size in sizes:
            at = slice(start, start + size)
            piece = {
                k: v[:, at] if k == "positions" else v if k == "padding_mask" else v[..., at, :]
                for k, v in wide.items()
            }
            y, params = jax.jit(transform(layer))(params, x[:, at], **piece)
            seen = slice(2, None) if "padding_mask" in given else slice(None)  # not the padding
            keep = np.arange(start, start + size) >= (seen.start or 0)
            close(y[:, keep], whole[:, at][:, keep])
            start += size
        assert int(params.cache_index) == 7


def test_a_model_may_be_initialised_with_the_masks_of_either_call():
    layer, x = nn.MultiHeadAttention(2, cache=6), normal(2, 3, 8)
    shapes = pt.abstract(layer, x)
    for keys in (1, 3, 6):
        given = {"padding_mask": np.ones((2, keys), bool), "bias": np.zeros((3, keys), np.float32)}
        assert jax.tree.leaves(pt.abstract(layer, x, **given)) == jax.tree.leaves(shapes)
    with pytest.raises(ValueError, match=r"padding_mask \(batch, key\), here \(2, 3\)"):
        pt.abstract(layer, x, padding_mask=np.ones((2, 5), bool))
    with pytest.raises(ValueError, match=r"padding_mask \(batch, key\), here \(2, 6\).*found \(2, 3\)"):
        pt.decoding(layer)(big(layer, x), x, padding_mask=np.ones((2, 3), bool))


def test_pieces_that_do_not_fit():
    layer, x = nn.MultiHeadAttention(2, causal=True, cache=2), normal(1, 3, 8)
    params = big(layer, x)
    layer(params, x)  # inference has no use for the cache
    start = r"^MultiHeadAttention\(None, heads=2, causal, cache=2\) attends to"
    with pytest.raises(ValueError, match=rf"{start} 1 to 2 at a time, .* found 3"):
        pt.decoding(layer)(params, x)
    with pytest.raises(ValueError, match=rf"{start} 1 to 2 .* found 0"):
        pt.training(layer)(params, x[:, :0])
    with pytest.raises(ValueError, match=rf"{start} 1 or more positions, but found 0"):
        layer(params, x[:, :0])


def test_the_dtype_of_the_cache():
    layer, x = nn.MultiHeadAttention(2, causal=True, cache=4), normal(1, 3, 8)
    params = big(layer, x)
    small = pt.replace(
        params, {n: v.astype(jnp.bfloat16) for n, v in pt.collect(params, kind="param").items()}
    )
    y = jnp.asarray(x, jnp.bfloat16)
    with pytest.raises(pt.MismatchError, match="`cache_key` holds float32, but the keys are bfloat16"):
        pt.decoding(layer)(small, y)
    layer(small, y)
    kept = dataclasses.replace(layer, cache_dtype="float32")
    out, new = pt.decoding(kept)(small, y)
    assert (out.dtype, new.cache_key.dtype) == (jnp.bfloat16, jnp.float32)
    half = dataclasses.replace(layer, cache_dtype=jnp.bfloat16)
    params = big(half, x)
    assert params.cache_value.dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("strict"):
        out, new = pt.decoding(half)(params, x)
    assert (out.dtype, new.cache_key.dtype) == (jnp.float32, jnp.bfloat16)
    close(out, layer(params, x), 0.1)


# Decoding


class Count(nn.Layer):
    def __call__(self, p, x):
        n = p.state("n", (), pt.initializers.Zero())
        p.update("n", n + 1)
        return x


def decoder(dropout=0.5):
    attend = nn.MultiHeadAttention(2, causal=True, rotary=True, cache=6, dropout=dropout)
    block = nn.Residual(norm=nn.BatchNorm(), attend=attend, drop=nn.Dropout(dropout))
    return nn.Sequential(
        dense=nn.Dense(8, flatten=False), blocks=nn.Repeat(nn.Sequential(a=block), 2), one=block
    )


@pytest.fixture(scope="module")
def decoded():
    net, x = decoder(), normal(2, 5, 4)
    params = big(net, x)
    return net, params, x, net(params, x)


def test_a_net_with_dropout_decodes(decoded):
    net, params, x, whole = decoded
    step, new, ys = jax.jit(pt.decoding(net)), params, []
    for i in range(5):
        y, new = step(new, x[:, i : i + 1])
        ys.append(y)
    close(jnp.concatenate(ys, 1), whole)
    assert new.blocks.a.attend.cache_index.tolist() == [5, 5]
    means = (tree.blocks.a.norm.running_mean for tree in (params, new))
    np.testing.assert_array_equal(*means)  # batch normalization is that of inference
    assert pt.decoding(decoder()) == pt.decoding(net)
    assert hash(pt.decoding(decoder())) == hash(pt.decoding(net))
    assert jax.tree.structure(new) == jax.tree.structure(params)

    def scanned(params, x):
        def body(params, token):
            y, params = pt.decoding(net)(params, token[:, None])
            return params, y[:, 0]

        return jax.lax.scan(body, params, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    close(jax.jit(scanned)(params, x), whole)

    def within(p, x):
        def body(p, carry, token):
            return carry, net(p, token[:, None])[:, 0]

        return pt.scan(body, p, jnp.zeros(()), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    y, new = pt.decoding(within)(params, x)
    close(y, whole)
    assert int(new.one.attend.cache_index) == 5


def test_decoding_goes_with_the_other_transforms(decoded):
    net, params, x, whole = decoded
    (y, acts), new = pt.decoding(pt.capture(net, "one"))(params, x)
    close(acts.one.output, whole)
    assert int(new.one.attend.cache_index) == 5
    (y, new), acts = pt.capture(pt.decoding(net), "blocks_a_attend")(params, x)
    assert acts.blocks.a.attend.output.shape == (2, 2, 5, 8)
    assert new.blocks.a.attend.cache_index.tolist() == [5, 5]
    rules = {".*attend_query_weight": pt.parametrizations.WeightNorm()}
    for model in (pt.decoding(pt.reparametrize(net, rules)), pt.reparametrize(pt.decoding(net), rules)):
        y, new = model(pt.expand(params, rules), x)
        close(y, whole)
        assert int(new.one.attend.cache_index) == 5
    y, new = pt.decoding(net)(pt.pack(params), x)
    close(y, whole)
    assert int(pt.unpack(new).one.attend.cache_index) == 5

    def half(p, x):
        return net(pt.cast(p, jnp.bfloat16), x.astype(jnp.bfloat16))

    y, new = pt.decoding(half)(params, x)
    assert (y.dtype, new.one.attend.cache_key.dtype) == (jnp.bfloat16, jnp.float32)
    assert int(new.one.attend.cache_index) == 5

    def checkpointed(p, x):
        y, new = jax.checkpoint(pt.decoding(net))(p, x)
        p.update("", new)
        return y

    for transform in (pt.decoding, pt.training):
        y, new = transform(checkpointed)(params, x)
        close(y, whole)
        assert int(new.one.attend.cache_index) == 5
    shapes = [jax.tree.leaves(pt.abstract(model, x)) for model in (net, pt.decoding(net))]
    assert shapes[0] == shapes[1]


def test_what_decoding_does_not_do(decoded):
    net, params, x, _ = decoded
    counting = pt.init(Count(), jax.random.key(0), x)
    assert float(pt.decoding(Count())(counting, x)[1].n) == 1
    with pytest.raises(
        pt.ScopeError, match="`n` cannot be written: the model was called for inference"
    ):
        Count()(counting, x)

    def renamed(p, x):
        pt.rename(p, [("n", "m")]).update("m", jnp.ones(()))

    with pytest.raises(pt.ScopeError, match="`m` cannot be written: a verb has given .* other paths"):
        pt.decoding(renamed)(counting, x)
    with pytest.raises(pt.ScopeError, match="the model draws random numbers, but the model decodes"):
        pt.decoding(lambda p, x: p.key())(params, x)
    with pytest.raises(pt.ScopeError, match=r"inside a jax transform, .*jit\(pt.decoding\(layer\)\)"):
        pt.decoding(lambda p, x: jax.jit(net)(p, x))(params, x)
    with pytest.raises(TypeError, match="with a parameter tree first, but found int"):
        pt.decoding(net)(3, x)
