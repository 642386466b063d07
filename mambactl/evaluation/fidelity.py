"""Fidelity of a student to its teacher, token by token on the same text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mambactl import console
from mambactl.data.encoding import TokenIds
from mambactl.errors import ModelError, UsageError
from mambactl.evaluation.calibration import COLUMNS as CONFIDENCES
from mambactl.evaluation.calibration import confidences
from mambactl.evaluation.output_head import output_head
from mambactl.evaluation.predictions import MEANS, Predictions
from mambactl.evaluation.statistics import Bootstrap
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.json_values import JsonObject

# logits of one model that may exist at a time, in elements
CHUNK_ELEMENTS = 2**25
# of those, how many a CPU compares at a time: what a pass leaves is read from a cache by the next,
# and memory is not given back in between, for which fresh pages cost more than the arithmetic
CPU_ELEMENTS = 2**20

COLUMNS = (*MEANS, *CONFIDENCES)
TOP = 5


@dataclass(frozen=True)
class Variant:
    """A model as it is while the context that `during` makes is entered."""

    model: PreTrainedModel
    during: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Head:
    """Weight [V, D] and bias [V] of a head in fp32: bf16 rounds many logits to ties, and rounding
    alone is thousandths of a nat.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of a model."""
        head = output_head(model)
        bias = getattr(head, "bias", None)
        return cls(head.weight.float(), None if bias is None else bias.float())

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of states [N, D]."""
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)

    def rows(self, elements: int = CHUNK_ELEMENTS) -> int:
        """Number of states per chunk whose logits stay within `elements`; at least one."""
        return max(1, elements // len(self.weight))


def fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    documents: Iterable[Sequence[int]],
    max_length: int = 512,
    batch_size: int = 4,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> JsonObject:
    """Compare two models with one vocabulary on tokenised documents, each cut in rows.

    Every row starts from an empty context, so its first token has no prediction. All numbers are
    per predicted token: `kl` is KL(teacher || student) in nats (`kl_p95` its 95th percentile) and
    `reverse_kl` KL(student || teacher), `agreement` the share of equal top tokens, `top5` how much
    of the teacher's five best tokens is among the student's, `acceptance` 1 - total variation (the
    expected acceptance of speculative sampling), `ce` and `perplexity` are those of the text.
    """
    only = {"student": Variant(student)}
    return compare(only, teacher, documents, max_length, batch_size, chunk_elements)["student"]


def compare(
    variants: Mapping[str, Variant],
    teacher: PreTrainedModel,
    documents: Iterable[Sequence[int]],
    max_length: int = 512,
    batch_size: int = 4,
    chunk_elements: int = CHUNK_ELEMENTS,
    bootstrap: Bootstrap | None = None,
) -> dict[str, JsonObject]:
    """`fidelity` of several students to one teacher on the same rows, which it reads once."""
    documents = list(documents)
    found = predict(variants, teacher, documents, max_length, batch_size, chunk_elements)
    counts = {"documents": len(documents), "rows": found.row_count, "max_length": max_length}
    return {name: counts | found.summary(name, bootstrap) for name in variants}


@torch.inference_mode()
def predict(
    variants: Mapping[str, Variant],
    teacher: PreTrainedModel,
    documents: Sequence[TokenIds],
    max_length: int = 512,
    batch_size: int = 4,
    chunk_elements: int = CHUNK_ELEMENTS,
    dealer: Dealer = ALONE,
) -> Predictions:
    """Measure every prediction of several students beside one teacher's on the same rows.

    Raises ModelError for other vocabularies, UsageError where there is nothing to predict.
    """
    for variant in variants.values():
        _same_vocabulary(variant.model, teacher)
    rows = _located_rows(documents, max_length)
    if not rows:
        raise UsageError(
            "the data holds no document of two tokens or more, so there is nothing to predict",
            hint="pass text that is longer",
        )
    heads = [Head.of(model) for model in (teacher, *(each.model for each in variants.values()))]
    ids = [row.ids for row in rows]
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]

    def measure(batch: list[Tensor]) -> list[Tensor]:
        return _measure_batch(list(variants.values()), teacher, heads, batch, chunk_elements)

    with console.progress("fidelity", sum(map(len, ids))) as task:
        found = dealer.results(batches, measure, task.advance, tokens_of)
    counts = torch.tensor([len(row.ids) - 1 for row in rows])
    positions = torch.cat([torch.arange(int(count)) for count in counts])
    origins = torch.tensor([(row.document, row.number) for row in rows])  # [R, 2]
    documents_of, rows_of = origins.repeat_interleave(counts, 0).T.numpy()
    values: dict[str, dict[str, np.ndarray]] = {
        name: dict(zip(COLUMNS, torch.cat(parts).numpy().T, strict=True))
        for name, parts in zip(variants, zip(*found, strict=True), strict=True)
    }
    return Predictions(values, positions.numpy(), documents_of, rows_of)


