"""A generative adversarial network whose discriminator is spectrally normalised.

The generator learns to turn noise into points of a ring of eight Gaussians, and the discriminator to
tell its points from theirs. Each weight of the discriminator is read over its largest singular value,
so the discriminator is hardly steeper than one, however long it trains. Miyato et al., "Spectral
normalization for generative adversarial networks", 2018.

No layer knows of it: ``pt.reparametrize`` reads weights through ``pt.parametrizations.SpectralNorm``.
Its singular vectors ``u`` and ``v`` are state. A training call of the discriminator improves them, the
generator's step only reads them, and no optimiser gets them.

Run it with ``python -m examples.gan``; it needs optax. ``--plain`` trains without the normalisation,
for comparison, and ``--help`` lists the options.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from paramtree import nn

MODES, RADIUS, STD = 8, 2.0, 0.1  # of the ring
ANGLES = np.arange(MODES, dtype=np.float32) * (2 * math.pi / MODES)
CENTRES = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)  # (modes, 2)
NOISE, WIDTH, BATCH = 8, 64, 256  # sizes of the generator's input, of hidden layers, and of batches


class Gan(NamedTuple):
    """Both models and their optimisers, and the rules that the discriminator's weights are read by."""

    generator: Any
    discriminator: Any
    generator_tx: Any
    discriminator_tx: Any
    rules: dict[str, Any]


class Run(NamedTuple):
    """What a step updates: the parameters of both nets and the states of their optimisers."""

    generator: Any
    discriminator: Any
    generator_state: Any
    discriminator_state: Any


class Report(NamedTuple):
    """The losses of a step, and after it: the coverage, and the spectral norms of weights as read."""

    step: int
    discriminator_loss: float
    generator_loss: float
    near: float
    modes: int
    norms: dict[str, float]


class Result(NamedTuple):
    """The trained run and its reports."""

    run: Run
    reports: list[Report]


def sample_ring(key: jax.Array, size: int) -> jax.Array:
    """Returns points of the ring, (size, 2)."""
    mode_key, point_key = jax.random.split(key)
    modes = jax.random.randint(mode_key, (size,), 0, MODES)
    return jnp.asarray(CENTRES)[modes] + STD * jax.random.normal(point_key, (size, 2))


def coverage(points: Any) -> tuple[float, int]:
    """Returns the share of points, (n, 2), within three deviations of a mode, and how many it covers.

    A mode is covered by a quarter of the points that it would have if all had equally many.
    """
    distances = np.linalg.norm(np.asarray(points)[:, None] - CENTRES[None], axis=2)
    nearest = distances.argmin(axis=1)[distances.min(axis=1) < 3 * STD]
    counts = np.bincount(nearest, minlength=MODES)
    return len(nearest) / len(distances), int(np.sum(counts >= len(distances) / (4 * MODES)))


def make_tx(lr: float) -> optax.GradientTransformation:
    """Returns an optimiser with a short memory, since the other net moves too."""
    return optax.adam(lr, b1=0.5, b2=0.9)


def make_gan(lr: float, iterations: int, plain: bool = False) -> Gan:
    """Returns a generator, (n, noise) to (n, 2), and a discriminator, (n, 2) to (n, 1).

    The discriminator learns at twice the rate: it has to keep up with the generator to guide it.
    """
    generator, discriminator = (
        nn.Sequential(*(nn.Dense(WIDTH, activation="relu") for _ in range(2)), nn.Dense(outputs))
        for outputs in (2, 1)
    )
    rules = {} if plain else {".*weight": pt.parametrizations.SpectralNorm(iterations)}
    normalised = pt.reparametrize(discriminator, rules)
    return Gan(generator, normalised, make_tx(lr), make_tx(2 * lr), rules)


def start(gan: Gan, key: jax.Array) -> Run:
    """Returns a run that has not begun; the optimiser gets parameters only, without ``u`` and ``v``."""
    generator_key, discriminator_key = jax.random.split(key)
    generator = pt.init(gan.generator, generator_key, jnp.zeros((1, NOISE)))
    discriminator = pt.init(gan.discriminator, discriminator_key, jnp.zeros((1, 2)))
    state = gan.discriminator_tx.init(pt.select(discriminator, kind="param"))
    return Run(generator, discriminator, gan.generator_tx.init(generator), state)


def generate(gan: Gan, generator: Any, key: jax.Array, size: int = BATCH) -> jax.Array:
    """Returns generated points, (size, 2)."""
    return gan.generator(generator, jax.random.normal(key, (size, NOISE)))


