"""Dividing trees by name, gradients by name, and what goes wrong with both."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paramtree as pt
from paramtree import nn
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, leaf, same, siblings, tied, trees, with_holes, with_kinds

PATTERNS = st.one_of(st.just(".*"), st.text("ab_0.*|()", max_size=5), st.sampled_from([".*w.*", "d.*"]))


def naive(tree: pt.ParamTree) -> tuple[dict[tuple[str, ...], Any], dict[int, set[str]]]:
    """Every path with its leaf, and for every stored leaf all of its names: by to_dict alone."""
    flat: dict[tuple[str, ...], Any] = {}
    todo: list[tuple[tuple[str, ...], Any]] = [((), tree.to_dict())]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo += [((*path, name), below) for name, below in reversed(value.items())]
        else:
            flat[path] = value
    names: dict[int, set[str]] = {}
    for path, value in flat.items():
        names.setdefault(id(value), set()).add("_".join(path))
    return flat, names


def naive_matches(tree: pt.ParamTree, pattern: str) -> dict[str, bool]:
    flat, names = naive(tree)
    return {
        "/".join(path): any(re.fullmatch(pattern, name) for name in names[id(value)])
        for path, value in flat.items()
    }


def distinct(tree: pt.ParamTree) -> pt.ParamTree:
    """The tree with leaves that are all different objects."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


@given(trees(), PATTERNS)
def test_mask_labels_select_and_partition_agree_with_a_naive_version(
    tree: pt.ParamTree, pattern: str
) -> None:
    tree = distinct(tree)
    try:
        re.compile(pattern)
    except re.error:
        for verb in (pt.mask, pt.select, pt.partition):
            with pytest.raises(pt.RuleError, match="not a regular expression"):
                verb(tree, pattern)
        return
    wanted = naive_matches(tree, pattern)
    if not any(wanted.values()):
        for verb in (pt.mask, pt.select, pt.partition):
            with pytest.raises(pt.RuleError, match="matches no"):
                verb(tree, pattern)
        return
    mask = pt.mask(tree, pattern)
    assert {path: mask[path] for path in wanted} == wanted
    labels = pt.labels(tree, {pattern: "in"}, default="out")
    assert {path: labels[path] == "in" for path in wanted} == wanted
    chosen, rest = pt.partition(tree, pattern)
    assert same(chosen, pt.select(tree, pattern))
    for path, hit in wanted.items():
        assert (path in chosen) == hit
        assert (path in rest) == (not hit)
        assert (chosen if hit else rest)[path] is tree[path]
    for merged in (pt.merge(chosen, rest), pt.merge(rest, chosen)):
        assert flatten(merged)[0] is flatten(tree)[0]
        assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True))


@given(trees(), st.sampled_from(["param", "state"]))
def test_partition_by_kind_merges_back(tree: pt.ParamTree, kind: str) -> None:
    one, other = pt.partition(tree, kind=kind)
    assert flatten(pt.merge(one, other))[0] is flatten(tree)[0]
    assert len(pt.collect(one, sep="/")) == len(pt.collect(tree, kind=kind, sep="/"))
    assert len(pt.collect(other, kind=kind, sep="/")) == 0


@pytest.mark.parametrize("name", CATALOGUE)
def test_parts_go_through_transforms(name: str) -> None:
    tree = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), CATALOGUE[name]())
    leaves = list(pt.collect(tree, sep="/"))
    if not leaves:
        assert flatten(pt.merge(*pt.partition(tree)))[0] is flatten(tree)[0]
        return
    pattern = re.escape(leaves[0].replace("/", "_"))
    chosen, rest = pt.partition(tree, pattern)
    new = jax.jit(lambda c, r: pt.merge(jax.tree.map(lambda x: x + 1, c), r))(chosen, rest)
    assert flatten(new)[0] is flatten(tree)[0]
    np.testing.assert_array_equal(new[leaves[0]], tree[leaves[0]] + 1)


def test_a_part_of_a_part_and_a_view_of_a_part() -> None:
    tree = tied()
    one = pt.select(tree, "embed.*|block.*")
    two, three = pt.partition(one, ".*_w")
    assert list(pt.collect(two)) == ["block_a_w"]
    assert same(pt.merge(two, three), one)
    assert same(pt.merge(two, pt.select(tree, "decoder_bias"), three), tree)
    assert same(pt.merge(pt.select(tree.block, ".*w"), pt.select(tree.block, ".*b")), tree.block)
    assert list(pt.collect(one.decoder)) == ["weight"]


