"""The `sft` stage: learns assistant turns, with or without a teacher, and resumes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mambactl.checkpoint.load import load_lineage, load_model, open_checkpoint
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.commands.sft import plan, run
from mambactl.data.bad_rows import BadRows
from mambactl.data.pack import collate
from mambactl.errors import ModelError, UsageError
from mambactl.options import SftConfig
from mambactl.train import rows
from mambactl.train.job import Job
from mambactl.train.losses import distillation_loss
from mambactl.train.optimization import last_hidden


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("s") / "student"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw = torch.Generator().manual_seed(0)

    def text(count):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=draw))

    def chat():
        asked = {"role": "user", "content": text(6)}
        return {"messages": [asked, {"role": "assistant", "content": "the river is old"}]}

    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text("".join(json.dumps(chat()) + "\n" for _ in range(30)))
    return str(path)


def cpu(data, **fields):
    settings = {
        "max_steps": 12,
        "batch_size": 2,
        "max_length": 32,
        "save_every": 4,
        "warmup": 2,
        "lr": 3e-3,
    }
    return SftConfig(device="cpu", data=[data], **{**settings, **fields})


def test_the_assistants_words_are_learned(student, data, tmp_path):
    config = cpu(data)
    result = run(config, student, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert result.metrics["sft"]["steps"] == 12
    assert result.metrics["sft"]["last_loss"] < 0.5 * result.metrics["sft"]["first_loss"]
    assert load_lineage(result.path)["stage"] == "sft"
    assert load_model(result.path).config.to_dict() == load_model(student).config.to_dict()
    before, after = (_ce(config, student, path) for path in (student, result.path))
    assert before == pytest.approx(result.metrics["sft"]["first_loss"], rel=0.3)
    assert after < 0.5 * before


def _ce(config, student, path):
    job = Job.of("sft", config, student)
    batch = collate(rows.training_rows(job, job.tokenizer(), assistant_only=True))
    model, mask = load_model(path), batch.loss_mask[:, 1:]
    with torch.no_grad():
        hidden = last_hidden(model, batch)[:, :-1]
        losses = distillation_loss(hidden, model.lm_head.weight, batch.input_ids[:, 1:], mask)
    return float(losses.ce / mask.sum())


def test_only_what_a_run_can_see_is_asked_of_the_hub(student, monkeypatch):
    asked = []

    def recorded(specs, most, **limits):
        asked.append({name: limits[name] for name in limits if name not in ("bad", "form")})
        return []

    monkeypatch.setattr(rows, "load_rows", recorded)
    for packing in (True, False):
        job = Job.of("sft", cpu("some/set", packing=packing), student)
        rows.read_documents(job, BadRows(skip=False))
    # 12 steps of 2 rows of 32 tokens
    assert asked == [{"used_tokens": 768}, {"used_rows": 24}]
    assert plan(cpu("some/set"), student)["documents"] is None


def test_the_first_step_is_the_packed_loss(student, data, tmp_path):
    config = cpu(data, max_steps=1, batch_size=200, lr=1e-9)
    result = run(config, student, tmp_path / "out")
    expected = _ce(config, student, student)
    assert result.metrics["sft"]["first_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_weighs_in(student, data, tmp_path, tiny_llama_dir):
    config = cpu(data, ce_weight=0.0, kl_weight=1.0, max_steps=30)
    result = run(config, student, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(lines[0]["train_kl"], rel=1e-3)
    assert lines[-1]["train_kl"] < 0.7 * lines[0]["train_kl"]
    assert load_lineage(result.path)["teacher"] == str(tiny_llama_dir)


def test_compiled_blocks_learn_the_same(student, data, tmp_path, monkeypatch):
    """As torch traces them, without code of their own, which takes minutes to make."""
    from mambactl.train import compiled

    whole = compiled.torch.compile
    monkeypatch.setattr(compiled.torch, "compile", lambda f, **o: whole(f, backend="eager", **o))
    curves = []
    for compiles in (False, True):
        out = tmp_path / str(compiles)
        run(cpu(data, kl_weight=1.0, max_steps=3, compile=compiles), student, out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in lines])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    with pytest.raises(UsageError, match="whole packed rows"):
        run(cpu(data, compile=True, packing=False), student, tmp_path / "apart")


@pytest.mark.parametrize("compiles", [False, True])
def test_compiled_blocks_see_one_shape(student, data, tmp_path, monkeypatch, compiles):
    from transformers import Trainer

    from mambactl.train import compiled

    whole, step, shapes = compiled.torch.compile, Trainer.training_step, set()

    def heard(trainer, model, inputs, *rest):
        shapes.add(tuple(inputs["input_ids"].shape))
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", heard)
    monkeypatch.setattr(compiled.torch, "compile", lambda f, **o: whole(f, backend="eager", **o))
    # fifteen rows: three batches of four, and three rows
    run(cpu(data, batch_size=4, max_steps=6, compile=compiles), student, tmp_path / "out")
    assert {rows for rows, _ in shapes} == ({4} if compiles else {3, 4})
    assert len(shapes) == 1 or not compiles


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_a_stopped_run_resumes_to_the_same_curve(student, data, tmp_path, monkeypatch, kl_weight):
    config = cpu(data, kl_weight=kl_weight, grad_accum=2)
    run(config, student, tmp_path / "whole")
    log = RunFolder.log

    def fails(self, entry):
        if entry["step"] == 7:
            raise RuntimeError("abrupt")
        log(self, entry)

    monkeypatch.setattr(RunFolder, "log", fails)
    with pytest.raises(RuntimeError, match="abrupt"):
        run(config, student, tmp_path / "broken")
    monkeypatch.undo()
    run(config, student, tmp_path / "broken", resume=True)
    whole, broken = (_curve(tmp_path / name) for name in ("whole", "broken"))
    assert whole == broken
    ours, theirs = (load_model(str(tmp_path / n)).state_dict() for n in ("whole", "broken"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _curve(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["tokens"]) for line in lines]


def test_what_cannot_be_tuned_is_a_sentence(student, data, tmp_path, tiny_llama_dir):
    with pytest.raises(UsageError, match="both 0"):
        run(cpu(data, ce_weight=0.0), student, tmp_path / "out")
    with pytest.raises(ModelError):
        run(cpu(data), str(tmp_path / "missing"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert plan(cpu(data), student)["teacher"] is None
    assert plan(cpu(data, kl_weight=1), student)["teacher"] == str(tiny_llama_dir)


def test_what_is_beside_a_result_ends_no_training(student, data, tmp_path, monkeypatch, capsys):
    """The plot, the card and what trackers write: each failure is a warning that names the file."""

    def fail(*_, **__):
        raise RuntimeError("no ink")

    class Tracker(TrainerCallback):
        on_log = fail

    monkeypatch.setattr("mambactl.train.publish.draw", fail)
    monkeypatch.setattr("mambactl.checkpoint.container.model_card", fail)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr("mambactl.commands.sft.require_trackers", lambda config: None)
    out = tmp_path / "out$x^{$"
    run(cpu(data, max_steps=2, log_to=["tensorboard"]), student, out)
    assert load_lineage(str(out))["stage"] == "sft"
    warned = [line for line in capsys.readouterr().err.splitlines() if "no ink" in line]
    # in steps of two, the tracker fails once
    for name in ("metrics.png", "README.md", "out$x^{$.logs"):
        assert any(name in line for line in warned)
    assert len(warned) == 3 and all(line.startswith("warning: ") for line in warned)
    assert not (out / "README.md").exists() and not (out / "metrics.png").exists()


def test_any_name_of_the_result_can_be_drawn(student, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out$x^{$"
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(Path(data).read_text()[: 1 + Path(data).read_text().index("\n")])
    config = cpu(data, max_steps=2, kl_weight=1.0, teacher=student, eval_data=[str(held_out)])
    run(config, student, out)
    assert (out / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert "is not written" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out", "out.st"])
def test_settings_that_transformers_would_not_save_are_kept(name, student, data, tmp_path):
    """As Llama-2 and Vicuna have them: sampling is described and off."""
    given = Path(shutil.copytree(student, tmp_path / "given"))
    text = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}'
    (given / "generation_config.json").write_text(text)
    # the trainer saves at its fourth step and at its last
    result = run(cpu(data, max_steps=6), str(given), tmp_path / name)
    with open_checkpoint(result.path) as reader:
        assert reader.files["generation_config.json"] == text
    assert load_model(result.path).generation_config.eos_token_id == [2, 3]
