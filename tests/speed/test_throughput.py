"""Speed numbers: what is counted, apart from how fast this machine is."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mambactl.decode import backend
from mambactl.decode.engine import Engine
from mambactl.speed import memory
from mambactl.speed.limits import limit
from mambactl.speed.subject import Grid, Subject
from mambactl.speed.throughput import NUMBERS, graph_numbers, throughput

MIXERS = ["mamba2", "attention"]
BANDWIDTH = 1e9


def measure(model, lengths, rows, output_len=2, warmup=0, iters=1, same_prompt=False):
    grid = Grid(lengths, rows, output_len, warmup, iters, same_prompt=same_prompt)
    return throughput(Subject(model, "m", BANDWIDTH), grid)


def test_every_pair_is_measured(make_hybrid, monkeypatch):
    model = make_hybrid(MIXERS)
    calls = []

    class Counting(Engine):
        def generate(self, prompts, params, **kwargs):
            calls.append((len(prompts[0]), len(prompts), params.max_new_tokens))
            return super().generate(prompts, params, **kwargs)

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Counting)
    points = measure(model, [3, 40], [1, 2], output_len=5, warmup=1, iters=2)
    pairs = [(3, 1), (3, 2), (40, 1), (40, 2)]
    assert [(p["input_len"], p["batch_size"]) for p in points] == pairs
    assert calls == [(length, rows, 5) for length, rows in pairs for _ in range(3)]
    for point in points:
        assert point["prefill_tokens_per_second"] > 0 and point["decode_tokens_per_second"] > 0
        # an interpreter that has torch loaded, and not the wrong unit
        assert 100 * 2**20 < point["peak_bytes"] < 50 * 2**30


@pytest.mark.skipif(not memory.STATUS.exists(), reason="no /proc")
def test_the_peak_is_of_this_program_alone(make_hybrid, monkeypatch):
    # what Linux reports of a process that took 1 TiB before it executed this one
    usage = SimpleNamespace(ru_maxrss=2**30)
    monkeypatch.setattr(memory.resource, "getrusage", lambda _: usage)
    (point,) = measure(make_hybrid(MIXERS), [4], [1])
    assert 100 * 2**20 < point["peak_bytes"] < 50 * 2**30
    monkeypatch.setattr(memory, "STATUS", memory.STATUS / "missing")
    (point,) = measure(make_hybrid(MIXERS), [4], [1])
    assert point["peak_bytes"] >= 2**30


def test_rates_are_tokens_of_all_rows_per_second(make_hybrid, monkeypatch):
    seconds = iter([9.0, 2.0, 4.0, 8.0])

    class Timed(Engine):
        def generate(self, prompts, params, **kwargs):
            output = super().generate(prompts, params, **kwargs)
            taken = next(seconds)
            output.stats.seconds = Counter(prefill=taken, verify=taken / 2)
            return output

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Timed)
    model = make_hybrid(MIXERS)
    (point,) = measure(model, [11], [3], output_len=4, warmup=1, iters=3)
    # the median run reads 3 x 11 tokens in 4 s, which gives three, and writes 3 x 3 more in 2 s
    assert point["prefill_tokens_per_second"] == pytest.approx(33 / 4)
    assert point["decode_tokens_per_second"] == pytest.approx(9 / 2)
    # four bytes a number, halfway through the answer
    allowed = limit(model.config, BANDWIDTH, 4, batch=3, context=11 + 2, kv_bytes=4)
    assert point["decode_byte_limit"] == pytest.approx(allowed)
    assert point["decode_share"] == pytest.approx(4.5 / allowed)


def test_cache_bytes_are_those_of_the_layers(make_hybrid):
    attention = make_hybrid(["attention"] * 2)
    (short, long) = measure(attention, [64, 128], [2], output_len=1)
    # 2 layers, keys and values, 2 rows, 2 heads of 16 in fp32
    assert short["cache_bytes"] == 2 * 2 * 2 * 2 * 16 * 4 * 64
    assert long["cache_bytes"] == 2 * short["cache_bytes"]
    recurrent = make_hybrid(["mamba2"] * 2)
    (short, long) = measure(recurrent, [64, 128], [2], output_len=1)
    assert 0 < short["cache_bytes"] == long["cache_bytes"]


@pytest.mark.parametrize("kernels", ["reference", ""])
def test_the_same_prompt_is_read_once(make_hybrid, monkeypatch, kernels):
    monkeypatch.setenv("MAMBACTL_KERNELS", kernels)
    model, read = make_hybrid(MIXERS), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    (apart,) = measure(model, [100], [3])
    before = sum(map(torch.numel, read))
    (point,) = measure(model, [100], [3], same_prompt=True)
    again = sum(map(torch.numel, read)) - before
    assert before >= 3 * 100 and 99 + 3 <= again < 2 * 100
    assert point["decode_tokens_per_second"] > 0
    assert point["cache_bytes"] == apart["cache_bytes"]
    assert point["prefill_tokens_per_second"] is point["first_token_ms"] is None
    assert list(point["intervals"]) == ["decode_tokens_per_second"]


def test_one_token_prompts_have_rates_too(make_hybrid):
    (point,) = measure(make_hybrid(MIXERS), [1], [1])
    assert point["prefill_tokens_per_second"] > 0
    assert point["decode_tokens_per_second"] > 0


def test_a_pair_that_does_not_fit_is_left_empty(make_hybrid, monkeypatch):
    class Small(Engine):
        def generate(self, prompts, params, **kwargs):
            if len(prompts) > 1:
                raise torch.OutOfMemoryError("no")
            return super().generate(prompts, params, **kwargs)

    monkeypatch.setenv("MAMBACTL_KERNELS", "reference")
    monkeypatch.setattr(backend, "Engine", Small)
    one, two = measure(make_hybrid(MIXERS), [4], [1, 2])
    assert one["decode_tokens_per_second"] > 0
    assert [two[name] for name in NUMBERS] == [None] * len(NUMBERS)


def test_only_an_engine_with_graphs_tells_of_them(make_hybrid):
    assert graph_numbers(Engine(make_hybrid(MIXERS))) == {}
    capture = SimpleNamespace(graphs=6, compile_seconds=3.0, capture_seconds=0.5)
    engine = SimpleNamespace(sessions={4: SimpleNamespace(capture=capture)})
    assert graph_numbers(engine, "x_") == {
        "x_launches_per_step": 1,
        "x_captures": 6,
        "x_capture_seconds": 0.5,
    }
