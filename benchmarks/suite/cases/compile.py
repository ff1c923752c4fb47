"""Tracing, lowering and compiling a train step."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite import transformers
from benchmarks.suite.case import Absent, Bound, Case

RATE = 1e-3
HAND = "by hand"
REPEAT = "paramtree Repeat"
NOISE = "XLA gets the same program; the rounds show the noise between two processes"
HOWS = ("paramtree", REPEAT, HAND)


def net_of(blocks: int, how: str) -> tuple[Callable[[Any, Any], Any], Any]:
    """Returns a model, as a function of parameters and inputs, and its parameter shapes."""
    import jax

    import paramtree as pt

    x, key = transformers.inputs(), jax.random.key(0)
    if how == "Linen":
        module = transformers.linen(blocks)
        return module.apply, jax.eval_shape(module.init, key, x)
    if how == "Equinox":
        import equinox as eqx

        arrays, static = eqx.partition(
            eqx.filter_eval_shape(transformers.equinox(blocks), key),
            lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
        )
        return lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays
    if how == "NNX":
        from flax import nnx

        graph, state = nnx.split(nnx.eval_shape(lambda: transformers.nnx(blocks)(0)))
        return lambda p, x: nnx.merge(graph, p)(x), state
    net = transformers.ours(blocks, repeat=how == REPEAT)
    params = pt.abstract(net, x)
    return (transformers.by_hand(blocks), params.to_dict()) if how == HAND else (net, params)


def step_of(model: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Returns an SGD step as a new function, so that nothing is cached for it."""
    import jax
    import jax.numpy as jnp

    def step(p: Any, x: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(model(p, x) ** 2))(p)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, p, grads), loss

    return step


def contender_of(how: str) -> Callable[[int], dict[str, float]]:
    """Returns a contender that traces, lowers and compiles once; peers only trace."""

    def contender(blocks: int) -> dict[str, float]:
        import jax

        if how not in HOWS and blocks > 24:
            raise Absent("more than 24 blocks take too long")
        x = transformers.inputs()
        model, params = net_of(1, how)
        small = jax.jit(step_of(model)).trace(params, x)
        if how in HOWS:
            small.lower().compile()  # warms up lazy imports and caches
        model, params = net_of(blocks, how)
        taken = []
        for _ in range(3 if how == REPEAT else 1):  # a hundred times faster than the others
            start = time.perf_counter()
            traced = jax.jit(step_of(model)).trace(params, x)
            taken.append(time.perf_counter() - start)
        if how not in HOWS:
            return {"trace": min(taken)}
        start = time.perf_counter()
        lowered = traced.lower()
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        if how == HAND and blocks <= 24:
            check(model)  # last, because it compiles too
        return {"trace": min(taken), "lower": middle - start, "compile": end - middle}

    return contender


def check(hand: Callable[[Any, Any], Any]) -> None:
    """Raises if the program by hand and this library's differ in their output."""
    import jax
    import numpy as np

    x = transformers.inputs()
    net = transformers.ours(1)
    params = net.init(jax.random.key(0), x)
    y = transformers.by_hand(1)(params.to_dict(), x)
    np.testing.assert_allclose(y, net(params, x), rtol=1e-5, atol=1e-6)


CASES = [
    Case(
        name="compile",
        title="Tracing and compiling a train step of a transformer",
        sizes=(24, 96),
        contenders={how: contender_of(how) for how in (*HOWS, "Linen", "NNX", "Equinox")},
        bounds=(
            Bound("trace", HAND, 1.05, why=NOISE),
            Bound("trace", REPEAT, 1.1, ours=REPEAT, base=24, when=lambda size: size == 96),
            Bound("lower", HAND, 1.05, why=NOISE),
            Bound("compile", HAND, 1.05, why=NOISE),
            Bound("compile", REPEAT, 1.1, ours=REPEAT, base=24, when=lambda size: size == 96),
        ),
        size="blocks",
        rounds=2,
        seconds=60,
        smoke=(1,),
        alone=True,
        limit=600,
        packages=("equinox", "flax"),
        note=(
            "The loss, its gradient and SGD, over blocks of 64 units, each once in a new process, "
            "after a warm-up with one block. paramtree and the program by hand give XLA the same "
            "program."
        ),
    ),
]
