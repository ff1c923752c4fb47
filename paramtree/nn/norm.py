"""Layers that normalise: over the batch, a layer, a group, an instance, or by the root mean square.

Their ``gamma`` and ``beta`` have one entry for each index of ``axis``. As in Gluon, a layer has both
even if ``scale`` or ``center`` is off, so that Gluon's files load; what is off is state, which is never
trained, and is not used. Everything is computed in float32 or wider, and the output has the dtype of
the input: the parameters and the statistics of a net that runs in bfloat16 may stay in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from paramtree.core.tree import check_scope
from paramtree.initializers import Initializer, get
from paramtree.nn.basic import _size
from paramtree.nn.layer import Layer

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


@dataclass(frozen=True, repr=False)
class _Norm(Layer):
    """What the layers have in common. Their settings are fields of the subclasses, in Gluon's order."""

    _shown: ClassVar[tuple[str, ...]] = ("axis", "center", "scale")
    _dims: ClassVar[int] = 1  # how many dimensions an input has at least

    def __post_init__(self: Any) -> None:
        name = type(self).__name__
        _size(name, "in_channels", self.in_channels)
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise ValueError(f"{name}: axis is one axis, a whole number, but found {self.axis!r}.")
        if not self.epsilon >= 0:
            raise ValueError(f"{name}: epsilon is a number of 0 or more, but found {self.epsilon!r}.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for field in fields(self):
            if field.name.endswith("_initializer"):
                object.__setattr__(self, field.name, get(getattr(self, field.name)))

    def _axis(self: Any, p: Any, x: Any) -> int:
        """Returns the axis of the channels, counted from the front, after checks of scope and input."""
        check_scope(p)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{self!r} takes floating-point numbers, but found {x.dtype}: cast the input first."
            )
        if x.ndim < self._dims:
            raise ValueError(
                f"{self!r} needs an input of {self._dims} dimensions or more, but found {x.shape}."
            )
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"{self!r}: there is no axis {self.axis} in an input {x.shape}.")
        axis = self.axis % x.ndim
        if axis == 0 and self._dims > 1:
            raise ValueError(
                f"{self!r}: the first axis is the batch, and cannot be that of the channels too, but "
                f"found axis {self.axis} of an input {x.shape}."
            )
        if self.in_channels and x.shape[axis] != self.in_channels:
            raise ValueError(
                f"{self!r} expects {self.in_channels} channels on axis {axis}, but found {x.shape}."
            )
        return int(axis)

    def _gamma_beta(self: Any, p: Any, channels: int) -> tuple[Any, Any]:
        """Declares both parameters; returns None for one that is off."""
        gamma, beta = (
            (p.param if used else p.state)(name, (channels,), initializer, self.dtype)
            for name, used, initializer in (
                ("gamma", self.scale, self.gamma_initializer),
                ("beta", self.center, self.beta_initializer),
            )
        )
        return gamma if self.scale else None, beta if self.center else None

    def __repr__(self: Any) -> str:
        names = {"epsilon": "eps"}
        settings = ("epsilon", *self._shown, "in_channels")
        shown = (f"{names.get(name, name)}={getattr(self, name)}" for name in settings)
        return f"{type(self).__name__}({', '.join(shown)})"


