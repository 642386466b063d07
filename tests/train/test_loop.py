"""The loop lowers its losses, touches what it may, and continues exactly after any stop."""

import json
import os
import signal

import pytest
import torch

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.errors import CheckError, OutputError, UsageError
from mambactl.options import DistillConfig
from mambactl.train.loop import Phase, train
from mambactl.train.optimization import (
    FINAL_SHARE,
    AlignmentObjective,
    LogitsObjective,
    build_optimizer,
    mixer_parameters,
    rest_parameters,
    schedule,
)

CONFIG = DistillConfig(batch_size=2, max_length=32, save_every=3, warmup=2)


def _phases(student, teacher, align=6, logits=6):
    mixers, rest = mixer_parameters(student), rest_parameters(student)
    return [
        Phase("align", align, AlignmentObjective(student, teacher), [(mixers, 5e-3)]),
        Phase("logits", logits, LogitsObjective(student, teacher), [(mixers, 3e-3), (rest, 1e-3)]),
    ]


def _folder(path, resume=False):
    folder = RunFolder(path / "out", {"config": CONFIG.model_dump(mode="json")})
    return folder, folder.open(resume, False)


def _untimed(folder):
    """Lines of the ledger without what depends on the clock."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def _run(student, phases, rows, path, resume=False, config=CONFIG):
    folder, opened = _folder(path, resume)
    with opened:
        reports = train(student, phases, rows, config, folder).reports
    return reports, folder


def test_alignment_lowers_its_loss_and_leaves_the_rest_alone(pair, rows, tmp_path):
    student, teacher = pair
    before = {name: p.clone() for name, p in student.named_parameters()}
    (report,), _ = _run(student, _phases(student, teacher, align=40)[:1], rows, tmp_path)
    assert report.last_loss < 0.5 * report.first_loss
    mixers = mixer_parameters(student)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in mixers), name


def test_logits_lower_the_kl(pair, rows, tmp_path):
    student, teacher = pair
    (report,), folder = _run(student, _phases(student, teacher, logits=40)[1:], rows, tmp_path)
    assert report.last_loss < 0.7 * report.first_loss
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[0]["loss"] == report.first_loss
    assert lines[-1]["tokens"] == report.tokens


class _Stops:
    """An objective that fails, or asks to stop, at its n-th batch."""

    def __init__(self, inner, after, what):
        self.inner, self.left, self.what = inner, after, what
        self.count, self.inputs = inner.count, inner.inputs

    def backward(self, batch, tokens):
        self.left -= 1
        if self.left == 0:
            self.what()
        return self.inner.backward(batch, tokens)


def _fresh(make_hybrid):
    teacher = make_hybrid(["attention"] * 4, seed=1).requires_grad_(False)
    return make_hybrid(["mamba2", "attention", "mamba1", "attention"], seed=2), teacher


def _fail():
    raise RuntimeError("abrupt")


@pytest.mark.parametrize(("phase", "after"), [(0, 2), (0, 5), (1, 1), (1, 5)])
def test_an_abrupt_stop_changes_nothing(make_hybrid, rows, tmp_path, phase, after):
    whole, teacher = _fresh(make_hybrid)
    _, folder = _run(whole, _phases(whole, teacher), rows, tmp_path / "whole")
    curve = _untimed(folder)

    broken, _ = _fresh(make_hybrid)
    phases = _phases(broken, teacher)
    stops = _Stops(phases[phase].objective, after, _fail)
    phases[phase] = Phase(phases[phase].name, 6, stops, phases[phase].parts)
    with pytest.raises(RuntimeError, match="abrupt"):
        _run(broken, phases, rows, tmp_path / "broken")

    again, _ = _fresh(make_hybrid)
    saved = (tmp_path / "broken" / "out.partial").exists()
    assert saved == ((phase, after) != (0, 2))
    _, folder = _run(again, _phases(again, teacher), rows, tmp_path / "broken", resume=True)
    assert _untimed(folder) == curve
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_first(make_hybrid, rows, tmp_path, signum):
    student, teacher = _fresh(make_hybrid)
    phases = _phases(student, teacher)
    stops = _Stops(phases[0].objective, 2, lambda: os.kill(os.getpid(), signum))
    phases[0] = Phase("align", 6, stops, phases[0].parts)
    seen = []

    def stop(number, _):
        seen.append(number)
        raise KeyboardInterrupt

    former = signal.signal(signum, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            _run(student, phases, rows, tmp_path)
        assert signal.getsignal(signum) is stop
    finally:
        signal.signal(signum, former)
    assert seen == [signum]
    state = torch.load(tmp_path / "out.partial" / "state.pt", weights_only=True)
    assert (state["phase"], state["step"]) == (0, 2)


def test_a_signal_with_nothing_to_save_acts_at_once(make_hybrid, rows, tmp_path):
    """The first step may compile for minutes, and its end would save no more than its start."""
    student, teacher = _fresh(make_hybrid)
    phases = _phases(student, teacher)
    ended = []

    def stop():
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(True)

    phases[0] = Phase("align", 6, _Stops(phases[0].objective, 1, stop), phases[0].parts)
    with pytest.raises(KeyboardInterrupt):
        _run(student, phases, rows, tmp_path)
    assert not ended and not (tmp_path / "out.partial").exists()


def test_a_signal_during_the_last_save_is_delivered(make_hybrid, rows, tmp_path, monkeypatch):
    student, teacher = _fresh(make_hybrid)
    save = RunFolder.save_state

    def signalled(self, state):
        if state["phase"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        save(self, state)

    monkeypatch.setattr(RunFolder, "save_state", signalled)
    with pytest.raises(KeyboardInterrupt):
        _run(student, _phases(student, teacher), rows, tmp_path)
    monkeypatch.undo()
    again, _ = _fresh(make_hybrid)
    reports, _ = _run(again, _phases(again, teacher), rows, tmp_path, resume=True)
    assert [report.steps for report in reports] == [6, 6]
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name)), name


def test_steps_without_a_token_to_learn_end_the_run(pair, rows, tmp_path):
    masked = [row._replace(loss_mask=0 * row.loss_mask) for row in rows]
    with pytest.raises(UsageError, match="6 steps of logits held no token to learn"):
        _run(pair[0], _phases(*pair)[1:], masked, tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_update(pair, rows, tmp_path):
    student, teacher = pair
    with torch.no_grad():
        student.model.layers[0].mixer.out_proj.weight[0, 0] = float("nan")
    kept = student.model.layers[2].mixer.out_proj.weight.clone()
    with pytest.raises(CheckError, match="became nan .* at step 1 of align"):
        _run(student, _phases(student, teacher), rows, tmp_path)
    assert torch.equal(student.model.layers[2].mixer.out_proj.weight, kept)
    assert not (tmp_path / "out.partial").exists()


def test_accumulated_batches_are_one_large_batch(make_hybrid, rows, tmp_path):
    ends = []
    for name, shape in (("large", (4, 1)), ("accumulated", (1, 4))):
        student, teacher = _fresh(make_hybrid)
        config = CONFIG.model_copy(
            update=dict(zip(("batch_size", "grad_accum"), shape, strict=True))
        )
        reports, _ = _run(
            student, _phases(student, teacher, logits=3)[1:], rows, tmp_path / name, config=config
        )
        ends.append((reports[0], student))
    assert ends[0][0].tokens == ends[1][0].tokens
    assert ends[0][0].last_loss == pytest.approx(ends[1][0].last_loss, rel=1e-4)


def test_an_unfinished_run_is_never_taken_or_lost_silently(tmp_path):
    folder, opened = _folder(tmp_path)
    with opened:
        folder.save_state({"step": 1})
    with pytest.raises(OutputError, match="holds an unfinished run"):
        folder.check(False, False)
    folder.check(True, False)
    other = RunFolder(tmp_path / "out", {"config": {**folder.mark["config"], "lr": 1.0}})
    with pytest.raises(OutputError, match=r"config\.lr 0\.0003 -> 1\.0"):
        other.check(True, False)
    other.check(False, True)


def test_publishing_replaces_in_one_rename(tmp_path):
    folder, _ = _folder(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mambactl.json").write_text('{"stage": "sft"}')
    with folder.open(False, True):
        folder.log({"step": 1})
        folder.result.mkdir()
        folder.finish()
        folder.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


def test_decay_spares_vectors_and_state_parameters(pair):
    student, _ = pair
    names = {id(p): name for name, p in student.named_parameters()}
    optimizer = build_optimizer(
        [(mixer_parameters(student), 2e-3), (rest_parameters(student, freeze_kept=False), 1e-4)]
    )
    groups = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert groups.keys() == {name for name, _ in student.named_parameters()}
    for name, (rate, decay) in groups.items():
        assert rate == (2e-3 if ".mamba." in name else 1e-4), name
        spared = name.endswith(("A_log", ".D", "dt_bias", "bias", "norm.weight"))
        assert (decay == 0) == spared, name


def test_the_schedule_warms_up_and_comes_down():
    shares = [schedule(step, 20, 4) for step in range(20)]
    assert shares[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(a > b for a, b in zip(shares[4:], shares[5:], strict=False))
    assert FINAL_SHARE < shares[-1] < 0.05
    assert max(schedule(step, 3, 10) for step in range(3)) == 1.0


def test_the_rate_is_held_and_falls_at_the_end() -> None:
    shares = [schedule(step, 200, 10, "wsd") for step in range(200)]
    assert shares[10:170] == [1.0] * 160
    assert all(a > b for a, b in zip(shares[170:], shares[171:], strict=False))
    assert FINAL_SHARE < shares[-1] < 0.05
    # a phase of a few steps still warms up and comes down
    assert schedule(2, 3, 10, "wsd") == 1.0 and schedule(0, 3, 10, "wsd") == 0.5
