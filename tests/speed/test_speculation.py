"""Speculative points: what is counted, on scripted models whose acceptance is known."""

from collections import Counter

import pytest
import torch

from mambactl.decode import backend
from mambactl.decode.engine import Engine
from mambactl.decode.stats import DecodeStats
from mambactl.models.config import HybridConfig
from mambactl.speed.limits import speculative_limit
from mambactl.speed.shapes import SHAPES, build, materialise, script, successors
from mambactl.speed.speculation import NUMBERS, speculation
from mambactl.speed.subject import Grid, Subject

PLAIN = {"input_len": 8, "batch_size": 2, "decode_tokens_per_second": 10.0}


@pytest.mark.parametrize("name", ["tiny", "tiny-mamba", "tiny-mamba2", "tiny-hybrid"])
def test_a_perfect_draft_is_always_accepted(scripted, name):
    subject, draft = scripted(name, acceptance=1.0)
    (point,) = speculation(subject, draft, 3, Grid([8], [2], 17, 0, 1), [PLAIN])
    assert point["acceptance"] == 1 and point["k"] == 3
    assert point["tokens_per_step"] == 4
    assert point["speculative_speedup"] == point["speculative_tokens_per_second"] / 10
    assert point["input_len"] == 8


def test_acceptance_is_per_judged_token(scripted):
    subject, draft = scripted("tiny", acceptance=0.7)
    (point,) = speculation(subject, draft, 3, Grid([8], [6], 100, 0, 1), [PLAIN])
    assert point["acceptance"] == pytest.approx(0.7, abs=0.06)
    # 1 + a + a^2 + a^3 is 2.53; of all drafted tokens only half would be accepted
    assert point["tokens_per_step"] == pytest.approx(2.53, abs=0.2)


def test_tokens_after_a_rejected_one_are_not_judged():
    stats = DecodeStats()
    stats.count_step([4, 4, 2, 0], [4, 1, 0, 0])
    assert (stats.accepted, stats.rejections) == (5, 2)
    assert stats.acceptance_per_token == 5 / 7
    assert stats.lengths == Counter({4: 2, 2: 1, 0: 1})
    total = DecodeStats()
    total.add(stats)
    total.add(stats)
    assert total.acceptance_per_token == 5 / 7 and total.lengths[4] == 4
    assert DecodeStats().acceptance_per_token == 0


def test_rates_are_medians_and_limits_those_of_both_models(scripted, monkeypatch):
    seconds = iter([9.0, 2.0, 8.0, 4.0])

    class Timed(Engine):
        def generate(self, prompts, params, **kwargs):
            output = super().generate(prompts, params, **kwargs)
            output.stats.seconds = Counter(prefill=1.0, draft=next(seconds))
            return output

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Timed)
    subject, draft = scripted("tiny", acceptance=1.0)
    (point,) = speculation(subject, draft, 3, Grid([8], [2], 17, 1, 3), [PLAIN])
    # the first of 17 tokens comes with the prompt
    assert point["speculative_tokens_per_second"] == 2 * 16 / 4
    allowed = speculative_limit(
        subject.model.config, draft.config, 3, 1.0, 1e9, 4, batch=2, context=16, kv_bytes=4
    )
    assert point["speculative_byte_limit"] == pytest.approx(allowed)
    assert point["speculative_share"] == pytest.approx(8 / allowed)


def test_automatic_k_reports_what_was_drafted_most(scripted, monkeypatch):
    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    subject, draft = scripted("tiny", acceptance=1.0)
    (point,) = speculation(subject, draft, "auto", Grid([8], [1], 60, 0, 1), [PLAIN])
    assert point["k"] == backend.REFERENCE_K
    (point,) = speculation(subject, "ngram", "auto", Grid([8], [1], 60, 0, 1), [PLAIN])
    # a cycle longer than the text repeats nothing
    assert (point["k"], point["acceptance"], point["tokens_per_step"]) == (0, 0, 1)
    # both are plain decoding
    assert point["speculative_speedup"] is None


def test_a_draft_of_a_trimmed_vocabulary():
    successor = successors(512, limit=64)
    shape = SHAPES["tiny-draft"]().to_dict() | {"vocab_size": 64}
    del shape["model_type"]
    draft = materialise(HybridConfig(**shape), "cpu", torch.float32, 1)
    script(draft, successor, 1)
    subject = Subject(build("tiny", "cpu", torch.float32, 0, successor), "tiny", 1e9, successor)
    (point,) = speculation(subject, draft, 2, Grid([8], [2], 31, 0, 1), [PLAIN])
    assert point["tokens_per_step"] == 3


def test_what_does_not_fit_is_left_empty(scripted, monkeypatch):
    class Small(Engine):
        def generate(self, prompts, params, **kwargs):
            raise torch.OutOfMemoryError("no")

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Small)
    subject, draft = scripted("tiny")
    (point,) = speculation(subject, draft, 2, Grid([8], [2], 4, 0, 1), [PLAIN])
    assert [point[name] for name in NUMBERS] == [None] * len(NUMBERS)
    assert point["decode_tokens_per_second"] == 10
