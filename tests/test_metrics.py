"""Every number is described once: its formats, and where its name may stand."""

import ast
from pathlib import Path

import pytest

from mambactl import metrics
from mambactl.metrics import METRICS, Metric

PACKAGE = Path(metrics.__file__).parent
# what shows numbers, and computes none
READERS = ("report", "cli", "commands/eval.py", "commands/table.py", "commands/report.py")
# of numbers that are sizes as well, which have options of the same name
SIZES = {"batch_size", "input_len"}


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (metrics.exact, 123.45678, "123.4568"), (metrics.signed, 0.5, "+0.5000"),
        (metrics.number, 99.99999, "100.0000"), (metrics.number, 1234.56, "1,234.6"),
        (metrics.number, -1234.56, "-1,234.6"), (metrics.percent, 0.1234, "12.3 %"),
        (metrics.whole_percent, 0.126, "13 %"), (metrics.tight_percent, 0.126, "13%"),
        (metrics.ratio, 1.0405, "1.040"), (metrics.ratio, 1234.5, "1,234"),
        (metrics.times, 1.256, "1.26x"), (metrics.mebibytes, 3 * 2**30, "3,072.00"),
        (metrics.count, 1028, "1,028"), (metrics.whole, 1234.5, "1,234"),
        (metrics.tenths, 1234.56, "1234.6"), (metrics.grouped_tenths, 1234.56, "1,234.6"),
        (metrics.hundredths, 2.345, "2.35"), (metrics.rate, 99.96, "100.0"),
        (metrics.rate, 1234.5, "1,234"), (metrics.significant, 0.012345, "0.0123"),
        (metrics.scientific, 0.00012, "1.2e-04"), (metrics.last_part, "runs/a/", "a"),
        (metrics.yes_or_no, True, "yes"),
    ],
)  # fmt: skip
def test_formats(write, value, text) -> None:
    assert write(value) == text


def test_a_number_that_is_missing_or_has_no_value() -> None:
    metric = Metric("speed", "speed", metrics.whole, brief=metrics.times)
    assert (metric.written({}), metric.written({"speed": None})) == ("", "")
    assert (metric.shown({}), metric.shown({"speed": None})) == ("", "-")
    assert (metric.written({"speed": 2.0}), metric.shown({"speed": 2.0})) == ("2", "2.00x")
    assert metrics.span(None, metrics.exact) == ""
    assert metrics.span((0, 0.5), metrics.exact) == "0.0000 to 0.5000"


def test_columns_are_those_that_some_row_has_and_statistics_stand_together() -> None:
    rows = [{"kl": 1, "agreement": 1}, {"kl_p95": 2, "ce": 3}]
    found = metrics.columns(metrics.group("fidelity"), rows)
    # a number without a heading is not on pages
    assert [each.name for each in found] == ["kl", "kl_p95", "agreement"]
    assert metrics.columns(metrics.group("unknown"), rows) == []


def test_a_group_names_no_number_twice_and_every_direction_is_known() -> None:
    for group, members in METRICS.items():
        names = [each.name for each in members]
        assert len(set(names)) == len(names), group
        assert {each.better for each in members} <= {"higher", "lower", None}, group
        for each in members:
            assert not each.of or each.of in names, each.name


def test_nothing_that_shows_numbers_spells_their_names() -> None:
    """A name stands in the table and where the number is computed."""
    names = {each.name for members in METRICS.values() for each in members} - SIZES
    # words of one part have other meanings as well; these have none
    spelled = {name for name in names if "_" in name} | {"kl", "agreement", "perplexity"}
    found = {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value}"
        for place in READERS
        for path in [PACKAGE / place, *(PACKAGE / place).rglob("*.py")]
        if path.is_file()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in spelled
    }
    assert found == set()
