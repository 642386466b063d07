"""Answers of `generate --dataset` on disk, in the working folder of OUT.

One file holds all batches up to a number, in their order. A batch that is answered before one in
front of it, by another process say, has a file of its own until its number has come, which names
the run it belongs to: what a process of an earlier run leaves late is not taken.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import BinaryIO

from pydantic import BaseModel, Field, ValidationError

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.data.answers import Answer, Group
from mambactl.data.conversations import Conversation
from mambactl.errors import OutputError
from mambactl.files import explained, replacing
from mambactl.foreign import fitted, json_object

FREE = "free some disk space, then use --resume"
_AGAIN = "start again with --force"


class _State(BaseModel):
    """Batches and bytes that are on disk, and what they took."""

    batches: int = Field(default=0, ge=0)
    bytes: int = Field(default=0, ge=0)
    totals: dict[str, int | float] = {}


class _Line(BaseModel):
    """One answer as a line of the working file holds it."""

    prompt: int
    sample: int
    texts: tuple[str, ...]
    finish: str
    tokens: int
    time: float


class _Head(BaseModel):
    """First line of a batch's own file: its run, its answers, and what they took."""

    run: str
    answers: int
    totals: dict[str, int | float]


class BatchFiles:
    """Batches that have a file each; `run` is a digest of what decides all answers of the run."""

    def __init__(self, folder: RunFolder, run: str):
        self.folder, self.run = folder, run

    def add(
        self, number: int, answers: Sequence[tuple[int, Answer]], totals: Mapping[str, float]
    ) -> None:
        """Write a whole batch; after this it is never decoded again."""
        head = {"run": self.run, "answers": len(answers), "totals": dict(totals)}
        path = self.folder.batch(number)
        with explained(self.folder.path, FREE), replacing(path) as new:
            new.write_bytes(json.dumps(head).encode() + b"\n" + _lines(answers))

    def read(self, number: int) -> tuple[bytes, dict[str, int | float]] | None:
        """Lines of a batch and what they took; None where it is not there, or of another run."""
        try:
            head, _, lines = self.folder.batch(number).read_bytes().partition(b"\n")
            found = _Head.model_validate_json(head)
        except (FileNotFoundError, ValidationError):
            return None
        whole = found.answers == lines.count(b"\n") and lines.endswith(b"\n")
        return (lines, found.totals) if whole and found.run == self.run else None

    def remove(self, number: int) -> None:
        """Delete a batch's file where there is one."""
        with suppress(FileNotFoundError):
            self.folder.batch(number).unlink()


class OtherAnswers(BatchFiles):
    """Files of the batches that a process beside the main one answers; the main one gathers."""

    def gather(self) -> None:
        """Do nothing: the main process gathers."""

    def left(self, batches: int) -> list[int]:
        """Nothing that this process knows of: the main one says what is left."""
        return []

    def require_all(self, batches: int) -> None:
        """Do nothing: the main process waits for the others."""


class WrittenAnswers:
    """The answers that are on disk, in the order of their batches, and what they took.

    A line holds a prompt's number and one Answer. What follows the last state is forgotten.
    """

    def __init__(self, folder: RunFolder, run: str):
        self.folder, self.run, self.ahead = folder, run, BatchFiles(folder, run)
        found = folder.load_state() or {}
        state = fitted(_State, found, folder.path, "its state", OutputError, _AGAIN)
        self.batches = state.batches
        self.totals = Counter(state.totals)
        # no name that the result itself may have
        path = folder.path / "decoded.partial"
        with explained(path, FREE):
            path.touch()
            if path.stat().st_size < state.bytes:
                raise OutputError(f"{path} lost what was written", _AGAIN)
            self.file: BinaryIO = path.open("r+b")
            self.file.truncate(state.bytes)
            self.file.seek(state.bytes)

    def add(
        self, number: int, answers: Sequence[tuple[int, Answer]], totals: Mapping[str, float]
    ) -> None:
        """Write a whole batch; after this it is never decoded again."""
        if number == self.batches:
            self._append(_lines(answers), totals)
        else:
            self.ahead.add(number, answers, totals)
        self.gather()

    def gather(self) -> None:
        """Append the batches whose number has come."""
        while (found := self.ahead.read(self.batches)) is not None:
            self._append(*found)
            self.ahead.remove(self.batches - 1)

    def left(self, batches: int) -> list[int]:
        """Numbers of the batches, of so many, that nobody has answered."""
        return [n for n in range(self.batches, batches) if self.ahead.read(n) is None]

    def require_all(self, batches: int) -> None:
        """Append what is left; raises OutputError where a batch is not there."""
        self.gather()
        if self.batches < batches:
            lost = self.folder.batch(self.batches)
            raise OutputError(f"{lost} is damaged or gone", "--resume answers its prompts again")

    def _append(self, lines: bytes, totals: Mapping[str, float]) -> None:
        with explained(self.folder.path, FREE):
            self.file.write(lines)
            self.file.flush()
            os.fsync(self.file.fileno())
        self.batches += 1
        self.totals.update(totals)
        self.folder.save_state(
            {"batches": self.batches, "bytes": self.file.tell(), "totals": dict(self.totals)}
        )

    def groups(self, conversations: Sequence[Conversation]) -> Iterator[Group]:
        """Every prompt with its samples, in the order of the set; one prompt in memory."""
        offsets: dict[int, list[int]] = {}
        self.file.seek(0)
        offset = 0
        for line in self.file:
            offsets.setdefault(self._parsed(line).prompt, []).append(offset)
            offset += len(line)
        for prompt, conversation in enumerate(conversations):
            answers = []
            for begin in offsets.get(prompt, ()):
                self.file.seek(begin)
                found = self._parsed(self.file.readline())
                answers.append(Answer(**found.model_dump(exclude={"prompt"})))
            yield conversation, sorted(answers, key=lambda answer: answer.sample)

    def _parsed(self, line: bytes) -> _Line:
        where = (self.file.name, "an answer", OutputError, _AGAIN)
        return fitted(_Line, json_object(line, *where), *where)


def _lines(answers: Sequence[tuple[int, Answer]]) -> bytes:
    rows = ({"prompt": prompt, **asdict(answer)} for prompt, answer in answers)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
