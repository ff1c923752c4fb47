"""The ``Layer`` base class, ``Sequential``, and ``Lambda`` for plain functions.

A layer is a class with fields, a frozen dataclass, whose ``__call__(p, x)`` reads parameters from its
scope and computes the output. It holds settings, never arrays: nets with equal settings are equal, have
equal hashes and share compiled code.
"""

import abc
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform, overload

import jax
import numpy as np

from paramtree.core.errors import suggest
from paramtree.core.rules import Rules
from paramtree.core.tree import ParamTree
from paramtree.model.init import init
from paramtree.model.scope import child, run_of
from paramtree.nn.call import called, dealt, keywords_of
from paramtree.typing import Scope

__all__ = ["Lambda", "Layer", "Sequential", "as_layer"]


_lock = threading.RLock()  # two threads may make the first layer of a class


def _inherits(cls: type, method: str) -> bool:
    """Whether a class of the user's own, and not Layer or a dataclass, gives a class its method."""
    for base in cls.__mro__[1:-1]:
        if isinstance(base, LayerType):
            return base._own[method] and base.__mro__[1] is not object
        if method in vars(base) and vars(base)[method] is not None:
            return True
    return False


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class LayerType(abc.ABCMeta):
    """The type of layer classes: makes a frozen dataclass of each, unless it is decorated as one.

    Not before the first layer is made, as a decorator is applied after the class is.
    """

    def __init__(cls, name: str, bases: Any, namespace: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(name, bases, namespace, **kwargs)
        # A dataclass with slots is a copy of the class, which has these already.
        cls._own: dict[str, bool] = namespace.get("_own") or {
            method: method in namespace or _inherits(cls, method)
            for method in ("__init__", "__eq__", "__hash__")
        }
        cls._fields: dict[str, Any] | None = namespace.get("_fields")

    if not TYPE_CHECKING:  # for which a class is called with its fields

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            cls._complete()
            layer = super().__call__(*args, **kwargs)
            _check_fields(layer)
            return layer

    def _complete(cls) -> None:
        if "_completed" in cls.__dict__:
            return
        with _lock:
            if "_completed" in cls.__dict__ or cls.__mro__[1] is object:
                return
            if cls._fields is None:
                init = not cls._own["__init__"]
                make: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False, init=init)
                make(cls)
                del cls.__setattr__, cls.__delattr__  # those of Layer let __init__ assign
            for method in ("__eq__", "__hash__"):
                if not cls._own[method]:  # a decorated class may have more than its fields
                    setattr(cls, method, getattr(Layer, method))
            cls._completed = True

    @property
    def __signature__(cls) -> inspect.Signature:
        cls._complete()
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]  # of the class, not a layer
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __dataclass_fields__(cls) -> dict[str, Any]:
        cls._complete()
        if cls._fields is None:
            raise AttributeError("__dataclass_fields__")  # Layer itself has none
        return cls._fields

    @__dataclass_fields__.setter
    def __dataclass_fields__(cls, fields: dict[str, Any]) -> None:
        cls._fields = fields


