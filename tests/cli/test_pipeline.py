"""`recipe run`: order, references, failure and resume, with a child process that only pretends."""

import json
import sys
from pathlib import Path

import pytest

from mambactl.cli import pipeline
from mambactl.errors import ModelError

RECIPE = """
stages:
  convert: {model: m, ratio: 0.25}
  distill: {data: [x], max_steps: 3}
  eval: {data: [y]}
  spec-decode@back: {model: m, draft: "${distill}"}
"""


@pytest.fixture
def children(monkeypatch) -> list[list[str]]:
    """The command lines of child processes; `fail` holds the stages that exit 7."""
    seen: list[list[str]] = []

    def child(command: list[str], json_errors: bool = False) -> tuple[int, str]:
        stage, source = command[3], command[4]
        seen.append(command[3:])
        if stage in fail:
            return 7, ""
        checkpoint = source
        if "-o" in command:
            checkpoint = command[command.index("-o") + 1]
            Path(checkpoint).mkdir(parents=True, exist_ok=True)
        return 0, json.dumps({"stage": stage, "checkpoint": checkpoint, "metrics": {}})

    fail: set[str] = set()
    child.fail = fail
    monkeypatch.setattr(pipeline, "_child", child)
    return seen


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "chain.yaml"
    path.write_text(RECIPE)
    return str(path)


def stages(children: list[list[str]]) -> list[str]:
    return [command[0] for command in children]


def test_sections_run_in_order_and_hand_on_checkpoints(cli, children, recipe, tmp_path) -> None:
    done = cli("recipe", "run", recipe)
    folder = tmp_path / "runs" / "chain"
    assert (done.code, done.out) == (0, f"{folder / 'distill'}\n")
    assert stages(children) == ["convert", "distill", "eval", "spec-decode"]
    assert [command[1] for command in children] == [
        "m",
        str(folder / "convert"),
        str(folder / "distill"),
        "m",
    ]
    assert f"draft={folder / 'distill'}" in children[3]
    assert "ratio=0.25" in children[0]
    assert 'data=["x"]' in children[1]


def test_sections_without_a_model(cli, children, tmp_path) -> None:
    path = tmp_path / "speed.yaml"
    path.write_text("stages: {bench@a: {synthetic: tiny}, bench@b: {synthetic: tiny-mamba}}")
    done = cli("recipe", "run", str(path))
    assert (done.code, done.out) == (0, f"{tmp_path / 'runs' / 'speed'}\n")
    assert [command[:3] for command in children] == [
        ["bench", "--set", "synthetic=tiny"],
        ["bench", "--set", "synthetic=tiny-mamba"],
    ]
    shown = json.loads(cli("recipe", "run", str(path), "--resume", "--json").out)
    assert shown["checkpoint"] is None and list(shown["sections"]) == ["bench@a", "bench@b"]


def test_failure_stops_with_its_code_and_resume_goes_on(
    cli, children, recipe, monkeypatch, tmp_path
) -> None:
    pipeline._child.fail.add("eval")
    done = cli("recipe", "run", recipe, "--out", "work")
    assert (done.code, done.out) == (7, "")
    assert f"mambactl recipe run {recipe} --out work --resume" in done.err
    pipeline._child.fail.clear()
    children.clear()
    assert cli("recipe", "run", recipe, "--out", "work").code == 5
    assert cli("recipe", "run", recipe, "--out", "work", "--resume").code == 0
    assert stages(children) == ["eval", "spec-decode"]


def test_resume_repeats_what_another_setting_changes(cli, children, recipe) -> None:
    cli("recipe", "run", recipe)
    children.clear()
    assert cli("recipe", "run", recipe, "--resume", "--set", "distill.max_steps=4").code == 0
    assert stages(children) == ["distill", "eval", "spec-decode"]
    # the stage itself would refuse to continue what was made differently
    assert "--force" in children[0] and "max_steps=4" in children[0]
    children.clear()
    assert cli("recipe", "run", recipe, "--resume", "--set", "convert.ratio=1").code == 0
    assert stages(children) == ["convert", "distill", "eval", "spec-decode"]
    assert ["--force" in command for command in children] == [True, True, False, False]
    children.clear()
    assert cli("recipe", "run", recipe, "--resume", "--set", "convert.ratio=1").code == 0
    assert children == []


def test_what_stands_on_a_replaced_checkpoint_stays_outdated(cli, children, recipe) -> None:
    cli("recipe", "run", recipe)
    changed = ("recipe", "run", recipe, "--resume", "--set", "convert.ratio=1")
    pipeline._child.fail.add("distill")
    assert cli(*changed).code == 7
    pipeline._child.fail.clear()
    children.clear()
    assert cli(*changed).code == 0
    assert stages(children) == ["distill", "eval", "spec-decode"]
    assert "--force" in children[0]


def test_without_resume_nothing_is_replaced(cli, children, recipe, tmp_path) -> None:
    cli("recipe", "run", recipe)
    (tmp_path / "runs" / "chain" / "convert.json").unlink()
    cli("recipe", "run", recipe, "--set", "distill.max_steps=4")
    assert not any("--force" in command for command in children)


