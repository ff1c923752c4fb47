"""The vision transformer: its patches, what decays, dropout by the step, a quick run, and errors."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import vit as example
from tests.helpers import lenient

pytestmark = pytest.mark.slow

NET = example.vit(patches=4, size=4, width=8, depth=3, heads=2, rate=0.1)
X = np.random.default_rng(0).random((6, 8, 8, 1), np.float32)
Y = np.arange(6, dtype=np.int32)
TINY = ["--width", "16", "--depth", "2", "--heads", "2", "--patch", "4"]


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    return pt.init(NET, jax.random.key(0), X[:1], rules=example.INIT)


def fails(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


def test_the_sequence_is_the_patches_row_by_row(params: pt.ParamTree) -> None:
    sequence = NET[:2](params, X)
    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    patches = np.stack([X[:, i : i + 4, j : j + 4, 0] for i, j in corners], 1)
    weight = np.asarray(params.patches.weight)[:, 0]
    np.testing.assert_allclose(sequence, np.einsum("bpij,oij->bpo", patches, weight), atol=1e-5)


def test_only_weights_decay(params: pt.ParamTree) -> None:
    decayed = [name for name, yes in pt.collect(pt.mask(params, example.DECAYED)).items() if yes]
    dense = ["attention_attend_query", "attention_attend_key", "attention_attend_value"]
    dense += ["attention_attend_out", "mlp_up", "mlp_down"]
    blocks = [f"blocks_{name}_weight" for name in dense]
    assert decayed == ["patches_weight", *blocks, "head_weight"]
    assert params.blocks.mlp.up.bias.ndim == 2  # so axes would not tell


def test_a_step_draws_by_its_number_and_is_traced_once(params: pt.ParamTree) -> None:
    tx = example.make_tx(1e-3, 10)
    step = example.make_step(NET, tx)

    def take(number: int) -> Any:
        state = example.TrainState(params, tx.init(params), jnp.int32(number))
        return step(jax.tree.map(jnp.copy, state), X, Y, jax.random.key(1))

    losses = [take(number)[1].item() for number in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    state, _ = take(4)
    assert int(state.step) == 5
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert step._cache_size() == 1


@pytest.mark.usefixtures("digits")
def test_a_quick_run_learns_and_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (example.main([*TINY, "--steps", "60", "--seed", "3"]) for _ in range(2))
    assert first.losses == second.losses and first.accuracy == second.accuracy
    assert np.mean(first.losses[-10:]) < 0.7 * np.mean(first.losses[:10])
    assert first.accuracy > 0.4
    printed = capsys.readouterr().out
    assert "digits: 4 patches an image" in printed
    assert f"test accuracy {first.accuracy:.3f}" in printed


@pytest.mark.usefixtures("digits")
def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, ["--steps", "0"], "--steps is at least 1, not 0")
    fails(capsys, ["--batch-size", "0"], "--batch-size is at least 1, not 0")
    fails(capsys, ["--patch", "0"], "--patch is at least 1, not 0")
    fails(capsys, ["--patch", "9"], "kernel")
    fails(capsys, ["--heads", "5"], "heads")
    fails(capsys, ["--rate", "1"], r"must be in \[0, 1\)")
    fails(capsys, ["--data", str(tmp_path / "none")], "none lacks train-images")
