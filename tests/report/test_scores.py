"""Scores of tasks on a page: their units, their intervals, and what has a place in the chart."""

import re

import pytest
from report_results import put, result

from mambactl.errors import UsageError
from mambactl.report.page import write_report
from mambactl.report.summary import interval, score_writer

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("acc_norm", 0.25, "25.0 %"), ("f1", 1.0, "100.0 %"), ("mcc", -0.05, "-5.0 %"),
        ("bleu_acc", 0.5, "50.0 %"), ("exact_match:strict", 0.5, "50.0 %"),
        # of a hundred, or of anything
        ("bleu", 0.5, "0.5000"), ("bleu_max", 25.0, "25.0000"), ("rouge1_diff", -2.5, "-2.5000"),
        ("chrf++", 50.0, "50.0000"), ("ter", 120.0, "120.0"), ("word_perplexity", 0.5, "0.5000"),
        ("points", 7.5, "7.5000"),
    ],
)  # fmt: skip
def test_only_shares_are_per_cent(metric, value, text) -> None:
    assert score_writer(metric)(value) == text


def test_intervals_reach_no_further_than_scores_do() -> None:
    found = dict.fromkeys(("acc", "mcc", "bleu_diff", "bleu"), 0.01)
    found |= {"likelihood": -3.0, "f1": 0.99}
    found |= {f"{name}_stderr": 0.1 for name in found}
    ends = {name: interval(found, name) for name in found if "stderr" not in name}
    assert ends["acc"] == pytest.approx((0.0, 0.206))
    assert ends["f1"] == pytest.approx((0.794, 1.0))
    assert ends["mcc"] == ends["bleu_diff"] == pytest.approx((-0.186, 0.206))
    assert ends["likelihood"] == pytest.approx((-3.196, -2.804))
    assert ends["bleu"] == pytest.approx((0.0, 0.206))


def test_the_chart_is_of_shares(tmp_path) -> None:
    tasks = {"cola": {"mcc": -0.05}, "wmt": {"bleu": 25.0}, "odd": {"points": 7.5}}
    put(tmp_path / "a.json", result("a", tasks=tasks))
    write_report([tmp_path / "a.json"], tmp_path / "page.html", "x")
    text = (tmp_path / "page.html").read_text("utf-8")
    (svg,) = re.findall(r"<figcaption><b>Scores</b>.*?(<svg.*?</svg>)", text, flags=re.DOTALL)
    assert "cola mcc" in svg and "wmt" not in svg and "odd" not in svg
    assert "25.0000" in text and "7.5000" in text and "2500" not in text


def test_differences_from_the_teacher_are_on_the_page_and_need_both_scores(tmp_path) -> None:
    both = {"student": 0.5, "teacher": 0.525, "difference": -0.025, "interval": [-0.05, 0.0125]}
    differences = {
        "by_task": {"piqa": both | {"metric": "acc", "documents": 40}},
        "mean": both | {"difference": -0.0375, "tasks": 7},
    }
    tasks = {"piqa": {"acc": 0.5, "teacher": {"acc": 0.525}}}
    content = result("a", tasks=tasks, task_differences=differences)
    write_report([put(tmp_path / "a.json", content)], tmp_path / "page.html", "x")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "Beside the teacher" in text and "mean of 7" in text and "-0.0375" in text
    assert "52.5 %" in text and "-0.0500 to +0.0125" in text
    del differences["by_task"]["piqa"]["teacher"]
    with pytest.raises(UsageError, match=r"task_differences\.by_task\.piqa\.teacher"):
        write_report([put(tmp_path / "b.json", content)], tmp_path / "page.html", "x")
