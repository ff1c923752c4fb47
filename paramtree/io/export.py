"""A model with its parameters as one compiled program, to run where this library is not installed."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export

from paramtree.core.errors import LoadError
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

    The file needs no paramtree, only jax: ``jax.export.deserialize(bytes).call(*inputs)`` runs it.

    Args:
      path: where to; a file that is there is replaced, at once.
      f: a model, ``f(params, *inputs)``, without static arguments; under ``jax.jit`` or not.
      params: its parameters, which become constants of the program.
      *inputs: arrays or ``jax.ShapeDtypeStruct``s. Sizes that are to stay free are symbols:
        ``jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 20"), "float32")``.
      platforms: which to compile for, of "cpu", "cuda", "rocm" and "tpu"; None is this one.

    Raises:
      Whatever jax raises when it traces the model.

    Example:
      >>> import paramtree as pt, jax.numpy as jnp, tempfile
      >>> net, x = pt.nn.Dense(3), jnp.ones((2, 4))
      >>> file = f"{tempfile.mkdtemp()}/dense.stablehlo"
      >>> save_model(file, net, pt.init(net, jax.random.key(0), x), x, platforms=["cpu", "tpu"])
      >>> load_model(file)(x).shape
      (2, 3)
    """
    exported = jax.export.export(jax.jit(lambda *args: f(params, *args)), platforms=platforms)(*inputs)
    data = exported.serialize()
    with replacing(os.fspath(path)) as new, open(new, "wb") as file:
        file.write(data)


def load_model(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Returns the function of the inputs that ``save_model`` saved. It runs under ``jax.jit`` too.

    A program is code: load only those that you would run.

    Args:
      path: the file.

    Raises:
      LoadError: it is no such program, or one of a newer jax.

    Example:
      See ``save_model``:

      >>> import paramtree as pt, jax.numpy as jnp, tempfile
      >>> file = f"{tempfile.mkdtemp()}/double.stablehlo"
      >>> pt.save_model(file, lambda p, x: p.w * x, pt.from_tree({"w": 2.0}), jnp.ones(2))
      >>> load_model(file)(jnp.ones(2))
      Array([2., 2.], dtype=float32)
    """
    with open(path, "rb") as file:
        data = bytearray(file.read())
    try:
        return jax.export.deserialize(data).call
    except Exception as error:  # flatbuffers and jax raise what they meet
        raise LoadError(
            f"{os.fspath(path)}: is no exported model that this jax can run: {error}"
        ) from error
