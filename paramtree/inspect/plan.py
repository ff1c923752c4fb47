"""Plans the memory and communication of a training step per device, from shapes alone.

Parameters, gradients and optimiser state are counted from their shardings. Activations and collectives
come from the compiler: the step is compiled for the mesh, whether or not its devices exist, and never
run. Nothing is allocated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paramtree.core.arrays import describe, shape_of
from paramtree.core.errors import ParamTreeError
from paramtree.core.rules import UNSET, Rules
from paramtree.inspect.compiled import facts, facts_elsewhere
from paramtree.inspect.report import Report, Table, bytes_text, plural, some
from paramtree.inspect.show_sharding import places
from paramtree.inspect.size import count
from paramtree.model.init import abstract
from paramtree.model.training import training
from paramtree.sharding.shardings import shardings
from paramtree.verbs.grad import value_and_grad

__all__ = ["Plan", "plan"]


@dataclass(frozen=True, repr=False)
class Plan(Report):
    """The result of ``pt.plan``: prints as a table, renders in a notebook, converts to plain values.

    Attributes:
      axes: the names and sizes of the mesh axes.
      count: the number of scalars in the model's parameters and state.
      per_device: bytes on each device: "parameters", "gradients", "optimiser", "activations", "total".
      whole: the unsharded bytes of all but the activations.
      collectives: for each kind in the compiled step: the number of instructions ("ops"), the number of
        times they run in a step ("runs"), and the bytes they give to each device ("bytes").
      backend: the backend that the step was compiled for.
      large: the names of large parameters that are replicated on every device.
    """

    axes: dict[str, int]
    count: int
    per_device: dict[str, int]
    whole: dict[str, int]
    collectives: dict[str, dict[str, int]]
    backend: str
    large: list[str]

    def table(self) -> Table:
        shape = ", ".join(f"{name}={size}" for name, size in self.axes.items())
        devices = plural(math.prod(self.axes.values()), "device", "devices")
        rows: list[tuple[str, ...]] = [
            (name, bytes_text(size), bytes_text(self.whole[name]) if name in self.whole else "")
            for name, size in self.per_device.items()
        ]
        notes = [
            f"{name}: {total['ops']:,} in the program, {total['runs']:,} a step, "
            f"{bytes_text(total['bytes'])} to each device"
            for name, total in self.collectives.items()
        ] or ["The devices do not communicate."]
        if self.large:
            notes.append(f"Large and replicated on every device: {some(self.large, 3)}.")
        notes.append(f"Activations and collectives come from a step compiled for {self.backend}.")
        return Table(
            title=f"{self.count:,} parameters on {devices} ({shape})",
            columns=("", "per device", "on one device"),
            rows=rows[:-1],
            numbers=("per device", "on one device"),
            totals=rows[-1:],
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
    """Returns the memory and collectives of a training step per device, without allocating anything.

    Args:
      f: a model, ``f(scope, *inputs)``.
      x: the global batch, as a ``jax.ShapeDtypeStruct`` or an array; or a tuple of several inputs.
      mesh_shape: the names and sizes of the mesh axes, as in ``{"data": 8, "model": 8}``, or a mesh. If
        there are fewer devices, the step is compiled for that many CPU devices.
      rules: patterns to partition specs, as in ``pt.shardings``; they apply to parameters, gradients
        and optimiser state.
      loss: a function ``loss(params, *inputs)`` that calls the model and returns a scalar; by default
        the mean square of the model's outputs under ``pt.training``.
      tx: an optax optimiser, or any object with an ``init``; Adam by default.
      batch: the partition spec of the inputs; by default dimension 0 over the first mesh axis.
      ties: paths to tie, as in ``pt.init``.
      axes: as in ``pt.shardings``.
      default: as in ``pt.shardings``.
      uneven: as in ``pt.shardings``.

    Raises:
      RuleError: the rules do not fit the parameters, or the batch size is not divisible by its axis.
      TypeError: ``mesh_shape`` is neither a mapping nor a mesh.
      ParamTreeError: the loss is not a scalar, or the step cannot be compiled.

    Example:
      >>> import jax, paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Dense(64, activation="relu"), pt.nn.Dense(8))
      >>> x = jax.ShapeDtypeStruct((32, 16), "float32")
      >>> rules = {"dense0.*": jax.P("model"), "dense1_weight": jax.P(None, "model"), ".*": None}
      >>> report = pt.plan(net, x, {"data": 2, "model": 4}, rules)
      >>> report.per_device["parameters"], report.whole["parameters"]
      (1632, 6432)
    """
    inputs = x if isinstance(x, tuple) else (x,)
    if isinstance(mesh_shape, Mesh | AbstractMesh):
        mesh_shape = mesh_shape.shape
    if not isinstance(mesh_shape, Mapping) or not mesh_shape:
        raise TypeError(
            f"plan: expected the axes of a mesh and their sizes, as in {{'data': 8}}, but found "
            f"{mesh_shape!r}."
        )
    axis_sizes = {str(name): int(size) for name, size in mesh_shape.items()}
    mesh = _mesh(axis_sizes)

    def sharded(tree: Any) -> Any:
        return shardings(tree, mesh, rules, axes=axes, default=default, uneven=uneven)

    params = abstract(f, *inputs, ties=ties)
    measure = loss or _mean_square(f)
    value = jax.eval_shape(measure, params, *inputs)
    if shape_of(value) != ():
        raise ParamTreeError(f"plan: the loss must be a scalar, but found {describe(value)}.")
    step = value_and_grad(measure)
    _, grads = jax.eval_shape(step, params, *inputs)
    state = jax.eval_shape((tx or _adam()).init, grads)
    trees = {"parameters": params, "gradients": grads, "optimiser": state}
    sizes = {name: places(tree, sharded(tree)) for name, tree in trees.items()}
    spec = P(next(iter(axis_sizes))) if batch is UNSET else batch
    data = jax.tree.map(lambda leaf: _input_sharding(leaf, mesh, spec, uneven), inputs)
    ins, outs = (sharded(params), *data), sharded(grads)
    compiled = _facts(step, (params, *inputs), ins, outs, mesh)
    per_device = {name: size.total for name, size in sizes.items()}
    per_device["activations"] = compiled["temporaries"]
    per_device["total"] = sum(per_device.values())
    return Plan(
        axes=axis_sizes,
        count=count(params),
        per_device=per_device,
        whole={name: size.whole for name, size in sizes.items()},
        collectives=compiled["collectives"],
        backend=compiled["backend"],
        large=[leaf.name for leaf in sizes["parameters"].leaves if leaf.replicated],
    )


def _mesh(axes: dict[str, int]) -> Any:
    """Returns a mesh of this process's devices, or an abstract mesh if they are too few."""
    sizes, devices = tuple(axes.values()), jax.devices()
    types = (AxisType.Auto,) * len(sizes)  # the compiler places what the rules leave open
    if math.prod(sizes) > len(devices):
        return AbstractMesh(sizes, tuple(axes), axis_types=types)
    return Mesh(np.array(devices[: math.prod(sizes)]).reshape(sizes), tuple(axes), axis_types=types)


def _input_sharding(leaf: Any, mesh: Any, spec: Any, uneven: str) -> Any:
    rules = {".*": spec if leaf.shape else None}  # scalars are replicated
    return shardings({"input": leaf}, mesh, rules, uneven=uneven)["input"]


def _facts(step: Any, args: Any, ins: Any, grads: Any, mesh: Any) -> Any:
    """Returns the compiler's facts about the step, as a program of flat leaves."""
    flat, treedef = jax.tree.flatten(args)

    def leaves(*flat: Any) -> Any:
        return tuple(jax.tree.leaves(step(*jax.tree.unflatten(treedef, flat))))

    outs = (NamedSharding(mesh, P()), *jax.tree.leaves(grads))
    jitted = jax.jit(leaves, in_shardings=tuple(jax.tree.leaves(ins)), out_shardings=outs)
    if isinstance(mesh, Mesh):
        return facts(jitted.lower(*flat).compile())
    return facts_elsewhere(jax.export.export(jitted, platforms=["cpu"])(*flat), dict(mesh.shape))


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
            "plan counts the state of optax's Adam unless tx= is given: pip install optax, or pass "
            "any object with an init."
        ) from None
    return optax.adam(1e-3)
