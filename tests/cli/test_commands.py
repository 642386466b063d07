"""A new command is its options, its file and its row: the rest of the program follows the table."""

import importlib
import json
import re
import sys

import pytest
from fixtures.command_line import flags_in
from pydantic import Field

from mambactl import commands, recipes
from mambactl.commands import COMMANDS, Command, ModelOption
from mambactl.errors import UsageError
from mambactl.options import StageConfig
from mambactl.options.fields import CommandConfig, DataSpecs, Lengths

STAGE = '''
"""`prune-heads`: a command that only this test knows."""

from pathlib import Path

from mambactl.errors import CheckError
from mambactl.stage_result import StageResult


def run(config, source, out, *, resume=False, force=False):
    if config.heads == [13]:
        raise CheckError("13 heads", "another number")
    print("noise")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(f"{source} {config.heads} {config.data} {resume} {force}")
    return StageResult(str(out), {"heads": len(config.heads)})


def plan(config, source):
    return {"heads": config.heads, "of": source}
'''
PLAIN = '''
"""`count-words`: a command that only this test knows."""

from mambactl.stage_result import StageResult, Table


def run(options, source):
    rows = [(word, options.text.count(word)) for word in source.split("-")]
    return StageResult(source, dict(rows), blocks=(Table("", ("word", "times"), rows), "done"))
'''


class PruneConfig(StageConfig):
    """Heads that tell the least are taken out."""

    heads: Lengths = Field([1], description="how many, by layer")
    data: DataSpecs = Field([], description="text that tells")

    @property
    def ending(self) -> str:
        return ".st"


class CountConfig(CommandConfig):
    """Words of a model's name in a text."""

    text: str = Field("a a b", description="what is searched")
    twice: bool = Field(False, description="for nothing")


PRUNE = Command(
    "prune-heads",
    PruneConfig,
    ("mambactl prune-heads t.st --heads 2,3",),
    model_option=ModelOption("victim", "model to prune", "mambactl prune-heads --victim MODEL"),
    writes="model",
    resumable=True,
)
COUNT = Command("count-words", CountConfig, ("mambactl count-words a-b",), json="metrics")


@pytest.fixture(autouse=True)
def new_commands(tmp_path_factory, monkeypatch) -> None:
    """Two rows in the table and their two files in the package, for one test."""
    folder = tmp_path_factory.mktemp("commands")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(folder)])
    for row, text in ((PRUNE, STAGE), (COUNT, PLAIN)):
        name = row.module.rpartition(".")[2]
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setitem(COMMANDS, row.name, row)
        # what is imported of them is forgotten with the folder
        monkeypatch.setitem(sys.modules, row.module, None)
        monkeypatch.delitem(sys.modules, row.module)
        monkeypatch.setattr(commands, name, None, raising=False)
    importlib.invalidate_caches()
    # nor are there models
    monkeypatch.setattr("mambactl.cli.preflight.require_found", lambda config, sources: None)


def test_help_has_the_summary_the_flags_and_the_examples(cli) -> None:
    shown = cli("prune-heads", "--help").out
    assert "Heads that tell the least are taken out." in shown
    assert "  Examples:\n    mambactl prune-heads t.st --heads 2,3\n" in shown
    assert " ".join(flags_in(shown)) == (
        "--victim --heads --data --device --dtype --out --resume --force --recipe --set "
        "--seed --trust-remote-code --dry-run --json --quiet --verbose --help"
    )
    assert "another way to give the victim" in shown
    plain = cli("count-words", "--help").out
    assert flags_in(plain) == ["--text", "--twice", "--json", "--help"]
    assert "--[no-]twice" not in plain
    everything = cli("--help").out
    assert re.search(r"^  prune-heads +Heads that tell", everything, re.MULTILINE)
    assert re.search(r"^  count-words +Words of a model", everything, re.MULTILINE)


def test_a_writer_has_a_place_and_a_line(cli, tmp_path) -> None:
    done = cli("prune-heads", "org/m", "--heads", "2,3")
    out = tmp_path / "runs" / "m-prune-heads.st"
    assert (done.code, done.out) == (0, f"{out}\n") and "noise" in done.err
    assert out.read_text() == "org/m [2, 3] [] False False"
    done = cli("prune-heads", "--victim", "-", "-o", "p.st", "--json", stdin="x\n")
    assert json.loads(done.out) == {
        "stage": "prune-heads",
        "checkpoint": str(tmp_path / "p.st"),
        "metrics": {"heads": 1},
    }
    assert cli("prune-heads", "m", "-o", "p.st").code == 5
    assert cli("prune-heads", "m", "-o", "p.st", "--force").code == 0
    assert (tmp_path / "p.st").read_text() == "m [1] [] False True"
    planned = json.loads(cli("prune-heads", "m", "-o", "q.st", "--dry-run", "--json").out)
    plan = {"out": str(tmp_path / "q.st"), "heads": [1], "of": "m"}
    assert planned == {"stage": "prune-heads", "checkpoint": None, **plan}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("prune-heads", "m", "--heads", "13"), 7, "13 heads"),
        (("prune-heads", "m", "--heads", "0"), 2, "prune-heads: heads: input should be greater"),
        (("prune-heads", "m", "--set", "haeds=2"), 2, "did you mean heads?"),
        (("prune-heads", "m", "--resume", "--force"), 2, "exclude each other"),
        (("prune-heads", "m", "--victim", "m"), 2, "MODEL and --victim are the same thing"),
        (("prune-heads", "--victim", ""), 3, "MODEL is empty"),
        (("prune-heads", "-"), 4, "nothing arrived on stdin"),
        (("count-words",), 2, "MODEL"),
        (("count-words", "m", "--recipe", "r"), 2, "--recipe"),
    ],
)
def test_exit_codes(cli, words, code, sentence) -> None:
    done = cli(*words)
    assert (done.code, done.out) == (code, "") and sentence in done.err


