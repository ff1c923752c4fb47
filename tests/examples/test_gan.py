"""The GAN example: spectral norms of one, what each step changes, the data, a run, and errors."""

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
from examples import gan as example
from tests.helpers import lenient

pytestmark = pytest.mark.slow

KEY = jax.random.key(1)
WEIGHTS = [f"dense{i}_weight" for i in range(3)]
TRAINED = {f"dense{i}_{leaf}" for i in range(3) for leaf in ("weight_weight", "bias")}
STATE = {f"{weight}_{vector}" for weight in WEIGHTS for vector in "uv"}
QUICK = ["--steps", "60", "--every", "20", "--lr", "1e-4"]


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example):
        yield


@pytest.fixture(scope="module")
def gan(lenient_optax: None) -> example.Gan:
    return example.make_gan(1e-3, iterations=3)


@pytest.fixture(scope="module")
def run(gan: example.Gan) -> example.Run:
    return example.start(gan, KEY)


@pytest.fixture(scope="module")
def after(gan: example.Gan, run: example.Run) -> example.Run:
    """Returns the run after a step of the discriminator."""
    return jax.jit(partial(example.train_discriminator, gan))(run, KEY)[0]


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def changed(a: Any, b: Any) -> set[str]:
    """Returns the names of the leaves that differ."""
    old, new = pt.collect(a), pt.collect(b)
    assert old.keys() == new.keys()
    return {name for name in old if np.any(old[name] != new[name])}


# The data


def test_the_ring_has_eight_modes_with_equal_shares() -> None:
    points = np.asarray(example.sample_ring(KEY, 40_000))
    assert points.shape == (40_000, 2) and points.dtype == np.float32
    angles = np.arange(8) * np.pi / 4
    centres = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    modes = np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1)
    np.testing.assert_allclose(np.bincount(modes) / len(points), 1 / 8, atol=0.008)
    for mode, centre in enumerate(centres):
        np.testing.assert_allclose(points[modes == mode].mean(axis=0), centre, atol=0.008)
        np.testing.assert_allclose(points[modes == mode].std(axis=0), 0.1, atol=0.006)
    assert not np.array_equal(points, example.sample_ring(jax.random.key(2), 40_000))


def test_coverage_counts_points_and_modes() -> None:
    ring, far = np.repeat(example.CENTRES, 10, axis=0), np.zeros((80, 2), np.float32)
    assert example.coverage(ring) == (1, 8)
    assert example.coverage(ring[:20]) == (1, 2)
    assert example.coverage(far) == (0, 0)
    assert example.coverage(np.concatenate([ring, far])) == (0.5, 8)
    assert example.coverage(ring + np.float32([0.29, 0])) == (1, 8)
    assert example.coverage(ring + np.float32([0.31, 0])) == (0, 0)
    # 318 points could be 40 to a mode, and a quarter of that is 10: the last mode has 8.
    assert example.coverage(np.concatenate([ring[:78], *[far] * 3])) == (78 / 318, 7)
    near, modes = example.coverage(example.sample_ring(KEY, 2000))
    assert abs(near - (1 - np.exp(-4.5))) < 0.01 and modes == 8


# A step


def test_the_parts_of_the_discriminator(run: example.Run) -> None:
    assert pt.collect(pt.select(run.discriminator, kind="param")).keys() == TRAINED
    assert pt.collect(pt.select(run.discriminator, kind="state")).keys() == STATE
    assert pt.collect(run.generator).keys() == {*WEIGHTS, "dense0_bias", "dense1_bias", "dense2_bias"}


def test_a_training_call_improves_the_vectors(
    gan: example.Gan, run: example.Run, after: example.Run
) -> None:
    norm = pt.parametrizations.SpectralNorm(3)
    for i in range(3):
        before, new = (tree.discriminator[f"dense{i}/weight"] for tree in (run, after))
        for name, vector in norm.update(
            {"weight": before.weight, "u": before.u, "v": before.v}
        ).items():
            np.testing.assert_allclose(new[name], vector, rtol=1e-4, atol=1e-5)


