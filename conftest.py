"""Settings for every test: strict promotion of dtypes and ranks, eight devices, quick compiling."""

import os
from importlib.metadata import version

import jax
import pytest
from hypothesis import settings

# Tests compile many small functions: without optimisation that takes a third of the time. XLA_FLAGS in
# the environment win, even if they are empty.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
         "--xla_cpu_parallel_codegen_split_count=1"]  # fmt: skip
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later ones know no such flag
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

collect_ignore = ["tests/typed_program.py"]  # it is only read, by type checkers

settings.register_profile("repo", deadline=None, max_examples=60)
settings.load_profile("repo")


@pytest.fixture
def key() -> jax.Array:
    """Returns a root key."""
    return jax.random.key(0)
