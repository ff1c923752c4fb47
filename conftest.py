"""Strict settings for every test: no silent promotion of dtypes or ranks; a CPU of eight devices."""

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("repo", deadline=None, max_examples=60)
settings.load_profile("repo")


@pytest.fixture
def key() -> jax.Array:
    """Returns a root key."""
    return jax.random.key(0)
