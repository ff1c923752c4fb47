"""Recurrent layers: compared with PyTorch and MXNet files; then padding, states, errors."""

import functools
import inspect
import json
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

GOLD = Path(__file__).parents[1] / "data" / "gluon" / "lstm"
KINDS = {
    "relu": functools.partial(nn.RNN, activation="relu"),
    "tanh": functools.partial(nn.RNN, activation="tanh"),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype("float32")


def filled(layer, *inputs, seed=0):
    """Returns parameters with more effect on the output than initial ones."""
    rng = np.random.default_rng(seed)
    tree = pt.abstract(layer, *inputs)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), tree)


def near(found, expected):
    """Checks that arrays differ by at most 1e-5 of their scale."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    if expected.size:
        assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def all_near(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(near, found, expected)


def zeros(layer, batch, kind):
    """Returns a state in the form that ``layer(p, x, state)`` returns: a list for an LSTM only."""
    begin = layer.begin_state(batch)
    return begin if kind == "lstm" else begin[0]


# PyTorch


def torch_layer(kind, size, params, **settings):
    """Returns PyTorch's layer in double precision, with our parameters."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    if kind in ("relu", "tanh"):
        settings["nonlinearity"] = kind
    make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(kind, torch.nn.RNN)
    layer = make(size, **settings).double()
    for name, parameter in layer.named_parameters():
        parameter.data = torch.tensor(np.asarray(params[our_name(name)], "float64"))
    return layer


def our_name(name):
    """Returns our name for a PyTorch name such as weight_ih_l0 or bias_hh_l1_reverse."""
    what, which, level, *reverse = name.split("_")
    side = "r" if reverse else "l"
    return f"{side}{level[1:]}_{which[0]}2h_{what}"


@st.composite
def cases(draw):
    time, batch, size = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return {
        "shape": (time, batch, size),
        "hidden": draw(st.integers(1, 4)),
        "layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "state": draw(st.booleans()),
        "lengths": draw(
            st.none() | st.lists(st.integers(1, time), min_size=batch, max_size=batch)
        ),
    }  # fmt: skip


@kinds
@settings(max_examples=4)
@given(case=cases())
def test_values_and_gradients_are_those_of_pytorch(kind, case):
    torch = pytest.importorskip("torch")
    rnn = torch.nn.utils.rnn
    (time, batch, size), hidden, layers = case["shape"], case["hidden"], case["layers"]
    first, lengths = case["batch_first"], case["lengths"]
    layer = KINDS[kind](
        hidden,
        num_layers=layers,
        layout="NTC" if first else "TNC",
        bidirectional=case["bidirectional"],
    )
    x = normal(*((batch, time) if first else (time, batch)), size)
    params = filled(layer, x)
    rows = layers * (1 + case["bidirectional"])
    state = [normal(rows, batch, hidden, seed=i + 1) for i in range(2 if kind == "lstm" else 1)]
    given_state = state if case["state"] else [np.zeros_like(part) for part in state]
    # The loss gives each output a different weight.
    weights = [normal(*x.shape[:2], (1 + case["bidirectional"]) * hidden, seed=7)]
    weights += [normal(rows, batch, hidden, seed=8 + i) for i in range(len(state))]

    def objective(params, x, state):
        y, new = layer(params, x, state, lengths=lengths)
        if not case["state"]:
            y = layer(params, x, lengths=lengths)  # starts from zeros
        total = sum((w * v).sum() for w, v in zip(weights, (y, *new), strict=True))
        return total, (y, new)

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    (_, outputs), grads = run(params, x, given_state)

    net = torch_layer(
        kind,
        size,
        params,
        hidden_size=hidden,
        num_layers=layers,
        batch_first=first,
        bidirectional=case["bidirectional"],
    )
    torch_x, *torch_state = (
        torch.tensor(a.astype("float64"), requires_grad=True) for a in (x, *given_state)
    )
    fed = torch_x
    if lengths is not None:
        fed = rnn.pack_padded_sequence(fed, lengths, batch_first=first, enforce_sorted=False)
    y, new = net(fed, tuple(torch_state) if kind == "lstm" else torch_state[0])
    if lengths is not None:
        y, _ = rnn.pad_packed_sequence(y, batch_first=first, total_length=time)
    new = list(new) if kind == "lstm" else [new]
    sum((torch.tensor(w) * v).sum() for w, v in zip(weights, (y, *new), strict=True)).backward()

    near(outputs[0], y.detach())
    all_near(outputs[1], [part.detach().numpy() for part in new])
    near(grads[1], torch_x.grad)
    if case["state"]:
        all_near(grads[2], [part.grad.numpy() for part in torch_state])
    names = {our_name(name): p.grad for name, p in net.named_parameters()}
    assert set(names) == set(params)
    for name, grad in names.items():
        near(grads[0][name], grad)


