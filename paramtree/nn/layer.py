"""What a layer is, and the ones that hold other layers or none.

A layer is a frozen dataclass whose ``__call__(p, x)`` is the whole layer: it asks its scope for
parameters and computes. It holds settings, never arrays, so two equal nets are equal, hash alike
and share what jax compiled for them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from paramtree.core.errors import suggest
from paramtree.core.names import Rules
from paramtree.core.tree import ParamTree, child
from paramtree.model.init import init
from paramtree.model.observe import announced
from paramtree.model.record import tie_in_recorder

__all__ = ["Lambda", "Layer", "Sequential"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The base of all layers; a subclass is a frozen dataclass that defines ``__call__(p, x)``.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp
      >>> @dataclasses.dataclass(frozen=True)
      ... class Scale(pt.nn.Layer):
      ...     start: float = 1.0
      ...
      ...     def __call__(self, p, x):
      ...         scale = p.param("scale", x.shape[-1:], pt.initializers.Constant(self.start))
      ...         return jnp.expand_dims(scale, range(x.ndim - 1)) * x
      >>> Scale(2.0).init(jax.random.key(0), jnp.ones((4, 3))).scale
      Array([2., 2., 2.], dtype=float32)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        call: Any = announced(cls.__call__)
        if call is not cls.__call__:  # else it is inherited, and another base may override it
            cls.__call__ = call  # type: ignore[method-assign]

    @announced
    def __call__(self, p: Any, x: Any) -> Any:
        """Computes the layer: ``p`` is its scope, ``x`` its input."""
        raise TypeError(f"{type(self).__name__} is a Layer without a __call__(self, p, x).")

    @property
    def alias(self) -> str:
        """What a ``Sequential`` calls it, before the counter."""
        return type(self).__name__.lower()

    def init(
        self,
        key: jax.Array,
        *inputs: Any,
        rules: Rules | None = None,
        ties: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> ParamTree:
        """Returns freshly initialised parameters: ``pt.init`` of this layer."""
        return init(self, key, *inputs, rules=rules, ties=ties, **kwargs)


@dataclasses.dataclass(frozen=True, repr=False)
class Lambda(Layer):
    """A function of the input alone as a layer.

    Example:
      >>> import jax.numpy as jnp
      >>> Lambda(jnp.tanh)({}, 0.0), Lambda(jnp.tanh)
      (Array(0., dtype=float32, weak_type=True), Lambda(tanh))
    """

    function: Callable[..., Any]

    def __call__(self, p: Any, x: Any) -> Any:
        return self.function(x)

    def __repr__(self) -> str:
        return f"Lambda({getattr(self.function, '__name__', repr(self.function))})"


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Sequential(Layer):
    """Layers one after another.

    The children are named after Gluon's aliases with a counter for each: ``dense0``, ``conv0``,
    ``dense1``; a layer without parameters has a place too. The same instance twice is a tie: two
    names of one leaf.

    Args:
      *layers: layers, or functions of x.
      **named: layers with the names that they are to have; they come last.

    Raises:
      TypeError: something that is not callable.
      ValueError: two children of one name.

    Example:
      >>> from paramtree import nn
      >>> net = nn.Sequential(nn.Dense(256, activation="relu"), head=nn.Dense(10))
      >>> net
      Sequential(
        (0): Dense(None -> 256, Activation(relu))
        (head): Dense(None -> 10, linear)
      )
      >>> net[0], net["head"] is net[1], len(net[1:])
      (Dense(None -> 256, Activation(relu)), True, 1)
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    # Which descendants are one instance, as pairs of paths (alias, source). Equal nets must be
    # interchangeable, so what instances they share has to be part of their equality.
    shared: tuple[tuple[str, str], ...]

    def __init__(
        self, *layers: Layer | Callable[..., Any], **named: Layer | Callable[..., Any]
    ) -> None:
        made = [_as_layer(layer, str(i)) for i, layer in enumerate(layers)]
        counts: dict[str, int] = {}
        names: list[str] = []
        for layer in made:
            names.append(_next_name(layer.alias, counts, names))
        if wrong := [name for name in named if not name or "/" in name]:
            raise ValueError(f"Sequential: {wrong[0]!r} cannot name a child: no '/', not empty.")
        if twice := [name for name in named if name in names]:
            raise ValueError(
                f"Sequential has two children called {', '.join(twice)}: positional children are "
                f"called {', '.join(names)}, so give the named ones other names."
            )
        made += [_as_layer(layer, name) for name, layer in named.items()]
        self._set(tuple(made), (*names, *named))

    def _set(self, layers: tuple[Layer, ...], names: tuple[str, ...]) -> None:
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "shared", tuple(_shared(self, "", {})))

    def __call__(self, p: Any, x: Any) -> Any:
        if self.shared:
            tie_in_recorder(p, self.shared)
        for name, layer in zip(self.names, self.layers, strict=True):
            x = layer(child(p, name), x)
        return x

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            # The children keep their names, so a part of a net runs on the whole net's tree.
            part = object.__new__(Sequential)
            part._set(self.layers[key], self.names[key])
            return part
        if isinstance(key, str):
            if key not in self.names:
                raise KeyError(
                    f"no child `{key}`; there are {', '.join(self.names)}.{suggest(key, self.names)}"
                )
            return self.layers[self.names.index(key)]
        return self.layers[key]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __repr__(self) -> str:
        lines = []
        counts: dict[str, int] = {}
        for i, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            shown = i if name == _next_name(layer.alias, counts, []) else name
            text = repr(layer).replace("\n", "\n  ")
            lines.append(f"  ({shown}): {text}\n")
        return f"Sequential(\n{''.join(lines)})"


def _next_name(alias: str, counts: dict[str, int], taken: list[str]) -> str:
    while True:
        count = counts[alias] = counts.get(alias, -1) + 1
        if f"{alias}{count}" not in taken:  # it may be: an alias can end in a digit
            return f"{alias}{count}"


def _as_layer(layer: Any, where: str) -> Layer:
    if isinstance(layer, Layer):
        return layer
    if isinstance(layer, type) or not callable(layer):
        shown = layer.__name__ if isinstance(layer, type) else repr(layer)
        raise TypeError(
            f"child {where} of a Sequential is {shown}; expected a layer such as nn.Dense(10), or a "
            "function of x. A list of layers is spread out: nn.Sequential(*layers)."
        )
    return Lambda(layer)


def _shared(layer: Layer, prefix: str, first: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Yields the paths of layers that are the same instance as one before, with that one's path."""
    # Only what a Sequential is given counts: the default of a dataclass's field is one instance too,
    # and two layers that have it in common do not mean to share.
    if not isinstance(layer, Sequential):
        return
    for name, below in zip(layer.names, layer.layers, strict=True):
        path = prefix + name
        if id(below) in first:
            yield path, first[id(below)]
        else:
            first[id(below)] = path
            yield from _shared(below, f"{path}/", first)
