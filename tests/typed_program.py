# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A user's program, which type checkers read: `make types` runs mypy and pyright over it.

It uses what is public, and says with ``assert_type`` which types are known. Nothing here is run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree import parametrizations as how
from paramtree.packed import Packed

key = jax.random.key(0)
x = jax.random.normal(key, (2, 20))
Step = Callable[[pt.Scope, jax.Array], jax.Array]

# Models: layers, functions of a scope, and classes of one's own


class Scale(nn.Layer):
    start: float = 1.0

    def __call__(self, p: pt.Scope, x: jax.Array) -> jax.Array:
        return x * p.param("scale", x.shape[-1:], init.Constant(self.start))


def model(p: pt.Scope, x: jax.Array, scale: float = 1.0) -> jax.Array:
    x = nn.Dense(8, activation="relu")(p.hidden, x)
    mean = p.state("mean", (8,), "zeros", jnp.float32)
    if p.training and "hidden" in p:
        p.update("mean", x.mean(0))
        x = x * jax.random.bernoulli(p.key(), 0.5, x.shape)
    return p.sow("scaled", scale * (x - mean))


dense, net = nn.Dense(3), nn.Sequential(nn.Dense(8), nn.BatchNorm(), Scale(2.0), jnp.tanh)
assert_type(dense, nn.Dense)
assert_type(Scale(start=2.0), Scale)
assert_type(net[0], nn.Layer)
assert_type(net[1:], nn.Sequential)
nn.Dense("3")  # type: ignore[arg-type]
pt.colect  # type: ignore[attr-defined]  # noqa: B018

# Trees, and models that are called with them: a tree is a scope

params = pt.init(net, key, x, rules={".*bias": "zeros"}, ties={})
assert_type(params, pt.ParamTree)
assert_type(pt.abstract(model, x), pt.ParamTree)
assert_type(net.init(key, x), pt.ParamTree)
assert_type(params.to_dict(), dict[str, Any])
assert_type(list(params), list[str])
assert_type(model(params, x), jax.Array)
assert_type(dense(params, x), jax.Array)
assert_type(nn.Conv2D(3, 3)(params, x), jax.Array)
assert_type(nn.MultiHeadAttention(2)(params, x), jax.Array)
assert_type(nn.LSTM(8)(params, x), jax.Array)
assert_type(nn.LSTM(8)(params, x, [x, x]), tuple[jax.Array, list[jax.Array]])
assert_type(nn.GRUCell(8)(params, x, x), tuple[jax.Array, jax.Array])
dense(x, params)  # type: ignore[arg-type]

# Transforms keep a model's arguments and output

low_rank = {"hidden_weight": how.LoRA(rank=2), ".*": None}
assert_type(pt.reparametrize(model, low_rank)(params, x, scale=2.0), jax.Array)
assert_type(pt.intervene(model, {"hidden": 0.0})(params, x), jax.Array)
assert_type(pt.capture(model, "hidden")(params, x, 2.0), tuple[jax.Array, pt.ParamTree])
assert_type(pt.training(model)(params, x, scale=2.0, key=key), tuple[jax.Array, pt.ParamTree])
assert_type(pt.decoding(model)(params, x, scale=2.0), tuple[jax.Array, pt.ParamTree])
assert_type(pt.training(net)(pt.pack(params), x)[1], Packed)
both = pt.training(pt.capture(pt.reparametrize(model, low_rank), "hidden"))
assert_type(both(params, x), tuple[tuple[jax.Array, pt.ParamTree], pt.ParamTree])
step: Step = pt.intervene(pt.reparametrize(dense, low_rank), {})
pt.capture(model)(params, "x")  # type: ignore[arg-type]


def loss(p: pt.Scope, x: jax.Array) -> jax.Array:
    return model(p, x).sum()


def loss_and_output(p: pt.Scope, x: jax.Array) -> tuple[jax.Array, str]:
    return model(p, x).sum(), "output"


def body(p: pt.Scope, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return h, dense(p, x)


assert_type(pt.grad(loss, wrt=".*weight")(params, x), pt.ParamTree)
assert_type(pt.grad(loss)({"a": params}, x), dict[str, pt.ParamTree])
assert_type(pt.grad(loss_and_output, has_aux=True)(params, x), tuple[pt.ParamTree, str])
assert_type(pt.value_and_grad(loss)(params, x), tuple[jax.Array, pt.ParamTree])
value, grads = pt.value_and_grad(loss_and_output, has_aux=True)(params, x)
assert_type(value, tuple[jax.Array, str])
assert_type(grads, pt.ParamTree)
assert_type(pt.scan(body, params, x, x), tuple[jax.Array, jax.Array])
pt.grad(loss)(params, 3)  # type: ignore[arg-type]

# Verbs give back what they are given: a tree, or any other pytree

kept, rest = pt.partition(params, "dense0_.*")
assert_type(kept, pt.ParamTree)
assert_type(pt.merge(kept, rest), pt.ParamTree)
assert_type(pt.collect(params, lambda name, leaf: leaf.ndim > 1), pt.ParamTree)
assert_type(pt.select({"a": x}, "a"), dict[str, jax.Array])
assert_type(pt.cast(pt.mask(pt.labels(params, {".*": "slow"}), ".*weight"), "bfloat16"), pt.ParamTree)
assert_type(pt.reinit(pt.replace(params, {"a": x}), key, {".*": init.Normal(0.01)}), pt.ParamTree)
assert_type(pt.map_named(lambda name, leaf: leaf * 2, params, ".*bias"), pt.ParamTree)
assert_type(pt.rename(pt.drop(pt.insert(params, {"b": x}), "b"), [("dense", "fc")]), pt.ParamTree)
assert_type(pt.untie(pt.tie(params, {"b": "a"}), "b"), pt.ParamTree)
assert_type(pt.unstack(pt.stack(params, "blocks"), "blocks"), pt.ParamTree)
assert_type(pt.fold(pt.expand(params, low_rank, key), low_rank), pt.ParamTree)
assert_type(pt.from_tree({"a": x}, kinds={"a": "state"}), pt.ParamTree)
assert_type(pt.unpack(pt.pack(params)), pt.ParamTree)
assert_type(pt.ties(params), dict[str, str])
assert_type(pt.count(params) + pt.nbytes(params, kind="param"), int)

# Files, places and reports

path, run = Path("model.safetensors"), {"params": params, "best": x}
pt.save(path, params, metadata={"step": "1"})
assert_type(pt.load(path), pt.ParamTree)
assert_type(pt.load(path, like=params, rename=[("a", "b")]), pt.ParamTree)
assert_type(pt.load(path, like=params, report=True), tuple[pt.ParamTree, pt.LoadReport])
assert_type(pt.peek(path), pt.ParamTree)
with pt.Checkpoints("run", best="loss") as checkpoints:
    checkpoints.save(1, run, {"loss": 0.5})
    assert_type(checkpoints.load(pt.load(path, like=x)), jax.Array)
    assert_type(checkpoints.latest, int | None)
mesh = jax.sharding.Mesh([], ("data",))
assert_type(pt.shardings(params, mesh, {".*": jax.sharding.PartitionSpec("data")}), pt.ParamTree)
print(pt.show(params), pt.show_sharding(params), pt.summary(net, params, x), pt.diff(params, kept))
print(pt.stats(params, ".*weight").to_dict(), pt.find_nonfinite(params))
pt.save_model("net", net, params, x)
pt.testing.assert_all_finite(pt.update_ratios(params, grads))
pt.plots.histograms(params).clear()
