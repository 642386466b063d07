"""Implicit rewards of preferred and rejected answers, and the KL of a model to its reference.

With r = log p(answer | prompt) under the policy less that under the reference, summed over the
answer's tokens, beta * r is the reward that direct preference optimisation implies (arXiv
2305.18290, eq. 5). A pair counts as right where the chosen answer has the larger one. The KL is of
whole next-token distributions, at every token of both answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mambactl import console, metrics
from mambactl.data.encoding import Example
from mambactl.data.pack import Batch, Row, collate, pack_whole
from mambactl.data.preferences import Pair
from mambactl.evaluation.fidelity import MEANS, Head, compare_logits
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.json_values import JsonObject
from mambactl.metrics import KL, REVERSE_KL, group

# numbers of a set, and what a table calls them
MEASURED = [metric for metric in group("preferences") if metric.bound]
SCALARS = tuple(metric.name for metric in MEASURED)
HEADINGS = tuple(metric.label for metric in MEASURED)
CE, REFERENCE_CE = (MEANS.index(each.name) for each in (metrics.CE, metrics.TEACHER_CE))
FROM_REFERENCE, TO_REFERENCE = (MEANS.index(each.name) for each in (KL, REVERSE_KL))


@dataclass(frozen=True)
class Layout:
    """Layout of documents in rows: `width` tokens, `batch_size` rows per pass, packed or padded.

    `amp` is the mixed-precision type, None for what the weights are.
    """

    width: int
    batch_size: int = 4
    packing: bool = True
    amp: torch.dtype | None = None

    def batches(self, texts: Sequence[Example]) -> list["AnswerRows"]:
        """Rows of the documents that are read together, in one order for all models."""
        width = min(self.width, max(len(text.input_ids) for text in texts))
        rows, members = pack_whole(texts, width, self.packing)
        pieces = [
            slice(start, start + self.batch_size) for start in range(0, len(rows), self.batch_size)
        ]
        return [AnswerRows(rows[piece], members[piece]) for piece in pieces]

    @torch.no_grad()
    def states(self, model: PreTrainedModel, read: "AnswerRows") -> "States":
        """States of a batch that predict learned tokens; owners on the host."""
        batch = collate(read.rows)
        predicted = batch.loss_mask[:, 1:]  # [B, T-1], position t predicts token t + 1
        owner = _owners(read.members, read.rows)[:, 1 : batch.loss_mask.shape[1]][predicted]
        hidden = _hidden(model, batch.to(model.device), self.amp)[:, :-1]
        device = hidden.device
        targets = batch.input_ids[:, 1:][predicted]
        return States(hidden[predicted.to(device)], targets.to(device), owner)


class AnswerRows(NamedTuple):
    """Rows of one batch, and the numbers of the documents in each."""

    rows: Sequence[Row]
    members: Sequence[Sequence[int]]


class States(NamedTuple):
    """Hidden states [N, D] that predict answer tokens [N] of documents number `owner` [N]."""

    hidden: Tensor
    targets: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Reference:
    """The reference's part in a comparison: states of the same tokens on the host, by the number
    of the batch, and its head.
    """

    states: Callable[[int], Tensor]
    head: Head


def documents(pairs: Sequence[Pair]) -> list[Example]:
    """Chosen and rejected documents of all pairs alternately, [2 N]."""
    return [document for pair in pairs for document in pair.answers]


@torch.no_grad()
def token_logps(
    model: PreTrainedModel, texts: Sequence[Example], layout: Layout
) -> list[np.ndarray]:
    """Log-probabilities (fp32) of the learned tokens of every document, in their order."""
    head = Head.of(model)
    found = [np.zeros(0, np.float32) for _ in texts]
    size = head.rows()
    with console.progress("reference", len(texts)) as progress:
        for states in answer_states(model, texts, layout):
            pieces = zip(states.hidden.split(size), states.targets.split(size), strict=True)
            logps = torch.cat([_logps(head(h), targets) for h, targets in pieces])
            owner = states.owner.numpy()
            # a document's tokens stand side by side
            ends = np.flatnonzero(np.diff(owner)) + 1
            for part in np.split(np.arange(len(owner)), ends):
                found[owner[part[0]]] = logps[part[0] : part[-1] + 1].cpu().numpy()
            progress.advance(len(ends) + 1)
    return found


def read_reference(model: PreTrainedModel, texts: Sequence[Example], layout: Layout) -> Reference:
    """Keep the states of `model` for `texts`; the model itself may then be freed."""
    with torch.no_grad():
        states = [part.hidden.cpu() for part in answer_states(model, texts, layout)]
        return Reference(states.__getitem__, Head.of(model))


def live_reference(model: PreTrainedModel, texts: Sequence[Example], layout: Layout) -> Reference:
    """Read states of `model` for `texts` batch by batch, when they are asked for."""
    batches = layout.batches(texts)
    return Reference(
        lambda number: layout.states(model, batches[number]).hidden.cpu(), Head.of(model)
    )


@torch.no_grad()
def compare_preferences(
    policy: PreTrainedModel,
    reference: Reference,
    pairs: Sequence[Pair],
    layout: Layout,
    beta: float = 1.0,
    dealer: Dealer = ALONE,
) -> JsonObject:
    """Numbers of `SCALARS` over pairs that `reference` was read for, and how many there are.

    `reward_margin` is beta times the mean difference of r, `normed_accuracy` compares r per token,
    `logp_*` are means of summed log-probabilities, `kl_to_reference` is KL(policy || reference) per
    answer token and `kl_from_reference` KL(reference || policy), in nats.
    """
    texts = documents(pairs)
    head = Head.of(policy)
    size = head.rows()
    batches = layout.batches(texts)

    def measure(number: int) -> tuple[Tensor, Tensor]:
        """Measurements of a batch's answer tokens [N, 7], and their documents [N]."""
        states, other = layout.states(policy, batches[number]), reference.states(number)
        pieces = zip(*(t.split(size) for t in (states.hidden, other, states.targets)), strict=True)
        parts = [
            compare_logits(head(hidden), reference.head(kept.to(hidden.device)), targets)
            for hidden, kept, targets in pieces
        ]
        return torch.cat(parts).double().cpu(), states.owner

    ours, theirs, counts = np.zeros((3, len(texts)))
    sums, seen = torch.zeros(len(MEANS), dtype=torch.float64), 0
    for measured, owners in dealer.results(range(len(batches)), measure):
        owner = owners.numpy()
        np.add.at(ours, owner, -measured[:, CE].numpy())
        np.add.at(theirs, owner, -measured[:, REFERENCE_CE].numpy())
        np.add.at(counts, owner, 1)
        sums += measured.sum(0)
        seen += len(measured)
    means = sums / max(seen, 1)
    return {
        "pairs": len(pairs),
        "answer_tokens": seen,
        **_rewards(ours, theirs, counts, beta),
        "kl_to_reference": float(means[TO_REFERENCE]),
        "kl_from_reference": float(means[FROM_REFERENCE]),
    }


