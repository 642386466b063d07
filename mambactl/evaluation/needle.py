"""Needle in a haystack: does a model find one sentence, by length of the text and depth in it?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from mambactl.data.haystack import ANSWER, ANSWER_START, NEEDLE, Haystack, make_frame, needle_prompt
from mambactl.data.recall_documents import encode_words
from mambactl.decode.backend import make_engine
from mambactl.decode.sampler import SamplingParams
from mambactl.evaluation.output_head import output_head
from mambactl.evaluation.recall import read_answers
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.json_values import JsonObject
from mambactl.metrics import RETRIEVED
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.present import of_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scoring = Literal["generate", "argmax"]
# scores of every prompt by their names, [lengths][depths * texts]
Found = list[list[JsonObject]]
ANSWERS = "answers"
# what an answer must hold, in any case of letters
WANTED = ("sandwich", "dolores park")
NEW_TOKENS = 32
# prompts are read together up to so many tokens
BATCH_TOKENS = 2**17


@dataclass(frozen=True)
class Grid:
    """Prompts [lengths][depths * texts] of token ids; those of a depth stand side by side.

    Depths are from 0 to 1, all prompts of a length are as long.
    """

    lengths: list[int]
    depths: list[float]
    texts: int
    prompts: list[list[list[int]]]
    answer: list[int]
    scoring: Scoring


def make_grid(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[JsonObject],
    lengths: Sequence[int],
    depths: int,
    seed: int,
    scoring: Scoring,
    texts: int = 1,
) -> Grid:
    """`texts` prompts per length and depth, each with another part of the text around the needle.

    `generate` leaves room for `NEW_TOKENS`; `argmax` writes the start of the answer into the
    prompt and keeps the rest of it to compare with.
    """
    frame, haystack = make_frame(tokenizer), Haystack(rows, tokenizer, seed)
    fractions = [step / (depths - 1) for step in range(depths)] if depths > 1 else [0.5]
    answer: list[int] = []
    start: list[int] = []
    if scoring == "argmax":
        templated = bool(getattr(tokenizer, "chat_template", None))
        # together, for tokens may reach over a space
        start = encode_words(tokenizer, ANSWER_START if templated else f" {ANSWER_START}")
        answer = encode_words(tokenizer, ANSWER)
    room = NEW_TOKENS if scoring == "generate" else len(start) + len(answer)
    lengths = sorted(set(lengths))
    prompts = [
        [
            [*needle_prompt(haystack, frame, length, fraction, room, text), *start]
            for fraction in fractions
            for text in range(texts)
        ]
        for length in lengths
    ]
    return Grid(lengths, fractions, texts, prompts, answer, scoring)


def measure_needle(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    grid: Grid,
    end_tokens: Sequence[int],
    advance: Callable[[int], None] = lambda prompts: None,
    dealer: Dealer = ALONE,
) -> Found:
    """Scores by [length][prompt].

    generate: `retrieved` (1 where the greedy answer holds all of `WANTED`), `rouge1` (F1 of the
    words of answer and needle, what the paper reports) and `answers`.
    argmax: `retrieved` (1 where every token of the answer is the most likely one after those
    before it) and `tokens`, the share of them that is. One pass, nothing is generated.
    """
    measure: Callable[[Sequence[Sequence[int]]], list[JsonObject]] = (
        _Generated(model, tokenizer, end_tokens)
        if grid.scoring == "generate"
        else _Forced(model, grid.answer)
    )
    batches: list[list[list[int]]] = []
    origins: list[int] = []
    # the longest first: memory that holds it holds the others
    for index in sorted(range(len(grid.lengths)), key=lambda i: -grid.lengths[i]):
        prompts = grid.prompts[index]
        size = max(1, BATCH_TOKENS // grid.lengths[index])
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        batches += parts
        origins += [index] * len(parts)
    found: Found = [[] for _ in grid.lengths]
    for index, part in zip(origins, dealer.results(batches, measure, advance, len), strict=True):
        found[index] += part
    return found


def scores_by_depth(grid: Grid, found: Found, samples: bool = False) -> JsonObject:
    """Scores by [length][depth], each the mean of the texts there, and the mean of all.

    `samples`: also the answers, a list of them where there are several texts.
    """
    result: JsonObject = {}
    for name in found[0][0]:
        cells = [[_at_depth(grid, row, i, name) for i in range(len(grid.depths))] for row in found]
        if name == ANSWERS:
            if samples:
                result[name] = [[c if grid.texts > 1 else c[0] for c in row] for row in cells]
            continue
        result[name] = [[sum(cell) / grid.texts for cell in row] for row in cells]
        result[f"mean_{name}"] = float(np.mean(result[name]))
    return result


def _at_depth(grid: Grid, row: Sequence[JsonObject], depth: int, name: str) -> list[Any]:
    return [prompt[name] for prompt in row[depth * grid.texts :][: grid.texts]]


def found_by_prompt(found: Found) -> list[np.ndarray]:
    """1 where a prompt's needle was retrieved, else 0, of every length [depths * texts]."""
    return [np.array([prompt[RETRIEVED.name] for prompt in row]) for row in found]


class _Generated:
    """Greedy answers through the decode engine."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: "PreTrainedTokenizerBase",
        end_tokens: Sequence[int],
    ):
        self.engine = make_engine(of_kind(HybridForCausalLM, model), None, 0)
        self.tokenizer = tokenizer
        self.params = SamplingParams(max_new_tokens=NEW_TOKENS, eos_token_ids=tuple(end_tokens))

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[JsonObject]:
        output = self.engine.generate(prompts, self.params)
        texts = self.tokenizer.batch_decode(output.tokens, skip_special_tokens=True)
        return [
            {
                RETRIEVED.name: retrieved(text),
                "rouge1": rouge1(text, NEEDLE),
                ANSWERS: text.strip(),
            }
            for text in texts
        ]


class _Forced:
    """The answer's tokens, each judged after the right ones before it."""

    def __init__(self, model: PreTrainedModel, answer: Sequence[int]):
        self.model, self.answer = model, list(answer)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[JsonObject]:
        device, size = self.model.device, len(self.answer)
        ids = torch.tensor([[*prompt, *self.answer[:-1]] for prompt in prompts], device=device)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        asked = hidden[:, -size:].flatten(0, 1)  # [B * A, D]
        targets = torch.tensor(self.answer * len(prompts), device=device)
        answers = read_answers(asked, output_head(self.model), targets)
        right = answers[:, 0].view(len(prompts), size).double().cpu()  # [B, A]
        return [{RETRIEVED.name: float(row.min()), "tokens": float(row.mean())} for row in right]


def retrieved(text: str) -> float:
    """1 where an answer holds everything that the needle says, else 0."""
    lowered = text.lower()
    return float(all(wanted in lowered for wanted in WANTED))


def rouge1(text: str, wanted: str) -> float:
    """F1 of the words two texts share, each as often as it is in both (ROUGE-1; Lin, 2004)."""
    ours, theirs = (_words(each) for each in (text, wanted))
    shared = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 2 * shared / (len(ours) + len(theirs)) if ours and theirs else 0.0


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
