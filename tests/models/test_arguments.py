"""Arguments and fields of transformers act here as they do there, or are refused."""

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModel, DynamicCache, LlamaConfig, LlamaForCausalLM

from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM, HybridModel


@pytest.fixture
def as_llama(make_hybrid):
    """A hybrid with attention alone, and the Llama of transformers with its weights."""
    hybrid = make_hybrid(["attention"] * 2)
    names = {field for field in LlamaConfig().to_dict() if field not in ("model_type", "dtype")}
    fields = {k: v for k, v in hybrid.config.to_dict().items() if k in names}
    llama = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).eval()
    llama.load_state_dict(hybrid.state_dict())
    return hybrid, llama


def test_labels_that_are_shifted_already_are_the_targets(mixed_model, draw_ids) -> None:
    ids = draw_ids(2, 9)
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    with torch.no_grad():
        plain = mixed_model(ids, labels=ids).loss
        for labels in (ids, None):
            assert torch.equal(mixed_model(ids, labels=labels, shift_labels=targets).loss, plain)
        # of a part of a row whose next token is in another part
        targets[:, -1] = 5
        logits = mixed_model(ids).logits
        found = mixed_model(ids, shift_labels=targets).loss
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found, wanted)


def test_flags_of_the_configuration_count(mixed_model, draw_ids) -> None:
    ids = draw_ids(2, 9)
    asked = mixed_model(ids, output_hidden_states=True, output_attentions=True)
    mixed_model.config.output_hidden_states = True
    mixed_model.config._attn_implementation = "eager"
    mixed_model.config.output_attentions = True
    found = mixed_model(ids)
    for one, other in zip(asked.hidden_states, found.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found.attentions[0], asked.attentions[0])
    # arguments come before them
    without = mixed_model(ids, output_hidden_states=False, output_attentions=False)
    assert without.hidden_states is without.attentions is None


def test_hidden_states_may_be_chosen(mixed_model, draw_ids) -> None:
    ids = draw_ids(2, 9)
    every = mixed_model(ids, output_hidden_states=True).hidden_states
    some = mixed_model(ids, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in some] == [False, True, True, False]
    assert torch.equal(some[0], every[0]) and torch.equal(some[3], every[3])
    assert mixed_model(ids, output_hidden_states=1).hidden_states[1] is not None


@pytest.mark.parametrize("asked", ["argument", "configuration"])
def test_outputs_may_be_tuples(mixed_model, draw_ids, asked) -> None:
    ids = draw_ids(1, 5)
    wanted = mixed_model(ids, use_cache=False).logits
    if asked == "configuration":
        mixed_model.config.return_dict = False
    arguments = {"return_dict": False} if asked == "argument" else {}
    (logits,) = mixed_model(ids, use_cache=False, **arguments)
    assert torch.equal(logits, wanted)
    (hidden,) = mixed_model.model(ids, use_cache=False, **arguments)
    assert hidden.shape == (1, 5, 48)


def test_attention_weights_are_those_of_llama(as_llama, draw_ids) -> None:
    hybrid, llama = as_llama
    ids, mask = draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    for given in (None, mask):
        real = torch.ones(2, 9, dtype=torch.bool) if given is None else given.bool()
        places = (real.cumsum(1) - 1).clamp(min=0)
        one, other = (
            model(ids, attention_mask=given, position_ids=places, output_attentions=True)
            for model in as_llama
        )
        for found, wanted in zip(one.attentions, other.attentions, strict=True):
            at = real[:, None].expand(-1, 4, -1)
            torch.testing.assert_close(found[at], wanted[at], rtol=0, atol=1e-5)
        # a step behind a prompt with padding
        longer = None if given is None else torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        step = [
            model(
                ids[:, :1], attention_mask=longer, past_key_values=out.past_key_values,
                position_ids=real.sum(1, keepdim=True), output_attentions=True,
            )
            for model, out in zip(as_llama, (one, other), strict=True)
        ]  # fmt: skip
        for found, wanted in zip(step[0].attentions, step[1].attentions, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask of all 11 columns"):
        hybrid(ids[:, :1], attention_mask=mask[:, -1:], past_key_values=one.past_key_values,
               output_attentions=True)  # fmt: skip


def test_maps_are_those_of_attention_layers(mixed_model, make_hybrid, draw_ids) -> None:
    found = mixed_model(draw_ids(1, 9), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in found] == [(1, 4, 9, 9)]
    beside = make_hybrid(["mamba2_mixed", "attention", "mamba2_window"])
    assert len(beside(draw_ids(1, 9), output_attentions=True).attentions) == 1
    with pytest.raises(ValueError, match="no layer of .* is attention"):
        make_hybrid(["mamba2_window"])(draw_ids(1, 9), output_attentions=True)


def test_what_means_nothing_here_is_refused(mixed_model, draw_ids) -> None:
    ids = draw_ids(1, 6)
    with pytest.raises(TypeError, match="takes no token_type_ids"):
        mixed_model(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(TypeError, match="takes no is_causal"):
        mixed_model(ids, is_causal=False)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        mixed_model(ids, inputs_embeds=torch.zeros(1, 6, 48))
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(TypeError, match="cu_seq_lens_q .* position_ids"):
        mixed_model(ids, cu_seq_lens_q=ends)
    mixed_model(ids, cu_seq_lens_q=ends, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]))
    mixed_model(ids, token_type_ids=None, is_causal=True)


