"""A summary has a row for each call of a layer, and every column adds up."""

import copy
import dataclasses
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paramtree as pt
from examples import char_lm, fashion_cnn
from paramtree import nn
from paramtree.inspect import flops
from paramtree.inspect.observe import call_of
from paramtree.inspect.summary import Summary
from tests.catalogue import trees


def shape(*sizes: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def of(net: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Summary:
    return pt.summary(net, pt.abstract(net, *inputs), *inputs, **kwargs)


def names(report: Summary) -> list[str]:
    return ["  " * row.depth + f"{row.name} {row.layer}".strip() for row in report.rows]


def by_xla(f: Callable[..., Any], *inputs: Any) -> float:
    return jax.jit(f).lower(*inputs).cost_analysis().get("flops", 0.0)


def check_sums(report: Summary) -> None:
    rows, totals = report.rows, report.totals
    for name in ("params", "trained", "state", "bytes", "flops"):
        assert sum(getattr(row, name) for row in rows) == totals["total"][name]
    parts = [totals[name] for name in ("trained", "frozen", "state")]
    for name in ("params", "trained", "state", "bytes"):
        assert sum(part.get(name, 0) for part in parts) == totals["total"][name]


# What it prints


def test_the_table_of_a_tied_model_with_repeated_blocks() -> None:
    net = char_lm.network(char_lm.Settings())
    tokens = shape(16, 128, dtype="int32")
    report = pt.summary(net, pt.abstract(net, tokens, ties=char_lm.TIES), tokens)
    assert str(report).split("\n") == [
        "layer                                     input             output             params       bytes     FLOPs",
        "───────────────────────────────────────────────────────────────────────────────────────────────────────────",
        "Sequential                                i32[16,128]       f32[16,128,96]",
        "  embed: Embedding                        i32[16,128]       f32[16,128,96]      9,216    36.0 KiB   208.9 k",
        "  blocks: Repeat(2 x)                     f32[16,128,96]    f32[16,128,96]",
        "    Sequential                            f32[16,128,96]    f32[16,128,96]",
        "      attention: Residual                 f32[16,128,96]    f32[16,128,96]                          393.2 k",
        "        norm: RMSNorm                     f32[16,128,96]    f32[16,128,96]        192       768 B     1.6 M",
        "        attend: MultiHeadAttention        f32[16,128,96]    f32[16,128,96]                          216.3 M",
        "          query: Dense                    f32[16,128,96]    f32[16,128,96]     18,432    72.0 KiB    75.5 M",
        "          key: Dense                      f32[16,128,96]    f32[16,128,96]     18,432    72.0 KiB    75.5 M",
        "          value: Dense                    f32[16,128,96]    f32[16,128,96]     18,432    72.0 KiB    75.5 M",
        "          out: Dense                      f32[16,128,96]    f32[16,128,96]     18,432    72.0 KiB    75.5 M",
        "        dropout: Dropout                  f32[16,128,96]    f32[16,128,96]",
        "      mlp: Residual                       f32[16,128,96]    f32[16,128,96]                          393.2 k",
        "        norm: RMSNorm                     f32[16,128,96]    f32[16,128,96]        192       768 B     1.6 M",
        "        widen: Dense                      f32[16,128,96]    f32[16,128,384]    74,496   291.0 KiB   407.4 M",
        "        narrow: Dense                     f32[16,128,384]   f32[16,128,96]     73,920   288.8 KiB   302.4 M",
        "        dropout: Dropout                  f32[16,128,96]    f32[16,128,96]",
        "  norm: RMSNorm                           f32[16,128,96]    f32[16,128,96]         96       384 B   788.5 k",
        "  decoder: Dense (tied to embed_weight)   f32[16,128,96]    f32[16,128,96]                           37.7 M",
        "",
        "trained                                                                       231,840   905.6 KiB",
        "total                                                                         231,840   905.6 KiB     1.3 G",
    ]  # fmt: skip
    check_sums(report)


def test_the_table_of_a_net_with_state_and_frozen_parameters() -> None:
    report = of(fashion_cnn.network(), shape(128, 28, 28, 1), trainable="dense.*", flops=False)
    lines = str(report).split("\n")
    assert lines[3:6] == [
        "  conv0: Conv2D             f32[128,28,28,1]    f32[128,14,14,16]       400                       1.6 KiB",
        "  batchnorm0: BatchNorm     f32[128,14,14,16]   f32[128,14,14,16]        32                32       256 B",
        "  relu0: Activation(relu)   f32[128,14,14,16]   f32[128,14,14,16]",
    ]
    assert lines[-4:] == [
        "trained                                                             202,122   202,122           789.5 KiB",
        "frozen                                                                5,104                      19.9 KiB",
        "state                                                                                      96       384 B",
        "total                                                               207,226   202,122      96   809.9 KiB",
    ]
    assert lines[0].split() == ["layer", "input", "output", "params", "trained", "state", "bytes"]


def test_a_terminal_and_a_notebook_show_the_rows() -> None:
    from rich.console import Console

    report = of(nn.Sequential(nn.Dense(3), nn.Dense(2)), shape(4, 5))
    out = io.StringIO()
    Console(file=out, width=120).print(report)
    assert "  dense1: Dense   f32[4,3]   f32[4,2]" in out.getvalue()
    page = report._repr_html_()
    assert "  dense1: Dense" in page and "f32[4,2]" in page
    assert "<script" not in page


def test_names_are_escaped() -> None:
    def net(p: Any, x: Any) -> Any:
        return nn.Dense(2)(p["<b>\x1b[31m"], x)

    report = of(net, shape(1, 2))
    assert "<b>" not in report._repr_html_() and "&lt;b&gt;" in report._repr_html_()
    assert "\x1b" not in str(report) + report._repr_html_()
    assert "\\x1b" in str(report)


def test_to_dict_has_plain_values() -> None:
    net = nn.Sequential(nn.Dense(3), nn.BatchNorm())
    report = of(net, shape(4, 5), trainable="dense0_weight").to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["rows"][1] == {
        "name": "dense0",
        "layer": "Dense",
        "depth": 1,
        "inputs": [{"shape": [4, 5], "dtype": "float32"}],
        "outputs": [{"shape": [4, 3], "dtype": "float32"}],
        "params": 18,
        "trained": 15,
        "state": 0,
        "bytes": 72,
        "flops": 2 * 4 * 5 * 3 + 4 * 3,
        "tied": {},
        "shared": False,
        "parametrized": {},
    }
    assert report["totals"]["trained"] == {"params": 15, "trained": 15, "bytes": 60}
    assert report["totals"]["frozen"] == {"params": 9, "bytes": 36}
    assert report["totals"]["state"] == {"state": 6, "bytes": 24}
    assert report["unused"] == []


# Counts


def tied_model() -> tuple[nn.Sequential, pt.ParamTree, Any]:
    net = nn.Sequential(
        embed=nn.Embedding(50, 16), lstm=nn.LSTM(16), decoder=nn.Dense(50, flatten=False)
    )
    tokens = shape(7, 2, dtype="int32")
    return net, pt.abstract(net, tokens, ties={"decoder/weight": "embed/weight"}), tokens


TIED_IN_PYTORCH = 3026  # sum(p.numel() for p in module.parameters())


def test_counts_of_a_tied_model_match_pytorch() -> None:
    net, params, tokens = tied_model()
    report = pt.summary(net, params, tokens)
    assert report.totals["total"]["params"] == pt.count(params) == TIED_IN_PYTORCH
    assert [row.params for row in report.rows] == [0, 800, 2176, 50]
    assert report.rows[3].tied == {"decoder_weight": "embed_weight"}
    assert "decoder: Dense (tied to embed_weight)" in str(report)


def test_pytorch_counts_the_same() -> None:
    torch = pytest.importorskip("torch")

    class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 16)
            self.lstm = torch.nn.LSTM(16, 16)
            self.decoder = torch.nn.Linear(16, 50)
            self.decoder.weight = self.embed.weight

    assert sum(p.numel() for p in Tied().parameters()) == TIED_IN_PYTORCH


def test_a_layer_instance_twice_counts_once_and_names_the_first() -> None:
    shared = nn.Dense(8, activation="relu")
    net = nn.Sequential(nn.Dense(8), shared, shared, nn.Dense(10))
    report = of(net, shape(2, 20))
    assert [row.params for row in report.rows] == [0, 168, 72, 0, 90]
    assert report.rows[3].tied == {"dense2_weight": "dense1_weight", "dense2_bias": "dense1_bias"}
    assert "  dense2: Dense (tied to dense1)" in str(report)
    assert report.rows[2].flops == report.rows[3].flops == 2 * 2 * 8 * 8 + 2 * 8 + 2 * 8
    check_sums(report)


def test_ties_to_several_layers_are_counted() -> None:
    net = nn.Sequential(a=nn.Dense(4), b=nn.Dense(4), c=nn.Dense(4))
    ties = {"c/weight": "a/weight", "c/bias": "b/bias"}
    report = pt.summary(net, pt.abstract(net, shape(2, 4), ties=ties), shape(2, 4))
    assert report.rows[3].tied == {"c_weight": "a_weight", "c_bias": "b_bias"}
    assert "  c: Dense (tied to a_weight +1)" in str(report)

    def on_top(p: Any, x: Any) -> Any:
        return nn.Dense(4)(p.copy, nn.Dense(4)(p, x))

    ties = {"copy/weight": "weight", "copy/bias": "bias"}
    report = pt.summary(on_top, pt.abstract(on_top, shape(2, 4), ties=ties), shape(2, 4))
    assert [row.params for row in report.rows] == [0, 20, 0]
    assert "  copy: Dense (tied to weight +1)" in str(report)


def test_a_layer_called_twice_on_one_scope_counts_once() -> None:
    def net(p: Any, x: Any) -> Any:
        dense = nn.Dense(4)
        return dense(p.out, dense(p.out, x))

    report = of(net, shape(2, 4))
    assert [(row.name, row.params, row.shared) for row in report.rows] == [
        ("", 0, False),
        ("out", 20, False),
        ("out", 0, True),
    ]
    assert str(report).split("\n")[4].startswith("  out: Dense (shared)")
    check_sums(report)


def test_parameters_of_functions_are_on_the_row_that_called_them() -> None:
    @dataclasses.dataclass(frozen=True)
    class Scaled(nn.Layer):
        def __call__(self, p: Any, x: Any) -> Any:
            scale = p.param("scale", (), pt.initializers.One())
            return scale * nn.Dense(3)(p, x)  # at the same place, which holds the leaves of both

    def head(p: Any, x: Any) -> Any:
        return x + jnp.expand_dims(p.param("shift", x.shape[-1:], "zeros"), 0)

    def net(p: Any, x: Any) -> Any:
        return head(p.head, Scaled()(p.body, x)) * p.param("temperature", (), "ones")

    report = of(net, shape(2, 4))
    assert [(row.depth, row.layer, row.params) for row in report.rows] == [
        (0, "net", 3 + 1),
        (1, "Scaled", 1),
        (2, "Dense", 15),
    ]
    check_sums(report)


def test_leaves_read_as_attributes_belong_to_their_place() -> None:
    params = pt.from_tree(
        {"dense": {"weight": np.ones((3, 4), np.float32), "extra": np.ones(2)}, "w": np.ones(5)}
    )
    report = pt.summary(
        lambda p, x: nn.Dense(3, use_bias=False)(p.dense, x) * p.w.sum().astype("float32"),
        params,
        shape(1, 4),
    )
    assert [row.params for row in report.rows] == [5, 14]
    assert report.unused == ["dense_extra"]
    assert str(report).endswith("\nThe output does not depend on dense_extra.")


def test_a_part_of_a_net_says_what_it_leaves_unused() -> None:
    net = nn.Sequential(*(nn.Dense(4) for _ in range(12)))
    params = pt.abstract(net, shape(2, 4))
    report = pt.summary(net[6:], params, shape(2, 4))
    assert [row.params for row in report.rows] == [120, 20, 20, 20, 20, 20, 20]
    assert len(report.unused) == 12
    assert str(report).endswith("dense0_weight, dense0_bias and 10 more.")


def test_names_in_a_sub_tree_are_relative_to_it() -> None:
    net = nn.Sequential(nn.Sequential(nn.Dense(3), nn.Dense(2)))
    params = pt.abstract(net, shape(1, 4))
    report = pt.summary(net[0], params.sequential0, shape(1, 4))
    assert names(report) == ["Sequential", "  dense0 Dense", "  dense1 Dense"]
    assert [row.params for row in report.rows] == [0, 15, 8]
    assert report.rows[1].name == "dense0"


def test_bytes_depend_on_dtypes() -> None:
    params = pt.from_tree(
        {
            "a": jnp.ones((3, 2), jnp.bfloat16),
            "b": np.ones(5, np.int8),
            "c": jnp.array(True),
            "d": jnp.ones((0, 7)),
            "e": jax.random.split(jax.random.key(0), 3),
            "f": jnp.ones(2, jnp.complex64),
            "g": 1.5,
            "h": shape(4),
        }
    )
    report = pt.summary(lambda p: p.a, params)
    assert report.rows[0].bytes == pt.nbytes(params) == 12 + 5 + 1 + 0 + 24 + 16 + 16
    assert report.rows[0].params == pt.count(params)
    assert str(report).split("\n")[2].split()[:2] == ["<lambda>", "bf16[3,2]"]


@dataclasses.dataclass(frozen=True)
class Probe(nn.Layer):
    """Reads some of its leaves, by attribute or declaration, and calls probes on some inner levels."""

    choices: tuple[int, ...]

    def __call__(self, p: Any) -> Any:
        total = jnp.zeros(())
        for i, (name, child) in enumerate(list(p.items())):
            choice = self.choices[i % len(self.choices)]
            if isinstance(child, pt.ParamTree):
                for _ in range(choice):
                    total = total + Probe(self.choices[1:] or (1,))(child)
            elif choice:
                total = total + p.param(name, child.shape, "zeros").astype("float32").sum()
        return total


@given(trees(holes=False), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_every_column_adds_up(tree: pt.ParamTree, choices: list[int]) -> None:
    report = pt.summary(Probe(tuple(choices)), tree, flops=False)
    total = report.totals["total"]
    assert total["params"] == pt.count(tree, kind="param")
    assert total["state"] == pt.count(tree, kind="state")
    assert total["bytes"] == pt.nbytes(tree)
    for name in ("params", "trained", "state", "bytes"):
        assert sum(getattr(row, name) for row in report.rows) == total[name]


@given(trees(holes=False), st.data())
def test_trainable_matches_what_partition_selects(tree: pt.ParamTree, data: st.DataObject) -> None:
    known = [] if _collides(tree) else list(pt.collect(tree, kind="param"))
    if not known:
        return
    pattern = data.draw(st.sampled_from(known).map(lambda name: f"{name[:1]}.*" if name else ".*"))
    pattern = pattern if pattern[0].isalnum() else ".*"
    report = pt.summary(lambda p: None, tree, trainable=pattern, flops=False)
    trained, frozen = pt.partition(tree, pattern, kind="param")
    assert report.totals["trained"]["params"] == pt.count(trained)
    assert report.totals["frozen"]["params"] == pt.count(frozen, kind="param")


def _collides(tree: pt.ParamTree) -> bool:
    try:
        pt.collect(tree)
    except pt.NameCollisionError:
        return True
    return False


# Which calls are seen


@dataclasses.dataclass(frozen=True)
class Child(nn.Dense):
    """A subclass whose call goes through its parent's."""

    def __call__(self, p: Any, x: Any) -> Any:
        return super().__call__(p, x) + 1


def test_a_call_through_super_is_one_row() -> None:
    net = nn.Residual(nn.Dense(4), Child(4))
    report = of(net, shape(2, 4))
    assert names(report) == ["Residual", "  dense0 Dense", "  child0 Child"]
    assert [row.params for row in report.rows] == [0, 20, 20]


def test_bases_with_an_inherited_call_do_not_hide_another_call() -> None:
    class Loud(nn.Layer):
        pass

    class Twice(Child):
        def __call__(self, p: Any, x: Any) -> Any:
            return 2 * super().__call__(p, x)

    class Quiet(Child):
        pass

    class Mixin:
        def __call__(self, p: Any, x: Any) -> Any:
            return 3 * super().__call__(p, x)  # type: ignore[misc]

    class Both(Loud, Quiet, Twice):
        pass

    class Mixed(Mixin, nn.Dense):
        pass

    x = jnp.ones((1, 2))
    params = pt.from_tree({"weight": jnp.ones((1, 2)), "bias": jnp.zeros(1)})
    assert Both(1)(params, x) == 6  # type: ignore[call-arg]
    assert "__call__" not in vars(Quiet) and "__call__" not in vars(Loud)
    assert Mixed(1)(params, x) == 6
    assert names(pt.summary(Mixed(1), params, x)) == ["Mixed"]
    with pytest.raises(TypeError, match="Loud is a Layer without a __call__"):
        Loud()(params, x)


def test_layers_stay_plain_dataclasses() -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Slots(nn.Layer):
        size: int

        def __call__(self, scope: Any, x: Any, *, twice: bool = False) -> Any:
            """A docstring."""
            return nn.Dense(self.size)(scope.inner, x) * (2 if twice else 1)

    import inspect

    net = Slots(3)
    assert net == Slots(3) and hash(net) == hash(Slots(3)) and net != Slots(4)
    assert list(inspect.signature(net).parameters) == ["scope", "x", "twice"]
    assert Slots.__call__.__doc__ == "A docstring."
    assert Slots.__call__.__qualname__.endswith("Slots.__call__")
    report = of(nn.Sequential(net), shape(2, 4))
    assert names(report) == ["Sequential", "  slots0 Slots", "    slots0_inner Dense"]
    for layer in (nn.Dense(3), Child(2), nn.Sequential(nn.Dense(3), nn.Dropout(0.5))):
        assert pickle.loads(pickle.dumps(layer)) == layer == copy.deepcopy(layer)


def test_scopes_and_inputs_may_be_keywords() -> None:
    def net(p: Any, x: Any, mask: Any, layer: int) -> Any:
        assert layer == 3
        x = nn.MultiHeadAttention(2)(p=p.attend, x=x, padding_mask=mask)
        y, (h, c) = nn.LSTM(4, layout="NTC")(p.lstm, x, nn.LSTM(4).begin_state(2))
        return {"y": y, "h": h}, "text", None, c

    x, mask = shape(2, 5, 8), shape(2, 5, dtype="bool")
    params = pt.abstract(net, x, mask, 3)
    report = pt.summary(net, params, x, layer=3, mask=mask)
    rows = {row.name: row for row in report.rows}
    assert [a.shape for a in rows[""].inputs] == [(2, 5, 8), (2, 5)]
    assert [a.shape for a in rows["attend"].inputs] == [(2, 5, 8), (2, 5)]
    assert [a.shape for a in rows["lstm"].inputs] == [(2, 5, 8), (1, 2, 4), (1, 2, 4)]
    assert [a.shape for a in rows["lstm"].outputs] == [(2, 5, 4), (1, 2, 4), (1, 2, 4)]
    assert len(rows[""].outputs) == 3
    assert "f32[2,5,8] +2" in str(report)


def test_layers_without_parameters_have_rows() -> None:
    net = nn.Sequential(
        nn.Conv2D(2, 3), nn.MaxPool2D(), nn.Activation("relu"), nn.Flatten(), nn.Dropout(0.5), jnp.tanh
    )
    report = of(net, shape(1, 8, 8, 1))
    assert [row.layer for row in report.rows] == [
        "Sequential", "Conv2D", "MaxPool2D", "Activation(relu)", "Flatten", "Dropout", "Lambda(tanh)"
    ]  # fmt: skip


def dense(p: Any, x: Any) -> Any:
    return nn.Dense(4, activation="tanh")(p.inner, x)


def scanned(p: Any, x: Any) -> Any:
    def body(carry: Any, _: Any) -> Any:
        x, total = carry
        x = dense(p, x)
        return (x, total + x.sum()), None

    # The carry begins as a weakly typed number and ends as an array, so jax traces the body twice.
    return jax.lax.scan(body, (x, 0.0), None, length=3)[0]


def looped(p: Any, x: Any) -> Any:
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: dense(p, x), x)


def choosing(p: Any, x: Any) -> Any:
    def other(x: Any) -> Any:
        return nn.Dense(4)(p.other, dense(p, x))

    return jax.lax.cond(x.sum() > 0, other, lambda x: x * 2, x)


def tried(p: Any, x: Any) -> Any:
    try:
        nn.Dense(4, in_units=9)(p.inner, x)
    except ValueError:
        return dense(p, x)


SEEN: dict[str, Callable[..., Any]] = {
    "plain": dense,
    "jit": lambda p, x: jax.jit(dense)(p, x),
    "jit around": jax.jit(dense),
    "closed over by jit": lambda p, x: jax.jit(lambda x: dense(p, x))(x),
    "checkpoint": lambda p, x: jax.checkpoint(dense)(p, x),
    "vmap": lambda p, x: jax.vmap(lambda row: dense(p, row[None])[0])(x),
    "vmap over a scope": lambda p, x: jax.vmap(dense, in_axes=(None, 0))(p, x[:, None])[:, 0],
    "scan": scanned,
    "while": looped,
    "cond": choosing,
    "tried": tried,
    "asked for shapes": lambda p, x: (jax.eval_shape(dense, p, x), dense(p, x))[1],
    "remapped": lambda p, x: dense(jax.tree.map(lambda leaf: 2 * leaf, p), x),
    "cast": lambda p, x: dense(pt.cast(p, {".*": "bfloat16"}), x.astype("bfloat16")),
    "gradient": lambda p, x: jax.grad(lambda x: dense(p, x).sum())(x),
}


INNER = pt.from_tree({"inner": {"weight": shape(4, 4), "bias": shape(4)}})


@pytest.mark.parametrize("name", SEEN)
def test_a_layer_is_seen_wherever_it_is_called(name: str) -> None:
    model = SEEN[name]
    params = INNER
    if name == "cond":
        params = pt.from_tree({**params.to_dict(), "other": params.inner})
    report = pt.summary(model, params, jnp.ones((3, 4)))
    expected = [("", 0), ("inner", 20), *([("other", 20)] if name == "cond" else [])]
    assert [(row.name, row.params) for row in report.rows] == expected
    assert report.rows[1].layer == "Dense"
    check_sums(report)


def test_one_function_under_checkpoint_is_seen_at_each_place() -> None:
    def net(p: Any, x: Any) -> Any:
        for i in range(3):
            x = jax.checkpoint(dense)(p[f"block{i}"], x)
        return x

    report = of(net, shape(2, 4))
    assert [row.name for row in report.rows] == ["", "block0_inner", "block1_inner", "block2_inner"]
    assert [row.params for row in report.rows] == [0, 20, 20, 20]
    assert len({row.flops for row in report.rows[1:]}) == 1
    assert report.rows[1].flops > 2 * 2 * 4 * 4
    again = of(net, shape(2, 4))  # the first trace leaves nothing behind
    assert again.to_dict() == report.to_dict()


def test_a_scope_may_be_carried_by_a_scan() -> None:
    def net(p: Any, x: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            p, x = carry
            return (p, dense(p, x)), None

        return jax.lax.scan(body, (p, x), None, length=3)[0][1]

    assert names(of(net, shape(2, 4))) == ["net", "  inner Dense"]


def test_repeated_blocks_show_their_rows_stacked_and_unstacked() -> None:
    block = nn.Residual(nn.Dense(4, activation="relu"))
    x = shape(2, 4)
    for remat in (False, True):
        net = nn.Sequential(blocks=nn.Repeat(block, 3, remat=remat), head=nn.Dense(4))
        params = pt.abstract(net, x)
        report = pt.summary(net, params, x)
        assert names(report) == [
            "Sequential",
            "  blocks Repeat(3 x)",
            "    blocks Residual",
            "      blocks_dense0 Dense",
            "  head Dense",
        ]
        assert [row.params for row in report.rows] == [0, 0, 0, 3 * 20, 20]
        assert report.rows[3].flops == 3 * (2 * 2 * 4 * 4 + 2 * 4 + 2 * 4)
        assert report.rows[2].flops == 3 * 2 * 4
        apart = pt.summary(net, pt.unstack(params, "blocks"), x)
        assert [row.name for row in apart.rows][1:4] == ["blocks", "blocks_0", "blocks_0_dense0"]
        assert apart.totals == report.totals
        check_sums(apart)


# Floating-point operations


def attention(p: Any, x: Any, mask: Any) -> Any:
    y = nn.MultiHeadAttention(2, causal=True)(p.attend, x, padding_mask=mask)
    return nn.LayerNorm()(p.norm, x + nn.Dense(8, activation="gelu", flatten=False)(p.mlp, y))


def unused(p: Any, x: Any) -> Any:
    nn.Dense(100)(p.dead, x)
    y, (h, _) = jax.jit(lambda x: (dense(p, x), (x * 3, x * 4)))(x)
    return y + h


NETS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "mlp": (nn.Sequential(nn.Dense(32, activation="relu"), nn.Dropout(0.5), nn.Dense(4)), (shape(3, 8),)),
    "cnn": (fashion_cnn.network(2), (shape(2, 28, 28, 1),)),
    "attention": (attention, (shape(2, 5, 8), shape(2, 5, dtype="bool"))),
    "parallel": (nn.Parallel(nn.Dense(3), nn.Dense(5, activation="softmax")), (shape(2, 4),)),
    "norms": (nn.Sequential(nn.GroupNorm(2), nn.InstanceNorm(), nn.RMSNorm()), (shape(2, 6, 4),)),
    "unused": (unused, (shape(2, 4),)),
    "identity": (nn.Flatten(), (shape(2, 4),)),
    **{name: (f, (shape(2, 4),)) for name, f in SEEN.items() if name not in ("scan", "while")},
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_operations_add_up_to_what_xla_counts_for_the_program(name: str) -> None:
    net, inputs = NETS[name]
    params = INNER if name == "cast" else pt.abstract(net, *inputs)
    report = pt.summary(net, params, *inputs)
    folded = 2 * 4 if name == "gradient" else 0  # XLA leaves out a product with ones
    assert report.totals["total"]["flops"] - folded == by_xla(net, params, *inputs)
    check_sums(report)


def test_a_while_loop_counts_once() -> None:
    params = pt.abstract(dense, shape(2, 4))
    report = pt.summary(looped, params, shape(2, 4))
    assert report.rows[1].flops == of(dense, shape(2, 4)).rows[1].flops
    assert report.totals["total"]["flops"] == by_xla(looped, params, shape(2, 4))


def test_the_most_expensive_branch_counts() -> None:
    def net(p: Any, x: Any) -> Any:
        branches = [lambda x: nn.Dense(4)(p.a, x), lambda x: nn.Dense(4)(p.b, nn.Dense(9)(p.c, x))]
        return jax.lax.switch(x[0, 0].astype(int), branches, x)

    x = shape(2, 4)
    report = of(net, x)
    assert [(row.name, row.flops > 0) for row in report.rows[1:]] == [
        ("a", False),
        ("c", True),
        ("b", True),
    ]
    assert report.totals["total"]["flops"] == by_xla(net, pt.abstract(net, x), x)
    check_sums(report)


def test_a_tied_net_has_the_operations_of_an_untied_one() -> None:
    net, params, tokens = tied_model()
    report = pt.summary(net, params, tokens)
    untied = pt.summary(net, pt.untie(params, "decoder_weight"), tokens)
    assert [row.flops for row in report.rows] == [row.flops for row in untied.rows]
    assert untied.totals["total"]["params"] == TIED_IN_PYTORCH + 800


def test_every_iteration_of_a_scan_counts() -> None:
    time, size = 6, 4
    net, x = nn.LSTM(size), shape(6, 2, 3)

    def unrolled(p: Any, x: Any) -> Any:
        i2h = x @ p.l0_i2h_weight.T + p.l0_i2h_bias[None, None]
        h = c = jnp.zeros((2, size))
        ys = []
        for t in range(time):
            gates = i2h[t] + (h @ p.l0_h2h_weight.T + p.l0_h2h_bias[None])
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            ys.append(h)
        return jnp.stack(ys)

    params = pt.abstract(net, x)
    once = by_xla(net, params, x)
    ours = pt.summary(net, params, x).totals["total"]["flops"]
    assert ours > 2 * once
    assert ours == pytest.approx(by_xla(unrolled, params, x), rel=0.02)  # indices differ
    half = of(net, shape(3, 2, 3)).totals["total"]["flops"]
    assert ours == 2 * half


def test_scans_within_scans_multiply() -> None:
    def net(p: Any, x: Any) -> Any:
        def inner(x: Any, _: Any) -> Any:
            return dense(p, x), None

        def outer(x: Any, _: Any) -> Any:
            return jax.lax.scan(inner, x, None, length=3)[0] + x, None

        return jax.lax.scan(outer, x, None, length=5)[0]

    report = of(net, shape(2, 4))
    once = of(dense, shape(2, 4)).rows[1].flops
    assert [row.flops for row in report.rows] == [5 * 2 * 4, 15 * once]


def test_unused_results_do_not_count() -> None:
    report = of(unused, shape(2, 4))
    assert [(row.name, row.flops > 0) for row in report.rows] == [
        ("", True),
        ("dead", False),
        ("inner", True),
    ]
    assert report.unused == ["dead_weight", "dead_bias"]
    assert report.rows[0].flops == 2 * 4 + 2 * 4  # one product and the sum, not the other product


def test_vmapped_calls_count_the_mapped_axis() -> None:
    params = pt.abstract(dense, shape(1, 4))
    report = pt.summary(SEEN["vmap"], params, shape(3, 4))
    assert report.rows[1].inputs[0].shape == (1, 4)
    assert report.rows[1].flops == of(dense, shape(3, 4)).rows[1].flops


def test_equal_layers_are_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = []
    analysed = flops._analysed

    def counted(equations: Any) -> float:
        lowered.append(equations)
        return analysed(equations)

    monkeypatch.setattr(flops, "_analysed", counted)
    net: Any = nn.Sequential(*(nn.Dense(4, activation="relu") for _ in range(200)))
    for _ in range(30):  # and a deep one, in which every level adds its input
        net = nn.Residual(net)
    report = of(net, shape(2, 4))
    assert len(report.rows) == 231
    assert len(lowered) == 2
    assert report.totals["total"]["flops"] == by_xla(net, pt.abstract(net, shape(2, 4)), shape(2, 4))


def test_operations_that_xla_does_not_know_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    analysed = flops._analysed

    def counted(equations: Any) -> float:
        unknown = any(equation.primitive.name == "tanh" for equation in equations.eqns)
        return float("nan") if unknown else analysed(equations)

    monkeypatch.setattr(flops, "_analysed", counted)
    report = of(nn.Sequential(nn.Dense(3), nn.Dense(3, activation="tanh")), shape(2, 4))
    assert [row.flops for row in report.rows] == [0, 54, None]
    assert report.totals["total"]["flops"] is None
    assert str(report).count("?") == 2


def test_a_failing_analysis_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("there is no such backend")

    monkeypatch.setattr(jax, "local_devices", fails)
    report = of(nn.Dense(3), shape(2, 4))
    assert report.rows[0].flops is None
    assert report.rows[0].params == 15


def test_without_operations_nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_analysed", None)
    report = of(nn.Dense(3), shape(2, 4), flops=False)
    assert report.to_dict()["rows"][0]["flops"] is None
    assert "FLOPs" not in str(report) and "?" not in str(report)


# No computation, no side effects


def test_nothing_is_computed_and_the_model_is_traced_once() -> None:
    traces = []

    def counted(x: Any) -> Any:
        traces.append(x)
        return x

    size = 1_000_000  # a terabyte of float32
    net = nn.Sequential(nn.Dense(size), counted, nn.Dense(size))
    params = pt.abstract(net, shape(1, size))
    traces.clear()
    report = pt.summary(net, params, shape(1, size))
    assert len(traces) == 1
    assert report.totals["total"]["params"] == 2 * (size * size + size)
    assert "3.6 TiB" in str(report) and "2.0 T" in str(report)


def test_arrays_shapes_and_tracers_give_the_same(key: jax.Array) -> None:
    net = fashion_cnn.network(2)
    x = jnp.ones((2, 28, 28, 1))
    params = pt.init(net, key, x)
    reports = []

    def inside(params: pt.ParamTree, x: Any) -> Any:
        reports.append(pt.summary(net, params, x).to_dict())
        return x

    inside(params, x)
    inside(jax.tree.map(np.asarray, params), np.asarray(x))
    inside(jax.eval_shape(lambda p: p, params), shape(2, 28, 28, 1))
    jax.jit(inside)(params, x)
    pt.training(inside)(params, x, key=key)
    assert all(report == reports[0] for report in reports[1:])
    assert len(reports) == 5


def test_no_tracer_leaks() -> None:
    net = nn.Sequential(
        nn.LSTM(4), nn.Repeat(nn.Dense(4, flatten=False), 2, remat=True), nn.Dropout(0.5)
    )
    params = pt.abstract(net, shape(3, 2, 4))
    with jax.checking_leaks():
        report = pt.summary(net, params, shape(3, 2, 4))
    assert len(report.rows) == 5
    assert all(
        type(a) is jax.ShapeDtypeStruct for row in report.rows for a in (*row.inputs, *row.outputs)
    )


def test_other_scopes_are_not_affected(key: jax.Array) -> None:
    traces = []

    def counted(x: Any) -> Any:
        traces.append(x)
        return x

    net = nn.Sequential(nn.Dense(3, activation="relu"), counted, nn.Residual(nn.Dense(3)))
    x = jnp.ones((2, 4))
    params = pt.init(net, key, x)
    before = jax.make_jaxpr(net)(params, x)
    step = jax.jit(net)
    y = step(params, x)
    traces.clear()
    pt.summary(net, params, x)
    assert len(traces) == 1
    after = jax.make_jaxpr(net)(params, x)
    assert str(after) == str(before)
    assert all(call_of(equation) is None for equation in after.eqns)
    assert all(str(equation.source_info.name_stack) == "" for equation in after.eqns)
    traces.clear()
    np.testing.assert_array_equal(step(params, x), y)
    assert not traces  # the compiled function is still cached


def test_errors_of_the_model_propagate() -> None:
    class Broken(Exception):
        pass

    error = Broken("by the model")

    def net(p: Any, x: Any) -> Any:
        raise error

    params = pt.from_tree({"w": jnp.ones(2)})
    with pytest.raises(Broken, match="by the model") as caught:
        pt.summary(nn.Sequential(nn.Sequential(body=Wrapped(net))), params, 1.0)
    assert caught.value is error
    net = nn.Sequential(nn.Dense(3))
    small = pt.abstract(net, shape(2, 4))
    with pytest.raises(pt.MismatchError, match="`dense0_weight` has shape .* the model needs"):
        pt.summary(net, small, shape(2, 5))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        pt.summary(nn.Dense(3), params)


@dataclasses.dataclass(frozen=True)
class Wrapped(nn.Layer):
    """A function of scope and input as a layer."""

    f: Callable[..., Any]

    def __call__(self, p: Any, x: Any) -> Any:
        return self.f(p, x)


# Arguments that do not fit


def test_arguments_in_another_order() -> None:
    net, x = nn.Dense(3), jnp.ones((2, 4))
    params = pt.abstract(net, x)
    with pytest.raises(TypeError, match=r"takes a model first, .*but found ParamTree\. Make"):
        pt.summary(params, net, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="found the class Dense. Make an instance of a layer, as in"):
        pt.summary(nn.Dense, params, x)
    with pytest.raises(TypeError, match="but found dict. pt.abstract.*pt.from_tree"):
        pt.summary(net, params.to_dict(), x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameters second, .* but found ArrayImpl. pt.abstract"):
        pt.summary(net, x, params)  # type: ignore[arg-type]


def test_a_tree_with_holes() -> None:
    net, x = nn.Dense(3), jnp.ones((2, 4))
    part = pt.select(pt.abstract(net, x), "weight")
    with pytest.raises(pt.ParamTreeError, match="1 of the 2 leaves .* are holes. Fill .*trainable"):
        pt.summary(net, part, x)


def test_a_pattern_that_matches_no_parameter() -> None:
    net, x = nn.Sequential(nn.Dense(3), nn.BatchNorm()), jnp.ones((2, 4))
    params = pt.abstract(net, x)
    with pytest.raises(pt.RuleError, match="summary: 'dens0.*' matches no name; the closest.* 'batch"):
        pt.summary(net, params, x, trainable=["dens0.*", "batchnorm0_running.*"])
    report = pt.summary(net, params, x, trainable=["dense0_.*", ".*gamma"])
    assert report.totals["trained"]["params"] == 15 + 3


def test_a_tree_and_a_model_of_nothing() -> None:
    report = pt.summary(lambda p: None, pt.from_tree({}))
    assert report.totals["total"] == {"params": 0, "trained": 0, "state": 0, "bytes": 0, "flops": 0}
    assert str(report).split("\n")[2].strip() == "<lambda>"


def test_a_model_in_training_has_the_rows_and_work_of_training() -> None:
    net = nn.Sequential(nn.Dense(3), nn.Dropout(0.5), nn.BatchNorm(), head=nn.Dense(2))
    x, params = jnp.ones((2, 4)), pt.abstract(net, jnp.ones((2, 4)))
    report = pt.summary(pt.training(net), params, x, key=jax.random.key(0))
    assert names(report) == [
        "training(Sequential)",
        "  dense0 Dense",
        "  dropout0 Dropout",
        "  batchnorm0 BatchNorm",
        "  head Dense",
    ]
    check_sums(report)
    plain = pt.summary(net, params, x)
    assert [row.params for row in report.rows] == [row.params for row in plain.rows]
    assert report.rows[2].flops > plain.rows[2].flops == 0  # it draws a mask
    assert report.rows[3].flops > plain.rows[3].flops  # it computes statistics

    def unused(p: Any, x: Any) -> Any:
        p.param("spare", (3,), pt.initializers.One())
        return net(p.net, x)

    tree = pt.abstract(unused, x)
    report = pt.summary(pt.training(unused), tree, x, key=jax.random.key(0))
    assert report.unused == ["spare"]


def test_rows_say_which_parametrisation_they_read_through() -> None:
    net = nn.Sequential(nn.Dense(3), nn.Repeat(nn.Dense(3), 2), nn.Dense(4))
    x, pz = jnp.ones((2, 3)), pt.parametrizations
    inner = pt.reparametrize(net, {"dense0_weight": pz.LoRA(2), "repeat.*": pz.WeightNorm()})
    model = pt.reparametrize(inner, {"dense0_weight_a": pz.Frozen()})
    report = of(model, x)
    check_sums(report)
    assert names(report)[0] == "reparametrize(reparametrize(Sequential))"
    assert [row.parametrized for row in report.rows] == [
        {},
        {"dense0_weight": "LoRA", "dense0_weight_a": "Frozen"},
        {},
        {"repeat0_weight": "WeightNorm", "repeat0_bias": "WeightNorm"},
        {},
    ]
    lines = str(report).split("\n")
    assert lines[3].startswith("  dense0: Dense (weight: LoRA) (weight_a: Frozen) ")
    assert lines[5].startswith("    Dense (weight, bias: WeightNorm) ")
    assert report.to_dict()["rows"][1]["parametrized"]["dense0_weight"] == "LoRA"


def test_what_is_read_without_being_declared_or_under_a_second_name() -> None:
    def net(p: Any, x: Any) -> Any:
        return nn.Dense(4, use_bias=False)(p.again, x) @ p.embed.weight + p.embed.bias[None]

    params = pt.from_tree({"embed": {"weight": shape(4, 4), "bias": shape(4)}, "again": {}})
    params = pt.tie(pt.insert(params, {"again/weight": shape(4, 4)}), {"again/weight": "embed/weight"})
    rules = {"embed_weight": pt.parametrizations.WeightNorm()}
    report = pt.summary(pt.reparametrize(net, rules), pt.expand(params, rules), jnp.ones((2, 4)))
    check_sums(report)
    assert {name: how for row in report.rows for name, how in row.parametrized.items()} == {
        "embed_weight": "WeightNorm"
    }


def test_long_names_leave_room_for_the_rest_of_a_note() -> None:
    def model(p: Any, x: Any) -> Any:
        for letter in "abc":
            p.param(letter * 80, (), pt.initializers.One())
        return x

    shown = repr(pt.summary(model, pt.abstract(model, 1.0), 1.0))
    assert f"The output does not depend on {'a' * 80}, {'b' * 80} and 1 more." in shown