def test_several_patterns_and_kinds() -> None:
    tree = siblings()
    assert list(pt.collect(pt.select(tree, ["dense0_.*", "dense11_bias"]))) == [
        "dense0_weight", "dense0_bias", "dense11_bias",
    ]  # fmt: skip
    tree = with_kinds({"bn/gamma": "param", "bn/mean": "state"})
    assert pt.mask(tree, kind="state").to_dict() == {"bn": {"gamma": False, "mean": True}}
    assert pt.mask(tree, ".*", kind="param").to_dict() == {"bn": {"gamma": True, "mean": False}}
    with pytest.raises(pt.RuleError, match="'bn_mean' matches no name of kind param"):
        pt.select(tree, "bn_mean", kind="param")


def test_tables_of_masks_and_labels() -> None:
    tree = siblings()
    table = {"dense0_bias": False, "dense0_.*": True}
    assert pt.mask(tree, table, default=False).dense0.to_dict() == {"weight": True, "bias": False}
    assert pt.labels(tree, {".*weight": 0, ".*": None}).dense3.to_dict() == {"weight": 0, "bias": None}
    assert pt.labels(tree, {".*": 1}).dense0.weight is not pt.mask(tree, {".*": True}).dense0.weight


def test_a_mask_is_made_once() -> None:
    tree = siblings()
    assert pt.mask(tree, ".*weight") is pt.mask(siblings(), ".*weight")
    assert pt.mask(tree, {".*": True}) is not pt.mask(tree, {".*": False})
    labels = pt.labels(tree, {".*": 1})
    assert labels is pt.labels(tree, {".*": 1})
    assert pt.labels(tree, {".*": True}).dense0.bias is True


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        (lambda t: pt.mask(t, "embd.*"), pt.RuleError, ["'embd.*' matches no name", "embed_weight"]),
        (lambda t: pt.mask(t, ".*weigth"), pt.RuleError, ["'.*weigth' matches no name; the closest are embed_weight"]),
        (lambda t: pt.mask(t, {"embed.*": True}), pt.RuleError, ["no pattern matches block_a_w, block_a_b, decoder_bias"]),
        (lambda t: pt.mask(t, {"embed.*": True, "decoder.*": False, ".*": True}), pt.RuleError,
         ["embed_weight by 'embed.*', decoder_weight by 'decoder.*'", "one rule"]),
        (lambda t: pt.mask(t, {"embed.*": 1, ".*": "x"}), pt.RuleError, ["'embed.*' gives 1; '.*' gives 'x'", "True or False"]),
        (lambda t: pt.labels(t, {".*": []}), pt.RuleError, ["'.*' gives []", "hashable"]),
        (lambda t: pt.labels(t, "x"), pt.RuleError, ["the rules of labels are a mapping"]),
        (lambda t: pt.cast(t, {".*": "flaot32"}), pt.RuleError, ["'.*' gives 'flaot32'", "a floating dtype"]),
        (lambda t: pt.cast(t, jnp.int32), pt.RuleError, ["a floating dtype"]),
        (lambda t: pt.cast(t, {"nothing": jnp.bfloat16}), pt.RuleError, ["'nothing' matches no name"]),
        (lambda t: pt.select(t, ["a.*", "zz", "embed.*"]), pt.RuleError, ["'a.*' matches no", "'zz' matches no name"]),
        (lambda t: pt.select(t, 3), pt.RuleError, ["found 3 of type int"]),
        (lambda t: pt.select(t, kind="buffer"), ValueError, ["kind is 'param', 'state' or None"]),
        (lambda t: pt.merge(), TypeError, ["merge takes the parts"]),
        (lambda t: pt.merge(pt.select(t, "embed.*"), pt.select(t, ".*weight|.*bias")), pt.MismatchError,
         ["more than one part has embed_weight"]),
        (lambda t: pt.merge(t, siblings()), pt.MismatchError, ["part 2 is not like the first:", "`dense0_weight` is extra.", "`embed_weight` is missing"]),
        (lambda t: pt.merge(t, pt.untie(t)), pt.MismatchError, ["`decoder_weight`: expected tied to `embed_weight`, found not tied."]),
        (lambda t: pt.merge(t, t.to_dict()), pt.MismatchError, ["the tree: expected ParamTree, found dict."]),
        (lambda t: pt.merge({"a": 1, "b": 2}, {"a": None, "b": 3}), pt.MismatchError, ["more than one part has ['b']"]),
    ],
)  # fmt: skip
def test_mistakes_are_listed(call: Any, kind: type, parts: list[str]) -> None:
    with pytest.raises(kind) as raised:
        call(tied())
    for text in parts:
        assert text in str(raised.value)


