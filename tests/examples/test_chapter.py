"""The chapter "Parameter Management": the example runs, and its nets match MXNet's numbers."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import parameter_management as example
from paramtree import nn

GOLD = Path(__file__).parents[1] / "data" / "gluon"
CLASSIFIERS = {"mlp": example.mlp(), "tied": example.tied_mlp(), "rgnet": example.rgnet()}
JIT = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


@pytest.fixture(autouse=True)
def full_precision():
    # A GPU may multiply float32 matrices in fewer bits, and miss the tolerance of 1e-5.
    with jax.default_matmul_precision("float32"):
        yield


# The example


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Returns the example's output by section."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "builtins.print", lambda *args: lines.extend(" ".join(map(str, args)).split("\n"))
        )
        example.main()
    starts = [i for i, line in enumerate(lines) if line and line == "-" * len(line)]
    ends = [*(i - 2 for i in starts[1:]), len(lines)]
    return {
        lines[start - 1]: "\n".join(lines[start + 1 : end])
        for start, end in zip(starts, ends, strict=True)
    }


MLP_LINES = """\
Parameter dense0_weight (shape=(256, 20), dtype=float32)
Parameter dense0_bias (shape=(256,), dtype=float32)
Parameter dense1_weight (shape=(10, 256), dtype=float32)
Parameter dense1_bias (shape=(10,), dtype=float32)"""
ZEROS = "[0. 0. 0. 0. 0. 0. 0. 0. 0. 0.]"


def numbers(text: str) -> np.ndarray:
    return np.array([float(word) for word in text.replace("[", " ").replace("]", " ").split()])


def test_sections_are_in_the_order_of_the_chapter(printed) -> None:
    assert list(printed) == [
        "A multilayer perceptron",
        "Parameter access",
        "Targeted parameters",
        "All parameters at once",
        "Nested blocks",
        "Shapes before any data",
        "Built-in initialization",
        "By parameter and by layer",
        "Custom initialization",
        "Setting values",
        "Tied parameters",
        "The gradient of a tied parameter",
        "A fancy net",
        "A chimera",
    ]


def test_access_prints_the_lines_of_the_chapter(printed) -> None:
    assert numbers(printed["A multilayer perceptron"]).shape == (20,)
    assert printed["Parameter access"] == MLP_LINES
    assert printed["Shapes before any data"] == MLP_LINES
    one = printed["Targeted parameters"].split("\n")
    assert one[:2] == ["Parameter dense1_bias (shape=(10,), dtype=float32)", ZEROS]
    assert "One array: True" in one
    assert one[-1] == "[2. 2. 2. 2. 2. 2. 2. 2. 2. 2.]"  # a sum over a batch of two
    lines = MLP_LINES.split("\n")
    assert printed["All parameters at once"].split("\n") == [
        *lines[:2],
        *lines,
        "[('weight', (256, 20)), ('bias', (256,))]",
        "[('dense0_weight', (256, 20)), ('dense0_bias', (256,)), ('dense1_weight', (10, 256)), "
        "('dense1_bias', (10,))]",
        ZEROS,
        *lines[0::2],
        *lines[:2],
    ]


def test_nested_blocks_print_the_net_and_its_parameters(printed) -> None:
    text = printed["Nested blocks"]
    block = """\
    ({}): Sequential(
      (0): Dense(None -> 32, Activation(relu))
      (1): Dense(None -> 16, Activation(relu))
    )
