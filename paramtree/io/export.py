"""Exporting a model with its parameters as one StableHLO program, which runs without paramtree."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export

from paramtree.core.errors import LoadError, ParamTreeError
from paramtree.core.structure import Structure
from paramtree.core.tree import ParamTree
from paramtree.io.atomic import replacing

__all__ = ["load_model", "save_model"]


def save_model(
    path: str | os.PathLike[str],
    f: Callable[..., Any],
    params: Any,
    *inputs: Any,
    platforms: Sequence[str] | None = None,
) -> None:
    """Saves a model together with its parameters, as StableHLO.

    Running it requires only jax: ``jax.export.deserialize(bytes).call(*inputs)``.

    Args:
      path: the file to write; an existing one is replaced atomically.
      f: a model, ``f(params, *inputs)``, without static arguments; may be jitted.
      params: its parameters, which become constants of the program.
      *inputs: arrays or ``jax.ShapeDtypeStruct`` objects. Use symbolic shapes for sizes that may vary:
        ``jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 20"), "float32")``.
      platforms: the platforms to lower for: "cpu", "cuda", "rocm" or "tpu"; by default the current one.

    Raises:
      ParamTreeError: flatbuffers is not installed.
      Exception: whatever jax raises while tracing the model.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp, tempfile
      >>> net, x = pt.nn.Dense(3), jnp.ones((2, 4))
      >>> file = f"{tempfile.mkdtemp()}/dense.stablehlo"
      >>> save_model(file, net, pt.init(net, jax.random.key(0), x), x, platforms=["cpu", "tpu"])
      >>> load_model(file)(x).shape
      (2, 3)
    """
    _check_installed()
    exported = jax.export.export(jax.jit(lambda *args: f(params, *args)), platforms=platforms)(*inputs)
    data = exported.serialize()
    with replacing(os.fspath(path)) as new, open(new, "wb") as file:
        file.write(data)


def load_model(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Returns the function of the inputs that ``save_model`` saved. It can be jitted.

    A program is code: load only programs that you trust.

    Args:
      path: the file.

    Raises:
      ParamTreeError: flatbuffers is not installed.
      LoadError: the file is not an exported program, or was written by a newer jax.

    Example:
      See ``save_model``:

      >>> import paramtree as pt, jax.numpy as jnp, tempfile
      >>> file = f"{tempfile.mkdtemp()}/double.stablehlo"
      >>> pt.save_model(file, lambda p, x: p.w * x, pt.from_tree({"w": 2.0}), jnp.ones(2))
      >>> load_model(file)(jnp.ones(2))
      Array([2., 2.], dtype=float32)
    """
    _check_installed()
    with open(path, "rb") as file:
        data = bytearray(file.read())
    try:
        return jax.export.deserialize(data).call
    except Exception as error:  # flatbuffers and jax raise many types
        problem = f"is not an exported model that this jax can run: {error}"
        raise LoadError(f"{os.fspath(path)}: {problem}") from error


def _check_installed() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ParamTreeError(
            "jax writes and reads programs with flatbuffers, which is not installed: "
            "pip install 'paramtree[export]'"
        )


def _to_bytes(structure: Structure) -> bytes:
    full = structure.full
    return json.dumps([full.paths, full.slots, full.kinds, structure.kept, full.stacks]).encode()


def _from_bytes(data: Any) -> Structure:
    paths, slots, kinds, kept, stacks = json.loads(bytes(data))
    stacks = tuple(tuple(map(tuple, stack)) for stack in stacks)
    return Structure.intern(tuple(map(tuple, paths)), tuple(slots), tuple(kinds), stacks).keep(kept)


jax.export.register_pytree_node_serialization(
    ParamTree,
    serialized_name="paramtree.ParamTree",
    serialize_auxdata=_to_bytes,
    deserialize_auxdata=_from_bytes,
)
