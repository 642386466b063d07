"""Agreement of two models' greedy texts behind the same prompts, token by token."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mambactl.evaluation.likelihood import BatchSize, Request, greedy_tokens
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.models.hybrid import HybridForCausalLM

Tokens = Sequence[int]


@dataclass(frozen=True)
class Pair:
    """Continuations of one prompt by two models."""

    prompt: Tokens
    student: Tokens
    teacher: Tokens


def generation_agreement(pairs: Sequence[Pair]) -> dict[str, float]:
    """Means over prompts, 1 where the texts are the same (`prefix_tokens` counts tokens).

    `prefix_*`: up to the first token that differs, as a number and as a share of the longer text;
    `exact_match`: whole texts that are equal; `position_match`: positions with the same token;
    `token_f1`: the same tokens at any position.
    """
    rows = [_row(pair.student, pair.teacher) for pair in pairs]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def forced_agreement(
    model: HybridForCausalLM,
    pairs: Sequence[Pair],
    batch_size: BatchSize = "auto",
    dealer: Dealer = ALONE,
) -> float:
    """Share of the teacher's tokens that the model would have written next itself.

    Behind the teacher's own text, so one early difference counts once: what a draft of these texts
    would be accepted with.
    """
    requests = [Request(pair.prompt, pair.teacher) for pair in pairs]
    longest = max(len(request.context) + len(request.continuation) for request in requests)
    written = sum(len(request.continuation) for request in requests)
    return sum(greedy_tokens(model, requests, longest, batch_size, dealer)) / written


def _row(student: Tokens, teacher: Tokens) -> dict[str, float]:
    longer = max(len(student), len(teacher))
    same = [one == other for one, other in zip(student, teacher, strict=False)]
    prefix = same.index(False) if False in same else len(same)
    common = sum((Counter(student) & Counter(teacher)).values())
    either = len(student) + len(teacher)
    return {
        "prefix_tokens": float(prefix),
        "prefix_share": prefix / longer if longer else 1.0,
        "exact_match": float(list(student) == list(teacher)),
        "position_match": sum(same) / longer if longer else 1.0,
        "token_f1": 2 * common / either if either else 1.0,
    }
