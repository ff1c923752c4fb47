"""``python -m paramtree``: its output, the files that it writes, and its exit codes."""

import html.parser
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import paramtree as pt
from paramtree.command import main
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, leaf, same, siblings, tied, with_holes, with_kinds

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GOLD = Path(__file__).parent / "data" / "gluon"


class Ran:
    """The exit code and output of the command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: Any) -> Ran:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Ran(code, *capsys.readouterr())

    return call


def saved(path: Path, tree: Any) -> Path:
    pt.save(path, tree)
    return path


def values() -> pt.ParamTree:
    return pt.from_tree({"a": {"w": leaf(1, (2, 3)), "b": leaf(2)}, "c": {"w": leaf(3)}})


def process(*args: Any, **options: Any) -> Any:
    """Runs the command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "paramtree", *map(str, args)]
    return subprocess.run(command, capture_output=True, env=env, check=False, timeout=120, **options)


# Listing


@pytest.mark.parametrize("ending", ["safetensors", "npz", "params", "orbax"])
def test_every_format_is_listed(tmp_path: Path, run: Any, ending: str) -> None:
    ran = run(saved(tmp_path / f"a.{ending}", values()))
    assert (ran.code, ran.err) == (0, "")
    title, outline = ran.out.split("\n", 1)
    assert title.startswith("ParamTree: 3 leaves, 10 ") and title.endswith(", 40 B")
    assert outline == (
        "├─ a                      8  32 B\n"
        "│  ├─ w  (2, 3)  float32  6  24 B\n"
        "│  └─ b  (2,)    float32  2   8 B\n"
        "└─ c                      2   8 B\n"
        "   └─ w  (2,)    float32  2   8 B\n"
    )


@pytest.mark.parametrize("path", sorted(GOLD.glob("*.*s")), ids=lambda path: path.name)
def test_the_files_of_mxnet_are_listed(run: Any, path: Path) -> None:
    ran = run(path)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"ParamTree: {len(flatten(pt.peek(path))[1])} lea")


