"""How closely a student follows its teacher, token by token on the same text."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mambactl import console
from mambactl.errors import ModelError, UsageError

# first context position of every bucket that results are broken down into
BUCKET_STARTS = (0, 64, 256, 1024, 4096)

# logits of one model that may exist at a time, in elements
CHUNK_ELEMENTS = 2**25

MEANS = ("kl", "reverse_kl", "agreement", "top5", "acceptance", "ce", "teacher_ce")
TOP = 5

# every number of a result that is one value
SCALARS = (*MEANS, "kl_p95", "perplexity", "teacher_perplexity", "perplexity_ratio")


@dataclass(frozen=True)
class Variant:
    """A model as it is while the context that `during` makes is entered."""

    model: PreTrainedModel
    during: Callable[[], AbstractContextManager[None]] = nullcontext


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
    per predicted token: `kl` is KL(teacher || student) in nats (`kl_p95` its 95th percentile) and
    `reverse_kl` KL(student || teacher), `agreement` the share of equal top tokens, `top5` how much
    of the teacher's five best tokens is among the student's, `acceptance` 1 - total variation (the
    expected acceptance of speculative sampling), `ce` and `perplexity` are those of the text.
    """
    only = {"student": Variant(student)}
    return compare(only, teacher, documents, max_length, batch_size, chunk_elements)["student"]


@torch.inference_mode()
def compare(
    variants: Mapping[str, Variant],
    teacher: PreTrainedModel,
    documents: Iterable[Sequence[int]],
    max_length: int = 512,
    batch_size: int = 4,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> dict[str, dict[str, Any]]:
    """`fidelity` of several students to one teacher on the same rows, which it reads once."""
    for variant in variants.values():
        _same_vocabulary(variant.model, teacher)
    documents = list(documents)
    rows = cut_rows(documents, max_length)
    if not rows:
        raise UsageError(
            "the data holds no document of two tokens or more, so there is nothing to predict",
            hint="pass text that is longer",
        )
    measured: dict[str, list[Tensor]] = {name: [] for name in variants}
    positions: list[Tensor] = []
    with console.progress("fidelity", sum(len(row) for row in rows)) as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            found = _measure_batch(list(variants.values()), teacher, batch, chunk_elements)
            for name, part in zip(variants, found, strict=True):
                measured[name].append(part)
            positions.extend(torch.arange(len(row) - 1) for row in batch)
            progress.advance(sum(len(row) for row in batch))
    counts = {"documents": len(documents), "rows": len(rows), "max_length": max_length}
    place = torch.cat(positions).numpy()
    return {
        name: counts | _summary(dict(zip(MEANS, torch.cat(parts).numpy().T, strict=True)), place)
        for name, parts in measured.items()
    }


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
    """Measure N predictions; logits [N, V], targets [N], result [N, 7] in the order of `MEANS`."""
    log_q = student.float().log_softmax(-1)  # [N, V]
    log_p = teacher.float().log_softmax(-1)  # [N, V]
    p, q = log_p.exp(), log_q.exp()
    difference = log_p - log_q
    kl, reverse = (p * difference).sum(-1), -(q * difference).sum(-1)
    acceptance = torch.minimum(p, q).sum(-1)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).float()
    best, wanted = (log.topk(TOP, -1).indices for log in (log_q, log_p))  # [N, 5]
    shared = (best[:, :, None] == wanted[:, None, :]).any(1).float().mean(-1)
    picked = targets[:, None]
    ce, teacher_ce = (-log.gather(-1, picked).squeeze(-1) for log in (log_q, log_p))
    return torch.stack([kl, reverse, agreement, shared, acceptance, ce, teacher_ce], dim=-1)


def _measure_batch(
    variants: Sequence[Variant],
    teacher: PreTrainedModel,
    rows: list[Tensor],
    chunk_elements: int,
) -> list[Tensor]:
    """Every variant's measurements of all predictions of a batch [N, 7]."""
    device = teacher.device
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [B, T]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [B, T]
    predicted = mask[:, 1:]  # [B, T-1], position t predicts token t + 1
    targets = ids[:, 1:][predicted]  # [N]

    guide = _hidden(teacher, ids, mask)[:, :-1][predicted]  # [N, D]
    p_head = teacher.get_output_embeddings()
    size = max(1, chunk_elements // p_head.weight.shape[0])
    measured = []
    for variant in variants:
        q_head = variant.model.get_output_embeddings()
        hidden = guide
        # the same object needs one pass, and then equals itself bit for bit
        if variant.model is not teacher or variant.during is not nullcontext:
            place = variant.model.device
            with variant.during():
                hidden = _hidden(variant.model, ids.to(place), mask.to(place))
            hidden = hidden[:, :-1][predicted.to(place)]
        chunks = zip(hidden.split(size), guide.split(size), targets.split(size), strict=True)
        parts = [compare_logits(q_head(q).to(device), p_head(p), target) for q, p, target in chunks]
        measured.append(torch.cat(parts).double().cpu())
    return measured


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
