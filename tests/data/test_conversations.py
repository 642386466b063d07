"""Prompt sets: every kind of row, what is no prompt, once each, dealt to shards."""

import gzip
import json

import pytest

from mambactl.data.bad_rows import BadRows
from mambactl.data.conversations import conversation, distinct, read_conversations, shard_of
from mambactl.data.row_forms import Unread
from mambactl.errors import UsageError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be short"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "7"}


@pytest.mark.parametrize(
    ("row", "opening"),
    [
        ({"prompt": "a"}, [user("a")]),
        ({"prompt": [SYSTEM, user("a")]}, [SYSTEM, user("a")]),
        ({"text": "a"}, [user("a")]),
        ({"instruction": "a", "input": "b"}, [user("a\n\nb")]),
        ({"instruction": "a", "input": ""}, [user("a")]),
        # the answer at the end is the one to be written anew, those before it are context
        ({"messages": [SYSTEM, user("a"), assistant("b")]}, [SYSTEM, user("a")]),
        ({"messages": [user("a"), assistant("b"), user("c")]}, None),
        ({"messages": [user("a"), CALL, RESULT, assistant("seven")]}, [user("a"), CALL, RESULT]),
    ],
)
def test_rows_become_turns_that_end_before_the_answer(row, opening):
    found = conversation("f, row 1", row)
    assert list(found.opening) == (row["messages"] if opening is None else opening)
    assert (found.n_answers, found.messages()) == (1, list(found.opening))


def test_turns_are_answered_one_after_the_other():
    row = {"id": 81, "category": "writing", "turns": ["a", "b", "c"], "reference": ["x"]}
    found = conversation("f, row 1", row)
    assert found.n_answers == 3
    assert found.messages() == [user("a")]
    assert found.messages(["A"]) == [user("a"), assistant("A"), user("b")]
    whole = found.messages(["A", "B", "C"])
    assert whole == [turn for text in "abc" for turn in (user(text), assistant(text.upper()))]
    assert found.about == {"id": 81, "category": "writing", "reference": ["x"]}
    assert conversation("f", {"question_id": 5, "turns": ["a"]}).about == {"id": 5}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": " "}, "empty prompt"),
        ({"turns": ["a", ""]}, "empty prompt"),
        ({"turns": []}, "empty prompt"),
        ({"turns": [{"role": "user"}]}, "not a list of strings"),
        ({"messages": [{"content": "a"}]}, "role None"),
        ({"messages": [SYSTEM]}, "no user turn"),
        ({"messages": [assistant("a")]}, "no user turn"),
        ({"messages": [user("a"), assistant("b"), SYSTEM]}, "ends with a system turn"),
        ({"messages": [{"role": "user", "content": None}]}, "no `content`"),
        ({"prompt": "a", "tools": "{"}, "not JSON"),
        ({"prompt": "a\ud800"}, "no text"),
        ({"words": "a"}, "`words`"),
        (["a"], "holds a list"),
    ],
)
def test_what_is_no_prompt_is_said(row, problem):
    with pytest.raises(UsageError, match=problem):
        conversation("f, row 1", row)


def test_files_are_read_in_turn_and_bad_rows_are_named(tmp_path):
    first, second, third = (tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt"))
    rows = [{"prompt": "one"}, {"prompt": ""}, {"prompt": "three"}]
    first.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    second.write_bytes(gzip.compress(b'{"prompt": "other"}\n'))
    third.write_text("line\n\nlast\n", "utf-8")
    bad = BadRows()
    found = read_conversations([str(first), str(second), str(third)], bad=bad)
    asked = [each.opening[0]["content"] for each in found]
    assert asked == ["one", "other", "line", "last", "three"]
    assert found[3].where == f"{third}, line 3"
    assert [row[1:3] for row in bad.found] == [(f"{first}, row 2", "has an empty prompt")]
    assert len(read_conversations([str(first), str(second)], max_samples=2)) == 2
    empty = tmp_path / "e.jsonl"
    empty.write_text("")
    with pytest.raises(UsageError, match="no rows"):
        read_conversations([str(empty)])


def test_a_prompt_is_taken_once_and_belongs_to_one_shard():
    rows = [conversation(f"row {n}", {"prompt": f"p{n % 40}", "id": n}) for n in range(60)]
    once = distinct(rows)
    assert [each.about["id"] for each in once] == list(range(40))
    for count in (1, 3, 7):
        shards = [shard_of(each, count) for each in rows]
        # equal prompts go together, and no shard is left without work
        assert shards[:20] == shards[40:]
        assert set(shards) == set(range(1, count + 1))
    assert once[0].digest != conversation("x", {"turns": ["p0", "more"]}).digest
    assert once[0].digest == conversation("x", {"messages": [user("p0"), assistant("z")]}).digest


def test_sampling_keys_tell_prompts_samples_and_turns_apart():
    rows = [conversation("x", {"turns": [text, "b"]}) for text in ("p", "q")]
    keys = [row.key(sample, turn) for row in rows for sample in (0, 1) for turn in (0, 1)]
    assert len(set(keys)) == 8
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert rows[0].key(0, 0) == conversation("elsewhere", {"turns": ["p", "b"]}).key(0, 0)


def test_columns_that_nothing_reads_are_named_once(tmp_path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Unread.__init__, "__defaults__", (said.append, ()))
    file = tmp_path / "p.jsonl"
    rows = [
        {"turns": ["a"], "prompt": "b", "id": 1, "question_id": 2},
        {"turns": ["c"], "prompt": "d"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert [each.opening[0]["content"] for each in read_conversations([str(file)])] == ["a", "c"]
    assert said == [f"{file}: not read: `prompt`"]
