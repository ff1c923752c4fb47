"""The language model of ``char_lm.py``, sharded over many devices by a short rule table.

A table maps weights to partition specs. Nothing else changes: not the network, not the step, not the
results. ``data`` shards the batch; ``fsdp`` also shards parameters and optimiser state, and devices
gather a weight when they need it; ``tensor`` shards the arithmetic within a layer, so that no device
ever holds a full weight; ``both`` combines ``fsdp`` and ``tensor`` on a mesh of two axes. The decoder
and the embedding are one leaf, so they are sharded once.

Run it with ``python -m examples.sharded_lm --table tensor`` on any devices. It needs optax. For eight
CPU devices, set ``XLA_FLAGS=--xla_force_host_platform_device_count=8``.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paramtree as pt
from examples import char_lm
from paramtree import nn

# Block weights are stacked over all blocks: the first dimension is the layer.
INTO, BACK = r"blocks_.*_(query|key|value|widen)_weight", r"blocks_.*_(out|narrow)_weight"


class Table(NamedTuple):
    """How to shard a network: the mesh shape, and the rules for its parameters."""

    mesh: Callable[[int], tuple[int, int]]  # device count -> (data, model)
    rules: dict[str, Any]


TABLES = {
    "data": Table(lambda n: (n, 1), {".*": None}),
    "fsdp": Table(
        lambda n: (n, 1),
        {"(embed|decoder)_weight": P("data"), ".*weight": P(None, "data"), ".*": None},
    ),
    "tensor": Table(
        lambda n: (1, n),
        {
            "(embed|decoder)_weight": P("model", None),
            INTO: P(None, "model", None),
            BACK: P(None, None, "model"),
            ".*_widen_bias": P(None, "model"),
            ".*": None,
        },
    ),
    "both": Table(
        lambda n: (2, n // 2) if n % 2 == 0 else (1, n),
        {
            "(embed|decoder)_weight": P("model", "data"),
            INTO: P(None, "model", "data"),
            BACK: P(None, "data", "model"),
            ".*_widen_bias": P(None, "model"),
            ".*": None,
        },
    ),
}


class Sharded(NamedTuple):
    """A network on a mesh, with the shardings of its parameters, optimiser state and batch."""

    net: nn.Sequential
    mesh: Mesh
    params: Any
    state: Any
    batch: NamedSharding


def sharded(settings: char_lm.Settings, table: Table, lr: float, devices: Sequence[Any]) -> Sharded:
    """Returns the shardings of a step's arguments; one table covers parameters and optimiser state.

    Args:
      settings: the network's settings.
      table: how to shard it.
      lr: the learning rate.
      devices: the devices to shard it over.

    Raises:
      RuleError: a dimension is not divisible by its mesh axes.
    """
    mesh = Mesh(np.array(devices).reshape(table.mesh(len(devices))), ("data", "model"))
    rows = NamedSharding(mesh, P("data"))
    # Without this the compiler may gather a batch to multiply it by a shard of a weight.
    keep_rows = nn.Lambda(partial(jax.lax.with_sharding_constraint, shardings=rows))
    net = char_lm.network(settings, between=keep_rows)
    shapes = pt.abstract(net, char_lm.ONE, ties=char_lm.TIES)
    state = jax.eval_shape(char_lm.make_tx(lr).init, shapes)
    return Sharded(
        net,
        mesh,
        pt.shardings(shapes, mesh, table.rules),
        pt.shardings(state, mesh, table.rules),
        rows,
    )


def begin(where: Sharded, lr: float, seed: int) -> tuple[Any, Any]:
    """Returns new parameters and optimiser state; each device computes its own shards."""
    params = pt.init(
        where.net, jax.random.key(seed), char_lm.ONE, ties=char_lm.TIES, shardings=where.params
    )
    make_state = jax.jit(char_lm.make_tx(lr).init, out_shardings=where.state)
    return params, make_state(params)


def make_step(where: Sharded, lr: float) -> Any:
    """Returns the compiled step, ``(params, state, tokens) -> (params, state, loss)``.

    It is the step of ``char_lm`` with shardings for its arguments and results.
    """
    return jax.jit(
        partial(char_lm.take_step, where.net, lr, key=None),
        in_shardings=(where.params, where.state, where.batch),
        out_shardings=(where.params, where.state, None),
        donate_argnums=(0, 1),
    )


def put_batch(where: Sharded, tokens: Any) -> Any:
    """Returns a batch, (batch, length), sharded by rows."""
    return jax.make_array_from_callback(tokens.shape, where.batch, lambda index: tokens[index])


def train(where: Sharded, data: char_lm.Data, args: argparse.Namespace) -> tuple[Any, list[float]]:
    """Returns the trained parameters and the loss of every step."""
    params, state = begin(where, args.lr, args.seed)
    step = make_step(where, args.lr)
    losses = []
    for i in range(args.steps):
        tokens = char_lm.batch_at(data.train, i, args.batch_size, args.context, args.seed)
        params, state, loss = step(params, state, put_batch(where, tokens))
        losses.append(loss)
        if (i + 1) % args.every == 0 or i + 1 == args.steps:
            print(f"step {i + 1}: loss {float(loss):.4f}", flush=True)
    return params, [float(loss) for loss in losses]


def add_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Adds the options of training."""
    char_lm.add_options(parser, steps)
    parser.set_defaults(width=128, heads=8, every=20)
    parser.add_argument("--table", choices=sorted(TABLES), default="tensor", help="how to shard it")


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Trains, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description="Trains a small GPT, sharded by a rule table.")
    add_options(parser, steps=100)
    args = parser.parse_args(argv)
    if args.dropout:
        parser.error("--dropout is not supported in this example")
    settings = char_lm.Settings(args.width, args.layers, args.heads)
    try:
        where = sharded(settings, TABLES[args.table], args.lr, jax.devices())
        data = char_lm.load_data()
    except (OSError, pt.RuleError) as error:
        parser.error(str(error))
    shapes = pt.abstract(where.net, char_lm.ONE, ties=char_lm.TIES)
    print(f"{args.table}: {dict(where.mesh.shape)}")
    pt.show_sharding(shapes, where.params)
    params, losses = train(where, data, args)
    assert params.decoder.weight is params.embed.weight  # still one leaf, sharded once
    return losses


if __name__ == "__main__":
    main()
