"""Files of a checkpoint that are no text, no JSON or no file: a sentence that names them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint.faults import dangling, device, folder, loop, pipe, refused, set_fields

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer
from mambactl.checkpoint.provenance import header_digest
from mambactl.errors import ModelError
from mambactl.foreign import blamed

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUGE = "9" * 5000
DEEP = "[" * 100_000 + "]" * 100_000


def alone(llama: Path) -> Path:
    """The index of a folder without weights in one file, which would be read in its place."""
    (llama / WEIGHTS).unlink()
    return llama / "model.safetensors.index.json"


TEXTS = {
    "empty": (b"", "is not valid JSON"),
    "digits": (f'{{"vocab_size": {HUGE}}}'.encode(), "is not valid JSON"),
    "nesting": (f'{{"a": {DEEP}}}'.encode(), ""),
    "deeper than the bound": (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "100 levels"),
    "half of a character": (b'{"a": "\\ud800"}', "is not valid JSON"),
    "NUL": (b'{"a": "\0"}', "is not valid JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "is not valid JSON"),
    "no object": (b"[]", "is not a JSON object"),
    "no number": (b'{"a": {"__float__": []}}', "is not valid JSON"),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_texts_of_a_config(llama: Path, fault: str) -> None:
    content, said = TEXTS[fault]
    (llama / CONFIG).write_bytes(content)
    refused(describe, llama, said)
    refused(load_tokenizer, remove_tokenizer(llama), CONFIG)


def remove_tokenizer(folder: Path) -> Path:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


@pytest.mark.parametrize("kind", [folder, pipe, device, loop, dangling])
@pytest.mark.parametrize(
    ("file", "load"),
    [
        (CONFIG, describe),
        ("mambactl.json", load_lineage),
        ("tokenizer.json", load_tokenizer),
        ("generation_config.json", load_model),
        (WEIGHTS, describe),
        ("model.safetensors.index.json", describe),
        ("pytorch_model.bin", describe),
    ],
)
def test_no_regular_file(llama: Path, file: str, load: Callable, kind: Callable) -> None:
    path = llama / file
    path.unlink(missing_ok=True)
    if file in ("pytorch_model.bin", "model.safetensors.index.json"):
        (llama / WEIGHTS).unlink()
    if file.endswith("index.json") and kind in (loop, dangling):
        pytest.skip("as good as not there, beside model.safetensors")
    kind(path)
    refused(load, llama, "")
    # digests meet the same files first
    assert len(header_digest(llama)) == 64


@pytest.mark.parametrize("kind", [pipe, device])
@pytest.mark.parametrize("suffix", [".st", ".gguf"])
def test_single_files_are_regular(tmp_path: Path, suffix: str, kind: Callable) -> None:
    kind(tmp_path / f"m{suffix}")
    refused(describe, tmp_path / f"m{suffix}", "not a regular file")


def test_a_file_that_may_not_be_read(llama: Path, monkeypatch) -> None:
    """Tests may run as a user that may read everything."""

    def closed(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mambactl.foreign.os.open", closed)
    refused(describe, llama, "Permission denied")


@pytest.mark.parametrize("file", [3, "", "..", "../x", "/etc/passwd", "a\0b", ["a"], None])
def test_files_that_an_index_may_not_name(llama: Path, file: Any) -> None:
    index = alone(llama)
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    refused(describe, llama, index.name)


@pytest.mark.parametrize("content", [{}, {"weight_map": 3}, {"weight_map": []}, []])
def test_an_index_without_names(llama: Path, content: Any) -> None:
    alone(llama).write_text(json.dumps(content))
    refused(describe, llama, "index.json")


def test_a_name_of_5000_letters_in_an_index(llama: Path) -> None:
    index = {"weight_map": {"a": "x" * 5000}}
    alone(llama).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="File name too long"):
        describe(str(llama))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("chat_template.jinja", b"{{ messages"),
        ("chat_template.jinja", b"\xff"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
    ],
)
def test_tokenizers_and_templates(llama: Path, file: str, content: bytes) -> None:
    (llama / "chat_template.jinja").unlink(missing_ok=True)
    (llama / file).write_bytes(content)
    refused(load_tokenizer, llama, file)


@pytest.mark.parametrize("fields", [{"eos_token_id": "x"}, {"eos_token_id": [[2]]}])
def test_fields_of_a_generation_config(llama: Path, fields: dict[str, Any]) -> None:
    (llama / "generation_config.json").write_text(json.dumps(fields))
    refused(load_model, llama, "generation_config.json")


def test_a_panic_in_a_library_is_damage_and_an_interrupt_is_not() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(ModelError, match="m cannot be used"), blamed("m"):
        raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), blamed("m"):
        raise KeyboardInterrupt


def test_a_tokenizer_of_a_larger_model(llama: Path) -> None:
    set_fields(llama, CONFIG, {"vocab_size": 9})
    refused(load_tokenizer, llama, "its model has 9")
