"""Computes many alike leaves in a jitted function: loops compile in a fraction of the time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["in_loops"]

# More loops take less memory, but longer to compile.
_LOOPS = 16
_PORTION = 2**21  # bytes of leaves that are not worth another loop


def in_loops(leaf: Callable[..., Any], key: jax.Array, words: np.ndarray, nbytes: int) -> list[Any]:
    """Returns ``leaf(key, words[i])`` for each i, computed in loops that write to one stack.

    XLA keeps a stack until every leaf has been copied out of it, so that one loop for all leaves would
    double the memory they take.

    Args:
      leaf: the function that computes a leaf; it is traced once.
      key: the root key.
      words: what tells the leaves apart, an entry for each.
      nbytes: the bytes of a leaf.
    """
    leaf = jax.jit(leaf)
    portion = max(1, _PORTION // max(1, nbytes), -(-len(words) // _LOOPS))
    stack = jax.lax.map(lambda word: leaf(key, word), words[:portion])
    leaves = [stack[i] for i in range(len(stack))]
    for start in range(portion, len(words), portion):
        some = jnp.asarray(words[start : start + portion])

        def write(i: Any, stack: Any, some: Any = some) -> Any:
            return jax.lax.dynamic_update_index_in_dim(stack, leaf(key, some[i]), i, 0)

        stack = jax.lax.fori_loop(0, len(some), write, stack)
        leaves += [stack[i] for i in range(len(some))]
    return leaves
