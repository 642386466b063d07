"""`draft`: heads and small models made of a target, which is refused once it changes."""

import json
import threading

import pytest
import torch
from train.abrupt_stop import abrupt_stop

import mambactl
from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer
from mambactl.commands.draft import plan, run
from mambactl.decode.backend import make_engine
from mambactl.decode.engine import Engine
from mambactl.decode.head_drafter import HeadDrafter
from mambactl.decode.head_files import load_head, weights_digest
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import ModelError, UsageError
from mambactl.options import DraftConfig

# what is no option of a draft model stays as it is by default
WHOLE = DraftConfig.model_fields["vocabulary"].default


@pytest.fixture(scope="module")
def target(tmp_path_factory, save_student):
    return str(save_student(tmp_path_factory.mktemp("draft") / "target"))


def settings(data, **fields):
    given = {
        "device": "cpu", "data": [str(data)], "max_steps": 4, "batch_size": 2, "max_length": 48,
        "answer_tokens": 12, "warmup": 1, "save_every": 2, "vocabulary": 50, "unroll": 3,
        "eval_tokens": 64,
    }  # fmt: skip
    return DraftConfig(**{**given, **fields})


def test_a_head_learns_from_what_its_target_writes(target, random_texts, tmp_path) -> None:
    out = tmp_path / "d.st"
    found = run(settings(random_texts, max_steps=6), target, out).metrics
    assert found["head"]["steps"] == 6 and found["head"]["written_tokens"] > 0
    model = load_model(target)
    assert found["vocabulary"] == 50 and found["target_sha256"] == weights_digest(model)
    head = load_head(str(out), model, target)
    assert len(head.ids) == 50 and head.ids.tolist() == sorted(set(head.ids.tolist()))
    rows = model.lm_head.weight[head.ids]
    assert torch.equal(head.body.lm_head.weight, rows)
    assert load_lineage(str(out))["stage"] == "draft"


def test_drafts_are_measured_on_text_that_was_held_out(target, random_texts, tmp_path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1}"}) + "\n" for n in range(9)))
    measured = {"eval_data": [str(asked)], "eval_every": 1, "max_steps": 2}
    for kind, text in (("head", "target"), ("model", "target"), ("head", "data")):
        # a twentieth is one row of so many
        held = measured if text == "target" else {"max_steps": 1, "batch_size": 24}
        sizes = {"layers": 1, "vocabulary": WHOLE} if kind == "model" else {}
        config = settings(random_texts, kind=kind, text=text, **sizes, **held)
        out = tmp_path / f"{kind}-{text}"
        found = run(config, target, out).metrics
        drafts = found["held_out"]["drafts"]
        assert [row["k"] for row in drafts] == [1, 2, 3]
        for name in ("tokens_per_step", "sampled_tokens_per_step"):
            assert 1 <= drafts[0][name] <= drafts[2][name] <= 4
        assert found["held_out"]["eval_tokens"] >= 64
        assert 0 < found["held_out"]["covered"] <= 1
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        measured_at = [line["step"] for line in lines if "kl" in line]
        assert measured_at == ([0, 1, 2] if text == "target" else [0, 1])
        assert found[kind]["kl"] == lines[-1]["kl"] > 0


def test_prompts_need_no_answers(target, tmp_path) -> None:
    rows = [{"prompt": "w1 w2"}, {"turns": ["w3", "w4"]}, {"instruction": "w5", "input": "w6"}]
    rows += [{"prompt": "w7", "chosen": "w8", "rejected": "w9"}]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plan(settings(data), target)
    assert (found["prompts"], found["held_out_prompts"]) == (4, 0)
    assert run(settings(data, max_steps=1), target, tmp_path / "d.st").metrics["head"]["steps"] == 1
    # what would stop the run stops a dry run
    for given, problem in (
        ({"max_length": 16, "answer_tokens": 15}, "no prompt to write on from"),
        ({"vocabulary": 98}, "--vocabulary 98 is more than the 97 tokens"),
        ({"eval_data": [str(data)]}, "is training data and held out"),
    ):
        with pytest.raises(UsageError, match=problem):
            plan(settings(data, **given), target)


