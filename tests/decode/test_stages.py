"""`generate` and `spec-decode` on checkpoints that lie on disk."""

import json
import shutil

import pytest
import torch

from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.commands import generate, spec_decode
from mambactl.decode import engine as engine_module
from mambactl.decode.equality import (
    first_differences,
    float32_logits,
    measured_logits,
    next_logits,
    require_equal,
)
from mambactl.decode.prompts import Prompt, encode
from mambactl.errors import CheckError, ModelError, UsageError
from mambactl.options import GenerateConfig, SpecDecodeConfig

COMMON = {"device": "cpu", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def draft_dir(tiny_llama_dir, tmp_path_factory):
    """The target with slightly different weights."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "draft"
    shutil.copytree(tiny_llama_dir, folder)
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def continuation(folder, text: str, new_tokens: int) -> str:
    """The text that transformers writes after a chat prompt."""
    from transformers import LlamaForCausalLM

    tokenizer = load_tokenizer(str(folder))
    ids = torch.tensor([encode(Prompt.of(text), tokenizer)])
    out = LlamaForCausalLM.from_pretrained(folder).generate(
        ids, max_new_tokens=new_tokens, do_sample=False
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("draft", [None, "ngram", "checkpoint"])
def test_generate_writes_what_transformers_writes(tiny_llama_dir, draft_dir, draft):
    spec = str(draft_dir) if draft == "checkpoint" else draft
    config = GenerateConfig(prompt="the old house", draft=spec, **COMMON)
    result = generate.run(config, str(tiny_llama_dir))
    assert result.text == continuation(tiny_llama_dir, "the old house", 12)
    assert result.path == str(tiny_llama_dir)
    assert result.metrics["texts"] == [result.text]
    json.dumps(result.metrics)


def test_generate_does_not_depend_on_the_batch_size(tiny_llama_dir, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("the old house\na day\nthe king and the queen went\n", "utf-8")
    texts = [
        generate.run(
            GenerateConfig(
                prompts=str(file), batch_size=size, temperature=1.5, top_p=0.9, seed=3, **COMMON
            ),
            str(tiny_llama_dir),
        ).metrics["texts"]
        for size in (1, 2, 3)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == 3


def test_spec_decode_reports_on_the_builtin_prompts(tiny_llama_dir, draft_dir, capsys):
    config = SpecDecodeConfig(draft=str(draft_dir), k=3, check=True, **COMMON)
    result = spec_decode.run(config, str(tiny_llama_dir))
    assert "\n" not in result.text
    assert "same tokens as plain decoding" in result.text
    metrics = result.metrics
    assert metrics["identical"] is True
    assert 0 < metrics["acceptance"] < 1
    assert 1 < metrics["tokens_per_step"] <= 4
    assert metrics["speculative"]["tokens"] == metrics["plain"]["tokens"]
    kept = list((tiny_llama_dir / "results").glob("spec-decode-*.json"))
    assert json.loads(kept[0].read_text())["metrics"] == json.loads(json.dumps(metrics))
    assert "equals plain decoding" in capsys.readouterr().err


def test_spec_decode_with_a_prompt_gives_the_completion(tiny_llama_dir):
    config = SpecDecodeConfig(draft="ngram", prompt="the old house", check=True, **COMMON)
    result = spec_decode.run(config, str(tiny_llama_dir))
    assert result.text == continuation(tiny_llama_dir, "the old house", 12)


@pytest.fixture
def second_best(monkeypatch):
    """Steps with drafts accept none of them and write the second best token."""
    real = engine_module.accept_greedy

    def wrong(logits, proposal):
        verdict = real(logits, proposal)
        if proposal.tokens.shape[1] == 0:
            return verdict
        return type(verdict)(proposal.lengths.clamp(max=0), logits.argsort(-1)[:, 0, -2])

    monkeypatch.setattr(engine_module, "accept_greedy", wrong)
    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")


def test_check_counts_ties(tiny_llama_dir, draft_dir, tmp_path, second_best, capsys):
    """The model's logits are all equal, so that every token is as good as another."""
    from transformers import LlamaForCausalLM

    folder = tmp_path / "equal"
    shutil.copytree(tiny_llama_dir, folder)
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(folder)
    prompts = tmp_path / "p.txt"
    prompts.write_text("the old house\na day\n", "utf-8")
    config = SpecDecodeConfig(draft=str(draft_dir), prompts=str(prompts), check=True, **COMMON)
    metrics = spec_decode.run(config, str(folder)).metrics
    assert (metrics["ties"], metrics["exact"], metrics["identical"]) == (2, True, False)
    assert "but for 2 that part at a tie of two logits" in " ".join(capsys.readouterr().err.split())


def test_check_names_the_first_wrong_token_and_the_gap(tiny_llama_dir, second_best):
    config = SpecDecodeConfig(draft=str(tiny_llama_dir), prompt="the house", check=True, **COMMON)
    with pytest.raises(CheckError) as caught:
        spec_decode.run(config, str(tiny_llama_dir))
    model = load_model(str(tiny_llama_dir), dtype=torch.float32)
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    tokens = encode(Prompt.of("the house"), tokenizer)
    # the first token is the prompt's
    tokens.append(int(next_logits(model, tokens).argmax()))
    logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    gap = (logits[best] - logits[second]).item()
    message = str(caught.value)
    assert f"prompt 0 at new token 1: {second} instead of {best}" in message
    assert f"their logits are {gap:.3g} and 0 below the best" in message
    assert caught.value.code == 7
    again = next_logits(model, tokens)
    assert (again[best] - again[second]).item() == pytest.approx(gap, rel=1e-4)


def test_a_missing_token_is_a_difference():
    assert first_differences([[1, 2], [3]], [[1, 2], [3]]) == {}
    assert first_differences([[1, 2], [3, 4]], [[1, 2], [3]]) == {1: 1}
    assert first_differences([[1, 2], [5]], [[1, 3], [4]]) == {0: 1, 1: 0}


def test_only_a_tie_of_the_two_best_logits_is_forgiven(make_hybrid):
    model = make_hybrid(["attention", "mamba2"], seed=3)
    prompt = [5, 9, 17]
    best, second = model(input_ids=torch.tensor([prompt])).logits[0, -1].topk(2).indices.tolist()
    rows = [prompt], [[best, 4]], [[second, 8]]
    with pytest.raises(CheckError, match="below the best"):
        require_equal(model, *rows)
    with torch.no_grad():
        # the same row of the head: the two logits are equal to the last bit
        model.lm_head.weight[second] = model.lm_head.weight[best]
    assert require_equal(model, *rows) == 1
    third = next(token for token in range(97) if token not in (best, second))
    for wrong in ([third, 8], []):
        # the two best being equal excuses neither another token nor a missing one
        with pytest.raises(CheckError):
            require_equal(model, [prompt], [[best, 4]], [wrong])
    assert require_equal(model, [prompt], [[best]], [[best]]) == 0


def test_ties_of_bfloat16_are_what_rounding_of_all_layers_explains(make_hybrid):
    mixers = ["attention", "mamba2", "mamba2_window"]
    model = make_hybrid(mixers, seed=3)
    upcast = model.to(torch.bfloat16).float()
    prompt = list(range(5, 45))
    wanted = next_logits(upcast, prompt)
    model = make_hybrid(mixers, seed=3).to(torch.bfloat16)
    torch.testing.assert_close(float32_logits(model, prompt), wanted)
    logits, error = measured_logits(model, prompt)
    assert error == pytest.approx((next_logits(model, prompt).float() - wanted).abs().max().item())
    assert error > torch.finfo(torch.bfloat16).eps * logits.max()
    order = logits.argsort(descending=True).tolist()
    near = [token for token in order[1:] if logits[order[0]] - logits[token] <= 2 * error]
    for token in order[1:]:
        rows = [prompt], [[order[0]]], [[token]]
        if token in near:
            assert require_equal(model, *rows) == 1
        else:
            with pytest.raises(CheckError, match="rounding moves logits there by"):
                require_equal(model, *rows)
    assert len(near) < len(order) / 4


def test_a_draft_with_other_tokens_is_refused(tiny_llama_dir, draft_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(draft_dir, other)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["the"], vocabulary["of"] = vocabulary["of"], vocabulary["the"]
    file.write_text(json.dumps(content), "utf-8")
    for stage in (generate, spec_decode):
        config_type = GenerateConfig if stage is generate else SpecDecodeConfig
        config = config_type(draft=str(other), prompt="the", **COMMON)
        for call in (stage.run, stage.plan):
            with pytest.raises(ModelError, match="is 'the', not 'of'|is 'of', not 'the'") as caught:
                call(config, str(tiny_llama_dir))
            assert "tokens)" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        (generate, {}, "no prompt"),
        (generate, {"prompt": " "}, "empty"),
        (generate, {"prompt": "a", "prompts": "b.txt"}, "exclude"),
        (spec_decode, {"prompt": "a"}, "no draft"),
        (spec_decode, {"draft": "ngram", "check": True, "temperature": 1.0}, "greedy"),
    ],
)
def test_contradicting_options_are_refused(tiny_llama_dir, stage, options, words):
    config_type = GenerateConfig if stage is generate else SpecDecodeConfig
    for call in (stage.run, stage.plan):
        with pytest.raises(UsageError, match=words):
            call(config_type(**options, **COMMON), str(tiny_llama_dir))


def test_plans_say_what_would_run(tiny_llama_dir, draft_dir):
    config = SpecDecodeConfig(draft=str(draft_dir), k=5, **COMMON)
    planned = spec_decode.plan(config, str(tiny_llama_dir))
    assert planned["k"] == 5
    assert planned["prompts"] == 8
    assert planned["new_tokens_at_most"] == 96
    assert planned["draft_parameters"] == planned["parameters"] > 0
    json.dumps(planned)
    alone = generate.plan(GenerateConfig(prompt="the", **COMMON), str(tiny_llama_dir))
    assert (alone["k"], alone["draft"]) == (0, None)
