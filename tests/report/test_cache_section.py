"""Quality over the cache of one sequence: a table of all models, charts over shares."""

import re

import pytest
from report_results import fidelity, put, result

from mambactl.errors import UsageError
from mambactl.report import charts
from mambactl.report.cache_section import quality_by_cache
from mambactl.report.collect import collect
from mambactl.report.content import Material
from mambactl.report.page import write_report

pytest.importorskip("matplotlib")


def sequences(share, teacher=True):
    """A cache that takes `share` at 1,024 tokens, and half of that at 8,192."""
    found = {}
    for tokens, part in ((8192, share / 2), (1024, share)):
        whole = tokens * 2**10
        found[str(tokens)] = {"total": int(part * whole)}
        if teacher:
            found[str(tokens)] |= {"teacher_total": whole, "share": part}
    return {"cache": {"dtype": "bfloat16", "sequences": found}}


def recalled(mean):
    together = {
        "mean_recall_ratio": mean, "least_recall_ratio": mean - 0.1,
        "intervals": {"mean_recall_ratio": [mean - 0.05, mean + 0.05]},
    }  # fmt: skip
    return {"recall": {"kv-256": {"recall": 0.5}, "recall": together}}


@pytest.fixture
def files(tmp_path):
    contents = {
        "half": sequences(0.5) | recalled(0.75) | {"fidelity": {"held": fidelity(0.02)}},
        "none": sequences(0.0625) | recalled(0.25) | {"fidelity": {"held": fidelity(0.15)}},
        # nothing says what its teacher takes
        "alone": sequences(0.25, teacher=False) | {"fidelity": {"held": fidelity(0.05)}},
    }
    return [
        put(tmp_path / f"{name}.json", result(f"runs/{name}", **content))
        for name, content in contents.items()
    ]


def test_every_model_stands_in_the_table_with_its_bytes(files):
    (table,) = quality_by_cache(Material(collect(files))).tables
    assert table.columns == [
        "model", "MiB at 1,024", "of the teacher's", "MiB at 8,192", "of the teacher's",
        "KL, held, 1,000 tokens", "mean ratio, recall", "least ratio, recall",
    ]  # fmt: skip
    texts = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert texts["half"] == ["0.50", "50.0 %", "2.00", "25.0 %", "0.0200", "0.750", "0.650"]
    assert texts["alone"] == ["0.25", "", "1.00", "", "0.0500", "", ""]
    notes = {row[0].text: row[-2].note for row in table.rows}
    assert notes["half"] == "0.700 to 0.800"


def test_charts_go_from_the_smallest_cache_to_the_largest(files, monkeypatch):
    drawn = []
    draw = charts.lines

    def lines(series, x, y):
        drawn.append((list(series), x, y))
        return draw(series, x, y)

    monkeypatch.setattr(charts, "lines", lines)
    section = quality_by_cache(Material(collect(files)))
    assert [figure.title.partition(",")[0] for figure in section.figures] == ["KL", "mean ratio"]
    assert [y for *_, y in drawn] == ["KL, nats per token", "mean over the teacher's"]
    kl, recall = (series for series, *_ in drawn)
    assert {each.name: list(each.points) for each in kl} == {
        "1,024 tokens": [(6.25, 0.15), (50, 0.02)], "8,192 tokens": [(3.125, 0.15), (25, 0.02)],
    }  # fmt: skip
    assert list(recall[0].points) == [(6.25, 0.25), (50, 0.75)]
    ends = [end for pair in recall[0].errors for end in pair]
    assert ends == pytest.approx([0.2, 0.3, 0.7, 0.8])


def test_one_model_has_a_table_and_old_results_have_no_section(files, tmp_path):
    assert not quality_by_cache(Material(collect(files[:1]))).figures
    old = put(tmp_path / "old.json", result("runs/old", fidelity={"held": fidelity(0.1)}))
    assert not quality_by_cache(Material(collect([old])))


def test_the_page_has_the_section_and_damaged_bytes_are_named(files, tmp_path):
    write_report(files, tmp_path / "page.html", "mambactl report x")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<h2>Quality over cache</h2>" in page and "% of the teacher" in page
    assert re.search(r"KL, held, 1,000 tokens over cache", page)
    damaged = result("runs/x", fidelity={"held": fidelity(0.1)}, **sequences(0.5))
    damaged["metrics"]["cache"]["sequences"]["1024"]["total"] = "much"
    with pytest.raises(UsageError, match=r"cache\.sequences\.1024\.total"):
        collect([put(tmp_path / "damaged.json", damaged)])
