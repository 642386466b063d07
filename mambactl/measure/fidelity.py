"""How closely a student follows its teacher, token by token on the same text."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mambactl import console
from mambactl.errors import ModelError, UsageError

# first context position of every bucket that results are broken down into
BUCKET_STARTS = (0, 64, 256, 1024)

# logits of one model that may exist at a time, in elements
CHUNK_ELEMENTS = 2**25

MEANS = ("kl", "agreement", "acceptance", "ce", "teacher_ce")

# every number of a result that is one value
SCALARS = (*MEANS, "kl_p95", "perplexity", "teacher_perplexity", "perplexity_ratio")


@torch.inference_mode()
def fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    documents: Iterable[Sequence[int]],
    max_length: int = 512,
    batch_size: int = 4,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> dict[str, Any]:
    """Compare two models with one vocabulary on tokenised documents, each cut in rows.

    Every row starts from an empty context, so its first token has no prediction. All numbers are
    per predicted token: `kl` is KL(teacher || student) in nats (`kl_p95` its 95th percentile),
    `agreement` the share of equal top tokens, `acceptance` 1 - total variation (the expected
    acceptance of speculative sampling), `ce` and `perplexity` are those of the text.
    """
    _same_vocabulary(student, teacher)
    documents = list(documents)
    rows = cut_rows(documents, max_length)
    if not rows:
        raise UsageError(
            "the data holds no document of two tokens or more, so there is nothing to predict",
            hint="pass text that is longer",
        )
    measured: list[Tensor] = []
    positions: list[Tensor] = []
    with console.progress("fidelity", sum(len(row) for row in rows)) as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            measured.append(_measure_batch(student, teacher, batch, chunk_elements))
            positions.extend(torch.arange(len(row) - 1) for row in batch)
            progress.advance(sum(len(row) for row in batch))
    values = dict(zip(MEANS, torch.cat(measured).numpy().T, strict=True))
    counts = {"documents": len(documents), "rows": len(rows), "max_length": max_length}
    return counts | _summary(values, torch.cat(positions).numpy())


def cut_rows(documents: Iterable[Sequence[int]], max_length: int) -> list[Tensor]:
    """Cut documents into rows of at most `max_length` tokens, longest first.

    A rest of one token is dropped: nothing in it can be predicted.
    """
    rows = [
        torch.as_tensor(document[start : start + max_length], dtype=torch.long)
        for document in documents
        for start in range(0, len(document), max_length)
    ]
    # equal lengths side by side waste the least padding
    return sorted((row for row in rows if len(row) > 1), key=len, reverse=True)


def compare_logits(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Measure N predictions; logits [N, V], targets [N], result [N, 5] in the order of `MEANS`."""
    log_q = student.float().log_softmax(-1)  # [N, V]
    log_p = teacher.float().log_softmax(-1)  # [N, V]
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    acceptance = torch.minimum(p, log_q.exp()).sum(-1)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).float()
    picked = targets[:, None]
    ce, teacher_ce = (-log.gather(-1, picked).squeeze(-1) for log in (log_q, log_p))
    return torch.stack([kl, agreement, acceptance, ce, teacher_ce], dim=-1)


def _measure_batch(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: list[Tensor], chunk_elements: int
) -> Tensor:
    device = student.device
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [B, T]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [B, T]
    predicted = mask[:, 1:]  # [B, T-1], position t predicts token t + 1
    targets = ids[:, 1:][predicted]  # [N]

    q_hidden = _hidden(student, ids, mask)[:, :-1][predicted]  # [N, D]
    # the same object needs one pass, and then equals itself bit for bit
    same = teacher is student
    p_hidden = q_hidden if same else _hidden(teacher, ids, mask)[:, :-1][predicted]
    q_head, p_head = student.get_output_embeddings(), teacher.get_output_embeddings()
    size = max(1, chunk_elements // q_head.weight.shape[0])
    chunks = zip(
        q_hidden.split(size),
        p_hidden.to(device).split(size),
        targets.split(size),
        strict=True,
    )
    measured = [compare_logits(q_head(q), p_head(p), target) for q, p, target in chunks]
    return torch.cat(measured).double().cpu()  # [N, 5]


def _hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    output = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    return output.last_hidden_state  # [B, T, D]


def _summary(values: dict[str, np.ndarray], positions: np.ndarray) -> dict[str, Any]:
    means = {name: float(column.mean()) for name, column in values.items()}
    ce, teacher_ce = means["ce"], means["teacher_ce"]
    # a broken student may be beyond what exp can hold: infinite, not an error
    with np.errstate(over="ignore"):
        perplexities = {
            "perplexity": float(np.exp(ce)),
            "teacher_perplexity": float(np.exp(teacher_ce)),
            "perplexity_ratio": float(np.exp(ce - teacher_ce)),
        }
    return {
        "tokens": len(positions),
        **means,
        "kl_p95": float(np.quantile(values["kl"], 0.95)),
        **perplexities,
        "by_position": _by_position(values, positions),
    }


def _by_position(
    values: dict[str, np.ndarray], positions: np.ndarray
) -> dict[str, dict[str, float]]:
    ends = (*BUCKET_STARTS[1:], math.inf)
    buckets = {}
    for start, end in zip(BUCKET_STARTS, ends, strict=True):
        inside = (positions >= start) & (positions < end)
        if inside.any():
            label = f"{start}+" if end == math.inf else f"{start}-{end - 1}"
            means = {name: float(values[name][inside].mean()) for name in ("kl", "agreement")}
            buckets[label] = {"tokens": int(inside.sum()), **means}
    return buckets


def _same_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the student has a vocabulary of {sizes[0]} tokens and the teacher one of {sizes[1]}",
            hint="compare models that share a tokenizer; --teacher names the right one",
        )