def _rewards(
    ours: np.ndarray, theirs: np.ndarray, counts: np.ndarray, beta: float
) -> dict[str, float]:
    ratio = ours - theirs  # [2 N], chosen and rejected alternately
    margin = ratio[0::2] - ratio[1::2]
    normed = ratio / np.maximum(counts, 1)
    return {
        "reward_accuracy": float((margin > 0).mean()),
        "reward_margin": float(beta * margin.mean()),
        "normed_accuracy": float((normed[0::2] > normed[1::2]).mean()),
        "logp_chosen": float(ours[0::2].mean()),
        "logp_rejected": float(ours[1::2].mean()),
    }


def answer_states(
    model: PreTrainedModel, texts: Sequence[Example], layout: Layout
) -> Iterator[States]:
    """States that predict learned tokens, in one order for all models; owners on the host."""
    return (layout.states(model, batch) for batch in layout.batches(texts))


def _owners(members: Sequence[Sequence[int]], rows: Sequence[Row]) -> Tensor:
    """Number of the document at every position [B, T]; padding counts as the first."""
    owner = np.stack(
        [
            np.asarray([*group, group[0]])[row.seq_idx]
            for group, row in zip(members, rows, strict=True)
        ]
    )
    return torch.from_numpy(owner)


def _hidden(model: PreTrainedModel, batch: Batch, amp: torch.dtype | None) -> Tensor:
    """States after the final norm [B, T, D]; packed rows need a model that resets where asked."""
    extra: dict[str, Tensor] = {}
    if batch.seq_idx is not None:
        extra = {"position_ids": batch.position_ids, "seq_idx": batch.seq_idx}
    # padding stands behind everything, where no causal model sees it
    with torch.autocast(batch.input_ids.device.type, dtype=amp, enabled=amp is not None):
        return model.base_model(batch.input_ids, use_cache=False, **extra).last_hidden_state


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits, targets, reduction="none")
