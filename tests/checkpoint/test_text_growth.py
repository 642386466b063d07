"""Bounds of the text that a tokenizer.json may make, before any text is given to it."""

import json
from pathlib import Path

import pytest

from mambactl.checkpoint.load import load_tokenizer
from mambactl.checkpoint.text_growth import growth, require_bounded_growth
from mambactl.errors import ModelError


def replace(pattern: str, content: str, kind: str = "Regex") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def many(steps: list[dict], name: str = "normalizers") -> dict:
    return {"type": "Sequence", name: steps}


@pytest.mark.parametrize(
    ("step", "times"),
    [
        (None, 1), ([], 1), ({"type": "NFC"}, 1), ({"type": "Sequence", "normalizers": 3}, 1),
        (replace(" {2,}", "\u2581"), 1), (replace(" ", "\u2581", "String"), 1),
        (replace("ab", "cdef", "String"), 2), (replace("", "xy", "String"), 3),
        (replace(".*", "xy"), 3), (replace("((", "xy"), 3), (replace(".", "aa"), 2),
        ({"type": "Prepend", "prepend": "__"}, 3), ({"type": "ByteLevel"}, 4),
        (many([replace(".", "aa")] * 10), 1024),
        (many([many([replace(".", "aa")] * 2)] * 3, "pretokenizers"), 64),
        (many([{"type": "ByteLevel"}, replace(".", "aa")], "decoders"), 8),
        ({"type": "Replace", "pattern": ".", "content": "aa"}, 1),
    ],
)  # fmt: skip
def test_how_much_longer(step: object, times: float) -> None:
    assert growth(step) == times


@pytest.mark.parametrize("name", ["normalizer", "pre_tokenizer", "decoder"])
def test_doubling_again_and_again_is_refused(name: str) -> None:
    content = json.dumps({name: many([replace(".", "aa")] * 40)})
    with pytest.raises(ModelError, match=f"its {name} may make a text 1.1e.12 times as long"):
        require_bounded_growth(content, Path("m"))
    require_bounded_growth(json.dumps({name: many([replace(".", "aa")] * 16)}), Path("m"))


def test_it_is_refused_before_a_text_is_read(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama_dir / name).read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    load_tokenizer(str(tmp_path))
    tokenizer["normalizer"] = many([replace(".", "aa")] * 40)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(ModelError, match="tokenizer.json: its normalizer"):
        load_tokenizer(str(tmp_path))
