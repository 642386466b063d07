"""Streams that are closed, full or no longer read, and text that looks like markup."""

import sys

import pytest

from mambactl import console

# the real entry point around a stage that talks a lot
TALKATIVE = """
import sys, types, warnings
from mambactl import console
from mambactl.cli import main as program
from mambactl.stage_result import StageResult

def run(config, source, out, **how):
    for _ in range(2000):
        console.log("line " * 40)
    console.table("title", ("a", "b"), [("c", "d")])
    with console.progress("work", 1) as task:
        task.advance()
    warnings.warn("from a library")
    sys.stderr.write("from another\\n")
    out.write_text("weights")
    return StageResult(str(out))

stage = types.ModuleType("mambactl.commands.convert")
stage.run = run
sys.modules[stage.__name__] = stage
sys.argv = ["mambactl", "convert", "m", "-o", "t.st"]
program.main()
"""


@pytest.mark.parametrize(
    "streams",
    [
        "2>&1 >/dev/null | head -1",
        "2>&-",
        "2>/dev/full",
        ">&-",
        "<&- >&- 2>&-",
    ],
)
def test_work_goes_on_when_nobody_reads(child, tmp_path, streams) -> None:
    (tmp_path / "talk.py").write_text(TALKATIVE)
    done = child("bash", "-c", f"set -o pipefail; {sys.executable} talk.py {streams}")
    assert done.code == 0, done.err
    assert (tmp_path / "t.st").read_text() == "weights"


@pytest.mark.parametrize("columns, longest", [("", console.LOG_WIDTH), ("60", 60)])
def test_tables_in_a_log_are_as_wide_as_they_need(capfd, monkeypatch, columns, longest) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console.stderr.cache_clear()
    headings = ["model", *(f"agreement-{number}" for number in range(8))]
    console.table("title", headings, [["name", *["0.1234"] * 8]])
    console.stderr.cache_clear()
    lines = capfd.readouterr().err.splitlines()
    assert max(map(len, lines)) <= longest
    whole = any(all(heading in line for heading in headings) for line in lines)
    assert whole == (longest > 80)


def test_text_is_shown_as_it_is(capfd) -> None:
    console.stderr.cache_clear()
    console.log("at :smile: [bold]x[/bold]")
    console.table("run :cat: [red]", ("a",), [(":dog: [b]",)])
    shown = capfd.readouterr().err
    for text in ("at :smile: [bold]x[/bold]", "run :cat: [red]", ":dog: [b]"):
        assert text in shown
