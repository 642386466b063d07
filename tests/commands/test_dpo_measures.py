"""Reports of `dpo`: held-out pairs by set, log-probabilities packed, padded and alone."""

import json

import numpy as np
import pytest
import torch
from conftest import WORDS

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.commands import eval as evaluation
from mambactl.commands.dpo import plan, run
from mambactl.errors import UsageError
from mambactl.evaluation.probes import EvalConfig
from mambactl.evaluation.rewards import Layout, documents, token_logps
from mambactl.options import DpoConfig
from mambactl.train import reference_policy
from mambactl.train.job import Job
from mambactl.train.preference_data import read_preferences


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("d") / "student"))


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def save(name, count, seed=0, extra=()):
        draw = torch.Generator().manual_seed(seed)

        def words(most):
            size = int(torch.randint(1, most, (1,), generator=draw))
            return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=draw))

        rows = [
            {
                "prompt": words(8),
                "chosen": "the river " + words(4),
                "rejected": "old king " + words(9),
            }
            for _ in range(count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))
        return str(path)

    return save


def cpu(*data, **fields):
    settings = {
        "max_steps": 4,
        "batch_size": 4,
        "max_length": 48,
        "warmup": 1,
        "lr": 1e-3,
        "reference": "self",
    }
    return DpoConfig(device="cpu", data=list(data), **{**settings, **fields})


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_held_out_pairs_are_measured_by_set(student, write, tmp_path):
    one, two = write("one", 40), write("two", 40, seed=1)
    config = cpu(one, two, eval_share=0.25, eval_every=2, max_steps=6, lr=3e-3)
    result = run(config, student, tmp_path / "out")
    lines = lines_of(tmp_path / "out")
    measured = [n for n, line in enumerate(lines, 1) if "held_out/one/reward_accuracy" in line]
    assert measured == [2, 4, 6]
    for name in ("one", "two"):
        found = result.metrics["held_out"][name]
        assert found["before"]["kl_to_reference"] == found["before"]["reward_margin"] == 0
        assert found["reward_accuracy"] > 0.8
        assert found["reward_margin"] > 0
        assert 0 < found["kl_to_reference"] == lines[-1][f"held_out/{name}/kl_to_reference"]
    assert load_lineage(result.path)["metrics"]["held_out"] == result.metrics["held_out"]
    # `eval` finds the same with the model it came from as reference, with rewards in nats
    asked = EvalConfig(device="cpu", preferences=f"{one},{two}", teacher=student, max_length=48)
    numbers = evaluation.run(asked, result.path).metrics["preferences"]
    assert list(numbers) == ["one", "two"]
    assert numbers["one"]["pairs"] == 40
    config = cpu(one, eval_data=[two], eval_every=2, max_steps=6, lr=3e-3)
    again = run(config, student, tmp_path / "again")
    whole = evaluation.run(asked, again.path).metrics["preferences"]["two"]
    found = again.metrics["held_out"]["two"]
    for key in ("reward_accuracy", "kl_to_reference", "logp_chosen"):
        assert found[key] == pytest.approx(whole[key], rel=1e-5)
    assert found["reward_margin"] == pytest.approx(0.1 * whole["reward_margin"], rel=1e-4)


def test_a_policy_that_goes_too_far_is_stopped(student, write, tmp_path):
    config = cpu(
        write("one", 40), eval_share=0.25, eval_every=2, max_steps=40, lr=3e-3, max_kl=1e-3
    )
    found = run(config, student, tmp_path / "out").metrics
    steps = found["dpo"]["steps"]
    assert steps < 40 and steps % 2 == 0
    assert found["held_out"]["one"]["kl_to_reference"] > 1e-3
    earlier = lines_of(tmp_path / "out")[: steps - 1]
    assert all(line.get("held_out/one/kl_to_reference", 0) <= 1e-3 for line in earlier)


