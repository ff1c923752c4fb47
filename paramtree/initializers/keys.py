"""Keys by path: those of leaves, and those that layers draw in training.

A leaf's key depends only on the root key and a 64-bit hash of its path. With 32 bits, two of a hundred
thousand leaves would more likely than not draw the same numbers.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.core.structure import Path

__all__ = ["check_key", "draw_key", "path_key", "path_words"]


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


def draw_key(key: jax.Array, draw: Path, taken: dict[int, Path]) -> jax.Array:
    """Returns the key of a draw, which is known by its path and number, (*path, number), in a call.

    The compiler takes as long for a folding as for the mask of a dropout, so only one word of the hash
    is folded in. Two draws of a call never fold in the same: ``taken`` says which draw has which word.
    """
    word = int(path_words(draw)[0])
    while taken.setdefault(word, draw) != draw:
        word = (word + 1) % 2**32
    return jax.random.fold_in(key, np.uint32(word))
