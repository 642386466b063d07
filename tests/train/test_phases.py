"""Distillation with every stage: step by step, measured while it trains, and exact after a kill."""

import json

import pytest
import torch
from conftest import WORDS
from train.abrupt_stop import abrupt_stop

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.commands.distill import plan, run
from mambactl.errors import UsageError
from mambactl.options import DistillConfig
from mambactl.options.phase_steps import phase_steps, without_steps

NAMES = ["align", "stepwise-1", "stepwise-2", "logits"]


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("p") / "student"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files with text to train on and to hold out."""
    draw = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 40), ("held", 12)):
        rows = [torch.randint(len(WORDS), (10 + n,), generator=draw) for n in range(count)]
        lines = [json.dumps({"text": " ".join(WORDS[i] for i in row)}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return [str(folder / f"{name}.jsonl") for name in ("train", "held")]


def every_stage(texts, **fields):
    settings = {
        "device": "cpu", "data": [texts[0]], "max_steps": 14, "align_steps": 4,
        "stepwise_steps": 6, "stages": ["align", "stepwise", "logits"],
        "stepwise_groups": [0.25, 0.5], "batch_size": 2, "max_length": 32, "save_every": 2,
        "warmup": 1, "eval_data": [texts[1]], "eval_every": 2, "eval_tokens": 128,
    }  # fmt: skip
    return DistillConfig(**{**settings, **fields})


def ledger(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.fixture(scope="module")
def whole(student, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return run(every_stage(texts), student, out), out


def test_every_stage_is_trained_measured_and_recorded(whole, student, texts) -> None:
    result, out = whole
    assert list(result.metrics) == NAMES
    assert [result.metrics[name]["steps"] for name in NAMES] == [4, 3, 3, 4]
    lines = ledger(out / "metrics.jsonl")
    assert [(line["phase"], line["step"]) for line in lines] == [
        ("align", 0),
        *((name, step) for name, steps in zip(NAMES, (4, 3, 3, 4), strict=True)
          for step in range(1, steps + 1)),
    ]  # fmt: skip
    for earlier, later in zip(lines, lines[1:], strict=False):
        assert later["tokens"] > earlier["tokens"] and later.get("flops", 0) >= 0
    measured = [(line["phase"], line["step"]) for line in lines if "kl" in line]
    assert measured == [
        ("align", 0), ("align", 2), ("align", 4), ("stepwise-1", 2), ("stepwise-1", 3),
        ("stepwise-2", 2), ("stepwise-2", 3), ("logits", 2), ("logits", 4),
    ]  # fmt: skip
    last = load_lineage(str(out))["metrics"]["logits"]
    assert last == result.metrics["logits"]
    assert last["kl"] == lines[-1]["kl"] and 0 <= last["agreement"] <= 1
    assert last["flops"] > 0 and last["seconds"] > 0 and last["tokens"] > 0
    # half of the student's mixers out of the way is closer to the teacher than none
    by_place = {(line["phase"], line["step"]): line["kl"] for line in lines if "kl" in line}
    assert by_place["stepwise-1", 2] < by_place["align", 0]


def test_held_out_numbers_are_those_of_eval(whole, student, texts, tiny_llama_dir) -> None:
    """The last line of the ledger against the other measurement, on the same documents."""
    from mambactl.evaluation.fidelity import fidelity
    from mambactl.train.job import Job
    from mambactl.train.rows import held_out_rows

    result, out = whole
    config = every_stage(texts)
    job = Job.of("distill", config, student)
    documents = [
        row.input_ids[(row.seq_idx == number) & row.valid].tolist()
        for row in held_out_rows(job, job.tokenizer())
        for number in range(int(row.seq_idx[row.valid].max()) + 1)
    ]
    found = fidelity(load_model(str(out)), load_model(str(tiny_llama_dir)), documents, 32)
    for name in ("kl", "agreement", "perplexity_ratio"):
        assert result.metrics["logits"][name] == pytest.approx(found[name], rel=1e-3), name


# before the first step, while aligning, in both groups, and in the last phase
@pytest.mark.parametrize("line", [0, 3, 6, 9, 13])
def test_a_stop_at_any_line_ends_at_the_same_weights(whole, student, texts, tmp_path, line) -> None:
    out = tmp_path / "out"
    with abrupt_stop(lambda number, _: number == line):
        run(every_stage(texts), student, out)
    run(every_stage(texts), student, out, resume=True)
    assert ledger(out / "metrics.jsonl") == ledger(whole[1] / "metrics.jsonl")
    ours, theirs = (load_model(str(path)).state_dict() for path in (out, whole[1]))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_measuring_changes_no_weight(whole, student, texts, tmp_path) -> None:
    out = tmp_path / "blind.st"
    result = run(every_stage(texts, eval_data=[]), student, out)
    assert "kl" not in result.metrics["logits"]
    ours, theirs = (load_model(str(path)).state_dict() for path in (out, whole[1]))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_plot_lies_beside_the_checkpoint(whole) -> None:
    pytest.importorskip("matplotlib")
    assert (whole[1] / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_stepwise_trains_the_groups_so_far_and_nothing_else(student, texts, tmp_path) -> None:
    config = every_stage(texts, stages=["stepwise"], stepwise_groups=None, stepwise_order=[2, 0])
    (first, second) = plan(config, student)["phases"]
    assert (first["attention_of_the_teacher"], first["trained"][0]["layers"]) == ("0", "2")
    assert second["trained"][0]["layers"] == "0,2" and "attention_of_the_teacher" not in second
    # stopped after the first group: only its mixer has moved
    out = tmp_path / "out"
    run(config.model_copy(update={"stepwise_groups": [0.25]}), student, out)
    before, after = (dict(load_model(str(p)).named_parameters()) for p in (student, out))
    for name, parameter in after.items():
        moved = not torch.equal(parameter, before[name])
        assert moved == (".mamba." in name), name


def test_the_rest_may_train_while_stepwise(student, texts, tmp_path) -> None:
    config = every_stage(texts, stages=["stepwise"], stepwise_rest_lr=1e-3, stepwise_steps=None)
    (first, _) = plan(config, student)["phases"]
    assert {part["part"] for part in first["trained"]} >= {"mlp", "attention", "embeddings"}
    assert [(part["part"], part["layers"]) for part in first["frozen"]] == [
        ("queries and keys of attention", "1,3"), ("mamba mixers", "2"),
    ]  # fmt: skip


def test_the_dry_run_lists_what_trains_and_what_does_not(student, texts) -> None:
    planned = plan(every_stage(texts), student)
    assert [phase["name"] for phase in planned["phases"]] == NAMES
    total = planned["parameters"]
    for phase in planned["phases"]:
        parts = [*phase["trained"], *phase["frozen"]]
        assert sum(part["parameters"] for part in parts) == total
        assert all(part["lr"] > 0 for part in phase["trained"])
        assert phase["tokens_at_most"] == phase["steps"] * 2 * 32
        assert phase["predicted"]["seconds"] > 0 and phase["predicted"]["probed_on"] == "cpu"
    align, _, _, logits = planned["phases"]
    assert [(part["part"], part["layers"], part["lr"]) for part in align["trained"]] == [
        ("mamba mixers", "0,2", 2e-3)
    ]
    (frozen,) = logits["frozen"]
    assert frozen["part"] == "queries and keys of attention"
    assert {p["lr"] for p in logits["trained"]} == {3e-4, 1e-4}
    assert planned["predicted"]["peak_bytes"] == logits["predicted"]["peak_bytes"]
    json.dumps(planned)


def test_layers_follow_the_selection_in_the_lineage(student, texts, monkeypatch) -> None:
    from mambactl.commands import distill

    found = {"stage": "sft", "metrics": {}, "ancestors": [
        {"stage": "convert", "metrics": {"selection": {"ranking": [3, 2, 1, 0]}}}
    ]}  # fmt: skip
    monkeypatch.setattr(distill, "load_lineage", lambda _: found)
    config = every_stage(texts, stages=["stepwise"], stepwise_steps=None)
    assert plan(config, student)["phases"][0]["trained"][0]["layers"] == "2"


def test_steps_are_dealt_to_the_stages() -> None:
    def steps(**fields):
        return phase_steps(DistillConfig(max_steps=11, **fields))

    three = ["align", "stepwise", "logits"]
    assert steps() == {"align": 2, "logits": 9}
    assert steps(stages=three) == {"align": 2, "stepwise": 4, "logits": 5}
    assert steps(stages=three, align_share=None) == {"align": 3, "stepwise": 3, "logits": 5}
    assert steps(stages=three, stepwise_steps=9) == {"align": 1, "stepwise": 9, "logits": 1}
    assert steps(stages=three, stepwise_steps=11) == {"stepwise": 11}
    assert steps(stages=["align"]) == {"align": 11} and steps(align_share=0.0) == {"logits": 11}
    assert [phase_steps(DistillConfig(max_steps=n)).get("align", 0) for n in (1, 2, 7)] == [0, 1, 1]
    assert steps(stages=three, align_steps=1) == {"align": 1, "stepwise": 5, "logits": 5}
    assert steps(stages=three, stepwise_steps=0) == {"align": 2, "logits": 9}
    assert steps(stages=["stepwise", "logits"]) == {"stepwise": 5, "logits": 6}
    assert steps(stages=["align", "stepwise"], align_steps=4) == {"align": 4, "stepwise": 7}
    few = {n: without_steps(DistillConfig(max_steps=n, stages=three)) for n in (1, 2, 3)}
    assert few == {1: ["align", "stepwise"], 2: ["align"], 3: []}
    assert without_steps(DistillConfig(stages=three, align_share=0, stepwise_steps=0)) == []
    for wrong in (["logits", "stepwise"], ["stepwise", "align"]):
        with pytest.raises(UsageError, match="order"):
            steps(stages=wrong)
    with pytest.raises(UsageError, match="more than --max-steps 11"):
        steps(stages=three, align_steps=6, stepwise_steps=6)


def test_what_cannot_be_done_is_a_sentence(student, texts, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="too few for 2 groups"):
        run(every_stage(texts, stepwise_steps=1), student, out)
    with pytest.raises(UsageError, match="each replaced layer once: 0,2"):
        run(every_stage(texts, stepwise_order=[0]), student, out)
    with pytest.raises(UsageError, match="is training data and held out"):
        run(every_stage(texts, eval_data=[texts[0]]), student, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_other_divergences_are_lowered_too(student, texts, tmp_path, divergence) -> None:
    config = every_stage(
        texts, stages=["logits"], divergence=divergence, max_steps=24, lr=3e-3, rest_lr=3e-3,
        eval_every=100, ce_weight=0.1, temperature=1.5,
    )  # fmt: skip
    found = run(config, student, tmp_path / "out").metrics["logits"]
    assert found["last_loss"] < found["first_loss"]
