"""The overhead of a jitted call, in deep nets of tiny layers with little arithmetic."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite.case import Absent, Bound, Case, Measured

RATE = 1e-3
Metrics = dict[str, Callable[[], Any]]


def data(width: int, batch: int) -> tuple[Any, Any]:
    """Returns inputs and targets."""
    import jax

    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (batch, width)), jax.random.normal(keys[1], (batch, width))


def layers(count: int, width: int) -> list[dict[str, Any]]:
    """Returns the values of all layers."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    scale = (2 / width) ** 0.5
    return [
        {
            "weight": jax.device_put((rng.normal(size=(width, width)) * scale).astype(np.float32)),
            "bias": jax.device_put(np.zeros(width, np.float32)),
        }
        for _ in range(count)
    ]


def squared(y: Any, target: Any) -> Any:
    """Returns the loss."""
    import jax.numpy as jnp

    return jnp.mean((y - target) ** 2)


def calls(model: Callable[[Any, Any], Any], params: Any, width: int, batch: int) -> Metrics:
    """Returns the calls for any model that is a pure function of a pytree."""
    import jax
    import optax

    x, target = data(width, batch)
    tx = optax.adam(RATE)

    def loss_of(p: Any) -> Any:
        return squared(model(p, x), target)

    @jax.jit
    def sgd(p: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(p)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, p, grads), loss

    @jax.jit
    def adam(p: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, loss

    forward = jax.jit(model)
    by_sgd, by_adam, state = params, params, tx.init(params)

    def sgd_step() -> None:
        nonlocal by_sgd
        by_sgd, loss = sgd(by_sgd)
        loss.block_until_ready()

    def adam_step() -> None:
        nonlocal by_adam, state
        by_adam, state, loss = adam(by_adam, state)
        loss.block_until_ready()

    return {
        "forward": lambda: forward(params, x).block_until_ready(),
        "SGD step": sgd_step,
        "Adam step": adam_step,
    }


def tree_of(size: int, width: int) -> tuple[Any, Any]:
    """Returns the net of this library and its parameters, with the values of ``layers``."""
    import paramtree as pt

    net = pt.nn.Sequential(*[pt.nn.Dense(width, activation="relu") for _ in range(size)])
    values = {f"dense{i}": layer for i, layer in enumerate(layers(size, width))}
    return net, pt.from_tree(values)


def ours(size: int, width: int = 8, batch: int = 1) -> Metrics:
    net, params = tree_of(size, width)
    return calls(net, params, width, batch)


def packed(size: int, width: int = 8, batch: int = 1) -> Metrics:
    import paramtree as pt

    if not hasattr(pt, "pack"):
        raise Absent("this version has no pt.pack")
    net, params = tree_of(size, width)
    return calls(net, pt.pack(params), width, batch)


def by_dict(size: int, width: int = 8, batch: int = 1) -> Metrics:
    import jax

    names = [f"dense{i}" for i in range(size)]

    def model(p: Any, x: Any) -> Any:
        for name in names:
            x = jax.nn.relu(x @ p[name]["weight"].T + p[name]["bias"])
        return x

    values = dict(zip(names, layers(size, width), strict=True))
    return calls(model, values, width, batch)


def by_tuple(size: int, width: int = 8, batch: int = 1) -> Metrics:
    import jax

    def model(p: Any, x: Any) -> Any:
        for i in range(size):
            x = jax.nn.relu(x @ p[2 * i].T + p[2 * i + 1])
        return x

    values = [leaf for layer in layers(size, width) for leaf in (layer["weight"], layer["bias"])]
    return calls(model, tuple(values), width, batch)


def linen_net(size: int, width: int = 8) -> tuple[Any, Any]:
    """Returns a Linen net and its parameters."""
    import jax
    from flax import linen

    net = linen.Sequential([part for _ in range(size) for part in (linen.Dense(width), linen.relu)])
    params = {
        f"layers_{2 * i}": {"kernel": layer["weight"].T, "bias": layer["bias"]}
        for i, layer in enumerate(layers(size, width))
    }
    jax.block_until_ready(params)
    return net.apply, {"params": params}


def linen(size: int) -> Metrics:
    return calls(*linen_net(size), 8, 1)


def haiku_net(size: int, width: int = 8) -> tuple[Any, Any]:
    """Returns a Haiku net and its parameters."""
    import haiku as hk
    import jax

    def model(x: Any) -> Any:
        for _ in range(size):
            x = jax.nn.relu(hk.Linear(width)(x))
        return x

    net = hk.without_apply_rng(hk.transform(model))
    params = {
        f"linear_{i}" if i else "linear": {"w": layer["weight"].T, "b": layer["bias"]}
        for i, layer in enumerate(layers(size, width))
    }
    return net.apply, params


def haiku(size: int) -> Metrics:
    return calls(*haiku_net(size), 8, 1)


def equinox_net(size: int, width: int = 8) -> tuple[Any, Any]:
    """Returns a function that calls an Equinox net, and the net."""
    import equinox as eqx
    import jax

    class Layer(eqx.Module):
        weight: jax.Array
        bias: jax.Array

        def __call__(self, x: Any) -> Any:
            return jax.nn.relu(x @ self.weight.T + self.bias)

    class Net(eqx.Module):
        layers: list[Layer]

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    return lambda net, x: net(x), Net([Layer(**layer) for layer in layers(size, width)])


def equinox(size: int) -> Metrics:
    import equinox as eqx
    import jax
    import optax

    model, net = equinox_net(size)
    x, target = data(8, 1)
    tx = optax.adam(RATE)
    forward = eqx.filter_jit(model)

    def loss_of(net: Any) -> Any:
        return squared(net(x), target)

    @eqx.filter_jit
    def sgd(net: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_of)(net)
        return eqx.apply_updates(net, jax.tree.map(lambda grad: -RATE * grad, grads)), loss

    @eqx.filter_jit
    def adam(net: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_of)(net)
        updates, state = tx.update(grads, state, net)
        return eqx.apply_updates(net, updates), state, loss

    by_sgd, by_adam, state = net, net, tx.init(eqx.filter(net, eqx.is_array))

    def sgd_step() -> None:
        nonlocal by_sgd
        by_sgd, loss = sgd(by_sgd)
        loss.block_until_ready()

    def adam_step() -> None:
        nonlocal by_adam, state
        by_adam, state, loss = adam(by_adam, state)
        loss.block_until_ready()

    return {
        "forward": lambda: forward(net, x).block_until_ready(),
        "SGD step": sgd_step,
        "Adam step": adam_step,
    }


def nnx(size: int) -> Metrics:
    import jax
    import optax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(size)])

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = jax.nn.relu(layer(x))
            return x

    net, by_sgd, by_adam = Net(), Net(), Net()
    x, target = data(8, 1)
    sgd_state = nnx.Optimizer(by_sgd, optax.sgd(RATE), wrt=nnx.Param)
    adam_state = nnx.Optimizer(by_adam, optax.adam(RATE), wrt=nnx.Param)
    forward = nnx.jit(lambda net, x: net(x))

    @nnx.jit
    def step(net: Any, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda net: squared(net(x), target))(net)
        optimizer.update(net, grads)
        return loss

    return {
        "forward": lambda: forward(net, x).block_until_ready(),
        "SGD step": lambda: step(by_sgd, sgd_state).block_until_ready(),
        "Adam step": lambda: step(by_adam, adam_state).block_until_ready(),
    }


