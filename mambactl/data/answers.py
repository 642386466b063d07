"""Answers as files: rows that `--data` reads, and what AlpacaEval's and MT-Bench's judges read.

AlpacaEval reads one JSON list of `instruction`, `output`, `generator` and `dataset`; FastChat's
judges for MT-Bench (Zheng et al., arXiv 2306.05685) read JSON Lines with `question_id`,
`answer_id`, `model_id`, `choices` (a list of `index` and `turns`) and `tstamp`, from a file named
after the model.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from mambactl.data.conversations import Conversation
from mambactl.data.turns import Row
from mambactl.errors import UsageError

Format = Literal["jsonl", "alpaca-eval", "mt-bench"]
# what FastChat answers the questions of a category with, and those of every other one
CATEGORY_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}
OTHER_TEMPERATURE = 0.7
ID_LENGTH = 22


@dataclass(frozen=True)
class Answer:
    """One sample: a text for every question of its conversation.

    `finish` is "length" if any of them was cut, `tokens` counts all new ones, `time` is when it was
    written, in seconds since 1970.
    """

    sample: int
    texts: tuple[str, ...]
    finish: str
    tokens: int
    time: float


Group = tuple[Conversation, Sequence[Answer]]


def require_fit(conversation: Conversation, format: Format) -> None:
    """Raise UsageError for a conversation that a format has no place for."""
    plain = len(conversation.opening) == 1 and conversation.tools is None
    if format == "alpaca-eval" and not (plain and not conversation.later):
        raise UsageError("is more than one instruction, which alpaca-eval has no place for")
    if format == "mt-bench" and "id" not in conversation.about:
        raise UsageError("has no `id`, by which mt-bench knows a question")


def write_answers(file: TextIO, groups: Iterable[Group], format: Format, generator: str) -> int:
    """Write every group of samples of one prompt; returns the number of rows."""
    rows = _ROWS[format](groups, generator)
    if format != "alpaca-eval":
        return sum(1 for row in rows if file.write(_line(row) + "\n"))
    count = 0
    for count, row in enumerate(rows, start=1):
        file.write((",\n" if count > 1 else "[\n") + _line(row))
    file.write("\n]\n" if count else "[]\n")
    return count


def _training_rows(groups: Iterable[Group], generator: str) -> Iterator[Row]:
    for conversation, answers in groups:
        about = dict(conversation.about)
        head = {"id": about.pop("id")} if "id" in about else {}
        tools = {"tools": conversation.tools} if conversation.tools else {}
        for answer in answers:
            yield {
                **head,
                "messages": conversation.messages(answer.texts),
                **tools,
                "sample": answer.sample,
                "finish": answer.finish,
                "tokens": answer.tokens,
                **about,
            }


def _alpaca_rows(groups: Iterable[Group], generator: str) -> Iterator[Row]:
    for conversation, answers in groups:
        about = conversation.about
        for answer in answers:
            yield {
                "dataset": str(about.get("dataset") or about.get("category") or ""),
                "instruction": conversation.opening[0]["content"],
                "output": answer.texts[0].strip(),
                "generator": generator,
            }


def _bench_rows(groups: Iterable[Group], generator: str) -> Iterator[Row]:
    for conversation, answers in groups:
        if not answers:
            continue
        question = conversation.about["id"]
        texts = [answer.texts for answer in answers]
        name = json.dumps([question, generator, texts])
        yield {
            "question_id": question,
            "answer_id": hashlib.sha256(name.encode()).hexdigest()[:ID_LENGTH],
            "model_id": generator,
            "choices": [
                {"index": index, "turns": [text.strip() for text in answer.texts]}
                for index, answer in enumerate(answers)
            ],
            "tstamp": max(answer.time for answer in answers),
        }


_ROWS: dict[Format, Callable[[Iterable[Group], str], Iterator[Row]]] = {
    "jsonl": _training_rows,
    "alpaca-eval": _alpaca_rows,
    "mt-bench": _bench_rows,
}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)
