"""`mambactl docs`: topics, the generated reference, the pager, manual pages and completion."""

import re
import shutil
import subprocess

import pytest
from fixtures.command_line import ROOT, flags_in

from mambactl.cli.command_reference import VARIABLES, command_names
from mambactl.cli.topics import FIRST, pages, topics
from mambactl.commands import COMMANDS
from mambactl.errors import EXIT_CODES, ExitCode


def test_topics_are_listed_with_their_titles(cli) -> None:
    listed = cli("docs").out
    assert re.findall(r"^- `([\w-]+)`: \S", listed, re.MULTILINE) == topics()
    files = {path.stem for path in (ROOT / "mambactl" / "docs").glob("*.md")}
    assert {*files, "rows", "reference"} == set(topics()) and set(FIRST) <= set(topics())


@pytest.mark.parametrize("topic", pages())
def test_a_topic_is_markdown_in_a_pipe(cli, topic) -> None:
    done = cli("docs", topic)
    assert (done.code, done.err) == (0, "") and done.out.startswith("# ")
    if topic not in (*COMMANDS, "recipe", "reference", "rows"):
        written = (ROOT / "mambactl" / "docs" / f"{topic}.md").read_text("utf-8")
        assert done.out == written.rstrip("\n") + "\n"


@pytest.mark.parametrize(("typed", "meant"), [("tutoril", "tutorial"), ("distil", "distill")])
def test_an_unknown_topic_names_the_nearest(cli, typed, meant) -> None:
    done = cli("docs", typed)
    assert (done.code, done.out) == (2, "")
    assert typed in done.err and f"did you mean {meant}?" in done.err


@pytest.mark.parametrize("command", [*COMMANDS, "recipe run"])
def test_the_page_of_a_command_has_every_option(cli, command) -> None:
    page = cli("docs", command.split()[0]).out
    section = page.partition(f"# mambactl {command}\n")[2]
    shown = re.findall(r"^\| `(?:-\w, )?--(?:\[no-\])?([\w-]+)", section, re.MULTILINE)
    asked = flags_in(cli(*command.split(), "--help").out)
    # the help of the page's own program has no short form
    assert [f"--{name}" for name in shown] == asked
    for example in COMMANDS[command].examples if command in COMMANDS else ():
        assert example in section


def test_the_reference_has_commands_recipes_exit_codes_and_variables(cli) -> None:
    text = cli("docs", "reference").out
    for name in command_names():
        assert f"## mambactl {name}\n" in text
    assert "| quickstart | none |" in text
    for code in ExitCode:
        assert f"| {int(code)} | {EXIT_CODES[code]} |" in text
    for name in VARIABLES:
        assert f"| `{name}` |" in text


def test_every_variable_that_the_code_reads_is_described() -> None:
    sources = (path.read_text("utf-8") for path in (ROOT / "mambactl").rglob("*.py"))
    read = {name for text in sources for name in re.findall(r'"(MAMBACTL_[A-Z_]+)"', text)}
    assert read == {name for name in VARIABLES if name.startswith("MAMBACTL_")}


def test_a_terminal_gets_a_pager(on_terminal, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr("pydoc.pager", shown.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for plain in (False, True):
        if plain:
            monkeypatch.setenv("PAGER", "cat")
        assert on_terminal("docs", "glossary") == (0, [])
    coloured, text = shown
    assert "\x1b[" in coloured and "\x1b[" not in text
    # tables are drawn, not shown as Markdown
    assert "acceptance rate" in text and "|---|" not in text


@pytest.mark.skipif(shutil.which("man") is None, reason="no man")
@pytest.mark.parametrize("topic", ["tutorial", "promises", "convert"])
def test_manual_pages_are_what_man_reads(cli, topic) -> None:
    pytest.importorskip("myst_parser")
    page = cli("docs", topic, "--man").out
    assert f'.TH "mambactl-{topic}" "7"' in page and "System Message" not in page
    man = subprocess.run(
        ["man", "-l", "-"],
        input=page,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert man.returncode == 0 and f"mambactl-{topic}" in man.stdout


def test_manual_pages_need_their_extra(cli, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "myst_parser", None)
    monkeypatch.setitem(__import__("sys").modules, "myst_parser.docutils_", None)
    done = cli("docs", "tutorial", "--man")
    assert done.code == 6 and 'pip install "mambactl[man]"' in done.err


def test_documents_load_no_heavy_library(python) -> None:
    code = (
        "import sys; from mambactl.cli.main import run\n"
        "codes = [run(['docs']), run(['docs', 'reference'])]\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or max(codes))"
    )
    done = python("-c", code)
    assert (done.code, done.err) == (0, "")
