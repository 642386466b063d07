"""Prompt lookup on the device; one program scans one text."""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options

BLOCK = 1024


@triton.jit
def _ngram_kernel(
    history, lengths, drafts, n_drafted, S, draft_stride, WIDTH,
    PDL: tl.constexpr, LONGEST: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    text = history + b * S
    length = tl.load(lengths + b)
    # a longer match beats a later one: score = (tokens that match) * S + (index of the follower)
    best = tl.zeros([BLOCK], tl.int64)
    for start in range(1, length, BLOCK):
        follower = start + tl.arange(0, BLOCK)
        matched = tl.zeros([BLOCK], tl.int64)
        equal = follower < length
        for back in tl.static_range(1, LONGEST + 1):
            token = tl.load(text + length - back, mask=back <= length, other=0)
            inside = equal & (follower >= back)
            equal = inside & (tl.load(text + follower - back, mask=inside, other=0) == token)
            matched += equal.to(tl.int64)
        best = tl.maximum(best, tl.where(matched > 0, matched * S + follower, 0))
    score = tl.max(best, 0)
    # the last token of a full row is at S - 1, so no follower reaches S
    follower = score % S
    count = tl.where(score > 0, tl.minimum(length - follower, WIDTH), 0)
    lane = tl.arange(0, LANES)
    copied = tl.load(text + follower + lane, mask=lane < count, other=0)
    tl.store(drafts + b * draft_stride + lane, copied, mask=lane < WIDTH)
    tl.store(n_drafted + b, count)


def draft_ngram(
    history: Tensor,
    lengths: Tensor,
    drafts: Tensor,
    width: int,
    n_drafted: Tensor,
    *,
    longest: int = 3,
    pdl: bool = False,
) -> None:
    """Draft from the text itself; see `kernels.decode.reference.ngram.draft_ngram`."""
    _ngram_kernel[(history.shape[0],)](
        history,
        lengths,
        drafts,
        n_drafted,
        history.stride(0),
        drafts.stride(0),
        width,
        PDL=pdl,
        LONGEST=longest,
        LANES=triton.next_power_of_2(width),
        BLOCK=BLOCK,
        **launch_options(pdl, num_warps=8),
    )
