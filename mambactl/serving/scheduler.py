"""The thread that decodes: it reads prompts a piece at a time and steps all rows between pieces."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from mambactl import console
from mambactl.decode.kept_prompts import KeptPrompts
from mambactl.decode.open_batch import OpenBatch, Written
from mambactl.decode.prefill import CHUNK_TOKENS
from mambactl.decode.prompt_reading import PromptReading, ReadPrompt, Whole
from mambactl.models.draft_head import DraftModel
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.serving.prometheus import ServerMetrics
from mambactl.serving.refusals import Refused, ending, not_ready, queue_full
from mambactl.serving.written_text import Arrived, Job, WrittenText

# prompts are read together where padding adds no more than this
MOST_PADDING = 1.25
# pieces that are read at once where nothing else is to be done
PIECES_ALONE = 8


@dataclass(frozen=True)
class Decoding:
    """Loaded models, and the batch that decodes with them."""

    target: HybridForCausalLM
    draft: DraftModel
    batch: OpenBatch
    kept: KeptPrompts
    # tokens of prompts between two steps, and where there are none
    piece: int
    at_once: int = CHUNK_TOKENS
    # reads short prompts as CUDA graphs
    whole: Whole | None = None


@dataclass
class _Reading:
    """Prompts being read, and the jobs that wait for them: none for a shared beginning alone."""

    reading: PromptReading
    jobs: list[Job] = field(default_factory=list)


@dataclass
class _Row:
    """A row of the batch, and whose text it is."""

    text: WrittenText
    job: Job
    heard: bool = False


class Scheduler:
    """Decodes what is submitted; all but `submit`, `cancel` and `stop` run in its own thread."""

    def __init__(
        self,
        decoding: Decoding,
        metrics: ServerMetrics,
        loop: asyncio.AbstractEventLoop,
        max_queue: int,
    ):
        self.decoding, self.metrics, self.loop, self.max_queue = decoding, metrics, loop, max_queue
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._cancelled: list[Job] = []
        self._stopped = False
        self._rows: dict[int, _Row] = {}
        self._numbers = 0
        self._reading: _Reading | None = None
        # what was read and is not kept yet
        self._read_last: PromptReading | None = None
        self._touched: set[WrittenText] = set()

    def submit(self, jobs: list[Job]) -> None:
        """Queue the prompts of a request; Refused where too many wait."""
        with self._changed:
            if self._stopped:
                raise not_ready()
            waiting = len(self._queue)
            if waiting + len(jobs) > self.max_queue + self._free():
                raise queue_full(waiting)
            self._queue.extend(jobs)
            self.metrics.waiting.set(len(self._queue))
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Drop what nobody waits for any more, before the next step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                self._cancelled.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after its present step."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    @torch.no_grad()
    def run(self) -> None:
        """Decode until stopped; whatever was under way then has failed."""
        try:
            while self._wait():
                self._drop_cancelled()
                self._read()
                self._step()
                self._wake()
                self._keep()
                self._count()
        finally:
            self._fail_all()

    def _free(self) -> int:
        """Number of free rows, less those that prompts being read will take."""
        reading = self._reading
        taken = 0 if reading is None else sum(len(job.texts) for job in reading.jobs)
        return self.decoding.batch.room - taken

    def _wait(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._changed:
            while not (self._stopped or self._queue or self._reading or self._rows):
                self._cancelled.clear()
                self._changed.wait()
            return not self._stopped

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            if cancelled:
                self._queue = deque(job for job in self._queue if not job.cancelled)
        if cancelled:
            for number, row in list(self._rows.items()):
                if row.job.cancelled:
                    self.decoding.batch.leave(number)
                    del self._rows[number]
            jobs = [] if self._reading is None else self._reading.jobs
            if jobs and all(job.cancelled for job in jobs):
                self._reading = None

    def _read(self) -> None:
        """Read a piece of a prompt, and let what was read join."""
        if self._reading is None:
            self._reading = self._next()
        current = self._reading
        if current is None:
            return
        try:
            if not current.reading.read():
                return
            texts = [
                (index, job, text)
                for index, job in enumerate(current.jobs)
                for text in job.texts
                if not job.cancelled
            ]
            read = current.reading.rows().select([index for index, _, _ in texts])
        except (RuntimeError, MemoryError) as error:
            # too little memory for this prompt is enough for others
            console.warn(f"a prompt could not be read: {error}")
            self._reading = None
            self._fail(current.jobs, Refused(f"the prompt could not be read: {error}", 500))
            return
        self._reading, self._read_last = None, current.reading
        if texts:
            rows = [(self._row(text, job), text.request) for _, job, text in texts]
            self.decoding.batch.join_all(rows, read)

    def _keep(self) -> None:
        """Keep the prompts read last; what they have begun goes on meanwhile."""
        reading, self._read_last = self._read_last, None
        if reading is None or not self.decoding.kept.most:
            return
        try:
            self.decoding.kept.keep(reading.rows())
        except (RuntimeError, MemoryError) as error:
            console.warn(f"a prompt could not be kept: {error}")

    def _next(self) -> _Reading | None:
        """The next prompts to read; those that are known join at once."""
        kept, batch = self.decoding.kept, self.decoding.batch
        while (job := self._first()) is not None and len(job.texts) <= batch.room:
            start = kept.longest(job.prompt)
            known = 0 if start is None else len(start.tokens)
            self._count_prompt(job, known)
            if start is not None and known == len(job.prompt):
                self._pop(job)
                self._join(job, start)
                continue
            mark = None if job.branched else kept.branch(job.prompt, known)
            if mark is not None:
                job.branched = True
                return _Reading(self._started([job.prompt[:mark]], start))
            jobs = self._alike(job, start, known)
            for each in jobs:
                self._pop(each)
                self._count_prompt(each, known)
            return _Reading(self._started([each.prompt for each in jobs], start), jobs)
        return None

    def _first(self) -> Job | None:
        with self._changed:
            return self._queue[0] if self._queue else None

    def _pop(self, job: Job) -> None:
        with self._changed:
            # cancelled jobs are gone already
            if job in self._queue:
                self._queue.remove(job)

    def _alike(self, first: Job, start: ReadPrompt | None, known: int) -> list[Job]:
        """The first job, and those behind it whose prompts are read together with it."""
        found, rows = [first], len(first.texts)
        tokens, at_once = len(first.prompt) - known, self.decoding.at_once
        longest = tokens
        with self._changed:
            others = list(self._queue)[1:]
        for job in others:
            rest = len(job.prompt) - known
            rows += len(job.texts)
            width = max(longest, rest) * (len(found) + 1)
            fits = rest > 0 and width <= min(MOST_PADDING * (tokens + rest), at_once)
            if rows > self.decoding.batch.room or not fits:
                break
            if self.decoding.kept.longest(job.prompt) is not start:
                break
            if not job.branched and self.decoding.kept.branch(job.prompt, known) is not None:
                break
            found.append(job)
            tokens, longest = tokens + rest, max(longest, rest)
        return found

    def _started(self, prompts: list[list[int]], start: ReadPrompt | None) -> PromptReading:
        piece = self.decoding.piece
        if not self._rows:
            piece = min(PIECES_ALONE * piece, self.decoding.at_once)
        made = self.decoding
        return PromptReading(made.target, made.draft, prompts, start, piece, made.whole)

    def _join(self, job: Job, prompt: ReadPrompt) -> None:
        if job.cancelled:
            return
        for text in job.texts:
            self.decoding.batch.join(self._row(text, job), text.request, prompt)

    def _row(self, text: WrittenText, job: Job) -> int:
        """Number of a new row."""
        self._numbers += 1
        self._rows[self._numbers] = _Row(text, job)
        return self._numbers

    def _step(self) -> None:
        if not self._rows:
            return
        found = self.decoding.batch.step()
        now = time.monotonic()
        for written in found:
            row = self._rows.get(written.row)
            if row is not None:
                self._hand_on(row, written, now)
        metrics = self.metrics
        metrics.steps.inc()
        metrics.tokens.inc(sum(len(written.tokens) for written in found))
        metrics.drafted.inc(sum(written.drafted for written in found))
        metrics.accepted.inc(sum(written.accepted for written in found))

    def _hand_on(self, row: _Row, written: Written, now: float) -> None:
        if not row.heard:
            row.heard = True
            self.metrics.first_token.observe(now - row.job.began)
        row.text.add(Arrived(written.tokens, written.likely, written.finish))
        self._touched.add(row.text)
        if written.finish is not None:
            self.metrics.whole.observe(now - row.job.began)
            del self._rows[written.row]

    def _wake(self) -> None:
        """Wake those that wait for what a step wrote."""
        awaited = [text for text in self._touched if text.awaited]
        self._touched.clear()
        if awaited:
            self._in_loop(awaited)

    def _in_loop(self, texts: list[WrittenText]) -> None:
        def wake() -> None:
            for text in texts:
                text.wake()

        # the loop may have ended before this thread
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(wake)

    def _fail(self, jobs: Iterable[Job], failure: Refused) -> None:
        texts = [text for job in jobs for text in job.texts]
        for text in texts:
            text.add(Arrived([], failure=failure))
        self._in_loop(texts)

    def _fail_all(self) -> None:
        with self._changed:
            self._stopped = True
            jobs = {id(job): job for job in self._queue}
            self._queue.clear()
        if self._reading is not None:
            jobs |= {id(job): job for job in self._reading.jobs}
        jobs |= {id(row.job): row.job for row in self._rows.values()}
        self._rows.clear()
        self._fail(jobs.values(), ending())

    def _count_prompt(self, job: Job, known: int) -> None:
        """Count a prompt once; tokens of it that are read to be kept do not count as known."""
        if job.counted:
            return
        job.counted = True
        self.metrics.prompt_tokens.inc(len(job.prompt))
        self.metrics.kept_tokens.inc(known)

    def _count(self) -> None:
        self.metrics.running.set(self.decoding.batch.running)
        self.metrics.waiting.set(len(self._queue))
        self.metrics.kept_bytes.set(self.decoding.kept.nbytes)
