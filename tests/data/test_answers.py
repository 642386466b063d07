"""Answer files as their readers expect them."""

import io
import json

import pytest

from mambactl.data.answers import Answer, require_fit, write_answers
from mambactl.data.conversations import conversation
from mambactl.errors import UsageError

TALK = conversation("f", {"id": 81, "category": "writing", "turns": ["a", "b"]})
SHORT = conversation("f", {"id": 7, "category": "helpful_base", "prompt": "why \u00e9?"})


def written(groups, format):
    file = io.StringIO()
    return write_answers(file, groups, format, "student"), file.getvalue()


def test_training_rows_hold_whole_conversations():
    answers = [Answer(0, ("A", "B"), "eos", 5, 1.0), Answer(2, ("C", "D"), "length", 9, 2.0)]
    count, text = written([(TALK, answers), (SHORT, [])], "jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    assert count == len(rows) == 2
    assert [turn["content"] for turn in rows[1]["messages"]] == ["a", "C", "b", "D"]
    assert rows[0] == {
        "id": 81,
        "messages": TALK.messages(["A", "B"]),
        "sample": 0,
        "finish": "eos",
        "tokens": 5,
        "category": "writing",
    }


def test_alpaca_eval_is_one_json_list():
    answers = [Answer(0, ("Because.\n",), "eos", 3, 1.0)]
    count, text = written([(SHORT, answers), (SHORT, answers)], "alpaca-eval")
    row = {
        "dataset": "helpful_base",
        "instruction": "why \u00e9?",
        "output": "Because.",
        "generator": "student",
    }
    assert (count, json.loads(text)) == (2, [row, row])
    assert json.loads(written([], "alpaca-eval")[1]) == []


def test_mt_bench_has_one_line_per_question_with_its_choices():
    answers = [Answer(0, ("A", "B"), "eos", 5, 1.0), Answer(1, ("C ", "D"), "eos", 5, 2.5)]
    count, text = written([(TALK, answers), (SHORT, [])], "mt-bench")
    row = json.loads(text)
    assert count == 1
    assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (row["question_id"], row["model_id"], row["tstamp"]) == (81, "student", 2.5)
    assert row["choices"] == [
        {"index": 0, "turns": ["A", "B"]},
        {"index": 1, "turns": ["C", "D"]},
    ]
    other = json.loads(written([(TALK, answers[:1])], "mt-bench")[1])
    assert other["answer_id"] != row["answer_id"]


def test_what_a_format_has_no_place_for_is_refused():
    with pytest.raises(UsageError, match="more than one instruction"):
        require_fit(TALK, "alpaca-eval")
    with pytest.raises(UsageError, match="no `id`"):
        require_fit(conversation("f", {"prompt": "a"}), "mt-bench")
    require_fit(SHORT, "alpaca-eval")
    require_fit(TALK, "mt-bench")
