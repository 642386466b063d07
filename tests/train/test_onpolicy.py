"""On-policy distillation: rows written with the weights of the step, scored by the teacher."""

import json
import math

import numpy as np
import pytest
import torch
from train.abrupt_stop import abrupt_stop

from mambactl.checkpoint.load import load_lineage, load_model
from mambactl.commands.distill import plan, run
from mambactl.decode.backend import make_engine
from mambactl.decode.refresh import DecodingCopy, tensors_of
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import UsageError
from mambactl.options import DistillConfig
from mambactl.options.phase_steps import phase_steps
from mambactl.train.drawn_prompts import DrawnPrompts, answers_at_most, drawn_prompts
from mambactl.train.job import Job
from mambactl.train.student_rows import StudentRows

ROW, NEW = 32, 12
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18]]


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("p") / "student"))


def settings(data, **fields):
    given = {
        "device": "cpu", "data": [str(data)], "max_steps": 8, "stages": ["onpolicy"],
        "batch_size": 2, "max_length": ROW, "onpolicy_tokens": NEW, "warmup": 1, "save_every": 2,
    }  # fmt: skip
    return DistillConfig(**{**given, **fields})


def ledger(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def same_weights(one, two) -> bool:
    ours, theirs = (load_model(str(path)).state_dict() for path in (one, two))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def feed(model, config, rows=(), trim=True, prompts=PROMPTS):
    """Rows of a student, and the prompts that they go on from."""
    drawn = DrawnPrompts(prompts, np.full(len(prompts), 1 / len(prompts)), ends=(2,))
    trained = {name for name, _ in model.named_parameters()}
    return StudentRows(config, torch.float32, model, trained, drawn, rows, trim)


def documents(batch):
    """(ids, mask) of every document of a batch."""
    for row in range(len(batch.input_ids)):
        ids, valid = batch.input_ids[row], batch.valid[row]
        numbers = torch.zeros_like(ids) if batch.seq_idx is None else batch.seq_idx[row]
        for number in numbers[valid].unique():
            own = (numbers == number) & valid
            yield ids[own].tolist(), batch.loss_mask[row][own].tolist()


def test_the_stage_is_trained_recorded_and_drawn(student, random_texts, tmp_path) -> None:
    out = tmp_path / "out"
    config = settings(random_texts, stages=["logits", "onpolicy"], onpolicy_steps=5)
    result = run(config, student, out)
    assert list(result.metrics) == ["logits", "onpolicy"]
    assert [found["steps"] for found in result.metrics.values()] == [3, 5]
    lines = [line for line in ledger(out / "metrics.jsonl") if line["phase"] == "onpolicy"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["answers"] > 0 and 0 <= line["ended"] <= 1 and math.isfinite(line["loss"])
        assert line["answers"] <= line["written_tokens"] <= NEW * line["answers"]
    # nothing but what was written is learned
    found = load_lineage(str(out))["metrics"]["onpolicy"]
    assert found["written_tokens"] == sum(line["written_tokens"] for line in lines)
    assert found["tokens"] == found["written_tokens"]
    assert found["answers"] == sum(line["answers"] for line in lines)


def test_the_loss_on_its_own_text_falls(student, random_texts, tmp_path) -> None:
    config = settings(random_texts, max_steps=40, lr=5e-3, rest_lr=2e-3, save_every=100)
    out = tmp_path / "out"
    run(config, student, out)
    losses = [line["loss"] for line in ledger(out / "metrics.jsonl")]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])


def test_only_written_tokens_are_learned(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "attention"], seed=3)
    config = settings("none", batch_size=3, onpolicy_temperature=0.0)
    engine = make_engine(model, None, 0)
    params = SamplingParams(max_new_tokens=NEW, eos_token_ids=(2,))
    with feed(model, config).open(0) as batches:
        batch = next(batches)
    seen = list(documents(batch))
    assert len(seen) >= 3
    for ids, mask in seen:
        (prompt,) = [each for each in PROMPTS if ids[: len(each)] == each]
        assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert ids[len(prompt) :] == engine.generate([prompt], params).tokens[0]
    assert not batch.loss_mask[~batch.valid].any()


def test_what_is_written_follows_the_weights_and_the_number_of_the_batch(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "mamba1"], seed=3)
    rows = feed(model, settings("none", grad_accum=2))

    def take(done, count):
        with rows.open(done) as batches:
            return [next(batches) for _ in range(count)]

    def same(one, two):
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None)

    first = take(0, 4)
    assert all(same(one, two) for one, two in zip(first[2:], take(2, 2), strict=True))
    assert not same(first[0], first[1])
    with rows.open(0) as batches, torch.no_grad():
        before = next(batches)
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        # the same step goes on with its own weights, the next one has the new ones
        assert same(before, first[0]) and same(next(batches), first[1])
        assert not same(next(batches), first[2])


