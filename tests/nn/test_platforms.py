"""Every layer and example is lowered for CUDA and TPU, from shapes alone, on any machine.

That shows that nothing which is traced or lowered is for the CPU alone. It does not compile for the other
platforms, which takes their compilers.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from examples import (
    activations,
    char_lm,
    diffusion,
    efficientnet,
    fashion_cnn,
    fashion_mnist,
    gan,
    llama,
    lora,
    minilm,
    moe,
    parameter_management,
    quantized_lm,
    recipes,
    resnet,
    seq2seq,
    sharded_lm,
    vit,
)
from paramtree import initializers as init
from paramtree import nn
from paramtree import parametrizations as par
from tests.nn.test_layers import TABLE, loss, of, transformed

PLATFORMS = ("cpu", "cuda", "tpu")
KEY = jax.eval_shape(lambda: jax.random.key(0))
BF16 = jnp.dtype("bfloat16")


def asked(*args: Any) -> Any:
    raise AssertionError("the model asks what machine it is traced on")


def lowered(f: Callable[..., Any], *args: Any) -> jax.export.Exported:
    """Lowers a function of shapes, which may not ask which devices there are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("default_backend", "devices", "local_devices"):
            patch.setattr(jax, name, asked)
        exported = jax.export.export(jax.jit(f), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    return exported


def targets(exported: jax.export.Exported) -> set[str]:
    """The library functions that the program calls, on all platforms together."""
    return {part.split("(")[0] for part in exported.mlir_module().split("custom_call @")[1:]}


def step(layer: Any, params: Any, key: Any, *inputs: Any) -> Any:
    """The output for inference; the new parameters and the gradient of a loss in training."""

    def trained(p: Any) -> tuple[Any, Any]:
        news = []

        def call(p: Any, *x: Any) -> Any:
            y, new = pt.training(layer)(p, *x, key=key)
            news.append(new)
            return y

        return loss(call, p, *inputs), news[0]

    (_, new), grads = pt.value_and_grad(trained, has_aux=True)(params)
    return layer(params, *inputs), new, grads


# What the other tests would find


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (jax.scipy.linalg.schur, "'schur' not found for platform"),
        (lambda x: x if jax.default_backend() == "cpu" else 2 * x, "asks what machine"),
        (lambda x: x * len(jax.devices()), "asks what machine"),
    ],
)
def test_what_is_for_the_cpu_alone_is_found(f: Any, message: str) -> None:
    with pytest.raises((NotImplementedError, AssertionError), match=message):
        lowered(f, of(3, 3))


def test_what_calls_a_library_is_seen() -> None:
    assert {"lapack_sgetrf_ffi", "cusolver_getrf_ffi", "LuDecomposition"} <= targets(
        lowered(jax.scipy.linalg.lu, of(3, 3))
    )


# Layers: test_layers.py checks that all have a row


@transformed
def test_layers_and_their_gradients(row: str) -> None:
    make, inputs = TABLE[row]
    layer = make()
    program = lowered(functools.partial(step, layer), pt.abstract(layer, *inputs), KEY, *inputs)
    assert not {name for name in targets(program) if "threefry" not in name}  # XLA's operations do