def test_cast() -> None:
    tree = pt.from_tree(
        {"w": jnp.ones(2), "n": jnp.arange(2), "np": np.ones(2, np.float32), "k": jax.random.key(0)}
    )
    half = pt.cast(tree, jnp.bfloat16)
    assert [str(leaf.dtype) for leaf in jax.tree.leaves(half)] == [
        "bfloat16",
        "int32",
        "bfloat16",
        "key<fry>",
    ]
    assert pt.cast(tree, {"w": "float16"}).np.dtype == np.float32
    shapes = pt.cast(jax.eval_shape(lambda: tied()), jnp.bfloat16)
    assert shapes.embed.weight.dtype == jnp.bfloat16
    assert pt.ties(pt.cast(tied(), jnp.bfloat16)) == pt.ties(tied())
    assert pt.cast({"a": jnp.ones(2), "f": jax.nn.relu}, jnp.float16)["a"].dtype == jnp.float16
    assert flatten(pt.cast(pt.from_tree({}), jnp.float16))[0] is flatten(pt.from_tree({}))[0]


# Other pytrees


def foreign() -> dict[str, Any]:
    trees: dict[str, Any] = {
        "dict": {"b": {"w": leaf(0), "c": leaf(1)}, "a": [leaf(2), (leaf(3), None)]}
    }
    linen = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    eqx = pytest.importorskip("equinox")
    hk = pytest.importorskip("haiku")
    x = jnp.ones((1, 3))
    trees["linen"] = linen.Dense(4).init(jax.random.key(0), x)
    trees["nnx"] = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    trees["equinox"] = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    trees["haiku"] = hk.transform(lambda x: hk.nets.MLP([4, 2])(x)).init(jax.random.key(0), x)
    with jax.numpy_dtype_promotion("standard"):
        trees["optax"] = optax.adam(1e-3).init(tied())
    return trees


@pytest.mark.parametrize("name", ["dict", "linen", "nnx", "equinox", "haiku", "optax"])
def test_other_pytrees_come_back_in_their_containers(name: str) -> None:
    tree = foreign()[name]
    names = list(pt.collect(tree))
    pattern = re.escape(names[0])
    mask = pt.mask(tree, pattern)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert sum(jax.tree.leaves(mask)) == 1
    labels = pt.labels(tree, {pattern: "x"}, default="y")
    assert jax.tree.leaves(labels).count("x") == 1
    chosen, rest = pt.partition(tree, pattern)
    assert type(chosen) is type(rest) is type(tree)
    assert list(pt.collect(chosen)) == names[:1]
    assert list(pt.collect(rest)) == names[1:]
    merged = pt.merge(chosen, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True))
    if name not in ("optax",):
        arrays = pt.select(tree)
        masked = optax.masked(optax.sgd(1.0), pt.mask(arrays, pattern))
        updates, _ = masked.update(arrays, masked.init(arrays))
        assert jax.tree.structure(updates) == jax.tree.structure(arrays)
    with pytest.raises(pt.RuleError, match="matches no name"):
        pt.mask(tree, "no such thing")


def test_optimiser_states_by_name() -> None:
    params = tied()
    with jax.numpy_dtype_promotion("standard"):
        state = optax.chain(optax.clip(1.0), optax.adamw(1e-3, mask=pt.mask(params, ".*weight"))).init(
            params
        )
    assert list(pt.collect(state, ".*mu.*weight")) == ["1_0_mu_embed_weight"]
    assert list(pt.collect(state, ".*nu_decoder.*")) == ["1_0_nu_decoder_weight", "1_0_nu_decoder_bias"]


# Gradients


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["body"]["w"]) @ params["head"]["w"]))


def two_layers() -> dict[str, Any]:
    w = jax.random.normal(jax.random.key(1), (2, 4, 4))
    return {"body": {"w": w[0]}, "head": {"w": w[1]}}


