"""The Fashion-MNIST example: losses equal to plain JAX, resumption, and errors."""

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paramtree as pt
from examples import fashion_mnist as example
from paramtree import initializers as init

pytestmark = pytest.mark.slow

QUICK = ["--batch-size", "128", "--lr", "0.1", "--init", "xavier"]
KINDS = pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def data() -> example.Data:
    if not example.DEBIAN.is_dir():
        pytest.importorskip("sklearn")
    return example.load_data()


def fails(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(args)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


# The network


def hand_loss(p: Any, x: Any, y: Any) -> Any:
    """The network in plain JAX: ``shared`` is stored once and used twice."""
    for name in ("hidden", "shared", "shared"):
        x = jax.nn.relu(x @ p[name]["weight"].T + p[name]["bias"][None])
    logits = x @ p["out"]["weight"].T + p["out"]["bias"][None]
    # The same formula as the example's: at this rate the net amplifies differences in the last bit, and
    # after 150 steps the losses differ in the fourth digit.
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def hand_step(p: Any, x: Any, y: Any) -> tuple[Any, Any]:
    loss, grads = jax.value_and_grad(hand_loss)(p, x, y)
    return jax.tree.map(lambda leaf, grad: leaf - 0.5 * grad, p, grads), loss


def test_the_losses_are_those_of_plain_jax(data: example.Data) -> None:
    net, tx = example.network(), optax.sgd(0.5)
    rules = {".*weight": init.Normal(0.01), ".*bias": init.Zero()}
    params = pt.init(net, jax.random.key(0), data.x[:1], rules=rules)
    copied = jax.tree.map(np.array, params)  # the step donates the tree
    hand: Any = {
        "hidden": copied.dense0.to_dict(),
        "shared": copied.dense1.to_dict(),
        "out": copied.dense3.to_dict(),
    }
    state, step = tx.init(params), example.make_step(net, tx)
    batch = min(256, len(data.y) // 4)
    count = min(200, len(data.y) // batch)
    ours, theirs = [], []
    with jax.default_matmul_precision("float32"):
        for i in range(200):
            rows = slice(i % count * batch, (i % count + 1) * batch)  # the first 51,200 images
            params, state, loss, _ = step(params, state, data.x[rows], data.y[rows])
            hand, other = hand_step(hand, data.x[rows], data.y[rows])
            ours.append(loss)
            theirs.append(other)
    ours, theirs = map(np.array, jax.device_get((ours, theirs)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert params[1].weight is params[2].weight


@KINDS
def test_a_tie_is_one_array_with_two_names(tie: bool) -> None:
    params = pt.abstract(example.network(tie), jax.ShapeDtypeStruct((1, 784), jnp.float32))
    assert len(pt.collect(params, aliases=True)) == 8
    assert len(jax.tree.leaves(params)) == (6 if tie else 8)
    one_layer = 256 * 256 + 256
    assert pt.count(params) == 784 * 256 + 256 + one_layer * (1 if tie else 2) + 256 * 10 + 10


def test_the_step_is_traced_once(data: example.Data) -> None:
    net, tx = example.network(), optax.sgd(0.5)
    params = pt.init(net, jax.random.key(0), data.x[:1])
    state, step = tx.init(params), example.make_step(net, tx)
    for _ in range(3):
        params, state, *_ = step(params, state, data.x[:32], data.y[:32])
    assert step._cache_size() == 1


# A run


@KINDS
@pytest.mark.usefixtures("digits")
def test_it_runs_on_digits(tie: bool, capsys: pytest.CaptureFixture[str]) -> None:
    results = example.main([*QUICK, "--epochs", "2", "--tie" if tie else "--no-tie"])
    printed = capsys.readouterr().out
    assert [result.epoch for result in results] == [1, 2]
    assert results[1].loss < results[0].loss < 2.5
    assert 0.2 < results[1].test_accuracy <= 1
    assert "`make data`" in printed and "--data" in printed and "digits: 1437 images" in printed
    assert ("dense1_weight = dense2_weight" in printed) == tie
    assert ("dense1_bias = dense2_bias" in printed) == tie
    table = printed.split("|gradient|")[1].strip().splitlines()
    assert len(table) == (6 if tie else 8)
    assert all(float(line.split()[-1]) > 0 for line in table)  # each has a gradient


@pytest.mark.skipif(not example.DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_it_learns_fashion_in_an_epoch() -> None:
    (result,) = example.main(["--epochs", "1", "--lr", "0.1", "--init", "xavier"])
    assert result.test_accuracy > 0.7


@pytest.mark.usefixtures("digits")
def test_a_resumed_run_is_the_one_that_was_never_interrupted(tmp_path: Path) -> None:
    whole, first, second = (tmp_path / f"{name}.safetensors" for name in ("whole", "first", "second"))
    expected = example.main([*QUICK, "--seed", "3", "--epochs", "2", "--checkpoint", str(whole)])
    begun = example.main([*QUICK, "--seed", "3", "--epochs", "1", "--checkpoint", str(first)])
    resume = ["--epochs", "2", "--resume", str(first), "--checkpoint", str(second)]
    resumed = example.main([*QUICK, *resume])
    assert [result[:4] for result in begun + resumed] == [result[:4] for result in expected]
    assert whole.read_bytes() == second.read_bytes()
    saved = pt.load(whole)
    names = {f"params_dense{i}_{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    assert set(pt.collect(saved)) == {"epoch", "seed"} | names
    assert (saved.epoch, saved.seed) == (2, 3)
    assert saved.params.dense2.weight is saved.params.dense1.weight
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (whole, first, second)}
    assert example.main([*QUICK, "--epochs", "2", "--resume", str(second)]) == []  # no epochs are left


@pytest.mark.usefixtures("digits")
def test_a_file_that_is_not_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.safetensors"
    example.main([*QUICK, "--epochs", "1", "--no-tie", "--checkpoint", str(file)])
    message = r"`params.dense1.weight` and `params.dense2.weight` are tied to one leaf, .* but differ in 65,?536 of"
    fails(capsys, ["--resume", str(file)], message)
    for content in (b"", b"text", file.read_bytes()[:-1000]):
        file.write_bytes(content)
        fails(capsys, ["--resume", str(file)], r"run\.safetensors: is ")
    fails(capsys, ["--resume", str(tmp_path / "none.npz")], r"No such file .*none\.npz")


@pytest.mark.usefixtures("digits")
def test_options_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["--batch-size", "2000"], "--batch-size is from 1 to 1437")
    fails(capsys, ["--batch-size", "0"], "--batch-size is from 1 to 1437")
    fails(capsys, ["--checkpoint", str(tmp_path / "no" / "run.npz")], "there is no folder .*no")


# The data


def idx(array: np.ndarray) -> bytes:
    """Returns an array as the bytes of an idx.gz file."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder of random data in the right format."""
    rng = np.random.default_rng(0)
    for (images, labels), size in ((example.TRAIN, 40), (example.TEST, 20)):
        (tmp_path / images).write_bytes(idx(rng.integers(0, 256, (size, 28, 28))))
        (tmp_path / labels).write_bytes(idx(rng.integers(0, 10, size)))
    return tmp_path


def test_a_folder_of_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = example.load_data(folder)
    assert data.x.shape == (40, 784) and data.x.dtype == np.float32
    assert data.test_y.shape == (20,) and data.test_y.dtype == np.int32
    assert data.x.min() == 0 and data.x.max() == 1
    results = example.main(["--data", str(folder), "--batch-size", "16", "--epochs", "1"])
    assert len(results) == 1
    assert "Fashion-MNIST: 40 images" in capsys.readouterr().out


WRONG = {
    "text": (lambda content: b"text", "is truncated or no gzip file: Not a gzipped file"),
    "truncated": (lambda content: content[: len(content) // 2], "is truncated or no gzip file: "),
    "empty": (lambda content: b"", "is no idx file of bytes"),
    "of other bytes": (lambda content: gzip.compress(b"text" * 9), "is no idx file of bytes"),
    "only a head": (lambda content: gzip.compress(gzip.decompress(content)[:6]), "is no idx file"),
    "short": (
        lambda content: gzip.compress(gzip.decompress(content)[:-3]),
        "should have .* bytes, and",
    ),
    "damaged": (
        lambda content: content[:30] + bytes(8) + content[38:],
        "is truncated or no gzip file: ",
    ),
}


@pytest.mark.parametrize("name", [*example.TRAIN, *example.TEST])
@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_file_is_named(folder: Path, change: str, name: str) -> None:
    make, message = WRONG[change]
    (folder / name).write_bytes(make((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{re.escape(name)} {message}"):
        example.load_data(folder)


def test_files_that_do_not_go_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = (folder / name for name in example.TRAIN)
    kept = labels.read_bytes()
    labels.write_bytes((folder / example.TEST[1]).read_bytes())
    fails(capsys, ["--data", str(folder)], "train-images.* has 40 images, train-labels.* 20 labels")
    labels.write_bytes(images.read_bytes())
    fails(capsys, ["--data", str(folder)], "train-labels.* is no idx file of bytes in 1 dimensions")
    labels.write_bytes(idx(np.full(40, 10)))
    fails(capsys, ["--data", str(folder)], "train-labels.* should have labels from 0 to 9")
    labels.write_bytes(kept)
    assert example.load_data(folder).y.shape == (40,)


def test_missing_files_are_all_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in example.TEST:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {', '.join(example.TEST)}. Name the folder"):
        example.load_data(folder)
    fails(
        capsys, ["--data", str(folder / "none")], f"none lacks {example.TRAIN[0]}, {example.TRAIN[1]}, "
    )


def test_without_any_data_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "DEBIAN", tmp_path / "not-installed")
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    fails(capsys, [], "There are no digits either: `pip install scikit-learn` brings them")