def test_steps_change_the_vectors_and_keep_their_length(
    gan: example.Gan, run: example.Run, after: example.Run
) -> None:
    later, _ = jax.jit(partial(example.train_discriminator, gan))(after, jax.random.key(2))
    constant = {"dense2_weight_u"}  # a matrix of one row has only 1 and -1 there
    # The loss of a saturated hinge does not depend on the last bias.
    moved = changed(run.discriminator, later.discriminator)
    assert TRAINED | STATE >= moved >= (TRAINED | STATE) - constant - {"dense2_bias"}
    for name, vector in pt.collect(pt.select(later.discriminator, kind="state")).items():
        assert float(jnp.linalg.norm(vector)) == pytest.approx(1, abs=1e-5), name


def test_a_step_of_the_discriminator_leaves_the_generator(run: example.Run, after: example.Run) -> None:
    same(after.generator, run.generator)
    same(after.generator_state, run.generator_state)


def test_a_step_of_the_generator_leaves_the_discriminator(gan: example.Gan, run: example.Run) -> None:
    new, loss = jax.jit(partial(example.train_generator, gan))(run, KEY)
    assert np.isfinite(loss)
    same(new.discriminator, run.discriminator)
    same(new.discriminator_state, run.discriminator_state)
    assert changed(run.generator, new.generator) == set(pt.collect(run.generator))


def test_the_optimiser_gets_no_vectors(run: example.Run, after: example.Run) -> None:
    for state in (run.discriminator_state, after.discriminator_state):
        for moments in (state[0].mu, state[0].nu):
            assert pt.collect(moments).keys() == TRAINED
    sizes = {leaf.shape for leaf in jax.tree.leaves(after.discriminator_state)}
    assert sizes == {(), (1,), (64,), (64, 2), (64, 64), (1, 64)}


def test_the_step_is_compiled_once(gan: example.Gan, run: example.Run) -> None:
    step = jax.jit(partial(example.both_steps, gan))
    for i in range(3):
        run, *losses = step(run, jax.random.fold_in(KEY, i))
    assert step._cache_size() == 1
    assert np.all(np.isfinite(losses))


# A run


def test_spectral_norms_stay_at_one(capsys: pytest.CaptureFixture[str]) -> None:
    result = example.main(QUICK)
    assert [report.step for report in result.reports] == [20, 40, 60]
    for report in result.reports:
        assert list(report.norms) == WEIGHTS
        np.testing.assert_allclose(list(report.norms.values()), 1, atol=0.05)
    parts = pt.collect(result.run.discriminator)
    for name, weight in pt.collect(result.run.discriminator, ".*weight_weight").items():
        u, v = parts[f"{name[:-7]}_u"], parts[f"{name[:-7]}_v"]
        largest = np.linalg.svd(weight, compute_uv=False)[0]
        np.testing.assert_allclose(u @ (weight @ v), largest, rtol=0.05)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and re.match(r" +20 +\d\.\d{3} +-?\d\.\d{3} .*  1\.0\d\d$", lines[1])


def test_without_normalisation_they_do_not() -> None:
    result = example.main([*QUICK, "--plain"])
    norms = result.reports[-1].norms
    assert list(norms) == WEIGHTS
    assert all(abs(norm - 1) > 0.2 for norm in norms.values())
    assert pt.collect(pt.select(result.run.discriminator, kind="state")).keys() == set()


def test_it_learns_the_modes() -> None:
    result = example.main(["--steps", "1500", "--every", "1500", "--seed", "3", "--iterations", "5"])
    (report,) = result.reports
    assert report.modes >= 6 and report.near > 0.25


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    example.main(["--steps", "1", "--iterations", "1", "--plots", str(tmp_path / "ring.png")])
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps is at least 1, not 0"),
        (["--every", "-5"], "--every is at least 1, not -5"),
        (["--iterations", "0"], "--iterations is at least 1, not 0"),
        (["--plots", "no/such/plot.png"], "--plots: there is no folder no/such"),
    ],
)
def test_options_that_cannot_be(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    assert message in " ".join(capsys.readouterr().err.split())
