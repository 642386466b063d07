"""Fidelity of a student in training to its teacher, on text that it never trains on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl.data.pack import Batch, Row, collate
from mambactl.evaluation.fidelity import CHUNK_ELEMENTS, MEANS, compare_logits
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.train.optimization import autocast, last_hidden
from mambactl.train.sharding import inside


class HeldOut:
    """KL, agreement, perplexity ratio and cross entropy over the same packed rows every time.

    Means are over what the rows learn; without a teacher only the cross entropy is measured. The
    rows stay on the host; no random number is drawn, so that a run with evaluations ends at the
    weights of one without.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM | None,
        rows: Sequence[Row],
        batch_size: int,
        amp: torch.dtype | None,
        trim: bool = True,
    ):
        self.student, self.teacher, self.amp = student, teacher, amp
        if not trim and len(rows) > batch_size:
            # compiled code is made for one shape
            rows = rows[: len(rows) // batch_size * batch_size]
        self.batches = [
            collate(rows[start : start + batch_size], trim)
            for start in range(0, len(rows), batch_size)
        ]

    @property
    def _models(self) -> list[HybridForCausalLM]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    @torch.no_grad()
    def measure(self) -> JsonObject:
        """Means per predicted token, in nats for `kl`; a forward pass of both models.

        Of models that are split every process must measure.
        """
        if self.teacher is None:
            return inside(self.student, lambda _: self._measure())
        return inside(self.teacher, lambda _: inside(self.student, lambda _: self._measure()))

    def _measure(self) -> JsonObject:
        device = self.student.device
        sums, count = torch.zeros(len(MEANS), dtype=torch.float64, device=device), 0
        for batch in self.batches:
            count += int(batch.loss_mask[:, 1:].sum())
            sums += self._sums(batch.to(device))
        means = dict(zip(MEANS, (sums / count).tolist(), strict=True))
        if self.teacher is None:
            return {"ce": means["ce"], "eval_tokens": count}
        # a student that broke may be beyond what exp can hold
        gap = min(means["ce"] - means["teacher_ce"], math.log(1e30))
        return {
            "kl": means["kl"],
            "agreement": means["agreement"],
            "perplexity_ratio": math.exp(gap),
            "ce": means["ce"],
            "eval_tokens": count,
        }

    def _sums(self, batch: Batch) -> Tensor:
        """Sums over the batch of what `compare_logits` measures, [7]."""
        predicted = batch.loss_mask[:, 1:]  # [B, T-1]
        with autocast(batch.input_ids.device, self.amp):
            hidden = [
                last_hidden(model, batch)[:, :-1][predicted] for model in self._models
            ]  # [N, D]
        # fp32 logits: in bf16 the rounding alone would be worth hundredths of a nat. Taken behind
        # the pass: Accelerate gathers a head that is split together with the last norm
        heads = [model.lm_head.weight.float() for model in self._models]
        targets = batch.input_ids[:, 1:][predicted]  # [N]
        size = max(1, CHUNK_ELEMENTS // heads[0].shape[0])
        total = torch.zeros(len(MEANS), dtype=torch.float64, device=targets.device)
        for start in range(0, len(targets), size):
            piece = slice(start, start + size)
            # without a teacher the student stands for it
            ours, *theirs = (
                state[piece].float() @ head.t() for state, head in zip(hidden, heads, strict=True)
            )
            theirs = theirs[0] if theirs else ours
            total += compare_logits(ours, theirs, targets[piece]).double().sum(0)
        return total
