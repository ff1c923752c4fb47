"""A train step before it first runs: tracing it, lowering it, and compiling it."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite import transformers
from benchmarks.suite.case import Bound, Case, Timed

RATE = 1e-3
HAND = "by hand"


def net_of(blocks: int, how: str) -> tuple[Callable[[Any, Any], Any], Any]:
    """Returns a model, as a function of parameters and inputs, and its parameters as shapes."""
    import jax

    import paramtree as pt

    x, key = transformers.inputs(), jax.random.key(0)
    if how == "Linen":
        module = transformers.linen(blocks)
        return module.apply, jax.eval_shape(module.init, key, x)
    if how == "Haiku":
        made = transformers.haiku(blocks)
        return made.apply, jax.eval_shape(made.init, key, x)
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
    net = transformers.ours(blocks, repeat=how == "paramtree Repeat")
    params = pt.abstract(net, x)
    return (transformers.by_hand(blocks), params.to_dict()) if how == HAND else (net, params)


def step_of(model: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Returns a step of SGD, a function that jax has not seen."""
    import jax
    import jax.numpy as jnp

    def step(p: Any, x: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(model(p, x) ** 2))(p)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, p, grads), loss

    return step


def tracing(how: str) -> Callable[[int], dict[str, Timed]]:
    """Returns the contender that traces, again and again."""

    def contender(blocks: int) -> dict[str, Timed]:
        import jax

        model, params = net_of(blocks, how)
        x = transformers.inputs()
        return {
            "trace": Timed(lambda step: step.trace(params, x), before=lambda: jax.jit(step_of(model)))
        }

    return contender


def compiling(how: str) -> Callable[[int], dict[str, float]]:
    """Returns the contender that lowers and compiles once."""

    def contender(blocks: int) -> dict[str, float]:
        import jax

        x = transformers.inputs()
        model, params = net_of(1, how)
        jax.jit(step_of(model)).lower(params, x).compile()  # loads what is loaded once
        model, params = net_of(blocks, how)
        if how == HAND:
            check(model)
        traced = jax.jit(step_of(model)).trace(params, x)
        start = time.perf_counter()
        lowered = traced.lower()
        middle = time.perf_counter()
        lowered.compile()
        return {"lower": middle - start, "compile": time.perf_counter() - middle}

    return contender


def check(hand: Callable[[Any, Any], Any]) -> None:
    """Raises if the program by hand does not compute what that of this library does."""
    import jax
    import numpy as np

    x = transformers.inputs()
    net = transformers.ours(1)
    params = net.init(jax.random.key(0), x)
    one = transformers.by_hand(1)(params.to_dict(), x)
    np.testing.assert_allclose(one, net(params, x), rtol=1e-5, atol=1e-6)


HOWS = ("paramtree", "paramtree Repeat", HAND)
CASES = [
    Case(
        name="trace",
        title="Tracing a train step of a transformer",
        sizes=(24, 96),
        contenders={how: tracing(how) for how in (*HOWS, "Linen", "NNX", "Equinox", "Haiku")},
        bounds=(
            Bound("trace", HAND, 1.05),
            Bound("trace", "paramtree Repeat", 1.1, ours="paramtree Repeat", base=24),
        ),
        size="blocks",
        rounds=2,
        turns=5,
        slice=0.1,
        seconds=60,
        smoke=(1,),
        packages=("equinox", "flax", "dm-haiku"),
        note=(
            "The loss, its gradient and SGD, over blocks of 64 units, traced again and again, each time "
            "as a function that jax has not seen."
        ),
    ),
    Case(
        name="compile",
        title="Compiling a train step of a transformer",
        sizes=(24, 96),
        contenders={how: compiling(how) for how in HOWS},
        bounds=(
            Bound("lower", HAND, 1.05),
            Bound("compile", HAND, 1.05),
            Bound("compile", "paramtree Repeat", 1.1, ours="paramtree Repeat", base=24),
        ),
        size="blocks",
        rounds=2,
        seconds=60,
        smoke=(1,),
        alone=True,
        limit=600,
        note="Each once, in a new process; XLA gets the same program of paramtree and by hand.",
    ),
]
