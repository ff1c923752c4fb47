"""Sequence to sequence: an encoder and a decoder that put the spaces back between words.

``theuserpreferred`` becomes ``the user preferred``. The phrases are three words in a row from comments
and docstrings of Python's standard library. Every tenth file is held out, and so is every phrase of it
that the others have too. In 1000 steps, about a minute on two cores, greedy decoding writes more than
75 % of 1000 such phrases without a mistake; one in nine has a word that is new to it.

Both halves are transformers (Vaswani et al., "Attention is all you need", 2017), with rotary positions.
The decoder attends to what it has written, which it caches as state, and to what the encoder makes of
the letters. Phrases differ in length: a mask keeps attention off the padding of the source, and the
loss does not count that of the target. In training the decoder reads the right text up to each place.

Run it with ``python -m examples.seq2seq``; it needs optax. ``--help`` lists the options.
"""

import argparse
import re
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

ALPHABET = "_<> abcdefghijklmnopqrstuvwxyz"  # padding, the ends of a phrase, and what it is made of
PAD, BEGIN = 0, 1
LENGTH = 24  # characters of a phrase, at most
RULES = {".*weight": init.Normal(0.05)}
TIES = {"decoder/embed": "encoder/embed", "decoder/head/weight": "encoder/embed/weight"}


class Data(NamedTuple):
    """Phrases for training, and others to test with."""

    train: list[str]
    test: list[str]


class Result(NamedTuple):
    """The share of phrases without a mistake, and pairs of what was written and what is right."""

    accuracy: float
    pairs: list[tuple[str, str]]


# The data


def load_data() -> Data:
    """Returns the phrases of the standard library, three words each; no phrase is in both parts."""
    train, test = dict[str, None](), dict[str, None]()  # sets that keep their order
    for i, file in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        found = test if i % 10 == 9 else train
        for run in re.findall(r"\b[a-z]+(?: [a-z]+){2,}\b", file.read_text("utf-8", "replace")):
            words = run.split()
            phrases = (" ".join(words[i : i + 3]) for i in range(len(words) - 2))
            found.update((phrase, None) for phrase in phrases if len(phrase) <= LENGTH)
    return Data(list(train), [phrase for phrase in test if phrase not in train])


def encode(texts: Sequence[str], length: int) -> Any:
    """Returns tokens, (texts, length), padded at the end."""
    rows = [[ALPHABET.index(c) for c in text.ljust(length, ALPHABET[PAD])] for text in texts]
    return np.array(rows, np.int32)


def decode(tokens: Any) -> str:
    """Returns the text up to the end of the phrase."""
    return "".join(ALPHABET[token] for token in tokens).split(">")[0]


def batch_of(phrases: Sequence[str]) -> tuple[Any, Any]:
    """Returns the letters of phrases, (batch, LENGTH), and phrases with ends, (batch, LENGTH + 2)."""
    letters = [phrase.replace(" ", "") for phrase in phrases]
    return encode(letters, LENGTH), encode([f"<{phrase}>" for phrase in phrases], LENGTH + 2)


# The model


class DecoderBlock(nn.Layer):
    """Attends to its own sequence and to the encoder's, with a feed-forward layer after both."""

    heads: int
    cache: int = 0

    def __call__(self, p: Any, x: Any, memory: Any, padding_mask: Any, positions: Any) -> Any:
        own = nn.MultiHeadAttention(self.heads, causal=True, rotary=True, cache=self.cache)
        cross = nn.MultiHeadAttention(self.heads, rotary=True)
        x = x + own(p.own, nn.RMSNorm()(p.own_norm, x))
        normed = nn.RMSNorm()(p.cross_norm, x)
        x = x + cross(p.cross, normed, memory, padding_mask=padding_mask, positions=positions)
        return x + nn.GatedMLP(2 * x.shape[-1])(p.mlp, nn.RMSNorm()(p.mlp_norm, x))


