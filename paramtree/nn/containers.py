"""Layers made of layers: parallel branches and residual connections."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.model.scope import child, run_of
from paramtree.nn.call import dealt
from paramtree.nn.layer import Layer, Sequential
from paramtree.typing import Scope

__all__ = ["Parallel", "Residual"]


class Residual(Sequential):
    """Applies layers one after another and adds their output to their input.

    He et al., "Deep residual learning for image recognition", 2016. Children are named as in a
    ``Sequential``, and get keyword arguments as there.

    Raises:
      TypeError: as for ``Sequential``.
      ValueError: when called: the output and the input have different shapes.

    Example:
      >>> import jax
      >>> from paramtree import nn
      >>> net = nn.Residual(nn.Dense(4, activation="relu"), nn.Dense(3))
      >>> x = jnp.ones((2, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 3)
    """

    def __init__(
        self, *layers: Layer | Callable[..., Any], **named: Layer | Callable[..., Any]
    ) -> None:
        super().__init__(*layers, **named)  # inherited anyway, but type checkers do not know

    def __call__(self, p: Scope, x: Any, **kwargs: Any) -> jax.Array:
        y = super().__call__(p, x, **kwargs)
        if y.shape != x.shape:
            raise ValueError(
                f"Residual adds its layers' output to their input, but found shapes {y.shape} and "
                f"{x.shape}: make the last layer restore the input's shape."
            )
        return x + y

    def __repr__(self) -> str:
        return super().__repr__().replace("Sequential", "Residual", 1)


class Parallel(Sequential):
    """Applies layers to the same input and concatenates their outputs along an axis.

    Gluon's ``Concurrent``. Children are named as in a ``Sequential``, and get keyword arguments as
    there.

    Args:
      *layers: layers, or functions of x.
      axis: the axis to concatenate along; None returns the outputs as a tuple.
      **named: layers under names of your choice.

    Example:
      >>> import jax
      >>> from paramtree import nn
      >>> net = nn.Parallel(nn.Dense(4), nn.Dense(2, activation="relu"))
      >>> x = jnp.ones((2, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 6)
    """

    axis: int | None

    def __init__(
        self,
        *layers: Layer | Callable[..., Any],
        axis: int | None = -1,
        **named: Layer | Callable[..., Any],
    ) -> None:
        super().__init__(*layers, **named)
        object.__setattr__(self, "axis", axis)

    def __call__(self, p: Scope, x: Any, **kwargs: Any) -> Any:
        if self.shared:
            run_of(p).tie(p, dict(self.shared))
        own = zip(self.names, self.layers, dealt(self, self.layers, kwargs), strict=True)
        outputs = tuple(layer(child(p, name), x, **keywords) for name, layer, keywords in own)
        return outputs if self.axis is None else jnp.concatenate(outputs, self.axis)

    def __repr__(self) -> str:
        return super().__repr__().replace("Sequential", "Parallel", 1)