# MXNet


def test_the_gold_of_mxnet():
    with np.load(f"{GOLD}.npz") as stored:
        gold = dict(stored)
    layer = nn.LSTM(8, num_layers=2)
    x = gold["x"]
    params = pt.load(f"{GOLD}.params", like=pt.abstract(layer, x))
    near(layer(params, x), gold["y"])
    y, (h, c) = layer(params, x, [gold["h0"], gold["c0"]])
    for found, name in ((y, "y_from_state"), (h, "hN"), (c, "cN")):
        near(found, gold[name])
    grads = jax.jit(jax.grad(lambda p: layer(p, x).sum()))(params)
    names = [name for name in gold if name.startswith("grad_sum:")]
    assert len(names) == len(params) == 8
    for name in names:
        *_, number, what = name.split(".")
        near(grads[f"l{number}_{what}"], gold[name])


def test_names_and_repr_are_those_of_mxnet():
    about = json.loads(GOLD.with_suffix(".json").read_text())
    layer = nn.LSTM(8, num_layers=2, input_size=4)
    assert repr(layer) == about["repr"]
    params = pt.abstract(layer, jnp.ones((5, 3, 4)))
    gluon = about["structural_to_gluon"].values()
    assert [f"lstm0_{name}" for name in params] == list(gluon)
    shapes = {name: tuple(entry["shape"]) for name, entry in about["net"]["params"].items()}
    assert {name: leaf.shape for name, leaf in params.items()} == shapes


def test_repr_is_in_the_form_of_gluon():
    assert repr(nn.RNN(8)) == "RNN(None -> 8, TNC)"
    assert repr(nn.GRU(3, 2, "NTC", dropout=0.5)) == "GRU(None -> 3, NTC, num_layers=2, dropout=0.5)"
    assert repr(nn.LSTM(3, bidirectional=True)) == "LSTM(None -> 3, TNC, bidirectional)"


def test_directions_and_layers_come_in_the_order_of_gluon():
    params = pt.abstract(nn.GRU(3, 2, bidirectional=True), jnp.ones((5, 3, 4)))
    words = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")
    assert list(params) == [f"{level}_{w}" for level in ("l0", "r0", "l1", "r1") for w in words]
    assert params.r0_i2h_weight.shape == (9, 4)
    assert params.l1_i2h_weight.shape == params.r1_i2h_weight.shape == (9, 6)
    assert params.r1_h2h_weight.shape == (9, 3)


@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (
            nn.RNN,
            "hidden_size num_layers activation layout dropout bidirectional i2h_weight_initializer "
            "h2h_weight_initializer i2h_bias_initializer h2h_bias_initializer input_size dtype",
        ),
        *(
            (
                layer,
                "hidden_size num_layers layout dropout bidirectional input_size i2h_weight_initializer "
                "h2h_weight_initializer i2h_bias_initializer h2h_bias_initializer dtype",
            )
            for layer in (nn.LSTM, nn.GRU)
        ),
    ],
    ids=["RNN", "LSTM", "GRU"],
)
def test_arguments_are_in_the_order_of_gluon(layer, arguments):
    assert list(inspect.signature(layer).parameters) == arguments.split()


def test_each_parameter_has_its_initializer(key):
    layer = nn.LSTM(2, 2, i2h_weight_initializer="ones", i2h_bias_initializer=init.LSTMBias())
    params = layer.init(key, jnp.ones((1, 1, 2)))
    for i in range(2):
        assert (params[f"l{i}_i2h_weight"] == 1).all()
        np.testing.assert_array_equal(params[f"l{i}_i2h_bias"], [0, 0, 1, 1, 0, 0, 0, 0])
        assert not params[f"l{i}_h2h_bias"].any()
        assert 0 < np.abs(params[f"l{i}_h2h_weight"]).max() <= 0.07


