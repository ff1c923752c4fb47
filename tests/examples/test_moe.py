"""The mixture of experts: routing against a loop over tokens, capacity, the loss, and its figures."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import moe as example
from paramtree import nn
from tests.helpers import lenient

pytestmark = pytest.mark.slow

EXPERT = nn.GatedMLP(6)
LAYER = example.MoE(EXPERT, n=4, k=2)
X = np.random.default_rng(0).normal(size=(2, 8, 5)).astype(np.float32)
TOKENS = X.reshape(16, 5)


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    return jax.tree.map(lambda leaf: 20 * leaf, pt.init(LAYER, jax.random.key(0), X))


def routed(params: pt.ParamTree) -> tuple[Any, Any]:
    """Returns the probabilities, (tokens, experts), and each token's experts, the likeliest first."""
    probs = np.asarray(jax.nn.softmax(TOKENS @ params.router.weight.T))
    return probs, np.argsort(-probs, axis=-1)[:, :2]


def mixed(params: pt.ParamTree, capacity: int) -> Any:
    """Returns the layer's output, token by token, where each expert has so many places."""
    probs, chosen = routed(params)
    full = np.zeros(4, int)
    y = np.zeros_like(TOKENS)
    for choice in range(2):  # all first choices come before all second ones
        for i, token in enumerate(TOKENS):
            expert = chosen[i, choice]
            full[expert] += 1
            if full[expert] <= capacity:
                own = jax.tree.map(lambda leaf, e=expert: leaf[e], params.experts.to_dict())
                output = EXPERT(pt.from_tree(own), jnp.asarray(token))
                y[i] += probs[i, expert] / probs[i, chosen[i]].sum() * np.asarray(output)
    return y.reshape(X.shape)


@pytest.mark.figures
def test_it_reaches_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    loss = float(re.search(r"falls below ([\d.]+) nats", example.__doc__).group(1))
    low, high = map(int, re.search(r"from (\d+) to (\d+) % of", example.__doc__).groups())
    result = example.main([])
    assert result.loss < loss
    assert result.shares.shape == (2, 8)
    np.testing.assert_allclose(result.shares.sum(1), 1, rtol=1e-5)
    assert low / 100 < result.shares.min() <= result.shares.max() < high / 100
    assert re.search(r"layer 1: experts get \d+\.\d%", capsys.readouterr().out)


def test_for_inference_each_token_gets_its_two_experts(params: pt.ParamTree) -> None:
    np.testing.assert_allclose(LAYER(params, X), mixed(params, 99), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capacity", [0.25, 0.5, 1.0])
def test_in_training_an_expert_has_so_many_places(params: pt.ParamTree, capacity: float) -> None:
    layer = example.MoE(EXPERT, n=4, k=2, capacity=capacity)
    y, _ = pt.training(layer)(params, X)
    expected = mixed(params, int(8 * capacity))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(y, LAYER(params, X))
    (row,) = mixed(params, 0)[:1]
    assert not row.any()


def test_what_it_sows(params: pt.ParamTree) -> None:
    probs, chosen = routed(params)
    _, sown = pt.capture(LAYER)(params, X)
    share = np.bincount(chosen.ravel(), minlength=4) / 32
    np.testing.assert_allclose(sown.share, share, rtol=1e-5)
    np.testing.assert_allclose(sown.balance, 4 * (share * probs.mean(0)).sum(), rtol=1e-5)
    equal = pt.replace(params, {"router_weight": jnp.zeros((4, 5))})
    np.testing.assert_allclose(pt.capture(LAYER)(equal, X)[1].balance, 1, rtol=1e-5)


def test_the_balance_loss_is_that_of_every_layer_and_evens_the_shares() -> None:
    net = example.network(16, 3, example.MoE(EXPERT, n=4, k=2))
    tokens = np.random.default_rng(1).integers(0, 96, (4, 17), np.int32)
    params = pt.init(net, jax.random.key(0), example.ONE)
    plain, one, two = (example.loss_fn(params, net, tokens, b) for b in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(two - one, one - plain, rtol=1e-4)
    _, sown = pt.capture(net, ".*feed_forward")(params, tokens[:, :-1])
    balance = pt.collect(sown, ".*balance")["blocks_mlp_feed_forward_balance"]
    assert balance.shape == (3,)
    np.testing.assert_allclose(one - plain, balance.mean(), rtol=1e-4)

    def spread(params: Any) -> float:
        return float(example.evaluate(net, params, tokens)[1].std())

    before = spread(params)
    tx = example.make_tx(1e-2, 30)
    state = tx.init(params)
    step = jax.jit(jax.grad(lambda p: example.loss_fn(p, net, tokens, 100.0)))
    for _ in range(30):
        updates, state = tx.update(step(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert spread(params) < before / 2


def test_every_expert_and_the_router_learn(params: pt.ParamTree) -> None:
    grads = jax.grad(lambda p: (pt.training(LAYER)(p, X)[0] ** 2).sum())(params)
    for name, leaf in pt.collect(grads).items():
        assert np.all(np.any(leaf, axis=tuple(range(1, leaf.ndim)))), name


def test_no_token_sees_those_after_it() -> None:
    net = example.network(16, 2, example.MoE(EXPERT, n=4, k=2))
    tokens = np.random.default_rng(1).integers(0, 96, (2, 12), np.int32)
    params = pt.init(net, jax.random.key(0), example.ONE)
    other = tokens.copy()
    other[:, 6:] = 0
    np.testing.assert_allclose(net(params, tokens)[:, :6], net(params, other)[:, :6], atol=1e-5)


def test_a_dense_run(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--steps", "2", "--batch-size", "2", "--context", "8", "--width", "16", "--hidden", "8"]
    assert example.main([*args, "--dense"]).shares is None
    dense = re.match(r"([\d,]+) parameters, of which a token uses \1\n", capsys.readouterr().out)
    example.main(args)
    total, active = re.match(r"([\d,]+) .* uses ([\d,]+)\n", capsys.readouterr().out).groups()
    router = 2 * 8 * 16
    assert int(active.replace(",", "")) - int(dense.group(1).replace(",", "")) == router
    assert int(total.replace(",", "")) - int(active.replace(",", "")) == 2 * 6 * 3 * 8 * 16
