"""The convolutional example: learning, running statistics, exact resumption, and errors."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import fashion_cnn as example

pytestmark = pytest.mark.slow

LR = 0.1
QUICK = ["--batch-size", "128", "--channels", "4", "--lr", str(LR)]
KEY = jax.random.key(1)
STATE = {f"batchnorm{i}_running_{what}" for i in (0, 1) for what in ("mean", "var")}

# An easy task: noise of the digits' size, whose brightness depends on the label.
RNG = np.random.default_rng(0)
Y = RNG.integers(0, 10, 128).astype(np.int32)
X = (RNG.normal(size=(128, 8, 8, 1)) * 0.1 + Y[:, None, None, None] / 10).astype(np.float32)


class Setting:
    """A small network, its compiled functions, and the runs of its first three steps."""

    def __init__(self) -> None:
        self.net, self.tx = example.network(4), example.optimiser(LR, 1437 // 128)
        self.step, self.evaluate = example.make_step(self.net, self.tx), example.make_evaluate(self.net)
        self.runs = [self.start()]
        for _ in range(3):
            self.runs.append(self.take(self.runs[-1])[0])

    def start(self) -> Any:
        return example.start(self.net, self.tx, jax.random.key(0), X[:1])

    def take(self, run: Any) -> Any:
        """Takes a step on a copy, because the step donates its run."""
        return self.step(jax.tree.map(jnp.copy, run), X, Y, KEY)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def fails(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in pt.collect(tree).items()}


# The step


def test_the_statistics_are_state(setting: Setting) -> None:
    params = setting.runs[0].params
    assert set(pt.collect(params, kind="state")) == STATE
    assert not set(pt.collect(params, kind="param")) & STATE
    (trace, _) = setting.runs[0].slots
    assert jax.tree.structure(trace.trace) == jax.tree.structure(pt.select(params, kind="param"))


def test_a_step_keeps_the_structure_and_is_traced_once(setting: Setting) -> None:
    assert len({jax.tree.structure(run) for run in setting.runs}) == 1
    assert setting.step._cache_size() == 1
    assert [int(run.steps) for run in setting.runs] == [0, 1, 2, 3]


def test_a_step_moves_all_leaves(setting: Setting) -> None:
    before, after = (leaves(run.params) for run in setting.runs[:2])
    assert [name for name in before if (before[name] == after[name]).all()] == []


def test_the_statistics_are_those_of_the_batch(setting: Setting) -> None:
    before, after = (run.params for run in setting.runs[:2])
    out = np.asarray(setting.net[0](before.conv0, X))
    norm = after.batchnorm0
    # A tenth of the batch's, plus nine tenths of the initial ones.
    np.testing.assert_allclose(norm.running_mean, 0.1 * out.mean((0, 1, 2)), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(norm.running_var, 0.9 + 0.1 * out.var((0, 1, 2)), rtol=1e-5)


def test_the_optimiser_moves_by_the_gradients(setting: Setting) -> None:
    run = setting.runs[0]

    def loss(params: Any) -> Any:
        logits, _ = pt.training(setting.net)(params, X, key=jax.random.fold_in(KEY, 0))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(Y)), Y])

    grads = leaves(jax.jit(jax.grad(loss))(run.params))  # includes the state, whose gradient is zero
    before, after = leaves(run.params), leaves(setting.runs[1].params)
    assert all((grads[name] == 0).all() for name in STATE)
    for name in before.keys() - STATE:
        moved = after[name] - before[name]
        np.testing.assert_allclose(moved, -LR * grads[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_dropout_depends_on_the_step(setting: Setting) -> None:
    run = setting.runs[0]
    losses = [setting.take(run._replace(steps=jnp.int32(i)))[1].item() for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_step_takes_its_buffers(setting: Setting) -> None:
    run = setting.start()
    setting.step(run, X, Y, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(run))


def test_the_loss_falls(setting: Setting) -> None:
    run, losses = setting.start(), []
    for _ in range(60):
        run, loss, _ = setting.step(run, X, Y, KEY)
        losses.append(loss)
    losses = np.array(jax.device_get(losses))
    assert losses[-10:].mean() < 0.7 * losses[:5].mean()
    assert setting.evaluate(run.params, X, Y) > 0.3


# Inference


def test_inference_is_deterministic_and_uses_the_running_statistics(setting: Setting) -> None:
    params, net = setting.runs[-1].params, jax.jit(setting.net)
    logits = np.asarray(net(params, X))
    np.testing.assert_array_equal(net(params, X), logits)
    # Predictions do not depend on the rest of the batch, as they would with batch statistics.
    np.testing.assert_allclose(net(params, X[:3]), logits[:3], rtol=1e-4, atol=1e-5)
    name = "batchnorm1_running_mean"
    other = pt.replace(params, {name: pt.collect(params)[name] + 1})
    assert not np.allclose(net(other, X), logits, rtol=1e-2, atol=0)


def test_evaluation_in_batches_is_that_of_all(setting: Setting) -> None:
    params = setting.runs[-1].params
    expected = float(np.mean(np.argmax(jax.jit(setting.net)(params, X), axis=-1) == Y))
    for size in (128, 60):  # the last batch of 60 has 8
        assert example.make_evaluate(setting.net, size)(params, X, Y) == expected


# A run


@pytest.mark.usefixtures("digits")
def test_a_resumed_run_is_the_one_that_was_never_interrupted(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Each run would recompile the step, because its optimiser is a new object.
    monkeypatch.setattr(example, "make_step", lambda net, tx: setting.step)
    whole, first, second = (tmp_path / f"{name}.safetensors" for name in ("whole", "first", "second"))
    expected = example.main([*QUICK, "--seed", "3", "--epochs", "2", "--checkpoint", str(whole)])
    printed = capsys.readouterr().out
    assert "`make data`" in printed and "digits: 1437 images" in printed
    assert "24 that are running statistics" in printed
    assert [result.epoch for result in expected] == [1, 2]
    assert expected[1].loss < expected[0].loss < 2.5
    assert 0.2 < expected[1].test_accuracy <= 1
    begun = example.main([*QUICK, "--seed", "3", "--epochs", "1", "--checkpoint", str(first)])
    resume = ["--epochs", "2", "--resume", str(first), "--checkpoint", str(second)]
    resumed = example.main([*QUICK, *resume])
    assert [result[:4] for result in begun + resumed] == [result[:4] for result in expected]
    assert whole.read_bytes() == second.read_bytes()
    assert setting.step._cache_size() == 1
    assert example.main([*QUICK, "--epochs", "2", "--resume", str(second)]) == []  # no epochs are left
    saved = pt.load(whole)
    assert (saved.epoch, saved.seed, saved.run.steps) == (2, 3, 2 * (1437 // 128))
    assert set(saved.run.slots["0"].trace) == set(saved.run.params)
    capsys.readouterr()
    fails(capsys, ["--resume", str(whole), "--channels", "8"], "conv0.weight.* 8.* 4")


@pytest.mark.usefixtures("digits")
def test_options_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["--batch-size", "2000"], "--batch-size is from 1 to 1437")
    fails(capsys, ["--batch-size", "0"], "--batch-size is from 1 to 1437")
    fails(capsys, ["--channels", "0"], "channels must be a positive integer, but found 0")
    fails(capsys, ["--checkpoint", str(tmp_path / "no" / "run.npz")], "there is no folder .*no")
    fails(capsys, ["--resume", str(tmp_path / "none.npz")], r"No such file .*none\.npz")
    fails(capsys, ["--data", str(tmp_path / "none")], "none lacks train-images")
    wrong = tmp_path / "run.safetensors"
    wrong.write_bytes(b"text")
    fails(capsys, ["--resume", str(wrong)], r"run\.safetensors: is ")
