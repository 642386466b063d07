"""Every command line in a document is one that the program takes."""

import re

import pytest
import typer.main

from mambactl.cli import app as program
from mambactl.cli import pipeline, recipe_page
from mambactl.cli.topics import pages
from mambactl.commands import COMMANDS
from tests.documents.markdown import DOCUMENTS, ROOT, blocks, commands, mentioned

IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# of the program, which has no command
OF_THE_PROGRAM = {"--version", "--help", "-h", "--install-completion", "--show-completion"}


@pytest.fixture
def parsed_only(monkeypatch):
    """Every command stops after its options were parsed and validated."""
    checked = []

    def plain(command, given):
        given.pop("json", None)
        program.take_others(command, given)
        program.take_model(command, given)
        checked.append(program.validated(command.name, command.options, given))

    def stage(command, config, *rest):
        config.require_coherent()
        checked.append(config)

    monkeypatch.setattr(program, "_run_plain", plain)
    monkeypatch.setattr(program, "_call", stage)
    monkeypatch.setattr(program, "require_packages", lambda modules: None)
    monkeypatch.setattr(pipeline, "run_plan", lambda plan: ("made", {}))
    monkeypatch.setattr(recipe_page, "write_page", lambda folder, again: folder)
    return checked


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_command_lines_of_blocks_are_taken(path, cli, parsed_only) -> None:
    for words in commands(path.read_text("utf-8")):
        if OF_THE_PROGRAM & set(words[:1]):
            continue
        done = cli(*words, stdin="student.st\n")
        assert done.code == 0, f"mambactl {' '.join(words)}\n{done.err}"


def test_a_wrong_line_is_found(cli, parsed_only) -> None:
    text = "```bash\nX=1 mambactl convert a --ratoi 1 | mambactl eval - --data b  # why\n```"
    first, second = commands(text)
    assert (first, second) == (["convert", "a", "--ratoi", "1"], ["eval", "-", "--data", "b"])
    assert cli(*first).code == 2
    assert cli(*second, stdin="a\n").code == 0 and len(parsed_only) == 1
    assert cli("convert", "a", "--form", "round").code == 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_and_options_in_sentences_exist(path) -> None:
    wrong = []
    for words in mentioned(path.read_text("utf-8")):
        name = words[0] if words else ""
        if OF_THE_PROGRAM & {name}:
            continue
        known = _options(words) if name in (*COMMANDS, "recipe", "docs") else set()
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        if not known or flags - known:
            wrong.append(words)
        if name == "docs" and words[1:] and words[1].islower():
            assert words[1] in pages(), words
    assert [words for words in wrong if words != ["COMMAND", "--help"]] == []


def _options(words) -> set[str]:
    command = typer.main.get_command(program.make_app(words[0]))
    for word in words[:2]:
        command = getattr(command, "commands", {}).get(word, command)
    both = (*_names(command, "opts"), *_names(command, "secondary_opts"))
    return {*both, "--help", "-h"}


def _names(command, kind):
    return (name for parameter in command.params for name in getattr(parameter, kind))


def test_topics_that_documents_name_are_there() -> None:
    named = {
        topic
        for path in DOCUMENTS
        for topic in re.findall(r"mambactl docs ([a-z][a-z-]+)", path.read_text("utf-8"))
    }
    assert len(named) > 10 and named <= set(pages())


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_files_that_documents_name_are_there(path) -> None:
    text = path.read_text("utf-8")
    linked = [path.parent / name for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    named = re.findall(r"`((?:mambactl|recipes|tests)/[\w/.-]+\.(?:py|md|json|yaml))`", text)
    if "structure" in path.name:
        # it also names files of an earlier tree
        named = []
    missing = [
        str(file) for file in (*linked, *(ROOT / name for name in named)) if not file.exists()
    ]
    assert missing == []


def test_blocks_are_of_a_language() -> None:
    assert all(blocks((ROOT / "README.md").read_text("utf-8")))
