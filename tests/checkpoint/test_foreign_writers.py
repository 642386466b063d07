"""Files that other programs read, written tensor by tensor."""

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from mambactl.checkpoint.gguf_writer import GgufFile
from mambactl.checkpoint.pickle_writer import PickleFolder

TENSORS = {
    "a": torch.arange(15.0).view(5, 3),
    "half": torch.linspace(-1, 1, 7).bfloat16(),
    "one": torch.tensor(3.0),
    "double": torch.ones(2, 2, dtype=torch.float64),
}
SHAPES = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> PickleFolder:
    return PickleFolder(tmp_path / "x", {"d_model": 8}, {"t.txt": "text"}, None, {"b": "a"})


def test_a_pickle_holds_tensors_written_in_any_order(folder: PickleFolder) -> None:
    folder.plan(SHAPES)
    for name in reversed(TENSORS):
        folder.write(name, TENSORS[name])
    folder.close()
    path = folder.path / "pytorch_model.bin"
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) == [*TENSORS, "b"]
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
        assert found["b"].data_ptr() == found["a"].data_ptr()
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        assert archive.testzip() is None
        for member in archive.infolist():
            raw.seek(member.header_offset + 26)
            name, extra = np.frombuffer(raw.read(4), np.uint16)
            # storages begin where any type may
            assert (member.header_offset + 30 + int(name) + int(extra)) % 64 == 0
    assert json.loads((folder.path / "config.json").read_text()) == {"d_model": 8}
    assert (folder.path / "t.txt").read_text() == "text"


def test_a_pickle_that_lacks_a_tensor_is_not_closed(folder: PickleFolder) -> None:
    folder.plan(SHAPES)
    folder.write("a", TENSORS["a"])
    with pytest.raises(ValueError, match="a was planned as"):
        folder.write("a", TENSORS["a"].half())
    with pytest.raises(ValueError, match="3 planned tensors were never written"):
        folder.close()
    folder.release()


def gguf_file(path: Path, kind: str) -> GgufFile:
    metadata = {
        "x.number": 3, "x.share": 0.5, "x.yes": True, "x.name": "é", "x.list": [1, 0],
        "x.words": ["a", "b"],
    }  # fmt: skip
    return GgufFile(path, path.with_name("beside.json"), "x", metadata, kind, {"stage": "export"})


def test_a_gguf_holds_keys_and_tensors_written_in_any_order(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "blk.0.w.weight": torch.randn(6, 64, generator=draw).bfloat16(),
        "blk.0.odd.weight": torch.randn(4, 33, generator=draw),
        "blk.0.ssm_a": torch.randn(3, 1, generator=draw),
        "norm.weight": torch.randn(5, generator=draw),
    }
    file = gguf_file(tmp_path / "x", "q8_0")
    file.plan({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    for name in reversed(tensors):
        file.write(name, tensors[name])
    file.close()
    read = gguf.GGUFReader(tmp_path / "x")
    found = {key: field.contents() for key, field in read.fields.items() if key.startswith("x.")}
    assert found == file._metadata
    assert read.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    # rows that are no whole number of blocks stay at 16 bits
    assert list(kinds.values()) == ["Q8_0", "F16", "F32", "F32"]
    for tensor in read.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        expected = tensors[tensor.name].float().numpy()
        assert values.shape == expected.shape
        assert (
            np.abs(values - expected).max()
            < {"Q8_0": 0.02, "F16": 1e-3, "F32": 1e-9}[tensor.tensor_type.name]
        )
    assert json.loads((tmp_path / "beside.json").read_text()) == {"stage": "export"}


def test_a_gguf_that_lacks_a_tensor_is_not_closed(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "x", "float32")
    file.plan({"norm.weight": ((5,), torch.float32)})
    with pytest.raises(ValueError, match=r"norm.weight was planned as"):
        file.write("norm.weight", torch.zeros(4))
    with pytest.raises(ValueError, match="1 planned tensors were never written"):
        file.close()
    file.release()
    assert not (tmp_path / "beside.json").exists()


@pytest.mark.parametrize("kind", ["pickle", "gguf", "safetensors"])
def test_a_tensor_may_come_in_parts(kind: str, tmp_path: Path) -> None:
    from mambactl.checkpoint.container import Container

    whole = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    file = {
        "pickle": lambda: PickleFolder(tmp_path / "x", {}, {}, None, {}),
        "gguf": lambda: gguf_file(tmp_path / "x", "float32"),
        "safetensors": lambda: Container(tmp_path / "x", False, {}, {}, None),
    }[kind]()
    file.plan({"w": ((96, 32), torch.float32)})
    with pytest.raises(ValueError, match="w was planned as"):
        file.write("w", whole[:40], whole[:40])
    with pytest.raises(ValueError, match="rows of 2 shapes"):
        file.write("w", whole[:40], whole[40:, :5])
    file.write("w", whole[:40], whole[40:41], whole[41:])
    file.close()
    if kind == "gguf":
        found = torch.tensor(gguf.GGUFReader(tmp_path / "x").tensors[0].data)
    elif kind == "pickle":
        found = torch.load(tmp_path / "x/pytorch_model.bin", weights_only=True)["w"]
    else:
        from safetensors.torch import load_file

        found = load_file(tmp_path / "x/model.safetensors")["w"]
    assert torch.equal(found, whole)
