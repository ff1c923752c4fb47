"""Values and names on their way from a file: casts, transforms, stacks, other shapes, what is saved."""

import os
import re
import socket
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn
from paramtree.io.formats import FORMATS

WRITABLE = [form.endings[0] for form in FORMATS if form.writes]
FILES = [ending for ending in WRITABLE if ending != ".orbax"]


# What is saved


@pytest.mark.parametrize("ending", WRITABLE)
@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (nn.Dense(3), r"the layer or function Dense"),
        (lambda p, x: x, "the layer or function <function"),
        (None, "found None"),
        ("text", "found 'text'"),
        ({"params": {"w": np.ones(2)}, "name": "text"}, "`name` is a str, not an array"),
        ([np.ones(2), {"deep": ["text"]}], "`1_deep_0` is a str, not an array"),
        ({"net": nn.Dense(3), "w": np.ones(2)}, r"`net` is the layer Dense"),
        ({"o": object()}, "`o` is a object, not an array"),
        ({"a": np.array(["x"])}, "`a` has dtype <U1"),
    ],
)
def test_what_is_no_tree_does_not_replace_one(
    tmp_path: Path, ending: str, wrong: Any, found: str
) -> None:
    file, good = tmp_path / f"m{ending}", pt.from_tree({"w": np.arange(3)})
    pt.save(file, good)
    with pytest.raises(pt.MismatchError, match=f"m{ending} was not written: .*{found}"):
        pt.save(file, wrong)
    assert np.array_equal(pt.load(file).w, np.arange(3))


def test_code_in_modules_is_left_out_but_nothing_else_is(tmp_path: Path) -> None:
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))  # its activation is a leaf
    pt.save(tmp_path / "m.npz", net)
    back = pt.load(tmp_path / "m.npz", like=net)
    assert back.activation is net.activation and np.array_equal(back(np.ones(2)), net(np.ones(2)))


def test_a_layer_in_place_of_a_tree_to_load_into(tmp_path: Path) -> None:
    pt.save(tmp_path / "m.npz", {"w": np.ones(2)})
    for wrong in (nn.Dense(3), lambda p: p, "text"):
        with pytest.raises(
            TypeError, match="like= is .*; expected a tree of arrays or shapes, such as pt.abstract"
        ):
            pt.load(tmp_path / "m.npz", like=wrong, strict=False)


@pytest.mark.parametrize("ending", FILES)
def test_only_files_are_replaced(tmp_path: Path, ending: str) -> None:
    tree = {"w": np.ones(2)}
    pipe, plug, folder = (tmp_path / f"{name}{ending}" for name in ("pipe", "plug", "folder"))
    os.mkfifo(pipe)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(plug))
        for path in (pipe, plug):
            link = tmp_path / f"link{ending}"
            link.symlink_to(path)
            for target in (path, link):
                with pytest.raises(OSError, match=rf"a pipe or a socket.*{target.name}"):
                    pt.save(target, tree)
                with pytest.raises(pt.LoadError, match="not a file, but a device, a pipe or a socket"):
                    pt.load(target)
            link.unlink()
        with pytest.raises(IsADirectoryError, match=rf"Is a directory.*folder{ending}"):
            pt.save(folder, tree)
        assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISSOCK(plug.stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in (pipe, plug, folder))


# Metadata


def test_metadata_is_written_read_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    pt.save(file, {"w": np.ones(2)}, metadata={"licence": "MIT", "format": "flax"})
    for _, report in (pt.peek(file, report=True), pt.load(file, report=True)):
        assert report.metadata == {"licence": "MIT", "format": "flax"}
        assert report.format == "safetensors"
    pt.save(file, {"w": np.ones(2)})
    assert pt.peek(file, report=True)[1].metadata == {"format": "pt"}
    for ending in FILES[1:]:
        with pytest.raises(pt.ParamTreeError, match="has no metadata; safetensors has"):
            pt.save(tmp_path / f"m{ending}", {"w": np.ones(2)}, metadata={"a": "b"})
    for wrong in ({"a": 1}, {1: "a"}, ["a"], "text"):
        with pytest.raises(TypeError, match="metadata is a mapping of texts to texts"):
            pt.save(file, {"w": np.ones(2)}, metadata=wrong)  # type: ignore[arg-type]
    with pytest.raises(pt.ParamTreeError, match="the metadata 'paramtree' is reserved"):
        pt.save(file, {"w": np.ones(2)}, metadata={"paramtree": "x"})


