"""Recipes that somebody else wrote: damaged YAML, names that lead elsewhere, unseen permissions."""

import json
import os
from pathlib import Path

import pytest

from mambactl import recipes
from mambactl.bounds import YAML_BYTES, YAML_VALUES
from mambactl.cli import pipeline
from mambactl.errors import UsageError
from mambactl.options.fields import as_yaml, parse_settings
from mambactl.plain_yaml import parse_yaml


def multiplied(first: str, link: str, close: str) -> str:
    """Five keys after `first`, each of which holds the one before it 30 times."""
    pairs = zip("abcde", "bcdef", strict=True)
    rest = [f"{new}: &{new} {link}" + ", ".join([f"*{old}"] * 30) + close for old, new in pairs]
    return "\n".join([f"a: &a {first}", *rest])


DAMAGED = {
    "aliases without end": (multiplied("[x]", "[", "]"), f"more than {YAML_VALUES}"),
    "merges without end": (multiplied("{k: v}", "{<<: [", "]}"), f"more than {YAML_VALUES}"),
    "a list in itself": ("a: &a [*a]", "refers to itself"),
    "a mapping in itself": ("stages: &s {convert: *s}", "refers to itself"),
    "an object of Python": ("a: !!python/object/apply:os.system [x]", "is a python/object"),
    "a name of Python": ("a: !!python/name:os.system", "is a python/name"),
    "another tag": ("stages: !function x.y", "is a !function"),
    "a set": ("stages: !!set {convert}", "is a set"),
    "a pair list": ("stages: !!omap [convert: 1]", "is a omap"),
    "binary": ("name: !!binary aGVsbG8=", "is a binary"),
    "a date": ("name: 2020-01-01", "line 1, column 7 is a timestamp; put it in quotes"),
    "a date that is none": ("name: 2020-13-45", "is a timestamp"),
    "a date for a key": ("stages: {2020-01-01: {}}", "is a timestamp"),
    "a number of 5,000 digits": ("seed: " + "9" * 5000, "a number of 5000 digits"),
    "a hexadecimal number": ("seed: 0x" + "f" * 5000, "a number of 5002 digits"),
    "nesting": ("- " * 100_000, "nested too deeply"),
    "nested mappings": ("{a: " * 60_000, "nested too deeply"),
    "half of a character": ('name: "\\ud800"', "half of a character"),
    "a NUL in quotes": ('name: "\\0"', "holds a NUL"),
    "a NUL": ("name: \0", "not valid YAML"),
    "an escape": ("name: \x1b[2J", "not valid YAML"),
    "a list for a key": ("stages: {[convert]: {}}", "a list or a mapping where a name belongs"),
    "a mapping for a key": ("stages: {{a: b}: {}}", "a list or a mapping where a name belongs"),
    "null for a key": ("stages: {null: {}}", "None is not a stage"),
    "a number for a key": ("stages: {3: {}}", "3 is not a stage"),
    "truth for a key": ("stages: {on: {}}", "True is not a stage"),
    "one key twice": ("stages: {convert: {model: m}, convert: {model: n}}", "is a second convert"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "nothing": ("", "not a recipe"),
    "a number": ("3", "not a recipe"),
    "text for sections": ("stages: convert", "`stages`"),
    "a number for options": ("stages: {convert: 0}", "convert must be a mapping"),
    "no text for options": ("stages: {convert: ''}", "convert must be a mapping"),
    "a list for a name": ("name: [a]\nstages: {convert: {model: m}}", "`name` must be text"),
    "a mapping for a text": ("description: {}\nstages: {convert: {model: m}}", "must be text"),
    "a list for a seed": ("seed: [1]\nstages: {convert: {model: m}}", "seed"),
    "a list for a model": ("stages: {convert: {model: [m]}}", "`model` of convert must be a name"),
    "a mapping for an out": ("stages: {convert: {model: m, out: {}}}", "`out` of convert must"),
    "a mapping for data": ("stages: {sft: {model: m, data: {a: b}}}", "data"),
    "numbers for data": ("stages: {sft: {model: m, data: [[1]]}}", "data"),
    "not a number": ("stages: {sft: {model: m, data: x, lr: .nan}}", "lr"),
    "no end": ("stages: {sft: {model: m, data: x, lr: .inf}}", "lr"),
    "a long key": ("x" * 5000 + ": 1", "..."),
    "a long value": ("stages: {convert: {model: m, ratio: " + "x" * 5000 + "}}", "..."),
    "an odd reference": ("stages: {convert: {model: '${a}${'}}", "${a}"),
    "references among options": ("stages: {sft: {model: m, data: ['${x}']}}", "${x}"),
    "too long": ("# " + "x" * YAML_BYTES.most, f"more than {YAML_BYTES}"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_a_sentence(name, tmp_path) -> None:
    text, sentence = DAMAGED[name]
    path = tmp_path / "r.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError) as caught:
        recipes.load_recipe(path)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600
    assert str(path) in str(caught.value)


def test_what_is_no_file_of_text_is_a_sentence(tmp_path, monkeypatch) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    found = {"bytes.yaml": "cannot be used", "pipe.yaml": "is a pipe", "": "is a folder"}
    found |= {"loop.yaml": "no recipe file", "x" * 5000: "no recipe file", "a\0b": "no recipe file"}
    for name, sentence in found.items():
        with pytest.raises(UsageError, match=sentence):
            recipes.load_recipe(f"{tmp_path}/{name}")
    for name in ("/dev/zero", "~nobody-at-all/r.yaml", ""):
        with pytest.raises(UsageError):
            recipes.load_recipe(name)


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipes.load_recipe("quickstart").name == "quickstart"


def test_anchors_and_merges_of_a_sensible_size_are_read() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: *a"
    assert parse_yaml(text, "r")["b"] == {"x": 2, "y": [1, 2]}
    assert parse_yaml(text, "r")["c"] == {"x": 1, "y": [1, 2]}


@pytest.mark.parametrize(
    "value", ["plain", "", "\U0001f600", ["\U0001f600.jsonl", "a: b"], {"a": None}, 3, "0x1f"]
)
def test_values_arrive_as_they_left(value) -> None:
    assert parse_settings([f"key={as_yaml(value)}"]) == {"key": value}


@pytest.mark.parametrize("value", ["- " * 5000, "9" * 5000, "2020-13-45", "!!python/name:os"])
def test_settings_that_are_no_yaml_are_text(value) -> None:
    assert parse_settings([f"key={value}"]) == {"key": value}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stages: {convert: {model: m, out: ../x}}", "may lead out"),
        ("stages: {convert: {model: m, out: a/../../x}}", "may lead out"),
        ("stages: {convert: {model: m, out: /tmp/x}}", "may lead out"),
        ("stages: {convert: {model: m, out: a//b}}", "may lead out"),
        ("stages: {convert: {model: m, out: '~/x'}}", "may lead out"),
        ("stages: {convert: {model: m, out: '${convert}'}}", "may lead out"),
        ('stages: {convert: {model: m, out: "a\\tb"}}', "may lead out"),
        ("stages: {convert: {model: m, out: -x}}", "a hyphen begins an option"),
        ("stages: {convert: {model: m, out: ''}}", "must be a name"),
        ("stages: {'convert@../../x': {model: m}}", "has the label"),
        ("stages: {'convert@': {model: m}}", "has the label"),
        ("stages: {convert: {model: --trust-remote-code}}", "a hyphen begins an option"),
        ("stages: {convert: {model: -o}}", "a hyphen begins an option"),
        ("stages: {convert: {model: '-'}}", "must be a name"),
        ("stages: {spec-decode: {target: --check, draft: d}}", "a hyphen begins an option"),
        ("stages: {eval: {model: m, data: x, report: ../r.html}}", "`report` of eval"),
        ("stages: {eval: {model: m, data: x, needle-plot: /tmp/n.png}}", "`needle_plot` of eval"),
        ("stages: {eval: {model: m, tasks: x, output_path: /tmp/n}}", "`output_path` of eval"),
        ("stages: {eval: {model: m, tasks: x, use_cache: ../c}}", "`use_cache` of eval"),
        ("stages: {generate: {model: m, prefix_cache: ../p}}", "`prefix_cache` of generate"),
        ("stages: {bench: {model: m, report: /tmp/b.html}}", "`report` of bench"),
        ("name: ../../x\nstages: {convert: {model: m}}", "no plain name"),
        ("name: /tmp/x\nstages: {convert: {model: m}}", "no plain name"),
        ("stages: {convert: {model: m}}\nvariants: {../x: {}}", "no plain name"),
        (
            "stages: {convert: {model: m, out: x}, convert@b: {model: m, out: x}}",
            "both write x",
        ),
    ],
)
def test_nothing_leads_out_of_the_working_folder(text, sentence, tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        recipes.load_recipe(path)


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Command lines that a recipe would run, each with success."""
    seen: list[list[str]] = []

    def child(command: list[str], json_errors: bool = False) -> tuple[int, str]:
        seen.append(command[3:])
        return 0, json.dumps({"checkpoint": command[4], "metrics": {}})

    monkeypatch.setattr(pipeline, "_child", child)
    return seen


def test_links_in_the_working_folder_are_not_followed(cli, started, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "sub").symlink_to(tmp_path / "elsewhere")
    for text in (
        "stages: {convert: {model: m, out: sub/t.st}}",
        "stages: {eval: {model: m, data: x, report: sub/r.html}}",
        "stages: {convert: {model: m, out: sub}}",
    ):
        (tmp_path / "r.yaml").write_text(text)
        done = cli("recipe", "run", "r.yaml", "--out", "w")
        assert done.code == 2 and "leads out of w" in done.err, text
    assert started == [] and list((tmp_path / "elsewhere").iterdir()) == []


def test_pages_lie_in_the_working_folder_unless_a_person_says_where(cli, started, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("stages: {eval: {model: m, data: x, report: r.html}}")
    assert cli("recipe", "run", "r.yaml", "--out", "w").code == 0
    assert f"report={tmp_path / 'w' / 'r.html'}" in started[0]
    typed = ("--set", "eval.report=../mine.html")
    assert cli("recipe", "run", "r.yaml", "--out", "v", *typed).code == 0
    assert "report=../mine.html" in started[1]


TRUSTING = "stages: {convert: {model: m}, eval@a: {data: x, trust_remote_code: true}}"


def test_code_of_checkpoints_takes_a_word_on_the_command_line(cli, started, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(TRUSTING)
    given = ("recipe", "run", "r.yaml")
    done = cli(*given)
    assert (done.code, started) == (2, [])
    assert "eval@a asks to run code" in done.err and "eval@a.trust_remote_code=true" in done.err
    planned = cli(*given, "--dry-run")
    assert planned.code == 0 and "warning: eval@a asks to run code" in planned.err
    assert cli("recipe", "show", "r.yaml").out.count("trust_remote_code: true  # recipe") == 1
    assert cli(*given, "--trust-remote-code", "--out", "a").code == 0
    assert cli(*given, "--set", "eval@a.trust_remote_code=true", "--out", "b").code == 0
    assert cli(*given, "--set", "eval@a.trust_remote_code=false", "--out", "c").code == 0
    asked = ["trust_remote_code=true" in command for command in started]
    assert asked == [False, True, False, True, False, False]


def test_one_stage_of_a_recipe_asks_as_well(cli, fake_stage, tmp_path) -> None:
    calls = fake_stage("eval")
    (tmp_path / "r.yaml").write_text(TRUSTING)
    given = ("eval", "m", "--recipe", "r.yaml")
    done = cli(*given)
    assert (done.code, calls) == (2, []) and "add --trust-remote-code" in done.err
    assert cli(*given, "--trust-remote-code").code == 0
    assert cli(*given, "--set", "trust_remote_code=false").code == 0
    assert [call["config"].trust_remote_code for call in calls] == [True, False]


@pytest.mark.parametrize("content", ["[]", "{", '{"result": 3}', "[" * 100_000])
def test_a_damaged_record_is_a_sentence(content, cli, started, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("stages: {convert: {model: m}}")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "convert.json").write_text(content)
    (tmp_path / "w" / "convert").mkdir()
    done = cli("recipe", "run", "r.yaml", "--out", "w", "--resume")
    assert (done.code, started) == (5, []) and "convert.json" in done.err


def test_names_of_a_recipe_command_no_terminal(cli, tmp_path) -> None:
    text = 'description: "\\e[2Jcleared"\nstages: {convert: {model: "\\e]0;title\\a"}}'
    (tmp_path / "r.yaml").write_text(text)
    shown = cli("recipe", "show", "r.yaml")
    planned = cli("recipe", "run", "r.yaml", "--dry-run")
    assert (shown.code, planned.code) == (0, 0)
    assert "\x1b" not in shown.out + planned.err and "\a" not in shown.out + planned.err


def test_a_dry_run_prints_one_object(cli, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("stages: {convert: {model: m}}")
    done = cli("recipe", "run", "r.yaml", "--dry-run", "--json")
    found = json.loads(done.out)
    assert found["checkpoint"] == str(Path("runs/r/convert").absolute())
    assert found["commands"]["convert"][:3] == ["mambactl", "convert", "m"]
