"""Attention to a memory whose keys and values are stored once, as in the decoder of a seq2seq model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn

B, T, S, CACHE = 2, 4, 3, 5


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def big(net, *inputs):
    rules = {".*(weight|bias)": pt.initializers.Normal(0.5)}
    return pt.init(net, jax.random.key(1), *inputs, rules=rules)


X, MEMORY, OTHER = normal(B, T, 8), normal(B, S, 6, seed=1), normal(B, S, 6, seed=2)
PADDING = jnp.arange(S)[None] < jnp.array([[S], [2]])
MASK = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]], bool)  # all see something
BIAS = normal(1, 2, T, S, seed=4)


def wide(term):
    """Returns a mask or bias for all places of the cache."""
    return np.pad(term, [(0, 0)] * (term.ndim - 1) + [(0, CACHE - S)])


OPTIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 1, "softcap": 2.0, "head_size": 6},
    "rotary": {"rotary": True, "qk_norm": True},
    "causal": {"causal": True, "window": 3},
}


@pytest.mark.parametrize(
    "name",
    ["grouped", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS if n != "grouped")],
)
def test_a_memory_given_once_is_the_memory_given_always(name):
    plain = nn.MultiHeadAttention(2, **OPTIONS[name])
    layer = dataclasses.replace(plain, cache=CACHE, dropout=0.5)
    params = big(layer, X, MEMORY)
    assert list(pt.collect(params, kind="state")) == [
        "cache_key", "cache_value", "cache_index", "cache_mask"
    ]  # fmt: skip
    assert params.cache_mask.shape == (B, CACHE) and int(params.cache_index) == -1
    weights = pt.select(params, kind="param")
    step = jax.jit(pt.decoding(layer))
    for padding in (None, PADDING):
        whole = plain(weights, X, MEMORY, MASK, padding, BIAS)
        first = {"mask": MASK[:2], "bias": BIAS[:, :, :2]}
        y, new = step(params, X[:, :2], MEMORY, padding_mask=padding, **first)
        ys = [y]
        for i in (2, 3):
            rest = {"mask": wide(MASK)[i : i + 1], "bias": wide(BIAS)[:, :, i : i + 1]}
            y, new = step(new, X[:, i : i + 1], **rest)
            ys.append(y)
        close(jnp.concatenate(ys, 1), whole)
        assert int(new.cache_index) == T
        np.testing.assert_array_equal(
            new.cache_mask[:, :S], np.ones((B, S)) if padding is None else padding
        )
        assert not new.cache_mask[:, S:].any() and not np.asarray(new.cache_key[:, S:]).any()
    # Another memory takes the place of the one before, padding and all.
    y, new = step(new, X[:, :1], OTHER[:, :2])
    close(y, plain(weights, X[:, :1], OTHER[:, :2]))
    y, new = step(new, X[:, 1:])
    close(y, plain(weights, X, OTHER[:, :2])[:, 1:])
    # Inference has no use for the cache, whatever the batch size.
    close(layer(new, X[:1], MEMORY[:1]), plain(weights, X[:1], MEMORY[:1]))
    # The memory may be given to no position at all.
    y, new = step(params, X[:, :0], MEMORY)
    assert y.shape == (B, 0, 8)
    close(step(new, X)[0], plain(weights, X, MEMORY))


class Decoder(nn.Layer):
    """A block of the decoder of a seq2seq model."""

    cache: int = 0
    memory: int = 0

    def __call__(self, p, x, memory=None, padding_mask=None):
        attend = nn.MultiHeadAttention(2, causal=True, rotary=True, cache=self.cache, dropout=0.5)
        x = x + attend(p.attend, nn.RMSNorm()(p.norm0, x))
        cross = nn.MultiHeadAttention(2, cache=self.memory)
        x = x + cross(p.cross, nn.RMSNorm()(p.norm1, x), memory, padding_mask=padding_mask)
        return x + nn.GatedMLP(8)(p.mlp, nn.RMSNorm()(p.norm2, x))


@pytest.fixture(scope="module")
def decoder():
    def made(*options):
        return nn.Sequential(blocks=nn.Repeat(Decoder(*options), 2), norm=nn.RMSNorm())

    net = made(T, CACHE)

    def call(p, x, memory):
        return net(p, x, memory=memory)

    return made(), net, big(call, X, MEMORY)


def test_a_decoder_writes_token_by_token_in_a_scan(decoder):
    plain, net, params = decoder
    assert params.blocks.cross.cache_key.shape == (2, B, CACHE, 2, 4)
    whole = plain(pt.select(params, kind="param"), X, memory=MEMORY, padding_mask=PADDING)
    given = {"memory": MEMORY, "padding_mask": PADDING}

    @jax.jit
    def decode(params, x):
        _, params = pt.decoding(net)(params, x[:, :1], **given)

        def step(params, token):
            y, params = pt.decoding(net)(params, token[:, None])
            return params, y[:, 0]

        return jax.lax.scan(step, params, x[:, 1:].swapaxes(0, 1))

    new, ys = decode(params, X)
    close(ys.swapaxes(0, 1), whole[:, 1:])
    assert new.blocks.cross.cache_index.tolist() == new.blocks.attend.cache_index.tolist() == [T, T]
    assert jax.tree.structure(new) == jax.tree.structure(params)

    def within(p, x):  # the loop is a part of the model
        first = net(p, x[:, :1], **given)

        def step(p, carry, token):
            return carry, net(p, token[:, None])[:, 0]

        _, ys = pt.scan(step, p, jnp.zeros(()), x[:, 1:].swapaxes(0, 1))
        return jnp.concatenate([first, ys.swapaxes(0, 1)], 1)

    close(pt.decoding(within)(params, X)[0], whole)


def test_the_memory_of_a_beam_follows_it(decoder):
    plain, net, params = decoder
    weights = pt.select(params, kind="param")
    _, params = pt.decoding(net)(params, X[:, :2], memory=MEMORY, padding_mask=PADDING)
    beams = jnp.array([1, 1])
    states = ".*cache_(key|value|mask)"  # the batch is after the axis of the copies
    params = pt.map_named(lambda name, leaf: jnp.take(leaf, beams, axis=1), params, states)
    y, _ = pt.decoding(net)(params, X[beams, 2:])
    given = {"memory": MEMORY[beams], "padding_mask": PADDING[beams]}
    close(y, plain(weights, X[beams], **given)[:, 2:])


def test_the_dtype_of_a_cached_memory():
    layer = nn.MultiHeadAttention(2, cache=CACHE, cache_dtype=jnp.bfloat16)
    params = big(layer, X, MEMORY)
    step = pt.decoding(layer)
    y, new = step(params, X[:, :1], MEMORY)
    again, new = step(new, X[:, :1])
    assert (y.dtype, new.cache_key.dtype) == (jnp.float32, jnp.bfloat16)
    close(again, y)  # both attend to what is stored
    exact = layer(params, X[:, :1], MEMORY)
    close(y, exact, 0.1)
    assert np.abs(y - exact).max() > 0
    half = pt.replace(
        params, {n: v.astype(jnp.bfloat16) for n, v in pt.collect(params, kind="param").items()}
    )
    small = [v.astype(jnp.bfloat16) for v in (X, MEMORY)]
    y, new = step(half, *small)
    y, _ = step(new, small[0])
    assert y.dtype == jnp.bfloat16
    layer = dataclasses.replace(layer, cache_dtype=None)
    params = pt.replace(half, {n: params[n].astype(jnp.float32) for n in ("cache_key", "cache_value")})
    with pytest.raises(pt.MismatchError, match="`cache_key` holds float32, but the keys are bfloat16"):
        pt.decoding(layer)(params, *small)
    with pytest.raises(pt.MismatchError, match="`cache_key` holds float32, but the keys are bfloat16"):
        pt.decoding(layer)(params, small[0])


def test_training_gives_the_gradient_of_the_memory():
    layer = nn.MultiHeadAttention(2, cache=CACHE)
    params = big(layer, X, MEMORY)
    plain = dataclasses.replace(layer, cache=0)

    def loss(memory, model):
        return jnp.sin(model(memory)).sum()

    def stored(memory):
        y, new = pt.training(layer)(params, X[:, :2], memory, padding_mask=PADDING)
        return jnp.concatenate([y, pt.training(layer)(new, X[:, 2:])[0]], 1)

    def direct(memory):
        return plain(params, X, memory, padding_mask=PADDING)

    close(jax.grad(loss)(MEMORY, stored), jax.grad(loss)(MEMORY, direct))


def test_a_model_may_be_initialised_as_it_is_called():
    layer = nn.MultiHeadAttention(2, cache=CACHE, rotary=True)

    def twice(p, x, memory):
        return jnp.concatenate([layer(p, x[:, :1], memory), layer(p, x[:, 1:])], 1)

    params = big(twice, X, MEMORY)
    assert jax.tree.structure(params) == jax.tree.structure(big(layer, X, MEMORY))
    for model in (pt.capture(twice), pt.intervene(twice, {".*": lambda name, h: h})):
        assert jax.tree.structure(pt.abstract(model, X, MEMORY)) == jax.tree.structure(params)
    y, _ = pt.decoding(twice)(params, X, MEMORY)
    close(y, layer(params, X, MEMORY))
    with jax.checking_leaks():
        jax.eval_shape(pt.decoding(twice), params, X, MEMORY)
    many = nn.Vmap(layer, 2)
    xs, memories = jnp.stack([X, 2 * X]), jnp.stack([MEMORY, OTHER])
    params = big(many, xs, memories)
    y, new = pt.decoding(many)(params, xs[:, :, :1], memories)
    assert new.cache_index.tolist() == [1, 1]
    y, _ = pt.decoding(many)(new, xs[:, :, 1:])
    close(y, many(params, xs, memories)[:, :, 1:])


def test_queries_of_a_piece_need_positions_where_nothing_counts_them():
    layer = nn.MultiHeadAttention(2, rotary=True)
    params = big(layer, X, MEMORY)
    steps = pt.decoding(layer)
    with pytest.raises(
        pt.ScopeError, match="counts from 0 in every call, .* give the layer positions="
    ):
        steps(params, X[:, 1:], MEMORY)
    y, _ = steps(params, X[:, 1:], MEMORY, positions=1 + jnp.arange(X.shape[1] - 1))
    close(y, layer(params, X, MEMORY)[:, 1:])


def test_a_memory_is_never_taken_for_another_thing():
    layer = nn.MultiHeadAttention(2, cache=CACHE)
    params, own = big(layer, X, MEMORY), big(layer, X)
    text = "holds a memory in its cache, which only calls under pt.decoding and pt.training read"
    with pytest.raises(pt.ScopeError, match=f"{text}: give it the memory"):
        layer(params, X)
    _, new = pt.decoding(layer)(params, X, MEMORY)
    with pytest.raises(pt.ScopeError, match=f"{text}: give it the memory"):
        layer(new, X)
    with pytest.raises(
        ValueError, match="with its padding: give the padding_mask in the call that gives"
    ):
        pt.decoding(layer)(new, X, padding_mask=PADDING)
    with pytest.raises(
        ValueError, match=r"needs a mask \(query, key\), here \(4, 5\) or .*found \(4, 3\)"
    ):
        pt.decoding(layer)(new, X, mask=MASK)
    with pytest.raises(
        ValueError, match=r"needs a mask \(query, key\), here \(4, 3\) or .*found \(4, 5\)"
    ):
        pt.decoding(layer)(new, X, MEMORY, mask=wide(MASK))
    with pytest.raises(ValueError, match="attends to 1 to 5 at a time, as its cache holds"):
        pt.decoding(layer)(params, X, jnp.concatenate([MEMORY, MEMORY], 1))
    with pytest.raises(
        pt.MismatchError, match=r"`cache_key` has shape \(2, 5, 2, 4\).*needs \(1, 5, 2, 4\)"
    ):
        pt.decoding(layer)(new, X[:1])
    # Before there is a memory.
    y, _ = pt.decoding(layer)(params, X)
    assert np.isnan(y).all()
    # A layer that was initialised without one.
    for call in (layer, pt.decoding(layer), pt.training(layer)):
        with pytest.raises(ValueError, match="caches its own sequence: call it without memory"):
            call(own, X, MEMORY)

    def both(p, x, memory):
        return layer(p, layer(p, x), memory)

    with pytest.raises(ValueError, match="caches its own sequence: call it without memory"):
        pt.init(both, jax.random.key(0), X, X)
    weights = pt.select(params, kind="param")
    close(layer(weights, X, MEMORY), layer(params, X, MEMORY))
    with pytest.raises(pt.ParamTreeError, match="`cache_key`"):
        pt.decoding(layer)(weights, X, MEMORY)
