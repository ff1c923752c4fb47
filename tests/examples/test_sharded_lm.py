"""The sharded language model: the same numbers on one device and on eight, with every table."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import char_lm, sharded_lm

pytestmark = pytest.mark.slow

SETTINGS = char_lm.Settings(width=32, layers=2, heads=8)
LR = 0.01


@pytest.fixture(autouse=True)
def lenient_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an int32 count
        yield


@functools.cache
def where(table: str, devices: int) -> sharded_lm.Sharded:
    return sharded_lm.sharded(SETTINGS, sharded_lm.TABLES[table], LR, jax.devices()[:devices])


def batches(steps: int) -> Any:
    return np.random.default_rng(0).integers(0, char_lm.CHARACTERS, (steps, 16, 17), np.int32)


def loss_and_gradients(one: sharded_lm.Sharded) -> Any:
    params, _ = sharded_lm.begin(one, LR, seed=3)

    def loss(params: Any, tokens: Any) -> Any:
        return char_lm.loss_and_accuracy(one.net, params, tokens)[0]

    both = jax.jit(jax.value_and_grad(loss), out_shardings=(None, one.params))
    return both(params, sharded_lm.put_batch(one, batches(1)[0]))


@functools.cache
def alone() -> Any:
    return loss_and_gradients(where("data", 1))


@pytest.mark.parametrize("table", sharded_lm.TABLES)
def test_losses_and_gradients_are_those_of_one_device(table: str) -> None:
    loss, grads = loss_and_gradients(where(table, 8))
    expected_loss, expected = alone()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (name, leaf), other in zip(pt.collect(grads).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-5 * float(jnp.abs(other).max()), err_msg=name)
    assert grads.decoder.weight is grads.embed.weight


@pytest.mark.parametrize("table", sharded_lm.TABLES)
def test_steps_keep_everything_in_its_place(table: str) -> None:
    one = where(table, 8)
    params, state = sharded_lm.begin(one, LR, seed=3)
    step = sharded_lm.make_step(one, LR)
    losses = []
    for tokens in batches(3):
        params, state, loss = step(params, state, sharded_lm.put_batch(one, tokens))
        losses.append(float(loss))
    assert step._cache_size() == 1
    for tree, places in ((params, one.params), (state, one.state)):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
        assert all(leaf.sharding.is_equivalent_to(place, leaf.ndim) for leaf, place in pairs)
    first = where("data", 1)
    params, state = sharded_lm.begin(first, LR, seed=3)
    step = sharded_lm.make_step(first, LR)
    for tokens, found in zip(batches(3), losses, strict=True):
        params, state, loss = step(params, state, sharded_lm.put_batch(first, tokens))
        np.testing.assert_allclose(found, float(loss), rtol=2e-4)


def gathered(table: str) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Returns the collectives of a step and the shapes of its all-gathers."""
    from paramtree.inspect.compiled import collectives

    one = where(table, 8)
    shapes = pt.abstract(one.net, char_lm.ONE, ties=char_lm.TIES)
    state = jax.eval_shape(char_lm.make_tx(LR).init, shapes)
    tokens = jax.ShapeDtypeStruct((16, 17), jnp.int32)
    text: Any = sharded_lm.make_step(one, LR).lower(shapes, state, tokens).compile().as_text()
    found = re.findall(r"= \(?\w+\[([\d,]*)\].*? all-gather(?:-start)?\(", text)
    return collectives(text), [tuple(int(n) for n in shape.split(",") if n) for shape in found]


def weights() -> set[tuple[int, ...]]:
    """Returns the shapes of unsharded weights, without the layer axis, and their transposes."""
    shapes = pt.abstract(where("data", 1).net, char_lm.ONE)
    whole = {leaf.shape[-2:] for leaf in jax.tree.leaves(pt.select(shapes, ".*weight"))}
    return whole | {shape[::-1] for shape in whole}


def test_a_step_exchanges_what_it_should() -> None:
    data, _ = gathered("data")
    assert list(data) == ["all-reduce"]
    # Two sums per layer forward, after attention and MLP, and two backward; the embedding, the softmax,
    # and the gradient norm. No device ever gathers a weight, or anything else.
    tensor, found = gathered("tensor")
    assert list(tensor) == ["all-reduce"] and found == []
    assert tensor["all-reduce"]["runs"] >= 4 * SETTINGS.layers
    # A layer's weights are gathered when it needs them, never those of all layers at once.
    fsdp, found = gathered("fsdp")
    assert set(fsdp) == {"all-gather", "all-reduce"}
    assert found and all(shape[-2:] in weights() for shape in found)
    assert not [shape for shape in found if len(shape) == 3 and shape[0] == SETTINGS.layers > 1]
    both, found = gathered("both")
    assert {"all-gather", "all-reduce"} <= set(both)
    assert not [shape for shape in found if shape in weights() and np.prod(shape) > 32 * 32]


def test_it_trains_and_says_how_it_is_divided(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--width", "32", "--layers", "1", "--steps", "6", "--every", "3", "--lr", "0.02"]
    losses = sharded_lm.main([*options, "--table", "both", "--batch-size", "16", "--context", "16"])
    text = capsys.readouterr().out
    assert "both: {'data': 2, 'model': 4}" in text and losses[-1] < losses[0]
    assert re.search(r"embed_weight +\(96, 32\) +float32 +P\('model', 'data'\) +1.5 KiB", text)
    assert "decoder_weight" not in text  # one leaf, sharded once
    with pytest.raises(SystemExit):
        sharded_lm.main(["--width", "36", "--heads", "3"])
    assert "is not a multiple of 8" in capsys.readouterr().err
