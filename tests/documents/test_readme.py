"""The README: short enough to be read, and what it shows is what was measured."""

import json
import re

from tests.documents.markdown import ROOT
from tests.performance.kept_tables import RESULTS

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


def test_headline_numbers_are_those_that_are_kept() -> None:
    table = TEXT.partition("## What was measured\n")[2].partition("\n\nAlso")[0]
    rows = [row for row in table.splitlines()[3:] if row.startswith("|")]
    start, heads, cache, speed, first, training = (
        row.removesuffix(" |").split(" | ") for row in rows
    )
    kept = json.loads((RESULTS / "smollm2-135m-students-h200.json").read_text("utf-8"))["students"]
    students = {each["name"]: each["metrics"] for each in kept}

    def share(name: str) -> str:
        return f"{100 * students[name]['cache']['sequences']['8192']['share']:.0f} %"

    recall = students["11 heads"]["recall"]["recall"]["mean_recall_ratio"]
    assert heads[1] == f"{recall:.2f}" and cache[1] == share("11 heads")
    least = students["11 heads"]["recall"]["recall"]["least_recall_ratio"]
    assert f"(least {least:.2f})" in heads[0]
    assert f"{share('11 heads')} of the teacher's cache at 8,192 tokens" in " ".join(TEXT.split())
    shown = {
        name: (RESULTS / f"{name}.md").read_text("utf-8") for name in ("quickstart", "decoding")
    }
    assert f"| {start[1]} |" in shown["quickstart"]
    hybrid = re.search(r"^\| llama3-8b-hybrid-50 \|.+\| 1 \| 1024 \|.+$", shown["decoding"], re.M)
    plain, speculative = (hybrid[0].split(" | ")[column] for column in (5, 7))
    assert [speculative, plain] == speed[1:]
    prompt = re.search(
        r"^\| 2,048 \| ([\d.]+) \| ([\d.]+) \|.+ ([\d.]+) \|$", shown["decoding"], re.M
    )
    alone, theirs, windowed = (f"{float(ms):.0f}" for ms in prompt.groups())
    assert first[1:] == [alone, theirs] and f"took {windowed} ms on a second one" in TEXT
    speeds = json.loads((RESULTS / "smollm2-135m-distill-h200.json").read_text("utf-8"))["speed"]
    _, logits, _, plain_text = speeds["captured"]["points"][:4]
    steps = (logits["tokens_per_second"], plain_text["tokens_per_second"])
    assert training[1:] == [f"{round(step, -3):,.0f}" for step in steps]
