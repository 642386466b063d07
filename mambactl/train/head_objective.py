"""Training of a draft head: the target's distribution, followed over several drafts in a row.

The first pass reads the target's streams, as decoding does behind a verified token; each later one
reads the head's own stream of the pass before, one position back, as decoding does behind a draft.
A query of pass s sees what decoding would have held: keys made of the target's streams up to the
last verified token, and one key of each pass since. This is the training-time test of EAGLE-3
(arXiv 2503.01840, section 3.2) with a plain mask.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mambactl.data.pack import Batch
from mambactl.models.cache import AttentionCache, HybridCache
from mambactl.models.draft_head import DraftHead, shifted
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.spec import StepContext
from mambactl.train.losses import Teacher, distillation_loss
from mambactl.train.optimization import autocast, next_tokens

# weight of each pass over that of the pass before: later drafts are tried less often
DECAY = 0.8


class _Passes(AttentionCache):
    """Keys and values of every pass so far, one pass behind the other, with their gradients.

    Each is repeated for the `shared` query heads that read it: fused attention with a mask takes
    as many of both.
    """

    def __init__(self, shared: int):
        super().__init__()
        self.shared = shared

    def update(self, keys: Tensor, values: Tensor, positions: Tensor | None, slots: int) -> tuple:
        new = [part.repeat_interleave(self.shared, 1) for part in (keys, values)]
        if self.keys is not None:
            new = [torch.cat(both, 2) for both in zip(self.tensors(), new, strict=True)]
        self.keys, self.values = new
        return self.keys, self.values


class HeadObjective:
    """Mean over passes and tokens of KL(target || head) and cross entropy; see `Objective`.

    Both are over the tokens that the head can draft; where the next one is another, nothing is
    learned.
    """

    def __init__(
        self,
        head: DraftHead,
        target: HybridForCausalLM,
        passes: int,
        kl_weight: float,
        ce_weight: float,
        amp: torch.dtype | None = None,
    ):
        self.head, self.target, self.amp = head, target, amp
        self.kl_weight, self.ce_weight = kl_weight, ce_weight
        shares = torch.tensor([DECAY**number for number in range(passes)])
        self.shares = (shares / shares.sum()).tolist()
        # the target's own rows; those of the head may come to differ
        self.rows = target.lm_head.weight.detach()[head.ids]  # [Vt, D]
        row_of = torch.full((target.config.vocab_size,), -1)
        row_of[head.ids.cpu()] = torch.arange(len(head.ids))
        # [V], for batches on the host, and for those on the device
        self.row_of, self.row_there = row_of, row_of.to(self.rows.device)

    def count(self, batch: Batch) -> int:
        """Tokens that some position of the row predicts, and the head can draft."""
        targets, mask = next_tokens(batch)
        return int((mask & (self.row_of[targets] >= 0)).sum())

    def inputs(self, batch: Batch, device: torch.device) -> Batch:
        """Copy the batch to the device."""
        return batch.to(device)

    def backward(self, batch: Batch, tokens: float | Tensor) -> Tensor:
        """One pass of the target and several of the head; see `Objective`."""
        with autocast(batch.input_ids.device, self.amp):
            streams = self._streams(batch)
            with torch.no_grad():
                guide = Teacher(self.target.model.norm(streams), self.rows)
            total = self._losses(batch, streams, guide)
        share = total / tokens
        share.backward()
        return share.detach()

    def states(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """States [B, T, D] after the final norm: the target's, and the head's of every pass."""
        streams = self._streams(batch)
        norm = self.head.body.model.norm
        own = [norm(stream) for stream in self.passes(batch, streams)]
        return self.target.model.norm(streams), own

    @torch.no_grad()
    def _streams(self, batch: Batch) -> Tensor:
        """The target's streams [B, T, D] behind every token, before its final norm."""
        model = self.target.model
        positions = None if batch.seq_idx is None else batch.position_ids
        hidden, context = model.enter(batch.input_ids, positions, batch.seq_idx)
        for block in model.layers:
            hidden = block(hidden, context, None)
        return hidden

    def _losses(self, batch: Batch, streams: Tensor, guide: Teacher) -> Tensor:
        targets, mask = next_tokens(batch)
        rows = self.row_there[targets]  # [B, T]
        learned, rows = mask & (rows >= 0), rows.clamp(min=0)
        body = self.head.body
        total = streams.new_zeros((), dtype=torch.float32)
        for number, stream in enumerate(self.passes(batch, streams)):
            # a position cannot follow more drafts than there are tokens before it
            counted = learned & (batch.position_ids >= number)
            loss = distillation_loss(
                body.model.norm(stream),
                body.lm_head.weight,
                rows,
                counted,
                guide,
                self.kl_weight,
                self.ce_weight,
            )
            total = total + self.shares[number] * loss.total
        return total

    def passes(self, batch: Batch, streams: Tensor) -> Iterator[Tensor]:
        """Own streams [B, T, D] of every pass, for the target's behind the same tokens."""
        head, model = self.head, self.head.body.model
        positions = None if batch.seq_idx is None else batch.position_ids
        opening = (batch.position_ids == 0)[..., None]
        cache = HybridCache(head.config, len(streams), head.device)
        sizes = head.config.num_attention_heads, head.config.num_key_value_heads
        cache.layers = [_Passes(sizes[0] // sizes[1])]
        context = model.context(self._wide(streams), positions, seq_idx=batch.seq_idx)
        seen = visible(context, streams)
        for number in range(len(self.shares)):
            before = shifted(streams, torch.zeros_like(streams[:, 0])).masked_fill(opening, 0)
            hidden = self._wide(head.entering(before, batch.input_ids))
            masked = replace(context, mask=pass_mask(seen, number)[:, None], spans=None)
            streams = model.layers[0](hidden, masked, cache)
            yield streams

    def _wide(self, stream: Tensor) -> Tensor:
        """The stream in fp32 where autocast trains, as the model's own."""
        return stream if self.amp is None else stream.float()


def visible(context: StepContext, hidden: Tensor) -> Tensor:
    """Keys of its own document up to each token, [B, T, T] bool, for hidden [B, T, D]."""
    batch, length = hidden.shape[:2]
    if context.spans is not None:
        return context.spans.mask()[:, 0].expand(batch, -1, -1)
    past = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    return past.expand(batch, -1, -1)


def pass_mask(seen: Tensor, number: int) -> Tensor:
    """Keys [B, T, (number + 1) T] that queries of a pass see, of all passes up to it.

    `seen` [B, T, T] is what queries of the first pass see, that is number 0.
    """
    length = seen.shape[1]
    near = torch.eye(length, dtype=torch.bool, device=seen.device)
    parts = [seen & torch.tril(torch.ones_like(seen[0]), -number)]
    for earlier in range(1, number + 1):
        back = number - earlier
        parts.append(seen & _moved_down(near, back))
    return torch.cat(parts, 2)


def _moved_down(near: Tensor, back: int) -> Tensor:
    """Mask of the one key that lies `back` positions before each query."""
    rows = near.roll(back, 0)
    rows[:back] = False
    return rows
