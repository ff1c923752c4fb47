"""Where two mechanisms meet: containers as leaves, ties in containers, ensembles, threads, ambiguous names."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

K = jax.random.key(0)
X = jnp.ones((2, 8))


def pairs() -> pt.ParamTree:
    tree = pt.from_tree({"a": jnp.ones(1), "b": jnp.ones(2)})
    return jax.tree.map(lambda x: (x, x + 1), tree)


def test_dropping_a_part_of_a_leaf_leaves_the_others_in_place() -> None:
    tree = pairs()
    less = pt.drop(tree, "a/0")
    assert less.a[0] is None and less.a[1] is tree.a[1] and less.b == tree.b
    rows = jax.hessian(lambda p: (p.w**2).sum() + (p.b**3).sum())(
        pt.from_tree({"w": jnp.ones(2), "b": jnp.ones(2)})
    )
    less = pt.drop(rows, "w/.*")
    assert less.b.b is rows.b.b and list(pt.collect(less)) == ["b_w", "b_b"]


def test_dropping_one_name_of_a_tied_leaf_in_a_container_is_refused() -> None:
    tied = pt.tie(pt.from_tree({"e": jnp.ones(2), "d": jnp.ones(2)}), {"d": "e"})
    with pytest.raises(
        pt.RuleError, match="drop: m_e are names of tied leaves that would go: match all"
    ):
        pt.drop({"m": tied}, "m_d")
    assert jax.tree.leaves(pt.drop({"m": tied}, "m_[ed]")) == []
    assert list(pt.drop(tied, "d")) == ["e"]


def test_kinds_for_leaves_in_leaves() -> None:
    made = pt.from_tree(pairs(), kinds={"a_1": "state"})
    assert list(pt.collect(made, kind="state")) == ["a_1"]


def test_copies_that_share_a_leaf_cannot_be_stacked() -> None:
    tree = pt.from_tree({"b": [{"w": jnp.ones(2), "v": jnp.ones(2)} for _ in "ab"]})
    for ties in ({"b/1/w": "b/0/w"}, {"b/1/v": "b/0/w"}):
        tied = pt.tie(tree, ties)
        with pytest.raises((pt.ParamTreeError, pt.MismatchError), match="are tied|tied to|not like"):
            pt.stack(tied, "b")
        assert pt.stack(pt.untie(tied), "b").b.w.shape == (2, 2)


def test_unstack_refuses_what_hides_the_stack() -> None:
    net = nn.Sequential(nn.Dense(8), nn.Repeat(nn.Dense(8), 3))
    many = jax.vmap(lambda key: pt.init(net, key, X))(jax.random.split(K, 5))
    with pytest.raises(
        pt.MismatchError, match="unstack: the leaves below `repeat0` are not stacks of one size"
    ):
        pt.unstack(many, "repeat0")
    with pytest.raises(pt.MismatchError, match="a leaf of it is itself a container"):
        pt.unstack(pairs(), "")
    with pytest.raises(
        TypeError, match="unstack takes the path of a level, such as 'blocks', but found 3"
    ):
        pt.unstack(pt.init(net, K, X), 3)  # type: ignore[arg-type]  # the mistake that is tested


@pytest.mark.parametrize("pattern", ["repeat0", "repeat0/", "^repeat0", "repeat0(?=/)"])
def test_renaming_a_stack_is_the_model_with_the_new_name(pattern: str) -> None:
    params = pt.init(nn.Sequential(nn.Dense(8), nn.Repeat(nn.Dense(8), 3)), K, X)
    new = pt.rename(params, [(pattern, "enc/blocks/" if pattern.endswith("/") else "enc/blocks")])
    assert list(pt.unstack(new, "enc/blocks").enc.blocks) == ["0", "1", "2"]
    net = nn.Sequential(nn.Dense(8), enc=nn.Sequential(blocks=nn.Repeat(nn.Dense(8), 3)))
    rules = {".*weight": init.Xavier()}
    pt.testing.assert_trees_equal(pt.reinit(new, K, rules).enc, pt.init(net, K, X, rules=rules).enc)
    root = pt.rename(pt.init(nn.Repeat(nn.Dense(8), 3), K, X), [("^", "deep/")])
    assert list(pt.unstack(root, "deep").deep) == ["0", "1", "2"]


def test_an_ensemble_of_packed_trees_stays_one() -> None:
    many = jax.vmap(lambda key: pt.pack(pt.init(nn.Dense(4), key, X)))(jax.random.split(K, 5))
    assert [leaf.shape for leaf in jax.tree.leaves(many)] == [(5, 36)]
    half = pt.cast(many, jnp.bfloat16)
    assert [leaf.shape for leaf in jax.tree.leaves(half)] == [(5, 36)] and half.weight.shape == (
        5,
        4,
        8,
    )
    again = pt.map_named(lambda name, x: x * 1, many)
    pt.testing.assert_trees_equal(pt.unpack(again), pt.unpack(many))
    merged = pt.merge(*pt.partition(many, "weight"))
    assert jax.tree.structure(merged) == jax.tree.structure(many)
    pt.testing.assert_trees_equal(pt.unpack(merged), pt.unpack(many))
    grads = pt.grad(lambda p: jax.vmap(nn.Dense(4), (0, None))(p, X).sum())(many)
    assert jax.tree.structure(grads) == jax.tree.structure(many)


def test_what_a_buffer_cannot_hold() -> None:
    packed = pt.pack(pt.from_tree({"w": jnp.ones(2), "b": jnp.ones(3)}))
    rows = jax.hessian(lambda p: (p.w**2).sum())(packed)
    with pytest.raises(
        pt.MismatchError, match="the buffer `packed param float32` .* pt.unpack the tree before"
    ):
        pt.count(rows)
    assert pt.count(jax.hessian(lambda p: (p.w**2).sum())(pt.unpack(packed))) == 25
    mixed = pt.pack({"w": jnp.ones(2), "lr": 0.1, "n": np.array([2**40, 1])})
    assert mixed.lr == 0.1 and mixed.n.tolist() == [2**40, 1] and mixed.w.shape == (2,)


def test_two_threads_ask_for_shardings_of_one_structure() -> None:
    mesh = jax.sharding.AbstractMesh((2,), ("d",))
    trees = [
        pt.from_tree({"in_two_threads": jax.ShapeDtypeStruct((n, 2), jnp.float32)}) for n in (3, 4)
    ]

    def ask(i: int) -> bool:
        spec = pt.shardings(trees[i % 2], mesh, {".*": jax.P("d")}, uneven="replicate")
        return spec.in_two_threads.spec == (jax.P() if i % 2 == 0 else jax.P("d")) or (
            i % 2 == 0 and spec.in_two_threads.spec == jax.P(None)
        )

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(ask, range(2000)))


def test_predicates_of_init_see_shapes() -> None:
    params = pt.init(nn.Dense(3), K, X, rules={lambda name, x: x.ndim > 1: init.One()})
    assert float(params.weight.min()) == 1


@pytest.mark.parametrize("pattern", ["weight|bias", "dense0", "eight"])
def test_the_advice_on_a_part_of_a_name_works(pattern: str) -> None:
    params = pt.init(nn.Sequential(nn.Dense(3), nn.Dense(2)), K, X)
    with pytest.raises(pt.RuleError, match="would match these") as raised:
        pt.select(params, pattern)
    advice = str(raised.value).split(": ")[-1].split("'")[1]
    named = str(raised.value).split("only a part of ")[1].split(": ")[0].split(", ")
    assert set(named) <= set(pt.collect(params, advice))
    for flagged in ("(?i)DENSE0", __import__("re").compile("DENSE0", 2)):
        with pytest.raises(pt.RuleError, match=r"only a part of dense0_weight, dense0_bias\."):
            pt.select(params, flagged)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda t: pt.rename(t, [("(?i)foo", "x")]), pt.RuleError, r"rename: '\(\?i\)foo' matches no name"),
        (lambda t: pt.rename(t, [("weight", 3)]), TypeError, "rename takes a list of pairs"),
        (lambda t: pt.rename({"m": t}, [("m", "n")]), TypeError, "nested dicts whose keys are names without '/'"),
        (lambda t: pt.rename({"a/b": 1}, [("a", "n")]), TypeError, "nested dicts whose keys are names without '/'"),
        (lambda t: pt.insert({0: 1}, {"a": 2}), TypeError, "nested dicts whose keys are names without '/'"),
        (lambda t: pt.select(t, __import__("re").compile(b".*")), pt.RuleError, "of type Pattern"),
        (lambda t: pt.select(t, []), pt.RuleError, "select: the list of patterns is empty"),
        (lambda t: pt.tie(t, ["a"]), pt.RuleError, "tie takes a mapping of paths"),
        (lambda t: pt.from_tree(t, ties=["a"]), pt.RuleError, "tie takes a mapping of paths"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call: Any, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        call(pt.init(nn.Dense(3), K, X))


def test_lists_of_patterns_everywhere() -> None:
    params = pt.init(nn.Sequential(nn.Dense(3), nn.Dense(2)), K, X)
    assert list(pt.collect(params, ["dense0_bias", "dense1/.*"])) == [
        "dense0_bias",
        "dense1_weight",
        "dense1_bias",
    ]
    tied = pt.tie(
        pt.from_tree({"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}), {"b": "a", "c": "a"}
    )
    assert pt.ties(pt.untie(tied, ["b", "c"])) == {}


def test_a_file_that_does_not_say_which_level_it_stacks_is_refused(tmp_path: Any) -> None:
    params = pt.init(nn.Repeat(nn.Repeat(nn.Dense(8), 3), 3), K, X)
    outer = pt.unstack(params, "")
    every = outer
    for i in "012":
        every = pt.unstack(every, i)
    pt.save(tmp_path / "own.npz", outer)
    pt.testing.assert_trees_equal(pt.load(tmp_path / "own.npz", like=every), every)
    np.savez(
        tmp_path / "foreign.npz",
        **{name: np.asarray(x) for name, x in pt.collect(outer, sep=".").items()},
    )
    with pytest.raises(pt.LoadError, match="`0_0_weight` is missing"):
        pt.load(tmp_path / "foreign.npz", like=every)


def test_a_dict_is_filled_along_the_axes_that_the_file_knows(tmp_path: Any) -> None:
    params = pt.init(nn.Repeat(nn.Sequential(inner=nn.Repeat(nn.Dense(8), 3)), 3), K, X)
    inner = pt.unstack(params, "inner")
    pt.save(tmp_path / "a.npz", inner)
    loaded = pt.load(tmp_path / "a.npz", like=params.to_dict())
    np.testing.assert_array_equal(loaded["inner"]["weight"], params.inner.weight)
    pt.save(tmp_path / "b.npz", params)
    loaded = pt.load(tmp_path / "b.npz", like=inner.to_dict())
    np.testing.assert_array_equal(loaded["inner"]["1"]["weight"], inner["inner/1/weight"])
