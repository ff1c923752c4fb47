"""Post-training quantisation: the language model of ``char_lm`` with its weights in eight or four bits.

One rule reads every weight matrix as integers times a scale for each output, by
``pt.parametrizations.Quantized``. The model does not change, and neither does its tie: the embedding
and the decoder share one set of integers. The file of the expanded parameters holds the integers.

Run it with ``python -m examples.quantized_lm``; it needs optax. It trains ``char_lm``, or loads its
checkpoint, and compares loss and size. ``--help`` lists the options.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import paramtree as pt
from examples import char_lm
from paramtree.parametrizations import Quantized

WEIGHTS = ".*weight"


class Measure(NamedTuple):
    """Loss in nats per character, accuracy, bytes in memory, and bytes of the file."""

    loss: float
    accuracy: float
    nbytes: int
    file_bytes: int


def measure(net: Any, params: Any, text: Any, size: int, context: int) -> Measure:
    """Returns the quality of a model on a text, and its size."""
    loss, accuracy = char_lm.evaluate(net, params, text, size, context)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        pt.save(file, params)
        return Measure(loss, accuracy, pt.nbytes(params), file.stat().st_size)


def main(argv: Sequence[str] | None = None) -> dict[str, Measure]:
    """Trains or loads a model, quantises it, and compares; returns the measures by name."""
    parser = argparse.ArgumentParser(description="Quantises a language model after training.")
    char_lm.add_options(parser, steps=300)
    parser.add_argument("--base", type=Path, metavar="FILE", help="a checkpoint of examples.char_lm")
    args = parser.parse_args(argv)
    try:
        data = char_lm.load_data()
        if args.base:
            run = char_lm.load_run(args.base, args.lr)
        else:
            run, _ = char_lm.train(char_lm.new_run(args, tie=1), data, args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    net, size, context = char_lm.network(run.settings), args.batch_size, args.context
    results = {"float32": measure(net, run.params, data.validation, size, context)}
    for bits in (8, 4):
        rules = {WEIGHTS: Quantized(bits)}
        model, params = pt.reparametrize(net, rules), pt.expand(run.params, rules)
        results[f"int{bits}"] = measure(model, params, data.validation, size, context)
    first = results["float32"]
    print(f"\n{'':8} {'loss':>7} {'accuracy':>9} {'bytes':>10} {'file':>10} {'of float32':>11}")
    for name, (loss, accuracy, nbytes, file) in results.items():
        share = nbytes / first.nbytes
        print(f"{name:8} {loss:7.4f} {accuracy:9.4f} {nbytes:10,} {file:10,} {share:11.1%}")
    return results


if __name__ == "__main__":
    main()
