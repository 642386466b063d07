"""Agreement of texts: by hand, and of a model with itself; where a stop text ends a row."""

import pytest
import torch

from mambactl.decode.engine import Engine
from mambactl.decode.sampler import SamplingParams
from mambactl.evaluation.agreement import Pair, forced_agreement, generation_agreement
from mambactl.generation.completion import CHECK_EVERY, complete


def test_numbers_by_hand():
    pairs = [
        Pair([1], [5, 6, 7, 8], [5, 6, 9, 8]),
        Pair([1], [5, 6], [5, 6]),
        Pair([1], [6, 5], [5, 6, 7, 8]),
    ]
    found = generation_agreement(pairs)
    assert found == pytest.approx(
        {
            "prefix_tokens": (2 + 2 + 0) / 3,
            "prefix_share": (0.5 + 1 + 0) / 3,
            "exact_match": 1 / 3,
            "position_match": (0.75 + 1 + 0) / 3,
            "token_f1": (6 / 8 + 1 + 4 / 6) / 3,
        }
    )


def test_a_forced_difference_counts_once(make_hybrid):
    model = make_hybrid(["mamba2", "attention"], seed=1)
    params = SamplingParams(max_new_tokens=12)
    prompts = [[5, 9, 33], [7, 8, 9, 10, 11]]
    texts = Engine(model).generate(prompts, params).tokens
    own = [Pair(*one) for one in zip(prompts, texts, texts, strict=True)]
    assert forced_agreement(model, own) == 1
    other = make_hybrid(["mamba2", "attention"], seed=2)
    found = forced_agreement(other, own)
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            logits = other(input_ids=torch.tensor([[*prompt, *text[:-1]]])).logits[0]
        expected.append((logits[len(prompt) - 1 :].argmax(-1) == torch.tensor(text)).double())
    assert found == pytest.approx(float(torch.cat(expected).mean())) and found < 1


def engines(model):
    from mambactl.decode.gpu.fused_engine import FusedEngine
    from mambactl.kernels.decode.reference.ops import ReferenceOps

    ops = ReferenceOps()
    return {"plain": Engine(model), "fused": FusedEngine(model, None, 0, ops)}


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_a_stop_text_ends_its_row_alone(make_hybrid, tiny_tokenizer, kind):
    model = make_hybrid(["mamba2", "attention"], seed=1)
    engine = engines(model)[kind]
    params = SamplingParams(max_new_tokens=40)
    prompts = [[5, 9, 33], [7, 8, 9, 10, 11], [12]]
    whole = complete(engine, tiny_tokenizer, prompts, params, (), 2)
    assert [len(text) for text in whole] == [40] * 3
    stop = tiny_tokenizer.decode(whole[0][9:12])
    heard = []
    cut = complete(engine, tiny_tokenizer, prompts, params, (stop,), 2, heard.append)
    assert sum(heard) == 3

    def expected(text):
        looks = (text[:end] for end in range(CHECK_EVERY, 41, CHECK_EVERY))
        return next((some for some in looks if stop in tiny_tokenizer.decode(some)), text)

    assert cut == [expected(text) for text in whole]
    assert len(cut[0]) == 12 < max(map(len, cut))
