"""A recorded pass does what an eager one does: the same bits, whatever batches come in between.

On a CPU a recording is the pass again, on the memory it was made with, as a CUDA graph is.
"""

import json

import pytest
import torch

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.pack import batches, collate
from mambactl.options import DistillConfig
from mambactl.train import captured, loop
from mambactl.train.cached_teacher import (
    CachedObjective,
    Drawing,
    TeacherCache,
    digests,
    draw_batch,
    write_shard,
)
from mambactl.train.captured import WARMUP, CapturedObjective, recorder_for
from mambactl.train.held_out import HeldOut
from mambactl.train.ledger import Evaluation
from mambactl.train.loop import Phase, train
from mambactl.train.optimization import (
    AlignmentObjective,
    LogitsObjective,
    mixer_parameters,
    rest_parameters,
)
from mambactl.train.stepwise import StandIns

MIXERS = ["mamba2", "attention", "mamba1", "attention"]
CONFIG = DistillConfig(batch_size=2, max_length=32, grad_accum=2, save_every=100, warmup=2)
CPU = torch.device("cpu")


class Again:
    """A recording that runs the function again; `log` counts what happened."""

    def __init__(self, run, log):
        self.run, self.log = run, log

    def replay(self):
        assert self.run is not None, "replayed after it was given back"
        self.log["replays"] += 1
        self.run()

    def reset(self):
        self.run = None
        self.log["resets"] += 1


class Recorder:
    """Records nothing, as a capture launches nothing, and may fail to."""

    def __init__(self, error=None):
        self.error = error
        self.log = {"warm": 0, "records": 0, "replays": 0, "resets": 0}

    def warm(self, run):
        self.log["warm"] += 1
        return run()

    def record(self, run):
        self.log["records"] += 1
        if self.error is not None:
            raise self.error
        return Again(run, self.log)


def fresh(make_hybrid):
    teacher = make_hybrid(["attention"] * 4, seed=1).requires_grad_(False)
    return make_hybrid(MIXERS, seed=2), teacher


def objective_of(kind, student, teacher, rows, folder):
    if kind == "align":
        return AlignmentObjective(student, teacher)
    if kind == "logits":
        return LogitsObjective(student, teacher, kl_weight=0.7, ce_weight=0.3)
    folder.mkdir()
    keys = [key for row in rows for key in digests(row)]
    drawn = draw_batch(teacher, collate(rows), keys, Drawing(3), None)
    write_shard(folder / "samples-00000.safetensors", keys, drawn, 97, False)
    return CachedObjective(student, TeacherCache(folder, 1 << 20))


def one_document(batch):
    """A batch of the other kind: its rows are not numbered."""
    return batch._replace(seq_idx=None)


def steps_of(objective, parameters, steps, in_place):
    """Losses and gradients of accumulated steps, with SGD between them."""
    found = []
    for members in steps:
        for parameter in parameters:
            if in_place and parameter.grad is not None:
                parameter.grad.zero_()
            elif not in_place:
                parameter.grad = None
        tokens = sum(objective.count(batch) for batch in members)
        shares = [objective.backward(objective.inputs(b, CPU), tokens) for b in members]
        found.append([torch.stack(shares).sum(), *(p.grad.clone() for p in parameters)])
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 1e-3 * parameter.grad
    return found