@dataclass(frozen=True)
class _Row:
    """Token ids [n], the document they are of, and the row's number in the data set."""

    ids: Tensor
    document: int
    number: int


def cut_rows(documents: Iterable[TokenIds], max_length: int) -> list[Tensor]:
    """Cut documents into rows of at most `max_length` tokens, longest first.

    A rest of one token is dropped: nothing in it can be predicted.
    """
    return [row.ids for row in _located_rows(documents, max_length)]


def tokens_of(rows: Sequence[Tensor]) -> int:
    """Number of tokens in some rows."""
    return sum(map(len, rows))


def _located_rows(documents: Iterable[TokenIds], max_length: int) -> list[_Row]:
    pieces = [
        (torch.as_tensor(document[start : start + max_length], dtype=torch.long), index)
        for index, document in enumerate(documents)
        for start in range(0, len(document), max_length)
    ]
    rows = [_Row(ids, index, number) for number, (ids, index) in enumerate(pieces) if len(ids) > 1]
    # equal lengths side by side waste the least padding
    return sorted(rows, key=lambda row: len(row.ids), reverse=True)


def compare_logits(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Measure N predictions; logits [N, V], targets [N], result [N, 7] in the order of `MEANS`."""
    return measure_logits(student, teacher, targets)[:, : len(MEANS)]


def measure_logits(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """`compare_logits` and behind it the columns of calibration, [N, 12] as in `COLUMNS`."""
    size = len(targets)
    if student.device.type == "cpu":
        size = max(1, CPU_ELEMENTS // student.shape[-1])
    pieces = zip(student.split(size), teacher.split(size), targets.split(size), strict=True)
    return torch.cat([_measure(*piece) for piece in pieces])


def _measure(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    x, y = student.float(), teacher.float()
    (tops, best), (wanted_tops, wanted) = x.topk(TOP, -1), y.topk(TOP, -1)  # [N, 5]
    q, p = x.softmax(-1), y.softmax(-1)  # [N, V]
    # the sum's logarithm, from the one probability that cannot vanish
    x_sum = tops[:, :1] - q.gather(-1, best[:, :1]).log()  # [N, 1]
    y_sum = wanted_tops[:, :1] - p.gather(-1, wanted[:, :1]).log()
    confidence = confidences(q, p, (best[:, 0], wanted[:, 0]), targets)
    acceptance = torch.minimum(p, q).sum(-1)
    agreement = (best[:, 0] == wanted[:, 0]).float()
    shared = (best[:, :, None] == wanted[:, None, :]).any(1).float().mean(-1)
    picked = targets[:, None]
    ce, teacher_ce = (
        (total - logits.gather(-1, picked))[:, 0] for total, logits in ((x_sum, x), (y_sum, y))
    )
    # in this order equal models differ by exactly nothing
    difference = (y - x).sub_(y_sum - x_sum)  # log p - log q, [N, V]
    kl, reverse = p.mul_(difference).sum(-1), -q.mul_(difference).sum(-1)
    means = torch.stack([kl, reverse, agreement, shared, acceptance, ce, teacher_ce], dim=-1)
    return torch.cat([means, confidence], -1)


def _measure_batch(
    variants: Sequence[Variant],
    teacher: PreTrainedModel,
    heads: Sequence[Head],
    rows: list[Tensor],
    chunk_elements: int,
) -> list[Tensor]:
    """Every variant's measurements of all predictions of a batch [N, 12].

    `heads` are the teacher's and then each variant's.
    """
    device = teacher.device
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [B, T]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [B, T]
    predicted = mask[:, 1:]  # [B, T-1], position t predicts token t + 1
    targets = ids[:, 1:][predicted]  # [N]

    guide = _hidden(teacher, ids)[:, :-1][predicted]  # [N, D]
    every = []
    for variant in variants:
        hidden = guide
        # the same object needs one pass, and then equals itself bit for bit
        if variant.model is not teacher or variant.during is not nullcontext:
            where = variant.model.device
            with variant.during():
                hidden = _hidden(variant.model, ids.to(where))
            hidden = hidden[:, :-1][predicted.to(where)]
        every.append(hidden)
    size = heads[0].rows(chunk_elements)
    measured: list[list[Tensor]] = [[] for _ in variants]
    for start in range(0, len(targets), size):
        piece = slice(start, start + size)
        wanted = heads[0](guide[piece])  # [n, V]
        for parts, head, hidden in zip(measured, heads[1:], every, strict=True):
            logits = head(hidden[piece]).to(device)
            parts.append(measure_logits(logits, wanted, targets[piece]))
    return [torch.cat(parts).double().cpu() for parts in measured]


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    # padding stands behind everything, where no causal model sees it
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]


def _same_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [output_head(model).weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the student has a vocabulary of {sizes[0]} tokens and the teacher one of {sizes[1]}",
            hint="compare models that share a tokenizer; --teacher names the right one",
        )
