"""Streams that are closed, full or no longer read, and text that looks like markup."""

import json
import os
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mambactl import console
from mambactl.checkpoint.save import save_model

# the real entry point around a stage that talks a lot
TALKATIVE = """
import sys, types, warnings
from mambactl import console
from mambactl.cli import main as program, preflight
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
# there is no model either
preflight.require_found = lambda config, sources: None
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


@pytest.mark.parametrize("name", ["\x1b]0;x\x07", "\x9b31m", "\u202etxt.\u2066", "\x7f\r\x00"])
def test_names_of_a_file_command_no_terminal(cli, make_hybrid, tmp_path, name) -> None:
    save_model(make_hybrid(["attention"]), tmp_path / "m.st", {}, None)
    with safe_open(tmp_path / "m.st", "pt") as reader:
        metadata = reader.metadata()
        state = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    save_file({**state, name: torch.ones(2)}, tmp_path / "m.st", metadata)
    shown = "".join(f"\\u{ord(letter):04x}" if letter not in "]0;x31mt." else letter
                    for letter in name)  # fmt: skip
    table = cli("inspect", "m.st", "--tensors")
    as_json = cli("inspect", "m.st", "--tensors", "--json")
    refused = cli("convert", "m.st", "-o", "out")
    assert (table.code, as_json.code, refused.code) == (0, 0, 3)
    for text in (table.out, refused.err):
        assert shown in text
    assert name in [tensor["name"] for tensor in json.loads(as_json.out)["tensors"]]
    told = "".join((table.out, table.err, as_json.out, as_json.err, refused.out, refused.err))
    assert [letter for letter in told if not letter.isprintable() and letter not in "\n\t"] == []


def test_what_a_library_writes_commands_no_terminal(child) -> None:
    script = """
        import logging, sys, warnings
        from mambactl import console
        console.secure_streams()
        warnings.warn("tensor \\x1b]0;title\\x07")
        logging.basicConfig()
        logging.getLogger().error("\\x9b31m")
        sys.stderr.write("bar 1\\rbar 2\\x1b[A\\n")
        console.stderr().print("[red]ours[/red]")
    """
    code = "\n".join(line.strip() for line in script.splitlines())
    done = child(sys.executable, "-c", code, FORCE_COLOR="1")
    assert "tensor \\u001b]0;title\\u0007" in done.err and "\\u009b31m" in done.err
    assert done.err.endswith("\x1b[31mours\x1b[0m\n") and done.err.count("\x1b") == 2


def test_a_terminal_shows_escapes_and_a_file_holds_them() -> None:
    ours, theirs = os.openpty()
    console.write_out("a\x1b[2Jb", theirs)
    assert os.read(ours, 100) == b"a\\u001b[2Jb\r\n"
    read, write = os.pipe()
    console.write_out("a\x1b[2Jb", write)
    assert os.read(read, 100) == b"a\x1b[2Jb\n"
    for descriptor in (ours, theirs, read, write):
        os.close(descriptor)


def test_letters_of_every_language_stay(capsys) -> None:
    text = "h\u00e9 \u65e5\u672c \u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f52c"
    console.log(text)
    assert capsys.readouterr().err == f"{text}\n"
