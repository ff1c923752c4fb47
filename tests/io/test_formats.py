"""The list of formats: what it says is true, the guide says the same, and a new one is a module and an entry."""

import itertools
import re
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree.command import main
from paramtree.core.tree import flatten
from paramtree.io import formats
from paramtree.io.formats.format import Content, Format
from tests.catalogue import CATALOGUE, leaf, same, tied

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending" / "format.md"
each = pytest.mark.parametrize("form", formats.FORMATS, ids=[form.name for form in formats.FORMATS])
WRITTEN = [form for form in formats.FORMATS if form.writes]
written = pytest.mark.parametrize("form", WRITTEN, ids=[form.name for form in WRITTEN])


# The list


def row(form: Format) -> str:
    """The row of a format in the guide."""
    endings = " ".join(f"`{ending}`" for ending in form.endings)
    what = "read, written" if form.writes else "read"
    needs = f"`paramtree[{form.extra}]`" if form.extra else ""
    cells = [form.name, endings, what, ", ".join(sorted(form.keeps)), needs]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def test_the_table_of_the_guide_is_the_list() -> None:
    text = (ROOT / "docs" / "guides" / "files.md").read_text()
    head = "| format | endings | | keeps | needs |\n|---|---|---|---|---|\n"
    assert head + "\n".join(map(row, formats.FORMATS)) + "\n\n" in text


def test_no_two_formats_share_a_name_or_an_ending() -> None:
    names = [form.name for form in formats.FORMATS]
    assert len(set(names)) == len(names)
    for a, b in combinations(formats.FORMATS, 2):
        assert not set(a.endings) & set(b.endings)


@each
def test_what_a_format_says_of_itself(form: Format) -> None:
    assert form.keeps <= {"layout", "metadata", "slices", "shards"}
    assert form.endings and all(re.fullmatch(r"(\.[a-z0-9]+)+", ending) for ending in form.endings)
    assert form.writes or not form.native
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert not form.extra or form.extra in extras


@each
def test_each_ending_chooses_its_format(tmp_path: Path, form: Format) -> None:
    for ending in form.endings:
        for path in (tmp_path / f"a{ending}", tmp_path / f"A.B{ending.upper()}"):
            if form.writes:
                pt.save(path, pt.from_tree({"w": leaf(1)}))
                assert pt.peek(path, report=True)[1].format == form.name
            else:
                with pytest.raises(
                    pt.ParamTreeError, match=r"is another library's format\. Choose one of"
                ):
                    pt.save(path, pt.from_tree({"w": leaf(1)}))
                with pytest.raises(
                    pt.ParamTreeError, match=f"was not written: {form.name} is only read"
                ):
                    form.write(str(path), Content({}, "", flatten(pt.from_tree({}))[0]))


@written
@pytest.mark.parametrize("name", CATALOGUE)
def test_what_a_format_keeps_comes_back(tmp_path: Path, form: Format, name: str) -> None:
    tree, path = CATALOGUE[name](), tmp_path / f"a{form.endings[0]}"
    options = {"metadata": {"about": "läyers"}} if "metadata" in form.keeps else {}
    sep = "/" if name == "colliding names" else "."
    pt.save(path, tree, sep=sep, **options)
    if "layout" in form.keeps:
        assert same(pt.load(path), tree)
    assert same(pt.load(path, like=tree), tree)
    assert pt.load(path, report=True)[1].metadata.get("about") == options.get("metadata", {}).get(
        "about"
    )


@written
def test_equal_trees_give_equal_files(
    tmp_path: Path, form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = (time.struct_time((2020, 1, day, 0, 0, 0, 0, 0, 0)) for day in itertools.count(1))
    texts = {"metadata": dict.fromkeys("abcdefgh", 'ä\n\x01"/')} if "metadata" in form.keeps else {}
    files = [tmp_path / f"{i}{form.endings[0]}" for i in range(5)]
    monkeypatch.setattr(time, "localtime", lambda *_: next(days))
    if form.name == "orbax":  # a folder, in which files are named at random
        return
    for file in files:
        pt.save(file, tied(), **texts)
    assert len({file.read_bytes() for file in files}) == 1


@written
def test_metadata_is_refused_where_it_is_not_kept(tmp_path: Path, form: Format) -> None:
    if "metadata" in form.keeps:
        return
    with pytest.raises(pt.ParamTreeError, match=f"{form.name} has no metadata; safetensors has"):
        pt.save(tmp_path / f"a{form.endings[0]}", tied(), metadata={"about": "it"})


# A new one


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Format:
    """The format that docs/extending/format.md adds."""
    block, _ = re.findall(r"```{code-cell} python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope: dict[str, Any] = {"__name__": "lines"}
    exec(compile(block, str(PAGE), "exec"), scope)
    form = scope["FORMAT"]
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, form))
    return form


