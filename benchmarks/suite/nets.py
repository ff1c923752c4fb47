"""The same nets in this library and in Flax NNX, for the case that times their training steps.

Each has as many parameters of the same sizes in both, computes the same, and draws dropout masks of the
same shapes. What a library does by default, such as its variance in one pass, it does here.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

RATE = 0.1  # of dropout
VOCABULARY, CLASSES = 256, 10


class Net(NamedTuple):
    """A net of this library, a function that makes NNX's from its ``Rngs``, and a batch.

    ``floor`` makes NNX's with convolutions' kernels in the layout of this library.
    """

    ours: Any
    nnx: Callable[[Any], Any]
    x: Any
    y: Any
    floor: Callable[[Any], Any] | None = None


def images(batch: int, side: int, channels: int) -> tuple[Any, Any]:
    """Returns images and their labels."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, side, side, channels))
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.integers(0, CLASSES, batch), jnp.int32)


def tokens(batch: int, length: int) -> tuple[Any, Any]:
    """Returns sequences of tokens, and the next token of each."""
    import jax.numpy as jnp
    import numpy as np

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (batch, length + 1))
    return jnp.asarray(ids[:, :-1], jnp.int32), jnp.asarray(ids[:, 1:], jnp.int32)


def block(width: int, heads: int, causal: bool) -> Any:
    """Returns a pre-norm block of attention and two dense layers, with dropout."""
    from paramtree import nn

    attend = nn.MultiHeadAttention(heads, causal=causal, dropout=RATE)
    widen = nn.Dense(4 * width, activation="gelu_tanh", flatten=False)
    return nn.Sequential(
        nn.Residual(norm=nn.LayerNorm(), attend=attend, drop=nn.Dropout(RATE)),
        nn.Residual(
            norm=nn.LayerNorm(),
            widen=widen,
            narrow=nn.Dense(width, flatten=False),
            drop=nn.Dropout(RATE),
        ),
    )


