"""Where the supported versions of jax differ. Each entry says which version makes it unnecessary."""

import functools
import warnings
from typing import Any

__all__ = ["take_current_trace"]


@functools.cache
def take_current_trace() -> Any:
    """Returns jax's context manager that gives the current trace.

    With jax 0.9.2 as the oldest version, ``jax.extend.core.take_current_trace`` is enough. Before it,
    the function is in ``jax.core``, which from 0.8.2 on warns that it will be elsewhere.
    """
    import jax.extend.core  # not at import: only some runs need it

    if hasattr(jax.extend.core, "take_current_trace"):
        return jax.extend.core.take_current_trace
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "jax.core.take_current_trace is deprecated", DeprecationWarning
        )
        core: Any = jax.core
        return core.take_current_trace