def test_a_limit_on_sets_of_which_nothing_is_held_out_is_refused(student, write, tmp_path):
    config = cpu(write("few", 2), eval_share=1e-9, max_kl=0.1)
    with pytest.raises(UsageError, match="no pair is held out"):
        run(config, student, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_packing_padding_and_single_rows_agree(student, write, tmp_path):
    data = write("pairs", 12)
    found = {}
    for packing in (True, False):
        for asked_once in (True, False):
            config = cpu(
                data,
                batch_size=12,
                max_steps=1,
                lr=1e-9,
                packing=packing,
                precompute_reference=asked_once,
                reference="teacher",
            )
            out = tmp_path / f"{packing}{asked_once}"
            run(config, student, out)
            found[packing, asked_once] = lines_of(out)[0]
    job = Job.of("dpo", cpu(data), student)
    pairs = read_preferences(job, job.config).train
    model = load_model(student, "cpu", torch.float32)
    alone = [part.sum() for part in token_logps(model, documents(pairs), Layout(48, 1, False))]
    for line in found.values():
        assert line["logps/chosen"] == pytest.approx(np.mean(alone[0::2]), abs=1e-4)
        assert line["logps/rejected"] == pytest.approx(np.mean(alone[1::2]), abs=1e-4)
        first = found[True, True]
        assert line["rewards/margins"] == pytest.approx(first["rewards/margins"], abs=1e-4)
        assert line["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


def test_longer_answers_can_weigh_less(student, write, tmp_path):
    data = write("pairs", 8)
    margins = {}
    for asked_once in (True, False):
        config = cpu(
            data,
            batch_size=8,
            max_steps=1,
            reference="teacher",
            ld_alpha=0.3,
            precompute_reference=asked_once,
        )
        run(config, student, tmp_path / f"{asked_once}")
        margins[asked_once] = lines_of(tmp_path / f"{asked_once}")[0]["rewards/margins"]
    run(cpu(data, batch_size=8, max_steps=1, reference="teacher"), student, tmp_path / "plain")
    assert margins[True] == pytest.approx(margins[False], abs=1e-4)
    assert margins[True] != pytest.approx(
        lines_of(tmp_path / "plain")[0]["rewards/margins"], abs=1e-2
    )


def test_losses_are_added_up(student, write, tmp_path):
    data = write("pairs", 8)
    shared = {"batch_size": 8, "max_steps": 1}
    losses = {
        "plain": cpu(data, **shared),
        "ipo": cpu(data, loss_type="ipo", **shared),
        "both": cpu(data, loss_type="sigmoid,ipo", loss_weights="1,0.5", sft_weight=2.0, **shared),
    }
    first = {}
    for name, config in losses.items():
        run(config, student, tmp_path / name)
        first[name] = lines_of(tmp_path / name)[0]["loss"]
    # at the start rewards are 0: log 2, and (1 / (2 beta))^2
    assert first["plain"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["ipo"] == pytest.approx(25, rel=1e-3)
    ce = first["both"] - first["plain"] - 0.5 * first["ipo"]
    model = load_model(student, "cpu", torch.float32)
    job = Job.of("dpo", cpu(data), student)
    pairs = read_preferences(job, job.config).train
    parts = token_logps(model, documents(pairs), Layout(48))[0::2]
    assert ce == pytest.approx(-2 * np.concatenate(parts).mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing": 0.1}, "does nothing for sigmoid"),
        ({"loss_type": "exo_pair"}, "needs label smoothing"),
        ({"loss_weights": "1,2"}, "2 loss weights for 1 loss types"),
        ({"loss_type": "sft"}, "learns no preference"),
        ({"loss_type": "apo_zero", "f_divergence": "forward_kl"}, "apo_zero has no --f-divergence"),
        ({"max_kl": 0.1}, "needs held-out preferences"),
        ({"eval_share": 0.1, "eval_data": ["x.jsonl"]}, "both hold data out"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(student, write, tmp_path, fields, message):
    with pytest.raises(UsageError, match=message):
        run(cpu(write("pairs", 4), **fields), student, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_of_data_are_refused(student, write, tmp_path):
    with pytest.raises(UsageError, match="without weights"):
        run(cpu(f"{write('pairs', 4)}=0.5"), student, tmp_path / "out")


def test_bad_rows_stop_the_run_or_are_counted(student, write, tmp_path):
    data = write("bad", 6, extra=[{"prompt": "a", "chosen": "old", "rejected": "old"}])
    with pytest.raises(UsageError, match="bad.jsonl, row 7: `chosen` equals `rejected`"):
        run(cpu(data), student, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    config = cpu(data, max_steps=1, skip_bad_rows=True)
    assert run(config, student, tmp_path / "out").metrics["data"]["bad"]["bad"] == 1
    shown = plan(config.model_copy(update={"eval_data": [write("other", 3)]}), student)
    assert shown["held_out"] == {"other": 3}
    assert shown["pairs"] == {"bad": {"pairs": 6, "bad": 1, "too_long": 0}}
    assert "[[the river" in shown["example"]["chosen"]


def test_the_reference_is_asked_once(student, write, tmp_path, monkeypatch):
    """A run that ends before its first checkpoint keeps what its reference said."""
    data = write("pairs", 10)
    config = cpu(data, reference="teacher", max_steps=5)
    monkeypatch.setattr(reference_policy, "PIECE", 4)
    asked = []

    def count(model, texts, layout):
        if len(asked) == 2 and not stopped:
            raise KeyboardInterrupt
        asked.append(len(texts))
        return token_logps(model, texts, layout)

    stopped = False
    monkeypatch.setattr(reference_policy, "token_logps", count)
    with pytest.raises(KeyboardInterrupt):
        run(config, student, tmp_path / "out")
    stopped = True
    resumed = run(config, student, tmp_path / "out", resume=True).metrics["dpo"]
    assert asked == [8, 8, 4]
    whole = run(config, student, tmp_path / "whole").metrics["dpo"]
    assert resumed["last_loss"] == pytest.approx(whole["last_loss"], abs=1e-6)


def test_accumulated_batches_are_one_batch(student, write, tmp_path):
    data = write("pairs", 12)
    first = {}
    for rows, times in ((12, 1), (4, 3)):
        config = cpu(data, batch_size=rows, grad_accum=times, max_steps=1, reference="teacher")
        run(config, student, tmp_path / str(rows))
        first[rows] = lines_of(tmp_path / str(rows))[0]
    for key in ("loss", "grad_norm"):
        assert first[4][key] == pytest.approx(first[12][key], rel=1e-3)
