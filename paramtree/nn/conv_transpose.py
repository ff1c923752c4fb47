"""Transposed convolutions over one, two and three axes in space."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from paramtree.initializers import Initializer
from paramtree.nn.conv import _Convolution
from paramtree.nn.spatial import Padding, Sizes, on_axes, pairs_for, shown_padding

__all__ = ["Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"]


@dataclass(frozen=True, repr=False)
class _ConvTranspose(_Convolution):
    channels: int
    kernel_size: Sizes
    strides: Sizes = 1
    padding: Padding = 0
    output_padding: Sizes = 0
    dilation: Sizes = 1
    groups: int = 1
    layout: str = ""
    activation: str | Callable[..., Any] | None = None
    use_bias: bool = True
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"
    in_channels: int = 0
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        strides: Any = self.strides
        dilation: Any = self.dilation
        name = type(self).__name__
        more = on_axes(self, "output_padding", self.output_padding, len(strides), least=0)
        if any(extra >= max(pair) for extra, *pair in zip(more, strides, dilation, strict=True)):
            raise ValueError(
                f"{name}: output_padding is less than the strides or the dilation, as it chooses among "
                f"the sizes that a convolution makes the same; found output_padding={more}, "
                f"strides={strides}, dilation={dilation}."
            )
        if self.padding == "same" and any(more):
            raise ValueError(
                f"{name}: padding='same' makes the output strides times as large as the input, so "
                f"output_padding has nothing to choose; leave out output_padding={more}."
            )
        object.__setattr__(self, "output_padding", more)

    def _weight_shape(self, size: int) -> tuple[int, ...]:
        kernel: Any = self.kernel_size
        return (size, self.channels // self.groups, *kernel)

    def _convolve(self, x: Any, weight: Any, sizes: Sequence[int]) -> Any:
        # The gradient of a convolution with respect to its input: the input is spread out by the
        # strides and convolved with the mirrored kernel, and what the padding covered is cut off.
        strides: Any = self.strides
        more: Any = self.output_padding
        windows = self._windows()
        if self.padding == "same":  # undoes that of a convolution which comes to these sizes
            whole_sizes = [size * stride for size, stride in zip(sizes, strides, strict=True)]
            pads = pairs_for("same", whole_sizes, windows, strides)
            more = [max(s - w, 0) for s, w in zip(strides, windows, strict=True)]
        else:
            pads = pairs_for(self.padding, sizes, windows, strides)
        around = []
        for size, stride, window, (low, high), extra in zip(
            sizes, strides, windows, pads, more, strict=True
        ):
            if (size - 1) * stride + window - low - high + extra < 1:
                raise ValueError(
                    f"{self!r}: the padding {shown_padding(pads)} leaves nothing of the output for an "
                    f"input of the shape {x.shape}; the layout is {self.layout}."
                )
            around.append((window - 1 - low, window - 1 - high + extra))
        weight = lax.rev(weight, range(2, weight.ndim))
        if self.groups > 1:
            # From (in, out / groups) to (in / groups, out), as lax has it.
            inputs, outputs, *kernel = weight.shape
            weight = weight.reshape(self.groups, inputs // self.groups, outputs, *kernel)
            weight = jnp.moveaxis(weight, 0, 1).reshape(inputs // self.groups, self.channels, *kernel)
        dilation: Any = self.dilation
        return lax.conv_general_dilated(
            x,
            weight,
            (1,) * len(sizes),
            around,
            lhs_dilation=strides,
            rhs_dilation=dilation,
            dimension_numbers=(self.layout, self._weight_layout("IO"), self.layout),
            feature_group_count=self.groups,
        )


@dataclass(frozen=True, repr=False)
class Conv1DTranspose(_ConvTranspose):
    """A transposed convolution over sequences: ``Conv2DTranspose`` with one axis in space.

    Its parameters are ``weight``, (in, out / groups, width), and ``bias``, (out,).

    Args:
      channels, kernel_size, strides, padding, output_padding, dilation, groups, activation,
        use_bias, weight_initializer, bias_initializer, in_channels, dtype: as for
        ``Conv2DTranspose``.
      layout: "NWC" or "NCW".

    Raises:
      ValueError: as ``Conv2DTranspose`` does.

    Example:
      >>> import jax
      >>> net = Conv1DTranspose(8, kernel_size=3, strides=2)
      >>> x = jnp.ones((2, 10, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 21, 8)
    """

    layout: str = "NWC"


@dataclass(frozen=True, repr=False)
class Conv2DTranspose(_ConvTranspose):
    """A transposed convolution over images: the gradient of a convolution as a layer.

    With ``conv`` a ``Conv2D`` of these settings and this weight, it is what
    ``jax.linear_transpose`` makes of ``conv``, plus the bias. Its parameters are ``weight``,
    (in, out / groups, height, width), and ``bias``, (out,).

    Along an axis of n entries the output has
    (n - 1) · stride - low - high + dilation · (kernel - 1) + 1 + output_padding.
    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.

    Args:
      channels: how many channels the output has.
      kernel_size: the kernel's size; here and below a number, or a tuple of one for each axis.
      strides: how many times larger the output is, roughly.
      padding: how much the convolution pads, and so how much is cut off here; as for ``Conv2D``.
        "same" gives n · stride entries.
      output_padding: how many more entries the output is to have at the high end: with strides
        above 1 a convolution comes to one size from several, and this says which is meant.
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
      ValueError: a setting that is not one, channels that the groups do not divide, an
        ``output_padding`` as large as strides and dilation, an unknown activation; on calling: an
        input without these axes or channels, or one of which the padding leaves nothing.

    Example:
      >>> import jax
      >>> net = Conv2DTranspose(8, kernel_size=4, strides=2, padding=1)
      >>> x = jnp.ones((2, 14, 14, 3))
      >>> params = net.init(jax.random.key(0), x)
      >>> params
      Parameter weight (shape=(3, 8, 4, 4), dtype=float32)
      Parameter bias (shape=(8,), dtype=float32)
      >>> net(params, x).shape
      (2, 28, 28, 8)
    """

    layout: str = "NHWC"


@dataclass(frozen=True, repr=False)
class Conv3DTranspose(_ConvTranspose):
    """A transposed convolution over volumes or films: ``Conv2DTranspose`` with three axes in space.

    Its parameters are ``weight``, (in, out / groups, depth, height, width), and ``bias``, (out,).

    Args:
      channels, kernel_size, strides, padding, output_padding, dilation, groups, activation,
        use_bias, weight_initializer, bias_initializer, in_channels, dtype: as for
        ``Conv2DTranspose``.
      layout: "NDHWC" or "NCDHW".

    Raises:
      ValueError: as ``Conv2DTranspose`` does.

    Example:
      >>> import jax
      >>> net = Conv3DTranspose(8, kernel_size=2, strides=2)
      >>> x = jnp.ones((2, 2, 3, 4, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 4, 6, 8, 8)
    """

    layout: str = "NDHWC"
