"""Decode attention against a dense softmax in fp64, one query at a time.

Errors are bounded element by element by A, the same average of |v| instead of v. fp32: 2e-6 of
the largest A. bf16: 2^-8 A for the rounded weights and 2^-8 |y| for the rounded result (half an
ulp each), and the fp32 term on top.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from mambactl.kernels.decode.reference import decode_attention as reference  # noqa: E402
from mambactl.kernels.decode.triton import decode_attention as kernel  # noqa: E402

pytestmark = pytest.mark.one_in(6)

NAN = float("nan")


class Case(NamedTuple):
    """Arguments of `decode_attention` with NaN wherever nothing valid stands."""

    q: Tensor
    keys: Tensor
    values: Tensor
    start: Tensor
    count: Tensor
    scale: int
    T: int
    offset: int = 0

    @property
    def n_new(self) -> list[int]:
        return (self.count * self.scale).tolist()

    def segment(self, first: int, length: int) -> "Case":
        """The same tokens with only rows first .. first + length of every sequence."""
        q = self.q.unflatten(0, (-1, self.T))[:, first : first + length].flatten(0, 1)
        n_new = (self.count * self.scale - first).clamp(0, length)
        slot = torch.arange(self.keys.shape[2], device=q.device)
        later = (slot >= (self.start + first + n_new)[:, None])[:, None, :, None]
        keys, values = (x.masked_fill(later, NAN) for x in (self.keys, self.values))
        return Case(q.contiguous(), keys, values, self.start + first, n_new, 1, length)


def draw(
    device,
    starts,
    counts,
    T=1,
    scale=1,
    heads=4,
    kv_heads=2,
    P=64,
    kind=torch.float32,
    seed=0,
    offset=0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    B, slots = len(starts), max(starts) + T + 5
    q = 2 * torch.randn(B, T, heads * P, generator=g)
    keys, values = torch.randn(2, B, kv_heads, slots, P, generator=g)
    for b in range(B):
        end = max(starts[b] + offset + counts[b] * scale, 0)
        q[b, counts[b] * scale :] = NAN
        q[b, : max(-starts[b] - offset, 0)] = NAN
        keys[b, :, end:] = NAN
        values[b, :, end:] = NAN
    start, count = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, counts))
    q, keys, values = (x.to(device, kind) for x in (q.flatten(0, 1), keys, values))
    return Case(q, keys, values, start, count, scale, T, offset)


def run(function, case: Case, splits=1, window=0, block_k=16, partial=None) -> Tensor:
    """The output [B, T, H, P], which held NaN before; checks that the counter is zero again."""
    B, Hk, _, P = case.keys.shape
    rows = case.T * case.q.shape[1] // (Hk * P)
    size = kernel.partial_shape(B, Hk, rows, P, splits)
    if partial is None:
        partial = torch.full(size, NAN, device=case.q.device)
    assert partial.numel() >= size[0]
    shape = kernel.counter_shape(B, Hk, rows)
    counter = torch.zeros(shape, dtype=torch.int32, device=case.q.device)
    out = torch.full_like(case.q, NAN)
    function(
        case.q, case.keys, case.values, case.start, case.count, case.scale, out, partial, counter,
        T=case.T, splits=splits, window=window, block_k=block_k, offset=case.offset,
    )  # fmt: skip
    assert not counter.any()
    return out.view(B, case.T, -1, P)


def dense(case: Case, window=0) -> tuple[Tensor, Tensor]:
    """y and A [B, T, H, P] in fp64; NaN in rows that are not used."""
    keys, values = case.keys.double(), case.values.double()
    (B, Hk, _, P), T = keys.shape, case.T
    q = case.q.double().view(B, T, -1, P)
    group = q.shape[2] // Hk
    y, size = torch.full_like(q, NAN), torch.full_like(q, NAN)
    for b, t, h in ((b, t, h) for b in range(B) for t in range(T) for h in range(q.shape[2])):
        last = int(case.start[b]) + case.offset + t
        if t >= case.n_new[b] or last < 0:
            continue
        seen = slice(max(last - window + 1, 0) if window else 0, last + 1)
        weight = (keys[b, h // group, seen] @ q[b, t, h] / math.sqrt(P)).softmax(0)
        y[b, t, h] = weight @ values[b, h // group, seen]
        size[b, t, h] = weight @ values[b, h // group, seen].abs()
    return y, size


def check(actual: Tensor, case: Case, window=0) -> None:
    y, size = dense(case, window)
    live = ~y.isnan()
    assert torch.equal(~actual.isnan(), live), "an unused row was written, or a used one is NaN"
    if not live.any():
        return
    bound = 2e-6 * size[live].max()
    if actual.dtype == torch.bfloat16:
        bound = bound + 2**-8 * (size[live] + y[live].abs())
    excess = ((actual.double() - y)[live].abs() / bound).max()
    assert excess <= 1, f"error {excess:.2f} times the bound"


@pytest.mark.parametrize("function", [reference.decode_attention, kernel.decode_attention])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_every_window_length(device, function, kind, splits) -> None:
    for T in range(1, 7):
        starts, counts = [42 - 7 * T, 25 * T - 20, 0], [T - T // 3, T, T // 2]
        heads = {"heads": 3, "kv_heads": 1}
        case = draw(device, starts, counts, T, **heads, kind=kind, P=16, seed=10 * splits + T)
        check(run(function, case, splits), case)


@pytest.mark.parametrize("block_k", [16, 32])
@pytest.mark.parametrize("splits", [1, 4])
def test_every_kind_of_cache_length(device, block_k, splits) -> None:
    starts = [0, 1, 13, 14, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 149]
    case = draw(device, starts, [2] * 14 + [0], T=2, heads=2, kv_heads=1, P=16, seed=block_k)
    check(run(kernel.decode_attention, case, splits, block_k=block_k), case)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (8, 1)])
@pytest.mark.parametrize("P", [48, 64, 128])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_groups_of_heads_and_head_dims(device, heads, kv_heads, P, kind) -> None:
    case = draw(device, [70, 0], [1, 1], 3, 3, heads, kv_heads, P, kind, seed=heads + P)
    check(run(kernel.decode_attention, case, 2, block_k=64), case)


@pytest.mark.parametrize(("heads", "T"), [(8, 9), (4, 9), (4, 17), (1, 17)])
@pytest.mark.parametrize("splits", [1, 4])
def test_windows_of_more_than_one_tile(device, heads, T, splits) -> None:
    case = draw(device, [37, 3, 9], [T, T - 2, 0], T, heads=heads, kv_heads=1, P=16, seed=T)
    check(run(kernel.decode_attention, case, splits), case)


@pytest.mark.parametrize("window", [1, 16, 33, 500])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_sliding_window(device, window, splits) -> None:
    case = draw(device, [90, 0, 15], [1, 1, 1], 5, 5, heads=2, kv_heads=1, P=16, seed=window)
    check(run(reference.decode_attention, case, window=window), case, window)
    check(run(kernel.decode_attention, case, splits, window), case, window)


@pytest.mark.parametrize("function", [reference.decode_attention, kernel.decode_attention])
@pytest.mark.parametrize("offset", [-3, -1, 2])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [0, 7])
def test_windows_that_begin_elsewhere(device, function, offset, splits, window) -> None:
    """Also before slot 0, where rows are padding; a window may lie there as a whole."""
    for T in (1, 2, 5):
        starts, counts = [0, 1, 17, 40], [T, T, T, 0]
        case = draw(device, starts, counts, T, heads=2, kv_heads=1, P=16, seed=T, offset=offset)
        check(run(function, case, splits, window), case, window)


@pytest.mark.parametrize("scale", [1, 4])
def test_counts_times_scale_and_sequences_that_ended(device, scale) -> None:
    case = draw(device, [20, 33, 50], [0, 4 // scale, 0], 4, scale, P=16)
    check(run(kernel.decode_attention, case, 4), case)
    ended = draw(device, [20, 33], [0, 0], 4, scale, P=16)
    assert run(kernel.decode_attention, ended, 4).isnan().all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [0, 20])
def test_a_row_comes_out_the_same_however_tokens_are_grouped(device, kind, splits, window) -> None:
    def one(case: Case) -> Tensor:
        return run(kernel.decode_attention, case, splits, window)

    # the new tokens cross a border between blocks, so that some rows miss the last block
    case = draw(device, [14, 46, 0], [6, 3, 2], 6, heads=2, kv_heads=1, kind=kind, seed=splits)
    whole = one(case)
    check(whole, case, window)
    for cuts in ([1] * 6, [4, 2]):
        firsts = [sum(cuts[:i]) for i in range(len(cuts))]
        pieces = [one(case.segment(a, n)) for a, n in zip(firsts, cuts, strict=True)]
        assert torch.equal(torch.cat(pieces, 1).nan_to_num(9e9), whole.nan_to_num(9e9))


def test_a_row_does_not_depend_on_the_other_sequences(device) -> None:
    starts, counts = [70, 3, 31], [3, 2, 1]
    case = draw(device, starts, counts, 3, P=64)
    both = run(kernel.decode_attention, case, 4)
    for b in range(3):
        q = case.q.view(3, 3, -1)[b]
        alone = Case(q, *(x[b : b + 1] for x in case[1:5]), 1, 3)
        actual = run(kernel.decode_attention, alone, 4)
        assert torch.equal(actual[0, : counts[b]], both[b, : counts[b]])


def test_partial_results_of_an_earlier_launch_do_not_matter(device) -> None:
    """One buffer, made for the longest window, for launches of other shapes."""
    partial = torch.full(kernel.partial_shape(3, 2, 12, 16, 16), NAN, device=device)
    for seed, (T, splits, start) in enumerate([(6, 4, 60), (1, 16, 20), (4, 2, 0)]):
        case = draw(device, [start, 5, 9], [T, 0, 1], T, P=16, seed=seed)
        first = run(kernel.decode_attention, case, splits, partial=partial)
        check(first, case)
        for junk in (NAN, 1e30):
            partial.fill_(junk)
            again = run(kernel.decode_attention, case, splits, partial=partial)
            assert torch.equal(first.nan_to_num(9e9), again.nan_to_num(9e9))


def test_scores_of_any_size(device) -> None:
    """Neither an overflow nor a row that loses all it had seen before."""
    case = draw(device, [80], [3], 3, P=16)
    case.keys.mul_(1e4)
    for splits in (1, 4):
        check(run(kernel.decode_attention, case, splits), case)
