"""Checkpoints, unfinished runs and results of an earlier version load, resume and report.

`make_fixtures.py` says how they were made. Everything goes through the command line.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compatibility.logits import logits_of
from compatibility.page_rows import rows_of
from safetensors.torch import load_file

from mambactl.cli.main import run

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text("utf-8"))
SINGLE_FILES = [name for name in EXPECTED["checkpoints"] if name.endswith(".st")]
FOLDERS = [name for name in EXPECTED["checkpoints"] if name not in SINGLE_FILES]

Command = Callable[..., str]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A copy of the fixtures as they were when they were made, and the working directory."""
    folder = tmp_path.resolve()
    shutil.copytree(FIXTURES, folder, dirs_exist_ok=True)
    for packed in folder.rglob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    for record in folder.glob("*.partial/run.json"):
        record.write_text(record.read_text("utf-8").replace("{fixtures}", str(folder)), "utf-8")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def mambactl(capfd) -> Command:
    """mambactl("inspect", "t.st") -> what the command writes to stdout; it must end with 0."""

    def call(*arguments: str) -> str:
        code = run(list(arguments))
        written = capfd.readouterr()
        assert code == 0, written.err
        return written.out.removesuffix("\n")

    return call


def test_there_is_one_of_each() -> None:
    mixers = {tuple(kept["inspect"]["mixers"]) for kept in EXPECTED["checkpoints"].values()}
    assert {name for layers in mixers for name in layers} == {
        "attention", "mamba1", "mamba2", "mamba2_window",
    }  # fmt: skip
    assert {kept["inspect"]["rotary"] for kept in EXPECTED["checkpoints"].values()} == {True, False}
    assert [f"{name}.st" for name in FOLDERS] == SINGLE_FILES
    assert {kept["command"][0] for kept in EXPECTED["runs"].values()} == {"distill", "sft", "dpo"}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_the_logits_it_gave(place, name) -> None:
    expected = load_file(place / "logits.safetensors")[name]
    # bitwise on the kind of CPU that made them; 2e-6 was the most that another instruction set did
    torch.testing.assert_close(logits_of(place / name), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_a_single_file_gives_what_its_folder_gives(place, mambactl, name) -> None:
    teacher = ("--teacher", name.removesuffix(".st"), "--data", "held-out.jsonl")
    metrics = json.loads(mambactl("eval", name, *teacher, "--device", "cpu", "--json"))["metrics"]
    found = metrics["fidelity"]["held-out"]
    assert abs(found["kl"]) < 1e-9 and found["agreement"] == 1


@pytest.mark.parametrize("name", EXPECTED["checkpoints"])
def test_greedy_text_stays(place, mambactl, name) -> None:
    expected = EXPECTED["checkpoints"][name]
    assert mambactl("generate", name, *expected["generate"]) == expected["text"]


@pytest.mark.parametrize("name", EXPECTED["checkpoints"])
def test_inspect_shows_what_it_showed(place, mambactl, name) -> None:
    shown = mambactl("inspect", name, "--json").replace(f"{place}/", "")
    found = json.loads(shown)
    # later than the fixtures
    parts = {"kv", "windows", "rings", "states", "total"}
    assert set(found.pop("session")["bytes"]) == parts
    assert all(parts <= set(each) for each in found.pop("sequences").values())
    assert found == EXPECTED["checkpoints"][name]["inspect"]


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_an_unfinished_run_ends_as_the_whole_one(place, mambactl, name) -> None:
    kept = EXPECTED["runs"][name]
    ledger = place / f"{name}.partial" / "metrics.jsonl"
    # a run that starts again would write its own first line
    lines = _marked(ledger)
    assert mambactl(*kept["command"], "-o", name, "--resume") == str(place / name)
    assert not ledger.exists()
    found = (place / name / "metrics.jsonl").read_text("utf-8").splitlines()
    assert found[0] == lines[0] and len(found) > len(lines)
    steps = [(line["phase"], line["step"]) for line in map(json.loads, found)]
    assert len(set(steps)) == len(steps)
    ours, expected = (
        load_file(place / each / "model.safetensors") for each in (name, kept["result"])
    )
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def _marked(ledger: Path) -> list[str]:
    first, *others = ledger.read_text("utf-8").splitlines()
    lines = [json.dumps(json.loads(first) | {"kept": True}), *others]
    ledger.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return lines


# tokens that a page wrote in full: those of training are in millions now, those of text in headings
REWRITTEN = {"502", "622", "1,097", "1,459", "held-out, 273 tokens"}


def test_kept_results_are_reported(place, mambactl) -> None:
    expected = EXPECTED["report"]
    page = mambactl(*expected["command"], "-o", "page.html")
    text = (place / page).read_text("utf-8")
    cells = {cell for row in rows_of(text) for cell in row}
    numbers = {cell for row in expected["rows"] for cell in row if any(map(str.isdigit, cell))}
    assert numbers - REWRITTEN <= cells
    # digests of checkpoints are those that were measured
    assert "has changed since" not in text


def test_a_kept_table_is_printed(place, mambactl) -> None:
    assert mambactl(*EXPECTED["table"]["command"]) == EXPECTED["table"]["text"]
