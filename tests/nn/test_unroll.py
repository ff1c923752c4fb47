"""Repeat with ``unroll``: the same values, gradients, state and parameters as without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn

N = 5
X = jnp.linspace(-1, 1, 6, dtype=jnp.float32).reshape(2, 3)
BLOCK = nn.Sequential(nn.Dense(3, "tanh"), nn.Dropout(0.5), nn.BatchNorm(momentum=0.5))


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def trained(net, params, key):
    """Returns the loss and new parameters of a call in training, and the gradient."""

    def loss(params):
        y, params = jax.checkpoint(pt.training(net))(params, X, key=key)
        return (y**2).sum(), params

    return pt.value_and_grad(loss, has_aux=True)(params)


# Two iterations and one copy left over, one and two left over, and none at all.
@pytest.mark.parametrize(("unroll", "remat"), [(2, False), (3, True), (True, True)])
def test_values_gradients_state_and_dropout_are_those_of_a_plain_repeat(unroll, remat, key):
    plain, net = nn.Repeat(BLOCK, N), nn.Repeat(BLOCK, N, unroll=unroll, remat=remat)
    params = net.init(key, X)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(plain.init(key, X)), strict=True):
        np.testing.assert_array_equal(a, b)
    close(net(params, X), plain(params, X))
    close(net(pt.unstack(params, ""), X), plain(params, X))
    ((_, new), grads), expected = trained(net, params, key), trained(plain, params, key)
    close((new, grads), (expected[0][1], expected[1]))
    assert len(np.unique(new.batchnorm0.running_mean, axis=0)) == N


def test_options_by_copy_and_captured_values(key):
    block = nn.Residual(nn.Dense(3), nn.DropPath(0.0))
    plain = nn.Repeat(block, 3, by_copy={"rate": (0.0, 0.2, 0.4)})
    net = nn.Repeat(block, 3, by_copy={"rate": (0.0, 0.2, 0.4)}, unroll=2)
    params = net.init(key, X)
    close(pt.capture(net, "dense0")(params, X), pt.capture(plain, "dense0")(params, X))
    close(*(pt.training(one)(params, X, key=key) for one in (net, plain)))


def test_a_block_is_traced_once_whatever_the_unroll(key):
    traces = []

    class Block(nn.Layer):
        def __call__(self, p, x):
            traces.append(x)
            return nn.Dense(3)(p.dense, x)

    for unroll in (1, 2, True):
        net = nn.Repeat(Block(), 4, unroll=unroll)
        params = net.init(key, X)
        traces.clear()
        jax.jit(net).lower(params, X)
        assert len(traces) == 1


@pytest.mark.parametrize(("unroll", "kept"), [(1, False), (2, True), (True, True)])
def test_where_copies_leave_the_loop_the_compiler_may_not_merge_the_recomputation(unroll, kept, key):
    net = nn.Repeat(nn.Dense(3, "tanh"), 4, remat=True, unroll=unroll)
    grad = jax.jit(jax.grad(lambda p: net(p, X).sum()))
    assert ("optimization_barrier" in grad.lower(net.init(key, X)).as_text()) is kept


def test_all_copies_are_equal_however_they_are_asked_for():
    assert nn.Repeat(BLOCK, 4, unroll=True) == nn.Repeat(BLOCK, 4, unroll=4) != nn.Repeat(BLOCK, 4)
    assert nn.Repeat(BLOCK, 4, unroll=9).unroll == 4  # True equals 1, so the field is a number
    assert nn.Repeat(BLOCK, 4, unroll=False) == nn.Repeat(BLOCK, 4)


@pytest.mark.parametrize("unroll", [0, -1, 2.0, "all", None])
def test_what_is_no_number_of_copies_is_an_error(unroll):
    with pytest.raises(ValueError, match="unroll must be a positive integer, or True for all copies"):
        nn.Repeat(BLOCK, 4, unroll=unroll)
