"""Saving and loading round-trip every tree by name, or raise one error that lists every problem."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import paramtree as pt
from paramtree import nn
from paramtree.core.tree import flatten
from tests.catalogue import CATALOGUE, leaf, same, siblings, tied, trees
from tests.helpers import x64

FORMATS = ("safetensors", "npz", "orbax")
WHOLE = pytest.mark.parametrize("ending", FORMATS)
quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


# Round trips


@quiet
@given(tree=trees())
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_any_tree_comes_back(tmp_path: Path, ending: str, tree: pt.ParamTree) -> None:
    file = tmp_path / f"a.{ending}"
    try:
        pt.save(file, tree)
    except pt.NameCollisionError as error:
        pt.save(file, tree, sep="/" if 'sep="/"' in str(error) else ".")
    assert same(pt.load(file), tree)
    assert same(pt.load(file, like=tree), tree)
    assert same(pt.load(file, like=shapes(tree)), tree)


@pytest.mark.parametrize("name", CATALOGUE)
def test_orbax_brings_every_tree_back(tmp_path: Path, name: str) -> None:
    tree = CATALOGUE[name]()
    pt.save(tmp_path / "a.orbax", tree)
    assert same(pt.load(tmp_path / "a.orbax"), tree)
    assert same(pt.load(tmp_path / "a.orbax", like=shapes(tree)), tree)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in ("colliding names",)])
def test_params_come_back_into_their_tree(tmp_path: Path, name: str) -> None:
    tree = CATALOGUE[name]()
    pt.save(tmp_path / "a.params", tree)
    assert same(pt.load(tmp_path / "a.params", like=tree), tree)


DTYPES = [
    *sorted(
        {name for name in dir(ml_dtypes) if name.startswith(("float", "bfloat", "int", "uint"))}
        - {"float6_e2m3fn", "float6_e3m2fn", "int1", "uint1"}  # missing from some versions of jax
    ),
    *("bool", "float16", "float32", "complex64"),
    *("int8", "int16", "int32", "uint8", "uint16", "uint32"),
]


@WHOLE
def test_every_dtype_comes_back(tmp_path: Path, ending: str) -> None:
    made = {}
    for dtype in DTYPES:
        try:
            values = [1, 2, 1, 4, 1, 2] if "e8m0" in dtype else [0, 1, 1, 0, 1, 0]  # e8m0 has no zero
            made[dtype] = jnp.asarray(values).astype(dtype)
        except TypeError:
            continue  # this jax lacks the dtype
    assert len(made) > 20
    tree = pt.from_tree({"vector": made, "scalar": {name: a[1] for name, a in made.items()}})
    pt.save(tmp_path / f"a.{ending}", tree)
    for found in (pt.load(tmp_path / f"a.{ending}"), pt.load(tmp_path / f"a.{ending}", like=tree)):
        assert same(found, tree)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


@WHOLE
def test_numpy_arrays_of_64_bits_come_back_exactly(tmp_path: Path, ending: str) -> None:
    values = {
        "f": np.array([np.pi, -0.0, np.inf]),
        "i": np.array([2**62]),
        "u": np.array(2**64 - 1, np.uint64),
        "c": np.array([1 + 2j]),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(10)[::3],
        "swapped": np.array([1.5, 2.5], ">f8"),
    }
    tree = pt.from_tree(values)
    pt.save(tmp_path / f"a.{ending}", tree)
    found = pt.load(tmp_path / f"a.{ending}")
    for name, value in values.items():
        assert isinstance(found[name], np.ndarray)
        assert found[name].dtype == value.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], value)
    with x64():
        assert isinstance(pt.load(tmp_path / f"a.{ending}").f, jax.Array)
    assert isinstance(pt.load(tmp_path / f"a.{ending}", like=tree).order, np.ndarray)


@WHOLE
def test_keys_come_back(tmp_path: Path, ending: str) -> None:
    tree = pt.from_tree(
        {"a": jax.random.key(3), "b": jax.random.split(jax.random.key(1, impl="rbg"), 2)}
    )
    pt.save(tmp_path / f"a.{ending}", tree)
    for found in (pt.load(tmp_path / f"a.{ending}"), pt.load(tmp_path / f"a.{ending}", like=tree)):
        assert found.a.dtype == tree.a.dtype and found.b.dtype == tree.b.dtype
        assert jax.random.bits(found.a) == jax.random.bits(tree.a)
        np.testing.assert_array_equal(jax.random.key_data(found.b), jax.random.key_data(tree.b))


def test_other_pytrees_come_back_as_what_they_are(tmp_path: Path) -> None:
    params = {"layer": {"w": jnp.ones((2, 3)), "b": [jnp.zeros(3), 2, 0.5, True]}}
    with jax.numpy_dtype_promotion("standard"):
        state = optax.adam(0.1).init(params)
    both = (params, state, np.float32(3))
    pt.save(tmp_path / "a.safetensors", both)
    found = pt.load(tmp_path / "a.safetensors", like=both)
    assert jax.tree.structure(found) == jax.tree.structure(both)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(both), strict=True):
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)


def test_a_tree_in_another_container_keeps_its_ties(tmp_path: Path) -> None:
    both = {"params": tied(), "steps": [3, 0.5]}
    pt.save(tmp_path / "a.safetensors", both)
    found = pt.load(tmp_path / "a.safetensors")
    assert found.params.decoder.weight is found.params.embed.weight
    back = pt.load(tmp_path / "a.safetensors", like=both)
    assert same(back["params"], tied()) and back["steps"] == [3, 0.5]
    half = {"params": pt.select(tied(), "embed_.*"), "f": jnp.tanh}  # holes and a function
    pt.save(tmp_path / "a.safetensors", half)
    assert list(pt.collect(pt.load(tmp_path / "a.safetensors"))) == ["params_embed_weight"]


# Interoperability with other programs


def test_safetensors_are_read_by_their_package(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    pt.save(file, tied())
    found = safetensors.numpy.load_file(file)
    assert set(found) == {"embed.weight", "block.a.w", "block.a.b", "decoder.bias"}
    np.testing.assert_array_equal(found["embed.weight"], tied().embed.weight)
    pt.save(file, tied(), sep="/")
    assert "block/a/w" in safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, "numpy") as opened:
        layout = json.loads(opened.metadata()["paramtree"])
    assert ["decoder", "weight"] in layout["paths"]


def test_npz_is_read_by_numpy(tmp_path: Path) -> None:
    pt.save(tmp_path / "a.npz", tied())
    with np.load(tmp_path / "a.npz") as found:
        np.testing.assert_array_equal(found["embed.weight"], tied().embed.weight)


def test_pytorch_reads_it_and_writes_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a.safetensors"
    tree = pt.from_tree({"w": jnp.ones(3, jnp.bfloat16), "f8": jnp.ones(3, jnp.float8_e4m3fn)})
    pt.save(file, tree)
    found = load_file(file)
    assert str(found["w"].dtype) == "torch.bfloat16" and str(found["f8"].dtype) == "torch.float8_e4m3fn"
    save_file(found, file)
    assert same(pt.load(file, like=tree), tree)


def test_orbax_reads_it_and_writes_it(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    nested = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "steps": [jnp.ones(2), jnp.ones(1)]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", nested)
    tree = pt.from_tree(nested)
    assert same(pt.load(tmp_path / "theirs", like=tree), tree)
    assert list(pt.collect(pt.load(tmp_path / "theirs"))) == [
        "layer_b",
        "layer_w",
        "steps_0",
        "steps_1",
    ]
    pt.save(tmp_path / "ours.orbax", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(tmp_path / "ours.orbax" / "0")["layer.b"], 0)


def test_files_of_others_become_trees_of_their_names(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    values = {f"layer.{i}.w": np.full(2, i, np.float32) for i in range(12)}
    safetensors.numpy.save_file(values, file)
    tree = pt.load(file)
    assert list(tree.layer) == [str(i) for i in range(12)]  # not 0, 1, 10, 11, 2
    assert pt.load(file, sep="/")["layer.3.w"][0] == 3
    with pytest.raises(pt.LoadError, match="has an empty segment between 'w'"):
        pt.load(file, sep="w")


def test_a_model_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    parts = {"a-1.safetensors": ["x.w", "y"], "a-2.safetensors": ["z"]}
    for i, (part, names) in enumerate(parts.items()):
        safetensors.numpy.save_file({name: np.full(2, i, "f") for name in names}, tmp_path / part)
    index = tmp_path / "a.safetensors.index.json"
    listed = {name: part for part, names in parts.items() for name in names}
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    tree = pt.load(index)
    assert (tree.x.w[0], tree.z[0]) == (0, 1)
    for wrong, message in (
        (
            {**listed, "z": "../a-2.safetensors"},
            r"'../a-2.safetensors': is not the name of a file next to",
        ),
        ({**listed, "z": "b"}, "'b': is in the index, but not next to it"),
        (
            {**listed, "more": "a-1.safetensors"},
            "'more': and 0 more are in the index, but not in the files",
        ),
        ({"z": 3}, "3: is not the name of a file"),
        ([], "is not an index of safetensors files"),
        ({"z": []}, "is not an index of safetensors files"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(pt.LoadError, match=message):
            pt.load(index)
    index.write_text("[" * 100_000)
    with pytest.raises(pt.LoadError, match="is not an index of safetensors files"):
        pt.load(index)


def test_the_content_says_what_a_file_is(tmp_path: Path) -> None:
    for ending in ("safetensors", "npz", "params"):
        pt.save(tmp_path / f"a.{ending}", pt.from_tree({"a": {"w": leaf(0)}}))
        (tmp_path / f"a.{ending}").rename(tmp_path / "model.dat")
        tree, report = pt.load(tmp_path / "model.dat", report=True)
        assert report.format == ending and tree.a.w[0] == 0
    pt.save(tmp_path / "without", pt.from_tree({"w": leaf(0)}))
    assert pt.load(tmp_path / "without", report=True)[1].format == "safetensors"


# Ties


@pytest.mark.parametrize("ending", [*FORMATS, "params"])
def test_a_tie_is_stored_once_and_comes_back_tied_or_untied(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    tree = tied()
    pt.save(file, tree)
    assert pt.ties(pt.load(file, like=tree)) == pt.ties(tree)
    if ending != "params":
        assert pt.ties(pt.load(file)) == pt.ties(tree)
    loose = pt.load(file, like=pt.untie(tree))
    assert not pt.ties(loose)
    np.testing.assert_array_equal(loose.decoder.weight, tree.embed.weight)
    assert loose.decoder.weight.unsafe_buffer_pointer() != loose.embed.weight.unsafe_buffer_pointer()
    jax.jit(lambda p: p, donate_argnums=0)(loose)  # raises if two leaves share a buffer


def test_any_alias_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    values = {"embed": np.ones((3, 2), np.float32), "decoder": np.ones((3, 2), np.float32)}
    like = pt.tie(pt.from_tree(values), {"decoder": "embed"})
    for names in (["embed"], ["decoder"], ["embed", "decoder"]):
        safetensors.numpy.save_file({name: values[name] for name in names}, file)
        tree, report = pt.load(file, like=like, report=True)
        assert same(tree, like)
        assert sorted(report.loaded["embed"]) == sorted(names)


def test_tied_names_with_different_values_say_how_far_apart_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    like = pt.tie(pt.from_tree({"embed": leaf(0), "decoder": leaf(0)}), {"decoder": "embed"})
    a, b = np.float32([1, 2]), np.float32([1, 2.5])
    safetensors.numpy.save_file({"embed": a, "decoder": b}, file)
    text = (
        "one leaf, `embed`, but differ in 1 of 2 elements, by at most 0.5.\nA tied leaf has one value"
    )
    with pytest.raises(pt.LoadError, match=text):
        pt.load(file, like=like)
    # the suggested fix
    assert pt.load(file, like=like, rename=[("decoder", None)]).decoder[1] == 2
    assert pt.load(file, like=pt.untie(like)).decoder[1] == 2.5
    nan = np.float32([np.nan, 1])
    safetensors.numpy.save_file({"embed": nan, "decoder": nan}, file)
    assert np.isnan(pt.load(file, like=like).embed[0])


# Matching


def test_names_are_found_in_every_spelling_and_by_position(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Dense(3, activation="relu"), nn.Activation("relu"), nn.Dense(2))
    like = pt.init(net, jax.random.key(0), jnp.ones((1, 4)))
    file = tmp_path / "a.npz"
    for pattern in ("dense{}.weight", "dense{}_weight", "dense{}/weight"):
        names = [pattern.format(i) for i in (0, 1)]
        np.savez(file, **dict(zip(names, [np.ones((3, 4), "f"), np.ones((2, 3), "f")], strict=True)))
        assert pt.load(file, like=like, allow_missing=".*bias").dense1.weight[0, 0] == 1
    np.savez(file, **{"0.weight": np.ones((3, 4), "f"), "2.weight": np.ones((2, 3), "f")})
    found = pt.load(file, like=like, allow_missing=True)
    assert found.dense1.weight[0, 0] == 1 and found.dense1.bias is like.dense1.bias


def test_everything_that_is_wrong_is_in_one_error(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    like = pt.from_tree(
        {"embed": {"weight": jnp.ones((3, 2))}, "b": jnp.ones(3), "c": jnp.ones(2), "d": 1.0}
    )
    wrong = {
        "embd.weight": np.ones((3, 2), np.float32),
        "b": np.ones(4, np.float32),
        "c": np.ones(2, np.float16),
        "d": np.ones(2, np.float32),
    }
    safetensors.numpy.save_file(wrong, file)
    with pytest.raises(pt.LoadError) as caught:
        pt.load(file, like=like)
    assert str(caught.value) == (
        f"{file} does not fit the tree:\n"
        "  `embed_weight` is missing; the closest unexpected name is `embd.weight`.\n"
        "  `embd.weight` is unexpected.\n"
        "  `b` has shape (4,), expected (3,).\n"
        "  `c` has dtype float16, expected float32.\n"
        "  `d` has shape (2,), expected ().\n"
        "allow_missing=True keeps the values of `like`; rename= rewrites the names in the file.\n"
        "ignore_extra=True skips names that the tree does not have.\n"
        "transform= can change the shape of an array; or the file is of a different model.\n"
        "cast_dtype=True casts to the dtypes of `like`."
    )
    # the suggested fix
    fixed = pt.load(
        file,
        like=like,
        rename=[("embd", "embed")],
        transform={"b": lambda b: b[:3], "d": lambda d: d[0]},
        cast_dtype=True,
    )
    assert fixed.c.dtype == np.float32 and fixed.d == 1.0 and type(fixed.d) is float


def test_missing_and_extra_may_be_allowed(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    like = pt.from_tree({"a": {"w": leaf(1), "b": leaf(2)}, "c": leaf(3)})
    pt.save(file, pt.from_tree({"a": {"w": leaf(7)}, "more": {"x": leaf(8)}}))
    tree, report = pt.load(file, like=like, strict=False, report=True)
    assert tree.a.w[0] == 7 and tree.a.b is like.a.b and tree.c is like.c
    assert (report.missing, report.ignored) == (["a_b", "c"], ["more.x"])
    assert report.to_dict()["loaded"] == {"a_w": ["a.w"]}
    assert "a_b: not in the file, kept" in str(report) and "more.x: in the file, ignored" in str(report)
    for extra in (r"more\..*", "more_x", True):
        assert same(pt.load(file, like=like, allow_missing="a_b|c", ignore_extra=extra), tree)
    with pytest.raises(pt.LoadError, match="`c` is missing.\n  `more.x` is unexpected"):
        pt.load(file, like=like, allow_missing="a_b")
    with pytest.raises(pt.LoadError, match="`a_b` is missing, and `like` has no value for it"):
        pt.load(file, like=shapes(like), strict=False)
    with pytest.raises(pt.RuleError, match="not a regular expression"):
        pt.load(file, like=like, allow_missing="(")


def test_rename_by_pairs_and_by_a_function(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    like = pt.from_tree({f"layer{i}": {"gamma": leaf(i)} for i in range(2)})
    values = {f"encoder.layer.{i}.norm.weight": np.full(2, i, np.float32) for i in range(2)}
    safetensors.numpy.save_file({**values, "position_ids": np.arange(3)}, file)
    pairs = [("position_ids", None), (r"^encoder\.layer\.", "layer"), (r"\.norm\.weight$", ".gamma")]
    assert same(pt.load(file, like=like, rename=pairs), like)
    assert same(pt.load(file, rename=pairs), like)

    def by_function(name: str) -> str | None:
        return None if name == "position_ids" else f"layer{name.split('.')[2]}_gamma"

    assert same(pt.load(file, like=like, rename=by_function), like)
    assert pt.load(file, like=like, rename=pairs, report=True)[1].ignored == ["position_ids"]
    with pytest.raises(pt.RuleError, match=r"rename: '.*encodr.*' matches no name; the closest are"):
        pt.load(file, like=like, rename=[*pairs, ("encodr", "x")])
    with pytest.raises(pt.RuleError, match="cannot replace 'position_ids'"):
        pt.load(file, like=like, rename=[("position_ids", r"\1")])
    with pytest.raises(TypeError, match=r"rename takes a list of pairs"):
        pt.load(file, like=like, rename=["ab", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="rename returned 3 for `encoder.layer.0.norm.weight`"):
        pt.load(file, like=like, rename=lambda name: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(pt.LoadError, match="`position_ids`, renamed to `ids`, is unexpected"):
        pt.load(file, like=like, rename=[("position_", ""), *pairs[1:]])


def test_transforms_transpose_split_and_stack(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    qkv = np.arange(18, dtype="f").reshape(9, 2)
    blocks = {f"h.{i}.ln.w": np.full(2, i, "f") for i in range(11)}
    np.savez(file, kernel=np.arange(6, dtype="f").reshape(2, 3), **{"attn.qkv.weight": qkv}, **blocks)
    like = pt.from_tree(
        {
            "dense": {"weight": jnp.zeros((3, 2))},
            "attn": {part: {"weight": jnp.zeros((3, 2))} for part in "qkv"},
            "blocks": {"ln": {"w": jnp.zeros((11, 2))}},
        }
    )
    found = pt.load(
        file,
        like=like,
        rename=[("kernel", "dense.weight"), (r"h\.\d+", "blocks")],
        transform={
            "dense_weight": np.transpose,
            "(.*)_qkv_(.*)": lambda a: {
                rf"\1_{part}_\2": b for part, b in zip("qkv", np.split(a, 3), strict=True)
            },
            "blocks_.*": lambda *layers: np.stack(layers),
        },
    )
    assert found.dense.weight[1, 0] == 1
    np.testing.assert_array_equal(found.attn.k.weight, qkv[3:6])
    np.testing.assert_array_equal(found.blocks.ln.w[:, 0], range(11))  # in natural order
    with pytest.raises(
        pt.RuleError, match="transform: 'kernl' matches no name; the closest are kernel"
    ):
        pt.load(file, transform={"kernl": np.transpose})
    with pytest.raises(
        pt.RuleError, match="the transform 'kernel' of kernel returned a str; expected an array"
    ):
        pt.load(file, transform={"kernel": str})
    with pytest.raises(pt.RuleError, match="transform .*expected a mapping of patterns to functions"):
        pt.load(file, transform=np.transpose)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError) as caught:
        pt.load(file, transform={"kernel": lambda a: 1 // 0})
    assert caught.value.__notes__ == ["in the transform 'kernel' of kernel"]
    with pytest.raises(pt.RuleError, match="the transform 'kernel' returned an invalid name"):
        pt.load(file, transform={"kernel": lambda a: {r"\3": a}})


@pytest.mark.parametrize("sep", [".", "/", ":"])
def test_a_pattern_with_a_slash_matches_whole_paths(tmp_path: Path, sep: str) -> None:
    file = tmp_path / "a.safetensors"
    tree = pt.from_tree(
        {"encoder": {"w": leaf(1), "inner": {"w": leaf(2)}}, "encoder_head": {"w": leaf(3)}}
    )
    pt.save(file, tree, sep=sep)

    def double(array: Any) -> Any:
        return array * 2

    for like in (tree, None):
        found = pt.load(file, like=like, transform={"encoder/.*": double})
        assert [found.encoder.w[0], found.encoder.inner.w[0], found.encoder_head.w[0]] == [2, 4, 3]
        found = pt.load(file, like=like, transform={"encoder/w": double, ".*_w": np.negative})
        assert [found.encoder.w[0], found.encoder.inner.w[0], found.encoder_head.w[0]] == [2, -2, -3]
        found = pt.load(
            file, like=like, transform={re.compile("(.*)/inner/w"): lambda a: {r"\1/inner/w": -a}}
        )
        assert found.encoder.inner.w[0] == -2
        with pytest.raises(pt.RuleError, match="transform: 'encoder/v' matches no name; .*encoder/w"):
            pt.load(file, like=like, transform={"encoder/v": double})

    more = pt.insert(tree, {"head": {"w": leaf(4)}, "head_old": {"w": leaf(5)}})
    found, report = pt.load(file, like=more, allow_missing="head/.*|head_old/w", report=True)
    assert same(found, more) and report.missing == ["head_w", "head_old_w"]
    assert same(pt.load(file, like=more, allow_missing="head_.*"), more)
    with pytest.raises(pt.LoadError) as caught:
        pt.load(file, like=more, allow_missing="head/.*")
    assert "`head_old_w` is missing" in str(caught.value) and "`head_w`" not in str(caught.value)
    tied = pt.tie(pt.from_tree({"a": {"w": leaf(1)}, "b": {"w": leaf(1)}}), {"b": "a"})
    assert same(pt.load(file, like=tied, allow_missing="b/w", ignore_extra=True), tied)  # an alias

    less = pt.drop(tree, "encoder/.*")
    found, report = pt.load(file, like=less, ignore_extra="encoder/.*", report=True)
    assert same(found, less)
    assert report.ignored == [f"encoder{sep}w", f"encoder{sep}inner{sep}w"]
    assert same(pt.load(file, like=less, ignore_extra="encoder/w|encoder/inner/w"), less)
    with pytest.raises(pt.LoadError) as caught:
        pt.load(file, like=pt.drop(tree, ".*"), ignore_extra="encoder/.*")
    assert f"`encoder_head{sep}w` is unexpected" in str(caught.value)
    assert f"`encoder{sep}w`" not in str(caught.value)


def test_patterns_of_names_in_a_file_without_levels(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **{"a.b": leaf(1), "c:d": leaf(2), "e": leaf(3)})
    like = pt.from_tree({"e": leaf(3)})
    with pytest.raises(pt.LoadError, match="`c:d` is unexpected"):
        pt.load(file, like=like, ignore_extra="a/b|c/d")
    with pytest.raises(pt.LoadError, match="`a.b` is unexpected"):
        pt.load(file, like=like, ignore_extra="a/b|c/d", sep=":")
    for sep in (":", ""):
        assert same(pt.load(file, like=like, ignore_extra=r"a\.b|c[:/]d", sep=sep), like)
    assert pt.load(file, transform={"c/d": np.negative}, sep=":").c.d[0] == -2


def test_patterns_for_a_file_are_not_predicates(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    pt.save(file, pt.from_tree({"a": leaf(1)}))
    like = pt.from_tree({"a": leaf(1), "b": leaf(2)})

    def is_wide(name: str, leaf: Any) -> bool:
        return True

    text = "the predicate is_wide cannot select arrays of a file.*use a regular expression"
    for options in (
        {"allow_missing": is_wide},
        {"ignore_extra": is_wide},
        {"transform": {is_wide: abs}},
    ):
        with pytest.raises(pt.RuleError, match=text):
            pt.load(file, like=like, **options)
    with pytest.raises(pt.RuleError, match=text):
        pt.load(file, transform={is_wide: abs})
    with pytest.raises(pt.RuleError, match="a pattern is a regular expression .*found 3 of type int"):
        pt.load(file, like=like, allow_missing=3)  # type: ignore[arg-type]
    assert same(pt.load(file, like=like, allow_missing=".*"), like)  # the suggested fix


def test_keys_under_two_names_of_a_tied_leaf_are_compared(tmp_path: Path) -> None:
    pt.save(tmp_path / "a.npz", pt.from_tree({"a": jax.random.key(1), "b": jax.random.key(1)}))
    like = pt.tie(pt.load(tmp_path / "a.npz"), {"b": "a"})
    assert pt.load(tmp_path / "a.npz", like=like).b == jax.random.key(1)
    pt.save(tmp_path / "a.npz", pt.from_tree({"a": jax.random.key(1), "b": jax.random.key(2)}))
    with pytest.raises(pt.LoadError, match="tied to one leaf, `a`, but differ in 1 of 2 elements"):
        pt.load(tmp_path / "a.npz", like=like)


def test_casting_only_where_nothing_else_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, a=np.float32([1.5]), b=np.int32([2]), c=np.array([1j], np.complex64))
    like = pt.from_tree(
        {"a": jnp.ones(1, jnp.bfloat16), "b": jnp.ones(1), "c": jnp.ones(1, jnp.complex64)}
    )
    tree, report = pt.load(file, like=like, cast_dtype=True, report=True)
    assert tree.a.dtype == jnp.bfloat16 and tree.b[0] == 2.0
    assert report.cast == {"a": "float32", "b": "int32"} and "a: cast from float32" in str(report)
    for name, dtype in (("a", jnp.int32), ("c", jnp.float32)):
        wrong = pt.replace(like, {name: jnp.ones(1, dtype)})
        with pytest.raises(pt.LoadError, match=f"`{name}` has dtype .*, which does not cast to"):
            pt.load(file, like=wrong, cast_dtype=True)


def test_a_subtree_saves_and_loads_by_itself_and_into_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    params = siblings()
    pt.save(file, params.dense10)
    assert set(safetensors.numpy.load_file(file)) == {"weight", "bias"}
    part = pt.load(file, like=params.dense3)
    assert "dense3_weight" in repr(part) and part.weight[0] == 10
    whole = pt.replace(params, {"dense3": part})
    assert whole.dense3.weight[0] == 10 and whole.dense2.weight is params.dense2.weight
    assert flatten(whole)[0] is flatten(params)[0]
    with pytest.raises(pt.RuleError, match="`dense99/weight` is not a name in the tree"):
        pt.replace(params, {"dense99": part})


def test_holes_take_no_part(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    params = siblings()
    some, rest = pt.partition(params, "dense1_.*")
    pt.save(file, some)
    assert len(safetensors.numpy.load_file(file)) == 2
    assert same(pt.merge(pt.load(file), rest), params)
    pt.save(file, params)
    with pytest.raises(pt.LoadError, match="`dense0.weight` is unexpected"):
        pt.load(file, like=some)
    assert same(pt.load(file, like=some, ignore_extra=True), some)


@pytest.mark.parametrize("ending", [*FORMATS, "params"])
def test_leaves_go_where_the_tree_like_them_is(tmp_path: Path, ending: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    pt.save(tmp_path / f"a.{ending}", siblings())
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), siblings())
    found = pt.load(tmp_path / f"a.{ending}", like=like)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))
    assert same(found, siblings())
    free = pt.load(tmp_path / f"a.{ending}", like=siblings())
    assert not any(leaf.committed for leaf in jax.tree.leaves(free)) or ending == "orbax"


# What cannot be saved


def test_what_cannot_be_saved_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    pt.save(file, pt.from_tree({"a": leaf(0)}))
    donated = jnp.ones(3) + 0
    jax.jit(lambda a: a + 1, donate_argnums=0)(donated)
    tree = pt.from_tree(
        {
            "s": jax.ShapeDtypeStruct((2,), "float32"),
            "t": "text",
            "d": donated,
            "o": np.array(["a"]),
            "ok": 1,
        }
    )
    with pytest.raises(pt.MismatchError) as caught:
        pt.save(file, tree)
    assert "`s` is a shape without values" in str(caught.value)
    assert "`t` is a str, not an array" in str(caught.value)
    assert "`d` has been donated" in str(caught.value)
    assert "`o` has dtype <U1" in str(caught.value) and "`ok`" not in str(caught.value)
    with pytest.raises(pt.MismatchError, match="`w` is being traced: save outside of jit"):
        jax.jit(lambda w: pt.save(file, {"w": w}))(leaf(0))
    assert pt.load(file).a[0] == 0
    with pytest.raises(pt.MismatchError, match="`w` has dtype complex64, which .params does not have"):
        pt.save(tmp_path / "a.params", {"w": jnp.ones(1, jnp.complex64)})


def test_names_that_no_file_should_have(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(pt.NameCollisionError, match='`a.b` is the name of both a.b and a/b.*sep="/"'):
        pt.save(file, {"a.b": leaf(0), "a": {"b": leaf(1)}})
    pt.save(file, {"a.b": leaf(0), "a": {"b": leaf(1)}}, sep="/")
    assert pt.load(file)["a.b"][0] == 0
    with pytest.raises(pt.ParamTreeError, match=re.escape("`a/../b` has the segment '..'")):
        pt.save(file, {"a": {"..": {"b": leaf(0)}}})
    with pytest.raises(pt.ParamTreeError, match="sep='' cannot separate names in a file"):
        pt.save(file, {"a": leaf(0)}, sep="")
    for ending in (".pt", ".pth", ".pkl", ".h5"):
        with pytest.raises(pt.ParamTreeError, match=f"{ending} is another library's format"):
            pt.save(tmp_path / f"a{ending}", {"a": leaf(0)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pt.save(tmp_path / "nowhere" / "a.npz", {"a": leaf(0)})
    with pytest.raises(FileNotFoundError, match="nothing"):
        pt.load(tmp_path / "nothing.safetensors")


def test_a_leaf_with_the_name_that_safetensors_keeps_for_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(pt.ParamTreeError, match="`__metadata__` is reserved in safetensors"):
        pt.save(file, {"__metadata__": leaf(0)})
    pt.save(tmp_path / "a.npz", {"__metadata__": leaf(0), "paramtree.json": leaf(1), "file": leaf(2)})
    assert pt.load(tmp_path / "a.npz").file[0] == 2


def test_a_sharded_tree_over_devices(tmp_path: Path) -> None:
    code = f"""if True:
        import jax, jax.numpy as jnp, numpy as np, paramtree as pt
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        mesh = Mesh(np.array(jax.devices()), ("x",))
        put = lambda a: jax.device_put(a, NamedSharding(mesh, P("x")))
        tree = pt.tie(pt.from_tree({{"a": put(jnp.arange(16.0)), "b": put(jnp.zeros(16)), "c": jnp.ones(3)}}),
                      {{"b": "a"}})
        half = NamedSharding(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y")), P("y"))
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=half if a.size == 16 else None), tree)
        for ending in ("safetensors", "orbax"):
            file = r"{tmp_path}/a." + ending
            pt.save(file, tree)
            same = pt.load(file, like=tree)
            assert same.a.sharding == tree.a.sharding and same.b is same.a, same.a.sharding
            assert len(same.a.addressable_shards) == 8
            other = pt.load(file, like=like)
            assert other.a.sharding == half and (other.a == jnp.arange(16.0)).all()
            assert (pt.load(file).a == jnp.arange(16.0)).all()
    """
    flags = "--xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.returncode == 0, run.stderr[-2000:]


# Exported models


def test_without_flatbuffers_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"flatbuffers, which is not installed: pip install 'paramtree\[export\]'"
    with pytest.raises(pt.ParamTreeError, match=message):
        pt.save_model(tmp_path / "net", nn.Dense(2), pt.from_tree({}), 1.0)
    with pytest.raises(pt.ParamTreeError, match=message):
        pt.load_model(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_model_runs_where_this_library_is_not(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Dense(5, activation="relu"), nn.Dense(3))
    params = pt.init(net, jax.random.key(0), jnp.ones((2, 4)))
    file = tmp_path / "net.stablehlo"
    free = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 4"), "float32")
    pt.save_model(file, net, params, free, platforms=["cpu", "cuda", "tpu"])
    x = jax.random.normal(jax.random.key(1), (7, 4))
    np.testing.assert_allclose(pt.load_model(file)(x), net(params, x), rtol=1e-5)
    assert jax.jit(pt.load_model(file))(x).shape == (7, 3)
    np.save(tmp_path / "x.npy", x)
    code = f"""if True:
        import sys; sys.modules["paramtree"] = None
        import jax.export, numpy as np
        program = jax.export.deserialize(bytearray(open(r"{file}", "rb").read()))
        assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
        np.save(r"{tmp_path}/y.npy", program.call(np.load(r"{tmp_path}/x.npy")))
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), net(params, x), rtol=1e-5)


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"not a program")
    with pytest.raises(pt.LoadError, match="is not an exported model"):
        pt.load_model(tmp_path / "a")
