"""The rate that decoding is judged by: the best of what was measured, before and after."""

import pytest
import torch

from mambactl.speed import bandwidth, conditions
from mambactl.speed.bandwidth import read_bandwidth

CPU = torch.device("cpu")


def test_the_bandwidth_of_this_machine() -> None:
    assert 1e8 < read_bandwidth("cpu", gigabytes=0.05, repeats=3) < 1e13


def test_the_fastest_run_of_the_fastest_way_counts(monkeypatch) -> None:
    seconds = iter([0.0, 4.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.5])
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += next(seconds)
        return now

    monkeypatch.setattr(bandwidth.time, "perf_counter", clock)
    # two ways, of each two runs
    rate = read_bandwidth("cpu", gigabytes=0.001, repeats=1)
    assert rate == pytest.approx(15 * bandwidth.ROW * 4 / 0.5)


@pytest.mark.parametrize(("after", "factor"), [(2e9, 2.0), (5e8, 1.0)])
def test_points_are_judged_by_the_higher_rate(monkeypatch, after: float, factor: float) -> None:
    monkeypatch.setattr(conditions, "read_bandwidth", lambda device: after)
    found = {"bandwidth_bytes_per_second": 1e9}
    whole = {"decode_byte_limit": 50.0, "decode_tokens_per_second": 51.0, "decode_share": 1.02}
    missing = {"decode_byte_limit": None, "decode_share": None}
    conditions.measured_again(found, CPU, [whole, missing])
    assert found["bandwidths_bytes_per_second"] == [1e9, after]
    assert found["bandwidth_bytes_per_second"] == max(1e9, after)
    assert whole["decode_byte_limit"] == 50.0 * factor
    assert whole["decode_share"] == pytest.approx(1.02 / factor)
    assert missing == {"decode_byte_limit": None, "decode_share": None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_reads_faster_than_the_ceiling() -> None:
    """A product of one row, the operation that decoding consists of, and a copy's reading half."""
    rate = read_bandwidth("cuda")
    weights = [torch.randn(28672, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for w in weights:
            torch.nn.functional.linear(x, w)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    assert sum(w.nbytes for w in weights) / min(seconds) < rate
    again = read_bandwidth("cuda")
    assert abs(again - rate) < 0.02 * rate
