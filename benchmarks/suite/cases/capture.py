"""Every activation of a small GPT, by ``pt.capture`` and by a program by hand that returns the same."""

from typing import Any

from benchmarks.suite.case import Bound, Case
from benchmarks.suite.cases import mlp, training

HAND = training.HAND


def by_hand(p: Any, tokens: Any, heads: int) -> Any:
    """Returns the logits and all activations of the GPT of ``training``, as a dict of flat names."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from paramtree.nn.attention import rotate

    def norm(p: Any, x: Any) -> Any:
        square = jnp.mean(lax.square(x), -1, keepdims=True)
        return x * lax.rsqrt(square + 1e-6) * p["gamma"][None, None]

    def block(x: Any, p: Any) -> Any:
        first, second = p["attention"], p["mlp"]
        size = (*x.shape[:2], heads, x.shape[2] // heads)
        acts = {"attention_norm": norm(first["norm"], x)}
        for name in ("query", "key", "value"):
            weight = first["attend"][name]["weight"]
            acts[f"attention_attend_{name}"] = jnp.inner(acts["attention_norm"], weight)
        query, key, value = (
            acts[f"attention_attend_{name}"].reshape(size) for name in ("query", "key", "value")
        )
        positions = jnp.arange(x.shape[1])
        y = jax.nn.dot_product_attention(
            rotate(query, positions), rotate(key, positions), value, is_causal=True
        )
        y = jnp.inner(y.reshape(x.shape), first["attend"]["out"]["weight"])
        acts |= {"attention_attend_out": y, "attention_attend": y}
        acts["attention"] = x = x + y
        acts["mlp_norm"] = norm(second["norm"], x)
        acts["mlp_widen"] = jax.nn.gelu(
            training.dense(second["widen"], acts["mlp_norm"]), approximate=False
        )
        acts["mlp_narrow"] = training.dense(second["narrow"], acts["mlp_widen"])
        acts["mlp"] = x = x + acts["mlp_narrow"]
        return x, {**acts, "": x}

    x = embedded = jnp.take(p["embed"]["weight"], tokens, axis=0)
    x, acts = lax.scan(block, x, p["blocks"])
    found = {f"blocks_{name}_output".replace("__", "_"): value for name, value in acts.items()}
    found["blocks_output1"], found["blocks_output"] = found["blocks_output"], x
    found["norm_output"] = norm(p["norm"], x)
    logits = found["norm_output"] @ p["embed"]["weight"].T
    return logits, {**found, "embed_output": embedded, "decoder_output": logits, "output": logits}


def over_hand(size: str) -> dict[str, Any]:
    import functools

    import jax
    import numpy as np

    import paramtree as pt

    program, values = training.written(size)
    params = pt.init(program.net, jax.random.key(0), program.x, ties=program.ties)
    capture = jax.jit(pt.capture(program.net))
    hand = jax.jit(functools.partial(by_hand, heads=2 if "tiny" in size else 4))
    _, acts = capture(params, program.x)
    _, expected = hand(values, program.x)
    named = pt.collect(acts)
    assert set(named) == set(expected), set(named) ^ set(expected)
    for name, value in named.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    ours = {"capture": lambda: jax.block_until_ready(capture(params, program.x))}
    return mlp.over(ours, {HAND: {"capture": lambda: jax.block_until_ready(hand(values, program.x))}})


CASES = [
    Case(
        name="capture",
        title="All activations of a model, over the same by hand, in one process",
        sizes=("GPT",),
        contenders={"paramtree": over_hand},
        bounds=(Bound(f"capture, of {HAND}", None, 1.05),),
        unit="x",
        size="",
        rounds=3,
        turns=1,
        seconds=50,
        smoke=("GPT, tiny",),
        cached=True,
        note=(
            "The outputs of all 16 layers of the GPT of the training steps, those in its blocks "
            "stacked. By hand: a function of nested dicts that returns a dict, first checked to give "
            "the same names and values."
        ),
    ),
]