class Layer(metaclass=LayerType):
    """The base class of layers: a class with fields, and ``__call__(p, x)``.

    A subclass is a frozen dataclass; there is nothing to decorate. Two layers are equal exactly when
    they are of one class and their fields are equal, so ``jax.jit`` shares what it compiled for them. A
    class with its own ``__init__`` assigns its attributes there, and these are its fields.

    Raises:
      TypeError: when a layer is made: a field is an array, or cannot be hashed.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp
      >>> class Scale(pt.nn.Layer):
      ...     start: float = 1.0
      ...
      ...     def __call__(self, p, x):
      ...         scale = p.param("scale", x.shape[-1:], pt.initializers.Constant(self.start))
      ...         return jnp.expand_dims(scale, range(x.ndim - 1)) * x
      >>> Scale(2.0).init(jax.random.key(0), jnp.ones((4, 3))).scale
      Array([2., 2., 2.], dtype=float32)
      >>> Scale(2.0), Scale(2.0) == Scale(start=2.0)
      (Scale(start=2.0), True)
    """

    __slots__ = ("__dict__", "__weakref__", "_layer_fields")

    # The names of all attributes and of those compared, from when the layer is made.
    _layer_fields: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        call: Any = called(cls.__call__)
        if call is not cls.__call__:  # otherwise inherited, and another base may override it
            cls.__call__ = call  # type: ignore[method-assign]  # the same, wrapped

    @called
    def __call__(self, p: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Returns the output for the scope ``p`` and the inputs."""
        raise TypeError(f"{type(self).__name__} is a Layer without a __call__(self, p, x): define it.")

    @property
    def __dataclass_fields__(self) -> dict[str, Any]:
        return type(self).__dataclass_fields__

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "_layer_fields"):
            how = f", as in dataclasses.replace(layer, {name}=value)"
            raise dataclasses.FrozenInstanceError(
                f"cannot assign to field {name!r} of {type(self).__name__}: a layer is frozen. Make "
                f"another{'' if type(self)._own['__init__'] else how}."
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(
            f"cannot delete field {name!r} of {type(self).__name__}: a layer is frozen."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _attributes(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        _check_fields(self)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Layer) and type(self) is type(other) and _values(self) == _values(other)
        )

    def __hash__(self) -> int:
        return hash((type(self), _values(self)))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in _values(self))
        return f"{type(self).__name__}({shown})"

    @property
    def alias(self) -> str:
        """The layer's name in a ``Sequential``, without the counter."""
        return type(self).__name__.lower()

    def init(
        self,
        key: jax.Array,
        /,
        *inputs: Any,
        rules: Rules | None = None,
        ties: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> ParamTree:
        """Returns new parameters, as ``pt.init(layer, key, *inputs)`` does."""
        return init(self, key, *inputs, rules=rules, ties=ties, **kwargs)


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


class Sequential(Layer):
    """Applies layers one after another.

    Children are named by Gluon's aliases and a counter per alias: ``dense0``, ``conv0``, ``dense1``.
    Layers without parameters are counted too. Using an instance twice ties its parameters.

    Args:
      *layers: layers, or functions of x.
      **named: layers under names of your choice; they follow the positional ones.

    Returns:
      When called with ``(p, x, **kwargs)``: the last output. Each child gets those keyword arguments
      that its ``__call__`` names, such as ``mask``.

    Raises:
      TypeError: a child is not callable, or when called: no child takes a keyword argument.
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

    def __call__(self, p: Scope, x: Any, **kwargs: Any) -> Any:
        if self.shared:
            run_of(p).tie(p, dict(self.shared))
        own = dealt(self, self.layers, kwargs)
        for name, layer, keywords in zip(self.names, self.layers, own, strict=True):
            x = layer(child(p, name), x, **keywords)
        return x

    def _inner_keywords(self) -> frozenset[str] | None:
        return keywords_of(*self.layers)

    @overload
    def __getitem__(self, key: int | str) -> Layer: ...
    @overload
    def __getitem__(self, key: slice) -> "Sequential": ...
    def __getitem__(self, key: int | str | slice) -> Layer:
        if isinstance(key, slice):
            # Children keep their names, so a slice runs on the parameters of the full net.
            net = object.__new__(Sequential)
            net._set(self.layers[key], self.names[key])
            _check_fields(net)
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


def _check_fields(layer: Layer) -> None:
    """Notes the attributes of a new layer.

    Raises:
      TypeError: one that is compared is an array, or cannot be hashed.
    """
    fields = {field.name: field for field in dataclasses.fields(layer)}
    slots = [vars(base).get("__slots__", ()) for base in type(layer).__mro__ if base is not Layer]
    names = [*fields, *(n for s in slots for n in ((s,) if isinstance(s, str) else s)), *vars(layer)]
    names = [n for n in dict.fromkeys(names) if hasattr(layer, n) and not n.startswith("__")]
    compared = tuple(n for n in names if n not in fields or fields[n].compare)
    for name in compared:
        value = getattr(layer, name)
        start = f"{type(layer).__name__}: the field `{name}` is"
        if isinstance(value, np.ndarray | jax.Array):
            raise TypeError(
                f"{start} an array. A layer holds settings, and arrays are in the tree: declare it in "
                f"__call__ with p.param or p.state, as in p.state({name!r}, shape, "
                "pt.initializers.Constant(array)), or give it to the call as an input."
            )
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"{start} {value!r} of type {type(value).__name__}, which cannot be hashed ({error}), "
                "so jax.jit could not tell layers apart. Give a tuple for a list, a tuple of pairs for "
                "a dict, a frozenset for a set, or a frozen dataclass."
            ) from None
    object.__setattr__(layer, "_layer_fields", (tuple(names), compared))


def _attributes(layer: Layer, compared: bool = False) -> tuple[str, ...]:
    """Returns the names of all attributes of a layer, or of those that are compared."""
    if not hasattr(layer, "_layer_fields"):  # copied by a dataclass with slots
        _check_fields(layer)
    return layer._layer_fields[compared]


def _values(layer: Layer) -> tuple[tuple[str, Any], ...]:
    return tuple((name, getattr(layer, name)) for name in _attributes(layer, compared=True))


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
