"""Rows that nothing can be learned from are named before training, and left out if asked."""

from copy import deepcopy

import numpy as np
import pytest

from mambactl.data.bad_rows import BadRows
from mambactl.data.checks import screened
from mambactl.data.doubts import Doubts
from mambactl.data.format import encode, encode_rows
from mambactl.data.sources import Document, load_rows
from mambactl.errors import UsageError


def chat(*turns, where="c.jsonl, row 1"):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return Document(where, {"messages": messages})


def seen(row, tokenizer, max_length=32):
    bad = BadRows()
    (example,) = encode_rows([row], tokenizer, assistant_only=True, doubts=Doubts())
    return screened(row, example, tokenizer, bad, max_length), bad


@pytest.mark.parametrize(
    ("turns", "kind", "problem"),
    [
        (("go", ""), "empty answer", "1 of 1 assistant turns are empty"),
        (("go", "the river", "go", " \n"), "empty answer", "1 of 2 assistant turns are empty"),
        (("go",), "no answer", "has no turn of the assistant"),
        (("go", "the " * 30), "too long", "has 37 tokens, and --max-length 32 would cut an answer"),
    ],
)
def test_a_chat_without_a_whole_answer_is_bad(tiny_tokenizer, turns, kind, problem):
    example, bad = seen(chat(*turns), tiny_tokenizer)
    assert example is None
    assert [(found.kind, found.where) for found in bad.found] == [(kind, "c.jsonl, row 1")]
    assert problem in bad.found[0].problem


def test_what_follows_the_last_answer_may_be_cut(tiny_tokenizer):
    row = chat("go", "the river", "the " * 40)
    example, bad = seen(row, tiny_tokenizer)
    whole = encode(row, tiny_tokenizer, assistant_only=True)
    assert not bad.found
    assert len(example.input_ids) == 32 < len(whole.input_ids)
    assert example.loss_mask.sum() == whole.loss_mask.sum() == 3


def test_an_answer_that_just_fits_is_kept(tiny_tokenizer):
    row = chat("go", "the " * 25)
    example, bad = seen(row, tiny_tokenizer)
    assert not bad.found and len(example.input_ids) == 32


def test_a_call_of_a_tool_is_an_answer(tiny_tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    row = Document("r", {"messages": [{"role": "user", "content": "go"}, call]})
    with pytest.raises(UsageError, match="leaves out the call of 'f'"):
        seen(row, tiny_tokenizer)
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content or m.tool_calls[0].function.name }}"
    )
    example, bad = seen(row, tokenizer)
    assert example is not None and not bad.found


def test_a_second_begin_token_is_found(tiny_tokenizer):
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "<|im_start|> " + tokenizer.chat_template
    row = chat("go", "the river")
    example, bad = seen(row, tokenizer)
    assert example is None and bad.counts == {"doubled begin token": 1}
    # whatever is learned of it, and in text too
    text = Document("t", {"text": "<|im_start|> <|im_start|> the"})
    assert screened(text, encode(text, tokenizer), tokenizer, bad) is None
    text = Document("t", {"text": "<|im_start|> the"})
    assert screened(text, encode(text, tokenizer), tokenizer, bad) is not None


def test_text_of_any_length_is_kept(tiny_tokenizer):
    row = Document("t", {"text": "the " * 99})
    example, bad = seen(row, tiny_tokenizer)
    assert len(example.input_ids) == 99 and not bad.found


def test_several_bad_rows_are_counted_by_kind_and_refused(capsys):
    bad = BadRows()
    bad.settle()
    for number in range(12):
        bad.add("too long", f"a.jsonl, row {number}", "has 99 tokens", "raise --max-length")
    bad.add("malformed", "b.jsonl, row 1", "`messages` is not a filled list")
    assert bad.counts == {"too long": 12, "malformed": 1}
    with pytest.raises(UsageError, match=r"13 bad rows \(12 too long, 1 malformed\)") as caught:
        bad.settle()
    assert "a.jsonl, row 0: has 99 tokens" in str(caught.value)
    assert (
        caught.value.hint.startswith("raise --max-length")
        and "--skip-bad-rows" in caught.value.hint
    )
    shown = capsys.readouterr().err
    assert "a.jsonl, row 9: has 99 tokens" in shown and "and 3 more" in shown


def test_skipped_rows_are_a_warning(capsys):
    bad = BadRows(skip=True)
    bad.add("too long", "a.jsonl, row 3", "has 99 tokens")
    bad.settle()
    shown = capsys.readouterr().err
    assert "a.jsonl, row 3: has 99 tokens" in shown
    assert "warning: 1 bad row (1 too long) left out" in shown


def test_malformed_and_refused_rows_are_noted_with_the_rest(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"messages": [{"content": "no role"}]}\n{"text": "the river"}\n{"words": 1}\n'
        '{"text": "cut\n'
        '{"messages": [{"role": "assistant", "content": "y"}]}\n'
    )
    bad = BadRows()
    rows = load_rows([str(path)], bad=bad)
    assert [row.where for row in rows] == [f"{path}, row 2", f"{path}, row 5"]
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    examples = encode_rows(rows, tokenizer, bad=bad)
    assert [example.input_ids.tolist() for example in examples] == [
        tokenizer("the river")["input_ids"]
    ]
    assert [(found.kind, found.where[-5:]) for found in bad.found] == [
        ("malformed", "row 1"), ("malformed", "row 3"), ("malformed", "row 4"),
        ("refused by the template", "row 5"),
    ]  # fmt: skip
    problems = [found.problem for found in bad.found]
    assert "has the role None" in problems[0] and "not JSON" in problems[2]
    assert "no system" in problems[3]


def test_bad_rows_take_no_part_in_the_budget(tiny_tokenizer):
    rows = [Document(f"row {n}", {"text": "the " * 10}) for n in range(9)]
    kept = encode_rows(
        rows, tiny_tokenizer, max_tokens=30,
        keep=lambda row, example: None if row.where in ("row 0", "row 1") else example,
    )  # fmt: skip
    assert len(kept) == 3 and np.sum([len(e.input_ids) for e in kept]) == 30


def test_only_turns_that_are_learned_have_to_say_something(tiny_tokenizer):
    row = chat("go", "", "go", "the river")
    assert seen(Document("r", row | {"learned": [3]}), tiny_tokenizer)[0] is not None
    example, bad = seen(Document("r", row | {"learned": []}), tiny_tokenizer)
    assert example is None and "no turn that is to be learned" in bad.found[0].problem
