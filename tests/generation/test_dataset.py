"""`generate --dataset` on a tiny model: killed and resumed, dealt out, repeated, read by sft."""

import errno
import json
import os
import signal
from collections import Counter

import pytest

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.commands import generate, sft
from mambactl.data.format import encode_rows
from mambactl.data.sources import load_rows
from mambactl.decode.engine import Engine, Generation
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.errors import OutputError, ResourceError, UsageError
from mambactl.generation import dataset
from mambactl.generation.question_set import QuestionSet
from mambactl.options import GenerateConfig, SftConfig

WORDS = ["old", "new", "red", "blue", "small", "large", "king", "queen", "tree", "bird"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Twelve rows: ten prompts of different length, one of them with two turns, two repeats."""
    rows = [{"id": n, "prompt": " ".join(WORDS[: n + 1])} for n in range(9)]
    rows.insert(4, {"id": 9, "turns": ["the old house", "the new house"], "reference": ["a"]})
    rows += [{"id": 10, "prompt": "old"}, {"id": 11, "prompt": "old new"}]
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(prompts, **options):
    fields = {
        "dataset": [prompts], "device": "cpu", "max_new_tokens": 8, "temperature": 1.0, "top_k": 20,
        "batch_size": 4, "keep_unfinished": True,
    }  # fmt: skip
    return GenerateConfig(**fields | options)


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answers_of(row):
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]


@pytest.fixture(scope="module")
def whole(prompts, tiny_llama_dir, tmp_path_factory):
    """Two samples per prompt, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "labels.jsonl"
    result = generate.run(config(prompts, samples_per_prompt=2), str(tiny_llama_dir), out)
    assert result.path == str(out)
    return out, result.metrics


def test_every_prompt_is_answered_once_in_the_order_of_the_set(whole):
    out, metrics = whole
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [n for n in (0, 1, 2, 3, 9, 4, 5, 6, 7, 8) for _ in "ab"]
    assert [row["sample"] for row in rows] == [0, 1] * 10
    assert (metrics["repeated_prompts"], metrics["prompts"], metrics["rows_written"]) == (2, 10, 20)
    talk = rows[8]
    assert [turn["role"] for turn in talk["messages"]] == ["user", "assistant"] * 2
    assert talk["reference"] == ["a"]
    assert metrics["tokens"] == sum(row["tokens"] for row in rows)
    # samples differ, and no answer follows from its place in a batch
    assert all(answers_of(a) != answers_of(b) for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_what_it_was_made_from_lies_beside_it(whole, prompts, tiny_llama_dir):
    out, metrics = whole
    record = json.loads(out.with_name(out.name + ".mambactl.json").read_text())
    assert record["stage"] == "generate"
    assert record["parent"]["path"] == str(tiny_llama_dir)
    assert record["parent"]["sha256"] == record["questions"]["source_sha256"]
    assert record["recipe"]["samples_per_prompt"] == 2
    assert record["metrics"] == metrics
    assert metrics["tokens_per_second"] > 0
    assert sorted(path.name for path in out.parent.iterdir()) == [
        out.name,
        f"{out.name}.mambactl.json",
    ]


def killed(at, prompts, model, out):
    """Run in a child process that kills itself at the n-th call of a RunFolder method."""
    name, calls = at
    child = os.fork()
    if child == 0:
        real, seen = getattr(RunFolder, name), Counter()

        def lethal(self, *given):
            seen[name] += 1
            if seen[name] == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *given)

        setattr(RunFolder, name, lethal)
        try:
            generate.run(config(prompts, samples_per_prompt=2), model, out)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_other_options_are_refused_before_anything_is_loaded(
    prompts, tiny_llama_dir, tmp_path, monkeypatch
):
    out, model = tmp_path / "labels.jsonl", str(tiny_llama_dir)
    killed(("save_state", 2), prompts, model, out)
    monkeypatch.setattr("mambactl.generation.question_set.load_tokenizer", None)
    with pytest.raises(OutputError, match="max_new_tokens 8 -> 9"):
        other = config(prompts, samples_per_prompt=2, max_new_tokens=9)
        generate.run(other, model, out, resume=True)
    with pytest.raises(OutputError, match="holds an unfinished run"):
        generate.run(config(prompts, samples_per_prompt=2), model, out)


@pytest.mark.parametrize(
    # a batch written but not recorded; all batches done but the file not there yet
    ("at", "left"),
    [(("save_state", 1), 5), (("save_state", 3), 3), (("publish", 1), 0)],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    whole, prompts, tiny_llama_dir, tmp_path, monkeypatch, at, left
):
    out, model = tmp_path / "labels.jsonl", str(tiny_llama_dir)
    killed(at, prompts, model, out)
    partial = tmp_path / "labels.jsonl.partial"
    assert not out.exists()
    # a page that the dying process had half written
    with (partial / "decoded.partial").open("ab") as file:
        file.write(b'{"prompt": 3, "sam')
    if left < 5:
        state = "unfinished run" if left else "finished run that is not published"
        with pytest.raises(OutputError, match=state):
            generate.run(config(prompts, samples_per_prompt=2), model, out)
        with pytest.raises(OutputError, match="temperature 1.0 -> 0.5"):
            other = config(prompts, samples_per_prompt=2, temperature=0.5)
            generate.run(other, model, out, resume=True)
    batches = Counter()
    real = FusedEngine.generate

    def counted(self, *given):
        batches["n"] += 1
        return real(self, *given)

    monkeypatch.setattr(FusedEngine, "generate", counted)
    result = generate.run(config(prompts, samples_per_prompt=2), model, out, resume=True)
    assert out.read_bytes() == whole[0].read_bytes()
    # what was written is not decoded again; the longest conversation has a second turn
    second_turn = left == 5
    assert batches["n"] == left + second_turn
    assert result.metrics["tokens"] == whole[1]["tokens"]
    assert not partial.exists()


def test_a_full_disk_loses_one_batch(whole, prompts, tiny_llama_dir, tmp_path, monkeypatch):
    out, model = tmp_path / "labels.jsonl", str(tiny_llama_dir)
    real, calls = dataset.os.fsync, Counter()

    def full(descriptor):
        calls["n"] += 1
        if calls["n"] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(dataset.os, "fsync", full)
        with pytest.raises(ResourceError, match="disk is full") as caught:
            generate.run(config(prompts, samples_per_prompt=2), model, out)
    assert "--resume" in caught.value.hint
    generate.run(config(prompts, samples_per_prompt=2), model, out, resume=True)
    assert out.read_bytes() == whole[0].read_bytes()


def test_shards_are_disjoint_and_together_the_whole(whole, prompts, tiny_llama_dir, tmp_path):
    lines = []
    for part in (1, 2, 3):
        out = tmp_path / f"{part}.jsonl"
        options = config(prompts, samples_per_prompt=2, shard=f"{part}/3", batch_size=3)
        metrics = generate.run(options, str(tiny_llama_dir), out).metrics
        found = out.read_text("utf-8").splitlines()
        assert 0 < len(found) == metrics["rows_written"] < 20
        lines += found
    # the same text, whatever was decoded beside it
    assert sorted(lines) == sorted(whole[0].read_text("utf-8").splitlines())


def test_the_seed_changes_samples_and_greedy_repeats_are_dropped(
    whole, prompts, tiny_llama_dir, tmp_path
):
    model = str(tiny_llama_dir)
    generate.run(config(prompts, samples_per_prompt=2, seed=1), model, tmp_path / "s.jsonl")
    same = [
        answers_of(a) == answers_of(b)
        for a, b in zip(rows_of(whole[0]), rows_of(tmp_path / "s.jsonl"), strict=True)
    ]
    assert not any(same)
    # one candidate token: all samples of a prompt are the same answer
    alike = config(prompts, samples_per_prompt=3, top_k=1)
    metrics = generate.run(alike, model, tmp_path / "g.jsonl").metrics
    assert (metrics["answers"], metrics["repeated_answers"]) == (30, 20)
    assert [row["sample"] for row in rows_of(tmp_path / "g.jsonl")] == [0] * 10


def test_only_finished_answers_are_kept_unless_asked(prompts, tiny_llama_dir, tmp_path):
    model, out = str(tiny_llama_dir), tmp_path / "a.jsonl"
    options = {"samples_per_prompt": 4, "temperature": 2.0, "top_k": 0, "max_new_tokens": 24}
    metrics = generate.run(config(prompts, keep_unfinished=None, **options), model, out).metrics
    rows = rows_of(out)
    assert 0 < len(rows) == metrics["answers"] - dropped(metrics) < 40
    assert {row["finish"] for row in rows} == {"eos"}
    assert all(text.strip() for row in rows for text in answers_of(row))
    generate.run(config(prompts, **options), model, tmp_path / "b.jsonl")
    kept = {json.dumps(row) for row in rows_of(tmp_path / "b.jsonl")}
    assert {json.dumps(row) for row in rows} < kept
    assert any(json.loads(row)["finish"] == "length" for row in kept)


def dropped(metrics):
    # an answer that is both cut and empty does not occur here
    return metrics["unfinished"] + metrics["empty"] + metrics["repeated_answers"]


def test_no_finished_answer_is_no_file_but_nothing_is_lost(prompts, tiny_llama_dir, tmp_path):
    model, out = str(tiny_llama_dir), tmp_path / "a.jsonl"
    cut = {"max_new_tokens": 1, "temperature": 0.0}
    with pytest.raises(UsageError, match="none of 10 answers") as caught:
        generate.run(config(prompts, keep_unfinished=False, **cut), model, out)
    assert "--resume --keep-unfinished" in caught.value.hint
    assert not out.exists()
    generate.run(config(prompts, **cut), model, out, resume=True)
    assert len(rows_of(out)) == 10


def test_sft_trains_on_what_was_written(whole, tiny_llama_dir, tiny_tokenizer, tmp_path):
    out, _ = whole
    documents = load_rows([str(out)])
    assert [row["messages"] for row in documents] == [row["messages"] for row in rows_of(out)]
    examples = encode_rows(documents, tiny_tokenizer, assistant_only=True)
    assert all(example.loss_mask.any() for example in examples)
    tuned = SftConfig(data=[str(out)], max_steps=1, batch_size=2, max_length=64, device="cpu")
    assert sft.run(tuned, str(tiny_llama_dir), tmp_path / "t.st").path == str(tmp_path / "t.st")


@pytest.mark.parametrize("draft", ["ngram", "self"])
def test_greedy_answers_with_a_draft_are_those_without(prompts, tiny_llama_dir, tmp_path, draft):
    model = str(tiny_llama_dir)
    spec = model if draft == "self" else draft
    plain, drafted = tmp_path / "p.jsonl", tmp_path / "d.jsonl"
    generate.run(config(prompts, temperature=0.0), model, plain)
    metrics = generate.run(
        config(prompts, temperature=0.0, draft=spec, k=3), model, drafted
    ).metrics
    assert plain.read_bytes() == drafted.read_bytes()
    assert 0 <= metrics["acceptance"] <= 1


def test_judges_get_every_row_also_repeats_and_cut_answers(prompts, tiny_llama_dir, tmp_path):
    out = tmp_path / "bench.jsonl"
    options = {"format": "mt-bench", "keep_unfinished": None, "generator": "tiny"}
    generate.run(config(prompts, **options), str(tiny_llama_dir), out)
    rows = rows_of(out)
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3, 9, 4, 5, 6, 7, 8, 10, 11]
    assert {row["model_id"] for row in rows} == {"tiny"}
    assert len(rows[4]["choices"][0]["turns"]) == 2


