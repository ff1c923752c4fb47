"""Whether two trees are alike is asked by name, and answered in full."""

import json
from collections import OrderedDict, namedtuple
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import paramtree as pt
from paramtree.core.tree import flatten, unflatten
from paramtree.inspect import distance as distance_module
from paramtree.inspect.distance import LARGE, Distance, distances
from paramtree.verbs import compare as compare_module
from paramtree.verbs.compare import Difference, compare, differences
from tests.catalogue import CATALOGUE, leaf, siblings, tied, trees, with_holes, with_kinds


class Point(NamedTuple):
    x: Any
    y: Any


def form(tree: Any) -> Any:
    return jax.tree.structure(tree), [(np.shape(x), x.dtype) for x in jax.tree.leaves(tree)]


def reordered(tree: pt.ParamTree) -> pt.ParamTree:
    return pt.from_tree(dict(reversed(list(tree.to_dict().items()))))


def first_cast(tree: pt.ParamTree) -> pt.ParamTree:
    """The tree with its first leaf in another dtype."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [x.astype(jnp.float16) if i == 0 else x for i, x in enumerate(leaves)]
    )


def first_longer(tree: pt.ParamTree) -> pt.ParamTree:
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [np.zeros((7, 7), x.dtype) if i == 0 else x for i, x in enumerate(leaves)]
    )


CHANGES = {
    "nothing": lambda tree: tree,
    "values": lambda tree: jax.tree.map(lambda x: x + x, tree),
    "shapes only": lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree),
    "pickled": lambda tree: unflatten(flatten(tree)[0], flatten(tree)[1], ("elsewhere",)),
    "a dtype": first_cast,
    "a shape": first_longer,
    "the order": reordered,
    "a dict": lambda tree: tree.to_dict(),
    "one more": lambda tree: pt.from_tree({**tree.to_dict(), "more": leaf(99)}),
    "one less": lambda tree: pt.from_tree(dict(list(tree.to_dict().items())[1:])),
    "an empty level more": lambda tree: pt.from_tree({**tree.to_dict(), "more": {}}),
    "no ties": lambda tree: pt.from_tree(tree.to_dict()),
    "holes": lambda tree: with_holes(tree, list(range(1, len(flatten(tree)[1])))),
    "a level above": lambda tree: {"level": tree},
}


# check_match


@given(tree=trees(), change=st.sampled_from(sorted(CHANGES)))
def test_trees_match_if_and_only_if_structure_shapes_and_dtypes_are_equal(tree, change):
    other = CHANGES[change](tree)
    for a, b in ((tree, other), (other, tree), ({"in": tree}, {"in": other})):
        if form(a) == form(b):
            pt.check_match(a, b)
            assert compare(a, b)[0] == []
        else:
            with pytest.raises(pt.MismatchError, match=r"^check_match: b is not like a:\n  "):
                pt.check_match(a, b)


@given(a=trees(), b=trees())
def test_any_two_trees_match_if_and_only_if_jax_takes_one_for_the_other(a, b):
    assert bool(differences(a, b)) == (form(a) != form(b))


@given(tree=trees(), change=st.sampled_from(sorted(CHANGES)))
def test_what_is_missing_in_one_is_extra_in_the_other(tree, change):
    def facts(a: Any, b: Any, turned: bool) -> Any:
        swap = {"missing": "extra", "extra": "missing"} if turned else {}
        return {
            (
                "" if what == "order" else name,
                swap.get(what, what),
                *((found, expected) if turned else (expected, found)),
            )
            for name, what, expected, found, _ in differences(a, b)
            if what != "tie"
            or change not in ("the order", "a dict")  # which name of a tie is first depends on it
        }

    other = CHANGES[change](tree)
    assert facts(tree, other, False) == facts(other, tree, True)


def text(a: Any, b: Any) -> str:
    with pytest.raises(pt.MismatchError, match="^check_match: ") as raised:
        pt.check_match(a, b)
    return str(raised.value)


def test_all_that_differs_is_in_one_message():
    a = pt.from_tree(
        {"dense0": {"weight": leaf(0, (2, 3)), "bias": leaf(1)}, "norm": {"gamma": leaf(2)}, "gone": {}}
    )
    b = pt.from_tree(
        {
            "dense0": {"weight": leaf(0, (2, 4)), "bais": leaf(1)},
            "norm": {"gamma": leaf(2).astype(jnp.bfloat16)},
        }
    )
    assert text(a, b) == (
        "check_match: b is not like a:\n"
        "  `dense0_bias` is missing, expected shape=(2,), dtype=float32; the closest name is `dense0_bais`.\n"
        "  `dense0_bais` is extra, found shape=(2,), dtype=float32.\n"
        "  `gone`: expected a level without children, found nothing.\n"
        "  `dense0_weight`: expected shape (2, 3), found (2, 4).\n"
        "  `norm_gamma`: expected dtype float32, found bfloat16.\n"
        "To match a part, give pt.collect(a, pattern) and pt.collect(b, pattern).\n"
        "Shapes follow from the model and from the shape of the input that pt.init was given.\n"
        "pt.cast(b, dtype) casts floating-point leaves."
    )


@pytest.mark.parametrize(
    ("a", "b", "lines"),
    [
        (tied(), pt.select(tied(), "embed.*"), ["`decoder_bias`: expected a leaf, found a hole."]),
        (pt.select(tied(), "embed.*"), tied(), ["`decoder_bias`: expected a hole, found a leaf."]),
        (with_kinds({"m": "param"}), with_kinds({"m": "state"}), ["`m`: expected kind param, found state."]),
        ({"m": None}, {"m": leaf(0)}, ["`m`: expected a hole, found a leaf."]),
        ({"m": {}}, {"m": leaf(0)}, ["`m`: expected a level without children, found shape=(2,), dtype=float32."]),
        ({"m": {}}, {}, ["`m`: expected a level without children, found nothing."]),
        ({"m": 1.0}, {"m": 1}, ["`m`: expected dtype float, found int."]),
        ({"m": "text"}, {"m": leaf(0)}, ["`m`: expected dtype str, found float32."]),
        ({"m": jax.random.key(0)}, {"m": leaf(0, ())}, ["`m`: expected dtype key<fry>, found float32."]),
        (leaf(0), leaf(0, (3,)), ["`value`: expected shape (2,), found (3,)."]),
        (leaf(0), {"m": leaf(0)}, ["`value` is missing, expected shape=(2,)", "`m` is extra"]),
        ([leaf(0)], (leaf(0),), ["the tree: expected list, found tuple."]),
        ({"m": [leaf(0)]}, {"m": (leaf(0),)}, ["`m`: expected list, found tuple."]),
        ({1: leaf(0)}, {"1": leaf(0)}, ["the tree: expected PyTreeDef({1: *}), found PyTreeDef({'1': *})."]),
        (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1), ["the order differs: expected `a`, found `b` in its place."]),
        (pt.from_tree({"a_b": {"c": 1}}), pt.from_tree({"a": {"b_c": 1}}), ["`a_b_c`: expected nesting a_b/c, found a/b_c."]),
        (CATALOGUE["colliding names"](), pt.from_tree({"a": {"b_c": leaf(0)}}), ["`a_b/c` is missing"]),
        (siblings().dense1, siblings().dense2.to_dict(), ["the tree: expected ParamTree, found dict."]),
    ],
)  # fmt: skip
def test_one_difference(a: Any, b: Any, lines: list[str]) -> None:
    message = text(a, b)
    for line in lines:
        assert f"  {line}" in message


def test_containers_of_one_name_are_told_apart() -> None:
    other = namedtuple("Point", ["x", "y"], module="elsewhere")
    assert f"  the tree: expected {__name__}.Point, found elsewhere.Point." in text(
        Point(1, 2), other(1, 2)
    )


def test_an_optimizers_state_is_compared_by_name() -> None:
    params = tied()
    state = optax.adam(1e-3).init(params)
    pt.check_match(state, optax.adam(1e-1).init(params))
    assert "  `0_mu_decoder_weight`: expected tied to `0_mu_embed_weight`, found not tied." in text(
        state, optax.adam(1e-3).init(pt.untie(params))
    )
    assert "`0`: expected ScaleByAdamState, found EmptyState." in text(
        state, optax.sgd(0.1).init(params)
    )


@jax.tree_util.register_pytree_node_class
class Layer:
    """A container of another library, with a field that is no leaf."""

    def __init__(self, w: Any, units: int) -> None:
        self.w, self.units = w, units

    def tree_flatten(self) -> Any:
        return (self.w,), self.units

    @classmethod
    def tree_unflatten(cls, units: int, leaves: Any) -> Any:
        return cls(*leaves, units)


def test_static_fields_of_containers_are_compared() -> None:
    a, b = ({"body": Layer(leaf(0), units)} for units in (3, 4))
    pt.check_match(a, {"body": Layer(leaf(1), 3)})
    assert text(a, b) == (
        "check_match: b is not like a:\n"
        "  `body`: expected PyTreeDef(CustomNode(Layer[3], [*])), found PyTreeDef(CustomNode(Layer[4], [*]))."
    )
    assert [d.what for d in pt.diff(a, b).differences] == ["static"]


def test_leaves_that_are_containers_are_looked_into() -> None:
    params = siblings().dense0
    pairs = jax.tree.map(lambda x: (x, x), params)
    assert "`weight_0` is extra" in text(params, pairs)
    pt.check_match(pairs, jax.tree.map(lambda x: (x, x + 1), params))
    assert "`weight`: expected a leaf, found a hole." in text(
        params, jax.tree.map(lambda x: None, params)
    )


def test_the_same_path_twice_is_an_error() -> None:
    with pytest.raises(
        pt.NameCollisionError, match="`a/b` is given twice, or is a leaf and also has children"
    ):
        pt.check_match({"a/b": 1.0, "a": {"b": 2.0}}, {})


def test_it_works_while_tracing_and_on_shapes() -> None:
    params = tied()
    traces = []

    @jax.jit
    def step(tree: Any, other: Any) -> Any:
        traces.append(None)
        pt.check_match(tree, other)
        pt.check_match(params, tree)
        return tree

    step(params, params)
    step(params, params)
    assert len(traces) == 1
    with pytest.raises(pt.MismatchError, match="`decoder_bias`: expected shape"):
        jax.eval_shape(step, params, longer(params))


def longer(params: pt.ParamTree) -> pt.ParamTree:
    return pt.map_named(lambda name, x: jnp.zeros(9), params, "decoder_bias")


def test_names_of_others_are_printed_harmlessly() -> None:
    message = text(pt.from_tree({"\x1b[31m": leaf(0)}), pt.from_tree({"w" * 1000: leaf(0)}))
    assert "`\\x1b[31m` is missing" in message
    assert "\x1b" not in message
    assert "... (1000 characters)` is extra" in message
    assert len(message) < 700


def test_only_so_many_names_are_compared_for_likeness(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []

    def close(wrong: str, known: list[str]) -> list[str]:
        searched.append(len(known))
        return []

    monkeypatch.setattr(compare_module, "close_names", close)
    a, b = (pt.from_tree({f"{name}{i}": 1.0 for i in range(3000)}) for name in "ab")
    assert len(differences(a, b)) == 6000
    assert sum(searched) <= 5000


# What a message advises to do helps


def advice(a: Any, b: Any, beginning: str) -> Any:
    """Runs the advice that begins so."""
    (line,) = [line for line in text(a, b).split("\n") if line.startswith(f"pt.{beginning}(")]
    end = max(line.rfind(") " + word) for word in ("unties", "ties", "puts"))
    return eval(line[: end + 1], {"pt": pt, "a": a, "b": b})


@pytest.mark.parametrize(
    "tree",
    [
        tied(),
        CATALOGUE["source after alias"](),
        pt.tie(pt.from_tree({"a.b": leaf(0), "c(": leaf(1)}), {"c(": "a.b"}),
    ],
)
def test_trees_are_tied_and_untied_as_advised(tree: pt.ParamTree) -> None:
    loose = pt.untie(tree)
    pt.check_match(tree, advice(tree, loose, "tie"))
    pt.check_match(loose, advice(loose, tree, "untie"))


def test_trees_with_other_ties_are_untied_and_tied_as_advised() -> None:
    loose = pt.from_tree({name: leaf(i) for i, name in enumerate("abcd")})
    a, b = pt.tie(loose, {"b": "a", "d": "c"}), pt.tie(loose, {"c": "a", "d": "a"})
    pt.check_match(a, advice(a, advice(a, b, "untie"), "tie"))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (tied(), pt.tie(reordered(tied()), {"embed/weight": "decoder/weight", "block/c": "block/a"})),
        (pt.from_tree({"a_b": {"c": leaf(1)}}), pt.from_tree({"a": {"b_c": leaf(2)}})),
        ({"a": [leaf(0)]}, {"a": (leaf(1),)}),
        (siblings().to_dict(), siblings()),
    ],
)
def test_values_get_into_another_form_as_advised(a: Any, b: Any) -> None:
    made = advice(a, b, "replace")
    pt.check_match(a, made)
    assert not pt.diff(pt.collect(made), pt.collect(b)).changes


def test_a_part_is_filled_casted_or_matched_as_advised() -> None:
    params = tied()
    part, rest = pt.partition(params, "embed.*")
    assert "pt.merge fills the holes" in text(params, part)
    pt.check_match(params, pt.merge(part, rest))
    low = pt.cast(params, jnp.bfloat16)
    assert "pt.cast(b, dtype) casts" in text(params, low)
    pt.check_match(params, pt.cast(low, jnp.float32))
    assert "pt.cast" not in text({"a": 1}, {"a": 1.0})
    more = pt.from_tree({**siblings().to_dict(), "head": leaf(0)})
    assert "give pt.collect(a, pattern) and pt.collect(b, pattern)" in text(siblings(), more)
    pt.check_match(pt.collect(siblings(), "dense.*"), pt.collect(more, "dense.*"))


# diff


@given(tree=trees())
def test_a_tree_does_not_differ_from_itself_or_a_copy(tree):
    copy = jax.tree.map(lambda x: x + 0 if x.dtype != bool else x, tree)
    for other in (tree, copy, jax.tree.map(np.asarray, tree)):
        found = pt.diff(tree, other)
        assert not found
        assert (found.differences, found.changes, found.shapes_only) == ((), (), 0)
        assert found.compared == len(jax.tree.leaves(tree))


@given(tree=trees(), data=st.data())
def test_one_changed_element_is_found_exactly(tree, data):
    leaves, treedef = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    slots = [i for i, x in enumerate(leaves) if x.size and x.dtype != bool]
    if not slots:
        return
    slot = data.draw(st.sampled_from(slots))
    changed = np.array(leaves[slot])
    place = data.draw(st.integers(0, changed.size - 1))
    changed.reshape(-1)[place] += 3
    other = jax.tree.unflatten(treedef, [changed if i == slot else x for i, x in enumerate(leaves)])
    for a, b in ((tree, other), (other, tree)):
        found = pt.diff(a, b)
        assert found
        assert found.differences == ()
        (change,) = found.changes
        assert change.name.replace("/", "_") == "_".join(flatten(tree)[0].canonical[slot])
        assert (change.differing, change.size, change.largest) == (1, changed.size, 3)


@given(a=trees(), b=trees())
def test_the_turned_difference_has_the_same_leaves(a, b):
    one, other = pt.diff(a, b), pt.diff(b, a)
    assert bool(one) == bool(other)
    facts = [
        {(c.name, c.differing, c.size, c.largest) for c in found.changes} for found in (one, other)
    ]
    assert facts[0] == facts[1]
    assert len(one.differences) == len(other.differences)


def test_what_changed_most_is_first_and_before_it_what_has_no_size() -> None:
    nan = jnp.nan
    a = {
        "w": leaf(100),
        "b": leaf(1),
        "c": leaf(0),
        "n": leaf(1),
        "act": "relu",
        "k": jax.random.key(0),
        "same": leaf(1),
    }
    b = {
        "w": leaf(101),
        "b": leaf(2),
        "c": leaf(1),
        "n": leaf(1).at[1].set(nan),
        "act": "gelu",
        "k": jax.random.key(1),
        "same": leaf(1),
    }
    found = pt.diff(pt.from_tree(a), pt.from_tree(b))
    assert [change.name for change in found.changes] == ["act", "k", "n", "c", "b", "w"]
    rows = found.to_dict()["values"]
    assert rows["w"] == {
        "differing": 2,
        "size": 2,
        "largest": 1.0,
        "relative": pytest.approx(0.01),
        "a": None,
        "b": None,
    }
    assert rows["c"]["relative"] == np.inf
    assert (
        np.isnan(rows["n"]["relative"])
        and np.isnan(rows["n"]["largest"])
        and rows["n"]["differing"] == 1
    )
    assert rows["act"] == {
        "differing": 1,
        "size": 1,
        "largest": None,
        "relative": None,
        "a": "'relu'",
        "b": "'gelu'",
    }
    assert rows["k"]["largest"] is None


def test_the_text_of_a_difference() -> None:
    a = pt.from_tree(
        {
            "embed": {"w": leaf(1, (2, 3))},
            "head": {"w": leaf(1, (2, 3)), "b": leaf(2)},
            "lr": 0.5,
            "n": jnp.int32(3),
        }
    )
    b = pt.from_tree(
        {
            "embed": {"w": leaf(2, (2, 3))},
            "head": {"w": leaf(1, (2, 4)), "c": leaf(2)},
            "lr": 0.25,
            "n": jnp.int32(3),
        }
    )
    assert repr(pt.diff(a, b)) == (
        "Differences: 3 in structure, shapes and dtypes, 2 of 3 leaves in value\n"
        "name      difference   a                           b                           elements   largest   relative\n"
        "────────────────────────────────────────────────────────────────────────────────────────────────────────────\n"
        "head_b    missing      shape=(2,), dtype=float32   nothing\n"
        "head_c    extra        nothing                     shape=(2,), dtype=float32\n"
        "head_w    shape        (2, 3)                      (2, 4)\n"
        "embed_w   value                                                                  6 of 6         1          1\n"
        "lr        value        0.5                         0.25                          1 of 1      0.25        0.5"
    )
    assert repr(pt.diff(a, a)) == "No difference in 5 leaves"
    assert repr(pt.diff(leaf(0), leaf(0))) == "No difference in 1 leaf"


def test_a_difference_as_plain_values() -> None:
    a, b = pt.from_tree({"w": leaf(0), "x": leaf(0)}), pt.from_tree({"w": leaf(0, (3,)), "x": leaf(2)})
    assert json.loads(json.dumps(pt.diff(a, b).to_dict())) == {
        "structure": [{"name": "w", "what": "shape", "expected": [2], "found": [3], "close": []}],
        "values": {
            "x": {"differing": 2, "size": 2, "largest": 2.0, "relative": np.inf, "a": None, "b": None}
        },
        "compared": 1,
        "shapes_only": 0,
    }


def test_hostile_names_and_values_stay_text() -> None:
    bad = "<script>alert(1)</script>\x1b[31m\u202e"
    found = pt.diff(
        pt.from_tree({bad: leaf(0), "s": bad}), pt.from_tree({bad + "2": leaf(0), "s": "<b>"})
    )
    for shown in (repr(found), found._repr_html_()):
        assert "\x1b" not in shown and "\u202e" not in shown
        assert "\\x1b[31m\\u202e" in shown
    assert "<script>" not in found._repr_html_() and "<b>" not in found._repr_html_()
    assert "&lt;script&gt;" in found._repr_html_()


def test_containers_do_not_matter_to_a_difference() -> None:
    params = siblings()
    nested = params.to_dict()
    assert not pt.diff(params, nested) and not pt.diff(nested, params)
    assert not pt.diff({"a": [leaf(0)]}, {"a": (leaf(0),)})
    assert pt.diff(OrderedDict(a=leaf(0), b=leaf(1)), OrderedDict(b=leaf(1), a=leaf(0)))
    nested["dense3"]["bias"] = leaf(-1)
    assert [change.name for change in pt.diff(params, nested).changes] == ["dense3_bias"]


def test_subtrees_are_compared_by_names_from_their_top() -> None:
    params = siblings()
    found = pt.diff(params.dense0, params.dense1)
    assert [change.name for change in found.changes] == ["weight", "bias"]
    assert not pt.diff(params.dense1, pt.from_tree(params.to_dict()["dense1"]))


def test_tied_leaves_differ_once_and_ties_by_name() -> None:
    params = tied()
    after = jax.tree.map(lambda x: x + 1, params)
    assert {change.name for change in pt.diff(params, after).changes} == {
        "embed_weight", "block_a_w", "block_a_b", "decoder_bias"
    }  # fmt: skip
    found = pt.diff(params, pt.untie(after))
    assert [(d.name, d.what, d.expected, d.found) for d in found.differences] == [
        ("block_c_w", "tie", "block_a_w", None),
        ("block_c_b", "tie", "block_a_b", None),
        ("decoder_weight", "tie", "embed_weight", None),
    ]
    assert len(found.changes) == 7  # without the tie each name has a leaf of its own


def test_parts_are_compared_where_both_have_leaves() -> None:
    params = siblings()
    part = pt.select(jax.tree.map(lambda x: x + 1, params), "dense[01]_.*")
    found = pt.diff(params, part)
    assert {d.what for d in found.differences} == {"hole"} and len(found.differences) == 20
    assert len(found.changes) == found.compared == 4


def test_values_of_two_dtypes_are_compared_exactly() -> None:
    params = {"w": jnp.array([1.0, 1.0 + 2**-7, 1.0 + 2**-8])}
    found = pt.diff(params, pt.cast(params, jnp.bfloat16))
    assert found.differences == (Difference("w", "dtype", "float32", "bfloat16"),)
    (change,) = found.changes
    assert (change.differing, change.largest) == (1, 2**-8)
    assert not pt.diff({"n": np.float64(0.5)}, {"n": jnp.float32(0.5)}).changes


def test_of_shapes_only_the_structure_is_compared() -> None:
    net = pt.nn.Dense(2)
    x = jnp.ones((1, 3))
    params = pt.init(net, jax.random.key(0), x)
    found = pt.diff(params, pt.abstract(net, x))
    assert not found and found.compared == 0 and found.shapes_only == 2
    assert repr(found) == (
        "No difference in 2 leaves\nValues were not compared for 2 leaves with only a shape."
    )
    assert pt.diff(params, pt.abstract(pt.nn.Dense(3), x)).differences


def test_what_has_no_values_to_compare_is_refused() -> None:
    params = {"a": leaf(0), "<b>\x1b": leaf(1)}
    with pytest.raises(TypeError, match=r"diff compares values, .*pt.check_match\(a, b\)"):
        jax.jit(lambda p: pt.diff(p, p))(params)
    jax.jit(lambda a, b: pt.check_match(a, b))(params, params)  # as advised
    gone = jax.tree.map(lambda x: x + 0, params)
    jax.tree.map(lambda x: x.delete(), gone)
    with pytest.raises(pt.ParamTreeError, match=r"diff: the values of `<b>\\x1b`, `a` are gone"):
        pt.diff(params, gone)
    for rtol in (-1, float("nan"), "1", None):
        with pytest.raises(ValueError, match="^rtol must be a non-negative number, but found"):
            pt.diff(params, params, rtol=rtol)
    with pytest.raises(ValueError, match="^atol must be a non-negative number, but found -1"):
        pt.diff(params, params, atol=-1)


# How far two leaves are apart

DTYPES = [
    np.dtype(name)
    for name in [
        "bool",
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ]
]
DTYPES += [np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4)]


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (5,), (2, 3), (0, 2)]))

    def one() -> np.ndarray:
        if dtype.kind in "iub":
            return draw(hnp.arrays(dtype, shape))  # hypothesis likes the extremes
        if dtype == ml_dtypes.int4:
            return draw(hnp.arrays(np.int8, shape, elements=st.integers(-8, 7))).astype(dtype)
        width = 128 if dtype.kind == "c" else 64
        kind = np.complex128 if dtype.kind == "c" else np.float64
        few = [0.0, 1.0, -1.0, 0.1, 1e4, np.nan, np.inf, -np.inf]
        numbers = st.one_of(st.sampled_from(few), st.floats(-400, 400))
        made = draw(
            hnp.arrays(
                kind, shape, elements=numbers if width == 64 else st.builds(complex, numbers, numbers)
            )
        )
        with np.errstate(all="ignore"):
            return made.astype(dtype)

    a = one()
    b = one()
    return a, np.where(draw(hnp.arrays(bool, shape)), a, b).astype(dtype)


def exactly(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> Any:
    """How many differ, by how much at most, and whether some differ by almost just what is tolerated."""
    count, most, edge = 0, Fraction(0), False
    odd = []
    for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True):
        x, y = (
            int(v) if v.dtype.kind in "iub" or v.dtype == ml_dtypes.int4 else complex(v) for v in (x, y)
        )
        if x == y or (x != x and y != y):
            continue
        if x != x or y != y or abs(x) == np.inf or abs(y) == np.inf:
            odd.append(np.nan if x != x or y != y or abs(x - y) != abs(x - y) else np.inf)
            count += 1
            continue
        far = Fraction(abs(x - y))
        limit = Fraction(atol) + Fraction(rtol) * Fraction(abs(y))
        edge |= limit > 0 and abs(far / limit - 1) < Fraction(1, 10**5)
        most = max(most, far)
        count += far > limit
    if odd:
        return count, np.nan if any(np.isnan(odd)) else np.inf, edge
    return count, most, edge


@given(pair=arrays(), rtol=st.sampled_from([0.0, 0.5]), atol=st.sampled_from([0.0, 1.5]))
@example(pair=(np.zeros(()), np.array(4.9e-251)), rtol=0.0, atol=0.0)  # its square is zero
def test_distances_are_those_of_exact_arithmetic(pair, rtol, atol):
    count, most, edge = exactly(*pair, rtol, atol)
    if edge:
        return
    (found,) = distances([pair], rtol, atol)
    if not count:
        assert found is None
        return
    assert (found.differing, found.size) == (count, pair[0].size)
    if isinstance(most, Fraction) and pair[0].dtype.kind in "iub":
        assert found.largest == most and isinstance(found.largest, int)
    else:
        np.testing.assert_allclose(found.largest, float(most), rtol=1e-12)
    if np.isfinite(float(most)):
        wide = np.complex128 if pair[0].dtype.kind == "c" else np.float64
        a, b = (x.astype(wide).reshape(-1) for x in pair)
        equal = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(all="ignore"):
            apart, length = np.where(equal, 0, a - b), np.where(np.isfinite(a), a, 0)
            scale, unit = np.abs(apart).max(), np.abs(length).max()  # squares underflow and overflow
            shape = np.linalg.norm(apart / scale) / np.linalg.norm(length / unit) if unit else 1
            norm = shape * (scale / unit) if unit else np.inf
        np.testing.assert_allclose(found.relative, norm, rtol=1e-6)


def test_extremes_do_not_overflow() -> None:
    def largest(a: Any, b: Any) -> Any:
        (found,) = distances([(a, b)])
        return found and found.largest

    assert largest(np.uint8([0, 3]), np.uint8([255, 3])) == 255
    assert largest(np.int8([-128]), np.int8([127])) == 255
    assert largest(np.int64([-(2**63)]), np.int64([2**63 - 1])) == 2**64 - 1
    assert largest(np.uint64([0]), np.uint64([2**64 - 1])) == 2**64 - 1
    assert largest(np.int64([2**62]), np.int64([2**62 + 1])) == 1
    assert largest(2**70, 2**70 + 1) is None and distances([(2**70, 2**70 + 1)]) == [
        Distance(1, 1, None, None)
    ]
    assert largest(np.float64(1e308), np.float64(0)) == 1e308
    assert distances([(np.full(4, 1e300), np.full(4, 2e300))])[0].relative == pytest.approx(1)
    assert largest(np.float64(1), np.float64(1 + 2**-52)) == 2**-52  # jax would see float32
    assert largest(jnp.float32([3e38]), jnp.float32([-3e38])) == pytest.approx(6e38)


def test_everything_else_is_equal_or_not() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    none = [
        ("a", "a"), (np.array(["nat"], "M8[s]"), np.array(["nat"], "M8[s]")), (np.array(["a"]), np.array(["a"])),
        (np.zeros(2, jax.dtypes.float0), np.zeros(2, jax.dtypes.float0)), (jax.random.key(3), jax.random.key(3)),
        (jnp.zeros((0, 3)), jnp.zeros((0, 3))), (odd := Odd(), odd), (1, 1), (True, 1), (0.5, np.float32(0.5)),
        (np.array([None, np.nan], object), np.array([None, np.nan], object)),
    ]  # fmt: skip
    assert distances(none) == [None] * len(none)
    some = [
        ("a", "b"), (np.array(["a", "b"]), np.array(["a", "c"])), (Odd(), Odd()),
        (jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.key(1), 3)),
    ]  # fmt: skip
    assert distances(some) == [Distance(*x, None, None) for x in [(1, 1), (1, 2), (1, 1), (3, 3)]]
    assert not pt.diff({"k": jax.random.key(0)}, {"k": leaf(0, ())}).changes  # told as another dtype


ON_DEVICE = ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool", "complex64"]


@pytest.mark.parametrize("dtype", ON_DEVICE)
def test_what_is_measured_on_a_device_is_what_numpy_measures(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.integers(0, 100, (3, 50)), dtype) for _ in range(2))
    pairs = [(a, b), (b, a), (a, a + a if dtype != "bool" else ~a), (a, jnp.array(a))]
    if a.dtype.kind not in "iub":
        odd = a.at[0, 0].set(jnp.nan)
        pairs += [(odd, jnp.array(odd)), (odd, b), (a, a.at[1].set(jnp.inf))]
    tolerances = [(0.0, 0.0), (0.25, 0.0), (0.0, 30.5)]
    host = [distances(pairs, *tolerated) for tolerated in tolerances]
    assert sum(map(bool, host[0])) >= 3 and host[0][3] is None
    monkeypatch.setattr(distance_module, "_on_host", lambda one, other: False)
    before = distance_module._on_device._cache_size()
    device = [distances(pairs, *tolerated) for tolerated in tolerances]
    assert distance_module._on_device._cache_size() == before + 1  # one shape and dtype, all tolerances
    for one, other in zip(
        [x for xs in host for x in xs], [x for xs in device for x in xs], strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.differing, one.size) == (other.differing, other.size)
            np.testing.assert_allclose(other[2:], one[2:], rtol=1e-6)


def test_nothing_is_compiled_for_what_a_processor_can_read() -> None:
    before = distance_module._on_device._cache_size()
    params = siblings()
    assert len(pt.diff(params, jax.tree.map(lambda x: x * 3 + 1, params)).changes) == 24
    big = jnp.zeros(LARGE + 1)
    assert not pt.diff(big, np.zeros(LARGE + 1, np.float32))
    assert pt.diff(big, big.at[LARGE].set(2)).changes[0].differing == 1  # in the last block
    assert distance_module._on_device._cache_size() == before


def test_arrays_of_objects_are_compared_one_by_one() -> None:
    def objects(*values: Any) -> Any:
        made = np.empty(len(values), object)
        made[:] = values
        return made

    one = objects(np.ones(2), "a", np.nan, np.ones(1), None)
    assert not pt.diff({"x": one}, {"x": objects(np.ones(2), "a", np.nan, np.ones(1), None)})
    found = pt.diff({"x": one}, {"x": objects(np.zeros(2), "a", np.nan, np.ones(2), 0)})
    assert [(change.differing, change.size) for change in found.changes] == [(3, 5)]


@pytest.mark.parametrize(
    "dtypes", [("f4", "f4"), ("i4", "i4"), ("f4", "f8"), ("u1", "?"), ("c8", "c8")], ids=str
)
def test_many_small_leaves_have_the_distances_of_the_formulas(dtypes: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(400):
        x = np.abs(3 * rng.standard_normal(i % 7)).astype(dtypes[0])
        y = x.astype(dtypes[1])
        y = np.roll(y, 1) if i % 3 else y
        if i % 5 == 0 and x.size and y.dtype.kind == "f":
            y[0] = np.nan
        pairs.append((x, y))
    together = distances(pairs, 1e-6, 1e-6)
    assert any(together) and not all(together)
    for (x, y), found in zip(pairs, together, strict=True):
        a, b = x.astype("c16"), y.astype("c16")
        off = np.abs(a - b)
        differing = np.count_nonzero(~(off <= 1e-6 + 1e-6 * np.abs(b)))
        if not differing:
            assert found is None
            continue
        length = np.linalg.norm(a)
        relative = np.nan if np.isnan(off).any() else np.linalg.norm(off) / length if length else np.inf
        np.testing.assert_allclose(found, (differing, x.size, off.max(), relative), rtol=1e-6)


def in_memory(kind: str, x: np.ndarray) -> Any:
    """The values of an array, kept in another way."""
    match kind:
        case "jax":
            return jnp.asarray(x)
        case "strided":
            return np.repeat(x, 2, axis=-1)[..., ::2]
        case "columns first":
            return np.asfortranarray(x)
        case "swapped bytes" if x.dtype.kind in "fc":
            return x.astype(x.dtype.newbyteorder())
        case "sharded":
            mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:2])
            return jax.device_put(x, NamedSharding(mesh, P(None, "x")))
        case "transposed by the compiler":
            if x.dtype == jnp.int4 and jax.__version_info__ < (0, 9):
                pytest.skip("jaxlib before 0.9 fails to lay out 4 bits in another way")
            layout = Layout(major_to_minor=(1, 0))
            return jax.device_put(x, Format(layout, SingleDeviceSharding(jax.devices()[0])))
    return x


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int8", "int4", "bool", "complex64", "float8_e4m3fn"]
)
@pytest.mark.parametrize(
    "kind",
    [
        "numpy",
        "jax",
        "strided",
        "columns first",
        "swapped bytes",
        "sharded",
        "transposed by the compiler",
    ],
)
def test_small_leaves_are_read_however_they_are_kept(kind: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    first = [rng.integers(0, 2, (3, 4)).astype(jnp.dtype(dtype)) for _ in range(5)]
    second = [rng.integers(0, 2, (3, 4)).astype(jnp.dtype(dtype)) for _ in range(4)] + [first[4]]
    expected = [distance_module._of_arrays(x, y, 0.0, 0.0) for x, y in zip(first, second, strict=True)]
    for other in ("numpy", kind):
        pairs = [(in_memory(kind, x), in_memory(other, y)) for x, y in zip(first, second, strict=True)]
        found = distances(pairs)
        assert found[4] is None and found[0] is not None
        for one, want in zip(found[:4], expected[:4], strict=True):
            np.testing.assert_allclose(one, want, rtol=1e-6)
