"""LoRA: adapts a language model to new text by low-rank updates of some of its weights.

A weight (out, in) becomes ``weight + scale * b @ a``, with ``a`` of (rank, in) and ``b`` of (out,
rank); only ``a`` and ``b`` are trained, and ``b`` starts at zero. Hu et al., "LoRA: low-rank adaptation
of large language models", 2021.

The model does not change. The adapters are a separate tree with one level for each weight that a
pattern selects. ``fold`` adds their products to the weights, and the loss is differentiated through it
by the adapters alone, so gradients, optimiser state and file hold only adapters. Weights stacked by
``nn.Repeat``, (n, out, in), get stacked adapters.

Run it with ``python -m examples.lora``; it needs optax. It trains ``char_lm`` on Python code, or
loads its checkpoint, and adapts it to prose: Python's help texts. ``--help`` lists the options.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from examples import char_lm

SCALE = 2.0  # the factor of the products


class Result(NamedTuple):
    """Losses on prose before and after, both file sizes, and the largest difference of logits."""

    before: float
    after: float
    model_bytes: int
    adapter_bytes: int
    difference: float


def init_adapters(params: Any, pattern: str, rank: int, key: jax.Array) -> pt.ParamTree:
    """Returns adapters for the weights that match: one level each, with leaves ``a`` and ``b``.

    Raises:
      RuleError: the pattern matches nothing.
      ValueError: the pattern matches a vector or a scalar.
    """
    adapters = {}
    for name, weight in pt.collect(pt.select(params, pattern)).items():
        if weight.ndim < 2:
            raise ValueError(f"`{name}` has shape {weight.shape}; adapters are for (..., out, in).")
        *copies, size_out, size_in = weight.shape
        key, a_key = jax.random.split(key)
        a = jax.random.normal(a_key, (*copies, rank, size_in), weight.dtype) / math.sqrt(size_in)
        adapters[name] = {"a": a, "b": jnp.zeros((*copies, size_out, rank), weight.dtype)}
    return pt.from_tree(adapters)


def fold(params: Any, adapters: pt.ParamTree) -> Any:
    """Returns the parameters with the adapters' products added; other leaves are the same arrays."""
    weights = pt.collect(params)
    return pt.replace(
        params, {name: weights[name] + SCALE * (ab.b @ ab.a) for name, ab in adapters.items()}
    )


@partial(jax.jit, static_argnames=("net", "lr"), donate_argnames=("adapters", "state"))
def train_step(
    net: Any, lr: float, adapters: Any, state: Any, params: Any, tokens: Any
) -> tuple[Any, Any, Any]:
    """Returns the updated adapters and optimiser state, and the loss before the update."""

    def loss(adapters: Any) -> Any:
        return char_lm.loss_and_accuracy(net, fold(params, adapters), tokens)[0]

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = char_lm.make_tx(lr).update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains or loads a model, adapts it, saves the adapters, and folds them in."""
    parser = argparse.ArgumentParser(description="Adapts a language model of Python code to prose.")
    char_lm.add_options(parser, steps=300)
    parser.add_argument("--base", type=Path, metavar="FILE", help="a checkpoint of examples.char_lm")
    parser.add_argument("--adapt-steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--pattern", default=r".*(query|value|widen|narrow)_weight")
    parser.add_argument("--adapters", type=Path, metavar="FILE", help="where to save the adapters")
    parser.add_argument("--sample", type=int, default=120, help="how many characters to write")
    args = parser.parse_args(argv)
    size, context = args.batch_size, args.context
    prose = char_lm.encode("\n".join(topics[name] for name in sorted(topics)))
    text, held_out = prose[: len(prose) * 9 // 10], prose[len(prose) * 9 // 10 :]
    try:
        if args.base:
            base = char_lm.load_run(args.base, args.lr)
        else:
            base, _ = char_lm.train(char_lm.new_run(args, tie=1), char_lm.load_data(), args)
        params, net = base.params, char_lm.network(base.settings)
        adapters = init_adapters(params, args.pattern, args.rank, jax.random.key(args.seed))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    before, _ = char_lm.evaluate(net, params, held_out, size, context)
    state = char_lm.make_tx(args.lr).init(adapters)
    for i in range(args.adapt_steps):
        tokens = char_lm.batch_at(text, i, size, context, args.seed)
        adapters, state, _ = train_step(net, args.lr, adapters, state, params, tokens)

    with tempfile.TemporaryDirectory() as folder:
        file, model = args.adapters or Path(folder, "adapters.safetensors"), Path(folder, "model.npz")
        pt.save(file, adapters)
        pt.save(model, params)
        folded = fold(params, pt.load(file))  # as a user with the base model would
        sizes = model.stat().st_size, file.stat().st_size
    adapted = jax.jit(lambda params, adapters, x: net(fold(params, adapters), x))
    x = char_lm.batch_at(held_out, 0, size, context, args.seed)[:, :-1]
    difference = np.abs(adapted(params, adapters, x) - jax.jit(net)(folded, x)).max().item()
    after, _ = char_lm.evaluate(net, folded, held_out, size, context)
    result = Result(before, after, *sizes, difference)
    print(f"{pt.count(adapters):,} of {pt.count(params):,} parameters, in {', '.join(adapters)}")
    print(f"loss on prose: {result.before:.3f} before, {result.after:.3f} with the adapters")
    print(f"file sizes: {sizes[0]:,} bytes for the model, {sizes[1]:,} for the adapters")
    print(f"logits of folded and adapted weights differ by at most {difference:.1e}")
    if args.sample:
        print(f"\n{char_lm.continued(base.settings, folded, 'The ', args.sample, args.seed)}")
    return result


if __name__ == "__main__":
    main()
