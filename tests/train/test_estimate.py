"""Predictions of a dry run against what then happens, on a CPU."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.pack import batches
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import DistillConfig
from mambactl.train import step_timing as probing
from mambactl.train.estimate import estimate, training_bytes
from mambactl.train.job import Job
from mambactl.train.ledger import PhaseReport
from mambactl.train.loop import train
from mambactl.train.optimization import build_optimizer, last_hidden
from mambactl.train.phases import PhasePlan, plan_phases, shapes_of
from mambactl.train.step_timing import Setup, probe

ROWS, LENGTH = 4, 64
SIZES = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 997, "head_dim": 32}


@pytest.fixture(scope="module")
def configs():
    mixers = ["mamba2", "attention", "mamba1", "attention"]
    return tiny_config(mixers, **SIZES), tiny_config(["attention"] * 4, **SIZES)


def _job(**fields) -> Job:
    settings = {"batch_size": ROWS, "max_length": LENGTH, "device": "cpu", "warmup": 1}
    config = DistillConfig(**{**settings, **fields})
    return Job("distill", config, "student", torch.device("cpu"), torch.float32)


def _plans(job, configs) -> list[PhasePlan]:
    return plan_phases(job.config, *configs)


def test_weights_gradients_and_moments_are_counted_exactly(configs) -> None:
    student = HybridForCausalLM(configs[0])
    for plan in _plans(_job(max_steps=4), configs):
        parts = plan.parameters(student)
        trained = [p for members, _ in parts for p in members.values()]
        for parameter in student.parameters():
            parameter.grad = None
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizer(parts)
        optimizer.step()
        moments = sum(
            state[name].nbytes for state in optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        )  # fmt: skip
        assert training_bytes(shapes_of(configs[0]), sum(p.numel() for p in trained)) == {
            "weights": sum(p.nbytes for p in student.parameters()),
            "gradients": sum(p.grad.nbytes for p in student.parameters() if p.grad is not None),
            "moments": moments,
        }


def test_activations_are_those_that_a_pass_keeps(configs, rows_of) -> None:
    student = HybridForCausalLM(configs[0]).train()
    batch = next(batches(rows_of(ROWS), ROWS, seed=0))
    owned = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = last_hidden(student, batch)
    assert hidden.shape[1] == LENGTH
    job = _job(max_steps=4, stages=["logits"])
    (plan,) = _plans(job, configs)
    measured = probe([plan.work(*configs, False)], Setup(job.device, job.dtype, None), ROWS, LENGTH)
    predicted = ROWS * LENGTH * sum(measured.kept[name, "train"] for name in configs[0].mixers)
    assert predicted == pytest.approx(sum(kept.values()), rel=0.2)


def test_checkpointing_and_frozen_parts_need_less(configs) -> None:
    def peak(**fields):
        job = _job(max_steps=4, stages=["logits"], **fields)
        return estimate(job, *configs, _plans(job, configs))["logits"].memory

    plain, frozen, again = peak(), peak(rest_lr=0), peak(grad_checkpointing=True)
    assert frozen["moments"] < plain["moments"] and frozen["head"] < plain["head"]
    assert again["activations"] < 0.75 * plain["activations"]
    assert again["moments"] == plain["moments"]


def test_one_shape_and_two_say_the_same_of_activations(configs, monkeypatch) -> None:
    """Compiled code is made for one shape, whose weights and their casts are taken off."""
    monkeypatch.setattr(probing, "_cache", {})
    seen = []
    monkeypatch.setattr(probing, "compiled", lambda run: seen.append(run) or run)
    works = [plan.work(*configs, False) for plan in _plans(_job(max_steps=4), configs)]
    setup = Setup(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    two = probe(works, setup, ROWS, LENGTH)
    assert not seen
    one = probe(works, replace(setup, compiles=True), ROWS, LENGTH)
    # a block of each kind forward and both ways, and each mixer to be aligned
    assert len(seen) == 6 and one.kept.keys() == two.kept.keys()
    for key, kept in two.kept.items():
        assert one.kept[key] == pytest.approx(kept, rel=0.1), key


def test_a_replayed_step_is_timed_replayed(configs, monkeypatch) -> None:
    monkeypatch.setattr(probing, "_cache", {})
    log = []

    class Again:
        def warm(self, run):
            log.append("warm")
            return run()

        def record(self, run):
            log.append("record")
            return SimpleNamespace(replay=lambda: log.append("replay") or run())

    monkeypatch.setattr(probing, "recorder_for", lambda device: Again())
    job = _job(max_steps=4, stages=["logits"], capture=True)
    (plan,) = _plans(job, configs)
    setup = Setup(job.device, job.dtype, None, replays=True)
    measured = probe([plan.work(*configs, False)], setup, ROWS, LENGTH)
    # the optimiser is launched as ever
    assert log.count("record") == len(measured.rates)
    assert log.count("replay") == len(measured.rates) * (probing.REPEATS + 1)
    estimate(job, *configs, [plan])
    assert log.count("record") == len(measured.rates), "asked for what is in the cache"


def test_the_time_of_a_run_is_predicted(configs, rows_of, tmp_path, monkeypatch) -> None:
    """In a wide range: other processes share this machine, and it is the probe that is tested."""
    from mambactl.train.loop import Phase
    from mambactl.train.optimization import AlignmentObjective, LogitsObjective

    monkeypatch.setattr(probing, "_cache", {})
    job = _job(max_steps=24, save_every=100)
    plans = _plans(job, configs)
    torch.manual_seed(0)
    teacher = HybridForCausalLM(configs[1]).eval().requires_grad_(False)
    student = HybridForCausalLM(configs[0])
    objectives = {"align": AlignmentObjective, "logits": LogitsObjective}

    def counted(work):
        return lambda rows, length, _: work.flops(rows, length)

    phases = [
        Phase(plan.name, plan.steps, objectives[plan.kind](student, teacher),
              plan.parameters(student), flops=counted(plan.work(*configs, False)))
        for plan in plans
    ]  # fmt: skip
    started = time.perf_counter()
    predicted = estimate(job, *configs, plans)
    assert time.perf_counter() - started < 20
    folder = RunFolder(tmp_path / "out", {})
    with folder.open(False, False):
        reports: list[PhaseReport] = train(student, phases, rows_of(64), job.config, folder)[0]
    for report in reports:
        forecast = predicted[report.name]
        steady = (report.seconds - report.starting_seconds) / (report.steps - 1) * report.steps
        assert 0.4 < forecast.seconds / steady < 2.5, report.name
        (phase,) = (phase for phase in phases if phase.name == report.name)
        assert report.flops == pytest.approx(phase.flops(ROWS, LENGTH, None) * report.steps)
        assert forecast.probed_on == "cpu" and forecast.flops_per_second > 1e6


@pytest.fixture
def rows_of():
    """rows_of(n): n full rows of several documents."""
    import numpy as np

    from mambactl.data.format import Example
    from mambactl.data.pack import pack

    def make(count: int):
        draw = np.random.default_rng(0)
        size = LENGTH // 4
        pieces = [draw.integers(3, 997, size).astype(np.int32) for _ in range(4 * count)]
        return pack([Example(piece, np.ones(size, bool)) for piece in pieces], LENGTH)

    return make