def _wide(x: Any) -> Any:
    """Returns the array in float32, or as it is if it is at least as wide."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else jnp.asarray(x)


def _along(vector: Any, y: Any, axis: int) -> Any:
    """Returns a vector in the dtype of ``y`` and shaped to lie along one of its axes."""
    shape = [1] * y.ndim
    shape[axis] = y.shape[axis]
    return vector.astype(y.dtype).reshape(shape)


def _moments(x: Any, axes: Sequence[int], axis_name: Any = None) -> tuple[Any, Any, Any]:
    """Returns the mean and the biased variance over axes, which are kept with size 1, and x - mean."""

    def mean(x: Any) -> Any:
        here = jnp.mean(x, axes, keepdims=True)
        return here if axis_name is None else lax.pmean(here, axis_name)

    # In two passes: E[x²] - E[x]² takes one, and loses all digits where the mean is large.
    center = mean(x)
    off = x - center
    return center, mean(lax.square(off)), off


def _standard(off: Any, variance: Any, epsilon: float) -> Any:
    # What is off the mean is computed once and used twice. Were it computed twice, XLA would put the
    # gradients of all residual blocks above into each one, and take minutes to compile deep nets.
    return off * lax.rsqrt(variance + epsilon)


def _affine(y: Any, gamma: Any, beta: Any, axis: int, dtype: Any) -> jax.Array:
    """Returns ``gamma * y + beta`` along an axis; None stands for 1 or 0."""
    if gamma is not None:
        y = y * _along(gamma, y, axis)
    if beta is not None:
        y = y + _along(beta, y, axis)
    return y.astype(dtype)


@dataclass(frozen=True, repr=False)
class BatchNorm(_Norm):
    """Normalises each channel over the batch, and keeps running statistics for inference.

    ``y = gamma (x - mean) / √(var + epsilon) + beta``, with the biased variance. Under
    ``pt.training`` the statistics are the batch's, over all axes but ``axis``, and
    ``running = momentum running + (1 - momentum) batch`` is written to the state ``running_mean`` and
    ``running_var``, which otherwise are the statistics. As in MXNet, and unlike in PyTorch, the
    running variance is of the biased ones too, and ``momentum`` is the share that stays.

    Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal
    covariate shift", 2015.

    Args:
      axis: the axis of the channels. Gluon's default is 1, as its layouts have them there.
      momentum: the share of the running statistics that a step keeps.
      epsilon: is added to the variance.
      center: whether ``beta`` is added.
      scale: whether ``gamma`` multiplies; it counts as 1 otherwise, Gluon's ``fix_gamma``.
      use_global_stats: whether the running statistics are used, and left alone, in training too.
      beta_initializer: zeros by default.
      gamma_initializer: ones by default.
      running_mean_initializer: zeros by default.
      running_variance_initializer: ones by default.
      in_channels: the number of channels if it is to be checked; 0 to infer it.
      axis_name: the name, or names, of mapped axes (``jax.vmap``, ``jax.shard_map``, ``jax.pmap``)
        over which training also averages: the whole batch's statistics on many devices.
      dtype: the dtype of gamma and beta. The statistics are in float32, or wider if this is.

    Raises:
      ValueError: a setting that is not one, or an input without that axis, of other channels, or in
        training empty.
      TypeError: an input that is not of floating point.
      NameError: in training outside of the map that ``axis_name`` names.
      ScopeError: in training inside a transform within the model, out of which the running
        statistics cannot be written.

    Example:
      >>> import paramtree as pt
      >>> net = BatchNorm()
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> params = net.init(jax.random.key(0), x)
      >>> y, params = pt.training(net)(params, x)
      >>> y.round(2).tolist(), (10 * params.running_mean).round(2).tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 20.0])
    """

    axis: int = -1
    momentum: float = 0.9
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    use_global_stats: bool = False
    beta_initializer: Initializer | str = "zeros"
    gamma_initializer: Initializer | str = "ones"
    running_mean_initializer: Initializer | str = "zeros"
    running_variance_initializer: Initializer | str = "ones"
    in_channels: int = 0
    axis_name: Any = None
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"BatchNorm: momentum is a share in [0, 1], but found {self.momentum!r}.")
        if isinstance(self.axis_name, list):
            object.__setattr__(self, "axis_name", tuple(self.axis_name))

    def __call__(self, p: Any, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        channels = x.shape[axis]
        gamma, beta = self._gamma_beta(p, channels)
        dtype = jnp.float32 if self.dtype.itemsize < 4 else self.dtype
        old_mean = p.state("running_mean", (channels,), self.running_mean_initializer, dtype)
        old_variance = p.state("running_var", (channels,), self.running_variance_initializer, dtype)
        wide = _wide(x)
        if p.training and not self.use_global_stats:
            mean, variance, off = self._of_batch(wide, axis)
            p.update("running_mean", self._blend(old_mean, mean))
            p.update("running_var", self._blend(old_variance, variance))
        else:
            mean, variance = (_along(s, wide, axis) for s in (old_mean, old_variance))
            off = wide - mean
        return _affine(_standard(off, variance, self.epsilon), gamma, beta, axis, x.dtype)

    def _of_batch(self, x: Any, axis: int) -> tuple[Any, Any, Any]:
        axes = [i for i in range(x.ndim) if i != axis]
        if not math.prod(x.shape[i] for i in axes):
            raise ValueError(
                f"{self!r} has no statistics of an empty batch, of shape {x.shape}, to train with."
            )
        try:
            return _moments(x, axes, self.axis_name)
        except NameError as error:
            raise NameError(
                f"{self!r} averages over the mapped axis {self.axis_name!r} in training, but is called "
                f"outside of it: map the step, as in jax.vmap(step, axis_name={self.axis_name!r})."
            ) from error

    def _blend(self, old: Any, new: Any) -> Any:
        # State keeps its dtype, and a tree that was cast may have it in low precision.
        wide = _wide(old)
        new = new.reshape(old.shape).astype(wide.dtype)
        return (self.momentum * wide + (1 - self.momentum) * new).astype(old.dtype)

    def __repr__(self) -> str:
        settings = [
            f"axis={self.axis}",
            f"eps={self.epsilon}",
            f"momentum={self.momentum}",
            f"fix_gamma={not self.scale}",
            f"use_global_stats={self.use_global_stats}",
            f"in_channels={self.in_channels or None}",
            *([] if self.axis_name is None else [f"axis_name={self.axis_name!r}"]),
        ]
        return f"BatchNorm({', '.join(settings)})"


@dataclass(frozen=True, repr=False)
class LayerNorm(_Norm):
    """Normalises over one axis: ``y = gamma (x - mean) / √(var + epsilon) + beta``.

    Ba et al., "Layer normalization", 2016.

    Args:
      axis: the axis that is normalised over, and along which gamma and beta lie.
      epsilon: is added to the variance, which is the biased one.
      center: whether ``beta`` is added.
      scale: whether ``gamma`` multiplies.
      beta_initializer: zeros by default.
      gamma_initializer: ones by default.
      in_channels: the size of the axis if it is to be checked; 0 to infer it.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting that is not one, or an input without that axis or of another size.
      TypeError: an input that is not of floating point.

    Example:
      >>> net = LayerNorm()
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> net(net.init(jax.random.key(0), x), x).round(2).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    axis: int = -1
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    beta_initializer: Initializer | str = "zeros"
    gamma_initializer: Initializer | str = "ones"
    in_channels: int = 0
    dtype: Any = "float32"

    def __call__(self, p: Any, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        gamma, beta = self._gamma_beta(p, x.shape[axis])
        wide = _wide(x)
        _, variance, off = _moments(wide, [axis])
        y = _standard(off, variance, self.epsilon)
        return _affine(y, gamma, beta, axis, x.dtype)


@dataclass(frozen=True, repr=False)
class InstanceNorm(_Norm):
    """Normalises each channel of each example over all other axes, as images over height and width.

    ``y = gamma (x - mean) / √(var + epsilon) + beta``. Ulyanov et al., "Instance normalization: the
    missing ingredient for fast stylization", 2016.

    Args:
      axis: the axis of the channels; the first axis is the batch. Gluon's default is 1.
      epsilon: is added to the variance, which is the biased one.
      center: whether ``beta`` is added.
      scale: whether ``gamma`` multiplies; as in Gluon, not by default.
      beta_initializer: zeros by default.
      gamma_initializer: ones by default.
      in_channels: the number of channels if it is to be checked; 0 to infer it.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting that is not one, or an input of fewer than three dimensions, without that
        axis, or of other channels.
      TypeError: an input that is not of floating point.

    Example:
      >>> net = InstanceNorm()
      >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])  # one example, two places, two channels
      >>> net(net.init(jax.random.key(0), x), x).round(2).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    _dims: ClassVar[int] = 3

    axis: int = -1
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = False
    beta_initializer: Initializer | str = "zeros"
    gamma_initializer: Initializer | str = "ones"
    in_channels: int = 0
    dtype: Any = "float32"

    def __call__(self, p: Any, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        gamma, beta = self._gamma_beta(p, x.shape[axis])
        wide = _wide(x)
        axes = [i for i in range(1, x.ndim) if i != axis]
        _, variance, off = _moments(wide, axes)
        y = _standard(off, variance, self.epsilon)
        return _affine(y, gamma, beta, axis, x.dtype)


@dataclass(frozen=True, repr=False)
class GroupNorm(_Norm):
    """Normalises groups of neighbouring channels of each example, over all axes but the batch.

    ``y = gamma (x - mean) / √(var + epsilon) + beta``. Wu and He, "Group normalization", 2018. There is
    one gamma and one beta a channel, as in PyTorch and MXNet 2; MXNet 1 has one a group.

    Args:
      num_groups: into how many groups the channels are divided.
      epsilon: is added to the variance, which is the biased one.
      center: whether ``beta`` is added.
      scale: whether ``gamma`` multiplies.
      beta_initializer: zeros by default.
      gamma_initializer: ones by default.
      in_channels: the number of channels if it is to be checked; 0 to infer it.
      axis: the axis of the channels; the first axis is the batch. In Gluon it is always 1.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting that is not one, or an input of fewer than two dimensions, without that
        axis, of other channels, or of channels that the groups do not divide.
      TypeError: an input that is not of floating point.

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
        _size("GroupNorm", "num_groups", self.num_groups)
        if not self.num_groups:
            raise ValueError("GroupNorm: num_groups is 1 or more, but found 0.")

    def __call__(self, p: Any, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        channels = x.shape[axis]
        if channels % self.num_groups:
            raise ValueError(
                f"{self!r} cannot divide {channels} channels, axis {axis} of {x.shape}, into groups."
            )
        gamma, beta = self._gamma_beta(p, channels)
        wide = _wide(x)
        split = self.num_groups, channels // self.num_groups
        groups = wide.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :])
        axes = [i for i in range(1, groups.ndim) if i != axis]
        _, variance, off = _moments(groups, axes)
        y = _standard(off, variance, self.epsilon).reshape(x.shape)
        return _affine(y, gamma, beta, axis, x.dtype)


@dataclass(frozen=True, repr=False)
class RMSNorm(_Norm):
    """Divides by the root mean square over one axis: ``y = gamma x / √(mean(x²) + epsilon)``.

    Zhang and Sennrich, "Root mean square layer normalization", 2019.

    Args:
      axis: the axis that is normalised over, and along which gamma lies.
      epsilon: is added to the mean square.
      gamma_initializer: ones by default.
      in_channels: the size of the axis if it is to be checked; 0 to infer it.
      dtype: the parameter's dtype.

    Raises:
      ValueError: a setting that is not one, or an input without that axis or of another size.
      TypeError: an input that is not of floating point.

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

    def __call__(self, p: Any, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        gamma = p.param("gamma", (x.shape[axis],), self.gamma_initializer, self.dtype)
        wide = _wide(x)
        square = jnp.mean(lax.square(wide), axis, keepdims=True)
        return _affine(wide * lax.rsqrt(square + self.epsilon), gamma, None, axis, x.dtype)
