"""The README: short enough to be read, and what it shows is what was measured."""

import re

from tests.documents.markdown import ROOT

TEXT = (ROOT / "README.md").read_text("utf-8")
MOST_LINES, LONGEST_LINE, MOST_WORDS = 150, 120, 1800


def test_it_is_short() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > LONGEST_LINE] == []
    assert len(TEXT.split()) <= MOST_WORDS


def test_it_has_what_a_stranger_looks_for() -> None:
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    for needed in ("Install", "Python", "pipeline", "Limits", "Licence"):
        assert any(needed in heading for heading in headings), needed
    assert len(re.findall(r"^!\[", TEXT, re.MULTILINE)) == 1
