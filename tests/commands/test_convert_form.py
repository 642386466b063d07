"""`convert --form`: what options and models decide, what they exclude, and what is said of it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint.load import load_lineage, open_checkpoint
from mambactl.commands.convert import plan, run
from mambactl.errors import UsageError
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.registry import MIXERS
from mambactl.options import ConvertConfig
from mambactl.options.conversion import SINKS, WINDOW, WITH_WINDOW


@dataclass(frozen=True)
class Described:
    """The mixers of a model by its configuration."""

    replaced_layers: list[int] = field(default_factory=list)
    windows: list[WindowSettings] = field(default_factory=list)
    rotates: bool = False


LLAMA, PORTABLE = Described(), Described([0])
WINDOWED, ROTARY = Described([0], [WindowSettings(5, 2)]), Described([0], rotates=True)
STATE = ("portable", "layer", None, None)
HEADS = ("faithful", "head", 64, 4)
THEIRS = ("faithful", "head", 5, 2)


@pytest.mark.parametrize(
    ("fields", "source", "aligned", "wanted"),
    [
        ({}, LLAMA, None, HEADS),
        ({"form": "faithful"}, LLAMA, None, HEADS),
        ({"by": "head"}, LLAMA, None, HEADS),
        ({"window": 128}, LLAMA, None, ("faithful", "head", 128, 4)),
        ({"sinks": 2}, LLAMA, None, ("faithful", "head", 64, 2)),
        ({"rotary": True}, LLAMA, None, HEADS),
        ({"keep_heads": "0.0"}, LLAMA, None, HEADS),
        ({"form": "faithful", "by": "layer"}, LLAMA, None, ("faithful", "layer", 64, 4)),
        ({"form": "faithful", "keep_attention": [1]}, LLAMA, None, ("faithful", "layer", 64, 4)),
        ({"by": "layer", "window": 9}, LLAMA, None, ("faithful", "layer", 9, 4)),
        ({"keep_attention": [1], "window": 9}, LLAMA, None, ("faithful", "layer", 9, 4)),
        ({"form": "portable"}, LLAMA, None, STATE),
        ({"by": "layer"}, LLAMA, None, STATE),
        ({"keep_attention": [1]}, LLAMA, None, STATE),
        ({"mixer": "mamba1"}, LLAMA, None, STATE),
        ({"mixer": "other"}, LLAMA, None, STATE),
        ({"init": "reference"}, LLAMA, None, STATE),
        ({"by": "layer", "rotary": True}, LLAMA, None, (None, "layer", None, None)),
        # a hybrid goes on as it began
        ({}, PORTABLE, None, STATE),
        ({}, WINDOWED, None, THEIRS),
        ({"by": "layer"}, WINDOWED, None, ("faithful", "layer", 5, 2)),
        ({"keep_attention": [1]}, WINDOWED, None, ("faithful", "layer", 5, 2)),
        ({"window": 64}, PORTABLE, None, HEADS),
        ({"form": "portable"}, WINDOWED, None, STATE),
        ({"init": "reference"}, WINDOWED, None, STATE),
        # ready-made mixers have the form that they have
        ({}, LLAMA, PORTABLE, STATE),
        ({}, LLAMA, WINDOWED, THEIRS),
        ({}, PORTABLE, WINDOWED, THEIRS),
        ({}, LLAMA, ROTARY, (None, "layer", None, None)),
        ({"by": "layer"}, LLAMA, WINDOWED, ("faithful", "layer", 5, 2)),
        ({"keep_attention": [1]}, LLAMA, WINDOWED, ("faithful", "layer", 5, 2)),
        ({"keep_attention": [1]}, LLAMA, PORTABLE, STATE),
        ({"keep_heads": "0.0"}, LLAMA, WINDOWED, THEIRS),
        ({"window": 5}, LLAMA, WINDOWED, THEIRS),
    ],
)
def test_what_is_decided(fields, source, aligned, wanted) -> None:
    ready = {} if aligned is None else {"mixers_from": "a.st"}
    options = ConvertConfig(**fields, **ready)
    found = options.of_form(source, aligned)
    assert (found.form, found.by, found.window, found.sinks) == wanted
    # complete options stay as they are, and nothing else changes
    assert found.of_form(source, aligned) == found
    changed = {"form", "by", "window", "sinks"}
    assert found.model_dump(exclude=changed) == options.model_dump(exclude=changed)


@pytest.mark.parametrize(
    ("fields", "aligned", "message", "hint"),
    [
        ({"form": "portable", "window": 64}, None, "does not go with --window", "--form portable"),
        ({"form": "portable", "sinks": 2}, None, "does not go with --sinks", "--form portable"),
        ({"form": "portable", "by": "head"}, None, "not go with --by head", "--form portable"),
        ({"form": "portable", "keep_heads": "0.0"}, None, "with --keep-heads", "--form portable"),
        ({"form": "portable", "rotary": True}, None, "not go with --rotary", "--form portable"),
        ({"keep_heads": "0.0", "keep_attention": [0]}, None, "and --keep-attention", "one of them"),
        ({"form": "portable"}, WINDOWED, "mixers of a.st have windows", "drop --form portable"),
        ({"form": "portable"}, ROTARY, "mixers of a.st turn", "drop --form portable"),
        ({"form": "faithful"}, PORTABLE, "mixers of a.st are a state alone", "--form faithful"),
    ],
)
def test_what_excludes_what(fields, aligned, message, hint) -> None:
    options = ConvertConfig(**fields, mixers_from=None if aligned is None else "a.st")
    with pytest.raises(UsageError, match=message) as raised:
        options.of_form(LLAMA, aligned)
    assert hint in raised.value.hint


@pytest.fixture(scope="module")
def llama(save_llama) -> str:
    """Four layers, four query heads on two KV heads, 64 channels in all and outside."""
    return save_llama(torch.bfloat16, hidden_size=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "faithful", "mixer": "mamba1"}, "--form faithful does not go with --mixer mamba"),
        ({"form": "faithful", "init": "reference"}, "--form faithful starts as the attention"),
        ({"keep_heads": "0.0", "mixer": "mamba1"}, "--keep-heads does not go with --mixer mamba1"),
        ({"window": 8, "init": "reference"}, "--window starts as the attention"),
    ],
)
def test_a_mixer_without_windows_has_no_faithful_form(llama, fields, message, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        run(ConvertConfig(**fields), llama, tmp_path / "t.st")
    assert not any(tmp_path.iterdir())


def test_the_window_of_the_form_is_that_of_the_mixers() -> None:
    assert WindowSettings(WINDOW) == WindowSettings(WINDOW, SINKS)
    assert set(WITH_WINDOW) == {name for name, spec in MIXERS.items() if spec.with_window}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {},
            "faithful form, by head: a window of 64 tokens and 4 sinks beside the state; mambactl",
        ),
        (
            {"form": "faithful", "by": "layer", "window": 9},
            "faithful form, by layer: a window of 9",
        ),
        ({"form": "portable"}, "portable form, by layer: a state alone; within what GraniteMoe"),
        ({"mixer": "mamba1"}, "portable form, by layer: a state alone; mambactl alone runs it"),
        ({"by": "layer", "rotary": True}, "form, by layer: a state alone, which rotates; mambactl"),
    ],
)
def test_the_form_and_who_can_load_it_is_said(llama, fields, sentence, tmp_path, capsys) -> None:
    run(ConvertConfig(device="cpu", **fields), llama, tmp_path / "t.st")
    assert sentence in capsys.readouterr().err


def test_heads_that_do_not_fill_the_width_are_beyond_granite(tiny_llama_dir, tmp_path, capsys):
    run(ConvertConfig(form="portable"), str(tiny_llama_dir), tmp_path / "t.st")
    assert "mambactl alone runs it (its heads are no multiple" in capsys.readouterr().err


def weights(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(str(path)) as reader:
        return {name: reader.get(name).clone() for name in reader.names()}


def test_chains_need_no_form(llama, tmp_path) -> None:
    """A student that is converted further, and mixers that are taken, keep their form."""
    window = {"window": 6, "sinks": 2}
    run(ConvertConfig(ratio=1, **window), llama, tmp_path / "all.st")
    aligned = {"mixers_from": str(tmp_path / "all.st")}
    half = run(ConvertConfig(**aligned), llama, tmp_path / "half.st")
    assert half.metrics["window"] == window and half.metrics["replaced_heads"] == 4
    most = run(ConvertConfig(ratio=0.75, **aligned), half.path, tmp_path / "most.st")
    assert most.metrics["window"] == window and most.metrics["replaced_heads"] == 2
    alone = run(ConvertConfig(ratio=0.75), half.path, tmp_path / "alone.st")
    assert alone.metrics["kept_heads"] == most.metrics["kept_heads"]
    layers = run(ConvertConfig(keep_attention=[1], **aligned), llama, tmp_path / "layers.st")
    assert layers.metrics["attention_layers"] == [1] and "kept_heads" not in layers.metrics
    with pytest.raises(UsageError, match="a window of 6 tokens and 2 sinks") as raised:
        run(ConvertConfig(window=9, **aligned), llama, tmp_path / "no.st")
    assert "--window 6 --sinks 2" in raised.value.hint
    assert not (tmp_path / "no.st").exists()


def test_the_lineage_holds_what_was_decided(llama, tmp_path) -> None:
    made = run(ConvertConfig(), llama, tmp_path / "t.st")
    recipe = load_lineage(made.path)["recipe"]
    assert [recipe[key] for key in ("form", "by", "window", "sinks")] == list(HEADS)
    assert plan(ConvertConfig(), llama)["form"] == "faithful"
    again = run(ConvertConfig(**recipe), llama, tmp_path / "again.st")
    first, second = weights(tmp_path / "t.st"), weights(Path(again.path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def as_before(folder: Path) -> None:
    """Change a lineage into one of a version without forms."""
    file = folder / "mambactl.json"
    record = json.loads(file.read_text())
    record["recipe"].pop("form")
    if record["recipe"]["window"] is None:
        record["recipe"].pop("by")
    file.write_text(json.dumps(record))


def test_resume_knows_what_other_defaults_made(cli, tiny_llama_dir, tmp_path) -> None:
    given = ("convert", str(tiny_llama_dir), "-o", "t", "--device", "cpu")
    assert cli(*given, "--form", "portable").code == 0
    as_before(tmp_path / "t")
    other = cli(*given, "--resume")
    assert other.code == 5
    assert 'made differently: by "layer" -> "head" (the default); form "portable"' in other.err
    assert "window null -> 64 (the default)" in other.err
    for spelling in (("--form", "portable"), ("--by", "layer")):
        same = cli(*given, *spelling, "--resume")
        assert (same.code, "nothing to do" in same.err) == (0, True), same.err
    assert (
        "differently: ratio 0.5 -> 0.25\n"
        in cli(*given, "--by", "layer", "--ratio", "0.25", "--resume").err
    )


def test_resume_accepts_another_spelling(cli, tiny_llama_dir, tmp_path) -> None:
    given = ("convert", str(tiny_llama_dir), "-o", "t", "--device", "cpu")
    assert cli(*given).code == 0
    explicit = ("--form", "faithful", "--by", "head", "--window", "64", "--sinks", "4")
    assert cli(*given, *explicit, "--resume").code == 0
    as_before(tmp_path / "t")
    assert cli(*given, "--resume").code == 0
    assert cli(*given, "--form", "portable", "--resume").code == 5
    assert cli(*given, "--form", "portable", "--window", "4", "--force").code == 2
