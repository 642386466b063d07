"""Conversations that a model shall answer: rows of prompt sets, each once, dealt to shards."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, zip_longest
from typing import Any

from mambactl.data.bad_rows import MALFORMED, BadRows
from mambactl.data.row_files import read_rows
from mambactl.data.sources import Row, chat_turns, tool_list
from mambactl.errors import UsageError
from mambactl.foreign import excerpt

EXPECTED = "`prompt`, `messages`, `turns` (strings), `instruction` or `text` per row"
# what a row says about itself and an answer keeps
KEPT = ("id", "category", "dataset", "reference")


@dataclass(frozen=True)
class Conversation:
    """Turns up to the first one to be answered, and the user's later turns.

    `about` holds what the row says about itself (KEPT), `where` names its file and row.
    """

    where: str
    opening: tuple[Row, ...]
    later: tuple[str, ...] = ()
    tools: list[Row] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def n_answers(self) -> int:
        """How many turns the model writes."""
        return 1 + len(self.later)

    @cached_property
    def digest(self) -> bytes:
        """sha256 of everything the model reads: equal prompts have equal digests."""
        content = [self.opening, self.later, self.tools]
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).digest()

    def messages(self, answers: Sequence[str] = ()) -> list[Row]:
        """The turns with the model's answers in their places, up to the next one to be answered."""
        turns = list(self.opening)
        for answer, question in zip_longest(answers, self.later[: len(answers)]):
            turns.append({"role": "assistant", "content": answer})
            if question is not None:
                turns.append({"role": "user", "content": question})
        return turns

    def key(self, sample: int, turn: int) -> int:
        """What names an answer for sampling (int64): it depends on nothing but the prompt."""
        name = b"%s/%d/%d" % (self.digest, sample, turn)
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big", signed=True)


def read_conversations(
    specs: Sequence[str], max_samples: int | None = None, bad: BadRows | None = None
) -> list[Conversation]:
    """Read every set of `specs`, taking rows from them round-robin: what can be answered.

    A spec is a .jsonl, .jsonl.gz or .parquet file (a row each), a .txt file (a prompt per line) or
    a hub id `ID[:config][@split]`. Rows hold `turns` (user turns, each answered in order),
    `messages` (answered after the last turn that is not the assistant's), `prompt`, `instruction`
    with an optional `input`, or `text`; other rows are noted in `bad`. Raises UsageError for a file
    that cannot be read.
    """
    found: list[Conversation] = []
    bad = BadRows() if bad is None else bad
    # a round takes one row of every set, and nothing of one that has ended
    rounds = zip_longest(*(_located(spec, bad) for spec in specs))
    rows = (row for row in chain.from_iterable(rounds) if row is not None)
    for where, row in islice(rows, max_samples):
        try:
            found.append(conversation(where, row))
        except UsageError as error:
            bad.add(MALFORMED, where, str(error), f"expected {EXPECTED}")
    if not found and not bad.found:
        raise UsageError(f"{', '.join(specs)}: no rows", "give a set with at least one prompt")
    return found


def conversation(where: str, row: Any) -> Conversation:
    """The conversation of one row; raises UsageError that says what is wrong with it."""
    if not isinstance(row, dict):
        raise UsageError(f"holds a {type(row).__name__}, not an object")
    turns, later = _turns(row)
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not any(turn["role"] == "user" for turn in turns):
        raise UsageError("has no user turn")
    if turns[-1]["role"] == "system":
        raise UsageError("ends with a system turn, so nothing is to be answered")
    questions = [turn.get("content") for turn in turns if turn["role"] == "user"]
    if not all(isinstance(text, str) and text.strip() for text in [*questions, *later]):
        raise UsageError("has an empty prompt")
    tools = tool_list(row["tools"]) if row.get("tools") else None
    about = {name: row[name] for name in KEPT if row.get(name) is not None}
    if row.get("question_id") is not None:
        about.setdefault("id", row["question_id"])
    found = Conversation(where, tuple(turns), tuple(later), tools, about)
    try:
        json.dumps(found.about, ensure_ascii=False, default=str).encode()
        # half a surrogate pair is text that neither a tokenizer nor a file takes
        return found if found.digest else found
    except UnicodeEncodeError as error:
        raise UsageError(f"holds what is no text ({error.reason})") from None


def distinct(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Every prompt once, where it comes first."""
    found: dict[bytes, Conversation] = {}
    for each in conversations:
        found.setdefault(each.digest, each)
    return list(found.values())


def shard_of(conversation: Conversation, count: int) -> int:
    """Which of `count` parts (from 1) a prompt belongs to, whatever else is in the set."""
    return 1 + int.from_bytes(conversation.digest[:8], "big") % count


def _located(spec: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    if not spec.endswith(".txt"):
        yield from ((f"{spec}, row {number}", row) for number, row in read_rows(spec, bad))
        return
    lines = [line for _, row in read_rows(spec) for line in row["text"].splitlines()]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{spec}, line {number}", {"text": line}


def _turns(row: Row) -> tuple[list[Row], list[str]]:
    """Turns up to the first answer, and later questions."""
    turns = row.get("turns")
    if turns is not None:
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise UsageError("`turns` is not a list of strings")
        if not turns:
            raise UsageError("has an empty prompt")
        return [_user(turns[0])], turns[1:]
    for name in ("messages", "prompt"):
        if isinstance(row.get(name), str):
            return [_user(row[name])], []
        if row.get(name) is not None:
            return chat_turns(row[name], name), []
    texts = [row.get("instruction"), row.get("input")]
    if isinstance(texts[0], str):
        return [_user("\n\n".join(text for text in texts if isinstance(text, str) and text))], []
    if isinstance(row.get("text"), str):
        return [_user(row["text"])], []
    columns = excerpt(", ".join(f"`{name}`" for name in row)) or "none"
    raise UsageError(f"has no prompt in its columns {columns}")


def _user(text: str) -> Row:
    return {"role": "user", "content": text}
