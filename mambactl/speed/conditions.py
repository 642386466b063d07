"""The conditions of a speed measurement, which its JSON begins with, and the rate that memory was
read at before and after it.
"""

import torch

from mambactl import console
from mambactl.json_values import JsonObject
from mambactl.options import StageConfig
from mambactl.report.results import machine
from mambactl.speed.bandwidth import read_bandwidth
from mambactl.speed.limits import Numbers, at_bandwidth


def conditions(
    config: StageConfig, device: torch.device, dtype: torch.dtype, **more: object
) -> JsonObject:
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


def measured_again(found: JsonObject, device: torch.device, points: list[Numbers]) -> None:
    """Measure the bandwidth once more and judge `points` by the higher of both, in place.

    It differs by a few % from one minute to the next, and a limit must not be too low.
    """
    before = found["bandwidth_bytes_per_second"]
    after = read_bandwidth(device)
    found["bandwidths_bytes_per_second"] = [before, after]
    if after > before:
        found["bandwidth_bytes_per_second"] = after
        for point in points:
            at_bandwidth(point, after / before)
