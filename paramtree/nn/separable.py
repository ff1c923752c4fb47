"""Depthwise convolutions, which keep channels apart, and separable ones, which then mix them."""

from collections.abc import Callable
from typing import Any

import jax

from paramtree.initializers import Initializer
from paramtree.model.scope import child
from paramtree.nn import conv
from paramtree.nn.basic import check_integers
from paramtree.nn.spatial import Padding, Sizes
from paramtree.typing import Scope

__all__ = [
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "DepthwiseConv3D",
    "SeparableConv1D",
    "SeparableConv2D",
    "SeparableConv3D",
]


class _Depthwise(conv.Direct):
    kernel_size: Sizes
    strides: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    depth_multiplier: int = 1
    layout: str = ""
    activation: str | Callable[..., Any] | None = None
    use_bias: bool = True
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"
    in_channels: int = 0
    dtype: Any = "float32"
    padding_mode: str = "zeros"

    def _check_counts(self) -> None:
        check_integers(self, 1, "depth_multiplier")

    def _counts(self, size: int) -> tuple[int, int]:
        return size * self.depth_multiplier, size or 1  # an input without channels is refused

    def _shown_channels(self) -> Any:
        return self.in_channels * self.depth_multiplier or None


class _Separable(conv.Direct):
    channels: int
    kernel_size: Sizes
    strides: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    depth_multiplier: int = 1
    layout: str = ""
    activation: str | Callable[..., Any] | None = None
    use_bias: bool = True
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"
    in_channels: int = 0
    dtype: Any = "float32"
    padding_mode: str = "zeros"

    def _check_counts(self) -> None:
        check_integers(self, 1, "channels", "depth_multiplier")

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        rank = len(self._axes)
        shared = {"layout": self.layout, "dtype": self.dtype}
        shared["weight_initializer"] = self.weight_initializer
        depthwise = _DEPTHWISE[rank](
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation,
            self.depth_multiplier,
            use_bias=False,  # that of the second convolution can be any sum of both
            in_channels=self.in_channels,
            padding_mode=self.padding_mode,
            **shared,
        )
        pointwise = _POINTWISE[rank](
            self.channels,
            1,
            activation=self.activation,
            use_bias=self.use_bias,
            bias_initializer=self.bias_initializer,
            **shared,
        )
        return pointwise(child(p, "pointwise"), depthwise(child(p, "depthwise"), x))


class DepthwiseConv1D(_Depthwise):
    """A depthwise convolution over sequences: ``DepthwiseConv2D`` with one spatial axis.

    Its parameters are ``weight``, (channels · depth_multiplier, 1, width), and ``bias``. The layout is
    "NWC" or "NCW". All other settings and the errors are as for ``DepthwiseConv2D``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = DepthwiseConv1D(4, padding=((3, 0),))  # causal: no output depends on a later input
      >>> x = jnp.ones((2, 20, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 20, 3)
    """

    layout: str = "NWC"


class DepthwiseConv2D(_Depthwise):
    """A convolution of each channel of an image with kernels of its own: ``groups`` is the channels.

    It maps (batch, height, width, channels) to (batch, new height, new width, channels ·
    depth_multiplier). Its parameters are ``weight``, (channels · depth_multiplier, 1, height, width),
    and ``bias``, (channels · depth_multiplier,): PyTorch's for ``groups=channels``. The outputs of one
    channel are next to each other.

    Chollet, "Xception: deep learning with depthwise separable convolutions", 2017.

    Args:
      depth_multiplier: the number of outputs of each channel.
      kernel_size, strides, padding, dilation, padding_mode: as for ``Conv2D``.
      layout, activation, use_bias, in_channels, dtype and the initializers: as for ``Conv2D``.

    Raises:
      ValueError: as for ``Conv2D``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = DepthwiseConv2D(kernel_size=3, padding=1, depth_multiplier=2)
      >>> x = jnp.ones((2, 28, 28, 3))
      >>> params = net.init(jax.random.key(0), x)
      >>> params
      Parameter weight (shape=(6, 1, 3, 3), dtype=float32)
      Parameter bias (shape=(6,), dtype=float32)
      >>> net(params, x).shape
      (2, 28, 28, 6)
    """

    layout: str = "NHWC"


class DepthwiseConv3D(_Depthwise):
    """A depthwise convolution over volumes or videos: ``DepthwiseConv2D`` with three spatial axes.

    Its parameters are ``weight``, (channels · depth_multiplier, 1, depth, height, width), and ``bias``.
    The layout is "NDHWC" or "NCDHW". All other settings and the errors are as for ``DepthwiseConv2D``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = DepthwiseConv3D((1, 3, 3), padding="same")
      >>> x = jnp.ones((2, 4, 6, 6, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 4, 6, 6, 3)
    """

    layout: str = "NDHWC"


class SeparableConv1D(_Separable):
    """A separable convolution over sequences: ``SeparableConv2D`` with one spatial axis.

    The layout is "NWC" or "NCW". All other settings and the errors are as for ``SeparableConv2D``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = SeparableConv1D(8, kernel_size=5, padding="same")
      >>> x = jnp.ones((2, 20, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 20, 8)
    """

    layout: str = "NWC"


class SeparableConv2D(_Separable):
    """A depthwise convolution over images, then one with kernels of size 1, which mixes the channels.

    It maps the shapes of ``Conv2D`` with far fewer parameters. The child ``depthwise`` is a
    ``DepthwiseConv2D`` without a bias, and the child ``pointwise`` a ``Conv2D`` with the bias and the
    activation. For a normalization or an activation between the two, write them one after another.

    Chollet, "Xception: deep learning with depthwise separable convolutions", 2017.

    Args:
      channels: the number of output channels.
      depth_multiplier: the number of outputs that the first convolution has for each channel.
      kernel_size, strides, padding, dilation, padding_mode: as for ``Conv2D``, of the first of the two.
      layout, activation, use_bias, in_channels, dtype and the initializers: as for ``Conv2D``.

    Raises:
      ValueError: as for ``Conv2D``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = SeparableConv2D(8, kernel_size=3, padding=1, activation="relu")
      >>> x = jnp.ones((2, 28, 28, 3))
      >>> params = net.init(jax.random.key(0), x)
      >>> params
      Parameter depthwise_weight (shape=(3, 1, 3, 3), dtype=float32)
      Parameter pointwise_weight (shape=(8, 3, 1, 1), dtype=float32)
      Parameter pointwise_bias (shape=(8,), dtype=float32)
      >>> net(params, x).shape
      (2, 28, 28, 8)
    """

    layout: str = "NHWC"


class SeparableConv3D(_Separable):
    """A separable convolution over volumes or videos: ``SeparableConv2D`` with three spatial axes.

    The layout is "NDHWC" or "NCDHW". All other settings and the errors are as for ``SeparableConv2D``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = SeparableConv3D(8, kernel_size=(1, 3, 3))
      >>> x = jnp.ones((2, 4, 6, 6, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 4, 4, 4, 8)
    """

    layout: str = "NDHWC"


_DEPTHWISE: dict[int, Any] = {1: DepthwiseConv1D, 2: DepthwiseConv2D, 3: DepthwiseConv3D}
_POINTWISE: dict[int, Any] = {1: conv.Conv1D, 2: conv.Conv2D, 3: conv.Conv3D}
