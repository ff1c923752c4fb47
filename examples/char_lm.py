"""A character-level language model: a small GPT whose decoder is tied to its embedding.

The network predicts the next character at each position. Its blocks are one repeated block, so they
compile as a scan. The decoder and the embedding are both (characters, width), so they are one array
under two names. The model trains on the source of Python's standard library, then writes Python.

Sampling caches the keys and values of earlier characters as state. The network with the cache is a
different layer object, but has the same parameters: layers hold settings, and the tree holds arrays.

Run it with ``python examples/char_lm.py``; it needs optax. ``--help`` lists the options.
"""

import argparse
import sysconfig
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from paramtree import nn

CHARACTERS = 96  # the newline and the 95 printable ASCII characters
FILES, PER_FILE = 150, 25_000  # how many files to read, and the most characters of each
TIES = {"decoder/weight": "embed/weight"}
ONE = np.zeros((1, 1), np.int32)  # a batch of one character; only its shape matters
PROMPT = "def "


class Settings(NamedTuple):
    """The settings that fix a network's parameters; ``tie`` ties the decoder to the embedding."""

    width: int = 96
    layers: int = 2
    heads: int = 4
    tie: int = 1


class Run(NamedTuple):
    """The state of a training run, which a checkpoint holds; the other options are not saved."""

    settings: Settings
    params: Any
    state: Any
    step: int
    seed: int


class Data(NamedTuple):
    """Training and validation characters, each (n,) int32."""

    train: Any
    validation: Any


class Report(NamedTuple):
    """Metrics of the steps since the last report; losses are means in nats per character."""

    step: int
    loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


# The data


def encode(text: str) -> Any:
    """Returns the tokens of a text, (n,) int32; characters without a token are dropped."""
    codes = np.frombuffer(text.expandtabs(4).encode("ascii", "ignore"), np.uint8).astype(np.int32)
    codes = codes[(codes == ord("\n")) | (codes >= ord(" ")) & (codes <= ord("~"))]
    return np.maximum(codes - (ord(" ") - 1), 0)


def decode(tokens: Any) -> str:
    """Returns the text of a sequence of tokens."""
    return "".join(chr(t + ord(" ") - 1) if t else "\n" for t in np.asarray(tokens).tolist())


