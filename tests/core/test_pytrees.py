"""One walker: in every container all verbs see the same leaves, and a tree inside loses nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from paramtree import nn
from paramtree.core.pytrees import is_array_or_number, open_tree
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, leaf, same, tied, with_holes, with_kinds


class Pair(NamedTuple):
    """A container of jax's own kind."""

    tree: Any
    rest: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    """A registered dataclass."""

    tree: Any
    step: Any


def module(tree: Any) -> Any:
    eqx = pytest.importorskip("equinox")

    class Module(eqx.Module):
        tree: Any
        activation: Any = jax.nn.relu

    return Module(tree)


def adam(tree: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(tree)


def stacked() -> pt.ParamTree:
    net = nn.Sequential(
        blocks=nn.Repeat(nn.Sequential(nn.Dense(2), nn.BatchNorm()), 3), head=nn.Dense(2)
    )
    return pt.init(net, jax.random.key(0), jnp.ones((2, 2)))


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda tree: tree,
    "dict": lambda tree: {"z": tree, "a": jnp.ones(1)},
    "nested": lambda tree: {"outer": [None, {"p": tree}]},
    "list": lambda tree: [tree, tree],
    "tuple": lambda tree: (tree, jnp.zeros(2), None),
    "namedtuple": lambda tree: Pair(tree, {"x": jnp.ones(1)}),
    "dataclass": lambda tree: Data(tree, jnp.int32(3)),
    "equinox": module,
    "optax": adam,
    "packed": lambda tree: {"p": pt.pack(tree)},
    "tree of tuples": lambda tree: jax.tree.map(lambda x: (x, x), tree),
    "tree of trees": lambda tree: jax.tree.map(lambda x: tree, tree),
}
TREES: dict[str, Callable[[], pt.ParamTree]] = {
    **{name: CATALOGUE[name] for name in ("one leaf", "flat", "tied across levels", "source after alias", "kinds",
                                          "with holes", "a view", "levels that hold nothing", "mixed dtypes")},
    "stacked": stacked,
}  # fmt: skip
every = pytest.mark.parametrize("tree_name", TREES)
everywhere = pytest.mark.parametrize("container", CONTAINERS)


def boxed(tree_name: str, container: str) -> Any:
    if container == "optax" and tree_name == "mixed dtypes":
        pytest.skip("optax has no moments of booleans")
    return CONTAINERS[container](TREES[tree_name]())


@everywhere
@every
def test_open_and_restore_are_inverse(tree_name: str, container: str) -> None:
    box = boxed(tree_name, container)
    source = open_tree(box)
    again = source.restore(source.leaves)
    assert jax.tree.structure(again) == jax.tree.structure(box)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(box), strict=True))
    assert open_tree(again).structure is source.structure


@everywhere
@every
def test_all_verbs_see_the_same_leaves_under_the_same_names(tree_name: str, container: str) -> None:
    box = boxed(tree_name, container)
    names = list(pt.collect(box, sep="/"))
    every_name = list(pt.collect(box, sep="/", aliases=True))
    count = sum(x.size for x in pt.collect(box, sep="/").values())
    assert pt.count(box) == count
    assert pt.nbytes(box) == sum(x.nbytes for x in pt.collect(box, sep="/").values())
    seen: list[str] = []
    pt.map_named(lambda name, x: seen.append(name) or x, box)
    assert seen == [name.replace("/", "_") for name in names]
    for made, kind in ((pt.mask(box, ".*"), bool), (pt.labels(box, {".*": "a"}), str)):
        found = open_tree(made, lambda x, kind=kind: isinstance(x, kind) and x is not False)
        assert [*dict.fromkeys(found.structure.names("/"))] == every_name
    assert list(pt.collect(pt.cast(box, jnp.float32), sep="/")) == names
    assert list(pt.collect(pt.from_tree(box), sep="/", aliases=True)) != [] or not names
    assert set(pt.collect(pt.from_tree(box), sep="/", aliases=True)) >= set(every_name)
    numeric = [n.replace("/", "_") for n, x in pt.collect(box, sep="/").items() if x.dtype != bool]
    assert [name for name in pt.stats(box).names if name in numeric] == numeric
    mesh = jax.sharding.AbstractMesh((1,), ("data",))
    places = pt.shardings(box, mesh, {".*": None})
    assert len(jax.tree.leaves(places)) == sum(map(is_array_or_number, jax.tree.leaves(box)))
    assert open_tree(box, is_array_or_number).structure is open_tree(box).structure
    for name in every_name:
        assert list(pt.collect(pt.select(box, name if "/" in name else f"(?:){name}"), sep="/"))
        value = jnp.array(pt.collect(box, sep="/", aliases=True)[name])
        assert pt.collect(pt.replace(box, {name: value}), sep="/", aliases=True)[name] is not None


