"""The structure knows stacks: each copy is initialised, split, loaded and found as itself."""

import copy
import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree.core.tree import flatten
from tests.catalogue import same

K = jax.random.key(0)
X = jnp.ones((2, 6))


def block() -> Any:
    return nn.Sequential(nn.Dense(6, activation="tanh"), nn.BatchNorm())


NETS: dict[str, Any] = {
    "stack": nn.Repeat(nn.Dense(6), 8),
    "named": nn.Sequential(nn.Dense(6), blocks=nn.Repeat(block(), 3), head=nn.Dense(2)),
    "nested": nn.Repeat(nn.Sequential(inner=nn.Repeat(nn.Dense(6), 3)), 3),
    "nested at one level": nn.Repeat(nn.Repeat(nn.Dense(6), 3), 3),
    "nested, other sizes": nn.Sequential(a=nn.Repeat(nn.Sequential(b=nn.Repeat(nn.Dense(6), 2), c=nn.Dense(6)), 3)),
    "tied": nn.Sequential(shared := nn.Repeat(nn.Dense(6), 3), shared),
    "tied inside": nn.Repeat(nn.Sequential(inside := nn.Dense(6), inside), 3),
}  # fmt: skip
RULES: dict[str, Any] = {
    "xavier": {".*weight": init.Xavier()},
    "gaussian": {".*weight": init.Xavier("gaussian", "in", 2)},
    "orthogonal": {".*weight": init.Orthogonal()},
    "lstm bias": {".*bias": lambda key, shape, dtype: jnp.arange(shape[0], dtype=dtype)},
    "mixed": {".*": init.Mixed([".*weight", ".*"], [init.Xavier(), init.One()])},
    "mixed by copy": {".*weight": init.Mixed([".*1_weight", ".*"], [init.One(), init.Normal()])},
}
nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


@nets
@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(made, id=name, marks=[pytest.mark.slow] if name in ("gaussian", "mixed") else [])
        for name, made in RULES.items()
    ],
)
def test_reinit_of_a_stack_equals_init_with_these_rules(net: Any, rules: Any) -> None:
    params, expected = pt.init(net, K, X), pt.init(net, K, X, rules=rules)
    pt.testing.assert_trees_equal(pt.reinit(params, K, rules), expected)
    boxed = pt.reinit({"p": pt.reinit(params, jax.random.key(9), {".*": "ones"})}, K, rules)
    assert jax.tree.structure(boxed["p"]) == jax.tree.structure(params)
    jitted = jax.jit(lambda p: pt.reinit(p, K, rules))(params)
    pt.testing.assert_trees_close(jitted, expected, rtol=1e-4, atol=1e-6)


def test_copies_are_not_a_fan() -> None:
    net = nn.Repeat(nn.Dense(64), 8)
    x = jnp.ones((2, 64))
    first = pt.init(net, K, x, rules={"weight": init.Xavier()})
    again = pt.reinit(pt.init(net, K, x), K, {"weight": init.Xavier()})
    assert abs(float(first.weight.std()) - np.sqrt(3 / 64) / np.sqrt(3)) < 2e-3
    pt.testing.assert_trees_equal(again, first)
    orthogonal = pt.reinit(first, K, {"weight": init.Orthogonal(1.0)}).weight
    np.testing.assert_allclose(orthogonal[3] @ orthogonal[3].T, np.eye(64), atol=1e-4)
    bias = pt.reinit(first, K, {"bias": init.LSTMBias()}).bias
    assert bias.shape == (8, 64) and np.array_equal(bias[5], init.LSTMBias()(K, (64,), jnp.float32))


def test_each_copy_is_the_layer_of_its_name() -> None:
    params = pt.init(NETS["named"], K, X, rules={".*weight": init.Xavier()})
    unrolled = nn.Sequential(
        nn.Dense(6), blocks=nn.Sequential(**{str(i): block() for i in range(3)}), head=nn.Dense(2)
    )
    alone = pt.init(unrolled, K, X, rules={".*weight": init.Xavier()})
    pt.testing.assert_trees_close(pt.unstack(params, "blocks").to_dict(), alone.to_dict(), rtol=1e-5)


