"""Where the supported versions of jax differ. Each entry says which version makes it unnecessary."""

import functools
import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["mask_for_window", "take_current_trace"]


def mask_for_window(mask: Any, window: Any, causal: bool) -> Any:
    """Returns the mask that ``jax.nn.dot_product_attention`` needs to keep to a window.

    With jax 0.8.2 as the oldest version, it is the mask that is given. Before, jax forgets the window
    where there is neither a mask nor causality, so one that hides nothing takes its place.
    """
    if mask is not None or window is None or causal or jax.__version_info__ >= (0, 8, 2):
        return mask
    return jnp.ones((1, 1, 1, 1), bool)


@functools.cache
def take_current_trace() -> Any:
    """Returns jax's context manager that gives the current trace.

    With jax 0.9.2 as the oldest version, ``jax.extend.core.take_current_trace`` is enough. Before it,
    the function is in ``jax.core``, which from 0.8.2 on warns that it will be elsewhere.
    """
    extended = importlib.import_module("jax.extend.core")  # not at import: only some runs need it
    if hasattr(extended, "take_current_trace"):
        return extended.take_current_trace
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "jax.core.take_current_trace is deprecated", DeprecationWarning
        )
        core: Any = jax.core
        return core.take_current_trace
