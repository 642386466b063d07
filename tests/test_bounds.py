"""Bounds are written down, and options that would take all memory are refused before anything."""

import re
from pathlib import Path

import pytest

from mambactl import bounds
from mambactl.bounds import BOUNDS, Bound
from mambactl.commands import COMMANDS
from mambactl.errors import UsageError
from mambactl.options.fields import validated

DOCUMENT = Path(__file__).parent.parent / "mambactl" / "docs" / "promises.md"


def test_the_table_in_the_document_is_that_of_the_code() -> None:
    section = DOCUMENT.read_text("utf-8").partition("## Limits\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert rows[1:] == [(bound.of, str(bound)) for bound in BOUNDS]


def test_the_table_has_every_bound() -> None:
    assert set(BOUNDS) == {each for each in vars(bounds).values() if isinstance(each, Bound)}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("eval", "needle", "1000000000"),
        ("eval", "needle", [1024, 1_000_001]),
        ("eval", "needle_depths", 10**9),
        ("eval", "needle_texts", 10**9),
        ("eval", "recall", 10**12),
        ("eval", "recall_rows", 10**12),
        ("eval", "max_length", 10**12),
        ("eval", "position_length", 10**12),
        ("eval", "generation_tokens", 10**12),
        ("eval", "batch_size", 10**9),
        ("sft", "max_length", 10**12),
        ("distill", "batch_size", 10**9),
        ("convert", "max_length", 10**12),
        ("generate", "max_new_tokens", 10**12),
        ("generate", "batch_size", 10**12),
        ("generate", "samples_per_prompt", 10**12),
        ("spec-decode", "k", 10**9),
        ("bench", "input_len", 10**12),
        ("bench", "output_len", 10**12),
        ("bench", "batch_size", 10**12),
    ],
)
def test_options_that_would_take_all_memory_are_refused(command, option, value) -> None:
    with pytest.raises(UsageError, match=f"{option.replace('_', '-')}: .*less than or equal to"):
        validated(command, COMMANDS[command].options, {option: value})
