"""Completion: what is offered, and that bash, zsh and fish themselves show it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mambactl.cli.suggestions import joined_words

ROOT = Path(__file__).parents[2]
COMPLETIONS = {"bash": "mambactl.bash", "zsh": "_mambactl", "fish": "mambactl.fish"}
BASH = """source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_mambactl_completion mambactl; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
# zsh shows completions to a person only: in a terminal of its own, as a list
ZSH = """zmodload zsh/zpty; zpty z 'PATH=$PATH zsh -f -i'
zpty -w z 'autoload -U compinit; compinit -u -D; PROMPT=""; source {script}; LISTMAX=0; COLUMNS=200'
sleep 1; zpty -n -w z $'mambactl {line}\t\t'; sleep {seconds}
while zpty -r -t z piece; do print -rn -- $piece; done; zpty -d z
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a checkpoint, a folder of runs and data; `mambactl` is on the path."""
    (tmp_path / "runs" / "quick" / "distill").mkdir(parents=True)
    (tmp_path / "runs" / "quick" / "distill" / "config.json").write_text("{}")
    for name in ("mine.st", "data.jsonl"):
        (tmp_path / name).write_text("")
    program = tmp_path / "bin" / "mambactl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mambactl "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_completion_scripts_are_those_that_typer_generates(python, shell) -> None:
    done = python("-m", "mambactl", _MAMBACTL_COMPLETE=f"source_{shell}")
    stored = (ROOT / "completions" / COMPLETIONS[shell]).read_text()
    # zsh wants #compdef on the first line, where the generator leaves an empty one
    assert stored == done.out.lstrip("\n"), (
        f"_MAMBACTL_COMPLETE=source_{shell} mambactl > completions/{COMPLETIONS[shell]}"
    )


@pytest.mark.parametrize(
    ("words", "offered"),
    [("mambactl sp", "spec-decode"), ("mambactl convert x --keep-a", "--keep-attention")],
)
def test_completion_offers(python, words, offered) -> None:
    env = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = python("-m", "mambactl", _MAMBACTL_COMPLETE="complete_bash", **env)
    assert done.out.split() == [offered]


LINES = [
    ("convert smol", {"smollm2-135m", "smollm2-360m", "smollm2-1.7b"}),
    ("distill mi", {"mine.st"}),
    ("chat runs/q", {"runs/quick/", "runs/quick/distill"}),
    ("recipe run qui", {"quickstart"}),
    ("recipe run quickstart --to dis", {"distill"}),
    ("distill mine.st --stages align,lo", {"align,logits"}),
    ("eval mine.st --tasks arc", {"arc_easy", "arc_challenge"}),
    ("spec-decode --draft ng", {"ngram"}),
]


@pytest.mark.parametrize(("line", "offered"), LINES)
def test_names_are_offered(place, line, offered) -> None:
    words = ["mambactl", *line.split()]
    env = f"COMP_WORDS={chr(10).join(words)}", f"COMP_CWORD={len(words) - 1}"
    found = output("env", *env, "_MAMBACTL_COMPLETE=complete_bash", "mambactl")
    assert set(found.split()) == offered


def test_words_that_bash_breaks_are_joined() -> None:
    assert joined_words(["m", "run", "a", "@", "5"], 4) == (["m", "run", "5"], 2, "a@")
    assert joined_words(["m", "run", "a", "@"], 3) == (["m", "run", ""], 2, "a@")
    assert joined_words(["m", "--set", "k", "=", "1", "x"], 5) == (
        ["m", "--set", "k=1", "x"], 3, ""
    )  # fmt: skip
    assert joined_words(["m", "run", ""], 2) == (["m", "run", ""], 2, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_offers_variants_and_leaves_files_to_itself(place) -> None:
    script = ROOT / "completions" / "mambactl.bash"
    for words, offered in (
        ("mambactl recipe run llama3-8b @ 8", ["87.5"]),
        ("mambactl distill mine.st --data da", []),
    ):
        found = output("bash", "-c", BASH.format(script=script, words=words))
        assert found.split() == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("recipe run llama3-8b@8", ["llama3-8b@87.5"]),
        ("convert smollm2-1.", ["smollm2-1.7b"]),
        # no answer of ours, so files
        ("distill mine.st --data da", ["data.jsonl"]),
    ],
)
def test_fish_offers_names_and_files(place, line, offered) -> None:
    script = ROOT / "completions" / "mambactl.fish"
    found = output("fish", "-c", f"source {script}; complete -C 'mambactl {line}'")
    assert found.split() == offered


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("recipe run llama3-8b@8", "llama3-8b@87.5"),
        ("distill mine.st --data da", "data.jsonl"),
    ],
)
def test_zsh_offers_names_and_files(place, line, offered) -> None:
    script = ROOT / "completions" / "_mambactl"
    shown = output("zsh", "-c", ZSH.format(script=script, line=line, seconds=6))
    assert offered in shown
