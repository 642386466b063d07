"""Operations of a pass over one token of one sequence, the common case of decoding on a CPU.

They compute what `kernels.decode.cpu.cpu_ops` computes for any rows. There, slots and rows are
indices that are gathered and scattered; here they are numbers that views begin at, which takes half
as many library calls, and calls are what a token costs beside its weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.kernels.decode.cpu.pass_rows import Rows
from mambactl.kernels.decode.operations import AttentionArguments
from mambactl.present import present


def convolve(
    rows: Rows, ring: Tensor, weight: Tensor, shift: Tensor, mixed: Tensor, at: int
) -> None:
    """SiLU(conv) of the newest projections of ring [1, R, C] to slot `at` of mixed [1, R, Ch]."""
    slots, there = rows.taps(ring.shape[1])
    seen = ring[0].index_select(0, slots[0])[:, : len(weight)]  # [4, Ch]
    if there is not None:
        seen = seen * there[0]
    torch.mul(seen, weight.T, out=seen)
    made = torch.sum(seen, 0).add_(shift)  # [Ch]
    mixed[0, at] = F.silu(made, inplace=True)


def write_heads(rows: Rows, y: Tensor, args: AttentionArguments, cos: Tensor, sin: Tensor) -> None:
    """Rotated queries of y [1, (H + 2 Hk) P] to args.q, keys and values to their slot."""
    kv_heads, width = args.keys.shape[1], args.keys.shape[3]
    y = y.view(-1, width)  # [H + 2 Hk, P]
    c, s = rows.angles(cos, sin)  # [1, 1, P]
    plain = y[:-kv_heads]
    rotated = plain * c[0]
    rotated.addcmul_(plain.roll(width // 2, -1), s[0])
    args.q.view(-1, width).copy_(rotated[:-kv_heads])
    at = rows.slot(args.sinks, args.ring)
    args.keys[0, :, at] = rotated[-kv_heads:]
    args.values[0, :, at] = y[-kv_heads:]


def attend(
    rows: Rows, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, window: int, sinks: int,
    ring: int,
) -> None:  # fmt: skip
    """softmax(q k^T / sqrt(P)) v for q and out [1, H P] and the cache [1, Hk, S, P]."""
    keys, values = keys[0], values[0]  # [Hk, S, P]
    kv_heads, _, width = keys.shape
    if ring == 0:
        end = present(rows.single) + 1
        keys, values = keys[:, :end], values[:, :end]
    hidden = rows.hidden(keys.shape[1], window, sinks, ring)  # [1, 1, 1, 1, S]
    query = q.view(kv_heads, -1, width)  # [Hk, G, P]
    if hidden is None:
        scores = torch.bmm(query, keys.mT).mul_(width**-0.5)  # [Hk, G, S]
    else:
        scores = torch.baddbmm(hidden[0, 0], query, keys.mT, alpha=width**-0.5)
    torch.bmm(scores.softmax(-1), values, out=out.view(kv_heads, -1, width))


def recur(
    at: int, ring: Tensor, mixed: Tensor, z: Tensor, state: Tensor, A: Tensor, D: Tensor,
    dt_bias: Tensor, gain: Tensor | None, eps: float, out: Tensor, heads: tuple[int, int, int],
) -> None:  # fmt: skip
    """One step of Mamba-2 on state [1, H, N, P] in place, from slot `at`; z and out [1, H P].

    `heads` are those of x and the groups of B and C.
    """
    H, N, P = state.shape[1:]
    n_x, n_b = heads[0] * P, heads[1] * N
    raw = mixed[0, at]  # [Ch]
    # a group of B or a head of x serves the state's heads that follow each other
    x = raw[:n_x].view(heads[0], 1, P).expand(-1, H // heads[0], -1).reshape(H, P)
    B = raw[n_x : n_x + n_b].view(heads[1], 1, N).expand(-1, H // heads[1], -1).reshape(H, N, 1)
    C = raw[n_x + n_b :].view(heads[2], 1, N).expand(-1, H // heads[2], -1).reshape(H, 1, N)
    dt = F.softplus(ring[0, at, len(raw) :] + dt_bias)[:, None]  # [H, 1]
    held = state[0]  # [H, N, P]
    held.mul_((dt * A[:, None]).exp_()[:, None]).addcmul_(B, (x * dt)[:, None])
    y = torch.bmm(C, held)[:, 0].addcmul_(D[:, None], x)  # [H, P]
    y.mul_(F.silu(z).view(H, P))
    if gain is not None:
        rate = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y.mul_(rate).mul_(gain.view(H, P))
    out.view(H, P).copy_(y)
