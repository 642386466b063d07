"""`--recall-share`: generated documents among the text, as many as asked, in a resumable run."""

import json

import numpy as np
import pytest
import torch
from conftest import WORDS
from pydantic import ValidationError

from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.commands import distill, teacher_cache
from mambactl.data.pack import collate
from mambactl.data.recall_documents import recall_documents
from mambactl.errors import OutputError, UsageError
from mambactl.options import DistillConfig, SftConfig, TeacherCacheConfig
from mambactl.train.job import Job
from mambactl.train.rows import training_rows


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("r") / "student"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 texts of 500 to 700 words."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    texts = (" ".join(rng.choice(WORDS, size)) for size in rng.integers(500, 700, 200))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config(data, kind=DistillConfig, **fields):
    settings = {"max_steps": 8, "batch_size": 2, "max_length": 64, "recall_share": 0.3}
    return kind(device="cpu", data=[data], **{**settings, **fields})


def made(job):
    """Rows of a job, the documents in them, and which of those are generated."""
    tokenizer = job.tokenizer()
    rows = training_rows(job, tokenizer)
    documents = [
        row.input_ids[row.valid & (row.seq_idx == number)]
        for row in rows
        for number in np.unique(row.seq_idx[row.valid])
    ]
    everything = recall_documents(tokenizer, 100_000, job.config.max_length, job.config.seed)
    known = {document.input_ids.tobytes() for document in everything}
    return rows, documents, [ids.tobytes() in known for ids in documents]


@pytest.mark.parametrize(
    ("share", "fields"),
    [
        (0.03, {"max_steps": 600, "max_length": 96}),
        (0.5, {"max_steps": 300}),
        (0.2, {"max_steps": 9999}),
        (0.2, {"packing": False}),
    ],
    ids=["of much text", "as much as text", "of all text there is", "a document a row"],
)
def test_the_share_is_what_was_asked(student, data, capsys, share, fields):
    job = Job.of("distill", config(data, recall_share=share, **fields), student)
    rows, documents, generated = made(job)
    tokens = np.array([len(ids) for ids in documents])
    found = tokens[generated].sum() / tokens.sum()
    # a generated document has 64 tokens and more, so that the sum is off by up to 32; the last one
    # is cut to fit, and is not among those of a longer list
    slack = (32 + job.config.max_length) / tokens.sum()
    assert found == pytest.approx(share, rel=0.01, abs=slack)
    line = capsys.readouterr().err
    said = float(line.split(" for recall (")[1].split("%")[0]) / 100
    assert said == pytest.approx(share, rel=0.01, abs=32 / tokens.sum() + 5e-5)
    assert sum(int(row.valid.sum()) for row in rows) == tokens.sum()


def test_no_share_gives_the_rows_of_a_stage_without_the_option(student, data, capsys):
    plain = SftConfig(device="cpu", data=[data], max_steps=8, batch_size=2, max_length=64)
    jobs = Job.of("distill", config(data, recall_share=0.0), student), Job.of("sft", plain, student)
    ours, theirs = (training_rows(job, job.tokenizer()) for job in jobs)
    assert [row.input_ids.tobytes() for row in ours] == [row.input_ids.tobytes() for row in theirs]
    assert "recall" not in capsys.readouterr().err


def test_the_same_seed_gives_the_same_rows(student, data):
    def bytes_of(**fields):
        job = Job.of("distill", config(data, **fields), student)
        return [row.input_ids.tobytes() for row in training_rows(job, job.tokenizer())]

    assert bytes_of() == bytes_of()
    assert bytes_of() != bytes_of(seed=1)
    assert bytes_of() != bytes_of(recall_share=0.2)


def test_a_generated_document_is_alone_in_its_row(student, data, make_hybrid):
    job = Job.of("distill", config(data, max_length=160, max_steps=20), student)
    rows, *_ = made(job)
    documents = recall_documents(job.tokenizer(), 2000, 160, job.config.seed)
    known = {document.input_ids.tobytes() for document in documents}
    model, compared = make_hybrid(["mamba2", "attention"]), 0
    for row in rows:
        for number in range(1, int(row.seq_idx[row.valid].max()) + 1):
            inside = np.flatnonzero(row.seq_idx == number)
            ids = row.input_ids[inside]
            if ids.tobytes() not in known:
                continue
            assert row.position_ids[inside].tolist() == list(range(len(ids)))
            assert row.loss_mask[inside].tolist() == [False] + [True] * (len(ids) - 1)
            batch = collate([row])
            with torch.no_grad():
                packed = model(
                    batch.input_ids,
                    seq_idx=batch.seq_idx,
                    position_ids=batch.position_ids,
                    use_cache=False,
                ).logits[0, inside]
                alone = model(torch.from_numpy(ids)[None].long(), use_cache=False).logits[0]
            torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-3)
            compared += 1
    assert compared > 2


def test_a_broken_run_resumes_to_the_same_weights(student, data, tmp_path, monkeypatch):
    asked = config(data, save_every=2, warmup=1)
    distill.run(asked, student, tmp_path / "whole")
    log = RunFolder.log

    def fails(self, entry):
        if (entry["phase"], entry["step"]) == ("logits", 4):
            raise RuntimeError("abrupt")
        log(self, entry)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", fails)
        with pytest.raises(RuntimeError, match="abrupt"):
            distill.run(asked, student, broken)
    with pytest.raises(OutputError, match=r"recall_share 0\.3 -> 0\.2"):
        distill.run(
            config(data, save_every=2, warmup=1, recall_share=0.2), student, broken, resume=True
        )
    distill.run(asked, student, broken, resume=True)
    ours, theirs = (load_model(str(tmp_path / name)).state_dict() for name in ("broken", "whole"))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_teacher_cache_holds_the_same_rows(student, data, tiny_llama_dir, tmp_path):
    cache = tmp_path / "cache"
    drawn = config(data, TeacherCacheConfig)
    teacher_cache.run(drawn, str(tiny_llama_dir), cache)
    asked = config(data, stages=["logits"], teacher_cache=str(cache))
    result = distill.run(asked, student, tmp_path / "out")
    assert result.metrics["logits"]["steps"] == 8
    other = config(data, stages=["logits"], teacher_cache=str(cache), recall_share=0.4)
    with pytest.raises(UsageError, match="rows are not in") as caught:
        distill.run(other, student, tmp_path / "other")
    assert "--recall-share 0.4" in caught.value.hint


def test_the_dry_run_counts_them(student, data, tiny_llama_dir):
    planned = distill.plan(config(data), student)
    assert planned["tokens_at_most"] == 8 * 2 * 64
    assert planned["recall_tokens_at_most"] == round(0.3 * 8 * 2 * 64)
    assert distill.plan(config(data, recall_share=0.0), student)["recall_tokens_at_most"] == 0
    planned = teacher_cache.plan(config(data, TeacherCacheConfig), str(tiny_llama_dir))
    assert planned["recall_tokens_at_most"] == round(0.3 * 8 * 2 * 64)


def test_what_cannot_be_asked_is_refused(student, data, tmp_path):
    for share in (-0.1, 0.51):
        with pytest.raises(ValidationError, match="recall_share"):
            config(data, recall_share=share)
    short = config(data, max_length=48)
    for call in (
        lambda: distill.plan(short, student),
        lambda: distill.run(short, student, tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="64 tokens and more, rows have 48"):
            call()
