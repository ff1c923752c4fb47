"""The language model example: its tie, new and resumed runs, and sampling with a cache."""

import argparse
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import char_lm as example
from tests.helpers import lenient

pytestmark = pytest.mark.slow

TINY = ["--width", "16", "--layers", "2", "--heads", "2", "--context", "16", "--batch-size", "8"]
TINY += ["--lr", "0.03", "--steps", "20", "--every", "10"]
TIED, UNTIED = (example.Settings(16, 2, 2, tie) for tie in (1, 0))
FULL = jax.jit(example.network(TIED))  # without a cache; batches of one text of 16 characters


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example), pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "load_data", functools.cache(example.load_data))
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the path of the checkpoint that the fixture ``reports`` writes."""
    return tmp_path_factory.mktemp("runs") / "whole.safetensors"


@pytest.fixture(scope="module")
def reports(saved: Path) -> list[example.Report]:
    return example.main([*TINY, "--seed", "3", "--sample", "12", "--checkpoint", str(saved)])[1]


@pytest.fixture(scope="module")
def run(saved: Path, reports: Any) -> example.Run:
    return example.load_run(saved, 0.03)


def fails(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


# The data


def test_characters_are_numbers_and_back() -> None:
    text = "def f(x):\n    return '~'\n"
    tokens = example.encode(text)
    assert tokens.dtype == np.int32 and example.decode(tokens) == text
    assert example.decode(example.encode("\tä\r\0\x7f!")) == "    !"
    everything = example.encode("\n" + "".join(map(chr, range(32, 127))))
    assert everything.tolist() == list(range(example.CHARACTERS))


def test_a_tenth_of_the_files_validates(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"m{i:02}.py").write_text(chr(ord("a") + i) * (30_000 if i == 0 else 3))
    data = example.load_data(tmp_path)
    assert example.decode(data.validation) == "jjjttt"
    assert len(data.train) == example.PER_FILE + 17 * 3
    assert not set(data.train.tolist()) & set(data.validation.tolist())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty should have 10 Python files or more, but has 0"):
        example.load_data(tmp_path / "empty")


def test_the_standard_library_is_there() -> None:
    data = example.load_data()
    assert len(data.train) > 10 * example.PER_FILE and len(data.validation) > example.PER_FILE
    for text in data:
        assert text.dtype == np.int32 and text.min() == 0 and text.max() == example.CHARACTERS - 1


def test_a_batch_depends_on_step_and_seed() -> None:
    text = np.arange(1000, dtype=np.int32)
    batch = example.batch_at(text, 5, 4, 16, 3)
    assert batch.shape == (4, 17) and (np.diff(batch) == 1).all()
    np.testing.assert_array_equal(batch, example.batch_at(text, 5, 4, 16, 3))
    for step, seed in ((6, 3), (5, 4)):
        assert not np.array_equal(batch, example.batch_at(text, step, 4, 16, seed))
    starts = example.batch_at(text[:18], 0, 100, 16, 0)[:, 0]
    assert set(starts.tolist()) == {0, 1}  # all slices, and none that runs over the end


# The network


def test_the_decoder_is_the_embedding() -> None:
    tied, untied = (
        pt.abstract(example.network(settings), example.ONE, ties=example.TIES if settings.tie else None)
        for settings in (TIED, UNTIED)
    )
    assert pt.ties(tied) == {"decoder_weight": "embed_weight"} and not pt.ties(untied)
    assert pt.count(untied) - pt.count(tied) == example.CHARACTERS * 16
    assert pt.collect(tied, aliases=True).keys() == pt.collect(untied).keys()
    assert all(leaf.shape[0] == 2 for leaf in pt.collect(tied, "blocks_.*").values())


def test_no_character_sees_those_after_it(run: example.Run) -> None:
    tokens = example.encode("import sys, os\n\n")[None]
    other = tokens.copy()
    other[0, 6:] = 0
    both = FULL(run.params, tokens), FULL(run.params, other)
    np.testing.assert_allclose(both[0][:, :6], both[1][:, :6], atol=1e-5)
    assert not np.allclose(both[0][:, 6:], both[1][:, 6:], atol=1e-3)


# A run


def test_the_loss_falls(reports: list[example.Report]) -> None:
    assert [report.step for report in reports] == [10, 20]
    first, last = reports
    assert last.loss < first.loss < 5 and last.validation_loss < first.validation_loss
    assert last.validation_loss < np.log(example.CHARACTERS) - 0.5
    assert last.validation_accuracy > 0.1


def test_the_tie_survives_training_and_a_checkpoint(saved: Path, run: example.Run) -> None:
    assert run.settings == TIED and (run.step, run.seed) == (20, 3)
    moments = run.state[1][0].mu, run.state[1][0].nu
    for tree in (run.params, *moments):
        assert pt.ties(tree) == {"decoder_weight": "embed_weight"}
        assert tree.decoder.weight is tree.embed.weight
    names = set(pt.collect(pt.load(saved)))
    assert "params_embed_weight" in names and "params_decoder_weight" not in names


def test_a_seed_gives_one_run(saved: Path, reports: list[example.Report], tmp_path: Path) -> None:
    again, resumed = tmp_path / "again.safetensors", tmp_path / "resumed.safetensors"
    traces = example.train_step._cache_size()
    args = [*TINY, "--sample", "0", "--seed", "3"]
    half = example.main([*args, "--steps", "10", "--checkpoint", str(again)])[1]
    rest = example.main([*TINY, "--sample", "0", "--resume", str(again), "--checkpoint", str(resumed)])[
        1
    ]
    assert [report[:4] for report in half + rest] == [report[:4] for report in reports]
    assert resumed.read_bytes() == saved.read_bytes()  # the same as without the interruption
    assert example.train_step._cache_size() == traces  # equal networks share what is compiled
    other = example.main([*args, "--seed", "4", "--steps", "10"])[1]
    assert other[0].loss != half[0].loss
    assert example.main([*TINY, "--sample", "0", "--resume", str(resumed)]) == {1: []}  # none left


def test_both_kinds_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    results = example.main([*TINY, "--steps", "5", "--compare", "--sample", "0"])
    assert list(results) == [1, 0] and all(len(reports) == 1 for reports in results.values())
    printed = capsys.readouterr().out
    tied, untied = re.search(r"\ntied: (\S+) parameters[^:]*\nuntied: (\S+) ", printed, re.S).groups()
    assert int(untied.replace(",", "")) - int(tied.replace(",", "")) == example.CHARACTERS * 16


def test_dropout_needs_a_key_and_only_then_drops(run: example.Run) -> None:
    net = example.network(TIED, dropout=0.5)
    tokens = example.batch_at(np.arange(90, dtype=np.int32), 0, 8, 16, 0)
    plain = example.measure(net, run.params, tokens)
    same(plain, example.measure(example.network(TIED), run.params, tokens))
    dropped = [float(example.measure(net, run.params, tokens, jax.random.key(i))[0]) for i in (0, 0, 1)]
    assert dropped[0] == dropped[1] != dropped[2] and float(plain[0]) not in dropped


# Sampling


def test_sampling_gives_the_logits_of_the_whole_text(run: example.Run) -> None:
    prompt = example.encode("def ")[None]
    for temperature in (1.0, 1e-6):
        tokens, logits = example.sample(TIED, run.params, prompt, jax.random.key(0), 12, temperature)
        assert tokens.shape == (1, 12) and tokens.dtype == jnp.int32
        whole = jnp.concatenate([prompt, tokens], axis=1)
        expected = FULL(run.params, whole)[:, 3:-1]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))  # a low temperature selects the likeliest
    text = example.continued(TIED, run.params, "def ", 12, seed=0)
    assert text.startswith("def ") and len(text) == 16
    assert text == example.continued(TIED, run.params, "def ", 12, seed=0)


def test_the_cache_gives_step_by_step_what_one_pass_gives(run: example.Run) -> None:
    tokens = example.encode("class A(B):\n    ")[None]
    net = example.network(TIED, cache=16)
    tree = example.with_cache(net, run.params, batch=1)
    assert pt.ties(tree) == pt.ties(run.params)
    same(pt.collect(tree, kind="param"), pt.collect(run.params))
    state = pt.collect(tree, kind="state")
    assert len(state) == 3 and not any(np.any(leaf) for leaf in state.values())
    write = jax.jit(pt.training(net))
    each = []
    for i in range(16):
        logits, tree = write(tree, tokens[:, i : i + 1])
        each.append(logits)
    assert write._cache_size() == 1
    expected = FULL(run.params, tokens)
    np.testing.assert_allclose(jnp.concatenate(each, axis=1), expected, rtol=1e-4, atol=1e-4)
    same(pt.collect(tree, kind="param"), pt.collect(run.params))  # only the state was written


# Errors


def test_options_that_cannot_be(
    saved: Path, run: example.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["--compare", "--resume", str(saved)], "--compare trains two networks, and takes n")
    fails(capsys, ["--checkpoint", str(tmp_path / "no" / "run.npz")], "there is no folder .*no")
    fails(capsys, ["--resume", str(tmp_path / "none.npz")], r"No such file .*none\.npz")
    fails(capsys, ["--width", "10", "--heads", "4"], "cannot divide 10 units into 4 heads")
    pt.save(tmp_path / "other.safetensors", run.params)
    fails(capsys, ["--resume", str(tmp_path / "other.safetensors")], r"`settings_width` is missing")


def test_a_run_goes_on_by_its_own_settings(saved: Path, run: example.Run) -> None:
    args = argparse.Namespace(
        batch_size=8, context=16, every=5, steps=21, dropout=0.0, lr=0.03, width=999
    )
    again = example.load_run(saved, 0.03)  # a step donates its arguments
    after, reports = example.train(again, example.load_data(), args)
    assert after.step == 21 and after.settings == TIED and len(reports) == 1
    assert pt.ties(after.params) == pt.ties(run.params)
