"""Only what mambactl wrote is replaced, links are not followed, and inputs are not outputs."""

import json
import os
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint.ownership import inputs_of, require_apart, require_replaceable
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.checkpoint.save import CheckpointWriter
from mambactl.commands import COMMANDS
from mambactl.errors import OutputError
from mambactl.options import DistillConfig, GenerateConfig
from mambactl.options.fields import StageConfig

LINEAGE = {"schema": 1, "stage": "convert"}
ONE = {"w": ((2,), torch.float32)}
# texts in the options of writing commands that name no file, folder or model
NO_INPUTS = {
    *("dtype", "device", "mixer", "init", "select", "stages", "schedule", "divergence", "log_to"),
    *("reference", "loss_type", "f_divergence", "prompt", "shard", "format", "generator", "k"),
    *("compile", "by", "form", "keep_heads", "to", "layout", "prefix_cache"),
    *("weights", "onpolicy_divergence", "kind", "text", "device_map"),
}


def write(out: Path, force: bool = False) -> None:
    with CheckpointWriter(out, {"model_type": "x"}, {}, LINEAGE, force) as writer:
        writer.plan(ONE)
        writer.write("w", torch.zeros(2))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def folder_of_hugging_face(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(b"weights")


def folder_with_notes(out: Path) -> None:
    write(out)
    (out / "notes.txt").write_text("mine")


def folder_with_linked_weights(out: Path) -> None:
    write(out)
    (out / "model.safetensors").rename(out.parent / "weights")
    (out / "model.safetensors").symlink_to(out.parent / "weights")


def folder_with_other_lineage(out: Path) -> None:
    folder_of_hugging_face(out)
    (out / "mambactl.json").write_text("[1]")


def link_to_own(out: Path) -> None:
    write(out.parent / "real")
    out.symlink_to(out.parent / "real")


FOREIGN = {
    "hugging-face": (folder_of_hugging_face, "no mambactl.json of ours"),
    "notes": (folder_with_notes, "holds notes.txt, which mambactl did not write"),
    "linked": (folder_with_linked_weights, "holds model.safetensors, which"),
    "other-lineage": (folder_with_other_lineage, "no mambactl.json of ours"),
    "link": (link_to_own, "is a symbolic link"),
    "dangling": (lambda out: out.symlink_to("nowhere"), "is a symbolic link"),
    "text": (lambda out: out.write_text("thesis"), "was not written by mambactl"),
    "pipe": (os.mkfifo, "is a pipe or device"),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    # a single file has nothing in it
    [(kind, "t") for kind in FOREIGN]
    + [(kind, "t.st") for kind in FOREIGN if kind not in ("notes", "linked")],
)
def test_what_is_not_ours_is_not_replaced(kind: str, name: str, tmp_path: Path) -> None:
    make, message = FOREIGN[kind]
    out = tmp_path / name
    make(out)
    before = tree(tmp_path)
    for attempt in (lambda: write(out, True), lambda: RunFolder(out, {}).check(False, True)):
        with pytest.raises(OutputError, match=message):
            attempt()
    assert tree(tmp_path) == before


def test_a_damaged_checkpoint_is_not_taken_for_ours(tmp_path: Path) -> None:
    out = tmp_path / "t.st"
    write(out)
    out.write_bytes(out.read_bytes()[:40])
    with pytest.raises(OutputError, match="or is damaged"):
        write(out, True)


@pytest.mark.parametrize("name", ["t", "t.st"])
def test_what_is_ours_or_empty_is_replaced(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    out.touch() if name == "t.st" else out.mkdir()
    for _ in range(2):
        write(out, True)
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_measurements_of_what_is_replaced_are_kept_beside_it(tmp_path: Path, capfd) -> None:
    out = tmp_path / "t"
    for number in (1, 2):
        write(out, True)
        (out / "results").mkdir()
        (out / "results" / "eval.json").write_text(str(number))
    write(out, True)
    assert not (out / "results").exists()
    kept = {path.name: (path / "eval.json").read_text() for path in tmp_path.glob("t.*")}
    assert kept == {"t.results-replaced": "1", "t.results-replaced-2": "2"}
    assert "t.results-replaced-2" in capfd.readouterr().err


def test_rows_are_ours_when_their_lineage_says_so(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("{}\n")
    with pytest.raises(OutputError, match="was not written by mambactl"):
        require_replaceable(out, True)
    (tmp_path / "rows.jsonl.mambactl.json").write_text(json.dumps(LINEAGE))
    require_replaceable(out, True)


def test_somebodys_files_beside_a_new_checkpoint_are_kept(tmp_path: Path) -> None:
    ledger = tmp_path / "t.st.metrics.jsonl"
    ledger.write_text("my measurements\n")
    with pytest.raises(OutputError, match="t.st.metrics.jsonl exists and was not written"):
        write(tmp_path / "t.st")
    assert ledger.read_text() == "my measurements\n"
    # of a checkpoint that was deleted by hand
    ledger.write_text('{"phase": "align", "step": 1}\n')
    write(tmp_path / "t.st")
    assert [path.name for path in tmp_path.iterdir()] == ["t.st"]


FOREIGN_PARTIAL = {
    "file": lambda path: path.write_text("precious"),
    "folder": lambda path: (path.mkdir(), (path / "thesis.tex").write_text("precious")),
    "link": lambda path: (
        (path.parent / "thesis").mkdir(),
        (path.parent / "thesis" / "run.json").write_text('{"stage": "sft"}'),
        path.symlink_to("thesis"),
    ),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "link-inside": lambda path: (
        path.mkdir(),
        (path / "run.json").write_text('{"stage": "sft"}'),
        (path.parent / "thesis.tex").write_text("precious"),
        (path / "metrics.jsonl").symlink_to("../thesis.tex"),
    ),
    "other-run": lambda path: (
        path.mkdir(),
        (path / "run.json").write_text('{"id": 3}'),
        (path / "data").write_text("precious"),
    ),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["t", "t.st"])
@pytest.mark.parametrize("kind", FOREIGN_PARTIAL)
def test_a_foreign_partial_is_left_alone(kind: str, name: str, force: bool, tmp_path: Path) -> None:
    FOREIGN_PARTIAL[kind](tmp_path / f"{name}.partial")
    before = tree(tmp_path)
    out = tmp_path / name
    with pytest.raises(
        OutputError, match=r"\.partial.* is .*link|\.partial (is no|holds)"
    ) as caught:
        write(out, force)
    assert caught.value.hint == "move it away, or choose another -o"
    for resume in (False, not force):
        folder = RunFolder(out, {"stage": "sft"})
        with pytest.raises(OutputError, match=r"\.partial"):
            folder.check(resume, force)
        with pytest.raises(OutputError, match=r"\.partial"), folder.open(resume, force):
            pass
    assert tree(tmp_path) == before


def test_files_that_somebody_put_into_our_folder_stay(tmp_path: Path, capfd) -> None:
    out = tmp_path / "t.st"
    with pytest.raises(RuntimeError), RunFolder(out, {"stage": "sft"}).open(False, False):
        (tmp_path / "t.st.partial" / "notes.txt").write_text("mine")
        raise RuntimeError
    assert tree(tmp_path / "t.st.partial") == {"notes.txt": b"mine"}
    assert "stays: it holds notes.txt" in capfd.readouterr().err


@pytest.mark.parametrize(
    "given",
    ["t", "t/model.safetensors", "link", "link/data.jsonl", "t.partial/trainer", "./x/../t"],
)
def test_an_input_inside_the_output_is_refused(given: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("t", "t.partial/trainer", "x"):
        Path(folder).mkdir(parents=True)
    for file in ("t/model.safetensors", "t/data.jsonl"):
        Path(file).touch()
    Path("link").symlink_to("t")
    with pytest.raises(OutputError, match=r"--data .* (is|lies inside) .*/t"):
        require_apart(tmp_path / "t", [("--data", given)])
    require_apart(tmp_path / "t", [("--data", "x"), ("--data", "t2"), ("MODEL", "org/t")])


def test_another_name_of_the_output_is_the_output(tmp_path: Path) -> None:
    (tmp_path / "t.st").touch()
    os.link(tmp_path / "t.st", tmp_path / "m.st")
    with pytest.raises(OutputError, match="MODEL .*m.st is .*t.st"):
        require_apart(tmp_path / "t.st", [("MODEL", str(tmp_path / "m.st"))])
    (tmp_path / "t.st.metrics.jsonl").touch()
    with pytest.raises(OutputError, match="--data"):
        require_apart(tmp_path / "t.st", [("--data", str(tmp_path / "t.st.metrics.jsonl"))])


def test_inputs_are_found_in_the_options() -> None:
    config = DistillConfig(
        data=["a.jsonl=0.7", "b"], eval_data=["c"], teacher="t", teacher_cache="k"
    )
    assert list(inputs_of(config)) == [
        ("--data", "a.jsonl"), ("--data", "b"), ("--eval-data", "c"), ("--teacher", "t"),
        ("--teacher-cache", "k"),
    ]  # fmt: skip
    assert ("--draft", "d.st") in list(inputs_of(GenerateConfig(draft="d.st", dataset=["p"])))


def test_every_text_in_the_options_of_writers_is_an_input_or_known_not_to_be() -> None:
    unknown = {
        f"{command.name}: {name}"
        for command in COMMANDS.values()
        if command.writes != "nothing"
        for name, field in command.options.model_fields.items()
        if "str" in str(field.annotation) or "Literal" in str(field.annotation)
        if name not in StageConfig.inputs | NO_INPUTS
    }
    assert unknown == set()
