"""What several processes of jax do as one: agree on a decision, wait for each other, share problems."""

import os
from collections.abc import Callable

import jax
import numpy as np

from paramtree.core.errors import ParamTreeError

__all__ = ["agree", "check_together", "is_first", "meet"]

_BYTES = 2048  # of a text that is shared
_MINUTES = 20


def is_first() -> bool:
    """Whether this is the process that decides and that finishes what all have written."""
    return jax.process_index() == 0


def agree(decide: Callable[[], str]) -> str:
    """Returns what the first process decides, in all of them; a problem is an error in all of them."""
    if jax.process_count() == 1:
        return decide()
    text, error = "", None
    if is_first():
        try:
            text = f"+{decide()}"
        except (ParamTreeError, OSError) as problem:
            text, error = f"-{problem}", problem
    from jax.experimental import multihost_utils

    text = _decoded(multihost_utils.broadcast_one_to_all(_encoded(text)))
    if error is not None:
        raise error
    if text.startswith("-"):
        raise ParamTreeError(text[1:])
    return text[1:]


def check_together(problem: str) -> str:
    """Returns the first problem that any process has, or an empty text."""
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    texts = map(_decoded, np.asarray(multihost_utils.process_allgather(_encoded(problem))))
    return next(filter(None, texts), "")


def meet(name: str) -> None:
    """Waits until all processes have called this with the same new name, in any thread."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # type: ignore[import-untyped]

        name = f"paramtree-{os.path.basename(name)}"
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=_MINUTES * 60_000)


def _encoded(text: str) -> np.ndarray:
    return np.frombuffer(text.encode()[:_BYTES].ljust(_BYTES, b"\0"), np.uint8)


def _decoded(data: np.ndarray) -> str:
    return bytes(np.asarray(data, np.uint8)).rstrip(b"\0").decode(errors="replace")
