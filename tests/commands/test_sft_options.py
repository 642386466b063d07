"""Further options of `sft`: caches, adapters, held-out text, trackers, previews, and a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import WORDS

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.commands import teacher_cache
from mambactl.commands.sft import plan, run
from mambactl.errors import ResourceError, UsageError
from mambactl.options import SftConfig, TeacherCacheConfig
from mambactl.train import trainer
from mambactl.train.job import Job
from mambactl.train.lora import adapted
from mambactl.train.publish import identity
from mambactl.train.rows import held_out_rows, training_rows

ROOT = Path(__file__).parents[2]
SIZES = {"max_steps": 6, "batch_size": 2, "max_length": 32}


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("s") / "student"))


def write(path, *answers):
    draw = torch.Generator().manual_seed(len(answers))
    lines = []
    for answer in answers:
        words = " ".join(WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=draw))
        turns = [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("d") / "chat.jsonl", *["the river is old"] * 30)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return write(tmp_path_factory.mktemp("h") / "held.jsonl", *["the old house is small"] * 9)


def cpu(data, **fields):
    given = {**SIZES, "save_every": 3, "warmup": 2, "lr": 3e-3, **fields}
    return SftConfig(device="cpu", data=[data], **given)


def ledger(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def breaks_at(monkeypatch, step):
    log = RunFolder.log

    def fails(self, entry):
        if entry["step"] == step:
            raise RuntimeError("abrupt")
        log(self, entry)

    monkeypatch.setattr(RunFolder, "log", fails)


def test_a_teacher_cache_takes_the_teachers_place(
    student, data, tiny_llama_dir, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    kept = TeacherCacheConfig(
        device="cpu", data=[data], samples=64, assistant_only_loss=True, **SIZES
    )
    teacher_cache.run(kept, str(tiny_llama_dir), cache)
    config = cpu(data, kl_weight=1.0, ce_weight=0.5)
    run(config, student, tmp_path / "live")
    monkeypatch.setattr(Job, "teacher", lambda *_, **__: pytest.fail("a teacher was loaded"))
    cached = config.model_copy(update={"teacher_cache": str(cache)})
    result = run(cached, student, tmp_path / "out")
    live, ours = ledger(tmp_path / "live"), ledger(tmp_path / "out")
    assert ours[0]["train_kl"] == pytest.approx(live[0]["train_kl"], rel=0.3)
    assert ours[0]["train_ce"] == pytest.approx(live[0]["train_ce"], rel=1e-4)
    assert ours[-1]["train_kl"] < ours[0]["train_kl"]
    assert load_lineage(result.path)["teacher"] == str(tiny_llama_dir)


def test_a_cache_of_other_rows_names_the_command(student, data, tiny_llama_dir, tmp_path):
    cache = tmp_path / "cache"
    # every token, where sft learns the assistant's
    teacher_cache.run(
        TeacherCacheConfig(device="cpu", data=[data], **SIZES), str(tiny_llama_dir), cache
    )
    config = cpu(data, kl_weight=1.0, teacher_cache=str(cache))
    with pytest.raises(UsageError, match="rows are not in") as caught:
        run(config, student, tmp_path / "out")
    assert "--assistant-only-loss" in caught.value.hint
    assert "mambactl teacher-cache" in caught.value.hint
    with pytest.raises(UsageError, match="without a KL"):
        run(cpu(data, teacher_cache=str(cache)), student, tmp_path / "out")


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_adapters_are_trained_merged_and_resumed(student, data, tmp_path, monkeypatch, kl_weight):
    pytest.importorskip("peft")
    config = cpu(data, lora=4, kl_weight=kl_weight)
    result = run(config, student, tmp_path / "whole")
    assert result.metrics["sft"]["last_loss"] < result.metrics["sft"]["first_loss"]
    ours, before = (load_model(path).state_dict() for path in (result.path, student))
    assert ours.keys() == before.keys()
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert all(name.endswith("proj.weight") for name in changed)
    assert {name.split(".")[3] for name in changed} == {"mamba", "self_attn", "mlp"}
    breaks_at(monkeypatch, 5)
    with pytest.raises(RuntimeError, match="abrupt"):
        run(config, student, tmp_path / "broken")
    monkeypatch.undo()
    saved = tmp_path / "broken.partial/trainer/checkpoint-3"
    assert (saved / "adapter_model.safetensors").stat().st_size < 300_000
    run(config, student, tmp_path / "broken", resume=True)
    again = load_model(str(tmp_path / "broken")).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("fields", [{"grad_checkpointing": True}, {"dtype": "bfloat16"}])
def test_adapters_train_alike_when_memory_is_saved(student, data, tmp_path, fields):
    pytest.importorskip("peft")
    config = cpu(data, lora=4, kl_weight=0.5, max_steps=4, lr=1e-2)
    plain = run(config, student, tmp_path / "plain").metrics["sft"]
    saving = run(config.model_copy(update=fields), student, tmp_path / "saving").metrics["sft"]
    assert saving["last_loss"] == pytest.approx(plain["last_loss"], rel=0.05)
    assert saving["last_loss"] < 0.9 * saving["first_loss"]


def test_the_plan_of_adapters_counts_them(student, data):
    pytest.importorskip("peft")
    whole, found = (plan(cpu(data, **fields), student) for fields in ({}, {"lora": 4}))
    model = adapted(load_model(student), SftConfig(lora=4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["trained_parameters"] == trained
    frozen = found["parameters"] * 4
    assert found["estimated_bytes"] == frozen + 16 * trained < whole["estimated_bytes"]


def test_without_peft_the_line_that_installs_it_is_said(student, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for attempt in (lambda: run(cpu(data, lora=4), student, tmp_path / "o"),
                    lambda: plan(cpu(data, lora=4), student)):  # fmt: skip
        with pytest.raises(ResourceError, match="peft") as caught:
            attempt()
        assert caught.value.hint == 'pip install "mambactl[lora]"'
    with pytest.raises(UsageError, match="--lora-alpha"):
        run(cpu(data, lora_alpha=4), student, tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_held_out_text_is_measured_on_the_way(student, data, held, tmp_path, monkeypatch):
    measured = {"eval_data": [held], "eval_every": 4, "eval_tokens": 100}
    config = cpu(data, kl_weight=1.0, ce_weight=0.1, **measured)
    plain = run(cpu(data, kl_weight=1.0, ce_weight=0.1), student, tmp_path / "plain")
    result = run(config, student, tmp_path / "out")
    lines = ledger(tmp_path / "out")
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "kl" in line] == [0, 4, 6]
    for line in lines:
        if "kl" in line:
            assert 0 <= line["agreement"] <= 1 and line["ce"] > 0 and line["perplexity_ratio"] > 0
    assert lines[-1]["kl"] < lines[0]["kl"]
    found = load_lineage(result.path)["metrics"]["sft"]
    assert {key: found[key] for key in ("kl", "ce", "agreement")} == {
        key: lines[-1][key] for key in ("kl", "ce", "agreement")
    }
    # measuring changes nothing
    ours, theirs = (load_model(path).state_dict() for path in (result.path, plain.path))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    breaks_at(monkeypatch, 5)
    with pytest.raises(RuntimeError, match="abrupt"):
        run(config, student, tmp_path / "broken")
    monkeypatch.undo()
    run(config, student, tmp_path / "broken", resume=True)
    keys = ("step", "loss", "kl", "ce")
    resumed = ledger(tmp_path / "broken")
    assert [[line.get(k) for k in keys] for line in resumed] == [
        [line.get(k) for k in keys] for line in lines
    ]


def test_held_out_answers_are_what_is_measured(student, data, held, tmp_path):
    """CE of the first entry against the model's own logits on the assistant's tokens."""
    config = cpu(data, max_steps=1, eval_data=[held], eval_tokens=100)
    run(config, student, tmp_path / "out")
    job = Job.of("sft", config, student)
    model, total, count = load_model(student), 0.0, 0
    for row in held_out_rows(job, job.tokenizer(), assistant_only=True):
        ids, mask = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.loss_mask)
        where = {"seq_idx": torch.from_numpy(row.seq_idx)[None],
                 "position_ids": torch.from_numpy(row.position_ids).long()[None]}  # fmt: skip
        with torch.no_grad():
            logs = model(ids[None], use_cache=False, **where).logits[0, :-1].log_softmax(-1)
        total -= float(logs.gather(-1, ids[1:, None])[:, 0][mask[1:]].sum())
        count += int(mask[1:].sum())
    first = ledger(tmp_path / "out")[0]
    # the five words of the answer, and its end
    assert first["eval_tokens"] == count and count % 6 == 0
    assert first["ce"] == pytest.approx(total / count, rel=1e-4)


def test_without_a_teacher_only_cross_entropy_is_measured(tiny_llama_dir, data, held, tmp_path):
    config = cpu(data, max_steps=2, eval_data=[held], eval_tokens=100)
    result = run(config, str(tiny_llama_dir), tmp_path / "out")
    first, *_, last = ledger(tmp_path / "out")
    assert {"ce", "eval_tokens"} <= first.keys() and not {"kl", "agreement"} & first.keys()
    assert result.metrics["sft"]["ce"] == last["ce"] < first["ce"]
    assert "kl" not in result.metrics["sft"]


def test_a_missing_tracker_is_said_before_anything_is_loaded(student, data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    config = cpu(data, log_to="tensorboard,wandb")
    for attempt in (lambda: run(config, "nowhere", tmp_path / "o"), lambda: plan(config, student)):
        with pytest.raises(ResourceError, match="--log-to tensorboard") as caught:
            attempt()
        assert caught.value.hint == "pip install tensorboard"


def test_curves_go_to_a_tracker_beside_the_result(student, data, held, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    config = cpu(data, log_to="tensorboard", eval_data=[held], eval_tokens=100)
    run(config, student, tmp_path / "out.st")
    events = next((tmp_path / "out.st.logs").rglob("events*")).read_bytes()
    for tag in (b"train/loss", b"eval/kl", b"eval/ce"):
        assert tag in events


def test_bad_rows_stop_the_run_or_are_left_out(student, tmp_path, capsys):
    data = write(tmp_path / "bad.jsonl", *["the river"] * 9, "", "the " * 40)
    with pytest.raises(UsageError, match=r"2 bad rows \(1 .*, 1 .*\)") as caught:
        run(cpu(data), student, tmp_path / "out")
    assert "--skip-bad-rows" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    shown = capsys.readouterr().err
    assert "bad.jsonl, row 10: 1 of 1 assistant turns are empty" in shown
    assert "bad.jsonl, row 11: has " in shown
    run(cpu(data, skip_bad_rows=True), student, tmp_path / "out")
    shown = capsys.readouterr().err
    assert "warning: 2 bad rows" in shown and "data: 9 of 11 documents" in shown


def test_the_plan_counts_and_shows_an_example(student, tmp_path, capsys):
    data = write(tmp_path / "bad.jsonl", *["the river"] * 9, "", "the " * 40)
    with pytest.raises(UsageError, match="2 bad rows"):
        plan(cpu(data), student)
    found = plan(cpu(data, skip_bad_rows=True), student)
    counts = {key: found[key] for key in ("documents", "used_documents", "rows", "tokens")}
    # 6 words and 2 of the answer, <|im_start|>, role and <|im_end|> of both turns
    assert counts == {"documents": 11, "used_documents": 9, "rows": 5, "tokens": 9 * 14}
    assert found["learned_tokens"] == 9 * 3
    assert found["bad_rows"] == {"empty answer": 1, "too long": 1}
    shown = capsys.readouterr().err
    assert "⟦the river <|im_end|>⟧" in shown
    assert "2 bad rows" in shown and "left out" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    assert plan(cpu("some/set"), student)["rows"] is None


def test_weights_mix_data(student, data, held, capsys):
    given = cpu(f"{data}=1").model_copy(update={"data": [f"{data}=1", f"{held}=3"]})
    job = Job.of("sft", given, student)
    tokens = [
        int(row.valid.sum()) for row in training_rows(job, job.tokenizer(), assistant_only=True)
    ]
    # one set is repeated: 30 documents of 15 tokens are a quarter
    assert sum(tokens) == pytest.approx(6 * 2 * 32, rel=0.1)
    known = identity(job)
    assert known["data_shares"] == [0.25, 0.75] and None not in known["data_sha256"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_loss_of_a_whole_one(student, data, tmp_path):
    steps = 30
    config = cpu(data, max_steps=steps, save_every=6, kl_weight=0.5)
    run(config, student, tmp_path / "whole")
    given = config.model_dump(exclude_defaults=True, exclude={"data", "device"})
    settings = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "mambactl", "sft", student, "--data", data, "--device", "cpu",
               *settings, "-o", str(tmp_path / "out")]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL
    )
    metrics = tmp_path / "out.partial/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 8:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = metrics.read_bytes().count(b"\n")
    assert 8 <= done < steps
    with metrics.open("a") as file:
        # a kill may come in the middle of a line
        file.write('{"phase": "sf')
    result = run(config, student, tmp_path / "out", resume=True)
    whole, ours = ledger(tmp_path / "whole"), ledger(tmp_path / "out")
    assert [line["step"] for line in ours] == list(range(1, steps + 1))
    assert ours[-1]["loss"] == pytest.approx(whole[-1]["loss"], abs=1e-6)
    assert result.metrics["sft"]["steps"] == steps
