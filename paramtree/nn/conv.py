"""Convolutions over one, two and three spatial axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paramtree.core.errors import suggest
from paramtree.core.tree import located, place_of
from paramtree.initializers import Initializer, Uniform, get
from paramtree.initializers.axes import of_weight
from paramtree.nn.basic import Activation, as_activation, check_integers
from paramtree.nn.spatial import Padding, Sizes, Spatial, shown_padding
from paramtree.typing import Scope

__all__ = ["Conv1D", "Conv2D", "Conv3D"]

# PyTorch's names, and those of jnp.pad.
_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class Convolution(Spatial):
    """Base of convolutions and transposed ones; subclasses declare the fields in Gluon's order."""

    alias = "conv"  # as in Gluon, all convolutions in a `Sequential` share one counter
    _letters = "OI"  # the first two axes of the weight; the second one is divided by groups

    def __post_init__(self: Any) -> None:
        self._check_layout()
        self._check_counts()
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

    def _check_counts(self: Any) -> None:
        check_integers(self, 1, "channels", "groups")
        check_integers(self, 0, "in_channels")
        for setting in ("channels", "in_channels"):
            if (size := getattr(self, setting)) % self.groups:
                raise ValueError(
                    f"{type(self).__name__}: {setting} must be divisible by groups={self.groups}, but "
                    f"found {size}."
                )

    def _counts(self: Any, size: int) -> tuple[int, int]:
        """Returns the number of output channels and of groups for a number of input channels."""
        return self.channels, self.groups

    def __call__(self: Any, p: Scope, x: Any) -> jax.Array:
        sizes = self._sizes(x)
        axis = self.layout.index("C")
        size = x.shape[axis]
        if self.in_channels and size != self.in_channels:
            raise ValueError(
                f"{self!r} expects {self.in_channels} channels, but found {size} on axis {axis} of "
                f"shape {x.shape} with layout {self.layout}."
            )
        channels, groups = self._counts(size)
        if size == 0 or size % groups:
            raise ValueError(
                f"{self!r} needs a positive number of channels divisible by groups={groups}, but "
                f"found {size} on axis {axis} of shape {x.shape} with layout {self.layout}."
            )
        first, second = (channels if letter == "O" else size for letter in self._letters)
        shape = first, second // groups, *self.kernel_size
        weight = p.param("weight", shape, self.weight_initializer, self.dtype)
        # Promote as x @ weight would; lax.conv_general_dilated requires equal dtypes.
        x, weight = jnp.asarray(x), jnp.asarray(weight)
        dtype = jnp.result_type(x, weight)
        y = self._convolve(p, x.astype(dtype), weight.astype(dtype), sizes)
        if self.use_bias:
            bias = p.param("bias", (channels,), self.bias_initializer, self.dtype)
            y = y + jnp.expand_dims(bias, [i for i in range(y.ndim) if i != axis])
        return y if self.activation is None else as_activation(self.activation)(y)

    def _windows(self: Any) -> list[int]:
        """Returns the size of the dilated kernel along each axis."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    def _apply(self: Any, x: Any, weight: Any, strides: Any, pads: Any, dilation: Any = None) -> Any:
        """Convolves x with the weight; ``dilation`` is that of x."""
        inputs = weight.shape[self._letters.index("I")]  # of each group
        kernel = self._letters + "".join(self.layout[axis] for axis in self._axes)
        return lax.conv_general_dilated(
            x,
            weight,
            strides,
            pads,
            dilation,
            self.dilation,
            dimension_numbers=(self.layout, kernel, self.layout),
            feature_group_count=x.shape[self.layout.index("C")] // inputs,
        )

    def __repr__(self: Any) -> str:
        rank = len(self.kernel_size)
        text = f"{self.in_channels or None} -> {self._shown_channels()}"
        text += f", kernel_size={self.kernel_size}, stride={self.strides}"
        if self.padding != ((0, 0),) * rank:
            text += f", padding={shown_padding(self.padding)}"
        if (mode := getattr(self, "padding_mode", "zeros")) != "zeros":
            text += f", padding_mode={mode}"
        if self.dilation != (1,) * rank:
            text += f", dilation={self.dilation}"
        if any(output_padding := getattr(self, "output_padding", ())):
            text += f", output_padding={output_padding}"
        for setting in ("groups", "depth_multiplier"):
            if (count := getattr(self, setting, 1)) != 1:
                text += f", {setting}={count}"
        if not self.use_bias:
            text += ", bias=False"
        if self.activation is not None:
            text += f", {Activation(self.activation)}"
        return f"{type(self).__name__}({text})"

    def _shown_channels(self: Any) -> Any:
        return self.channels


class Direct(Convolution):
    """Base of the convolutions that are not transposed, which have a ``padding_mode``."""

    def __post_init__(self: Any) -> None:
        super().__post_init__()
        name, mode = type(self).__name__, self.padding_mode
        if not isinstance(mode, str) or mode not in _MODES:
            raise ValueError(
                f"{name}: padding_mode must be one of {', '.join(map(repr, _MODES))}, but found "
                f"{mode!r}.{suggest(str(mode), _MODES)}"
            )
        none = self.padding == ((0, 0),) * len(self._axes)
        if mode != "zeros" and none and max(self.kernel_size) > 1:
            raise ValueError(
                f"{name}: padding_mode={mode!r} says what to pad with, but padding=0 pads nothing: "
                "give a padding, such as 1 or 'same', or leave out padding_mode."
            )

    def _convolve(self: Any, p: Any, x: Any, weight: Any, sizes: Sequence[int]) -> Any:
        windows = self._windows()
        pads = self._pads(sizes, windows)
        for size, (low, high), window in zip(sizes, pads, windows, strict=True):
            if size + low + high < window:
                raise ValueError(
                    f"{self!r}: the dilated kernel {tuple(windows)} is larger than an input of shape "
                    f"{x.shape} with padding {shown_padding(pads)} and layout {self.layout}."
                )
        if self.padding_mode != "zeros":
            x, pads = self._padded(p, x, sizes, pads), [(0, 0)] * len(pads)
        return self._apply(x, weight, self.strides, pads)

    def _padded(self: Any, p: Any, x: Any, sizes: Sequence[int], pads: Any) -> Any:
        """Returns x padded with its own entries."""
        for axis, size, pair in zip(self._axes, sizes, pads, strict=True):
            most = {"reflect": size - 1, "circular": size, "replicate": max(pair)}[self.padding_mode]
            if max(pair) > most:
                place = f" of {located(place_of(p))}" if place_of(p) else ""
                raise ValueError(
                    f"{self!r}{place}: padding_mode={self.padding_mode!r} pads an axis of size {size} "
                    f"by {most} at most, but found padding {shown_padding(pads)} for axis {axis} of "
                    f"shape {x.shape} with layout {self.layout}: give less padding, or padding_mode="
                    "'replicate' or 'zeros', which have no limit."
                )
        widths = [(0, 0)] * x.ndim
        for axis, pair in zip(self._axes, pads, strict=True):
            widths[axis] = pair
        return jnp.pad(x, widths, _MODES[self.padding_mode])


class _Conv(Direct):
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
    padding_mode: str = "zeros"


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
      padding_mode: what the padding is, as in PyTorch: "zeros"; "reflect", the entries mirrored at the
        outermost one; "replicate", the outermost entry; "circular", the entries of the other end.

    Raises:
      ValueError: a setting is invalid, ``groups`` does not divide the channels, ``padding_mode`` is
        given without padding, or the activation is unknown; when called: the input has other axes or
        channels, is smaller than the kernel, or has too few entries to pad with.

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
