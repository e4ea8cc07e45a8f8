"""The source trees are one import package, whole in the wheel, and know each other one way only."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ffjax

ROOT = Path(__file__).resolve().parent.parent
TREES = {"ffjax": "ffjax", "cost": "ffjax/cost", "strategies": "ffjax/strategies", "examples": "ffjax/examples"}
"""Each source tree and where it is installed."""
PLUGIN = "pytest_ffjax.py"


def source_files() -> dict[Path, str]:
    """Each file of the distribution and its place in a wheel; a README and a user's project are for the repository."""
    return {ROOT / PLUGIN: PLUGIN} | {
        path: f"{installed}/{path.relative_to(ROOT / tree).as_posix()}"
        for tree, installed in TREES.items()
        for path in sorted((ROOT / tree).rglob("*"))
        if path.is_file() and not {"__pycache__", "own_project"} & set(path.parts) and path.suffix != ".md"
    }


def build(kind: str, source: Path, out: Path) -> Path:
    """Calls the build backend as a frontend would, but in this environment, so that no network is needed."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    out.mkdir()
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\nis this environment from `pip install -e '.[test]'`?"
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of the sdist of a clean copy: what a release would be."""
    tmp = tmp_path_factory.mktemp("build")
    for tree in TREES:
        shutil.copytree(ROOT / tree, tmp / "copy" / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", PLUGIN):
        shutil.copy(ROOT / name, tmp / "copy")
    with tarfile.open(build("sdist", tmp / "copy", tmp / "sdist")) as sdist:
        sdist.extractall(tmp / "unpacked", filter="data")
    (unpacked,) = (tmp / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp / "wheel")) as archive:
        yield archive


def test_wheel_has_every_module_and_data_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert sorted(names) == sorted(source_files().values()), "mend [tool.setuptools] packages or package-data"


def test_wheel_has_license_command_and_plugin(wheel: zipfile.ZipFile) -> None:
    info = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in info
    entry_points = wheel.read(info["entry_points.txt"]).decode()
    assert "ffjax = ffjax.cli:main" in entry_points
    assert "[pytest11]\npytest_ffjax = pytest_ffjax" in entry_points
    assert f"Version: {ffjax.__version__}" in wheel.read(info["METADATA"]).decode()


def test_installed_command_loads() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="ffjax")
    assert callable(command.load())


def test_pytest_neither_imports_jax_nor_warns_because_ffjax_is_installed() -> None:
    (plugin,) = importlib.metadata.entry_points(group="pytest11", name="pytest_ffjax")
    code = f"import sys, {plugin.module}; assert not {{'jax', 'ffjax'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    # What it looks for in a package that it would rewrite but finds imported; see `AssertionRewritingHook`.
    assert "PYTEST_DONT_REWRITE" in (ffjax.__doc__ or "")


def test_type_checkers_overlay_points_at_the_trees() -> None:
    overlay = ROOT / ".typing" / "ffjax"
    links = {link.name: link.resolve() for link in overlay.iterdir()}
    assert links == {
        "__init__.py": ROOT / "ffjax" / "__init__.py",
        "cost": ROOT / "cost",
        "examples": ROOT / "examples",
        "strategies": ROOT / "strategies",
    }


def test_folders_of_a_user_are_not_shadowed(tmp_path: Path) -> None:
    for name in ("cost", "strategies", "examples"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    code = "import ffjax.cost, ffjax.strategies, ffjax.examples, cost, strategies, examples; "
    code += "assert cost.MINE and strategies.MINE and examples.MINE"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


KNOWS = {
    "ffjax/ir": {"ffjax.ir"},
    "ffjax/cost": {"ffjax.ir", "ffjax.cost"},
    "ffjax/strategies": {"ffjax.ir", "ffjax.cost", "ffjax.strategies"},
    "ffjax/emit": {"ffjax.ir", "ffjax.emit"},
}
"""What a layer may import of ffjax, `ffjax.errors` aside; the top of the package knows all."""


class _WhatRuns(ast.NodeTransformer):
    """Drops imports that type checkers alone read."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports(path: Path, *, types: bool = True) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree if types else _WhatRuns().visit(tree)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("layer", KNOWS)
def test_layers_know_each_other_one_way_only(layer: str) -> None:
    allowed = {*KNOWS[layer], "ffjax.errors"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, installed in source_files().items()
        if installed.startswith(f"{layer}/") and path.suffix == ".py"
        for line, name in imports(path)
        if name.split(".")[0] == "ffjax" and not any(f"{name}.".startswith(f"{known}.") for known in allowed)
    ]
    assert not wrong


def test_the_search_never_sees_jax() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "strategies").rglob("*.py")
        for line, name in imports(path)
        if name.split(".")[0] in ("jax", "jaxlib")
    ]
    assert not wrong


def test_no_file_knows_one_that_knows_it() -> None:
    places = {path: place for path, place in source_files().items() if path.suffix == ".py"}
    modules = {
        place.removesuffix(".py").removesuffix("/__init__").replace("/", "."): place for place in places.values()
    }

    def known(name: str) -> str | None:
        """The file that an import reads: of a module, or of the one that has the name."""
        return modules.get(name) or modules.get(name.rpartition(".")[0])

    graph = {
        place: {file for _, n in imports(path, types=False) if (file := known(n)) and file != place}
        for path, place in places.items()
    }
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files
