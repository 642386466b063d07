"""Tables of results in documents are those of the kept JSON."""

import json
import re

import pytest

from mambactl.report.bench_table import markdown
from tests.documents.markdown import ROOT
from tests.performance import kept_tables
from tests.performance.kept_tables import RESULTS, TABLES


@pytest.mark.parametrize("name", TABLES)
def test_tables_show_what_is_kept(name) -> None:
    assert kept_tables.shown(name) == TABLES[name].text(), "python -m tests.performance.kept_tables"


def test_every_table_has_its_marks_once() -> None:
    for name, table in TABLES.items():
        text = (RESULTS / table.document).read_text("utf-8")
        assert [text.count(mark) for mark in kept_tables.marks(name)] == [1, 1], name


def test_numbers_of_the_guide_to_shares_are_those_of_the_students() -> None:
    text = (ROOT / "mambactl" / "docs" / "choosing.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    kept = json.loads((RESULTS / "smollm2-135m-students-h200.json").read_text("utf-8"))["students"]
    metrics = {student["name"].split()[0]: student["metrics"] for student in reversed(kept)}
    assert [heads for heads, _ in rows] == ["45", "22", "11", "6", "0"]
    for heads, numbers in rows:
        found = metrics.get(heads) or metrics["no"]
        shares = [round(100 * each["share"]) for each in found["cache"]["sequences"].values()]
        held = found["fidelity"]["held"]
        assert numbers.split(" | ") == [
            " / ".join(map(str, shares)),
            f"{held['kl']:.4f}",
            f"{held['agreement']:.3f}",
            f"{found['recall']['recall']['mean_recall_ratio']:.2f}",
        ]


def test_decoding_shows_the_table_of_the_command() -> None:
    kept = json.loads((RESULTS / "decode-h200.json").read_text("utf-8"))
    assert kept_tables.shown("bench") == markdown([("decode-h200.json", kept)])
