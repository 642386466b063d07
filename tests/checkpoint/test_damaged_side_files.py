"""Configs and side files that are damaged: one sentence with the file's name, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model, load_tokenizer, open_strict
from mambactl.errors import ModelError

NO_UTF8 = b'{"a": "\xff\xfe"}'


def refused(load: Callable[[str], object], folder: Path, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(str(folder))
    assert name in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("load", [load_model, open_strict, describe])
def test_a_config_that_is_not_utf8(llama, load) -> None:
    (llama / "config.json").write_bytes(NO_UTF8)
    refused(load, llama, "config.json")


@pytest.mark.parametrize("load", [load_model, open_strict])
@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "nope"},
        {"rope_parameters": None, "rope_scaling": {"type": "foo", "rope_type": "foo"}},
        {"model_type": []},
    ],
)
def test_a_config_of_no_possible_model(llama, fields, load) -> None:
    raw = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**raw, **fields}))
    refused(load, llama, "config.json")


@pytest.mark.parametrize("content", [NO_UTF8, b"{}", b"[1", b""])
def test_a_damaged_tokenizer(llama, content) -> None:
    (llama / "tokenizer.json").write_bytes(content)
    refused(load_tokenizer, llama, "tokenizer.json")


@pytest.mark.parametrize("content", [NO_UTF8, b"{", b"[]", b'{"added_tokens_decoder": 3}'])
def test_a_damaged_tokenizer_config(llama, content) -> None:
    (llama / "tokenizer_config.json").write_bytes(content)
    refused(load_tokenizer, llama, "tokenizer_config.json")


def test_the_tokenizer_reads_the_config_too(llama) -> None:
    for file in llama.glob("tokenizer*"):
        file.unlink()
    (llama / "config.json").write_bytes(NO_UTF8)
    refused(load_tokenizer, llama, "config.json")


@pytest.mark.parametrize("content", [NO_UTF8, b"{", b"[]", b'{"num_beams": -1, "use_cache": 3'])
def test_a_damaged_generation_config(llama, content) -> None:
    (llama / "generation_config.json").write_bytes(content)
    refused(load_model, llama, "generation_config.json")
