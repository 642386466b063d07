"""Text that is learned several times: how often, in which order, and after a stop."""

from collections import Counter, deque
from contextlib import contextmanager
from itertools import count, islice, pairwise

import pytest

from mambactl.train.ledger import Written
from mambactl.train.repeated_text import RepeatedText


class Numbers:
    """A feed whose batches are their numbers, and whose counts are those of its steps.

    Of processes that `share` a run, rank and number, it has the batches of one.
    """

    def __init__(self, grad_accum: int, share: tuple[int, int] = (0, 1)):
        self.grad_accum, self.share, self.made = grad_accum, share, 0
        self._counts: deque[Written] = deque()

    @contextmanager
    def open(self, done: int):
        yield self._batches(done)

    def _batches(self, done: int):
        for number in count(done):
            self.made += 1
            step, last = divmod(number + 1, self.grad_accum)
            if last == 0:
                self._counts.append(Written(tokens=step))
            yield number * self.share[1] + self.share[0]

    def take_counts(self) -> Written:
        return self._counts.popleft()


def steps(uses: int, grad_accum: int, done: int, number: int) -> tuple[list[list[int]], list[int]]:
    """Batches of each step and the tokens that it says were written."""
    feed = RepeatedText(Numbers(grad_accum), uses, grad_accum)
    found, tokens = [], []
    with feed.open(done * grad_accum) as batches:
        for _ in range(number):
            found.append(list(islice(batches, grad_accum)))
            tokens.append(feed.take_counts().tokens)
    return found, tokens


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_text_is_learned_as_often_as_asked_and_not_twice_in_a_row(grad_accum) -> None:
    found, tokens = steps(4, grad_accum, 0, 48)
    texts = [step[0] // grad_accum for step in found]
    for text, step in zip(texts, found, strict=True):
        assert step == list(range(text * grad_accum, (text + 1) * grad_accum))
    # the first texts stand in for those that are not written yet, the last ones are not done
    uses = Counter(texts)
    assert all(uses[text] == 4 for text in range(3, 9))
    assert texts[12:20] == [3, 2, 1, 0, 4, 3, 2, 1]
    assert all(a != b for a, b in pairwise(texts[8:]))
    assert tokens == [step // 4 + 1 if step % 4 == 0 else 0 for step in range(48)]


def test_text_that_is_used_once_is_that_of_the_other_feed() -> None:
    found, tokens = steps(1, 2, 0, 5)
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert tokens == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("done", [1, 7, 8, 13])
def test_a_run_that_resumes_repeats_the_same_text(done) -> None:
    whole, tokens = steps(4, 2, 0, 40)
    later, counted = steps(4, 2, done, 40 - done)
    assert later == whole[done:]
    assert counted == tokens[done:]


def test_no_more_is_written_than_is_learned() -> None:
    source = Numbers(2)
    with RepeatedText(source, 4, 2).open(0) as batches:
        for _ in islice(batches, 2 * 9):
            pass
    assert source.made == 2 * 3


def test_processes_that_share_a_run_write_and_learn_at_the_same_steps() -> None:
    """Each writes its own part of a step, and writing waits for all of them."""
    alone, _ = steps(4, 2, 0, 20)
    parts = []
    for rank in range(2):
        source = Numbers(1, share=(rank, 2))
        with RepeatedText(source, 4, 1).open(0) as batches:
            parts.append([(next(batches), source.made) for _ in range(20)])
    made = [[number for _, number in part] for part in parts]
    assert made[0] == made[1] == [step // 4 + 1 for step in range(20)]
    assert [[one, two] for (one, _), (two, _) in zip(*parts, strict=True)] == alone
