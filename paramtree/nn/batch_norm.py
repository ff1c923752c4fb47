"""Batch normalization. See ``norm`` for the parameters and dtypes that all normalizing layers share."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.initializers import Initializer
from paramtree.nn.norm import Norm, broadcast_along, moments_of, widened
from paramtree.typing import Scope

__all__ = ["BatchNorm"]


class BatchNorm(Norm):
    """Normalizes each channel over the batch, and keeps running statistics for inference.

    ``y = gamma (x - mean) / √(var + epsilon) + beta``, with the biased variance. Under
    ``pt.training`` the mean and variance are the batch's, over all axes except ``axis``, and update the
    state ``running_mean`` and ``running_var``: ``running = momentum running + (1 - momentum) batch``.
    Inference uses the running statistics. As in MXNet, and unlike in PyTorch, the running variance is
    biased too, and ``momentum`` is the weight of the old value.

    Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal
    covariate shift", 2015.

    Args:
      axis: the channel axis. Gluon's default is 1.
      momentum: the weight of the old running statistics in an update, in [0, 1].
      epsilon: added to the variance.
      center: whether to add ``beta``.
      scale: whether to multiply by ``gamma``; off is Gluon's ``fix_gamma``.
      use_global_stats: whether training also uses the running statistics, without updating them.
      beta_initializer: zeros by default.
      gamma_initializer: ones by default.
      running_mean_initializer: zeros by default.
      running_variance_initializer: ones by default.
      in_channels: the expected number of channels; 0 accepts any number.
      axis_name: the name or names of mapped axes (``jax.vmap``, ``jax.shard_map``, ``jax.pmap``) to
        average the statistics over in training, for a batch that is split over devices.
      dtype: the dtype of gamma and beta. The statistics are at least float32.

    Raises:
      ValueError: a setting is invalid; when called: the input has no such axis, another number of
        channels, or is empty in training.
      TypeError: when called: the input is not floating-point.
      NameError: when called in training outside the map that binds ``axis_name``.
      ScopeError: when called in training inside a jax transform within the model, from which the
        running statistics cannot be written.

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
            raise ValueError(f"BatchNorm: momentum must be in [0, 1], but found {self.momentum!r}.")
        if isinstance(self.axis_name, list):
            object.__setattr__(self, "axis_name", tuple(self.axis_name))

    def __call__(self, p: Scope, x: Any) -> jax.Array:
        axis = self._axis(p, x)
        channels = x.shape[axis]
        gamma, beta = self._gamma_beta(p, channels)
        dtype = jnp.float32 if self.dtype.itemsize < 4 else self.dtype
        old_mean = p.state("running_mean", (channels,), self.running_mean_initializer, dtype)
        old_variance = p.state("running_var", (channels,), self.running_variance_initializer, dtype)
        wide = widened(x)
        if p.training and not self.use_global_stats:
            mean, variance, deviations = self._batch_moments(wide, axis)
            p.update("running_mean", self._blend(old_mean, mean))
            p.update("running_var", self._blend(old_variance, variance))
        else:
            mean, variance = (broadcast_along(s, wide, axis) for s in (old_mean, old_variance))
            deviations = wide - mean
        return self._scaled(x, deviations, variance, axis, gamma, beta)

    def _batch_moments(self, x: Any, axis: int) -> tuple[Any, Any, Any]:
        axes = [i for i in range(x.ndim) if i != axis]
        if not math.prod(x.shape[i] for i in axes):
            raise ValueError(f"{self!r} cannot train on an empty batch, but found shape {x.shape}.")
        try:
            return moments_of(x, axes, self.axis_name)
        except NameError as error:
            raise NameError(
                f"{self!r} averages over the mapped axis {self.axis_name!r} in training, but is called "
                f"outside it: map the step, as in jax.vmap(step, axis_name={self.axis_name!r})."
            ) from error

    def _blend(self, old: Any, new: Any) -> Any:
        # State keeps its dtype, which is low precision if the tree was cast.
        wide = widened(old)
        new = new.reshape(old.shape).astype(wide.dtype)
        return (self.momentum * wide + (1 - self.momentum) * new).astype(old.dtype)

    def __repr__(self) -> str:
        text = f"axis={self.axis}, eps={self.epsilon}, momentum={self.momentum}"
        text += f", fix_gamma={not self.scale}, use_global_stats={self.use_global_stats}"
        text += f", in_channels={self.in_channels or None}"
        if self.axis_name is not None:
            text += f", axis_name={self.axis_name!r}"
        return f"BatchNorm({text})"
