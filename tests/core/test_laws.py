"""Laws that hold for every tree, from the catalogue or generated."""

import copy
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, WITHOUT_HOLES, same, siblings, tied, trees

every_tree = pytest.mark.parametrize("name", CATALOGUE)
every_whole_tree = pytest.mark.parametrize("name", WITHOUT_HOLES)


@given(trees())
def test_flatten_and_unflatten_are_inverse(tree: pt.ParamTree) -> None:
    leaves, treedef = jax.tree.flatten(tree)
    again = jax.tree.unflatten(treedef, leaves)
    assert same(tree, again)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(again), strict=True))
    assert jax.tree.structure(again) == treedef
    assert hash(jax.tree.structure(again)) == hash(treedef)


@given(trees())
def test_mapping_the_identity_gives_the_same_structure_object(tree: pt.ParamTree) -> None:
    assert flatten(jax.tree.map(lambda x: x, tree))[0] is flatten(tree)[0]


@given(trees())
def test_pickle_copy_and_deepcopy(tree: pt.ParamTree) -> None:
    for again in (pickle.loads(pickle.dumps(tree)), copy.copy(tree), copy.deepcopy(tree)):
        assert same(tree, again)
        for one, other in zip(repr(again).splitlines(), repr(tree).splitlines(), strict=True):
            assert one.split("(")[0] == other.split("(")[0]  # full names: the place is kept too


@given(trees(holes=False))
def test_to_dict_and_from_tree_round_trip(tree: pt.ParamTree) -> None:
    again = pt.from_tree(tree.to_dict())
    ties = flatten(tree)[0].entries()
    assert list(flatten(again)[0].entries()) == [(path, i) for i, (path, _) in enumerate(ties)]
    assert again.to_dict().keys() == tree.to_dict().keys()
    assert same(pt.from_tree(again.to_dict()), again)
    for path, slot in flatten(tree)[0].entries():
        assert again["/".join(path)] is flatten(tree)[1][slot]


@given(trees())
def test_reading_is_consistent(tree: pt.ParamTree) -> None:
    assert len(tree) == len(list(tree)) == len(tree.items()) == len(tree.keys())
    for name, value in tree.items():
        assert name in tree
        child = tree[name]
        assert child is value or same(child, value)
    for path, slot in flatten(tree)[0].entries():
        value: Any = tree
        for segment in path:
            value = value[segment]
        assert value is tree["/".join(path)] is flatten(tree)[1][slot]


@given(trees())
def test_key_paths_read_the_leaves_they_name(tree: pt.ParamTree) -> None:
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert tree[key_path[0].key] is leaf
        assert eval(f"tree{jax.tree_util.keystr(key_path)}") is leaf


@given(trees())
def test_printing_gives_one_line_a_name(tree: pt.ParamTree) -> None:
    lines = repr(tree).splitlines()
    named = [line for line in lines if line.startswith(("Parameter ", "State "))]
    assert len(named) == len(list(flatten(tree)[0].entries()))
    whole_lines = repr(tree).splitlines()
    assert sum("tied to" in line for line in whole_lines) == len(pt.ties(tree))


@given(trees())
def test_collect_finds_each_stored_leaf_once_and_every_name_with_aliases(tree: pt.ParamTree) -> None:
    flat = pt.collect(tree, sep="/")
    assert [id(leaf) for leaf in flat.values()] == [id(leaf) for leaf in jax.tree.leaves(tree)]
    names = pt.collect(tree, sep="/", aliases=True)
    assert list(names) == ["/".join(path) for path, _ in flatten(tree)[0].entries()]
    assert len(pt.ties(names)) == len(pt.ties(tree))


@given(trees(), st.text("ab_.*", max_size=4))
def test_collect_agrees_with_a_naive_version(tree: pt.ParamTree, pattern: str) -> None:
    import re

    try:
        re.compile(pattern)
    except re.error:
        with pytest.raises(pt.RuleError, match="not a regular expression"):
            pt.collect(tree, pattern)
        return
    expected, seen, clash = [], set(), False
    for path, slot in flatten(tree)[0].entries():
        name = "_".join(path)
        if re.fullmatch(pattern, name) and slot not in seen:
            seen.add(slot)
            clash = clash or name in expected
            expected.append(name)
    if clash:
        with pytest.raises(pt.NameCollisionError, match='sep="/"'):
            pt.collect(tree, pattern)
    else:
        assert list(pt.collect(tree, pattern)) == expected


