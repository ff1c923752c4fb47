"""Flags with which XLA compiles quickly.

Tests and the pages of the site compile many small functions and compute little: without optimisation
the compiler takes a third of the time.
"""

from importlib.metadata import version

__all__ = ["FLAGS"]

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later ones know no such flag
