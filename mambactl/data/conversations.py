"""Conversations that a model shall answer: rows of prompt sets, each once, dealt to shards."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, zip_longest

from mambactl.data.bad_rows import MALFORMED, BadRows
from mambactl.data.row_files import read_rows
from mambactl.data.row_forms import QUESTIONS, TEMPLATE, TOOLS, Reading, Unread, question_of
from mambactl.data.sources import round_robin
from mambactl.data.turns import ASSISTANT, SYSTEM, USER, BadRow, Row
from mambactl.errors import UsageError

# what a row says about itself and an answer keeps
KEPT = ("id", "category", "dataset", "reference")
# the number of a question, in the place of an id
NUMBER = "question_id"


@dataclass(frozen=True)
class Conversation:
    """Turns up to the first one to be answered, and the user's later turns.

    `about` holds what the row says about itself (KEPT), `where` names its file and row.
    """

    where: str
    opening: tuple[Row, ...]
    later: tuple[str, ...] = ()
    tools: list[Row] | None = None
    about: Row = field(default_factory=dict)
    # options of its own for the chat template
    template: Row = field(default_factory=dict)

    @property
    def n_answers(self) -> int:
        """Number of turns that the model writes."""
        return 1 + len(self.later)

    @cached_property
    def digest(self) -> bytes:
        """sha256 of everything the model reads: equal prompts have equal digests."""
        content = [self.opening, self.later, self.tools]
        content += [self.template] if self.template else []
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
        """Sampling key (int64) of an answer, from the prompt, the sample and the turn alone."""
        name = b"%s/%d/%d" % (self.digest, sample, turn)
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big", signed=True)


def read_conversations(
    specs: Sequence[str], max_samples: int | None = None, bad: BadRows | None = None
) -> list[Conversation]:
    """Read every set of `specs`, taking rows from them round-robin: what can be answered.

    A spec is what `--data` takes, but a .txt file holds a prompt per line. Rows hold `turns` (user
    turns, each answered in order), a chat (answered after the last turn that is not the
    assistant's), a prompt or `text`; other rows are noted in `bad`. Columns that nothing reads are
    named once per file. Raises UsageError for a file that cannot be read.
    """
    found: list[Conversation] = []
    bad, unread = BadRows() if bad is None else bad, Unread(known=(*KEPT, NUMBER))
    rows = round_robin([_located(spec, bad) for spec in specs])
    for where, row, file in islice(rows, max_samples):
        try:
            reading = Reading.of(row)
            found.append(_conversation(where, reading))
            unread.see(file, reading)
        except BadRow as error:
            bad.add(MALFORMED, where, str(error), error.cure or f"expected {QUESTIONS}")
        except UsageError as error:
            bad.add(MALFORMED, where, str(error), error.hint or f"expected {QUESTIONS}")
    if not found and not bad.found:
        raise UsageError(f"{', '.join(specs)}: no rows", "give a set with at least one prompt")
    return found


def conversation(where: str, row: object) -> Conversation:
    """The conversation of one row; raises UsageError that says what is wrong with it."""
    try:
        return _conversation(where, Reading.of(row))
    except BadRow as error:
        raise UsageError(str(error), error.cure) from None


def _conversation(where: str, reading: Reading) -> Conversation:
    row, (turns, later, extras) = reading.row, question_of(reading)
    while turns and turns[-1]["role"] == ASSISTANT:
        turns = turns[:-1]
    if not any(turn["role"] == USER for turn in turns):
        raise UsageError("has no user turn")
    if turns[-1]["role"] == SYSTEM:
        raise UsageError("ends with a system turn, so nothing is to be answered")
    questions = [turn.get("content") for turn in turns if turn["role"] == USER]
    if not all(isinstance(text, str) and text.strip() for text in [*questions, *later]):
        raise UsageError("has an empty prompt")
    about = {name: row[name] for name in KEPT if row.get(name) is not None}
    if row.get(NUMBER) is not None:
        about.setdefault("id", row[NUMBER])
    tools, template = extras.get(TOOLS), extras.get(TEMPLATE, {})
    found = Conversation(where, tuple(turns), tuple(later), tools, about, template)
    try:
        json.dumps(found.about, ensure_ascii=False, default=str).encode()
        # half a surrogate pair is text that neither a tokenizer nor a file takes
        return found if found.digest else found
    except UnicodeEncodeError as error:
        raise UsageError(f"holds what is no text ({error.reason})") from None


def distinct(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Conversations without repeats of the same prompt, in the order of their first places."""
    found: dict[bytes, Conversation] = {}
    for each in conversations:
        found.setdefault(each.digest, each)
    return list(found.values())


def shard_of(conversation: Conversation, count: int) -> int:
    """Number of the shard (1 to `count`) of a prompt, whatever else is in the set."""
    return 1 + int.from_bytes(conversation.digest[:8], "big") % count


def _located(spec: str, bad: BadRows) -> Iterator[tuple[str, object, str]]:
    for where, row, file in read_rows(spec, bad):
        if not file.removesuffix(".gz").endswith(".txt") or not isinstance(row, dict):
            yield where, row, file
            continue
        for number, line in enumerate(row["text"].splitlines(), start=1):
            if line.strip():
                yield f"{file}, line {number}", {"text": line}, file
