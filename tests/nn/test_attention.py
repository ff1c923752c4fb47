"""Attention against PyTorch's, its masks, grouped keys, rotary positions and cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn
from tests.helpers import quick_compilation

__all__ = ["quick_compilation"]

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
        out = layer(params, x, memory if cross else None, mask)
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


def test_masks_of_four_axes_and_nothing_but_masks():
    x = normal(2, 3, 4)
    layer = nn.MultiHeadAttention(2)
    params = big(layer, x)
    lower = jnp.tril(jnp.ones((3, 3), bool))[None, None]
    close(layer(params, x, None, lower), dataclasses.replace(layer, causal=True)(params, x))
    padding = jnp.array([[True, True, False]] * 2)
    close(layer(params, x, None, padding), layer(params, x, x[:, :2]))
    with pytest.raises(ValueError, match=r"needs a mask \(batch, memory length\), .*found \(3, 3\)"):
        layer(params, x, None, lower[0, 0])
    with pytest.raises(ValueError, match=r"a boolean mask \(True means attend\), but found float32"):
        layer(params, x, None, jnp.ones((2, 3)))


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
        (lambda: nn.MultiHeadAttention(2, cache=4).init(key, x, x), "call it without memory"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    assert (
        repr(nn.MultiHeadAttention(4, 8, 2, causal=True, cache=3))
        == "MultiHeadAttention(8, heads=4, kv_heads=2, causal, cache=3)"
    )
    assert nn.MultiHeadAttention(2) == nn.MultiHeadAttention(2, bias_initializer=pt.initializers.Zero())
