"""Tying and untying."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import paramtree as pt
from tests.catalogue import leaf, same, siblings, tied, with_holes, with_kinds


def three() -> pt.ParamTree:
    return pt.from_tree({k: {"w": leaf(i), "b": leaf(i + 3)} for i, k in enumerate("abc")})


def test_tying_levels_and_leaves() -> None:
    tree = pt.tie(three(), {"b": "a", "c/w": "a/w"})
    assert pt.ties(tree) == {"b_w": "a_w", "b_b": "a_b", "c_w": "a_w"}
    assert tree.a.w is tree.b.w is tree.c.w
    assert len(jax.tree.leaves(tree)) == 3


def test_the_value_is_the_sources_and_the_name_the_firsts() -> None:
    tree = pt.tie(three(), {"a": "c"})
    assert pt.ties(tree) == {"c_w": "a_w", "c_b": "a_b"}
    assert tree.a.w[0] == 2


def test_chains_lead_to_their_end() -> None:
    tree = pt.tie(three(), {"a/w": "b/w", "b/w": "c/w"})
    assert tree.a.w is tree.b.w is tree.c.w and tree.a.w[0] == 2
    assert same(tree, pt.tie(three(), {"b/w": "c/w", "a/w": "b/w"}))


def test_an_alias_can_move_to_another_leaf() -> None:
    tree = pt.tie(pt.tie(three(), {"b": "a"}), {"b": "c"})
    assert tree.b.w is tree.c.w and tree.a.w is not tree.b.w
    assert pt.ties(tree) == {"c_w": "b_w", "c_b": "b_b"}


def test_ties_as_paths_can_be_tied_again() -> None:
    assert same(pt.tie(pt.untie(tied()), pt.ties(tied(), sep="/")), tied())


def test_tying_twice_changes_nothing() -> None:
    assert same(pt.tie(tied(), {"decoder/weight": "embed/weight"}), tied())


@pytest.mark.parametrize(
    ("pairs", "kind", "text"),
    [
        ({"a/x": "b/w"}, pt.RuleError, "`a/x` is not a path in the tree"),
        ({"a/w": "b/x", "z": "a"}, pt.RuleError, "`b/x` is not a path.*`z` is not a path"),
        ({"a_w": "b/w"}, pt.RuleError, "`a_w` is a name; tie takes paths: write 'a/w'"),
        ({"a": "a"}, pt.RuleError, "`a` cannot be tied to itself"),
        ({"a/w": "a"}, pt.RuleError, "`a/w` and `a` cannot be tied: one holds the other"),
        ({"a": "a/w"}, pt.RuleError, "`a` and `a/w` cannot be tied: one holds the other"),
        ({"a": "b/w"}, pt.RuleError, "`a` is a level and `b/w` a leaf: tie like to like"),
        ({"a": "b", "b": "a"}, pt.RuleError, r"in a circle, a/[wb] -> b/[wb] -> a/[wb]"),
        ({"a/w": "b/w", "b/w": "c/w", "c/w": "b/w"}, pt.RuleError, "in a circle"),
        ({"a": "b", "a/w": "c/w"}, pt.RuleError, "`a/w` is tied twice, to different leaves"),
        ({"a": 3}, pt.RuleError, "a path is a string such as 'decoder/weight', but found 3"),
    ],
)
def test_tie_refuses(pairs: Any, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        pt.tie(three(), pairs)


def test_tie_refuses_what_is_not_alike_and_lists_all() -> None:
    tree = pt.from_tree(
        {"a": {"w": leaf(0), "b": leaf(0)}, "c": {"w": leaf(0, (3,)), "b": jnp.arange(2)}}
    )
    with pytest.raises(
        pt.MismatchError, match=r"`c_w` and `a_w` have different shapes, \(3,\) and \(2,\)"
    ) as e:
        pt.tie(tree, {"c": "a"})
    assert "`c_b` and `a_b` have different dtypes, int32 and float32" in str(e.value)
    with pytest.raises(pt.RuleError, match="do not have the same leaves: only a/b; only d/x"):
        pt.tie(pt.from_tree({"a": {"w": 1, "b": 2}, "d": {"w": 1, "x": 2}}), {"a": "d"})
    with pytest.raises(pt.MismatchError, match="different kinds, state and param"):
        pt.tie(with_kinds({"a": "param", "b": "state"}), {"b": "a"})
    with pytest.raises(pt.ParamTreeError, match="tie: the tree has holes.*pt.merge"):
        pt.tie(with_holes(three(), [0]), {"b": "a"})
    with pytest.raises(
        TypeError, match=r"tie takes a parameter tree.*found dict: pt.from_tree\(tree\)"
    ):
        pt.tie({"a": 1}, {"b": "a"})


def test_untie_makes_each_matching_name_its_own_leaf() -> None:
    tree = pt.tie(three(), {"b": "a", "c": "a"})
    assert pt.ties(pt.untie(tree, "b_w")) == {"b_b": "a_b", "c_w": "a_w", "c_b": "a_b"}
    assert pt.ties(pt.untie(tree, "a_w")) == {"b_b": "a_b", "c_w": "b_w", "c_b": "a_b"}
    assert pt.ties(pt.untie(tree, ".*_w")) == {"b_b": "a_b", "c_b": "a_b"}
    loose = pt.untie(tree)
    assert loose.a.w is not loose.b.w and (loose.a.w == loose.b.w).all()


def test_untie_refuses() -> None:
    with pytest.raises(pt.RuleError, match="'bias' matches no name.*The tied names are: embed_weight"):
        pt.untie(tied(), "bias")
    with pytest.raises(pt.RuleError, match="Nothing is tied"):
        pt.untie(siblings(), "dense0.*")
    assert same(pt.untie(siblings()), siblings())
    with pytest.raises(pt.ParamTreeError, match="untie: the tree has holes"):
        pt.untie(with_holes(tied(), [0]))


def test_identity_is_not_a_tie() -> None:
    w = leaf(0)
    assert pt.ties(pt.from_tree({"x": w, "y": w})) == {}
