"""Names, patterns, rules, and the verbs that use them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from paramtree.core.pytrees import open_tree
from paramtree.core.rules import UNSET, assign
from paramtree.core.rules import resolve as resolve_rules
from tests.catalogue import CATALOGUE, leaf, same, siblings, tied, with_kinds


def resolve(tree: Any, rules: Any, default: Any = UNSET) -> tuple[Any, ...]:
    """The value of each slot."""
    assigned = resolve_rules(open_tree(tree), rules, "the rules", default=default)
    values = (*rules.values(), default)
    return tuple(values[i] for i in assigned.rules)


def test_patterns_match_the_whole_name() -> None:
    tree = siblings()
    assert list(pt.collect(tree, "dense1")) == []
    assert list(pt.collect(tree, "dense1_.*")) == ["dense1_weight", "dense1_bias"]
    assert len(pt.collect(tree, ".*weight")) == 12


def test_collect_chooses_kinds_and_separators() -> None:
    tree = with_kinds({"bn/gamma": "param", "bn/mean": "state"})
    assert list(pt.collect(tree, kind="state")) == ["bn_mean"]
    assert list(pt.collect(tree, kind="param", sep=".")) == ["bn.gamma"]
    assert pt.collect(tree, sep="/")["bn/mean"] is tree.bn.mean
    assert repr(pt.collect(tree, kind="state")).startswith("State bn_mean")
    with pytest.raises(ValueError, match="kind is 'param', 'state' or None for both, not 'const'"):
        pt.collect(tree, kind="const")


def test_collect_names_a_tied_leaf_by_its_first_name_that_matches() -> None:
    assert list(pt.collect(tied(), ".*weight")) == ["embed_weight"]
    assert list(pt.collect(tied(), "decoder.*")) == ["decoder_weight", "decoder_bias"]
    both = pt.collect(tied(), ".*weight", aliases=True)
    assert list(both) == ["embed_weight", "decoder_weight"]
    assert pt.ties(both) == {"decoder_weight": "embed_weight"}


def test_collisions_raise_and_the_suggestion_works() -> None:
    tree = CATALOGUE["colliding names"]()
    with pytest.raises(
        pt.NameCollisionError, match='`a_b_c` is the name of both a_b/c and a/b_c.*sep="/"'
    ):
        pt.collect(tree)
    assert list(pt.collect(tree, sep="/")) == ["a_b/c", "a/b_c"]
    with pytest.raises(
        pt.NameCollisionError, match="`a_b_c` is the name of both a_b/c and a/b_c; give the path"
    ):
        pt.replace(tree, {"a_b_c": leaf(5)})
    assert pt.replace(tree, {"a/b_c": leaf(5)}).a.b_c[0] == 5


def test_collect_names_the_arrays_of_any_pytree() -> None:
    params = siblings()
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    assert list(pt.collect(state, ".*mu.*dense3_weight")) == ["1_0_mu_dense3_weight"]
    assert list(pt.collect({"b": np.ones(2), "a": [1, jax.nn.relu, np.zeros(3)]})) == ["a_2", "b"]
    assert list(pt.collect(np.ones(2))) == ["value"]
    assert len(pt.collect({})) == 0


def test_collect_names_flax_haiku_and_equinox_parameters() -> None:
    linen = pytest.importorskip("flax.linen")
    x = jnp.ones((1, 3))
    variables = linen.Dense(4).init(jax.random.key(0), x)
    assert set(pt.collect(variables)) == {"params_kernel", "params_bias"}
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    assert "layers_0_weight" in pt.collect(module)
    doubled = pt.replace(module, {"layers_0_bias": 1 + module.layers[0].bias})
    assert type(doubled) is type(module) and doubled.activation is module.activation
    np.testing.assert_array_equal(doubled.layers[0].bias, 1 + module.layers[0].bias)
    hk = pytest.importorskip("haiku")
    params = hk.transform(lambda x: hk.nets.MLP([2])(x)).init(jax.random.key(0), x)
    assert set(pt.collect(params)) == {"mlp_~_linear_0_w", "mlp_~_linear_0_b"}
    assert pt.from_tree(params)["mlp/~/linear_0/w"].shape == (3, 2)


def test_the_first_rule_that_matches_counts() -> None:
    structure = siblings()
    values = resolve(structure, {"dense0_.*": "a", ".*weight": "b", ".*": "c"})
    assert values[:4] == ("a", "a", "b", "c")
    assert resolve(structure, {"dense0_.*": "a"}, default=None)[:3] == ("a", "a", None)
    assert resolve(structure, {".*": 1, "dense0_bias": 2})[1] == 1  # shadowed, not a typo


def test_everything_that_is_wrong_with_rules_is_in_one_error() -> None:
    with pytest.raises(pt.RuleError) as raised:
        resolve(tied(), {"embed.*": 1, "decodr.*": 2, "decoder.*": 3, "weight": 4})
    text = str(raised.value)
    for part in (
        "'decodr.*' matches no name; the closest are decoder_",
        "'weight' matches no whole name, only a part of embed_weight, decoder_weight: '.*weight.*' would",
        "embed_weight by 'embed.*', decoder_weight by 'decoder.*'; give both names one rule",
        "no pattern matches block_a_w, block_a_b; add a last rule '.*'",
    ):
        assert part in text
    with pytest.raises(pt.RuleError, match=r"the pattern '\[' is not a regular expression.*re.escape"):
        resolve(tied(), {"[": 1})
    with pytest.raises(
        pt.RuleError,
        match="in a string, as in '.\\*weight', or a function of name and leaf, but found 3 of type int",
    ):
        resolve(tied(), {3: 1})  # type: ignore[dict-item]  # the tested mistake
    with pytest.raises(pt.RuleError, match="the rules are a mapping of patterns"):
        resolve(tied(), ["a"])  # type: ignore[arg-type]  # the tested mistake


def test_a_tied_leaf_may_be_matched_by_one_of_its_names() -> None:
    assert resolve(tied(), {"decoder_weight": 1}, default=0)[0] == 1
    assert resolve(tied(), {"embed.*": 1, "decoder.*": 1}, default=0)[0] == 1


def test_resolving_again_is_a_look_up() -> None:
    first = assign(open_tree(siblings()), (".*weight",))
    assert assign(open_tree(siblings()), (".*weight",)) is first


def test_replace_fits_values_to_the_leaf() -> None:
    tree = pt.from_tree({"w": jnp.zeros((2, 2), jnp.bfloat16), "n": jnp.zeros((), jnp.int32)})
    new = pt.replace(tree, {"w": [[1, 2], [3, 4]], "n": 5})
    assert new.w.dtype == jnp.bfloat16 and new.n.dtype == jnp.int32 and int(new.n) == 5
    assert pt.replace(tree, {"w": np.ones((2, 2))}).w.dtype == jnp.bfloat16
    assert pt.replace(tree, {"w": jnp.ones((2, 2))}).w.dtype == jnp.float32  # not a jax array's
    assert jax.jit(lambda t, v: pt.replace(t, {"w": v}))(tree, jnp.ones((2, 2))).w.dtype == jnp.float32
    assert pt.replace({"a": np.ones(2)}, {"a": np.zeros(2)})["a"].tolist() == [0, 0]
    shapes = pt.replace(tree, {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)})
    assert shapes.w.shape == (2, 2)


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ({"embed_wieght": 1}, pt.RuleError, "`embed_wieght` is not a name in the tree. Did you mean `embed_weight`"),
        ({"embed_weight": leaf(0), "decoder_bias": leaf(0, (5,))}, pt.MismatchError,
         r"`embed_weight` has shape \(3, 2\) and dtype float32, and the new value has shape \(2,\).*`decoder_bias` has"),
        ({"embed_weight": 1.0}, pt.MismatchError, r"jnp.full\(\(3, 2\), value\)"),
        ({"embed_weight": "text"}, pt.MismatchError, "the new value"),
        ({"embed_weight": None}, pt.MismatchError, "the new value is a NoneType"),
        ({"embed_weight": jnp.zeros((3, 2)), "decoder_weight": jnp.ones((3, 2))}, pt.RuleError,
         "`embed_weight` and `decoder_weight` are tied, one leaf, and get different arrays"),
        ([1], pt.RuleError, "replace takes a mapping of names to arrays"),
    ],
)  # fmt: skip
def test_replace_refuses(values: Any, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        pt.replace(tied(), values)


def test_replacing_one_name_of_a_tied_leaf_replaces_the_other() -> None:
    new = pt.replace(tied(), {"decoder_weight": jnp.full((3, 2), 9.0)})
    assert new.embed.weight is new.decoder.weight and float(new.embed.weight[0, 0]) == 9


def test_equal_arrays_for_two_names_of_one_leaf_are_one_value() -> None:
    new = pt.replace(tied(), {"embed_weight": np.ones((3, 2)), "decoder_weight": np.ones((3, 2))})
    assert float(new.decoder.weight.sum()) == 6


def test_map_named() -> None:
    tree = tied()
    seen = []
    pt.map_named(lambda name, x: seen.append(name) or x, tree, ".*weight|decoder.*")
    assert seen == ["embed_weight", "decoder_bias"]
    table = {".*_w": lambda name, x: x * 2, ".*_b": lambda name, x: x * 3}
    new = pt.map_named(table, tree)
    assert new.block.c.w[0] == 2 * tree.block.c.w[0] and new.block.a.b[0] == 3 * tree.block.a.b[0]
    assert new.embed.weight is tree.embed.weight
    assert same(pt.map_named(tree, lambda name, x: x), tree)
    assert pt.map_named(lambda name, x: name, {"a": np.ones(2), "f": jax.nn.relu}) == {
        "a": "a",
        "f": jax.nn.relu,
    }
    with pytest.raises(
        pt.RuleError, match="'decoder_wieght' matches no name; the closest are decoder_weight"
    ):
        pt.map_named(lambda name, x: x, tree, "decoder_wieght")
    with pytest.raises(TypeError, match="takes a function of name and leaf"):
        pt.map_named(3, tree)


def test_count_and_nbytes_count_a_tied_leaf_once() -> None:
    tree = tied()
    assert pt.count(tree) == 6 + 2 + 2 + 2
    assert pt.count(tree, ".*weight") == 6
    assert pt.nbytes(tree) == 4 * 12
    assert pt.nbytes(jax.eval_shape(lambda: tree)) == 48
    assert pt.count(with_kinds({"a": "param", "b": "state"}), kind="state") == 2
    assert pt.count({"a": np.ones((2, 3), np.float16)}) == 6
    assert pt.nbytes({"a": np.ones((2, 3), np.float16)}) == 12
    assert pt.count(pt.from_tree({"x": None})) == pt.count(pt.from_tree({})) == 0
    assert pt.count(CATALOGUE["colliding names"]()) == 4
    for measure in (pt.count, pt.nbytes):
        with pytest.raises(pt.RuleError, match=f"{measure.__name__}: '.*wieght' matches no name"):
            measure(tree, ".*wieght")
