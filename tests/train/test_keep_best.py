"""Recall watched while training, and the weights of the best measurement."""

import json

import pytest
import torch
from train.abrupt_stop import abrupt_stop

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.commands import distill
from mambactl.errors import UsageError
from mambactl.evaluation.recall import measure_recall, recall_probes
from mambactl.options import DistillConfig
from mambactl.train import watched_recall
from mambactl.train.best_weights import LEAST_RECALL, score


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student) -> str:
    return str(save_student(tmp_path_factory.mktemp("b") / "student"))


@pytest.fixture(scope="module")
def held(tmp_path_factory, random_texts) -> str:
    """Text that is not trained on."""
    lines = random_texts.read_text().splitlines()
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    path.write_text("\n".join(lines[-12:]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def options(random_texts, held, tmp_path_factory):
    train = tmp_path_factory.mktemp("train") / "train.jsonl"
    train.write_text("\n".join(random_texts.read_text().splitlines()[:-12]) + "\n")

    def make(**fields) -> DistillConfig:
        usual = {
            "device": "cpu", "data": [str(train)], "max_steps": 8, "align_steps": 2,
            "batch_size": 2, "max_length": 32, "save_every": 3, "warmup": 0, "eval_every": 2,
            "eval_data": [held], "eval_tokens": 128, "eval_recall": [64], "eval_recall_rows": 4,
        }  # fmt: skip
        return DistillConfig(**usual | fields)

    return make


@pytest.fixture
def recalled(monkeypatch):
    """recalled(1.0, 0.5): what models recall of a probe, one after the other, the teacher first."""

    def script(*shares: float) -> None:
        left = list(shares)

        def measured(model, probe, *arguments):
            return {"recall": left.pop(0)}

        monkeypatch.setattr(watched_recall, "measure_recall", measured)
        probes = recall_probes
        monkeypatch.setattr(watched_recall, "recall_probes", lambda *a: probes(*a)[:1])

    return script


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(path) -> dict[str, torch.Tensor]:
    return load_model(str(path)).state_dict()


def test_the_score_weighs_both_alike() -> None:
    assert score({"kl": 0.02, "recall_kept": 0.5}) == pytest.approx(0.04)
    assert score({"kl": 0.02}) == 0.02 and score({"recall_kept": 0.8}) == 1.25
    assert score({"kl": 0.02, "recall_kept": 0.0}) == pytest.approx(0.02 / LEAST_RECALL)


def test_recall_is_logged_and_changes_no_weight(student, options, tmp_path, capfd) -> None:
    watched, alone = tmp_path / "watched", tmp_path / "alone"
    distill.run(options(), student, watched)
    assert "the teacher recalls " in capfd.readouterr().err
    distill.run(options(eval_recall=[], eval_data=[]), student, alone)
    ours, theirs = weights(watched), weights(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [line for line in lines_of(watched) if "recall" in line]
    assert [(x["phase"], x["step"]) for x in lines] == [
        ("align", 0), ("align", 2), ("logits", 2), ("logits", 4), ("logits", 6)
    ]  # fmt: skip
    model, config = load_model(str(watched)), options()
    with torch.no_grad():
        for probe in watched_recall.watched_probes(config, _tokenizer(student)):
            found = measure_recall(model, probe)["recall"]
            assert lines[-1]["recall"][probe.name] == found


def _tokenizer(source):
    from mambactl.checkpoint.load import load_tokenizer

    return load_tokenizer(source)


# the teacher's, before the first step, after aligning, and at three steps of matching logits
BEST = {
    ("logits", 2): (0.5, 0.1, 0.1, 0.6, 0.1, 0.1),
    ("align", 2): (0.5, 0.01, 0.5, 0.01, 0.01, 0.01),
    ("align", 0): (0.5, 0.5, 0.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("where", BEST)
def test_the_best_weights_are_kept(student, options, tmp_path, recalled, where) -> None:
    recalled(*BEST[where])
    result = distill.run(options(keep_best=True), student, tmp_path / "best")
    best = result.metrics["best"]
    assert (best["phase"], best["step"]) == where
    assert load_lineage(result.path)["metrics"]["best"] == best
    scores = {(x["phase"], x["step"]): x["score"] for x in lines_of(tmp_path / "best") if "kl" in x}
    assert len(scores) == 5 and best["score"] == min(scores.values()) == scores[where]
    assert best["score"] == pytest.approx(best["kl"] / best["recall_kept"])
    assert best["recall_kept"] == min(1.0, best["recall"]["kv-64"] / 0.5)
    # a run that stops there saves the same
    if where == ("align", 0):
        wanted = weights(student)
    else:
        wanted = _weights_at(student, options, tmp_path, recalled, where)
    ours = weights(tmp_path / "best")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def _weights_at(student, options, tmp_path, recalled, where) -> dict[str, torch.Tensor]:
    """Weights of a run without --keep-best at the moment of one measurement."""
    log, caught = RunFolder.log, {}
    models = []
    phase_run = distill.train

    def train(model, *arguments):
        models.append(model)
        return phase_run(model, *arguments)

    def watches(self, entry):
        if (entry["phase"], entry["step"]) == where:
            caught.update({n: p.detach().clone() for n, p in models[0].state_dict().items()})
        log(self, entry)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "log", watches)
        patched.setattr(distill, "train", train)
        distill.run(options(eval_recall=[]), student, tmp_path / "last")
    return caught


@pytest.mark.parametrize("stops_at", [("align", 2), ("logits", 5)])
def test_a_stop_keeps_what_was_best(student, options, tmp_path, recalled, stops_at) -> None:
    where = ("logits", 2)
    recalled(*BEST[where])
    whole = distill.run(options(keep_best=True), student, tmp_path / "whole")
    recalled(*BEST[where])
    config = options(keep_best=True, save_every=1)
    with abrupt_stop(lambda _, entry: (entry["phase"], entry["step"]) == stops_at):
        distill.run(config, student, tmp_path / "again")
    # what is left to measure, the teacher once more
    done = {("align", 2): 1, ("logits", 5): 4}[stops_at]
    recalled(0.5, *BEST[where][1 + done :])
    again = distill.run(config, student, tmp_path / "again", resume=True)
    assert again.metrics["best"] == whole.metrics["best"]
    ours, theirs = weights(tmp_path / "again"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_student_that_waits_for_its_mixers_is_not_kept(student, options, tmp_path) -> None:
    config = options(
        stages=["stepwise"], align_steps=None, stepwise_groups=[0.25, 0.5], keep_best=True
    )
    distill.run(config, student, tmp_path / "out")
    measured = [line for line in lines_of(tmp_path / "out") if "kl" in line]
    assert [line["phase"] for line in measured if "score" not in line] == ["stepwise-1"] * 3
    assert [line["phase"] for line in measured if "score" in line] == ["stepwise-2"] * 2


def test_the_best_of_nothing_is_refused(student, options, tmp_path) -> None:
    with pytest.raises(UsageError, match="--keep-best needs something") as caught:
        distill.run(
            options(keep_best=True, eval_data=[], eval_recall=[]), student, tmp_path / "out"
        )
    assert "--eval-recall" in caught.value.hint
    with pytest.raises(UsageError, match="does not fit in 4 tokens"):
        distill.plan(options(eval_recall=[4]), student)
