"""The `distill` stage: from a hybrid folder to a better one, resumable, or a sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer, open_checkpoint
from mambactl.checkpoint.run_folder import RunFolder, differences
from mambactl.commands import convert, distill, dpo, sft
from mambactl.commands import eval as evaluation
from mambactl.commands.distill import plan, run
from mambactl.errors import ModelError, OutputError, UsageError
from mambactl.evaluation.probes import EvalConfig
from mambactl.options import ConvertConfig, DistillConfig, DpoConfig, SftConfig
from mambactl.options.phase_steps import phase_steps
from mambactl.train.job import Job
from mambactl.train.ledger import PhaseReport
from mambactl.train.publish import identity, report_phases


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("d") / "student"))


@pytest.fixture(scope="module")
def data(random_texts):
    return str(random_texts)


def cpu(data, **fields):
    settings = {"max_steps": 16, "batch_size": 2, "max_length": 32, "save_every": 4, "warmup": 2}
    return DistillConfig(device="cpu", data=[data], **{**settings, **fields})


@pytest.mark.parametrize("name", ["out", "out.st"])
def test_both_phases_improve_and_are_recorded(student, data, tmp_path, name):
    out = tmp_path / name
    config = cpu(data, max_steps=40, align_share=0.5)
    result = run(config, student, out)
    assert result.path == str(out)
    # a folder holds its ledger, a single file has it beside
    ledger = out / "metrics.jsonl" if out.is_dir() else tmp_path / f"{name}.metrics.jsonl"
    plot = ledger.with_name(ledger.name.replace("jsonl", "png"))
    assert {path.name for path in tmp_path.iterdir()} - {plot.name} == (
        {name} if out.is_dir() else {name, ledger.name}
    )
    assert len(ledger.read_text().splitlines()) == 40
    metrics = result.metrics
    assert list(metrics) == ["align", "logits"]
    for phase in metrics.values():
        assert phase["steps"] == 20
        assert phase["last_loss"] < phase["first_loss"]
        assert phase["tokens"] > 500
    lineage = load_lineage(str(out))
    assert lineage["stage"] == "distill"
    assert lineage["metrics"] == metrics
    assert lineage["recipe"] == config.model_dump(mode="json")
    assert [link["stage"] for link in lineage["ancestors"]] == ["convert"]
    assert load_model(str(out)).config.mixers == ["mamba2", "attention"] * 2
    assert load_tokenizer(str(out)).chat_template == load_tokenizer(student).chat_template


def test_settings_that_transformers_would_not_save_are_kept(data, tiny_llama_dir, tmp_path):
    given = shutil.copytree(tiny_llama_dir, tmp_path / "given")
    text = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9}'
    (given / "generation_config.json").write_text(text)
    convert.run(ConvertConfig(), str(given), tmp_path / "student")
    run(cpu(data, max_steps=2), str(tmp_path / "student"), tmp_path / "out")
    for out in ("student", "out"):
        assert (tmp_path / out / "generation_config.json").read_text() == text


def test_the_result_has_the_sources_type(student, data, tmp_path, make_hybrid, tiny_llama_dir):
    half = tmp_path / "half"
    _save_as(load_model(student), torch.bfloat16, student, half)
    run(cpu(data, max_steps=2), str(half), tmp_path / "out")
    with open_checkpoint(str(tmp_path / "out")) as reader:
        for name in reader.names():
            kept = name.endswith(("A_log", ".D", "dt_bias"))
            assert reader.dtype(name) == (torch.float32 if kept else torch.bfloat16), name
        assert reader.config["dtype"] == "bfloat16"


def _save_as(model, dtype, source, out):
    from mambactl.checkpoint.save import save_model

    with open_checkpoint(source) as reader:
        save_model(model.to(dtype), out, reader.files, reader.lineage)


def test_a_killed_run_resumes_to_the_same_weights(student, data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = cpu(data)
    run(config, student, whole)
    _kill_at_step(config, student, broken, 11)
    assert not broken.exists()
    with pytest.raises(OutputError, match="unfinished run") as caught:
        run(config, student, broken)
    assert "--resume" in caught.value.hint
    with pytest.raises(OutputError, match=r"lr 0\.0003 -> 0\.001"):
        run(config.model_copy(update={"lr": 1e-3}), student, broken, resume=True)
    run(config, student, broken, resume=True)
    # another process may round the last digits differently; in one process nothing differs
    curves = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (broken, whole)
    ]
    for ours, theirs in zip(*curves, strict=True):
        assert ours.pop("phase") == theirs.pop("phase")
        for line in (ours, theirs):
            del line["seconds"], line["tokens_per_second"]
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (load_model(str(path)).state_dict() for path in (broken, whole))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture
def unfinished(student, data, tmp_path, monkeypatch):
    """Source, data and OUT of a run that stopped after two steps."""
    source, text, out = (tmp_path / name for name in ("source", "text.jsonl", "out"))
    shutil.copytree(student, source)
    shutil.copyfile(data, text)
    log = RunFolder.log

    def fails(self, entry):
        if entry["step"] == 3:
            raise RuntimeError("abrupt")
        log(self, entry)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", fails)
        with pytest.raises(RuntimeError, match="abrupt"):
            run(_short(text), str(source), out)
    return source, text, out


def _short(text):
    return cpu(str(text), max_steps=3, stages=["logits"], save_every=1)


def test_a_run_resumes_under_another_spelling_of_its_paths(unfinished, monkeypatch):
    source, text, out = unfinished
    monkeypatch.chdir(source.parent)
    run(_short(text.name), source.name, out, resume=True)
    assert out.is_dir()


def test_another_source_under_the_same_name_is_not_resumed(unfinished, save_student):
    source, text, out = unfinished
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}), "utf-8")
    with pytest.raises(OutputError, match="started differently: source_sha256"):
        run(_short(text), str(source), out, resume=True)


def test_edited_data_is_not_resumed_on(unfinished):
    source, text, out = unfinished
    text.write_text(text.read_text() + '{"text": "the"}\n')
    with pytest.raises(OutputError, match="started differently: data_sha256"):
        run(_short(text), str(source), out, resume=True)


def test_another_teacher_under_the_same_name_is_not_resumed(unfinished, tiny_llama_dir, tmp_path):
    source, text, _ = unfinished
    teacher, config = tmp_path / "teacher", tmp_path / "teacher" / "config.json"
    shutil.copytree(tiny_llama_dir, teacher)
    job = Job.of("distill", _short(text).model_copy(update={"teacher": str(teacher)}), str(source))
    before = identity(job)
    config.write_text(config.read_text().replace("1e-05", "1e-04"))
    assert differences(before, before) == []
    (changed,) = differences(before, identity(job))
    assert changed.startswith("teacher_sha256")


@pytest.mark.parametrize("stage", [distill, sft, dpo])
def test_a_teacher_with_other_tokens_is_refused(student, data, tmp_path, permuted, stage):
    fields = {"device": "cpu", "data": [data], "teacher": permuted}
    config = {
        distill: DistillConfig(**fields),
        sft: SftConfig(**fields, kl_weight=1.0),
        dpo: DpoConfig(**fields),
    }[stage]
    with pytest.raises(ModelError, match="another vocabulary .*: token .* is 'the'|'of'"):
        stage.plan(config, student)
    if stage is not dpo:
        with pytest.raises(ModelError, match="another vocabulary"):
            stage.run(config, student, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_phase_that_made_it_worse_is_a_warning(capsys):
    def told(losses):
        lines = [
            {"phase": "align", "step": step, "loss": float(loss)}
            for step, loss in enumerate(losses, 1)
        ]
        ends = {"first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"]}
        report = PhaseReport("align", steps=len(lines), **ends)
        report_phases([report], SimpleNamespace(read_log=lambda: lines))
        return capsys.readouterr().err

    message = "warning: the last 5 losses of align are 18.0000 on average, the first 5 were 3.0000"
    assert f"{message}: lower --align-lr" in told(range(1, 21))
    assert "warning" not in told(range(20, 0, -1))
    # a few batches say nothing, and neither does the last one alone
    assert "warning" not in told(range(1, 10))
    assert "warning" not in told([*range(20, 0, -1), 30])


def _kill_at_step(config, source, out, step):
    """Start the stage in a child process and kill -9 it once it has logged `step` lines."""
    program = (
        "import sys; from pathlib import Path; from mambactl.options import DistillConfig; "
        "from mambactl.commands.distill import run; import torch; torch.set_num_threads(1); "
        "from mambactl.train import loop; import time; inner = loop._gradients; "
        "loop._gradients = lambda *a: (time.sleep(0.05), inner(*a))[1]; "
        "run(DistillConfig.model_validate_json(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json(), source, str(out)],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    log = out.with_name(out.name + ".partial") / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()


def test_the_dry_run_says_what_would_happen(student, data, tiny_llama_dir, tmp_path):
    planned = plan(cpu(data, align_steps=4), student)
    assert [(p["name"], p["steps"]) for p in planned["phases"]] == [("align", 4), ("logits", 12)]
    assert planned["teacher"] == str(tiny_llama_dir)
    assert planned["mixers"] == ["mamba2", "attention"] * 2
    assert planned["documents"] == 50
    assert planned["parameters"] == sum(p.numel() for p in load_model(student).parameters())
    json.dumps(planned)


def test_phases_share_max_steps():
    def steps(**fields):
        return phase_steps(DistillConfig(max_steps=9, **fields))

    assert steps() == {"align": 2, "logits": 7}
    assert steps(stages=["logits"]) == {"logits": 9}
    assert steps(stages=["align"]) == {"align": 9}
    assert steps(align_steps=0) == {"logits": 9}
    assert steps(align_steps=9) == {"align": 9}
    for wrong in ({"stages": []}, {"stages": ["logits", "align"]}, {"align_steps": 10}):
        with pytest.raises(UsageError):
            steps(**wrong)


def test_what_cannot_be_distilled_is_a_sentence(
    student, data, tiny_llama_dir, tmp_path, make_hybrid
):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no Mamba layer"):
        run(cpu(data, teacher=student), str(tiny_llama_dir), out)
    with pytest.raises(UsageError, match="no Mamba layer"):
        plan(cpu(data, teacher=student), str(tiny_llama_dir))
    with pytest.raises(UsageError, match="no data given"):
        run(DistillConfig(device="cpu"), student, out)
    with pytest.raises(UsageError, match=r"cannot be aligned.*no attention in the layers \[0, 2\]"):
        run(cpu(data, teacher=student), student, out)
    with pytest.raises(UsageError, match="float16"):
        run(cpu(data, dtype="float16"), student, out)
    with pytest.raises(UsageError, match="random number generators"):
        run(cpu(data, capture=True, grad_checkpointing=True), student, out)
    other = _saved_teacher(make_hybrid, tmp_path / "other", tiny_llama_dir, vocab_size=95)
    with pytest.raises(ModelError, match="has 95 tokens, .* has 97"):
        run(cpu(data, teacher=other), student, out)
    assert not list(tmp_path.glob("out*"))
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(OutputError, match="exists"):
        run(cpu(data), student, out)
    with pytest.raises(OutputError, match="other content"):
        run(cpu(data), student, out, force=True)


def test_padding_behind_a_teachers_vocabulary(student, data, tiny_llama_dir, tmp_path):
    """The KL is over the tokens that both have: it is that to the teacher without padding."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    model.resize_token_embeddings(110)
    with torch.no_grad():
        model.lm_head.weight[97:] = 3 * model.lm_head.weight[:13]
    padded = shutil.copytree(tiny_llama_dir, tmp_path / "padded")
    model.save_pretrained(padded)
    configs = [
        cpu(data, stages=["logits"], max_steps=1, teacher=str(teacher))
        for teacher in (tiny_llama_dir, padded)
    ]
    found = [run(config, student, tmp_path / f"{n}.st") for n, config in enumerate(configs)]
    states = [load_model(each.path).state_dict() for each in found]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert plan(configs[1], student)["teacher"] == str(padded)
    probe = {"data": [data], "bootstrap": 0, "device": "cpu", "max_length": 32}
    kept = []
    for teacher in (tiny_llama_dir, padded):
        measured = evaluation.run(EvalConfig(teacher=str(teacher), **probe), student)
        kept += [found["kl"] for found in measured.metrics["fidelity"].values()]
    assert kept[0] == pytest.approx(kept[1], rel=1e-6)


def test_a_larger_teacher_only_gives_logits(student, data, tmp_path, make_hybrid, tiny_llama_dir):
    larger = _saved_teacher(make_hybrid, tmp_path / "larger", tiny_llama_dir, hidden_size=64)
    with pytest.raises(UsageError, match="64 hidden units"):
        run(cpu(data, teacher=larger), student, tmp_path / "out")
    with pytest.raises(UsageError, match="64 hidden units"):
        plan(cpu(data, teacher=larger), student)
    rates = {"lr": 3e-3, "rest_lr": 3e-3}
    config = cpu(data, teacher=larger, stages=["logits"], max_steps=60, **rates)
    result = run(config, student, tmp_path / "out")
    assert result.metrics["logits"]["last_loss"] < result.metrics["logits"]["first_loss"]
    assert load_lineage(result.path)["teacher"] == larger


def _saved_teacher(make_hybrid, out, files, **fields):
    from mambactl.checkpoint.save import save_model

    with open_checkpoint(str(files)) as reader:
        return str(save_model(make_hybrid(["attention"] * 4, **fields), out, reader.files, None))
