"""Angles that depend on the length of the text: those of a token are those of its own position."""

import pytest
import torch
from decode.engines import fused, plain, prompts_of
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mambactl.decode.sampler import SamplingParams
from mambactl.models.positions import RotaryEmbedding

KINDS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 12, "short_factor": [1 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}  # fmt: skip


@pytest.fixture(params=KINDS)
def model(request, make_hybrid):
    mixers = ["attention", "mamba2_window", "mamba2_mixed"]
    return make_hybrid(mixers, rope_parameters=KINDS[request.param], max_position_embeddings=12)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_librarys_for_a_text_that_ends_there(kind) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=12,
        rope_parameters=KINDS[kind],
    )  # fmt: skip
    rows, like = torch.arange(50)[None], torch.zeros(1, 1)
    found = RotaryEmbedding(config)(like, rows)
    for position in range(50):
        wanted = LlamaRotaryEmbedding(config)(like, rows[:, : position + 1])
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours[0, position], theirs[0, -1], rtol=0, atol=1e-5)


def test_calls_in_pieces_and_drafts_change_nothing(model) -> None:
    """Texts begin below the length that was trained and end far beyond it."""
    prompts, some = prompts_of([9, 3, 20]), SamplingParams(max_new_tokens=20)
    tokens = plain(model).generate(prompts, some).tokens
    for engine in (plain(model, "ngram", 4), fused(model), fused(model, "ngram", 4)):
        assert engine.generate(prompts, some).tokens == tokens
    for prompt, found in zip(prompts, tokens, strict=True):
        assert plain(model).generate([prompt], some).tokens == [found]
        with torch.no_grad():
            whole = model(torch.tensor([prompt + found]), use_cache=False).logits[0].argmax(-1)
        assert whole[len(prompt) - 1 : -1].tolist() == found
