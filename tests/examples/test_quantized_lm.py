"""The example of post-training quantisation: eight bits keep the loss, and the file shrinks."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import paramtree as pt
from examples import char_lm, quantized_lm
from tests.helpers import lenient

pytestmark = pytest.mark.slow

TINY = ["--width", "16", "--layers", "2", "--heads", "2", "--context", "16", "--batch-size", "8"]
TINY += ["--lr", "0.03", "--steps", "30"]


@pytest.fixture(scope="module", autouse=True)
def lenient_optax() -> Iterator[None]:
    with lenient(char_lm):
        yield


def test_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = quantized_lm.main(TINY)
    whole, eight, four = results["float32"], results["int8"], results["int4"]
    assert abs(eight.loss - whole.loss) < 0.01 * whole.loss
    assert abs(four.loss - whole.loss) < 0.3 * whole.loss and four.loss != eight.loss
    assert eight.nbytes < 0.4 * whole.nbytes  # scales and norms are a fifth of so narrow a net
    assert eight.file_bytes < 0.6 * whole.file_bytes  # the rest is the header
    assert "int8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        quantized_lm.main([*TINY, "--base", str(tmp_path / "none.npz")])
    assert "none.npz" in capsys.readouterr().err


def test_every_weight_of_the_full_size_is_in_a_quarter_of_the_bytes() -> None:
    net = char_lm.network(char_lm.Settings())
    params = pt.init(net, jax.random.key(0), char_lm.ONE, ties=char_lm.TIES)
    rules = {quantized_lm.WEIGHTS: pt.parametrizations.Quantized(8)}
    expanded = pt.expand(params, rules)
    integers = pt.select(expanded, ".*integers")
    weights = pt.select(params, quantized_lm.WEIGHTS)
    assert 4 * pt.nbytes(integers) == pt.nbytes(weights)
    assert pt.nbytes(expanded) < 0.265 * pt.nbytes(params)
    assert pt.ties(expanded) == {
        f"decoder_weight_{part}": f"embed_weight_{part}" for part in ("integers", "scale")
    }
    for name, leaf in pt.collect(pt.fold(expanded, rules)).items():
        error = np.abs(np.asarray(leaf) - np.asarray(pt.collect(params)[name])).max()
        assert error <= np.abs(leaf).max() / 254 * 1.01, name