@everywhere
@every
def test_parts_merge_into_the_identical_treedef(tree_name: str, container: str) -> None:
    box = boxed(tree_name, container)
    names = list(pt.collect(box, sep="/"))
    for pattern in {names[0], names[-1]}:
        anywhere = pattern if "/" in pattern else [lambda name, x, p=pattern: name == p]
        chosen, rest = pt.partition(box, anywhere)
        assert list(pt.collect(chosen, sep="/")) == [pattern]
        assert list(pt.collect(rest, sep="/")) == [name for name in names if name != pattern]
        for parts in ((chosen, rest), (rest, chosen)):
            merged = pt.merge(*parts)
            assert jax.tree.structure(merged) == jax.tree.structure(box)
            jax.tree.map(np.testing.assert_array_equal, merged, box)
    for kind in ("param", "state"):
        merged = pt.merge(*pt.partition(box, kind=kind))
        assert jax.tree.structure(merged) == jax.tree.structure(box)


@everywhere
@every
def test_kinds_and_ties_come_through(tree_name: str, container: str) -> None:
    tree, box = TREES[tree_name](), boxed(tree_name, container)
    kinds = open_tree(box).structure.kinds
    if container in ("dict", "nested", "itself", "packed", "equinox"):
        extra = container == "dict"
        assert sorted(kinds) == sorted([*flatten(tree)[0].kinds, *["param"] * extra])
    assert len(pt.collect(box, kind="state", sep="/")) == kinds.count("state")
    if pt.ties(tree):
        made = pt.from_tree(box)
        assert len(pt.ties(made)) >= len(pt.ties(tree))
        assert open_tree(made).structure.kinds.count("state") == kinds.count("state")


def batch_norm() -> tuple[Any, pt.ParamTree, jax.Array]:
    net = nn.Sequential(nn.Dense(4), nn.BatchNorm())
    x = jax.random.normal(jax.random.key(1), (5, 3))
    return net, pt.init(net, jax.random.key(0), x), x


def test_state_in_a_dict_is_state() -> None:
    net, params, x = batch_norm()
    box = {"params": params}
    assert list(pt.collect(box, kind="state")) == [
        "params_batchnorm0_running_mean", "params_batchnorm0_running_var",
    ]  # fmt: skip
    grads = pt.grad(lambda box: net(box["params"], x).sum())(box)
    assert list(pt.collect(grads)) == [
        "params_dense0_weight", "params_dense0_bias", "params_batchnorm0_gamma", "params_batchnorm0_beta",
    ]  # fmt: skip
    assert isinstance(grads["params"], pt.ParamTree)
    with pytest.raises(pt.RuleError, match="'.*running_mean' matches no name of kind param"):
        pt.grad(lambda box: net(box["params"], x).sum(), ".*running_mean")(box)


def test_an_alias_in_a_dict_is_a_name() -> None:
    params = pt.tie(pt.from_tree({"a": jnp.ones(2), "b": jnp.ones(2)}), {"b": "a"})
    new = pt.replace({"p": params}, {"p_b": jnp.zeros(2)})
    assert new["p"].a is new["p"].b and float(new["p"].a[0]) == 0
    assert list(pt.collect({"p": params}, aliases=True)) == ["p_a", "p_b"]


def test_what_a_dict_lost_can_be_given_back() -> None:
    tree = pt.from_tree(
        {
            "embed": {"w": leaf(0)},
            "bn": with_kinds({"g": "param", "running_mean": "state"}),
            "out": {"w": leaf(0)},
        }
    )
    tree = pt.tie(tree, {"out/w": "embed/w"})
    lost = pt.from_tree(tree.to_dict())
    assert pt.ties(lost) == {} and len(pt.collect(lost, kind="state")) == 0
    again = pt.from_tree(tree.to_dict(), kinds={".*running_.*": "state"}, ties={"out/w": "embed/w"})
    assert same(again, tree)
    assert same(pt.from_tree(tree, kinds={"bn/.*": "state"}, ties={}), again) is False
    with pytest.raises(
        pt.RuleError, match="from_tree: 'bn.*' gives 'buffer'. Expected 'param' or 'state'"
    ):
        pt.from_tree({"bn": {"m": 1}}, kinds={"bn.*": "buffer"})
    with pytest.raises(pt.RuleError, match="'runing_.*' matches no name; the closest are running_mean"):
        pt.from_tree({"running_mean": 1}, kinds={"runing_.*": "state"})


