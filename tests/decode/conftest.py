"""Statistics and tiny models that the decoding tests share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Pearson's chi-square test of counts [C] against probabilities [C]; cells expected below 5
    are pooled, and a count where the probability is zero gives 0.
    """
    counts, probs = counts.double().flatten(), probs.double().flatten()
    if counts[probs == 0].sum() > 0:
        return 0.0
    expected = probs / probs.sum() * counts.sum()
    rare = expected < 5
    observed, expected = (
        torch.cat([values[~rare], values[rare].sum()[None]]) for values in (counts, expected)
    )
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.double)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.fixture(name="p_value")
def _p_value() -> Callable[[Tensor, Tensor], float]:
    return p_value


@pytest.fixture
def ops() -> Callable:
    """ops(exact=False) -> the kernels of a GPU."""
    pytest.importorskip("triton")
    from mambactl.kernels.decode.triton.ops import TritonOps

    return lambda exact=False: TritonOps(exact)
