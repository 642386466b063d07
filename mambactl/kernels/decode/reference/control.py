"""Where each sequence of a running batch stands, on the device, and how a step moves it on.

`control` int32 [len(Field), B] is all that the kernels of a step know; the host only reads the
mailbox. `feed` int32 [B, 2 + K] holds the newest token the target has read, the pending token it
has not, and the drafts. `history` int32 [B, S] holds every token at its position.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Field(IntEnum):
    """Rows of `control`."""

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
    """Where the pass that starts at `begin` stores its state: there, or not at all (`base`).

    A ring of `limit` slots must hold three positions before the stored state, what is replayed,
    and `span` tokens a step, also in the step after this one. Limit 0 is plain decoding that
    stores after every token, as none is ever taken back.
    """
    if limit == 0:
        return begin + 1
    full = begin - base + 2 * span + 3 > limit
    return torch.where(full & (begin > base), begin, base)


def commit(
    control: Tensor, feed: Tensor, history: Tensor, accepted: Tensor, following: Tensor,
    drafted: Tensor | None, eos: Tensor, mailbox: Tensor, k: int, *, span: int, limit: int,
    draft_limit: int,
) -> None:  # fmt: skip
    """Take over a verdict: `accepted` [B] of k drafts and the token `following` [B] them.

    Writes the new tokens, up to an eos (ids in `eos` [E]) or the end of the budget, to mailbox
    [depth, B, 4 + K + 1] at slot step % depth.
    """
    for b in range(control.shape[1]):
        step = int(control[Field.STEP, b])
        letter = mailbox[step % len(mailbox), b]
        control[Field.STEP, b] = step + 1
        if not control[Field.ACTIVE, b]:
            letter[Letter.EMITTED], letter[Letter.FINISH] = 0, Finish.IDLE
            continue
        n, held = int(accepted[b]), int(control[Field.LENGTH, b])
        new = torch.cat([feed[b, 2 : 2 + n], following[b : b + 1].to(feed.dtype)])  # [n + 1]
        ends = torch.isin(new, eos).nonzero()
        budget = int(control[Field.BUDGET, b])
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
        control[Field.LENGTH, b] = held + n + 1
        control[Field.BUDGET, b] = budget - emitted
        control[Field.WRITTEN, b] += emitted
        control[Field.ACTIVE, b] = int(finish == Finish.RUNNING)
        control[Field.BASE, b] = control[Field.NEXT, b]
        control[Field.DRAFT_BASE, b] = control[Field.DRAFT_NEXT, b]
    plan_stores(control, span=span, limit=limit, draft_limit=draft_limit)


def plan_stores(control: Tensor, *, span: int, limit: int, draft_limit: int) -> None:
    """Decide where the coming passes store states, from LENGTH, BASE and DRAFT_BASE."""
    length = control[Field.LENGTH]
    control[Field.NEXT] = next_store(length, control[Field.BASE], span, limit)
    control[Field.DRAFT_NEXT] = next_store(length - 1, control[Field.DRAFT_BASE], span, draft_limit)
