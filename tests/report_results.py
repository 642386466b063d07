"""Results as `eval` keeps them, with as few numbers as a page needs."""

import json
from pathlib import Path


def fidelity(kl, tokens=1000):
    by_position = {
        "0-63": {"tokens": 600, "kl": kl / 2, "agreement": 0.9},
        "64-255": {"tokens": 400, "kl": 2 * kl, "agreement": 0.7},
    }
    return {
        "tokens": tokens, "kl": kl, "agreement": 0.8, "perplexity_ratio": 1.01,
        "intervals": {"kl": [kl - 0.01, kl + 0.02]}, "by_position": by_position,
    }  # fmt: skip


def result(checkpoint, **metrics):
    return {
        "stage": "eval", "checkpoint": checkpoint, "created": "2026-11-24T10:00:00+00:00",
        "version": "0.1.0", "command": ["mambactl", "eval", checkpoint, "--data", "a b.jsonl"],
        "device": "cpu", "model": {
            "digest": "d1g3st", "cache": {"bytes_per_sequence": 2**20, "bytes_per_token": 256},
        },
        "metrics": {"teacher": "llama", **metrics},
    }  # fmt: skip


def put(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", "utf-8")
    return path
