"""A plan made from shapes matches the bytes of real arrays and the collectives of the program."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import paramtree as pt
from paramtree import nn
from paramtree.inspect import compiled, plan

X = jax.ShapeDtypeStruct((32, 16), jnp.float32)
NET = nn.Sequential(nn.Dense(64, activation="relu"), nn.Dense(8))
TENSOR = {"dense0.*": P("model"), "dense1_weight": P(None, "model"), ".*": None}


def test_bytes_match_the_arrays() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    report = pt.plan(NET, X, mesh, TENSOR)
    params = pt.init(NET, jax.random.key(0), X)
    placed = jax.device_put(params, pt.shardings(params, mesh, TENSOR))
    size = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert report.per_device["parameters"] == report.per_device["gradients"] == size
    assert report.per_device["optimiser"] == 2 * size + 4  # two moments and a count
    assert report.whole["parameters"] == pt.nbytes(params) and report.count == pt.count(params)
    assert report.per_device["total"] == sum(v for k, v in report.per_device.items() if k != "total")
    assert report.per_device["activations"] >= (32 // 2) * (64 // 4) * 4


def test_collectives_match_the_program() -> None:
    data = pt.plan(NET, X, {"data": 8}, {".*": None})
    assert list(data.collectives) == ["all-reduce"]
    # The gradient of every parameter, and the loss.
    assert data.collectives["all-reduce"]["bytes"] >= pt.nbytes(pt.abstract(NET, X))
    alone = pt.plan(NET, X, {"data": 1}, {".*": None})
    assert alone.collectives == {} and "The devices do not communicate." in str(alone)
    tensor = pt.plan(NET, X, {"model": 8}, TENSOR, batch=None)
    assert list(tensor.collectives) == ["all-reduce"]
    assert tensor.collectives["all-reduce"]["bytes"] < data.collectives["all-reduce"]["bytes"] / 2


def test_every_iteration_of_a_loop_counts() -> None:
    net = nn.Repeat(nn.Dense(16, flatten=False), 5)
    report = pt.plan(net, X, {"model": 8}, {"weight": P(None, "model"), ".*": None}, batch=None)
    assert any(total["runs"] >= total["ops"] + 4 for total in report.collectives.values())


def test_more_devices_than_there_are() -> None:
    here = pt.plan(NET, X, {"data": 2, "model": 4}, TENSOR).to_dict()
    there = pt.plan(NET, X, {"data": 4, "model": 8}, TENSOR)
    assert there.backend == "cpu" and there.per_device["parameters"] < here["per_device"]["parameters"]
    assert there.collectives["all-reduce"]["ops"] == here["collectives"]["all-reduce"]["ops"]
    assert "1,608 parameters on 32 devices (data=4, model=8)" in str(there)


def test_the_subprocess_compiles_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    here = pt.plan(NET, X, {"data": 2, "model": 4}, TENSOR)
    monkeypatch.setattr(jax, "devices", list)
    assert pt.plan(NET, X, {"data": 2, "model": 4}, TENSOR).to_dict() == here.to_dict()


def test_nothing_is_allocated() -> None:
    held = jax.live_arrays()  # or another array may have an id again
    before = set(map(id, held))
    net = nn.Sequential(nn.Dense(2**15), nn.Dense(2**15))
    big = jax.ShapeDtypeStruct((8, 2**15), jnp.float32)
    report = pt.plan(net, big, {"model": 8}, {".*weight": P("model"), ".*": None}, batch=None)
    assert report.per_device["parameters"] > 2**30
    new = [a for a in jax.live_arrays() if id(a) not in before]
    assert sum(a.nbytes for a in new) < 2**20


def test_state_keys_other_losses_and_optimisers() -> None:
    net = nn.Sequential(nn.Dense(16), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(8))
    report = pt.plan(net, X, {"data": 4}, {".*": None}, tx=optax.sgd(0.1))
    shapes = pt.abstract(net, X)
    assert report.per_device["optimiser"] == 0
    assert report.per_device["gradients"] == pt.nbytes(shapes, kind="param")
    assert report.per_device["parameters"] == pt.nbytes(shapes)
    y = jax.ShapeDtypeStruct((32, 8), jnp.float32)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return jnp.abs(NET(params, x) - y).mean()

    with_loss = pt.plan(lambda p, x, y: NET(p, x), (X, y), {"data": 4}, {".*": None}, loss=loss)
    assert with_loss.count == pt.count(pt.abstract(NET, X))
    with pytest.raises(
        pt.ParamTreeError, match=r"the loss must be a scalar, but found shape=\(32, 8\)"
    ):
        pt.plan(NET, X, {"data": 4}, {".*": None}, loss=lambda p, x: NET(p, x))


def test_bad_arguments_are_refused_before_compiling() -> None:
    with pytest.raises(pt.RuleError, match="'dense2.*' matches no name"):
        pt.plan(NET, X, {"data": 2}, {"dense2.*": None, ".*": None})
    odd = jax.ShapeDtypeStruct((33, 16), jnp.float32)
    with pytest.raises(
        pt.RuleError, match=r"`input` \(33, 16\) dimension 0, of 33, is not a multiple of 2"
    ):
        pt.plan(NET, odd, {"data": 2}, {".*": None})
    with pytest.raises(TypeError, match=r"the axes of a mesh and their sizes, .* but found \(2, 4\)"):
        pt.plan(NET, X, (2, 4), TENSOR)  # type: ignore[arg-type]
    tied = {"b/weight": "a/weight"}
    net = nn.Sequential(a=nn.Dense(16), b=nn.Dense(16))
    assert pt.plan(net, X, {"data": 2}, {".*": None}, ties=tied).count == 16 * 16 + 2 * 16


def test_a_program_that_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_FLAG", "--xla_no_such_flag")
    with pytest.raises(pt.ParamTreeError, match="the program for 16 devices cannot be compiled"):
        pt.plan(NET, X, {"data": 16}, {".*": None})


def test_large_replicated_leaves_are_named() -> None:
    wide = nn.Dense(2**10)
    x = jax.ShapeDtypeStruct((8, 2**10), jnp.float32)
    report = pt.plan(wide, x, {"data": 8}, {".*": None})
    assert report.large == ["weight"]
    assert "Large and replicated on every device: weight." in str(report) and report._repr_html_()


def test_collectives_are_read_from_the_text_of_a_program() -> None:
    text = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %s = (f32[2]{0}, bf16[4]{0}) all-gather-start(%x)
  %t = f32[4]{0} all-gather-done(%s)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %y = pred[8]{0} all-reduce(%z), to_apply=%add
}
"""
    assert compiled.collectives(text) == {
        "all-reduce": {"ops": 2, "runs": 8, "bytes": 7 * 32 + 8},
        "all-gather": {"ops": 1, "runs": 7, "bytes": 7 * 16},
    }


