"""Damage to the files of a checkpoint's weights: bytes, headers, values and pickles."""

import json
import os
import pickle
import struct
from pathlib import Path
from random import Random

from hostile.checkpoint_files import METADATA, SAFETENSORS, files, read_header, write_header
from hostile.mutations import damage_bytes, damage_entry, damage_json
from hostile.templates import TOUCH


def damaged_bytes(model: Path, draw: Random) -> str:
    """Bytes of any file."""
    path = draw.choice(files(model))
    content, what = damage_bytes(path.read_bytes(), draw)
    path.write_bytes(content)
    return f"{path.name}: {what}"


def another_entry(model: Path, draw: Random) -> str:
    """Something else where a file is."""
    path = draw.choice(files(model))
    return f"{path.name} is {damage_entry(path, draw)}"


def damaged_header(model: Path, draw: Random) -> str:
    """A value of the header of a safetensors file."""
    path = draw.choice(files(model, *SAFETENSORS))
    header, data = read_header(path)
    text, what = damage_json(header, draw)
    write_header(path, text, data)
    return f"header of {path.name}: {what}"


def wrong_tensor(model: Path, draw: Random) -> str:
    """Wrong offsets, types and shapes of one tensor, and lies about the header's length."""
    path = draw.choice(files(model, *SAFETENSORS))
    header, data = read_header(path)
    tensors = json.loads(header)
    name = draw.choice([key for key in tensors if key != METADATA])
    start, end = tensors[name]["data_offsets"]
    large = 1 << draw.choice((31, 40, 62))
    faults = {
        "dtype": draw.choice(("F64", "I64", "BOOL", "F8_E4M3", "F4", "Q", "", "BF16")),
        "shape": draw.choice(([large], [large, large], [0], [], [-1], [1] * 5000, [3, 5])),
        "data_offsets": draw.choice(
            ([end, start], [start, end + large], [0, 0], [start + 1, end + 1], [start, end, end])
        ),
    }
    field = draw.choice((*faults, "length"))
    if field == "length":
        length = draw.choice((0, 1, len(header) - 1, len(header) + 1, 1 << 32, (1 << 64) - 1))
        path.write_bytes(struct.pack("<Q", length) + header.encode() + data)
        return f"{path.name}: a header of {length} bytes"
    tensors[name][field] = faults[field]
    write_header(path, json.dumps(tensors), data)
    return f"{path.name}: {field} of {name} is {str(faults[field])[:50]}"


def not_finite(model: Path, draw: Random) -> str:
    """NaN or infinity in a tensor of fp32."""
    path = draw.choice(files(model, *SAFETENSORS, ".bin", ".gguf"))
    value = draw.choice((float("nan"), float("inf"), float("-inf")))
    if path.suffix == ".bin":
        name, count = _in_pickle(path, value, draw)
    elif path.suffix == ".gguf":
        name, count = _in_gguf(path, value, draw)
    else:
        name, count = _in_safetensors(path, value, draw)
    return f"{path.name}: {name} has {value} {count} times"


def _in_safetensors(path: Path, value: float, draw: Random) -> tuple[str, int]:
    header, data = read_header(path)
    tensors = {key: row for key, row in json.loads(header).items() if key != METADATA}
    name = draw.choice([key for key, row in tensors.items() if row["dtype"] == "F32"])
    start, end = tensors[name]["data_offsets"]
    at = start + 4 * draw.randrange((end - start) // 4)
    count = draw.choice((1, (end - at) // 4))
    content = data[:at] + struct.pack("<f", value) * count + data[at + 4 * count :]
    write_header(path, header, content)
    return name, count


def _in_pickle(path: Path, value: float, draw: Random) -> tuple[str, int]:
    import torch

    weights = torch.load(path, weights_only=True)
    name = draw.choice(sorted(weights))
    weights[name].view(-1)[draw.randrange(weights[name].numel())] = value
    torch.save(weights, path)
    return name, 1


def _in_gguf(path: Path, value: float, draw: Random) -> tuple[str, int]:
    """A number of the second half, which holds fp32 alone, at multiples of 32 bytes."""
    content = bytearray(path.read_bytes())
    at = 4 * draw.randrange(len(content) // 8, len(content) // 4)
    content[at : at + 4] = struct.pack("<f", value)
    path.write_bytes(content)
    return f"byte {at}", 1


class _Shell:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (TOUCH,)


def running_pickle(model: Path, draw: Random) -> str:
    """A pickle that runs a command, as weights or beside them."""
    name = draw.choice(
        ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pt", "tokenizer.pkl")
    )
    write_running_pickle(model / name, draw)
    if draw.random() < 0.5:
        for path in files(model, *SAFETENSORS):
            path.unlink()
    return f"{name} runs a command"


def write_running_pickle(path: Path, draw: Random) -> None:
    """Write a pickle, or a file of torch with one, that runs a command when it is read."""
    import torch

    content = {"lm_head.weight": _Shell()}
    if draw.random() < 0.5:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))


def large_counts(model: Path, draw: Random) -> str:
    """A number in the header of a GGUF that is far too large."""
    content = bytearray(model.read_bytes())
    at = draw.choice((4, 8, 16, 24, draw.randrange(24, 2000), draw.randrange(24, 2000)))
    width = draw.choice((4, 8))
    value = draw.choice((0, (1 << 8 * width) - 1, 1 << 31, 1 << 20))
    content[at : at + width] = value.to_bytes(width, "little")
    model.write_bytes(content)
    return f"{model.name}: {value} at byte {at}"