@pytest.mark.parametrize("kind", ["align", "logits", "cached"])
def test_the_bits_of_eager_steps(make_hybrid, rows, tmp_path, kind):
    """Accumulated batches, one with other columns and one without documents between them."""
    full = [collate(rows[start : start + 2], trim=False) for start in range(0, 8, 2)]
    assert all(batch.seq_idx is not None for batch in full)
    odd = collate(rows[8:9], trim=False)
    steps = [full[:2], full[2:], [full[0], odd], full[1:3], full[::-1]]
    if kind != "cached":
        steps.insert(3, [one_document(full[1]), full[2]])
    found = []
    recorder = Recorder()
    for number in range(2):
        student, teacher = fresh(make_hybrid)
        mixers = mixer_parameters(student)
        chosen = mixers if kind == "align" else dict(student.named_parameters())
        student.requires_grad_(False)
        parameters = [p.requires_grad_() for p in chosen.values()]
        objective = objective_of(kind, student, teacher, rows, tmp_path / f"{number}")
        if number:
            objective = CapturedObjective(objective, parameters, recorder)
        found.append(steps_of(objective, parameters, steps, in_place=bool(number)))
    eager, replayed = found
    for step, (ours, theirs) in enumerate(zip(replayed, eager, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step
    log, batches_taken = recorder.log, sum(map(len, steps))
    assert log["records"] == 1 and objective.replays
    # odd forms before the recording are warm-up of their own, later ones run as they are
    others = 1 if kind == "cached" else 2
    assert log["replays"] == batches_taken - WARMUP - others


def run(make_hybrid, rows, path, config=CONFIG, stop=None):
    student, teacher = fresh(make_hybrid)
    mixers, rest = mixer_parameters(student), rest_parameters(student)
    recurrent = {name: p for name, p in mixers.items() if name.startswith("model.layers.0.")}
    phases = [
        Phase("align", 5, AlignmentObjective(student, teacher), [(mixers, 5e-3)]),
        Phase("stepwise-1", 4, LogitsObjective(student, teacher), [(recurrent, 3e-3)],
              context=StandIns(student, teacher, [2])),
        Phase("logits", 5, LogitsObjective(student, teacher), [(mixers, 3e-3), (rest, 1e-3)]),
    ]  # fmt: skip
    held_out = HeldOut(student, teacher, rows[:4], 2, None)
    folder = RunFolder(path / "out", {})
    with folder.open(path.joinpath("out.partial").exists(), False):
        if stop is not None:
            phases[stop] = stopping(phases[stop])
            with pytest.raises(KeyError):
                train(student, phases, rows, config, folder, Evaluation(2, held_out.measure), False)
            return None, None
        train(student, phases, rows, config, folder, Evaluation(2, held_out.measure), False)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return student, [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def stopping(phase):
    """The phase with an objective that fails at its seventh batch."""
    inner, left = phase.objective, iter(range(6))

    class Fails(type(inner)):
        def count(self, batch):
            if next(left, None) is None:
                raise KeyError("abrupt")
            return super().count(batch)

    inner.__class__ = Fails
    return phase


@pytest.fixture
def recorders(monkeypatch):
    """The recorders that the loop asked for, one a phase."""
    made = []

    def make(device):
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(loop, "recorder_for", make)
    return made


@pytest.mark.parametrize("accumulated", [1, 2])
def test_phases_with_evaluation_end_at_the_same_weights(
    make_hybrid, rows, tmp_path, recorders, accumulated
):
    """With one batch a step gradients are written, with several added."""
    config = CONFIG.model_copy(update={"grad_accum": accumulated})
    eager, curve = run(make_hybrid, rows, tmp_path / "eager", config)
    assert not recorders
    config = config.model_copy(update={"capture": True})
    replayed, other = run(make_hybrid, rows, tmp_path / "replayed", config)
    assert other == curve
    for name, parameter in replayed.named_parameters():
        assert torch.equal(parameter, eager.get_parameter(name)), name
    # one recording a phase, each given back
    assert [recorder.log["records"] for recorder in recorders] == [1, 1, 1]
    assert [recorder.log["resets"] for recorder in recorders] == [1, 1, 1]
    assert all(recorder.log["replays"] > 0 for recorder in recorders)


def test_a_resumed_run_records_anew(make_hybrid, rows, tmp_path, recorders):
    config = CONFIG.model_copy(update={"capture": True, "save_every": 2})
    whole, curve = run(make_hybrid, rows, tmp_path / "whole", config)
    run(make_hybrid, rows, tmp_path / "broken", config, stop=1)
    # what was recorded is given back on the way out, too
    assert recorders[-1].log["resets"] == recorders[-1].log["records"] == 1
    again, other = run(make_hybrid, rows, tmp_path / "broken", config)
    assert other == curve
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_failed_recording_is_said_once_and_changes_nothing(pair, rows, capsys):
    student, teacher = pair
    parameters = list(mixer_parameters(student).values())
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()
    recorder = Recorder(torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB\nmore"))
    inner = AlignmentObjective(student, teacher)
    objective = CapturedObjective(inner, parameters, recorder)
    batch = collate(rows[:2])
    tokens = objective.count(batch)
    wanted = inner.backward(batch, tokens)
    for _ in range(WARMUP + 3):
        assert torch.equal(objective.backward(batch, tokens), wanted)
    assert recorder.log == {"warm": WARMUP, "records": 1, "replays": 0, "resets": 0}
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("could not be made: CUDA out of memory. Tried 3 GiB") == 1
    assert not objective.replays and "more" not in said


def test_gradients_that_were_replaced_are_noticed(pair, rows):
    student, teacher = pair
    parameters = list(mixer_parameters(student).values())
    objective = CapturedObjective(AlignmentObjective(student, teacher), parameters, Recorder())
    batch = collate(rows[:2])
    for _ in range(WARMUP + 1):
        objective.backward(batch, 40)
    student.zero_grad(set_to_none=True)
    with pytest.raises(ValueError, match="zero them in place"):
        objective.backward(batch, 40)
    objective.release()
    assert objective.backward(batch, 40).isfinite()


def test_gradients_that_would_be_lost_are_noticed(pair, rows):
    student, teacher = pair
    parameters = list(mixer_parameters(student).values())
    inner = AlignmentObjective(student, teacher)
    objective = CapturedObjective(inner, parameters, Recorder(), adds=False)
    batch = collate(rows[:2])
    objective.backward(batch, 40)
    with pytest.raises(ValueError, match="set them to None first"):
        objective.backward(batch, 40)


def test_nothing_is_recorded_on_a_cpu(make_hybrid, rows, tmp_path):
    assert recorder_for(CPU) is None
    plain, _ = run(make_hybrid, rows, tmp_path / "plain")
    asked, _ = run(make_hybrid, rows, tmp_path / "x", CONFIG.model_copy(update={"capture": True}))
    for name, parameter in asked.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("kind", ["align", "logits", "cached"])
def test_a_cuda_graph_does_what_eager_passes_do(
    make_hybrid, rows, tmp_path, kind, monkeypatch, adds
):
    """Nothing in a pass waits, memory comes back, and losses and gradients agree."""
    device = torch.device("cuda")
    student, teacher = fresh(make_hybrid)
    student.to(device)
    # a cache is drawn from a teacher on the host
    teacher.to(CPU if kind == "cached" else device)
    student.train()
    parameters = list(mixer_parameters(student).values())
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()
    inner = objective_of(kind, student, teacher, rows, tmp_path / "cache")
    objective = CapturedObjective(inner, parameters, recorder_for(device), adds)
    taken = [batch for _, batch in zip(range(9), batches(rows, 2, 0, trim=False), strict=False)]
    warned = []
    monkeypatch.setattr(captured.console, "warn", warned.append)
    for number, batch in enumerate(taken):
        wanted = gradients(inner, parameters, batch, device, quiet=number > 0)
        found = gradients(objective, parameters, batch, device, quiet=False, in_place=adds)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not warned and objective.replays
    held = torch.cuda.memory_reserved()
    objective.release()
    assert torch.cuda.memory_reserved() < held


def gradients(objective, parameters, batch, device, quiet, in_place=False):
    """Loss and gradients; `quiet` forbids what waits for the device. Leaves .grad as it was."""
    kept = [p.grad for p in parameters]
    for parameter in parameters:
        if in_place and parameter.grad is not None:
            parameter.grad.zero_()
        elif not in_place:
            parameter.grad = None
    tokens = objective.count(batch)
    inputs = objective.inputs(batch, device)
    torch.cuda.set_sync_debug_mode("error" if quiet else "default")
    try:
        loss = objective.backward(inputs, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [loss, *(p.grad.clone() for p in parameters)]
    if not in_place:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
    return found
