"""Weights with a constraint: of a given norm, of mean 0 and variance 1, orthogonal, positive, ..."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Orthogonal", "Positive", "SpectralNorm", "WeightNorm", "WeightStandardization"]

Parts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class WeightNorm:
    """The direction and the length of each row apart: ``weight = g v / |v|``.

    Salimans and Kingma, "Weight normalization", 2016. The parts are ``g``, the norms, and ``v``, of the
    shape of the weight, as in ``torch.nn.utils.parametrizations.weight_norm``.

    Args:
      axis: the axis of the outputs, along which every entry has a norm of its own; None for one norm.

    Example:
      >>> parts = WeightNorm().split(jnp.array([[3.0, 4.0], [0.0, 2.0]]))
      >>> parts["g"].tolist(), WeightNorm().join(parts).tolist()
      ([[5.0], [2.0]], [[3.0, 4.0], [0.0, 2.0]])
    """

    axis: int | None = 0
    expects = " A row of zeros has no direction."

    def split(self, value: Any, key: Any = None) -> Parts:
        """Returns the norms and the value."""
        return {"g": self._norm(value), "v": value}

    def join(self, parts: Parts) -> Any:
        """Returns the value of these norms."""
        return parts["v"] * (parts["g"] / self._norm(parts["v"]))

    def _norm(self, value: Any) -> Any:
        axes = (
            None
            if self.axis is None
            else tuple(i for i in range(value.ndim) if i != self.axis % value.ndim)
        )
        return jnp.sqrt(jnp.sum(value * value, axis=axes, keepdims=True))


@dataclasses.dataclass(frozen=True)
class WeightStandardization:
    """The weights of each output with mean 0 and variance 1: ``(weight - mean) / √(var + epsilon)``.

    Qiao et al., "Micro-batch training with batch-channel normalization and weight standardization",
    2019. The weight stays one trained leaf, which the model reads standardised, so expanding a net
    changes its output: a normalization has to follow, which divides by the scale of the output.

    With a gain no normalization is needed: the weight is also divided by the square root of the number
    of weights of an output, and multiplied by a trained gain of each output, as in Brock et al.,
    "Characterizing signal propagation to close the performance gap in unnormalized ResNets", 2021.
    The parts are then ``v``, the weight, and ``gain``.

    Args:
      axis: the axis of the outputs; 1 for transposed convolutions.
      epsilon: added to the variance.
      gain: what the gains start from, such as 1, or 1.7139 before a ReLU; None for no gain.

    Example:
      >>> how = WeightStandardization()
      >>> how.join(how.split(jnp.array([[1.0, 3.0], [-5.0, 5.0]]))).round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    axis: int = 0
    epsilon: float = 1e-6
    gain: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.axis, int):
            raise ValueError(f"{name}: axis must be an integer, but found {self.axis!r}.")
        for setting in ("epsilon", "gain"):  # equal weights have a variance of 0
            if (value := getattr(self, setting)) is not None and not value > 0:
                raise ValueError(f"{name}: {setting} must be positive, but found {value!r}.")

    def split(self, value: Any, key: Any = None) -> Any:
        """Returns the value, and the gains if there are any."""
        inside = -value.ndim <= self.axis < value.ndim
        if not inside or value.size <= value.shape[self.axis]:
            raise ValueError(
                f"WeightStandardization needs two weights or more for each index of axis {self.axis}, "
                f"but found shape {value.shape}."
            )
        if self.gain is None:
            return value
        shape = [1] * value.ndim
        shape[self.axis] = value.shape[self.axis]
        return {"v": value, "gain": jnp.full(shape, self.gain, value.dtype)}

    def join(self, parts: Any) -> Any:
        """Returns the standardised value, which is computed in float32 or wider."""
        value = parts if self.gain is None else parts["v"]
        wide = value.astype(jnp.float32) if value.dtype.itemsize < 4 else value
        axes = tuple(i for i in range(wide.ndim) if i != self.axis % wide.ndim)
        wide = wide - jnp.mean(wide, axes, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + self.epsilon)
        if self.gain is not None:
            fan = value.size / value.shape[self.axis]
            scale = scale * parts["gain"].astype(wide.dtype) * fan**-0.5
        return (wide * scale).astype(value.dtype)


