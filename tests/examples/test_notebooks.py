"""The notebooks run from top to bottom, show the expected outputs, and are stored without outputs."""

import base64
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"

# Text expected in the outputs, by notebook and cell.
EXPECTED = {
    "chapter": {
        "params": "Parameter dense0_weight (shape=(8, 4), dtype=float32)",
        "collect": "['dense1_weight', 'dense1_bias']",
        "abstract": "Parameter dense0_weight (shape=(8, 1000000), dtype=float32)",
        "mismatch-error": "`dense0_weight` has shape (8, 4), but the model needs (8, 5)",
        "built-in": "[1. 1. 1. 1.]",
        "partial-rules": "[42. 42. 42.] [42.]",
        "replace": "[42. ",
        "assign-error": 'params = pt.replace(params, {"dense0_weight": value})',
        "tied": "Parameter dense2_weight (shape=(8, 8), dtype=float32, tied to dense1_weight)",
        "tie-set": "100.0",
        "tie-grad": "6 arrays tied, 8 untied",
        "save": "[[0.]\n [0.]]",
    },
    "inspection": {
        "show": "ParamTree: 9 leaves, 2,314 parameters, 16 of state",
        "show-text": "running_mean",
        "summary-table": "batchnorm0: BatchNorm",
        "stats": "min to max",
        "show-stats": "▕",
        "step": "loss: 0.",
        "plot-ratios": "with 1 Axes",
        "plot-histograms": "with 6 Axes",
        "plot-heatmap": "with 1 Axes",
        "plot-dense": "with 2 Axes",
        "diff": "Differences: 9 of 9 leaves in value",
        "diff-nothing": "Differences: 4 of 9 leaves in value",
        "lengths": "Not finite: 2 of 6 leaves",
    },
    "surgery": {
        "peek-file": "embed_tokens",
        "misfit-error": "`model.embed_tokens.weight` is unexpected.",
        "rename-load": "It computes what theirs does.",
        "new-head": "head_weight   shape        (5, 16)   (3, 16)",
        "train-head": "Differences: 2 of 11 leaves in value",
        "adapters": "256 numbers are trained instead of 1939",
        "fold-in": "Differences: 4 of 11 leaves in value",
        "tie-blocks": "1939 numbers, now 1395",
        "untie-blocks": "{'blocks_2_weight': 'blocks_1_weight', 'blocks_2_bias': 'blocks_1_bias'}",
        "scan": "Parameter blocks_weight (shape=(4, 16, 16), dtype=float32)",
        "save": "model.layers.3.linear.kernel",
        "before-after": "2 in structure, shapes and dtypes, 4 of 9 leaves in value",
    },
}


class SameInterpreter(KernelSpecManager):
    """Offers a single kernel, the Python that runs the tests, whatever is installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name=kernel_name,
            language="python",
        )


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def text_of(output: Any) -> str:
    return output.text if output.output_type == "stream" else output.data["text/plain"]


def test_these_are_all_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_is_kept_without_outputs_and_with_ids(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in ids)  # words, not random ids
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_runs_and_shows_what_it_says(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=SameInterpreter()),
        timeout=200,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(
        cleanup_kc=True,  # shuts the kernel down, as with the client's own manager
        env={
            **os.environ,
            "IPYTHONDIR": str(tmp_path / "ipython"),  # ignores the user's settings
            "JAX_PLATFORMS": "cpu",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            "PYTHONPATH": str(ROOT),
        },
    )
    shown = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        # A cell shows at most one result and prints no warning.
        assert len([output for output in outputs if output.output_type != "stream"]) <= 1, cell.id
        assert [output.text for output in outputs if output.get("name") == "stderr"] == [], cell.id
        shown[cell.id] = "\n".join(map(text_of, outputs))
        for output in outputs:
            if cell.id.startswith("plot-"):
                width, height = struct.unpack(">II", base64.b64decode(output.data["image/png"])[16:24])
                assert width <= 7 * 150 and height > 100
    for cell_id, text in EXPECTED[name].items():
        assert text in shown[cell_id], f"{cell_id} shows {shown[cell_id]}"
    assert list(tmp_path.iterdir()) == [tmp_path / "ipython"]  # it leaves no files behind
