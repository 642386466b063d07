"""The definition of correct for every recurrent kernel, in plain differentiable PyTorch.

Mamba-2 (SSD, arXiv 2405.21060), per head with scalar decay:
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          S in [P, N]
    y_t = S_t C_t
Mamba-1 (selective scan, arXiv 2312.00752), per channel d and state index n:
    S_t[d, n] = exp(dt_t[d] A[d, n]) S_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]
    y_t[d] = sum_n C_t[n] S_t[d, n]
Rotary positions (RoFormer, arXiv 2104.09864) rotate queries and keys, and B and C of rotary states:
what a state returns for C_t of B_s then depends on t - s as the teacher's scores do.
What stands around them is here as well: `rms_norm`, `swiglu`, and the skip D x, gate and norm of a
Mamba-2 mixer in `gated_norm`. Arithmetic of states is fp32 or, for fp64 input, fp64; states never
have less than fp32.

Letters: B batch, T tokens, H heads, P head dim, N state, G groups, Ch channels, W conv width.
`seq_idx` [B, T] numbers the documents of a packed row: states and convolutions reset where it
changes; what came before the row belongs to its first document. `n_new` [B] makes a batch ragged:
row b uses only its first n_new[b] tokens, and the state it returns is the state after those.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambactl.present import present

# what one step reads of each token, [B, T, ...] each: (x, dt, B) of the Mamba mixers
Records = tuple[Tensor, ...]
# (state, *records of one token, query or None) -> (output or None, next state)
Step = Callable[..., tuple[Tensor | None, Tensor]]
HALVES = (torch.bfloat16, torch.float16)


def state_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 input, otherwise fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    previous: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution as a sum of taps, so that any split in time rounds alike.

    x [B, T, Ch], weight [Ch, W], bias [Ch], previous [B, W-1, Ch]: inputs before x (zeros if None).
    """
    width, length = weight.shape[1], x.shape[1]
    if previous is None:
        previous = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat([previous.to(x.dtype), x], dim=1)  # [B, W-1+T, Ch]
    number = None if seq_idx is None else document_numbers(seq_idx)  # [B, T]
    y = x * weight[:, -1]  # [B, T, Ch]
    for back in range(1, width):
        tap = padded[:, width - 1 - back : width - 1 - back + length]  # [B, T, Ch]
        if number is not None:
            earlier = F.pad(number, (back, 0))[:, :length]  # [B, T]
            tap = tap.masked_fill((earlier != number)[..., None], 0)
        y = y + tap * weight[:, -1 - back]
    return y if bias is None else y + bias


def document_numbers(seq_idx: Tensor) -> Tensor:
    """Documents [B, T] counted from 0 along each row: a number in `seq_idx` may come back later."""
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))


def latest_inputs(x: Tensor, previous: Tensor, n_new: Tensor | None) -> Tensor:
    """The W-1 inputs [B, W-1, Ch] that precede the next token, after n_new tokens of x.

    Of a long x only those are read.
    """
    width, length = previous.shape[1], x.shape[1]
    previous = previous.to(x.dtype)
    if n_new is None or length == 0:
        newest = x[:, max(length - width, 0) :]
        return torch.cat([previous[:, newest.shape[1] :], newest], dim=1)
    at = n_new[:, None] + torch.arange(-width, 0, device=x.device)  # [B, W-1], in x
    own, earlier = (
        t.gather(1, index.clamp(0, t.shape[1] - 1)[..., None].expand(-1, -1, t.shape[2]))
        for t, index in ((x, at), (previous, at + width))
    )
    return torch.where((at >= 0)[..., None], own, earlier)