# Leaves that are containers


def hessian() -> Any:
    return jax.hessian(lambda p: jnp.sqrt(p.w - 1).sum() + (p.b**2).sum())(
        pt.from_tree({"w": jnp.ones(2), "b": jnp.ones(3)})
    )


def test_a_hessian_full_of_nan_is_found() -> None:
    h = hessian()
    assert list(pt.collect(h)) == ["w_w", "w_b", "b_w", "b_b"]
    assert list(pt.find_nonfinite(h).found) == ["w_w", "w_b"]
    with pytest.raises(AssertionError, match="2 of 4 leaves are not finite:\n  `w_w`: "):
        pt.testing.assert_all_finite(h)
    assert pt.count(h) == 25
    half = pt.cast(h, {"w_.*": jnp.bfloat16})
    assert half.w.b.dtype == jnp.bfloat16 and half.b.w.dtype == jnp.float32
    assert jax.tree.structure(half) == jax.tree.structure(h)
    only = pt.select(h, "w/w")
    assert len(jax.tree.leaves(only)) == 1 and only.w.w is h.w.w


def test_a_tied_leaf_that_is_a_container_is_one() -> None:
    tree = pt.tie(pt.from_tree({"a": leaf(0), "b": leaf(0), "c": leaf(1)}), {"b": "a"})
    pairs = jax.tree.map(lambda x: (x, x + 1), tree)
    assert list(pt.collect(pairs)) == ["a_0", "a_1", "c_0", "c_1"]
    assert list(pt.collect(pairs, aliases=True)) == ["a_0", "a_1", "b_0", "b_1", "c_0", "c_1"]
    new = pt.replace(pairs, {"b_1": jnp.zeros(2)})
    assert float(new.a[1][0]) == 0 and jax.tree.structure(new) == jax.tree.structure(pairs)


def test_shardings_of_a_state_of_tuples() -> None:
    state = jax.tree.map(lambda x: (x, x), pt.from_tree({"w": jnp.ones((4, 2)), "b": jnp.ones(4)}))
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    found = pt.shardings(state, mesh, {"w.*": jax.P("data"), ".*": None})
    assert [s.spec for s in jax.tree.leaves(found)] == [jax.P("data")] * 2 + [jax.P()] * 2


# Names


def test_a_name_with_a_newline_is_a_name() -> None:
    tree = pt.from_tree({"a\nb": jnp.ones(2), "c": jnp.ones(2)})
    assert pt.mask(tree, ".*").to_dict() == pt.mask(tree).to_dict() == {"a\nb": True, "c": True}
    assert (
        pt.cast(tree, jnp.float16)["a\nb"].dtype
        == pt.cast(tree, {".*": jnp.float16})["a\nb"].dtype
        == jnp.float16
    )
    assert pt.map_named(lambda name, x: name, tree)["a\nb"] == "a\nb"
    assert pt.map_named({".*": lambda name, x: name}, tree)["a\nb"] == "a\nb"
    assert pt.labels(tree, {".*": 1})["a\nb"] == 1


def test_values_that_are_equal_and_not_the_same_are_not_mixed_up() -> None:
    tree = pt.from_tree({"a": jnp.ones(2)})
    assert pt.labels(tree, {".*": (True,)}).a == (True,)
    assert type(pt.labels(tree, {".*": (1,)}).a[0]) is int
    assert type(pt.labels(tree, {".*": (1.0,)}).a[0]) is float
    assert type(pt.labels(tree, {".*": 0}, default=False).a) is int


def test_what_a_structure_remembers_is_bounded() -> None:
    tree = pt.from_tree({f"w{i}": leaf(i) for i in range(30)})
    for i in range(300):
        pt.mask(tree, f"w{i % 30}|x{i}")
        pt.collect(tree, f"w{i % 30}|x{i}", sep=str(i))
    structure, _ = flatten(tree)
    assert len(structure._cache) <= 64
    assert pt.mask(tree, "w3").to_dict()["w3"] is True


