"""Transposed convolutions over one, two and three spatial axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from paramtree.initializers import Initializer
from paramtree.nn.conv import Convolution
from paramtree.nn.spatial import Padding, Sizes, shown_padding

__all__ = ["Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"]


class _ConvTranspose(Convolution):
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

    _letters = "IO"

    def __post_init__(self: Any) -> None:
        super().__post_init__()
        self._spread("output_padding", minimum=0)
        name, strides, dilation = type(self).__name__, self.strides, self.dilation
        extras = self.output_padding
        if any(extra >= max(pair) for extra, *pair in zip(extras, strides, dilation, strict=True)):
            raise ValueError(
                f"{name}: output_padding must be less than the strides or the dilation, but found "
                f"output_padding={extras}, strides={strides}, dilation={dilation}."
            )
        if self.padding == "same" and any(extras):
            raise ValueError(
                f"{name}: padding='same' fixes the output size at strides times the input size: leave "
                f"out output_padding={extras}."
            )

    def _convolve(self: Any, p: Any, x: Any, weight: Any, sizes: Sequence[int]) -> Any:
        # The gradient of a convolution with respect to its input: dilate the input by the strides,
        # convolve it with the flipped kernel, and crop the padding.
        windows, strides, extras = self._windows(), self.strides, self.output_padding
        if self.padding == "same":  # the padding of the convolution that maps the output to this input
            pads = self._pads([n * stride for n, stride in zip(sizes, strides, strict=True)], windows)
            extras = [max(s - w, 0) for s, w in zip(strides, windows, strict=True)]
        else:
            pads = self._pads(sizes, windows)
        input_pads = []
        for size, stride, window, (low, high), extra in zip(
            sizes, strides, windows, pads, extras, strict=True
        ):
            if (size - 1) * stride + window - low - high + extra < 1:
                raise ValueError(
                    f"{self!r}: padding {shown_padding(pads)} leaves an empty output for an input of "
                    f"shape {x.shape} with layout {self.layout}."
                )
            input_pads.append((window - 1 - low, window - 1 - high + extra))
        weight = lax.rev(weight, range(2, weight.ndim))
        if self.groups > 1:
            # From (in, out / groups) to lax's (in / groups, out).
            inputs, outputs, *kernel = weight.shape
            weight = weight.reshape(self.groups, inputs // self.groups, outputs, *kernel)
            weight = jnp.moveaxis(weight, 0, 1).reshape(inputs // self.groups, self.channels, *kernel)
        return self._apply(x, weight, (1,) * len(sizes), input_pads, strides)


class Conv1DTranspose(_ConvTranspose):
    """A transposed convolution over sequences: ``Conv2DTranspose`` with one spatial axis.

    Its parameters are ``weight``, (in, out / groups, width), and ``bias``, (out,). The layout is "NWC"
    or "NCW". All other settings and the errors are as for ``Conv2DTranspose``.

    Example:
      >>> import jax
      >>> net = Conv1DTranspose(8, kernel_size=3, strides=2)
      >>> x = jnp.ones((2, 10, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 21, 8)
    """

    layout: str = "NWC"


class Conv2DTranspose(_ConvTranspose):
    """A transposed convolution over images: the gradient of a convolution, as a layer.

    It equals ``jax.linear_transpose`` of a ``Conv2D`` with the same settings and weight, plus the bias.
    Its parameters are ``weight``, (in, out / groups, height, width), and ``bias``, (out,).

    An axis of size n becomes
    (n - 1) · stride - low - high + dilation · (kernel - 1) + 1 + output_padding.
    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.

    Args:
      strides: roughly the ratio of output size to input size.
      padding: the padding of the convolution, as for ``Conv2D``, which is cropped from the output here.
        "same" gives an output of size n · stride.
      output_padding: extra entries at the high end. With strides above 1 a convolution maps several
        sizes to one, and this setting selects which of them to restore.
      channels, kernel_size, dilation, groups, layout and all others: as for ``Conv2D``.

    Raises:
      ValueError: a setting is invalid, ``groups`` does not divide the channels, ``output_padding`` is
        not less than the strides or the dilation, or the activation is unknown; when called: the
        input has other axes or channels, or the padding leaves an empty output.

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


class Conv3DTranspose(_ConvTranspose):
    """A transposed convolution over volumes or videos: ``Conv2DTranspose`` with three spatial axes.

    Its parameters are ``weight``, (in, out / groups, depth, height, width), and ``bias``, (out,). The
    layout is "NDHWC" or "NCDHW". All other settings and the errors are as for ``Conv2DTranspose``.

    Example:
      >>> import jax
      >>> net = Conv3DTranspose(8, kernel_size=2, strides=2)
      >>> x = jnp.ones((2, 2, 3, 4, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 4, 6, 8, 8)
    """

    layout: str = "NDHWC"
