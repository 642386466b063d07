"""Versions and extras: what another environment holds is said with the line that changes it."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from mambactl.cli.main import explain
from mambactl.requirements import EXTRAS, Outside, outside

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def demanding(monkeypatch) -> Outside:
    """A mambactl that needs another transformers than the one that is there."""
    lines = ["torch>=2", "transformers<99,>=98", 'lm-eval==1; extra == "eval"', "no-such-thing>1"]
    monkeypatch.setattr("importlib.metadata.requires", lambda package: lines)
    return Outside("transformers", version("transformers"), "<99,>=98")


def test_only_what_is_there_and_needed_counts(demanding) -> None:
    assert list(outside()) == [demanding]
    assert demanding.line == 'pip install "transformers<99,>=98"'


def test_doctor_names_a_version_outside_with_the_line_to_type(cli, demanding) -> None:
    done = cli("doctor")
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if "needs" in line)
    words = ("transformers", demanding.installed, demanding.needed, demanding.line)
    assert all(word in line for word in words)


def test_a_failure_in_another_version_is_no_bug(demanding) -> None:
    code, said, hint = explain(AttributeError("no attribute get_max_length"))
    assert (code, hint) == (6, demanding.line)
    assert f"needs transformers<99,>=98, not {demanding.installed}" in said


def test_the_installed_versions_are_inside() -> None:
    assert list(outside()) == []


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.module)
def test_a_missing_extra_is_a_sentence(extra) -> None:
    missing = ModuleNotFoundError("No module", name=f"{extra.module}.part")
    code, said, hint = explain(missing)
    assert (code, hint) == (6, extra.line)
    assert f'"mambactl[{extra.name}]"' in extra.line
    declared = PROJECT["optional-dependencies"][extra.name]
    assert any(need.startswith(extra.package) for need in declared)


def test_the_checks_run_the_oldest_version_of_the_range() -> None:
    need = next(line for line in PROJECT["dependencies"] if line.startswith("transformers"))
    oldest = re.search(r">=([\d.]+)", need)[1]
    assert f"oldest={oldest}\n" in (ROOT / ".ci" / "run").read_text()
