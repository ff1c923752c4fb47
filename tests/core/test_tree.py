"""Reading and printing a tree, and its immutability."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paramtree as pt
from paramtree.core.structure import picker
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, leaf, siblings, tied, with_holes, with_kinds


@pytest.fixture
def tree() -> pt.ParamTree:
    return pt.from_tree(
        {
            "dense0": {"weight": leaf(0, (3, 2)), "bias": leaf(1)},
            "dense1": {"weight": leaf(2)},
            "scale": 3.0,
        }
    )


def test_every_way_of_reading_gives_the_same_object(tree: pt.ParamTree) -> None:
    w = tree.dense0.weight
    assert w is tree["dense0"]["weight"] is tree["dense0/weight"] is tree[0].weight is tree[0][0]
    assert w is tree[-3][np.int64(0)] is dict(tree.dense0.items())["weight"]
    assert tree["scale"] == tree.scale == tree[-1] == 3.0
    assert list(tree) == list(tree.keys()) == ["dense0", "dense1", "scale"]
    assert "dense0/bias" in tree
    assert "dense0/x" not in tree
    assert "scale/x" not in tree
    assert 0 in tree and 3 not in tree and None not in tree
    assert hasattr(tree, "dense0") and not hasattr(tree, "dense9")
    assert getattr(tree, "dense9", None) is None
    assert "dense0" in dir(tree) and tree._ipython_key_completions_() == list(tree)
    assert {**tree.dense0}.keys() == {"weight", "bias"}


@pytest.mark.parametrize(
    ("read", "kind", "text"),
    [
        (
            lambda t: t.dense0.wieght,
            AttributeError,
            r"`dense0_wieght` is not in `dense0`.*Did you mean `weight`",
        ),
        (
            lambda t: t["dense0"]["wieght"],
            KeyError,
            "`dense0_wieght` is not in `dense0`, which has: weight, bias",
        ),
        (lambda t: t["dense0/wieght"], KeyError, "Did you mean `weight`"),
        (lambda t: t["dnse0/weight"], KeyError, "`dnse0` is not in the tree.*Did you mean `dense0`"),
        (lambda t: t["scale/x"], KeyError, "`scale` is a leaf: it has no `x`"),
        (lambda t: t[3], IndexError, "position 3 is not in the tree, which has 3 children: dense0"),
        (lambda t: t.dense0[-3], IndexError, "position -3 is not in `dense0`"),
        (lambda t: t[1.5], TypeError, "by name, path or position, not by float"),
        (lambda t: t[:1], TypeError, "by name, path or position, not by slice"),
    ],
)
def test_reading_what_is_not_there(tree: pt.ParamTree, read: Any, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text) as raised:
        read(tree)
    if kind is not TypeError:
        assert isinstance(raised.value, pt.MissingError)


def test_a_hole_says_that_it_is_one() -> None:
    tree = with_holes(siblings(), [1])
    with pytest.raises(pt.MissingError, match="`dense0_weight` is a hole.*pt.merge"):
        tree.dense0.weight  # noqa: B018  # reading is the test
    assert list(tree.dense0) == ["bias"] and tree.dense0[1] is tree.dense0.bias
    assert "weight" not in tree.dense0
    assert repr(tree).splitlines() == [
        "Parameter dense0_bias (shape=(2,), dtype=float32)",
        "(23 holes)",
    ]


def test_assignment_says_what_to_call_and_that_works(tree: pt.ParamTree) -> None:
    value = jnp.zeros((3, 2))
    for change in (
        lambda: setattr(tree.dense0, "weight", value),
        lambda: tree.dense0.__setitem__("weight", value),
    ):
        with pytest.raises(pt.ImmutableError, match="`dense0_weight` cannot be assigned") as raised:
            change()
        code = str(raised.value).split("Make a new one: ")[1].rstrip(".")
        scope = {"pt": pt, "params": tree, "value": value}
        exec(code, scope)
        assert scope["params"].dense0.weight is value
    for remove in (lambda: delattr(tree, "scale"), lambda: tree.__delitem__("scale")):
        with pytest.raises(pt.ImmutableError, match="`scale` cannot be deleted.*pt.select"):
            remove()
    assert isinstance(raised.value, TypeError) and isinstance(raised.value, AttributeError)


def test_the_constructor_says_what_to_call() -> None:
    with pytest.raises(TypeError, match=r"pt.init\(model, key, x\).*pt.from_tree\(mapping\)"):
        pt.ParamTree({"a": 1})


def test_a_sub_tree_knows_its_place_but_its_structure_does_not() -> None:
    tree = siblings()
    assert repr(tree.dense3).startswith("Parameter dense3_weight (")
    assert jax.tree.structure(tree.dense3) == jax.tree.structure(tree.dense4)
    traces = []
    f = jax.jit(lambda t: traces.append(1) or t.weight)
    f(tree.dense3), f(tree.dense4)
    assert len(traces) == 1
    assert repr(pt.from_tree(tree.dense3)) == repr(tree.dense3)


def test_what_printing_shows() -> None:
    def f(t: pt.ParamTree) -> pt.ParamTree:
        assert repr(t).splitlines()[0] == "Parameter dense0_weight (shape=(2,), dtype=float32)"
        return t

    jax.jit(f)(siblings())
    jax.vmap(f, axis_size=2)(jax.tree.map(lambda x: jnp.stack([x, x]), siblings()))
    things = {
        "shape": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
        "numpy": np.zeros(2, np.int8),
        "key": jax.random.key(0),
        "none": None,
        "text": "a\nb",
        "long": "x" * 100,
        "broken": type("Broken", (), {"__repr__": lambda self: 1 / 0})(),
    }
    assert repr(pt.from_tree(things)).splitlines() == [
        "Parameter shape (shape=(2, 3), dtype=bfloat16)",
        "Parameter numpy (shape=(2,), dtype=int8)",
        "Parameter key (shape=(), dtype=key<fry>)",
        "Parameter none (None)",
        r"Parameter text ('a\nb')",
        f"Parameter long ('{'x' * 56}...)",
        "Parameter broken (Broken)",
    ]
    assert "State bn_mean (shape=(2,), dtype=float32)" in repr(
        with_kinds({"bn/w": "param", "bn/mean": "state"})
    )
    assert "Parameter decoder_weight (shape=(3, 2), dtype=float32, tied to embed_weight)" in repr(
        tied()
    )
    assert repr(pt.from_tree({})) == "(no parameters)"


def test_structures_print_in_jax_messages() -> None:
    with pytest.raises(ValueError, match="dense0/weight"):
        jax.tree.map(lambda a, b: a, siblings(), tied())
    holed = with_holes(tied(), [0])
    assert repr(flatten(holed)[0]).startswith("(embed/weight, block/a/w=hole, ")
    assert "decoder/weight=embed/weight" in repr(flatten(holed)[0])
    assert repr(flatten(with_kinds({"m": "state"}))[0]) == "(m:state)"


def test_structures_die_with_their_trees() -> None:
    import gc
    import weakref

    tree = pt.from_tree({"only_here_for_this_test": leaf(0), "x": leaf(1)})
    pt.collect(tree, ".*this.*")
    pt.merge(*pt.partition(tree, ".*this.*"))
    pt.mask(tree, ".*this.*")
    pt.labels(tree, {".*": "a"})
    found = weakref.ref(flatten(tree)[0])
    del tree
    gc.collect()
    assert found() is None


def test_from_tree_of_a_dict_that_holds_itself_ends() -> None:
    cyclic: dict[str, Any] = {"a": {"w": 1.0}}
    cyclic["a"]["b"] = cyclic
    with pytest.raises(ValueError, match="the dict at `a/b` holds itself, which has no end"):
        pt.from_tree(cyclic)
    shared = {"w": 1.0}  # twice, but not in itself
    assert list(pt.collect(pt.from_tree({"a": shared, "b": shared}))) == ["a_w", "b_w"]


def test_from_tree_takes_containers_in_their_own_order() -> None:
    import collections
    import dataclasses

    pair = collections.namedtuple("pair", "b a")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Data:
        z: Any
        y: Any

    tree = pt.from_tree(
        {"z": [1, (2,)], "pair": pair(3, 4), "data": Data(5, 6), "mlp/~/linear": {"w": 7}, 8: 9}
    )
    assert list(pt.collect(tree, sep="/")) == [
        "z/0", "z/1/0", "pair/b", "pair/a", "data/z", "data/y", "mlp/~/linear/w", "8",
    ]  # fmt: skip
    assert tree["mlp/~/linear/w"] == 7


def test_from_tree_keeps_the_ties_and_kinds_of_trees_inside() -> None:
    inner = tied()
    both = pt.from_tree({"one": inner, "two": inner, "bn": with_kinds({"mean": "state"})})
    assert pt.ties(both).items() >= {"one_decoder_weight": "one_embed_weight"}.items()
    assert both.one.embed.weight is both.one.decoder.weight
    assert list(pt.collect(both, kind="state")) == ["bn_mean"]
    assert len(jax.tree.leaves(both)) == 2 * len(jax.tree.leaves(inner)) + 1  # repetition makes no tie


def test_from_tree_keeps_the_holes_of_trees_inside() -> None:
    holed = with_holes(siblings(), [1, 3])
    both = pt.from_tree({"whole": siblings(), "part": holed, "empty": with_holes(siblings(), [])})
    assert jax.tree.structure(both.part) == jax.tree.structure(holed)
    assert len(jax.tree.leaves(both)) == 24 + 2
    assert both.part.dense0.bias is holed.dense0.bias
    with pytest.raises(pt.MissingError, match="`part_dense0_weight` is a hole"):
        _ = both.part.dense0.weight


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ({"a/b": 1, "a": {"b": 2}}, pt.NameCollisionError, "`a/b` is given twice"),
        (
            {"a": 1, "a/b": 2},
            pt.NameCollisionError,
            "`a/b` is given twice, or is a leaf and also has children",
        ),
        ({1: 1, "1": 2}, pt.NameCollisionError, "`1` is given twice"),
        ({"": 1}, pt.RuleError, "'' cannot be part of a path"),
        ({"a//b": 1}, pt.RuleError, "'a//b' cannot be part of a path"),
        (np.ones(2), TypeError, "single ndarray: give it a name"),
    ],
)
def test_from_tree_refuses(value: Any, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        pt.from_tree(value)


def test_a_tree_a_thousand_levels_deep() -> None:
    nested: Any = {"w": leaf(0)}
    for _ in range(3000):
        nested = {"a": nested}
    tree = pt.from_tree(nested)
    assert flatten(jax.tree.map(lambda x: x, tree))[0] is flatten(tree)[0]
    assert len(repr(tree)) > 3000


@given(st.lists(st.integers(-5, 4), max_size=5))
def test_a_picker_takes_any_positions(order: list[int]) -> None:
    assert picker(tuple(order))(tuple("abcde")) == tuple("abcde"[i] for i in order)


@pytest.mark.parametrize("order", [range(5), range(0, 5, 2), range(3, 5), (-1, 0), (-2, -1), (4, 3)])
def test_a_picker_takes_ranges(order: Any) -> None:
    assert picker(tuple(order))(list("abcde")) == tuple("abcde"[i] for i in order)


def test_reading_in_threads_gives_one_structure() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: pt.from_tree({f"t{i}": leaf(i) for i in range(50)}), range(32)))
    assert len({id(flatten(tree)[0]) for tree in made}) == 1


def test_truth_and_identity() -> None:
    assert not pt.from_tree({})
    assert siblings()
    tree = CATALOGUE["flat"]()
    assert tree == tree  # by identity, because arrays have no single truth value
    assert len({tree, tree}) == 1
