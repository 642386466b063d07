"""Data sets of every kind are read alike, and a bad one is named with its row."""

import gzip
import json
import random

import pytest

from mambactl.data import sources
from mambactl.data.bad_rows import MALFORMED, BadRows
from mambactl.data.sources import count_rows, load_rows
from mambactl.errors import UsageError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def _jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_every_container_gives_the_same_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": "the river"}, {"text": "é\nold"}]
    plain = _jsonl(tmp_path / "a.jsonl", *rows)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_rows([plain]) == rows
    assert load_rows([str(packed)]) == rows
    assert load_rows([str(tmp_path / "a.parquet")]) == rows
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert load_rows([str(tmp_path / "a.txt")]) == [{"text": "one\ntwo\n"}]


def test_chat_keeps_tools_and_drops_nulls_and_other_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    row = {
        "messages": [{"role": "user", "content": "go"}, call],
        "tools": '[{"name": "f"}]',
        "id": 3,
    }
    assert load_rows([_jsonl(tmp_path / "a.jsonl", row)]) == [
        {"messages": row["messages"], "tools": [{"name": "f"}]}
    ]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert load_rows([str(tmp_path / "a.parquet")])[0]["messages"] == row["messages"]


def test_several_sets_take_turns_and_stop_at_max_samples(tmp_path):
    first = _jsonl(tmp_path / "a.jsonl", *({"text": f"a{i}"} for i in range(3)))
    second = _jsonl(tmp_path / "b.jsonl", *({"text": f"b{i}"} for i in range(2)))
    texts = [row["text"] for row in load_rows([first, second])]
    assert texts == ["a0", "b0", "a1", "b1", "a2"]
    assert len(load_rows([first, second], max_samples=3)) == 3


def test_every_row_remembers_where_it_was_read(tmp_path):
    first, second = tmp_path / "a.jsonl", _jsonl(tmp_path / "b.jsonl", *[{"text": "b"}] * 2)
    first.write_text('{"text": "a"}\n\n\n{"text": "a"}\n')
    rows = load_rows([str(first), second])
    places = [f"{first}, row 1", f"{second}, row 1", f"{first}, row 4", f"{second}, row 2"]
    assert [row.where for row in rows] == places


def test_a_set_on_the_hub_is_read_as_far_as_it_is_used(tmp_path, monkeypatch):
    import datasets

    text, read = "x" * 160, []

    def streamed(*_, **__):
        for number in range(1000):
            read.append(number)
            yield {"text": text, "messages": None}

    monkeypatch.setattr(datasets, "load_dataset", streamed)
    # 4 characters per token, and 4 times what is used
    assert len(load_rows(["some/set"], used_tokens=100)) == 4 * 4 * 100 / 160 == len(read)
    assert len(load_rows(["some/set"], used_rows=3)) == 3 * sources.POOL
    assert len(load_rows(["some/set"])) == 1000
    local = _jsonl(tmp_path / "a.jsonl", *[{"text": text}] * 50)
    assert len(load_rows([local], used_tokens=100)) == len(load_rows([local], used_rows=1)) == 50
    read.clear()
    assert count_rows(["some/set"]) is None and count_rows([local, "some/set"]) is None
    assert (count_rows([local]), count_rows([local], 7)) == (50, 7)
    assert read == []
    with pytest.raises(UsageError, match="no file and no hub id"):
        count_rows([str(tmp_path / "nope.docx")])
    with pytest.raises(UsageError, match="no file and no hub id"):
        count_rows(["/long" * 100])


@pytest.mark.parametrize(
    ("offline", "said", "hint"),
    [
        ("", "Dataset 'some/set' is a gated dataset on the Hub.", "/datasets/some/set, and with"),
        ("", "Dataset 'some/set' doesn't exist on the Hub or cannot be accessed.", "hf auth login"),
        ("1", "Couldn't reach 'some/set' on the Hub", "unset HF_HUB_OFFLINE"),
    ],
)
def test_a_set_that_the_hub_refuses_says_what_to_type(offline, said, hint, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(said)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(UsageError) as caught:
        load_rows(["some/set"])
    assert said in str(caught.value) and hint in caught.value.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "x", "n": 1}, "row 2: has the columns `words`, `n`"),
        ({}, "row 2: has the columns none"),
        ([1], "row 2: holds a list"),
        ({"text": 3}, "`text` is a number"),
        ({"messages": []}, "`messages` is not a filled list"),
        ({"messages": [{"role": 3, "content": "x"}]}, "has the role 3"),
        ({"messages": [{"role": "user"}]}, r"`messages\[0\]` has no `content`"),
        ({**CHAT, "tools": "{"}, "`tools` is not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = _jsonl(tmp_path / "a.jsonl", CHAT, row)
    with pytest.raises(UsageError, match=message) as caught:
        load_rows([path])
    assert str(caught.value).startswith(path)
    assert "`messages`" in caught.value.hint


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="no data given"):
        load_rows([])
    with pytest.raises(UsageError, match=r"nope\.jsonl does not exist"):
        load_rows([str(tmp_path / "nope.jsonl")])
    with pytest.raises(UsageError, match="is a folder without rows"):
        load_rows([str(tmp_path)])
    for name in ("empty.jsonl", "empty.txt"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(UsageError, match="is empty"):
            load_rows([str(tmp_path / name)], max_samples=1)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(UsageError, match="row 3: not JSON"):
        load_rows([str(tmp_path / "broken.jsonl")])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(UsageError, match="cannot be used"):
        load_rows([str(tmp_path / "cut.jsonl.gz")])
    damaged = bytearray(gzip.compress(random.Random(0).randbytes(9999).hex().encode()))
    damaged[2000:2040] = bytes(40)
    (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
    with pytest.raises(UsageError, match="cannot be used"):
        load_rows([str(tmp_path / "damaged.jsonl.gz")])
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="cannot be used"):
        load_rows([str(tmp_path / "latin.txt")])
    (tmp_path / "no.parquet").write_bytes(b"PAR0")
    with pytest.raises(UsageError, match="as parquet"):
        load_rows([str(tmp_path / "no.parquet")])
    (tmp_path / "a.docx").write_text("text\nx\n")
    with pytest.raises(UsageError, match="unknown kind of file"):
        load_rows([str(tmp_path / "a.docx")])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (r'{"text": "half of a face \uD83D"}', "holds what is no text"),
        (r'{"messages": [{"role": "user", "content": "\ude00"}]}', "holds what is no text"),
        ("[" * 10**5 + "]" * 10**5, "not JSON"),
    ],
)
def test_a_line_that_no_tokenizer_can_read_is_a_bad_row(tmp_path, line, problem):
    file = tmp_path / "rows.jsonl"
    # both halves together are a character
    file.write_text(r'{"text": "a face \ud83d\ude00"}' + f"\n{line}\n")
    with pytest.raises(UsageError, match=f"row 2: {problem}"):
        load_rows([str(file)])
    bad = BadRows(skip=True)
    assert [row["text"] for row in load_rows([str(file)], bad=bad)] == ["a face \U0001f600"]
    assert bad.count(MALFORMED) == 1


def test_an_unreachable_hub_set_is_a_sentence():
    with pytest.raises(UsageError, match="data set nobody/nothing:en@test cannot be loaded"):
        load_rows(["nobody/nothing:en@test"])