def train_discriminator(gan: Gan, run: Run, key: jax.Array) -> tuple[Run, Any]:
    """Returns the run after a step of the discriminator, and its hinge loss."""
    real_key, fake_key = jax.random.split(key)
    fakes = generate(gan, run.generator, fake_key)
    points = jnp.concatenate([sample_ring(real_key, BATCH), fakes])

    def loss(params: Any) -> tuple[Any, Any]:
        scores, new = pt.training(gan.discriminator)(params, points)
        real, fake = jnp.split(scores, 2)
        return jnp.mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)), new

    (value, new), grads = pt.value_and_grad(loss, has_aux=True)(run.discriminator)
    trained, vectors = pt.partition(new, kind="param")  # the parameters, and the improved u and v
    updates, state = gan.discriminator_tx.update(grads, run.discriminator_state, trained)
    discriminator = pt.merge(optax.apply_updates(trained, updates), vectors)
    return run._replace(discriminator=discriminator, discriminator_state=state), value


def train_generator(gan: Gan, run: Run, key: jax.Array) -> tuple[Run, Any]:
    """Returns the run after a step of the generator, and its loss; the discriminator only infers."""

    def loss(generator: Any) -> Any:
        return -jnp.mean(gan.discriminator(run.discriminator, generate(gan, generator, key)))

    value, grads = jax.value_and_grad(loss)(run.generator)
    updates, state = gan.generator_tx.update(grads, run.generator_state, run.generator)
    generator = optax.apply_updates(run.generator, updates)
    return run._replace(generator=generator, generator_state=state), value


def both_steps(gan: Gan, run: Run, key: jax.Array) -> tuple[Run, Any, Any]:
    """Returns the run after a step of both nets, and their losses."""
    first, second = jax.random.split(key)
    run, discriminator_loss = train_discriminator(gan, run, first)
    run, generator_loss = train_generator(gan, run, second)
    return run, discriminator_loss, generator_loss


def spectral_norms(gan: Gan, discriminator: Any) -> dict[str, float]:
    """Returns the largest singular value of each weight of the discriminator, as it is read."""
    weights = pt.collect(pt.fold(discriminator, gan.rules), ".*weight")
    return {name: jnp.linalg.norm(weight, 2).item() for name, weight in weights.items()}


def plot(file: Path, points: Any, real: Any) -> None:
    """Saves a scatter plot of generated and real points, (n, 2) both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    for name, some in (("the ring", real), ("generated", points)):
        x, y = np.asarray(some).T
        axes.scatter(x, y, s=3, alpha=0.5, label=name)
    axes.legend(loc="center")
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains, prints, and returns the trained nets and the reports."""
    parser = argparse.ArgumentParser(description="Trains a GAN with spectral normalisation on a ring.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=500, help="steps from one report to the next")
    parser.add_argument("--lr", type=float, default=5e-4, help="the learning rate of the generator")
    # With one, as in the paper, weights are read up to 1.6 times too large early on: while one trains,
    # another singular value becomes its largest, and u and v take many iterations to turn to that.
    parser.add_argument("--iterations", type=int, default=40, help="of power iteration in each step")
    parser.add_argument("--plain", action="store_true", help="train without spectral normalisation")
    parser.add_argument("--plots", type=Path, metavar="FILE", help="where to save a scatter plot")
    args = parser.parse_args(argv)
    for name in ("steps", "every", "iterations"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is at least 1, not {getattr(args, name)}")
    if args.plots and not args.plots.parent.is_dir():
        parser.error(f"--plots: there is no folder {args.plots.parent}")
    gan = make_gan(args.lr, args.iterations, args.plain)
    init_key, train_key, test_key, ring_key = jax.random.split(jax.random.key(args.seed), 4)
    run, step, reports = start(gan, init_key), jax.jit(partial(both_steps, gan)), list[Report]()
    sample = jax.jit(partial(generate, gan, key=test_key, size=2000))
    print(
        f"{'step':>5} {'discriminator':>13} {'generator':>9} {'near':>5} {'modes':>5}  spectral norms"
    )
    for i in range(1, args.steps + 1):
        run, *losses = step(run, jax.random.fold_in(train_key, i))
        if i % args.every == 0 or i == args.steps:
            covered, norms = coverage(sample(run.generator)), spectral_norms(gan, run.discriminator)
            reports.append(Report(i, losses[0].item(), losses[1].item(), *covered, norms))
            print("{:5} {:13.3f} {:9.3f} {:5.2f} {:5}".format(*reports[-1]), end=" ")
            print(*(f"{norm:6.3f}" for norm in norms.values()))
    if args.plots:
        plot(args.plots, sample(run.generator), sample_ring(ring_key, 2000))
    return Result(run, reports)


if __name__ == "__main__":
    main()
