"""Layers made of layers: parallel branches, residual connections, and repeated blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError
from paramtree.core.pytrees import KEEP, open_tree
from paramtree.core.structure import STATE, Structure
from paramtree.core.tree import ParamTree, unflatten
from paramtree.model.record import Recorder, tie_in_recorder
from paramtree.model.scope import Scope, check_scope, child, run_of, write
from paramtree.model.training import Training, training
from paramtree.nn.layer import Layer, Sequential, as_layer

__all__ = ["Parallel", "Repeat", "Residual"]


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Residual(Sequential):
    """Applies layers one after another and adds their output to their input.

    He et al., "Deep residual learning for image recognition", 2016. Children are named as in a
    ``Sequential``.

    Raises:
      ValueError: when called: the output and the input have different shapes.

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
                f"Residual adds its layers' output to their input, but found shapes {y.shape} and "
                f"{x.shape}: make the last layer restore the input's shape."
            )
        return x + y

    def __repr__(self) -> str:
        return super().__repr__().replace("Sequential", "Residual", 1)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Parallel(Sequential):
    """Applies layers to the same input and concatenates their outputs along an axis.

    Gluon's ``Concurrent``. Children are named as in a ``Sequential``.

    Args:
      *layers: layers, or functions of x.
      axis: the axis to concatenate along; None returns the outputs as a tuple.
      **named: layers under names of your choice.

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
    """Scans over ``n`` copies of a block, each with its own parameters, state and keys.

    Each parameter is one leaf with a leading axis of size ``n``, so a hundred copies trace and compile
    as fast as two. Copy i starts from the values that a layer named ``i`` would start from.
    ``pt.unstack(params, "blocks")`` gives every copy its own names; the unstacked tree also runs, copy
    by copy.

    Args:
      block: a layer, or a model ``f(p, x, *args)`` whose output has the shape and dtype of ``x``.
      n: the number of copies.
      remat: whether the backward pass recomputes each copy instead of storing its intermediates; or a
        policy from ``jax.checkpoint_policies`` that selects what to store.

    Returns:
      When called with ``(p, x, *args)``: the output of the last copy. All copies get the same ``args``.

    Raises:
      ValueError: ``n`` is not a positive integer.
      TypeError: ``block`` is not callable, or when called: ``p`` is not a scope.
      MismatchError: when called: the block changes the shape or dtype of its input, or a leaf has no
        leading axis of size ``n``.

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
        as_layer(self.block, "the block of a Repeat")
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(f"Repeat: n must be a positive integer, but found {self.n!r}.")

    def __call__(self, p: Any, x: Any, *args: Any) -> Any:
        check_scope(p)
        if isinstance(p, Recorder):
            y = self.block(p.repeated(self.n), x, *args)
            self._check_output(x, y)
            return y
        if not isinstance(p, ParamTree):
            raise TypeError(f"Repeat needs a paramtree scope, but found {type(p).__name__}.")
        copies = [str(i) for i in range(self.n)]
        if list(p) == copies:  # unstacked
            for i in copies:
                x = self.block(p[i], x, *args)
            return x
        self._check_stacks(p)
        run: Any = self._train if isinstance(run_of(p), Training) else self._infer
        return run(p, x, args)

    def _infer(self, p: Any, x: Any, args: Any) -> Any:
        source = open_tree(p)
        copy = _one_copy(source.structure)

        def body(x: Any, leaves: Any) -> tuple[Any, None]:
            y = self.block(source.rebuild(copy, leaves, KEEP), x, *args)
            self._check_output(x, y)
            return y, None

        return jax.lax.scan(self._remat(body), x, source.leaves, length=self.n)[0]

    def _train(self, p: Scope, x: Any, args: Any) -> Any:
        source = open_tree(p)
        structure, copy = source.structure, _one_copy(source.structure)
        keys = jax.random.split(p.key(), self.n) if run_of(p).can_draw else None

        def body(x: Any, leaves_and_key: Any) -> tuple[Any, Any]:
            leaves, key = leaves_and_key
            tree = unflatten(copy, leaves, source.place)
            y, new = training(self.block)(tree, x, *args, key=key)
            self._check_output(x, y)
            new_leaves = zip(open_tree(new).leaves, structure.kinds, strict=True)
            return y, [leaf for leaf, kind in new_leaves if kind == STATE]

        y, state = jax.lax.scan(self._remat(body), x, (source.leaves, keys), length=self.n)
        new_state = iter(state)
        leaves = [
            next(new_state) if kind == STATE else leaf
            for leaf, kind in zip(source.leaves, structure.kinds, strict=True)
        ]
        if state:
            write(p, unflatten(structure, leaves))
        return y

    def _remat(self, body: Callable[..., Any]) -> Callable[..., Any]:
        if not self.remat:
            return body
        policy = self.remat if callable(self.remat) else None
        # Inside a scan the compiler cannot merge the recomputation with the first computation.
        return jax.checkpoint(body, prevent_cse=False, policy=policy)

    def _check_output(self, x: Any, y: Any) -> None:
        after, before = (jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), v) for v in (y, x))
        if after != before:
            raise MismatchError(
                f"Repeat: the block returns {after} for an input of {before}, but its output is the "
                "next copy's input: make the shapes and dtypes equal."
            )

    def _check_stacks(self, p: Any) -> None:
        source = open_tree(p)
        mismatches = [
            f"`{join((*source.place, *path))}` has shape {shape_of(leaf)}"
            for path, leaf in zip(source.structure.canonical, source.leaves, strict=True)
            if (shape_of(leaf) or (None,))[0] != self.n
        ]
        if mismatches:
            raise MismatchError(
                f"Repeat: {', '.join(mismatches)}; expected a leading axis of size {self.n}, one entry "
                "per copy. Stack named copies with pt.stack."
            )

    def __repr__(self) -> str:
        text = repr(self.block).replace("\n", "\n  ")
        return f"Repeat(\n  ({self.n} x): {text}\n)"


def _one_copy(structure: Structure) -> Structure:
    """Returns the structure of a single copy: that of a stack without its outermost axis."""

    def make() -> Structure:
        stacks = [
            stack[1:] if stack[:1] and stack[0][0] == 0 else stack for stack in structure.full.stacks
        ]
        full = structure.full
        copy = Structure.intern(
            full.paths, full.slots, full.kinds, tuple(stacks) if any(stacks) else ()
        )
        return copy.keep(structure.kept)

    copy: Structure = structure.cached("one copy", make)
    return copy