def nnx_block(width: int, heads: int, causal: bool) -> Callable[[Any], Any]:
    """Returns a function that makes the same block of NNX."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.norm0, self.norm1 = (nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(2))
            # By default NNX draws one mask for all examples and heads, which is another model.
            self.attend = nnx.MultiHeadAttention(
                heads, width, dropout_rate=RATE, broadcast_dropout=False, decode=False, rngs=rngs
            )
            self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
            self.narrow = nnx.Linear(4 * width, width, rngs=rngs)
            self.drop0, self.drop1 = (nnx.Dropout(RATE, rngs=rngs) for _ in range(2))

        def __call__(self, x: Any) -> Any:
            x = x + self.drop0(self.attend(self.norm0(x), is_causal=causal))
            y = nnx.gelu(self.widen(self.norm1(x)), approximate=True)
            return x + self.drop1(self.narrow(y))

    return Block


def gpt(tiny: bool) -> Net:
    """A GPT: learned positions, four blocks, and a decoder of its own."""
    from flax import nnx

    from paramtree import nn

    width, heads, blocks, length, batch = (8, 2, 1, 4, 1) if tiny else (128, 4, 4, 128, 8)
    ours = nn.Sequential(
        nn.Embedding(VOCABULARY, width),
        nn.LearnedPositions(length),
        nn.Dropout(RATE),
        *(block(width, heads, True) for _ in range(blocks)),
        nn.LayerNorm(),
        nn.Dense(VOCABULARY, use_bias=False, flatten=False),
    )

    class Gpt(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            make = nnx_block(width, heads, True)
            self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
            self.places = nnx.Embed(length, width, rngs=rngs)
            self.drop = nnx.Dropout(RATE, rngs=rngs)
            self.blocks = nnx.List([make(rngs) for _ in range(blocks)])
            self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
            self.decode = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.drop(self.embed(x) + self.places.embedding[...][None, : x.shape[1]])
            for each in self.blocks:
                x = each(x)
            return self.decode(self.norm(x))

    return Net(ours, Gpt, *tokens(batch, length))


def vit(tiny: bool) -> Net:
    """A vision transformer: patches of four by four, a class token, learned positions, four blocks."""
    import jax.numpy as jnp
    from flax import nnx

    from paramtree import nn

    width, heads, blocks, side, batch = (8, 2, 1, 8, 1) if tiny else (128, 4, 4, 32, 16)
    length = (side // 4) ** 2
    ours = nn.Sequential(
        nn.Conv2D(width, 4, strides=4),
        lambda x: x.reshape(x.shape[0], length, width),
        nn.ClassToken(),
        nn.LearnedPositions(length + 1),
        nn.Dropout(RATE),
        *(block(width, heads, False) for _ in range(blocks)),
        nn.LayerNorm(),
        lambda x: x[:, 0],
        nn.Dense(CLASSES),
    )

    class Vit(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            make = nnx_block(width, heads, False)
            self.patches = nnx.Conv(3, width, (4, 4), strides=4, padding="VALID", rngs=rngs)
            self.token = nnx.Param(jnp.zeros((1, width)))
            self.places = nnx.Param(jnp.zeros((length + 1, width)))
            self.drop = nnx.Dropout(RATE, rngs=rngs)
            self.blocks = nnx.List([make(rngs) for _ in range(blocks)])
            self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
            self.head = nnx.Linear(width, CLASSES, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.patches(x).reshape(x.shape[0], length, width)
            token = jnp.broadcast_to(self.token[...][None], (x.shape[0], 1, width))
            x = self.drop(jnp.concatenate([token, x], 1) + self.places[...][None])
            for each in self.blocks:
                x = each(x)
            return self.head(self.norm(x)[:, 0])

    return Net(ours, Vit, *images(batch, side, 3))


STAGES = ((1, 1), (2, 2), (4, 2), (8, 2))  # channels, over those of the first, and strides


def basic_block(channels: int, strides: int, project: bool) -> Any:
    """Returns a residual block of ResNet-18."""
    import jax

    from paramtree import nn
    from paramtree.model.scope import child

    body = nn.Sequential(
        *(nn.Conv2D(channels, 3, strides, padding=1, use_bias=False), nn.BatchNorm()),
        nn.Activation("relu"),
        *(nn.Conv2D(channels, 3, padding=1, use_bias=False), nn.BatchNorm()),
    )
    short = nn.Sequential(nn.Conv2D(channels, 1, strides, use_bias=False), nn.BatchNorm())

    def call(p: Any, x: Any) -> Any:
        y = body(child(p, "body"), x)
        return jax.nn.relu(y + (short(child(p, "short"), x) if project else x))

    return call


def resnet(tiny: bool) -> Net:
    """ResNet-18 for small images: a stem of three by three, without a pool."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from paramtree import nn

    base, side, batch = (2, 8, 2) if tiny else (64, 32, 8)
    shapes, size = [], base
    for times, strides in STAGES:
        shapes += [(size, base * times, strides), (base * times, base * times, 1)]
        size = base * times

    class ResNet(nn.Layer):
        def __call__(self, p: Any, x: Any) -> Any:
            x = nn.Conv2D(base, 3, padding=1, use_bias=False)(p.stem, x)
            x = jax.nn.relu(nn.BatchNorm()(p.norm, x))
            for i, (given, channels, strides) in enumerate(shapes):
                x = basic_block(channels, strides, given != channels)(p[f"block{i}"], x)
            return nn.Dense(CLASSES)(p.head, nn.GlobalAvgPool2D()(p, x))

    class Turned(nnx.Module):
        """A convolution whose kernel is (out, in, height, width)."""

        def __init__(self, given: int, channels: int, kernel: int, strides: int, rngs: Any) -> None:
            shape = channels, given, kernel, kernel
            init = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
            self.kernel = nnx.Param(init(rngs.params(), shape))
            self.strides, self.pads = (strides, strides), [(kernel // 2, kernel // 2)] * 2

        def __call__(self, x: Any) -> Any:
            layout = ("NHWC", "OIHW", "NHWC")
            kernel = self.kernel[...]
            return jax.lax.conv_general_dilated(
                x, kernel, self.strides, self.pads, dimension_numbers=layout
            )

    def plain(given: int, channels: int, kernel: int, strides: int, rngs: Any) -> Any:
        shape, padding = (kernel, kernel), kernel // 2
        return nnx.Conv(
            given, channels, shape, strides=strides, padding=padding, use_bias=False, rngs=rngs
        )

    def norm(channels: int, rngs: Any) -> Any:
        return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)

    class Block(nnx.Module):
        def __init__(self, conv: Any, given: int, channels: int, strides: int, rngs: Any) -> None:
            self.conv0 = conv(given, channels, 3, strides, rngs)
            self.conv1 = conv(channels, channels, 3, 1, rngs)
            self.norm0, self.norm1 = norm(channels, rngs), norm(channels, rngs)
            self.project = given != channels
            if self.project:
                self.short = conv(given, channels, 1, strides, rngs)
                self.norm2 = norm(channels, rngs)

        def __call__(self, x: Any) -> Any:
            y = self.norm1(self.conv1(jax.nn.relu(self.norm0(self.conv0(x)))))
            return jax.nn.relu(y + (self.norm2(self.short(x)) if self.project else x))

    class Theirs(nnx.Module):
        def __init__(self, rngs: Any, conv: Any = plain) -> None:
            self.stem, self.norm = conv(3, base, 3, 1, rngs), norm(base, rngs)
            self.blocks = nnx.List([Block(conv, *shape, rngs) for shape in shapes])
            self.head = nnx.Linear(size, CLASSES, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = jax.nn.relu(self.norm(self.stem(x)))
            for each in self.blocks:
                x = each(x)
            return self.head(jnp.mean(x, (1, 2)))

    floor = functools.partial(Theirs, conv=Turned)
    return Net(ResNet(), Theirs, *images(batch, side, 3), floor)


def cnn(tiny: bool) -> Net:
    """Three convolutions, each with a max pool, and a dense layer."""
    import jax
    from flax import nnx

    from paramtree import nn

    channels, side, batch = (2, 8, 2) if tiny else (32, 32, 64)
    sizes = [3, channels, 2 * channels, 2 * channels]
    convolutions = [nn.Conv2D(size, 3, padding="same", activation="relu") for size in sizes[1:]]
    ours = nn.Sequential(
        *(layer for conv in convolutions for layer in (conv, nn.MaxPool2D())), nn.Dense(CLASSES)
    )

    class Cnn(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            pairs = itertools.pairwise(sizes)
            self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairs])
            self.head = nnx.Linear(sizes[-1] * (side // 8) ** 2, CLASSES, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            for conv in self.convs:
                x = nnx.max_pool(jax.nn.relu(conv(x)), (2, 2), strides=(2, 2))
            return self.head(x.reshape(x.shape[0], -1))

    return Net(ours, Cnn, *images(batch, side, 3))


NETS = {"GPT": gpt, "ViT": vit, "ResNet-18": resnet, "CNN": cnn}