OPTIONS: dict[str, Any] = {
    "xla": {"implementation": "xla"},
    "window": {"causal": True, "window": 2},
    "softcap and dropout": {"softcap": 5.0, "dropout": 0.5},
    "all else": {"qk_norm": True, "rotary": True, "num_kv_heads": 1, "scale": 0.3},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_attention(options: str, dtype: str) -> None:
    layer, x = nn.MultiHeadAttention(2, dtype=dtype, **OPTIONS[options]), of(2, 3, 8, dtype=dtype)
    lowered(functools.partial(step, layer), pt.abstract(layer, x), KEY, x)


def test_attention_by_cudnn_is_initialised_anywhere() -> None:
    def program(implementation: Any) -> str:
        layer = nn.MultiHeadAttention(2, implementation=implementation)
        return lowered(lambda key: layer.init(key, of(2, 3, 8)), KEY).mlir_module()

    one, other = (program(how) for how in ("cudnn", None))
    assert one == other


# Nets


def network() -> nn.Sequential:
    """A net with one layer of each family, from images to logits."""
    return nn.Sequential(
        nn.Conv2D(8, 3, 2, 1), nn.BatchNorm(), nn.Activation("gelu"), nn.MaxPool2D(3, 2, 1),
        nn.Dropout(0.5), nn.Lambda(flat), nn.LSTM(8, layout="NTC"),
        nn.Repeat(nn.Residual(nn.RMSNorm(), nn.MultiHeadAttention(2)), 2), nn.Dense(3),
    )  # fmt: skip


def flat(x: Any) -> Any:
    return x.reshape(x.shape[0], -1, x.shape[-1])


NET, X = network(), of(2, 8, 8, 3)


def halved(params: Any, x: Any) -> Any:
    return NET(pt.cast(params, "bfloat16"), x.astype(BF16))


def quantised(params: Any, x: Any) -> Any:
    rules = {".*dense.*weight|.*query_weight": par.Quantized(4), ".*": None}
    return pt.reparametrize(NET, rules)(pt.expand(params, rules), x)


def sgd(params: Any, x: Any, key: Any) -> Any:
    def trained(p: Any) -> tuple[Any, Any]:
        y, new = pt.training(NET)(p, x, key=key)
        return (y**2).mean(), new

    tx = optax.sgd(0.1, momentum=0.9)
    grads, new = pt.grad(trained, has_aux=True)(params)
    weights, state = pt.partition(new, kind="param")
    updates, opt_state = tx.update(grads, tx.init(weights), weights)
    return pt.merge(optax.apply_updates(weights, updates), state), opt_state


WAYS: dict[str, Any] = {
    "packed": (lambda p, x: NET(pt.pack(p), x), ()),
    "packed by the caller": (lambda p, x: jax.grad(functools.partial(loss, NET))(pt.pack(p), x), ()),
    "in bfloat16": (halved, ()),
    "computing in bfloat16": (nn.Compute(NET, "bfloat16"), ()),
    "quantised": (quantised, ()),
    "captured": (pt.capture(NET, inputs=True), ()),
    "intervened": (pt.intervene(NET, {"dense0": lambda name, h: 2 * h}), ()),
    "a step of training": (sgd, (KEY,)),
    "initialised": (lambda p, x, key: pt.init(NET, key, x), (KEY,)),
    "statistics": (lambda p, x: [jnp.mean(w) for w in pt.collect(p, ".*weight").values()], ()),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_run_a_net(way: str) -> None:
    f, more = WAYS[way]
    lowered(f, pt.abstract(NET, X), X, *more)


INITIALIZERS: dict[str, Any] = {
    "Bilinear": (init.Bilinear(), (2, 2, 4, 4)),
    "Constant": (init.Constant(2.0), (3, 4)),
    "LSTMBias": (init.LSTMBias(), (8,)),
    "Load": (init.Load({"dense0_weight": np.ones((3, 4), "float32")}, init.Zero()), (3, 4)),
    "MSRAPrelu": (init.MSRAPrelu(), (3, 4)),
    "Mixed": (init.Mixed([".*"], [init.Normal()]), (3, 4)),
    "Normal": (init.Normal(), (3, 4)),
    "One": (init.One(), (3, 4)),
    "Orthogonal": (init.Orthogonal(), (3, 4)),
    "TruncNorm": (init.TruncNorm(), (3, 4)),
    "Uniform": (init.Uniform(), (3, 4)),
    "VarianceScaling": (init.VarianceScaling(1.0, "fan_in", "normal"), (3, 4)),
    "Xavier": (init.Xavier(), (3, 4)),
    "Zero": (init.Zero(), (3, 4)),
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializers(name: str) -> None:
    initializer, shape = INITIALIZERS[name]

    def model(p: Any) -> Any:
        return p.dense0.param("bias" if name == "LSTMBias" else "weight", shape, initializer)

    lowered(lambda key: pt.init(model, key), KEY)


PARAMETRIZATIONS: dict[str, Any] = {
    "Cast": par.Cast("float32"),
    "Frozen": par.Frozen(),
    "LoRA": par.LoRA(2),
    "Masked": par.Masked(jnp.abs),
    "Orthogonal": par.Orthogonal(),
    "Positive": par.Positive(),
    "Quantized": par.Quantized(8),
    "Quantized to 4 bits": par.Quantized(4),
    "Quantized in training": par.Quantized(fake=True),
    "SpectralNorm": par.SpectralNorm(),
    "WeightNorm": par.WeightNorm(),
    "WeightStandardization": par.WeightStandardization(),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrisations(name: str) -> None:
    net, x = nn.Sequential(nn.Dense(4, "tanh")), of(2, 4)
    rules = {".*weight": PARAMETRIZATIONS[name], ".*": None}

    def whole(params: Any, key: Any, x: Any) -> Any:
        expanded = pt.expand(params, rules, key)
        y, new, grads = step(pt.reparametrize(net, rules), expanded, key, x)
        return y, grads, pt.fold(new, rules)

    lowered(whole, pt.abstract(net, x), KEY, x)


@pytest.mark.parametrize(
    ("table", "module"), [(INITIALIZERS, init), (PARAMETRIZATIONS, par)], ids=["init", "par"]
)
def test_every_public_one_has_a_row(table: Any, module: Any) -> None:
    classes = {n for n, v in vars(module).items() if isinstance(v, type)}
    assert {name.split()[0] for name in table} == classes - {"Initializer"}


# Examples

TOKENS, MASK, IMAGES = of(2, 8, dtype="int32"), of(2, 8, dtype="int32"), of(2, 32, 32, 1)
SMALL = char_lm.Settings(width=16, layers=2, heads=2)
LLAMA = llama.Settings(width=16, layers=2, heads=4, kv_heads=2, hidden=24)


def adapted(rules: Any) -> Any:
    return pt.reparametrize(char_lm.network(SMALL), rules)


def on_a_mesh() -> Any:
    where = sharded_lm.sharded(SMALL, sharded_lm.TABLES["both"], 0.1, jax.devices())
    return where.net, (of(8, 8, dtype="int32"),)


EXAMPLES: dict[str, Callable[[], Any]] = {
    "activations": lambda: (pt.capture(char_lm.network(SMALL), activations.LAYERS), (TOKENS,)),
    "char_lm": lambda: (char_lm.network(SMALL, dropout=0.1), (TOKENS,)),
    "diffusion": lambda: (diffusion.UNet(16), (IMAGES, of(2, dtype="int32"), of(2, dtype="int32"))),
    "efficientnet": lambda: (efficientnet.efficientnet(5), (of(1, 32, 32, 3),)),
    "fashion_cnn": lambda: (fashion_cnn.network(4), (of(2, 28, 28, 1),)),
    "fashion_mnist": lambda: (fashion_mnist.network(), (of(2, 784),)),
    "gan": lambda: (gan.make_gan(0.1, 1).discriminator, (of(2, 2),)),
    "gan generator": lambda: (gan.make_gan(0.1, 1).generator, (of(2, gan.NOISE),)),
    "llama": lambda: (llama.llama(LLAMA), (TOKENS,)),
    "lora": lambda: (adapted(lora.rules_for(".*(query|value)_weight", 2)), (TOKENS,)),
    "minilm": lambda: (minilm.embed, (TOKENS, MASK)),
    "moe": lambda: (moe.network(16, 2, moe.MoE(nn.GatedMLP(8), 4)), (TOKENS,)),
    "parameter_management": lambda: (parameter_management.chimera(), (of(2, 20),)),
    "parameter_management nested": lambda: (parameter_management.rgnet(), (of(2, 20),)),
    "quantized_lm": lambda: (adapted({quantized_lm.WEIGHTS: par.Quantized(4), ".*": None}), (TOKENS,)),
    "recipes": lambda: (recipes.resnet(4, 3), (of(2, 8, 8, 3),)),
    "recipes experts": lambda: (recipes.Experts(nn.Dense(4), 3), (of(2, 4),)),
    "resnet": lambda: (resnet.resnet(4), (IMAGES,)),
    "seq2seq": lambda: (seq2seq.Seq2Seq(16, 2, 1, 2), (TOKENS, TOKENS)),
    "sharded_lm": on_a_mesh,
    "vit": lambda: (vit.vit(16, 8, 16, 2, 2, 0.1), (IMAGES,)),
}


def test_every_example_has_a_row() -> None:
    files = {file.stem for file in (Path(__file__).parents[2] / "examples").glob("*.py")}
    # The processes of multiprocess.py train the net of sharded_lm.py.
    assert files - {"multiprocess"} == {name.split()[0] for name in EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    net, inputs = EXAMPLES[name]()
    lowered(net, pt.abstract(net, *inputs), *inputs)


def test_generating_with_a_cache() -> None:
    params = jax.eval_shape(functools.partial(llama.init_params, LLAMA), KEY)
    lowered(lambda p, tokens, key: llama.generate(LLAMA, p, tokens, key, 3), params, TOKENS, KEY)
