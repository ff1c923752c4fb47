"""What several files of tests share."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Compiles without most optimisations, which take longer than all that small arrays compute."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # other tests may compare bits, which differ with the optimisations


def x64() -> Any:
    """Returns the context in which jax has 64-bit types."""
    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        from jax.experimental import enable_x64 as enable
    return enable(True)