def mask_records(records: Records, n_new: Tensor | None) -> Records:
    """Records (x, dt, B) [B, T, ...] that leave a state as it is from token n_new on.

    dt = 0 does that; x and B become 0 too, because padding may hold NaN.
    """
    if n_new is None:
        return records
    padding = torch.arange(records[1].shape[1], device=n_new.device) >= n_new[:, None]  # [B, T]
    x, dt, B = (
        t.masked_fill(padding.view(*padding.shape, *[1] * (t.ndim - 2)), 0) for t in records
    )
    return x, dt, B


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Mamba-2 over a whole sequence in chunks (arXiv 2405.21060, section 6).

    x [B, T, H, P], dt [B, T, H] after softplus, A [H] negative, B and C [B, T, G, N] with G
    dividing H, initial_state [B, H, P, N], which belongs to the first document of each row.
    Returns y [B, T, H, P] and the final state [B, H, P, N].
    """
    kind = state_dtype(x)
    batch, length, heads, width = x.shape
    chunk = min(chunk_size, max(length, 1))
    n_chunks = max(-(-length // chunk), 1)
    pad = n_chunks * chunk - length
    x, B, C = (_chunks(t.to(kind), pad, n_chunks, heads) for t in (x, B, C))  # [B, c, H, L, ...]
    dt = _chunks(dt.to(kind)[..., None], pad, n_chunks, heads)[..., 0]  # [B, c, H, L]
    # fp64: a difference of two sums must stay exact after a token that forgets everything
    decay = (dt * A.to(kind)[:, None]).double().cumsum(3)  # [B, c, H, L], log since the chunk began
    documents, carried = _chunk_documents(seq_idx, batch, n_chunks, chunk, pad, x.device)

    y = _within_chunks(x, dt, B, C, decay, documents)  # [B, c, H, L, P]
    fresh = _chunk_states(x, dt, B, decay, documents)  # [B, c, H, P, N]
    state = x.new_zeros(batch, heads, width, B.shape[-1])
    if initial_state is not None:
        state = initial_state.to(kind)
    entering = []
    since = decay.to(kind).exp()  # [B, c, H, L]
    whole = since[..., -1] * carried[:, :, None, -1]  # [B, c, H], 0 where a document ended
    for c in range(n_chunks):
        entering.append(state)
        state = state * whole[:, c, :, None, None] + fresh[:, c]  # [B, H, P, N]
    into = since * carried[:, :, None]  # [B, c, H, L]
    y = y + (C @ torch.stack(entering, 1).mT) * into[..., None]
    return y.transpose(2, 3).reshape(batch, length + pad, heads, width)[:, :length], state


def _chunks(t: Tensor, pad: int, n_chunks: int, heads: int) -> Tensor:
    """[B, T, G, F] -> [B, c, H, L, F]: padded, cut in chunks, groups repeated to heads."""
    t = F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (n_chunks, -1)).transpose(2, 3)
    return t.repeat_interleave(heads // t.shape[2], dim=2)


def _chunk_documents(
    seq_idx: Tensor | None, batch: int, n_chunks: int, chunk: int, pad: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Documents per chunk [B, c, L], and where the entering state still counts [B, c, L]."""
    if seq_idx is None or seq_idx.shape[1] == 0:
        return None, torch.ones(batch, n_chunks, chunk, dtype=torch.bool, device=device)
    # padding belongs to the last document: its dt is 0, and the final state must pass it
    numbers = F.pad(document_numbers(seq_idx), (0, pad), mode="replicate")
    documents = numbers.view(batch, n_chunks, chunk)
    before = F.pad(documents[:, :-1, -1], (1, 0))  # [B, c], document of the entering state
    return documents, documents == before[..., None]


def _within_chunks(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, decay: Tensor, documents: Tensor | None
) -> Tensor:
    chunk = x.shape[3]
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()  # [L, S]
    if documents is not None:
        same = documents[..., :, None] == documents[..., None, :]  # [B, c, L, S]
        keep = (keep & same)[:, :, None]
    gap = (decay[..., :, None] - decay[..., None, :]).to(dt.dtype)  # [B, c, H, L, S]
    weight = gap.masked_fill(~keep, float("-inf")).exp() * dt[..., None, :]
    return ((C @ B.mT) * weight) @ x  # [B, c, H, L, P]