@pytest.mark.parametrize("value", [[300], [-129], np.array([300]), [2**40]])
def test_an_integer_that_does_not_fit_is_refused(value: Any) -> None:
    tree = pt.from_tree({"n": jnp.zeros(1, jnp.int8)})
    with pytest.raises(pt.MismatchError, match="`n` has shape .* with values outside of -128 to 127"):
        pt.replace(tree, {"n": value})
    assert pt.replace(tree, {"n": [127]}).n.dtype == jnp.int8
    assert int(pt.replace({"n": np.zeros(1, np.uint8)}, {"n": [200]})["n"][0]) == 200
    with pytest.raises(pt.MismatchError, match="outside of 0 to 255"):
        pt.replace({"n": np.zeros(1, np.uint8)}, {"n": [-1]})


# Patterns with a slash, and predicates


def encoders() -> pt.ParamTree:
    return pt.from_tree(
        {
            "encoder": {"w": leaf(0), "b": leaf(1, (3,))},
            "encoder_head": {"w": leaf(2), "b": leaf(3, (3,))},
        }
    )


def test_a_pattern_with_a_slash_matches_the_whole_path() -> None:
    tree = encoders()
    assert list(pt.collect(tree, "encoder/.*")) == ["encoder_w", "encoder_b"]
    assert list(pt.collect(pt.select(tree, "encoder/.*"))) == ["encoder_w", "encoder_b"]
    assert pt.mask(tree, "encoder/w").to_dict()["encoder_head"] == {"w": False, "b": False}
    assert pt.labels(tree, {"encoder/.*": 1, ".*": 2}).to_dict()["encoder_head"] == {"w": 2, "b": 2}
    assert pt.cast(tree, {"encoder/w": jnp.float16}).encoder_head.w.dtype == jnp.float32
    assert pt.count(tree, "encoder/.*") == 5
    assert list(pt.stats(tree, "encoder/.*").names) == ["encoder_w", "encoder_b"]
    again = pt.reinit(tree, jax.random.key(0), {"encoder/w": "ones"})
    assert float(again.encoder.w[0]) == 1 and again.encoder_head.w is tree.encoder_head.w
    with pytest.raises(pt.RuleError, match="'encodr/.*' matches no name; the closest are encoder/"):
        pt.select(tree, "encodr/.*")
    with pytest.raises(
        pt.RuleError, match="'encoder/' matches no whole name, only a part of encoder/w"
    ):
        pt.select(tree, "encoder/")


def test_predicates_select_everywhere() -> None:
    tree, vectors = encoders(), lambda name, x: x.shape == (3,)
    assert list(pt.collect(tree, vectors)) == ["encoder_b", "encoder_head_b"]
    assert pt.mask(tree, lambda name, x: name.endswith("w")).to_dict()["encoder"] == {
        "w": True,
        "b": False,
    }
    assert pt.labels(tree, {vectors: "v", ".*": "m"}).encoder.b == "v"
    assert pt.cast(tree, {vectors: jnp.float16}).encoder.b.dtype == jnp.float16
    trained, frozen = pt.partition(tree, vectors)
    assert same(pt.merge(trained, frozen), tree)
    assert list(pt.collect(pt.grad(lambda p: p.encoder.b.sum(), vectors)(tree))) == [
        "encoder_b",
        "encoder_head_b",
    ]
    assert list(pt.collect(pt.drop(tree, vectors))) == ["encoder_w", "encoder_head_w"]
    assert float(pt.reinit(tree, jax.random.key(0), {vectors: "ones"}).encoder.b[0]) == 1
    bigger = jax.tree.map(lambda x: jnp.ones(5), tree)
    with pytest.raises(pt.RuleError, match="the predicate <lambda> is true for no leaf"):
        pt.mask(bigger, vectors)  # the structure is the same, the leaves are not
    tx = optax.adamw(1e-3, mask=pt.mask(tree, lambda name, x: x.ndim > 0))
    with jax.numpy_dtype_promotion("standard"):
        tx.init(tree)


def test_holes_and_ties_in_a_container_are_kept() -> None:
    holed = with_holes(tied(), [0, 2])
    box = {"p": holed, "x": jnp.ones(2)}
    half = pt.cast(box, jnp.float16)
    assert flatten(half["p"])[0] is flatten(holed)[0]
    part = pt.select(box, "p/embed/.*")
    assert isinstance(part["p"], pt.ParamTree) and part["x"] is None
    with pytest.raises(pt.MissingError, match="is a hole"):
        _ = part["p"].block.a.b
