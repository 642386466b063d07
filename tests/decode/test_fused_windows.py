"""Windows of attention beside Mamba layers in the engine of whole steps."""

import pytest
import torch
from decode.engines import GREEDY, NATIVE1, NATIVE2, ROTARY, SPAN, fused, plain, prompts_of

from mambactl.decode import prefill
from mambactl.models import session_size
from mambactl.models.key_ring import WindowSettings

WINDOWED = {
    "native": {"mixers": ["mamba2_window"] * 2, "mamba2": NATIVE2, "has_mlp": False},
    "no sinks": {
        "mixers": ["mamba2_window", "attention"], "mamba2_window": WindowSettings(5, sinks=0),
        "attention_bias": True, "sliding_window": 8, "num_key_value_heads": 1,
    },
    "all sinks": {
        "mixers": ["mamba2_window", "mamba1"], "mamba2_window": WindowSettings(1, sinks=70)
    },
    "wide": {
        "mixers": ["mamba1", "mamba2_window"], "mamba2_window": WindowSettings(300), "head_dim": 24,
        "mamba1": NATIVE1, "has_mlp": False,
    },
    "kept heads": {
        "mixers": ["mamba2_mixed", "mamba2_window", "mamba2_mixed"], "mamba2_window": SPAN,
        "attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 3,
        "kept_heads": {0: (0, 2), 2: (1,)}, "sliding_window": 24,
    },
    "rotary": {
        "mixers": ["mamba2_window", "mamba2_mixed"], "mamba2": ROTARY, "mamba2_window": SPAN,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                            "original_max_position_embeddings": 1024},
    },
}  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_in_rings_that_are_not_rounded_up(make_hybrid, monkeypatch, name) -> None:
    """Prompts read in pieces, kept in rings in which an earlier call left something."""
    monkeypatch.setattr(session_size, "WINDOW_STEP", 1)
    target, similar = (make_hybrid(**WINDOWED[name], seed=21) for _ in range(2))
    with torch.no_grad():
        similar.lm_head.weight[::7] = similar.lm_head.weight[1::7]
    drafts = {0: None, 1: similar, 5: similar, 2: "ngram", "auto": similar}
    engines = [fused(target, draft, k) for k, draft in drafts.items()]
    batches = [prompts_of(lengths, seed=9) for lengths in ([1], [90], [2], [3, 1, 40])]
    expected = [plain(target).generate(prompts, GREEDY).tokens for prompts in batches]
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 16)
    for engine in engines:
        for prompts, tokens in zip(batches, expected, strict=True):
            done = engine.generate(prompts, GREEDY)
            assert done.tokens == tokens, engine.k
            if len(prompts[0]) == 90 and engine.k == 5:
                assert done.stats.accepted > 3 and done.stats.rejections > 0
            for session in engine.sessions.values():
                for tensor in session.target.tensors():
                    tensor.fill_(7)