def test_the_page_is_short() -> None:
    text = PAGE.read_text()
    assert len(text.splitlines()) < 120
    assert max(map(len, text.splitlines())) <= 120


def test_the_format_of_the_page_saves_and_loads(tmp_path: Path, toy: Format) -> None:
    path = tmp_path / "a.txt"
    tree = pt.from_tree(
        {"a": {"w": jnp.array([1.5, -0.1]), "b": jnp.zeros((0, 2))}, "s": jnp.array(3.0)}
    )
    pt.save(path, tree)
    assert path.read_text().splitlines()[0] == "# arrays of float32"
    found, report = pt.load(path, report=True)
    assert report.format == "lines" and same(found, tree)
    assert same(pt.load(path, like=tree), tree)
    path.rename(tmp_path / "a")
    shapes = pt.peek(tmp_path / "a")
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(shapes)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(tree)
    ]
    ties = tied()
    pt.save(path, ties)
    assert same(pt.load(path, like=ties), ties)


def test_the_format_of_the_page_is_listed_and_converted(
    tmp_path: Path, toy: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = pt.from_tree({"a": {"w": leaf(1), "b": leaf(2)}})
    pt.save(tmp_path / "a.safetensors", tree)
    assert main([str(tmp_path / "a.safetensors"), "--convert", str(tmp_path / "a.txt")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "a.txt")]) == 0
    assert "w  (2,)  float32" in capsys.readouterr().out
    assert main([str(tmp_path / "a.txt"), "--diff", str(tmp_path / "a.safetensors")]) == 0
    assert main([str(tmp_path / "a.txt"), "--convert", str(tmp_path / "a.npz")]) == 0
    assert same(pt.load(tmp_path / "a.npz"), tree)


def test_the_format_of_the_page_refuses_what_it_cannot_hold(tmp_path: Path, toy: Format) -> None:
    with pytest.raises(pt.MismatchError, match=r"`w` has dtype int32, which \.txt does not have"):
        pt.save(tmp_path / "a.txt", pt.from_tree({"w": jnp.arange(3)}))
    with pytest.raises(pt.ParamTreeError, match="lines has no metadata"):
        pt.save(tmp_path / "a.txt", pt.from_tree({}), metadata={"a": "b"})
    with pytest.raises(pt.ParamTreeError, match=r"Choose one of .*\.txt"):
        pt.save(tmp_path / "a.pkl", pt.from_tree({}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not an array"),
        ("[1, 2]", "line 1: is not an array"),
        ("[" * 100_000, "line 1: is not an array"),
        ('["a", [2], [1.0]]', "line 1: appears twice, or does not have shape"),
        ('["a", [1], [[1.0]]]', "line 1: appears twice, or does not have shape"),
        ('["a", [-1], [1.0]]', "'a': no array can have shape"),
        ('["a", [1099511627776], [1.0]]', "line 1: appears twice, or does not have shape"),
        ('["..", [1], [1.0]]', "is not a valid name"),
        ('["b", [], [1]]\n["b", [], [1]]', "line 1: does not|line 1: appears|line 2: appears twice"),
    ],
)
def test_the_format_of_the_page_trusts_no_file(
    tmp_path: Path, toy: Format, line: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text(f"# arrays of float32\n{line}\n")
    with pytest.raises(pt.LoadError, match=rf"a\.txt: .*({message})"):
        pt.load(tmp_path / "a.txt")


def test_a_file_that_no_format_knows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(np.arange(99).tobytes())
    names = ", ".join(form.name for form in formats.FORMATS[:-1])
    with pytest.raises(pt.LoadError, match=f"is neither {names} nor {formats.FORMATS[-1].name}"):
        pt.load(tmp_path / "a.txt")
