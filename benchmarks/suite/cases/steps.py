"""Training steps of whole nets against Flax NNX, and of an LSTM against PyTorch, in one process."""

import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite import nets
from benchmarks.suite.case import Bound, Case, Measured

RATE = 1e-3
TURNS, SECONDS = 15, 5.0  # a ratio takes as many turns of each, or more up to this time

Call = Callable[[], Any]


def seconds_of(size: str) -> float:
    """Returns how long a ratio takes; the smoke run's takes a turn of each."""
    return 0 if size.endswith("tiny") else SECONDS


def over(call: Call, reference: Call, seconds: float) -> Measured:
    """Returns the ratio of the least times of two calls that take turns in one process."""

    def timed(function: Call) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def ratio() -> float:
        taken: dict[Call, list[float]] = {call: [], reference: []}
        until = time.monotonic() + seconds
        turns = TURNS if seconds else 1
        while len(taken[call]) < turns or time.monotonic() < until:
            order = (call, reference) if len(taken[call]) % 2 else (reference, call)
            for function in order:
                taken[function].append(timed(function))
        return min(taken[call]) / min(taken[reference])

    return Measured(ratio)


def loss_of(logits: Any, y: Any) -> Any:
    import jax.numpy as jnp
    import optax

    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def ours(net: nets.Net) -> Call:
    """Returns a call that takes an Adam step in training, which donates what it replaces."""
    import jax
    import optax

    import paramtree as pt

    tx, model = optax.adam(RATE), pt.training(net.ours)
    params = pt.init(net.ours, jax.random.key(0), net.x)
    state = params, tx.init(pt.select(params, kind="param")), jax.random.key(1)

    def step(state: Any, x: Any, y: Any) -> Any:
        params, slots, key = state
        key, now = jax.random.split(key)

        def loss_and_state(params: Any) -> Any:
            logits, params = model(params, x, key=now)
            return loss_of(logits, y), pt.select(params, kind="state")

        (loss, kept), grads = pt.value_and_grad(loss_and_state, has_aux=True)(params)
        trained = pt.select(params, kind="param")
        updates, slots = tx.update(grads, slots, trained)
        return (pt.merge(optax.apply_updates(trained, updates), kept), slots, key), loss

    return stepping(step, state, net.x, net.y)


def nnx(make: Callable[[Any], Any], net: nets.Net) -> Call:
    """Returns a call that takes an Adam step of NNX in the functional way, the fastest of its ways."""
    import optax
    from flax import nnx

    model = make(nnx.Rngs(0))
    model.train()
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state: Any, x: Any, y: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda model: loss_of(model(x), y))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    return stepping(step, state, net.x, net.y)


def stepping(step: Callable[..., Any], state: Any, x: Any, y: Any = None) -> Call:
    """Returns a call that takes a step, compiled, from the state that the last one has left."""
    import jax

    jitted = jax.jit(step, donate_argnums=0)

    def call() -> None:
        nonlocal state
        state, loss = jitted(state, x, y)
        loss.block_until_ready()

    call()  # compiles
    return call


def over_nnx(size: str) -> dict[str, Measured]:
    name, _, tiny = size.partition(", ")
    net = nets.NETS[name](bool(tiny))
    check(net)
    ratios = {"step, of NNX": over(ours(net), nnx(net.nnx, net), seconds_of(size))}
    if net.floor is not None:
        ratios["the floor, of NNX"] = over(nnx(net.floor, net), nnx(net.nnx, net), seconds_of(size))
    return ratios


def check(net: nets.Net) -> None:
    """Raises if the two nets do not have parameters of the same sizes."""
    import jax
    from flax import nnx

    import paramtree as pt

    params = pt.select(pt.abstract(net.ours, net.x), kind="param")
    theirs = nnx.state(nnx.eval_shape(lambda: net.nnx(nnx.Rngs(0))), nnx.Param)
    sizes = [sorted(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the nets differ in the sizes of their parameters: {sizes}")


def over_torch(size: str) -> dict[str, Measured]:
    """Returns the ratio of a step of a two-layer bidirectional LSTM, each library on one thread."""
    if hasattr(os, "sched_setaffinity"):  # before either starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import torch

    torch.set_num_threads(1)
    import jax
    import jax.numpy as jnp
    import numpy as np

    import paramtree as pt

    time_, batch, given, units = (4, 2, 3, 4) if size == "tiny" else (32, 32, 64, 128)
    images = np.random.default_rng(0).normal(size=(time_, batch, given)).astype(np.float32)
    net = pt.nn.LSTM(units, num_layers=2, bidirectional=True)
    x, inputs = jnp.asarray(images), torch.from_numpy(images)
    params = pt.init(net, jax.random.key(0), x)

    def step(params: Any, x: Any, _: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(net(p, x) ** 2))(params)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, params, grads), loss

    theirs = torch.nn.LSTM(given, units, num_layers=2, bidirectional=True)
    optimizer = torch.optim.SGD(theirs.parameters(), RATE)

    def torch_step() -> None:
        optimizer.zero_grad()
        (theirs(inputs)[0] ** 2).mean().backward()
        optimizer.step()

    def plain_step(params: Any, x: Any, _: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(by_hand(p, x) ** 2))(params)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, params, grads), loss

    plain = {name: leaf + 0 for name, leaf in pt.collect(params).items()}  # the steps donate theirs
    seconds = seconds_of(size)
    return {
        "step, of PyTorch": over(stepping(step, params, x), torch_step, seconds),
        "the floor, of PyTorch": over(stepping(plain_step, plain, x), torch_step, seconds),
    }


