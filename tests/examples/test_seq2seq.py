"""The sequence example: its data, both kinds of padding, greedy decoding, and the figure it states."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import seq2seq as example
from tests.helpers import lenient

pytestmark = pytest.mark.slow

NET = example.Seq2Seq(width=16, encoder_layers=2, decoder_layers=2, heads=2)
PHRASES = ["the user preferred", "is not a", "that divide keys"]
SOURCE, TARGET = example.batch_of(PHRASES)


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    params = pt.init(NET, jax.random.key(0), SOURCE, TARGET, rules=example.RULES, ties=example.TIES)
    return jax.tree.map(lambda leaf: 4 * leaf, params)  # far from uniform, so no two logits are equal


@pytest.mark.figures
def test_it_reaches_its_figure(capsys: pytest.CaptureFixture[str]) -> None:
    stated = int(re.search(r"more than\s+(\d+) % of 1000", example.__doc__).group(1))
    result = example.main([])
    assert len(result.pairs) == 1000 and result.accuracy > stated / 100
    right = sum(written == phrase for written, phrase in result.pairs)
    assert right == round(1000 * result.accuracy)
    assert f"{right / 10:.1f}% of 1000 phrases without a mistake" in capsys.readouterr().out


def test_a_short_run_is_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--width", "16", "--heads", "2", "--steps", "3", "--batch-size", "4"]
    one, again = (example.main(args) for _ in range(2))
    assert one == again and one.accuracy == 0
    assert re.search(r"step +3  loss 3\.\d{4}\n", capsys.readouterr().out)


def test_phrases_are_three_words_and_the_tested_ones_are_new() -> None:
    data = example.load_data()
    assert len(data.train) > 20_000 and len(data.test) > 1000
    for phrases in data:
        assert len(set(phrases)) == len(phrases)
        assert all(re.fullmatch(r"[a-z]+ [a-z]+ [a-z]+", phrase) for phrase in phrases)
        assert max(map(len, phrases)) == example.LENGTH
    assert not set(data.train) & set(data.test)
    assert data == example.load_data()


def test_texts_are_tokens_and_back() -> None:
    tokens = example.encode(["az b"], 6)
    assert tokens.dtype == np.int32 and tokens.tolist() == [[4, 29, 3, 5, 0, 0]]
    assert example.decode(tokens[0]) == "az b__"
    assert example.decode(np.int32([4, 2, 5])) == "a"
    assert len(set(example.ALPHABET)) == 30
    assert (SOURCE.shape, TARGET.shape) == ((3, 24), (3, 26))
    for phrase, source, target in zip(PHRASES, SOURCE, TARGET, strict=True):
        assert example.decode(source).rstrip("_") == phrase.replace(" ", "")
        assert target[0] == example.BEGIN and example.decode(target[1:]) == phrase
        assert target[len(phrase) + 1] == 2 and not target[len(phrase) + 2 :].any()
        assert (source != example.PAD).sum() == len(phrase) - 2


def test_padding_changes_nothing(params: pt.ParamTree) -> None:
    logits = NET(params, SOURCE, TARGET[:, :-1])
    for i, phrase in enumerate(PHRASES):
        letters, length = len(phrase) - 2, len(phrase) + 2
        alone = NET(params, SOURCE[i : i + 1, :letters], TARGET[i : i + 1, : length - 1])
        np.testing.assert_allclose(logits[i, : length - 1], alone[0], rtol=1e-4, atol=1e-4)
    losses = [
        example.loss_fn(params, NET, SOURCE[i : i + 1, : len(p) - 2], TARGET[i : i + 1, : len(p) + 2])
        for i, p in enumerate(PHRASES)
    ]
    counts = [len(phrase) + 1 for phrase in PHRASES]
    mean = np.dot(losses, counts) / sum(counts)
    np.testing.assert_allclose(example.loss_fn(params, NET, SOURCE, TARGET), mean, rtol=1e-4)


def test_the_decoder_sees_the_letters_and_what_it_has_written_alone(params: pt.ParamTree) -> None:
    logits = NET(params, SOURCE, TARGET)
    later = TARGET.copy()
    later[:, 5:] = 2
    np.testing.assert_allclose(NET(params, SOURCE, later)[:, :5], logits[:, :5], atol=1e-5)
    assert not np.allclose(NET(params, SOURCE, later)[:, 5:], logits[:, 5:], atol=1e-3)
    assert not np.allclose(NET(params, SOURCE[::-1], TARGET)[0], logits[0], atol=1e-3)


def test_greedy_decoding_with_the_cache_is_that_without(params: pt.ParamTree) -> None:
    cached = example.translate(NET, params, SOURCE)
    assert cached.shape == (3, example.LENGTH + 1) and len(set(cached.ravel().tolist())) > 5
    text = jnp.concatenate([jnp.full((3, 1), example.BEGIN, jnp.int32), cached], 1)
    whole = NET(params, SOURCE, text).argmax(-1)
    np.testing.assert_array_equal(whole[:, :-1], cached)


def test_one_table_has_all_letters(params: pt.ParamTree) -> None:
    assert params.decoder.head.weight is params.decoder.embed.weight is params.encoder.embed.weight
    assert pt.count(params, ".*embed_weight") == 30 * 16


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--heads", "7"])
    assert "cannot divide 96 units into 7 heads" in " ".join(capsys.readouterr().err.split())
