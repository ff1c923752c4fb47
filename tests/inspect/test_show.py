"""A tree renders as text, in IPython, as HTML and with treescope."""

import html.parser
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import paramtree as pt
from paramtree import nn
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, tied, with_holes, with_kinds

VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(html.parser.HTMLParser):
    """Parses HTML, checks that tags are closed in order, and collects tags, attributes, ids and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.rows = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        for key, value in attrs:
            self.attributes.add(key)
            self.rows += key == "class" and value.startswith("pt-row")
            if key == "style":
                assert SAFE_STYLE.fullmatch(value), value
            if key == "id":
                self.ids.append(value)
            if key == "href":
                self.links.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open[-1:] == ["style"] else data


SAFE_TAGS = {"div", "style", "details", "summary", "span", "b", "i", "a", "bdi", "svg", "path"}
SAFE_ATTRIBUTES = {
    "class", "title", "id", "href", "open", "viewbox", "preserveaspectratio", "role", "aria-label", "d",
    "style",
}  # fmt: skip
# Own properties, whose values are numbers, lengths and functions of lengths.
SAFE_STYLE = re.compile(r"(--pt-[a-z]+:[0-9a-z(), ]+(;|$))+")


def checked(text: str) -> Page:
    page = Page(text)
    assert page.tags <= SAFE_TAGS
    assert page.attributes <= SAFE_ATTRIBUTES
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|url\(|@import", text)
    return page


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_tree_of_the_catalogue_shows_all_its_names(name: str) -> None:
    tree = CATALOGUE[name]()
    page = checked(tree._repr_html_())
    structure = flatten(tree)[0]
    text = repr(pt.show(tree))
    for path in structure.paths[:50]:
        assert path[-1][:40] in page.text
        assert path[-1][:40] in text
    assert page.rows == len(structure.slots) + bool(structure.slots)  # and the heads
    aliases = sum(slot >= 0 for slot in structure.slots) - len(structure.kinds)
    assert len(page.links) == aliases == text.count("= ")
    assert set(page.ids) == {link[1:] for link in page.links}


@pytest.mark.parametrize("name", CATALOGUE)
def test_totals_match_count_and_nbytes(name: str) -> None:
    tree = CATALOGUE[name]()
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree)):
        return
    from paramtree.inspect.outline import Level, as_tree, outline

    top = outline(as_tree(tree))

    def check(level: Level) -> None:
        assert level.count == sum(below.count or 0 for below in level.children)
        assert level.nbytes == sum(below.nbytes or 0 for below in level.children)
        for below in level.children:
            if isinstance(below, Level):
                check(below)

    check(top)
    leaves = jax.tree.leaves(tree)
    assert top.count == sum(leaf.size for leaf in leaves)
    assert top.nbytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert top.leaves == len(leaves)


TEXT = """\
ParamTree: 8 leaves, 256 parameters, 16 of state, 1.1 KiB
├─ dense0                             168  672 B
│  ├─ weight        (8, 20)  float32  160  640 B
│  └─ bias          (8,)     float32    8   32 B
├─ dense1                              72  288 B
│  ├─ weight        (8, 8)   float32   64  256 B
│  └─ bias          (8,)     float32    8   32 B
├─ dense2
│  ├─ weight                                      = dense1_weight
│  └─ bias                                        = dense1_bias
├─ batchnorm0                          32  128 B
│  ├─ gamma         (8,)     float32    8   32 B
│  ├─ beta          (8,)     float32    8   32 B
│  ├─ running_mean  (8,)     float32    8   32 B  state
│  └─ running_var   (8,)     float32    8   32 B  state
└─ relu0                                          empty"""


def net() -> tuple[Any, pt.ParamTree]:
    shared = pt.nn.Dense(8)
    mlp = pt.nn.Sequential(pt.nn.Dense(8), shared, shared, pt.nn.BatchNorm(), pt.nn.Activation("relu"))
    return mlp, pt.init(mlp, jax.random.key(0), jnp.ones((2, 20)))


def test_the_text_of_a_net() -> None:
    _, params = net()
    assert repr(pt.show(params)) == TEXT


def test_a_sub_tree_shows_its_place() -> None:
    _, params = net()
    assert (
        repr(pt.show(params.dense2)).splitlines()[0]
        == "ParamTree dense2: 2 leaves, 72 parameters, 288 B"
    )
    assert 'title="dense2_weight"' in params.dense2._repr_html_()


def test_holes_are_marked_and_counted() -> None:
    text = repr(pt.show(with_holes(tied(), [1])))
    assert text.splitlines()[0].endswith("5 holes")
    assert len(re.findall(r"  hole$", text, re.MULTILINE)) == 5


def test_statistics_are_shown_in_text_and_html() -> None:
    tree = pt.from_tree({"a": jnp.array([0.0, 1.0, jnp.nan]), "b": "text"})
    text = repr(pt.show(tree, stats=True)).splitlines()
    assert text[1].split() == ["mean", "std", "min", "max", "zeros", "min", "to", "max"]
    assert text[2].split()[:11] == [
        "├─",
        "a",
        "(3,)",
        "float32",
        "3",
        "12",
        "B",
        "0.5",
        "0.5",
        "0",
        "1",
    ]
    page = checked(pt.show(tree, stats=True)._repr_html_())
    assert "1 NaN" in page.text and "svg" in page.tags


def test_no_value_is_read_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.array import ArrayImpl

    def read(self: Any) -> Any:
        raise AssertionError("a value was read")

    tree = pt.from_tree({"a": jnp.ones(3)})
    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    assert "(3,)" in tree._repr_html_() and "(3,)" in repr(pt.show(tree))


@given(
    st.lists(st.text(min_size=1).filter(lambda s: "/" not in s), min_size=1, max_size=4, unique=True)
)
@settings(max_examples=200)
def test_any_name_is_escaped(names: list[str]) -> None:
    tree = pt.from_tree({name: {"w": jnp.ones(2), f"{name}2": 1} for name in names})
    checked(tree._repr_html_())
    assert len(repr(pt.show(tree)).splitlines()) == 1 + 3 * len(names)
    assert all(line.isprintable() for line in repr(pt.show(tree)).splitlines())
    assert all(line.isprintable() for line in repr(tree).splitlines())


def test_a_name_of_a_megabyte_is_cut() -> None:
    tree = pt.from_tree({"w" * 2**20: jnp.ones(2)})
    assert len(tree._repr_html_()) < 10_000
    assert "... (1048576 characters)" in repr(pt.show(tree))


def test_large_trees_are_closed_and_grouped_and_text_is_short() -> None:
    tree = pt.from_tree({f"layer{i}": {"w": np.ones(1), "b": np.ones(1)} for i in range(5000)})
    text = tree._repr_html_()
    assert "<details open>" not in text
    page = checked(text)
    assert page.rows == 10_001
    assert "layer4900 ... layer4999" in page.text
    assert len(repr(pt.show(tree)).splitlines()) < 210
    assert repr(pt.show(tree)).splitlines()[-1] == "└─ ... 4,800 more"


def test_a_tree_of_many_levels_stays_shallow_for_a_browser() -> None:
    nested: Any = {"w": np.ones(1)}
    for i in range(2000):
        nested = {f"n{i}": nested}
    page = checked(pt.from_tree(nested)._repr_html_())
    assert page.rows == 2
    assert pt.from_tree(nested)._repr_html_().count("<details") == 100


def test_two_views_on_a_page_do_not_share_ids() -> None:
    tree = tied()
    assert not set(Page(tree._repr_html_()).ids) & set(Page(tree._repr_html_()).ids)


def test_tracers_shapes_and_other_pytrees_are_shown() -> None:
    model, params = net()
    assert "float32" in repr(pt.show(pt.abstract(model, jnp.ones((2, 20)))))
    seen = []
    jax.jit(lambda tree: seen.append((repr(pt.show(tree)), tree._repr_html_())))(params)
    assert all("traced" in text and "(8, 20)" in text for text in seen[0])
    for value in (optax.adam(0.1).init({"a": jnp.ones(2)}), [1, (2, None)], {}, jnp.ones(3), 3, None):
        checked(pt.show(value)._repr_html_())
    state = optax.sgd(0.1, momentum=0.9).init(pt.select(params, ".*weight"))
    assert "8 holes" in repr(pt.show(state)) or "holes" in repr(pt.show(state))
    assert "value" in repr(pt.show(jnp.ones(3)))


def test_a_sharding_is_shown() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    on_one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert "devices" not in repr(pt.show({"a": jax.device_put(jnp.ones(2), on_one)}))
    abstract = jax.sharding.AbstractMesh((4,), ("<b>",))
    spec = jax.sharding.NamedSharding(abstract, jax.sharding.PartitionSpec(None, "<b>"))
    leaf = jax.ShapeDtypeStruct((2, 8), jnp.float32, sharding=spec)
    assert "P(None, <b>)" in repr(pt.show({"a": leaf}))
    assert "P(None, <b>)" in checked(pt.show({"a": leaf})._repr_html_()).text


def test_ipython_prints_an_outline_and_python_a_list() -> None:
    pretty = pytest.importorskip("IPython.lib.pretty")
    _, params = net()
    assert pretty.pretty(params) == repr(pt.show(params))
    assert pretty.pretty(pt.show(params)) == repr(pt.show(params))
    assert repr(params).startswith("Parameter dense0_weight (shape=(8, 20), dtype=float32)\n")


def test_a_display_of_ipython_takes_the_html() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    _, params = net()
    data, _ = formatters.DisplayFormatter().format(params)
    assert data["text/html"].startswith('<div class="paramtree"')


def test_treescope_draws_levels_ties_and_holes() -> None:
    treescope = pytest.importorskip("treescope")
    text = treescope.render_to_text(with_holes(tied(), [0]))
    assert "ParamTree" in text and "'embed'" in text
    assert "<tied to embed_weight>" in text and "<hole>" in text
    assert treescope.render_to_html(with_kinds({"a/<script>": "state"})).count("'<script>'") == 0


def test_a_view_is_of_a_tree_and_prints_no_control_characters() -> None:
    tree = pt.from_tree({"\x1b[31mred": jnp.ones(1), "a\nb": "x\x07y"})
    assert "\x1b" not in repr(pt.show(tree)) and "\x1b" not in repr(tree)
    assert "\\x1b[31mred" in repr(tree)


def test_none_in_other_containers_is_a_hole() -> None:
    part = pt.select({"dense": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}}, ".*kernel")
    assert repr(pt.show(part)) == (
        "ParamTree: 1 leaf, 6 parameters, 24 B, 1 hole\n"
        "└─ dense                       6  24 B\n"
        "   ├─ bias                              hole\n"
        "   └─ kernel  (2, 3)  float32  6  24 B"
    )
    assert "<i>hole</i>" in pt.show(part)._repr_html_()


def test_leaves_are_counted_as_jax_counts_them() -> None:
    tree = pt.from_tree({"a": jnp.ones(2), "b": jnp.ones(2)})
    state = optax.masked(optax.trace(0.9), pt.mask(tree, "a")).init(tree)
    assert len(jax.tree.leaves(state)) == 1
    assert repr(pt.show(state)).startswith("ParamTree: 1 leaf, 2 parameters, 8 B\n")
    pairs = jax.tree.map(lambda leaf: (leaf, leaf), tree)
    assert repr(pt.show(pairs)).startswith("ParamTree: 4 leaves, 8 parameters, 32 B")
    assert list(pt.collect(pairs)) == ["a_0", "a_1", "b_0", "b_1"]


def test_symbolic_sizes_have_no_count() -> None:
    (batch,) = export.symbolic_shape("batch")
    shape: Any = jax.ShapeDtypeStruct((batch, 4), jnp.float32)
    shown = pt.show({"x": shape, "y": jnp.ones(2)})
    assert "x  (batch, 4)  float32" in repr(shown) and "2 parameters" in repr(shown)
    assert "(batch, 4)" in shown._repr_html_()


# Parametrised levels


@pytest.mark.parametrize("copies", [(), (2,)], ids=["plain", "stacked"])
def test_a_level_says_which_parametrisation_it_belongs_to(copies: tuple[int, ...]) -> None:
    pz = pt.parametrizations
    made = [pz.WeightNorm(), pz.SpectralNorm(), pz.LoRA(2), pz.Quantized(), pz.Masked(jnp.abs)]
    made += [pz.Orthogonal(), pz.Frozen(), pz.Positive(), pz.Cast("float16")]
    made += [pz.WeightStandardization(gain=1.0)]
    assert {type(one).__name__ for one in made} == {n for n in vars(pz) if n[0].isupper()}
    x = jnp.ones((2, 3))
    for one in made:
        layer = nn.Dense(3, use_bias=False, weight_initializer=pt.initializers.Uniform(1.0))
        net = nn.Repeat(layer, 2) if copies else layer
        tree = pt.init(net, jax.random.key(0), x, rules={".*": positive})
        expanded = pt.expand(tree, {"weight": one}, jax.random.key(1))
        lines, name = str(pt.show(expanded)).split("\n"), type(one).__name__
        if isinstance(one, pz.Positive | pz.Cast):  # one leaf stays where it was
            assert len(lines) == 2 and name not in lines[1]
        else:
            assert lines[1].endswith(f"  {name}"), lines
            assert f">{name}, " in pt.show(expanded)._repr_html_()
    assert "WeightNorm" not in str(pt.show({"a": {"g": x, "v": x, "w": x}, "b": {"v": x, "g": x}}))


def positive(key: Any, shape: Any, dtype: Any) -> Any:
    return jax.random.uniform(key, shape, dtype, 0.5, 1.5)
