"""How a weight is stored: in integers, as a low-rank change, pruned, in another dtype, frozen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Cast", "Frozen", "LoRA", "Masked", "Quantized"]

Parts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A frozen weight and a trained change of low rank: ``weight = base + (alpha / rank) b @ a``.

    Hu et al., "LoRA: low-rank adaptation of large language models", 2021. The parts are ``base``, a
    state, ``a``, (rank, in), and ``b``, (out, rank), which starts at zero, so an expanded net gives the
    same output. A kernel is a matrix of the rows of its first axis.

    Args:
      rank: the rank of the change.
      alpha: the scale of the change, times the rank; the rank if None.

    Example:
      >>> parts = LoRA(2).split(jnp.ones((4, 3)), jax.random.key(0))
      >>> {name: part.shape for name, part in parts.items()}
      {'base': (4, 3), 'a': (2, 3), 'b': (4, 2)}
    """

    rank: int
    alpha: float | None = None
    kinds = ("base",)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA: rank must be a positive integer, but found {self.rank!r}.")

    def split(self, value: Any, key: Any = None) -> Parts:
        """Returns the value as the base, ``a`` as He et al. initialise it, and ``b`` of zeros."""
        if key is None:
            raise TypeError("LoRA draws random numbers: pt.expand(params, rules, key).")
        if value.ndim < 2:
            raise ValueError(f"LoRA needs a matrix, but found shape {value.shape}.")
        out, inputs = value.shape[0], value.size // max(1, value.shape[0])
        a = jax.random.normal(key, (self.rank, inputs), value.dtype) * (1 / max(1, inputs)) ** 0.5
        return {"base": value, "a": a, "b": jnp.zeros((out, self.rank), value.dtype)}

    def join(self, parts: Parts) -> Any:
        """Returns the base and the change."""
        base, scale = parts["base"], (self.rank if self.alpha is None else self.alpha) / self.rank
        return base + (scale * (parts["b"] @ parts["a"])).reshape(base.shape)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Integers with a scale for each channel: ``weight ≈ scale integers``, symmetric around zero.

    The parts are ``integers``, int8 or int4, and ``scale``, both state: it is not trained.
    With ``fake`` the weight stays one trained leaf that is read rounded, and gradients pass straight
    through the rounding (Bengio et al., 2013): train so before quantising.

    Args:
      bits: 8 or 4.
      axis: the axis of the channels; None for one scale.
      fake: whether to round only where the weight is read.
      dtype: what the weight is read in.

    Example:
      >>> parts = Quantized().split(jnp.array([[1.0, -0.5], [0.0, 0.25]]))
      >>> parts["integers"].tolist(), Quantized().join(parts).round(2).tolist()
      ([[127, -64], [0, 127]], [[1.0, -0.5], [0.0, 0.25]])
    """

    bits: int = 8
    axis: int | None = 0
    fake: bool = False
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"Quantized: bits must be 8 or 4, but found {self.bits!r}.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that are state."""
        return () if self.fake else ("integers", "scale")

    def split(self, value: Any, key: Any = None) -> Any:
        """Returns the integers and the scales; the value itself if they are fake."""
        if self.fake:
            return value
        integers, scale = self._rounded(value)
        return {"integers": integers.astype(f"int{self.bits}"), "scale": scale}

    def join(self, parts: Any) -> Any:
        """Returns the rounded value."""
        if not self.fake:
            return (parts["integers"].astype(parts["scale"].dtype) * parts["scale"]).astype(self.dtype)
        integers, scale = self._rounded(parts)
        return parts + jax.lax.stop_gradient(integers * scale - parts)

    def _rounded(self, value: Any) -> tuple[Any, Any]:
        most = 2 ** (self.bits - 1) - 1
        axes = (
            None
            if self.axis is None
            else tuple(i for i in range(value.ndim) if i != self.axis % value.ndim)
        )
        size = jnp.max(jnp.abs(value), axis=axes, keepdims=True)
        scale = jnp.where(size > 0, size / most, jnp.ones_like(size))
        return jnp.clip(jnp.round(value / scale), -most, most), scale


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """A pruned weight: where the mask is False it is zero, and gets no gradient.

    The parts are ``value`` and ``mask``, a boolean state.

    Args:
      mask: an array of booleans that broadcasts to the weight, or a function of the weight that gives
        one, such as ``lambda w: jnp.abs(w) > 0.1``.

    Example:
      >>> parts = Masked(jnp.abs).split(jnp.array([0.0, 2.0]))
      >>> Masked(jnp.abs).join({**parts, "value": jnp.array([5.0, 5.0])}).tolist()
      [0.0, 5.0]
    """

    mask: Any
    kinds = ("mask",)

    def split(self, value: Any, key: Any = None) -> Parts:
        """Returns the value and its mask."""
        mask = self.mask(value) if callable(self.mask) else jnp.asarray(self.mask)
        return {"value": value, "mask": jnp.broadcast_to(jnp.asarray(mask).astype(bool), value.shape)}

    def join(self, parts: Parts) -> Any:
        """Returns the value, zero where it is masked."""
        return jnp.where(parts["mask"], parts["value"], jnp.zeros_like(parts["value"]))

    def _identity(self) -> Any:
        if callable(self.mask):
            return self.mask
        mask = np.asarray(self.mask)
        return mask.shape, mask.dtype, mask.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masked) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


@dataclasses.dataclass(frozen=True)
class Cast:
    """A weight that is stored in one dtype and read in another: mixed precision, by name.

    Args:
      dtype: what the model reads it in.
      stored: what it is stored in, and its gradient is.

    Example:
      >>> Cast(jnp.bfloat16).join(jnp.ones(2)).dtype, Cast(jnp.bfloat16).split(jnp.ones(2)).dtype
      (dtype(bfloat16), dtype('float32'))
    """

    dtype: Any
    stored: Any = "float32"

    def __post_init__(self) -> None:
        for name in ("dtype", "stored"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))

    def split(self, value: Any, key: Any = None) -> Any:
        """Returns the value as it is stored."""
        return value.astype(self.stored)

    def join(self, parts: Any) -> Any:
        """Returns the value as it is read."""
        return parts.astype(self.dtype)

    def restore(self, parts: Any) -> Any:
        """Returns the value as it is stored, for ``pt.fold``."""
        return parts


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A parameter that is not trained: its one part, ``frozen``, is state.

    Gradients and optimizers leave it out, and ``pt.fold`` makes a parameter of it again.

    Example:
      >>> Frozen().split(jnp.ones(2))
      {'frozen': Array([1., 1.], dtype=float32)}
    """

    kinds = ("frozen",)

    def split(self, value: Any, key: Any = None) -> Parts:
        """Returns the value as state."""
        return {"frozen": value}

    def join(self, parts: Parts) -> Any:
        """Returns the value."""
        return jax.lax.stop_gradient(parts["frozen"])
