"""Steps read late, as on a GPU: same run, same weights, and a bad state is never kept."""

import json

import pytest
import torch

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.errors import CheckError
from mambactl.options import DistillConfig
from mambactl.train import ledger, loop
from mambactl.train.ledger import Evaluation
from mambactl.train.loop import Phase, train
from mambactl.train.optimization import LogitsObjective, mixer_parameters, rest_parameters

CONFIG = DistillConfig(batch_size=2, max_length=32, save_every=5, warmup=2)


def _phase(student, teacher, steps, rate=3e-3):
    parts = [(mixer_parameters(student), rate), (rest_parameters(student), rate / 3)]
    return Phase("logits", steps, LogitsObjective(student, teacher), parts)


def _models(make_hybrid):
    teacher = make_hybrid(["attention"] * 4, seed=1).requires_grad_(False)
    return make_hybrid(["mamba2", "attention", "mamba1", "attention"], seed=2), teacher


def _train(student, phases, rows, path, config=CONFIG, evaluation=None):
    folder = RunFolder(path / "out", {"config": 1})
    with folder.open(False, False):
        return train(student, phases, rows, config, folder, evaluation).reports, folder


@pytest.fixture
def in_flight(monkeypatch):
    """in_flight(3): the loop reads a step only when three more were started."""

    def make(lag):
        plain = loop._PhaseRun.__init__

        def init(self, *arguments):
            plain(self, *arguments)
            self.lag = lag

        monkeypatch.setattr(loop._PhaseRun, "__init__", init)

    return make


def test_reading_late_changes_nothing(make_hybrid, rows, tmp_path, in_flight) -> None:
    ends = []
    for lag in (0, 3):
        in_flight(lag)
        student, teacher = _models(make_hybrid)
        (report,), folder = _train(
            student, [_phase(student, teacher, 8)], rows, tmp_path / f"{lag}"
        )
        lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        curve = [(line["step"], line["loss"], line["lr"], line["tokens"]) for line in lines]
        ends.append((curve, report.tokens, [p.clone() for p in student.parameters()]))
    assert ends[0][:2] == ends[1][:2]
    assert [step for step, *_ in ends[0][0]] == list(range(1, 9))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][2], ends[1][2], strict=True))


class _Breaks(LogitsObjective):
    """From its n-th batch on the loss and all gradients are nan."""

    left = 0

    def backward(self, batch, tokens):
        loss = super().backward(batch, tokens)
        self.left -= 1
        if self.left > 0:
            return loss
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
        return loss * float("nan")


@pytest.mark.parametrize("lag", [0, 2])
def test_what_is_not_finite_is_never_applied_nor_saved(
    make_hybrid, rows, tmp_path, in_flight, lag
) -> None:
    in_flight(lag)
    student, teacher = _models(make_hybrid)
    phase = _phase(student, teacher, 10)
    breaks = _Breaks(student, teacher)
    breaks.left = 7
    broken = Phase("logits", 10, breaks, phase.parts)
    folder = RunFolder(tmp_path / "out", {"config": 1})
    wrong = pytest.raises(CheckError, match=r"became nan .* at step 7 of logits")
    with wrong as caught, folder.open(False, False):
        train(student, [broken], rows, CONFIG, folder)
    assert "lower --lr" in caught.value.hint
    state = folder.load_state()
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["parameters"].values())
    # at most `lag` more steps were started, and none of them moved anything
    assert breaks.left >= -lag
    assert all(p.isfinite().all() for p in student.parameters())
    reached = [p.clone() for p in student.parameters()]
    breaks.left = 2
    with pytest.raises(CheckError), folder.open(True, False):
        # from step 5 again, over one good step to the same weights
        train(student, [broken], rows, CONFIG, folder)
    assert all(torch.equal(a, b) for a, b in zip(reached, student.parameters(), strict=True))
    lines = folder.metrics.read_text().splitlines()
    assert len(lines) == 6


class _Leaves(LogitsObjective):
    """A loss that is `after` batches itself and then five times as high."""

    seen = 0
    after = 30

    def backward(self, batch, tokens):
        self.seen += 1
        return super().backward(batch, tokens) * (5 if self.seen > self.after else 1)


def test_a_loss_that_left_what_it_reached_stops_the_run(
    make_hybrid, rows, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(ledger, "PATIENCE", 8)
    student, teacher = _models(make_hybrid)
    phase = _phase(student, teacher, 200, rate=1e-5)
    leaves = Phase("logits", 200, _Leaves(student, teacher), phase.parts)
    folder = RunFolder(tmp_path / "out", {"config": 1})
    stops = pytest.raises(CheckError, match="smoothed loss of logits rose from .* stays there")
    with stops as e, folder.open(False, False):
        train(student, [leaves], rows, CONFIG, folder)
    assert "the last good state is kept" in str(e.value) and "lower --lr" in e.value.hint
    # saved while the loss was good, not while it rose
    assert 30 <= folder.load_state()["step"] < len(folder.metrics.read_text().splitlines()) - 7


def test_evaluations_stand_in_the_lines_of_their_steps(make_hybrid, rows, tmp_path) -> None:
    student, teacher = _models(make_hybrid)
    seen = []

    def measure():
        assert not student.training
        seen.append(float(sum(p.detach().double().sum() for p in student.parameters())))
        return {"kl": float(len(seen)), "agreement": 0.5, "perplexity_ratio": 1.0}

    evaluation = Evaluation(3, measure)
    (report,), folder = _train(
        student, [_phase(student, teacher, 7)], rows, tmp_path, evaluation=evaluation
    )
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(line["step"], line["kl"]) for line in lines if "kl" in line] == [
        (0, 1.0), (3, 2.0), (6, 3.0), (7, 4.0)
    ]  # fmt: skip
    assert (report.kl, report.agreement) == (4.0, 0.5)
    # each saw other weights, and the last those that the run ended with
    assert len(set(seen)) == 4
    assert seen[-1] == float(sum(p.detach().double().sum() for p in student.parameters()))
    assert len(lines) == 8 and "loss" not in lines[0]
