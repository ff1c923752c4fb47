"""Rotary position embeddings, and how they are scaled to longer sequences."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_rotary", "is_number", "rotate", "rotated_size"]

_SETTINGS = {
    "linear": ("factor",), "ntk": ("factor",), "yarn": ("factor", "original_length"),
    "yarn_hf": ("factor", "original_length"),
}  # fmt: skip
_SLOW, _FAST = 1, 32  # of YaRN: rotations within the original length


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, not a boolean."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value)


def check_rotary(name: str, base: Any, fraction: Any, scaling: Any) -> None:
    """Raises ValueError unless the settings are valid; ``name`` is who has them."""
    if not is_number(base) or base <= 0:
        raise ValueError(f"{name}: the rotary base must be a positive number, but found {base!r}.")
    if not is_number(fraction) or not 0 < fraction <= 1:
        raise ValueError(f"{name}: the rotary fraction must be in (0, 1], but found {fraction!r}.")
    if scaling is None:
        return
    kind, *numbers = scaling if isinstance(scaling, tuple) and scaling else (None,)
    settings = _SETTINGS.get(kind, ()) if isinstance(kind, str) else ()
    valid = bool(settings) and len(numbers) == len(settings)
    if not valid or not all(is_number(n) and n >= 1 for n in numbers):
        forms = ", ".join(f"({', '.join((repr(k), *v))})" for k, v in _SETTINGS.items())
        raise ValueError(
            f"{name}: the rotary scaling must be None or one of {forms}, with numbers of at least 1, "
            f"but found {scaling!r}."
        )
    if kind == "yarn_hf" and base <= 1:
        raise ValueError(f"{name}: the rotary base of {scaling!r} must be above 1, but found {base!r}.")


def rotate(
    x: Any, positions: Any, base: float = 10_000.0, fraction: float = 1.0, scaling: Any = None
) -> jax.Array:
    """Returns x with rotary position embeddings applied.

    The dot product of two rotated vectors depends only on their distance. Su et al., "RoFormer:
    enhanced transformer with rotary position embedding", 2021. The first half of each vector is paired
    with the second half, as in GPT-NeoX and Llama.

    Pair i of n turns by the rate ``base ** (-i / n)`` per position. There are scalings for sequences
    that are longer by a factor than those of training:

    - ``("linear", factor)`` divides all rates by the factor. Chen et al., "Extending context window of
      large language models via position interpolation", 2023.
    - ``("ntk", factor)`` multiplies the base by ``factor ** (n / (n - 1))``, so that the fastest rate
      stays and the slowest is divided by the factor (bloc97, "NTK-aware scaled RoPE", 2023).
    - ``("yarn", factor, original_length)`` divides the rates of pairs that turn less than once within
      the original length, keeps those that turn more than 32 times, and blends in between, linearly in
      the number of turns. It multiplies the result by ``0.1 ln(factor) + 1``. Peng et al., "YaRN:
      efficient context window extension of large language models", 2023.
    - ``("yarn_hf", factor, original_length)`` is YaRN as models on Hugging Face have it, whose
      configuration says ``"rope_type": "yarn"``. It differs in the blend, which is linear in the pair's
      index, from the last that turns 32 times to the first that turns once.

    Args:
      x: (..., length, heads, size).
      positions: integers, (length,), or (batch, length) for an x of four dimensions.
      base: the wavelengths grow geometrically from 2π towards 2π · base.
      fraction: the part of each vector, from its beginning, that is rotated; its size must be even.
      scaling: None or one of the above.

    Raises:
      ValueError: the size that is rotated is odd or 0, a setting is invalid, or the positions have
        another shape.

    Example:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> rotate(x, jnp.array([0, 1]))[0, :, 0].round(2)
      Array([[ 1.        ,  1.        ],
             [-0.29999998,  1.38      ]], dtype=float32)
    """
    check_rotary("rotate", base, fraction, scaling)
    if x.ndim < 3:
        raise ValueError(f"rotate needs x (..., length, heads, size), but found {x.shape}.")
    size = rotated_size(x.shape[-1], fraction)
    if size % 2 or not size:
        raise ValueError(
            f"rotate turns pairs, so it needs an even size, but found x of shape {x.shape}, of which "
            f"it would rotate {size}."
        )
    shapes = [x.shape[-3:-2], *([x.shape[:2]] if x.ndim == 4 else [])]
    if positions.shape not in (*shapes, (1, x.shape[-3])):
        raise ValueError(
            f"rotate needs positions of shape {' or '.join(map(str, shapes))} for x of shape "
            f"{x.shape}, but found {positions.shape}."
        )
    half = size // 2
    rates, gain = _rates(half, base, scaling)
    rates = rates.reshape((1,) * positions.ndim + rates.shape)
    angles = (positions.astype(jnp.float32)[..., None] * rates)[..., None, :]
    angles = angles.reshape((1,) * (x.ndim - angles.ndim) + angles.shape)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if gain != 1:
        cos, sin = cos * gain, sin * gain
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b = x[..., :half], x[..., half:size]
    rest = [x[..., size:]] if size < x.shape[-1] else []
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], axis=-1)


def rotated_size(size: int, fraction: float) -> int:
    """Returns how many elements of a vector are rotated."""
    return int(size * fraction)


def _rates(half: int, base: float, scaling: Any) -> tuple[Any, float]:
    """Returns the angle of each pair per position, and what the rotated vectors are multiplied by."""
    kind, factor, *rest = scaling or ("none", 1)
    if kind == "ntk" and half > 1:
        base = base * factor ** (half / (half - 1))
    rates = jnp.power(jnp.float32(base), -jnp.arange(half, dtype=jnp.float32) / half)
    if kind == "linear":
        return rates / factor, 1
    if kind in ("yarn", "yarn_hf"):
        if kind == "yarn":
            turns = rates * (rest[0] / (2 * math.pi))
            kept = jnp.clip((turns - _SLOW) / (_FAST - _SLOW), 0, 1)
        else:
            kept = _kept_by_index(half, base, rest[0])
        return rates * (kept + (1 - kept) / factor), 0.1 * math.log(factor) + 1
    return rates, 1


def _kept_by_index(half: int, base: float, length: float) -> Any:
    """Returns how much of its rate each pair keeps in YaRN as its authors' code has it.

    The paper's equations blend by the number of turns. The authors' own code, which Hugging Face's
    Transformers follow and the published models were trained with, blends by the index instead. With
    base 10,000, size 128 and length 4,096 they keep up to 0.37 more or less of a rate, so a factor of 4
    gives rates that differ by 42 %: neither can stand for the other.
    """

    def index(turns: float) -> float:  # the pair that turns so often within the length
        return half * math.log(length / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(index(_FAST)), 0)
    last = min(math.ceil(index(_SLOW)), 2 * half - 1)
    width = last - first or 0.001  # as their code does
    return 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / width, 0, 1)