def test_a_plain_command_prints_its_blocks_or_its_metrics(cli) -> None:
    done = cli("count-words", "a-b", "--text", "a b b")
    assert done.code == 0 and [line.split() for line in done.out.splitlines()[-3:]] == [
        ["a", "1"], ["b", "2"], ["done"],
    ]  # fmt: skip
    assert json.loads(cli("count-words", "-", "--json", stdin="a-b\n").out) == {"a": 2, "b": 1}


RECIPE = """
stages:
  prune-heads: {victim: m, heads: [2], data: [text.txt]}
  eval: {}
  prune-heads@again: {out: last}
  sft: {data: ["${prune-heads}"]}
"""


def test_sections_of_a_recipe(cli, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "r.yaml").write_text(RECIPE)
    first, measured, again, tuned = recipes.load_recipe(tmp_path / "r.yaml").sections
    assert (first.model, first.out, again.out) == ("m", "prune-heads.st", "last.st")
    assert first.values == {"heads": [2], "data": [str(tmp_path / "text.txt")]}
    assert (first.writes, measured.writes, tuned.writes) == (True, False, True)
    done = cli("recipe", "run", "r.yaml", "-o", "run", "--dry-run")
    lines = [line.partition("] ")[2] for line in done.err.splitlines() if line.startswith("[")]
    pruned, last = tmp_path / "run" / "prune-heads.st", tmp_path / "run" / "last.st"
    text = f"'data=[\"{tmp_path / 'text.txt'}\"]'"
    assert lines == [
        f"mambactl prune-heads m -o {pruned} --set 'heads=[2]' --set {text}",
        f"mambactl eval {pruned}",
        f"mambactl prune-heads {pruned} -o {last}",
        f"mambactl sft {last} -o {tmp_path / 'run' / 'sft'} --set 'data=[\"{pruned}\"]'",
    ]
    assert "    heads: [2]  # recipe" in cli("recipe", "show", "r.yaml").out
    assert cli("prune-heads", "n", "-r", "r.yaml", "-o", "n.st", "--heads", "4").code == 0
    assert (tmp_path / "n.st").read_text().startswith("n [4] ['")


def test_the_schema_knows_sections_and_no_plain_command(cli) -> None:
    schema = json.loads(cli("recipe", "schema").out)
    sections = schema["properties"]["stages"]["patternProperties"]
    assert {"heads", "data", "seed", "model", "out", "victim"} <= set(
        sections[r"^prune-heads(@[\w.-]+)?$"]["properties"]
    )
    assert not any("count-words" in pattern for pattern in sections)


def test_a_plain_command_is_no_section(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("stages: {count-words: {model: m}}")
    with pytest.raises(UsageError, match="count-words is not a stage"):
        recipes.load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("mambactl pru", ["prune-heads"]),
        ("mambactl count", ["count-words"]),
        ("mambactl prune-heads x --hea", ["--heads"]),
    ],
)
def test_completion(cli, monkeypatch, words, offered) -> None:
    monkeypatch.setenv("_MAMBACTL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert cli().out.split() == offered


def test_only_what_resumes_says_so_when_it_is_stopped() -> None:
    from mambactl.cli.app import continues

    assert continues(["prune-heads", "m"]) and not continues(["count-words", "m"])
    assert continues(["recipe", "run", "quickstart"]) and not continues([])
    assert not continues(["generate", "m", "-p", "x"])
    assert continues(["generate", "m", "--dataset=x"])
    resuming = {name for name, command in COMMANDS.items() if command.resumable}
    assert resuming == {
        "teacher-cache",
        "distill",
        "sft",
        "dpo",
        "draft",
        "generate",
        "prune-heads",
    }


def test_every_row_agrees_with_itself() -> None:
    for name, command in COMMANDS.items():
        assert name == command.name and command.options.__doc__, name
        assert all(f"mambactl {name} " in f"{line} " for line in command.examples[:1]), name
        assert (command.model == "optional") == bool(command.options.without_model), name
        fields = command.options.model_fields
        assert {*command.options.without_model} <= fields.keys(), name
        assert command.writes_with is None or command.writes_with in fields, name
        assert command.is_stage or command.writes == "nothing", name
        assert not (command.resumable and command.writes == "nothing"), name
