"""Paths that -o may not name, and exit codes: inputs, links, and what mambactl did not write."""

import json
import shutil
from pathlib import Path

import pytest

from mambactl.checkpoint.publishing import WorkFolder


@pytest.fixture
def place(cli, tiny_llama_dir: Path, random_texts: Path, tmp_path: Path) -> Path:
    """A teacher, a student of it as a folder and as a file, and text in the student's folder."""
    shutil.copytree(tiny_llama_dir, tmp_path / "teacher")
    for out in ("s", "s.st"):
        assert cli("convert", "teacher", "-o", out).code == 0
    shutil.copy(random_texts, tmp_path / "text.jsonl")
    (tmp_path / "s.partial").mkdir()
    shutil.copy(random_texts, tmp_path / "s.partial" / "text.jsonl")
    (tmp_path / "link").symlink_to("s")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    recipe = {"stages": {"convert": {"model": "teacher"}}}
    (tmp_path / "s" / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


TRAINING = ("--data", "text.jsonl", "--max-steps", "1", "--device", "cpu")


# what a dry run finds, too, beside inputs
FOUND_EARLY = [("convert", "teacher", "-o", out) for out in ("link", "s", "folder", "text.jsonl")]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("convert", "s", "-o", "s"), "MODEL s is {}/s, which this command would replace"),
        (("convert", "s", "-o", "link"), "MODEL s is {}/link, which"),
        (("convert", "s.st", "-o", "./s.st"), "MODEL s.st is {}/s.st, which"),
        (("convert", "teacher", "-o", "teacher/../s", "--recipe", "s/recipe.yaml"), "--recipe"),
        (("convert", "teacher", "--calibrate", "s.partial/text.jsonl", "-o", "s"), "--calibrate"),
        (("convert", "teacher", "--mixers-from", "s", "-o", "s"), "--mixers-from s is"),
        (("distill", "s", *TRAINING, "--teacher", "s.st", "-o", "s.st"), "--teacher s.st is"),
        (("distill", "s", *TRAINING, "-o", "teacher"), "the teacher {}/teacher is"),
        (("convert", "s", "-o", "teacher"), "has no mambactl.json of ours"),
        (("convert", "teacher", "-o", "link"), "is a symbolic link"),
        (("convert", "teacher", "-o", "s"), "s.partial holds what no command of ours left"),
        (("convert", "teacher", "-o", "."), "MODEL teacher lies inside {}, which"),
        (("convert", "teacher", "-o", "folder"), "folder is a folder with other content"),
        (("convert", "teacher", "-o", "/"), "cannot be written"),
        (("convert", "teacher", "-o", "text.jsonl"), "was not written by mambactl"),
        (("convert", "teacher", "-o", "text.jsonl/s"), "Not a directory"),
        (("convert", "teacher", "-o", "x" * 250), "File name too long"),
    ],
)
def test_refused_with_code_5_and_nothing_changes(cli, place, command, message) -> None:
    if "s.partial" not in message:
        shutil.rmtree(place / "s.partial") if "--calibrate" not in command else None
    if "recipe" not in message:
        (place / "s" / "recipe.yaml").unlink()
    before = tree(place)
    done = cli(*command, "--force")
    assert (done.code, done.out) == (5, ""), done.err
    assert message.format(place) in done.err and "hint: " in done.err
    assert "Traceback" not in done.err
    assert tree(place) == before
    if command in FOUND_EARLY:
        planned = cli(*command, "--force", "--dry-run")
        assert planned.code == 5 and message.format(place) in planned.err


def test_a_dry_run_finds_a_run_that_was_begun(cli, place) -> None:
    work = WorkFolder(place / "new", {"stage": "distill"})
    work.path.mkdir()
    work.begin(False)
    (work.path / "state.pt").touch()
    done = cli("distill", "s", *TRAINING, "-o", "new", "--dry-run")
    assert done.code == 5 and "new.partial holds an unfinished run" in done.err
    assert cli("distill", "s", *TRAINING, "-o", "new", "--dry-run", "--force").code == 0


def test_resume_publishes_what_is_complete_and_force_says_what_it_discards(
    cli, tiny_llama_dir, tmp_path, monkeypatch
) -> None:
    command = ("convert", str(tiny_llama_dir), "-o", "t.st")
    assert cli(*command, "--ratio", "1").code == 0
    older = (tmp_path / "t.st").read_bytes()

    def dies(_: WorkFolder) -> None:
        raise RuntimeError("abrupt")

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "publish", dies)
        assert cli(*command, "--force").code == 1
    assert (tmp_path / "t.st").read_bytes() == older
    assert cli(*command, "--ratio", "0.25", "--resume").code == 5
    done = cli(*command, "--resume")
    assert (done.code, done.out) == (0, f"{tmp_path / 't.st'}\n")
    assert (tmp_path / "t.st").read_bytes() != older
    assert [path.name for path in tmp_path.iterdir()] == ["t.st"]
