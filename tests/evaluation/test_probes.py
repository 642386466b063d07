"""The table of probes: a new row, or a new number of a row, is known everywhere at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WORDS
from fixtures.surprise_probe import SurpriseOptions, SurpriseProbe

from mambactl.commands import eval as eval_command
from mambactl.errors import CheckError, UsageError
from mambactl.evaluation import agreement, probes
from mambactl.evaluation.probes import PROBES, EvalConfig, eval_options
from mambactl.metrics import METRICS, Metric, percent
from mambactl.report import compare
from mambactl.report.page import write_report

pytest.importorskip("matplotlib")

PROGRAM = Path(__file__).parents[1] / "fixtures" / "surprise_probe.py"


@pytest.fixture
def added(monkeypatch):
    """The options of an `eval` whose table has one row more."""
    monkeypatch.setitem(PROBES, SurpriseProbe.name, SurpriseProbe())
    return eval_options(PROBES.values())


@pytest.fixture
def folder(tmp_path, save_student):
    return str(save_student(tmp_path / "a"))


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_text(" ".join(WORDS) + "\n" + " ".join(WORDS[::-1]) + "\n", "utf-8")
    return str(path)


def measured(folder: str) -> dict:
    (path,) = Path(folder, "results").glob("eval-*.json")
    return json.loads(path.read_text("utf-8"))["metrics"]


def call(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=300,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


def test_a_new_probe_is_known_everywhere(folder, lines, tmp_path):
    """One file and one row: an option, JSON, a table, kept results, a page and the card."""
    page = tmp_path / "page.html"
    done = call(
        "eval", folder, "--device", "cpu", "--surprise", lines, "--report", str(page), "--json",
        "--fail-under", "odd.tame_lines>=0,line_loss<=1e9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["metrics"]["surprise"]["odd"]
    assert found["line_loss"] > 0 and 0 <= found["tame_lines"] <= 1
    said = done.stderr.splitlines()
    title = next(line for line in said if line.startswith(f"eval: surprise of {folder}"))
    table = said[said.index(title) + 1 :]
    assert any("loss of a line" in line and "tame lines" in line for line in table)
    assert any(f"{found['line_loss']:.4f}" in line for line in table)
    assert measured(folder)["surprise"]["odd"] == found
    assert Path(folder, "results", "eval-odd.json").is_file()
    text = page.read_text("utf-8")
    assert "<h2>Surprise</h2>" in text and "How unexpected a line is." in text
    assert "On odd" in text and f"{100 * found['tame_lines']:.1f} %" in text
    card = Path(folder, "README.md").read_text("utf-8")
    assert "| surprise | odd line loss | odd tame |" in card
    assert f"| {found['line_loss']:.1f} | {100 * found['tame_lines']:.1f} % |" in card


def test_the_option_of_a_new_probe_is_in_the_help(added):
    names = list(added.model_fields)
    assert names[-3:] == ["surprise", "fail_under", "report"]
    assert names == [*list(EvalConfig.model_fields)[:-2], *names[-3:]]
    assert added(surprise="a.txt,b.txt").surprise == ["a.txt", "b.txt"]
    with pytest.raises(ValueError, match="surprise"):
        EvalConfig(surprise="a.txt")
    done = call("eval", "--help")
    assert "--surprise" in done.stdout and "texts (.txt) that are read" in done.stdout


def test_a_new_probe_is_compared_and_bounded(
    added, folder, lines, save_student, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "200")
    models = [folder, str(save_student(tmp_path / "b"))]
    config = added(device="cpu", surprise=lines, report=str(tmp_path / "both.html"))
    result = compare.run(config, models, eval_command)
    rows = capsys.readouterr().err.partition("2 models")[2]
    loss = result.metrics["models"][0]["metrics"]["surprise"]["odd"]["line_loss"]
    assert "odd line loss" in rows and f"{loss:.1f}" in rows
    assert (tmp_path / "both.html").read_text("utf-8").count(">odd line loss<") == 1
    # a bound is known before anything is measured, with its direction
    for bound, message in (
        ("line_loss=1", "better when lower"),
        ("unknown>=1", "known are line_loss, tame_lines, also as NAME.METRIC for odd"),
    ):
        failing = config.model_copy(update={"fail_under": [bound]})
        with pytest.raises(UsageError) as refused:
            eval_command.plan(failing, folder)
        assert message in f"{refused.value} {refused.value.hint}"
    failing = config.model_copy(update={"fail_under": ["odd.line_loss<=0.01"]})
    with pytest.raises(CheckError, match="odd.line_loss is"):
        eval_command.run(failing, folder)


def test_without_its_row_nobody_knows_it(folder, lines, tmp_path):
    config = eval_options([*PROBES.values(), SurpriseProbe()])(device="cpu", surprise=lines)
    with pytest.raises(UsageError, match="nothing to measure"):
        eval_command.run(config, folder)
    kept = {"checkpoint": folder, "metrics": {"surprise": {"odd": {"line_loss": 1.0}}}}
    (tmp_path / "kept.json").write_text(json.dumps(kept), "utf-8")
    with pytest.raises(UsageError, match="holds no measurement"):
        write_report([tmp_path / "kept.json"], tmp_path / "page.html", "x")


def test_a_new_number_of_a_probe_is_known_everywhere(
    folder, tiny_llama_dir, tmp_path, monkeypatch, capsys
):
    """One entry of METRICS beside the line that computes it."""
    number = Metric("first_token", "same first token", percent, "higher", summary="first")
    monkeypatch.setitem(METRICS, "generation", (*METRICS["generation"], number))
    compute = agreement.generation_agreement

    def more(pairs):
        first = [one.student[:1] == one.teacher[:1] for one in pairs]
        return compute(pairs) | {"first_token": sum(first) / len(first)}

    monkeypatch.setattr(agreement, "generation_agreement", more)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS[:3]) + "\n", "utf-8")
    page = tmp_path / "page.html"
    config = EvalConfig(
        device="cpu", generation_agreement=str(prompts), generation_tokens=4, report=str(page),
        fail_under=["generation.first_token>=0"],
    )  # fmt: skip
    result = compare.run(config, [folder], eval_command)
    share = result.metrics["generation"]["generation"]["first_token"]
    assert measured(folder)["generation"]["generation"]["first_token"] == share
    assert f"first_token {share:.4f}" in " ".join(capsys.readouterr().err.split())
    text = page.read_text("utf-8")
    # in the section of the probe, and among all numbers of the model
    assert "same first token" in text and ">first<" in text
    assert "| same text | first |" in Path(folder, "README.md").read_text("utf-8")
    failing = config.model_copy(update={"fail_under": ["first_token>=1.5"]})
    with pytest.raises(CheckError, match="generation.first_token is"):
        compare.run(failing, [folder], eval_command)


def test_options_follow_from_the_rows():
    assert list(eval_options(PROBES.values()).model_fields) == list(EvalConfig.model_fields)
    without = eval_options(probe for name, probe in PROBES.items() if name != "needle")
    gone = [name for name in EvalConfig.model_fields if name not in without.model_fields]
    assert gone and all(name.startswith("needle") for name in gone)
    assert SurpriseOptions not in probes.HELP


def test_rows_say_how_they_are_measured():
    """Data sets of two students with different teachers are told apart by what the row says."""
    relative = [name for name, probe in PROBES.items() if probe.teacher == "needed"]
    assert relative == ["fidelity", "layers", "long_context", "preferences", "generation"]
    assert [name for name, probe in PROBES.items() if probe.alone] == ["tasks"]
    assert [name for name, probe in PROBES.items() if probe.controlled] == ["fidelity", "recall"]
