"""Mamba-2 and the attentions beside it in one launch, because a launch costs more than the work.

The programs are those of `mamba2_step` or `mamba2_closed`, and `decode_attention`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.kernels.decode.triton.decode_attention import attend_program, attention_sizes
from mambactl.kernels.decode.triton.mamba2_closed import closed_program, closed_sizes
from mambactl.kernels.decode.triton.mamba2_step import grouped_norm, mamba2_program, mamba2_sizes
from mambactl.kernels.launch import gdc_launch_dependents, launch_options

BLOCK_K = 64


@triton.jit
def _attend_at(
    pid, tiles, batch, q, keys, values, start, count, out, partial, counter, scale, T, offset, S,
    HK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, LOG2_SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, COMBINE_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program `pid` of an attention."""
    row = pid // SPLITS
    tickets = HK * tiles
    attend_program(
        pid % SPLITS, row % tickets // HK, row % HK, row // tickets, batch, tickets, q, keys,
        values, start, count, out, partial, counter, scale, T, offset, S, HK, G, P, LOG2_SCALE,
        WINDOW, SINKS, RING, SPLITS, BLOCK_R, BLOCK_K, BLOCK_P, COMBINE_R, PDL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "offset", "scale"])
def _beside_kernel(
    ring, mixed, z, state, A, D, dt_bias, gain, eps, out, start, count, base, base_next, T, offset,
    scale, width, batch, pieces,
    q0, keys0, values0, out0, partial0, counter0, slots0, tiles0,
    q1, keys1, values1, out1, partial1, counter1, slots1, tiles1,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, XH: tl.constexpr, BG: tl.constexpr,
    CG: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, LOG2_SCALE: tl.constexpr, HEAD_P: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HK0: tl.constexpr, G0: tl.constexpr, WINDOW0: tl.constexpr, SINKS0: tl.constexpr,
    RING0: tl.constexpr, SPLITS0: tl.constexpr, BLOCK_R0: tl.constexpr, COMBINE_R0: tl.constexpr,
    CLOSED: tl.constexpr, LEN: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    HK1: tl.constexpr, G1: tl.constexpr, WINDOW1: tl.constexpr, SINKS1: tl.constexpr,
    RING1: tl.constexpr, SPLITS1: tl.constexpr, BLOCK_R1: tl.constexpr, COMBINE_R1: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    # programs of the first attention, of the second (HK1 = 0: there is none), of the recurrence
    pid = tl.program_id(0)
    behind0 = pid - SPLITS0 * HK0 * tiles0 * batch
    behind1 = behind0 - SPLITS1 * HK1 * tiles1 * batch
    if behind0 < 0:
        _attend_at(
            pid, tiles0, batch, q0, keys0, values0, start, count, out0, partial0, counter0, scale,
            T, offset, slots0, HK0, G0, HEAD_P, LOG2_SCALE, WINDOW0, SINKS0, RING0, SPLITS0,
            BLOCK_R0, BLOCK_K, BLOCK_P, COMBINE_R0, PDL,
        )  # fmt: skip
    elif behind1 < 0:
        if HK1 > 0:
            _attend_at(
                behind0, tiles1, batch, q1, keys1, values1, start, count, out1, partial1, counter1,
                scale, T, offset, slots1, HK1, G1, HEAD_P, LOG2_SCALE, WINDOW1, SINKS1, RING1,
                SPLITS1, BLOCK_R1, BLOCK_K, BLOCK_P, COMBINE_R1, PDL,
            )  # fmt: skip
    elif CLOSED:
        closed_program(
            behind1 // pieces % H, behind1 // pieces // H, behind1 % pieces, ring, mixed, z, state,
            A, D, dt_bias, gain, eps, out, start, count, base, base_next, T, offset, scale, width,
            H, P, N, XH, BG, CG, SLOTS, NORM, LEN, ROWS, BP, BN, STAGES, PDL,
        )  # fmt: skip
    else:
        mamba2_program(
            behind1 // pieces % H, behind1 // pieces // H, behind1 % pieces, ring, mixed, z, state,
            A, D, dt_bias, gain, eps, out, start, count, base, base_next, T, offset, scale, width,
            H, P, N, XH, BG, CG, SLOTS, NORM, BP, BN, PDL,
        )  # fmt: skip


def mamba2_beside(
    ring: Tensor, mixed: Tensor, z: Tensor, state: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
    gain: Tensor | None, eps: float, out: Tensor, start: Tensor, count: Tensor, base: Tensor,
    base_next: Tensor, scale: int, *, T: int, offset: int, x_heads: int, b_groups: int,
    c_groups: int, beside: Sequence[AttentionArguments], closed: bool, pdl: bool,
) -> None:  # fmt: skip
    """See `kernels.decode.reference.recurrent.mamba2_segment`; one or two attentions `beside`.

    `closed` chooses the closed form of the recurrence.
    """
    batch, heads, _, _ = state.shape
    form = (ring, state, gain, x_heads, b_groups, c_groups)
    if closed:
        pieces, warps, sizes = closed_sizes(*form)
    else:
        (pieces, sizes), warps = mamba2_sizes(*form), 4
        sizes |= {"LEN": 0, "ROWS": 0, "STAGES": 0}
    inside = sizes["NORM"]
    programs, pointers = heads * batch * pieces, []
    for number, args in enumerate(_two(beside)):
        tiles, own = attention_sizes(
            args.keys, args.q.shape[1], T, args.splits, args.window, args.sinks, args.ring, BLOCK_K
        )
        there = number < len(beside)
        programs += args.splits * args.keys.shape[1] * tiles * batch * there
        pointers += [*args[:6], args.keys.shape[2], tiles]
        own["HK"] *= there
        shared = {"HEAD_P": own.pop("P"), **{name: own.pop(name) for name in _SHARED}}
        sizes |= shared | {f"{name}{number}": size for name, size in own.items()}
    stages = 3 if ring.element_size() == 2 else 2
    _beside_kernel[(programs,)](
        ring, mixed, z, state, A, D, dt_bias, gain if inside else A, eps, out, start, count, base,
        base_next, T, offset, scale, ring.shape[2], batch, pieces, *pointers, CLOSED=closed,
        PDL=pdl, **sizes, **launch_options(pdl, num_warps=warps, num_stages=stages),
    )  # fmt: skip
    if gain is not None and not inside:
        grouped_norm(out, gain, eps, heads, pdl=pdl)


_SHARED = ("LOG2_SCALE", "BLOCK_P", "BLOCK_K")


def _two(beside: Sequence[AttentionArguments]) -> tuple[AttentionArguments, AttentionArguments]:
    """The first and the last attention, which may be one."""
    return beside[0], beside[-1]
