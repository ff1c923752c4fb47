"""Tracing, lowering, compiling and running a train step of many alike blocks, unrolled and repeated."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite import transformers
from benchmarks.suite.case import Absent, Bound, Case

RATE = 1e-3
HAND = "by hand"
REPEAT = "paramtree Repeat"
SCAN = "lax.scan by hand"
LINEN_SCAN = "Linen nn.scan"
NOISE = "XLA gets the same program; the rounds show the noise between two processes"
MOST = {"paramtree": 96, HAND: 48}  # blocks, unrolled: 96 take XLA a quarter of a minute or more
LOOPS = (REPEAT, SCAN, LINEN_SCAN)
HOWS = (*MOST, *LOOPS)


def net_of(blocks: int, how: str) -> tuple[Callable[[Any, Any], Any], Any]:
    """Returns a model, as a function of parameters and inputs, and its parameter shapes."""
    import jax

    import paramtree as pt

    x, key = transformers.inputs(), jax.random.key(0)
    if how in ("Linen", LINEN_SCAN):
        module = transformers.linen(blocks, scan=how == LINEN_SCAN)
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
    net = transformers.ours(blocks, repeat=how in (REPEAT, SCAN))
    params = pt.abstract(net, x)
    if how in (HAND, SCAN):
        return transformers.by_hand(blocks, scan=how == SCAN), params.to_dict()
    return net, params


def step_of(model: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Returns an SGD step as a new function, so that nothing is cached for it."""
    import jax
    import jax.numpy as jnp

    def step(p: Any, x: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(model(p, x) ** 2))(p)
        return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, p, grads), loss

    return step


def contender_of(how: str) -> Callable[[int], dict[str, float]]:
    """Returns a contender that traces, lowers and compiles once, and runs; the others only trace."""

    def contender(blocks: int) -> dict[str, float]:
        import jax

        most = blocks if how in LOOPS else MOST.get(how, 12)
        if blocks > most:
            raise Absent(f"more than {most} blocks take too long")
        x = transformers.inputs()
        model, params = net_of(1, how)
        small = jax.jit(step_of(model)).trace(params, x)
        if how in HOWS:
            small.lower().compile()  # warms up lazy imports and caches
        model, params = net_of(blocks, how)
        taken = []
        for _ in range(3 if how in LOOPS else 1):  # a hundred times faster than the others
            start = time.perf_counter()
            traced = jax.jit(step_of(model)).trace(params, x)
            taken.append(time.perf_counter() - start)
        if how not in HOWS:
            return {"trace": min(taken)}
        start = time.perf_counter()
        lowered = traced.lower()
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        times = {"trace": min(taken), "lower": middle - start, "compile": end - middle}
        times["step"] = step_time(compiled, params, x)
        if how in (HAND, SCAN) and blocks <= 12:
            check(how == SCAN)  # last, because it compiles too
        memory = compiled.memory_analysis()
        return times if memory is None else {**times, "memory": float(memory.temp_size_in_bytes)}

    return contender


def step_time(compiled: Any, shapes: Any, x: Any) -> float:
    """Returns the least time of a step, of those that a second has, or ten."""
    import jax
    import jax.numpy as jnp

    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)
    taken: list[float] = []
    while len(taken) < 10 or sum(taken) < 1:
        start = time.perf_counter()
        params, _ = jax.block_until_ready(compiled(params, x))
        taken.append(time.perf_counter() - start)
    return min(taken)


def check(scan: bool) -> None:
    """Raises if the program by hand and this library's differ in their output."""
    import jax
    import numpy as np

    x = transformers.inputs()
    net = transformers.ours(2, repeat=scan)
    params = net.init(jax.random.key(0), x)
    y = transformers.by_hand(2, scan=scan)(params.to_dict(), x)
    np.testing.assert_allclose(y, net(params, x), rtol=1e-5, atol=1e-6)


CASES = [
    Case(
        name="compile",
        title="A train step of a transformer: tracing, compiling, running",
        sizes=(12, 48, 96),
        contenders={how: contender_of(how) for how in (*HOWS, "Linen", "NNX", "Equinox")},
        bounds=(
            *(
                Bound(metric, HAND, 1.05, when=lambda size: size <= 48, why=NOISE)
                for metric in ("trace", "lower", "compile", "step", "memory")
            ),
            *(
                Bound(metric, (SCAN, LINEN_SCAN), limit, ours=REPEAT, why=NOISE)
                for metric, limit in (("compile", 1.1), ("step", 1.05), ("memory", 1.05))
            ),
            *(
                Bound(metric, REPEAT, 1.1, ours=REPEAT, base=12, when=lambda size: size == 96)
                for metric in ("trace", "compile")
            ),
        ),
        units={"memory": "bytes"},
        size="blocks",
        rounds=2,
        seconds=60,
        smoke=(1,),
        alone=True,
        limit=600,
        packages=("equinox", "flax"),
        note=(
            "The loss, its gradient and SGD, over blocks of 64 units, each once in a new process, "
            "after a warm-up with one block; the step is the least of a second. Memory is what XLA "
            "allocates for temporaries. The programs by hand have the arithmetic of paramtree's; "
            "paramtree traces the attention of the first block, and the others reuse it."
        ),
    ),
]
