"""Activations by name, captured and replaced, in every kind of run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn
from paramtree import parametrizations as par

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))
MLP = nn.Sequential(nn.Dense(8, activation="relu"), nn.Dropout(0.5), nn.Dense(3))
DEEP = nn.Sequential(nn.Repeat(nn.Sequential(nn.Dense(8), nn.Dense(8)), 3), nn.Dense(3))


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_activations_of_copies_and_steps_are_in_the_order_of_the_calls() -> None:
    block = nn.Residual(nn.LayerNorm(), nn.Dense(8))

    def scanned(p: Any, x: Any) -> Any:
        return pt.scan(lambda p, h, _: (block(p.block, h), None), p, x, length=2)[0]

    for net in (nn.Repeat(block, 3), nn.Vmap(block, 3, in_axes=None), scanned):
        params = pt.init(net, KEY, X)
        names = list(pt.collect(pt.capture(net)(params, X)[1]))
        order = [i for i, name in enumerate(names) if name.endswith(("norm0_output", "dense0_output"))]
        assert [names[i].rpartition("_output")[0][-5:] for i in order] == ["norm0", "ense0"], names


def test_outputs_and_inputs_by_name() -> None:
    params = pt.init(MLP, KEY, X)
    y, acts = pt.capture(MLP, inputs=True)(params, X)
    h = MLP[0](params.dense0, X)
    close(acts.dense0.output, h)
    close(acts.dense0.input, X)
    close(acts.dropout0.output, h)
    close(acts.dense1.output, y)
    close(acts.output, y)
    assert set(pt.collect(pt.capture(MLP, "dense1")(params, X)[1])) == {"dense1_output"}
    assert set(pt.collect(pt.capture(MLP, ["dense1", "dense0"])(params, X)[1])) == {
        "dense0_output",
        "dense1_output",
    }
    with pytest.raises(pt.RuleError, match="'dens1' matches no name; the closest are dense1"):
        pt.capture(MLP, "dens1")(params, X)


def test_all_inputs_of_a_layer_are_kept() -> None:
    class Sum(nn.Layer):
        def __call__(self, p: Any, x: Any, y: Any) -> Any:
            return x + p.param("scale", (), pt.initializers.One()) * y

    def model(p: Any, x: Any) -> Any:
        return Sum()(p.sum, x, 2 * x)

    _, acts = pt.capture(model, "sum", inputs=True)(pt.init(model, KEY, X), X)
    assert len(acts.sum.input) == 2
    close(acts.sum.input[0], X)
    close(acts.sum.input[1], 2 * X)
    close(acts.sum.output, 3 * X)


def test_a_second_call_has_a_number() -> None:
    def model(p: Any, x: Any) -> Any:
        layer = nn.Dense(8)
        return layer(p.a, layer(p.a, x))

    params = pt.init(model, KEY, X)
    y, acts = pt.capture(model, "a")(params, X)
    close(acts.a.output1, y)
    close(nn.Dense(8)(params.a, acts.a.output), y)


def test_stacks() -> None:
    params = pt.init(DEEP, KEY, X)
    y, acts = pt.capture(DEEP, "repeat0.*")(params, X)
    assert acts.repeat0.dense1.output.shape == (3, 4, 8)
    assert acts.repeat0.output.shape == (4, 8)  # of the Repeat; those of its block come next
    assert acts.repeat0.output1.shape == (3, 4, 8)
    copies = pt.unstack(params, "repeat0").repeat0
    h = X
    for i in range(3):
        h = nn.Dense(8)(copies[str(i)].dense0, h)
        close(acts.repeat0.dense0.output[i], h)
        h = nn.Dense(8)(copies[str(i)].dense1, h)
    mapped = nn.Vmap(MLP, 2, in_axes=None, out_axes=1)
    tree = mapped.init(KEY, X)
    assert pt.capture(mapped, "dense0")(tree, X)[1].dense0.output.shape == (2, 4, 8)

    def loop(p: Any, x: Any) -> Any:
        return pt.scan(lambda p, c, _: (nn.Dense(8)(p.cell, c), None), p, x, length=5)[0]

    steps = pt.capture(loop, "cell")(pt.init(loop, KEY, X), X)[1]
    assert steps.cell.output.shape == (5, 4, 8)


def sows(p: Any, x: Any) -> Any:
    h = nn.Dense(8)(p.a, x)
    h = p.a.sow("half", h / 2)
    return nn.Dense(3)(p.b, h) + p.sow("bias", jnp.ones(3))[None]


def test_sown_values() -> None:
    params = pt.init(sows, KEY, X)
    y, acts = pt.capture(sows)(params, X)
    close(acts.a.half, acts.a.output / 2)
    assert acts.bias.tolist() == [1, 1, 1]
    assert set(pt.collect(pt.capture(sows, "a")(params, X)[1])) == {"a_output", "a_half"}
    assert set(pt.collect(pt.capture(sows, "a_half")(params, X)[1])) == {"a_half"}

    def plain(p: Any, x: Any) -> Any:
        return nn.Dense(3)(p.b, nn.Dense(8)(p.a, x) / 2) + jnp.ones(3)[None]

    assert str(jax.make_jaxpr(sows)(params, X)) == str(jax.make_jaxpr(plain)(params, X))


def test_interventions() -> None:
    params = pt.init(MLP, KEY, X)
    zero = pt.intervene(MLP, {"dense0": lambda name, h: h * 0})
    close(zero(params, X), np.broadcast_to(params.dense1.bias, (4, 3)))
    close(pt.intervene(MLP, {"dense0": 0.0})(params, X), zero(params, X))
    acts = pt.capture(MLP)(params, X)[1]
    other = pt.capture(MLP)(params, 2 * X)[1]
    patched = pt.intervene(MLP, {"dense0": other.dense0.output})
    close(patched(params, X), MLP(params, 2 * X))
    names = []
    pt.intervene(MLP, {".*": lambda name, h: names.append(name) or h})(params, X)
    assert names == ["dense0", "dropout0", "dense1", ""]
    half = pt.intervene(sows, {"a_half": lambda name, h: 2 * h})
    tree = pt.init(sows, KEY, X)
    close(half(tree, X), nn.Dense(3)(tree.b, nn.Dense(8)(tree.a, X)) + 1)
    assert np.any(half(tree, X) != sows(tree, X))
    deep = pt.init(DEEP, KEY, X)
    stacked = pt.capture(DEEP, "repeat0_dense0")(deep, 2 * X)[1].repeat0.dense0.output
    close(pt.intervene(DEEP, {"repeat0_dense0": stacked})(deep, X), DEEP(deep, 2 * X))
    with pytest.raises(pt.MismatchError, match=r"intervene: `dense0` is .* and would be replaced by"):
        pt.intervene(MLP, {"dense0": acts.dense1.output})(params, X)
    with pytest.raises(pt.RuleError, match="'dens0' matches no name"):
        pt.intervene(MLP, {"dens0": 0})(params, X)


def test_the_gradient_of_an_activation() -> None:
    params = pt.init(MLP, KEY, X)

    def loss(change: Any) -> Any:
        return pt.intervene(MLP, {"dense0": lambda name, h: h + change})(params, X).sum()

    found = jax.grad(loss)(jnp.zeros((4, 8)))
    close(found, np.broadcast_to(params.dense1.weight.sum(0), (4, 8)))


def test_it_composes_with_training_and_other_transforms() -> None:
    net = nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5), DEEP)
    params = pt.init(pt.capture(net), KEY, X)
    assert jax.tree.structure(params) == jax.tree.structure(pt.init(net, KEY, X))
    want, new = pt.training(net)(params, X, key=KEY)
    (y, acts), after = pt.training(pt.capture(net))(params, X, key=KEY)
    close(y, want)
    pt.testing.assert_trees_close(after, new)
    assert np.any(acts.dropout0.output == 0)
    (y, after), again = pt.capture(pt.training(net))(params, X, key=KEY)
    close(y, want)
    assert type(after) is pt.ParamTree
    pt.testing.assert_trees_close(after, new)
    pt.testing.assert_trees_close(again, acts)
    jitted = jax.jit(pt.capture(pt.training(net)))(params, X, key=KEY)
    pt.testing.assert_trees_close(jitted[1], acts, rtol=1e-4, atol=1e-5)
    rules = {"dense0_weight": par.WeightNorm()}
    wide = pt.expand(params, rules)
    for f in (
        pt.capture(pt.reparametrize(net, rules), "dense0"),
        pt.reparametrize(pt.capture(net, "dense0"), rules),
    ):
        close(f(wide, X)[1].dense0.output, nn.Dense(8)(params.dense0, X))
    both = pt.capture(pt.intervene(net, {"dense0": lambda name, h: h * 0}), "dense0")
    assert both(params, X)[1].dense0.output.shape == (4, 8)
    mapped = jax.vmap(pt.capture(net, "dense0"), (None, 0))(params, X[:, None])
    assert mapped[1].dense0.output.shape == (4, 1, 8)
    assert pt.capture(net)(pt.pack(params), X)[1].dense0.output.shape == (4, 8)


def test_what_cannot_get_out_raises_and_what_is_not_asked_for_does_not() -> None:
    def model(p: Any, x: Any) -> Any:
        h = nn.Dense(8)(p.first, x)
        return jax.lax.scan(lambda c, _: (nn.Dense(8)(p.cell, c), None), h, None, length=2)[0]

    params = pt.init(model, KEY, X)
    with pytest.raises(pt.ScopeError, match=r"`cell_output` is computed inside a jax transform, scan"):
        pt.capture(model)(params, X)
    assert set(pt.collect(pt.capture(model, "first")(params, X)[1])) == {"first_output"}

    def saved(p: Any, x: Any) -> Any:
        return jax.checkpoint(nn.Dense(8))(p.a, x)

    with pytest.raises(pt.ScopeError, match=r"`a_output` is computed inside .*checkpoint"):
        pt.capture(saved)(pt.init(saved, KEY, X), X)
    doubled = pt.intervene(saved, {"a": lambda name, h: 2 * h})
    tree = pt.init(saved, KEY, X)
    close(doubled(tree, X), 2 * saved(tree, X))


def test_equal_transforms_are_equal() -> None:
    def fn(name: str, h: Any) -> Any:
        return h

    assert pt.capture(MLP, "a") == pt.capture(MLP, "a") != pt.capture(MLP, "b")
    assert pt.intervene(MLP, {"a": fn}) == pt.intervene(MLP, {"a": fn}) != pt.intervene(MLP, {"b": fn})
    assert hash(pt.intervene(MLP, {"a": fn})) == hash(pt.intervene(MLP, {"a": fn}))


# How jax traces


def test_calls_in_a_scan_and_after_it_have_numbers() -> None:
    def body(p: Any, carry: Any, _: Any) -> Any:
        x, total = carry
        x = nn.Dense(3)(p.dense, x)
        return (x, total + x.sum()), None

    def net(p: Any, x: Any) -> Any:
        carry, _ = pt.scan(body, p, (x, 0.0), None, length=4)  # a weakly typed number
        return nn.Dense(3)(p.dense, carry[0])

    x = jnp.ones((2, 3))
    params = pt.init(net, jax.random.key(0), x)
    _, acts = pt.capture(net, "dense")(params, x)
    assert {name: leaf.shape for name, leaf in pt.collect(acts).items()} == {
        "dense_output": (4, 2, 3),
        "dense_output1": (2, 3),
    }


def test_a_scope_may_be_carried_by_a_scan() -> None:
    def net(p: Any, x: Any) -> Any:
        x = nn.Dense(3)(p.first, x)

        def body(carry: Any, _: Any) -> Any:
            p, x = carry
            return (p, jnp.tanh(x @ p.first.weight)), None

        return jax.lax.scan(body, (p, x), None, length=2)[0][1]

    x = jnp.ones((2, 3))
    params = pt.init(net, jax.random.key(0), x)
    y, acts = pt.capture(net, "first")(params, x)
    np.testing.assert_array_equal(y, net(params, x))
    assert list(pt.collect(acts)) == ["first_output"]


# Names


def test_what_is_captured_can_be_put_back_by_its_name() -> None:
    net = nn.Sequential(nn.Dense(3, activation="tanh"), nn.Repeat(nn.Dense(3), 2), nn.Dense(2))
    x = jax.random.normal(jax.random.key(1), (2, 3))
    params = pt.init(net, jax.random.key(0), x)
    y, acts = pt.capture(net)(params, x)
    names = ["dense0_output", "repeat0_output1", "repeat0_output", "dense1_output", "output"]
    assert list(pt.collect(acts)) == names
    other = 2 * x
    for name in names:  # from here on the model sees what it computed from x
        put_back = pt.intervene(net, {name: pt.collect(acts)[name]})
        np.testing.assert_array_equal(put_back(params, other), y)
    blocks = pt.capture(net, "repeat0_output1")(params, x)[1]  # the block, not the Repeat
    assert {n: a.shape for n, a in pt.collect(blocks).items()} == {"repeat0_output1": (2, 2, 3)}
    with pytest.raises(pt.RuleError, match="'dens0_output' matches no name; the first are dense0"):
        pt.intervene(net, {"dens0_output": 0.0})(params, x)
    with pytest.raises(pt.RuleError, match="the first are dense0, repeat0, dense1|the closest"):
        pt.intervene(net, {"qqqqqq": 0.0})(params, x)


@pytest.mark.parametrize("value", [{0: 1}, np.ones(7, "f4"), (np.ones(2),), "text"])
def test_a_replacement_of_another_form_is_an_error(value: Any) -> None:
    net, x = nn.Sequential(nn.Repeat(nn.Dense(3), 2)), jnp.ones((2, 3))
    params = pt.init(net, jax.random.key(0), x)
    with pytest.raises((pt.MismatchError, TypeError), match="`repeat0` is .*would be replaced by|text"):
        pt.intervene(net, {"repeat0": value})(params, x)


# Calls


DENSE = nn.Dense(4)
Y = jax.random.normal(jax.random.key(5), (3, 4))


def by_hand(p: Any, x: Any) -> Any:
    return DENSE(p.d, DENSE(p.d, DENSE(p.d, x)))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
@pytest.mark.parametrize("name", ["d_output", "d_output1", "d_output2", "d"])
def test_a_compiled_layer_that_is_called_again_is_another_call(wrap: Any, name: str) -> None:
    layer = wrap(DENSE)

    def net(p: Any, x: Any) -> Any:
        return layer(p.d, layer(p.d, layer(p.d, x)))

    params = pt.init(net, jax.random.key(0), Y)
    change = {name: lambda n, h: 2 * h + 1}
    expected = pt.intervene(by_hand, change)(params, Y)
    for model in (pt.intervene(net, change), jax.jit(pt.intervene(net, change))):
        np.testing.assert_allclose(model(params, Y), expected, rtol=1e-5)
    assert np.any(expected != by_hand(params, Y))


def test_a_stack_of_another_length_is_an_error() -> None:
    net = nn.Sequential(nn.Repeat(nn.Repeat(nn.Dense(4), 3), 2))
    params = pt.init(net, jax.random.key(0), Y)
    inner = "repeat0_output2"
    for sizes in ((2,), (3,), (5,), (3, 2), (2, 5), (1, 2, 3)):
        stack = jnp.zeros((*sizes, 3, 4))
        with pytest.raises(pt.MismatchError, match=r"or \(2, 3\) of them, one for each iteration"):
            pt.intervene(net, {inner: stack})(params, Y)
    zeros = pt.intervene(net, {inner: jnp.zeros((2, 3, 3, 4))})(params, Y)
    assert not np.any(zeros) and not np.any(pt.intervene(net, {inner: jnp.zeros((3, 4))})(params, Y))


class Wrapper(nn.Layer):
    """A layer that calls others on its own scope."""

    def __call__(self, p: Any, x: Any) -> Any:
        return 2 * nn.Dense(4)(p, nn.Dropout(0.5)(p, x))


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Sequential(wrapped=Wrapper()), "wrapped"),
        (nn.Sequential(nn.Repeat(nn.Dense(4), 3)), "repeat0"),
        (nn.Sequential(lstm=nn.LSTM(4, num_layers=2, dropout=0.5, layout="NTC")), "lstm"),
    ],
)
def test_a_layer_is_replaced_once_and_not_what_it_calls_on_its_scope(net: Any, name: str) -> None:
    x = Y[None] if name == "lstm" else Y
    params = pt.init(net, jax.random.key(0), x)

    def total(change: Any) -> Any:
        return pt.intervene(net, {name: lambda n, h: h + change})(params, x).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.zeros(())), x.size, rtol=1e-5)
    if name == "repeat0":
        copies = pt.unstack(params, name)
        add = pt.intervene(net, {name: lambda n, h: h + 1})
        np.testing.assert_allclose(add(copies, x), add(params, x), rtol=1e-5, atol=1e-6)


def test_names_start_at_the_tree_that_is_given() -> None:
    net = nn.Sequential(nn.Dense(4), nn.Dense(4))
    params = pt.init(lambda p, x: net(p.part, x), jax.random.key(0), Y)
    for capture in (pt.capture(net, "dense0"), jax.jit(pt.capture(net, "dense0"))):
        assert list(pt.collect(capture(params.part, Y)[1])) == ["dense0_output"]
    model = pt.intervene(net, {"dense1": 0.0})
    assert not np.any(model(params.part, Y)) and not np.any(jax.jit(model)(params.part, Y))


def test_a_model_that_captures_or_adapts_inside_is_initialised() -> None:
    body = nn.Sequential(nn.Dense(4), nn.Repeat(nn.Dense(4), 2))

    def captures(p: Any, x: Any) -> Any:
        y, acts = pt.capture(body, "dense0|repeat0_output1")(p.body, x)
        return nn.Dense(2)(p.head, acts.dense0.output) + acts.repeat0.output1.sum()

    for at in ("dense0", "repeat0", "repeat0_output1"):

        def adapts(p: Any, x: Any, at: str = at) -> Any:
            rule = {at: lambda name, h: h + nn.Dense(4)(p.adapter, h)}
            return pt.intervene(body, rule)(p.body, x)

        if at != "repeat0_output1":  # a layer of the outside cannot be in the scan
            params = pt.init(adapts, jax.random.key(0), Y)
            assert "adapter_weight" in pt.collect(params) and adapts(params, Y).shape == Y.shape
    params = pt.init(captures, jax.random.key(0), Y)
    assert list(params) == ["body", "head"] and captures(params, Y).shape == (3, 2)


@pytest.mark.parametrize("name", ["", "a/b", "output", "output1", "input", 3])
def test_names_that_cannot_be_sown(name: Any) -> None:
    def net(p: Any, x: Any) -> Any:
        return p.sow(name, nn.Dense(4)(p.d, x))

    params = pt.init(net, jax.random.key(0), Y)
    with pytest.raises(pt.ScopeError, match="cannot name a value that is sown: give it a name"):
        pt.capture(net)(params, Y)


def test_equal_numbers_make_equal_interventions() -> None:
    for value in (0.5, 1, True):
        assert pt.intervene(DENSE, {"": value}) == pt.intervene(DENSE, {"": type(value)(value)})
    assert pt.intervene(DENSE, {"": 1}) != pt.intervene(DENSE, {"": 1.0})
    assert pt.intervene(DENSE, {"": np.ones(2)}) != pt.intervene(DENSE, {"": np.ones(2)})