# Sequences of unequal lengths


@pytest.mark.parametrize("kind", ["relu", "lstm", "gru"])
def test_what_the_padding_holds_makes_no_difference(kind):
    layer = KINDS[kind](3, bidirectional=True)
    x = normal(4, 3, 2)
    params = filled(layer, x)
    lengths = np.array([4, 2, 1])
    beyond = np.arange(4)[:, None] >= lengths
    broken = np.where(beyond[:, :, None], np.float32("nan"), x)

    @jax.jit
    def run(params, x, lengths):
        def total(params, x):
            y, state = layer(params, x, zeros(layer, 3, kind), lengths=lengths)
            return y.sum() + sum(leaf.sum() for leaf in jax.tree.leaves(state)), (y, state)

        return jax.grad(total, (0, 1), has_aux=True)(params, x)

    found, expected = run(params, broken, lengths), run(params, x, lengths)
    all_near(found, expected)
    (_, slope), (y, _) = found
    assert not np.asarray(y)[beyond].any()
    assert not np.asarray(slope)[beyond].any()
    assert np.asarray(y)[~beyond].any(-1).all()


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_a_padded_sequence_is_what_it_is_alone(kind):
    layer = KINDS[kind](3, bidirectional=True, layout="NTC")
    x = normal(3, 5, 2)
    params = filled(layer, x)
    run = jax.jit(layer)
    y, state = run(params, x, zeros(layer, 3, kind), lengths=jnp.array([5, 2, 3]))
    for i, length in enumerate((5, 2, 3)):
        alone, end = run(params, x[i : i + 1, :length], zeros(layer, 1, kind))
        near(y[i : i + 1, :length], alone)
        all_near(jax.tree.map(lambda part, i=i: part[:, i : i + 1], state), end)


def test_a_length_of_0_keeps_the_state_and_one_that_is_too_large_is_all(key):
    layer = nn.GRU(3, bidirectional=True)
    x = normal(4, 2, 5)
    params = filled(layer, x)
    h = normal(2, 2, 3)
    y, new = layer(params, x, h, lengths=jnp.array([0, 9], jnp.int8))
    assert not y[:, 0].any()
    near(new[:, 0], h[:, 0])
    whole, end = layer(params, x, h)
    near(y[:, 1], whole[:, 1])
    near(new[:, 1], end[:, 1])


def test_lengths_may_be_mapped_over(key):
    layer = nn.LSTM(3)
    x = normal(2, 4, 3, 5)
    params = filled(layer, x[0])
    lengths = jnp.array([[1, 2, 3], [4, 4, 0]])
    y = jax.vmap(lambda x, n: layer(params, x, lengths=n))(x, lengths)
    for i in range(2):
        near(y[i], layer(params, x[i], lengths=lengths[i]))


# States


