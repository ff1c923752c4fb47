"""What importing a library adds to importing jax."""

import importlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite.case import Bound, Case


def importing(*modules: str) -> Callable[[Any], dict[str, float]]:
    """Returns a contender that imports some modules in a fresh process."""

    def contender(size: Any) -> dict[str, float]:
        import jax
        import jax.numpy

        assert jax.numpy  # loaded before the clock starts
        start = time.perf_counter()
        for module in modules:
            importlib.import_module(module)
        return {"import": time.perf_counter() - start}

    return contender


CASES = [
    Case(
        name="imports",
        title="Import, over `import jax, jax.numpy`",
        sizes=("import",),
        contenders={
            "paramtree": importing("paramtree"),
            "paramtree.api": importing("paramtree.api"),
            "Equinox": importing("equinox"),
            "Linen": importing("flax.linen"),
            "NNX": importing("flax.nnx"),
            "Haiku": importing("haiku"),
            "Penzai": importing("penzai.pz"),
        },
        bounds=(Bound("import", None, 0.015),),
        size="",
        rounds=3,
        seconds=60,
        smoke=("import",),
        packages=("equinox", "flax", "dm-haiku", "penzai"),
        alone=True,
        note="Public names load on first use; `paramtree.api` loads all of them.",
    )
]
