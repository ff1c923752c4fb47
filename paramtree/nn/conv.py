"""Convolutions over one, two and three spatial axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from paramtree.initializers import Initializer, Uniform, get
from paramtree.initializers.axes import of_weight
from paramtree.nn.basic import Activation, as_activation, check_integers
from paramtree.nn.spatial import Padding, Sizes, Spatial, shown_padding

__all__ = ["Conv1D", "Conv2D", "Conv3D"]


class Convolution(Spatial):
    """Base of convolutions and transposed ones; subclasses declare the fields in Gluon's order."""

    alias = "conv"  # as in Gluon, all convolutions in a `Sequential` share one counter
    _letters = "OI"  # the first two axes of the weight; the second one is divided by groups

    def __post_init__(self: Any) -> None:
        self._check_layout()
        check_integers(self, 1, "channels", "groups")
        check_integers(self, 0, "in_channels")
        for setting in ("channels", "in_channels"):
            if (size := getattr(self, setting)) % self.groups:
                raise ValueError(
                    f"{type(self).__name__}: {setting} must be divisible by groups={self.groups}, but "
                    f"found {size}."
                )
        if self.activation is not None:
            as_activation(self.activation)
        self._spread("kernel_size", "strides", "dilation")
        self._spread_padding()
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(
            self,
            "weight_initializer",
            of_weight(self.weight_initializer or Uniform(), 2 + len(self.kernel_size)),
        )
        object.__setattr__(self, "bias_initializer", get(self.bias_initializer))

    def __call__(self: Any, p: Any, x: Any) -> Any:
        sizes = self._sizes(x)
        axis = self.layout.index("C")
        size = x.shape[axis]
        if self.in_channels and size != self.in_channels:
            raise ValueError(
                f"{self!r} expects {self.in_channels} channels, but found {size} on axis {axis} of "
                f"shape {x.shape} with layout {self.layout}."
            )
        if size == 0 or size % self.groups:
            raise ValueError(
                f"{self!r} needs a positive number of channels divisible by groups={self.groups}, but "
                f"found {size} on axis {axis} of shape {x.shape} with layout {self.layout}."
            )
        first, second = (self.channels if letter == "O" else size for letter in self._letters)
        shape = first, second // self.groups, *self.kernel_size
        weight = p.param("weight", shape, self.weight_initializer, self.dtype)
        # Promote as x @ weight would; lax.conv_general_dilated requires equal dtypes.
        x, weight = jnp.asarray(x), jnp.asarray(weight)
        dtype = jnp.result_type(x, weight)
        y = self._convolve(x.astype(dtype), weight.astype(dtype), sizes)
        if self.use_bias:
            bias = p.param("bias", (self.channels,), self.bias_initializer, self.dtype)
            y = y + jnp.expand_dims(bias, [i for i in range(y.ndim) if i != axis])
        return y if self.activation is None else as_activation(self.activation)(y)

    def _windows(self: Any) -> list[int]:
        """Returns the size of the dilated kernel along each axis."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    def _apply(self: Any, x: Any, weight: Any, strides: Any, pads: Any, dilation: Any = None) -> Any:
        """Convolves x with the weight; ``dilation`` is that of x."""
        kernel = self._letters + "".join(self.layout[axis] for axis in self._axes)
        return lax.conv_general_dilated(
            x,
            weight,
            strides,
            pads,
            dilation,
            self.dilation,
            dimension_numbers=(self.layout, kernel, self.layout),
            feature_group_count=self.groups,
        )

    def __repr__(self: Any) -> str:
        rank = len(self.kernel_size)
        text = f"{self.in_channels or None} -> {self.channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.strides}"
        if self.padding != ((0, 0),) * rank:
            text += f", padding={shown_padding(self.padding)}"
        if self.dilation != (1,) * rank:
            text += f", dilation={self.dilation}"
        if any(output_padding := getattr(self, "output_padding", ())):
            text += f", output_padding={output_padding}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if not self.use_bias:
            text += ", bias=False"
        if self.activation is not None:
            text += f", {Activation(self.activation)}"
        return f"{type(self).__name__}({text})"


class _Conv(Convolution):
    channels: int
    kernel_size: Sizes
    strides: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    groups: int = 1
    layout: str = ""
    activation: str | Callable[..., Any] | None = None
    use_bias: bool = True
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"
    in_channels: int = 0
    dtype: Any = "float32"

    def _convolve(self: Any, x: Any, weight: Any, sizes: Sequence[int]) -> Any:
        windows = self._windows()
        pads = self._pads(sizes, windows)
        for size, (low, high), window in zip(sizes, pads, windows, strict=True):
            if size + low + high < window:
                raise ValueError(
                    f"{self!r}: the dilated kernel {tuple(windows)} is larger than an input of shape "
                    f"{x.shape} with padding {shown_padding(pads)} and layout {self.layout}."
                )
        return self._apply(x, weight, self.strides, pads)


class Conv1D(_Conv):
    """A convolution over sequences (batch, width, channels): ``Conv2D`` with one spatial axis.

    Its parameters are ``weight``, (out, in / groups, width), and ``bias``, (out,). The layout is "NWC"
    or "NCW". All other settings and the errors are as for ``Conv2D``.

    Example:
      >>> import jax
      >>> net = Conv1D(8, kernel_size=5, dilation=2)
      >>> x = jnp.ones((2, 20, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 12, 8)
    """

    layout: str = "NWC"


class Conv2D(_Conv):
    """A convolution over images: ``activation(weight * x + bias)``.

    It maps (batch, height, width, channels) to (batch, new height, new width, channels). Its
    parameters are ``weight``, (out, in / groups, height, width), and ``bias``, (out,), whatever the
    layout of the data: weights from PyTorch and from Gluon's "NCHW" need no conversion. (Gluon's "NHWC"
    weights are (out, height, width, in): move the last axis to 1.)

    An axis of size n becomes ⌊(n + low + high - dilation · (kernel - 1) - 1) / stride⌋ + 1.
    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.

    Args:
      channels: the number of output channels.
      kernel_size: the kernel's size; this and the next settings are a number or one number per axis.
      strides: the step from one window to the next.
      padding: the number of zeros at both ends of an axis, or a pair (low, high); "valid" is 0, and
        "same" gives an output of size ⌈n / stride⌉.
      dilation: the step from one entry of the kernel to the next.
      groups: the number of channel groups, which are convolved independently.
      layout: "NHWC" or "NCHW".
      activation: a name or a function; None for the identity.
      use_bias: whether to add a bias.
      weight_initializer: U[-0.07, 0.07] if None.
      bias_initializer: zeros by default.
      in_channels: the expected number of input channels; 0 accepts any number.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting is invalid, ``groups`` does not divide the channels, or the activation is
        unknown; when called: the input has other axes or channels, or is smaller than the kernel.

    Example:
      >>> import jax
      >>> net = Conv2D(8, kernel_size=3, padding=1, activation="relu")
      >>> x = jnp.ones((2, 28, 28, 3))
      >>> params = net.init(jax.random.key(0), x)
      >>> params
      Parameter weight (shape=(8, 3, 3, 3), dtype=float32)
      Parameter bias (shape=(8,), dtype=float32)
      >>> net(params, x).shape
      (2, 28, 28, 8)
    """

    layout: str = "NHWC"


class Conv3D(_Conv):
    """A convolution over volumes or videos (batch, depth, height, width, channels), as ``Conv2D``.

    Its parameters are ``weight``, (out, in / groups, depth, height, width), and ``bias``, (out,). The
    layout is "NDHWC" or "NCDHW". All other settings and the errors are as for ``Conv2D``.

    Example:
      >>> import jax
      >>> net = Conv3D(8, kernel_size=(1, 3, 3), padding="same")
      >>> x = jnp.ones((2, 4, 6, 6, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 4, 6, 6, 8)
    """

    layout: str = "NDHWC"
