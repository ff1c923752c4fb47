"""Training steps against the same programs by hand on dicts: a tied MLP, a CNN, a small GPT, an LSTM.

Each program by hand is first checked to have the same loss and gradients as ours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.suite.case import Bound, Case
from benchmarks.suite.cases import mlp

RATE = 1e-3
HAND = "by hand"


class Program(NamedTuple):
    """A network of this library and the same by hand, both functions of parameters and inputs."""

    net: Any
    hand: Callable[[Any, Any], Any]
    x: Any
    y: Any
    ties: dict[str, str] | None = None


def data(kind: str, *shape: int, classes: int = 10) -> tuple[Any, Any]:
    """Returns inputs and labels, one label per example or, for tokens, per character."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    if kind == "tokens":
        tokens = jnp.asarray(rng.integers(0, classes, (shape[0], shape[1] + 1)), jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]
    labels = jnp.asarray(rng.integers(0, classes, shape[0]), jnp.int32)
    return jnp.asarray(rng.normal(size=shape), jnp.float32), labels


def dense(p: Any, x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.inner(x, p["weight"]) + p["bias"][(None,) * (x.ndim - 1)]


def tied_mlp(tiny: bool) -> Program:
    """The network of ``examples/fashion_mnist.py``, whose second layer is used twice."""
    import jax

    from paramtree import nn

    units = 8 if tiny else 256
    first, shared = (nn.Dense(units, activation="relu") for _ in range(2))
    net = nn.Sequential(first, shared, shared, nn.Dense(10))

    def hand(p: Any, x: Any) -> Any:
        for name in ("dense0", "dense1", "dense1"):
            x = jax.nn.relu(dense(p[name], x))
        return dense(p["dense3"], x)

    return Program(net, hand, *data("floats", 8 if tiny else 256, 784))


def cnn(tiny: bool) -> Program:
    """Two convolutions with pooling, and two dense layers."""
    import jax
    from jax import lax

    from paramtree import nn

    channels = 2 if tiny else 16
    net = nn.Sequential(
        *(nn.Conv2D(channels, 5, padding="same", activation="relu"), nn.MaxPool2D()),
        *(nn.Conv2D(2 * channels, 3, padding="same", activation="relu"), nn.MaxPool2D()),
        *(nn.Dense(8 * channels, activation="relu"), nn.Dense(10)),
    )

    def hand(p: Any, x: Any) -> Any:
        for name in ("conv0", "conv1"):
            x = lax.conv_general_dilated(
                x, p[name]["weight"], (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
            )
            x = jax.nn.relu(x + p[name]["bias"][None, None, None])
            x = lax.reduce_window(x, -float("inf"), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(dense(p["dense0"], x.reshape(x.shape[0], -1)))
        return dense(p["dense1"], x)

    return Program(net, hand, *data("floats", 2 if tiny else 64, 28, 28, 1))


def gpt(tiny: bool) -> Program:
    """The network of ``examples/char_lm.py``: blocks as a scan, and a tied decoder."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from paramtree import nn
    from paramtree.nn.attention import rotate

    width, heads = (8, 2) if tiny else (64, 4)
    attend = nn.MultiHeadAttention(heads, use_bias=False, causal=True, rotary=True)
    widen = nn.Dense(4 * width, activation="gelu", flatten=False)
    block = nn.Sequential(
        attention=nn.Residual(norm=nn.RMSNorm(), attend=attend),
        mlp=nn.Residual(norm=nn.RMSNorm(), widen=widen, narrow=nn.Dense(width, flatten=False)),
    )
    net = nn.Sequential(
        embed=nn.Embedding(96, width),
        blocks=nn.Repeat(block, 2),
        norm=nn.RMSNorm(),
        decoder=nn.Dense(96, use_bias=False, flatten=False),
    )

    def norm(p: Any, x: Any) -> Any:
        square = jnp.mean(lax.square(x), -1, keepdims=True)
        return x * lax.rsqrt(square + 1e-6) * p["gamma"][None, None]

    def attention(p: Any, x: Any) -> Any:
        size = (*x.shape[:2], heads, width // heads)
        query, key, value = (
            jnp.inner(x, p[name]["weight"]).reshape(size) for name in ("query", "key", "value")
        )
        positions = jnp.arange(x.shape[1])
        query, key = rotate(query, positions), rotate(key, positions)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return jnp.inner(y.reshape(x.shape), p["out"]["weight"])

    def block_by_hand(x: Any, p: Any) -> Any:
        first, second = p["attention"], p["mlp"]
        x = x + attention(first["attend"], norm(first["norm"], x))
        y = jax.nn.gelu(dense(second["widen"], norm(second["norm"], x)), approximate=False)
        return x + dense(second["narrow"], y), None

    def hand(p: Any, x: Any) -> Any:
        x = jnp.take(p["embed"]["weight"], x, axis=0)
        x, _ = lax.scan(block_by_hand, x, p["blocks"])
        return norm(p["norm"], x) @ p["embed"]["weight"].T

    x, y = data("tokens", 1 if tiny else 4, 4 if tiny else 64, classes=96)
    return Program(net, hand, x, y, {"decoder/weight": "embed/weight"})


def lstm(tiny: bool) -> Program:
    """An LSTM over sequences, and a dense layer on its last output."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from paramtree import nn

    units = 4 if tiny else 128
    net = nn.Sequential(nn.LSTM(units, layout="NTC"), lambda x: x[:, -1], nn.Dense(10))

    def hand(p: Any, x: Any) -> Any:
        lstm = p["lstm0"]
        inputs = x.swapaxes(0, 1) @ lstm["l0_i2h_weight"].T + lstm["l0_i2h_bias"][None, None]

        def cell(state: Any, projected: Any) -> Any:
            h, c = state
            gates = projected + (h @ lstm["l0_h2h_weight"].T + lstm["l0_h2h_bias"][None])
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], units))
        (h, _), _ = lax.scan(cell, (zeros, zeros), inputs)
        return dense(p["dense0"], h)

    return Program(net, hand, *data("floats", 2 if tiny else 32, 4 if tiny else 32, 64))


