"""Fashion-MNIST with a convolutional network that has BatchNorm state and dropout.

BatchNorm's running statistics are leaves of kind "state" in the parameter tree. A training step
differentiates and updates only leaves of kind "param", and takes the new state from the model. All that
a step changes is one pytree, which is donated to the step, and saved and loaded in one piece.

Run it with ``python -m examples.fashion_cnn``; ``--help`` lists the options.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from examples import fashion_mnist
from examples.fashion_mnist import Data, Epoch, progress
from paramtree import nn


class Run(NamedTuple):
    """Everything that a training step changes."""

    params: pt.ParamTree  # including the running statistics
    slots: Any  # the optimiser's state, for the leaves of kind "param" only
    steps: Any  # steps so far, an int32; dropout keys depend on it


def network(channels: int = 16) -> nn.Sequential:
    """Returns two convolutions with BatchNorm, and two dense layers."""

    def convolution(channels: int, size: int, strides: int) -> nn.Conv2D:
        # BatchNorm subtracts the mean, so a bias would have no effect.
        return nn.Conv2D(channels, kernel_size=size, strides=strides, padding="same", use_bias=False)

    return nn.Sequential(
        *(convolution(channels, 5, 2), nn.BatchNorm(), nn.Activation("relu")),  # 28 x 28 to 14 x 14
        *(convolution(2 * channels, 3, 1), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D()),
        *(nn.Dense(8 * channels, activation="relu"), nn.Dropout(0.25), nn.Dense(10)),
    )


def optimiser(lr: float, steps: int) -> optax.GradientTransformation:
    """Returns SGD with momentum, whose rate decays by a factor of 0.6 every ``steps`` steps.

    The optimiser's state counts the steps, so a resumed run continues at the same rate.
    """
    return optax.sgd(optax.exponential_decay(lr, steps, 0.6), momentum=0.9)


def start(net: nn.Sequential, tx: optax.GradientTransformation, key: Any, x: Any) -> Run:
    """Returns a new run at step 0."""
    params = pt.init(net, key, x)
    return Run(params, tx.init(pt.select(params, kind="param")), jnp.zeros((), jnp.int32))


def loss_and_state(net: nn.Sequential, params: pt.ParamTree, x: Any, y: Any, key: Any) -> Any:
    """Returns a batch's mean cross-entropy, with the new state and the accuracy as auxiliary output.

    The model runs in training: it applies dropout, and normalizes by batch statistics and records them.
    """
    logits, params = pt.training(net)(params, x, key=key)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (pt.select(params, kind="state"), jnp.mean(jnp.argmax(logits, axis=-1) == y))


def make_step(net: nn.Sequential, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the compiled step, ``(run, x, y, key) -> (run, loss, accuracy)``.

    The step folds its number into ``key``, so all steps take the same key. It donates ``run``.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(run: Run, x: Any, y: Any, key: Any) -> tuple[Run, Any, Any]:
        # Unlike jax.value_and_grad, pt.value_and_grad does not differentiate by state.
        value_and_grad = pt.value_and_grad(partial(loss_and_state, net), has_aux=True)
        key = jax.random.fold_in(key, run.steps)
        (loss, (state, accuracy)), grads = value_and_grad(run.params, x, y, key)
        trained = pt.select(run.params, kind="param")
        updates, slots = tx.update(grads, run.slots, trained)
        params = pt.merge(optax.apply_updates(trained, updates), state)
        return Run(params, slots, run.steps + 1), loss, accuracy

    return step


def make_evaluate(net: nn.Sequential, batch_size: int = 1000) -> Callable[..., float]:
    """Returns ``(params, x, y) -> accuracy``, which runs inference in batches."""

    @jax.jit
    def correct(params: pt.ParamTree, x: Any, y: Any) -> Any:
        return jnp.sum(jnp.argmax(net(params, x), axis=-1) == y)

    def evaluate(params: pt.ParamTree, x: Any, y: Any) -> float:
        batches = [slice(i, i + batch_size) for i in range(0, len(y), batch_size)]
        return sum(correct(params, x[rows], y[rows]).item() for rows in batches) / len(y)

    return evaluate


def load_images(folder: Path | None) -> Data:
    """Returns the data of ``fashion_mnist.load_data``, with images of (height, width, 1)."""
    if folder is None and not fashion_mnist.DEBIAN.is_dir():
        print("Fashion-MNIST not found: run `make data`, or pass its folder to --data.")
        print("Training on scikit-learn's digits instead.")
        data = fashion_mnist.load_digits()
    else:
        data = fashion_mnist.load_data(folder)
    side = math.isqrt(data.x.shape[1])
    x, test_x = (images.reshape(-1, side, side, 1) for images in (data.x, data.test_x))
    return data._replace(x=x, test_x=test_x)


def main(argv: Sequence[str] | None = None) -> list[Epoch]:
    """Trains, prints, and returns the metrics of each epoch."""
    parser = argparse.ArgumentParser(description="Trains a convolutional network on Fashion-MNIST.")
    parser.add_argument("--seed", type=int, default=0, help="ignored with --resume")
    parser.add_argument("--epochs", type=int, default=5, help="total, counting resumed epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05, help="initial learning rate")
    parser.add_argument("--channels", type=int, default=16, help="channels of the first convolution")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the four idx.gz files")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after every epoch")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to continue from")
    args = parser.parse_args(argv)
    done, batch_size = 0, args.batch_size
    try:
        data, net = load_images(args.data), network(args.channels)
        size = len(data.y)
        if not 0 < batch_size <= size:
            raise ValueError(
                f"--batch-size is from 1 to {size}, the number of images, not {batch_size}"
            )
        tx = optimiser(args.lr, size // batch_size)
        begin = partial(start, net, tx, x=data.x[:1])
        if args.resume:
            run = jax.eval_shape(begin, jax.random.key(0))  # shapes only; nothing is computed
            saved = pt.load(args.resume, like={"run": run, "epoch": 0, "seed": 0})
            run, done, args.seed = saved["run"], saved["epoch"], saved["seed"]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.checkpoint and not args.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint: there is no folder {args.checkpoint.parent}")
    init_key, shuffle_key, dropout_key = jax.random.split(jax.random.key(args.seed), 3)
    if not args.resume:
        run = begin(init_key)
    trained, state = (pt.count(run.params, kind=kind) for kind in ("param", "state"))
    print(f"{data.name}: {size} images to train with, {len(data.test_y)} to test with")
    print(f"The network: {trained} numbers that are trained, {state} that are running statistics")
    print(f"{'epoch':>5} {'loss':>8} {'train':>8} {'test':>8} {'seconds':>8}")
    step, evaluate = make_step(net, tx), make_evaluate(net)
    results: list[Epoch] = []
    for epoch in range(done + 1, args.epochs + 1):
        begun, metrics = time.perf_counter(), []
        order = np.asarray(jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), size))
        batches = order[: size - size % batch_size].reshape(-1, batch_size)  # drops the remainder
        for rows in progress(batches, f"epoch {epoch}"):
            run, *loss_and_accuracy = step(run, data.x[rows], data.y[rows], dropout_key)
            metrics.append(loss_and_accuracy)  # on the device, so that no step waits
        loss, accuracy = np.mean(jax.device_get(metrics), axis=0).tolist()
        test_accuracy = evaluate(run.params, data.test_x, data.test_y)
        results.append(Epoch(epoch, loss, accuracy, test_accuracy, time.perf_counter() - begun))
        print("{:5} {:8.3f} {:8.3f} {:8.3f} {:8.1f}".format(*results[-1]), flush=True)
        if args.checkpoint:
            pt.save(args.checkpoint, {"run": run, "epoch": epoch, "seed": args.seed})
    return results


if __name__ == "__main__":
    main()