def load_data(folder: Path | None = None) -> Data:
    """Returns the beginnings of a folder's Python files; every tenth file is for validation.

    Args:
      folder: the folder to read; the standard library by default.

    Raises:
      FileNotFoundError: the folder has fewer than ten Python files.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))[:FILES]
    if len(files) < 10:
        raise FileNotFoundError(f"{folder} should have 10 Python files or more, but has {len(files)}.")
    texts = [encode(file.read_text("utf-8", "replace")[:PER_FILE]) for file in files]
    train = [text for i, text in enumerate(texts) if i % 10 != 9]
    return Data(np.concatenate(train), np.concatenate(texts[9::10]))


def batch_at(text: Any, step: int, size: int, context: int, seed: int) -> Any:
    """Returns slices of a text, (size, context + 1), chosen by step and seed alone."""
    starts = np.random.default_rng((seed, step)).integers(len(text) - context, size=size)
    return text[starts[:, None] + np.arange(context + 1)[None]]


# The network


def network(
    settings: Settings, dropout: float = 0.0, cache: int = 0, between: nn.Lambda | None = None
) -> nn.Sequential:
    """Returns the network, ``(params, tokens) -> logits``: (batch, length) to (..., characters).

    Args:
      settings: the settings that fix the parameters.
      dropout: the dropout rate of each residual branch under ``pt.training``.
      cache: the capacity of the cache for decoding one character at a time; 0 for no cache.
      between: a layer applied to (batch, length, width) before and after each block.
    """
    width, layers, heads, _ = settings
    attend = nn.MultiHeadAttention(heads, use_bias=False, causal=True, rotary=True, cache=cache)
    widen = nn.Dense(4 * width, activation="gelu", flatten=False)
    narrow = nn.Dense(width, flatten=False)
    flow = {} if between is None else {"between": between}
    block = nn.Sequential(
        attention=nn.Residual(norm=nn.RMSNorm(), attend=attend, dropout=nn.Dropout(dropout)),
        mlp=nn.Residual(norm=nn.RMSNorm(), widen=widen, narrow=narrow, dropout=nn.Dropout(dropout)),
        **flow,
    )
    return nn.Sequential(
        embed=nn.Embedding(CHARACTERS, width),
        **flow,
        blocks=nn.Repeat(block, layers),
        norm=nn.RMSNorm(),
        decoder=nn.Dense(CHARACTERS, use_bias=False, flatten=False),
    )


def loss_and_accuracy(net: nn.Sequential, params: Any, tokens: Any, key: Any = None) -> Any:
    """Returns a batch's mean cross-entropy in nats per character, and its accuracy.

    Args:
      net: the network.
      params: its parameters.
      tokens: (batch, length); every token but the first of a row is a target.
      key: a PRNG key for dropout; None for inference.
    """
    x, y = tokens[:, :-1], tokens[:, 1:]
    logits = net(params, x) if key is None else pt.training(net)(params, x, key=key)[0]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == y)


def make_tx(lr: float) -> Any:
    """Returns AdamW with gradient clipping and fifty warm-up steps."""
    adamw = optax.adamw(optax.linear_schedule(0, lr, 50), weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def take_step(
    net: nn.Sequential, lr: float, params: Any, state: Any, tokens: Any, key: Any
) -> tuple[Any, Any, Any]:
    """Returns the updated parameters and optimiser state, and the loss before the update."""
    value_and_grad = jax.value_and_grad(partial(loss_and_accuracy, net), has_aux=True)
    (loss, _), grads = value_and_grad(params, tokens, key)
    updates, state = make_tx(lr).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


# The step donates its parameters and state. Networks with equal settings are equal, so they share one
# compiled step.
train_step = jax.jit(take_step, static_argnames=("net", "lr"), donate_argnames=("params", "state"))
measure = jax.jit(loss_and_accuracy, static_argnames="net")


def evaluate(
    net: nn.Sequential, params: Any, text: Any, size: int, context: int
) -> tuple[float, float]:
    """Returns the mean loss and accuracy over eight fixed batches of a text."""
    batches = [batch_at(text, i, size, context, seed=0) for i in range(8)]
    metrics = jax.device_get([measure(net, params, batch) for batch in batches])
    loss, accuracy = np.mean(metrics, axis=0).tolist()
    return loss, accuracy


# Sampling


def with_cache(net: nn.Sequential, params: pt.ParamTree, batch: int) -> pt.ParamTree:
    """Returns the parameters with an empty cache, as state, in each attention layer.

    Args:
      net: the network, made with ``cache``.
      params: the parameters of the network without a cache.
      batch: how many texts to continue at a time.
    """
    tokens, ties = np.zeros((batch, 1), np.int32), pt.ties(params, sep="/")
    return pt.replace(pt.init(net, jax.random.key(0), tokens, ties=ties), params)


@partial(jax.jit, static_argnames=("settings", "length"))
def sample(
    settings: Settings, params: Any, prompt: Any, key: Any, length: int, temperature: float = 0.8
) -> tuple[Any, Any]:
    """Continues texts by sampling each character from the network's prediction.

    Args:
      settings: the network's settings.
      params: its parameters.
      prompt: the beginnings, (batch, 1 or more).
      key: a PRNG key.
      length: how many characters to draw.
      temperature: the logits are divided by it; lower values favour likely characters.

    Returns:
      The characters, (batch, length), and their logits, (batch, length, characters).
    """
    net = network(settings, cache=prompt.shape[1] + length)
    write = pt.decoding(net)  # the cache is state
    logits, tree = write(with_cache(net, params, len(prompt)), prompt)

    def draw(carry: Any, key: Any) -> Any:
        tree, logits = carry
        token = jax.random.categorical(key, logits / temperature).astype(jnp.int32)
        next_logits, tree = write(tree, token[:, None])
        return (tree, next_logits[:, 0]), (token, logits)

    carry = tree, logits[:, -1]
    _, (tokens, all_logits) = jax.lax.scan(draw, carry, jax.random.split(key, length))
    return tokens.swapaxes(0, 1), all_logits.swapaxes(0, 1)


def continued(settings: Settings, params: Any, prompt: str, length: int, seed: int) -> str:
    """Returns the prompt followed by ``length`` sampled characters."""
    tokens, _ = sample(settings, params, encode(prompt)[None], jax.random.key(seed), length)
    return prompt + decode(tokens[0])


# A run


def new_run(args: argparse.Namespace, tie: int) -> Run:
    """Returns a run at step 0, with a network built from the options."""
    settings = Settings(args.width, args.layers, args.heads, tie)
    ties = TIES if tie else None
    params = pt.init(network(settings), jax.random.key(args.seed), ONE, ties=ties)
    return Run(settings, params, make_tx(args.lr).init(params), 0, args.seed)


def load_run(file: Path, lr: float) -> Run:
    """Returns a saved run.

    Raises:
      OSError: the file does not exist.
      LoadError: the file is not a checkpoint of a run.
    """
    saved = pt.load(file, like={"settings": Settings(0, 0, 0, 0)}, ignore_extra=True)
    settings = saved["settings"]  # they fix all other shapes
    params = pt.abstract(network(settings), ONE, ties=TIES if settings.tie else None)
    state = jax.eval_shape(make_tx(lr).init, params)
    return pt.load(file, like=Run(settings, params, state, 0, 0))


def train(
    run: Run, data: Data, args: argparse.Namespace, file: Path | None = None
) -> tuple[Run, list[Report]]:
    """Continues a run to the last step; reports and saves it every ``args.every`` steps."""
    settings, params, state, done, seed = run
    size, context, every = args.batch_size, args.context, args.every
    net, dropping = network(settings), network(settings, args.dropout)
    drop_key = jax.random.key(seed + 1) if args.dropout else None
    reports: list[Report] = []
    losses: list[Any] = []  # on the device, so that no step waits
    start = time.perf_counter()
    print(f"{'step':>6} {'loss':>8} {'validation':>11} {'accuracy':>9} {'seconds':>8}")
    for i in range(done, args.steps):
        key = None if drop_key is None else jax.random.fold_in(drop_key, i)
        tokens = batch_at(data.train, i, size, context, seed)
        params, state, loss = train_step(dropping, args.lr, params, state, tokens, key)
        losses.append(loss)
        if (i + 1) % every == 0 or i + 1 == args.steps:
            mean = float(np.mean(jax.device_get(losses)))
            metrics = evaluate(net, params, data.validation, size, context)
            reports.append(Report(i + 1, mean, *metrics, time.perf_counter() - start))
            print("{:6} {:8.3f} {:11.3f} {:9.3f} {:8.1f}".format(*reports[-1]), flush=True)
            losses = []
            run = Run(settings, params, state, i + 1, seed)
            if file:
                pt.save(file, run)
    return run, reports


def add_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Adds the options of training."""
    parser.add_argument("--seed", type=int, default=0, help="ignored with --resume")
    parser.add_argument("--steps", type=int, default=steps, help="total, counting resumed steps")
    parser.add_argument("--width", type=int, default=Settings().width)
    parser.add_argument("--layers", type=int, default=Settings().layers)
    parser.add_argument("--heads", type=int, default=Settings().heads)
    parser.add_argument("--context", type=int, default=128, help="characters per training example")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3, help="the learning rate")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--every", type=int, default=100, help="steps per report")


