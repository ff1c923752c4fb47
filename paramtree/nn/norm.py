"""Layer, instance, group and RMS normalization, and the base of all normalizing layers.

``gamma`` and ``beta`` have one entry for each index of ``axis``. As in Gluon, a layer declares both
even if ``scale`` or ``center`` is off, so that Gluon's files load; the unused one is state and never
trained. Layers compute in float32 or wider and return the input's dtype: the parameters and
statistics of a bfloat16 net may stay in float32.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from paramtree.initializers import Initializer, get
from paramtree.nn.basic import check_integers
from paramtree.nn.layer import Layer
from paramtree.typing import Scope

__all__ = ["GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class Norm(Layer):
    """Base of normalizing layers. Subclasses declare the fields, each in Gluon's order."""

    _shown: ClassVar[tuple[str, ...]] = ("axis", "center", "scale")
    _dims: ClassVar[int] = 1  # the minimum number of input dimensions

    def __post_init__(self: Any) -> None:
        name = type(self).__name__
        check_integers(self, 0, "in_channels")
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise ValueError(f"{name}: axis must be a single integer, but found {self.axis!r}.")
        if not self.epsilon >= 0:
            raise ValueError(f"{name}: epsilon must be non-negative, but found {self.epsilon!r}.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for field in fields(self):
            if field.name.endswith("_initializer"):
                object.__setattr__(self, field.name, get(getattr(self, field.name)))

    def _axis(self: Any, p: Any, x: Any) -> int:
        """Checks the scope and the input, and returns the channel axis as a non-negative number."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{self!r} needs floating-point numbers, but found {x.dtype}: cast the input first."
            )
        if x.ndim < self._dims:
            raise ValueError(f"{self!r} needs at least {self._dims} dimensions, but found {x.shape}.")
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"{self!r} finds no axis {self.axis} in an input of shape {x.shape}.")
        axis = self.axis % x.ndim
        if axis == 0 and self._dims > 1:
            raise ValueError(
                f"{self!r}: the channel axis cannot be the first, which is the batch, but found axis "
                f"{self.axis} of an input of shape {x.shape}."
            )
        if self.in_channels and x.shape[axis] != self.in_channels:
            raise ValueError(
                f"{self!r} expects {self.in_channels} channels on axis {axis}, but found {x.shape}."
            )
        return int(axis)

    def _gamma_beta(self: Any, p: Any, channels: int) -> tuple[Any, Any]:
        """Declares gamma and beta, and returns them, or None for one that is off."""
        declare_gamma = p.param if self.scale else p.state
        declare_beta = p.param if self.center else p.state
        gamma = declare_gamma("gamma", (channels,), self.gamma_initializer, self.dtype)
        beta = declare_beta("beta", (channels,), self.beta_initializer, self.dtype)
        return gamma if self.scale else None, beta if self.center else None

    def _scaled(self: Any, x: Any, y: Any, variance: Any, axis: int, gamma: Any, beta: Any) -> Any:
        """Returns ``gamma y / √(variance + epsilon) + beta``, in the shape and dtype of x.

        y is the deviations of ``moments_of``: computed again, they make XLA duplicate the gradients of
        all later residual blocks into each block, and compiling a deep net takes minutes.
        """
        y = (y * lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        if gamma is not None:
            y = y * broadcast_along(gamma, y, axis)
        if beta is not None:
            y = y + broadcast_along(beta, y, axis)
        return y.astype(x.dtype)

    def _normalized(self: Any, p: Any, x: Any, axis: int, over: list[int], shape: Any = None) -> Any:
        """Returns x normalized over axes, which are those of ``shape`` if given, such as of groups."""
        gamma, beta = self._gamma_beta(p, x.shape[axis])
        _, variance, deviations = moments_of(widened(x).reshape(shape or x.shape), over)
        return self._scaled(x, deviations, variance, axis, gamma, beta)

    def __repr__(self: Any) -> str:
        settings = (f"{name}={getattr(self, name)}" for name in (*self._shown, "in_channels"))
        return f"{type(self).__name__}(eps={self.epsilon}, {', '.join(settings)})"


def widened(x: Any) -> Any:
    """Returns the array in at least float32."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else jnp.asarray(x)


def broadcast_along(vector: Any, y: Any, axis: int) -> Any:
    """Returns a vector in the dtype of ``y``, reshaped to broadcast along one of its axes."""
    shape = [1] * y.ndim
    shape[axis] = y.shape[axis]
    return vector.astype(y.dtype).reshape(shape)


def moments_of(x: Any, axes: Sequence[int], axis_name: Any = None) -> tuple[Any, Any, Any]:
    """Returns the mean and biased variance over axes, kept with size 1, and the deviations x - mean."""

    def mean(x: Any) -> Any:
        local = jnp.mean(x, axes, keepdims=True)
        return local if axis_name is None else lax.pmean(local, axis_name)

    # Two passes, as E[x²] - E[x]² loses all digits where the mean is large. One pass around a mean of
    # some examples is as exact, and a step of BatchNorm and convolution takes 2 to 10 % less on CPU.
    # But then no mean of the gradient separates the residual blocks of a deep net, XLA duplicates the
    # gradients of the later ones in each, and compiling 40 blocks takes 32 s instead of 5.
    center = mean(x)
    deviations = x - center
    return center, mean(lax.square(deviations)), deviations


class _AxisNorm(Norm):
    axis: int = -1
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    beta_initializer: Initializer | str = "zeros"
    gamma_initializer: Initializer | str = "ones"
    in_channels: int = 0
    dtype: Any = "float32"


class LayerNorm(_AxisNorm):
    """Normalizes over one axis: ``y = gamma (x - mean) / √(var + epsilon) + beta``.

    Ba et al., "Layer normalization", 2016.

    Args:
      axis: the axis to normalize over, which gamma and beta lie along.
      epsilon: added to the biased variance.
      center: whether to add ``beta``.
      scale: whether to multiply by ``gamma``.
      beta_initializer: zeros by default.
      gamma_initializer: ones by default.
      in_channels: the expected size of the axis; 0 accepts any size.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting is invalid; when called: the input has no such axis, or another size.
      TypeError: when called: the input is not floating-point.

    Example:
      >>> net = LayerNorm()
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> net(net.init(jax.random.key(0), x), x).round(2).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        return self._normalized(p, x, axis, [axis])


class InstanceNorm(_AxisNorm):
    """Normalizes each channel of each example over all other axes, such as height and width.

    ``y = gamma (x - mean) / √(var + epsilon) + beta``. Ulyanov et al., "Instance normalization: the
    missing ingredient for fast stylization", 2016.

    Args:
      axis: the channel axis; the first axis is the batch. Gluon's default is 1.
      scale: whether to multiply by ``gamma``; off by default, as in Gluon.
      epsilon, center, in_channels and all others: as for ``LayerNorm``.

    Raises:
      ValueError: a setting is invalid; when called: the input has fewer than three dimensions, no
        such axis, or another number of channels.
      TypeError: when called: the input is not floating-point.

    Example:
      >>> net = InstanceNorm()
      >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])  # one example, two positions, two channels
      >>> net(net.init(jax.random.key(0), x), x).round(2).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    _dims: ClassVar[int] = 3
    scale: bool = False

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        return self._normalized(p, x, axis, [i for i in range(1, x.ndim) if i != axis])


