"""Filtering, drawing and judging tokens, with every setting and count held by a tensor.

`settings` fp32 [3] is temperature, top_k (0: off), top_p (1: off); [S, 3] are those of S runs of
equally many rows, a sequence each. `seed` is int64 [1]. With s = logits / temperature, the
distribution of a row is exp(s - log_mass) where s >= threshold and zero elsewhere.
`decode.sampler` and `decode.accept` define the same choices for host settings.
"""

from enum import IntEnum

import torch
from torch import Tensor

from mambactl.kernels.random import Stream, draw, uniform
from mambactl.present import present


def smallest_kept(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """The value [..., 1] that scaled logits [..., V] need in order to stay.

    Top-k keeps ties with the k-th largest; top-p then keeps the smallest set of most likely tokens
    whose mass reaches top_p, and ties with the last of them.
    """
    floor = torch.full_like(scaled[..., :1], float("-inf"))  # [..., 1]
    if 0 < top_k < scaled.shape[-1]:
        floor = scaled.topk(top_k, dim=-1).values[..., -1:]
    if top_p >= 1:
        return floor
    left = scaled.masked_fill(scaled < floor, float("-inf"))  # [..., V]
    ranked = left.sort(dim=-1, descending=True).values  # [..., V]
    mass = ranked.double().softmax(-1)
    outside = mass.cumsum(-1) - mass >= top_p
    return ranked.masked_fill(outside, float("inf")).amin(-1, keepdim=True)


def filter_rows(
    logits: Tensor, settings: Tensor, threshold: Tensor, log_mass: Tensor, *, pdl: bool = False
) -> None:
    """Find the distributions that rows are drawn from: logits [R, V] fp32, -inf for no token.

    Writes threshold [R], the smallest scaled logit that stays, and log_mass [R], both fp32.
    """
    scaled = logits / _temperatures(settings, logits)  # [R, V]
    kept = scaled >= _floors(scaled, settings)
    exists = kept & (scaled > float("-inf"))
    threshold.copy_(scaled.masked_fill(~exists, float("inf")).amin(-1))
    mass = scaled.double().masked_fill(~kept, float("-inf")).logsumexp(-1)  # [R]
    log_mass.copy_(mass)


def _temperatures(settings: Tensor, logits: Tensor) -> Tensor:
    """The temperature of every row of logits [R, V] or [K, R, V], [R, 1]."""
    one = settings.view(-1, 3)[:, :1]
    return one.repeat_interleave(logits.shape[-2] // len(one), 0)


def _floors(scaled: Tensor, settings: Tensor) -> Tensor:
    """`smallest_kept` of every row of scaled logits [R, V], [R, 1]."""
    every = settings.view(-1, 3)[:, 1:].tolist()
    if all(each == every[0] for each in every):
        every = every[:1]
    runs = zip(scaled.chunk(len(every)), every, strict=True)
    return torch.cat([smallest_kept(run, int(top_k), top_p) for run, (top_k, top_p) in runs])


def probabilities(logits: Tensor, settings: Tensor, threshold: Tensor, log_mass: Tensor) -> Tensor:
    """Probabilities after `filter_rows`, written out: logits [..., R, V] -> fp32 [..., R, V]."""
    scaled = logits / _temperatures(settings, logits)
    probs = (scaled - log_mass[..., None]).exp()
    return probs.masked_fill(scaled < threshold[..., None], 0.0)


def draw_rows(
    logits: Tensor,
    settings: Tensor,
    threshold: Tensor,
    log_mass: Tensor,
    keys: Tensor,
    positions: Tensor,
    seed: Tensor,
    stream: int,
    tokens: Tensor,
    *,
    offset: int = 0,
    pdl: bool = False,
) -> None:
    """Draw a token per row of logits [R, V] at text position `positions` int32 [R] + offset.

    keys int64 [R] name the rows; writes tokens int32 [R], a view of any stride.
    """
    probs = probabilities(logits, settings, threshold, log_mass)  # [R, V]
    uniforms = uniform(int(seed), keys, positions.long() + offset, stream)  # [R]
    tokens.copy_(draw(probs, uniforms))


def verdict_greedy(
    best: Tensor,
    drafts: Tensor,
    lengths: Tensor | None,
    accepted: Tensor,
    following: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Keep drafted tokens while they equal the target's argmax, `best` int32 [B * (K + 1)].

    drafts int32 [B, >= K]; sequence b uses its first `lengths[b]` (None: all K). Writes int32 [B]:
    how many are accepted, and the token that follows them.
    """
    batch = accepted.shape[0]
    table = best.view(batch, -1)  # [B, K + 1]
    for row, length in enumerate(_lengths(lengths, batch, table.shape[1] - 1)):
        n = 0
        while n < length and drafts[row, n] == table[row, n]:
            n += 1
        accepted[row], following[row] = n, table[row, n]


def verdict_sampled(
    logits: Tensor,
    settings: Tensor,
    threshold: Tensor,
    log_mass: Tensor,
    draft_logits: Tensor | None,
    draft_threshold: Tensor | None,
    draft_log_mass: Tensor | None,
    drafts: Tensor,
    lengths: Tensor | None,
    keys: Tensor,
    positions: Tensor,
    seed: Tensor,
    accepted: Tensor,
    following: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Rejection sampling (arXiv 2211.17192, Algorithm 1) of drafts int32 [B, >= K].

    The target's logits [B * (K + 1), V] have threshold and log_mass [B * (K + 1)]; the draft's are
    [K, B, V] with [K, B], or None when the drafts were certain. positions int32 [B] number the
    first new token of each sequence. Writes accepted and following, int32 [B].
    """
    batch = accepted.shape[0]
    target = probabilities(logits, settings, threshold, log_mass)
    target = target.view(batch, -1, logits.shape[1])  # [B, K + 1, V]
    token_positions = positions.long()[:, None] + torch.arange(target.shape[1], device=keys.device)
    rows = keys[:, None].expand_as(token_positions)  # [B, K + 1]
    tests = uniform(int(seed), rows, token_positions, Stream.ACCEPT)  # [B, K + 1]
    emits = uniform(int(seed), rows, token_positions, Stream.EMIT)  # [B, K + 1]
    if draft_logits is None:
        shape = (target.shape[1] - 1, *target.shape[::2])
        certain = drafts[:, : shape[0]].T.long()[..., None]  # [K, B, 1]
        draft = torch.zeros(shape, device=logits.device).scatter(-1, certain, 1.0)  # [K, B, V]
    else:
        found = present(draft_threshold), present(draft_log_mass)
        draft = probabilities(draft_logits, settings, *found)
    for row, length in enumerate(_lengths(lengths, batch, draft.shape[0])):
        n = 0
        while n < length and _passes(target[row, n], draft[n, row], drafts[row, n], tests[row, n]):
            n += 1
        rest = target[row, n]  # [V]
        if n < length:
            rest = (rest - draft[n, row]).clamp(min=0)
        if not rest.sum() > 0:
            rest = target[row, n]
        accepted[row], following[row] = n, draw(rest, emits[row, n])


def _passes(target: Tensor, draft: Tensor, token: Tensor, number: Tensor) -> bool:
    # strict, so that a token of target probability zero never passes, not even with number = 0
    return bool(number * draft[token].double() < target[token].double())


def _lengths(lengths: Tensor | None, batch: int, width: int) -> list[int]:
    return [width] * batch if lengths is None else lengths.tolist()


class Field(IntEnum):
    """Rows of `progress` [len(Field), B], the integers that say how far each sequence is."""

    LENGTH = 0  # tokens the target holds; the pending one has this position
    ACTIVE = 1  # 1 until the sequence is finished
    BASE = 2  # position of the target's stored recurrent state
    NEXT = 3  # where the coming pass stores it anew; the same as BASE if it does not
    DRAFT_BASE = 4
    DRAFT_NEXT = 5
    BUDGET = 6  # tokens still to be written
    WRITTEN = 7  # tokens written so far
    STEP = 8  # steps taken, which chooses the mailbox slot


class Letter(IntEnum):
    """Columns of a mailbox slot before the new tokens."""

    ACCEPTED = 0
    DRAFTED = 1
    EMITTED = 2
    FINISH = 3


class Finish(IntEnum):
    """Values of Letter.FINISH."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    IDLE = 3


def next_store(begin: Tensor, base: Tensor, span: int, limit: int) -> Tensor:
    """Position at which the pass from `begin` stores its state: `begin`, or `base` if it does not.

    A ring of `limit` slots must hold three positions before the stored state, what is replayed,
    and `span` tokens a step, also in the step after this one. Limit 0 is plain decoding that
    stores after every token, as none is ever taken back.
    """
    if limit == 0:
        return begin + 1
    full = begin - base + 2 * span + 3 > limit
    return torch.where(full & (begin > base), begin, base)


def commit(
    progress: Tensor, feed: Tensor, history: Tensor, accepted: Tensor, following: Tensor,
    drafted: Tensor | None, eos: Tensor, mailbox: Tensor, k: int, *, span: int, limit: int,
    draft_limit: int,
) -> None:  # fmt: skip
    """Take over a verdict: `accepted` [B] of k drafts and the token `following` [B] them.

    Writes the new tokens, up to an eos (ids in `eos` [E]) or the end of the budget, to mailbox
    [depth, B, 4 + K + 1] at slot step % depth.
    """
    for b in range(progress.shape[1]):
        step = int(progress[Field.STEP, b])
        letter = mailbox[step % len(mailbox), b]
        progress[Field.STEP, b] = step + 1
        if not progress[Field.ACTIVE, b]:
            letter[Letter.EMITTED], letter[Letter.FINISH] = 0, Finish.IDLE
            continue
        n, held = int(accepted[b]), int(progress[Field.LENGTH, b])
        new = torch.cat([feed[b, 2 : 2 + n], following[b : b + 1].to(feed.dtype)])  # [n + 1]
        ends = torch.isin(new, eos).nonzero()
        budget = int(progress[Field.BUDGET, b])
        emitted = min(budget, int(ends[0]) + 1 if len(ends) else n + 1)
        finish = Finish.LENGTH if emitted == budget else Finish.RUNNING
        if len(ends) and emitted == int(ends[0]) + 1:
            finish = Finish.EOS
        letter[Letter.ACCEPTED] = n
        letter[Letter.DRAFTED] = k if drafted is None else drafted[b]
        letter[Letter.EMITTED], letter[Letter.FINISH] = emitted, finish
        letter[len(Letter) : len(Letter) + n + 1] = new
        room = min(n + 1, history.shape[1] - held - 1)
        history[b, held + 1 : held + 1 + room] = new[:room]
        feed[b, 0] = feed[b, 1 + n]
        feed[b, 1] = following[b]
        progress[Field.LENGTH, b] = held + n + 1
        progress[Field.BUDGET, b] = budget - emitted
        progress[Field.WRITTEN, b] += emitted
        progress[Field.ACTIVE, b] = int(finish == Finish.RUNNING)
        progress[Field.BASE, b] = progress[Field.NEXT, b]
        progress[Field.DRAFT_BASE, b] = progress[Field.DRAFT_NEXT, b]
    plan_stores(progress, span=span, limit=limit, draft_limit=draft_limit)


def plan_stores(progress: Tensor, *, span: int, limit: int, draft_limit: int) -> None:
    """Decide where the coming passes store states, from LENGTH, BASE and DRAFT_BASE."""
    length = progress[Field.LENGTH]
    progress[Field.NEXT] = next_store(length, progress[Field.BASE], span, limit)
    progress[Field.DRAFT_NEXT] = next_store(
        length - 1, progress[Field.DRAFT_BASE], span, draft_limit
    )