@pytest.mark.slow
def test_seven_billion_parameters_on_sixty_four_devices() -> None:
    width, layers, heads = 4096, 32, 32
    block = nn.Sequential(
        attention=nn.Residual(
            norm=nn.RMSNorm(),
            attend=nn.MultiHeadAttention(heads, use_bias=False, causal=True, rotary=True),
        ),
        mlp=nn.Residual(
            norm=nn.RMSNorm(),
            widen=nn.Dense(4 * width, activation="gelu", flatten=False, use_bias=False),
            narrow=nn.Dense(width, flatten=False, use_bias=False),
        ),
    )
    net = nn.Sequential(
        embed=nn.Embedding(50_304, width),
        blocks=nn.Repeat(block, layers),
        norm=nn.RMSNorm(),
        decoder=nn.Dense(50_304, use_bias=False, flatten=False),
    )
    rules = {
        "(embed|decoder)_weight": P("model", "data"),
        "blocks_.*_(query|key|value|widen)_weight": P(None, "model", "data"),
        "blocks_.*_(out|narrow)_weight": P(None, "data", "model"),
        ".*": None,
    }
    held = jax.live_arrays()
    before = set(map(id, held))
    report = pt.plan(net, jax.ShapeDtypeStruct((64, 2048), jnp.int32), {"data": 8, "model": 8}, rules)
    assert 6.8e9 < report.count < 6.9e9
    weights = 4 * report.count / 64
    assert weights < report.per_device["parameters"] < weights + 2**22  # norms are replicated
    assert re.search(r"6,8\d\d,\d{3},\d{3} parameters on 64 devices \(data=8, model=8\)", str(report))
    assert set(report.collectives) >= {"all-reduce"} and report.per_device["activations"] > 2**30
    assert not [a for a in jax.live_arrays() if id(a) not in before and a.nbytes > 2**20]


def test_the_exported_program_needs_no_devices() -> None:
    assert not isinstance(plan._mesh({"data": 1000}), Mesh)
    assert isinstance(plan._mesh({"data": 2}), Mesh)
