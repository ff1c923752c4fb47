"""Initializers that depend on a parameter's name, and the names of initializers."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.errors import ParamTreeError, RuleError
from paramtree.initializers.values import (
    Bilinear,
    Constant,
    Initializer,
    LSTMBias,
    MSRAPrelu,
    Normal,
    One,
    Orthogonal,
    Shape,
    TruncNorm,
    Uniform,
    Xavier,
    Zero,
)

__all__ = ["Load", "Mixed", "get"]


class _ByName:
    """An initializer that depends on the parameter's name, which ``init`` and ``reinit`` tell it."""

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        raise ParamTreeError(
            f"{type(self).__name__} goes by name: use it in the rules of pt.init or pt.reinit, as in "
            "{'.*': initializer}."
        )


@dataclass(frozen=True)
class Mixed(_ByName):
    """A rule table in one initializer: the first pattern that matches the whole name counts.

    Args:
      patterns: regular expressions for whole names.
      initializers: as many initializers.

    Raises:
      ValueError: unequal numbers; on use: RuleError, no pattern matches a name.

    Example:
      >>> Mixed([".*bias", ".*"], [Zero(), Normal()]).for_name("dense0_weight")
      Normal(sigma=0.01)
    """

    patterns: Sequence[str]
    initializers: Sequence["Initializer | str"]

    def __post_init__(self) -> None:
        if len(self.patterns) != len(self.initializers):
            raise ValueError(
                f"Mixed takes as many patterns as initializers, but found {len(self.patterns)} and "
                f"{len(self.initializers)}."
            )
        object.__setattr__(self, "patterns", tuple(self.patterns))
        object.__setattr__(self, "initializers", tuple(map(get, self.initializers)))

    def for_name(self, name: str) -> Initializer:
        """Returns the initializer of a parameter."""
        for pattern, initializer in zip(self.patterns, self.initializers, strict=True):
            if re.fullmatch(pattern, name):
                return get(initializer)
        raise RuleError(f"no pattern of Mixed matches `{name}`: add a last pattern '.*'.")


@dataclass(frozen=True, eq=False)
class Load(_ByName):
    """The arrays of another model, by name; ``arg:`` and ``aux:`` before a name do not count.

    Args:
      params: a mapping, or a flat tree, from names to arrays.
      default_init: the initializer of names that are not there; None makes them an error.

    Example:
      >>> Load({"arg:dense0_bias": np.ones(2)}, Zero()).for_name("dense0_bias")
      Constant(value=array([1., 1.]))
    """

    params: Mapping[str, Any]
    default_init: "Initializer | str | None" = None

    def for_name(self, name: str) -> Initializer:
        """Returns the initializer of a parameter."""
        for full in (name, f"arg:{name}", f"aux:{name}"):
            if full in self.params:
                array = self.params[full]
                return _Loaded(array)
        if self.default_init is None:
            raise RuleError(
                f"Load has no array for `{name}`; it has: {', '.join(self.params)}. Give a "
                "default_init for the names that are not there."
            )
        return get(self.default_init)


class _Loaded(Constant):
    """An array that must have the very shape it is asked for."""

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if np.shape(self.value) != shape:
            raise ValueError(f"Load has an array of shape {np.shape(self.value)}, expected {shape}.")
        return super().__call__(key, shape, dtype)

    def __repr__(self) -> str:
        return f"Constant(value={self.value!r})"


_BY_NAME: dict[str, Callable[[], Initializer]] = {
    "zeros": Zero,
    "ones": One,
    "uniform": Uniform,
    "normal": Normal,
    "truncnorm": TruncNorm,
    "orthogonal": Orthogonal,
    "xavier": Xavier,
    "msraprelu": MSRAPrelu,
    "bilinear": Bilinear,
    "lstmbias": LSTMBias,
}


def get(initializer: "Initializer | str") -> Initializer:
    """Returns the initializer itself, or the one that Gluon calls by a name, with its defaults.

    Raises:
      ValueError: no initializer has that name.

    Example:
      >>> get("zeros")
      Zero()
    """
    if not isinstance(initializer, str):
        return initializer
    if initializer.lower() not in _BY_NAME:
        raise ValueError(f"an initializer's name is one of {', '.join(_BY_NAME)}, not {initializer!r}.")
    return _BY_NAME[initializer.lower()]()
