"""What the documents say runs, and what is public is documented."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import paramtree as pt

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_blocks_of_the_readme_run_and_print_what_they_say(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    code = [text for language, text in BLOCKS if language == "python"]
    assert code
    for language, text in BLOCKS:
        if language == "python":
            capsys.readouterr()
            exec(compile(text, "README.md", "exec"), scope)
        elif language == "text":
            assert capsys.readouterr().out == text


def test_the_first_lines_of_the_readme_are_the_two_commands() -> None:
    assert BLOCKS[0][0] == "sh"
    assert [line.split(" #")[0].strip() for line in BLOCKS[0][1].splitlines()] == [
        "make demo",
        "make test",
    ]
    assert re.search(r"^\s*make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def public() -> dict[str, Any]:
    found = {}
    for module in (pt, pt.nn, pt.initializers, pt.testing, pt.plots):
        for name in module.__all__ if module in (pt.testing, pt.plots) else dir(module):
            value = getattr(module, name)
            if (
                not name.startswith("_")
                and callable(value)
                and value.__module__.startswith("paramtree")
            ):
                found[f"{module.__name__}.{name}"] = value
    return found


@pytest.mark.parametrize("name", public())
def test_everything_public_is_documented_with_an_example(name: str) -> None:
    value = public()[name]
    doc = inspect.getdoc(value) or ""
    assert doc
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        assert ">>>" in doc, f"{name} has no example"
    if inspect.isclass(value):
        for method, member in vars(value).items():
            if not method.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method} is not documented"
    else:
        for parameter in inspect.signature(value).parameters:
            assert re.search(rf"\*{{0,2}}{parameter}\b", doc), f"{name} does not describe {parameter}"


def test_importing_loads_jax_and_paramtree_only() -> None:
    code = "import sys, jax, jax.numpy; before = set(sys.modules); import paramtree; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = {name.split(".")[0] for name in run.stdout.split()}
    assert "paramtree" in new
    assert new <= {"paramtree", "jax"}  # older versions of jax load jax.export only when asked to


# The packages that the library imports, and the files that may; numpy and ml_dtypes are jax's own.
USED = {
    "chex": {"testing.py"},
    "etils": {"orbax.py"},
    "matplotlib": {"picture.py", "plots.py"},
    "optax": {"plan.py"},
    "orbax": {"orbax.py", "processes.py"},
    "rich": {"progress.py", "report.py"},
    "safetensors": {"safetensors.py"},
    "treescope": {"show.py"},
}


def test_other_packages_are_imported_where_they_are_used_only() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "paramtree").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for package in {name.split(".")[0] for name in names}:
                if package not in sys.stdlib_module_names | {"jax", "ml_dtypes", "numpy", "paramtree"}:
                    found.setdefault(package, set()).add(path.name)
    assert found == USED


def test_every_dependency_is_justified() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    packages = {re.split(r"[^\w-]", name)[0] for name in [*project["dependencies"], *extras]}
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2].partition("\n## ")[0]
    rows = {
        name for row in re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE) for name in row.split(", ")
    }
    assert packages - {"paramtree"} == rows - {"package"}


@pytest.mark.slow
def test_any_room_can_be_imported_first() -> None:
    rooms = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "paramtree").rglob("*.py")
    ]
    code = """if True:
        import importlib, sys
        registering = ["paramtree.core.tree", "paramtree.core.errors", "paramtree.core.arrays",
                       "paramtree.core.structure", "paramtree.model.scope",
                       "paramtree.io.export", "paramtree.packed"]
        for room in sys.argv[1:]:
            for name in [name for name in sys.modules if name.startswith("paramtree")]:
                if name not in registering:  # jax allows a class to be registered but once
                    del sys.modules[name]
            importlib.import_module(room)
    """
    args = [sys.executable, "-c", code, *rooms]
    subprocess.run(args, check=True, capture_output=True)


ROOMS = [
    {"typing", "compat"}, {"core"}, {"verbs"}, {"sharding"}, {"initializers"}, {"model"}, {"nn", "parametrizations"}, {"io"}, {"inspect"},
    {"packed", "testing", "command"}, {"api", "__main__", "__init__"},
]  # fmt: skip
FILES = sorted((ROOT / "paramtree").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """The modules of paramtree that a file imports, also in functions, with the names it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "paramtree":
            yield from ((node.module, alias.name) for alias in node.names)


def test_imports_go_one_way() -> None:
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    for path in FILES:
        room = path.relative_to(ROOT / "paramtree").parts[0].removesuffix(".py")
        for module, name in imports(path):
            used = module.split(".")[1] if "." in module else name
            if used in level and room not in ("api", "__init__"):
                same = used == room
                assert same or level[used] < level[room], f"{path} imports {used}, which is below it"


def test_private_names_stay_in_their_module() -> None:
    fields = {"_leaves", "_structure", "_place", "_flat"}
    for path in FILES:
        for module, name in imports(path):
            private = name.startswith("_") and name != "__version__"
            assert not private, f"{path} imports {name} of {module}"
        if path.parts[-2:] == ("core", "tree.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in fields:
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert own, f"{path}:{node.lineno} reads {node.attr} of another object"


def test_files_are_small() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert {path.name: count for path, count in lines.items() if count > 400} == {}
    core = {path.name: count for path, count in lines.items() if path.parent.name == "core"}
    assert sum(core.values()) <= 1200, core
    assert len(list((ROOT / "paramtree").glob("*.py"))) <= 8


def test_no_public_name_is_also_a_module() -> None:
    rooms = {path.stem for path in (ROOT / "paramtree").iterdir()}
    assert rooms & set(dir(pt)) == {
        "nn",
        "initializers",
        "parametrizations",
        "testing",
    }  # else importing the module would hide it


def test_a_misspelt_public_name_is_suggested() -> None:
    with pytest.raises(AttributeError, match="no attribute 'colect'. Did you mean `collect`"):
        pt.colect  # noqa: B018  # reading is the test
    assert "collect" in dir(pt)


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pt.__version__)
    changes = re.findall(
        r"^## (\d\S*)(?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert changes[0][0] == pt.__version__  # what comes next is under "Unreleased"
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {pt.__version__}\ndate-released: {changes[0][1]}\n" in citation
    assert f" to {pt.__version__.rpartition('.')[0]}\n" in (ROOT / "docs" / "upgrading.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = re.search(r"jax>=([\d.]+)", " ".join(project["dependencies"]))
    assert oldest
    assert jax.__version_info__ >= tuple(map(int, oldest[1].split(".")))
    assert f"jax {oldest[1]} or newer" in (ROOT / "docs" / "start" / "install.md").read_text()
