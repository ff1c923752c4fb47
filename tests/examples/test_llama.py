"""The Llama example: its parts, what sampling may draw, the cache, and the figure it states."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import llama as example
from tests.helpers import lenient

pytestmark = pytest.mark.slow

TINY = example.Settings(width=16, layers=2, heads=4, kv_heads=2, hidden=24)
NET = example.llama(TINY)


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(example):
        yield


@pytest.fixture(scope="module")
def params() -> pt.ParamTree:
    params = example.init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda leaf: 5 * leaf, params)  # far from uniform, so no two logits are equal


@pytest.mark.figures
def test_it_reaches_its_figure(capsys: pytest.CaptureFixture[str]) -> None:
    stated = re.search(r"falls below ([\d.]+) nats", example.__doc__)
    result = example.main([])
    assert result.loss < float(stated.group(1))
    assert result.agreeing == 200
    assert result.text.startswith("def ") and len(result.text) == 204
    printed = capsys.readouterr().out
    assert "200 of 200 greedy tokens are the same" in printed and result.text in printed


def test_a_short_run_is_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--width",
        "16",
        "--heads",
        "4",
        "--hidden",
        "24",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--context",
        "16",
        "--length",
        "8",
    ]
    one, again, other = (example.main([*args, "--seed", seed]) for seed in ("0", "0", "1"))
    assert one == again != other
    assert len(one.text) == len("def ") + 8
    assert re.search(r"step +3  loss 4\.\d{3}  validation 4\.\d{3}\n", capsys.readouterr().out)


def test_queries_share_keys_and_the_head_is_the_embedding(params: pt.ParamTree) -> None:
    attend = params.blocks.attention.attend
    assert attend.query.weight.shape == (2, 16, 16) and attend.key.weight.shape == (2, 8, 16)
    assert params.head.weight is params.embed.weight
    untied = example.init_params(TINY._replace(tie=False), jax.random.key(0))
    assert pt.count(untied) - pt.count(params) == example.CHARACTERS * 16
    assert not any("bias" in name for name in pt.collect(params))


def test_only_matrices_decay(params: pt.ParamTree) -> None:
    tx = example.make_tx(1e-3, 10)
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # the first step's rate is 0
        updates, state = tx.update(zeros, state, params)
    moved = {name for name, leaf in pt.collect(updates).items() if np.any(leaf)}
    assert moved == set(pt.collect(params, ".*weight")) != set(pt.collect(params))


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        ({}, [0, 1, 2, 3]),
        ({"temperature": 0}, [2]),
        ({"top_k": 1}, [2]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_p": 0.55}, [0, 2]),  # 0.5 is less
        ({"top_p": 0.45}, [2]),
        ({"top_p": 1e-6}, [2]),
        ({"top_p": 0.89}, [0, 2, 3]),
        ({"top_k": 3, "top_p": 0.89}, [0, 2]),  # of these three the two have 0.895
        ({"temperature": 2.0, "top_p": 0.45}, [0, 2]),  # the likeliest has 0.39 of flatter ones
    ],
)
def test_what_is_drawn(how: dict[str, float], allowed: list[int]) -> None:
    probabilities = np.float32([0.35, 0.05, 0.5, 0.1])
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.log(probabilities[None]) + 3
    drawn = jax.vmap(lambda key: example.choose(logits, key, **how)[0])(keys)
    expected = np.zeros(4)
    expected[allowed] = probabilities[allowed] ** (1 / (how.get("temperature") or 1))
    shares = np.bincount(drawn, minlength=4) / len(keys)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)
    assert not shares[expected == 0].any()


def test_rows_are_drawn_apart() -> None:
    logits = jnp.log(jnp.asarray([[1e-9, 1, 1e-9], [1, 1e-9, 1e-9]], jnp.float32))
    drawn = example.choose(logits, jax.random.key(0), top_k=2, top_p=0.5)
    assert drawn.dtype == jnp.int32 and drawn.tolist() == [1, 0]


def test_the_cache_changes_no_token(params: pt.ParamTree) -> None:
    prompts = example.batch_at(np.arange(90, dtype=np.int32), 0, 3, 4, 0)
    key = jax.random.key(0)
    cached = example.generate(TINY, params, prompts, key, 20, temperature=0)
    whole = example.generate_without_cache(NET, params, prompts, 20)
    assert cached.shape == (3, 20) and len(set(cached.ravel().tolist())) > 5
    np.testing.assert_array_equal(cached, whole)
    text = jnp.concatenate([prompts, cached], 1)
    np.testing.assert_array_equal(NET(params, text).argmax(-1)[:, 4:-1], cached)


def test_a_seed_gives_one_text(params: pt.ParamTree) -> None:
    prompt, keys = np.int32([[1, 2]]), jax.random.split(jax.random.key(0))
    one, again, other = (
        example.generate(TINY, params, prompt, key, 20, temperature=1.0).tolist()
        for key in (keys[0], keys[0], keys[1])
    )
    assert one == again != other


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--heads", "3"])
    assert "num_kv_heads must divide num_heads" in capsys.readouterr().err
