"""Fixtures of the tests of examples."""

from pathlib import Path

import pytest

from examples import fashion_mnist


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Has the examples train on scikit-learn's digits, as where Fashion-MNIST is not installed."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "not-installed")
