"""Leaves share compiled functions: numbers such as sigma compile nothing, and initializers must be pure."""

import itertools
import logging
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree.initializers.lift import lift

K = jax.random.key(0)

# A factory with one number, and a shape that no other test uses.
KINDS: dict[str, Any] = {
    "Normal": (init.Normal, (13, 7)),
    "Uniform": (init.Uniform, (13, 7)),
    "TruncNorm": (lambda s: init.TruncNorm(s, s), (13, 7)),
    "Xavier": (lambda s: init.Xavier(magnitude=s), (13, 7)),
    "Xavier gaussian": (lambda s: init.Xavier("gaussian", "in", s), (13, 7)),
    "MSRAPrelu": (lambda s: init.MSRAPrelu("in", s), (13, 7)),
    "VarianceScaling": (init.VarianceScaling, (13, 7)),
    "VarianceScaling of a stack": (lambda s: init.VarianceScaling(s, batch_axis=0), (3, 13, 7)),
    "Orthogonal": (init.Orthogonal, (13, 7)),
    "Orthogonal normal": (lambda s: init.Orthogonal(s, "normal"), (13, 7)),
    "LSTMBias": (init.LSTMBias, (52,)),
    "Constant": (init.Constant, (70_001,)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def start(initializer: Any, shape: tuple[int, ...], dtype: Any = "float32") -> Any:
    return pt.init(lambda p: p.param("w", shape, initializer, dtype), K).w


@kinds
def test_another_number_compiles_nothing(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, shape = KINDS[kind]
    start(make(0.01), shape)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        values = [start(make(number), shape) for number in (0.02, 0.03, 1, 2.5)]
    assert "Compiling" not in caplog.text
    assert all((a != b).any() for a, b in itertools.pairwise(values))


def test_leaves_of_several_numbers_share_a_function(caplog: pytest.LogCaptureFixture) -> None:
    layers = [nn.Dense(19, weight_initializer=init.Normal(0.01 * i)) for i in range(1, 9)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        params = pt.init(nn.Sequential(*layers), K, jax.ShapeDtypeStruct((2, 19), "float32"))
    drawn = [r for r in caplog.messages if "Compiling" in r and "_compute" in r]
    assert len(drawn) == 1
    ratios = [params[f"dense{i}"].weight.std() / (0.01 * (i + 1)) for i in range(8)]
    np.testing.assert_allclose(ratios, 1, atol=0.2)


@kinds
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_the_bits_are_those_of_the_number_as_a_constant(kind: str, dtype: str) -> None:
    make, shape = KINDS[kind]
    dtype = jnp.dtype(dtype)

    function = lift(make(7.0), shape, dtype)[0]
    compiled = jax.jit(lambda key, *numbers: function(key, shape, dtype, *numbers))
    for number in (0.01, 1, 1 / 3, 0.123456789) if dtype == "float32" else (1, 0.123456789):
        lifted, numbers = lift(make(number), shape, dtype)
        assert numbers and lifted == function != make(number)
        constant = jax.jit(lambda key, n=number: make(n)(key, shape, dtype))(K)
        drawn = compiled(K, *numbers)
        assert drawn.dtype == constant.dtype == dtype
        assert np.asarray(drawn).tobytes() == np.asarray(constant).tobytes()


def test_what_is_not_a_plain_number_stays() -> None:
    class Shifted(init.Normal):
        def __call__(self, key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
            return super().__call__(key, shape, dtype) + 1

    for initializer in (
        Shifted(0.01), init.Zero(), init.Normal(np.float64(0.1)), init.Constant(np.ones(3)),  # type: ignore[arg-type]
        init.Xavier(magnitude=jnp.float32(3)),  # type: ignore[arg-type]
    ):  # fmt: skip
        assert lift(initializer, (4, 3), jnp.dtype("float32")) == (initializer, ())
    assert abs(float(start(Shifted(0.01), (13, 7)).mean()) - 1) < 0.1
    assert lift(init.Constant(3), (4,), jnp.dtype("int32")) == (init.Constant(3), ())


def test_a_number_may_be_traced() -> None:
    values = jax.jit(lambda s: start(init.Normal(s), (13, 7)))(jnp.float32(0.5))
    np.testing.assert_allclose(values, start(init.Normal(0.5), (13, 7)), rtol=1e-5)


# Purity

RNG = np.random.default_rng(0)


def numpy_array(key: Any, shape: Any, dtype: Any) -> Any:
    return RNG.normal(size=shape).astype(dtype)


def python_number(key: Any, shape: Any, dtype: Any) -> Any:
    return random.random() * jax.random.normal(key, shape, dtype)


@jax.tree_util.Partial
def partial(key: Any, shape: Any, dtype: Any) -> Any:
    return jnp.asarray(np.random.normal(size=shape), dtype)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, key: Any, shape: Any, dtype: Any) -> Any:
        return np.random.normal(size=shape).astype(dtype)


IMPURE = [
    numpy_array,
    python_number,
    partial,
    Unhashable(),
    jax.jit(numpy_array, static_argnums=(1, 2)),
]
X = jax.ShapeDtypeStruct((2, 5), "float32")


@pytest.mark.parametrize("initializer", IMPURE, ids=["numpy", "python", "partial", "unhashable", "jit"])
@pytest.mark.parametrize("repeat", [False, True])
def test_an_impure_initializer_is_refused(initializer: Any, repeat: bool) -> None:
    layer = nn.Dense(5)
    net = nn.Sequential(nn.Repeat(layer, 3) if repeat else layer)
    for _ in range(2):  # the error is not forgotten
        with pytest.raises(ValueError, match="gives other values in a second call") as info:
            pt.init(net, K, X, rules={".*weight": initializer})
        assert "weight`" in str(info.value)
        assert "jax.random.normal(key, shape, dtype)" in str(info.value)
    with pytest.raises(ValueError, match="second call with the same key"):
        jax.jit(lambda key: pt.init(net, key, X, rules={".*weight": initializer}))(K)
    with pytest.raises(ValueError, match="second call with the same key"):
        pt.reinit(pt.init(net, K, X), K, {".*weight": initializer})


def test_a_pure_one_is_checked_once() -> None:
    calls = []

    def pure(key: Any, shape: Any, dtype: Any) -> Any:
        calls.append(shape)
        table = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
        return jax.nn.gelu(jax.nn.relu(table)) + jax.random.normal(key, shape, dtype)

    net = nn.Sequential(*[nn.Dense(5, weight_initializer=pure) for _ in range(4)])
    params = pt.init(net, K, X)
    assert len(calls) == 3  # two traces for the check, and one to compile
    assert (params.dense0.weight != params.dense1.weight).any()
    pt.init(net, jax.random.key(1), X)
    assert len(calls) == 3


def test_an_error_in_the_check_is_that_of_the_call() -> None:
    def fails(key: Any, shape: Any, dtype: Any) -> Any:
        raise ZeroDivisionError("as it happens")

    with pytest.raises(ZeroDivisionError, match="as it happens") as info:
        pt.init(nn.Dense(5, weight_initializer=fails), K, X)
    assert "`weight`" in "".join(info.value.__notes__)