def test_a_cache_of_another_model_is_refused(mixed_model, draw_ids) -> None:
    ids = draw_ids(1, 6)
    with pytest.raises(ValueError, match="the cache is a DynamicCache"):
        mixed_model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="the cache is a DynamicCache"):
        mixed_model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2)


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_kinds_of_cache_are_refused(mixed_model, draw_ids, kind) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}'"):
        mixed_model.generate(draw_ids(1, 6), cache_implementation=kind, max_new_tokens=2)


def test_continuous_batching_is_refused(mixed_model) -> None:
    with pytest.raises(NotImplementedError, match="generate"):
        mixed_model.generate_batch([[1, 2, 3]])


def test_positions_of_one_row_are_those_of_all(mixed_model, draw_ids, uncached) -> None:
    ids, positions = draw_ids(2, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    wanted = uncached(mixed_model, ids, position_ids=positions.expand(2, -1))
    assert torch.equal(uncached(mixed_model, ids, position_ids=positions), wanted)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]])
    wanted = uncached(mixed_model, ids, seq_idx=seq_idx.expand(2, -1))
    assert torch.equal(uncached(mixed_model, ids, seq_idx=seq_idx), wanted)


@pytest.mark.parametrize("mixer", ["attention", "mamba2_window", "mamba2_mixed"])
def test_attention_drops_weights_in_training(mixer, draw_ids) -> None:
    ids = draw_ids(2, 40)
    torch.manual_seed(0)
    model = HybridForCausalLM(tiny_config([mixer], attention_dropout=0.5))
    outputs = [model.train(training)(ids).logits for training in (True, True, False, False)]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])


def test_parallel_plans_name_what_is_there(any_model) -> None:
    names = {name for name, _ in any_model.named_modules()}
    layers = range(any_model.config.num_hidden_layers)
    for pattern in any_model.tp_plan:
        assert names & {pattern.replace("*", str(index)) for index in layers}, pattern
    assert "lm_head" in any_model.tp_plan
    kept = any_model._keep_in_fp32_modules_strict
    parameters = {name.rpartition(".")[2] for name, _ in any_model.named_parameters()}
    assert set(kept) == parameters & {"A_log", "D", "dt_bias"}


def test_the_base_model_opens_by_itself(mixed_model, draw_ids, tmp_path) -> None:
    mixed_model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is HybridModel
    ids = draw_ids(1, 9)
    found = base(ids, use_cache=False).last_hidden_state
    assert torch.equal(found, mixed_model.model(ids, use_cache=False).last_hidden_state)


def test_a_cache_starts_again(any_model, draw_ids, read) -> None:
    ids = draw_ids(2, 9)
    cache = HybridCache(any_model.config, 2, recording=True)
    first = [read(any_model, cache, part) for part in ids.split([6, 1, 2], 1)]
    assert cache.has_previous_state() and cache.get_mask_sizes(3) == (12, 0)
    cache.reset()
    assert cache.nbytes() == 0 and cache.get_seq_length() == 0
    assert not cache.has_previous_state() and cache.get_max_length() == -1
    again = [read(any_model, cache, part) for part in ids.split([6, 1, 2], 1)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_a_cache_s_rows_repeat(any_model, draw_ids, read, assert_close) -> None:
    ids = draw_ids(2, 9)
    cache = HybridCache(any_model.config, 2)
    read(any_model, cache, ids[:, :8])
    single = cache.select(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    found = read(any_model, cache, ids[:, 8:].repeat_interleave(2, 0))
    wanted = read(any_model, single, ids[:, 8:])
    assert_close(found[::2], wanted)
    assert_close(found[1::2], wanted)


def test_a_prompt_that_can_be_taken_back_is_read_as_one(
    mixed_model, draw_ids, assert_close
) -> None:
    ids, mask = draw_ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[1, :3] = 0
    asked = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    cache = HybridCache(mixed_model.config, 2)
    cache.activate_past_recording()
    with torch.no_grad():
        whole = mixed_model(ids, use_cache=False, **asked)
        parts = mixed_model(ids, past_key_values=cache, **asked)
    assert_close(parts.logits, whole.logits)
    for found, wanted in zip(parts.hidden_states, whole.hidden_states, strict=True):
        assert_close(found, wanted)
    assert_close(parts.attentions[0], whole.attentions[0])
    cache.crop(-64)
    assert cache.lengths.tolist() == [6, 3]
