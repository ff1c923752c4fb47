"""The diffusion model: its schedule, loss, sampling, moving average, picture, a quick run, and errors."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import diffusion as example
from tests.helpers import lenient

pytestmark = pytest.mark.slow

NET = example.UNet(8)
X = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
Y = np.arange(4, dtype=np.int32)
LEFT = np.asarray(example.schedule()[1])[:, None, None, None]


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    return pt.init(NET, jax.random.key(0), X, Y, Y, rules=example.INIT)


def knows(images: Any, _: Any, x: Any, t: Any, label: Any) -> Any:
    """A model for which the images of each class are all one; it knows them."""
    left = jnp.asarray(LEFT)[t]
    return (x - jnp.sqrt(left) * images[label]) / jnp.sqrt(1 - left)


def fails(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


# The diffusion


def test_the_schedule_is_a_cosine() -> None:
    beta, left = map(np.asarray, example.schedule())
    times = np.arange(1, example.STEPS + 1) / example.STEPS
    cosine, start = (np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 for t in (times, 0))
    np.testing.assert_allclose(left[:-1], (cosine / start)[:-1], rtol=1e-5)
    assert 0 < left[-1] < 1e-5  # the last beta is clipped, so that something is left
    np.testing.assert_allclose(left, np.cumprod(1 - beta), rtol=1e-4)


def test_the_loss_of_no_noise_is_one_and_of_all_of_it_zero(key: jax.Array) -> None:
    images, label = np.repeat(X, 100, 0), np.repeat(Y, 100)
    nothing = example.noise_loss(lambda p, x, t, label: jnp.zeros_like(x), {}, key, images, label)
    assert nothing == pytest.approx(1, abs=0.03)
    assert example.noise_loss(partial(knows, jnp.asarray(X)), {}, key, images, label) < 1e-4


def test_sampling_finds_the_images_that_the_model_knows(key: jax.Array) -> None:
    images = jnp.asarray(X)
    found = example.sample(lambda *args: knows(images, *args), {}, key, Y[::-1], X.shape)
    np.testing.assert_allclose(found, X[::-1], atol=1e-3)


def test_samples_of_a_normal_distribution_are_normal(key: jax.Array) -> None:
    # If the images are N(0, s²), the best prediction is linear in the noisy image, and so is the step.
    def share(left: Any) -> Any:
        return 1 / (left * 0.2**2 + 1 - left)

    def best(p: Any, x: Any, t: Any, label: Any) -> Any:
        left = jnp.asarray(LEFT)[t]
        return x * jnp.sqrt(1 - left) * share(left)

    variance, (beta, left) = 1.0, (np.asarray(a, np.float64) for a in example.schedule())
    for t in range(example.STEPS)[::-1]:
        before = left[t - 1] if t else 1.0
        image = np.sqrt(before) * beta[t] * np.sqrt(left[t]) * 0.2**2 * share(left[t])
        factor = (image + np.sqrt(1 - beta[t]) * (1 - before)) / (1 - left[t])
        variance = factor**2 * variance + beta[t] * (1 - before) / (1 - left[t])
    found = example.sample(best, {}, key, np.zeros(20_000, np.int32), (20_000, 1, 1, 1))
    assert 0.19 < np.sqrt(variance) < 0.2  # a little less than 0.2, as the steps are finite
    assert float(jnp.std(found)) == pytest.approx(np.sqrt(variance), rel=0.02)
    assert float(jnp.mean(found)) == pytest.approx(0, abs=0.006)


# The network


def test_an_untrained_network_predicts_no_noise(params: pt.ParamTree) -> None:
    y = jax.jit(NET)(params, X, Y, Y)
    np.testing.assert_array_equal(y, np.zeros_like(X), strict=True)
    assert not np.any(pt.collect(params)["middle_second_weight"])
    assert np.std(pt.collect(params)["middle_first_weight"]) > 0.05


def test_it_depends_on_time_and_class(params: pt.ParamTree) -> None:
    random = pt.reinit(params, jax.random.key(1), {".*weight": "lecun_normal"})
    net, zeros = jax.jit(NET), np.zeros_like(Y)
    y, later = net(random, X, zeros, zeros), net(random, X, zeros + 9, zeros)
    other = net(random, X, zeros, zeros + 1)
    assert np.abs(y - later).max() > 1e-3 and np.abs(y - other).max() > 1e-3


def test_the_average_follows_the_parameters(params: pt.ParamTree) -> None:
    tx = example.make_tx(1e-2, 10)
    step = example.make_step(NET, tx, 0.75)
    start = example.TrainState(params, jax.tree.map(jnp.copy, params), tx.init(params))
    after, _ = step(jax.tree.map(jnp.copy, start), jax.random.key(2), X, Y)
    assert jax.tree.structure(after) == jax.tree.structure(start)
    names = pt.collect(params)
    assert np.any(pt.collect(after.params)["out_weight"])
    for name, old in names.items():
        new, average = (pt.collect(tree)[name] for tree in (after.params, after.average))
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, atol=1e-6, err_msg=name)


# The picture


def test_the_grid_has_its_images_row_by_row() -> None:
    images = np.linspace(-1, 1, 6, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 4, 1))
    pixels = example.grid(images, 3)
    assert pixels.shape == (4, 12) and pixels.dtype == np.uint8
    assert pixels[::2, ::4].tolist() == [[0, 51, 102], [153, 204, 255]]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    path = tmp_path / "picture.png"
    path.write_bytes(example.png(pixels))
    with image.open(path) as opened:
        assert opened.mode == "L"
        np.testing.assert_array_equal(np.asarray(opened), pixels)


def test_the_nearest_mean() -> None:
    means = np.arange(10, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1))
    label = np.arange(10)
    assert example.nearest_to_own(means, means + 0.3, label) == 1
    assert example.nearest_to_own(means, means[::-1], label) == 0
    assert example.nearest_to_own(means, means, np.where(label < 4, 9, label)) == 0.6


# A run


@pytest.mark.usefixtures("digits")
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "drawn.png"
    quick = ["--width", "8", "--steps", "30", "--picture", str(picture)]
    result = example.main([*quick, "--decay", "0.8"])
    assert 0 < result.loss < 0.9
    assert result.samples.shape == (100, 8, 8, 1) and np.abs(result.samples).max() <= 1
    assert result.mean[0] == pytest.approx(result.samples.mean())
    assert result.own[1] > 0.8  # of the test images, which are digits
    assert picture.read_bytes() == example.png(example.grid(result.samples, 10))
    printed = capsys.readouterr().out
    assert f"test images: {result.loss:.4f}" in printed and str(picture) in printed


@pytest.mark.usefixtures("digits")
def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, ["--steps", "0"], "--steps is at least 1, not 0")
    fails(capsys, ["--batch-size", "0"], "--batch-size is at least 1, not 0")
    fails(capsys, ["--picture", "no/such/picture.png"], "there is no folder no/such")
    fails(capsys, ["--width", "12"], "cannot divide 12 channels into 8 groups")
    fails(capsys, ["--data", str(tmp_path / "none")], "none lacks train-images")
