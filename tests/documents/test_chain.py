"""`recipes/chain.py` runs every stage, deletes what is done with, and reports one that fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mambactl.files import EMBEDDED_FOLDER

CHAIN = Path(__file__).parents[2] / "recipes" / "chain.py"
SMALL = ("--shape", "tiny", "--device", "cpu", "--rows", "1", "--length", "256", "--steps", "1")


@pytest.fixture
def chain(tmp_path: Path, tiny_llama_dir: Path, monkeypatch):
    """chain(option, ...) -> exit code, the table, and the figures."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / EMBEDDED_FOLDER).symlink_to(tiny_llama_dir)
    monkeypatch.setenv("MAMBACTL_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(CHAIN.parents[1]))

    def call(*words: str) -> tuple[int, str, dict]:
        kept = tmp_path / "figures.json"
        line = [sys.executable, str(CHAIN), *SMALL, "--work", str(tmp_path / "work")]
        done = subprocess.run(
            [*line, "--json", str(kept), *words], capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, json.loads(kept.read_text())

    return call


def test_a_stage_that_fails_is_reported_and_the_next_ones_go_on(chain, tmp_path: Path) -> None:
    skipped = ("convert", "distill", "sft", "dpo", "eval", "spec-decode", "convert portable")
    words = [word for stage in skipped for word in ("--skip", stage)]
    code, table, found = chain(*words, "--copy", "--more", "convert by rule=--ratio 7")
    assert code == 1
    rows = {row["stage"]: row for row in found["stages"]}
    assert list(rows) == ["synthetic", "cp", "convert by rule"]
    assert [name for name, row in rows.items() if row["code"]] == ["convert by rule"]
    note = rows["convert by rule"]["note"]
    assert "ratio" in note and note in table
    # the copy of the checkpoint that was timed is gone, and was counted while it was there
    size = rows["synthetic"]["result"]["metrics"]["bytes"]
    assert rows["cp"]["peak"]["disk"] > 2 * size > rows["synthetic"]["peak"]["disk"]
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["pairs.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_whole_chain_on_a_cpu(chain, tmp_path: Path, processes: int) -> None:
    code, table, found = chain("--nproc", str(processes))
    assert code == 0, table
    names = [row["stage"] for row in found["stages"]]
    assert names == [
        *("synthetic", "convert", "distill", "sft", "dpo", "eval", "spec-decode"),
        *("convert portable", "export"),
    ]
    for row in found["stages"]:
        assert row["seconds"] > 0 and row["peak"]["host"] > 50e6, row["stage"]
    phases = {*found["stages"][2]["result"]["metrics"]}
    assert {"align", "logits"} <= phases and ("onpolicy" in phases) == (processes == 1)
    assert "- logits" in table and "| together |" in table
    # all that is left is what the script wrote for itself
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["pairs.jsonl"]