def spared(contender: Callable[..., Metrics]) -> Callable[[int], Metrics]:
    """Returns a contender that skips what would compile for minutes with many layers."""

    def call(size: int) -> Metrics:
        if size > (100 if contender is nnx else 10) and contender is not equinox:
            raise Absent("XLA would compile for minutes with more layers")
        metrics = contender(size)
        return {metric: metrics[metric] for metric in metrics if size <= 100 or metric != "Adam step"}

    return call


def wide(contender: Callable[..., Metrics]) -> Callable[[int], Metrics]:
    """Returns a contender with layers of 512 that only takes Adam steps."""
    return lambda size: {"Adam step": contender(size, 512, 32)["Adam step"]}


def over(calls: Metrics, references: dict[str, Metrics]) -> dict[str, Measured]:
    """Returns the ratios of the calls' times to those of the references, in turns in one process."""

    def ratio(call: Callable[[], Any], reference: Callable[[], Any]) -> float:
        def repeat(function: Callable[[], Any], count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                function()
            return time.perf_counter() - start

        repeat(call, 5)
        count = max(1, int(SPAN / repeat(reference, 5) * 5))
        ratios = []
        for i in range(PAIRS):  # alternates which goes first
            order = (call, reference) if i % 2 else (reference, call)
            taken = {function: repeat(function, count) for function in order}
            ratios.append(taken[call] / taken[reference])
        return statistics.median(ratios)

    return {
        f"{metric}, of {name}": Measured(lambda a=calls[metric], b=reference[metric]: ratio(a, b))
        for name, reference in references.items()
        for metric in calls
    }


def together(size: int) -> dict[str, Measured]:
    """Returns the ratios of this library to a dict and a tuple, and of the tuple to the dict."""
    tree, nested, bare = ours(size), by_dict(size), by_tuple(size)
    floor = over(bare, {"dict": nested})
    ratios = over(tree, {"dict": nested, "tuple": bare})
    return {**ratios, **{f"the tuple's {metric}": call for metric, call in floor.items()}}


SPAN, PAIRS = 0.001, 101  # seconds per span, spans of each call
FLOOR = "the floor is the tuple, measured the same way"
NODE = "jax calls Python once for a custom class, see `least node` in the flatten case"
NOISE = "two processes of one program differ by as much"
When = Callable[[int], bool]
FEW: When = lambda size: size < 100  # noqa: E731
MANY: When = lambda size: size >= 100  # noqa: E731
DEEP: When = lambda size: size > 100  # noqa: E731
ANY: When = lambda size: True  # noqa: E731
PACKED = "paramtree packed"
CONTENDERS = {
    "paramtree": ours,
    PACKED: packed,
    "dict": by_dict,
    "tuple": by_tuple,
    "Equinox": spared(equinox),
    "NNX": spared(nnx),
    "Linen": spared(linen),
    "Haiku": spared(haiku),
}

CASES = [
    Case(
        name="mlp",
        title="Jitted calls of an MLP of tiny layers",
        sizes=(10, 100, 400),
        contenders=CONTENDERS,
        bounds=(
            Bound("forward", "dict", 0.7, when=DEEP, why=FLOOR),
            Bound("forward", "tuple", 1.05, when=DEEP, why=NOISE),
            Bound("SGD step", "dict", 0.9, when=DEEP, why=FLOOR),
            Bound("SGD step", "tuple", 1.05, when=DEEP, why=NOISE),
            Bound("Adam step", "dict", 0.9, when=DEEP, why=FLOOR),
            Bound("Adam step", "dict", 0.4, ours=PACKED),
        ),
        size="layers",
        rounds=2,
        turns=7,
        slice=0.02,
        smoke=(2,),
        packages=("equinox", "flax", "dm-haiku", "optax"),
        cached=True,
        note=(
            "Layers of 8 units with a bias and a relu, a batch of one. Each call is jitted and blocks "
            "until ready: `jax.jit` for trees, dicts and tuples (Linen's and Haiku's parameters are "
            "dicts), `filter_jit` for Equinox, `nnx.jit` and `nnx.Optimizer` for NNX. SGD is written "
            "by hand, Adam is optax's. Linen and Haiku store transposed weights, and run with 10 "
            "layers only, because their calls are those of a dict. With 400 layers Equinox is the only "
            "peer, without an Adam step: XLA would compile for minutes. Two processes of the same "
            "program differ by up to a tenth here, so the bounds up to 100 layers are in the next "
            "case; those with 400, where tracing takes most of a minute, are here."
        ),
    ),
    Case(
        name="mlp_over",
        title="The same calls over those of a dict and of a bare tuple, in one process",
        sizes=(10, 100),
        contenders={
            "paramtree": together,
        },
        bounds=tuple(
            Bound(f"{metric}, of {name}", None, limit, when=when, why=why)
            for metric, name, limit, when, why in (
                ("forward", "dict", 1.0, FEW, ""),
                ("forward", "dict", 0.7, MANY, FLOOR),
                ("forward", "tuple", 1.05, ANY, NODE),
                ("SGD step", "dict", 1.0, FEW, ""),
                ("SGD step", "dict", 0.9, MANY, FLOOR),
                ("SGD step", "tuple", 1.05, ANY, NODE),
                ("Adam step", "dict", 0.9, ANY, FLOOR),
            )
        ),
        unit="x",
        size="layers",
        rounds=3,
        turns=1,
        seconds=60,
        smoke=(2,),
        packages=("optax",),
        cached=True,
        note=(
            "Both are called in turns of a millisecond in one process, in three processes. The floor "
            "is the tuple: jax only passes its leaves on."
        ),
    ),
    Case(
        name="adam_wide",
        title="An Adam step of 24 layers of 512",
        sizes=(24,),
        contenders={name: wide(CONTENDERS[name]) for name in ("paramtree", PACKED, "dict", "tuple")},
        bounds=(
            Bound("Adam step", "dict", 1.05),
            Bound("Adam step", "dict", 1.05, ours=PACKED),
        ),
        size="layers",
        slice=0.1,
        turns=9,
        rounds=2,
        seconds=60,
        smoke=(2,),
        packages=("optax",),
        cached=True,
        note="Arithmetic dominates; one vector of all parameters costs more than it saves here.",
    ),
]
