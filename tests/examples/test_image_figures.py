"""The figures that the docstrings of the image examples state, from their default runs."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from examples import diffusion, fashion_mnist, resnet, vit

pytestmark = pytest.mark.figures


@pytest.fixture(autouse=True)
def on_fashion_mnist() -> Iterator[None]:
    if not fashion_mnist.DEBIAN.is_dir():
        pytest.skip("Fashion-MNIST is not installed: run `make data`")
    with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an int32 count
        yield


def test_the_vision_transformer() -> None:
    assert vit.main([]).accuracy >= 0.84


def test_the_residual_network() -> None:
    result = resnet.main([])
    assert result.old >= 0.85 and result.before < 0.4
    assert result.head >= 0.8 and result.after >= 0.9


def test_the_diffusion_model(tmp_path: Path) -> None:
    result = diffusion.main(["--picture", str(tmp_path / "samples.png")])
    assert result.loss <= 0.12
    for samples, images in (result.mean, result.std):
        assert abs(samples - images) <= 0.1
    assert result.own[0] >= 0.5
