"""Weights that are cut, contradict themselves or hold something else: a sentence."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.faults import refused
from safetensors.torch import load_file, save_file

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import open_strict
from mambactl.checkpoint.pickle_reader import PickleReader
from mambactl.checkpoint.safetensors_reader import SingleFileReader
from mambactl.errors import ModelError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "9" * 5000


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "length beyond the file": safetensors({}, length=2**40),
    "length beyond the bound": safetensors(b"{}" + b" " * (65 << 20)),
    "length of 2^64": safetensors({}, length=2**64 - 1),
    "no JSON": safetensors(b"\xff" * 64),
    "nesting": safetensors(b'{"a":' + DEEP.encode() + b"}"),
    "digits": safetensors(f'{{"a":{HUGE}}}'.encode()),
    "no tensors": safetensors({}),
    "list": safetensors([]),
    "overlap": safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
    "hole": safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "beyond": safetensors({"a": entry([4], 0, 16)}, b"\0" * 8),
    "overflow": safetensors({"a": entry([2**40, 2**40], 0, 4)}, b"\0" * 4),
    "negative": safetensors({"a": entry([-1], 0, 4)}, b"\0" * 4),
    "dtype": safetensors({"a": entry([4], 0, 4, "F9")}, b"\0" * 4),
    "float8": safetensors({"a": entry([4], 0, 4, "F8_E4M3")}, b"\0" * 4),
    "dtype of a number": safetensors({"a": entry([4], 0, 4, 3)}, b"\0" * 4),
    "metadata": safetensors({"__metadata__": {"a": 3}, "a": entry([1], 0, 4)}, b"\0" * 4),
    "twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"\0" * 8,
    ),
    "too many": safetensors({f"t{i}": entry([0], 0, 0, "U8") for i in range(100_001)}),
}


@pytest.mark.parametrize("fault", SAFETENSORS)
def test_headers_of_safetensors(llama: Path, fault: str) -> None:
    (llama / WEIGHTS).write_bytes(SAFETENSORS[fault])
    refused(describe, llama, WEIGHTS)


METADATA = {
    "config": {"config.json": "["},
    "lineage": {"mambactl.json": '{"schema": 1}'},
    "no base64": {"tokenizer.model": "base64:%%%"},
}


@pytest.mark.parametrize("fault", METADATA)
def test_metadata_of_a_single_file(llama: Path, tmp_path: Path, fault: str) -> None:
    config = (llama / CONFIG).read_text()
    metadata = {"config.json": config, **METADATA[fault]}
    save_file(load_file(llama / WEIGHTS), tmp_path / "m.st", metadata)
    with pytest.raises(ModelError, match=next(iter(METADATA[fault]))) as caught:
        SingleFileReader(tmp_path / "m.st")
    assert caught.value.hint


def expanded(state: dict[str, torch.Tensor]) -> object:
    """Shapes without numbers behind them."""
    return {**state, "w": torch.ones(1).expand(2**20, 2**20)}


PICKLES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "list": lambda state: list(state.values()),
    "tensor": lambda state: torch.ones(3),
    "nothing": lambda state: {},
    "dicts of dicts": lambda state: {"model": state},
    "numbers as names": lambda state: {1: torch.ones(1)},
    "sparse": lambda state: {**state, "w": torch.eye(3).to_sparse()},
    "quantised": lambda state: {
        **state,
        "w": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
    },
    "meta": lambda state: {**state, "w": torch.ones(3, device="meta")},
    "expanded": expanded,
    "bytes": lambda state: {**state, "w": bytearray(8)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fault", PICKLES)
def test_pickles_of_other_things(llama: Path, fault: str, zipped: bool) -> None:
    content = PICKLES[fault](load_file(llama / WEIGHTS))
    (llama / WEIGHTS).unlink()
    file = llama / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    refused(open_strict, llama, "")


def test_pickles_that_are_cut_or_packed(llama: Path) -> None:
    state = load_file(llama / WEIGHTS)
    (llama / WEIGHTS).unlink()
    file = llama / "pytorch_model.bin"
    torch.save(state, file)
    whole = file.read_bytes()
    for part in (b"", whole[:2], whole[:1000], whole[: len(whole) // 2], whole[:-30]):
        file.write_bytes(part)
        refused(PickleOf, llama, file.name)
    file.write_bytes(whole)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(PickleOf, llama, "compressed")


def PickleOf(folder: str) -> PickleReader:
    return PickleReader(Path(folder))


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(tensors: int, pairs: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def pair(key: str, kind: int, value: bytes) -> bytes:
    return packed(key) + struct.pack("<I", kind) + value


def tensor(shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return packed("token_embd.weight") + sizes + struct.pack("<IQ", kind, offset)


NAMED = pair("general.architecture", 8, packed("llama"))
# kinds of values: 4 is uint32, 6 float32, 7 bool, 8 a string, 9 an array
GGUFS = {
    "empty": b"",
    "magic": b"GGUX" + b"\0" * 60,
    "torn": b"GGUF\3\0\0\0\1",
    "version": gguf(0, 0, version=99),
    "2^60 tensors": gguf(2**60, 0),
    "2^60 pairs": gguf(0, 2**60),
    "2^60 strings": gguf(0, 1, pair("a", 9, struct.pack("<IQ", 8, 2**60))),
    "2^60 numbers": gguf(0, 1, pair("a", 9, struct.pack("<IQ", 4, 2**60))),
    "numbers beyond the end": gguf(0, 1, pair("a", 9, struct.pack("<IQ", 4, 1000))),
    "nested": gguf(0, 1, pair("a", 9, struct.pack("<IQIQ", 9, 1, 9, 1))),
    "string of 2^60": gguf(0, 1, struct.pack("<Q", 2**60)),
    "kind": gguf(0, 1, pair("a", 77, b"\0" * 64)),
    "no UTF-8": gguf(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)),
    "twice": gguf(0, 2, 2 * pair("a", 4, b"\0" * 4)),
    "alignment 0": gguf(0, 1, pair("general.alignment", 4, b"\0" * 4)),
    "alignment of a string": gguf(0, 1, pair("general.alignment", 8, packed("x"))),
    "architecture of a number": gguf(0, 1, pair("general.architecture", 4, b"\0" * 4)),
    "no sizes": gguf(0, 1, NAMED),
    "sizes that are text": gguf(0, 2, NAMED + pair("llama.embedding_length", 8, packed("x"))),
    "shape": gguf(1, 1, NAMED + tensor([2**40, 2**40])),
    "dimensions": gguf(1, 1, NAMED + tensor([1] * 9)),
    "type of a tensor": gguf(1, 1, NAMED + tensor([4], kind=250) + b"\0" * 64),
    "offset beyond the end": gguf(1, 1, NAMED + tensor([4], offset=2**50) + b"\0" * 64),
}


@pytest.mark.parametrize("fault", GGUFS)
def test_headers_of_gguf(tmp_path: Path, fault: str) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUFS[fault])
    refused(describe, tmp_path / "m.gguf", "")
