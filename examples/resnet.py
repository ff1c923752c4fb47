"""A residual network: trained on five classes of Fashion-MNIST, then fine-tuned for the other five.

The network has the stages and blocks of ResNet-18, with fewer channels. He et al., "Deep residual
learning for image recognition", 2016. It first learns the classes 0 to 4. Then it gets a new last
layer for the classes 5 to 9, and 1,000 images of them: the last layer is trained alone, and after it
the later stages too, each at a rate of its own. A table has the rates by name, ``RATES``; what is not
in it is frozen, and costs neither gradients nor optimiser state.

Fine-tuning calls the network as for inference, so BatchNorm normalises by the running statistics and
keeps them. They and the frozen parameters stay exactly as they were, which the run checks.

On test images, the default run gets at least 85 % of the classes 0 to 4 right; of the classes 5 to 9
less than 40 % with a new last layer, at least 80 % once that is trained, and at least 90 % fine-tuned.
Run it with ``python -m examples.resnet``; ``--help`` lists the options.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from examples.fashion_cnn import load_images, make_evaluate
from examples.fashion_mnist import progress
from examples.recipes import fine_tune_step, new_head
from paramtree import nn

HEAD = {"head_.*": 1e-2}  # learning rates by name
RATES = {"stage1_.*": 1e-4, "stage2_.*": 3e-4, "stage3_.*": 1e-3, "head_.*": 3e-3}


class Result(NamedTuple):
    """Parameters and test accuracies: of classes 0 to 4, and of 5 to 9 before and after each part."""

    trained: pt.ParamTree  # on classes 0 to 4
    probed: pt.ParamTree  # the new last layer trained
    tuned: pt.ParamTree  # and the later stages too
    old: float
    before: float
    head: float
    after: float


class ConvNorm(nn.Layer):
    """A convolution and BatchNorm, (batch, height, width, any) to (batch, ⌈.⌉, ⌈.⌉, channels)."""

    channels: int
    kernel: int
    strides: int = 1

    def __call__(self, p: Any, x: Any) -> Any:
        pad = self.kernel // 2
        x = nn.Conv2D(self.channels, self.kernel, self.strides, pad, use_bias=False)(p.conv, x)
        return nn.BatchNorm()(p.norm, x)


class BasicBlock(nn.Layer):
    """Two convolutions and a shortcut, which projects if the shape changes."""

    channels: int
    strides: int = 1

    def __call__(self, p: Any, x: Any) -> Any:
        y = jax.nn.relu(ConvNorm(self.channels, 3, self.strides)(p.first, x))
        y = ConvNorm(self.channels, 3)(p.second, y)
        if x.shape != y.shape:
            x = ConvNorm(self.channels, 1, self.strides)(p.shortcut, x)
        return jax.nn.relu(x + y)


def resnet(width: int = 16, classes: int = 5) -> nn.Sequential:
    """Returns the network, (batch, height, width, 1) to (batch, classes)."""

    def stage(channels: int, strides: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(channels, strides), BasicBlock(channels))

    return nn.Sequential(
        stem=ConvNorm(width, 3, strides=2),
        relu=jax.nn.relu,
        **{f"stage{i}": stage(width * 2**i, 2 if i else 1) for i in range(4)},
        pool=nn.GlobalAvgPool2D(),
        head=nn.Dense(classes),
    )


def cross_entropy(logits: Any, y: Any) -> Any:
    """Returns the mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_step(net: Any, tx: optax.GradientTransformation) -> Any:
    """Returns the compiled step, ``(params, opt_state, x, y) -> (params, opt_state, loss)``."""

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        logits, params = pt.training(net)(params, x)
        return cross_entropy(logits, y), pt.select(params, kind="state")

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        (loss, statistics), grads = pt.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        trained = pt.select(params, kind="param")
        updates, opt_state = tx.update(grads, opt_state, trained)
        return pt.merge(optax.apply_updates(trained, updates), statistics), opt_state, loss

    return step


