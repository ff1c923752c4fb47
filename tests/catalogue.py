"""A catalogue of trees that every law must hold for, and strategies that make more of them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import paramtree as pt
from paramtree.core.structure import build
from paramtree.core.tree import flatten, unflatten


def leaf(i: int, shape: tuple[int, ...] = (2,)) -> Any:
    """An array that no other number gives."""
    return jnp.full(shape, float(i), jnp.float32)


def deep(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"weight": leaf(0), "bias": leaf(1)}
    for i in range(depth):
        tree = {f"level{i}": tree, f"side{i}": leaf(i + 2)}
    return tree


def with_holes(tree: pt.ParamTree, kept: list[int]) -> pt.ParamTree:
    structure = flatten(tree)[0].keep(kept)
    return unflatten(structure, tuple(flatten(tree)[1][i] for i in kept))


def with_kinds(kinds: dict[str, str]) -> pt.ParamTree:
    items = [(tuple(path.split("/")), path) for path in kinds]
    structure, order = build(items, kinds)
    return unflatten(structure, tuple(leaf(i) for i, _ in enumerate(order)))


def siblings() -> pt.ParamTree:
    return pt.from_tree({f"dense{i}": {"weight": leaf(i), "bias": leaf(i + 20)} for i in range(12)})


def tied() -> pt.ParamTree:
    tree = pt.from_tree(
        {
            "embed": {"weight": leaf(0, (3, 2))},
            "block": {"a": {"w": leaf(1), "b": leaf(2)}, "c": {"w": leaf(3), "b": leaf(4)}},
            "decoder": {"weight": leaf(5, (3, 2)), "bias": leaf(6)},
        }
    )
    return pt.tie(tree, {"decoder/weight": "embed/weight", "block/c": "block/a"})


CATALOGUE: dict[str, Callable[[], pt.ParamTree]] = {
    "empty": lambda: pt.from_tree({}),
    "one leaf": lambda: pt.from_tree({"w": leaf(0)}),
    "flat": lambda: pt.from_tree({"w": leaf(0), "b": leaf(1, ()), "a": leaf(2, (0, 3))}),
    "deep": lambda: pt.from_tree(deep(60)),
    "more than ten siblings": siblings,
    "colliding names": lambda: pt.from_tree({"a_b": {"c": leaf(0)}, "a": {"b_c": leaf(1)}}),
    "levels that hold nothing": lambda: pt.from_tree({"a": {}, "b": {"c": {}, "w": leaf(0)}}),
    "odd names": lambda: pt.from_tree({"läyer 0": {"w.x": leaf(0), "[b]": leaf(1)}, "items": leaf(2)}),
    "tied across levels": tied,
    "source after alias": lambda: pt.tie(
        pt.from_tree({"decoder": leaf(0), "x": leaf(1), "embed": leaf(2)}), {"decoder": "embed"}
    ),
    "kinds": lambda: with_kinds({"bn/gamma": "param", "bn/mean": "state", "bn/var": "state"}),
    "with holes": lambda: with_holes(tied(), [0, 2, 3]),
    "nothing but holes": lambda: with_holes(siblings(), []),
    "a view": lambda: siblings().dense10,
    "a view with a tie out of it": lambda: tied().decoder,
    "a view with holes": lambda: with_holes(tied(), [0, 2]).block,
    "mixed dtypes": lambda: pt.from_tree(
        {"f": leaf(0), "i": jnp.arange(3), "h": jnp.ones(2, jnp.bfloat16), "b": jnp.array(True)}
    ),
}

WITHOUT_HOLES = [name for name in CATALOGUE if "hole" not in name]

NAMES = st.text("ab_0", min_size=1, max_size=3)


@st.composite
def trees(draw: st.DrawFn, holes: bool = True) -> pt.ParamTree:
    """Any tree: random nesting, ties and, if wanted, holes; or one of the catalogue."""
    if draw(st.booleans()):
        names = list(CATALOGUE) if holes else WITHOUT_HOLES
        return CATALOGUE[draw(st.sampled_from(names))]()
    nested = st.recursive(
        st.just(None), lambda below: st.dictionaries(NAMES, below, max_size=4), max_leaves=12
    )
    count = iter(range(1000))

    def fill(below: Any) -> Any:
        if below is None:
            return np.full((2,), float(next(count)), np.float32)
        return {name: fill(value) for name, value in below.items()}

    tree = pt.from_tree(fill(draw(st.dictionaries(NAMES, nested, max_size=5))))
    paths = ["/".join(path) for path in flatten(tree)[0].canonical]
    if len(paths) > 1 and draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            alias, source = draw(st.permutations(paths).map(lambda order: order[:2]))
            tree = pt.tie(tree, {alias: source})
    if holes and draw(st.booleans()):
        slots = range(len(flatten(tree)[0].kinds))
        tree = with_holes(tree, sorted(draw(st.sets(st.sampled_from(slots)))) if slots else [])
    return tree


def same(a: pt.ParamTree, b: pt.ParamTree) -> bool:
    """Whether two trees have one structure and equal leaves."""
    a, b = ((tree) for tree in (a, b))
    return flatten(a)[0] is flatten(b)[0] and all(
        np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype
        for x, y in zip(flatten(a)[1], flatten(b)[1], strict=True)
    )