Pair = namedtuple("Pair", "h c")


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("gru", lambda h: h),
        ("gru", lambda h: [h]),
        ("tanh", lambda h: (h,)),
        ("lstm", lambda h: [h, h]),
        ("lstm", lambda h: (h, h)),
        ("lstm", lambda h: Pair(h, h)),
    ],
    ids=["array", "list of one", "tuple of one", "list", "tuple", "named tuple"],
)
def test_a_state_comes_back_in_the_form_that_it_was_given_in(kind, form):
    layer = KINDS[kind](3, 2)
    x, state = normal(4, 2, 5), form(normal(2, 2, 3))
    params = filled(layer, x)
    y, new = layer(params, x, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    # Two halves give the same outputs as the full sequence, also as steps of a scan.
    half, middle = layer(params, x[:2], state)
    rest, end = layer(params, x[2:], middle)
    near(np.concatenate([half, rest]), y)
    all_near(end, new)
    state = jax.tree.map(jnp.asarray, state)
    end, parts = jax.lax.scan(lambda s, x: layer(params, x, s)[::-1], state, x.reshape(2, 2, 2, 5))
    near(parts.reshape(y.shape), y)
    all_near(end, new)


def test_the_state_to_begin_with_is_zeros():
    for layer, count in ((nn.LSTM(3, 2, bidirectional=True, dtype="bfloat16"), 2), (nn.GRU(3, 4), 1)):
        state = layer.begin_state(5)
        assert isinstance(state, list)
        assert [(part.shape, part.dtype) for part in state] == [((4, 5, 3), layer.dtype)] * count
        assert not any(part.any() for part in state)
    assert nn.RNN(3).begin_state(5, "float16")[0].dtype == jnp.float16


def test_the_last_output_is_the_last_state():
    layer = nn.GRU(3, 2, bidirectional=True)
    x = normal(4, 2, 5)
    y, h = layer(filled(layer, x), x, jnp.zeros((4, 2, 3)))
    near(h[2], y[-1, :, :3])
    near(h[3], y[0, :, 3:])


@pytest.mark.parametrize("kind", ["tanh", "lstm"])
def test_sequences_without_steps_and_batches_without_sequences(kind):
    layer = KINDS[kind](3, bidirectional=True)
    params = filled(layer, jnp.ones((1, 1, 5)))
    for shape in ((0, 2, 5), (4, 0, 5)):
        x = jnp.ones(shape)
        state = jax.tree.map(jnp.ones_like, zeros(layer, shape[1], kind))
        for lengths in (None, jnp.zeros(shape[1], "int32")):
            y, new = jax.jit(layer)(params, x, state, lengths=lengths)
            assert y.shape == (*shape[:2], 6)
            all_near(new, state)  # unchanged
    grads = jax.grad(lambda p: layer(p, jnp.ones((0, 2, 5))).sum())(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))
    assert jax.tree.structure(pt.abstract(layer, jnp.ones((0, 2, 5)))) == jax.tree.structure(params)


# Dropout, dtypes, compilation


def test_dropout_is_between_the_layers_in_training(key):
    layer = nn.RNN(40, 2, "identity", dropout=0.5)
    x = np.ones((4, 3, 2), "float32")
    params = layer.init(key, x, rules={".*_bias": init.Zero(), ".*h2h.*": init.Zero()})
    # Without recurrence and with an identity as the second layer, the output shows the mask.
    params = pt.replace(params, {"l1_i2h_weight": jnp.eye(40)})
    plain = np.asarray(nn.RNN(40, 2, "identity")(params, x))
    near(layer(params, x), plain)
    run = jax.jit(pt.training(layer))
    y, after = run(params, x, key=key)
    shares = np.asarray(y) / plain
    assert set(np.unique(shares.round(3))) == {0, 2}
    assert 0.4 < (shares > 1).mean() < 0.6
    assert len({share.tobytes() for share in shares}) == 4  # each step has its own mask
    near(run(params, x, key=key)[0], y)
    assert not np.array_equal(run(params, x, key=jax.random.key(5))[0], y)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    # No dropout follows the last layer.
    with pytest.raises(pt.ScopeError, match="draws random numbers, but no key was given"):
        pt.training(layer)(params, x)
    single = nn.RNN(40, 1, "identity", dropout=0.5)
    params = single.init(key, x)
    near(pt.training(single)(params, x)[0], single(params, x))


def test_every_gap_between_layers_has_a_mask_of_its_own(key):
    layer = nn.RNN(50, 3, "identity", dropout=0.5)
    x = np.ones((1, 1, 1), "float32")
    params = layer.init(key, x, rules={"l0_i2h_weight": init.One(), ".*": init.Zero()})
    params = pt.replace(params, {f"l{i}_i2h_weight": jnp.eye(50) for i in (1, 2)})
    y, _ = pt.training(layer)(params, x, key=key)
    assert set(np.unique(y)) == {0, 4}
    assert 0.05 < (np.asarray(y) > 0).mean() < 0.45  # a quarter; a shared mask would keep half


def test_dropout_is_recomputed_under_checkpoint(key):
    layer = nn.GRU(3, 2, dropout=0.5)
    x = normal(4, 2, 5)
    params = filled(layer, x)

    def total(model, params):
        return pt.training(model)(params, x, key=key)[0].sum()

    run = [
        jax.jit(jax.value_and_grad(functools.partial(total, f))) for f in (layer, jax.checkpoint(layer))
    ]
    all_near(run[1](params), run[0](params))


