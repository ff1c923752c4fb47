"""What training a model takes on every device of a mesh, from shapes alone: nothing is allocated.

Parameters, gradients and the state of the optimiser are counted from their shardings. What the
activations take, and what the devices exchange, only the compiler knows, so it is asked: the step is
compiled for that many devices, whether they are here or not, and never run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paramtree.core.arrays import describe, shape_of
from paramtree.core.errors import ParamTreeError
from paramtree.core.names import UNSET, Rules
from paramtree.inspect.compiled import facts, facts_elsewhere
from paramtree.inspect.report import Column, Report, Table, bytes_text, count_text, plural
from paramtree.inspect.show_sharding import places
from paramtree.inspect.size import count
from paramtree.model.grad import value_and_grad
from paramtree.model.init import abstract
from paramtree.model.training import training
from paramtree.sharding.shardings import shardings

__all__ = ["Plan", "plan"]


@dataclass(frozen=True, repr=False)
class Plan(Report):
    """What ``pt.plan`` found: prints as a table, shows in a notebook, converts to plain values.

    Attributes:
      axes: the axes of the mesh, and their sizes.
      count: how many numbers the parameters and the state of the model are.
      per_device: the bytes on every device, of "parameters", "gradients", "optimiser", "activations"
        and in "total".
      whole: the bytes that there would be on one device, of all but the activations.
      collectives: for each kind that the compiled step has: how many are in it ("ops"), how often they
        run in a step ("runs"), and how many bytes that gives to a device ("bytes").
      backend: what the step was compiled for.
      large: names of large parameters that are whole on every device.
    """

    axes: dict[str, int]
    count: int
    per_device: dict[str, int]
    whole: dict[str, int]
    collectives: dict[str, dict[str, int]]
    backend: str
    large: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values.

        Example:
          >>> Plan({"data": 2}, 9, {"total": 36}, {}, {}, "cpu", []).to_dict()["per_device"]
          {'total': 36}
        """
        return asdict(self)

    def table(self) -> Table:
        """Returns the bytes and the collectives as text."""
        shape = ", ".join(f"{name}={size}" for name, size in self.axes.items())
        devices = plural(math.prod(self.axes.values()), "device", "devices")
        rows: list[tuple[str, ...]] = [
            (
                name,
                bytes_text(size),
                bytes_text(self.whole[name]) if name in self.whole else "",
            )
            for name, size in self.per_device.items()
            if name != "total"
        ]
        notes = [
            f"{name}: {count_text(one['ops'])} in the program, {count_text(one['runs'])} a step, "
            f"{bytes_text(one['bytes'])} to each device"
            for name, one in self.collectives.items()
        ] or ["The devices exchange nothing."]
        if self.large:
            more = f" and {len(self.large) - 3} more" if len(self.large) > 3 else ""
            notes.append(f"Large, and whole on every device: {', '.join(self.large[:3])}{more}.")
        notes.append(f"Activations and collectives are those of a step compiled for {self.backend}.")
        return Table(
            title=f"{count_text(self.count)} parameters on {devices} ({shape})",
            columns=(Column(""), Column("per device", True), Column("on one device", True)),
            rows=rows,
            totals=[("total", bytes_text(self.per_device.get("total", 0)), "")],
            notes=notes,
        )


