"""A checkpoint on disk: its kind, the names of its files and the types of its tensors."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

CONFIG = "config.json"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
BINARY_PREFIX = "base64:"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk; `kind` is folder, file or gguf, `spec` is what the user typed."""

    spec: str
    path: Path
    kind: str


def cache_dir() -> Path:
    """Where fetched and converted files are kept: $MAMBACTL_CACHE or the XDG cache."""
    if explicit := os.environ.get("MAMBACTL_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mambactl"
