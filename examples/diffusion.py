"""A diffusion model that draws clothes: a small U-Net, trained on Fashion-MNIST.

The network learns to predict the noise in a noisy image, from the image, the amount of noise and the
class. Sampling starts from noise alone and takes away a little of it, 200 times. Ho et al., "Denoising
diffusion probabilistic models", 2020, with the noise schedule of Nichol and Dhariwal, "Improved
denoising diffusion probabilistic models", 2021.

The parameters that draw are a moving average of those that are trained: two trees of one structure.
The samples are saved as a picture, with a row for each class.

The default run predicts the noise of test images with a mean squared error of at most 0.12, where
predicting none has 1. Mean and deviation of the samples' pixels, in [-1, 1], are within 0.1 of those of
the test images. At least half of the samples are nearer to the mean of their own class than to those of
the other nine; of the test images, two thirds are.
Run it with ``python -m examples.diffusion``; ``--help`` lists the options.
"""

import argparse
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from examples.fashion_cnn import load_images
from examples.fashion_mnist import progress
from paramtree import initializers as init
from paramtree import nn

STEPS = 200  # from an image to noise
INIT = {
    "out_weight|.*_second_weight": init.Zero(),  # a block begins as its shortcut
    "label_weight": init.Normal(1.0),
    ".*weight": "lecun_normal",
}


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    params: Any
    average: Any  # the moving average of params
    opt_state: Any


class Result(NamedTuple):
    """What the run found."""

    average: pt.ParamTree
    loss: float  # of the noise in test images
    samples: Any  # (100, height, width, 1) in [-1, 1], ten of each class
    mean: tuple[float, float]  # of the pixels of samples and of test images
    std: tuple[float, float]
    own: tuple[float, float]  # how many samples and test images are nearest to their class's mean


# The network


class ResBlock(nn.Layer):
    """A residual block that adds the embedding of time and class in its middle.

    Maps images (batch, height, width, any) and embeddings (batch, any) to (batch, height, width,
    channels).
    """

    channels: int

    def __call__(self, p: Any, x: Any, embedding: Any) -> Any:
        y = jax.nn.silu(nn.GroupNorm(8)(p.norm0, x))
        y = nn.Conv2D(self.channels, 3, padding=1)(p.first, y)
        y = y + nn.Dense(self.channels)(p.embedding, embedding)[:, None, None]
        y = jax.nn.silu(nn.GroupNorm(8)(p.norm1, y))
        y = nn.Conv2D(self.channels, 3, padding=1)(p.second, y)
        return nn.Conv2D(self.channels, 1)(p.shortcut, x) + y


class UNet(nn.Layer):
    """Predicts noise from noisy images (batch, height, width, 1), times and classes (batch,).

    Works at a half and a quarter of the resolution, which height and width have to divide by.
    """

    width: int

    def __call__(self, p: Any, x: Any, t: Any, label: Any) -> Any:
        width = self.width
        times = nn.SinusoidalPositions()({}, jnp.zeros((1, STEPS, width)))[0]
        embedding = nn.Dense(4 * width)(p.time, times[t]) + nn.Embedding(10, 4 * width)(p.label, label)
        embedding = jax.nn.silu(embedding)
        half = nn.Conv2D(width, 4, strides=2, padding=1)(p.stem, x)
        half = ResBlock(width)(p.down0, half, embedding)
        quarter = nn.Conv2D(2 * width, 4, strides=2, padding=1)(p.shrink, half)
        quarter = ResBlock(2 * width)(p.down1, quarter, embedding)
        y = ResBlock(2 * width)(p.middle, quarter, embedding)
        y = ResBlock(2 * width)(p.up1, jnp.concatenate([y, quarter], -1), embedding)
        y = nn.Upsample(2)(p.grow1, y)
        y = ResBlock(width)(p.up0, jnp.concatenate([y, half], -1), embedding)
        y = nn.Upsample(2)(p.grow0, y)
        y = nn.Conv2D(width // 2, 3, padding=1, activation="silu")(p.fine, jnp.concatenate([y, x], -1))
        return nn.Conv2D(1, 3, padding=1)(p.out, y)


# The diffusion


def schedule() -> tuple[Any, Any]:
    """Returns the share of noise that each step adds, and that of the image after it, (STEPS,) both."""
    times = (np.arange(STEPS + 1) / STEPS + 0.008) / 1.008
    left = np.cos(times * np.pi / 2) ** 2
    beta = np.minimum(1 - left[1:] / left[:-1], 0.999)
    return jnp.asarray(beta, jnp.float32), jnp.asarray(np.cumprod(1 - beta), jnp.float32)


def noise_loss(net: Any, params: Any, key: Any, x: Any, label: Any) -> Any:
    """Returns the mean squared error of the predicted noise, at random times."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, label.shape, 0, STEPS)
    noise = jax.random.normal(noise_key, x.shape)
    left = schedule()[1][t][:, None, None, None]
    noisy = jnp.sqrt(left) * x + jnp.sqrt(1 - left) * noise
    return jnp.mean((net(params, noisy, t, label) - noise) ** 2)


@partial(jax.jit, static_argnames="net")
def denoise(net: Any, params: Any, key: Any, x: Any, t: Any, label: Any) -> Any:
    """Returns images with the noise of step ``t``, an integer, taken away."""
    beta, left = schedule()
    before = jnp.concatenate([jnp.ones(1), left[:-1]])
    noise = net(params, x, jnp.full(label.shape, t), label)
    image = jnp.clip((x - jnp.sqrt(1 - left[t]) * noise) / jnp.sqrt(left[t]), -1, 1)
    mean = jnp.sqrt(before[t]) * beta[t] * image + jnp.sqrt(1 - beta[t]) * (1 - before[t]) * x
    std = jnp.sqrt(beta[t] * (1 - before[t]) / (1 - left[t]))  # zero at t = 0
    return mean / (1 - left[t]) + std * jax.random.normal(key, x.shape)


def sample(net: Any, params: Any, key: Any, label: Any, shape: tuple[int, ...]) -> Any:
    """Returns images of ``shape``, drawn for the classes (batch,)."""
    start_key, key = jax.random.split(key)
    x = jax.random.normal(start_key, shape)
    for t in reversed(range(STEPS)):  # on CPUs, XLA's convolutions are far slower inside lax.scan
        x = denoise(net, params, jax.random.fold_in(key, t), x, t, label)
    return x


def make_tx(lr: float, steps: int) -> optax.GradientTransformation:
    """Returns Adam, whose rate decays along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(lr, steps))


