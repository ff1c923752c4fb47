"""The residual network: what is frozen stays bit for bit, rates go by name, a quick run, and errors."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import pytest

import paramtree as pt
from examples import resnet as example
from tests.helpers import lenient

pytestmark = pytest.mark.slow

NET = example.resnet(width=4)
X = np.random.default_rng(0).random((16, 8, 8, 1), np.float32)
Y = np.arange(16, dtype=np.int32) % 5


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    params = pt.init(NET, jax.random.key(0), X[:1], rules={".*weight": "he_normal"})
    return jax.jit(pt.training(NET))(params, X)[1]  # with statistics that are not the initial ones


def contents(tree: Any) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in pt.collect(tree).items()}


def moved(before: Any, after: Any) -> dict[str, float]:
    """Returns how far each leaf that changed moved at most."""
    a, b = pt.collect(before), pt.collect(after)
    distance = {name: float(jnp.max(jnp.abs(a[name] - b[name]))) for name in a}
    return {name: far for name, far in distance.items() if far}


def fails(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


def test_the_blocks_are_those_of_resnet18(params: pt.ParamTree) -> None:
    assert len(pt.collect(params, ".*conv_weight")) == 1 + 16 + 3  # the stem, the blocks, shortcuts
    shortcuts = pt.collect(params, ".*shortcut_conv_weight")
    assert list(shortcuts) == [f"stage{i}_basicblock0_shortcut_conv_weight" for i in (1, 2, 3)]
    sizes = [params[f"stage{i}"].basicblock1.second.norm.gamma.size for i in range(4)]
    assert sizes == [4, 8, 16, 32]


def test_a_block_adds_its_input(key: jax.Array) -> None:
    block, x = example.BasicBlock(4), jax.random.normal(key, (2, 3, 3, 4))
    silent = pt.replace(pt.init(block, key, x), {"second/norm/gamma": jnp.zeros(4)})
    np.testing.assert_array_equal(block(silent, x), jnp.maximum(x, 0))


def test_training_moves_parameters_and_statistics(params: pt.ParamTree) -> None:
    tx = optax.sgd(0.1)
    step = example.make_step(NET, tx)
    start = jax.tree.map(jnp.copy, params)
    after, _, loss = step(start, tx.init(pt.select(start, kind="param")), X, Y)
    assert np.isfinite(loss)
    assert moved(params, after).keys() == pt.collect(params).keys()
    assert jax.tree.structure(after) == jax.tree.structure(params)
    expected = jax.jit(pt.training(NET))(params, X)[1].stem.norm.running_mean
    np.testing.assert_allclose(after.stem.norm.running_mean, expected, rtol=1e-5)


@pytest.mark.parametrize("rates", [example.HEAD, example.RATES], ids=["head", "stages"])
def test_a_step_moves_what_has_a_rate_by_that_and_nothing_else(
    params: pt.ParamTree, rates: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(params)
    tuned = example.fine_tune(NET, params, rates, np.arange(16)[None], X, Y)
    trained = {
        name: rate
        for pattern, rate in rates.items()
        for name in pt.collect(params, pattern, kind="param")
    }
    after = contents(tuned)
    assert {name for name in after if after[name] != before[name]} == trained.keys()
    for name, far in moved(params, tuned).items():  # Adam's first step is the rate, but for epsilon
        assert far == pytest.approx(trained[name], rel=1e-2), name
    kept = len(before) - len(trained)
    assert f"{kept} of {len(before)} leaves are exactly as before" in capsys.readouterr().out


def test_a_frozen_leaf_that_changes_is_an_error(
    params: pt.ParamTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(loss: Any, tx: Any, pattern: str) -> Any:
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            return pt.map_named(lambda name, leaf: leaf + 1, params, "head_.*|stem_.*"), state, 0.0

        return step

    monkeypatch.setattr(example, "fine_tune_step", too_much)
    with pytest.raises(RuntimeError, match=r"Frozen leaves have changed:\n.*5 of \d+ leaves"):
        example.fine_tune(NET, params, example.HEAD, np.arange(16)[None], X, Y)


@pytest.mark.usefixtures("digits")
@jax.numpy_dtype_promotion("standard")  # optax raises a Python float to an int32 count
def test_a_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--width", "4", "--steps", "40", "--tune-steps", "40", "--images", "300"]
    result = example.main([*quick, "--batch-size", "64", "--seed", "1"])
    assert result.old > 0.6 and result.before < 0.6 < result.after
    assert result.head <= result.after
    body, probed = (pt.partition(t, "head_.*")[1] for t in (result.trained, result.probed))
    assert contents(body) == contents(probed)
    states = [contents(pt.select(t, kind="state")) for t in (result.trained, result.tuned)]
    assert states[0] == states[1] and len(states[0]) == 40
    printed = capsys.readouterr().out
    assert "digits: training on" in printed and f"{result.after:.3f} after" in printed


@pytest.mark.usefixtures("digits")
def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("steps", "tune-steps", "images", "batch-size"):
        fails(capsys, [f"--{name}", "0"], f"--{name} is at least 1, not 0")
    fails(capsys, ["--width", "0"], "channels must be a positive integer, but found 0")
    fails(capsys, ["--data", str(tmp_path / "none")], "none lacks train-images")
