"""Documented forms of rows give what they say wherever they lie; others are refused by name."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mambactl.data.bad_rows import BadRows
from mambactl.data.conversations import read_conversations
from mambactl.data.format import Rules, encode_rows
from mambactl.data.preferences import load_pairs, marked
from mambactl.data.row_containers import SUFFIXES
from mambactl.data.sources import load_rows
from mambactl.errors import UsageError
from mambactl.generation.decoding import read_prompts

DOCUMENT = Path(__file__).parents[2] / "recipes" / "rows.md"
BLOCK = re.compile(r"^([^\n]+)\n\n```jsonl\n(.*?)```", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(BLOCK.findall(DOCUMENT.read_text()))
CHATS = ("ShareGPT", "chat as JSON text", "Alpaca", "prompt and completion, turns")
QUESTIONS = ["old house", "new tree", "king or\n\nqueen"]
ANSWERS = ["the red door", "a small bird", "the queen"]
END = "<|im_end|>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path):
    def save(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return save


@pytest.fixture
def example(tmp_path):
    def save(name):
        path = tmp_path / "example.jsonl"
        path.write_text(EXAMPLES[name])
        return str(path)

    return save


def learned(example, tokenizer):
    return tokenizer.decode(example.input_ids[example.loss_mask])


def encoded(spec, tokenizer, **rules):
    return encode_rows(load_rows([spec]), tokenizer, rules=Rules(assistant_only=True, **rules))


def test_the_table_of_forms_has_an_example_of_each() -> None:
    table = DOCUMENT.read_text().partition("## Forms")[2].partition("chat\n\n```")[0]
    forms = re.findall(r"^\| ([^|`]+?) \| `", table, re.MULTILINE)
    assert forms == list(EXAMPLES)
    assert all(len(text.splitlines()) == 3 for text in EXAMPLES.values())
    named = DOCUMENT.read_text().partition("## Forms")[0]
    assert all(suffix in named for suffix in SUFFIXES if not suffix.endswith(".gz"))


def test_every_chat_gives_the_same_tokens(example, tiny_tokenizer) -> None:
    wanted = encoded(example("chat"), tiny_tokenizer)
    assert [learned(each, tiny_tokenizer) for each in wanted] == [f"{a} {END}" for a in ANSWERS]
    for name in CHATS:
        found = encoded(example(name), tiny_tokenizer)
        for mine, theirs in zip(found, wanted, strict=True):
            assert np.array_equal(mine.input_ids, theirs.input_ids), name
            assert np.array_equal(mine.loss_mask, theirs.loss_mask), name


def test_text_ends_where_it_is_asked_to_and_completions_do(example, tiny_tokenizer) -> None:
    completed = encoded(example("prompt and completion, text"), tiny_tokenizer)
    assert [learned(each, tiny_tokenizer) for each in completed] == [f"{a} {END}" for a in ANSWERS]
    plain, ended = (
        encoded(example("text"), tiny_tokenizer, append_eos=asked) for asked in (False, True)
    )
    for text, whole, both in zip(plain, ended, completed, strict=True):
        assert text.input_ids.tolist() == whole.input_ids.tolist()[:-1]
        assert np.array_equal(whole.input_ids, both.input_ids) and whole.loss_mask.all()


def test_every_pair_gives_the_same_tokens(example, tiny_tokenizer) -> None:
    turns, texts = (
        load_pairs([example(name)], tiny_tokenizer, 64)["example"].pairs
        for name in ("pairs, turns", "pairs, text")
    )
    for mine, theirs, answer in zip(texts, turns, ANSWERS, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine[2:], theirs[2:], strict=True))
        shown = marked(mine, tiny_tokenizer)["chosen"].partition("[[")[2]
        assert shown.split() == [*answer.split(), f"{END}]]"]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith("pairs")])
def test_generate_asks_what_every_form_asks(example, name) -> None:
    path = example(name)
    asked = [each.opening[-1]["content"] for each in read_conversations([path])]
    wanted = [f"{q} {a}" for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    assert asked == (wanted if name == "text" else QUESTIONS)
    assert [prompt.messages[-1]["content"] for prompt in read_prompts(path)] == asked


def containers(folder: Path, rows) -> list[str]:
    """The same rows in every container; lists in tables are JSON text."""
    import csv

    import pyarrow
    from datasets import Dataset, DatasetDict
    from pyarrow import parquet

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    texts = {
        "a.jsonl": lines,
        "a.ndjson": lines,
        "a.json": json.dumps(rows, indent=1),
        "held.json": json.dumps({"version": 1, "data": rows}),
        "lines.json": lines,
    }
    for name, text in texts.items():
        (folder / name).write_text("\ufeff" + text, "utf-8")
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(["messages", "note"])
            table.writerows([[json.dumps(row["messages"]), ""] for row in rows])
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    parts = folder / "parts"
    parts.mkdir()
    for number, row in enumerate(rows):
        (parts / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    saved = Dataset.from_list(rows)
    saved.save_to_disk(folder / "saved")
    DatasetDict(train=saved, test=saved.select([0])).save_to_disk(folder / "splits")
    hub = folder / "hub" / "data"
    hub.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), hub / "train-00000-of-00001.parquet")
    (folder / "hub" / "README.md").write_text("# rows\n")
    names = [*texts, *(f"{name}.gz" for name in texts), "a.csv", "a.tsv"]
    names += ["a.parquet", "parts/*.jsonl", "saved", "saved@train", "splits", "splits@train"]
    names += ["splits@train[:1]+train[1:]", "hub", "hub@train"]
    return [str(folder / name) for name in names]


def test_every_container_and_folder_gives_the_same_rows(tmp_path, monkeypatch) -> None:
    from datasets import disable_progress_bars

    disable_progress_bars()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in EXAMPLES["chat"].splitlines()]
    for spec in containers(tmp_path, rows):
        assert load_rows([spec]) == rows, spec
    assert load_rows([str(tmp_path / "splits@test")]) == rows[:1]
    found = load_rows([str(tmp_path / "parts" / "*.jsonl")])
    assert [row.where for row in found] == [f"{tmp_path}/parts/{n}.jsonl, row 1" for n in range(3)]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("splits@val", "", "has no split val"),
        ("nothing/*.jsonl", "", "matches no file"),
        ("empty", None, "is a folder without rows"),
        ("model", "config.json", "is a folder with a checkpoint"),
        ("a.json", "[{]", "a.json: not JSON"),
        ("a.json", '[{"text": 3}]', "a.json, row 1: `text` is a number"),
        ("a.csv", "text\nx,y\n", "a.csv, row 1: not JSON|row 1: .*1 cells more than names"),
        ("a.csv", 'text\n"x\n', "a.csv, row 1: as a table cannot be used"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, problem) -> None:
    from datasets import Dataset, DatasetDict

    if name.startswith("splits"):
        DatasetDict(train=Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "splits")
    elif content is None or name == "model":
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / content).write_text("{}")
    elif content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=problem):
        load_rows([str(tmp_path / name)])


CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
# of three spellings, the first as templates want it
CALLS = [
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "assistant", "function_call": {"name": "f", "arguments": '{"n": 1}'}},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"n": 1}}'},
]


@pytest.mark.parametrize("call", CALLS)
def test_calls_are_one_form(write, call) -> None:
    (row,) = load_rows([write({"messages": [user("go"), call]})])
    assert row["messages"][1] == CALLS[0]


def test_a_system_message_and_a_history_go_before_the_question(write) -> None:
    pairs = {"system": "be short", "instruction": "c", "history": [["a", "b"]]}
    turns = [{"role": "system", "content": "be short"}, user("a"), assistant("b"), user("c")]
    (row,) = load_rows([write({**pairs, "output": "d"})])
    assert row["messages"] == [*turns, assistant("d")]
    (asked,) = read_conversations([write(pairs)])
    assert list(asked.opening) == turns
    functions = {"functions": '[{"name": "f"}]', "messages": [user("a"), assistant("b")]}
    (row,) = load_rows([write(functions)])
    assert row["tools"] == [{"type": "function", "function": {"name": "f"}}]


def test_turns_that_are_marked_are_not_learned(write, tiny_tokenizer) -> None:
    turns = [user("go"), assistant("the river"), user("go"), assistant("a house")]
    for mark in ({"weight": 0}, {"train": False}, {"training": False}):
        spec = write({"messages": [*turns[:1], turns[1] | mark, *turns[2:]]})
        (found,) = encoded(spec, tiny_tokenizer)
        assert learned(found, tiny_tokenizer) == f"a house {END}"
    (found,) = encoded(write({"prompt": turns[:3], "completion": turns[3:]}), tiny_tokenizer)
    assert learned(found, tiny_tokenizer) == f"a house {END}"


def test_nulls_of_arrow_are_nothing_and_those_of_json_stay(tmp_path, write) -> None:
    import pyarrow
    from pyarrow import parquet

    def row(**arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [user("go"), {"role": "assistant", "tool_calls": [call]}]}

    rows = [row(city="a"), row(zone="b")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_rows([str(tmp_path / "a.parquet")]) == load_rows([write(*rows)]) == rows
    assert load_rows([write(row(city=None))]) == [row(city=None)]


@pytest.mark.parametrize(
    ("row", "problem", "cure"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has the columns", "mambactl dpo"),
        ({"prompt": "a"}, "has the columns `prompt`", "mambactl generate"),
        ({"prompt": "a", "completion": "b", "label": False}, "has a `label`", "is true"),
        (
            {"messages": [user("a")], "chat_template_kwargs": {"tokenize": True}},
            "has `tokenize`, which is no option",
            "",
        ),
        ({"messages": [user("a"), assistant("b")], "images": ["x"]}, "has `images`", ""),
        ({"messages": [user([{"type": "image_url"}])]}, "part of the type 'image_url'", ""),
        ({"messages": [{**user("a"), "train": True}]}, "is marked to be learned", ""),
        ({"messages": [{**assistant("a"), "weight": 0.5}]}, "has the `weight` 0.5", ""),
        ({"messages": "[{'role': 'user'}]"}, "`messages` is text and not JSON", ""),
        ({"messages": [{"from": "function_call", "value": "x"}]}, "is text and not JSON", ""),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "`history` is no list", ""),
        (
            {"system": "s", "messages": [{"role": "system", "content": "t"}, user("a")]},
            "another system message",
            "",
        ),
    ],
)
def test_what_would_change_the_meaning_is_refused(write, row, problem, cure) -> None:
    bad = BadRows()
    assert load_rows([write(row)], bad=bad) == []
    assert problem in bad.found[0].problem and cure in bad.found[0].cure
    with pytest.raises(UsageError) as caught:
        bad.settle()
    of_another_kind = "mambactl" in cure or "label" in problem
    assert ("--skip-bad-rows" in caught.value.hint) != of_another_kind


@pytest.mark.parametrize(
    ("row", "problem", "cure"),
    [
        ({"messages": [user("a"), assistant("b")]}, "has the columns", "mambactl sft"),
        ({"context": "go", "chosen": "the a", "rejected": "the b"}, "`context` is not read", ""),
        (
            {"prompt": [user("a")], "chosen": [assistant("b") | {"train": False}], "rejected": "c"},
            "marked not to be learned",
            "",
        ),
    ],
)
def test_a_pair_that_would_lose_its_prompt_is_refused(
    write, tiny_tokenizer, row, problem, cure
) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        load_pairs([write(row)], tiny_tokenizer, 64)
    assert cure in caught.value.hint


def test_unread_columns_are_named_once_per_file(write, tiny_tokenizer, capsys) -> None:
    chat = {"messages": [user("a"), assistant("b")], "note": "x", "empty": None}
    load_rows([write(chat, chat | {"more": 1})])
    said = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
    assert [line.partition("not read: ")[2] for line in said] == ["`note`", "`more`"]
    pair = {"prompt": "the", "chosen": "old", "rejected": "new", "score": 3.0}
    load_pairs([write(pair, pair)], tiny_tokenizer, 64)
    assert capsys.readouterr().err.count("not read: `score`") == 1
