"""MXNet's ``.params``: files written by MXNet itself, and every version and naming scheme."""

import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import parameter_management as example
from paramtree import nn
from paramtree.core.tree import flatten
from paramtree.io.opening import open_source

GOLD = Path(__file__).parents[1] / "data" / "gluon"
FILES = sorted(path.name for path in GOLD.glob("*.params"))


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def named_as_gluon(p: Any, x: Any) -> Any:
    return nn.Dense(10)(p.output, nn.Dense(16, activation="relu")(p.hidden, x))


NETS: dict[str, Any] = {
    "mlp": example.mlp(),
    "tied": example.tied_mlp(),
    "tied_dedup": example.tied_mlp(),
    "rgnet": example.rgnet(),
    "fancymlp": example.FancyMLP(),
    "convbn": nn.Sequential(
        nn.Conv2D(8, 3, padding=1, activation="relu", layout="NCHW"),
        nn.BatchNorm(axis=1),
        nn.MaxPool2D(layout="NCHW"),
        nn.Conv2D(6, 3, 2, use_bias=False, layout="NCHW"),
        nn.BatchNorm(axis=1, scale=False),
        nn.Activation("relu"),
        nn.GlobalAvgPool2D(layout="NCHW"),
        nn.Flatten(),
        nn.Dense(10),
    ),
    "lstm": nn.LSTM(8, num_layers=2),
    "legacy": named_as_gluon,
    "legacy_stripped": named_as_gluon,
    "legacy_structural": named_as_gluon,
}


def test_there_are_gold_files() -> None:
    assert len(FILES) == 12


@pytest.mark.parametrize("name", FILES)
def test_the_arrays_are_those_of_mxnet(name: str) -> None:
    with np.load((GOLD / name).with_suffix(".npz")) as gold:
        gold = dict(gold)
    with open_source(str(GOLD / name)) as source:
        assert source.arrays
        for key, stored in source.arrays.items():
            array, wanted = stored.read(), gold[key]
            assert (array.dtype, array.shape) == (stored.dtype, stored.shape)
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array, wanted, strict=True)


@pytest.mark.parametrize("name", [name for name in FILES if name != "sparse.params"])
def test_files_are_written_byte_for_byte(tmp_path: Path, name: str) -> None:
    pt.save(tmp_path / name, pt.load(GOLD / name))
    assert (tmp_path / name).read_bytes() == (GOLD / name).read_bytes()


@pytest.mark.parametrize("values", [False, True], ids=["shapes", "values"])
@pytest.mark.parametrize("name", NETS)
def test_files_load_into_the_nets_they_came_from(name: str, values: bool) -> None:
    with np.load(GOLD / f"{name}.npz") as gold:
        x, y = gold["x"], gold["y"]
    net = NETS[name]
    like = pt.init(net, jax.random.key(0), x) if values else pt.abstract(net, x)
    params = pt.load(GOLD / f"{name}.params", like=like)
    assert flatten(params)[0] is flatten(like)[0]
    np.testing.assert_allclose(np.ravel(net(params, x)), np.ravel(y), atol=2e-6)


def test_gluon_names_go_by_order_when_the_counters_differ(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Dense(3), nn.Dense(3), nn.Dense(3))
    params = pt.init(net, jax.random.key(0), jnp.ones((1, 3)))
    for first in (1, 7, 9):
        renamed = {
            f"net_dense{first + i}_{k}": v
            for i, layer in enumerate(params.values())
            for k, v in layer.items()
        }
        pt.save(tmp_path / "a.params", pt.from_tree(renamed))
        found = pt.load(tmp_path / "a.params", like=params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)
    del renamed["net_dense9_bias"]
    pt.save(tmp_path / "a.params", pt.from_tree(renamed))
    with pytest.raises(pt.LoadError, match="`dense0_weight` is missing"):
        pt.load(tmp_path / "a.params", like=params)


