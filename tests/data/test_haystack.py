"""Needle prompts: exact lengths, the needle where it should be, and text that does not repeat."""

import random

import pytest

from mambactl.data.haystack import BEFORE, Haystack, make_frame, needle_prompt
from mambactl.errors import UsageError


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(0)
    words = [
        "the",
        "river",
        "house",
        "door",
        "light",
        "water",
        "stone",
        "old",
        "new",
        "red",
        "blue",
    ]

    def sentence():
        return " ".join(rng.choices(words, k=7)) + " ."

    texts = [" ".join(sentence() for _ in range(12)) for _ in range(5)]
    chat = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    return [{"messages": chat}, *({"text": text} for text in texts[2:])]


@pytest.fixture
def parts(rows, tiny_tokenizer):
    return Haystack(rows, tiny_tokenizer, seed=0), make_frame(tiny_tokenizer)


def place_of(prompt, needle):
    found = [i for i in range(len(prompt)) if prompt[i : i + len(needle)] == needle]
    assert len(found) == 1
    return found[0]


def test_lengths_are_exact_and_depths_ascend(parts):
    haystack, frame = parts
    places = []
    for depth in (0, 0.25, 0.5, 0.75, 1):
        prompt = needle_prompt(haystack, frame, 300, depth, room=20)
        assert len(prompt) == 280
        assert prompt[: len(frame.before)] == frame.before
        assert prompt[-len(frame.after) :] == frame.after
        at = place_of(prompt, frame.needle)
        places.append(at)
        if 0 < depth < 1:
            # behind a sentence, at most one sentence too early
            assert prompt[at - 1] in haystack.ends
            wanted = len(frame.before) + depth * (280 - frame.size)
            assert wanted - 8 <= at <= wanted + 1
    assert places[0] == len(frame.before)
    assert places[-1] == 280 - len(frame.after) - len(frame.needle)
    assert places == sorted(places)


def test_text_that_is_read_again_comes_in_another_order(parts):
    haystack, _ = parts
    size = haystack.tokens
    text = haystack.read(6 * size, "long")
    rounds = {tuple(text[start : start + size]) for start in range(0, 6 * size, size)}
    assert len(rounds) >= 5
    assert haystack.read(100, "a") == haystack.read(100, "a") != haystack.read(100, "b")


def test_a_seed_decides_the_text(rows, tiny_tokenizer):
    one, other = (Haystack(rows, tiny_tokenizer, seed).read(200, "a") for seed in (0, 1))
    assert one != other


def test_the_question_is_in_the_template_or_before_an_answer_mark(tiny_tokenizer):
    chat, plain = make_frame(tiny_tokenizer), make_frame(tiny_tokenizer, chat=False)
    start = tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert chat.before[0] == start and start in chat.after
    assert plain.before == tiny_tokenizer(BEFORE)["input_ids"] and start not in plain.after


def test_what_does_not_fit_is_said(parts, tiny_tokenizer):
    haystack, frame = parts
    with pytest.raises(UsageError, match="leaves no room for text") as raised:
        needle_prompt(haystack, frame, 64, 0.5, room=32)
    least = int(raised.value.hint.split()[2])
    assert len(needle_prompt(haystack, frame, least, 0.5, room=32)) == least - 32
    with pytest.raises(UsageError, match="the haystack has 1 tokens"):
        Haystack([{"text": "river"}], tiny_tokenizer, 0)