def test_an_index_of_several_files_is_listed(tmp_path: Path, run: Any) -> None:
    saved(tmp_path / "1.safetensors", pt.from_tree({"a": {"w": leaf(1)}}))
    saved(tmp_path / "2.safetensors", pt.from_tree({"b": {"w": leaf(2)}}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.w": "1.safetensors", "b.w": "2.safetensors"}}))
    ran = run(index)
    assert ran.code == 0 and ran.out.startswith("ParamTree: 2 leaves, ")
    assert run(index, "--convert", tmp_path / "2.safetensors").code == 2
    assert run(index, "--html", tmp_path / "1.safetensors").code == 2
    assert run(index).out == ran.out
    assert run(index, "--convert", tmp_path / "whole.npz").code == 0
    assert same(pt.load(tmp_path / "whole.npz"), pt.load(index))


def test_ties_kinds_holes_and_dtypes_are_shown(tmp_path: Path, run: Any) -> None:
    out = run(saved(tmp_path / "a.safetensors", tied())).out
    assert re.search(r"weight +(= embed_weight)\n", out)
    out = run(saved(tmp_path / "a.npz", with_kinds({"m/mean": "state", "m/w": "param"}))).out
    assert re.search(r"mean .* state\n", out)
    out = run(saved(tmp_path / "a.npz", with_holes(siblings(), [0]))).out
    assert "23 holes" in out and re.search(r"weight +hole\n", out)
    odd = {"k": jax.random.key(0), "d": np.ones(2), "h": jnp.ones(2, jnp.bfloat16)}
    out = run(saved(tmp_path / "a.npz", pt.from_tree(odd))).out
    assert all(text in out for text in ("key<fry>", "float64", "bfloat16"))


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_tree_is_listed(tmp_path: Path, run: Any, name: str) -> None:
    tree = CATALOGUE[name]()
    pt.save(tmp_path / "a.npz", tree, sep="/")
    ran = run(tmp_path / "a.npz")
    assert ran.code == 0 and f": {len(flatten(tree)[1])} lea" in ran.out.split("\n")[0]
    pt.save(tmp_path / "a.orbax", tree, sep="/")
    assert run(tmp_path / "a.orbax").out == ran.out


def test_a_pattern_chooses_by_whole_names(tmp_path: Path, run: Any) -> None:
    path = saved(tmp_path / "a.npz", siblings())
    ran = run(path, "--match", "dense1_.*")
    assert ran.code == 0
    assert re.findall(r"dense\d+", ran.out) == ["dense1"]
    assert "hole" not in ran.out
    assert len(re.findall("weight", run(path, "--match", ".*weight").out)) == 12


def test_a_pattern_that_matches_nothing_exits_with_1(tmp_path: Path, run: Any) -> None:
    path = saved(tmp_path / "a.npz", siblings())
    ran = run(path, "--match", "dense1_weihgt")
    assert (ran.code, ran.out) == (1, "")
    assert "--match: 'dense1_weihgt' matches no name; the closest are dense1_weight" in ran.err
    assert ran.err.count("\n") == 1
    assert run(saved(tmp_path / "b.npz", pt.from_tree({})), "--match", ".*").code == 1


# Errors


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["a.npz", "b.npz"],
        ["a.npz", "--match"],
        ["a.npz", "--match", "("],
        ["a.npz", "--mat", "x"],
        ["a.npz", "--stats", "--diff", "a.npz"],
        ["a.npz", "--stats", "--convert", "b.npz"],
        ["a.npz", "--diff", "a.npz", "--convert", "b.npz"],
        ["a.npz", "--convert", "b.npz", "--html", "b.html"],
    ],
)
def test_wrong_usage_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, args: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.npz", siblings())
    ran = run(*args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: python -m paramtree")
    assert os.listdir(tmp_path) == ["a.npz"]


def test_the_help_tells_the_exit_codes(run: Any) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert re.search(r"exit codes:\n  0 .*\n  1 .*\n  2 ", ran.out)


def gold(*, cut: int) -> bytes:
    return (GOLD / "mlp.params").read_bytes()[:-cut]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"", "is empty"),
        ("a.safetensors", struct.pack("<Q", 9) + b'{"a": 1}}', "damaged"),
        ("a.safetensors", struct.pack("<Q", 2**60) + b"{}", "damaged"),
        ("a.params", gold(cut=200), "is truncated"),
        ("a.npz", b"PK\3\4 and nothing more", "damaged"),
        ("a.pt", b"\x80\x02", "is a pickle"),
        ("a.index.json", b"[]", "is not an index"),
        ("a.index.json", b'{"weight_map": {"a": "../b"}}', "is not the name of a file next to"),
        ("a.txt", b"some words that are long enough", "is neither safetensors"),
    ],
)
@pytest.mark.parametrize("job", [[], ["--stats"], ["--convert", "out.npz"], ["--html", "out.html"]])
def test_a_damaged_file_exits_with_2_and_one_line(
    tmp_path: Path, run: Any, name: str, content: bytes, message: str, job: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    ran = run(tmp_path / name, *[tmp_path / arg if "out" in arg else arg for arg in job])
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"python -m paramtree: {tmp_path / name}") and message in ran.err
    assert ran.err.count("\n") == 1
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_cannot_be_opened_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    ran = run(tmp_path / "a.npz")
    assert ran.code == 2
    assert ran.err == f"python -m paramtree: {tmp_path}/a.npz: No such file or directory\n"
    ran = run(tmp_path)
    assert ran.code == 2 and "is a folder without a finished Orbax checkpoint." in ran.err
    path = saved(tmp_path / "a.npz", siblings())

    def refuse(path: str, *args: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sys.modules["paramtree.io.opening"], "open", refuse, raising=False)
    assert run(path).err == f"python -m paramtree: {path}: Permission denied\n"


def test_too_little_memory_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError("Unable to allocate 1.00 PiB")

    monkeypatch.setattr("paramtree.io.formats.safetensors.read_span", fail)
    path = saved(tmp_path / "a.safetensors", values())
    assert run(path).code == 0
    ran = run(path, "--convert", tmp_path / "b.npz")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"python -m paramtree: {path}: not enough memory. Unable to allocate 1.00 PiB\n"


HOSTILE = {
    "\x1b[31mred": "\\x1b[31mred",
    "two\nlines\rback": "two\\nlines\\rback",
    "\u202eright to left\u200f": "\\u202eright to left\\u200f",
    "<script>alert(1)": "<script>alert(1)",
    "\x9b31m\x07\x08": "\\x9b31m\\x07\\x08",
    "\u2028line\u2029": "\\u2028line\\u2029",
    "é€😀": "é€😀",
}


