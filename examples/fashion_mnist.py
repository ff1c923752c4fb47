"""Fashion-MNIST with a tied layer: the network of an exercise in Dive into Deep Learning.

The network is 784 -> 256 -> 256 -> 256 -> 10, and its two 256 -> 256 layers are tied: two names, one
array. The tie is part of the tree, so gradients sum over both uses, and the optimiser, donation and
checkpoints need no special handling. ``--help`` lists the options.
"""

import argparse
import gzip
import importlib.util
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
WEIGHTS: dict[str, init.Initializer] = {"normal": init.Normal(0.01), "xavier": init.Xavier()}


class Data(NamedTuple):
    """Training and test images, (n, pixels) float32 in [0, 1], and their labels, (n,) int32."""

    name: str
    x: Any
    y: Any
    test_x: Any
    test_y: Any


class Epoch(NamedTuple):
    """Metrics of an epoch; loss and training accuracy are means over its steps."""

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float


# The data


def load_data(folder: Path | None = None) -> Data:
    """Returns Fashion-MNIST from a folder or from Debian's package; if there is neither, the digits.

    Raises OSError for missing files, and ValueError for a file that is not in the expected format.
    """
    if folder is None and not DEBIAN.is_dir():
        print("Fashion-MNIST not found: run `make data`, or pass its folder to --data.")
        print("Training on scikit-learn's digits instead; try them with --init xavier --epochs 60.")
        return load_digits()
    folder = folder or DEBIAN
    missing = [name for name in TRAIN + TEST if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}. Name the folder that has them.")
    return Data("Fashion-MNIST", *load_pair(folder, *TRAIN), *load_pair(folder, *TEST))


def load_pair(folder: Path, image_file: str, label_file: str) -> tuple[Any, Any]:
    """Returns the images and labels of a pair of files."""
    images, labels = read_idx(folder / image_file, 3), read_idx(folder / label_file, 1)
    if len(images) != len(labels):
        raise ValueError(f"{image_file} has {len(images)} images, {label_file} {len(labels)} labels.")
    if not len(labels) or labels.max() > 9:
        raise ValueError(f"{label_file} should have labels from 0 to 9.")
    return images.reshape(len(images), -1) / np.float32(255), labels.astype(np.int32)


def read_idx(path: Path, ndim: int) -> Any:
    """Returns the ``ndim``-dimensional array of bytes in an idx.gz file."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no gzip file: {error}. Download it again.") from error
    start = 4 + 4 * ndim  # two zeros, a type code, ndim, and the sizes
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < start:
        raise ValueError(f"{path} is no idx file of bytes in {ndim} dimensions: {content[:4]!r}.")
    shape = tuple(np.frombuffer(content, ">i4", ndim, 4).tolist())
    if math.prod(shape) != len(content) - start:
        raise ValueError(f"{path} should have {shape} bytes, and has {len(content) - start}.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def load_digits() -> Data:
    """Returns scikit-learn's 1,797 digits of 8 x 8 pixels; a fifth of them are for testing."""
    if importlib.util.find_spec("sklearn") is None:
        raise FileNotFoundError("There are no digits either: `pip install scikit-learn` brings them.")
    images, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    split = len(labels) * 4 // 5
    return Data("digits", images[:split], labels[:split], images[split:], labels[split:])


# The network and its training


def network(tie: bool = True) -> nn.Sequential:
    """Returns the network; ``tie`` makes its second and third layers the same layer."""
    first, second, third = (nn.Dense(256, activation="relu") for _ in range(3))
    return nn.Sequential(first, second, second if tie else third, nn.Dense(10))


def loss_and_accuracy(net: nn.Sequential, params: pt.ParamTree, x: Any, y: Any) -> tuple[Any, Any]:
    """Returns the mean cross-entropy and the accuracy of a batch."""
    logits = net(params, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == y)