def test_a_deduplicated_file_and_a_net_that_is_not_tied() -> None:
    net = nn.Sequential(*(nn.Dense(8, activation="relu") for _ in range(3)), nn.Dense(10))
    like = pt.abstract(net, jnp.ones((4, 20)))
    with pytest.raises(
        pt.LoadError, match=r"load into pt.tie\(like, \{alias: source\}\), and pt.untie"
    ):
        pt.load(GOLD / "tied_dedup.params", like=like)
    # the suggested fix
    params = pt.untie(pt.load(GOLD / "tied_dedup.params", like=pt.tie(like, {"dense2": "dense1"})))
    with np.load(GOLD / "tied.npz") as gold:
        np.testing.assert_allclose(net(params, gold["x"]), gold["y"], atol=2e-6)
    assert not pt.ties(params)


def test_recurrent_layers_go_by_the_cells_that_they_stand_for(tmp_path: Path) -> None:
    with np.load(GOLD / "lstm.npz") as gold:
        gold = dict(gold)
    names = [f"l{i}_{g}_{w}" for i in (0, 1) for w in ("weight", "bias") for g in ("i2h", "h2h")]
    source = [f"_unfused.{name[1]}.{name[3:]}" for name in names]
    like = pt.from_tree({name: jnp.zeros_like(gold[s]) for name, s in zip(names, source, strict=True)})
    found = pt.load(GOLD / "lstm.params", like=like)
    for name, s in zip(names, source, strict=True):
        np.testing.assert_array_equal(found[name], gold[s])
    nested = {
        "lstm0": {"l0_i2h_weight": jnp.ones(2), "r0_i2h_weight": jnp.ones(3)},
        "dense0": {"bias": jnp.ones(1)},
    }
    both = pt.from_tree(nested)
    file = tmp_path / "a.params"
    file.write_bytes(
        of(
            [v2(np.ones(2, "f")), v2(np.ones(3, "f")), v2(np.ones(1, "f"))],
            ["0._unfused.0.l_cell.i2h_weight", "0._unfused.0.r_cell.i2h_weight", "1.bias"],
        )
    )
    assert pt.load(file, like=both).lstm0.r0_i2h_weight.shape == (3,)


# Files built from the specification of the format


def of(arrays: list[bytes], names: list[str]) -> bytes:
    head = struct.pack("<QQQ", 0x112, 0, len(arrays)) + b"".join(arrays) + struct.pack("<Q", len(names))
    return head + b"".join(struct.pack("<Q", len(n.encode())) + n.encode() for n in names)


CODES = {
    "f4": 0,
    "f8": 1,
    "f2": 2,
    "u1": 3,
    "i4": 4,
    "i1": 5,
    "i8": 6,
    "b1": 7,
    "i2": 8,
    "u2": 9,
    "u4": 10,
    "u8": 11,
}


def code(a: np.ndarray) -> int:
    return CODES[a.dtype.str[1:]]


def shape(dims: Any, code: str = "q") -> bytes:
    return struct.pack(f"<i{len(dims)}{code}", len(dims), *dims)


def rest(a: np.ndarray) -> bytes:
    return struct.pack("<iii", 1, 0, code(a)) + a.tobytes()


def v0(a: np.ndarray) -> bytes:
    return shape(a.shape, "I") + rest(a)


def v1(a: np.ndarray) -> bytes:
    return struct.pack("<I", 0xF993FAC8) + shape(a.shape) + rest(a)


def v2(a: np.ndarray) -> bytes:
    return struct.pack("<Ii", 0xF993FAC9, 0) + shape(a.shape) + rest(a)


def v3(a: np.ndarray) -> bytes:
    return struct.pack("<Ii", 0xF993FACA, 0) + shape(a.shape) + rest(a)


def sparse(stype: int, dims: Any, data: np.ndarray, *index: np.ndarray) -> bytes:
    head = struct.pack("<Ii", 0xF993FAC9, stype) + shape(data.shape) + shape(dims)
    kinds = b"".join(struct.pack("<i", code(i)) + shape(i.shape) for i in index)
    return (
        head
        + struct.pack("<iii", 1, 0, code(data))
        + kinds
        + data.tobytes()
        + b"".join(i.tobytes() for i in index)
    )