def _chunk_states(
    x: Tensor, dt: Tensor, B: Tensor, decay: Tensor, documents: Tensor | None
) -> Tensor:
    weight = (decay[..., -1:] - decay).to(dt.dtype).exp() * dt  # [B, c, H, L]
    if documents is not None:
        weight = weight * (documents == documents[..., -1:])[:, :, None]
    return (x * weight[..., None]).mT @ B  # [B, c, H, P, N]


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """One token of Mamba-2: state [B, H, P, N], x [B, H, P], dt [B, H], B and C [B, G, N].

    Returns y [B, H, P] (None without C) and the new state.
    """
    kind, heads = state.dtype, x.shape[1]
    dt = dt.to(kind)
    key = B.to(kind).repeat_interleave(heads // B.shape[1], dim=1)  # [B, H, N]
    kept = state * (dt * A.to(kind)).exp()[..., None, None]
    state = kept + (dt[..., None] * x.to(kind))[..., None] * key[:, :, None]  # [B, H, P, N]
    if C is None:
        return None, state
    query = C.to(kind).repeat_interleave(heads // C.shape[1], dim=1)  # [B, H, N]
    return (state * query[:, :, None]).sum(-1), state


def selective_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """One token of Mamba-1: state [B, Ch, N], x and dt [B, Ch], A [Ch, N], B and C [B, G, N].

    Channels split into G consecutive groups. Returns y [B, Ch] (None without C) and the state.
    """
    kind, channels = state.dtype, x.shape[1]
    dt = dt.to(kind)
    key = B.to(kind).repeat_interleave(channels // B.shape[1], dim=1)  # [B, Ch, N]
    kept = state * (dt[..., None] * A.to(kind)).exp()
    state = kept + (dt * x.to(kind))[..., None] * key  # [B, Ch, N]
    if C is None:
        return None, state
    query = C.to(kind).repeat_interleave(channels // C.shape[1], dim=1)  # [B, Ch, N]
    return (state * query).sum(-1), state


def recur(
    step: Step,
    state: Tensor,
    records: Records,
    C: Tensor | None,
    n_new: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Token by token over records [B, T, ...]; the order every exact path follows.

    `step` is `ssd_step` or `selective_step` with A bound: (state, x, dt, B, C) -> (y, state).
    Returns y [B, T, ...] (None without C) and the state after n_new tokens.
    """
    outputs = []
    for t in range(records[0].shape[1]):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]  # [B]
            state = state * same.view(-1, *[1] * (state.ndim - 1))
        token = (record[:, t] for record in records)
        y, new = step(state, *token, None if C is None else C[:, t])
        if n_new is not None:
            live = (t < n_new).view(-1, *[1] * (state.ndim - 1))
            new = torch.where(live, new, state)
        state = new
        outputs.append(y)
    if C is None:
        return None, state
    return torch.stack(outputs, 1) if outputs else records[0], state


def run(
    step: Step,
    state: Tensor,
    records: Records,
    C: Tensor,
    n_new: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`recur` with a read-out: outputs y [B, T, ...] and the state after n_new tokens."""
    y, state = recur(step, state, records, C, n_new, seq_idx)
    return present(y), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1 over a whole sequence: x and dt [B, T, Ch], A [Ch, N], B and C [B, T, G, N].

    Returns y [B, T, Ch] and the final state [B, Ch, N].
    """
    state = initial_state
    if state is None:
        state = torch.zeros(x.shape[0], *A.shape, dtype=state_dtype(x), device=x.device)
    return run(bind(selective_step, A), state, (x, dt, B), C, seq_idx=seq_idx)


def bind(step: Callable, A: Tensor) -> Step:
    """`step` with its decay matrix fixed."""
    return lambda state, x, dt, B, C: step(state, x, dt, A, B, C)


def multi_step(
    step: Step,
    checkpoint: Tensor,
    history: Records,
    n_kept: Tensor,
    records: Records,
    C: Tensor,
    n_new: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify with replay (arXiv 2408.15237, section 4): rollback without storing a state per token.

    Replays the first n_kept[b] tokens of `history` from `checkpoint`, then runs the new tokens.
    Returns outputs of the new tokens, the state after the kept ones and the state after the new.
    """
    _, kept = recur(step, checkpoint, history, None, n_kept)
    y, live = run(step, kept, records, C, n_new)
    return y, kept, live


class Spans(NamedTuple):
    """int32 [B, T]: the first key a query sees, and the end of the queries that see a key.

    Both grow along a row, as documents and sliding windows make them.
    """

    starts: Tensor
    ends: Tensor

    def mask(self) -> Tensor:
        """Seen keys [B, 1, T, T]."""
        at = torch.arange(self.starts.shape[1], device=self.starts.device)
        return ((at <= at[:, None]) & (at >= self.starts[..., None]))[:, None]


def document_starts(seq_idx: Tensor) -> Tensor:
    """First position of each token's document in its row, [B, T]."""
    at = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand(seq_idx.shape)
    first = at[:, 1:].masked_fill(seq_idx[:, 1:] == seq_idx[:, :-1], 0)
    return torch.nn.functional.pad(first, (1, 0)).cummax(1).values


def spans(seq_idx: Tensor | None, like: Tensor, window: int | None) -> Spans:
    """Spans that tokens of `like` [B, T] see: the last `window` tokens of their own document."""
    at = torch.arange(like.shape[1], device=like.device).expand(like.shape)
    starts = torch.zeros_like(at)
    if seq_idx is not None:
        starts = document_starts(seq_idx)
    if window:
        starts = torch.maximum(starts, at - window + 1)
    ends = torch.searchsorted(starts, at.contiguous(), right=True)
    return Spans(starts.int(), ends.int())


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, spans: Spans | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(P)) [B, H, T, S] for q [B, H, T, P] and k [B, Hk, S, P], Hk dividing H.

    Keys are those of `mask` [B or 1, 1, T, S], else those of `spans`, else the past.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).to(state_dtype(q)) / q.shape[-1] ** 0.5
    if mask is None and spans is not None:
        mask = spans.mask()
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels i and N / 2 + i of states [..., N] rotated (RoFormer), laid out as Llama's.

    Two halves of one split have one gradient, where two slices would have two to be added up.
    """
    one, other = states.chunk(2, -1)
    return states * cos + torch.cat((-other, one), -1) * sin


def rotate_states(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """B or C [B, T, G, N] rotated by its position, `rotary` being (cos, sin) [B, T, N]."""
    return rotated(states, *state_angles(states, rotary)).contiguous()


def state_angles(states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, N] of states [B, T, G, N], as `still` leaves them."""
    half = states.shape[-1] // 2
    cos, sin = (still(t, value, half) for t, value in zip(rotary, (1.0, 0.0), strict=True))
    return cos.to(states.dtype).unsqueeze(-2), sin.to(states.dtype).unsqueeze(-2)


def still(rotation: Tensor, value: float, half: int | None = None) -> Tensor:
    """Cosines or sines [..., N] or [..., N / 2] for states: the pair that rotates fastest stays.

    That is channels 0 and N / 2 of N = 2 * `half`; with it a mixer holds a channel constant, which
    is its running mean (see `mambactl.models.mixers.from_attention`).
    """
    channel = torch.arange(rotation.shape[-1], device=rotation.device)
    return rotation.masked_fill(channel % (half or rotation.shape[-1]) == 0, value)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps) times weight [D], rounded where Llama's is."""
    if weight.dtype == x.dtype and x.dtype not in HALVES:
        return F.rms_norm(x, weight.shape, weight, eps)
    # a half is rounded before the weight multiplies it
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def norm_by(x: Tensor, mean: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of a part x [..., D] of something whose mean square is `mean` [..., 1]."""
    return weight * (x.to(mean.dtype) * torch.rsqrt(mean + eps)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) up, the SiLU rounded to its dtype (arXiv 2002.05202)."""
    return F.silu(gate) * up


def skip(x: Tensor, D: Tensor) -> Tensor:
    """D x [B, T, H, P] for x [B, T, Hx, P] and D [H], with no copies of heads that H / Hx share."""
    x = x.to(state_dtype(x))
    scale = D.to(x.dtype).unflatten(0, (x.shape[-2], -1, 1))  # [Hx, H / Hx, 1]
    return (scale * x.unsqueeze(-2)).flatten(-3, -2)


def gated_norm(
    y: Tensor,
    z: Tensor,
    x: Tensor,
    D: Tensor,
    weight: Tensor,
    groups: int,
    eps: float,
    kind: torch.dtype,
) -> Tensor:
    """RMSNorm of (y + D x) SiLU(z) within each of `groups` equal slices, times weight, as `kind`.

    y [B, T, H, P], z [B, T, H P], x [B, T, Hx, P], D [H], weight [H P] -> [B, T, H P].
    """
    y = (y + skip(x, D)).flatten(-2)  # [B, T, H P]
    grouped = (y * F.silu(z.to(y.dtype))).unflatten(-1, (groups, -1))  # [B, T, G, H P / G]
    normed = F.rms_norm(grouped, grouped.shape[-1:], None, eps)
    return (normed.flatten(-2) * weight.to(y.dtype)).to(kind)
