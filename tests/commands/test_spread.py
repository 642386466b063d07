"""Two processes that share a run: what they write is what one process writes."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from fixtures.shared_runs import (
    STEPS,
    align,
    assert_same,
    curve,
    prefer,
    saved_students,
    together,
    tune,
    written_data,
)
from torch.distributed.tensor import DTensor

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.commands import distill, dpo, sft
from mambactl.models.mixers.mamba2 import Mamba2Mixer
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS
from mambactl.options import DistillConfig
from mambactl.train import publish
from mambactl.train.loop import _PhaseRun
from mambactl.train.trainer import _Watch

# a process that has used a GPU cannot be forked
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")


@pytest.fixture(scope="module")
def students(tmp_path_factory, save_student, make_hybrid, tiny_llama_dir) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("spread")
    return saved_students(folder, save_student, make_hybrid, tiny_llama_dir)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return written_data(tmp_path_factory.mktemp("data"))


def run_all(students, data, processes: int, place: Path) -> None:
    """Every kind of loss, reference and head."""
    matched = tune(data, processes, kl_weight=0.5, grad_accum=2)
    sft.run(matched, students["tied"], place / "matched")
    sft.run(tune(data, processes, kl_weight=1.0), students["untied"], place / "untied")
    plain = tune(data, processes, grad_checkpointing=True)
    sft.run(plain, students["tied"], place / "plain")
    dpo.run(prefer(data, processes), students["tied"], place / "dpo")
    dpo.run(prefer(data, processes, reference="self"), students["untied"], place / "own")


@pytest.fixture(scope="module")
def alone(students, data, tmp_path_factory) -> Path:
    """Results of one process, to compare with."""
    place = tmp_path_factory.mktemp("one")
    run_all(students, data, 1, place)
    return place


@pytest.mark.parametrize(
    "shard",
    [pytest.param(False, id="whole"), pytest.param(True, id="sharded", marks=pytest.mark.slow)],
)
def test_two_processes_write_what_one_writes(students, data, alone, tmp_path, monkeypatch, shard):
    save = publish.save_result

    def watched(job, model, folder, teacher, metrics):
        split = any(isinstance(tensor, DTensor) for tensor in model.state_dict().values())
        assert split == shard
        save(job, model, folder, teacher, metrics)

    for module in (distill, dpo, sft):
        monkeypatch.setattr(module, "save_result", watched)
    codes = together(lambda: run_all(students, data, 2, tmp_path), tmp_path / "log", shard)
    assert codes == [0, 0]
    for name in ("matched", "untied", "plain", "dpo", "own"):
        assert_same(alone / name, tmp_path / name)
        keys = ("step", "loss", "grad_norm") + (
            ("train_kl", "train_ce") if name == "matched" else ()
        )
        expected = [pytest.approx(row, rel=1e-4) for row in curve(alone / name, *keys)]
        assert curve(tmp_path / name, *keys) == expected
    assert not list(tmp_path.glob("*.partial"))
    before = load_model(students["tied"]).state_dict()
    after = load_model(str(alone / "matched")).state_dict()
    # the comparison has something to compare
    assert max(float((after[n] - t).abs().max()) for n, t in before.items()) > 1e-3
    assert load_lineage(str(tmp_path / "matched"))["recipe"]["nproc"] == 2


@pytest.mark.slow
def test_mixed_precision_rounds_the_same_sharded_or_not(students, data, tmp_path, monkeypatch):
    mix, made = Mamba2Mixer.forward, FullyShardedDataParallelPlugin.__post_init__

    def as_on_gpus(self):
        made(self)
        # where Accelerate shards itself it takes the trainer's type for what travels, too
        self.set_mixed_precision("bf16")

    def watched(self, *args, **kwargs):
        if not self.A_log.is_meta:
            kinds = {getattr(self, name).dtype for name in FLOAT32_PARAMETERS}
            assert kinds == {torch.float32}
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            assert torch.is_autocast_enabled("cpu")
        return mix(self, *args, **kwargs)

    monkeypatch.setattr(FullyShardedDataParallelPlugin, "__post_init__", as_on_gpus)
    monkeypatch.setattr(Mamba2Mixer, "forward", watched)
    config = tune(data, 2, dtype="bfloat16", kl_weight=0.5, max_steps=2)
    for name, shard in (("whole", False), ("sharded", True)):
        out = tmp_path / name
        work = partial(sft.run, config, students["tied"], out)
        assert together(work, tmp_path / "log", shard) == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "sharded")


# on GPUs every version does
LOADS = pytest.mark.since_transformers("5.18", "loads no optimizer of several processes on a CPU")


@pytest.mark.parametrize(
    "shard",
    [
        pytest.param(False, id="whole", marks=[LOADS, pytest.mark.slow]),
        pytest.param(True, id="sharded"),
    ],
)
def test_a_signal_to_one_process_stops_all_and_resumes(
    students, data, alone, tmp_path, monkeypatch, shard
):
    seen, out = _Watch.on_log, tmp_path / "out"

    def signalled(self, args, state, control, logs, **others):
        if state.global_step == 2 and os.environ["RANK"] == "1" and "loss" in logs:
            os.kill(os.getpid(), signal.SIGTERM)
        seen(self, args, state, control, logs, **others)

    def half(resume: bool) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        config = tune(data, 2, kl_weight=0.5, grad_accum=2)
        sft.run(config, students["tied"], out, resume=resume)

    monkeypatch.setattr(_Watch, "on_log", signalled)
    codes = together(lambda: half(False), tmp_path / "log", shard)
    assert codes == [-signal.SIGTERM, -signal.SIGTERM]
    assert not out.exists()
    checkpoint = RunFolder(out, {}).trainer_checkpoint()
    steps = int(checkpoint.name.rpartition("-")[2])
    assert steps in (2, 3)
    monkeypatch.undo()
    assert together(lambda: half(True), tmp_path / "log", shard) == [0, 0]
    assert_same(alone / "matched", out)
    assert [step for (step,) in curve(out, "step")] == list(range(1, STEPS + 1))


def test_the_command_line_shows_one_run(students, data, tmp_path):
    command = [sys.executable, "-m", "mambactl", "distill", students["tied"]]
    command += ["--data", data["sft"], "--device", "cpu", "--max-steps", "2", "--max-length", "32"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--nproc", "2", "--json", "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"] == str(out)
    assert done.stdout.count("\n") == 1
    assert done.stderr.count("wrote") == done.stderr.count("distill: 2 processes") == 1
    assert load_lineage(str(out))["recipe"]["nproc"] == 2


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_distilling_in_two_processes(students, data, tmp_path, monkeypatch, shard):
    source, one, two = students["tied"], tmp_path / "one", tmp_path / "two"
    distill.run(align(data, 1), source, one)
    steps = _PhaseRun._launch

    def signalled(self, step, feed):
        if self.phase.name == "logits" and step == 0 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(self, step, feed)

    def work(resume: bool) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        distill.run(align(data, 2), source, two, resume=resume)

    monkeypatch.setattr(_PhaseRun, "_launch", signalled)
    codes = together(partial(work, False), tmp_path / "log", shard=shard)
    assert codes == [-signal.SIGTERM, -signal.SIGTERM]
    assert RunFolder(two, {}).load_state()["step"] == 1
    monkeypatch.undo()
    assert together(partial(work, True), tmp_path / "log", shard=shard) == [0, 0]
    assert_same(one, two)
    keys = ("step", "loss", "gradient_norm", "lr")
    expected = [pytest.approx(row, rel=1e-4) for row in curve(one, *keys)]
    assert curve(two, *keys) == expected
    tokens = [load_lineage(str(out))["metrics"]["logits"]["tokens"] for out in (one, two)]
    assert tokens[0] == tokens[1] > 0


def test_students_write_in_two_processes_what_they_write_in_one(students, data, tmp_path):
    def config(processes: int) -> DistillConfig:
        fields = {"stages": ["onpolicy"], "onpolicy_tokens": 8, "onpolicy_share": 0.5}
        return align(data, processes, max_length=48).model_copy(update=fields)

    source, one, two = students["tied"], tmp_path / "one", tmp_path / "two"
    distill.run(config(1), source, one)
    work = partial(distill.run, config(2), source, two)
    assert together(work, tmp_path / "log", shard=False) == [0, 0]
    assert_same(one, two)
    keys = ("step", "loss", "tokens", "written_tokens", "answers", "ended")
    assert curve(two, *keys) == [pytest.approx(row, rel=1e-4) for row in curve(one, *keys)]
    assert all(row[3] > 0 for row in curve(one, *keys))