def plan(
    f: Callable[..., Any],
    x: Any,
    mesh_shape: Mapping[str, int] | Mesh | AbstractMesh,
    rules: Rules,
    *,
    loss: Callable[..., Any] | None = None,
    tx: Any = None,
    batch: Any = UNSET,
    ties: Mapping[str, str] | None = None,
    axes: Mapping[str, Any] | None = None,
    default: Any = UNSET,
    uneven: str = "error",
) -> Plan:
    """Returns what a training step takes on each device of a mesh, without allocating any of it.

    Args:
      f: a model, ``f(scope, *inputs)``.
      x: the shape of its input, of the whole batch, as a ``jax.ShapeDtypeStruct`` or an array; or a
        tuple of several inputs.
      mesh_shape: the axes of the mesh and their sizes, as in ``{"data": 8, "model": 8}``. So many
        devices need not be here: the step is then compiled for as many of a CPU. Or a mesh.
      rules: patterns to specs, as ``pt.shardings`` takes them, for parameters, gradients and the state
        of the optimiser.
      loss: a function ``loss(params, *inputs)`` of a scalar, in which the model is called; the mean of
        the squares of what it returns under ``pt.training`` if not given.
      tx: an optimiser of optax, or anything with an ``init``; Adam if not given.
      batch: the spec of the inputs; by default the first dimension is divided over the first axis.
      ties: paths to tie, as in ``pt.init``.
      axes: as for ``pt.shardings``.
      default: as for ``pt.shardings``.
      uneven: as for ``pt.shardings``.

    Raises:
      RuleError: the rules do not fit the parameters, or the batch is not divided by its axis.
      TypeError: ``mesh_shape`` is something else.
      ParamTreeError: the step cannot be compiled.

    Example:
      >>> import jax, paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Dense(64, activation="relu"), pt.nn.Dense(8))
      >>> x = jax.ShapeDtypeStruct((32, 16), "float32")
      >>> rules = {"dense0.*": jax.P("model"), "dense1_weight": jax.P(None, "model"), ".*": None}
      >>> found = pt.plan(net, x, {"data": 2, "model": 4}, rules)
      >>> found.per_device["parameters"], found.whole["parameters"]
      (1632, 6432)
    """
    inputs = x if isinstance(x, tuple) else (x,)
    if isinstance(mesh_shape, Mesh | AbstractMesh):
        mesh_shape = mesh_shape.shape
    if not isinstance(mesh_shape, Mapping) or not mesh_shape:
        raise TypeError(
            "plan takes the axes of a mesh and their sizes, as in {'data': 8}, but found "
            f"{mesh_shape!r}."
        )
    axis_sizes = {str(name): int(size) for name, size in mesh_shape.items()}
    mesh = _mesh(axis_sizes)
    how: dict[str, Any] = {"axes": axes, "default": default, "uneven": uneven}

    def placed(tree: Any) -> Any:
        return shardings(tree, mesh, rules, **how)

    params = abstract(f, *inputs, ties=ties)
    measure = loss or _mean_square(f)
    value = jax.eval_shape(measure, params, *inputs)
    if shape_of(value) != ():
        raise ParamTreeError(f"plan: the loss is a scalar, but found {describe(value)}.")
    step = value_and_grad(measure)
    _, grads = jax.eval_shape(step, params, *inputs)
    state = jax.eval_shape((tx or _adam()).init, grads)
    sizes = {
        "parameters": places(params, placed(params)),
        "gradients": places(grads, placed(grads)),
        "optimiser": places(state, placed(state)),
    }
    spec = P(next(iter(axis_sizes))) if batch is UNSET else batch
    data = tuple(_divided(a, mesh, spec, uneven) for a in inputs)
    found = _facts(step, (params, *inputs), (placed(params), *data), placed(grads), mesh, axis_sizes)
    per_device = {name: one.total for name, one in sizes.items()}
    per_device["activations"] = found["temporaries"]
    per_device["total"] = sum(per_device.values())
    return Plan(
        axes=axis_sizes,
        count=count(params),
        per_device=per_device,
        whole={name: one.whole for name, one in sizes.items()},
        collectives=found["collectives"],
        backend=found["backend"],
        large=[leaf.name for leaf in sizes["parameters"].leaves if leaf.replicated],
    )


def _mesh(axes: dict[str, int]) -> Any:
    """Returns a mesh of the devices that are here, or of none if they are too few."""
    sizes, devices = tuple(axes.values()), jax.devices()
    if math.prod(sizes) > len(devices):
        return AbstractMesh(sizes, tuple(axes))
    return Mesh(np.array(devices[: math.prod(sizes)]).reshape(sizes), tuple(axes))


def _divided(value: Any, mesh: Any, spec: Any, uneven: str) -> Any:
    """Returns the shardings of an input, which may be any pytree; a number has nothing to divide."""

    def one(leaf: Any) -> Any:
        rules = {".*": spec if leaf.shape else None}
        return shardings({"input": leaf}, mesh, rules, uneven=uneven)["input"]

    return jax.tree.map(one, value)


def _facts(step: Any, args: Any, ins: Any, grads: Any, mesh: Any, axes: dict[str, int]) -> Any:
    """Returns what the compiler says of the step, whose program takes and returns mere leaves."""
    flat, treedef = jax.tree.flatten(args)

    def leaves(*flat: Any) -> Any:
        return tuple(jax.tree.leaves(step(*jax.tree.unflatten(treedef, flat))))

    whole = NamedSharding(mesh, P())
    outs = (whole, *jax.tree.leaves(grads))
    jitted = jax.jit(leaves, in_shardings=tuple(jax.tree.leaves(ins)), out_shardings=outs)
    if isinstance(mesh, Mesh):
        return facts(jitted.lower(*flat).compile())
    return facts_elsewhere(jax.export.export(jitted, platforms=["cpu"])(*flat), axes)


def _mean_square(f: Callable[..., Any]) -> Callable[..., Any]:
    def loss(params: Any, *inputs: Any) -> Any:
        output, _ = training(f)(params, *inputs, key=jax.random.key(0))
        floats = [y for y in jax.tree.leaves(output) if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum((jnp.mean(y.astype(jnp.float32) ** 2) for y in floats), jnp.zeros(()))

    return loss


def _adam() -> Any:
    try:
        import optax  # type: ignore[import-untyped]
    except ImportError:
        raise ParamTreeError(
            "plan counts the state of optax's Adam if no tx= is given: pip install optax, or give "
            "anything with an init."
        ) from None
    return optax.adam(1e-3)
