"""The thread that decodes, with a batch that only notes what is asked of it."""

import asyncio
import threading
import time
from dataclasses import dataclass, field

import pytest

from mambactl.decode.kept_prompts import KeptPrompts
from mambactl.decode.open_batch import RowRequest, Written
from mambactl.decode.sampler import SamplingParams
from mambactl.serving.prometheus import ServerMetrics
from mambactl.serving.refusals import Refused
from mambactl.serving.scheduler import Decoding, Scheduler
from mambactl.serving.written_text import Job, WrittenText


@dataclass
class Noting:
    """An open batch whose rows get a token a step, each the number of the step."""

    most: int
    rows: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    steps: int = 0
    broken: bool = False
    # held by a test while it looks
    gate: threading.Lock = field(default_factory=threading.Lock)

    @property
    def room(self) -> int:
        return self.most - len(self.rows)

    @property
    def running(self) -> int:
        return len(self.rows)

    def join(self, row, request, prompt) -> None:
        self.notes.append(f"join {len(prompt.tokens)}")
        self.rows[row] = request.params.max_new_tokens

    def join_all(self, rows, read) -> None:
        for index, (row, request) in enumerate(rows):
            self.join(row, request, read.prompt(index))

    def leave(self, row) -> None:
        self.notes.append("leave")
        self.rows.pop(row, None)

    def step(self) -> list[Written]:
        with self.gate:
            if self.broken:
                raise RuntimeError("the device is gone")
            self.steps += 1
            self.notes.append(f"step {len(self.rows)}")
            found = []
            for row in list(self.rows):
                self.rows[row] -= 1
                finish = None if self.rows[row] else "length"
                found.append(Written(row, [self.steps], finish=finish))
                if finish:
                    del self.rows[row]
            time.sleep(0.001)
            return found


@pytest.fixture
def run(make_hybrid):
    """run(scenario, most) -> its result; `scenario(scheduler, batch)` runs beside the thread."""
    target = make_hybrid(["mamba2"], seed=1)

    def play(scenario, most: int = 2, max_queue: int = 8, piece: int = 16):
        async def main():
            batch = Noting(most)
            made = Decoding(target, None, batch, KeptPrompts(10**7), piece)
            scheduler = Scheduler(made, ServerMetrics(), asyncio.get_running_loop(), max_queue)
            failed = []

            def work() -> None:
                try:
                    scheduler.run()
                except RuntimeError as error:
                    failed.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            try:
                return await asyncio.wait_for(scenario(scheduler, batch), 60)
            finally:
                scheduler.stop()
                thread.join()
                assert bool(failed) == batch.broken

        return asyncio.run(main())

    return play


def job(length: int, new: int, texts: int = 1, first: int = 3) -> Job:
    request = RowRequest(SamplingParams(max_new_tokens=new))
    tokens = [first + index % 7 for index in range(length)]
    return Job(tokens, [WrittenText(request) for _ in range(texts)], time.monotonic())


async def whole(text: WrittenText) -> list[int]:
    tokens = []
    while True:
        arrived = await text.take()
        if arrived.failure is not None:
            raise arrived.failure
        tokens += arrived.tokens
        if arrived.finish is not None:
            return tokens


def test_what_was_cancelled_leaves_before_the_next_step(run) -> None:
    async def scenario(scheduler, batch):
        one, other = job(5, 10**6), job(6, 20)
        scheduler.submit([one, other])
        await one.texts[0].take()
        with batch.gate:
            # no step is under way
            begun = len(batch.notes)
            scheduler.cancel([one])
        assert len(await whole(other.texts[0])) == 20
        after = batch.notes[begun:]
        left = after.index("leave")
        return [note for note in after[:left] if note.startswith("step")], after[left + 1]

    before, following = run(scenario)
    # at most the step that had been asked for
    assert len(before) <= 1 and following == "step 1"


def test_rows_wait_for_room_and_are_written_in_order(run) -> None:
    async def scenario(scheduler, batch):
        jobs = [job(4 + number, 5, first=3 + 8 * number) for number in range(6)]
        scheduler.submit(jobs)
        texts = await asyncio.gather(*(whole(each.texts[0]) for each in jobs))
        return texts, [note for note in batch.notes if note.startswith("join")]

    texts, joined = run(scenario)
    assert all(len(text) == 5 for text in texts)
    assert joined == [f"join {4 + number}" for number in range(6)]
    # never more than two at a time
    assert [text[0] for text in texts] == sorted(text[0] for text in texts)


def test_running_rows_go_on_between_the_pieces_of_a_prompt(run) -> None:
    async def scenario(scheduler, batch):
        running, long = job(3, 10**6), job(400, 1)
        scheduler.submit([running])
        await running.texts[0].take()
        begun = batch.steps
        scheduler.submit([long])
        await whole(long.texts[0])
        scheduler.cancel([running])
        return batch.steps - begun

    # 25 pieces of 16 tokens
    assert run(scenario, piece=16) >= 24


def test_prompts_that_begin_alike_are_read_from_where_they_part(run) -> None:
    async def scenario(scheduler, batch):
        shared = [3 + number % 50 for number in range(150)]
        jobs = []
        for last in (60, 70, 80):
            jobs.append(job(1, 1))
            jobs[-1].prompt[:] = shared + [last] * 70
            scheduler.submit([jobs[-1]])
            await whole(jobs[-1].texts[0])
        again = job(1, 1)
        again.prompt[:] = jobs[0].prompt
        scheduler.submit([again])
        await whole(again.texts[0])
        return list(scheduler.metrics.kept_tokens.collect())[0].samples[0].value

    # the first is read whole, the second up to where they part first; the last is known
    assert run(scenario) == 150 + 220


def test_a_full_queue_refuses(run) -> None:
    async def scenario(scheduler, batch):
        with batch.gate:
            scheduler.submit([job(3, 5, texts=2)])
            scheduler.submit([job(4, 5)])
            with pytest.raises(Refused) as caught:
                for _ in range(4):
                    scheduler.submit([job(5, 5)])
        return caught.value.status

    assert run(scenario, max_queue=1) == 429


def test_everybody_hears_that_the_engine_failed(run) -> None:
    async def scenario(scheduler, batch):
        one, waiting = job(3, 10**6, texts=2), job(4, 5)
        scheduler.submit([one, waiting])
        await one.texts[0].take()
        batch.broken = True
        for text in (*one.texts, *waiting.texts):
            with pytest.raises(Refused, match="ending"):
                await whole(text)
        with pytest.raises(Refused, match="not ready"):
            scheduler.submit([job(3, 1)])
        return True

    assert run(scenario)
