"""Layer classes: frozen dataclasses without a decorator, equal exactly when their fields are."""

import abc
import copy
import dataclasses
import functools
import inspect
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn

KEY = jax.random.key(0)
X = jnp.ones((2, 3))


class Scale(nn.Layer):
    start: float = 1.0

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.start


class Own(nn.Layer):
    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.start


class Named(nn.Dense):
    title: str = ""


class Tagged(nn.Sequential):
    def __init__(self, *layers: Any, tag: float = 1.0) -> None:
        super().__init__(*layers)
        self.tag = tag

    def __call__(self, p: Any, x: Any) -> Any:
        return super().__call__(p, x) * self.tag


@dataclasses.dataclass(frozen=True)
class Decorated(nn.Layer):
    start: float = 1.0

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.start


@dataclasses.dataclass(frozen=True)
class Below(Scale):
    end: float = dataclasses.field(default=2.0, kw_only=True)


class OfDecorated(Decorated):
    def __init__(self, start: float, more: float) -> None:
        super().__init__(start)
        object.__setattr__(self, "more", more)

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.start * self.more


PAIRS = [
    (Scale(2.0), Scale(3.0)),
    (Own(2.0), Own(3.0)),
    (Named(3, title="a"), Named(3, title="b")),
    (Tagged(nn.Dense(3), tag=1.0), Tagged(nn.Dense(3), tag=2.0)),
    (Decorated(2.0), Decorated(3.0)),
    (Below(2.0, end=1.0), Below(2.0, end=3.0)),
    (OfDecorated(1.0, 2.0), OfDecorated(1.0, 3.0)),
    (nn.Dense(3), nn.Dense(4)),
    (nn.Sequential(nn.Dense(3)), nn.Sequential(nn.Dense(3, use_bias=False))),
    (nn.Parallel(nn.Dense(3)), nn.Parallel(nn.Dense(3), axis=0)),
    (Scale(2.0), Decorated(2.0)),
    (nn.Repeat(nn.Dense(3), 2), nn.Repeat(nn.Dense(3), 3)),
]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda layer: type(layer).__name__)
def test_layers_are_equal_exactly_when_their_fields_are(a: Any, b: Any) -> None:
    assert a != b
    for layer in (a, b):
        twin = copy.deepcopy(layer)
        assert twin == layer == pickle.loads(pickle.dumps(layer)) == copy.copy(layer)
        assert hash(twin) == hash(layer)
        assert layer != "another"
        with pytest.raises(dataclasses.FrozenInstanceError):
            layer.start = 5.0
        with pytest.raises(dataclasses.FrozenInstanceError):
            del layer.start
    assert len({a, b, copy.deepcopy(a)}) == 2


def test_jit_tells_layers_apart() -> None:
    call = jax.jit(lambda layer, p, x: layer(p, x), static_argnums=0)
    empty = pt.from_tree({})
    for a, b in [
        (Scale(2.0), Scale(3.0)),
        (Own(2.0), Own(3.0)),
        (OfDecorated(1.0, 2.0), OfDecorated(1.0, 3.0)),
    ]:
        assert (call(a, empty, X) != call(b, empty, X)).all()


def test_a_class_is_a_dataclass() -> None:
    class Late(nn.Layer):
        a: int
        b: tuple[int, ...] = dataclasses.field(default_factory=tuple)

        def __post_init__(self) -> None:
            object.__setattr__(self, "b", tuple(self.b))

    assert [field.name for field in dataclasses.fields(Late)] == ["a", "b"]
    assert list(inspect.signature(Late).parameters) == ["a", "b"]
    layer = Late(1, b=[1, 2])  # type: ignore[arg-type]
    assert dataclasses.replace(layer, a=3) == Late(3, (1, 2))
    assert dataclasses.asdict(layer) == {"a": 1, "b": (1, 2)}
    assert repr(layer) == ["test_a_class_is_a_dataclass.<locals>", "Late(a=1, b=(1, 2))"][-1]
    assert [field.name for field in dataclasses.fields(Below)] == ["start", "end"]
    assert list(inspect.signature(nn.Residual).parameters) == ["layers", "named"]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        Late()  # type: ignore[call-arg]


