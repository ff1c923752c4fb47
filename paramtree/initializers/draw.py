"""Computes leaves: each from a key of its own, with one compiled function for equal specs."""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.arrays import join
from paramtree.core.errors import MismatchError
from paramtree.core.structure import Path
from paramtree.initializers.axes import check_rule
from paramtree.initializers.keys import path_words
from paramtree.initializers.lift import lift
from paramtree.initializers.loops import in_loops
from paramtree.initializers.pure import check_pure
from paramtree.initializers.spec import Spec
from paramtree.initializers.values import Initializer
from paramtree.sharding.place import scatter

__all__ = ["draw"]


@jax.jit
def _path_key(key: jax.Array, words: jax.Array) -> jax.Array:
    """Same as ``path_key``; a loop compiles in half the time of two calls."""
    return jax.lax.fori_loop(0, 2, lambda i, key: jax.random.fold_in(key, words[i]), key)


def _compute(
    initializer: Any, shape: tuple[int, ...], dtype: Any, key: jax.Array, *numbers: Any
) -> Any:
    value = jnp.asarray(initializer(key, shape, dtype, *numbers))
    floats = jnp.issubdtype(value.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    if value.shape != shape or (value.dtype != dtype and not floats):
        raise MismatchError(
            f"the initializer {initializer!r} gave {value.dtype}{value.shape}, but "
            f"{jnp.dtype(dtype).name}{shape} was asked for."
        )
    return value.astype(dtype)


def _compute_stack(
    initializer: Any, shapes: tuple[Any, Any], dtype: Any, keys: Any, *numbers: Any
) -> Any:
    """Returns a stack, (*lead, *single), of an array for each key; ``shapes`` is (lead, single)."""
    lead, single = shapes
    values = jax.vmap(lambda key: _compute(initializer, single, dtype, key, *numbers))(keys)
    return values.reshape(lead + single)


# One compiled function for all leaves that share initializer, shape and dtype, and one that derives
# their keys.
_compiled = jax.jit(_compute, static_argnums=(0, 1, 2))
_path_keys = jax.jit(jax.vmap(_path_key, in_axes=(None, 0)))


@functools.lru_cache(maxsize=256)
def _sharded(compute: Any, sharding: Any) -> Any:
    """Returns a compiled function that computes each shard of the result on its own device.

    jax's threefry computes each random number from its position in the array, so the values do not
    depend on the sharding.
    """
    return jax.jit(compute, static_argnums=(0, 1, 2), out_shardings=sharding)


def draw(
    paths: Sequence[Path],
    specs: Sequence[Spec],
    key: jax.Array,
    shardings: Sequence[Any] | None = None,
) -> tuple[Any, ...]:
    """Returns the values of some leaves, computed from their specs and the keys of their paths.

    Args:
      paths: the paths of the leaves.
      specs: the leaves to compute.
      key: the root key.
      shardings: the sharding of each leaf, None for the default device.

    Raises:
      MismatchError: an initializer returned another shape or dtype than requested. This and any
        other error in an initializer names the leaf.
    """
    traced = _traced(key)
    if shardings is not None and not traced:
        key = _uncommitted(key)
    shardings = [None] * len(specs) if shardings is None else list(shardings)
    if any(spec.stack for spec in specs):
        return _stacked(paths, specs, key, shardings)
    specs = [_for_name(spec, join(path)) for spec, path in zip(specs, paths, strict=True)]
    check_pure(paths, specs, key)
    leaves: list[Any] = [None] * len(specs)
    window = _Window()
    groups = list(_alike(specs, shardings))
    if not traced:
        _compile_ahead(groups, paths, specs, key, shardings)
    for members in groups:
        first, sharding = specs[members[0]], shardings[members[0]]
        call = first.initializer, first.shape, first.dtype
        words = [path_words(paths[i]) for i in members]
        with _naming(paths[members[0]], first):
            if traced and len(members) > 1 and _uses_key(*call, key):
                # Compiled leaf by leaf, the random bits of a net of 400 layers take XLA minutes.
                size = math.prod(first.shape) * jnp.dtype(first.dtype).itemsize
                values = in_loops(functools.partial(_leaf, sharding, call), key, np.stack(words), size)
            elif traced and sharding is not None:
                values = [_compute_at(sharding, *call, _path_key(key, pair)) for pair in words]
            elif not traced and _is_filled(first, sharding):
                values = [_filled(*call) for _ in words]
            elif not _compilable(first.initializer):
                values = [_held(sharding, *call, _path_key(key, pair)) for pair in words]
            else:
                compiled, values = _computing(sharding), []
                function, numbers = (call[0], ()) if traced else lift(*call)
                for pair in words:
                    window.wait_for(first.shape, first.dtype)
                    values.append(
                        window.add(compiled(function, *call[1:], _path_key(key, pair), *numbers))
                    )
        for i, value in zip(members, values, strict=True):
            leaves[i] = value
    return tuple(leaves)


def _traced(key: Any) -> bool:
    """Whether the computation is traced: the key is, or everything is, as in a jitted function."""
    return isinstance(key, jax.core.Tracer) or isinstance(jnp.asarray(0), jax.core.Tracer)


def _computing(sharding: Any) -> Any:
    """Returns the compiled function for leaves of one sharding."""
    return _compiled if sharding is None else _sharded(_compute, sharding)


def _compile_ahead(
    groups: Sequence[list[int]],
    paths: Sequence[Path],
    specs: Sequence[Spec],
    key: jax.Array,
    shardings: Sequence[Any],
) -> None:
    """Compiles the function of each group of leaves in a thread, while the next group is lowered.

    An error in the thread occurs again, and is raised, when the function is called.
    """
    new = []
    for first in (members[0] for members in groups):
        spec = specs[first]
        if _is_filled(spec, shardings[first]) or not _compilable(spec.initializer):
            continue
        with _naming(paths[first], spec):
            function, numbers = lift(spec.initializer, spec.shape, spec.dtype)
        if mark := _uncompiled(shardings[first], function, spec.shape, spec.dtype):
            mark.clear()
            new.append((first, function, numbers))
    if not new or jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # set at run time
        return
    # XLA uses the other cores itself. With more threads here, malloc retains more memory: a tenth of
    # the parameters of a 600 MB model.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_path_key.lower(key, path_words(())).compile)
        for first, function, numbers in new:
            spec, compiled = specs[first], _computing(shardings[first])
            with _naming(paths[first], spec):
                lowered = compiled.lower(function, spec.shape, spec.dtype, key, *numbers)
            thread.submit(lowered.compile)


@functools.lru_cache(maxsize=2**14)
def _uncompiled(*call: Any) -> list[None]:
    """Returns the same list for equal specs; it is emptied when they are compiled."""
    return [None]


class _Window:
    """Limits how many leaves are computed at a time.

    A leaf takes several times its memory while it is computed, and jax would start dozens at once.
    """

    MOST = 2**24  # bytes of leaves; a larger leaf is computed alone

    def __init__(self) -> None:
        self._begun: collections.deque[Any] = collections.deque()
        self._bytes = 0

    def wait_for(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Waits until there is room for a leaf."""
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        while self._begun and self._bytes + size > self.MOST:
            self._bytes -= jax.block_until_ready(self._begun.popleft()).nbytes

    def add(self, leaf: Any) -> Any:
        """Counts a leaf that is being computed, and returns it."""
        if not isinstance(leaf, jax.core.Tracer):
            self._begun.append(leaf)
            self._bytes += leaf.nbytes
        return leaf


def _uncommitted(key: jax.Array) -> jax.Array:
    """Returns a key that is not committed to a device, as the leaves may be on others."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jnp.asarray(np.asarray(key))
    data = jnp.asarray(np.asarray(jax.random.key_data(key)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _compute_at(sharding: Any, *call: Any) -> Any:
    """Computes a leaf inside a jitted function, with its sharding if it has one."""
    value = _compute(*call)
    return value if sharding is None else _constrain(value, sharding)


def _leaf(sharding: Any, call: tuple[Any, ...], key: jax.Array, words: Any) -> Any:
    return _compute_at(sharding, *call, _path_key(key, words))


def _constrain(value: Any, sharding: Any) -> Any:
    """Constrains the sharding of an array in a jitted function."""
    types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    if jax.sharding.AxisType.Explicit in types:
        return jax.sharding.reshard(value, sharding)
    return jax.lax.with_sharding_constraint(value, sharding)


def _is_filled(spec: Spec, sharding: Any) -> bool:
    """Whether a leaf is constant and too small to be worth compiling for its shape."""
    fill = getattr(spec.initializer, "fill", None)
    return fill is not None and sharding is None and math.prod(spec.shape) < 2**16


def _filled(initializer: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Makes a constant leaf on the host; a numpy buffer could not be donated."""
    return jax.device_put(np.full(shape, jnp.asarray(initializer.fill, dtype)), may_alias=False)


def _held(sharding: Any, *call: Any) -> Any:
    """Computes a leaf of an initializer that holds an array, without compiling."""
    if sharding is None:
        return jnp.array(_compute(*call))  # a copy: two leaves must never share a buffer
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return scatter(_compute(*call), sharding)


def _stacked(
    paths: Sequence[Path], specs: Sequence[Spec], key: jax.Array, shardings: Sequence[Any]
) -> tuple[Any, ...]:
    """Computes every copy in a stack as if it were a leaf of its own."""
    names: list[Path] = []
    singles: list[Spec] = []
    single_shardings: list[Any] = []
    whole: dict[int, Any] = {}  # stacks that are computed at once
    traced = _traced(key)
    for i, (path, spec, sharding) in enumerate(zip(paths, specs, shardings, strict=True)):
        copies, copy_specs = _copies(path, spec)
        if spec.stack and sharding is not None:
            whole[i] = _sharded_stack(copies, copy_specs, spec, key, sharding)
        elif spec.stack and traced and _are_alike(copy_specs):
            whole[i] = _looped_stack(copies, copy_specs[0], spec.shape, key)
        else:
            names += copies
            singles += copy_specs
            single_shardings += [sharding] * len(copies)
    values = iter(draw(names, singles, key, single_shardings))
    leaves = []
    for i, spec in enumerate(specs):
        if i in whole:
            leaves.append(whole[i])
        elif not spec.stack:
            leaves.append(next(values))
        else:
            count = math.prod(spec.shape[: len(spec.stack)])
            leaves.append(
                jnp.stack([next(values) for _ in range(count)]).reshape(spec.shape)
                if count
                else jnp.zeros(spec.shape, spec.dtype)
            )
    return tuple(leaves)


def _copies(path: Path, spec: Spec) -> tuple[list[Path], list[Spec]]:
    """Returns the path that each copy in a stack would have on its own, and its spec."""
    shape = spec.shape[len(spec.stack) :]
    paths, specs = [], []
    for index in np.ndindex(*spec.shape[: len(spec.stack)]):
        copy = list(path)
        for number, (position, _) in reversed(list(zip(index, spec.stack, strict=True))):
            copy.insert(position, str(number))
        paths.append(tuple(copy))
        single = dataclasses.replace(spec, shape=shape, stack=())
        specs.append(_for_name(single, join(copy), join(path), index) if spec.stack else single)
    return paths, specs


def _looped_stack(copies: Sequence[Path], first: Spec, shape: tuple[int, ...], key: jax.Array) -> Any:
    """Computes a stack of alike copies in a jitted function."""
    call = first.initializer, first.shape, first.dtype
    check_pure(copies[:1], [first], key)
    with _naming(copies[0], first):
        if not _uses_key(*call, key):
            return jnp.broadcast_to(_compute(*call, key), (len(copies), *first.shape)).reshape(shape)
        words = np.stack([path_words(path) for path in copies])
        return jax.lax.map(functools.partial(_leaf, None, call, key), words).reshape(shape)


def _sharded_stack(
    copies: Sequence[Path], specs: Sequence[Spec], stack: Spec, key: jax.Array, sharding: Any
) -> Any:
    """Computes a stack of copies, each shard on its own device."""
    traced, first = _traced(key), specs[0]
    if _are_alike(specs):
        words = np.stack([path_words(path) for path in copies])
        shapes = stack.shape[: len(stack.stack)], first.shape
        keys = _path_keys(key, words)
        check_pure(copies[:1], specs[:1], key)
        if traced:
            return _constrain(_compute_stack(first.initializer, shapes, first.dtype, keys), sharding)
        function, numbers = lift(first.initializer, first.shape, first.dtype)
        return _sharded(_compute_stack, sharding)(function, shapes, first.dtype, keys, *numbers)
    if traced:
        value = jnp.stack(draw(copies, specs, key)).reshape(stack.shape)
        return _constrain(value, sharding)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # each copy has its own initializer
        values = [np.asarray(value) for value in draw(copies, specs, key)]
    return scatter(np.stack(values).reshape(stack.shape), sharding)


def _for_name(spec: Spec, name: str, stack: str = "", index: tuple[int, ...] = ()) -> Spec:
    """Returns the spec with an initializer that depends on the name replaced by the one for this name.

    A copy in a stack is also known by the name of the stack and its index.
    """
    while for_name := getattr(spec.initializer, "for_name", None):
        initializer = for_name(name, stack, index) if stack else for_name(name)
        check_rule(initializer, name, spec.shape)
        spec = dataclasses.replace(spec, initializer=initializer)
    return spec


def _alike(specs: Sequence[Spec], shardings: Sequence[Any]) -> Iterator[list[int]]:
    """Yields the indices of specs that one function computes."""
    groups: dict[Any, list[int]] = {}
    for i, (spec, sharding) in enumerate(zip(specs, shardings, strict=True)):
        call: Any = i
        if _compilable(spec.initializer):
            call = spec.initializer, spec.shape, spec.dtype, sharding
        groups.setdefault(call, []).append(i)
    yield from groups.values()


def _are_alike(specs: Sequence[Spec]) -> bool:
    """Whether one function computes all of them."""
    groups = list(_alike(specs, [None] * len(specs)))
    return len(groups) == 1 and _compilable(specs[0].initializer)


def _compilable(initializer: Initializer) -> bool:
    """Whether the initializer can be a static argument of a compiled function."""
    if getattr(initializer, "eager", False):  # it holds an array, which would be compiled in
        return False
    try:
        hash(initializer)
    except TypeError:
        return False
    return True


def _uses_key(initializer: Initializer, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> bool:
    """Whether the values depend on the key; those of biases mostly do not."""
    jaxpr = jax.make_jaxpr(lambda key: initializer(key, shape, dtype))(key).jaxpr
    return any(var is jaxpr.invars[0] for eqn in jaxpr.eqns for var in eqn.invars)


@contextlib.contextmanager
def _naming(path: Path, spec: Spec) -> Iterator[None]:
    try:
        yield
    except MismatchError as error:
        raise MismatchError(f"`{join(path)}`: {error}") from None
    except Exception as error:
        error.add_note(f"While initialising `{join(path)}`, {spec.shape}, by {spec.initializer!r}.")
        raise
