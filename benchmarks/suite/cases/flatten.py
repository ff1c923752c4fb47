"""Flattening and unflattening trees, as every call of jax does."""

from collections.abc import Callable
from typing import Any

from benchmarks.suite.case import Bound, Case


def arrays(leaves: int) -> dict[str, Any]:
    """Returns a nested dict of small arrays, two per layer."""
    import jax.numpy as jnp

    return {f"layer{i}": {"weight": jnp.zeros(2), "bias": jnp.zeros(2)} for i in range(leaves // 2)}


def metrics(tree: Any) -> dict[str, Callable[[], Any]]:
    """Returns the calls to time for a tree of any type."""
    import jax

    leaves, treedef = jax.tree.flatten(tree)
    same: Callable[[Any], Any] = lambda leaf: leaf  # noqa: E731
    return {
        "flatten": lambda: jax.tree.flatten(tree),
        "unflatten": lambda: jax.tree.unflatten(treedef, leaves),
        "tree_map": lambda: jax.tree.map(same, tree),
    }


def ours(size: int) -> dict[str, Any]:
    import paramtree as pt

    return metrics(pt.from_tree(arrays(size)))


def least(size: int) -> dict[str, Any]:
    import jax

    class Node:
        """A minimal custom node: it returns its tuple, and stores one."""

        __slots__ = ("leaves",)

    def unflatten(aux: Any, leaves: Any) -> Node:
        node = Node()
        node.leaves = leaves
        return node

    jax.tree_util.register_pytree_node(Node, lambda node: (node.leaves, None), unflatten)
    return metrics(unflatten(None, tuple(jax.tree.leaves(arrays(size)))))


def by_dict(size: int) -> dict[str, Any]:
    return metrics(arrays(size))


def by_tuple(size: int) -> dict[str, Any]:
    import jax

    return metrics(tuple(jax.tree.leaves(arrays(size))))


def equinox(size: int) -> dict[str, Any]:
    import equinox as eqx
    import jax

    class Layer(eqx.Module):
        weight: jax.Array
        bias: jax.Array

    class Model(eqx.Module):
        layers: list[Layer]

    return metrics(Model([Layer(**layer) for layer in arrays(size).values()]))


def nnx(size: int) -> dict[str, Any]:
    import jax
    from flax import nnx

    return metrics(nnx.State(jax.tree.map(nnx.Param, arrays(size))))


LEAST = "least node"
FLOOR = "see the floor, `least node`"

CASES = [
    Case(
        name="flatten",
        title="Flatten, unflatten and tree_map",
        sizes=(20, 200, 2000, 20000),
        contenders={
            "paramtree": ours,
            "dict": by_dict,
            "tuple": by_tuple,
            LEAST: least,
            "Equinox": equinox,
            "NNX": nnx,
        },
        bounds=tuple(
            bound
            for metric in ("flatten", "unflatten", "tree_map")
            for bound in (
                Bound(metric, "dict", 0.4, when=lambda size: size >= 200, why=FLOOR),
                Bound(metric, "tuple", 1.1, why=FLOOR),
            )
        ),
        smoke=(20,),
        packages=("equinox", "flax"),
        rounds=2,
        turns=9,
        seconds=50,
        note=(
            "The floor is `least node`: a class registered with jax that only returns its tuple and "
            "stores one. jax calls Python once to flatten such a class and once to unflatten it, which "
            "takes a few tenths of a microsecond, and iterates over the children, where it indexes a "
            "bare tuple."
        ),
    )
]
