"""Length of a run in steps and epochs, its log lines, and the date in its chats."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from conftest import WORDS

from mambactl.checkpoint import run_folder
from mambactl.commands import distill, dpo, sft, teacher_cache
from mambactl.errors import UsageError
from mambactl.options import DistillConfig, DpoConfig, SftConfig, TeacherCacheConfig
from mambactl.train.epochs import with_steps
from mambactl.train.job import Job

SIZES = {"device": "cpu", "batch_size": 2, "max_length": 32}
DAY = date(2001, 2, 3)


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("s") / "student"))


@pytest.fixture
def write(tmp_path):
    def save(name, count, form):
        draw = torch.Generator().manual_seed(count)
        path = tmp_path / name
        words = (torch.randint(len(WORDS), (20,), generator=draw).tolist() for _ in range(count))
        rows = [form(" ".join(WORDS[i] for i in row)) for row in words]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return save


def text(words):
    return {"text": words}


def chat(words):
    turns = [{"role": "user", "content": words[:20]}, {"role": "assistant", "content": "the river"}]
    return {"messages": turns}


def pair(words):
    return {"prompt": words[:20], "chosen": "the river", "rejected": "a house"}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [DistillConfig, SftConfig, DpoConfig, TeacherCacheConfig])
def test_epochs_and_steps_exclude_each_other(options) -> None:
    options(epochs=1).require_coherent()
    with pytest.raises(UsageError, match="--epochs and --max-steps both"):
        # also where the value is the usual one
        options(epochs=1, max_steps=200).require_coherent()


def test_epochs_are_steps_once_rows_are_counted(student, write, tmp_path, capsys) -> None:
    found = {
        "sft": (sft.run, SftConfig, write("chats.jsonl", 9, chat), {"packing": False}),
        "distill": (distill.run, DistillConfig, write("texts.jsonl", 9, text), {"align_steps": 3}),
        "dpo": (dpo.run, DpoConfig, write("pairs.jsonl", 9, pair), {"reference": "self"}),
    }
    for name, (run, options, data, more) in found.items():
        result = run(options(**SIZES, **more, data=[data], epochs=1.5), student, tmp_path / name)
        # ceil(1.5 * 9 / 2)
        assert sum(phase["steps"] for phase in result.metrics.values() if "steps" in phase) == 7
        assert len(lines(tmp_path / name)) == 7
        assert "7 steps of 2 " in capsys.readouterr().err


def test_epochs_of_a_mixture_are_those_of_the_set_that_is_smallest_for_its_share(
    student, write
) -> None:
    from mambactl.train.rows import training_rows

    few, many = write("few.jsonl", 4, text), write("many.jsonl", 90, text)
    data = [f"{few}=0.25", f"{many}=0.75"]
    job = Job.of("sft", SftConfig(**SIZES, packing=False, data=data, epochs=3), student)
    rows = training_rows(job, job.tokenizer())
    # four rows three times, and three of the others for each of them
    assert len(rows) == 4 * 3 * 4
    assert with_steps(job, len(rows)).config.max_steps == len(rows) // 2


def test_a_step_larger_than_the_data_is_reported(student, capsys) -> None:
    job = Job.of("sft", SftConfig(**SIZES | {"batch_size": 64}, data=["x"], max_steps=3), student)
    assert with_steps(job, 10) == job
    said = capsys.readouterr().err
    assert "3 steps of 64 packed rows: 19.2 epochs, of 10 packed rows" in said
    assert "warning: a step of 64 packed rows is larger than the data, which has 10" in said


def test_the_first_step_learns_and_lines_are_said(student, write, tmp_path, capsys) -> None:
    ways = {
        "sft": (sft.run, SftConfig, chat, {}),
        "dpo": (dpo.run, DpoConfig, pair, {"reference": "self"}),
    }
    for name, (run, options, form, more) in ways.items():
        data = write(f"{name}.jsonl", 9, form)
        given = {**SIZES, "max_steps": 4, "warmup": 2, "lr": 3e-3, "log_every": 2, **more}
        run(options(**given, data=[data]), student, tmp_path / name)
        rates = [line["lr"] for line in lines(tmp_path / name)]
        assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3 * 0.505], rel=1e-3)
        said = [line for line in capsys.readouterr().err.splitlines() if " step " in line]
        assert [line.partition(":")[0] for line in said] == [f"{name} step 2", f"{name} step 4"]
        assert all("loss " in line and "gradient norm " in line for line in said)


def test_distill_reports_to_trackers(student, write, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    config = DistillConfig(
        **SIZES, max_steps=4, data=[write("a.jsonl", 9, text)], log_to=["tensorboard"],
        eval_data=[write("b.jsonl", 9, text)], eval_tokens=64, log_every=1,
    )  # fmt: skip
    distill.run(config, student, tmp_path / "out")
    events = next((tmp_path / "out.logs").rglob("events*")).read_bytes()
    for tag in (b"train/loss", b"train/learning_rate", b"train/grad_norm", b"eval/kl"):
        assert tag in events
    assert "logits step 2: loss " in capsys.readouterr().err


def test_a_tracker_that_fails_is_left_alone(student, write, tmp_path, monkeypatch, capsys) -> None:
    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", fail)
    config = DistillConfig(
        **SIZES, max_steps=2, data=[write("a.jsonl", 9, text)], log_to=["tensorboard"]
    )
    distill.run(config, student, tmp_path / "out")
    assert capsys.readouterr().err.count("no ink") == 1


class Past(date):
    @classmethod
    def today(cls) -> date:
        return DAY


@pytest.fixture
def dated(student, tmp_path) -> str:
    """The student with a template that prints the time of rendering."""
    folder = Path(shutil.copytree(student, tmp_path / "dated"))
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.write_text("{{ strftime_now('%d %m %Y %H:%M:%S') }} " + text)
    return str(folder)


def test_a_cache_of_yesterday_serves_today(dated, write, tmp_path, monkeypatch, capsys) -> None:
    data, cache = write("chats.jsonl", 9, chat), str(tmp_path / "cache")
    rows = {**SIZES, "max_steps": 2, "data": [data], "max_length": 64}
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "date", Past)
        config = TeacherCacheConfig(**rows, assistant_only_loss=True)
        teacher_cache.run(config, dated, Path(cache))
    given = SftConfig(**rows, teacher=dated, teacher_cache=cache, kl_weight=1)
    assert sft.run(given, dated, tmp_path / "out").metrics["sft"]["steps"] == 2
    assert "chat templates print 2001-02-03" in capsys.readouterr().err


def test_a_run_goes_on_with_its_day(dated, write, tmp_path, monkeypatch) -> None:
    config = SftConfig(**SIZES | {"max_length": 64}, max_steps=2, save_every=1,
                       data=[write("chats.jsonl", 9, chat)])  # fmt: skip
    days = []
    rows = sft.training_rows

    def noted(job, *others):
        days.append(job.day)
        return rows(job, *others)

    def fails(*_):
        raise RuntimeError("abrupt")

    monkeypatch.setattr(sft, "training_rows", noted)
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "date", Past)
        patched.setattr(sft, "save_result", fails)
        with pytest.raises(RuntimeError, match="abrupt"):
            sft.run(config, dated, tmp_path / "out")
    sft.run(config, dated, tmp_path / "out", resume=True)
    assert days == [DAY, DAY]