def test_hostile_names_are_spelled_out_on_one_line_each(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "a.safetensors"
    long = "x" * 2**20
    safetensors.numpy.save_file({name: np.zeros(1) for name in (*HOSTILE, long)}, path)
    ran = run(path)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert len(lines) == 1 + len(HOSTILE) + 1
    assert all(line.isprintable() and len(line) < 300 for line in lines)
    assert all(any(f"─ {shown} " in line for line in lines) for shown in HOSTILE.values())
    assert "(1048576 characters)" in ran.out
    ran = run(path, "--match", long[:-1])
    assert ran.code == 1 and len(ran.err) < 5000
    ran = run(path, "--match", "red")
    assert ran.code == 1 and ran.err.isprintable() is False and "\x1b" not in ran.err
    assert "\\x1b[31mred" in ran.err


def test_hostile_names_do_nothing_on_a_page(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "<b>&.safetensors"
    names = ["<script>alert(1)", '" onload="alert(1)', "<img src=x onerror=alert(1)>"]
    safetensors.numpy.save_file({name: np.zeros(1) for name in names}, path)
    for job in ([], ["--stats"], ["--diff", saved(tmp_path / "b.npz", values())]):
        assert run(path, *job, "--html", tmp_path / "a.html").code == (1 if "--diff" in job else 0)
        page = Page((tmp_path / "a.html").read_text("utf-8"))
        assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
        assert not [name for name in page.attributes if name.startswith("on")]
        assert "<b>&.safetensors" in page.title
        assert all(name in page.text for name in names)


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = self.title = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] == "title":
            self.title += data


# Values


def test_stats_are_those_of_the_values(tmp_path: Path, run: Any) -> None:
    path = saved(tmp_path / "a.npz", values())
    ran = run(path, "--stats")
    assert ran.code == 0
    assert ran.out == f"{pt.stats(values())!r}\n"
    assert run(path, "--stats", "--match", "c_w").out == f"{pt.stats(pt.collect(values(), 'c_w'))!r}\n"


def test_only_what_matches_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    path = saved(tmp_path / "a.safetensors", values())
    from paramtree.io.source import Source

    read: list[str] = []
    get = Source.get
    monkeypatch.setattr(Source, "get", lambda self, name: (read.append(name), get(self, name))[1])
    for job, expected in [
        ([], []),
        (["--html", "-"], []),
        (["--stats"], ["c.w"]),
        (["--convert", tmp_path / "b.npz"], ["c.w"]),
        (["--diff", path], ["c.w", "c.w"]),
    ]:
        read.clear()
        assert run(path, "--match", "c.*", *job).code == 0
        assert read == expected


def test_differences_exit_with_1(tmp_path: Path, run: Any) -> None:
    a = saved(tmp_path / "a.safetensors", values())
    same_values = saved(tmp_path / "b.npz", values())
    ran = run(a, "--diff", same_values)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{pt.diff(values(), values())!r}\n"
    other = pt.replace(values(), {"a_b": leaf(9)})
    b = saved(tmp_path / "c.safetensors", other)
    ran = run(a, "--diff", b)
    assert (ran.code, ran.err) == (1, "")
    assert ran.out == f"{pt.diff(values(), other)!r}\n"
    assert run(a, "--diff", b, "--match", ".*w").code == 0
    assert run(a, "--diff", b, "--match", "a_b").code == 1


def test_trees_of_other_shapes_differ(tmp_path: Path, run: Any) -> None:
    a = saved(tmp_path / "a.safetensors", values())
    b = saved(tmp_path / "b.orbax", pt.from_tree({"a": {"w": leaf(1, (3, 2)), "new": leaf(2)}}))
    ran = run(a, "--diff", b)
    assert (ran.code, ran.err) == (1, "")
    assert "(2, 3)" in ran.out and "(3, 2)" in ran.out and "new" in ran.out


def test_a_pattern_may_match_in_one_of_two_files(tmp_path: Path, run: Any) -> None:
    a = saved(tmp_path / "a.npz", values())
    b = saved(tmp_path / "b.npz", pt.from_tree({"d": {"w": leaf(1)}}))
    for one, other in [(a, b), (b, a)]:
        ran = run(one, "--diff", other, "--match", "d_.*")
        assert (ran.code, ran.err) == (1, "") and "d_w" in ran.out
    ran = run(a, "--diff", b, "--match", "e_.*")
    assert (ran.code, ran.out) == (1, "") and "matches no name" in ran.err


def test_reports_are_printed_whole(tmp_path: Path, run: Any) -> None:
    path = saved(tmp_path / "a.npz", pt.from_tree({f"w{i}": leaf(0) for i in range(1001)}))
    other = saved(tmp_path / "b.npz", pt.from_tree({f"v{i}": leaf(0) for i in range(1001)}))
    assert re.findall(r"^w\d+", run(path, "--stats").out, re.MULTILINE) == [
        f"w{i}" for i in range(1001)
    ]
    assert len(re.findall(r"^[wv]\d+", run(path, "--diff", other).out, re.MULTILINE)) == 2002


def test_a_missing_other_exits_with_2(tmp_path: Path, run: Any) -> None:
    ran = run(saved(tmp_path / "a.npz", values()), "--diff", tmp_path / "b.npz")
    assert ran.code == 2 and "b.npz: No such file" in ran.err


def test_a_page_of_each_kind(tmp_path: Path, run: Any) -> None:
    a, b = saved(tmp_path / "a.npz", values()), saved(tmp_path / "b.npz", tied())
    for job, code in [([], 0), (["--stats"], 0), (["--diff", b], 1), (["--match", "a_.*"], 0)]:
        ran = run(a, *job, "--html", tmp_path / "a.html")
        assert (ran.code, ran.out, ran.err) == (code, "", "")
        text = (tmp_path / "a.html").read_bytes()
        assert b'<meta charset="utf-8">' in text[:200]
        page = Page(text.decode("utf-8"))
        assert page.tags[:2] == ["html", "head"] and "a.npz" in page.title
        assert not re.search(rb"(src|href)=|url\(|@import", text)
        printed = run(a, *job, "--html", "-").out
        assert without_ids(printed).rstrip() == without_ids(text.decode("utf-8")).rstrip()


def without_ids(page: str) -> str:
    return re.sub(r"pt[0-9a-f]{8}", "", page)


# Converting


FORMATS = ("safetensors", "npz", "orbax")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_tree_is_converted(tmp_path: Path, run: Any, name: str) -> None:
    tree = CATALOGUE[name]()
    pt.save(tmp_path / "a.safetensors", tree, sep="/")
    path = tmp_path / "a.safetensors"
    for ending in ("npz", "orbax", "safetensors"):
        out = tmp_path / f"b.{ending}"
        ran = run(path, "--convert", out)
        assert (ran.code, ran.out, ran.err) == (0, "", "")
        assert same(pt.load(out), tree)
        path = out
    a, b = (safetensors.numpy.load_file(tmp_path / f"{stem}.safetensors") for stem in "ab")
    assert list(a) == list(b)  # names in the file are unchanged


@pytest.mark.parametrize("name", ["convbn", "tied", "lstm", "mlp"])
def test_the_files_of_mxnet_are_converted_and_back(tmp_path: Path, run: Any, name: str) -> None:
    path = GOLD / f"{name}.params"
    assert run(path, "--convert", tmp_path / "a.safetensors").code == 0
    assert same(pt.load(tmp_path / "a.safetensors"), pt.load(path))
    assert run(tmp_path / "a.safetensors", "--convert", tmp_path / "b.params").code == 0
    assert same(pt.load(tmp_path / "b.params"), pt.load(path))


def test_ties_are_written_under_every_name_where_a_format_has_none(tmp_path: Path, run: Any) -> None:
    path = saved(tmp_path / "a.npz", tied())
    assert run(path, "--convert", tmp_path / "a.params").code == 0
    assert same(pt.load(tmp_path / "a.params", like=tied()), tied())


def test_dtypes_keep_their_64_bits(tmp_path: Path, run: Any) -> None:
    tree = pt.from_tree({"f": np.array([np.pi]), "i": np.array([2**62]), "k": jax.random.key(3)})
    path = saved(tmp_path / "a.npz", tree)
    assert run(path, "--convert", tmp_path / "b.safetensors").code == 0
    found = pt.load(tmp_path / "b.safetensors")
    assert (found.f[0], found.i[0]) == (np.pi, 2**62)
    assert jax.random.bits(found.k) == jax.random.bits(tree.k)
    ran = run(path, "--convert", tmp_path / "b.params")
    assert ran.code == 2 and "`k` has dtype key<fry>, which .params does not have" in ran.err
    assert not (tmp_path / "b.params").exists()


def test_what_matches_is_converted_and_parts_merge(tmp_path: Path, run: Any) -> None:
    path = saved(tmp_path / "a.npz", tied())
    parts = []
    for pattern, out in [("block.*", "b.npz"), ("(?!block).*", "c.safetensors")]:
        assert run(path, "--match", pattern, "--convert", tmp_path / out).code == 0
        parts.append(pt.load(tmp_path / out))
        assert same(parts[-1], pt.select(tied(), pattern))
    assert same(pt.merge(*parts), tied())
    with np.load(tmp_path / "b.npz") as file:
        assert set(file.files) == {"block.a.w", "block.a.b", "paramtree.json"}
    ran = run(path, "--match", "nothing", "--convert", tmp_path / "d.npz")
    assert ran.code == 1 and not (tmp_path / "d.npz").exists()


def test_what_is_read_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.safetensors", values())
    other = saved(tmp_path / "b.npz", tied())
    os.symlink(path, tmp_path / "link.npz")
    for out in (path, "a.safetensors", "./a.safetensors", "link.npz"):
        ran = run(path, "--convert", out)
        assert ran.code == 2 and "was not written" in ran.err and "contains the input" in ran.err
        assert run("link.npz", "--html", out).code == 2
    assert run(path, "--diff", other, "--html", other).code == 2
    assert run(path, "--stats", "--html", path).code == 2
    assert same(pt.load(path), values()) and same(pt.load(other), tied())
    orbax = saved(tmp_path / "c.orbax", values())
    (step,) = (folder for folder in orbax.iterdir() if folder.is_dir())
    for file, out in [(orbax, orbax), (step, orbax), (orbax, step)]:
        assert run(file, "--convert", out).code == 2
    assert same(pt.load(orbax), values())


def test_another_file_is_overwritten(tmp_path: Path, run: Any) -> None:
    a, b = saved(tmp_path / "a.npz", values()), saved(tmp_path / "b.npz", tied())
    assert run(a, "--convert", b).code == 0
    assert same(pt.load(b), values())


@pytest.mark.parametrize("option", ["--convert", "--html"])
def test_what_cannot_be_written_exits_with_2(tmp_path: Path, run: Any, option: str) -> None:
    a = saved(tmp_path / "a.npz", values())
    (tmp_path / "folder").mkdir()
    for out, message in [
        (tmp_path / "no" / "b.npz", "No such file or directory"),
        (tmp_path / "folder", "Is a directory"),
        (a / "b.npz", "Not a directory"),
    ]:
        ran = run(a, option, out)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == f"python -m paramtree: {out} was not written: {message}.\n"
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "folder"]


