"""Bounds on the text growth of a tokenizer.json: normalizers may double it again and again."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from mambactl.bounds import TEXT_GROWTH
from mambactl.errors import ModelError
from mambactl.foreign import AGAIN, json_object

TOKENIZER = "tokenizer.json"
# what rewrites text, and the lists that a sequence of such steps has
STEPS = ("normalizer", "pre_tokenizer", "decoder")
LISTS = ("normalizers", "pretokenizers", "decoders")
# bytes of a character, each of which becomes one; spaces around a character
FIXED = {"ByteLevel": 4.0, "BertNormalizer": 3.0}


def require_bounded_growth(content: str | bytes, path: Path) -> None:
    """Raise ModelError where a step of a tokenizer.json may make text longer than the bound."""
    steps = json_object(content, path, TOKENIZER)
    for name in STEPS:
        most = growth(steps.get(name))
        if most > TEXT_GROWTH.most:
            raise ModelError(
                f"{path}, {TOKENIZER}: its {name} may make a text {most:.3g} times as long "
                f"(at most {TEXT_GROWTH.most:,})",
                AGAIN,
            )


def growth(step: object) -> float:
    """Factor by which a step may lengthen a text; 1 for what the library has to judge."""
    if not isinstance(step, Mapping):
        return 1.0
    kind = step.get("type")
    if kind == "Sequence":
        parts = [part for name in LISTS if isinstance(step.get(name), list) for part in step[name]]
        return math.prod(map(growth, parts))
    if kind == "Replace":
        return _replaced(step)
    if kind == "Prepend":
        return 1.0 + _length(step.get("prepend"))
    return FIXED.get(str(kind), 1.0)


def _replaced(step: Mapping[str, object]) -> float:
    pattern, new = step.get("pattern"), _length(step.get("content"))
    if not isinstance(pattern, Mapping):
        return 1.0
    if isinstance(text := pattern.get("String"), str) and text:
        return max(1.0, new / len(text))
    # between all characters, where nothing is a match as well
    return 1.0 + new if _matches_nothing(pattern.get("Regex")) else max(1.0, new)


def _matches_nothing(expression: object) -> bool:
    if not isinstance(expression, str):
        return True
    try:
        return re.compile(expression).match("") is not None
    except (re.error, RecursionError, OverflowError):
        # of another dialect
        return True


def _length(text: object) -> float:
    return float(len(text)) if isinstance(text, str) else 0.0
