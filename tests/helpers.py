"""Fixtures and helpers shared by several test files."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import optax  # type: ignore[import-untyped]
import pytest


def x64() -> Any:
    """Returns a context manager that enables jax's 64-bit types."""
    return jax.enable_x64(True)


@contextlib.contextmanager
def lenient(example: Any) -> Iterator[None]:
    """Allows dtype promotion in the optimiser of an example, as optax raises floats to an int32 count."""
    make_tx = example.make_tx

    def make(*args: Any) -> Any:
        tx = make_tx(*args)

        def update(grads: Any, state: Any, params: Any = None) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return tx.update(grads, state, params)

        return optax.GradientTransformation(tx.init, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "make_tx", make)
        yield
