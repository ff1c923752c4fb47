"""Renaming, dropping and inserting paths."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

import paramtree as pt
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, leaf, same, tied, trees, with_holes, with_kinds


def test_rename_rewrites_paths_and_keeps_all_else() -> None:
    tree = pt.from_tree({"bn": with_kinds({"gamma": "param", "mean": "state"}), "t": tied()})
    new = pt.rename(
        tree, [("gamma$", "weight"), ("^bn/mean", "bn/running/mean"), (r"t/(embed|decoder)", r"\1")]
    )
    assert list(pt.collect(new, sep="/", aliases=True))[:2] == ["bn/weight", "bn/running/mean"]
    assert list(pt.collect(new, kind="state")) == ["bn_running_mean"]
    assert pt.ties(new)["decoder_weight"] == "embed_weight"
    assert new.embed.weight is tree.t.embed.weight and new.decoder.weight is new.embed.weight
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(tree), strict=True))


@given(trees())
def test_renaming_there_and_back_is_the_identity(tree: pt.ParamTree) -> None:
    if not flatten(tree)[0].paths:
        return
    there = pt.rename(tree, [("^", "new/")])
    assert list(there) == ["new"]
    back = pt.rename(there, [("^new/", "")])
    assert flatten(back)[0] is flatten(tree)[0] and same(back, tree)
    assert flatten(there.new)[0] is flatten(tree)[0]


@given(trees(holes=False))
def test_what_is_inserted_can_be_dropped(tree: pt.ParamTree) -> None:
    new = pt.insert(tree, {"zz": tied(), "zy/deep/w": leaf(1)})
    assert same(new.zz, tied()) and list(new)[-2:] == ["zz", "zy"]
    assert same(pt.drop(new, ["zz/.*", "zy/.*"]), tree)


def test_names_with_many_children_keep_their_order() -> None:
    tree = CATALOGUE["more than ten siblings"]()
    new = pt.insert(pt.drop(tree, "dense3/.*"), {"dense3": tree.dense3, "dense0/scale": 2.0})
    assert list(new) == [f"dense{i}" for i in range(12) if i != 3] + ["dense3"]
    assert list(new.dense0) == ["weight", "bias", "scale"]


def test_dropping_one_name_of_a_tied_leaf_keeps_the_others() -> None:
    tree = pt.drop(tied(), "embed/weight")
    assert list(pt.collect(tree))[-2:] == ["decoder_weight", "decoder_bias"] and "embed" not in tree
    assert len(jax.tree.leaves(tree)) == len(jax.tree.leaves(tied()))
    assert len(jax.tree.leaves(pt.drop(tied(), ".*weight"))) == len(jax.tree.leaves(tied())) - 1


def test_other_containers() -> None:
    assert pt.rename({"a": {"w": 1}, "b": 2}, [("^a/", "c/")]) == {"c": {"w": 1}, "b": 2}
    assert pt.insert({"a": 1}, {"b/c": 2}) == {"a": 1, "b": {"c": 2}}
    assert pt.drop({"a": jnp.ones(1), "b": 2}, "a") == {"a": None, "b": 2}
    packed = pt.pack(tied())
    for new in (
        pt.rename(packed, [("^embed", "e")]),
        pt.insert(packed, {"n": jnp.ones(1)}),
        pt.drop(packed, "embed/.*"),
    ):
        assert type(new) is type(packed)
    for call in (lambda t: pt.rename(t, [("a", "b")]), lambda t: pt.insert(t, {"a": 1})):
        with pytest.raises(
            TypeError, match="takes a parameter tree, or nested dicts.*but found list: .*pt.from_tree"
        ):
            call([1, 2])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda t: pt.rename(t, [("embd", "e")]), pt.RuleError, "rename: 'embd' matches no name; the closest are embed/weight"),
        (lambda t: pt.rename(t, [("embed|decoder", "x")]), pt.NameCollisionError, "`x/weight` is given twice"),
        (lambda t: pt.rename(t, [("embed/", "/")]), pt.RuleError, "`embed/weight` becomes '/weight', which is not a path"),
        (lambda t: pt.rename(t, [("embed", r"\1")]), pt.RuleError, r"rename: '\\\\1' cannot replace 'embed'"),
        (lambda t: pt.rename(t, {"embed": "e"}), TypeError, "rename takes a list of pairs"),
        (lambda t: pt.drop(t, "embd/.*"), pt.RuleError, "drop: 'embd/.*' matches no name; the closest are embed/"),
        (lambda t: pt.insert(t, {"embed": leaf(1)}), pt.NameCollisionError, "insert: `embed` is already in the tree. pt.replace"),
        (lambda t: pt.insert(t, {"embed/weight/x": leaf(1)}), pt.NameCollisionError, "`embed/weight/x` is given twice, or is a leaf"),
        (lambda t: pt.insert(t, {"a//b": leaf(1)}), pt.RuleError, "'a//b' is not a path: names joined with '/'"),
        (lambda t: pt.insert(t, {3: leaf(1)}), pt.RuleError, "3 is not a path"),
        (lambda t: pt.insert(t, [leaf(1)]), pt.RuleError, "insert takes a mapping of paths"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call: Any, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        call(tied())


def test_holes_stay() -> None:
    holed = with_holes(tied(), [0, 2])
    new = pt.rename(holed, [("^embed", "e")])
    assert jax.tree.leaves(new)[0] is holed.embed.weight
    with pytest.raises(pt.MissingError, match="`block_a_w` is a hole"):
        _ = new.block.a.w
    assert len(jax.tree.leaves(pt.drop(holed, "embed/.*"))) == 2
