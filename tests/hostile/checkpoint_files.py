"""Files of a checkpoint, in a folder or inside of a single file."""

import json
import struct
from pathlib import Path

METADATA = "__metadata__"
SAFETENSORS = (".safetensors", ".st")


def files(model: Path, *suffixes: str) -> list[Path]:
    """Files of a checkpoint, of some suffixes or all."""
    found = [model] if model.is_file() else sorted(model.iterdir())
    return [path for path in found if not suffixes or path.suffix in suffixes]


def read_header(path: Path) -> tuple[str, bytes]:
    """The header of a safetensors file as text, and the data behind it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end].decode("utf-8"), content[end:]


def write_header(path: Path, header: str, data: bytes) -> None:
    """Write a safetensors file, whose header may be anything."""
    encoded = header.encode("utf-8")
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def side_files(model: Path) -> list[str]:
    """Names of what is beside the weights."""
    if model.is_dir():
        return [path.name for path in files(model, ".json", ".jinja", ".md")]
    return list(json.loads(read_header(model)[0])[METADATA])


def read_side_file(model: Path, name: str) -> str:
    """The text of a side file."""
    if model.is_dir():
        return (model / name).read_text("utf-8")
    return json.loads(read_header(model)[0])[METADATA][name]


def write_side_file(model: Path, name: str, text: str) -> None:
    """Replace a side file, or add it."""
    if model.is_dir():
        (model / name).write_text(text, "utf-8")
        return
    header, data = read_header(model)
    tensors = json.loads(header)
    tensors[METADATA][name] = text
    write_header(model, json.dumps(tensors), data)
