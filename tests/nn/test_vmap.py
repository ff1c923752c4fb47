"""Copies side by side: ``nn.Vmap`` equals a loop over layers that are initialised alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 8))
BLOCK = nn.Sequential(nn.Dense(5, activation="relu"), nn.Dense(3), nn.BatchNorm(), nn.Dropout(0.5))


def test_each_copy_equals_a_layer_initialised_alone_under_its_name() -> None:
    def stacked(p: Any, x: Any) -> Any:
        return nn.Vmap(BLOCK, 4, in_axes=None)(p.experts, x)

    def named(p: Any, x: Any) -> Any:
        return jnp.stack([BLOCK(p[f"experts/{i}"], x) for i in range(4)])

    rules = {".*weight": init.Xavier(), ".*bias": init.Normal(0.1)}
    params = pt.init(stacked, KEY, X, rules=rules)
    expected = pt.init(named, KEY, X, rules=rules)
    pt.testing.assert_trees_close(pt.unstack(params, "experts"), expected)
    np.testing.assert_allclose(stacked(params, X), named(expected, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        stacked(expected, X), named(expected, X), rtol=1e-5, atol=1e-6
    )  # unstacked
    restacked = pt.stack(pt.unstack(params, "experts"), "experts")
    assert jax.tree.structure(restacked) == jax.tree.structure(params)
    pt.testing.assert_trees_close(
        pt.reinit(params, jax.random.key(7), rules), pt.init(stacked, jax.random.key(7), X, rules=rules)
    )


@pytest.mark.parametrize(
    ("in_axes", "out_axes", "shape"),
    [
        (None, 0, (6, 8)),
        (0, 1, (4, 6, 8)),
        (1, -1, (6, 4, 8)),
        ((0,), 0, (4, 6, 8)),
        ([1], 0, (6, 4, 8)),
    ],
)
def test_axes(in_axes: Any, out_axes: Any, shape: Any) -> None:
    net = nn.Vmap(nn.Dense(3), 4, in_axes, out_axes)
    x = jax.random.normal(KEY, shape)
    params = net.init(KEY, x)
    axis = in_axes[0] if isinstance(in_axes, tuple | list) else in_axes
    rows = [x if axis is None else jnp.take(x, i, axis) for i in range(4)]
    copies = [pt.from_tree({"weight": params.weight[i], "bias": params.bias[i]}) for i in range(4)]
    outputs = [nn.Dense(3)(p, row) for p, row in zip(copies, rows, strict=True)]
    want = jnp.stack(outputs, out_axes)
    np.testing.assert_allclose(net(params, x), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(net)(params, x), want, rtol=1e-5, atol=1e-6)
    unstacked = pt.from_tree({str(i): copy for i, copy in enumerate(copies)})
    np.testing.assert_allclose(net(unstacked, x), want, rtol=1e-5, atol=1e-6)


def test_training_gives_each_copy_its_own_state_and_keys() -> None:
    net = nn.Vmap(nn.Sequential(nn.BatchNorm(), nn.Dropout(0.5)), 3)
    x = jax.random.normal(KEY, (3, 50, 8)) + jnp.arange(3.0)[:, None, None]
    params = net.init(KEY, x)
    y, new = pt.training(net)(params, x, key=KEY)
    masks = np.asarray(y == 0)
    assert masks.any(axis=(1, 2)).all()
    assert (masks[0] != masks[1]).any()
    means = np.asarray(new.batchnorm0.running_mean).mean(axis=1)
    np.testing.assert_allclose(means, 0.1 * np.arange(3), atol=0.05)
    again, _ = pt.training(net)(params, x, key=KEY)
    np.testing.assert_array_equal(y, again)


def test_a_mixture_of_experts() -> None:
    class Experts(nn.Layer):
        n: int
        units: int

        def __call__(self, p: Any, x: Any) -> Any:
            gate = jax.nn.softmax(nn.Dense(self.n)(p.gate, x))
            block = nn.Sequential(nn.Dense(16, activation="relu"), nn.Dense(self.units))
            return jnp.einsum("bn,nbu->bu", gate, nn.Vmap(block, self.n, in_axes=None)(p.experts, x))

    net = Experts(4, 3)
    x = jax.random.normal(KEY, (64, 8))
    target = jnp.sin(x[:, :3] * 2)
    params = net.init(KEY, x, rules={".*weight": init.Xavier()})

    def loss(params: Any) -> Any:
        return jnp.mean((net(params, x) - target) ** 2)

    tx = optax.sgd(0.3, momentum=0.9)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    first = loss(params)
    for _ in range(100):
        params, state, value = step(params, state)
    assert value < 0.5 * first

    gate = jax.nn.softmax(nn.Dense(4)(params.gate, x))
    experts = pt.unstack(params, "experts").experts
    block = nn.Sequential(nn.Dense(16, activation="relu"), nn.Dense(3))
    by_loop = jnp.stack([gate[:, i : i + 1] * block(experts[str(i)], x) for i in range(4)]).sum(0)
    np.testing.assert_allclose(net(params, x), by_loop, rtol=1e-4, atol=1e-5)


def test_in_repeat_and_repeat_in_it() -> None:
    inner = nn.Sequential(nn.Dense(8), nn.Dropout(0.5), nn.BatchNorm())
    average = nn.Sequential(nn.Vmap(inner, 3, in_axes=None), lambda y: y.mean(0))
    for net, shape in (
        (nn.Repeat(average, 2), (2, 3, 8, 8)),
        (nn.Vmap(nn.Repeat(inner, 2), 3, in_axes=None), (3, 2, 8, 8)),
    ):
        params = net.init(KEY, X)
        assert jax.tree.leaves(params)[0].shape == shape
        y, new = pt.training(net)(params, X, key=KEY)
        assert jax.tree.structure(new) == jax.tree.structure(params)
        assert np.isfinite(y).all()
        for leaf in jax.tree.leaves(pt.select(new, ".*running_mean")):
            assert len({float(v) for v in np.asarray(leaf).reshape(6, 8)[:, 0]}) == 6


def test_repeat_with_an_input_for_each_copy() -> None:
    def block(p: Any, x: Any, rate: Any, shared: Any) -> Any:
        return x + rate * nn.Dense(8)(p.dense, x) - shared

    net = nn.Repeat(block, 3, in_axes=(0, None))
    rates = jnp.array([0.0, 0.5, 1.0])
    params = net.init(KEY, X, rates, 2.0)
    want = X
    for i in range(3):
        leaves = pt.from_tree({"weight": params.dense.weight[i], "bias": params.dense.bias[i]})
        want = want + rates[i] * nn.Dense(8)(leaves, want) - 2.0
    np.testing.assert_allclose(net(params, X, rates, 2.0), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(pt.MismatchError, match="argument 0 has .* 3 copies"):
        net(params, X, rates[:2], 2.0)
    with pytest.raises(pt.MismatchError, match="2 axes for 1 arguments"):
        net(params, X, rates)


def test_repeat_of_a_block_whose_children_are_called_by_numbers() -> None:
    def block(p: Any, x: Any) -> Any:
        return nn.Dense(8)(p["1"], nn.Dense(8)(p["0"], x))

    net = nn.Repeat(block, 2)
    params = net.init(KEY, X)
    assert net(params, X).shape == X.shape
    y, _ = pt.training(net)(params, X)
    np.testing.assert_allclose(y, net(params, X), rtol=1e-6)


def test_a_mapped_scope_at_init_says_what_to_use() -> None:
    layer = nn.Dense(3)
    xs = jax.random.normal(KEY, (4, 6, 8))
    for in_axes, x in (((0, 0), xs), ((0, None), xs[0])):
        with pytest.raises(pt.ScopeError, match=r"nn\.Vmap\(layer, n\)"):
            pt.init(lambda p, x, a=in_axes: jax.vmap(layer, in_axes=a)(p.experts, x), KEY, x)
    with pytest.raises(pt.ScopeError, match=r"nn\.Vmap\(layer, n\)"):
        pt.init(lambda p, x: jax.vmap(layer)(p.experts, x), KEY, xs)
    shared = pt.init(lambda p, x: jax.vmap(layer, in_axes=(None, 0))(p.shared, x), KEY, xs)
    assert shared.shared.weight.shape == (3, 8)
    closed = pt.init(lambda p, x: jax.vmap(lambda x: layer(p.shared, x))(x), KEY, xs)
    assert jax.tree.structure(closed) == jax.tree.structure(shared)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Vmap: n must be a positive integer, but found 0"):
        nn.Vmap(nn.Dense(3), 0)
    with pytest.raises(TypeError, match="the block of a Vmap is"):
        nn.Vmap([nn.Dense(3)], 2)  # type: ignore[arg-type]
    params = nn.Vmap(nn.Dense(3), 4, in_axes=None).init(KEY, X)
    with pytest.raises(
        pt.MismatchError, match=r"`weight` has shape \(4, 3, 8\).*expected a leading axis"
    ):
        nn.Vmap(nn.Dense(3), 5, in_axes=None)(params, X)
