"""A training step of ``examples/fashion_mnist.py`` beside the same step by hand on a nested dict.

By hand the tied layer is one entry of the dict, which is used twice, and the update is written out.
The two are run in turn in one process, a few steps at a time and each first in every other turn; as
machines drift, the ratio of a round is the median of those of its turns. Each goes on from its own
parameters, whose buffers it donates. The goal is a ratio of at most 1.03.

Run with ``python benchmarks/fashion_step.py``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import paramtree as pt

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.fashion_mnist import make_step, network

RATE = 0.01  # so that the noise they learn from does not drive them to where numbers are slow
NAMES = {"hidden": "dense0", "shared": "dense1", "out": "dense3"}


def hand_loss(p: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Returns the loss and the accuracy of the network in plain JAX."""
    for name in ("hidden", "shared", "shared"):
        x = jax.nn.relu(x @ p[name]["weight"].T + p[name]["bias"])
    logits = x @ p["out"]["weight"].T + p["out"]["bias"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == y)


@partial(jax.jit, donate_argnums=0)
def hand_step(p: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """Returns the next parameters, the loss and the accuracy."""
    (loss, accuracy), grads = jax.value_and_grad(hand_loss, has_aux=True)(p, x, y)
    return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, p, grads), loss, accuracy


def contestants(x: Any, y: Any) -> dict[str, Callable[[int], float]]:
    """Returns for either way a function that takes some steps and returns the seconds of one."""
    net, tx = network(), optax.sgd(RATE)
    params = pt.init(net, jax.random.key(0), x)
    by_hand: Any = {
        name: jax.tree.map(jnp.copy, params[ours].to_dict()) for name, ours in NAMES.items()
    }
    state, step = tx.init(params), make_step(net, tx)

    def ours(steps: int) -> float:
        nonlocal params, state
        start = time.perf_counter()
        for _ in range(steps):
            params, state, loss, _ = step(params, state, x, y)
        loss.block_until_ready()
        jax.block_until_ready(params)
        return (time.perf_counter() - start) / steps

    def hand(steps: int) -> float:
        nonlocal by_hand
        start = time.perf_counter()
        for _ in range(steps):
            by_hand, loss, _ = hand_step(by_hand, x, y)
        loss.block_until_ready()
        jax.block_until_ready(by_hand)
        return (time.perf_counter() - start) / steps

    return {"ours": ours, "hand": hand}


def main() -> None:
    """Prints a line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of which the ratios are shown")
    parser.add_argument("--turns", type=int, default=40, help="of each round")
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1])
    args = parser.parse_args()
    for batch_size in args.batch_sizes:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.random((batch_size, 784), np.float32))
        y = jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32)
        cases = contestants(x, y)
        for case in cases.values():
            case(10)  # compiles
        times: dict[str, list[float]] = {name: [] for name in cases}
        ratios = []
        for _ in range(args.rounds):
            for turn in range(args.turns):
                for name in sorted(cases, reverse=turn % 2 == 1):
                    times[name].append(cases[name](args.steps) * 1e6)
            pairs = zip(times["ours"][-args.turns :], times["hand"][-args.turns :], strict=True)
            ratios.append(statistics.median(ours / hand for ours, hand in pairs))
        ours, hand = (statistics.median(times[name]) for name in ("ours", "hand"))
        spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {args.rounds} rounds"
        print(
            f"batch of {batch_size}: ours {ours:.0f} us, by hand {hand:.0f} us a step; "
            f"ours/hand {statistics.median(ratios):.3f} ({spread})"
        )


if __name__ == "__main__":
    main()
