"""Names that fit in two ways, or not at all: nothing is read into another leaf in silence."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn
from paramtree.command import main


def full(value: float, *shape: int) -> Any:
    return np.full(shape or (2,), value, np.float32)


SQUARE = np.arange(4, dtype=np.float32).reshape(2, 2)


def test_numbers_are_names_where_the_tree_has_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **{f"layers.{i}.w": full(i) for i in range(3)})
    with pytest.raises(pt.LoadError, match="`layers_5_w` is missing"):
        pt.load(file, like={"layers": {"5": {"w": full(9)}}})
    one = pt.load(file, like={"layers": {"2": {"w": full(9)}}}, ignore_extra=True)
    assert one["layers"]["2"]["w"][0] == 2
    named = pt.load(file, like={"layers": {n: {"w": full(9)} for n in "abc"}})  # these are positions
    assert [layer["w"][0] for layer in named["layers"].values()] == [0, 1, 2]


def test_two_levels_of_numbers_that_both_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **{f"ex.{i}.{j}.w": full(10 * i + j) for i in range(2) for j in range(2)})
    for like in ({"ex": {str(i): {"w": SQUARE} for i in range(2)}}, {"ex": [{"w": SQUARE}] * 2}):
        with pytest.raises(pt.LoadError, match="`ex_0_w` is missing"):
            pt.load(file, like=like)
    both = pt.load(file, like={"ex": {"w": np.zeros((2, 2, 2), np.float32)}})
    np.testing.assert_array_equal(both["ex"]["w"][:, :, 0], [[0, 1], [10, 11]])


@pytest.mark.parametrize("ending", ["npz", "safetensors", "params"])
@pytest.mark.parametrize(
    "block",
    [
        nn.Sequential(nn.Dense(4), nn.Sequential(nn.Dense(4))),
        nn.Sequential(nn.Dense(4), nn.Repeat(nn.Dense(4), 3)),
        nn.Sequential(nn.Sequential(nn.Dense(4)), nn.Dense(4)),
    ],
)
def test_either_form_of_a_nested_model_loads_into_either(
    tmp_path: Path, block: Any, ending: str
) -> None:
    net = nn.Sequential(nn.Repeat(block, 2))
    stacked = pt.init(net, jax.random.key(0), jnp.ones((1, 4)))
    named = pt.unstack(stacked, "repeat0")
    for tree, like in ((stacked, named), (named, stacked), (named, named)):
        pt.save(tmp_path / f"a.{ending}", tree)
        loaded = pt.load(tmp_path / f"a.{ending}", like=jax.tree.map(jnp.zeros_like, like))
        pt.testing.assert_trees_equal(loaded, like)


def test_a_transform_of_one_name_of_a_tie_is_that_of_one_name(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    pt.save(file, pt.from_tree({"a": {"w": SQUARE}, "b": {"w": SQUARE}}, ties={"b/w": "a/w"}))
    like = {"a": {"w": np.zeros_like(SQUARE)}, "b": {"w": np.zeros_like(SQUARE)}}
    one = pt.load(file, like=like, transform={"b_w": lambda a: a * 10})
    np.testing.assert_array_equal(one["a"]["w"], SQUARE)
    np.testing.assert_array_equal(one["b"]["w"], 10 * SQUARE)
    two = pt.load(file, like=like, transform={"a_w": np.transpose, "b_w": lambda a: a * 10})
    np.testing.assert_array_equal(two["a"]["w"], SQUARE.T)
    np.testing.assert_array_equal(two["b"]["w"], 10 * SQUARE)
    halves = {r"(.)_w": lambda a: {r"\1_x": a[0], r"\1_y": a[1]}}
    split = {n: {"x": np.zeros(2, np.float32), "y": np.zeros(2, np.float32)} for n in "ab"}
    loaded = pt.load(file, like=split, transform=halves)
    assert all(loaded[n]["y"].tolist() == [2, 3] for n in "ab")
    tied = pt.load(file, transform=halves)
    assert pt.ties(tied) == {"b_x": "a_x", "b_y": "a_y"}


def test_the_order_does_not_contradict_names(tmp_path: Path) -> None:
    file = tmp_path / "a.params"
    pt.save(file, {f"x_{n}_weight": full(i) for i, n in enumerate("abc")}, sep="_")
    zero = {"weight": full(9)}
    with pytest.raises(pt.LoadError, match="`d_weight` is missing"):
        pt.load(file, like=pt.from_tree({"b": zero, "a": zero, "d": zero}))
    by_order = pt.load(file, like=pt.from_tree({"p": zero, "q": zero, "r": zero}))
    assert [by_order[n].weight[0] for n in "pqr"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "like", "expected"),
    [
        (np.float32(2.5), 1, "dtype float32, expected Python's int"),
        (np.int64(2), True, "dtype int64, expected Python's bool"),
        (True, 1, "dtype bool, expected Python's int"),
        (np.float32(0.5), True, "dtype float32, expected Python's bool"),
        (np.complex64(1j), 1.0, "dtype complex64, expected Python's float"),
        (np.int64(2**60 + 1), 1.0, "is 1152921504606846977, which a float cannot hold"),
    ],
)
def test_a_number_of_python_keeps_what_it_is(
    tmp_path: Path, value: Any, like: Any, expected: str
) -> None:
    file = tmp_path / "a.safetensors"
    pt.save(file, {"n": value})
    for cast in (False, True):
        with pytest.raises(pt.LoadError, match=f"`n`.* {expected}"):
            pt.load(file, like={"n": like}, cast_dtype=cast)
    for good in (3, 0.5, True, 2j):
        pt.save(file, {"n": good})
        assert pt.load(file, like={"n": type(good)(0)})["n"] == good


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float8_e4m3fn", "float4_e2m1fn"])
def test_small_numbers_do_not_wrap_or_saturate(tmp_path: Path, dtype: str) -> None:
    file, small = tmp_path / "a.safetensors", getattr(ml_dtypes, dtype)
    wrong = np.array([100, 1, 0], np.int8) if "int" in dtype else np.array([np.inf, 1, 0], np.float32)
    pt.save(file, {"w": wrong})
    with pytest.raises(pt.LoadError, match=f"`w` has 1 of 3 values that {dtype} cannot hold"):
        pt.load(file, like={"w": np.zeros(3, small)}, cast_dtype=True)
    pt.save(file, {"w": np.array([0, 1, 0], wrong.dtype)})
    assert pt.load(file, like={"w": np.zeros(3, small)}, cast_dtype=True)["w"].tolist() == [0, 1, 0]


def sharded(file: Path) -> pt.ParamTree:
    tree = pt.from_tree({"a": {"w": SQUARE, "b": SQUARE[0]}, "c": SQUARE + 5})
    pt.save(file, tree, max_shard_size=20)
    return tree


def test_a_model_in_several_files_is_not_converted_onto_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    tree = sharded(file)
    part = next(tmp_path.glob("*-00001-*"))
    for source in (file, f"{file}.index.json", tmp_path):
        for out in (file, f"{file}.index.json", part):
            code = main([str(source), "--match", ".*_b", "--convert", str(out)])
            assert code == 2 and "was not written" in capsys.readouterr().err
    pt.testing.assert_trees_equal(pt.load(file), tree)
    assert main([str(file), "--convert", str(tmp_path / "other.npz")]) == 0


def test_an_index_copied_by_a_user_keeps_its_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tree = sharded(file)
    (tmp_path / "best.safetensors.index.json").write_bytes(Path(f"{file}.index.json").read_bytes())
    pt.save(file, {"other": SQUARE}, max_shard_size=4)
    pt.save(file, {"other": SQUARE})
    pt.testing.assert_trees_equal(pt.load(tmp_path / "best.safetensors"), tree)


def test_links_and_odd_paths(tmp_path: Path) -> None:
    for name in ("real", "links"):
        (tmp_path / name).mkdir()
    real, link = (tmp_path / name / "m.safetensors" for name in ("real", "links"))
    pt.save(real, {"old": SQUARE})
    link.symlink_to(real)
    tree = sharded(link)
    for path in (link, real):
        pt.testing.assert_trees_equal(pt.load(path), tree)
    pt.save(link, {"new": SQUARE})
    assert list(pt.load(real)) == ["new"] and os.listdir(tmp_path / "links") == ["m.safetensors"]
    pt.save(f"{tmp_path}/n.orbax/", tree)
    pt.testing.assert_trees_equal(pt.load(f"{tmp_path}/n.orbax/"), tree)
    for name in ("\u65e5" * 80, "\U0001f4a5" * 60, "-", "a.b.c"):
        pt.save(tmp_path / name, tree)
        pt.testing.assert_trees_equal(pt.load(tmp_path / name), tree)
    with pytest.raises(TypeError, match="metadata is a mapping of texts to texts"):
        pt.save(tmp_path / "m.safetensors", tree, metadata={"a": "\ud800"})


def test_combined_states_stay_states(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    pt.save(file, pt.from_tree({"a": {"m1": SQUARE, "m2": SQUARE}}, kinds={"a_m.": "state"}))
    loaded = pt.load(file, rename=[("m[12]", "m")], transform={"a_m": lambda x, y: np.stack([x, y])})
    assert list(pt.collect(loaded, kind="state")) == ["a_m"] and loaded.a.m.shape == (2, 2, 2)


def test_a_stack_of_numbers_becomes_arrays_of_jax(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **{"h.s": np.arange(3, dtype=np.float32)})
    like = {"h": {str(i): {"s": jnp.zeros(())} for i in range(3)}}
    loaded = pt.load(file, like=like)
    assert all(isinstance(level["s"], jax.Array) for level in loaded["h"].values())
