"""Mixed precision: a layer or a net that computes in another dtype than its parameters have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import dtype_of
from paramtree.core.pytrees import open_tree
from paramtree.core.tree import ParamTree
from paramtree.nn.call import dealt, keywords_of
from paramtree.nn.layer import Layer, as_layer
from paramtree.typing import Scope
from paramtree.verbs.cast import cast
from paramtree.verbs.split import merge, partition

__all__ = ["Compute"]


class Compute(Layer):
    """Computes a layer or a net in another dtype, such as bfloat16; parameters stay in theirs.

    Each call reads the parameters as ``pt.parametrizations.Cast`` does, and casts the floating-point
    inputs. Parameters, gradients and optimizer states stay in float32, and so does state, such as
    running statistics. Names are those of the layer, in a ``Sequential`` too, so both have the same
    parameters. Normalizing layers compute in float32 all the same.

    Args:
      layer: a layer, or a model ``f(p, *inputs, **kwargs)``.
      compute_dtype: a floating dtype.
      keep: a pattern for the names of parameters that are read as they are stored, such as "norm.*".

    Returns:
      When called with ``(p, *inputs, **kwargs)``: the outputs of the layer; those of floating point
      have the dtype of the first input of floating point; if there is none, of the first parameter; and
      else float32.

    Raises:
      ValueError: ``compute_dtype`` is no floating dtype.
      TypeError: ``layer`` is not callable, or when called: it returns a parameter tree.
      RuleError: when called: ``keep`` matches no parameter.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Sequential(pt.nn.Compute(pt.nn.Dense(3), "bfloat16"), pt.nn.Dense(2))
      >>> x = jnp.ones((4, 5))
      >>> params = net.init(jax.random.key(0), x)
      >>> params.dense0.weight.dtype, net(params, x).dtype
      (dtype('float32'), dtype('float32'))
      >>> pt.capture(net, "dense0")(params, x)[1]
      Parameter dense0_output1 (shape=(4, 3), dtype=bfloat16)
      Parameter dense0_output (shape=(4, 3), dtype=float32)
    """

    layer: Callable[..., Any]
    compute_dtype: Any
    keep: str | None = None

    def __post_init__(self) -> None:
        as_layer(self.layer, "the layer of a Compute")
        try:
            dtype = jnp.dtype("bool" if self.compute_dtype is None else self.compute_dtype)
        except TypeError:
            dtype = jnp.dtype("bool")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                "Compute: compute_dtype must be a floating dtype such as jnp.bfloat16, but found "
                f"{self.compute_dtype!r}."
            )
        object.__setattr__(self, "compute_dtype", dtype)

    @property
    def alias(self) -> str:
        """That of the layer, so that names stay as they are."""
        return self.layer.alias if isinstance(self.layer, Layer) else "compute"

    def __call__(self, p: Scope, *inputs: Any, **kwargs: Any) -> Any:
        dealt(self, [self.layer], kwargs)
        params, state = partition(p, kind="param")
        dtype = self.compute_dtype
        rules = dtype if self.keep is None else {self.keep: None, ".*": dtype}
        p = merge(cast(params, rules), state)
        given = *jax.tree.leaves((inputs, kwargs)), *open_tree(params).leaves
        floating = [leaf.dtype for leaf in given if _is_floating(leaf)]
        inputs, kwargs = _in_dtype((inputs, kwargs), dtype)
        y = self.layer(p, *inputs, **kwargs)
        if any(isinstance(v, ParamTree) for v in jax.tree.leaves(y, is_leaf=_is_tree)):
            raise TypeError(
                "Compute: the model returns a parameter tree, which is not cast back: give Compute the "
                "model itself, as in pt.training(nn.Compute(net, dtype))."
            )
        return _in_dtype(y, floating[0] if floating else jnp.dtype("float32"))

    def _inner_keywords(self) -> frozenset[str] | None:
        return keywords_of(self.layer)

    def __repr__(self) -> str:
        text = repr(self.layer).replace("\n", "\n  ")
        keep = "" if self.keep is None else f", keep={self.keep!r}"
        return f"Compute({text}, {self.compute_dtype}{keep})"


def _is_tree(value: Any) -> bool:
    return isinstance(value, ParamTree)


def _is_floating(value: Any) -> bool:
    dtype = dtype_of(value)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))


def _in_dtype(values: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda v: jnp.asarray(v, dtype) if _is_floating(v) else v, values)
