"""The parameters of each layer: their shapes in symbols, and their names in Gluon and PyTorch.

``table`` checks names and shapes against the layer itself, so that a page cannot say something else.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import paramtree as pt
from IPython.display import Markdown
from paramtree import nn


class Entry(NamedTuple):
    """A layer, an input, the sizes that symbols stand for, and (name, shape, Gluon's, PyTorch's)."""

    layer: nn.Layer
    inputs: tuple[Any, ...]
    sizes: dict[str, int]
    rows: list[tuple[str, str, str, str]]


def of(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    """Returns an input of a shape."""
    return jax.ShapeDtypeStruct(shape, dtype)


NORM = [
    ("gamma", "channels", "gamma", "weight"),
    ("beta", "channels", "beta", "bias"),
]
RUNNING = [
    ("running_mean", "channels", "running_mean", "running_mean"),
    ("running_var", "channels", "running_var", "running_var"),
]


def weights(shape: str) -> list[tuple[str, str, str, str]]:
    """Returns the rows of a layer that has a weight and a bias."""
    return [
        ("weight", shape, "weight", "weight"),
        ("bias", shape.split(",")[0], "bias", "bias"),
    ]


def convolution(dims: int) -> Entry:
    """Returns the entry of a convolution of so many spatial dimensions."""
    layer = getattr(nn, f"Conv{dims}D")(7, 2)
    kernel = ", ".join(["kernel"] * dims)
    sizes = {"channels": 7, "inputs": 5, "groups": 1, "kernel": 2}
    return Entry(
        layer,
        (of(3, *[4] * dims, 5),),
        sizes,
        weights(f"channels, inputs / groups, {kernel}"),
    )


def transposed(dims: int) -> Entry:
    """Returns the entry of a transposed convolution of so many spatial dimensions."""
    layer = getattr(nn, f"Conv{dims}DTranspose")(7, 2)
    kernel = ", ".join(["kernel"] * dims)
    sizes = {"channels": 7, "inputs": 5, "groups": 1, "kernel": 2}
    rows = [
        (
            "weight",
            f"inputs, channels / groups, {kernel}",
            "weight",
            "weight",
        ),
        ("bias", "channels", "bias", "bias"),
    ]
    return Entry(layer, (of(3, *[4] * dims, 5),), sizes, rows)


def depthwise(dims: int) -> Entry:
    """Returns the entry of a depthwise convolution of so many spatial dimensions."""
    layer = getattr(nn, f"DepthwiseConv{dims}D")(
        2, depth_multiplier=3
    )
    kernel = ", ".join(["kernel"] * dims)
    sizes = {"inputs": 5, "multiplier": 3, "kernel": 2}
    rows = weights(f"inputs * multiplier, 1, {kernel}")
    return Entry(layer, (of(3, *[4] * dims, 5),), sizes, rows)


def separable(dims: int) -> Entry:
    """Returns the entry of a separable convolution of so many spatial dimensions."""
    layer = getattr(nn, f"SeparableConv{dims}D")(
        7, 2, depth_multiplier=3
    )
    kernel = ", ".join(["kernel"] * dims)
    sizes = {"channels": 7, "inputs": 5, "multiplier": 3, "kernel": 2}
    rows = [
        (
            "depthwise_weight",
            f"inputs * multiplier, 1, {kernel}",
            "",
            "",
        ),
        (
            "pointwise_weight",
            f"channels, inputs * multiplier{', 1' * dims}",
            "",
            "",
        ),
        ("pointwise_bias", "channels", "", ""),
    ]
    return Entry(layer, (of(3, *[4] * dims, 5),), sizes, rows)


def recurrent(kind: str, gates: int) -> Entry:
    """Returns the entry of a bidirectional layer over sequences."""
    layer = getattr(nn, kind)(3, bidirectional=True)
    of_gates = f"{gates} * hidden" if gates > 1 else "hidden"
    rows = []
    for side, suffix in (("l0", "l0"), ("r0", "l0_reverse")):
        for ours, theirs, shape in (
            ("i2h", "ih", f"{of_gates}, inputs"),
            ("h2h", "hh", f"{of_gates}, hidden"),
        ):
            rows.append(
                (
                    f"{side}_{ours}_weight",
                    shape,
                    f"{side}_{ours}_weight",
                    f"weight_{theirs}_{suffix}",
                )
            )
        for ours, theirs in (("i2h", "ih"), ("h2h", "hh")):
            rows.append(
                (
                    f"{side}_{ours}_bias",
                    of_gates,
                    f"{side}_{ours}_bias",
                    f"bias_{theirs}_{suffix}",
                )
            )
    return Entry(
        layer, (of(4, 2, 5),), {"hidden": 3, "inputs": 5}, rows
    )


def cell(kind: str, gates: int) -> Entry:
    """Returns the entry of a cell."""
    of_gates = f"{gates} * hidden" if gates > 1 else "hidden"
    rows = [
        (
            "i2h_weight",
            f"{of_gates}, inputs",
            "i2h_weight",
            "weight_ih",
        ),
        (
            "h2h_weight",
            f"{of_gates}, hidden",
            "h2h_weight",
            "weight_hh",
        ),
        ("i2h_bias", of_gates, "i2h_bias", "bias_ih"),
        ("h2h_bias", of_gates, "h2h_bias", "bias_hh"),
    ]
    return Entry(
        getattr(nn, kind)(3),
        (of(2, 5),),
        {"hidden": 3, "inputs": 5},
        rows,
    )


def attention() -> Entry:
    """Returns the entry of attention with fewer keys than queries."""
    sizes = {
        "units": 12,
        "kv_units": 6,
        "inputs": 5,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 3,
    }
    rows = []
    for name, size, third in (
        ("query", "num_heads * head_size", "first third of in_proj_"),
        (
            "key",
            "num_kv_heads * head_size",
            "second third of in_proj_",
        ),
        (
            "value",
            "num_kv_heads * head_size",
            "last third of in_proj_",
        ),
        ("out", "units", "out_proj."),
    ):
        source = (
            "num_heads * head_size" if name == "out" else "inputs"
        )
        rows.append(
            (
                f"{name}_weight",
                f"{size}, {source}",
                "",
                f"{third}weight",
            )
        )
        rows.append((f"{name}_bias", size, "", f"{third}bias"))
    return Entry(
        nn.MultiHeadAttention(4, units=12, num_kv_heads=2),
        (of(2, 3, 5),),
        sizes,
        rows,
    )


_PAIR = {"channels": 5}

TABLES = {
    "Dense": Entry(
        nn.Dense(3),
        (of(2, 5),),
        {"units": 3, "inputs": 5},
        weights("units, inputs"),
    ),
    "Embedding": Entry(
        nn.Embedding(7, 3),
        (of(2, dtype="int32"),),
        {"input_dim": 7, "output_dim": 3},
        weights("input_dim, output_dim")[:1],
    ),
    **{f"Conv{dims}D": convolution(dims) for dims in (1, 2, 3)},
    **{
        f"Conv{dims}DTranspose": transposed(dims)
        for dims in (1, 2, 3)
    },
    **{f"DepthwiseConv{d}D": depthwise(d) for d in (1, 2, 3)},
    **{f"SeparableConv{d}D": separable(d) for d in (1, 2, 3)},
    "BatchNorm": Entry(
        nn.BatchNorm(), (of(2, 5),), _PAIR, [*NORM, *RUNNING]
    ),
    "LayerNorm": Entry(nn.LayerNorm(), (of(2, 5),), _PAIR, NORM),
    "GroupNorm": Entry(nn.GroupNorm(1), (of(2, 3, 5),), _PAIR, NORM),
    "InstanceNorm": Entry(
        nn.InstanceNorm(), (of(2, 3, 5),), _PAIR, NORM
    ),
    "RMSNorm": Entry(
        nn.RMSNorm(),
        (of(2, 5),),
        _PAIR,
        [("gamma", "channels", "", "weight")],
    ),
    "RNN": recurrent("RNN", 1),
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3),
    "RNNCell": cell("RNNCell", 1),
    "LSTMCell": cell("LSTMCell", 4),
    "GRUCell": cell("GRUCell", 3),
    "MultiHeadAttention": attention(),
    "GatedMLP": Entry(
        nn.GatedMLP(7),
        (of(2, 5),),
        {"hidden": 7, "units": 5},
        [
            (
                "gate_weight",
                "hidden, units",
                "",
                "gate_proj.weight (Llama)",
            ),
            (
                "up_weight",
                "hidden, units",
                "",
                "up_proj.weight (Llama)",
            ),
            (
                "down_weight",
                "units, hidden",
                "",
                "down_proj.weight (Llama)",
            ),
        ],
    ),
    "PReLU": Entry(
        nn.PReLU(),
        (of(2, 5),),
        {"channels": 1},
        [("alpha", "channels", "alpha", "weight")],
    ),
    "LayerScale": Entry(
        nn.LayerScale(),
        (of(2, 5),),
        _PAIR,
        [("gamma", "channels", "", "gamma (timm)")],
    ),
    "LearnedPositions": Entry(
        nn.LearnedPositions(7),
        (of(2, 3, 5),),
        {"length": 7, "units": 5},
        [("weight", "length, units", "", "weight of an Embedding")],
    ),
    "ClassToken": Entry(
        nn.ClassToken(),
        (of(2, 3, 5),),
        {"units": 5},
        [
            (
                "token",
                "1, units",
                "",
                "cls_token (timm), without its first axis",
            )
        ],
    ),
}


def shape_of(text: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape that a text such as "4 * hidden, inputs" stands for."""
    shape = []
    for entry in text.split(","):
        first, *factors = re.split(r"\s*([*/])\s*", entry.strip())
        value = sizes[first] if first in sizes else int(first)
        for sign, factor in zip(
            factors[::2], factors[1::2], strict=True
        ):
            number = sizes[factor] if factor in sizes else int(factor)
            value = value * number if sign == "*" else value // number
        shape.append(value)
    return tuple(shape)


