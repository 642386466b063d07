"""Damaged data is a sentence with file and row, whatever is wrong with it, in bounded memory."""

import gzip
import json
import os
import random

import pytest

from mambactl import foreign
from mambactl.bounds import LINE_BYTES, MIB, Bound
from mambactl.data import row_containers
from mambactl.data.bad_rows import BadRows
from mambactl.data.conversations import read_conversations
from mambactl.data.preferences import load_pairs
from mambactl.data.sources import load_rows
from mambactl.errors import UsageError
from mambactl.generation.decoding import read_prompts

GOOD = {
    "text": "the river",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "prompt": "the old king",
    "chosen": "went",
    "rejected": "saw",
}
USER = {"role": "user", "content": "a"}


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


# a value, as JSON, for every column
VALUES = {
    "number": "3",
    "digits": "9" * 5000,
    "exponent": "1e999",
    "nan": "NaN",
    "null": "null",
    "true": "true",
    "string": '"the"',
    "empty": '""',
    "half of a character": r'"\ud800"',
    "nul": r'"\u0000"',
    "list": "[]",
    "numbers": "[1, 2]",
    "strings": '["a", "b"]',
    "nulls": "[null]",
    "lists": "[[]]",
    "objects": "[{}]",
    "object": "{}",
    "100 levels": nested(99),
    "900 levels": nested(900),
    "100,000 levels": nested(100_000),
    "a number as content": '[{"role": "user", "content": 5}]',
    "a number beside a call": '[{"role": "user", "content": 5, "tool_calls": [{}]}]',
    "a list as role": '[{"role": ["user"], "content": "a"}]',
    "a number as calls": '[{"role": "assistant", "tool_calls": 5}]',
    "text as calls": '[{"role": "assistant", "tool_calls": "f"}]',
    "numbers as calls": '[{"role": "assistant", "tool_calls": [1]}]',
    "empty calls": '[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]',
    "a call of a number": '[{"role": "assistant", "tool_calls": [{"function": 3}]}]',
}
COLUMNS = (
    *("text", "messages", "tools", "prompt", "chosen", "rejected", "turns", "instruction"),
    *("conversations", "completion", "input", "output", "history", "system", "functions"),
    *("chat_template_kwargs", "label", "images"),
)
# of rows without messages, where these columns hold what is learned
BARE = ("text", "messages")


def lines_of(value: str) -> list[str]:
    """A row for every column that holds the value, and a row that is the value."""
    rows = [
        json.dumps({key: item for key, item in GOOD.items() if key != column})[:-1]
        + f', "{column}": {value}}}'
        for column in COLUMNS
    ]
    bare = {key: item for key, item in GOOD.items() if key not in BARE}
    rows += [json.dumps(bare)[:-1] + f', "{column}": {value}}}' for column in COLUMNS]
    return [*rows, value]


@pytest.mark.parametrize("value", VALUES)
def test_any_value_in_any_column_is_read_or_refused(tmp_path, value) -> None:
    path = tmp_path / "rows.jsonl"
    for line in lines_of(VALUES[value]):
        path.write_text(line + "\n", encoding="utf-8")
        bad = BadRows()
        assert len(read_conversations([str(path)], bad=bad)) + len(bad.found) == 1
        for read in (lambda: load_rows([str(path)]), lambda: read_prompts(str(path))):
            try:
                assert len(read()) == 1
            except UsageError as error:
                assert str(error).startswith(f"{path}, row 1: ")


def test_any_value_in_any_column_of_preferences_is_a_pair_or_a_bad_row(
    tmp_path, tiny_tokenizer
) -> None:
    lines = [line for value in VALUES.values() for line in lines_of(value)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    (found,) = load_pairs([str(path)], tiny_tokenizer, 64, skip_bad_rows=True).values()
    assert found.pairs and len(found.pairs) + len(found.bad.found) == len(lines)


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2),
        (b'{"text": "a"}\n{"text": "a\x00"}\n', 2),
        (b'{"text": "a"}\nnothing\n', 2),
        (b'{"text": "a"}\n{"text": "a"', 2),
        (b"\xff\xfe" + '{"text": "a"}\n'.encode("utf-16-le"), 1),
        (b'{"text": 1}{"text": 2}\n', 1),
    ],
)
def test_a_damaged_line_is_named(tmp_path, content, row) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"rows.jsonl, row {row}"):
        load_rows([str(path)])