def test_load_takes_stacks_and_copies() -> None:
    params = pt.init(NETS["named"], K, X)
    flat = pt.collect(params)
    again = pt.init(NETS["named"], jax.random.key(5), X, rules={".*": init.Load(flat)})
    pt.testing.assert_trees_equal(again, params)
    pt.testing.assert_trees_equal(pt.reinit(again, K, {".*": init.Load(flat)}), params)
    loose = pt.collect(pt.unstack(params, "blocks"))
    pt.testing.assert_trees_equal(pt.reinit(again, K, {".*": init.Load(loose)}), params)
    with pytest.raises(pt.RuleError, match="Load has no array for `blocks_0_dense0_weight`"):
        pt.reinit(params, K, {".*": init.Load({})})


@nets
def test_subsets_reinitialise_as_the_whole(net: Any) -> None:
    params = pt.init(net, K, X)
    table = {".*": init.Normal(0.5)}
    every = pt.init(net, K, X, rules=table)
    for name in pt.collect(params):
        part = pt.reinit(params, K, {name: init.Normal(0.5)})
        np.testing.assert_array_equal(pt.collect(part)[name], pt.collect(every)[name])
        chosen, rest = pt.partition(params, name)
        merged = pt.merge(pt.reinit(chosen, K, {".*": init.Normal(0.5)}), rest)
        pt.testing.assert_trees_equal(merged, part)
    packed = pt.reinit(pt.pack(params), K, table)
    pt.testing.assert_trees_equal(pt.unpack(packed), every)


def test_a_part_of_the_tree_still_knows() -> None:
    params = pt.init(NETS["named"], K, X)
    one = pt.reinit(params.blocks, K, {".*weight": init.Xavier()})
    assert float(jnp.abs(one.dense0.weight).max()) <= np.sqrt(3 / 6) and one.dense0.weight.std() > 0.2
    below = pt.reinit(params.blocks.dense0, K, {"weight": init.Xavier()})
    assert below.weight.std() > 0.2
    flat = pt.reinit(pt.collect(params), K, {".*weight": init.Xavier()})
    assert flat["blocks_dense0_weight"].std() > 0.2


def test_an_ensemble_that_hides_the_stack_is_refused() -> None:
    net = nn.Repeat(nn.Dense(6), 8)
    many = jax.vmap(lambda key: pt.init(net, key, X))(jax.random.split(K, 5))
    with pytest.raises(
        pt.MismatchError, match=r"reinit: `weight` has shape \(5, 8, 6, 6\), but is a stack of \(8,\)"
    ):
        pt.reinit(many, K, {"weight": init.Xavier()})
    keys = jax.random.split(K, 5)
    again = jax.vmap(lambda p, key: pt.reinit(p, key, {"weight": init.Xavier()}))(many, keys)
    pt.testing.assert_trees_close(
        again,
        jax.vmap(lambda key: pt.init(net, key, X, rules={"weight": init.Xavier()}))(keys),
        rtol=1e-5,
    )


LEVELS = {
    "named": ["blocks"],
    "nested": ["", "inner"],
    "nested, other sizes": ["a", "a/b"],
    "nested at one level": [""],
}


@pytest.mark.parametrize("name", LEVELS)
def test_unstacking_any_level_gives_the_same_model(name: str) -> None:
    # Orthogonal weights do not amplify rounding, as a product of nine others may.
    net, params = NETS[name], pt.init(NETS[name], K, X, rules={".*weight": init.Orthogonal(1.2)})
    y = net(params, X)
    for level in LEVELS[name]:
        loose = pt.unstack(params, level)
        np.testing.assert_allclose(net(loose, X), y, rtol=1e-5, atol=1e-6)
        assert same(pt.stack(loose, level), params)
    both = params
    for level in reversed(LEVELS[name]):
        both = pt.unstack(both, level)
    np.testing.assert_allclose(net(both, X), y, rtol=1e-5, atol=1e-6)
    for level in LEVELS[name]:
        both = pt.stack(both, level)
    assert same(both, params)


