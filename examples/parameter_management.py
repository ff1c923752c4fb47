"""Parameter management, step by step.

Follows the chapter "Parameter Management" of Dive into Deep Learning (the MXNet Gluon edition) and
prints what it prints. Where Gluon mutates a net, a function here takes a parameter tree and returns a
new one.

Run it with ``python examples/parameter_management.py``.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

# The nets


def mlp() -> nn.Sequential:
    """Returns a multilayer perceptron with one hidden layer."""
    return nn.Sequential(nn.Dense(256, activation="relu"), nn.Dense(10))


def block1() -> nn.Sequential:
    """Returns two dense layers; the layers of two calls share nothing."""
    return nn.Sequential(nn.Dense(32, activation="relu"), nn.Dense(16, activation="relu"))


def block2() -> nn.Sequential:
    """Returns four blocks in sequence."""
    return nn.Sequential(*(block1() for _ in range(4)))


def rgnet() -> nn.Sequential:
    """Returns a net of nested blocks, as Rube Goldberg would have built it."""
    return nn.Sequential(block2(), nn.Dense(10))


def tied_mlp() -> nn.Sequential:
    """Returns four layers; the second and the third are the same layer."""
    shared = nn.Dense(8, activation="relu")
    return nn.Sequential(nn.Dense(8, activation="relu"), shared, shared, nn.Dense(10))


@dataclass(frozen=True)
class FancyMLP(nn.Layer):
    """A net with a constant, a layer used twice, and a loop; its output is a scalar."""

    def __call__(self, p: Any, x: Any) -> Any:
        rand_weight = p.state("rand_weight", (20, 20), init.Uniform())  # state is never trained
        dense = nn.Dense(20, activation="relu")
        x = dense(p.dense, x)
        x = jax.nn.relu(x @ rand_weight + 1)
        x = dense(p.dense, x)  # the same scope again, so the same parameters
        return jnp.sum(x * rescaling(x))


def rescaling(x: jax.Array) -> jax.Array:
    """Returns the factor that halves ``x`` until its norm is at most 1, times 10 if it ends below 0.8.

    The loop halves a scalar, not ``x``, because JAX has no reverse-mode derivative of ``while_loop``.
    It needs none: a small change of ``x`` does not change the number of halvings.
    """
    norm = jnp.linalg.norm(x)
    scale = jax.lax.while_loop(lambda s: norm * s > 1, lambda s: s / 2, jnp.ones_like(norm))
    return jnp.where(norm * scale < 0.8, 10 * scale, scale)


@dataclass(frozen=True)
class NestMLP(nn.Layer):
    """A net in a net: three dense layers, the first two of them in a block."""

    def __call__(self, p: Any, x: Any) -> Any:
        net = nn.Sequential(nn.Dense(64, activation="relu"), nn.Dense(32, activation="relu"))
        x = net(p.net, x)
        return nn.Dense(16, activation="relu")(p.dense, x)


def chimera() -> nn.Sequential:
    """Returns a net that combines different kinds of layers."""
    return nn.Sequential(NestMLP(), nn.Dense(20), FancyMLP())


# Parameter access


def start(key: jax.Array, x: jax.Array) -> pt.ParamTree:
    """Initializes the net, with sizes inferred from the input, and runs it."""
    title("A multilayer perceptron")
    net = mlp()
    params = pt.init(net, key, x)
    print(jax.jit(net)(params, x))
    return params


def access_by_position(params: pt.ParamTree) -> None:
    """Shows the parameters of each layer."""
    title("Parameter access")
    print(params[0])
    print(params[1])


def access_one(params: pt.ParamTree, x: jax.Array) -> None:
    """Reads single parameters by position, attribute and name; each is a plain array."""
    title("Targeted parameters")
    print(pt.collect(params, "dense1_bias"))
    print(params[1].bias)
    print(pt.collect(params, "dense0_weight"))
    print(params.dense0.weight[0])
    print("One array:", params.dense0.weight is params["dense0/weight"] is params[0]["weight"])
    # A gradient is not stored in the parameter: it is another tree with the same names.
    net = mlp()
    grads = jax.jit(jax.grad(lambda p: net(p, x).sum()))(params)
    print(pt.collect(grads, "dense0_weight"))
    print(grads[1].bias)


def access_all(params: pt.ParamTree) -> None:
    """Reads all parameters at once, or those whose full name matches a regular expression."""
    title("All parameters at once")
    print(params[0])
    print(pt.collect(params))
    print([(name, leaf.shape) for name, leaf in pt.collect(params[0]).items()])
    print([(name, leaf.shape) for name, leaf in pt.collect(params).items()])
    print(pt.collect(params)["dense1_bias"])
    print(pt.collect(params, ".*weight"))
    print(pt.collect(params, "dense0.*"))


def access_nested(key: jax.Array, x: jax.Array) -> None:
    """Prints and reads the parameters of nested blocks."""
    title("Nested blocks")
    net = rgnet()
    params = pt.init(net, key, x)
    print(jax.jit(net)(params, x))
    print(net)
    print(pt.collect(params))
    print(params[0][1][0].bias)


def shapes_before_data() -> None:
    """Infers all shapes from an input's shape, without data or computation."""
    title("Shapes before any data")
    x = jax.ShapeDtypeStruct((2, 20), jnp.float32)
    print(pt.abstract(mlp(), x))