@pytest.mark.parametrize("kind", ["relu", "lstm", "gru"])
def test_low_precision(kind):
    layer = KINDS[kind](3, 2, dtype="bfloat16")
    x = normal(4, 2, 5)
    params = filled(layer, jnp.asarray(x, "bfloat16"))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    y, state = layer(params, jnp.asarray(x, "bfloat16"), zeros(layer, 2, kind))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state))
    exact = KINDS[kind](3, 2)(pt.cast(params, {".*": "float32"}), x)
    np.testing.assert_allclose(np.asarray(y, "float32"), exact, atol=0.1, rtol=0.1)


def test_where_jax_promotes_so_do_the_layers():
    layer = nn.LSTM(3, 2)
    x = normal(4, 2, 5)
    params = filled(layer, x)
    with jax.numpy_dtype_promotion("standard"):
        half = layer(params, jnp.asarray(x, "bfloat16"))
    assert half.dtype == jnp.float32


def test_a_layer_is_compiled_once(key):
    traces = []

    def activation(x):
        traces.append(x)
        return jnp.tanh(x)

    x = normal(4, 2, 3)
    net = nn.Sequential(nn.RNN(3, 3, activation), nn.RNN(3, 1, activation))
    params = net.init(key, x)
    assert len(traces) == 1  # four layers of the same type and size share one trace
    for _ in range(3):
        y = net(params, x)
    assert len(traces) == 1
    near(y, nn.RNN(3, 1, "tanh")(params[1], nn.RNN(3, 3, "tanh")(params[0], x)))
    step = jax.jit(pt.grad(lambda p: net(p, x).sum()))
    step(params)
    seen = len(traces)
    step(params)
    assert len(traces) == seen


def test_a_sequential_trains(key):
    net = nn.Sequential(
        nn.Embedding(4, 3), nn.LSTM(8, 2, "NTC", dropout=0.1), nn.Dense(4, flatten=False)
    )
    ids = np.tile(np.arange(7) % 4, (3, 1))
    params = net.init(key, ids, rules={".*weight": init.Xavier(magnitude=6), ".*": init.Zero()})
    assert list(params) == ["embedding0", "lstm0", "dense0"]

    @jax.jit
    def step(params, key):
        def objective(params):
            logits, after = pt.training(net)(params, ids[:, :-1], key=key)
            scores = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(scores, ids[:, 1:, None], 2).mean(), after

        (value, after), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return value, jax.tree.map(lambda w, g: w - g, after, grads)

    values = []
    for k in jax.random.split(key, 100):
        value, params = step(params, k)
        values.append(float(value))
    assert values[-1] < values[0] / 2


# Errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.LSTM(-1), "LSTM: hidden_size must be a non-negative integer, but found -1"),
        (lambda: nn.GRU(3, num_layers=1.5), "GRU: num_layers must be .* but found 1.5"),
        (lambda: nn.GRU(3, num_layers=0), "GRU: num_layers must be a positive integer, but found 0"),
        (lambda: nn.GRU(3, input_size=None), "GRU: input_size must be .* but found None"),
        (lambda: nn.RNN(3, layout="NCT"), "RNN: layout must be 'TNC' or 'NTC', but found 'NCT'"),
        (lambda: nn.RNN(3, dropout=1), r"RNN: dropout must be in \[0, 1\), but found 1"),
        (lambda: nn.RNN(3, activation="tahn"), "no activation 'tahn'. Did you mean `tanh`"),
    ],
)
def test_invalid_settings(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (jnp.ones((4, 5)), ValueError, r"GRU\(None -> 3, TNC\) needs an input \(time, batch, channels\), "
         r"but found shape \(4, 5\)"),
        (jnp.ones((4, 2, 5), "int32"), TypeError, r"GRU.* needs floating-point numbers, but found int32"),
    ],
)  # fmt: skip
def test_invalid_inputs(x, error, text, key):
    with pytest.raises(error, match=text):
        nn.GRU(3).init(key, x)


