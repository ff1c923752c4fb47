"""Copies of a layer, each with parameters, state and keys of its own: in sequence or side by side.

Each parameter is one leaf with a leading axis over the copies, so a hundred copies trace and compile as
fast as two. ``pt.unstack`` gives every copy its own names; the unstacked tree also runs, copy by copy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError
from paramtree.core.structure import Structure
from paramtree.core.tree import ParamTree, flatten, place_of, unflatten
from paramtree.model.scope import level_of, run_of
from paramtree.nn.call import dealt, keywords_of
from paramtree.nn.layer import Layer, as_layer
from paramtree.typing import Scope

__all__ = ["Repeat", "Vmap"]


class _Copies(Layer):
    block: Callable[..., Any]
    n: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        as_layer(self.block, f"the block of a {name}")
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(f"{name}: n must be a positive integer, but found {self.n!r}.")

    def _is_unstacked(self, p: Any) -> bool:
        """Whether every copy has names of its own.

        Raises:
          TypeError: ``p`` is not a scope.
          MismatchError: there are no such names, and a leaf has no leading axis of size ``n``.
        """
        if not isinstance(p, ParamTree):
            raise TypeError(
                f"{type(self).__name__} needs a paramtree scope, but found {type(p).__name__}."
            )
        structure, leaves = flatten(level_of(p))
        stacked = any(stack and stack[0][0] == 0 for stack in structure.stacks)
        if not stacked and list(p) == [str(i) for i in range(self.n)]:
            return True
        mismatches = [
            f"`{join((*place_of(p), *path))}` has shape {shape_of(leaf)}"
            for path, leaf in zip(structure.canonical, leaves, strict=True)
            if (shape_of(leaf) or (None,))[0] != self.n
        ]
        if mismatches:
            raise MismatchError(
                f"{type(self).__name__}: {', '.join(mismatches)}; expected a leading axis of size "
                f"{self.n}, one entry per copy. Stack named copies with pt.stack."
            )
        return False

    def _inner_keywords(self) -> frozenset[str] | None:
        return keywords_of(self.block)

    def _body(self, p: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
        """Returns a function that calls one copy, and its arguments, stacked: the leaves and keys.

        The function returns the output, and what the run takes from the copy.
        """
        run = run_of(p)
        structure, leaves = flatten(level_of(p))
        copy = _one_copy(structure)

        def body(leaves_and_part: Any, *inputs: Any, **by_copy: Any) -> tuple[Any, Any]:
            leaves, part = leaves_and_part
            inner = run.inside(unflatten(copy, leaves, place_of(p)), part)
            y, own = self.block(inner, *inputs, **kwargs, **by_copy), run_of(inner)
            return y, (own.results(inner), own.outputs(inner))

        return body, (leaves, run.split(p, self.n))

    def __repr__(self) -> str:
        text = repr(self.block).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  ({self._shown()}): {text}\n)"

    def _shown(self) -> str:
        return f"{self.n} x"


class Repeat(_Copies):
    """Scans over ``n`` copies of a block, each with its own parameters, state and keys.

    Each parameter is one leaf with a leading axis of size ``n``. Copy i starts from the values that a
    layer named ``i`` would start from. The block of layers by turns is the group of them:
    ``Repeat(Sequential(local, full), 3)`` is local, full, local, full, local, full.

    Args:
      block: a layer, or a model ``f(p, x, *args, **kwargs)`` whose output has the shape and dtype of
        ``x``.
      n: the number of copies.
      remat: whether the backward pass recomputes each copy instead of storing its intermediates; or a
        policy from ``jax.checkpoint_policies`` that selects what to store.
      in_axes: for all ``args``, or for each in a tuple, the axis along which every copy gets an entry
        of its own; None gives all copies the same.
      by_copy: keyword arguments of the block with a value for each copy, a mapping of names to ``n``
        numbers, or to an array of numbers with a first axis of size ``n``. The block gets its value as
        an array, traced, so it is no setting that decides what is computed, such as a window.
      unroll: how many copies one iteration of the loop computes, as in ``jax.lax.scan``; True, or ``n``
        and more, for all of them, without a loop. The parameters and values are the same. A step takes
        less time, and compiling takes more. It says nothing about a tree whose copies have names.

    Returns:
      When called with ``(p, x, *args, **kwargs)``: the output of the last copy. All copies get the same
      keyword arguments.

    Raises:
      ValueError: ``n`` or ``unroll`` is not a positive integer, or ``by_copy`` does not hold ``n``
        numbers.
      TypeError: ``block`` is not callable, or does not take what is in ``by_copy``, or when called:
        ``p`` is not a scope, or ``block`` does not take a keyword argument.
      MismatchError: when called: the block changes the shape or dtype of its input, a leaf has no
        leading axis of size ``n``, or an argument has another number of entries.

    Example:
      >>> import paramtree as pt
      >>> net = pt.nn.Repeat(pt.nn.Dense(3, activation="tanh"), 4)
      >>> params = net.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> params
      Parameter weight (shape=(4, 3, 3), dtype=float32)
      Parameter bias (shape=(4, 3), dtype=float32)
      >>> net(params, jnp.ones((2, 3))).shape
      (2, 3)

      Stochastic depth, with a rate that grows from copy to copy:

      >>> block = pt.nn.Residual(pt.nn.Dense(3), pt.nn.DropPath(0.0))
      >>> net = pt.nn.Repeat(block, 4, by_copy={"rate": jnp.linspace(0, 0.3, 4)})
    """

    remat: bool | Callable[..., Any] = False
    in_axes: int | tuple[int | None, ...] | None = None
    by_copy: Any = ()  # kept as pairs of a name and a tuple, in the order of the names
    unroll: int | bool = 1  # kept as a number from 1 to n, since True equals 1

    def __post_init__(self) -> None:
        super().__post_init__()
        table = self.by_copy if isinstance(self.by_copy, Mapping) else dict(self.by_copy)
        pairs = [(name, _by_copy(name, table[name], self.n)) for name in sorted(table)]
        object.__setattr__(self, "by_copy", tuple(pairs))
        dealt(self, [self.block], dict(pairs))
        if not isinstance(self.unroll, int) or (self.unroll < 1 and self.unroll is not False):
            raise ValueError(
                "Repeat: unroll must be a positive integer, or True for all copies, but found "
                f"{self.unroll!r}."
            )
        unroll = {True: self.n, False: 1}[self.unroll] if isinstance(self.unroll, bool) else self.unroll
        object.__setattr__(self, "unroll", min(unroll, self.n))

    def __call__(self, p: Scope, x: Any, *args: Any, **kwargs: Any) -> Any:
        run = run_of(p)
        dealt(self, [self.block], kwargs)
        if twice := [name for name, _ in self.by_copy if name in kwargs]:
            raise TypeError(f"Repeat: {twice[0]!r} has a value for each copy already: do not give it.")
        shared, own = self._divided(args)
        named = {name: jnp.asarray(values) for name, values in self.by_copy}

        def of_copy(i: int) -> tuple[list[Any], Any]:
            arguments, options = jax.tree.map(lambda arg: arg[i], (own, named))
            return _together(shared, arguments), options

        if run.recording:
            p, (inputs, options) = run.repeated(p, self.n), of_copy(0)
            return self._checked(x, self.block(p, x, *inputs, **kwargs, **options))
        if self._is_unstacked(p):
            for i in range(self.n):
                inputs, options = of_copy(i)
                x = self.block(p[str(i)], x, *inputs, **kwargs, **options)
            return x
        body, stacked = self._body(p, kwargs)

        def step(x: Any, entry: Any) -> tuple[Any, Any]:
            y, results = body(entry[0], x, *_together(shared, entry[1]), **entry[2])
            return self._checked(x, y), results

        entries = stacked, own, named
        y, results = jax.lax.scan(self._remat(step), x, entries, length=self.n, unroll=self.unroll)
        run.absorb(p, results[0])
        run.collect(results[1])
        return y

    def _inner_keywords(self) -> frozenset[str] | None:
        names = super()._inner_keywords()
        return None if names is None else names - {name for name, _ in self.by_copy}

    def _divided(self, args: tuple[Any, ...]) -> tuple[dict[int, Any], dict[int, Any]]:
        """Returns the arguments that all copies share, and those with an entry for each, in front."""
        axes = self.in_axes if isinstance(self.in_axes, tuple) else (self.in_axes,) * len(args)
        if len(axes) != len(args):
            raise MismatchError(f"Repeat: in_axes has {len(axes)} axes for {len(args)} arguments.")
        shared, own = dict[int, Any](), dict[int, Any]()
        for i, (arg, axis) in enumerate(zip(args, axes, strict=True)):
            if axis is None:
                shared[i] = arg
                continue
            own[i] = jax.tree.map(lambda a, axis=axis: jnp.moveaxis(jnp.asarray(a), axis, 0), arg)
            sizes = {leaf.shape[0] for leaf in jax.tree.leaves(own[i])}
            if sizes != {self.n}:
                raise MismatchError(
                    f"Repeat: argument {i} has {sizes} entries along its axis {axis}, but there are "
                    f"{self.n} copies."
                )
        return shared, own

    def _shown(self) -> str:
        return ", ".join([super()._shown(), *(f"{name} by copy" for name, _ in self.by_copy)])

    def _remat(self, body: Callable[..., Any]) -> Callable[..., Any]:
        if not self.remat:
            return body
        policy = self.remat if callable(self.remat) else None
        # Between loops the compiler cannot merge the recomputation with the first computation; unrolled
        # copies may be outside of the loops.
        return jax.checkpoint(body, prevent_cse=self.unroll > 1, policy=policy)

    def _checked(self, x: Any, y: Any) -> Any:
        after, before = (jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), v) for v in (y, x))
        if after != before:
            raise MismatchError(
                f"Repeat: the block returns {after} for an input of {before}, but its output is the "
                "next copy's input: make the shapes and dtypes equal."
            )
        return y


class Vmap(_Copies):
    """Maps over ``n`` copies of a block side by side, each with its own parameters, state and keys.

    Each parameter is one leaf with a leading axis of size ``n``. Copy i starts from the values that a
    layer named ``i`` would start from: a mixture of experts, or an ensemble.

    Args:
      block: a layer, or a model ``f(p, *inputs, **kwargs)``.
      n: the number of copies.
      in_axes: the axis of each input to map over, as in ``jax.vmap``; None gives all copies the same.
      out_axes: where the copies go in the output, as in ``jax.vmap``.

    Returns:
      When called with ``(p, *inputs, **kwargs)``: the outputs of all copies, stacked along
      ``out_axes``. All copies get the same keyword arguments.

    Raises:
      ValueError: ``n`` is not a positive integer, or when called: an input has another size.
      TypeError: ``block`` is not callable, or when called: ``p`` is not a scope, or ``block`` does not
        take a keyword argument.
      MismatchError: when called: a leaf has no leading axis of size ``n``.

    Example:
      >>> import paramtree as pt
      >>> experts = pt.nn.Vmap(pt.nn.Dense(3), 4, in_axes=None)
      >>> params = experts.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> params
      Parameter weight (shape=(4, 3, 5), dtype=float32)
      Parameter bias (shape=(4, 3), dtype=float32)
      >>> experts(params, jnp.ones((2, 5))).shape
      (4, 2, 3)
    """

    in_axes: Any = 0
    out_axes: Any = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("in_axes", "out_axes"):
            if isinstance(axes := getattr(self, name), list):
                object.__setattr__(self, name, tuple(axes))

    def __call__(self, p: Scope, *inputs: Any, **kwargs: Any) -> Any:
        run = run_of(p)
        dealt(self, [self.block], kwargs)
        if run.recording:
            p = run.repeated(p, self.n)

            def one(_: Any, *inputs: Any) -> Any:
                return self.block(p, *inputs, **kwargs), None

            return self._mapped(one, None, inputs)[0]
        if self._is_unstacked(p):
            rows = jax.vmap(lambda *row: row, self.in_axes, axis_size=self.n)(*inputs) if inputs else ()
            outputs = [
                self.block(p[str(i)], *jax.tree.map(lambda row, i=i: row[i], rows), **kwargs)
                for i in range(self.n)
            ]
            stacked = jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)
            return jax.vmap(lambda y: y, out_axes=self.out_axes, axis_size=self.n)(stacked)
        body, stacked = self._body(p, kwargs)
        y, results = self._mapped(body, stacked, inputs)
        run.absorb(p, results[0])
        run.collect(results[1])
        return y

    def _mapped(self, body: Callable[..., Any], stacked: Any, inputs: Any) -> Any:
        axes = self.in_axes if isinstance(self.in_axes, tuple | list) else (self.in_axes,) * len(inputs)
        return jax.vmap(body, (0, *axes), (self.out_axes, 0), axis_size=self.n)(stacked, *inputs)


def _by_copy(name: str, values: Any, n: int) -> tuple[Any, ...]:
    """Returns an option with a value for each copy as a tuple, which layers are compared by."""
    if isinstance(values, jax.core.Tracer):
        raise ValueError(
            f"Repeat: by_copy[{name!r}] is traced, but a layer holds settings: give it to the call as "
            "an argument, with in_axes=0."
        )
    try:
        array = np.asarray(values)
    except ValueError:  # the values have several shapes
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"Repeat: by_copy[{name!r}] must hold numbers, which the copies get as arrays, but found "
            f"{values!r}. Copies with other settings are layers by turns, as in "
            "nn.Repeat(nn.Sequential(a, b), n)."
        )
    if array.shape[:1] != (n,):
        found = f"an array of shape {array.shape}" if array.ndim else repr(values)
        raise ValueError(f"Repeat: by_copy[{name!r}] must hold {n} numbers, but found {found}.")
    if not np.isfinite(array.astype(float)).all():
        raise ValueError(f"Repeat: by_copy[{name!r}] must hold finite numbers, but found {values!r}.")
    return _as_tuple(array.tolist())


def _as_tuple(values: Any) -> Any:
    return tuple(map(_as_tuple, values)) if isinstance(values, list) else values


def _together(shared: dict[int, Any], own: dict[int, Any]) -> list[Any]:
    """Returns arguments in order."""
    return [value for _, value in sorted({**shared, **own}.items())]


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