def test_a_byte_order_mark_is_no_damage(tmp_path) -> None:
    for name, content in (("a.jsonl", '{"text": "a"}'), ("a.txt", "a")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert load_rows([str(tmp_path / name)]) == [{"text": "a"}]


@pytest.mark.parametrize("suffix", row_containers.SUFFIXES)
def test_only_regular_files_are_read(tmp_path, suffix) -> None:
    pipe, link, folder = (tmp_path / f"{name}{suffix}" for name in ("pipe", "link", "folder"))
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    folder.mkdir()
    loop = tmp_path / f"loop{suffix}"
    loop.symlink_to(loop)
    for path, problem in (
        (pipe, "is a pipe or device"),
        (link, "is a pipe or device"),
        (folder, "is a folder"),
        (loop, "cannot be used"),
        (tmp_path / ("n" * 300 + suffix), "cannot be used .File name too long"),
        (tmp_path / f"nul\0{suffix}", "cannot be used"),
    ):
        with pytest.raises(UsageError, match=problem):
            load_rows([str(path)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_long_line_is_refused_before_it_is_held(tmp_path, monkeypatch, name) -> None:
    for module in (foreign, row_containers):
        monkeypatch.setattr(module, "LINE_BYTES", Bound(MIB, "bytes", "a line"))
    for letter in ("a", "ü"):
        text = (letter * (MIB + 1)).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        with pytest.raises(UsageError, match="has more than 1 MiB"):
            load_rows([str(tmp_path / name)])


def test_little_memory_is_taken_by_a_small_file_of_zeros(tmp_path) -> None:
    """The bound itself, with a file that decompresses to more than it."""
    import tracemalloc

    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(2 * LINE_BYTES.most // MIB):
            file.write(bytes(MIB))
    tracemalloc.start()
    with pytest.raises(UsageError, match="row 1 has more than 64 MiB"):
        load_rows([str(path)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 * LINE_BYTES.most


def test_a_file_of_empty_lines_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(row_containers, "EMPTY_LINES", Bound(1000, "empty lines", "a gap"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}' + "\n" * 1000 + '{"text": "b"}\n')
    assert len(load_rows([str(path)])) == 2
    path.write_text('{"text": "a"}' + "\n" * 2000)
    with pytest.raises(UsageError, match="row 2 has more than 1,000 empty lines"):
        load_rows([str(path)])


def parquet_of(path, rows) -> bytes:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=8)
    return path.read_bytes()


def test_a_damaged_parquet_is_named(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    whole = parquet_of(path, [{"text": f"the {n % 3}", "messages": [USER]} for n in range(40)])
    draw = random.Random(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 8)):
            damaged[draw.randrange(4, len(whole))] = draw.randrange(256)
        path.write_bytes(bytes(damaged) if trial % 3 else whole[: draw.randrange(len(whole))])
        try:
            load_rows([str(path)])
        except UsageError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 20


@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        {"text": b"bytes"},
        {"messages": [None]},
        {"messages": [{"role": None, "content": None}]},
        {"messages": {"role": "user", "content": "a"}},
        {"messages": [USER], "tools": [None]},
        {"other": 1},
    ],
)
def test_a_parquet_of_another_schema_is_a_bad_row(tmp_path, row) -> None:
    parquet_of(tmp_path / "a.parquet", [row])
    with pytest.raises(UsageError, match="a.parquet, row 1: "):
        load_rows([str(tmp_path / "a.parquet")])


def test_a_large_row_group_is_refused_before_it_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(row_containers, "ROW_GROUP_BYTES", Bound(10, "bytes", "a row group"))
    parquet_of(tmp_path / "a.parquet", [{"text": "the river"}] * 40)
    with pytest.raises(UsageError, match="row group 0 has more than"):
        load_rows([str(tmp_path / "a.parquet")])