def test_formats_of_others_are_not_written(tmp_path: Path, run: Any) -> None:
    a = saved(tmp_path / "a.npz", values())
    for ending in ("pt", "index.json"):
        ran = run(a, "--convert", tmp_path / f"b.{ending}")
        assert ran.code == 2 and "is another library's format" in ran.err
    assert os.listdir(tmp_path) == ["a.npz"]


def mixed() -> pt.ParamTree:
    return pt.from_tree(
        {
            "d": np.array([np.pi, np.nan]),
            "l": np.array([2**62]),
            "i": jnp.arange(3),
            "b": jnp.array(True),
            "h": jnp.ones((2, 2), jnp.bfloat16),
            "f8": jnp.ones(3, jnp.float8_e4m3fn),
            "i4": jnp.ones(3, jnp.int4),
            "c": jnp.array([1 + 2j]),
            "e": jnp.ones((0, 3)),
            "k": jax.random.key(0),
        }
    )


@pytest.mark.parametrize("make", [mixed, lambda: pt.from_tree({}), lambda: with_holes(tied(), [])])
def test_every_job_takes_every_kind_of_leaf(tmp_path: Path, run: Any, make: Any) -> None:
    path = saved(tmp_path / "a.safetensors", make())
    assert run(path, "--convert", tmp_path / "b.orbax").code == 0
    for job in ([], ["--stats"], ["--diff", tmp_path / "b.orbax"]):
        for html_too in ([], ["--html", tmp_path / "a.html"]):
            ran = run(path, *job, *html_too)
            assert (ran.code, ran.err) == (0, "")