@given(trees(holes=False))
def test_untie_then_tie_restores_the_structure(tree: pt.ParamTree) -> None:
    tree = tree
    loose = pt.untie(tree)
    assert pt.ties(loose) == {}
    assert loose.to_dict().keys() == tree.to_dict().keys()
    first = flatten(tree)[0].canonical
    pairs = {
        "/".join(path): "/".join(first[slot])
        for path, slot in flatten(tree)[0].entries()
        if path != first[slot]
    }
    assert same(pt.tie(loose, pairs), tree)


@given(trees(), st.integers(0, 2**32 - 1))
def test_replacing_leaves_by_themselves_changes_nothing(tree: pt.ParamTree, seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = pt.collect(tree, sep="/")
    chosen = {name: leaf for name, leaf in flat.items() if rng.random() < 0.5}
    assert same(pt.replace(tree, chosen), tree)


@given(trees())
def test_map_named_tells_every_stored_leaf_its_name(tree: pt.ParamTree) -> None:
    seen = []
    again = pt.map_named(lambda name, leaf: seen.append(name) or leaf, tree)
    assert same(tree, again)
    assert seen == ["_".join(path) for path in flatten(tree)[0].canonical]


@given(trees())
def test_any_object_can_be_a_leaf(tree: pt.ParamTree) -> None:
    for make in (
        lambda leaf: None,
        lambda leaf: object(),
        str,
        lambda leaf: {"x": 1},
        lambda leaf: [3],
    ):
        mapped = jax.tree.map(make, tree)
        assert flatten(mapped)[0] is flatten(tree)[0]
        assert len(repr(mapped).splitlines()) == len(repr(tree).splitlines())


# Ties and structures survive every transformation


def loss(tree: pt.ParamTree) -> jax.Array:
    """A sum over all names, each with a different weight."""
    total = jnp.float32(0)
    for i, (path, _) in enumerate(flatten(tree)[0].entries()):
        total += (i + 1) * jnp.sum(tree["/".join(path)] ** 2)
    return total


def floating(tree: pt.ParamTree) -> pt.ParamTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), tree)


@jax.numpy_dtype_promotion("standard")  # optax raises a Python float to an int32 count
def adam(tree: pt.ParamTree) -> pt.ParamTree:
    tx = optax.adam(0.1)
    state = tx.init(tree)
    assert flatten(state[0].mu)[0] is flatten(tree)[0]
    updates, _ = tx.update(jax.grad(loss)(tree), state, tree)
    return optax.apply_updates(tree, updates)


SURVIVES = {
    "map": lambda t: jax.tree.map(lambda x: x + 1, t),
    "grad": jax.grad(loss),
    "jit": jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t)),
    "vmap": lambda t: jax.vmap(lambda t, s: jax.tree.map(lambda x: x * s, t), (None, 0))(
        t, jnp.arange(3.0)
    ),
    "scan": lambda t: jax.lax.scan(
        lambda t, _: (jax.tree.map(lambda x: x / 2, t), None), t, None, length=2
    )[0],
    "scan outputs": lambda t: jax.lax.scan(lambda c, _: (c, t), 0, None, length=2)[1],
    "cond": lambda t: jax.lax.cond(True, lambda t: t, lambda t: jax.tree.map(jnp.zeros_like, t), t),
    "while_loop": lambda t: jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, jax.tree.map(lambda x: -x, c[1])), (0, t)
    )[1],
    "checkpoint": jax.grad(jax.checkpoint(loss)),
    "adam": adam,
    "training step": jax.jit(adam),
    "device_put": jax.device_put,
    "eval_shape": lambda t: jax.eval_shape(lambda t: t, t),
    "donation": lambda t: jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(
        jax.tree.map(jnp.copy, t)
    ),
}


@pytest.mark.parametrize("how", SURVIVES)
@every_tree
def test_structure_survives(name: str, how: str) -> None:
    tree = floating(CATALOGUE[name]())
    result = SURVIVES[how](tree)
    assert flatten(result)[0] is flatten(tree)[0]
    for alias, source in pt.ties(tree).items():
        assert pt.ties(result)[alias] == source


@given(trees(holes=False))
@settings(max_examples=25)
def test_a_tied_gradient_is_the_sum_of_the_untied_ones(tree: pt.ParamTree) -> None:
    tree = floating(tree)
    one, many = jax.grad(loss)(tree), jax.grad(loss)(pt.untie(tree))
    totals: dict[int, Any] = {}
    for path, slot in flatten(tree)[0].entries():
        totals[slot] = totals.get(slot, 0) + many["/".join(path)]
    for slot, total in totals.items():
        np.testing.assert_allclose(flatten(one)[1][slot], total, rtol=1e-6)