class GroupNorm(Norm):
    """Normalizes each group of adjacent channels of each example, over all axes except the batch.

    ``y = gamma (x - mean) / √(var + epsilon) + beta``. Wu and He, "Group normalization", 2018. gamma
    and beta have one entry per channel, as in PyTorch and MXNet 2; MXNet 1 has one per group.

    Args:
      num_groups: the number of groups.
      axis: the channel axis; the first axis is the batch. Always 1 in Gluon.
      epsilon, center, scale, in_channels and all others: as for ``LayerNorm``.

    Raises:
      ValueError: a setting is invalid; when called: the input has fewer than two dimensions, no such
        axis, or a number of channels that is unexpected or not divisible by ``num_groups``.
      TypeError: when called: the input is not floating-point.

    Example:
      >>> net = GroupNorm(num_groups=2)
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> net(net.init(jax.random.key(0), x), x).round(2).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    _shown: ClassVar[tuple[str, ...]] = ("num_groups", "center", "scale", "axis")
    _dims: ClassVar[int] = 2

    num_groups: int = 1
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    beta_initializer: Initializer | str = "zeros"
    gamma_initializer: Initializer | str = "ones"
    in_channels: int = 0
    axis: int = -1
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 0, "num_groups")
        if not self.num_groups:
            raise ValueError("GroupNorm: num_groups must be positive, but found 0.")

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        channels = x.shape[axis]
        if channels % self.num_groups:
            raise ValueError(
                f"{self!r} cannot divide {channels} channels into {self.num_groups} groups, on axis "
                f"{axis} of shape {x.shape}."
            )
        over = [i for i in range(1, x.ndim + 1) if i != axis]
        shape = *x.shape[:axis], self.num_groups, channels // self.num_groups, *x.shape[axis + 1 :]
        return self._normalized(p, x, axis, over, shape)


class RMSNorm(Norm):
    """Divides by the root mean square over one axis: ``y = gamma x / √(mean(x²) + epsilon)``.

    Zhang and Sennrich, "Root mean square layer normalization", 2019. The errors are as for
    ``LayerNorm``.

    Args:
      axis: the axis to normalize over, which gamma lies along.
      epsilon: added to the mean square.
      gamma_initializer: ones by default.
      in_channels: the expected size of the axis; 0 accepts any size.
      dtype: the parameter's dtype.

    Example:
      >>> net = RMSNorm()
      >>> x = jnp.array([[1.0, 7.0], [-10.0, 70.0]])
      >>> (5 * net(net.init(jax.random.key(0), x), x)).round(2).tolist()
      [[1.0, 7.0], [-1.0, 7.0]]
    """

    _shown: ClassVar[tuple[str, ...]] = ("axis",)

    axis: int = -1
    epsilon: float = 1e-6
    gamma_initializer: Initializer | str = "ones"
    in_channels: int = 0
    dtype: Any = "float32"

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        gamma = p.param("gamma", (x.shape[axis],), self.gamma_initializer, self.dtype)
        wide = widened(x)
        square = jnp.mean(lax.square(wide), axis, keepdims=True)
        return self._scaled(x, wide, square, axis, gamma, None)
