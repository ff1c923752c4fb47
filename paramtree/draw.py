"""Computing leaves: a key of its own for each, and one compiled function for all that are alike.

A leaf's key depends only on the root key and on its path, by a 64-bit hash. With 32 bits, two of a
hundred thousand leaves would more likely than not draw the same numbers.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.errors import MismatchError
from paramtree.initializers import Initializer
from paramtree.leaf import join
from paramtree.record import Spec
from paramtree.structure import Path

__all__ = ["check_key", "draw", "path_key", "path_words"]


def check_key(key: Any) -> None:
    """Raises TypeError if ``key`` is not a PRNG key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise TypeError(
            f"expected a PRNG key, such as jax.random.key(0), but found {type(key).__name__}. The "
            "order is pt.init(model, key, *inputs)."
        )


def path_words(path: Path) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Returns the 64-bit hash of a path as two words, uint32[2], the same in every process.

    The segments are joined with "/", which none of them holds, so ("a", "bc") and ("ab", "c") differ.
    """
    digest = hashlib.blake2b("/".join(path).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, dtype=">u4").astype(np.uint32)


def path_key(key: jax.Array, words: Any) -> jax.Array:
    """Returns the key of a leaf: both words of its path's hash, folded into the root key."""
    return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])


def _compute(initializer: Initializer, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> Any:
    value = jnp.asarray(initializer(key, shape, dtype))
    floats = jnp.issubdtype(value.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    if value.shape != shape or (value.dtype != dtype and not floats):
        raise MismatchError(
            f"the initializer {initializer!r} gave {value.dtype}{value.shape}, but "
            f"{jnp.dtype(dtype).name}{shape} was asked for."
        )
    return value.astype(dtype)


# One compiled function for all leaves that share initializer, shape and dtype. Deriving the key is
# another, as it is the same for all and takes a third of the time to compile.
_compiled = jax.jit(_compute, static_argnums=(0, 1, 2))
_path_key = jax.jit(path_key)


def draw(paths: Sequence[Path], specs: Sequence[Spec], key: jax.Array) -> tuple[Any, ...]:
    """Returns the values of some leaves, computed from their specs and the keys of their paths.

    Raises:
      MismatchError: an initializer gave another shape or dtype than it was asked for; it and any
        other error of an initializer names the leaf.
    """
    if any(spec.copies for spec in specs):
        return _stacked(paths, specs, key)
    specs = [_for_name(spec, path) for spec, path in zip(specs, paths, strict=True)]
    leaves: list[Any] = [None] * len(specs)
    traced = isinstance(key, jax.core.Tracer)
    for members in _alike(specs):
        first = specs[members[0]]
        call = first.initializer, first.shape, first.dtype
        words = [path_words(paths[i]) for i in members]
        with _naming(paths[members[0]], first):
            if traced and len(members) > 1 and _uses_key(*call, key):
                # Compiled once a leaf, the random bits of a net of 400 layers take XLA minutes.
                one = functools.partial(_compute, *call)
                values = list(
                    jax.lax.map(lambda two, one=one: one(path_key(key, two)), np.stack(words))
                )
            elif _compilable(first.initializer):
                values = [_compiled(*call, _path_key(key, two)) for two in words]
            else:  # jnp.array copies: two leaves must never share a buffer
                values = [jnp.array(_compute(*call, _path_key(key, two))) for two in words]
        for i, value in zip(members, values, strict=True):
            leaves[i] = value
    return tuple(leaves)


def _stacked(paths: Sequence[Path], specs: Sequence[Spec], key: jax.Array) -> tuple[Any, ...]:
    """Computes every copy as the leaf that it would be if it were not in a stack."""
    single: list[tuple[Path, Spec]] = []
    for path, spec in zip(paths, specs, strict=True):
        axes = len(spec.copies)
        one = spec._replace(shape=spec.shape[axes:], copies=())
        for numbers in np.ndindex(*spec.shape[:axes]):
            name = list(path)
            for number, (_, place) in reversed(list(zip(numbers, spec.copies, strict=True))):
                name.insert(place, str(number))
            single.append((tuple(name), one))
    values = iter(draw([name for name, _ in single], [one for _, one in single], key))
    leaves = []
    for spec in specs:
        if not spec.copies:
            leaves.append(next(values))
            continue
        count = math.prod(spec.shape[: len(spec.copies)])
        leaves.append(jnp.stack([next(values) for _ in range(count)]).reshape(spec.shape))
    return tuple(leaves)


def _for_name(spec: Spec, path: Path) -> Spec:
    """Returns the spec with an initializer that goes by name replaced by the one for this name."""
    while for_name := getattr(spec.initializer, "for_name", None):
        spec = spec._replace(initializer=for_name(join(path)))
    return spec


def _alike(specs: Sequence[Spec]) -> Iterator[list[int]]:
    """Yields the positions of specs that one function can compute."""
    groups: dict[Any, list[int]] = {}
    for i, spec in enumerate(specs):
        call = (spec.initializer, spec.shape, spec.dtype) if _compilable(spec.initializer) else i
        groups.setdefault(call, []).append(i)
    yield from groups.values()


def _compilable(initializer: Initializer) -> bool:
    """Whether the initializer is a static argument of a compiled function."""
    if getattr(initializer, "eager", False):  # holds an array that compiled code would hold as well
        return False
    try:
        hash(initializer)
    except TypeError:
        return False
    return True


def _uses_key(initializer: Initializer, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> bool:
    """Whether the values depend on the key; those of biases mostly do not, and need no loop."""
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
