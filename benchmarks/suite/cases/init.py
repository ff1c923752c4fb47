"""Initialization in a new process: time until all parameters are ready, and peak memory."""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.suite import transformers
from benchmarks.suite.case import Absent, Bound, Case

Init = tuple[Callable[..., Any], tuple[Any, ...]]  # a function, and its arguments after the key
Make = Callable[[int, int], Init]


def ours(blocks: int, width: int) -> Init:
    net = transformers.ours(blocks, width)
    return net.init, (transformers.inputs(width),)


def linen(blocks: int, width: int) -> Init:
    return transformers.linen(blocks, width).init, (transformers.inputs(width),)


def haiku(blocks: int, width: int) -> Init:
    return transformers.haiku(blocks, width).init, (transformers.inputs(width),)


def equinox(blocks: int, width: int) -> Init:
    import equinox as eqx

    net = transformers.equinox(blocks, width)
    return lambda key: eqx.filter(net(key), eqx.is_array), ()


def nnx(blocks: int, width: int) -> Init:
    from flax import nnx

    net = transformers.nnx(blocks, width)
    return lambda key: nnx.state(net(key), nnx.Param), ()


PEERS: dict[str, Make] = {"Linen": linen, "NNX": nnx, "Equinox": equinox, "Haiku": haiku}


def timed(make: Make, jitted: bool = False, most: int | None = None) -> Callable[[int], Any]:
    """Returns a contender that initializes once in a fresh process."""

    def contender(blocks: int) -> dict[str, float]:
        if most is not None and blocks > most:
            raise Absent(f"more than {most} blocks take too long")
        import jax

        init, args = make(blocks, transformers.WIDTH)
        jax.block_until_ready(args)
        start = time.perf_counter()
        params = (jax.jit(init) if jitted else init)(jax.random.key(0), *args)
        jax.block_until_ready(params)
        return {"init": time.perf_counter() - start}

    return contender


@contextmanager
def peak() -> Iterator[list[int]]:
    """Yields a list, and appends the peak growth of resident memory to it; needs Linux."""
    if not Path("/proc/self/clear_refs").exists():
        raise Absent("only Linux can reset the peak memory of a process")

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    growth: list[int] = []
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc keeps would hide growth
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    yield growth
    growth.append(status("VmHWM") - before)


def most_memory(make: Make, how: str = "") -> Callable[[int], Any]:
    """Returns a contender that measures peak memory as a multiple of the parameters' bytes."""

    def contender(blocks: int) -> dict[str, float]:
        if how == "sharded":
            if "jax" in sys.modules:  # in a smoke run, contenders share a process
                raise Absent("the number of devices must be set before jax is loaded")
            os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        width = WIDE if blocks > 1 else 64
        init, args = make(blocks, width)
        key = jax.random.key(0)
        options = {}
        if how == "sharded":
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            options = {"shardings": NamedSharding(mesh, PartitionSpec("devices"))}
        # Warm up: a net of one block compiles the same leaves.
        small_init, small_args = make(1, width)
        jax.block_until_ready(small_init(key, *small_args, **options))
        if how == "jitted":
            init = jax.jit(init).lower(key, *args).compile()
        with peak() as growth:
            params = init(key, *args, **options)
            jax.block_until_ready(params)
        return {"peak": growth[0] / sum(leaf.nbytes for leaf in jax.tree.leaves(params))}

    return contender


def llama(repeat: bool, tiny: bool) -> Any:
    """Returns a net of 32 blocks with Llama's layers, of seven billion parameters unless tiny."""
    from paramtree import nn

    width, heads, hidden, vocabulary = (64, 4, 128, 512) if tiny else (4096, 32, 11008, 32000)
    attend = nn.MultiHeadAttention(heads, causal=True, rotary=True, use_bias=False)

    def block() -> Any:
        return nn.Sequential(
            nn.Residual(norm=nn.RMSNorm(), attend=attend),
            nn.Residual(norm=nn.RMSNorm(), mlp=nn.GatedMLP(hidden)),
        )

    blocks = nn.Repeat(block(), 32) if repeat else nn.Sequential(*[block() for _ in range(32)])
    return nn.Sequential(
        embed=nn.Embedding(vocabulary, width),
        blocks=blocks,
        norm=nn.RMSNorm(),
        head=nn.Dense(vocabulary, use_bias=False, flatten=False),
    )