class Seq2Seq(nn.Layer):
    """Called with the letters and the phrases up to each place; returns logits of what comes next."""

    width: int = 96
    encoder_layers: int = 3
    decoder_layers: int = 1
    heads: int = 4

    @property
    def encoder(self) -> nn.Sequential:
        """Returns the memory of (batch, length) tokens: (batch, length, width)."""
        block = nn.Sequential(
            nn.Residual(norm=nn.RMSNorm(), attend=nn.MultiHeadAttention(self.heads, rotary=True)),
            nn.Residual(norm=nn.RMSNorm(), mlp=nn.GatedMLP(2 * self.width)),
        )
        embed = nn.Embedding(len(ALPHABET), self.width)
        return nn.Sequential(
            embed=embed, blocks=nn.Repeat(block, self.encoder_layers), norm=nn.RMSNorm()
        )

    def decoder(self, cache: int = 0) -> nn.Sequential:
        """Returns the logits after each of (batch, length) tokens, which attend to a memory."""
        return nn.Sequential(
            embed=nn.Embedding(len(ALPHABET), self.width),
            blocks=nn.Repeat(DecoderBlock(self.heads, cache), self.decoder_layers),
            norm=nn.RMSNorm(),
            head=nn.Dense(len(ALPHABET), use_bias=False, flatten=False),
        )

    def __call__(self, p: Any, source: Any, target: Any) -> Any:
        mask = source != PAD
        memory = self.encoder(p.encoder, source, padding_mask=mask)
        positions = jnp.arange(target.shape[1])
        how = {"memory": memory, "padding_mask": mask, "positions": positions}
        return self.decoder()(p.decoder, target, **how)


@partial(jax.jit, static_argnames="net")
def translate(net: Seq2Seq, params: Any, source: Any) -> Any:
    """Returns the likeliest token at each place, (batch, LENGTH + 1), with a cache of those before."""
    mask = source != PAD
    memory = net.encoder(params.encoder, source, padding_mask=mask)
    decoder = net.decoder(cache=LENGTH + 1)
    begin = jnp.full((len(source), 1), BEGIN, jnp.int32)
    how = {"memory": memory, "padding_mask": mask}
    tree = pt.init(decoder, jax.random.key(0), begin, **how, positions=jnp.arange(1))
    tree = pt.replace(tree, params.decoder)

    def step(carry: Any, i: Any) -> Any:
        tree, token = carry
        logits, tree = pt.decoding(decoder)(tree, token, **how, positions=i[None])
        token = logits.argmax(-1).astype(jnp.int32)
        return (tree, token), token[:, 0]

    _, tokens = jax.lax.scan(step, (tree, begin), jnp.arange(LENGTH + 1))
    return tokens.swapaxes(0, 1)


# Training


def make_tx(lr: float, steps: int) -> Any:
    """Returns AdamW on a cosine schedule."""
    schedule = optax.warmup_cosine_decay_schedule(0, lr, min(100, steps // 2), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))


def loss_fn(params: Any, net: Seq2Seq, source: Any, target: Any) -> Any:
    """Returns the mean cross-entropy of the tokens that are not padding."""
    logits, labels = net(params, source, target[:, :-1]), target[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(where=labels != PAD)


@partial(jax.jit, static_argnames=("net", "lr", "steps"), donate_argnames=("params", "state"))
def train_step(net: Seq2Seq, lr: float, steps: int, params: Any, state: Any, *batch: Any) -> Any:
    """Returns the updated parameters and optimiser state, and the loss before the update."""
    loss, grads = jax.value_and_grad(loss_fn)(params, net, *batch)
    updates, state = make_tx(lr, steps).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains on most phrases, and writes others."""
    parser = argparse.ArgumentParser(description="Learns to put spaces between words.")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--encoder-layers", type=int, default=3)
    parser.add_argument("--decoder-layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    net, data = Seq2Seq(args.width, args.encoder_layers, args.decoder_layers, args.heads), load_data()
    rng = np.random.default_rng(args.seed)
    test = rng.permutation(data.test)[:1000].tolist()
    try:
        params = pt.init(net, jax.random.key(args.seed), *batch_of(test[:1]), rules=RULES, ties=TIES)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(data.train):,} phrases, {len(test):,} to test; {pt.count(params):,} parameters")

    state = make_tx(args.lr, args.steps).init(params)
    for i in range(1, args.steps + 1):
        batch = batch_of([data.train[j] for j in rng.integers(len(data.train), size=args.batch_size)])
        params, state, loss = train_step(net, args.lr, args.steps, params, state, *batch)
        if i % 100 == 0 or i == args.steps:
            print(f"step {i:5}  loss {loss:.4f}", flush=True)

    written = [decode(row) for row in np.asarray(translate(net, params, batch_of(test)[0]))]
    pairs = list(zip(written, test, strict=True))
    accuracy = np.mean([one == other for one, other in pairs]).item()
    for one, other in pairs[:10]:
        print(f"{other.replace(' ', ''):24} {one}{'' if one == other else f'   (not: {other})'}")
    print(f"{accuracy:.1%} of {len(test)} phrases without a mistake")
    return Result(accuracy, pairs)


if __name__ == "__main__":
    main()