def test_the_input_size_is_checked(key):
    with pytest.raises(ValueError, match=r"GRU\(4 -> 3, TNC\) expects inputs of size 4, but found"):
        nn.GRU(3, input_size=4).init(key, jnp.ones((4, 2, 5)))
    params = nn.GRU(3).init(key, jnp.ones((4, 2, 5)))
    with pytest.raises(pt.MismatchError, match=r"`l0_i2h_weight` has shape \(9, 5\).* needs \(9, 4\)"):
        nn.GRU(3)(params, jnp.ones((4, 2, 4)))
    with pytest.raises(ValueError, match=r"needs an input \(batch, time, channels\)"):
        nn.GRU(3, layout="NTC")(params, jnp.ones(4))
    with pytest.raises(TypeError, match="its parameters first"):
        nn.GRU(3)(jnp.ones((4, 2, 5)), params)


@pytest.mark.parametrize(
    ("layer", "state", "text"),
    [
        (nn.GRU(3), jnp.ones((1, 4, 3)), r"an array h of shape \(1, 2, 3\) .* found one array \(1, 4, 3\)"),
        (nn.GRU(3), [jnp.ones((1, 2, 3))] * 2, r"an array h of .* but found 2: \[\(1, 2, 3\), \(1, 2, 3\)\]"),
        (nn.LSTM(3), jnp.ones((1, 2, 3)), r"LSTM.* a state \[h, c\] of shape .* one array \(1, 2, 3\)"),
        (nn.LSTM(3), [jnp.ones((1, 2, 3))], r"\[h, c\] of shape \(1, 2, 3\) .* but found 1: \[\(1, 2, 3\)\]"),
        (nn.LSTM(3, 2), [jnp.ones((1, 2, 3))] * 2, r"of shape \(2, 2, 3\) \(layers \* directions"),
    ],
)  # fmt: skip
def test_states_of_another_form(layer, state, text):
    x = normal(4, 2, 5)
    params = filled(layer, x)
    with pytest.raises(ValueError, match=text) as info:
        layer(params, x, state)
    assert "begin_state(2) returns zeros" in str(info.value)
    layer(params, x, layer.begin_state(2))  # what the text says to do


def test_a_state_of_another_dtype():
    layer = nn.LSTM(3, dtype="bfloat16")
    x = jnp.asarray(normal(4, 2, 5), "bfloat16")
    params = filled(layer, x)
    with pytest.raises(
        TypeError, match="computes in bfloat16, but the state h is float32: cast it"
    ) as info:
        layer(params, x, layer.begin_state(2, "float32"))
    assert "begin_state(2, 'bfloat16')" in str(info.value)
    y, _ = layer(params, x, layer.begin_state(2, "bfloat16"))  # what the text says to do
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("lengths", [3, [1, 2, 3], [1.0, 2.0], [[1, 2]]], ids=str)
def test_invalid_lengths(lengths):
    layer = nn.GRU(3)
    x = normal(4, 2, 5)
    with pytest.raises(
        ValueError, match="needs integer lengths, one for each of the 2 sequences, but found"
    ):
        layer(filled(layer, x), x, lengths=jnp.asarray(lengths))


@pytest.mark.parametrize(
    "make", [nn.LSTM, *(pytest.param(m, marks=pytest.mark.slow) for m in (nn.RNN, nn.GRU))]
)
def test_forward_reverse_and_differences_agree(make, key):
    net, x = make(3, bidirectional=True), jax.random.normal(key, (4, 2, 3))
    lengths = jnp.array([4, 2], jnp.int32)
    params = net.init(key, x)
    flat, back = jax.flatten_util.ravel_pytree(params)
    flat = 0.5 * jax.random.normal(jax.random.key(2), flat.shape)

    def total(flat):
        return (net(back(flat), x, lengths=lengths) ** 2).sum()

    change = jax.random.normal(jax.random.key(1), flat.shape)
    _, along = jax.jvp(total, (flat,), (change,))
    np.testing.assert_allclose(along, jax.grad(total)(flat) @ change, rtol=1e-4)
    step = 3e-3
    difference = (total(flat + step * change) - total(flat - step * change)) / (2 * step)
    np.testing.assert_allclose(along, difference, rtol=1e-2)
    curved = jax.jvp(jax.grad(total), (flat,), (change,))[1] @ change
    again = jax.grad(lambda flat: jax.jvp(total, (flat,), (change,))[1])(flat) @ change
    np.testing.assert_allclose(curved, again, rtol=1e-3)