# Parameter initialization


def built_in_init(params: pt.ParamTree, key: jax.Array) -> None:
    """Reinitializes by rules: the first pattern that matches a name gives its initializer."""
    title("Built-in initialization")
    print("By default:", params[0].weight[0])
    params = pt.reinit(params, key, {".*weight": init.Normal(0.01), ".*bias": init.Zero()})
    print("Normal(0.01):", params[0].weight[0])
    print("Zero():", params[0].bias[:8])
    params = pt.reinit(params, key, {".*weight": init.Constant(1)})
    print("Constant(1):", params[0].weight[0])


def init_by_layer(params: pt.ParamTree, key: jax.Array) -> None:
    """Initializes one parameter in one way and a layer in another."""
    title("By parameter and by layer")
    params = pt.reinit(params, key, {"dense0_weight": init.Xavier(), "dense1_.*": init.Constant(42)})
    print(params[1].weight[0, 0])
    print(params[0].weight[0])


def far_or_zero(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws from U[5, 10] and U[-10, -5] with probability 1/4 each; otherwise 0."""
    draws = jax.random.uniform(key, shape, dtype, -10, 10)
    return jnp.where(abs(draws) >= 5, draws, 0)


def custom_init(params: pt.ParamTree, key: jax.Array) -> pt.ParamTree:
    """Initializes with a custom initializer, which is just a function."""
    title("Custom initialization")
    params = pt.reinit(params, key, {".*weight": far_or_zero})
    print(params[0].weight[0])
    return params


def set_values(params: pt.ParamTree) -> None:
    """Sets values in a new tree; the old one does not change."""
    title("Setting values")
    weight = params[0].weight + 1
    changed = pt.replace(params, {"dense0_weight": weight.at[0, 0].set(42)})
    print(changed[0].weight[0])
    print("Before:", params[0].weight[0, 0])


# Tied parameters


def tie_layers(key: jax.Array, x: jax.Array) -> pt.ParamTree:
    """Uses one layer twice: each parameter has two names and one array."""
    title("Tied parameters")
    net = tied_mlp()
    params = pt.init(net, key, x)
    print(jax.jit(net)(params, x))
    print(params)
    print(f"{len(pt.collect(params, aliases=True))} names, {len(jax.tree.leaves(params))} arrays")
    print(params[1].weight[0] == params[2].weight[0])
    weight = params[1].weight.at[0, 0].set(100)
    changed: pt.ParamTree = pt.replace(params, {"dense1_weight": weight})
    print(changed[2].weight[0, 0])
    print("One array:", changed[1].weight is changed[2].weight)
    return changed


def tied_gradient(params: pt.ParamTree, x: jax.Array) -> None:
    """Compares the gradient of a tied layer with those of its two uses after untying."""
    title("The gradient of a tied parameter")
    net = tied_mlp()
    grad = jax.jit(jax.grad(lambda p: net(p, x).sum()))
    tied, untied = grad(params), grad(pt.untie(params))
    print(pt.collect(tied, "dense[12]_weight"))
    print(pt.collect(untied, "dense[12]_weight"))
    print("Is the sum:", jnp.allclose(tied[1].weight, untied[1].weight + untied[2].weight))


# Nets that are not just a sequence of layers


def fancy(key: jax.Array, x: jax.Array) -> None:
    """Runs a net with a constant, a layer used twice and a loop, eagerly and compiled."""
    title("A fancy net")
    net = FancyMLP()
    params = pt.init(net, key, x)
    print(params)
    print(net(params, x))
    print(jax.jit(net)(params, x))
    print(pt.collect(params, kind="param"))


def mixed(key: jax.Array, x: jax.Array) -> None:
    """Runs the chimera."""
    title("A chimera")
    net = chimera()
    params = pt.init(net, key, x)
    print(net)
    print(params)
    print(jax.jit(net)(params, x))


def title(text: str) -> None:
    """Prints a heading."""
    print(f"\n{text}\n{'-' * len(text)}")


def main() -> None:
    """Runs all steps in the chapter's order."""
    key, data_key = jax.random.split(jax.random.key(0))
    x = jax.random.uniform(data_key, (2, 20))
    params = start(key, x)
    access_by_position(params)
    access_one(params, x)
    access_all(params)
    access_nested(key, x)
    shapes_before_data()
    built_in_init(params, key)
    init_by_layer(params, key)
    set_values(custom_init(params, key))
    tied_gradient(tie_layers(key, x), x)
    fancy(key, x)
    mixed(key, x)


if __name__ == "__main__":
    main()
