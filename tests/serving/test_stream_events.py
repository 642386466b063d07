"""Events of a stream: tokens that came meanwhile are one of them, and its JSON is that of any."""

import asyncio
import json
import time

import pytest

from mambactl.decode.open_batch import Likely, RowRequest
from mambactl.decode.sampler import SamplingParams
from mambactl.serving.answer_text import AnswerText, Piece
from mambactl.serving.refusals import Refused
from mambactl.serving.reply_format import ChatFormat, CompletionFormat, sent_event
from mambactl.serving.written_text import Arrived, WrittenText


def text() -> WrittenText:
    return WrittenText(RowRequest(SamplingParams(max_new_tokens=9)))


def test_tokens_that_came_meanwhile_are_taken_together() -> None:
    async def scenario() -> tuple[Arrived, Arrived]:
        one, other = text(), text()
        for token in range(3):
            one.add(Arrived([token], [Likely(-token, ())]))
        one.add(Arrived([3], [Likely(-3, ())], "length"))
        failure = Refused("too late")
        other.add(Arrived([5]))
        other.add(Arrived([], failure=failure))
        return await one.take(), await other.take()

    whole, failed = asyncio.run(scenario())
    assert (whole.tokens, whole.finish) == ([0, 1, 2, 3], "length")
    assert [each.logprob for each in whole.likely] == [0, -1, -2, -3]
    # what came before a failure is not lost
    assert failed.tokens == [5] and str(failed.failure) == "too late"


def test_a_pause_ends_with_the_text() -> None:
    async def scenario() -> tuple[Arrived, Arrived, float]:
        one, loop = text(), asyncio.get_running_loop()
        one.add(Arrived([1]))
        loop.call_later(0.02, one.add, Arrived([2]))
        first = await one.take(pause=0.1)
        begun = time.monotonic()

        def end() -> None:
            one.add(Arrived([3], finish="length"))
            assert one.awaited
            one.wake()

        loop.call_later(0.02, end)
        return first, await one.take(pause=60), time.monotonic() - begun

    first, last, seconds = asyncio.run(scenario())
    assert first.tokens == [1, 2] and last.tokens == [3] and seconds < 30


@pytest.mark.parametrize("form", [ChatFormat("m", False), CompletionFormat("m", True)])
def test_a_prepared_event_is_the_event(form) -> None:
    for content in ('the "old" house\n', "\ud7ff \x00 ☃ \ue000", "a"):
        for index in (0, 3, 0):
            piece = Piece(content)
            assert form.sent(index, piece, ()) == sent_event(form.event(index, piece, ()))
    last = json.loads(form.sent(0, Piece("", finish="stop"), ()).removeprefix(b"data: "))
    assert last["choices"][0]["finish_reason"] == "stop"


def test_no_log_probabilities_behind_a_stop_text(tiny_tokenizer) -> None:
    ids = tiny_tokenizer("the old house and the old", add_special_tokens=False)["input_ids"]
    answer = AnswerText(tiny_tokenizer, ["house"], 0)
    piece = answer.add(Arrived(ids, [Likely(-1.0, ())] * len(ids)))
    assert (piece.text, piece.finish, answer.tokens) == ("the old ", "stop", 3)
    # a space in front of a word is of its token
    assert [each.token for each in piece.likely] == ["the", "old", "house"]


@pytest.mark.parametrize("at_once", [1, 2, 9])
@pytest.mark.parametrize(
    ("stop", "finish", "text", "tokens"),
    [
        ("<|old|>", "length", "the old house and", ["the", "old", "house", "and"]),
        (" house and", None, "the old", ["the", "old"]),
        (" old house", None, "the", ["the"]),
        ("house", None, "the old ", ["the", "old", "house"]),
        ("e old", None, "th", ["the"]),
        ("the", None, "", []),
        (" house new", "eos", "the old house", ["the", "old", "house"]),
        (" house and red", "length", "the old house and", ["the", "old", "house", "and"]),
    ],
)
def test_log_probabilities_are_of_tokens_in_the_text(
    tiny_tokenizer, at_once, stop, finish, text, tokens
) -> None:
    """No piece tells of a token before its text, however many tokens come at once."""
    ids = tiny_tokenizer("the old house and", add_special_tokens=False)["input_ids"]
    answer, said, told = AnswerText(tiny_tokenizer, [stop], 0), "", []
    for start in range(0, len(ids), at_once):
        part = ids[start : start + at_once]
        ended = finish if start + at_once >= len(ids) else None
        if ended == "eos":
            part = [*part[:-1], tiny_tokenizer.eos_token_id]
        piece = answer.add(Arrived(part, [Likely(-1.0, ())] * len(part), ended))
        said, told = said + piece.text, told + [each.token for each in piece.likely]
        assert len(" ".join(told[:-1])) < max(len(said), 1)
        if answer.finish is not None:
            break
    assert (said, told) == (text, tokens)
