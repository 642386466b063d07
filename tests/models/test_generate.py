"""transformers' generate() on a hybrid: greedy, sampled, beams, padding, continuing a cache."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mambactl.models.cache import HybridCache

NEW = 12


def naive(model, ids: Tensor, uncached, count: int = NEW) -> Tensor:
    """Argmax continuation [B, T + count] that recomputes everything for every token."""
    for _ in range(count):
        ids = torch.cat([ids, uncached(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture
def endless(any_model):
    """`any_model` without a token that ends the text."""
    any_model.generation_config.eos_token_id = None
    any_model.generation_config.pad_token_id = 0
    return any_model


def test_greedy_is_the_naive_loop(endless, draw_ids, uncached) -> None:
    ids = draw_ids(2, 9)
    expected = naive(endless, ids, uncached)
    for use_cache in (True, False):
        output = endless.generate(
            ids, max_new_tokens=NEW, do_sample=False, use_cache=use_cache,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        assert torch.equal(output, expected)


def test_left_padded_prompts_continue_as_if_alone(endless, draw_ids, uncached) -> None:
    ids, mask = draw_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, pad in enumerate((0, 3, 8)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    output = endless.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, pad in enumerate((0, 3, 8)):
        alone = naive(endless, ids[row : row + 1, pad:], uncached)
        assert torch.equal(output[row, pad:], alone[0])


def test_generation_ends_at_eos(mixed_model, draw_ids, uncached) -> None:
    ids = draw_ids(1, 9)
    plain = naive(mixed_model, ids, uncached)[0, 9:].tolist()
    eos = plain[5]
    output = mixed_model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=eos)
    assert output[0, 9:].tolist() == plain[: plain.index(eos) + 1]


def test_sampling_follows_its_seed(endless, draw_ids) -> None:
    ids = draw_ids(2, 6)
    outputs = []
    for seed, use_cache in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        outputs.append(
            endless.generate(
                ids, max_new_tokens=NEW, do_sample=True, temperature=5.0, top_k=0,
                use_cache=use_cache, attention_mask=torch.ones_like(ids),
            )
        )  # fmt: skip
    assert outputs[0].shape == (2, 6 + NEW)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_beams_score_as_without_a_cache(endless, draw_ids, uncached) -> None:
    ids = draw_ids(2, 6)
    beams = [
        endless.generate(
            ids, max_new_tokens=NEW, num_beams=3, do_sample=False, use_cache=use_cache,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
            attention_mask=torch.ones_like(ids),
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(beams[0].sequences, beams[1].sequences)
    log_probs = uncached(endless, beams[0].sequences)[:, 5:-1].log_softmax(-1)
    chosen = beams[0].sequences[:, 6:, None]
    total = log_probs.gather(-1, chosen).sum((1, 2))
    for output in beams:
        torch.testing.assert_close(output.sequences_scores, total, rtol=1e-4, atol=1e-3)


def test_a_conversation_continues_from_its_cache(endless, draw_ids, uncached) -> None:
    ids = draw_ids(1, 9)
    first = endless.generate(
        ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    assert isinstance(first.past_key_values, HybridCache)
    more = torch.cat([first.sequences, draw_ids(1, 5, seed=1)], 1)
    second = endless.generate(
        more, max_new_tokens=NEW, do_sample=False, past_key_values=first.past_key_values,
        attention_mask=torch.ones_like(more),
    )  # fmt: skip
    assert torch.equal(second, naive(endless, more, uncached))


@pytest.fixture(scope="module")
def llama():
    """A Llama of the same vocabulary with other weights, whose text does not end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def greedy(model, ids: Tensor, **options) -> Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options
    )


def test_it_drafts_for_a_llama(endless, llama, draw_ids) -> None:
    ids = draw_ids(1, 9)
    endless.generation_config.num_assistant_tokens_schedule = "constant"
    assert torch.equal(greedy(llama, ids, assistant_model=endless), greedy(llama, ids))
    # nothing is taken back where the draft is the target
    assert torch.equal(greedy(endless, ids, assistant_model=endless), greedy(endless, ids))


def test_drafts_for_it_change_nothing(endless, llama, draw_ids) -> None:
    ids = draw_ids(1, 9).repeat(1, 2)
    expected = greedy(endless, ids)
    assert torch.equal(greedy(endless, ids, assistant_model=llama), expected)
    assert torch.equal(greedy(endless, ids, prompt_lookup_num_tokens=3), expected)


def test_prompts_are_read_in_chunks(endless, draw_ids) -> None:
    ids = draw_ids(2, 11)
    assert torch.equal(greedy(endless, ids, prefill_chunk_size=4), greedy(endless, ids))


def test_several_answers_to_each_prompt(endless, draw_ids) -> None:
    found = endless.generate(
        draw_ids(2, 6), do_sample=True, num_return_sequences=3, max_new_tokens=4
    )
    assert found.shape == (6, 10)