def test_names_that_make_no_tree_are_listed_and_load_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "m.safetensors"
    arrays = {"m.weight": np.ones(2), "m.weight.absmax": np.ones(1), "a..b": np.zeros(3)}
    save_file(arrays, file)
    assert sorted(pt.peek(file)) == sorted(arrays)
    loaded = pt.load(file, like=pt.peek(file))
    assert all(np.array_equal(loaded[name], array) for name, array in arrays.items())
    assert sorted(pt.load(file, sep="/")) == sorted(arrays)
    with pytest.raises(pt.LoadError, match=r"'a\.\.b': has an empty segment.*Pass another sep="):
        pt.load(file)
    with pytest.raises(pt.LoadError, match="do not form a tree: .*sep='' keeps whole names"):
        pt.load(file, rename=[(r"a\.\.b", None)])
    assert sorted(pt.load(file, sep="")) == sorted(arrays)


def test_numbers_of_less_than_a_byte_are_listed_and_the_others_read(tmp_path: Path) -> None:
    import json
    import struct

    header = json.dumps(
        {
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "q": {"dtype": "F4", "shape": [2, 8], "data_offsets": [8, 16]},
            "r": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [16, 19]},
            "z": {"dtype": "U8", "shape": [1], "data_offsets": [19, 20]},
        }
    ).encode()
    data = np.array([1, 2], np.float32).tobytes() + bytes(11) + b"\7"
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    shapes = pt.peek(file)
    assert shapes.q.shape == (2, 8) and shapes.r.shape == (4,)
    with pytest.raises(pt.LoadError, match=r"'q': has dtype F4, .*rename=\[\('q', None\)\]"):
        pt.load(file)
    rest = pt.load(file, rename=[("q|r", None)])
    assert rest.w.tolist() == [1, 2] and rest.z.tolist() == [7]


# Casts

BIG = np.array([2**40, 1])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("values", "dtype", "worst"),
    [
        (BIG, "int32", "1099511627776"),
        (BIG, "float16", "1099511627776"),
        (BIG, "bool", "1099511627776"),
        (-BIG, "uint32", "-1099511627776"),
        (np.array([-1, 1]), "uint8", "-1"),
        (np.array([7e4, 1.0]), "float16", "70000"),
        (np.array([1e300, 1.0]), "float32", "1e.300"),
        (np.array([1e300, 1.0]), "bfloat16", "1e.300"),
        (np.array([5e5, 1.0]), "float8_e4m3fn", "500000"),
        (np.array([1e300j, 1.0]), "complex64", "1e.300j"),
    ],
)
def test_a_cast_that_loses_values_names_them(
    tmp_path: Path, values: Any, dtype: str, worst: str, sharded: bool
) -> None:
    file = tmp_path / "m.safetensors"
    pt.save(file, {"good": np.ones(2), "bad": values})
    like = {"good": jnp.ones(2, "float16"), "bad": jnp.zeros(2, dtype)}
    options: dict[str, Any] = {}
    if sharded:
        mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
        options["shardings"] = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    expected = f"`bad` has . of . values that {dtype} cannot hold, such as .*{worst}"
    with pytest.raises(pt.LoadError, match=expected) as error:
        pt.load(file, like=like, cast_dtype=True, **options)
    assert "good" not in str(error.value)
    shown = pt.load(file, like=like, cast_dtype=True, transform={"bad": np.zeros_like}, **options)
    assert not np.any(shown["bad"])


