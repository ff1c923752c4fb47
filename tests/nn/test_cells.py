"""Recurrent cells: equal to the layers over sequences and to PyTorch's; forms of the state; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from tests.nn.test_recurrent import all_near, filled, full_precision, near, normal

__all__ = ["full_precision"]  # an autouse fixture

# A cell, and the layer that runs it over a sequence.
KINDS = {
    "relu": (lambda: nn.RNNCell(3, "relu"), lambda: nn.RNN(3)),
    "tanh": (lambda: nn.RNNCell(3), lambda: nn.RNN(3, activation="tanh")),
    "function": (lambda: nn.RNNCell(3, jnp.sin), lambda: nn.RNN(3, activation=jnp.sin)),
    "lstm": (lambda: nn.LSTMCell(3), lambda: nn.LSTM(3)),
    "gru": (lambda: nn.GRUCell(3), lambda: nn.GRU(3)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def scanned(cell):
    """Returns a model that runs a cell over time with pt.scan."""

    def model(p, xs, state):
        state, ys = pt.scan(lambda p, state, x: cell(p, x, state)[::-1], p, state, xs)
        return ys, state

    return model


@kinds
def test_a_scan_equals_the_layer_over_sequences(kind, key):
    cell, layer = (make() for make in KINDS[kind])
    xs, state = normal(4, 2, 5), [normal(2, 3, seed=1 + i) for i in range(1 + (kind == "lstm"))]
    params = filled(cell, xs[0])
    assert list(params) == ["i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"]
    renamed = pt.rename(params, [("(.+)", r"l0_\1")])
    assert jax.tree.structure(renamed) == jax.tree.structure(pt.abstract(layer, xs))

    def loss(f):
        def total(params, xs, state):
            y, new = f(params, xs, state)
            leaves = [y, *jax.tree.leaves(new)]
            return sum((jnp.arange(v.size).reshape(v.shape) / 9 * v).sum() for v in leaves)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))

    y, new = jax.jit(scanned(cell))(params, xs, state)
    layers_y, layers_new = layer(renamed, xs, [part[None] for part in state])
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(y, layers_y, **tolerance)
    for one, other in zip(new, layers_new, strict=True):
        np.testing.assert_allclose(one, other[0], **tolerance)
    value, grads = loss(scanned(cell))(params, xs, state)
    layers_value, layers_grads = loss(layer)(renamed, xs, [part[None] for part in state])
    near(value, layers_value)
    all_near(jax.tree.leaves(grads[0]), jax.tree.leaves(layers_grads[0]))
    near(grads[1], layers_grads[1])
    all_near(grads[2], [part[0] for part in layers_grads[2]])
    assert same_start(cell, layer, xs, key)


def same_start(cell, layer, xs, key):
    """Whether the two initialise alike, but for the values."""
    one, other = cell.init(key, xs[0]), layer.init(key, xs)
    return [w.shape for w in jax.tree.leaves(one)] == [w.shape for w in jax.tree.leaves(other)]


@kinds
def test_values_and_gradients_are_those_of_pytorch(kind):
    torch = pytest.importorskip("torch")
    if kind == "function":
        pytest.skip("PyTorch has no cell of any function")
    cell = KINDS[kind][0]()
    x, state = normal(2, 5), tuple(normal(2, 3, seed=1 + i) for i in range(1 + (kind == "lstm")))
    params = filled(cell, x)
    y, new = cell(params, x, state)
    weights = [normal(2, 3, seed=5 + i) for i in range(len(new))]

    def total(params, x, state):
        _, new = cell(params, x, state)
        return sum((w * part).sum() for w, part in zip(weights, new, strict=True))

    grads = jax.grad(total, argnums=(0, 1, 2))(params, x, state)
    make = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}.get(kind, torch.nn.RNNCell)
    other = make(5, 3, **({"nonlinearity": kind} if make is torch.nn.RNNCell else {})).double()
    names = {"weight_ih": 0, "weight_hh": 1, "bias_ih": 2, "bias_hh": 3}
    for name, parameter in other.named_parameters():
        parameter.data = torch.tensor(np.asarray(params[list(params)[names[name]]], "float64"))
    torch_x, *torch_state = (torch.tensor(a.astype("float64"), requires_grad=True) for a in (x, *state))
    found = other(torch_x, tuple(torch_state) if kind == "lstm" else torch_state[0])
    found = found if kind == "lstm" else (found,)
    near(y, found[0].detach())
    all_near(list(new), [part.detach().numpy() for part in found])
    sum((torch.tensor(w) * part).sum() for w, part in zip(weights, found, strict=True)).backward()
    for name, parameter in other.named_parameters():
        near(grads[0][list(params)[names[name]]], parameter.grad)
    near(grads[1], torch_x.grad)
    all_near(list(grads[2]), [part.grad.numpy() for part in torch_state])


@kinds
def test_the_new_state_has_the_form_of_the_old(kind):
    cell = KINDS[kind][0]()
    x = normal(2, 5)
    params = filled(cell, x)
    y, state = cell(params, x)
    if kind == "lstm":
        assert isinstance(state, tuple)
        assert [part.shape for part in state] == [(2, 3)] * 2
    else:
        assert state is y
    zeros = cell.begin_state(2)
    assert isinstance(zeros, list)
    for form in (list, tuple):
        again, new = cell(params, x, form(zeros))
        assert type(new) is form
        all_near(list(new), jax.tree.leaves(state))
        near(again, y)
    assert jax.tree.structure(cell(params, x, state)[1]) == jax.tree.structure(state)


def test_initializers(key):
    cell = nn.LSTMCell(2, "ones", init.Constant(2.0), "lstmbias", "zeros", dtype="bfloat16")
    params = cell.init(key, jnp.ones((1, 3), "bfloat16"))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert (params.i2h_weight == 1).all()
    assert (params.h2h_weight == 2).all()
    np.testing.assert_array_equal(params.i2h_bias, [0, 0, 1, 1, 0, 0, 0, 0])
    assert cell.begin_state(2)[0].dtype == jnp.bfloat16
    assert cell.begin_state(2, "float32")[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.RNNCell(-1), "RNNCell: hidden_size must be a non-negative integer, but found -1"),
        (lambda: nn.LSTMCell(2.5), "LSTMCell: hidden_size must be .* found 2.5"),
        (lambda: nn.GRUCell(3, input_size=-2), "GRUCell: input_size must be .* found -2"),
        (lambda: nn.RNNCell(3, "rleu"), "no activation 'rleu'"),
        (lambda: nn.GRUCell(3, "tanh"), "tanh"),
    ],
    ids=["negative", "float", "input_size", "activation", "initializer"],
)
def test_invalid_settings(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_invalid_inputs(key):
    cell = nn.LSTMCell(3, input_size=5)
    x = jnp.ones((2, 5))
    params = cell.init(key, x)
    for wrong in (x[None], x[0]):
        with pytest.raises(ValueError, match=r"LSTMCell\(5 -> 3\) needs an input \(batch, channels\)"):
            cell(params, wrong)
    with pytest.raises(ValueError, match="expects inputs of size 5"):
        cell(params, x[:, :4])
    with pytest.raises(TypeError, match="needs floating-point numbers, but found int32"):
        cell(params, x.astype("int32"))
    h = jnp.zeros((2, 3))
    for state in (h, (h,), (h, h, h), (h, h[:1]), (h[None], h[None])):
        with pytest.raises(ValueError, match=r"needs a state \[h, c\] of shape \(2, 3\) \(batch, hidd"):
            cell(params, x, state)
    with pytest.raises(ValueError, match="needs a state an array h"):
        nn.GRUCell(3)(nn.GRUCell(3).init(key, x), x, (h, h))
    with pytest.raises(TypeError, match="computes in float32, but the state c is bfloat16"):
        cell(params, x, (h, h.astype("bfloat16")))


def test_repr():
    assert repr(nn.RNNCell(3)) == "RNNCell(None -> 3, Activation(tanh))"
    assert repr(nn.GRUCell(3, input_size=4)) == "GRUCell(4 -> 3)"


def test_in_a_vmap(key):
    cells = nn.Vmap(nn.GRUCell(3), 4, in_axes=None)
    x = normal(2, 5)
    params = cells.init(key, x)
    y, state = cells(params, x)
    assert y.shape == state.shape == (4, 2, 3)
    second = pt.from_tree(jax.tree.map(lambda w: w[1], params.to_dict()))
    near(y[1], nn.GRUCell(3)(second, x)[0])
