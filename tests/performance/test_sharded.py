"""The script that measures split training runs, on shapes small enough for a CPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.performance import communication
from tests.performance.communication import shares
from tests.performance.sharded import PARTS, options_of
from tests.performance.sharded_steps import measure


def test_a_part_is_checked_and_measured() -> None:
    words = "--model tiny-hybrid --check tiny-hybrid --device cpu --dtype float32 --rows 1"
    found = measure(
        options_of([*words.split(), "--parts=align-mixers,logits-whole", "--length=32"])
    )
    assert found["processes"] == 1
    assert all(part["loss_error"] < 1e-4 for part in found["check"].values())
    for part in found["parts"].values():
        assert part["tokens_per_second"] > 0 < part["peak_bytes"] and not part["shared"]
        assert part["losses"][-1] < part["losses"][0]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        # a gap, and half of the exchange beside products
        ([("gemm", 0, 4), ("ncclDevKernel_AllGather", 2, 6), ("gemm", 8, 10)], (0.4, 0.2, 0.2)),
        # kernels that overlap count once
        ([("ncclA", 0, 5), ("ncclB", 1, 4), ("gemm", 5, 10)], (0.5, 0.5, 0.0)),
        ([("gemm", 0, 4), ("relu", 3, 8)], (0.0, 0.0, 0.0)),
    ],
)
def test_shares_of_communication(spans, expected) -> None:
    found = shares((name, (100.0 + start, 100.0 + end)) for name, start, end in spans)
    assert tuple(found.values()) == pytest.approx(expected)
    assert list(found) == ["busy", "alone", "idle"]


def test_kernels_of_a_gpu_are_told_from_calls_and_annotations(monkeypatch) -> None:
    kinds = torch.autograd.DeviceType

    def event(name: str, start: int, end: int, kind=kinds.CUDA, annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, time_range=span, device_type=kind, is_user_annotation=annotation
        )

    events = [
        event("cudaLaunchKernel", 0, 50, kinds.CPU),
        event("nccl:all_reduce", 0, 90, annotation=True),
        event("gemm", 10, 16),
        event("ncclDevKernel_AllReduce_Sum_f32", 16, 20),
    ]
    seen = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(communication, "profile", lambda activities: seen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    taken: list[int] = []
    found = communication.communication(lambda: taken.append(1), 2, torch.device("cuda"))
    assert found == {"steps": 2, "busy": 0.4, "alone": 0.4, "idle": 0.0} and len(taken) == 2
    events.clear()
    found = communication.communication(lambda: taken.append(1), 1, torch.device("cuda"))
    assert found.keys() == {"why"} and len(taken) == 3


def test_what_all_processes_keep_is_chosen_by_part() -> None:
    assert options_of(["--together"]).together == list(PARTS)
    assert options_of(["--together=logits-mixers"]).together == ["logits-mixers"]
    assert options_of([]).together == []
    with pytest.raises(SystemExit):
        options_of(["--together=logitz"])
