"""Looks into a trained language model: what its layers hold, and what its predictions depend on.

The model is ``char_lm``, and does not change: with ``pt.capture`` it also returns the outputs of the
layers that a pattern selects, and with ``pt.intervene`` they are replaced on the way. Each function is
one use of this: ``statistics`` of activations; a linear ``probe`` of what can be read from them (Alain
and Bengio, 2016); activation patching, to see in which layer and where in a text a difference counts,
by the share of it that is ``restored`` (Meng et al., 2022); ``saliency`` by gradients (Simonyan et al.,
2013); and the ``attention_maps`` of all heads.

The blocks are one repeated block, so their parameters and activations are stacks, with an axis of
layers in front. That suits the attention maps, which are computed for all layers at once. To tell
layers apart, the model runs on unstacked parameters, ``pt.unstack(params, "blocks")``: then each has a
name of its own, such as ``blocks_0_mlp``.

Run it with ``python -m examples.activations``; it needs optax, and matplotlib for ``--plots``. It
trains ``char_lm``, or loads its checkpoint. ``--help`` lists the options.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import paramtree as pt
from examples import char_lm
from paramtree import nn

# The values that flow through the halves of the blocks, and what each half adds to them.
LAYERS = r"embed|blocks_\d+_(attention|mlp)(_attend|_narrow)?"
PROMPT, CORRUPTED = "def f(self):\n    return sel", "def f(self):\n    return del"
LONGEST = 7  # positions in a word are counted up to here


class Row(NamedTuple):
    """Statistics of an activation: ``zeros`` is a fraction, and ``largest`` a magnitude."""

    mean: float
    std: float
    zeros: float
    largest: float


class Probe(NamedTuple):
    """Accuracies on held-out texts: of always giving the commonest label, and of each classifier."""

    majority: float
    accuracy: dict[str, float]


class Result(NamedTuple):
    """Findings: saliency (length,), and maps (layers, heads, length, length), are of the prompt.

    The shares that are ``restored``, (1 + length,), are of all positions together, then of each alone.
    """

    statistics: dict[str, Row]
    probe: Probe
    restored: dict[str, Any]
    saliency: Any
    maps: Any


def statistics(activations: pt.ParamTree) -> dict[str, Row]:
    """Returns statistics of activations by name."""
    return {
        name: Row(row["mean"], row["std"], row["zeros"], max(-row["min"], row["max"]))
        for name, row in pt.stats(activations).to_dict().items()
    }


def word_positions(tokens: Any) -> Any:
    """Returns how far the word has come at each token, (n,) int32: 0 outside, at most ``LONGEST``."""
    count, counts = 0, []
    for character in char_lm.decode(tokens):
        count = count + 1 if character.isalnum() or character == "_" else 0
        counts.append(min(count, LONGEST))
    return np.array(counts, np.int32)


def fit(features: Any, labels: Any, classes: int, ridge: float = 1e-4) -> tuple[Any, Any]:
    """Returns a linear classifier's weights, (size, classes), and biases, (classes,).

    It is the ridge regression of one-hot labels, (n,) integers, on features, (n, size), in closed form.
    The penalty ``ridge`` is relative to the mean variance of the features.
    """
    targets = jax.nn.one_hot(labels, classes)
    center, rates = features.mean(0), targets.mean(0)
    centered = features - center[None]
    gram = centered.T @ centered
    gram += ridge * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
    weights = jnp.linalg.solve(gram, centered.T @ (targets - rates[None]))
    return weights, rates - center @ weights


def probe(activations: pt.ParamTree, labels: Any) -> Probe:
    """Measures how well a linear classifier reads labels from each activation at the same position.

    Args:
      activations: a tree of (texts, length, size). The last quarter of the texts is held out.
      labels: (texts, length) integers.
    """
    seen, classes = len(labels) * 3 // 4, int(labels.max()) + 1
    train, test = labels[:seen].ravel(), labels[seen:].ravel()
    accuracy = {}
    for name, value in pt.collect(activations).items():
        weights, biases = fit(value[:seen].reshape(len(train), -1), train, classes)
        scores = value[seen:].reshape(len(test), -1) @ weights + biases[None]
        accuracy[name] = float(jnp.mean(jnp.argmax(scores, axis=-1) == test))
    return Probe(float(np.mean(test == np.bincount(train).argmax())), accuracy)


def patched(net: nn.Layer, params: Any, tokens: Any, layer: str, value: Any, where: Any) -> Any:
    """Returns the logits of a prompt, (length,), with another output of one layer at some positions.

    The output is replaced by ``value``, (1, length, size), where ``where``, booleans (cases, length),
    is true. Each case is a run of its own, so the logits are (cases, length, characters).
    """
    rule = {layer: lambda name, output: jnp.where(where[:, :, None], value, output)}
    return pt.intervene(net, rule)(params, jnp.broadcast_to(tokens, where.shape))


def restored(
    net: nn.Layer, params: Any, clean: Any, corrupted: Any, where: Any, pattern: str = LAYERS
) -> dict[str, Any]:
    """Returns how far patching one layer turns the prediction for one prompt into that for another.

    Args:
      net: the network.
      params: its parameters, unstacked.
      clean: a prompt, (length,), whose activations are patched in.
      corrupted: the prompt that runs, (length,).
      where: the positions to patch, booleans (cases, length).
      pattern: the names of the layers, each of which is patched alone.

    Returns:
      For each layer, (cases,): the change of the last position's logits, as a share of the difference
      between the prompts along it. 0 restores nothing, and 1 everything.
    """
    logits, activations = pt.capture(net, pattern)(params, clean[None])
    start = net(params, corrupted[None])[0, -1]
    way, shares = logits[0, -1] - start, {}
    for name, value in pt.collect(activations).items():
        change = patched(net, params, corrupted, name, value, where)[:, -1] - start[None]
        shares[name] = change @ way / (way @ way)
    return shares


def saliency(net: nn.Layer, params: Any, tokens: Any, target: Any, layer: str = "embed") -> Any:
    """Returns the gradient of the next token's log-probability by a layer's output, (length, size).

    The norm at a position is the saliency of its character in the prompt ``tokens``, (length,).
    ``target`` is the next token. The gradient is that by zeros which are added to the output.
    """

    def log_probability(change: Any) -> Any:
        model = pt.intervene(net, {layer: lambda name, output: output + change})
        return jax.nn.log_softmax(model(params, tokens[None])[0, -1])[target]

    _, activations = pt.capture(net, layer)(params, tokens[None])
    (output,) = pt.collect(activations).values()
    return jax.grad(log_probability)(jnp.zeros_like(output))[0]


def attention_maps(net: nn.Layer, params: Any, tokens: Any, heads: int) -> Any:
    """Returns the attention probabilities of all heads, (layers, texts, heads, length, length).

    The parameters are stacks, and ``tokens`` is (texts, length). The model does not return the
    probabilities, but its layers return the queries and keys that they are made of.
    """
    _, activations = pt.capture(net, "blocks_attention_attend_(query|key)")(params, tokens)
    attend, length = activations.blocks.attention.attend, tokens.shape[1]
    query, key = (
        nn.rotate(output.reshape(*output.shape[:-1], heads, -1), jnp.arange(length))
        for output in (attend.query.output, attend.key.output)  # (layers, texts, length, width)
    )
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / math.sqrt(query.shape[-1])
    seen = jnp.broadcast_to(jnp.tri(length, dtype=bool), scores.shape)
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def draw(tables: Mapping[str, Any], rows: Sequence[str], columns: Sequence[str]) -> Any:
    """Returns a figure of tables with values up to 1, whose rows and columns have names."""
    figure = pt.plots.heatmap(tables, limit=1.0, panels=len(tables))
    for axes in figure.axes:
        axes.yaxis.set_ticks(range(len(rows)), labels=rows, fontsize=4)
        axes.xaxis.set_ticks(range(len(columns)), labels=columns, fontsize=4)
    return figure


def show(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
    """Prints a table."""
    width = max(map(len, rows))
    print(f"\n{title}\n{'':{width}}" + "".join(f"{head:>15}" for head in heads))
    for name, numbers in rows.items():
        print(f"{name:{width}}" + "".join(f"{number:z15.3f}" for number in numbers))


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains or loads a model, and looks into it."""
    parser = argparse.ArgumentParser(description="Looks into a language model of Python code.")
    char_lm.add_options(parser, steps=300)
    parser.add_argument("--base", type=Path, metavar="FILE", help="a checkpoint of examples.char_lm")
    parser.add_argument("--pattern", default=LAYERS, help="the layers, by names such as blocks_0_mlp")
    parser.add_argument("--texts", type=int, default=256, help="how many to measure and probe")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--corrupted", default=CORRUPTED, help="the prompt with another character")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to save plots")
    args = parser.parse_args(argv)
    clean, corrupted = char_lm.encode(args.prompt), char_lm.encode(args.corrupted)
    if len(clean) != len(corrupted) or np.sum(clean != corrupted) != 1:
        parser.error("--corrupted should differ from --prompt in one character")
    if args.plots and not args.plots.is_dir():
        parser.error(f"--plots: there is no folder {args.plots}")
    try:
        data = char_lm.load_data()
        texts = min(args.texts, len(data.validation) // args.context)
        text = data.validation[: texts * args.context]
        tokens, labels = text.reshape(texts, -1), word_positions(text).reshape(texts, -1)
        if args.base:
            run = char_lm.load_run(args.base, args.lr)
        else:
            run, _ = char_lm.train(char_lm.new_run(args, tie=1), data, args)
        net, params = char_lm.network(run.settings), run.params
        unstacked = pt.unstack(params, "blocks")
        _, activations = jax.jit(pt.capture(net, args.pattern))(unstacked, tokens)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    found = statistics(activations)
    show("Activations", Row._fields, found)
    probed = probe(activations, labels)
    rows = {name: [value] for name, value in probed.accuracy.items()}
    rows["(the commonest answer)"] = [probed.majority]
    show("How far the word has come, read from", ["accuracy"], rows)

    length, change = len(clean), int(np.argmax(clean != corrupted))
    where = np.concatenate([np.ones((1, length), bool), np.eye(length, dtype=bool)])
    shares = restored(net, unstacked, clean, corrupted, where, args.pattern)
    shares = {name: np.asarray(share) for name, share in shares.items()}
    rows = {name: [share[0], share[1 + change], share[-1]] for name, share in shares.items()}
    heads = ["everywhere", "at the change", "at the end"]
    show(f"How much of {args.prompt!r} comes back in {args.corrupted!r} by patching", heads, rows)

    characters = char_lm.decode(clean).replace("\n", "↵")
    target = jnp.argmax(net(params, clean[None])[0, -1])
    norms = np.linalg.norm(saliency(net, params, clean, target), axis=-1)
    print(f"\nSaliency for {char_lm.decode(target[None])!r} as the next character")
    for character, norm in zip(characters, norms, strict=True):
        print(f"{character} {norm:6.3f} {'#' * round(40 * norm / norms.max())}")

    maps = np.asarray(attention_maps(net, params, clean[None], run.settings.heads)[:, 0])
    by_head = {f"block{i}_head{j}": maps[i, j] for i, j in np.ndindex(maps.shape[:2])}
    print("\nThe character that each head attends to most, below the one that it attends from")
    for name, each in {"": np.eye(length), **by_head}.items():
        print(f"{name:14} {''.join(characters[i] for i in each.argmax(axis=-1))}")

    if args.plots:
        table = np.stack([share[1:] for share in shares.values()])
        figures = {
            "activations": pt.plots.histograms(activations, log=True),
            "restored": draw({"restored": table}, list(shares), characters),
            "attention": draw(by_head, characters, characters),
        }
        for name, figure in figures.items():
            figure.savefig(args.plots / f"{name}.png")
    return Result(found, probed, shares, norms, maps)


if __name__ == "__main__":
    main()