@pytest.mark.slow
def test_resume_with_the_real_convert(python, tiny_llama_dir, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(f"stages: {{convert: {{model: {tiny_llama_dir}}}}}")
    given = ("-m", "mambactl", "recipe", "run", "c.yaml", "--out", "w")
    assert python(*given).code == 0
    done = python(*given, "--resume", "--set", "convert.ratio=1")
    assert (done.code, done.out) == (0, f"{tmp_path / 'w' / 'convert'}\n"), done.err
    config = json.loads((tmp_path / "w" / "convert" / "config.json").read_text())
    assert config["mixers"] == ["mamba2_window"] * 4


def test_hints_repeat_folder_and_settings(cli, children, recipe) -> None:
    given = ("recipe", "run", recipe, "--out", "my work", "--set", "convert.ratio=1")
    again = f"mambactl recipe run {recipe} --out 'my work' --set convert.ratio=1"
    assert f"{again} --to convert" in cli(*given, "--from", "eval").err
    assert cli(*given).code == 0
    assert f"{again} --resume" in cli(*given).err


def test_a_person_reads_sentences_and_a_program_json(cli, fake_stage, monkeypatch) -> None:
    script = [sys.executable, "-c", "import os; print(os.environ.get('_MAMBACTL_PLAIN_ERRORS'))"]
    assert pipeline._child(script) == (0, "1\n")
    assert pipeline._child(script, json_errors=True) == (0, "None\n")
    fake_stage("convert", raises=ModelError("broken", "mend it"))
    monkeypatch.setenv("_MAMBACTL_PLAIN_ERRORS", "1")
    assert "error: broken\nhint: mend it\n" in cli("convert", "m", "--json").err


def test_no_code_of_the_current_folder_runs(python, tiny_llama_dir, tmp_path) -> None:
    for module in ("yaml", "json", "torch", "colorsys", "sitecustomize", "usercustomize"):
        (tmp_path / f"{module}.py").write_text(f"open('{module} ran', 'w').close()\n")
    (tmp_path / "one.yaml").write_text(f"stages: {{convert: {{model: '{tiny_llama_dir}'}}}}")
    done = python("-P", "-m", "mambactl", "recipe", "run", "one.yaml", "--out", "made")
    assert (done.code, done.out) == (0, f"{tmp_path / 'made' / 'convert'}\n"), done.err
    assert list(tmp_path.glob("* ran")) == []
    # the same without -P is Python's own rule, and shows that these files would run
    assert python("-m", "mambactl", "recipe", "run", "one.yaml", "--out", "again").code != 0
    assert [path.name for path in tmp_path.glob("* ran")] != []


def test_the_command_itself_runs_no_code_of_the_current_folder(python, tmp_path) -> None:
    for module in ("yaml", "typer", "mambactl", "sitecustomize"):
        (tmp_path / f"{module}.py").write_text(f"open('{module} ran', 'w').close()\n")
    # what pip installs as `mambactl`: Python runs it by its path, whose folder it searches
    script = tmp_path / "bin" / "mambactl"
    script.parent.mkdir()
    script.write_text("from mambactl.cli.main import main\nmain()\n")
    done = python(str(script), "recipe", "show", "quickstart")
    assert done.code == 0 and "smollm2-135m" in done.out, done.err
    assert list(tmp_path.glob("* ran")) == []


def test_json_errors_are_the_last_line_of_a_recipe(cli, children, recipe) -> None:
    pipeline._child.fail.add("convert")
    assert "warning" not in cli("recipe", "run", recipe, "--json").err


def test_force_runs_everything_again(cli, children, recipe) -> None:
    cli("recipe", "run", recipe)
    children.clear()
    assert cli("recipe", "run", recipe, "--force").code == 0
    assert stages(children) == ["convert", "distill", "eval", "spec-decode"]
    assert "--force" in children[0] and "--force" not in children[2]


def test_from_and_to(cli, children, recipe) -> None:
    assert cli("recipe", "run", recipe, "--from", "eval").code == 2
    assert cli("recipe", "run", recipe, "--from", "eval", "--to", "convert").code == 2
    assert cli("recipe", "run", recipe, "--to", "distill").code == 0
    assert stages(children) == ["convert", "distill"]
    children.clear()
    assert cli("recipe", "run", recipe, "--from", "eval").code == 0
    assert stages(children) == ["eval", "spec-decode"]


def test_dry_run_shows_the_commands_only(cli, children, recipe, tmp_path) -> None:
    done = cli("recipe", "run", recipe, "--dry-run")
    assert (done.code, done.out, children) == (0, "", [])
    assert "[2/4] mambactl distill" in done.err
    assert not (tmp_path / "runs").exists()


def test_json_holds_every_section(cli, children, recipe) -> None:
    found = json.loads(cli("recipe", "run", recipe, "--json").out)
    assert list(found["sections"]) == ["convert", "distill", "eval", "spec-decode@back"]
    assert found["checkpoint"].endswith("/distill")
