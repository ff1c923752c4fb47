"""The LoRA example: only adapters are trained and saved, and folding them changes no output."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import char_lm, lora
from tests.helpers import lenient

pytestmark = pytest.mark.slow

TINY = ["--width", "16", "--layers", "2", "--heads", "2", "--context", "16", "--batch-size", "8"]
TINY += ["--lr", "0.03", "--steps", "10", "--adapt-steps", "15", "--rank", "2", "--sample", "0"]
SETTINGS = char_lm.Settings(16, 2, 2, 1)
NET = char_lm.network(SETTINGS)
PATTERN = r".*(query|value)_weight"
RULES = lora.rules_for(PATTERN, 2)
LORA = pt.reparametrize(NET, RULES)
NAMES = [f"blocks_attention_attend_{name}_weight" for name in ("query", "value")]
TOKENS = char_lm.batch_at(char_lm.encode("import sys, os, re\nprint(sys.argv)\n" * 3), 0, 8, 16, 0)


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(char_lm):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    return pt.init(NET, jax.random.key(0), char_lm.ONE, ties=char_lm.TIES)


@pytest.fixture
def expanded(params: pt.ParamTree) -> pt.ParamTree:
    return pt.expand(params, RULES, jax.random.key(1))


def filled(expanded: pt.ParamTree) -> pt.ParamTree:
    """Returns the tree with nonzero ``a`` and ``b``."""
    normal = pt.initializers.Normal(0.3)
    return pt.reinit(expanded, jax.random.key(2), {".*_weight_(a|b)": normal})


def arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(leaf) for name, leaf in pt.collect(tree).items()}


def test_the_adapters_are_all_that_is_trained(expanded: pt.ParamTree) -> None:
    adapters = pt.select(expanded, kind="param")
    assert list(pt.collect(adapters)) == [f"{name}_{part}" for name in NAMES for part in "ab"]
    leaves = arrays(adapters)
    for name in NAMES:  # the first axis is over the copies of the block
        a, b = leaves[f"{name}_a"], leaves[f"{name}_b"]
        assert a.shape == (2, 2, 16) and b.shape == (2, 16, 2) and np.any(a) and not np.any(b)
        assert not np.array_equal(a[0], a[1])
    one, other = (leaves[f"{name}_a"] for name in NAMES)
    assert not np.array_equal(one, other)


def test_with_b_at_zero_nothing_changes(params: pt.ParamTree, expanded: pt.ParamTree) -> None:
    folded = pt.fold(expanded, RULES)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    for one, other in zip(arrays(folded).values(), arrays(params).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_folding_adds_the_products(params: pt.ParamTree, expanded: pt.ParamTree) -> None:
    expanded = filled(expanded)
    folded, before, parts = arrays(pt.fold(expanded, RULES)), arrays(params), arrays(expanded)
    for name, leaf in folded.items():
        if name not in NAMES:
            np.testing.assert_array_equal(leaf, before[name])
            continue
        for i in range(2):
            change = 2.0 * parts[f"{name}_b"][i] @ parts[f"{name}_a"][i]
            np.testing.assert_allclose(leaf[i], before[name][i] + change, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        LORA(expanded, TOKENS), NET(pt.fold(expanded, RULES), TOKENS), rtol=1e-5, atol=1e-5
    )


def test_a_tie_stays_a_tie(params: pt.ParamTree) -> None:
    rules = lora.rules_for("(embed|decoder)_weight", 2)
    expanded = filled(pt.expand(params, rules, jax.random.key(1)))
    folded = pt.fold(expanded, rules)
    assert folded.decoder.weight is folded.embed.weight
    assert not np.array_equal(folded.embed.weight, params.embed.weight)


def test_training_moves_only_the_adapters(params: pt.ParamTree, expanded: pt.ParamTree) -> None:
    adapters, frozen = pt.partition(expanded, kind="param")
    before, start = arrays(frozen), arrays(adapters)
    state = char_lm.make_tx(0.03).init(adapters)
    assert pt.count(state[1][0].mu) == pt.count(adapters) == 2 * 2 * (16 * 2 + 2 * 16)
    losses = []
    for _ in range(10):
        adapters, state, loss = lora.train_step(LORA, 0.03, adapters, state, frozen, TOKENS)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01
    assert lora.train_step._cache_size() == 1
    for name, leaf in arrays(adapters).items():
        assert np.any(leaf != start[name]), name
    for name, leaf in arrays(frozen).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_patterns_that_cannot_be(params: pt.ParamTree) -> None:
    with pytest.raises(pt.RuleError, match="'.*qwery_weight' matches no name; the closest are"):
        pt.expand(params, lora.rules_for(".*qwery_weight", 2), jax.random.key(0))
    with pytest.raises(pt.MismatchError, match=r"`norm_gamma` is .*LoRA.* needs a matrix, but found"):
        pt.expand(params, lora.rules_for("norm_gamma", 2), jax.random.key(0))


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "adapters.safetensors"
    args = [*TINY, "--adapters", str(file), "--pattern", PATTERN]
    result = lora.main(args)
    assert result.after < result.before
    assert result.difference < 1e-4
    assert result.adapter_bytes == file.stat().st_size < result.model_bytes / 3
    loaded = pt.load(file)
    assert list(pt.collect(loaded)) == [f"{name}_{leaf}" for name in NAMES for leaf in "ab"]
    assert all(np.any(leaf) for leaf in pt.collect(loaded).values())
    printed = capsys.readouterr().out
    assert re.search(r"256 of 7,920 parameters, in " + ", ".join(NAMES), printed)

    with pytest.raises(SystemExit, match="2"):
        lora.main([*TINY, "--base", str(tmp_path / "none.npz")])
    assert "none.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        lora.main([*TINY, "--steps", "1", "--pattern", "nrom.*"])
    assert "'nrom.*' matches no name" in capsys.readouterr().err


def test_a_checkpoint_is_the_base(params: pt.ParamTree, tmp_path: Path) -> None:
    file, adapters = tmp_path / "base.safetensors", tmp_path / "adapters.npz"
    pt.save(file, char_lm.Run(SETTINGS, params, char_lm.make_tx(0.03).init(params), 7, 0))
    content = file.read_bytes()
    result = lora.main([*TINY, "--base", str(file), "--adapters", str(adapters), "--pattern", PATTERN])
    assert result.after < result.before < np.log(char_lm.CHARACTERS) + 0.5
    assert file.read_bytes() == content
    expanded = pt.expand(params, RULES, jax.random.key(9))  # with adapters of its own
    expanded = pt.replace(expanded, pt.collect(pt.load(adapters)).to_dict())
    folded = pt.fold(expanded, RULES)
    assert pt.ties(folded) == pt.ties(params) and not np.array_equal(
        NET(folded, jnp.asarray(TOKENS)), NET(params, jnp.asarray(TOKENS))
    )
