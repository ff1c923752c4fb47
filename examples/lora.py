"""LoRA: adapts a language model to new text by low-rank updates of some of its weights.

A weight (out, in) becomes ``base + (alpha / rank) b @ a``, with ``a`` of (rank, in) and ``b`` of (out,
rank). Hu et al., "LoRA: low-rank adaptation of large language models", 2021.

The model does not change. One rule table says which weights are read through ``LoRA``, and that all
other parameters are frozen. So the parameters that are left to train are the adapters, and gradients,
optimiser state and file hold nothing else. ``pt.fold`` gives the plain model's parameters back.

Run it with ``python -m examples.lora``; it needs optax. It trains ``char_lm`` on Python code, or
loads its checkpoint, and adapts it to prose: Python's help texts. ``--help`` lists the options.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from examples import char_lm
from paramtree.parametrizations import Frozen, LoRA


class Result(NamedTuple):
    """Losses on prose before and after, both file sizes, and the largest difference of logits."""

    before: float
    after: float
    model_bytes: int
    adapter_bytes: int
    difference: float


def rules_for(pattern: str, rank: int) -> dict[str, Any]:
    """Returns the rules that adapt the matching weights and freeze all else."""
    return {pattern: LoRA(rank, alpha=2 * rank), ".*": Frozen()}


@partial(jax.jit, static_argnames=("net", "lr"), donate_argnames=("adapters", "state"))
def train_step(
    net: Any, lr: float, adapters: Any, state: Any, frozen: Any, tokens: Any
) -> tuple[Any, Any, Any]:
    """Returns the updated adapters and optimiser state, and the loss before the update."""

    def loss(adapters: Any) -> Any:
        return char_lm.loss_and_accuracy(net, pt.merge(adapters, frozen), tokens)[0]

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
        rules = rules_for(args.pattern, args.rank)
        expanded = pt.expand(params, rules, jax.random.key(args.seed))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    before, _ = char_lm.evaluate(net, params, held_out, size, context)
    lora = pt.reparametrize(net, rules)
    adapters, frozen = pt.partition(expanded, kind="param")
    state = char_lm.make_tx(args.lr).init(adapters)
    for i in range(args.adapt_steps):
        tokens = char_lm.batch_at(text, i, size, context, args.seed)
        adapters, state, _ = train_step(lora, args.lr, adapters, state, frozen, tokens)

    with tempfile.TemporaryDirectory() as folder:
        file, model = args.adapters or Path(folder, "adapters.safetensors"), Path(folder, "model.npz")
        pt.save(file, adapters)
        pt.save(model, params)
        # As a user with the base model would
        expanded = pt.merge(pt.load(file, like=adapters), frozen)
        sizes = model.stat().st_size, file.stat().st_size
    folded = pt.fold(expanded, rules)
    x = char_lm.batch_at(held_out, 0, size, context, args.seed)[:, :-1]
    difference = np.abs(jax.jit(lora)(expanded, x) - jax.jit(net)(folded, x)).max().item()
    after, _ = char_lm.evaluate(net, folded, held_out, size, context)
    result = Result(before, after, *sizes, difference)
    names = [name.removesuffix("_a") for name in pt.collect(adapters, ".*_a")]
    print(f"{pt.count(adapters):,} of {pt.count(params):,} parameters, in {', '.join(names)}")
    print(f"loss on prose: {result.before:.3f} before, {result.after:.3f} with the adapters")
    print(f"file sizes: {sizes[0]:,} bytes for the model, {sizes[1]:,} for the adapters")
    print(f"logits of folded and adapted weights differ by at most {difference:.1e}")
    if args.sample:
        print(f"\n{char_lm.continued(base.settings, folded, 'The ', args.sample, args.seed)}")
    return result


if __name__ == "__main__":
    main()
