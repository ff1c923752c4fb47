"""The activations example: each function agrees with a computation of its own, and the program runs."""

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
from examples import activations as example
from examples import char_lm
from tests.helpers import lenient

SETTINGS = char_lm.Settings(16, 2, 2, 1)
NET = char_lm.network(SETTINGS)
TINY = ["--width", "16", "--layers", "2", "--heads", "2", "--context", "16", "--batch-size", "8"]
TINY += ["--lr", "0.03", "--steps", "10", "--texts", "200"]
TEXT = char_lm.encode("import sys, os, re\n\n\ndef main(argv):\n    print(sys.argv)\n" * 12)
TOKENS = TEXT[: 40 * 16].reshape(40, 16)
CLEAN, CORRUPTED = (char_lm.encode(text) for text in ("def f(x): return x", "def f[x): return x"))
LENGTH, CHANGE, LAST = 18, 5, 17
ALL, NONE = np.ones((1, LENGTH), bool), np.zeros((1, LENGTH), bool)


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(char_lm):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    """Returns stacked parameters, large enough for attention to be uneven."""
    params = pt.init(NET, jax.random.key(0), char_lm.ONE, ties=char_lm.TIES)
    return jax.tree.map(lambda leaf: 4 * leaf, params)


@pytest.fixture(scope="module")
def unstacked(params: pt.ParamTree) -> pt.ParamTree:
    return pt.unstack(params, "blocks")


@pytest.fixture(scope="module")
def activations(unstacked: pt.ParamTree) -> pt.ParamTree:
    return jax.jit(pt.capture(NET, example.LAYERS))(unstacked, TOKENS)[1]


def close(a: Any, b: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


@partial(jax.jit, static_argnames="first")
def rest(params: pt.ParamTree, h: Any, first: int) -> Any:
    """Returns the logits that a value before the block ``first`` leads to, layer by layer."""
    _, blocks, norm, decoder = NET.layers
    for i in range(first, SETTINGS.layers):
        h = blocks.block(params.blocks[str(i)], h)
    return decoder(params.decoder, norm(params.norm, h))


# Statistics and probes


def test_statistics_are_those_of_numpy(activations: pt.ParamTree) -> None:
    found = example.statistics(activations)
    assert list(found) == list(pt.collect(activations)) and len(found) == 9
    for name, value in pt.collect(activations).items():
        array = np.asarray(value, np.float64)
        close(found[name], [array.mean(), array.std(), (array == 0).mean(), np.abs(array).max()])
    found = example.statistics(pt.from_tree({"a": {"output": jnp.array([0.0, -3.0, 0.0, 1.0])}}))
    close(found["a_output"], [-0.5, 1.5, 0.5, 3])


def test_positions_in_words_are_counted() -> None:
    tokens = char_lm.encode("ab_1 c\n(averylongname")
    expected = [1, 2, 3, 4, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6, *[7] * 7]
    assert example.word_positions(tokens).tolist() == expected


def test_a_classifier_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5)) + 3
    labels = rng.integers(3, size=60)
    weights, biases = example.fit(jnp.float32(features), labels.astype(np.int32), 3, ridge=0.0)
    design = np.concatenate([features, np.ones((60, 1))], axis=1)
    solution = np.linalg.lstsq(design, np.eye(3)[labels])[0]
    close(weights, solution[:-1])
    close(biases, solution[-1], atol=1e-4)
    smaller, _ = example.fit(jnp.float32(features), labels.astype(np.int32), 3, ridge=10.0)
    assert np.linalg.norm(smaller) < np.linalg.norm(weights) / 5


def test_a_probe_reads_what_is_there(activations: pt.ParamTree) -> None:
    spaces = (char_lm.encode(" ")[0] == TOKENS).astype(np.int32)
    found = example.probe(activations, spaces)
    assert list(found.accuracy) == list(pt.collect(activations))
    assert found.majority == np.mean(spaces[30:] == 0) < 0.9
    assert found.accuracy["embed_output"] > found.majority + 0.05
    # The last quarter has no part in the fit: with its labels exchanged, the same answers are wrong.
    exchanged = np.concatenate([spaces[:30], 1 - spaces[30:]])
    other = example.probe(activations, exchanged)
    close(other.majority, 1 - found.majority)
    for name, accuracy in found.accuracy.items():
        close(other.accuracy[name], 1 - accuracy)
    coins = np.random.default_rng(0).integers(2, size=TOKENS.shape, dtype=np.int32)
    assert example.probe(activations, coins).accuracy["embed_output"] < 0.65  # nothing to read