PROGRAMS = {"tied MLP": tied_mlp, "CNN": cnn, "GPT": gpt, "LSTM": lstm}


def prepared(size: str) -> tuple[Program, Any]:
    """Returns a program and its parameters; the smoke run uses tiny ones."""
    import jax

    import paramtree as pt

    name, _, tiny = size.partition(", ")
    program = PROGRAMS[name](bool(tiny))
    return program, pt.init(program.net, jax.random.key(0), program.x, ties=program.ties)


def loss_of(model: Callable[[Any, Any], Any], params: Any, x: Any, y: Any) -> Any:
    import jax.numpy as jnp
    import optax

    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(params, x), y))


def steps(model: Callable[[Any, Any], Any], params: Any, x: Any, y: Any) -> dict[str, Any]:
    """Returns a call that takes an SGD step and donates the previous parameters."""
    import jax

    def step(params: Any, x: Any, y: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: loss_of(model, p, x, y))(params)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, params, grads), loss

    jitted = jax.jit(step, donate_argnums=0)

    def take_step() -> None:
        nonlocal params
        params, loss = jitted(params, x, y)
        loss.block_until_ready()

    return {"step": take_step}


def ours(size: str) -> dict[str, Any]:
    program, params = prepared(size)
    return steps(program.net, params, program.x, program.y)


def by_hand(size: str) -> dict[str, Any]:
    program, values = written(size)
    return steps(program.hand, values, program.x, program.y)


def over_hand(size: str) -> dict[str, Any]:
    return mlp.over(ours(size), {HAND: by_hand(size)})


def written(size: str) -> tuple[Program, Any]:
    """Returns a program and its parameters as a dict, after checking it against ours."""
    import jax
    import numpy as np

    import paramtree as pt

    program, params = prepared(size)
    x, y = program.x, program.y
    values = params.to_dict()
    # The dict has a tied leaf once, under its canonical name.
    for alias in pt.ties(params, sep="/"):
        level, name = values, alias.split("/")
        for part in name[:-1]:
            level = level[part]
        del level[name[-1]]
    values = jax.tree.map(lambda leaf: leaf.copy(), values)
    grad = jax.jit(jax.value_and_grad(loss_of, 1), static_argnums=0)
    (loss, grads), (expected, wanted) = (
        grad(program.hand, values, x, y),
        grad(program.net, params, x, y),
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = "/".join(part.key for part in path)
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-3, atol=1e-6, err_msg=name)
    return program, values


CASES = [
    Case(
        name="training",
        title="Training steps",
        sizes=tuple(PROGRAMS),
        contenders={"paramtree": ours, HAND: by_hand},
        size="",
        rounds=1,
        turns=9,
        slice=0.06,
        seconds=60,
        smoke=tuple(f"{name}, tiny" for name in PROGRAMS),
        packages=("optax",),
        cached=True,
        note=(
            "Cross-entropy, its gradient and SGD, with donated buffers. MLP: 784, three of 256, the "
            "last two tied, 10; a batch of 256. CNN: 16 and 32 channels on 28 x 28, a batch of 64. "
            "GPT: two blocks of 64 units, 4 x 64 characters, a tied decoder. LSTM: 128 units over 32 "
            "steps, a batch of 32. By hand: functions of nested dicts, first checked to have the same "
            "loss and gradients. Two processes of the same program differ by a few percent, so the "
            "next case runs both in one."
        ),
    ),
    Case(
        name="training_over",
        title="The same steps over those by hand, in one process",
        sizes=tuple(PROGRAMS),
        contenders={"paramtree": over_hand},
        bounds=(Bound(f"step, of {HAND}", None, 1.02),),
        unit="x",
        size="",
        rounds=2,
        turns=1,
        seconds=50,
        smoke=tuple(f"{name}, tiny" for name in PROGRAMS),
        packages=("optax",),
        cached=True,
        note="Both take turns in one process.",
    ),
]