def test_a_prompt_that_comes_again_is_answered_anew(make_hybrid) -> None:
    rows = feed(make_hybrid(["mamba2"], seed=3), settings("none"), prompts=[[3, 4, 5]])
    with rows.open(0) as batches:
        answers = [tuple(ids) for _ in range(3) for ids, _ in documents(next(batches))]
    assert len(answers) == 12 and len(set(answers)) > 9


MIXED = ["mamba2", "attention", "mamba1", "mamba2_window", "mamba2_mixed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refresh_keeps_every_address_and_takes_every_weight(make_hybrid, dtype) -> None:
    model = make_hybrid(MIXED, seed=4, tie_word_embeddings=True)
    copy = DecodingCopy(model, {name for name, _ in model.named_parameters()}, dtype)
    copy.reserve(4, 40)
    greedy = SamplingParams(max_new_tokens=24)
    before = copy.generate(PROMPTS[:4], greedy, range(4)).tokens
    packed = getattr(copy._engine, "packed", None)
    assert (packed is not None) == (dtype == torch.float32)
    addresses = [tensor.data_ptr() for tensor in tensors_of(packed)]
    other = make_hybrid(MIXED, seed=5, tie_word_embeddings=True)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)
    copy.refresh()
    assert [tensor.data_ptr() for tensor in tensors_of(packed)] == addresses
    after = copy.generate(PROMPTS[:4], greedy, range(4)).tokens
    fresh = DecodingCopy(other, (), dtype)
    fresh.reserve(4, 40)
    assert after == fresh.generate(PROMPTS[:4], greedy, range(4)).tokens != before
    # the last packed model is what a new one would be, bit by bit
    if packed is not None:
        for ours, theirs in zip(tensors_of(packed), tensors_of(fresh._engine.packed), strict=True):
            assert torch.equal(ours, theirs)


def test_after_steps_the_copy_writes_what_the_saved_model_does(
    student, random_texts, tmp_path, monkeypatch
) -> None:
    copies = []

    def watched(self, *args):
        made(self, *args)
        copies.append(self)

    made = DecodingCopy.__init__
    monkeypatch.setattr(DecodingCopy, "__init__", watched)
    out = tmp_path / "out"
    run(settings(random_texts, max_steps=3, lr=2e-2), student, out)
    (copy,) = copies
    greedy = SamplingParams(max_new_tokens=24)
    written = copy.generate(PROMPTS, greedy, range(5)).tokens
    # of the last step, which came after the last text
    copy.refresh()
    expected = make_engine(load_model(str(out)), None, 0).generate(PROMPTS, greedy).tokens
    assert copy.generate(PROMPTS, greedy, range(5)).tokens == expected != written


def test_frozen_weights_are_shared_and_compiled_blocks_are_not_run(make_hybrid) -> None:
    model = make_hybrid(["mamba2", "attention"], seed=3).requires_grad_(False)

    def stop(*_):
        raise AssertionError("a block of the student in training ran")

    for block in model.model.layers:
        block.run = stop
    trained = {name for name, _ in model.named_parameters() if ".mamba." in name}
    copy = DecodingCopy(model, trained, torch.float32)
    assert len(copy.generate([[3, 4]], SamplingParams(max_new_tokens=3), [0]).tokens[0]) == 3
    ours, theirs = (dict(each.named_parameters()) for each in (copy.model, model))
    shared = {name for name in theirs if ours[name].data_ptr() == theirs[name].data_ptr()}
    assert "lm_head.weight" in shared and "model.layers.0.mlp.down_proj.weight" in shared
    assert not shared & trained


@pytest.mark.parametrize(("share", "packing"), [(1.0, True), (0.5, True), (0.5, False)])
def test_rows_of_the_data_stand_behind_those_of_the_student(
    make_hybrid, rows, share, packing
) -> None:
    model = make_hybrid(["mamba2"], seed=3)
    config = settings("none", batch_size=4, onpolicy_share=share, packing=packing)
    with feed(model, config, rows, trim=False).open(0) as batches:
        for batch, _ in zip(batches, range(3), strict=False):
            assert batch.input_ids.shape == (4, ROW)
            written = round(4 * share)
            known = {row.input_ids.tobytes() for row in rows}
            found = [ids.int().numpy().tobytes() in known for ids in batch.input_ids]
            assert found == [False] * written + [True] * (4 - written)
            if not packing:
                assert batch.seq_idx is None or share < 1


def test_answers_fill_rows_and_no_document_is_cut(make_hybrid) -> None:
    model = make_hybrid(["mamba2"], seed=3)
    config = settings("none", batch_size=3, max_length=48)
    rows = feed(model, config)
    # of the shortest prompt, 13 tokens with its answer
    assert rows.most == answers_at_most(config, 1) == 9
    with rows.open(0) as batches:
        for batch, _ in zip(batches, range(5), strict=False):
            assert len(batch.input_ids) <= 3 and batch.input_ids.shape[1] <= 64
            for ids, mask in documents(batch):
                # it ends by itself or is as long as it may be
                assert ids[-1] == 2 or sum(mask) == NEW


