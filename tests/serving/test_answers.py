"""Tokens into the text of an answer: stop texts, calls of tools."""

import json

import pytest

from mambactl.serving.answer_text import AnswerText
from mambactl.serving.tool_calls import ToolText
from mambactl.serving.written_text import Arrived


def written(tokenizer, text: str, stops, size: int) -> AnswerText:
    """The answer to a text whose tokens arrive `size` at a time, with its text as `text`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, whole = AnswerText(tokenizer, stops, None), ""
    for start in range(0, len(ids), size):
        last = start + size >= len(ids)
        piece = answer.add(Arrived(ids[start : start + size], finish="length" if last else None))
        whole += piece.text
        if answer.finish is not None:
            break
    answer.text = whole
    return answer


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "stops, expected, finish, tokens",
    [
        ([], "the old house and the old door", "length", 7),
        (["old door"], "the old house and the ", "stop", 7),
        (["d house", "and"], "the ol", "stop", 3),
        (["door", "river"], "the old house and the old ", "stop", 7),
        (["doors"], "the old house and the old door", "length", 7),
        (["the"], "", "stop", 1),
    ],
)
def test_a_stop_text_ends_it_at_the_same_token_however_tokens_arrive(
    tiny_tokenizer, size, stops, expected, finish, tokens
) -> None:
    answer = written(tiny_tokenizer, "the old house and the old door", stops, size)
    assert (answer.text, answer.finish, answer.tokens) == (expected, finish, tokens)


ONE = '{"name": "f", "arguments": {"a": 1}}'
LLAMA = '{"name": "f", "parameters": {"a": 1}}'


@pytest.mark.parametrize(
    "text, rest, calls",
    [
        (f"<tool_call>{ONE}</tool_call>", "", ["f"]),
        (f"Let me see.\n<tool_call>\n{ONE}\n</tool_call>", "Let me see.\n", ["f"]),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>{LLAMA}</tool_call>", "", ["f", "f"]),
        (LLAMA, "", ["f"]),
        (f"[{ONE}, {ONE}]", "", ["f", "f"]),
        # what is cut off, names another function, or is only about calls stays a text
        ("<tool_call>{", "<tool_call>{", []),
        (ONE.replace("f", "g"), ONE.replace("f", "g"), []),
        (f"Write {ONE}", f"Write {ONE}", []),
        ("a < b <tool", "a < b <tool", []),
        ('{"a": 1}', '{"a": 1}', []),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_are_told_from_text(text, rest, calls, size) -> None:
    reader, found = ToolText({"f"}), ""
    for start in range(0, len(text), size):
        found += reader.add(text[start : start + size])
    last, made = reader.finish()
    assert (found + last, [call.name for call in made]) == (rest, calls)
    assert all(json.loads(call.arguments) == {"a": 1} for call in made)


def test_without_tools_text_passes() -> None:
    reader = ToolText(())
    assert reader.add(ONE) == ONE and reader.finish() == ("", [])
