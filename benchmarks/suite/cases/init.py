"""Initialisation in a new process: how long until all parameters are there, and the most memory."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite import transformers
from benchmarks.suite.case import Absent, Case

Make = Callable[[int, int], tuple[Callable[..., Any], tuple[Any, ...]]]


def ours(blocks: int, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    net = transformers.ours(blocks, width)
    return net.init, (transformers.inputs(width),)


def linen(blocks: int, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return transformers.linen(blocks, width).init, (transformers.inputs(width),)


def haiku(blocks: int, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return transformers.haiku(blocks, width).init, (transformers.inputs(width),)


def equinox(blocks: int, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import equinox as eqx

    net = transformers.equinox(blocks, width)
    return lambda key: eqx.filter(net(key), eqx.is_array), ()


def nnx(blocks: int, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from flax import nnx

    net = transformers.nnx(blocks, width)
    return lambda key: nnx.state(net(key), nnx.Param), ()


def timed(make: Make, jitted: bool = False, most: int | None = None) -> Callable[[int], Any]:
    """Returns the contender that initialises once, in a process that has done nothing else."""

    def contender(blocks: int) -> dict[str, float]:
        if most is not None and blocks > most:
            raise Absent(f"at more than {most} blocks: it takes minutes to compile")
        import jax

        init, args = make(blocks, transformers.WIDTH)
        jax.block_until_ready(args)
        start = time.perf_counter()
        params = (jax.jit(init) if jitted else init)(jax.random.key(0), *args)
        jax.block_until_ready(params)
        return {"init": time.perf_counter() - start}

    return contender


PEERS = {"Linen": linen, "NNX": nnx, "Equinox": equinox, "Haiku": haiku}
CASES = [
    Case(
        name="init",
        title="Cold initialisation of a transformer",
        sizes=(4, 24, 96),
        contenders={
            "paramtree": timed(ours),
            "paramtree jitted": timed(ours, jitted=True),
            **{name: timed(make) for name, make in PEERS.items()},
            **{f"{name} jitted": timed(make, True, 24) for name, make in PEERS.items()},
        },
        size="blocks",
        rounds=3,
        seconds=120,
        smoke=(1,),
        packages=("equinox", "flax", "dm-haiku"),
        alone=True,
        limit=600,
    ),
]