def make_tx(rates: Mapping[str, Any]) -> optax.GradientTransformation:
    """Returns Adam with a learning rate for each pattern of names."""
    return optax.multi_transform(
        {rate: optax.adam(rate) for rate in rates.values()}, lambda tree: pt.labels(tree, rates)
    )


def train(step: Any, params: Any, opt_state: Any, batches: Any, x: Any, y: Any) -> pt.ParamTree:
    """Returns the parameters after a step for each batch of row numbers, and prints the loss."""
    losses = []
    for rows in progress(batches, "training"):
        params, opt_state, loss = step(params, opt_state, x[rows], y[rows])
        losses.append(loss)
    print(f"  loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last", flush=True)
    return params


def fine_tune(net: Any, params: Any, rates: Mapping[str, Any], *data: Any) -> pt.ParamTree:
    """Returns parameters trained at rates by name; prints that all others are exactly as they were."""
    pattern, tx = "|".join(rates), make_tx(rates)
    step = fine_tune_step(lambda params, x, y: cross_entropy(net(params, x), y), tx, pattern)
    opt_state = tx.init(pt.select(params, pattern, kind="param"))
    tuned = train(jax.jit(step), params, opt_state, *data)
    frozen, after = (pt.partition(tree, pattern, kind="param")[1] for tree in (params, tuned))
    if difference := pt.diff(frozen, after):
        raise RuntimeError(f"Frozen leaves have changed:\n{difference}")
    print(f"  {len(pt.collect(frozen))} of {len(pt.collect(params))} leaves are exactly as before")
    return tuned


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains, fine-tunes, prints, and returns the result."""
    parser = argparse.ArgumentParser(description="Trains and fine-tunes a residual network.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="on the classes 0 to 4")
    parser.add_argument("--tune-steps", type=int, default=100, help="of each part of fine-tuning")
    parser.add_argument("--images", type=int, default=1000, help="to fine-tune with")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the four idx.gz files")
    args = parser.parse_args(argv)
    for name in ("steps", "tune_steps", "images", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1, not {getattr(args, name)}")
    try:
        data, net = load_images(args.data), resnet(args.width)
        init_key, head_key = jax.random.split(jax.random.key(args.seed))
        params = pt.init(net, init_key, data.x[:1], rules={".*weight": "he_normal"})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    old, new = data.y < 5, data.y >= 5
    test_old, test_new = data.test_y < 5, data.test_y >= 5
    x, y = data.x[new][: args.images], data.y[new][: args.images] - 5
    evaluate, rng = make_evaluate(net), np.random.default_rng(args.seed)

    def batches(size: int, steps: int) -> Any:
        return rng.integers(size, size=(steps, args.batch_size))

    def accuracy(params: pt.ParamTree) -> float:
        return evaluate(params, data.test_x[test_new], data.test_y[test_new] - 5)

    print(f"{data.name}: training on {old.sum()} images of the classes 0 to 4")
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, args.steps), momentum=0.9)
    opt_state = tx.init(pt.select(params, kind="param"))
    on_old = batches(old.sum(), args.steps), data.x[old], data.y[old]
    trained = train(make_step(net, tx), params, opt_state, *on_old)
    accuracy_old = evaluate(trained, data.test_x[test_old], data.test_y[test_old])
    print(f"  test accuracy of the classes 0 to 4: {accuracy_old:.3f}")
    print(f"The last layer alone, on {len(y)} images of the classes 5 to 9")
    start = new_head(trained, head_key, "head_.*")
    probed = fine_tune(net, start, HEAD, batches(len(y), args.tune_steps), x, y)
    print("The later stages too")
    tuned = fine_tune(net, probed, RATES, batches(len(y), args.tune_steps), x, y)
    found = [accuracy(params) for params in (start, probed, tuned)]
    print("Test accuracy of the classes 5 to 9:", end=" ")
    print("{:.3f} before, {:.3f} with the last layer, {:.3f} after".format(*found))
    return Result(trained, probed, tuned, accuracy_old, *found)


if __name__ == "__main__":
    main()
