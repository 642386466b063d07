"""Two processes that split the weights of a distillation: what one process makes, and what ends it.

The fast part is in test_spread; every kind of phase, measurement and end of a process is here.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from fixtures.shared_runs import (
    align,
    curve,
    prefer,
    read_curve,
    saved_students,
    together,
    tune,
    written_data,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.commands import distill, dpo, sft
from mambactl.errors import UsageError
from mambactl.options import DistillConfig, DpoConfig, SftConfig
from mambactl.train.consolidate import consolidated
from mambactl.train.job import Job
from mambactl.train.loop import _PhaseRun
from mambactl.train.publish import regrouped
from mambactl.train.sharing import Casts
from mambactl.train.trainer import _Watch

TEXT = "the cat sat on a mat and the dog ran "
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")


@pytest.fixture(scope="module")
def students(tmp_path_factory, save_student, make_hybrid, tiny_llama_dir) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("split")
    return saved_students(folder, save_student, make_hybrid, tiny_llama_dir)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return written_data(tmp_path_factory.mktemp("data"))


def split(config: DistillConfig, source: str, out: Path) -> None:
    """Run in two processes, whose weights really are split."""
    made = _PhaseRun.__init__

    def watched(self, model, *args, **kwargs):
        assert isinstance(model, FSDPModule)
        made(self, model, *args, **kwargs)

    def work() -> None:
        _PhaseRun.__init__ = watched
        distill.run(config, source, out)

    assert together(work, out.with_name("log"), shard=True) == [0, 0]


def farthest(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def weights(out: Path) -> dict[str, Tensor]:
    return load_model(str(out)).state_dict()


@pytest.mark.slow
@forks
def test_weights_are_those_of_one_process(students, data, tmp_path):
    configs = [align(data, count, stages=["align", "logits"], max_steps=30) for count in (1, 2)]
    one, two = tmp_path / "one", tmp_path / "two"
    distill.run(configs[0], students["untied"], one)
    split(configs[1], students["untied"], two)
    assert farthest(weights(one), weights(two)) < 1e-5
    assert farthest(weights(one), weights(Path(students["untied"]))) > 1e-3


@pytest.fixture
def double(monkeypatch) -> None:
    """Models and their sums in float64, of which runs leave the weights at OUT."""
    teacher = Job.teacher

    def kept(job, model, folder, teacher, metrics, rounded=()):
        whole = consolidated(model)
        if whole is not None:
            torch.save(whole.state_dict(), folder.out)
            shutil.copy(folder.metrics, folder.out.with_suffix(".jsonl"))

    monkeypatch.setattr(Casts, "__call__", lambda self, name, own: own.double())
    monkeypatch.setattr(Job, "teacher", lambda self: teacher(self).double())
    monkeypatch.setattr(distill, "save_result", kept)


PARTS = {
    "phases": {"stages": ["align", "stepwise", "logits"], "max_steps": 30},
    "rest stepwise": {"stages": ["stepwise"], "stepwise_rest_lr": 1e-4},
    "recomputed": {"grad_checkpointing": True},
    "kept queries train": {"freeze_kept": False, "recall_share": 0.2, "max_length": 128},
    "mixers": {"rest_lr": 0.0, "ce_weight": 0.3},
    "measured": {
        **{"eval_every": 1, "eval_recall": [64], "eval_recall_rows": 2, "max_length": 64},
        "keep_best": True,
    },
}


@pytest.mark.slow
@forks
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_that_of_one_process(students, data, tmp_path, double, part, head):
    fields, keys = dict(PARTS[part]), ("step", "loss", "gradient_norm", "lr", "tokens")
    if "keep_best" in fields:
        held_out = tmp_path / "held-out.jsonl"
        held_out.write_text("\n".join([json.dumps({"text": TEXT * 3})] * 4))
        fields["eval_data"] = [str(held_out)]
        keys = ("step", "kl", "agreement", "score")
    one, two = tmp_path / "one", tmp_path / "two"
    distill.run(align(data, 1, **fields), students[head], one)
    split(align(data, 2, **fields), students[head], two)
    found = [torch.load(path) for path in (one, two)]
    assert {tensor.dtype for tensor in found[0].values()} == {torch.float64}
    assert farthest(*found) < 1e-9
    curves = [read_curve(out.with_suffix(".jsonl"), *keys) for out in (one, two)]
    assert curves[1] == [pytest.approx(row, rel=1e-6) for row in curves[0]]


@pytest.mark.slow
@forks
@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_process_ends_all_and_the_run_resumes(
    students, data, tmp_path, monkeypatch, count
):
    source, one, two = students["untied"], tmp_path / "one", tmp_path / "two"
    fields = {"stages": ["align", "logits"], "max_steps": 8, "align_steps": 4, "save_every": 1}
    distill.run(align(data, 1, **fields), source, one)
    launch = _PhaseRun._launch

    def killed(self, step, feed):
        if self.phase.name == "logits" and step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(self, step, feed)

    monkeypatch.setattr(_PhaseRun, "_launch", killed)
    work: Callable[..., object] = partial(distill.run, align(data, 2, **fields), source, two)
    with pytest.raises(AssertionError, match=r"Connection|peer|bytes"):
        together(work, tmp_path / "log", shard=True)
    for log in tmp_path.glob("log.*"):
        log.unlink()
    monkeypatch.undo()
    assert not two.exists()
    assert RunFolder(two, {}).load_state()["step"] == 2
    # as it was typed: batches a step follow from the number of processes
    config = align(data, 2, **fields).model_copy(update={"nproc": None if count == 1 else count})
    if count == 1:
        distill.run(config, source, two, resume=True)
    else:
        again = partial(distill.run, config, source, two, resume=True)
        assert together(again, tmp_path / "log", shard=True) == [0, 0]
    assert farthest(weights(one), weights(two)) < 1e-5
    keys = ("step", "loss", "gradient_norm", "lr", "tokens")
    assert curve(two, *keys) == [pytest.approx(row, rel=1e-4) for row in curve(one, *keys)]


@pytest.mark.slow
@forks
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_trainer_killed_in_one_process_goes_on_in_others(
    students, data, tmp_path, monkeypatch, stage, count
):
    module, options = {"sft": (sft, tune), "dpo": (dpo, prefer)}[stage]
    fields = {"batch_size": 2, "max_steps": 6, "save_every": 2}
    if stage == "sft":
        fields["kl_weight"] = 0.5
    source, one, two = students["untied"], tmp_path / "one", tmp_path / "two"
    module.run(options(data, 1, grad_accum=4, **fields), source, one)
    begun = options(data, 2, grad_accum=2, **fields)
    log = _Watch.on_log

    def killed(self, args, state, control, logs, **others):
        if state.global_step == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        log(self, args, state, control, logs, **others)

    monkeypatch.setattr(_Watch, "on_log", killed)
    with pytest.raises(AssertionError, match=r"Connection|peer|bytes"):
        together(partial(module.run, begun, source, two), tmp_path / "log", shard=True)
    for file in tmp_path.glob("log.*"):
        file.unlink()
    monkeypatch.undo()
    config = begun.model_copy(update={"nproc": None if count == 1 else count})
    again = partial(module.run, config, source, two, resume=True)
    codes = together(again, tmp_path / "log", shard=True, count=count)
    assert codes == [0] * count
    assert farthest(weights(one), weights(two)) < 1e-5
    keys = ("step", "loss", "grad_norm", "tokens")
    assert curve(two, *keys) == [pytest.approx(row, rel=1e-4) for row in curve(one, *keys)]


@pytest.mark.slow
@forks
def test_split_weights_are_measured_while_sft_trains(students, data, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join([json.dumps({"text": TEXT * 3})] * 4))
    fields = {"kl_weight": 0.5, "eval_data": [str(held_out)], "eval_every": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    sft.run(tune(data, 1, **fields), students["untied"], one)
    work = partial(sft.run, tune(data, 2, **fields), students["untied"], two)
    assert together(work, tmp_path / "log", shard=True) == [0, 0]
    keys = ("step", "kl", "agreement", "ce")
    assert curve(two, *keys) == [pytest.approx(row, rel=1e-4) for row in curve(one, *keys)]
    assert farthest(weights(one), weights(two)) < 1e-5


@pytest.mark.parametrize(
    ("begun", "now", "expected"),
    [
        ((2, 4), (2, 4), 2),
        ((2, 4), (2, None), 8),
        ((2, 4), (2, 8), 1),
        ((4, None), (4, 2), 2),
        ((4, None), (1, 4), 1),
        ((2, 4), (2, 3), None),
        ((2, 4), (2, 16), None),
    ],
)
def test_a_step_keeps_its_rows_on_other_processes(begun, now, expected):
    record = dict(zip(("grad_accum", "nproc"), begun, strict=True))
    config = DistillConfig(data=["x"], grad_accum=now[0], nproc=now[1])
    if expected is not None:
        assert regrouped(config, record).grad_accum == expected
        return
    with pytest.raises(UsageError, match="of whose 8 batches a step") as refusal:
        regrouped(config, record)
    assert "--nproc 4" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("stage", "fields", "match"),
    [
        (DistillConfig, {"capture": True}, "CUDA graph"),
        (DistillConfig, {"stages": ["logits", "onpolicy"]}, "writes no text"),
        (SftConfig, {"lora": 4}, "--lora needs whole weights"),
        (SftConfig, {"compile": True}, "--compile needs whole weights"),
        (DpoConfig, {"eval_data": ["y"]}, "--eval-data of dpo needs whole weights"),
        (DpoConfig, {"eval_share": 0.1}, "--eval-share of dpo needs whole weights"),
    ],
)
def test_what_split_weights_cannot_do_is_refused(stage, fields, match):
    stage(data=["x"], nproc=2, **fields).require_coherent()
    with pytest.raises(UsageError, match=match):
        stage(data=["x"], nproc=2, shard=True, **fields).require_coherent()