def test_the_inner_level_of_equal_stacks_is_split_along_its_own_axis() -> None:
    params = pt.init(NETS["nested"], K, X)
    inner = pt.unstack(params, "inner")
    np.testing.assert_array_equal(inner["inner/1/weight"], params.inner.weight[:, 1])
    outer = pt.unstack(params, "")
    np.testing.assert_array_equal(outer["1/inner/weight"], params.inner.weight[1])
    one = pt.unstack(pt.unstack(NETS_AT_ONE := pt.init(NETS["nested at one level"], K, X), ""), "2")
    np.testing.assert_array_equal(one["2/1/weight"], NETS_AT_ONE.weight[2, 1])


FORMS = ["stacked", "outer", "inner", "both"]


def in_form(params: pt.ParamTree, form: str, levels: list[str]) -> pt.ParamTree:
    if form in ("inner", "both"):
        params = pt.unstack(params, levels[1])
    return pt.unstack(params, levels[0]) if form in ("outer", "both") else params


@pytest.mark.parametrize("name", ["nested", "nested, other sizes"])
@pytest.mark.parametrize(("written", "read"), [*itertools.product(FORMS, FORMS)])
def test_a_file_of_any_form_loads_into_any_form(
    name: str, written: str, read: str, tmp_path: Any
) -> None:
    params = pt.init(NETS[name], K, X, rules={".*weight": init.Normal(0.7)})
    pt.save(tmp_path / "a.safetensors", in_form(params, written, LEVELS[name]))
    like = in_form(jax.tree.map(jnp.zeros_like, params), read, LEVELS[name])
    if {written, read} == {"outer", "inner"}:  # neither form has names for the copies of the other
        with pytest.raises(pt.LoadError, match="is missing; the closest unexpected name is"):
            pt.load(tmp_path / "a.safetensors", like=like)
        return
    loaded = pt.load(tmp_path / "a.safetensors", like=like)
    pt.testing.assert_trees_equal(loaded, in_form(params, read, LEVELS[name]))


def test_stacks_survive_files_and_verbs(tmp_path: Any) -> None:
    params = pt.init(NETS["named"], K, X)
    for ending in ("safetensors", "npz"):
        pt.save(tmp_path / f"a.{ending}", params)
        assert same(pt.load(tmp_path / f"a.{ending}"), params)
    for again in (
        pt.rename(params, [("blocks", "layers"), ("layers", "blocks")]),
        pt.drop(pt.insert(params, {"more": jnp.ones(2)}), "more"),
        pt.untie(pt.tie(params, {})),
        pt.from_tree({"p": params}).p,
        pickle.loads(pickle.dumps(params)),
        copy.deepcopy(params),
        jax.jit(lambda t: jax.tree.map(lambda x: x, t))(params),
    ):
        assert flatten(again)[0] is flatten(params)[0]
    deeper = pt.rename(params, [("^blocks", "encoder/blocks")])
    np.testing.assert_array_equal(
        pt.unstack(deeper, "encoder/blocks")["encoder/blocks/1/dense0/weight"],
        params.blocks.dense0.weight[1],
    )
    moved = pt.reinit(pt.insert(pt.from_tree({}), {"a/b": params}), K, {".*weight": init.Xavier()})
    assert moved["a/b/blocks/dense0/weight"].std() > 0.2


def test_stacks_differ_by_name() -> None:
    params = pt.init(nn.Repeat(nn.Dense(6), 8), K, X)
    plain = pt.from_tree(params.to_dict())
    found = pt.diff(params, plain).to_dict()
    assert "stack" in str(found)
    with pytest.raises(
        pt.MismatchError, match=r"`weight`: expected a stack of \(8,\), found not stacked"
    ):
        pt.check_match(params, plain)
    assert "weight[8]" in repr(flatten(params)[0])
