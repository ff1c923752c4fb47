"""Initializers that depend on a parameter's name, and ``get``, which looks one up by its own name."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.errors import ParamTreeError, RuleError
from paramtree.initializers import values
from paramtree.initializers.fans import MSRAPrelu, VarianceScaling, Xavier
from paramtree.initializers.values import Constant, Initializer, Normal, Shape, Zero


class _ByName:
    """Base of initializers that depend on the parameter's name, which ``init`` and ``reinit`` pass."""

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        raise ParamTreeError(
            f"{type(self).__name__} depends on the parameter's name: use it in the rules of pt.init or "
            "pt.reinit, as in {'.*': initializer}."
        )


@dataclass(frozen=True)
class Mixed(_ByName):
    """A rule table as an initializer: the first pattern that matches the full name applies.

    Args:
      patterns: regular expressions that must match the full name.
      initializers: one initializer per pattern.

    Raises:
      ValueError: the numbers of patterns and initializers differ.
      RuleError: when used: no pattern matches a parameter's name.

    Example:
      >>> Mixed([".*bias", ".*"], [Zero(), Normal()]).for_name("dense0_weight")
      Normal(sigma=0.01)
    """

    patterns: Sequence[str]
    initializers: Sequence["Initializer | str"]

    def __post_init__(self) -> None:
        if len(self.patterns) != len(self.initializers):
            raise ValueError(
                f"Mixed needs as many patterns as initializers, but found {len(self.patterns)} and "
                f"{len(self.initializers)}."
            )
        object.__setattr__(self, "patterns", tuple(self.patterns))
        object.__setattr__(self, "initializers", tuple(map(get, self.initializers)))

    def for_name(self, name: str, stack: str = "", index: tuple[int, ...] = ()) -> Initializer:
        """Returns the initializer for this name; a copy in a stack also matches by the stack's name."""
        for pattern, initializer in zip(self.patterns, self.initializers, strict=True):
            if re.fullmatch(pattern, name) or (stack and re.fullmatch(pattern, stack)):
                return get(initializer)
        raise RuleError(f"no pattern of Mixed matches `{name}`: add '.*' as the last pattern.")


@dataclass(frozen=True, eq=False)
class Load(_ByName):
    """Copies another model's arrays by name, ignoring the prefixes ``arg:`` and ``aux:``.

    Args:
      params: a mapping, or a flat tree, from names to arrays.
      default_init: the initializer for missing names; None makes a missing name an error.

    Example:
      >>> Load({"arg:dense0_bias": np.ones(2)}, Zero()).for_name("dense0_bias")
      Constant(value=array([1., 1.]))
    """

    params: Mapping[str, Any]
    default_init: "Initializer | str | None" = None

    def for_name(self, name: str, stack: str = "", index: tuple[int, ...] = ()) -> Initializer:
        """Returns the initializer for the parameter with this name, or for a copy in a stack."""
        for prefix in ("", "arg:", "aux:"):
            if prefix + name in self.params:
                return _Loaded(self.params[prefix + name])
            if stack and prefix + stack in self.params:
                return _Loaded(self.params[prefix + stack][index])
        if self.default_init is None:
            raise RuleError(
                f"Load has no array for `{name}`; it has: {', '.join(self.params)}. Pass a "
                "default_init for missing names."
            )
        return get(self.default_init)


class _Loaded(Constant):
    """A ``Constant`` that does not broadcast: its shape must be the parameter's."""

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if np.shape(self.value) != shape:
            raise ValueError(f"Load has an array of shape {np.shape(self.value)}, expected {shape}.")
        return super().__call__(key, shape, dtype)

    def __repr__(self) -> str:
        return f"Constant(value={self.value!r})"


def _scalings() -> dict[str, Callable[[], Initializer]]:
    """Returns jax's initializers by name, with the axes of weights (out, in, *spatial)."""
    kinds = {"lecun": (1.0, "fan_in"), "he": (2.0, "fan_in"), "glorot": (1.0, "fan_avg")}
    kinds |= {"kaiming": kinds["he"], "xavier": kinds["glorot"]}
    distributions = {"normal": "truncated_normal", "uniform": "uniform"}
    return {
        f"{kind}_{name}": functools.partial(VarianceScaling, *settings, distribution)
        for kind, settings in kinds.items()
        for name, distribution in distributions.items()
    }


_BY_NAME: dict[str, Callable[[], Initializer]] = {
    "zeros": Zero,
    "ones": values.One,
    "uniform": values.Uniform,
    "normal": Normal,
    "truncnorm": values.TruncNorm,
    "orthogonal": values.Orthogonal,
    "xavier": Xavier,
    "msraprelu": MSRAPrelu,
    "bilinear": values.Bilinear,
    "lstmbias": values.LSTMBias,
    "truncated_normal": values.TruncNorm,
    "variance_scaling": VarianceScaling,
    **_scalings(),
}


def scaling_name(scaling: VarianceScaling) -> str:
    """Returns the name of a default instance, such as "he_normal", or an empty string."""
    return next((name for name, make in _scalings().items() if make() == scaling), "")


def get(initializer: "Initializer | str") -> Initializer:
    """Returns an initializer unchanged, or the default instance of one given by its name.

    The names are Gluon's and jax's: "he_normal" and so on are for weights (out, in, *spatial), unlike
    ``jax.nn.initializers.he_normal()``, which is for (in, out).

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> get("zeros")
      Zero()
    """
    if not isinstance(initializer, str):
        return initializer
    if initializer.lower() not in _BY_NAME:
        raise ValueError(f"no initializer {initializer!r}. The names are {', '.join(_BY_NAME)}.")
    return _BY_NAME[initializer.lower()]()
