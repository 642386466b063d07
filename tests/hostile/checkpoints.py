"""Damaged checkpoints, and the command lines that read them."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hostile import side_file_damage as side
from hostile import weight_damage as weights
from hostile.checkpoint_files import SAFETENSORS, files
from hostile.runner import CommandLine
from hostile.starting_points import MODELS

from mambactl.errors import ExitCode

CPU = ("--device", "cpu")
TRAIN = (*CPU, "--max-steps", "1", "--batch-size", "2", "--max-length", "64", "--warmup", "0")
# command lines by name, with how often each is drawn; MODEL stands for the checkpoint
COMMANDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "inspect": (22, ("inspect", "MODEL")),
    "inspect tensors": (4, ("inspect", "MODEL", "--tensors", "--json")),
    "convert": (12, ("convert", "MODEL", "-o", "out", *CPU)),
    "convert to a file": (6, ("convert", "MODEL", "--ratio", "1", "-o", "out.st", *CPU)),
    "generate": (14, ("generate", "MODEL", "-p", "the river", "--max-new-tokens", "4", *CPU)),
    "answers": (
        5,
        ("generate", "MODEL", "--dataset", "../inputs/data/text.jsonl", "--max-samples", "2",
         "--max-new-tokens", "4", "--keep-unfinished", "-o", "out.jsonl", *CPU),
    ),
    "eval": (9, ("eval", "MODEL", "--data", "../inputs/data/held-out.jsonl", "--max-length", "32",
                 *CPU)),
    "sft": (9, ("sft", "MODEL", "--data", "../inputs/data/chats.jsonl", "-o", "out", *TRAIN)),
    "distill": (6, ("distill", "MODEL", "--data", "../inputs/data/text.jsonl", "-o", "out.st",
                    *TRAIN)),
    "dpo": (4, ("dpo", "MODEL", "--data", "../inputs/data/pairs.jsonl", "-o", "out", *TRAIN)),
    "spec-decode": (6, ("spec-decode", "--draft", "ngram", "--target", "MODEL", "-k", "2",
                        "--max-new-tokens", "4", "--check", *CPU)),
    "bench": (3, ("bench", "MODEL", "--input-len", "8", "--output-len", "2", "--iters", "1", *CPU)),
}  # fmt: skip
# what has a lineage, and what commands need for the others
STUDENTS = ("single file", "ours", "windows", "two mixers")
TEACHER = {"eval": ("--teacher", "MODEL"), "dpo": ("--reference", "self")}
# without attention there is nothing to convert, without a lineage nothing to distil
INSTEAD = {
    "distill": ({"llama", "sharded", "pickled", "gguf", "state-spaces"}, "convert"),
    "convert": ({"state-spaces", "two mixers"}, "generate"),
    "convert to a file": ({"state-spaces", "two mixers"}, "eval"),
}
# where results about a checkpoint are kept
RESULTS = ("model/results", "model/README.md", "model.st.results", "model.gguf.results")


def make_case(draw: Random, inputs: Path, work: Path) -> tuple[CommandLine, str]:
    """Damage a checkpoint in `work`; returns the command line that reads it, and what it is."""
    kind = draw.choice(list(MODELS))
    shutil.copytree(inputs / kind, work, dirs_exist_ok=True)
    model = work / MODELS[kind]
    fitting = [change for change in CHANGES if change.fits(model)]
    change = draw.choices(fitting, [each.weight for each in fitting])[0]
    names = change.commands or tuple(COMMANDS)
    command = draw.choices(names, [COMMANDS[name][0] for name in names])[0]
    what = change.make(model, draw)
    # `inspect` reads headers alone
    codes = frozenset() if command.startswith("inspect") else change.codes
    line = CommandLine(words_of(kind, command), writes=("out", *RESULTS), codes=codes)
    return line, f"{kind}: {what}"


def words_of(kind: str, command: str) -> tuple[str, ...]:
    """The words of a command, or of another one where it can do nothing with this kind of model."""
    while command in INSTEAD and kind in INSTEAD[command][0]:
        command = INSTEAD[command][1]
    words = COMMANDS[command][1]
    if kind not in STUDENTS:
        words += TEACHER.get(command, ())
    return tuple(MODELS[kind] if word == "MODEL" else word for word in words)


@dataclass(frozen=True)
class Change:
    """A kind of damage: how often it is drawn, and which models and commands it concerns."""

    weight: int
    # damages the checkpoint at a path; returns what it did
    make: Callable[[Path, Random], str]
    fits: Callable[[Path], bool] = Path.exists
    # all of them where it is empty
    commands: tuple[str, ...] = ()
    codes: frozenset[int] = frozenset()


def _folder(model: Path) -> bool:
    return model.is_dir()


def _has_side_files(model: Path) -> bool:
    return model.suffix != ".gguf"


def _has_tensors(model: Path) -> bool:
    return bool(files(model, *SAFETENSORS))


def _has_lineage(model: Path) -> bool:
    return model.suffix == ".st" or (model / "mambactl.json").exists()


CHATS = ("generate", "sft", "answers", "spec-decode")
FOLLOWS_A_TEACHER = ("distill", "eval", "dpo", "inspect", "convert")
CHANGES = (
    Change(18, weights.damaged_bytes),
    Change(10, weights.another_entry),
    Change(45, side.damaged_json, _has_side_files),
    Change(12, weights.damaged_header, _has_tensors),
    Change(8, weights.wrong_tensor, _has_tensors),
    Change(
        7, weights.not_finite,
        codes=frozenset({ExitCode.MODEL, ExitCode.CHECK}),
    ),
    Change(8, side.hostile_template, commands=CHATS),
    Change(5, weights.running_pickle, _folder),
    Change(5, side.own_code, _folder),
    Change(8, side.misleading_lineage, _has_lineage, FOLLOWS_A_TEACHER),
    Change(8, side.odd_sizes, _has_side_files),
    Change(5, side.odd_tokenizer, _has_side_files, ("generate", "sft", "eval", "convert")),
    Change(25, weights.large_counts, lambda model: model.suffix == ".gguf"),
)  # fmt: skip
