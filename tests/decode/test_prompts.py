"""Prompt files and their way to token ids."""

import gzip
import json

import pytest

from mambactl.decode.prompts import BUILTIN, Prompt, encode
from mambactl.errors import UsageError
from mambactl.generation.decoding import read_prompts


def test_builtin_prompts_cover_four_kinds_of_text():
    assert {prompt.category for prompt in BUILTIN} == {"chat", "code", "maths", "summary"}
    assert len({prompt.messages[0]["content"] for prompt in BUILTIN}) == len(BUILTIN) == 8


def test_every_known_row_becomes_a_prompt(tmp_path):
    talk = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant")]
    rows = [
        {"prompt": "one"},
        {"text": "two"},
        {"id": 3, "category": "maths", "turns": ["three", "more"], "reference": None},
        {"messages": talk},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", "utf-8")
    prompts = read_prompts(str(file))
    assert prompts[:3] == [Prompt.of("one"), Prompt.of("two"), Prompt.of("three", "maths")]
    assert prompts[3].messages == tuple(talk[:2])
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_prompts(str(packed)) == prompts


def test_text_files_hold_a_prompt_per_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\n  two \n", "utf-8")
    assert read_prompts(str(file)) == [Prompt.of("one"), Prompt.of("  two ")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"colour": "b"}\n', "row 2"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "row 2"),
        ("p.jsonl", '["a"]\n', "row 1"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "b"}]}\n', "row 1"),
        ("p.txt", "\n", "no rows"),
        ("p.csv", "a\n", "no rows"),
        ("p.md", "a\n", "unknown kind"),
        (None, "", "no file"),
    ],
)
def test_bad_files_are_refused_with_the_row(tmp_path, name, content, words):
    if name:
        (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(UsageError, match=words):
        read_prompts(str(tmp_path / (name or "missing.txt")))


def test_the_chat_template_wraps_when_wanted(tiny_tokenizer):
    prompt = Prompt.of("the old house")
    wrapped = tiny_tokenizer.decode(encode(prompt, tiny_tokenizer))
    assert wrapped == "<|im_start|> <unk> the old house <|im_end|> <|im_start|> <unk>"
    assert tiny_tokenizer.decode(encode(prompt, tiny_tokenizer, chat=False)) == "the old house"