# Patching


def test_patching_the_embedding_gives_one_prompt_or_the_other(unstacked: pt.ParamTree) -> None:
    value = pt.capture(NET, "embed")(unstacked, CLEAN[None])[1].embed.output
    clean, corrupted = NET(unstacked, CLEAN[None]), NET(unstacked, CORRUPTED[None])
    assert np.abs(clean - corrupted)[0, -1].max() > 0.01
    for where, expected in ((ALL, clean), (NONE, corrupted)):
        found = example.patched(NET, unstacked, CORRUPTED, "embed", value, where)
        np.testing.assert_array_equal(found, expected)


def test_a_patch_is_in_one_layer_at_some_positions(unstacked: pt.ParamTree) -> None:
    clean, corrupted = (
        pt.capture(NET, r"blocks_0_mlp|blocks_1_attention_attend")(unstacked, tokens[None])[1].blocks
        for tokens in (CLEAN, CORRUPTED)
    )
    where = np.random.default_rng(0).random((3, LENGTH)) < 0.5
    value = clean["0"].mlp.output
    found = example.patched(NET, unstacked, CORRUPTED, "blocks_0_mlp", value, where)
    mixed = np.where(where[:, :, None], value, corrupted["0"].mlp.output)
    close(found, rest(unstacked, mixed, first=1))

    value = clean["1"].attention.attend.output  # the half adds it to the output of the first block
    found = example.patched(NET, unstacked, CORRUPTED, "blocks_1_attention_attend", value, ALL)
    mlp = NET.layers[1].block.layers[1]
    h = mlp(unstacked.blocks["1"].mlp, corrupted["0"].mlp.output + value)
    close(found, rest(unstacked, h, first=2))


def test_a_difference_moves_from_where_it_is_made_to_the_end(unstacked: pt.ParamTree) -> None:
    where = np.concatenate([ALL, NONE, np.eye(LENGTH, dtype=bool)])
    shares = example.restored(NET, unstacked, CLEAN, CORRUPTED, where)
    assert len(shares) == 9 and all(share.shape == (2 + LENGTH,) for share in shares.values())
    stream = [name for name in shares if re.fullmatch(r"(embed|blocks_._(attention|mlp))_output", name)]
    assert len(stream) == 5
    for name, share in shares.items():
        close(share[1], 0)
        close(share[2 : 2 + CHANGE], np.zeros(CHANGE))  # before the change nothing differs
        if name in stream:
            close(share[0], 1, atol=1e-4)
    close(shares["embed_output"][2:], np.eye(LENGTH)[CHANGE], atol=1e-4)
    close(shares["blocks_1_mlp_output"][2:], np.eye(LENGTH)[LAST], atol=1e-4)
    # A share is the length along the way from one prompt's logits to the other's.
    start, end = (NET(unstacked, tokens[None])[0, -1] for tokens in (CORRUPTED, CLEAN))
    value = pt.capture(NET, "blocks_0_attention")(unstacked, CLEAN[None])[1]
    value = value.blocks["0"].attention.output
    logits = example.patched(NET, unstacked, CORRUPTED, "blocks_0_attention", value, where)
    change, way = np.float64(logits[2 + LAST, -1] - start), np.float64(end - start)
    close(shares["blocks_0_attention_output"][2 + LAST], change @ way / (way @ way))


# Gradients


@pytest.mark.parametrize("layer", ["embed", "blocks_0_mlp"])
def test_the_saliency_gradient_agrees_with_differences(layer: str, unstacked: pt.ParamTree) -> None:
    found = jax.jit(partial(example.saliency, NET, layer=layer))(unstacked, CLEAN, 7)
    assert found.shape == (LENGTH, 16)
    value = pt.capture(NET, layer)(unstacked, CLEAN[None])[1][layer.replace("_", "/")].output
    first = 0 if layer == "embed" else 1
    if layer == "embed":
        close(value[0], unstacked.embed.weight[CLEAN])

    def log_probability(change: Any) -> float:
        logits = np.float64(rest(unstacked, value + jnp.float32(change)[None], first)[0, -1])
        return logits[7] - np.log(np.exp(logits).sum())

    rng, eps = np.random.default_rng(0), 1e-3
    for direction in rng.normal(size=(3, LENGTH, 16)):
        difference = (log_probability(eps * direction) - log_probability(-eps * direction)) / (2 * eps)
        np.testing.assert_allclose(np.sum(found * direction), difference, rtol=0.02, atol=1e-3)