def main(argv: Sequence[str] | None = None) -> dict[int, list[Report]]:
    """Trains and samples; returns each run's reports, keyed by whether the decoder is tied."""
    parser = argparse.ArgumentParser(description="Trains a small GPT on Python's standard library.")
    add_options(parser, steps=1000)
    parser.add_argument("--tie", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compare", action="store_true", help="train both tied and untied")
    parser.add_argument("--sample", type=int, default=120, help="how many characters to write")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="file to write at each report")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to continue from")
    args = parser.parse_args(argv)
    if args.compare and (args.checkpoint or args.resume):
        parser.error("--compare trains two networks, and takes neither --checkpoint nor --resume")
    if args.checkpoint and not args.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint: there is no folder {args.checkpoint.parent}")
    kinds = (1, 0) if args.compare else (int(args.tie),)
    try:
        data = load_data()
        runs = (
            [load_run(args.resume, args.lr)] if args.resume else [new_run(args, tie) for tie in kinds]
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(data.train):,} training characters, {len(data.validation):,} for validation")
    results = {}
    for first in runs:
        count = pt.count(first.params)
        print(f"\n{'tied' if first.settings.tie else 'untied'}: {count:,} parameters")
        run, results[first.settings.tie] = train(first, data, args, args.checkpoint)
        if args.sample:
            print(f"\n{continued(run.settings, run.params, PROMPT, args.sample, run.seed)}")
    return results


if __name__ == "__main__":
    main()
