"""The ``Layer`` base class, ``Sequential``, and ``Lambda`` for plain functions.

A layer is a frozen dataclass whose ``__call__(p, x)`` reads parameters from its scope and computes
the output. It holds settings, never arrays: nets with equal settings are equal, have equal hashes
and share compiled code.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from paramtree.core.errors import suggest
from paramtree.core.rules import Rules
from paramtree.core.tree import ParamTree
from paramtree.model.init import init
from paramtree.model.observe import announced
from paramtree.model.record import tie_in_recorder
from paramtree.model.scope import child

__all__ = ["Lambda", "Layer", "Sequential", "as_layer"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The base class of layers. A subclass is a frozen dataclass that defines ``__call__(p, x)``.

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
        if call is not cls.__call__:  # otherwise inherited, and another base may override it
            cls.__call__ = call  # type: ignore[method-assign]

    @announced
    def __call__(self, p: Any, x: Any) -> Any:
        """Returns the output for the scope ``p`` and the input ``x``."""
        raise TypeError(f"{type(self).__name__} is a Layer without a __call__(self, p, x): define it.")

    @property
    def alias(self) -> str:
        """The layer's name in a ``Sequential``, without the counter."""
        return type(self).__name__.lower()

    def init(
        self,
        key: jax.Array,
        *inputs: Any,
        rules: Rules | None = None,
        ties: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> ParamTree:
        """Returns new parameters, as ``pt.init(layer, key, *inputs)`` does."""
        return init(self, key, *inputs, rules=rules, ties=ties, **kwargs)


@dataclasses.dataclass(frozen=True, repr=False)
class Lambda(Layer):
    """Turns a function of the input into a layer without parameters.

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
    """Applies layers one after another.

    Children are named by Gluon's aliases and a counter per alias: ``dense0``, ``conv0``, ``dense1``.
    Layers without parameters are counted too. Using an instance twice ties its parameters.

    Args:
      *layers: layers, or functions of x.
      **named: layers under names of your choice; they follow the positional ones.

    Raises:
      TypeError: a child is not callable.
      ValueError: two children have the same name, or a name is empty or contains "/".

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
    # Pairs of paths (alias, source) of descendants that are the same instance. A field, because nets
    # that share instances differently have different parameters and must not be equal.
    shared: tuple[tuple[str, str], ...]

    def __init__(
        self, *layers: Layer | Callable[..., Any], **named: Layer | Callable[..., Any]
    ) -> None:
        children = [as_layer(layer, f"child {i} of a Sequential") for i, layer in enumerate(layers)]
        counts: dict[str, int] = {}
        names: list[str] = []
        for layer in children:
            names.append(_next_name(layer.alias, counts, names))
        if invalid := [name for name in named if not name or "/" in name]:
            raise ValueError(f"Sequential: a child's name is empty or contains '/': {invalid[0]!r}.")
        if duplicates := [name for name in named if name in names]:
            raise ValueError(
                f"Sequential has two children named {', '.join(duplicates)}: the positional ones are "
                f"named {', '.join(names)}. Choose other names for the keyword arguments."
            )
        children += [as_layer(layer, f"child {k} of a Sequential") for k, layer in named.items()]
        self._set(tuple(children), (*names, *named))

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
            # Children keep their names, so a slice runs on the parameters of the full net.
            net = object.__new__(Sequential)
            net._set(self.layers[key], self.names[key])
            return net
        if isinstance(key, str):
            if key not in self.names:
                raise KeyError(
                    f"no child `{key}`; expected {', '.join(self.names)}.{suggest(key, self.names)}"
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
            label = i if name == _next_name(layer.alias, counts, []) else name
            text = repr(layer).replace("\n", "\n  ")
            lines.append(f"  ({label}): {text}\n")
        return f"Sequential(\n{''.join(lines)})"


def _next_name(alias: str, counts: dict[str, int], taken: list[str]) -> str:
    while True:
        count = counts[alias] = counts.get(alias, -1) + 1
        if f"{alias}{count}" not in taken:  # aliases may end in a digit, and so collide
            return f"{alias}{count}"


def as_layer(layer: Any, role: str) -> Layer:
    """Returns a layer, or a function of x as a ``Lambda``; ``role`` is its name in messages."""
    if isinstance(layer, Layer):
        return layer
    if isinstance(layer, type) or not callable(layer):
        shown = layer.__name__ if isinstance(layer, type) else repr(layer)
        raise TypeError(
            f"{role} is {shown}; expected a layer such as nn.Dense(10), or a function of x. Unpack a "
            "list of layers: nn.Sequential(*layers)."
        )
    return Lambda(layer)


def _shared(layer: Layer, prefix: str, first: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Yields (path, path of its first occurrence) for every layer instance that occurs again."""
    # Only children of a Sequential count. Two layers may hold the same default of a dataclass field
    # without meaning to share parameters.
    if not isinstance(layer, Sequential):
        return
    for name, inner in zip(layer.names, layer.layers, strict=True):
        path = prefix + name
        if id(inner) in first:
            yield path, first[id(inner)]
        else:
            first[id(inner)] = path
            yield from _shared(inner, f"{path}/", first)