def make_step(net: nn.Sequential, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the compiled step, ``(params, state, x, y) -> (params, state, loss, accuracy)``.

    The step donates its parameters and state.
    """

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: pt.ParamTree, state: Any, x: Any, y: Any) -> tuple[Any, ...]:
        value_and_grad = jax.value_and_grad(partial(loss_and_accuracy, net), has_aux=True)
        (loss, accuracy), grads = value_and_grad(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, accuracy

    return step


def progress(steps: Any, title: str) -> Any:
    """Returns the steps, with a progress bar if stderr is a terminal and rich is installed."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        return steps
    console = importlib.import_module("rich.console").Console(stderr=True)
    track = importlib.import_module("rich.progress").track
    return track(steps, title, console=console, transient=True)


def report(net: nn.Sequential, params: pt.ParamTree, x: Any, y: Any) -> None:
    """Prints a line for each parameter and its gradient; a tied parameter has one line."""
    grads, _ = jax.jit(jax.grad(partial(loss_and_accuracy, net), has_aux=True))(params, x, y)
    flat, aliases = pt.collect(grads), pt.ties(params)
    print(f"\n{'parameter':31} {'shape':>10} {'mean':>9} {'std':>9} {'|gradient|':>10}")
    for name, leaf in pt.collect(params).items():
        names = " = ".join([name, *(alias for alias, source in aliases.items() if source == name)])
        shape, norm = " x ".join(map(str, leaf.shape)), jnp.linalg.norm(flat[name].ravel())
        print(f"{names:31} {shape:>10} {leaf.mean():9.5f} {leaf.std():9.5f} {norm:10.6f}")


# Checkpoints


def checkpoint(params: pt.ParamTree, epoch: int, seed: int) -> pt.ParamTree:
    """Returns a tree from which a run can resume; plain SGD has no state."""
    return pt.from_tree({"params": params, "epoch": epoch, "seed": seed})


def main(argv: Sequence[str] | None = None) -> list[Epoch]:
    """Trains, prints, and returns the metrics of each epoch."""
    parser = argparse.ArgumentParser(description="Trains a network with a tied layer on Fashion-MNIST.")
    parser.add_argument("--seed", type=int, default=0, help="ignored with --resume")
    parser.add_argument("--epochs", type=int, default=5, help="total, counting resumed epochs")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.5, help="the learning rate")
    parser.add_argument("--init", choices=WEIGHTS, default="normal")
    parser.add_argument("--tie", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the four idx.gz files")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after every epoch")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to continue from")
    args = parser.parse_args(argv)
    net, tx, done = network(args.tie), optax.sgd(args.lr), 0
    try:
        data = load_data(args.data)
        params = pt.abstract(net, data.x)
        if args.resume:
            resumed = pt.load(args.resume, like=checkpoint(params, 0, 0))
            params, done, args.seed = resumed.params, resumed.epoch, resumed.seed
    except (OSError, ValueError) as error:
        parser.error(str(error))
    size, batch_size = len(data.y), args.batch_size
    if not 0 < batch_size <= size:
        parser.error(f"--batch-size is from 1 to {size}, the number of images, not {batch_size}")
    if args.checkpoint and not args.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint: there is no folder {args.checkpoint.parent}")
    init_key, shuffle_key = jax.random.split(jax.random.key(args.seed))
    if not args.resume:
        weights = WEIGHTS[args.init]
        params = pt.init(net, init_key, data.x, rules={".*weight": weights, ".*bias": init.Zero()})
    print(f"{data.name}: {size} images to train with, {len(data.test_y)} to test with")
    print(f"{'epoch':>5} {'loss':>8} {'train':>8} {'test':>8} {'seconds':>8}")
    state, step = tx.init(params), make_step(net, tx)
    evaluate = jax.jit(partial(loss_and_accuracy, net))
    results: list[Epoch] = []
    for epoch in range(done + 1, args.epochs + 1):
        start, metrics = time.perf_counter(), []
        order = np.asarray(jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), size))
        batches = order[: size - size % batch_size].reshape(-1, batch_size)  # drops the remainder
        for rows in progress(batches, f"epoch {epoch}"):
            params, state, *both = step(params, state, data.x[rows], data.y[rows])
            metrics.append(both)  # on the device, so that no step waits
        loss, accuracy = np.mean(jax.device_get(metrics), axis=0).tolist()
        test_accuracy = evaluate(params, data.test_x, data.test_y)[1].item()
        results.append(Epoch(epoch, loss, accuracy, test_accuracy, time.perf_counter() - start))
        print("{:5} {:8.3f} {:8.3f} {:8.3f} {:8.1f}".format(*results[-1]))
        if args.checkpoint:
            pt.save(args.checkpoint, checkpoint(params, epoch, args.seed))
    report(net, params, data.x[:10_000], data.y[:10_000])
    return results


if __name__ == "__main__":
    main()
