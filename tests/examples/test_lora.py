"""The LoRA example: only adapters are trained and saved, and folding them changes no output."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from examples import char_lm, lora
from paramtree import nn
from tests.helpers import quick_compilation

pytestmark = pytest.mark.slow

__all__ = ["quick_compilation"]

TINY = ["--width", "16", "--layers", "2", "--heads", "2", "--context", "16", "--batch-size", "8"]
TINY += ["--lr", "0.03", "--steps", "10", "--adapt-steps", "15", "--rank", "2", "--sample", "0"]
SETTINGS = char_lm.Settings(16, 2, 2, 1)
NET = char_lm.network(SETTINGS)
PATTERN = r".*(query|value)_weight"
NAMES = [f"blocks_attention_attend_{name}_weight" for name in ("query", "value")]
TOKENS = char_lm.batch_at(char_lm.encode("import sys, os, re\nprint(sys.argv)\n" * 3), 0, 8, 16, 0)


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    """Allows dtype promotion in the optimiser only, since optax raises floats to an int32 count."""
    make_tx = char_lm.make_tx

    def lenient(lr: float) -> Any:
        tx = make_tx(lr)

        def update(grads: Any, state: Any, params: Any = None) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return tx.update(grads, state, params)

        return optax.GradientTransformation(tx.init, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(char_lm, "make_tx", lenient)
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    return pt.init(NET, jax.random.key(0), char_lm.ONE, ties=char_lm.TIES)


@pytest.fixture
def adapters(params: pt.ParamTree) -> pt.ParamTree:
    return lora.init_adapters(params, PATTERN, 2, jax.random.key(1))


def filled(adapters: pt.ParamTree) -> pt.ParamTree:
    """Returns the adapters with nonzero ``a`` and ``b``."""
    return pt.reinit(adapters, jax.random.key(2), {".*": pt.initializers.Normal(0.3)})


def arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(leaf) for name, leaf in pt.collect(tree).items()}


def test_each_weight_that_matches_has_its_adapters(
    params: pt.ParamTree, adapters: pt.ParamTree
) -> None:
    assert list(adapters) == NAMES
    for adapter in adapters.values():
        assert adapter.a.shape == (2, 2, 16) and adapter.b.shape == (2, 16, 2)
        assert np.any(adapter.a) and not np.any(adapter.b)
    a, b = (adapters[name].a for name in NAMES)
    assert not np.array_equal(a, b) and not np.array_equal(a[0], a[1])  # all are drawn independently


def test_with_b_at_zero_nothing_changes(params: pt.ParamTree, adapters: pt.ParamTree) -> None:
    folded = lora.fold(params, adapters)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    for one, other in zip(arrays(folded).values(), arrays(params).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_folding_adds_the_products_to_the_chosen_and_copies_nothing_else(
    params: pt.ParamTree, adapters: pt.ParamTree
) -> None:
    adapters = filled(adapters)
    folded, before = pt.collect(lora.fold(params, adapters)), pt.collect(params)
    for name, leaf in folded.items():
        if name not in NAMES:
            assert leaf is before[name]
            continue
        for i in range(2):  # each of the stacked copies separately
            ab = np.asarray(adapters[name].b[i]) @ np.asarray(adapters[name].a[i])
            np.testing.assert_allclose(leaf[i], before[name][i] + 2.0 * ab, rtol=1e-5, atol=1e-6)


def test_a_folded_layer_is_the_layer_beside_its_adapter() -> None:
    net, x = nn.Dense(5), np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    params = net.init(jax.random.key(0), x)
    adapters = filled(lora.init_adapters(params, "weight", 2, jax.random.key(1)))
    a, b = adapters.weight.a, adapters.weight.b
    beside = net(params, x) + lora.SCALE * ((x @ a.T) @ b.T)
    np.testing.assert_allclose(net(lora.fold(params, adapters), x), beside, rtol=1e-5, atol=1e-5)


def test_a_tie_stays_a_tie(params: pt.ParamTree) -> None:
    adapters = filled(lora.init_adapters(params, "embed_weight", 2, jax.random.key(1)))
    folded = lora.fold(params, adapters)
    assert folded.decoder.weight is folded.embed.weight
    assert not np.array_equal(folded.embed.weight, params.embed.weight)


def test_only_the_adapters_are_trained(params: pt.ParamTree, adapters: pt.ParamTree) -> None:
    before, start = arrays(params), arrays(adapters)
    state = char_lm.make_tx(0.03).init(adapters)
    assert pt.count(state[1][0].mu) == pt.count(adapters) == 2 * 2 * (16 * 2 + 2 * 16)
    losses = []
    for _ in range(10):
        adapters, state, loss = lora.train_step(NET, 0.03, adapters, state, params, TOKENS)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01
    assert lora.train_step._cache_size() == 1
    for name, leaf in arrays(adapters).items():
        assert np.any(leaf != start[name]), name
    for name, leaf in arrays(params).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_patterns_that_cannot_be(params: pt.ParamTree) -> None:
    with pytest.raises(pt.RuleError, match="'.*qwery_weight' matches no name; the closest are"):
        lora.init_adapters(params, ".*qwery_weight", 2, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"`norm_gamma` has shape \(16,\); adapters are for \(..., out, in\)"
    ):
        lora.init_adapters(params, "norm_gamma", 2, jax.random.key(0))


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


def test_a_checkpoint_is_the_base(params: pt.ParamTree, tmp_path: Path) -> None:
    file, adapters = tmp_path / "base.safetensors", tmp_path / "adapters.npz"
    pt.save(file, char_lm.Run(SETTINGS, params, char_lm.make_tx(0.03).init(params), 7, 0))
    content = file.read_bytes()
    result = lora.main([*TINY, "--base", str(file), "--adapters", str(adapters), "--pattern", PATTERN])
    assert result.after < result.before < np.log(char_lm.CHARACTERS) + 0.5
    assert file.read_bytes() == content and pt.load(adapters).keys() == set(NAMES)
    folded = lora.fold(params, pt.load(adapters))
    assert pt.ties(folded) == pt.ties(params) and not np.array_equal(
        NET(folded, jnp.asarray(TOKENS)), NET(params, jnp.asarray(TOKENS))
    )
