"""The `teacher-cache` stage, and the objective that `distill` makes of what it wrote."""

import os
import signal
import time
from functools import partial

import pytest
import torch
from fixtures.shared_runs import together

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.commands import teacher_cache
from mambactl.commands.teacher_cache import cached_objective, plan, run
from mambactl.data.pack import batches
from mambactl.errors import ModelError, OutputError, UsageError
from mambactl.options import DistillConfig, TeacherCacheConfig
from mambactl.train.job import Job
from mambactl.train.rows import training_rows

SIZES = {"max_steps": 6, "batch_size": 2, "max_length": 32}


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("c") / "student"))


@pytest.fixture(scope="module")
def data(random_texts):
    return str(random_texts)


def config(data, **fields):
    return TeacherCacheConfig(device="cpu", data=[data], **{**SIZES, **fields})


@pytest.fixture(scope="module")
def cache(data, tiny_llama_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    run(config(data), str(tiny_llama_dir), out)
    return out


def distilling(data, cache, student, **fields):
    """The state of `distill` when it asks for the objective."""
    given = {**SIZES, "teacher_cache": str(cache), **fields}
    asked = DistillConfig(device="cpu", data=[data], stages=["logits"], **given)
    job = Job.of("distill", asked, student)
    model = job.student()
    return job, asked, model, training_rows(job, job.tokenizer())


def test_distilling_finds_every_row(data, cache, student, capsys):
    job, asked, model, rows = distilling(data, cache, student, kl_weight=0.5, ce_weight=0.5)
    objective = cached_objective(job, asked, model, rows)
    assert "no teacher in memory" in capsys.readouterr().err
    losses = []
    for _, batch in zip(range(len(rows)), batches(rows, 2, seed=3), strict=False):
        tokens = objective.count(batch)
        losses.append(objective.backward(objective.inputs(batch, job.device), tokens))
    assert torch.stack(losses).isfinite().all()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_what_it_was_made_from_is_recorded(data, cache, tiny_llama_dir):
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]
    lineage = load_lineage(str(cache))
    kept = lineage["cache"]
    assert lineage["stage"] == "teacher-cache"
    assert (kept["teacher"], kept["data"]) == (str(tiny_llama_dir), [data])
    assert (kept["samples"], kept["max_length"], kept["vocab_size"]) == (12, 32, 97)
    assert kept["rows"] == lineage["metrics"]["rows"] > 5
    assert len(kept["teacher_sha256"]) == len(kept["tokenizer_sha256"]) == 64
    assert kept["data_sha256"] == [kept["data_sha256"][0]] and len(kept["data_sha256"][0]) == 64