def test_donation_takes_a_tied_buffer_once() -> None:
    net = nn.Sequential(shared := nn.Dense(8), shared)
    params = pt.init(net, jax.random.key(0), jnp.ones((1, 8)))
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    old = params
    params = step(params)
    assert params.dense0.weight is params.dense1.weight
    assert old.dense0.weight.is_deleted()


def test_untied_leaves_can_be_donated() -> None:
    net = nn.Sequential(shared := nn.Dense(8), shared)
    params = pt.untie(pt.init(net, jax.random.key(0), jnp.ones((1, 8))))
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)


@given(trees())
def test_export_serialises_the_structure(tree: pt.ParamTree) -> None:
    from paramtree.io.export import _from_bytes, _to_bytes

    structure = flatten(tree)[0]
    assert _from_bytes(_to_bytes(structure)) is structure


def test_jax_export_round_trip() -> None:
    tree = tied()
    exported = jax.export.export(jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t)))(tree)
    again = jax.export.deserialize(exported.serialize())
    result = again.call(tree)
    assert flatten(result)[0] is flatten(tree)[0]
    np.testing.assert_array_equal(result.embed.weight, 2 * tree.embed.weight)


# Initialization


def mlp(sizes: list[tuple[str, int]]) -> Any:
    def model(p: Any, x: jax.Array) -> jax.Array:
        return sum(nn.Dense(size)(p[name], x).sum() for name, size in sizes)

    return model


SIZES = [("a", 3), ("b", 4), ("c", 3), ("long_name", 2)]


@given(st.permutations(SIZES), st.integers(1, 4))
@settings(max_examples=20)
def test_other_layers_never_change_a_leaf(order: list[tuple[str, int]], count: int) -> None:
    key, x = jax.random.key(7), jnp.ones((2, 5))
    full = pt.init(mlp(SIZES), key, x)
    part = pt.init(mlp(order[:count]), key, x)
    for name, leaf in pt.collect(part).items():
        np.testing.assert_array_equal(leaf, pt.collect(full)[name])


RULES = {
    ".*weight": init.Normal(0.5),
    "a_.*": init.Uniform(2.0),
    ".*_bias": init.Constant(3.0),
    "(b|c)_weight": init.Orthogonal(),
    "long.*": init.Zero(),
}


@given(st.lists(st.sampled_from(list(RULES)), min_size=1, unique=True), st.booleans())
@settings(max_examples=20)
def test_reinit_equals_a_full_init_with_the_rules(patterns: list[str], jitted: bool) -> None:
    rules = {pattern: RULES[pattern] for pattern in patterns}
    model, x = mlp(SIZES), jnp.ones((2, 5))
    key = jax.random.key(3)
    wanted = pt.init(model, key, x, rules=rules)
    start = pt.init(model, jax.random.key(4), x)
    remade = (
        jax.jit(lambda t, k: pt.reinit(t, k, rules)) if jitted else lambda t, k: pt.reinit(t, k, rules)
    )(start, key)
    hit = pt.collect(start, "|".join(f"(?:{p})" for p in rules))
    assume(len(hit))
    for name, leaf in pt.collect(remade).items():
        source = wanted if name in hit else start
        np.testing.assert_array_equal(leaf, pt.collect(source)[name], err_msg=name)


def test_ten_siblings_stay_in_order() -> None:
    assert list(siblings()) == [f"dense{i}" for i in range(12)]
    assert [str(path[0].key) for path, _ in jax.tree_util.tree_leaves_with_path(siblings())][:4] == [
        "dense0/weight",
        "dense0/bias",
        "dense1/weight",
        "dense1/bias",
    ]


def keyed(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["a", "b", "a/c", "w_1", 3, ""])
    return st.recursive(leaves, lambda below: st.dictionaries(keys, below, max_size=4), max_leaves=8)


@given(st.dictionaries(st.sampled_from("abc"), keyed(st.sampled_from([None, 1, 2.5, "x", (1, 2)]))))
def test_nested_dicts_are_read_in_one_pass_as_the_walker_reads_them(nested: Any) -> None:
    from paramtree.core.pytrees import open_tree

    try:
        source = open_tree(nested, counts=None, declared=True)
    except pt.ParamTreeError as error:
        with pytest.raises(type(error), match=re.escape(str(error)[:30])):
            pt.from_tree(nested)
        return
    structure, leaves = flatten(pt.from_tree(nested))
    assert structure is source.structure
    assert leaves == source.leaves
