"""Preference rows: every spelling gives the same tokens, bad rows are named, nothing is cut."""

import itertools
import json

import numpy as np
import pytest

from mambactl.data import preferences
from mambactl.data.preferences import held_out, load_pairs, marked, without_prompts
from mambactl.data.row_files import Found
from mambactl.errors import UsageError


def turn(role, content):
    return {"role": role, "content": content}


ASK, GOOD, BAD = turn("user", "the river"), turn("assistant", "old king"), turn("assistant", "a")
ROW = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}


@pytest.fixture
def write(tmp_path):
    def save(*rows, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return save


def only(path, tokenizer, **options):
    return next(iter(load_pairs([path], tokenizer, 64, **options).values()))


def test_spellings_of_a_chat_give_one_pair(write, tiny_tokenizer):
    text = {"prompt": "the river", "chosen": "old king", "rejected": "a"}
    whole = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    both = {"prompt": "ignored", **whole}
    pairs = only(write(ROW, text, whole, both), tiny_tokenizer).pairs
    assert len({(*p.prompt, -1, *p.chosen, -1, *p.rejected) for p in pairs}) == 1
    assert len({p.key for p in pairs}) == 1
    shown = marked(pairs[0], tiny_tokenizer)
    # spaces as the tiny tokenizer decodes; the end token is learned, nothing behind it
    prompt, answer = shown["chosen"].split("[[")
    assert prompt.split()[2:5] == ["the", "river", "<|im_end|>"]
    assert answer.split() == ["old", "king", "<|im_end|>]]"]
    assert shown["where"].endswith("pairs.jsonl, row 1")


def test_turns_that_both_share_are_the_prompt(write, tiny_tokenizer):
    again = turn("user", "red door")
    start = [turn("system", "the a"), ASK, BAD, again]
    pair = only(write({"chosen": [*start, GOOD], "rejected": [*start, BAD]}), tiny_tokenizer).pairs[
        0
    ]
    given = only(
        write({"prompt": start, "chosen": [GOOD], "rejected": [BAD]}), tiny_tokenizer
    ).pairs[0]
    assert np.array_equal(pair.prompt, given.prompt)
    assert np.array_equal(pair.chosen, given.chosen)


def test_text_stays_text_without_a_prompt_or_a_chat(write, tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    raw = only(
        write({"prompt": "the river", "chosen": " old king", "rejected": " a"}),
        tiny_tokenizer,
        chat=False,
    ).pairs[0]
    assert list(raw.prompt) == tiny_tokenizer("the river")["input_ids"]
    assert list(raw.chosen) == [*tiny_tokenizer("old king")["input_ids"], end]
    shared = only(
        write({"chosen": "the river old king", "rejected": "the river a"}), tiny_tokenizer
    ).pairs[0]
    for ours, theirs in zip(shared[2:], raw[2:], strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "rejected": [GOOD]}, "`chosen` equals `rejected`"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "`chosen` equals `rejected`"),
        ({"prompt": [ASK], "chosen": [{"content": "a"}], "rejected": [BAD]}, "has the role None"),
        ({**ROW, "rejected": [turn("assistant", "  ")]}, "the answer of `rejected` is empty"),
        ({**ROW, "prompt": [ASK, GOOD]}, "ends with an assistant turn"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has the columns `chosen`, `rejected`"),
        ({"chosen": [ASK, GOOD], "rejected": [BAD, BAD]}, "start differently"),
        ({"chosen": [ASK, GOOD, ASK], "rejected": [ASK, BAD]}, "`chosen` holds a turn of the user"),
        ({"chosen": "old a", "rejected": "king a"}, "start differently"),
        ([1], "holds a list"),
    ],
)
def test_a_bad_row_is_named_or_left_out(write, tiny_tokenizer, row, message):
    path = write(ROW, row)
    with pytest.raises(UsageError, match=f"row 2: .*{message}") as caught:
        load_pairs([path], tiny_tokenizer, 64)
    assert "--skip-bad-rows" in caught.value.hint
    found = only(path, tiny_tokenizer, skip_bad_rows=True)
    assert found.counts() == {"pairs": 1, "bad": 1, "too_long": 0}


def test_the_hint_is_about_columns_only_where_they_are_wrong(write, tiny_tokenizer):
    for row, about_columns in (({**ROW, "rejected": [GOOD]}, False), ({"x": "y"}, True)):
        with pytest.raises(UsageError) as caught:
            load_pairs([write(row)], tiny_tokenizer, 64)
        assert ("expected `prompt`" in caught.value.hint) == about_columns


def test_a_template_that_doubles_the_begin_token(write, tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "<|im_start|> " + tokenizer.chat_template
    with pytest.raises(UsageError, match="row 1: begins with .* twice"):
        load_pairs([write(ROW)], tokenizer, 64)


def test_what_is_too_long_is_bad_and_never_cut(write, tiny_tokenizer):
    long = {**ROW, "chosen": [turn("assistant", "old " * 60)]}
    path = write(ROW, long, ROW)
    with pytest.raises(UsageError, match="row 2: has .* --max-length 64 would cut") as caught:
        only(path, tiny_tokenizer)
    assert "raise --max-length" in caught.value.hint
    found = only(path, tiny_tokenizer, skip_bad_rows=True)
    assert found.counts() == {"pairs": 2, "bad": 0, "too_long": 1}
    with pytest.raises(UsageError, match="no pair is usable") as caught:
        load_pairs([write(long)], tiny_tokenizer, 64, skip_bad_rows=True)
    assert "raise --max-length" in caught.value.hint


def test_a_broken_line_is_a_bad_row(write, tiny_tokenizer):
    path = write(ROW)
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(UsageError, match="row 2: not JSON"):
        only(path, tiny_tokenizer)
    assert only(path, tiny_tokenizer, skip_bad_rows=True).counts()["bad"] == 1


def test_sets_stay_apart_and_take_turns(write, tiny_tokenizer):
    one, two = write(ROW, ROW, ROW, name="one.jsonl"), write(ROW, name="two.jsonl")
    sets = load_pairs([one, two], tiny_tokenizer, 64, max_samples=3)
    assert {name: len(found.pairs) for name, found in sets.items()} == {"one": 2, "two": 1}


def test_a_set_on_the_hub_is_read_as_far_as_it_is_used(monkeypatch, tiny_tokenizer):
    read = []

    def endless(spec, bad):
        for number in itertools.count(1):
            read.append(number)
            yield Found(f"{spec}, row {number}", {**ROW, "prompt": f"the {number}"}, spec)

    monkeypatch.setattr(preferences, "read_rows", endless)
    found = load_pairs(["some/set"], tiny_tokenizer, 64, used=3)["some/set"]
    assert len(found.pairs) == len(read) == 12


def test_no_prompt_is_on_both_sides(write, tiny_tokenizer):
    words = ["river", "house", "door", "light", "water", "stone", "old", "new", "red", "blue"]
    rows = [
        {**ROW, "prompt": [turn("user", f"{a} {b}")]} for a in words for b in words for _ in (0, 1)
    ]
    sets = load_pairs([write(*rows)], tiny_tokenizer, 64)
    train, held = held_out(sets, 0.2)
    kept, taken = train["pairs"].pairs, held["pairs"].pairs
    assert not {p.key for p in kept} & {p.key for p in taken}
    assert len(kept) + len(taken) == 200
    assert 16 <= len(taken) <= 64
    rest, dropped = without_prompts(sets, {p.key for p in taken})
    assert (len(rest["pairs"].pairs), dropped) == (len(kept), len(taken))