def test_a_field_that_jit_could_not_compare_is_refused() -> None:
    class Sizes(nn.Layer):
        sizes: Any

    for value, word in [
        ([1, 2], "Give a tuple for a list"),
        ({"a": 1}, "a tuple of pairs"),
        ({1}, "frozenset"),
        (([1],), "tuple"),
    ]:
        with pytest.raises(
            TypeError, match=rf"Sizes: the field `sizes` is .* cannot be hashed.*{word}"
        ):
            Sizes(value)
    for array in (jnp.ones(2), np.ones(2)):
        with pytest.raises(TypeError, match="Sizes: the field `sizes` is an array.*p.state"):
            Sizes(array)
    with pytest.raises(TypeError, match="Own: the field `start` is an array"):
        Own(jnp.ones(2))  # type: ignore[arg-type]
    Sizes(np.float32(1)), Sizes((1, "a", None, jnp.tanh))


def test_a_field_that_is_not_compared_is_left_out() -> None:
    class Cached(nn.Layer):
        a: int
        cache: Any = dataclasses.field(default_factory=dict, compare=False)

    assert Cached(1) == Cached(1, {"x": 1})


def test_a_layer_takes_any_form_of_a_scope_and_nothing_else() -> None:
    net = nn.Dense(3)
    params = net.init(KEY, X)
    want = net(params, X)
    np.testing.assert_allclose(net(p=params, x=X), want)
    np.testing.assert_allclose(net(pt.pack(params), X), want, rtol=1e-6)
    np.testing.assert_allclose(Scale(2.0)({}, X), 2 * X)
    for wrong in (X, {"weight": X}, None, [params], {}):
        for layer in (net, Scale(2.0), nn.BatchNorm(), nn.Repeat(net, 2)):
            if isinstance(wrong, dict) and not wrong and not isinstance(layer, nn.Dense | nn.BatchNorm):
                continue  # enough for a layer without parameters
            with pytest.raises(TypeError, match="called with its parameters first"):
                layer(wrong, X)


class Slotted(nn.Layer):
    __slots__ = ("a",)

    def __init__(self, a: float) -> None:
        self.a = a

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.a


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots(nn.Layer):
    a: float = 1.0

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.a


@dataclasses.dataclass(slots=True)
class Slots(nn.Layer):
    a: float = 1.0

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.a


class Cached(nn.Layer):
    a: float = 1.0

    @functools.cached_property
    def table(self) -> Any:
        return jnp.ones(3)

    def __call__(self, p: Any, x: Any) -> Any:
        return x * self.a


@pytest.mark.parametrize("make", [Slotted, FrozenSlots, Slots, Cached])
def test_slots_and_cached_properties(make: Any) -> None:
    layer = make(2.0)
    if make is Cached:
        assert layer.table.shape == (3,)
    assert layer == make(2.0) != make(3.0)
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin == layer
        assert hash(twin) == hash(layer) == hash(make(2.0))
        assert twin.a == 2.0


class Mixin:
    pass


class MixinWithInit:
    def __init__(self, *extra: int) -> None:
        self.extra = extra


class AlwaysEqual(nn.Layer):
    a: int = 1

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def test_other_bases() -> None:
    class Named(Mixin, nn.Sequential):
        pass

    class Extra(MixinWithInit, nn.Layer):
        pass

    class Abstract(nn.Layer, abc.ABC):
        b: int = 2

    class Below(AlwaysEqual):
        b: int = 2

    assert list(Named(nn.Dense(3), nn.Dense(2)).names) == ["dense0", "dense1"]
    assert Extra(1, 2) == Extra(1, 2) != Extra(1, 3)
    assert Abstract(3) != Abstract(4)
    assert Below(1, 2) == Below(1, 3)
    assert nn.Dropout(0.5)(p={}, x=X).shape == X.shape
