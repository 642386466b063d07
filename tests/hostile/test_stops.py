"""Whatever operation a stage is stopped before, the next command ends it as if nothing had been.

An old OUT is there, bit for bit, until its complete successor is.
"""

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS
from hostile.stops import operations_of, run_stopped

# numbers that a clock decides, and when something was made
TIMED = {
    *("created", "seconds", "starting_seconds", "tokens_per_second", "total_flos", "date"),
    *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
    "train_tokens_per_second",
}
# of the operations before publishing, one of so many is tried
EVERY = 3
TRAINING = ["--batch-size", "2", "--max-length", "32", "--warmup", "1", "--save-every", "2"]


@dataclass(frozen=True)
class Stage:
    """A command line but for its end: `resume` is what a stopped command is given again.

    `old` is the command that makes what is replaced, if it is replaced.
    """

    command: list[str]
    out: str
    resume: str = "--resume"
    old: list[str] | None = None

    @property
    def arguments(self) -> list[str]:
        """The whole command line."""
        out = ["-o", self.out] if self.out else []
        return [*self.command, *out, *(["--force"] if self.old else [])]

    def again(self, folder: Path, published: bool) -> list[str]:
        """The command that goes on: where nothing had begun, it is the command itself."""
        mark = folder / f"{self.out}.partial" / "run.json"
        begun = mark.exists() and json.loads(mark.read_text())["stage"] != "checkpoint"
        if self.old and not begun and not published:
            return self.arguments
        return [*self.command, "-o", self.out, self.resume]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_llama_dir, save_student) -> dict[str, str]:
    """A teacher, a student and data, by name; everything that stages import is loaded once."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    import mambactl.commands.convert
    import mambactl.commands.distill
    import mambactl.commands.dpo
    import mambactl.commands.eval
    import mambactl.commands.generate
    import mambactl.commands.sft
    import mambactl.train.matching
    import mambactl.train.preference  # noqa: F401

    folder = tmp_path_factory.mktemp("inputs")
    texts = [{"text": " ".join(WORDS[start:] + WORDS[:start])} for start in range(12)]
    pairs = [
        {"prompt": f"{a} {b}", "chosen": f"the {b}", "rejected": f"old {a} night"}
        for a in WORDS[:4]
        for b in WORDS[6:10]
    ]
    prompts = [{"prompt": " ".join(WORDS[: n + 1])} for n in range(5)]
    for name, rows in {"text": texts, "pairs": pairs, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = save_student(folder / "student")
    names = {name: str(folder / f"{name}.jsonl") for name in ("text", "pairs", "prompts")}
    return {"teacher": str(tiny_llama_dir), "student": str(student), **names}


def stages(inputs: dict[str, str]) -> dict[str, Stage]:
    """Every stage that writes."""
    convert = ["convert", inputs["teacher"]]
    older = [*convert, "--ratio", "0.25"]
    distill = ["distill", inputs["student"], "--data", inputs["text"], *TRAINING]
    distill += ["--max-steps", "4", "--device", "cpu"]
    sft = ["sft", inputs["student"], "--data", inputs["text"], *TRAINING]
    sft += ["--max-steps", "3", "--device", "cpu"]
    dpo = ["dpo", inputs["student"], "--data", inputs["pairs"], *TRAINING, "--reference", "self"]
    dpo += ["--max-steps", "3", "--device", "cpu"]
    cache = ["teacher-cache", inputs["teacher"], "--data", inputs["text"], "--max-steps", "4"]
    cache += ["--batch-size", "2", "--max-length", "32", "--device", "cpu"]
    answers = ["generate", inputs["teacher"], "--dataset", inputs["prompts"], "--device", "cpu"]
    answers += ["--max-new-tokens", "4", "--batch-size", "2", "--keep-unfinished"]
    exported = ["export", inputs["teacher"], "--no-check"]
    return {
        "export-folder": Stage(exported, "t"),
        "export-folder-old": Stage(exported, "t", "--force", [*exported, "--dtype", "bfloat16"]),
        "convert-file": Stage(convert, "t.st"),
        "convert-folder": Stage(convert, "t"),
        "convert-file-old": Stage(convert, "t.st", "--force", older),
        "convert-folder-old": Stage(convert, "t", "--force", older),
        "distill-file": Stage(distill, "t.st"),
        "distill-folder-old": Stage(distill, "t", old=older),
        "sft-file-old": Stage(sft, "t.st", old=older),
        "sft-folder": Stage(sft, "t"),
        "dpo-file": Stage(dpo, "t.st"),
        "dpo-folder-old": Stage(dpo, "t", old=older),
        "teacher-cache": Stage(cache, "t"),
        "teacher-cache-old": Stage(cache, "t", old=[*cache, "--samples", "3"]),
        "generate": Stage(answers, "t.jsonl"),
        "generate-old": Stage(answers, "t.jsonl", old=[*answers, "--max-new-tokens", "3"]),
    }


STAGES = tuple(stages(dict.fromkeys(("teacher", "student", "text", "pairs", "prompts"), "")))


@dataclass(frozen=True)
class Reference:
    """A stage that was not stopped: what it did with files, and what it left."""

    stage: Stage
    operations: list[str]
    before: Path
    left: dict[str, Any]

    @property
    def publishing(self) -> int:
        """The first operation that is about the complete result."""
        return next(
            number
            for number, what in enumerate(self.operations, 1)
            if what.startswith("open") and "finished.json" in what
        )


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory, inputs) -> Callable[[str], Reference]:
    """reference_of(name) -> the Reference of a stage."""
    known: dict[str, Reference] = {}

    def reference(name: str) -> Reference:
        if name not in known:
            stage = stages(inputs)[name]
            place = tmp_path_factory.mktemp(f"ref-{name}")
            before = place / "before"
            before.mkdir()
            if stage.old:
                made = run_stopped([*stage.old, "-o", stage.out], before, None)
                assert made.code == 0, made.said
                measure(before / stage.out)
            work = place / "work"
            shutil.copytree(before, work)
            done = operations_of(stage.arguments, work)
            known[name] = Reference(stage, done, before, contents(work))
        return known[name]

    return reference


def measure(checkpoint: Path) -> None:
    """Keep a measurement in a folder, as `eval` does."""
    if checkpoint.is_dir() and (checkpoint / "config.json").exists():
        (checkpoint / "results").mkdir()
        (checkpoint / "results" / "eval-text.json").write_text('{"stage": "eval"}')


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder by its name, without what a clock decides."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> Any:
    if path.suffix == ".png":
        # seconds are among what it shows
        return path.read_bytes()[:8]
    if path.suffix == ".st":
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        record = header["__metadata__"]
        record["mambactl.json"] = _untimed(json.loads(record["mambactl.json"]))
        return header, raw[end:]
    if path.name.endswith("metrics.jsonl"):
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name.endswith(".json"):
        return _untimed(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "README.md":
        # seconds come behind steps and tokens
        row = rb"(?m)^(\| [^|]+ \| [\d,]+ \| [\d,]+ \|) [\d,]+ \|"
        return re.sub(row, rb"\1 - |", path.read_bytes())
    return path.read_bytes()


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in TIMED}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def of_out(found: dict[str, Any], out: str) -> dict[str, Any]:
    """OUT itself: what is in a folder but for measurements, or the file."""
    inside = {name: value for name, value in found.items() if name.startswith(f"{out}/")}
    kept = {name: value for name, value in inside.items() if "/results/" not in name}
    return kept or {out: found[out]} if kept or out in found else {}


def check_stop(reference: Reference, number: int, stop: signal.Signals, work: Path) -> None:
    """Stop a stage before one operation, look at OUT, go on, and compare with what it should be."""
    stage = reference.stage
    shutil.copytree(reference.before, work)
    what = f"before {number}, {reference.operations[number - 1]}"
    ended = run_stopped(stage.arguments, work, number, stop)
    expected = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (143, 0)}[stop]
    assert ended.code in expected, (what, ended)
    assert "Traceback" not in ended.said, (what, ended.said)
    old, new = contents(reference.before), reference.left
    out = of_out(contents(work), stage.out)
    complete = [of_out(new, stage.out), of_out(old, stage.out) if stage.old else {}]
    assert out in complete, what
    if ended.code != 0:
        done = run_stopped(stage.again(work, out == complete[0]), work, None)
        assert done.code == 0, (what, done.said)
    left = contents(work)
    assert left.keys() == new.keys(), what
    for name, value in left.items():
        assert value == new[name], (what, name, _differences(value, new[name]))
    assert sorted(path.name for path in work.iterdir()) == sorted(
        {name.partition("/")[0] for name in new}
    ), what


def _differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Differences of nested values, in short."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted(found.keys() | expected.keys())
        pairs = [(key, found.get(key), expected.get(key)) for key in keys]
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        pairs = [(n, *pair) for n, pair in enumerate(zip(found, expected, strict=False))]
    else:
        return [] if found == expected else [f"{where}: {str(found)[:99]} {str(expected)[:99]}"]
    return [line for key, *pair in pairs for line in _differences(*pair, f"{where}/{key}")]


# where the order of publishing is decided; the other operations are behind the marker
SAMPLE = [
    *(("convert-file", -1, signal.SIGKILL), ("convert-folder-old", 2, signal.SIGKILL)),
    *(("convert-folder-old", 4, signal.SIGKILL), ("convert-file-old", 3, signal.SIGTERM)),
    *(("sft-file-old", 2, signal.SIGKILL), ("sft-file-old", 4, signal.SIGKILL)),
    pytest.param("sft-file-old", 3, signal.SIGTERM, marks=pytest.mark.slow),
    ("generate", 3, signal.SIGKILL),
    *(("generate", 2, signal.SIGKILL), ("teacher-cache", 2, signal.SIGKILL)),
]


@pytest.mark.parametrize(("name", "after", "stop"), SAMPLE)
def test_a_stop_while_publishing_loses_nothing(reference_of, name, after, stop, tmp_path) -> None:
    reference = reference_of(name)
    check_stop(reference, reference.publishing + after, stop, tmp_path / "work")


@pytest.mark.hostile
@pytest.mark.parametrize("name", STAGES)
def test_a_stop_before_any_operation_loses_nothing(reference_of, name, tmp_path) -> None:
    reference = reference_of(name)
    last = len(reference.operations)
    assert last - reference.publishing > 5
    # those of training are many and alike
    before = range(1, reference.publishing - 2, EVERY)
    for number in [*before, *range(reference.publishing - 2, last + 1)]:
        stops = [signal.SIGKILL] + [signal.SIGTERM] * (number % 4 == 0)
        for stop in stops:
            check_stop(reference, number, stop, tmp_path / f"{number}-{stop.name}")
            shutil.rmtree(tmp_path / f"{number}-{stop.name}")


@pytest.mark.hostile
def test_a_stop_while_measurements_are_kept_leaves_the_checkpoint_and_no_rest(
    inputs, tmp_path
) -> None:
    command = ["eval", "s", "--data", inputs["text"], "--max-length", "32", "--device", "cpu"]
    before, whole = tmp_path / "before", tmp_path / "whole"
    shutil.copytree(inputs["student"], before / "s")
    shutil.copytree(before, whole)
    operations = operations_of(command, whole)
    assert len(operations) > 5
    for number in range(1, len(operations) + 1):
        work = tmp_path / str(number)
        shutil.copytree(before, work)
        ended = run_stopped(command, work, number)
        assert ended.code == -signal.SIGKILL, ended
        kept = contents(before)
        assert {name: contents(work)[name] for name in kept if "README" not in name} == {
            name: value for name, value in kept.items() if "README" not in name
        }
        again = run_stopped(command, work, None)
        assert again.code == 0, again.said
        assert contents(work).keys() == contents(whole).keys(), operations[number - 1]
        assert measured(work) == measured(whole)


def measured(work: Path) -> tuple[str, Any]:
    """The card of a checkpoint but for the time of measuring, and what was measured of it."""
    (kept,) = (work / "s" / "results").iterdir()
    card = re.sub(r"on cpu, .*", "", (work / "s" / "README.md").read_text())
    return card, json.loads(kept.read_text())["metrics"]
