"""The end of a decode step on a GPU: see `kernels.decode.reference.control`."""

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.reference.control import Field, Finish, Letter
from mambactl.kernels.launch import gdc_launch_dependents, gdc_wait, launch_options

LENGTH, ACTIVE, BASE, NEXT, DRAFT_BASE, DRAFT_NEXT, BUDGET, WRITTEN, STEP = (
    tl.constexpr(int(field)) for field in Field
)
ACCEPTED, DRAFTED, EMITTED, FINISH = (tl.constexpr(int(letter)) for letter in Letter)
LETTERS = tl.constexpr(len(Letter))
RUNNING, EOS, SPENT, IDLE = (tl.constexpr(int(finish)) for finish in Finish)


@triton.jit
def _next_store(begin, base, span, limit):
    lazy = tl.where((begin - base + 2 * span + 3 > limit) & (begin > base), begin, base)
    return tl.where(limit == 0, begin + 1, lazy)


@triton.jit
def _commit_kernel(
    control, feed, history, accepted, following, drafted, eos, mailbox, n_eos, k, B, feed_stride,
    history_stride, depth, letter_size, span, limit, draft_limit, COUNTED: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    field = control + b
    step = tl.load(field + STEP * B)
    letter = mailbox + (step % depth * B + b) * letter_size
    tl.store(field + STEP * B, step + 1)
    if tl.load(field + ACTIVE * B) == 0:
        tl.store(letter + EMITTED, 0)
        tl.store(letter + FINISH, IDLE)
        return
    n = tl.load(accepted + b)
    held = tl.load(field + LENGTH * B)
    budget = tl.load(field + BUDGET * B)
    last = tl.load(following + b)
    row = feed + b * feed_stride
    newest = tl.load(row + 1 + n)
    i = tl.arange(0, WIDE)
    new = tl.load(row + 2 + i, mask=i < n, other=0)
    new = tl.where(i == n, last, new)  # [WIDE], the first n + 1 count
    ended = i < 0
    for e in range(n_eos):
        ended = ended | (new == tl.load(eos + e))
    first_end = tl.min(tl.where(ended & (i <= n), i, WIDE))
    emitted = tl.minimum(budget, tl.minimum(first_end, n) + 1)
    finish = tl.where(emitted == budget, SPENT, RUNNING)
    finish = tl.where(emitted == first_end + 1, EOS, finish)
    tl.store(letter + ACCEPTED, n)
    if COUNTED:
        tl.store(letter + DRAFTED, tl.load(drafted + b))
    else:
        tl.store(letter + DRAFTED, k)
    tl.store(letter + EMITTED, emitted)
    tl.store(letter + FINISH, finish)
    tl.store(letter + LETTERS + i, new, mask=i <= n)
    place = held + 1 + i
    tl.store(history + b * history_stride + place, new, mask=(i <= n) & (place < history_stride))
    tl.store(row, newest)
    tl.store(row + 1, last)
    length = held + n + 1
    base, draft_base = tl.load(field + NEXT * B), tl.load(field + DRAFT_NEXT * B)
    tl.store(field + LENGTH * B, length)
    tl.store(field + BUDGET * B, budget - emitted)
    tl.store(field + WRITTEN * B, tl.load(field + WRITTEN * B) + emitted)
    tl.store(field + ACTIVE * B, tl.where(finish == RUNNING, 1, 0))
    tl.store(field + BASE * B, base)
    tl.store(field + DRAFT_BASE * B, draft_base)
    tl.store(field + NEXT * B, _next_store(length, base, span, limit))
    tl.store(field + DRAFT_NEXT * B, _next_store(length - 1, draft_base, span, draft_limit))


def commit(
    control: Tensor, feed: Tensor, history: Tensor, accepted: Tensor, following: Tensor,
    drafted: Tensor | None, eos: Tensor, mailbox: Tensor, k: int, *, span: int, limit: int,
    draft_limit: int, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.control.commit`."""
    depth, batch, letter_size = mailbox.shape
    _commit_kernel[(batch,)](
        control, feed, history, accepted, following, accepted if drafted is None else drafted,
        eos, mailbox, len(eos), k, batch, feed.stride(0), history.stride(0), depth, letter_size,
        span, limit, draft_limit, COUNTED=drafted is not None,
        WIDE=triton.next_power_of_2(feed.shape[1]), PDL=pdl, **launch_options(pdl, num_warps=1),
    )  # fmt: skip