# In a process of its own


def test_the_process_lists_without_a_device(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", siblings())
    ran = process(path, env={"JAX_PLATFORMS": "none_of_that_name"})  # using devices would fail
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.decode("utf-8").startswith("ParamTree: 24 leaves")
    assert b"\x1b" not in ran.stdout
    assert process(path, "--match", "x").returncode == 1
    ran = process(tmp_path / "b")
    assert ran.returncode == 2 and ran.stderr.count(b"\n") == 1


def test_an_output_that_has_few_characters(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", pt.from_tree({"é": {"w": leaf(0), "b": leaf(1)}, "c": leaf(2)}))
    ran = process(path, env={"PYTHONIOENCODING": "ascii"})
    assert (ran.returncode, ran.stderr) == (0, b"")
    lines = ran.stdout.decode("ascii").splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["|- \\xe9", "|", "|", "`- c"]
    ran = process(path, "--html", "-", env={"PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0 and "&#233;" in ran.stdout.decode("ascii")


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", pt.from_tree({f"w{i}": leaf(i) for i in range(3000)}))
    command = [sys.executable, "-m", "paramtree", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **pipes) as running:
        assert running.stdout.readline().startswith(b"ParamTree: 3,000 leaves")
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", siblings())
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "paramtree", str(path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, check=False)
    assert ran.returncode == 2
    assert (
        ran.stderr
        == b"python -m paramtree: the output could not be written: No space left on device.\n"
    )


def test_what_goes_wrong_unexpectedly_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("an unexpected problem")

    monkeypatch.setattr("paramtree.inspect.diff.diff", fail)
    path = saved(tmp_path / "a.npz", values())
    ran = run(path, "--diff", path)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" in ran.err and "an unexpected problem" in ran.err


def test_an_interrupt_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paramtree.io.peek.open_source", interrupt)
    ran = run(saved(tmp_path / "a.npz", values()))
    assert (ran.code, ran.out, ran.err) == (130, "", "")


MEMORY = """
import sys
from paramtree.command import main
assert main(sys.argv[1:]) == 0
with open("/proc/self/status") as lines:
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""


def hollow(path: Path, tensors: int, size: int = 2**30) -> Path:
    """Writes a safetensors file whose values are a hole in a sparse file."""
    each = size // (tensors * 4) if tensors else 0
    header = {
        f"model.layers.{i // 10}.block{i % 10}.weight": {
            "dtype": "F32",
            "shape": [each],
            "data_offsets": [4 * each * i, 4 * each * (i + 1)],
        }
        for i in range(tensors)
    }
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + 4 * each * tensors)
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc/self/status")
def test_a_gigabyte_is_listed_in_little_memory(tmp_path: Path) -> None:
    peaks = {}
    for tensors in (0, 1000, 20_000):
        path = hollow(tmp_path / f"{tensors}.safetensors", tensors)
        args = [sys.executable, "-c", MEMORY, str(path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(args, capture_output=True, text=True, check=True, env=env)
        assert ran.stdout.count("weight") == tensors
        peaks[tensors] = int(ran.stderr) / 1024
    assert peaks[1000] - peaks[0] < 10  # mebibytes
    assert peaks[20_000] - peaks[0] < 60  # measured 44 to 49: about 2.4 KiB a name, for any array size


def test_the_benchmark_of_the_command_runs() -> None:
    args = [sys.executable, str(ROOT / "benchmarks" / "command.py"), "--rounds", "1", "--tensors", "10"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(args, capture_output=True, text=True, check=True, env=env)
    assert re.search(r"1 GiB in +10 tensors: +\d+ ms", ran.stdout)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"paramtree {pt.__version__}\n"


def test_a_conversion_keeps_foreign_metadata_and_writes_no_file_called_minus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pt.save("a.safetensors", {"w": np.ones(2)}, metadata={"licence": "MIT"})
    assert main(["a.safetensors", "--convert", "-"]) == 2
    assert "a file is written, not the standard output" in capsys.readouterr().err
    assert main(["a.safetensors", "--convert", "b.safetensors"]) == 0
    assert pt.peek("b.safetensors", report=True)[1].metadata == {"format": "pt", "licence": "MIT"}
    assert main(["a.safetensors", "--convert", "c.npz"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "c.npz"]