def test_casts_that_lose_nothing_or_only_digits(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    pt.save(file, {"a": np.array([np.inf, -np.inf, np.nan, 0.1]), "n": np.array([127, -128])})
    like = {"a": jnp.zeros(4, "float16"), "n": jnp.zeros(2, "int8")}
    loaded = pt.load(file, like=like, cast_dtype=True)
    np.testing.assert_array_equal(loaded["a"], np.array([np.inf, -np.inf, np.nan, 0.1], "float16"))
    assert loaded["n"].tolist() == [127, -128]


@pytest.mark.parametrize("ending", WRITABLE)
def test_a_number_of_python_loads_into_any_integer_that_holds_it(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"m{ending}"
    pt.save(file, {"step": 300})
    assert pt.load(file, like={"step": jnp.zeros((), jnp.int32)})["step"].dtype == jnp.int32
    assert pt.load(file, like={"step": 0})["step"] == 300
    assert pt.load(file, like={"step": np.int16(0)})["step"] == 300
    with pytest.raises(
        pt.LoadError, match="`step` has 1 of 1 values that int8 cannot hold, such as 300"
    ):
        pt.load(file, like={"step": jnp.zeros((), jnp.int8)})
    with pytest.raises(pt.LoadError, match="`step` has dtype int64, expected float32"):
        pt.load(file, like={"step": jnp.zeros((), jnp.float32)})


# Other shapes


def test_leaves_of_other_shapes_keep_their_values_and_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    pt.save(file, {"body": np.ones(3), "head": {"weight": np.ones((5, 3)), "bias": np.ones(5)}})
    like = pt.from_tree(
        {"body": jnp.zeros(3), "head": {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}}
    )
    like = pt.cast(like, "float32")
    loaded, report = pt.load(file, like=like, mismatched="keep", cast_dtype=True, report=True)
    assert np.all(loaded.body == 1) and loaded.head.weight is like.head.weight
    assert report.kept == {"head_weight": (5, 3), "head_bias": (5,)}
    assert "head_weight: shape (5, 3) in the file, kept" in str(report)
    with pytest.raises(pt.LoadError, match="`head_weight`.* has shape .*expected .2, 3"):
        pt.load(file, like=like, cast_dtype=True)
    with pytest.raises(
        pt.LoadError, match=r"`head_bias` has shape \(5,\), not \(2,\), and `like` has no"
    ):
        pt.load(file, like=jax.eval_shape(lambda: like), mismatched="keep", cast_dtype=True)
    with pytest.raises(ValueError, match="mismatched is 'error' or 'keep', not 'skip'"):
        pt.load(file, like=like, mismatched="skip")


# Transforms and stacks

COPIES = 3
QKV = {i: np.arange(12.0).reshape(6, 2) + i for i in range(COPIES)}
BY_NAME = {r"(.*)_qkv": lambda a: dict(zip([r"\1_q", r"\1_k", r"\1_v"], np.split(a, 3), strict=True))}
BY_PATH = {r"(.*)/qkv": lambda a: dict(zip([r"\1/q", r"\1/k", r"\1/v"], np.split(a, 3), strict=True))}
BY_GROUP = {
    r"(?P<at>.*)_qkv": lambda a: dict(
        zip([r"\g<at>_q", r"\g<at>_k", r"\g<1>_v"], np.split(a, 3), strict=True)
    )
}


@pytest.mark.parametrize("transform", [BY_NAME, BY_PATH, BY_GROUP], ids=["name", "path", "group"])
@pytest.mark.parametrize("levels", [("h",), ("net", "h_x"), ("h", "attn_y", "z")])
def test_a_transform_keeps_levels_and_fills_stacks(
    tmp_path: Path, transform: Any, levels: tuple[str, ...]
) -> None:
    first, *rest = levels
    file = tmp_path / "m.npz"
    names = {i: ".".join([first, str(i), *rest, "qkv"]) for i in range(COPIES)}
    np.savez(file, **{names[i]: QKV[i] for i in range(COPIES)})
    found = pt.load(file, transform=transform)
    for i in range(COPIES):
        level = found["/".join([first, str(i), *rest])]
        assert list(level) == ["q", "k", "v"]
        assert np.array_equal(level.k, QKV[i][2:4])
    inner: Any = {name: np.zeros((2, 2)) for name in "qkv"}
    stacked: Any = {name: np.zeros((COPIES, 2, 2)) for name in "qkv"}
    for name in reversed(rest):
        inner, stacked = {name: inner}, {name: stacked}
    named = pt.from_tree({first: {str(i): inner for i in range(COPIES)}})
    assert jax.tree.structure(pt.load(file, like=named, transform=transform)) == (
        jax.tree.structure(named)
    )
    whole = pt.load(file, like=pt.from_tree({first: stacked}), transform=transform)
    for j, name in enumerate("qkv"):
        expected = np.stack([QKV[i][2 * j : 2 * j + 2] for i in range(COPIES)])
        assert np.array_equal(whole["/".join([*levels, name])], expected)


def test_a_transform_into_a_stacked_layer(tmp_path: Path) -> None:
    attend = nn.MultiHeadAttention(2, use_bias=False)
    net = nn.Sequential(blocks=nn.Repeat(nn.Residual(attend=attend), COPIES))
    x = jnp.ones((1, 5, 4))
    params = pt.init(net, jax.random.key(0), x)
    copies = pt.unstack(params, "blocks")
    arrays = {}
    for i in range(COPIES):
        weights = [copies.blocks[str(i)].attend[n].weight for n in ("query", "key", "value")]
        arrays[f"h.{i}.attn.in_proj_weight"] = np.concatenate(weights)
        arrays[f"h.{i}.attn.out.weight"] = np.asarray(copies.blocks[str(i)].attend.out.weight)
    np.savez(tmp_path / "m.npz", **arrays)
    parts = [r"\1_query_weight", r"\1_key_weight", r"\1_value_weight"]
    rename = [(r"^h\.(\d+)\.attn", r"blocks.\1.attend")]
    for like in (params, copies):
        loaded = pt.load(
            tmp_path / "m.npz",
            like=jax.tree.map(jnp.zeros_like, like),
            rename=rename,
            transform={r"(.*)_in_proj_weight": lambda a: dict(zip(parts, np.split(a, 3), strict=True))},
        )
        pt.testing.assert_trees_equal(loaded, like)


@pytest.mark.parametrize("ending", FILES)
def test_stacked_copies_are_read_once(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramtree.io import source

    copies, read = 32, 0
    file = tmp_path / f"m{ending}"
    pt.save(file, {"h": {"w": np.arange(copies * 1000.0).reshape(copies, 1000)}})
    fill = source._fill

    def counting(path: str, readinto: Any, span: Any) -> None:
        nonlocal read
        read += len(span)
        fill(path, readinto, span)

    monkeypatch.setattr(source, "_fill", counting)
    like = {"h": {str(i): {"w": np.zeros(1000)} for i in range(copies)}}
    loaded = pt.load(file, like=like)
    assert all(loaded["h"][str(i)]["w"][0] == 1000 * i for i in range(copies))
    assert read == 8 * copies * 1000


# Messages


MISTAKEN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a pointer of Git LFS.*git lfs pull",
    b"<!DOCTYPE html><html><body>404": "is an HTML page: the download gave a page",
    b"\n <HTML>": "is an HTML page",
    b"<?xml version='1.0'?><Error>": "is an XML page",
    b"GGUF\3\0\0\0": "is a GGUF file",
    b"\x1f\x8b\x08": "is compressed by gzip",
    b"\x93NUMPY\1\0": "holds one array without a name. Write it with numpy.savez",
    b"": "is empty",
    b"something": "is neither safetensors, ",
}


@pytest.mark.parametrize("content", MISTAKEN)
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model"])
def test_what_is_taken_for_a_model(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (pt.load, pt.peek):
        with pytest.raises(pt.LoadError, match=f"{name}: {MISTAKEN[content]}"):
            read(tmp_path / name)


def test_a_folder_without_a_model_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        pt.LoadError, match="is a folder without .*model.safetensors; it has config.json"
    ):
        pt.load(tmp_path)
    for name in ("a", "b"):
        pt.save(tmp_path / f"{name}.safetensors", {"w": np.ones(2)})
    with pytest.raises(pt.LoadError, match="several models, a.safetensors, b.safetensors: name one"):
        pt.load(tmp_path)
    pt.save(tmp_path / "model.safetensors", {"w": np.zeros(2)})
    assert not pt.load(tmp_path).w.any()


@pytest.mark.parametrize("difference", ["missing", "extra", "shape", "dtype", "unsavable"])
def test_the_errors_of_a_large_tree_are_short(tmp_path: Path, difference: str) -> None:
    many = 3_000
    big = pt.from_tree({f"layer{i}": {"weight": np.ones(2, np.float32)} for i in range(many)})
    file = tmp_path / "m.safetensors"
    other: Any = {"w": np.ones(2)}
    saved, like = {
        "missing": (other, big),
        "extra": (big, other),
        "shape": (big, jax.tree.map(lambda a: a[:1], big)),
        "dtype": (big, pt.cast(big, "float16")),
        "unsavable": (jax.eval_shape(lambda: big), None),
    }[difference]

    def run() -> None:
        pt.save(file, saved)
        pt.load(
            file, like=like, allow_missing=difference == "extra", ignore_extra=difference == "missing"
        )

    with pytest.raises((pt.LoadError, pt.MismatchError), match=re.escape("and 2,98")) as error:
        run()
    assert len(str(error.value)) < 6000
