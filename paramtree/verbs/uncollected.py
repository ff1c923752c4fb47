"""Making many objects at once, without the steps of Python's garbage collector."""

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["uncollected"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pauses the collector; also a decorator.

    It looks for cycles again and again while objects are made, through all that is in memory, which
    takes as long as making them. What is made here has no cycles, and is freed without it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