def test_a_category_has_its_own_temperature(tiny_llama_dir, tmp_path):
    file, model = tmp_path / "p.jsonl", str(tiny_llama_dir)
    kinds = ["math", "writing", "coding", "other"]
    rows = [{"id": n, "category": kind, "prompt": WORDS[n]} for n, kind in enumerate(kinds)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for options in ({"category_temperature": True}, {"temperature": 0.7}, {}):
        out = tmp_path / f"{len(found)}.jsonl"
        generate.run(config(str(file), **{"temperature": 0.0} | options), model, out)
        found.append(rows_of(out))
    own, warm, greedy = found
    assert own == [greedy[0], warm[1], greedy[2], warm[3]]
    assert warm != greedy


def test_bad_rows_stop_before_decoding_unless_skipped(
    tiny_llama_dir, tmp_path, monkeypatch, capsys
):
    file, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    rows = [{"prompt": "old"}, {"prompt": ""}, {"prompt": "old " * 1020}, {"messages": [{}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as patch:
        patch.setattr("mambactl.generation.decoding.load_model", None)
        with pytest.raises(UsageError) as caught:
            generate.run(config(str(file)), str(tiny_llama_dir), out)
    assert "3 bad rows (2 malformed, 1 too long)" in str(caught.value)
    told = capsys.readouterr().err
    for words in ("row 2: has an empty prompt", "row 4", "row 3: needs 10", "more than the 1024"):
        assert words in told
    assert "row 1" not in told
    assert list(tmp_path.iterdir()) == [file]
    skipped = config(str(file), skip_bad_rows=True)
    metrics = generate.run(skipped, str(tiny_llama_dir), out).metrics
    assert (metrics["rows"], metrics["bad_rows"], metrics["rows_written"]) == (4, 3, 1)


@pytest.mark.parametrize(
    ("options", "out", "error"),
    [
        ({"prompt": "a"}, "a.jsonl", "exclude each other"),
        ({"temperature": 0.0, "samples_per_prompt": 2}, "a.jsonl", "all the same"),
        ({"category_temperature": True}, "a.jsonl", "exclude each other"),
        ({"draft": "d.st", "ngram": True}, "a.jsonl", "exclude each other"),
        ({"shard": "0/2"}, "a.jsonl", "--shard 0/2"),
        ({"shard": "3/2"}, "a.jsonl", "--shard 3/2"),
        ({}, "a.txt", "does not end in .jsonl"),
        ({"format": "alpaca-eval"}, "a.jsonl", "does not end in .json"),
        ({"format": "alpaca-eval"}, "a.json", "row 5: is more than one instruction"),
    ],
)
def test_what_cannot_be_asked_is_refused(prompts, tiny_llama_dir, tmp_path, options, out, error):
    with pytest.raises(UsageError, match=error):
        generate.run(config(prompts, **options), str(tiny_llama_dir), tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_and_shows_a_prompt(prompts, tiny_llama_dir):
    options = config(prompts, samples_per_prompt=3, draft="ngram")
    plan = generate.plan(options, str(tiny_llama_dir))
    assert (plan["rows"], plan["prompts"], plan["answers"], plan["turns"]) == (12, 10, 30, 33)
    assert plan["batches"] == 8
    # an automatic number of drafts follows the clock, which resuming cannot
    assert plan["k"] == QuestionSet.of(options, str(tiny_llama_dir)).identity["k"] == 4
    assert plan["first_prompt"] == "<|im_start|> user old <|im_end|> <|im_start|> assistant "


def test_options_of_a_data_set_need_one(tiny_llama_dir):
    alone = GenerateConfig(prompt="a", samples_per_prompt=2)
    with pytest.raises(UsageError, match="--samples-per-prompt goes with --dataset"):
        generate.run(alone, str(tiny_llama_dir))


def test_a_cut_answer_does_not_hide_the_same_one_with_an_end(
    prompts, tiny_llama_dir, tmp_path, monkeypatch
):
    def scripted(self, prompts, params, on_tokens, keys):
        # the first sample stops before the end that the second one has
        return Generation([[5]] * len(prompts), ["length", "eos"] * (len(prompts) // 2))

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(Engine, "generate", scripted)
    out = tmp_path / "a.jsonl"
    options = config(prompts, samples_per_prompt=2, keep_unfinished=False)
    metrics = generate.run(options, str(tiny_llama_dir), out).metrics
    assert {row["sample"] for row in rows_of(out)} == {1}
    assert (metrics["unfinished"], metrics["repeated_answers"]) == (10, 0)
