"""Settings for every test: strict promotion of dtypes and ranks, eight devices, quick compiling."""

import gc
import os

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests.quick import FLAGS

os.environ.setdefault("XLA_FLAGS", FLAGS)  # those of the environment win, even if empty

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

collect_ignore = ["tests/typed_program.py"]  # it is only read, by type checkers

gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that stay: collect seldom

# No test is judged by a clock, not even by how long its examples take to draw on a busy machine.
settings.register_profile(
    "repo", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repo")


@pytest.fixture
def key() -> jax.Array:
    """Returns a root key."""
    return jax.random.key(0)
