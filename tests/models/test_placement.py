"""Devices of a stage that is one of several processes."""

import pytest
import torch

from mambactl.errors import ResourceError, UsageError
from mambactl.options import SftConfig
from mambactl.ranks import placement


@pytest.fixture
def third_of_four(monkeypatch) -> list[int]:
    """This process is the third of four on the second machine; returns the GPUs made current."""
    chosen: list[int] = []
    for name, value in {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return chosen


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_the_gpu_of_its_number(third_of_four, device):
    assert placement(SftConfig(device=device)) == (torch.device("cuda:2"), torch.bfloat16)
    assert third_of_four == [2]


def test_processes_on_a_cpu_share_it(third_of_four):
    assert placement(SftConfig(device="cpu")) == (torch.device("cpu"), torch.float32)
    assert third_of_four == []


def test_what_cannot_be_shared_is_a_sentence(third_of_four, monkeypatch):
    with pytest.raises(UsageError, match="8 processes cannot share cuda:1"):
        placement(SftConfig(device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ResourceError, match="no cuda:2 here"):
        placement(SftConfig(device="cuda"))
