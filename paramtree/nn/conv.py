"""Convolutions over one, two and three axes in space; their transposes have a file of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from paramtree.core.tree import check_scope
from paramtree.initializers import Initializer, Uniform, get
from paramtree.nn.basic import _activation, _shown
from paramtree.nn.layer import Layer
from paramtree.nn.spatial import (
    Padding,
    Sizes,
    check_layout,
    on_axes,
    padding_of,
    pairs_for,
    shown_padding,
    sizes_of,
    spatial_axes,
    whole,
)

__all__ = ["Conv1D", "Conv2D", "Conv3D"]


class _Convolution(Layer):
    """All that convolutions and transposed ones have in common: everything but the one operation.

    It is no dataclass itself: the fields stand in the subclasses, as Gluon has ``output_padding``
    in the middle of the transposed ones' arguments.
    """

    channels: int
    kernel_size: Sizes
    strides: Sizes
    padding: Padding
    dilation: Sizes
    groups: int
    layout: str
    activation: str | Callable[..., Any] | None
    use_bias: bool
    weight_initializer: Initializer | str | None
    bias_initializer: Initializer | str
    in_channels: int
    dtype: Any

    def __post_init__(self) -> None:
        name = type(self).__name__
        rank = check_layout(self)
        for what, least in (("channels", 1), ("groups", 1), ("in_channels", 0)):
            if not whole(value := getattr(self, what), least):
                raise ValueError(
                    f"{name}: {what} is a whole number of {least} or more, but found {value!r}."
                )
        for what in ("channels", "in_channels"):
            if getattr(self, what) % self.groups:
                raise ValueError(
                    f"{name}: {what} is {getattr(self, what)}, which cannot be divided into "
                    f"{self.groups} equal groups."
                )
        if self.activation is not None:
            _activation(self.activation)
        for what in ("kernel_size", "strides", "dilation"):
            object.__setattr__(self, what, on_axes(self, what, getattr(self, what), rank))
        object.__setattr__(self, "padding", padding_of(self, self.padding, rank))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        weight = get(self.weight_initializer or Uniform())
        object.__setattr__(self, "weight_initializer", weight)
        object.__setattr__(self, "bias_initializer", get(self.bias_initializer))

    def __call__(self, p: Any, x: Any) -> Any:
        check_scope(p)
        sizes = sizes_of(self, x)
        where = self.layout.index("C")
        size = x.shape[where]
        if self.in_channels and size != self.in_channels:
            raise ValueError(
                f"{self!r} expects inputs of {self.in_channels} channels, but found {size} on axis "
                f"{where} of the shape {x.shape}; the layout is {self.layout}."
            )
        if size == 0 or size % self.groups:
            raise ValueError(
                f"{self!r} needs a number of channels that can be divided into groups={self.groups}, "
                f"but found {size} on axis {where} of the shape {x.shape}; the layout is {self.layout}."
            )
        weight = p.param("weight", self._weight_shape(size), self.weight_initializer, self.dtype)
        # As x @ weight does it; lax.conv_general_dilated itself takes equal dtypes only.
        x, weight = jnp.asarray(x), jnp.asarray(weight)
        dtype = jnp.result_type(x, weight)
        x, weight = lax.convert_element_type(x, dtype), lax.convert_element_type(weight, dtype)
        y = self._convolve(x, weight, sizes)
        if self.use_bias:
            bias = p.param("bias", (self.channels,), self.bias_initializer, self.dtype)
            y = y + jnp.expand_dims(bias, [axis for axis in range(y.ndim) if axis != where])
        return y if self.activation is None else _activation(self.activation)(y)

    def _weight_shape(self, size: int) -> tuple[int, ...]:
        raise NotImplementedError

    def _convolve(self, x: Any, weight: Any, sizes: Sequence[int]) -> Any:
        raise NotImplementedError

    def _windows(self) -> list[int]:
        """Returns how far the kernel reaches along each axis."""
        kernel: Any = self.kernel_size
        dilation: Any = self.dilation
        return [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]

    def _weight_layout(self, channels: str) -> str:
        return channels + "".join(self.layout[axis] for axis in spatial_axes(self.layout))

    @property
    def alias(self) -> str:
        """What a ``Sequential`` calls it: all convolutions share one counter, as in Gluon."""
        return "conv"

    def __repr__(self) -> str:
        kernel: Any = self.kernel_size
        rank = len(kernel)
        text = f"{self.in_channels or None} -> {self.channels}, kernel_size={kernel}"
        text += f", stride={self.strides}"
        if self.padding != ((0, 0),) * rank:
            text += f", padding={shown_padding(self.padding)}"
        if self.dilation != (1,) * rank:
            text += f", dilation={self.dilation}"
        if any(more := getattr(self, "output_padding", ())):
            text += f", output_padding={more}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if not self.use_bias:
            text += ", bias=False"
        if self.activation is not None:
            text += f", Activation({_shown(self.activation)})"
        return f"{type(self).__name__}({text})"


@dataclass(frozen=True, repr=False)
class _Conv(_Convolution):
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

    def _weight_shape(self, size: int) -> tuple[int, ...]:
        kernel: Any = self.kernel_size
        return (self.channels, size // self.groups, *kernel)

    def _convolve(self, x: Any, weight: Any, sizes: Sequence[int]) -> Any:
        strides: Any = self.strides
        windows = self._windows()
        pads = pairs_for(self.padding, sizes, windows, strides)
        for size, (low, high), window in zip(sizes, pads, windows, strict=True):
            if size + low + high < window:
                raise ValueError(
                    f"{self!r} reaches over {tuple(windows)}, which is more than an input of the shape "
                    f"{x.shape} has with padding {shown_padding(pads)}; the layout is {self.layout}."
                )
        dilation: Any = self.dilation
        return lax.conv_general_dilated(
            x,
            weight,
            strides,
            pads,
            rhs_dilation=dilation,
            dimension_numbers=(self.layout, self._weight_layout("OI"), self.layout),
            feature_group_count=self.groups,
        )


@dataclass(frozen=True, repr=False)
class Conv1D(_Conv):
    """A convolution over sequences: ``Conv2D`` with one axis in space.

    It takes (batch, width, channels) to (batch, new width, channels). Its parameters are ``weight``,
    (out, in / groups, width), and ``bias``, (out,).

    Args:
      channels, kernel_size, strides, padding, dilation, groups, activation, use_bias,
        weight_initializer, bias_initializer, in_channels, dtype: as for ``Conv2D``.
      layout: "NWC" or "NCW".

    Raises:
      ValueError: as ``Conv2D`` does.

    Example:
      >>> import jax
      >>> net = Conv1D(8, kernel_size=5, dilation=2)
      >>> x = jnp.ones((2, 20, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 12, 8)
    """

    layout: str = "NWC"


@dataclass(frozen=True, repr=False)
class Conv2D(_Conv):
    """A convolution over images, ``activation(weight * x + bias)``.

    It takes (batch, height, width, channels) to (batch, new height, new width, channels). Its
    parameters are ``weight``, (out, in / groups, height, width), and ``bias``, (out,); the layout of
    the data does not change them, so PyTorch's files and those of Gluon's "NCHW" load as they are.
    (With "NHWC" Gluon lays out the weight as (out, height, width, in): move its last axis to 1.)

    Along an axis of n entries the output has
    ⌊(n + low + high - dilation · (kernel - 1) - 1) / stride⌋ + 1.
    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.

    Args:
      channels: how many channels the output has.
      kernel_size: the kernel's size; here and below a number, or a tuple of one for each axis.
      strides: the step from one window to the next.
      padding: how many zeros to put at both ends; a pair (low, high) for an axis where they differ.
        "valid" is 0, and "same" such that the output has ⌈n / stride⌉ entries.
      dilation: the step from one entry of the kernel to the next.
      groups: how many groups of channels there are that see nothing of one another.
      layout: "NHWC" or "NCHW".
      activation: a name or a function; None for none.
      use_bias: whether there is a bias.
      weight_initializer: U[-0.07, 0.07] if None.
      bias_initializer: zeros by default.
      in_channels: how many channels the input has, if that is to be checked; 0 to infer it.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting that is not one, channels that the groups do not divide, an unknown
        activation; on calling: an input without these axes or channels, or smaller than the kernel.

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


@dataclass(frozen=True, repr=False)
class Conv3D(_Conv):
    """A convolution over volumes or films: ``Conv2D`` with three axes in space.

    It takes (batch, depth, height, width, channels) to an output with these axes. Its parameters are
    ``weight``, (out, in / groups, depth, height, width), and ``bias``, (out,).

    Args:
      channels, kernel_size, strides, padding, dilation, groups, activation, use_bias,
        weight_initializer, bias_initializer, in_channels, dtype: as for ``Conv2D``.
      layout: "NDHWC" or "NCDHW".

    Raises:
      ValueError: as ``Conv2D`` does.

    Example:
      >>> import jax
      >>> net = Conv3D(8, kernel_size=(1, 3, 3), padding="same")
      >>> x = jnp.ones((2, 4, 6, 6, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 4, 6, 6, 8)
    """

    layout: str = "NDHWC"
