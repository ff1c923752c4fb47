"""What must hold for the files of a release. `make dist` builds them and runs this:

    python tests/check_dist.py dist .venv-dist/bin/python

The second is a Python into which the wheel alone was installed, without extras.
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXTRAS = ("orbax", "flatbuffers", "matplotlib", "optax", "h5py", "flax", "torch", "treescope", "pytest")


def check_archives(dist: Path) -> None:
    """Checks what the sdist and the wheel hold; the wheel was built from the sdist."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    assert wheel.name == f"paramtree-{version}-py3-none-any.whl"
    assert sdist.name == f"paramtree-{version}.tar.gz"
    package = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in (ROOT / "paramtree").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as file:
        held = {name: file.read(name) for name in file.namelist()}
    info = f"paramtree-{version}.dist-info/"
    described = {name.removeprefix(info): data for name, data in held.items() if name.startswith(info)}
    code = {name: data for name, data in held.items() if not name.startswith(info)}
    assert code == package, sorted(code.keys() ^ package.keys())  # so no tests, data or documents
    assert "paramtree/py.typed" in code
    assert described["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()

    with tarfile.open(sdist) as file:
        names = {m.name.partition("/")[2] for m in file.getmembers() if m.isfile()}
        stream: Any = file.extractfile(f"paramtree-{version}/LICENSE")
        assert stream.read() == (ROOT / "LICENSE").read_bytes()
    assert package.keys() < names
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "paramtree",
        "paramtree.egg-info", "pyproject.toml", "setup.cfg",
    }  # fmt: skip

    metadata = message_from_bytes(described["METADATA"])
    assert metadata["Name"] == "paramtree"
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"].startswith(">=3.")
    assert metadata["Keywords"] and metadata["Summary"]
    readme: Any = metadata.get_payload(decode=True)
    assert readme.decode().strip() == (ROOT / "README.md").read_text().strip()
    needed = {name.split(">")[0] for name in metadata.get_all("Requires-Dist") if "extra" not in name}
    assert needed == {"jax", "jaxlib", "chex", "rich", "safetensors"}
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()
    print(f"paramtree {version}: {len(code)} files in the wheel, {len(names)} in the sdist")


def check_bare(python: Path, version: str) -> None:
    """Checks that the installed wheel works alone, in a folder from which no checkout is imported."""
    with tempfile.TemporaryDirectory() as folder:
        for source in (Path(__file__), ROOT / "examples" / "parameter_management.py"):
            shutil.copy(source, folder)

        def run(*args: str) -> str:
            command = [str(python.absolute()), *args]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{args}:\n{done.stdout}\n{done.stderr}"
            return done.stdout

        print(run("-m", "pip", "check").strip())
        assert "tied" in run("parameter_management.py")
        assert version in run("-m", "paramtree", "--version")
        print(run("check_dist.py").strip())


def use_alone() -> None:
    """Uses the installed library, and each part whose package is missing."""
    import jax
    import jax.numpy as jnp

    import paramtree as pt
    from paramtree import nn

    installed = Path(pt.__file__)
    assert "site-packages" in installed.parts, installed
    assert (installed.parent / "py.typed").exists()
    assert pt.__version__ == importlib.metadata.version("paramtree")
    for name in EXTRAS:
        assert importlib.util.find_spec(name) is None, f"{name} is installed: the test needs it absent"

    net = nn.Sequential(nn.Dense(8, activation="relu"), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(3))
    x, key = jnp.ones((4, 5)), jax.random.key(0)
    params = pt.init(net, key, x, rules={".*weight": "he_normal"})
    y, new = jax.jit(pt.training(net))(params, x, key=key)
    assert y.shape == (4, 3)
    assert "mean" in repr(pt.diff(params, new))
    assert list(pt.collect(pt.grad(lambda p: net(p, x).sum(), ".*weight")(params))) == [
        "dense0_weight",
        "dense1_weight",
    ]
    rules = {"dense0_weight": pt.parametrizations.LoRA(rank=2)}
    low_rank = pt.expand(params, rules, key)
    pt.testing.assert_trees_close(pt.fold(low_rank, rules), params)
    outputs = pt.capture(pt.reparametrize(net, rules), "dense1")(low_rank, x)[1]
    assert list(pt.collect(outputs)) == ["dense1_output"]
    for report in (pt.show, pt.stats, pt.find_nonfinite):
        assert repr(report(params))
    assert "dense0" in repr(pt.summary(net, params, x))
    for ending in ("safetensors", "npz", "params"):
        pt.save(f"model.{ending}", params)
        pt.testing.assert_trees_equal(pt.load(f"model.{ending}", like=params), params)
    mesh = jax.make_mesh((1,), ("data",))
    places = pt.shardings(params, mesh, {".*": jax.sharding.PartitionSpec()})
    assert jax.device_put(params, places).dense0.weight.sharding.mesh == mesh
    assert pt.unpack(pt.pack(params)).dense0.weight.shape == (8, 5)

    missing = {
        "paramtree[orbax]": [
            lambda: pt.save("model.orbax", params),
            lambda: pt.Checkpoints("run").save(1, params),
        ],
        "paramtree[plots]": [lambda: pt.plots.histograms(params)],
        "paramtree[export]": [
            lambda: pt.save_model("net", net, params, x),
            lambda: pt.load_model("model.npz"),
        ],
        "pip install optax": [lambda: pt.plan(net, x, {"data": 1}, {".*": None})],
    }
    for advice, uses in missing.items():
        for use in uses:
            message = _message_of(use)
            assert advice in message, message
    print(
        f"paramtree {pt.__version__} works alone, with jax {jax.__version__} on {sys.version.split()[0]}"
    )


def _message_of(use: Callable[[], Any]) -> str:
    import paramtree as pt

    try:
        use()
    except (ImportError, pt.ParamTreeError) as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        use_alone()
    else:
        check_archives(Path(sys.argv[1]))
        (built,) = Path(sys.argv[1]).glob("*.whl")
        check_bare(Path(sys.argv[2]), built.name.split("-")[1])