def test_prompts_without_answers_are_no_text(target, random_texts, tmp_path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    for given, problem in (
        ({"data": [str(asked)]}, f"^{asked}, row 1: has the columns `prompt`"),
        ({"eval_data": [str(asked)]}, f"^no row of --eval-data can be measured: {asked}, row 1"),
    ):
        with pytest.raises(UsageError, match=problem) as found:
            config = settings(random_texts, text="data").model_copy(update=given)
            run(config, target, tmp_path / "d.st")
        hint = "these are prompts without answers: mambactl generate MODEL --dataset FILE"
        assert found.value.hint == hint


def test_malformed_rows_are_an_error_unless_they_are_skipped(target, tmp_path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "the old house"}\n{"text": 3}\n' * 4)
    with pytest.raises(UsageError, match="bad.jsonl"):
        run(settings(data), target, tmp_path / "d.st")
    assert not (tmp_path / "d.st").exists()
    run(settings(data, skip_bad_rows=True, max_steps=1), target, tmp_path / "d.st")


def test_a_target_that_changed_is_refused(target, random_texts, tmp_path, cli) -> None:
    out, other = tmp_path / "d.st", tmp_path / "other"
    run(settings(random_texts, max_steps=2), target, out)
    with_draft = ["--draft", str(out), "--max-new-tokens", "6", "--device", "cpu", "--no-chat"]
    done = cli("spec-decode", "--target", target, *with_draft, "-p", "w1 w2", "--check")
    assert done.code == 0, done.err
    # the digest is that of the weights before they are rounded
    done = cli("spec-decode", "--target", target, *with_draft, "-p", "w1", "--weights", "int8")
    assert done.code == 0, done.err
    changed = load_model(target)
    with torch.no_grad():
        changed.model.norm.weight[0] += 0.5
    changed.save_pretrained(other)
    load_tokenizer(target).save_pretrained(other)
    for words in (
        ["spec-decode", "--target", str(other), "-p", "w1"],
        ["generate", str(other), "w1"],
    ):
        refused = cli(*words, *with_draft)
        assert refused.code == 3
        assert "was made for other weights than those of" in refused.err
        assert "mambactl draft" in refused.err
    for words in (["inspect", str(out)], ["generate", str(out), "w1"]):
        refused = cli(*words)
        assert refused.code == 3 and "is a draft head" in refused.err
    kept = cli("generate", target, "w1", *with_draft, "--prefix-cache", str(tmp_path / "kept"))
    assert kept.code == 0 and "--prefix-cache gives nothing" in kept.err


def test_chat_and_generate_write_what_they_write_without_it(
    target, random_texts, tmp_path, cli
) -> None:
    out = tmp_path / "d.st"
    run(settings(random_texts, max_steps=2), target, out)
    words = ["--max-new-tokens", "8", "--dtype", "float32", "--device", "cpu"]
    lines = f"w1 w2\nw3\n/save {tmp_path / 'kept.st'}\n"
    plain = cli("chat", target, *words, stdin="w1 w2\nw3\n")
    drafted = cli("chat", target, *words, "--draft", str(out), "-k", "2", stdin=lines)
    assert plain.code == 0 and drafted.out.splitlines()[:2] == plain.out.splitlines()[:2]
    assert "no state is kept" in drafted.err + drafted.out
    model = mambactl.load(target, device="cpu", dtype="float32")
    params = mambactl.SamplingParams(max_new_tokens=8)
    (one,) = mambactl.generate(model, "w5 w6", params, draft=str(out), k=3)
    (two,) = mambactl.generate(model, "w5 w6", params)
    assert one.text == two.text and one.stats.drafted > 0
    with pytest.raises(UsageError, match="by the stored weights"):
        rounded = mambactl.load(target, device="cpu", weights="int8")
        mambactl.generate(rounded, "w5", params, draft=str(out))


def test_a_server_writes_what_it_writes_without_it(target, random_texts, tmp_path) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    out = tmp_path / "d.st"
    run(settings(random_texts, max_steps=2), target, out)
    place = {"device": "cpu", "dtype": "float32"}
    prompts = ["w1 w2 w3", "w1 w2 w3 w4 w5", "w9", "w1 w2 w3"]
    found: dict[int, str] = {}
    with mambactl.serve(
        target, port=0, batch_size=2, max_length=64, draft=str(out), k=2, **place
    ) as server:

        def ask(number: int) -> None:
            body = {
                "model": "target",
                "prompt": prompts[number],
                "max_tokens": 10,
                "temperature": 0,
            }
            reply = httpx.post(f"{server.url}/completions", json=body, timeout=60)
            found[number] = reply.raise_for_status().json()["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    model, params = mambactl.load(target, **place), mambactl.SamplingParams(max_new_tokens=10)
    for number, prompt in enumerate(prompts):
        (wanted,) = mambactl.generate(model, prompt, params, chat=False)
        assert found[number] == wanted.text


def test_a_model_of_some_layers_is_an_ordinary_checkpoint(target, random_texts, tmp_path) -> None:
    out = tmp_path / "m.st"
    found = run(
        settings(random_texts, kind="model", layers=2, vocabulary=WHOLE), target, out
    ).metrics
    assert found["model"]["steps"] == 4
    whole, small = load_model(target), load_model(str(out))
    assert small.config.mixers == [whole.config.mixers[n] for n in (0, -1)]
    assert torch.equal(small.model.embed_tokens.weight, whole.model.embed_tokens.weight)
    assert not torch.equal(
        small.model.layers[1].mlp.up_proj.weight, whole.model.layers[-1].mlp.up_proj.weight
    )
    with pytest.raises(UsageError, match="no smaller than its target"):
        plan(
            settings(
                random_texts,
                kind="model",
                layers=whole.config.num_hidden_layers,
                vocabulary=WHOLE,
            ),
            target,
        )


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    target, random_texts, tmp_path
) -> None:
    config = settings(random_texts, max_steps=6)
    whole, halves = tmp_path / "whole.st", tmp_path / "halves.st"
    run(config, target, whole)
    with abrupt_stop(lambda number, _: number == 3):
        run(config, target, halves)
    run(config, target, halves, resume=True)
    model = load_model(target)
    one, two = (load_head(str(path), model, target).state_dict() for path in (whole, halves))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


FORMS = {
    "no attention and no mlp": (["mamba2"] * 2, {"has_mlp": False}),
    "norms of heads": (["mamba1", "attention"], {"qk_norm": True, "attention_bias": True}),
    "multipliers": (["attention"] * 2, {"residual_multiplier": 0.25, "logits_scaling": 4.0}),
}


@pytest.mark.parametrize("form", FORMS)
def test_targets_of_other_forms(make_hybrid, tiny_tokenizer, random_texts, tmp_path, form) -> None:
    mixers, fields = FORMS[form]
    source = tmp_path / "t"
    make_hybrid(mixers, seed=1, **fields).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    run(settings(random_texts, max_steps=2, dtype="bfloat16"), str(source), tmp_path / "d.st")
    model = load_model(str(source))
    head = load_head(str(tmp_path / "d.st"), model, str(source))
    params, prompts = SamplingParams(max_new_tokens=20), [[5, 6, 7], [8]]
    plain = make_engine(model, None, 0).generate(prompts, params)
    found = make_engine(model, head, 3).generate(prompts, params)
    again = Engine(model, HeadDrafter(head), 3).generate(prompts, params)
    assert found.tokens == plain.tokens == again.tokens
    assert found.stats.row_steps == again.stats.row_steps


def test_the_command_line_says_who_can_use_it(target, random_texts, tmp_path, cli) -> None:
    out = tmp_path / "d.st"
    words = ["draft", target, "--data", str(random_texts), "--max-steps", "2", "--max-length", "48"]
    words += ["--answer-tokens", "8", "--batch-size", "2", "--device", "cpu", "-o", str(out)]
    words += ["--eval-tokens", "64"]
    planned = cli(*words, "--vocabulary", "60", "--dry-run", "--json")
    assert planned.code == 0 and json.loads(planned.out)["vocabulary"] == 60 and not out.exists()
    done = cli(*words)
    assert done.code == 0 and done.out.strip() == str(out)
    assert "only mambactl decodes with it, and only" in done.err
    assert f"next: mambactl spec-decode --draft {out} --target {target}" in done.err
    assert cli(*words).code == 5 and cli(*words, "--resume").code == 0


def test_text_that_is_there_is_taken_as_it_is(target, random_texts, tmp_path) -> None:
    out = tmp_path / "d"
    config = settings(random_texts, text="data", output_lr=1e-3, max_steps=2)
    found = run(config, target, out).metrics["head"]
    assert "written_tokens" not in found
    model = load_model(target)
    head = load_head(str(out), model, target)
    assert not torch.equal(head.body.lm_head.weight, model.lm_head.weight[head.ids])


def test_damaged_heads_are_refused(target, random_texts, tmp_path) -> None:
    out = tmp_path / "d"
    run(settings(random_texts, max_steps=1), target, out)
    model = load_model(target)
    content = json.loads((out / "config.json").read_text())
    for key, value in (("hidden_size", 64), ("target_sha256", "0" * 64), ("num_hidden_layers", 2)):
        (out / "config.json").write_text(json.dumps(content | {key: value}))
        with pytest.raises(ModelError):
            load_head(str(out), model, target)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "^--ce-weight and --kl-weight are both 0"),
        ({"epochs": 1.0, "max_steps": None}, "--epochs count text that is there"),
        ({"answer_tokens": 48}, "leave no room"),
        ({"layers": 2}, "--layers is not for a draft head"),
        ({"kind": "model", "vocabulary": 9}, "--vocabulary is not for a draft model"),
    ],
)
def test_options_without_sense_are_refused(options, problem) -> None:
    given = {key: value for key, value in options.items() if value is not None}
    with pytest.raises(UsageError, match=problem):
        DraftConfig(**{"max_length": 48, "answer_tokens": 12, **given}).require_coherent()