@pytest.mark.parametrize("make", [lambda: pt.from_tree(two_layers()), two_layers], ids=["tree", "dict"])
def test_gradients_by_name(make: Any) -> None:
    params, x = make(), jnp.ones((3, 4))
    full = jax.grad(loss)(params, x)
    for wrt in (None, ".*", ["body_w", "head_w"]):
        grads = pt.grad(loss, wrt)(params, x)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, grads, full)
    value, grads = jax.jit(pt.value_and_grad(loss, wrt="head.*"))(params, x)
    np.testing.assert_allclose(value, loss(params, x), rtol=1e-6)
    assert list(pt.collect(grads)) == ["head_w"]
    np.testing.assert_allclose(pt.collect(grads)["head_w"], full["head"]["w"], rtol=1e-4, atol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(pt.select(params, "head.*"))
    with_aux = lambda p, x: (loss(p, x), "aux")  # noqa: E731  # a function in one line
    (_, aux), _ = pt.value_and_grad(with_aux, has_aux=True)(params, x)
    assert aux == "aux"
    assert pt.grad(with_aux, "head.*", has_aux=True)(params, x)[1] == "aux"


def dots(jaxpr: Any) -> int:
    inner = [p for eqn in jaxpr.eqns for p in eqn.params.values() if hasattr(p, "jaxpr")]
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(
        dots(p.jaxpr) for p in inner
    )


def test_frozen_leaves_cost_no_backward_pass() -> None:
    params, x = pt.from_tree(two_layers()), jnp.ones((3, 4))
    count = {
        wrt: dots(jax.make_jaxpr(pt.grad(loss, wrt))(params, x).jaxpr)
        for wrt in (".*", "head.*", "body.*")
    }
    # Two products forward. Backward: one for each weight, and one to reach the body through the head.
    assert count == {".*": 5, "head.*": 3, "body.*": 4}
    out = jax.make_jaxpr(pt.grad(loss, "head.*"))(params, x).jaxpr.outvars
    assert [var.aval.shape for var in out] == [(4, 4)]


def test_state_and_whole_numbers_are_not_trained(key: jax.Array) -> None:
    tree = pt.from_tree({"bn": with_kinds({"gamma": "param", "mean": "state"}), "steps": jnp.int32(3)})
    f = lambda p: jnp.sum(p.bn.gamma * p.bn.mean) * p.steps.astype(jnp.float32)  # noqa: E731
    grads = pt.grad(f)(tree)
    assert list(pt.collect(grads)) == ["bn_gamma"]
    np.testing.assert_array_equal(grads.bn.gamma, 3 * tree.bn.mean)
    assert list(pt.collect(pt.grad(f, "bn.*")(tree))) == ["bn_gamma"]  # state is never trained
    with pytest.raises(pt.RuleError, match="'.*mean' matches no name of kind param"):
        pt.grad(f, ".*mean")(tree)
    with pytest.raises(pt.RuleError, match=r"cannot differentiate with respect to steps \(int32\)"):
        pt.grad(f, "bn.*|steps")(tree)
    with pytest.raises(pt.RuleError, match="'bnn.*' matches no name"):
        pt.grad(f, "bnn.*")(tree)


def test_a_tied_leaf_is_differentiated_through_all_of_its_names() -> None:
    f = lambda p: jnp.sum(p.embed.weight * 2 + p.decoder.weight * 3)  # noqa: E731
    for wrt in ("embed.*", "decoder_weight", None):
        assert float(pt.grad(f, wrt)(tied()).embed.weight[0, 0]) == 5


def test_training_a_part_with_optax(key: jax.Array) -> None:
    net = nn.Sequential(nn.Dense(4, activation="tanh"), shared := nn.Dense(4), shared, head=nn.Dense(2))
    x = jax.random.normal(key, (5, 3))
    params = pt.init(net, key, x)
    trainable, frozen = pt.partition(params, "head_.*|dense1.*")
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(trainable)
    traces = []

    @jax.jit
    def step(trainable: Any, state: Any) -> Any:
        traces.append(1)
        grads = jax.grad(lambda t: jnp.mean(net(pt.merge(t, frozen), x) ** 2))(trainable)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state

    before = net(params, x)
    for _ in range(5):
        trainable, state = step(trainable, state)
    after = pt.merge(trainable, frozen)
    assert len(traces) == 1
    assert flatten(after)[0] is flatten(params)[0]
    assert after.dense0.weight is params.dense0.weight
    assert float(jnp.mean(net(after, x) ** 2)) < float(jnp.mean(before**2))


def test_with_holes_printing_and_reading() -> None:
    part = pt.select(tied(), "decoder_bias")
    assert repr(part).splitlines() == [
        "Parameter decoder_bias (shape=(2,), dtype=float32)",
        "(6 holes)",
    ]
    with pytest.raises(
        pt.MissingError, match="`embed_weight` is a hole: select or partition left it out"
    ):
        part.embed.weight  # noqa: B018  # reading is the test
    assert same(pt.merge(part, with_holes(tied(), [0, 1, 2])), tied())