def by_hand(params: dict[str, Any], x: Any) -> Any:
    """Returns the output of the LSTM, written with nothing but a scan for each layer and direction."""
    import jax
    import jax.numpy as jnp

    def side(name: str, x: Any, reverse: bool) -> Any:
        parts = (f"{name}_{kind}" for kind in ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"))
        given, back, *biases = (params[part] for part in parts)

        def step(state: Any, from_x: Any) -> Any:
            i, f, g, o = jnp.split(from_x + state[0] @ back.T, 4, -1)
            c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[1], back.shape[1]))
        return jax.lax.scan(step, (zeros, zeros), x @ given.T + sum(biases), reverse=reverse)[1]

    for layer in "01":
        x = jnp.concatenate([side(f"l{layer}", x, False), side(f"r{layer}", x, True)], -1)
    return x


DROPOUTS = 24
SCAN = "the floor is a scan by hand: XLA's products on one thread are slower than PyTorch's"
LAYOUT = "the floor is NNX with kernels (out, in, h, w), as PyTorch's files have them"


def compiled(who: str) -> Callable[[int], dict[str, float]]:
    """Returns a contender that compiles the gradient of a net of dropouts, once in a new process."""

    def contender(count: int) -> dict[str, float]:
        import jax
        import jax.numpy as jnp

        x, key = jnp.ones((8, 64)), jax.random.key(0)
        f, argument = dropouts(who, count, key, x)
        warm = jax.jit(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (3,)))
        warm.lower(key).compile()
        start = time.perf_counter()
        jax.jit(f).lower(argument, x).compile()
        return {"trace and compile": time.perf_counter() - start}

    return contender


def dropouts(who: str, count: int, key: Any, x: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """Returns a function of what holds the keys and of x, and the former."""
    import jax
    import jax.numpy as jnp

    if who == "paramtree":
        import paramtree as pt

        pairs = [(pt.nn.Dropout(0.1), pt.nn.Activation("tanh")) for _ in range(count)]
        net = pt.nn.Sequential(*(layer for pair in pairs for layer in pair))
        params, model = pt.init(net, key, x), pt.training(net)
        return lambda key, x: jax.grad(lambda x: model(params, x, key=key)[0].sum())(x), key
    from flax import nnx

    rngs = nnx.Rngs(0)
    graph, state = nnx.split(nnx.List([nnx.Dropout(0.1, rngs=rngs) for _ in range(count)]))

    def total(layers: Any, x: Any) -> Any:
        for layer in layers:
            x = jnp.tanh(layer(x))
        return x.sum()

    def f(state: Any, x: Any) -> Any:
        layers = nnx.merge(graph, state)
        return nnx.grad(total, argnums=1)(layers, x), nnx.state(layers)

    return f, state


CASES = [
    Case(
        name="steps",
        title="Training steps of whole nets over those of Flax NNX, in one process",
        sizes=tuple(nets.NETS),
        contenders={"paramtree": over_nnx},
        bounds=(
            Bound("step, of NNX", None, 1.0, when=lambda size: size in ("GPT", "ViT")),
            Bound("step, of NNX", None, 1.0, when=lambda size: size == "ResNet-18", why=LAYOUT),
            Bound("step, of NNX", None, 0.6, when=lambda size: size == "CNN"),
        ),
        unit="x",
        size="",
        rounds=2,
        turns=1,
        seconds=100,
        smoke=("CNN, tiny",),
        packages=("flax", "optax"),
        cached=True,
        limit=600,
        note=(
            "The loss, its gradient and Adam, with donated buffers: the ratio of the least times of "
            "two calls that take turns. NNX runs in its functional way: `nnx.split` once, `nnx.merge` "
            "in the step. Both nets have parameters of the same sizes and masks of the same shapes. "
            "GPT: four blocks of 128 units and four heads, 8 x 128 tokens, dropout of 0.1 on "
            "embeddings, probabilities and branches. ViT: the same blocks, 16 images of 32 x 32 in "
            "patches of 4 x 4. ResNet-18: 64 to 512 channels on 32 x 32, a batch of 8. CNN: three "
            "convolutions of 32 to 64 channels, each with a max pool, on 32 x 32, a batch of 64. XLA "
            "on CPU computes a kernel's gradient as (in, h, w, out), and reads it against its order in "
            "each update of Adam if the kernel is (out, in, h, w): NNX with such kernels is the floor."
        ),
    ),
    Case(
        name="steps_lstm",
        title="A step of a two-layer bidirectional LSTM over PyTorch's, in one process",
        sizes=("one thread",),
        contenders={"paramtree": over_torch},
        bounds=(Bound("step, of PyTorch", None, 1.1, why=SCAN),),
        unit="x",
        size="",
        rounds=2,
        turns=1,
        smoke=("tiny",),
        packages=("torch",),
        cached=True,
        note=(
            "128 units over 32 steps of 64 inputs, a batch of 32; SGD. Both libraries run on one "
            "thread of one core. PyTorch is no dependency of the benchmarks: install it by hand."
        ),
    ),
    Case(
        name="compile_dropout",
        title="Compiling the gradient of a net of dropouts",
        sizes=(DROPOUTS,),
        contenders={who: compiled(who) for who in ("paramtree", "NNX")},
        bounds=(Bound("trace and compile", "NNX", 1.1),),
        size="dropouts",
        rounds=2,
        smoke=(1,),
        packages=("flax",),
        alone=True,
        note="Each once in a new process. XLA takes as long for a key as for a mask.",
    ),
]