def from_shapes(repeat: bool) -> Callable[[str], dict[str, float]]:
    """Returns a contender that lowers a sharded initialisation from shapes, or runs a tiny one."""

    def contender(size: str) -> dict[str, float]:
        if "jax" in sys.modules:  # in a smoke run, contenders share a process
            raise Absent("the number of devices must be set before jax is loaded")
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        import jax
        import numpy as np
        from jax.sharding import Mesh, PartitionSpec

        import paramtree as pt

        net, tokens = llama(repeat, size == "tiny"), jax.ShapeDtypeStruct((1, 16), "int32")
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        split = (None, "devices") if repeat else ("devices",)
        key = jax.random.key(0)
        start = time.perf_counter()
        # Those of the blocks in a Repeat have an axis of copies in front.
        rules = {
            ".*gamma": PartitionSpec(),
            "blocks_.*": PartitionSpec(*split),
            ".*": PartitionSpec("devices"),
        }
        places = pt.shardings(pt.abstract(net, tokens), mesh, rules)
        found = time.perf_counter()
        if size == "tiny":
            jax.block_until_ready(pt.init(net, key, tokens, shardings=places))
            return {"first value": time.perf_counter() - start}
        init = jax.jit(lambda key: pt.init(net, key, tokens), out_shardings=places)
        traced = init.trace(key)
        middle = time.perf_counter()
        traced.lower()
        end = time.perf_counter()
        return {"shardings": found - start, "trace": middle - found, "lower": end - middle}

    return contender


WIDE = 512
TOLD = "most of it is tracing the model for its shapes, which NNX and Equinox get as arguments"
KEPT = "about 35 MB of it are temporaries that malloc keeps, whatever the size of the model"
EAGER = tuple(PEERS)
MOST = {"Linen": 4, "Haiku": 4}  # blocks; these two are slower
JITTED = ("Linen jitted", "Equinox jitted")
CASES = [
    Case(
        name="init",
        title="Cold initialisation of a transformer",
        sizes=(4, 24, 96),
        contenders={
            "paramtree": timed(ours),
            "paramtree jitted": timed(ours, True, 4),
            **{name: timed(make, most=MOST.get(name)) for name, make in PEERS.items()},
            **{name: timed(PEERS[name.split()[0]], True, 4) for name in JITTED},
        },
        bounds=(
            Bound("init", (*EAGER, *JITTED), 0.7, when=lambda size: size <= 24, why=TOLD),
            Bound("init", EAGER, 0.6, when=lambda size: size == 96, why=TOLD),
            Bound("init", JITTED, 0.7, ours="paramtree jitted", when=lambda size: size <= 4),
            Bound("init", "paramtree", 4.0, base=24, when=lambda size: size == 96),
        ),
        size="blocks",
        rounds=2,
        seconds=60,
        smoke=(1,),
        packages=("equinox", "flax", "dm-haiku"),
        alone=True,
        limit=600,
        note=(
            "Pre-norm blocks of 64 units with four heads. Each runs once in a new process, timed from "
            "after the imports until all parameters are ready: tracing, compilation and computation. "
            "paramtree's weights are truncated normals here, like those of Linen, NNX and Haiku; "
            "Equinox's are uniform. Under `jit`, XLA compiles each of the peers' leaves separately: 24 "
            "blocks take 20 to 45 seconds, so they run with 4 only."
        ),
    ),
    Case(
        name="init_memory",
        title="The most memory that initialisation takes, over that of the parameters",
        sizes=(48,),
        contenders={
            "paramtree": most_memory(ours),
            "paramtree jitted": most_memory(ours, "jitted"),
            "paramtree sharded": most_memory(ours, "sharded"),
            **{name: most_memory(PEERS[name]) for name in ("NNX", "Equinox")},
        },
        bounds=(
            Bound("peak", None, 1.1, why=KEPT),
            Bound("peak", None, 1.1, ours="paramtree sharded"),
            Bound("peak", None, 1.2, ours="paramtree jitted"),
        ),
        unit="x",
        size="blocks",
        rounds=2,
        seconds=60,
        smoke=(1,),
        packages=("equinox", "flax", "dm-haiku"),
        turns=1,
        limit=600,
        note=(
            f"{WIDE} units, {576:,} MiB of parameters, the largest leaf 4 MiB. The peak growth of the "
            "process's resident memory after everything is compiled. Sharded: the first axis of all "
            "leaves over eight CPU devices. Jitted: alike leaves are made in few loops, which compile "
            "in a tenth of the time that leaf by leaf takes, and which share what memory they need "
            "beside the leaves."
        ),
    ),
    Case(
        name="init_sharded",
        title="A sharded initialisation of seven billion parameters from shapes",
        sizes=("7B", "tiny"),
        contenders={"paramtree": from_shapes(False), "paramtree Repeat": from_shapes(True)},
        bounds=(
            Bound("lower", None, 5.0, when=lambda size: size == "7B"),
            Bound("lower", None, 5.0, ours="paramtree Repeat", when=lambda size: size == "7B"),
        ),
        size="",
        rounds=2,
        seconds=30,
        smoke=("tiny",),
        alone=True,
        note=(
            "32 blocks with Llama's layers, 6.7 billion parameters, on eight CPU devices. 7B: "
            "`pt.abstract` and `pt.shardings`, then `jax.jit(init, out_shardings=)` is traced and "
            "lowered; nothing is allocated. Tiny: the same net of 64 units, until all values are "
            "there, with compilation."
        ),
    ),
]
