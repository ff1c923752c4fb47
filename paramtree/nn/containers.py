"""Layers made of layers: side by side, around a skip connection, or one block many times."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError
from paramtree.core.structure import STATE
from paramtree.core.tree import ParamTree, _flatten, check_scope, child
from paramtree.model.record import Recorder, tie_in_recorder
from paramtree.model.training import TrainingScope, training
from paramtree.nn.layer import Layer, Sequential, _as_layer

__all__ = ["Parallel", "Repeat", "Residual"]


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Residual(Sequential):
    """Layers one after another, whose output is added to their input.

    He et al., "Deep residual learning for image recognition", 2016. The children are named as in a
    ``Sequential``.

    Raises:
      ValueError: on calling: the output has another shape than the input.

    Example:
      >>> from paramtree import nn
      >>> net = nn.Residual(nn.Dense(4, activation="relu"), nn.Dense(3))
      >>> x = jnp.ones((2, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 3)
    """

    def __call__(self, p: Any, x: Any) -> Any:
        y = super().__call__(p, x)
        if y.shape != x.shape:
            raise ValueError(
                f"Residual adds its layers' output to their input, but found {y.shape} and {x.shape}: "
                "let the last layer restore the shape."
            )
        return x + y

    def __repr__(self) -> str:
        return super().__repr__().replace("Sequential", "Residual", 1)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Parallel(Sequential):
    """Layers side by side on one input, their outputs joined along an axis.

    Gluon's ``Concurrent``. The children are named as in a ``Sequential``.

    Args:
      *layers: layers, or functions of x.
      axis: the axis to join along; None for a tuple of the outputs.
      **named: layers with the names that they are to have.

    Example:
      >>> from paramtree import nn
      >>> net = nn.Parallel(nn.Dense(4), nn.Dense(2, activation="relu"))
      >>> x = jnp.ones((2, 3))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (2, 6)
    """

    axis: int | None

    def __init__(
        self,
        *layers: Layer | Callable[..., Any],
        axis: int | None = -1,
        **named: Layer | Callable[..., Any],
    ) -> None:
        super().__init__(*layers, **named)
        object.__setattr__(self, "axis", axis)

    def __call__(self, p: Any, x: Any) -> Any:
        if self.shared:
            tie_in_recorder(p, self.shared)
        pairs = zip(self.names, self.layers, strict=True)
        outputs = tuple(layer(child(p, name), x) for name, layer in pairs)
        return outputs if self.axis is None else jnp.concatenate(outputs, self.axis)

    def __repr__(self) -> str:
        return super().__repr__().replace("Sequential", "Parallel", 1)


@dataclasses.dataclass(frozen=True, repr=False)
class Repeat(Layer):
    """One block many times, each with parameters of its own, as a scan.

    Every parameter of the block is there once, with a first axis of size ``n``, so tracing and
    compiling take no longer for a hundred copies than for two. Copy i starts from the very values
    that it would start from as a layer called ``i``. ``pt.unstack(params, "blocks")`` gives
    each copy names of its own; such a tree runs as well, copy by copy. State is kept, and keys are
    drawn, for each copy.

    Args:
      block: a layer, or any model ``f(p, x, *args)`` whose output is like ``x``.
      n: how many.
      remat: whether the backward pass computes each copy anew instead of keeping what is inside it;
        or a policy of ``jax.checkpoint_policies`` that says what to keep.

    Returns:
      On calling with ``(p, x, *args)``: what the last copy gives; all get the same ``args``.

    Raises:
      ValueError: ``n`` is not a whole number of 1 or more.
      MismatchError: on calling: the block's output is not like its input, or the leaves are not
        stacks of ``n``.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Repeat(pt.nn.Dense(3, activation="tanh"), 4)
      >>> params = net.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> params
      Parameter weight (shape=(4, 3, 3), dtype=float32)
      Parameter bias (shape=(4, 3), dtype=float32)
      >>> net(params, jnp.ones((2, 3))).shape
      (2, 3)
    """

    block: Callable[..., Any]
    n: int
    remat: bool | Callable[..., Any] = False

    def __post_init__(self) -> None:
        _as_layer(self.block, "the block")
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(f"Repeat: n is a whole number of 1 or more, but found {self.n!r}.")

    def __call__(self, p: Any, x: Any, *args: Any) -> Any:
        check_scope(p)
        if isinstance(p, Recorder):
            y = self.block(p.repeated(self.n), x, *args)
            self._check_output(x, y)
            return y
        if not isinstance(p, ParamTree):
            raise TypeError(f"Repeat takes a scope of paramtree's, but found {type(p).__name__}.")
        copies = [str(i) for i in range(self.n)]
        if list(p) == copies:  # unstacked
            for i in copies:
                x = self.block(p[i], x, *args)
            return x
        tree = p._with(_flatten(p)[0])
        self._check_stacks(tree)
        return (
            self._train(p, tree, x, args)
            if isinstance(p, TrainingScope)
            else self._infer(tree, x, args)
        )

    def _infer(self, tree: ParamTree, x: Any, args: Any) -> Any:
        def body(x: Any, leaves: Any) -> tuple[Any, None]:
            y = self.block(tree._with(leaves), x, *args)
            self._check_output(x, y)
            return y, None

        return jax.lax.scan(self._remat(body), x, tree._leaves, length=self.n)[0]

    def _train(self, p: TrainingScope, tree: ParamTree, x: Any, args: Any) -> Any:
        keys = jax.random.split(p.key(), self.n) if p.can_draw else None

        def body(x: Any, each: Any) -> tuple[Any, Any]:
            leaves, key = each
            one = tree._with(leaves)
            y, after = training(self.block)(one, x, *args, key=key)
            self._check_output(x, y)
            kinds = tree._structure.kinds
            return y, [leaf for leaf, kind in zip(after._leaves, kinds, strict=True) if kind == STATE]

        y, state = jax.lax.scan(self._remat(body), x, (tree._leaves, keys), length=self.n)
        fresh = iter(state)
        kinds = tree._structure.kinds
        leaves = [
            next(fresh) if kind == STATE else leaf
            for leaf, kind in zip(tree._leaves, kinds, strict=True)
        ]
        if state:
            p.write(tree._with(leaves))
        return y

    def _remat(self, body: Callable[..., Any]) -> Callable[..., Any]:
        if not self.remat:
            return body
        policy = self.remat if callable(self.remat) else None
        # In a scan there is nothing that the compiler could merge the second computation with.
        return jax.checkpoint(body, prevent_cse=False, policy=policy)

    def _check_output(self, x: Any, y: Any) -> None:
        have, want = (jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), v) for v in (y, x))
        if have != want:
            raise MismatchError(
                f"Repeat: the block gives {have} for an input of {want}, and the next copy is to take "
                "it: they must be alike in shape and dtype."
            )

    def _check_stacks(self, tree: ParamTree) -> None:
        wrong = [
            f"`{join((*tree._place, *path))}` has shape {shape_of(leaf)}"
            for path, leaf in zip(tree._structure.canonical, tree._leaves, strict=True)
            if (shape_of(leaf) or (None,))[0] != self.n
        ]
        if wrong:
            raise MismatchError(
                f"Repeat: {', '.join(wrong)}; expected a first axis of {self.n}, one for each copy. "
                "pt.stack puts named copies together."
            )

    def __repr__(self) -> str:
        text = repr(self.block).replace("\n", "\n  ")
        return f"Repeat(\n  ({self.n} x): {text}\n)"
