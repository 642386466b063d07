"""The conditions of a speed measurement, which its JSON begins with."""

from typing import Any

import torch

from mambactl import console
from mambactl.options import StageConfig
from mambactl.report.results import machine
from mambactl.speed.bandwidth import read_bandwidth


def conditions(
    config: StageConfig, device: torch.device, dtype: torch.dtype, **more: Any
) -> dict[str, Any]:
    """Machine, versions, date, type of the weights, read bandwidth and options; logs the bandwidth.

    `more` are options that no field of `config` holds.
    """
    bandwidth = read_bandwidth(device)
    found = machine(device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "bandwidth_bytes_per_second": bandwidth,
        "config": config.model_dump(mode="json") | more,
    }
    console.log(f"{found['device']} reads {bandwidth / 1e9:,.0f} GB/s")
    return found
