"""The rules of the source tree: layout, direction of imports, sizes, and who may print."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mambactl"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "mambactl",
    "recipes",
    "tests",
    "completions",
}
LONGEST_FILE = 450
VAGUE_NAMES = {"utils", "helpers", "common", "misc"}

# what a folder may import besides itself; leaves are open to all and import no other part
LEAVES = {"errors", "console", "disk", "ranks", "recipe", "recipes", "__init__"}
LIBRARY = {"models", "kernels"}
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "checkpoint": LIBRARY,
    "data": LIBRARY,
    "decode": LIBRARY,
    "train": LIBRARY | {"data"},
    "measure": LIBRARY | {"decode", "data"},
    "stages": LIBRARY | {"checkpoint", "data", "decode", "train", "measure"},
    "cli": LIBRARY | {"checkpoint", "data", "decode", "train", "measure", "stages"},
    "__main__": {"cli"},
}
HEAVY = {"torch", "transformers", "datasets", "trl", "accelerate", "numpy", "safetensors"}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from mambactl import console` names the part in its aliases
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "mambactl" else [node.module]


def imported_at_load(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path) -> None:
    own = part(path)
    allowed = LEAVES | {own} | (set() if own in LEAVES else MAY_IMPORT[own])
    for name in imports(ast.parse(path.read_text())):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "mambactl" and target in LEAVES | MAY_IMPORT.keys():
            assert target in allowed, f"{own} imports {name}"


def test_the_command_line_loads_nothing_heavy() -> None:
    light = [path for path in MODULES if part(path) in LEAVES | {"cli", "__main__"}]
    for path in [*light, PACKAGE / "stages" / "__init__.py"]:
        loaded = {name.partition(".")[0] for name in imported_at_load(ast.parse(path.read_text()))}
        assert not loaded & HEAVY, path


def test_kernels_know_nothing_of_the_rest() -> None:
    for path in (PACKAGE / "kernels").rglob("*.py"):
        names = set(imports(ast.parse(path.read_text())))
        assert not {name for name in names if name.startswith("transformers")}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    assert path.stem not in VAGUE_NAMES


def test_every_module_and_public_name_is_described() -> None:
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(str(path))
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        missing += [f"{path}: {node.name}" for node in public if not ast.get_docstring(node)]
    assert missing == []


def test_nobody_prints() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"


def test_top_level_is_exactly_the_layout() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = {Path(line).parts[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL
