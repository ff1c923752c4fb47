"""The tree costs nothing in the compiled program: jaxprs equal those of code written by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import paramtree as pt
from paramtree import nn

SIZES = [(32, jax.nn.relu), (16, jnp.tanh), (4, None)]


def by_hand(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for i, (_, activation) in enumerate(SIZES):
        layer = params[f"dense{i}"]
        x = jnp.inner(x, layer["weight"]) + layer["bias"][None, :]
        x = x if activation is None else activation(x)
    return x


def equations(jaxpr: Any) -> list[str]:
    """Every equation with its variables numbered by first use, those of inner jaxprs too."""
    number: dict[Any, int] = {}

    def shown(atom: Any) -> str:
        if type(atom).__name__ == "Literal":
            return str(atom)
        return f"v{number.setdefault(atom, len(number))}:{atom.aval}"

    lines = []
    for eqn in jaxpr.eqns:
        inner = [p for p in eqn.params.values() if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
        plain = {
            k: str(v)
            for k, v in eqn.params.items()
            if not callable(v) and all(v is not p for p in inner)
        }
        nested = [equations(getattr(p, "jaxpr", p)) for p in inner]
        args, outs = list(map(shown, eqn.invars)), list(map(shown, eqn.outvars))
        lines.append(f"{eqn.primitive} {args} {outs} {sorted(plain.items())} {nested}")
    return lines


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Dense(size, activation=activation) for size, activation in SIZES))


def test_forward_and_gradient_are_those_of_the_hand_written_program(
    net: nn.Sequential, key: jax.Array
) -> None:
    x = jnp.ones((5, 8))
    params = pt.init(net, key, x)
    plain = params.to_dict()
    ours, theirs = jax.make_jaxpr(net)(params, x), jax.make_jaxpr(by_hand)(plain, x)
    assert equations(ours.jaxpr) == equations(theirs.jaxpr)
    assert len(ours.eqns) == 11
    ours = jax.make_jaxpr(jax.grad(lambda p, x: net(p, x).sum()))(params, x)
    theirs = jax.make_jaxpr(jax.grad(lambda p, x: by_hand(p, x).sum()))(plain, x)
    assert equations(ours.jaxpr) == equations(theirs.jaxpr)
    other = jax.make_jaxpr(jax.grad(lambda p, x: by_hand(p, 2 * x).sum()))(plain, x)
    assert equations(ours.jaxpr) != equations(other.jaxpr)


def test_training_without_state_adds_nothing(net: nn.Sequential, key: jax.Array) -> None:
    x = jnp.ones((5, 8))
    params = pt.init(net, key, x)
    ours = jax.make_jaxpr(lambda p, x: pt.training(net)(p, x)[0])(params, x)
    assert equations(ours.jaxpr) == equations(jax.make_jaxpr(net)(params, x).jaxpr)


@jax.numpy_dtype_promotion("standard")  # optax raises a Python float to an int32 count
def test_a_step_is_traced_once(net: nn.Sequential, key: jax.Array) -> None:
    traces = []
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params: pt.ParamTree, state: Any, x: jax.Array) -> Any:
        traces.append(1)
        grads = jax.grad(lambda p: net(p, x).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    x = jnp.ones((5, 8))
    params = pt.init(net, key, x)
    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state, x)
    params = pt.reinit(params, key, {".*": "zeros"})
    params = pt.replace(params, {"dense0_bias": jnp.ones(32)})
    step(params, state, x)
    step(pt.init(net, jax.random.key(9), x), tx.init(params), x)
    assert len(traces) == 1


def test_equal_nets_share_what_jit_compiled(key: jax.Array) -> None:
    traces = []

    def counted(x: jax.Array) -> jax.Array:
        traces.append(1)
        return x

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Dense(4, activation="relu"), counted, head=nn.Dense(2))

    x = jnp.ones((2, 3))
    params = pt.init(make(), key, x)
    traces.clear()
    nets = [make() for _ in range(3)]  # jax forgets a function when it dies
    for net in nets:
        jax.jit(net)(params, x)
    assert len(traces) == 1
    in_training = [pt.training(net) for net in nets]
    for f in in_training:
        jax.jit(f)(params, x)
    assert nets[0] == nets[1]
    assert hash(nets[0]) == hash(nets[1])
    assert len(traces) == 2
