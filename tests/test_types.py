"""Budgets of what hides a type or a layout, and the rule about positional arguments.

`pyright` itself runs in `.ci/run`; its settings are in pyproject.toml.
"""

import ast
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mambactl"
MODULES = sorted(PACKAGE.rglob("*.py"))
# uses of `Any`, comments that silence pyright, and calls whose layout is written by hand
MOST_ANY, MOST_IGNORES, MOST_LAID_OUT = 110, 40, 30
MOST_POSITIONAL = 8


def uses_of_any(tree: ast.AST) -> int:
    """Annotations and values that are `Any`, those inside of quotes too."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found += node.id == "Any"
        elif isinstance(node, ast.Attribute):
            found += node.attr == "Any"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += len(re.findall(r"[\[|,] ?Any\b|^Any$|\bAny[\]|]", node.value))
    return found


def comments(path: Path) -> Iterator[str]:
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.string


def is_kernel(function: ast.FunctionDef) -> bool:
    """True for a function that Triton compiles: its calls are of kernels as well."""
    return any("jit" in ast.unparse(each) for each in function.decorator_list)


def long_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls with too many positional arguments, outside of kernels and their launches."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and is_kernel(node):
            continue
        launches = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL and not launches:
            yield node
        yield from long_calls(node)


def test_few_types_are_any() -> None:
    counted = {path: uses_of_any(ast.parse(path.read_text())) for path in MODULES}
    most = sorted(counted, key=counted.__getitem__, reverse=True)[:5]
    where = ", ".join(f"{path.relative_to(ROOT)} {counted[path]}" for path in most)
    assert sum(counted.values()) <= MOST_ANY, where


def test_ignores_name_their_rule_and_are_few() -> None:
    silencing = [
        (path.relative_to(ROOT), comment)
        for path in MODULES
        for comment in comments(path)
        if re.search(r"#\s*(type:\s*ignore|pyright:)", comment)
    ]
    unnamed = [
        found for found in silencing if not re.search(r"pyright: (ignore\[\w+\]|basic,)", found[1])
    ]
    assert unnamed == []
    assert len(silencing) <= MOST_IGNORES


def test_layouts_by_hand_are_few_outside_of_kernels() -> None:
    files = [path for path in MODULES if not path.is_relative_to(PACKAGE / "kernels")]
    found = [path for path in files for comment in comments(path) if "fmt: skip" in comment]
    assert len(found) <= MOST_LAID_OUT


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_long_calls_name_their_arguments(path) -> None:
    calls = long_calls(ast.parse(path.read_text()))
    assert [f"{path}:{call.lineno}" for call in calls] == []


def test_pyright_checks_the_whole_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    assert (settings["include"], settings["typeCheckingMode"]) == (["mambactl"], "standard")
    assert "exclude" not in settings and "ignore" not in settings
    eased = {each["root"] for each in settings["executionEnvironments"] if len(each) > 2}
    assert eased == {"mambactl/kernels/decode/triton", "mambactl/kernels/sequence"}
    assert "bin/pyright" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("def f(x: Any): pass", 1),
        ("x: dict[str, typing.Any] = {}", 1),
        ('x: "dict[str, Any]" = {}', 1),
        ('"""Any padding is fine."""', 0),
        ("from typing import Any", 0),
    ],
)
def test_uses_of_any_are_counted(text, number) -> None:
    assert uses_of_any(ast.parse(text)) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("f(1, 2, 3, 4, 5, 6, 7, 8)", 0),
        ("f(1, 2, 3, 4, 5, 6, 7, 8, 9)", 1),
        ("f(1, 2, 3, 4, 5, 6, 7, 8, ninth=9)", 0),
        ("kernel[(1,)](1, 2, 3, 4, 5, 6, 7, 8, 9)", 0),
        ("kernel[(1,)](f(1, 2, 3, 4, 5, 6, 7, 8, 9))", 1),
        ("@triton.jit\ndef kernel(x): f(1, 2, 3, 4, 5, 6, 7, 8, 9)", 0),
        ("@cache\ndef g(x): f(1, 2, 3, 4, 5, 6, 7, 8, 9)", 1),
    ],
)
def test_long_calls_are_found(text, number) -> None:
    assert len(list(long_calls(ast.parse(text)))) == number
