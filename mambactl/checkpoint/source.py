"""A checkpoint on disk: its kind and the names of its files."""

import os
from dataclasses import dataclass
from pathlib import Path

SINGLE_FILE_SUFFIXES = (".st", ".safetensors")
CONFIG = "config.json"
LINEAGE = "mambactl.json"
CARD = "README.md"
# of training, in a folder or beside a single file
LEDGER = "metrics.jsonl"
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