"""
    blocks = "".join(block.format(i) for i in range(4))
    net = f"Sequential(\n  (0): Sequential(\n{blocks}  )\n  (1): Dense(None -> 10, linear)\n)\n"
    assert net in text
    parameters = [line for line in text.split("\n") if line.startswith("Parameter ")]
    assert len(parameters) == 18
    assert (
        parameters[0]
        == "Parameter sequential0_sequential0_dense0_weight (shape=(32, 20), dtype=float32)"
    )
    assert (
        parameters[6]
        == "Parameter sequential0_sequential1_dense1_weight (shape=(16, 32), dtype=float32)"
    )
    assert parameters[-1] == "Parameter dense0_bias (shape=(10,), dtype=float32)"
    assert np.array_equal(numbers(text.rpartition("Parameter ")[2].partition("\n")[2]), np.zeros(32))


def test_initialisation_prints_what_was_asked_for(printed) -> None:
    _, default, normal, zero, one = re.split(
        r"By default:|Normal\(0.01\):|Zero\(\):|Constant\(1\):", printed["Built-in initialization"]
    )
    assert 0.03 < abs(numbers(default)).max() <= 0.07
    assert 0.002 < numbers(normal).std() < 0.03
    assert np.array_equal(numbers(zero), np.zeros(8))
    assert np.array_equal(numbers(one), np.ones(20))
    constant, xavier = printed["By parameter and by layer"].split("\n", 1)
    assert constant == "42.0"
    assert 0.05 < abs(numbers(xavier)).max() <= np.sqrt(3 / 138)
    custom = abs(numbers(printed["Custom initialization"]))
    assert 0 < (custom == 0).sum() < 20
    assert set((custom == 0) | ((custom >= 5) & (custom <= 10))) == {True}
    values, before = printed["Setting values"].split("Before:")
    assert numbers(values)[0] == 42
    old = numbers(printed["Custom initialization"])
    np.testing.assert_allclose(numbers(values)[1:], old[1:] + 1, rtol=1e-5)
    assert numbers(before) == old[0]


def test_ties_print_as_one_array(printed) -> None:
    text = printed["Tied parameters"]
    assert "Parameter dense2_weight (shape=(8, 8), dtype=float32, tied to dense1_weight)" in text
    assert text.endswith(
        "8 names, 6 arrays\n[ True  True  True  True  True  True  True  True]\n100.0\nOne array: True"
    )
    weights = [f"Parameter dense{i}_weight (shape=(8, 8), dtype=float32)" for i in (1, 1, 2)]
    assert printed["The gradient of a tied parameter"] == "\n".join([*weights, "Is the sum: True"])


def test_fancy_nets_print(printed) -> None:
    text = printed["A fancy net"].split("\n")
    dense = [
        "Parameter dense_weight (shape=(20, 20), dtype=float32)",
        "Parameter dense_bias (shape=(20,), dtype=float32)",
    ]
    assert text[:3] == ["State rand_weight (shape=(20, 20), dtype=float32)", *dense]
    assert text[5:] == dense
    np.testing.assert_allclose(float(text[3]), float(text[4]), rtol=1e-5)
    text = printed["A chimera"].split("\n")
    assert text[:5] == [
        "Sequential(",
        "  (0): NestMLP()",
        "  (1): Dense(None -> 20, linear)",
        "  (2): FancyMLP()",
        ")",
    ]
    assert text[5] == "Parameter nestmlp0_net_dense0_weight (shape=(64, 20), dtype=float32)"
    assert "State fancymlp0_rand_weight (shape=(20, 20), dtype=float32)" in text
    assert np.isfinite(float(text[-1]))


def test_custom_initialiser_has_the_distribution_of_the_chapter(key) -> None:
    draws = example.far_or_zero(key, (400, 100), jnp.float32)
    assert draws.dtype == jnp.float32
    assert draws.shape == (400, 100)
    sizes = np.abs(draws)
    assert set(np.unique((sizes == 0) | ((sizes >= 5) & (sizes <= 10)))) == {True}
    for share, expected in ((draws == 0, 1 / 2), (draws > 0, 1 / 4), (draws < 0, 1 / 4)):
        np.testing.assert_allclose(np.mean(share), expected, atol=0.01)
    np.testing.assert_allclose(sizes[sizes > 0].mean(), 7.5, atol=0.05)


# MXNet's numbers


def gold(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLD / f"{name}.npz") as file:
        return dict(file)


def weights_in(data: dict[str, np.ndarray]) -> list[str]:
    return [name for name in data if name.endswith(("weight", "bias")) and ":" not in name]


def path_of(params: pt.ParamTree, name: str) -> str:
    """Returns the path of a structural name, in which digits are positions."""
    path = []
    for segment in name.split("."):
        path.append(list(params)[int(segment)] if segment.isdigit() else segment)
        params = params[path[-1]]
    return "/".join(path)


def assert_gradients(grads: pt.ParamTree, data: dict[str, np.ndarray], kind: str) -> None:
    wanted = {name.partition(":")[2]: value for name, value in data.items() if name.startswith(kind)}
    assert wanted
    assert all(abs(value).max() > 0.01 for value in wanted.values())
    for name, value in wanted.items():
        assert_close(grads[path_of(grads, name)], value, f"{kind}:{name}")


def assert_close(actual, desired, name: str = "") -> None:
    np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5, err_msg=name)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -chosen.mean()


@JIT
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_equals_gluon(name, wrap) -> None:
    data = gold(name)
    net = CLASSIFIERS[name]
    x, labels = jnp.asarray(data["x"]), jnp.asarray(data["labels"])
    params = pt.load(GOLD / f"{name}.params", like=pt.abstract(net, x))

    assert_close(wrap(net)(params, x), data["y"])
    grads = wrap(jax.grad(lambda p: net(p, x).sum()))(params)
    assert_gradients(grads, data, "grad_sum")
    loss, grads = wrap(jax.value_and_grad(lambda p: cross_entropy(net(p, x), labels)))(params)
    assert_close(loss, data["ce"][0])
    assert_gradients(grads, data, "grad_ce")


def test_weights_go_in_by_position(key) -> None:
    data = gold("rgnet")
    net, x = example.rgnet(), jnp.asarray(data["x"])
    params = pt.load(GOLD / "rgnet.params", like=pt.init(net, key, x))
    assert np.array_equal(params[0][1][0].bias, data["0.1.0.bias"])
    assert np.array_equal(params[1].weight, data["1.weight"])


@JIT
@pytest.mark.parametrize("kind", ["grad_sum", "grad_ce"])
def test_tied_gradient_is_the_sum_of_the_untied_ones(kind, wrap) -> None:
    data = gold("tied")
    assert np.array_equal(data["1.weight"], data["2.weight"])
    net = example.tied_mlp()
    x, labels = jnp.asarray(data["x"]), jnp.asarray(data["labels"])
    params = pt.load(GOLD / "tied.params", like=pt.abstract(net, x))
    losses = {
        "grad_sum": lambda p: net(p, x).sum(),
        "grad_ce": lambda p: cross_entropy(net(p, x), labels),
    }
    grad = wrap(jax.grad(losses[kind]))

    tied = grad(params)
    assert tied.dense1.weight is tied.dense2.weight
    assert len(jax.tree.leaves(tied)) == 6
    assert_gradients(tied, data, kind)

    loose = pt.untie(params)
    assert pt.ties(loose) == {}
    untied = grad(loose)
    assert len(jax.tree.leaves(untied)) == 8
    for leaf in ("weight", "bias"):
        one, two = untied.dense1[leaf], untied.dense2[leaf]
        assert not np.allclose(one, two)
        assert_close(one + two, tied.dense1[leaf])
        assert_close(one + two, data[f"{kind}:1.{leaf}"])
    assert_close(untied.dense0.weight, tied.dense0.weight)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_repr_is_that_of_gluon(name) -> None:
    def relu(units: int, size: int) -> nn.Dense:
        return nn.Dense(units, activation="relu", in_units=size)

    def block(size: int) -> nn.Sequential:
        return nn.Sequential(relu(32, size), relu(16, 32))

    shared = relu(8, 8)
    nets = {
        "mlp": nn.Sequential(relu(256, 20), nn.Dense(10, in_units=256)),
        "tied": nn.Sequential(relu(8, 20), shared, shared, nn.Dense(10, in_units=8)),
        "rgnet": nn.Sequential(
            nn.Sequential(block(20), block(16), block(16), block(16)), nn.Dense(10, in_units=16)
        ),
    }
    assert repr(nets[name]) == json.loads((GOLD / f"{name}.json").read_text())["repr"]


def test_mlp_parameters_print_as_in_gluon() -> None:
    data = gold("mlp")
    params = pt.abstract(example.mlp(), jnp.asarray(data["x"]))
    shown = json.loads((GOLD / "mlp.json").read_text())["collect_params"].split("\n")[1:-1]
    assert repr(pt.collect(params)).split("\n") == [line.strip() for line in shown]


# FancyMLP


@JIT
def test_fancy_mlp_equals_gluon(wrap) -> None:
    data = gold("fancymlp")
    net = example.FancyMLP()
    x = jnp.asarray(data["x"])
    params = pt.load(GOLD / "fancymlp.params", like=pt.abstract(net, x))

    y = wrap(net)(params, x)
    assert y.shape == ()
    assert_close(y, data["y"][0])
    grads = wrap(jax.grad(net))(params, x)
    assert list(grads) == ["rand_weight", "dense"]
    assert grads.rand_weight.shape == (20, 20)  # a leaf like any other to jax.grad; not in Gluon
    assert "grad_sum:rand_weight" not in data
    assert_gradients(grads, data, "grad_sum")


def test_fancy_mlp_keeps_its_constant_as_state(key) -> None:
    params = pt.init(example.FancyMLP(), key, jnp.ones((2, 20)))
    assert list(pt.collect(params, kind="state")) == ["rand_weight"]
    assert list(pt.collect(params, kind="param")) == ["dense_weight", "dense_bias"]


@JIT
@pytest.mark.parametrize(
    ("size", "halvings", "tenfold"),
    [
        (0.5, 0, True),
        (0.9, 0, False),
        (1.0, 0, False),
        (1.5, 1, True),
        (1.9, 1, False),
        (40.0, 6, True),
    ],
)
def test_fancy_mlp_halves_and_multiplies_as_the_loop_does(size, halvings, tenfold, wrap) -> None:
    """Sets the norm before the loop by a single bias: all other weights are 0."""
    tree = {
        "rand_weight": jnp.zeros((20, 20)),
        "dense": {"weight": jnp.zeros((20, 20)), "bias": jnp.zeros(20).at[3].set(size)},
    }
    params = pt.from_tree(tree)
    x = jnp.ones((1, 20))
    factor = 0.5**halvings * (10 if tenfold else 1)
    y, grads = wrap(jax.value_and_grad(example.FancyMLP()))(params, x)
    assert_close(y, size * factor)
    # Only the second use of the layer contributes: relu of the bias, times the factor.
    np.testing.assert_allclose(grads.dense.bias[3], factor, rtol=1e-6)
    assert y.dtype == jnp.float32


def test_chimera_has_a_gradient_for_every_parameter() -> None:
    net = example.chimera()
    x = jnp.ones((2, 20))
    shapes = pt.abstract(net, x)
    params = pt.map_named(lambda name, leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    grads = jax.jit(jax.grad(net))(params, x)
    assert list(params) == ["nestmlp0", "dense0", "fancymlp0"]
    assert all(float(abs(leaf).max()) > 0 for leaf in pt.collect(grads, kind="param").values())