def test_a_broken_run_resumes_to_the_same_bytes(data, cache, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_TOKENS", 4 * 32)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(config(data), str(tiny_llama_dir), whole)
    shards = sorted(path.name for path in whole.glob("samples-*"))
    assert len(shards) > 2
    written = []

    def fails(path, *rest):
        if len(written) == 2:
            raise RuntimeError("abrupt")
        written.append(path)
        teacher_cache_write(path, *rest)

    teacher_cache_write = teacher_cache.write_shard
    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache, "write_shard", fails)
        with pytest.raises(RuntimeError, match="abrupt"):
            run(config(data), str(tiny_llama_dir), broken)
    assert not broken.exists()
    with pytest.raises(OutputError, match="unfinished run"):
        run(config(data), str(tiny_llama_dir), broken)
    with pytest.raises(OutputError, match="samples 12 -> 3"):
        run(config(data, samples=3), str(tiny_llama_dir), broken, resume=True)
    run(config(data), str(tiny_llama_dir), broken, resume=True)
    assert sorted(path.name for path in broken.glob("samples-*")) == shards
    for name in shards:
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")
def test_two_processes_write_the_files_of_one(data, tiny_llama_dir, tmp_path, monkeypatch):
    """Also where one of them finds a file that a killed run had not recorded."""
    monkeypatch.setattr(teacher_cache, "SHARD_TOKENS", 4 * 32)
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run(config(data), str(tiny_llama_dir), whole)
    shards = sorted(path.name for path in whole.glob("samples-*"))
    write = teacher_cache.write_shard

    def watched(path, *rest):
        write(path, *rest)
        rank = os.environ["RANK"]
        (tmp_path / f"{rank}-{path.name}").touch()
        if rank == "1" and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("1-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        if killed:
            raise RuntimeError("as the launcher would end it")

    def work(resume):
        try:
            run(config(data), str(tiny_llama_dir), shared, resume=resume)
        except RuntimeError as error:
            assert "launcher" in str(error)

    killed = True
    monkeypatch.setattr(teacher_cache, "write_shard", watched)
    assert together(partial(work, False), tmp_path / "log", shard=False) == [0, -signal.SIGKILL]
    assert not shared.exists()
    killed = False
    before = len(list(tmp_path.glob("?-samples*")))
    assert before == 2
    assert together(partial(work, True), tmp_path / "log", shard=False) == [0, 0]
    assert len(list(tmp_path.glob("?-samples*"))) == len(shards)
    assert sorted(path.name for path in shared.glob("samples-*")) == shards
    for name in shards:
        assert (shared / name).read_bytes() == (whole / name).read_bytes()
    kept = [load_lineage(str(each))["metrics"] for each in (whole, shared)]
    assert [kept[0][key] for key in ("rows", "tokens", "bytes")] == [
        kept[1][key] for key in ("rows", "tokens", "bytes")
    ]


def test_another_run_is_told_which_command_makes_its_cache(data, cache, student):
    given = distilling(data, cache, student, max_length=48, seed=2)
    with pytest.raises(UsageError, match=r"\d+ of \d+ rows are not in") as caught:
        cached_objective(*given)
    command = caught.value.hint
    assert command.startswith("mambactl teacher-cache ")
    for words in (f"--data {data}", "--max-length 48", "--seed 2", f"-o {cache}", "--max-steps 6"):
        assert words in command


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": 2.0}, "drawn at temperature 1, not at 2"),
        ({"divergence": "reverse"}, "estimates the forward KL, not reverse"),
    ],
)
def test_other_distributions_are_refused(data, cache, student, fields, sentence):
    with pytest.raises(UsageError, match=sentence):
        cached_objective(*distilling(data, cache, student, **fields))


def test_another_teacher_or_vocabulary_is_refused(data, cache, student, permuted, tmp_path):
    job, asked, model, rows = distilling(data, cache, student, teacher=student)
    with pytest.raises(UsageError, match="was drawn from .*, not from"):
        cached_objective(job, asked, model, rows)
    other = tmp_path / "other"
    run(config(data), permuted, other)
    with pytest.raises(UsageError, match="made with another vocabulary"):
        cached_objective(*distilling(data, other, student))
    with pytest.raises(ModelError, match="is no teacher cache") as caught:
        cached_objective(*distilling(data, student, student))
    assert "mambactl teacher-cache TEACHER" in caught.value.hint


def test_what_exists_is_kept(data, cache, tiny_llama_dir, tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        run(config(data), str(tiny_llama_dir), cache)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match="other content"):
        run(config(data), str(tiny_llama_dir), tmp_path, force=True)
    replaced = tmp_path / "out"
    for samples in (2, 3):
        run(config(data, samples=samples), str(tiny_llama_dir), replaced, force=True)
        assert load_lineage(str(replaced))["cache"]["samples"] == samples


def test_a_hybrid_may_be_the_teacher_and_the_plan_writes_nothing(data, student, tmp_path):
    planned = plan(config(data, power=0.8), student)
    assert planned["tokens_at_most"] == 6 * 2 * 32 and planned["documents"] == 50
    assert planned["parameters"] == sum(p.numel() for p in load_model(student).parameters())
    result = run(config(data, power=0.8), student, tmp_path / "out")
    assert result.path == str(tmp_path / "out") and result.metrics["tokens"] > 200