def test_the_saliency_is_the_same_in_stacks(params: pt.ParamTree, unstacked: pt.ParamTree) -> None:
    gradient = jax.jit(partial(example.saliency, NET))
    close(gradient(params, CLEAN, 7), gradient(unstacked, CLEAN, 7))


# Attention


def test_attention_maps_are_those_of_the_layer(params: pt.ParamTree) -> None:
    heads, texts = SETTINGS.heads, TOKENS[:3]
    maps = example.attention_maps(NET, params, texts, heads)
    assert maps.shape == (2, 3, heads, 16, 16)
    close(maps.sum(-1), np.ones((2, 3, heads, 16)))
    assert (np.triu(maps, 1) == 0).all() and (np.asarray(maps) >= 0).all()
    assert maps[..., -1, :].max() > 0.2  # uneven, as even ones would hide errors
    _, captured = pt.capture(NET, "blocks_attention_attend_(value|out)", inputs=True)(params, texts)
    attend = captured.blocks.attention.attend
    value = attend.value.output.reshape(2, 3, 16, heads, -1)
    mixed = np.einsum("nbhqk,nbkhd->nbqhd", maps, value).reshape(2, 3, 16, 16)
    np.testing.assert_allclose(mixed, attend.out.input, atol=1e-5)


def test_plots_have_the_names_of_rows_and_columns() -> None:
    figure = example.draw({"a": np.eye(3), "b": np.ones((3, 3))}, "xyz", ["$", "\\n", ""])
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y", "z"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["$", "\\n", ""]


# The program


@pytest.mark.slow
def test_the_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "run.safetensors"
    char_lm.main([*TINY[:-2], "--sample", "0", "--seed", "3", "--checkpoint", str(saved)])
    capsys.readouterr()
    result = example.main([*TINY, "--seed", "3", "--plots", str(tmp_path)])
    printed = capsys.readouterr().out
    assert {path.stem for path in tmp_path.glob("*.png")} == {"activations", "restored", "attention"}
    for title in ("Activations", "How far the word has come", "How much of 'def", "Saliency for "):
        assert f"\n{title}" in printed
    assert "\nblock1_head1 " in printed and "block2" not in printed

    length = len(example.PROMPT)
    params = char_lm.load_run(saved, 0.03).params
    names = list(result.statistics)
    assert len(names) == 9 and list(result.probe.accuracy) == list(result.restored) == names
    text = char_lm.load_data().validation[: 200 * 16].reshape(200, 16)
    _, activations = pt.capture(NET, "embed")(params, text)
    close(result.statistics["embed_output"], example.statistics(activations)["embed_output"])
    assert 0 < result.probe.majority < 1
    assert all(0 <= accuracy <= 1 for accuracy in result.probe.accuracy.values())
    assert result.probe.accuracy["embed_output"] > result.probe.majority + 0.02
    assert all(share.shape == (1 + length,) for share in result.restored.values())
    close(result.restored["blocks_1_mlp_output"][0], 1, atol=1e-3)
    assert result.saliency.shape == (length,) and (result.saliency > 0).all()
    assert result.maps.shape == (2, 2, length, length)
    prompt = char_lm.encode(example.PROMPT)[None]
    close(result.maps, example.attention_maps(NET, params, prompt, 2)[:, 0])

    again = example.main([*TINY, "--base", str(saved), "--pattern", "embed"])
    assert list(again.restored) == ["embed_output"]
    close(again.statistics["embed_output"], result.statistics["embed_output"])
    close(again.maps, result.maps)


@pytest.mark.slow
def test_options_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(args: list[str], message: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            example.main([*TINY, "--steps", "0", *args])
        printed = " ".join(capsys.readouterr().err.split())
        assert re.search(message, printed), printed

    fails(["--prompt", "self", "--corrupted", "sel"], "should differ from --prompt in one character")
    fails(["--prompt", "self", "--corrupted", "sale"], "should differ from --prompt in one character")
    fails(["--prompt", "self", "--corrupted", "self"], "should differ from --prompt in one character")
    fails(["--plots", str(tmp_path / "no")], "--plots: there is no folder .*no")
    fails(["--base", str(tmp_path / "none.npz")], r"No such file .*none\.npz")
    fails(["--heads", "3"], "cannot divide 16 units into 3 heads")
    fails(["--pattern", "blocks_mlp"], "'blocks_mlp' matches no name")