# before the first state, behind one, and in the last step
@pytest.mark.parametrize(
    "line", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_stop_at_any_line_ends_at_the_same_weights(student, random_texts, tmp_path, line) -> None:
    config = settings(random_texts, grad_accum=2, onpolicy_share=0.5)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(config, student, whole)
    with abrupt_stop(lambda number, _: number == line):
        run(config, student, out)
    run(config, student, out, resume=True)
    assert ledger(out / "metrics.jsonl") == ledger(whole / "metrics.jsonl")
    assert same_weights(out, whole)
    reports = [load_lineage(str(path))["metrics"]["onpolicy"] for path in (out, whole)]
    for name in ("written_tokens", "answers", "ended", "tokens"):
        assert reports[0][name] == reports[1][name]


def test_prompts_are_those_of_generate(student, tmp_path) -> None:
    """A chat without its last answer, the prompt of a pair, the beginning of a text."""
    from mambactl.data.conversations import conversation
    from mambactl.decode.prompts import encode
    from mambactl.generation.question_set import as_prompt

    says = [("user", "the house"), ("assistant", "a door"), ("user", "red"), ("assistant", "blue")]
    turns = [{"role": role, "content": text} for role, text in says]
    data = [
        {"messages": turns},
        {"messages": turns[:3]},
        {"prompt": "the river and", "completion": " the light"},
        {"text": "one two three four five six"},
        # no prompt: the assistant begins, or more than a row leaves
        {"messages": turns[1:2]},
        {"prompt": "the " * 25, "completion": "end"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    config = settings(path, max_length=36)
    job = Job.of("distill", config, student)
    tokenizer = job.tokenizer()
    planned = [type("Plan", (), {"kind": "onpolicy", "steps": 8})]
    found = drawn_prompts(job, config, tokenizer, planned)
    chat = encode(as_prompt(conversation("row", {"messages": turns[:3]})), tokenizer)
    pair = tokenizer("the river and")["input_ids"]
    text = tokenizer("one two three four five six")["input_ids"]
    expected = [chat, chat, pair, text[: len(text) // 2]]
    assert sorted(found.prompts) == sorted(expected)
    assert found.ends == (2,) and found.chances.tolist() == [0.25] * 4
    assert found.draw(0, 3, 4) == found.draw(0, 3, 4)
    assert any(found.draw(0, 3, 4) != found.draw(0, number, 4) for number in range(4, 12))
    assert sorted(found.draw(0, 3, 4)) == sorted(expected) and len(found.draw(0, 3, 9)) == 9


def test_a_mixture_keeps_its_weights(student, random_texts, tmp_path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    chats.write_text(2 * (json.dumps({"messages": turns}) + "\n"))
    data = [f"{random_texts}=1", f"{chats}=3"]
    config = settings("none", max_steps=50).model_copy(update={"data": data})
    job = Job.of("distill", config, student)
    planned = [type("Plan", (), {"kind": "onpolicy", "steps": 50})]
    found = drawn_prompts(job, config, job.tokenizer(), planned)
    assert found.chances[-2:].sum() == pytest.approx(0.75)
    assert found.chances.sum() == pytest.approx(1) and len(set(found.chances[:-2])) == 1


def test_steps_of_the_stage_come_off_the_stage_before() -> None:
    def steps(*stages, **fields):
        return phase_steps(DistillConfig(max_steps=20, stages=list(stages), **fields))

    assert steps("onpolicy") == {"onpolicy": 20}
    assert steps("logits", "onpolicy") == {"logits": 10, "onpolicy": 10}
    assert steps("logits", "onpolicy", onpolicy_steps=5) == {"logits": 15, "onpolicy": 5}
    assert steps("align", "logits", "onpolicy") == {"align": 4, "logits": 8, "onpolicy": 8}
    assert steps("align", "logits", "onpolicy", onpolicy_steps=6) == {
        "align": 4, "logits": 10, "onpolicy": 6,
    }  # fmt: skip
    assert steps("align", "onpolicy", onpolicy_steps=6) == {"align": 14, "onpolicy": 6}
    assert steps("onpolicy", onpolicy_steps=20) == {"onpolicy": 20}
    assert steps("logits", "onpolicy", onpolicy_steps=0) == {"logits": 20}
    with pytest.raises(UsageError, match="--onpolicy-steps 21 is more than --max-steps 20"):
        steps("logits", "onpolicy", onpolicy_steps=21)
    with pytest.raises(UsageError, match="the only stage"):
        steps("onpolicy", onpolicy_steps=6)
    with pytest.raises(UsageError, match="not asked for"):
        steps("align", "logits", onpolicy_steps=6)
    with pytest.raises(UsageError, match="leave no step of --max-steps 20 to logits"):
        steps("align", "logits", "onpolicy", onpolicy_steps=20)
    with pytest.raises(UsageError, match="not in their order"):
        steps("onpolicy", "logits")


def test_prompts_need_no_answers_where_the_student_writes_all(student, tmp_path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(6 * (json.dumps({"prompt": "the river and"}) + "\n"))
    assert plan(settings(data, max_steps=2), student)["documents"] == 6
    found = run(settings(data, max_steps=2), student, tmp_path / "out").metrics
    assert found["onpolicy"]["answers"] > 0
    for others in ({"onpolicy_share": 0.5}, {"stages": ["logits", "onpolicy"]}, {"epochs": 1.0}):
        given = settings(data, **others)
        assert given.needs_answers
    data.write_text(json.dumps({"x": 1}) + "\n")
    with pytest.raises(UsageError, match="row 1: has the columns `x`"):
        run(settings(data), student, tmp_path / "other")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"kl_weight": 2.0}, "--kl-weight is of no use to --stages onpolicy"),
        ({"teacher_cache": "c"}, "--teacher-cache is of no use"),
        ({"stages": ["align"], "divergence": "jsd"}, "--divergence is of no use to --stages align"),
        ({"stages": ["logits", "logits"]}, "--stages names logits twice"),
    ],
)
def test_options_of_other_stages_are_refused(given, problem) -> None:
    with pytest.raises(UsageError, match=problem):
        settings("none", **given).require_coherent()
    settings("none", stages=["stepwise", "onpolicy"], kl_weight=2.0).require_coherent()


def test_what_cannot_be_done_is_a_sentence(student, random_texts, tmp_path) -> None:
    with pytest.raises(UsageError, match="leave no room for a prompt in rows of 32"):
        run(settings(random_texts, onpolicy_tokens=32), student, tmp_path / "out")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "the " * 40, "completion": "end"}) + "\n")
    with pytest.raises(UsageError, match="holds no prompt to write on from"):
        run(settings(pairs), student, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_run_from_before_the_stage_resumes() -> None:
    """The record of such a run names none of the options; they take values that change nothing."""
    config = DistillConfig(max_steps=4)
    options = {name for name in DistillConfig.model_fields if name.startswith("onpolicy")}
    assert len(options) == 5 and options <= config.since_later
    assert config.as_begun({}) == config.model_copy(update=dict(DistillConfig.later))
    assert not options & settings("none", onpolicy_share=0.5).since_later - {
        "onpolicy_steps", "onpolicy_temperature", "onpolicy_divergence",
    }  # fmt: skip


def test_the_dry_run_says_what_is_written(student, random_texts) -> None:
    config = settings(random_texts, stages=["logits", "onpolicy"], batch_size=4)
    logits, own = plan(config.model_copy(update={"onpolicy_share": 0.25}), student)["phases"]
    assert (own["rows_written"], own["rows_of_data"], own["new_tokens_at_most"]) == (1, 3, NEW)
    assert own["divergence"] == "reverse" and own["trained"] == logits["trained"]
    memory = own["predicted"]["memory"]
    assert memory["copy"] == 4 * sum(p.numel() for p in load_model(student).parameters())
    assert memory["cache"] > 0 and "copy" not in logits["predicted"]["memory"]
    assert own["predicted"]["seconds"] > 0
    json.dumps(own)


def test_memory_that_runs_out_while_writing_is_named(student, random_texts, tmp_path, monkeypatch):
    from mambactl.errors import ResourceError

    def full(*_, **__):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(DecodingCopy, "generate", full)
    with pytest.raises(ResourceError, match="while the student writes") as raised:
        run(settings(random_texts), student, tmp_path / "out")
    assert "--onpolicy-tokens" in raised.value.hint


def test_a_cache_takes_the_teachers_place_only_before(
    student, random_texts, tiny_llama_dir, tmp_path
) -> None:
    from mambactl.commands import teacher_cache
    from mambactl.options import TeacherCacheConfig

    sizes = {"max_steps": 8, "batch_size": 2, "max_length": ROW}
    cached = TeacherCacheConfig(device="cpu", data=[str(random_texts)], **sizes)
    teacher_cache.run(cached, str(tiny_llama_dir), tmp_path / "cache")
    config = settings(
        random_texts, stages=["logits", "onpolicy"], teacher_cache=str(tmp_path / "cache")
    )
    found = run(config, student, tmp_path / "out").metrics
    assert found["logits"]["steps"] == found["onpolicy"]["steps"] == 4
    assert math.isfinite(found["onpolicy"]["last_loss"])
