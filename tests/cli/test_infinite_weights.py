"""A weight that is NaN or infinite is named by every command that reads weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_sentences
from safetensors.torch import load_file, save_file

DAMAGED = "model.layers.1.mlp.down_proj.weight"
MIXER = "model.layers.0.mamba.in_proj.weight"
SHORT = ("--max-steps", "1", "--batch-size", "1", "--max-length", "32", "--device", "cpu")
# placeholders: GOOD and BAD are of attention alone, STUDENT is a hybrid, TEXT and PAIRS are data
COMMANDS = [
    "convert BAD --ratio 0.5",
    "distill STUDENT --teacher BAD --data TEXT",
    "sft BAD --data TEXT --teacher GOOD",
    "sft STUDENT --data TEXT --teacher BAD --kl-weight 1",
    "sft BAD --data TEXT --teacher GOOD --lora 2",
    "dpo BAD --data PAIRS",
    "eval BAD --teacher GOOD --data TEXT",
    "eval STUDENT --teacher BAD --data TEXT",
    "generate BAD -p house",
    "generate GOOD -p house --draft BAD",
    "spec-decode GOOD --draft BAD -p house",
    "spec-decode BAD --draft GOOD -p house --check",
    "bench BAD",
    "teacher-cache BAD --data TEXT",
]


def damage(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    state[name][3, 5] = float("inf")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_llama_dir: Path, save_student) -> dict[str, str]:
    place = tmp_path_factory.mktemp("infinite")
    bad = Path(shutil.copytree(tiny_llama_dir, place / "bad"))
    damage(bad, DAMAGED)
    mixers = save_student(place / "mixers")
    damage(mixers, MIXER)
    pair = {"prompt": "the old", "chosen": "the river", "rejected": "king night"}
    (place / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 8)
    return {
        "GOOD": str(tiny_llama_dir),
        "BAD": str(bad),
        "MIXERS": str(mixers),
        "STUDENT": str(save_student(place / "student.st")),
        "TEXT": write_sentences(place / "text.jsonl", 1, 8),
        "PAIRS": str(place / "pairs.jsonl"),
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_the_tensor_is_named(cli, inputs, line: str, tmp_path: Path) -> None:
    words = [inputs.get(word, word) for word in line.split()]
    if words[0] in ("distill", "sft", "dpo"):
        words += SHORT
    done = cli(*words)
    assert (done.code, done.out) == (3, ""), done.err
    assert f"{DAMAGED} holds NaN or infinite numbers" in done.err
    assert "Traceback" not in done.err
    assert [path for path in tmp_path.rglob("*.safetensors") if path.is_file()] == []


def test_a_mixer_that_is_taken_over_too(cli, inputs) -> None:
    done = cli("convert", inputs["GOOD"], "--ratio", "0.5", "--mixers-from", inputs["MIXERS"])
    assert done.code == 3 and f"{MIXER} holds NaN or infinite numbers" in done.err


def test_inspect_reads_no_weights(cli, inputs) -> None:
    assert cli("inspect", inputs["BAD"]).code == 0


def test_a_copied_tensor_too(cli, inputs, tmp_path: Path) -> None:
    """The tensor is of a layer that convert does not touch."""
    assert not torch.isfinite(load_file(f"{inputs['BAD']}/model.safetensors")[DAMAGED]).all()
    done = cli("convert", inputs["BAD"], "--keep-attention", "1", "-o", "o.st")
    assert done.code == 3 and DAMAGED in done.err
    assert list(tmp_path.glob("o.st*")) == []
