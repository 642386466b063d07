"""Cost of the text that a student writes while it trains: bytes from shapes, seconds by a probe."""

import time
from functools import cache

import torch

from mambactl.models.cache_bytes import session_bytes
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.session_size import SessionSize
from mambactl.options import DistillConfig
from mambactl.train.drawn_prompts import answers_at_most
from mambactl.train.job import Job
from mambactl.train.ledger import forward_flops

REPEATS = 3
# numbers that are read to find out how fast memory is
PROBED = {"cpu": 1 << 24, "cuda": 1 << 28}


def writing_bytes(
    job: Job, config: DistillConfig, student: HybridConfig, model: HybridForCausalLM
) -> dict[str, int]:
    """Most bytes of the copy that decodes and of its cache, both in the type of the run."""
    itemsize = job.dtype.itemsize
    size = SessionSize.holding(answers_at_most(config, 1), config.max_length, 0)
    return {
        "copy": itemsize * sum(p.numel() for p in model.parameters()),
        "cache": session_bytes(student, itemsize, size).total,
    }


def writing_seconds(
    job: Job,
    config: DistillConfig,
    student: HybridConfig,
    model: HybridForCausalLM,
    flops_per_second: float,
) -> float:
    """Seconds in which a batch is written if no answer ends early, reading prompts left out.

    A pass, which gives every row a token, takes as long as the weights take to be read, or as the
    operations of its rows; what launching them takes comes on top.
    """
    rows = answers_at_most(config, 1)
    weights = job.dtype.itemsize * sum(p.numel() for p in model.parameters())
    operations = rows * forward_flops(student, config.max_length)
    each = max(weights / _memory_rate(job.device), operations / flops_per_second)
    return config.onpolicy_tokens * each


@cache
def _memory_rate(device: torch.device) -> float:
    """Bytes of fp32 numbers that a device reads in a second."""
    numbers = torch.ones(PROBED.get(device.type, PROBED["cuda"]), device=device)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        # the number is waited for
        float(numbers.sum())
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds[1:])
