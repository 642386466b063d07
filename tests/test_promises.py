"""The tests that a document names for its promises are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "mambactl" / "docs" / "promises.md").read_text("utf-8")
ROWS = re.findall(r"^\|.*\|$", TEXT, flags=re.MULTILINE)
NAMED = sorted({name for row in ROWS for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", row)})


def test_every_promise_has_a_test() -> None:
    section = TEXT.split("## What is promised\n")[1].split("\n## ")[0]
    _, _, *promises = [line for line in section.splitlines() if line.startswith("|")]
    assert len(promises) > 10
    assert [row for row in promises if "::test_" not in row.split("|")[3]] == []


@pytest.mark.parametrize("name", NAMED)
def test_tests_that_are_named_exist(name) -> None:
    file, _, test = name.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
