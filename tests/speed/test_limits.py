"""Byte counts against hand-made ones, and the limits of the performance study."""

from dataclasses import replace

import pytest
import torch

from mambactl.models.cache import HybridCache
from mambactl.models.cache_bytes import state_elements
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.speed.limits import (
    bytes_per_step,
    limit,
    parameters_read,
    speculative_limit,
    tokens_per_step,
)
from mambactl.speed.shapes import SHAPES

BANDWIDTH = 4.3e12
TINY = ["tiny", "tiny-mamba", "tiny-mamba2", "tiny-hybrid", "tiny-draft"]


@pytest.mark.parametrize(
    ("name", "context", "expected"),
    [("mamba-2.8b", 1024, 771), ("llama3-8b", 1024, 284), ("llama3-8b-hybrid-50", 1024, 274)],
)
def test_plain_limits(name: str, context: int, expected: float) -> None:
    assert limit(SHAPES[name](), BANDWIDTH, context=context) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("k", "acceptance", "expected"),
    [(2, 0.6, 1381), (3, 0.7, 1711), (4, 0.8, 2180), (8, 0.9, 3429)],
)
def test_speculative_limits(k: int, acceptance: float, expected: float) -> None:
    target, draft = SHAPES["mamba-2.8b"](), SHAPES["mamba-130m"]()
    found = speculative_limit(target, draft, k, acceptance, BANDWIDTH)
    assert found == pytest.approx(expected, rel=0.01)


def test_hybrid_with_a_gigabyte_of_draft() -> None:
    target, draft = SHAPES["llama3-8b-hybrid-50"](), SHAPES["draft-llama3-2l"]()
    found = speculative_limit(target, draft, 4, 0.7, BANDWIDTH, context=1024)
    assert found == pytest.approx(606, rel=0.01)


def test_published_sizes() -> None:
    assert parameters_read(SHAPES["llama3-8b"]()) == 8_030_261_248 - 128_256 * 4096
    assert parameters_read(SHAPES["llama3-8b-hybrid-50"]()) == pytest.approx(7.776e9, rel=1e-3)
    step = bytes_per_step(SHAPES["mamba-2.8b"](), context=1024)
    assert step.weights == pytest.approx(5.537e9, rel=3e-3)
    assert (step.state, step.kv) == (2 * 64 * 5120 * 16 * 4, 0)
    step = bytes_per_step(SHAPES["llama3-8b-hybrid-50"](), context=1024)
    assert step.state == 2 * 16 * 524_288 * 4
    assert step.kv == 16 * 2 * 1024 * 2 * 1025


@pytest.mark.parametrize("name", TINY)
def test_weights_are_those_of_the_model(name: str) -> None:
    config = SHAPES[name]()
    model = HybridForCausalLM(config).to(torch.bfloat16)
    held = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    step = bytes_per_step(config)
    assert step.weights == held
    assert step.embedding == 2 * config.hidden_size
    assert step.total == step.weights + step.embedding + step.state + step.kv


@pytest.mark.parametrize("name", TINY)
def test_cache_bytes_are_those_of_the_cache(name: str) -> None:
    config, batch, tokens = SHAPES[name](), 3, 20
    cache = HybridCache(config, batch)
    with torch.no_grad():
        model = HybridForCausalLM(config).eval()
        model(torch.zeros(batch, tokens, dtype=torch.long), past_key_values=cache)
    layers = list(zip(config.mixers, cache.layers, strict=True))
    states = sum(layer.live.nbytes for mixer, layer in layers if mixer != "attention")
    kv = sum(layer.keys.nbytes + layer.values.nbytes for m, layer in layers if m == "attention")
    assert states == batch * state_elements(config) * 4
    step = bytes_per_step(config, batch=batch, context=tokens - 1, kv_bytes=4)
    assert (step.state, step.kv) == (2 * states, kv)


def test_a_window_reads_everything_once() -> None:
    config = SHAPES["tiny-hybrid"]()
    one = bytes_per_step(config, batch=2, context=100)
    five = bytes_per_step(config, batch=2, context=100, tokens_per_pass=5)
    per_token = 2 * (2 * 2 * 16) * 2
    assert five == replace(one, embedding=5 * one.embedding, kv=one.kv + 4 * per_token)


def test_a_sliding_window_bounds_what_is_read() -> None:
    config = SHAPES["tiny"]()
    config.sliding_window = 64
    assert bytes_per_step(config, context=64) == bytes_per_step(config, context=5000)
    assert bytes_per_step(config, context=10).kv < bytes_per_step(config, context=64).kv


def test_smaller_weights_leave_the_rest() -> None:
    config = SHAPES["tiny-mamba2"]()
    whole, half = bytes_per_step(config), bytes_per_step(config, 1)
    float32 = 2 * 3 * 2 * 4  # layers x (A_log, D, dt_bias) x heads x bytes
    assert half.weights - float32 == (whole.weights - float32) / 2
    assert half.state == whole.state


def test_tokens_per_step() -> None:
    assert tokens_per_step(3, 0.7) == pytest.approx((1 - 0.7**4) / 0.3)
    assert (tokens_per_step(4, 1.0), tokens_per_step(4, 0.0), tokens_per_step(0, 0.5)) == (5, 1, 1)


def test_rows_share_the_weights() -> None:
    config = SHAPES["llama3-8b"]()
    one, many = (limit(config, BANDWIDTH, batch=batch, context=1024) for batch in (1, 8))
    assert 7 < many / one < 8
    assert speculative_limit(config, None, 0, 0.5, BANDWIDTH, batch=8, context=1024) == many