def make_step(net: Any, tx: optax.GradientTransformation, decay: float) -> Any:
    """Returns the compiled step, ``(state, key, x, label) -> (state, loss)``; it donates the state."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, key: Any, x: Any, label: Any) -> tuple[TrainState, Any]:
        loss, grads = jax.value_and_grad(partial(noise_loss, net))(state.params, key, x, label)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, 1 - decay)
        return TrainState(params, average, opt_state), loss

    return step


# The samples


def png(pixels: Any) -> bytes:
    """Returns a grayscale PNG file of bytes (height, width)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *pixels.shape[::-1], 8, 0, 0, 0, 0)
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each row begins with its filter, none
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grid(images: Any, columns: int) -> Any:
    """Returns images (n, height, width, 1) in [-1, 1] as the bytes of one, (rows, columns) of them."""
    n, height, width, _ = images.shape
    tiles = images.reshape(n // columns, columns, height, width).swapaxes(1, 2)
    return np.uint8(np.round((tiles.reshape(-1, columns * width) + 1) * 127.5))


def nearest_to_own(means: Any, x: Any, label: Any) -> float:
    """Returns the share of images that are nearest to their class's mean, of (10, height, width, 1)."""
    distances = np.stack([((x - mean) ** 2).sum((1, 2, 3)) for mean in means], 1)
    return float(np.mean(distances.argmin(1) == label))


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains, draws, prints, and returns the result."""
    parser = argparse.ArgumentParser(description="Trains a diffusion model on Fashion-MNIST.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200, help="of training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="initial learning rate")
    parser.add_argument("--decay", type=float, default=0.99, help="of the moving average")
    parser.add_argument("--width", type=int, default=16, help="channels at half the resolution")
    parser.add_argument("--picture", type=Path, metavar="FILE", default=Path("diffusion.png"))
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the four idx.gz files")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1, not {getattr(args, name)}")
    if not args.picture.parent.is_dir():
        parser.error(f"--picture: there is no folder {args.picture.parent}")
    net, (init_key, train_key, key) = UNet(args.width), jax.random.split(jax.random.key(args.seed), 3)
    try:
        data = load_images(args.data)
        data = data._replace(x=2 * data.x - 1, test_x=2 * data.test_x - 1)
        params = pt.init(net, init_key, data.x[:1], data.y[:1], data.y[:1], rules=INIT)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    tx, rng = make_tx(args.lr, args.steps), np.random.default_rng(args.seed)
    state = TrainState(params, jax.tree.map(jnp.copy, params), tx.init(params))
    step, losses = make_step(net, tx, args.decay), []
    print(f"{data.name}: {len(data.y)} images, {pt.count(params):,} parameters")
    for i in progress(range(1, args.steps + 1), "training"):
        rows = rng.integers(len(data.y), size=args.batch_size)
        state, loss = step(state, jax.random.fold_in(train_key, i), data.x[rows], data.y[rows])
        losses.append(loss)
        if i % 250 == 0 or i == args.steps:
            recent = np.mean(jax.device_get(losses[-250:]))
            print(f"step {i}: loss {recent:.3f}", flush=True)
    test_x, test_y = data.test_x[:1000], data.test_y[:1000]
    test_loss = float(jax.jit(partial(noise_loss, net))(state.average, key, test_x, test_y))
    print(f"Mean squared error of the noise in test images: {test_loss:.4f}", flush=True)
    label = np.repeat(np.arange(10, dtype=np.int32), 10)
    samples = np.asarray(sample(net, state.average, key, label, (100, *test_x.shape[1:])))
    args.picture.write_bytes(png(grid(samples, 10)))
    means = [data.x[data.y == i].mean(0) for i in range(10)]
    found = [
        (float(x.mean()), float(x.std()), nearest_to_own(means, x, y))
        for x, y in ((samples, label), (data.test_x, data.test_y))
    ]
    for name, numbers in zip(("samples", "test images"), found, strict=True):
        print("{}: pixels {:.3f} ± {:.3f}, {:.0%} nearest to their class".format(name, *numbers))
    print(f"Ten samples of each class: {args.picture}")
    mean, std, own = zip(*found, strict=True)
    return Result(state.average, test_loss, samples, mean, std, own)


if __name__ == "__main__":
    main()