def table(name: str) -> Markdown:
    """Returns the table of a layer.

    Raises:
      ValueError: the layer has other parameters.
    """
    entry = TABLES[name]
    found = {
        key: leaf.shape
        for key, leaf in pt.collect(
            pt.abstract(entry.layer, *entry.inputs)
        ).items()
    }
    said = {
        ours: shape_of(shape, entry.sizes)
        for ours, shape, _, _ in entry.rows
    }
    # One product of sizes may equal another by chance; the sizes are chosen so that few do.
    if {key: tuple(shape) for key, shape in found.items()} != said:
        raise ValueError(
            f"{name} has {found}, but the table says {said}."
        )
    assert all(math.prod(shape) for shape in said.values())
    lines = [
        "| parameter | shape | in Gluon | in PyTorch |",
        "|---|---|---|---|",
    ]
    for ours, shape, gluon, torch in entry.rows:
        cells = (
            f"`{text}`" if text and " " not in text else text
            for text in (gluon, torch)
        )
        shape = f"({shape})" if "," in shape else f"({shape},)"
        lines.append(
            f"| `{ours}` | {shape.replace('*', '·')} | {' | '.join(cells)} |"
        )
    return Markdown("\n".join(lines))


def without() -> set[str]:
    """Returns the names of the layers that have no table: they have no parameters of their own."""
    layers = {
        name
        for name, value in vars(nn).items()
        if isinstance(value, type)
        and issubclass(value, nn.Layer)
        and value is not nn.Layer
    }
    return layers - set(TABLES)