@dataclasses.dataclass(frozen=True)
class SpectralNorm:
    """A weight over its largest singular value, which power iteration estimates.

    Miyato et al., "Spectral normalization for generative adversarial networks", 2018. The parts are
    ``weight``, and the state ``u``, (rows,), and ``v``, (columns,), for the weight as a matrix of the
    rows of its first axis. A call under ``pt.training`` iterates; inference does not. The weight that
    the model reads has a spectral norm of about one, so expanding a net changes its output. The
    estimate lags behind a weight that changes fast: one iteration, as in the paper, may read it half as
    large again, and more come closer.

    Args:
      iterations: how often each training call iterates.
      epsilon: the least length of a vector to divide by, while iterating.

    Example:
      >>> parts = SpectralNorm(20).split(jnp.diag(jnp.array([4.0, 2.0])), jax.random.key(0))
      >>> SpectralNorm(20).join(parts).round(3).tolist()
      [[1.0, 0.0], [0.0, 0.5]]
    """

    iterations: int = 1
    epsilon: float = 1e-12
    kinds = ("u", "v")
    expects = " A matrix of zeros has no norm to divide by."

    def split(self, value: Any, key: Any = None) -> Parts:
        """Returns the value, and singular vectors after fifteen iterations from random ones."""
        if key is None:
            raise TypeError("SpectralNorm starts from random vectors: pt.expand(params, rules, key).")
        if value.ndim < 2:
            raise ValueError(f"SpectralNorm needs a matrix, but found shape {value.shape}.")
        matrix = _matrix(value)
        u, v = (
            jax.random.normal(k, (size,), value.dtype)
            for k, size in zip(jax.random.split(key), matrix.shape, strict=True)
        )
        u, v = self._iterated(matrix, u, v, max(15, self.iterations))
        return {"weight": value, "u": u, "v": v}

    def join(self, parts: Parts) -> Any:
        """Returns the weight over its spectral norm; gradients do not flow through ``u`` and ``v``."""
        u, v = jax.lax.stop_gradient(parts["u"]), jax.lax.stop_gradient(parts["v"])
        return parts["weight"] / jnp.vdot(u, _matrix(parts["weight"]) @ v)

    def update(self, parts: Parts) -> Parts:
        """Returns the vectors after some iterations."""
        matrix = jax.lax.stop_gradient(_matrix(parts["weight"]))
        u, v = self._iterated(matrix, parts["u"], parts["v"], self.iterations)
        return {"u": u, "v": v}

    def _iterated(self, matrix: Any, u: Any, v: Any, times: int) -> tuple[Any, Any]:
        def once(_: Any, vectors: Any) -> Any:
            u = self._unit(matrix @ vectors[1])
            return u, self._unit(matrix.T @ u)

        result: tuple[Any, Any] = jax.lax.fori_loop(0, times, once, (u, v))
        return result

    def _unit(self, vector: Any) -> Any:
        return vector / jnp.maximum(jnp.sqrt(jnp.vdot(vector, vector)), self.epsilon)


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """A matrix with orthogonal rows or columns, whichever are fewer, that stays so while it trains.

    The parts are ``base``, a state, and ``skew``, which starts at zero: the value is the base rotated
    by the Cayley transform of the antisymmetric part of ``skew``, as in Helfrich et al., "Orthogonal
    recurrent neural networks with scaled Cayley transform", 2018. A value that is not a multiple of an
    orthogonal matrix is replaced by the nearest one; start from ``pt.initializers.Orthogonal``.

    Example:
      >>> parts = Orthogonal().split(jnp.eye(2))
      >>> weight = Orthogonal().join({**parts, "skew": jnp.array([[0.0, 0.5], [0.0, 0.0]])})
      >>> abs(weight @ weight.T).round(3).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    kinds = ("base",)

    def split(self, value: Any, key: Any = None) -> Parts:
        """Returns the nearest multiple of an orthogonal matrix, and zeros."""
        if value.ndim < 2:
            raise ValueError(f"Orthogonal needs a matrix, but found shape {value.shape}.")
        u, scales, vt = jnp.linalg.svd(_matrix(value), full_matrices=False)
        size = min(_matrix(value).shape)
        base = (jnp.mean(scales) * (u @ vt)).reshape(value.shape)
        return {"base": base, "skew": jnp.zeros((size, size), value.dtype)}

    def join(self, parts: Parts) -> Any:
        """Returns the rotated base."""
        base, skew = _matrix(parts["base"]), parts["skew"] - parts["skew"].T
        eye = jnp.eye(len(skew), dtype=skew.dtype)
        rotation = jnp.linalg.solve(eye + skew, eye - skew)
        rows, columns = base.shape
        rotated = rotation @ base if rows <= columns else base @ rotation
        return rotated.reshape(parts["base"].shape)


@dataclasses.dataclass(frozen=True)
class Positive:
    """A positive value, stored as the inverse of its softplus.

    Example:
      >>> stored = Positive().split(jnp.array([0.5, 3.0]))
      >>> Positive().join(stored).round(4).tolist()
      [0.5, 3.0]
    """

    expects = " They have to be positive."

    def split(self, value: Any, key: Any = None) -> Any:
        """Returns what softplus makes the value of."""
        return value + jnp.log(-jnp.expm1(-value))

    def join(self, parts: Any) -> Any:
        """Returns the value."""
        return jax.nn.softplus(parts)


def _matrix(value: Any) -> Any:
    return value.reshape(value.shape[0], math.prod(value.shape[1:]))