@pytest.mark.parametrize("version", [v0, v1, v2, v3])
def test_every_version_and_dtype(tmp_path: Path, version: Any) -> None:
    arrays = [np.array([[0, 1], [1, 0], [1, 1]], dtype) for dtype in CODES]
    (tmp_path / "a").write_bytes(of([version(a) for a in arrays], list(CODES)))
    with open_source(str(tmp_path / "a")) as source:
        for name, array in zip(CODES, arrays, strict=True):
            np.testing.assert_array_equal(source.arrays[name].read(), array, strict=True)


def test_bfloat16_and_arrays_without_axes_or_elements(tmp_path: Path) -> None:
    tree = pt.from_tree(
        {"h": jnp.array([1.5, 2], jnp.bfloat16), "s": jnp.float32(3), "z": jnp.zeros((0, 2))}
    )
    pt.save(tmp_path / "a.params", tree)
    assert (tmp_path / "a.params").read_bytes()[24:28] == struct.pack("<I", 0xF993FACA)
    found = pt.load(tmp_path / "a.params")
    assert found.h.dtype == jnp.bfloat16 and found.s.shape == () and found.z.shape == (0, 2)
    none = struct.pack("<Iii", 0xF993FAC9, 0, 0)  # a scalar without a value
    (tmp_path / "b").write_bytes(of([none, v2(np.ones(2, "f"))], ["a", "b"]))
    assert pt.load(tmp_path / "b").a.shape == (0,)


def test_names_of_exported_models_and_no_names(tmp_path: Path) -> None:
    file = tmp_path / "a"
    a, b = np.ones((2, 3), "f"), np.zeros(2, "f")
    file.write_bytes(of([v2(a), v2(b)], ["arg:net_fc_weight", "aux:net_bn_running_mean"]))
    tree = pt.load(file)
    assert list(pt.collect(tree, kind="state")) == ["net_bn_running_mean"]
    assert list(tree) == ["net_fc_weight", "net_bn_running_mean"]
    like = pt.from_tree({"fc": {"weight": jnp.zeros((2, 3))}, "bn": {"running_mean": jnp.ones(2)}})
    assert pt.load(file, like=like).bn.running_mean[0] == 0
    file.write_bytes(of([v2(a), v2(b)], []))
    assert list(pt.load(file)) == ["0", "1"]
    assert pt.load(file, like=like).fc.weight[0, 0] == 1
    with pytest.raises(
        pt.LoadError, match=r"`bn_running_mean`, from `1`, has shape \(2,\), expected \(4,\)"
    ):
        pt.load(file, like=pt.from_tree({"fc": {"weight": a}, "bn": {"running_mean": np.ones(4, "f")}}))
    with pytest.raises(pt.LoadError, match="`fc_weight` is missing"):
        pt.load(file, like=pt.from_tree({"fc": {"weight": a}}))


def test_sparse_arrays_become_dense_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a"
    two, index = np.ones((2, 3), "f"), np.array([0, 3])
    starts, columns = np.array([0, 1, 1, 2]), np.array([2, 0])
    file.write_bytes(
        of([sparse(1, (4, 3), two, index), sparse(2, (3, 3), two[0, :2], starts, columns)], ["r", "c"])
    )
    tree = pt.load(file)
    np.testing.assert_array_equal(tree.r, [[1] * 3, [0] * 3, [0] * 3, [1] * 3])
    np.testing.assert_array_equal(tree.c, [[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    for array in (
        sparse(1, (4, 3), two, np.array([0, 4])),
        sparse(1, (4, 3), two, np.array([-1, 3])),
        sparse(1, (4, 2), two, index),
        sparse(2, (3, 3), two[0, :2], np.array([0, 2, 1, 2]), columns),
        sparse(2, (3, 3), two[0, :2], np.array([0, 1, 1, 5]), columns),
        sparse(2, (3, 3), two[0, :2], starts, np.array([3, 0])),
        sparse(2, (3,), two[0, :2], starts, columns),
    ):
        file.write_bytes(of([array], ["a"]))
        with pytest.raises(
            pt.LoadError, match="array 0: is sparse, but its indices do not fit its shape"
        ):
            pt.load(file)
    file.write_bytes(of([sparse(1, (10**6, 10**6), np.ones((0, 10**6), "f"), index[:0])], ["a"]))
    with pytest.raises(pt.LoadError, match="would take 4,000,000,000,000 bytes of memory.*like="):
        pt.load(file)
