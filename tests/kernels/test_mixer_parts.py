"""Norms within groups and x_proj of a decode pass: Triton against the reference, and that in fp64.

Tolerances are those of `kernels.products.close`.
"""

import math

import pytest
import torch
from kernels.products import KINDS, NAN, REFERENCE, close, same
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels.decode.reference.linear import segment_positions  # noqa: E402
from mambactl.kernels.decode.triton.ops import TritonOps  # noqa: E402

pytestmark = pytest.mark.one_in(3)

SLOTS = 16


@pytest.fixture(scope="module")
def ops(device) -> TritonOps:
    return TritonOps()


def ints(*values: int, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width", "groups"), [(1, 48, 1), (5, 72, 3), (2, 96, 8)])
def test_grouped_norm(ops, device, kind, rows, width, groups) -> None:
    g = torch.Generator().manual_seed(width)
    y, gain = (torch.randn(n, width, generator=g).to(device, kind) for n in (rows, 1))
    if rows > 1:
        y[1] = NAN
    actual, expected = y.clone(), y.clone()
    ops.grouped_norm(actual, gain[0], 1e-5, groups)
    REFERENCE.grouped_norm(expected, gain[0], 1e-5, groups)
    close(actual, expected, kind)
    parts = y.double().view(rows, groups, -1)
    rms = (parts.norm(dim=2, keepdim=True) ** 2 * groups / width + 1e-5).sqrt()
    close(expected, (parts / rms).flatten(1) * gain.double(), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "columns", "batch", "T"),
    [
        (72, 19, 1, 1), (40, 11, 2, 1), (72, 13, 3, 2), (600, 7, 2, 5), (2050, 5, 2, 3),
        (48, 21, 3, 6),
    ],
)  # fmt: skip
def test_mamba1_low(ops, device, kind, channels, columns, batch, T) -> None:
    """Against fp64 too; up to 16 rows one after the other, and by the library."""
    g = torch.Generator().manual_seed(channels)
    mixed = torch.randn(batch * T, channels, generator=g).to(device, kind)
    w = (torch.randn(columns, channels, generator=g) / math.sqrt(channels)).to(device, kind)
    start, count = ints(2, 30, 18, device=device)[-batch:], ints(1, 1, 0, device=device)[:batch]
    for offset in (0, -3):
        at, real = segment_positions(start, count, T, T=T, offset=offset)
        rows = torch.full((batch, SLOTS, channels), NAN, dtype=kind, device=device)
        for b, t in real.nonzero().tolist():
            rows[b, int(at[b, t]) % SLOTS] = mixed[b * T + t]
        results = []
        for one in (ops, REFERENCE):
            low = torch.full((batch, SLOTS, columns), NAN, dtype=kind, device=device)
            one.mamba1_low(rows, w, low, start, count, T, T=T, offset=offset)
            results.append(low)
        exact = torch.full((batch, SLOTS, columns), NAN, dtype=torch.float64)
        for b, t in real.nonzero().tolist():
            exact[b, int(at[b, t]) % SLOTS] = w.double().cpu() @ mixed[b * T + t].double().cpu()
        close(*results, kind)
        close(results[1], exact, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_mamba1_low_is_bitwise_the_same_alone_and_among_sixteen(ops, device, kind) -> None:
    g = torch.Generator().manual_seed(4)
    mixed = torch.randn(16, SLOTS, 72, generator=g).to(device, kind)
    w = torch.randn(9, 72, generator=g).to(device, kind)
    start, one = (torch.arange(16, dtype=torch.int32, device=device) for _ in range(2))
    one = torch.ones_like(one)
    whole, part = (torch.full((16, SLOTS, 9), NAN, dtype=kind, device=device) for _ in range(2))
    ops.mamba1_low(mixed, w, whole, start, one, 1, T=1, offset=0)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 13), slice(13, 16)):
        ops.mamba1_low(mixed[rows], w, part[rows], start[rows], one[rows], 1, T=1, offset=0)
    same(part, whole)
