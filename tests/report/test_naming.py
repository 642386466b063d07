"""Whose a number on a page is: models, those they are compared with, controls and teachers."""

import json
import re

import pytest
from report_page import PHONE, browser, in_a_browser
from report_results import fidelity, put, result

from mambactl.report.charts import folded
from mambactl.report.collect import collect
from mambactl.report.page import write_report
from mambactl.report.summary import summarise

pytest.importorskip("matplotlib")


def test_a_model_measured_twice_differently_has_two_rows(tmp_path) -> None:
    for name, kl, tokens in (("a", 0.5, 1000), ("b", 0.25, 1000), ("c", 0.125, 2000)):
        content = result("runs/a", fidelity={"held": fidelity(kl, tokens)})
        (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
    found = summarise(collect(sorted(tmp_path.glob("*.json"))).entries)
    assert [row.name for row in found.rows] == ["a", "a (run 2)"]
    # other tokens of a data set are no other value of the same number
    assert {c.group for c in found.columns} == {
        "held, 1,000 tokens", "held, 2,000 tokens", "cache",
    }  # fmt: skip


def test_a_teacher_measured_on_other_rows_has_a_row_of_its_own(tmp_path) -> None:
    for name, found in (("a", 0.9), ("b", 0.9), ("c", 0.7)):
        recall = {"kv-64": {"recall": 0.5, "chance": 0.1, "teacher": {"recall": found}}}
        content = json.dumps(result(name, recall=recall))
        (tmp_path / f"{name}.json").write_text(content, "utf-8")
    rows = summarise(collect(sorted(tmp_path.glob("*.json"))).entries).rows
    found = {row.name: [entry.model for entry in row.entries] for row in rows[3:]}
    assert found == {
        "teacher llama": ["a", "b"], "guessing": ["a", "b", "c"], "teacher llama (run 2)": ["c"],
    }  # fmt: skip


def test_names_are_as_short_as_they_can_be(tmp_path) -> None:
    for number, name in enumerate(("x/a", "y/a", "y/b")):
        content = result(name, fidelity={"held": fidelity(0.5)})
        (tmp_path / f"{number}.json").write_text(json.dumps(content), "utf-8")
    entries = collect(sorted(tmp_path.glob("*.json"))).entries
    assert [entry.model for entry in entries] == ["x/a", "y/a", "b"]


def test_what_lies_beside_a_checkpoint_is_about_it_wherever_it_was_measured(tmp_path) -> None:
    """Results that were fetched from another machine, without the checkpoint."""
    held = result("/else/where/d.st", fidelity={"held": fidelity(0.5)})
    put(tmp_path / "d.st.results/eval-held.json", held)
    put(tmp_path / "d.st.results/eval-piqa.json", result("/a/d.st", tasks={"piqa": {"acc": 0.5}}))
    put(tmp_path / "d.st.metrics.jsonl", {"phase": "logits", "step": 1, "tokens": 5, "kl": 0.5})
    other = result("/else/where/e.st", fidelity={"held": fidelity(0.25)})
    put(tmp_path / "pages.results/e.json", other)
    ways = [
        [tmp_path / "d.st"],
        [tmp_path / "d.st.results", tmp_path / "d.st.metrics.jsonl"],
        [*(tmp_path / "d.st.results").glob("*.json"), tmp_path / "d.st.metrics.jsonl"],
    ]
    for paths in ways:
        found = collect(paths)
        assert {each.model for each in (*found.entries, *found.ledgers)} == {"d.st"}
        assert len(found.entries) == 2
        measured = {dict(entry.source.details)["model"] for entry in found.entries}
        assert measured == {"/else/where/d.st", "/a/d.st"}
        (ledger,) = found.ledgers
        assert "is kept in" in dict(ledger.source.details)["command"]
    # what is named twice is read once
    assert len(collect([*ways[0], *ways[1], *ways[2]]).entries) == 2
    # renamed since, as its ledger
    put(tmp_path / "new.st.results/eval-held.json", held)
    assert [entry.model for entry in collect([tmp_path / "new.st.results"]).entries] == ["new.st"]
    # a page's own results are of many models
    (entry,) = collect([tmp_path / "pages.results"]).entries
    assert entry.model == "e.st"


def test_those_that_are_compared_are_told_apart(tmp_path) -> None:
    tests = {"held": {"tests": {"kl": {"difference": -0.25, "p": 0.5}}}}
    against = {"model": "x/final", "fidelity": {"held": fidelity(0.5)}, "tests": tests}
    put(tmp_path / "a.json", result("y/final", fidelity={"held": fidelity(0.25)}, against=against))
    points = [[{"input_len": n, "batch_size": 1, "decode_tokens_per_second": speed * n}
               for n in (8, 16)] for speed in (1.0, 3.0)]  # fmt: skip
    bench = {"points": points[0], "baseline_points": points[1], "baseline": "x/final"}
    put(tmp_path / "b.json", result("y/final", **bench))
    entries = collect(sorted(tmp_path.glob("*.json"))).entries
    assert [row.name for row in summarise(entries).rows] == ["y/final", "against x/final"]
    write_report(sorted(tmp_path.glob("*.json")), tmp_path / "page.html", "x")
    text = (tmp_path / "page.html").read_text("utf-8")
    figures = dict(re.findall(r"<figcaption><b>(.*?)</b>(.*?)</figure>", text, flags=re.DOTALL))
    for title in ("KL by position, held, 1,000 tokens", "Tokens/s over context, batch 1, cpu"):
        names = re.findall(r"</i>(.*?)</li>", figures[title])
        assert sorted(names) == ["x/final", "y/final"]


def test_numbers_by_different_teachers_do_not_share_a_column(tmp_path) -> None:
    controls = {"window 64+4": {"fidelity": {"held": fidelity(0.75)}}}
    for name, teacher, kl in (("a", "x/big", 0.5), ("b", "y/small", 0.25), ("c", "x/big", 0.125)):
        content = result(name, fidelity={"held": fidelity(kl)}, controls=controls)
        content["metrics"]["teacher"] = teacher
        put(tmp_path / f"{name}.json", content)
    one = collect([tmp_path / "a.json", tmp_path / "c.json"]).entries
    assert {c.group for c in summarise(one).columns} == {"held, 1,000 tokens", "cache"}
    entries = collect(sorted(tmp_path.glob("*.json"))).entries
    found = summarise(entries)
    small, big = ("held, teacher small, 1,000 tokens", "held, teacher big, 1,000 tokens")
    assert {c.group for c in found.columns} == {big, small, "cache"}
    best = {c.group: found.best(c) for c in found.columns if c.heading == "KL"}
    assert best == {big: 0.125, small: None}
    write_report(sorted(tmp_path.glob("*.json")), tmp_path / "page.html", "x")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "to the teacher (big, small)" in text and "<dt>teacher</dt><dd>x/big</dd>" in text


def test_a_control_measured_twice_has_one_row(tmp_path) -> None:
    recall = {"kv-64": {"recall": 0.5, "chance": 0.1}}
    window = {"window 64+4": {"fidelity": {"held": fidelity(0.5)}}}
    put(tmp_path / "a.json", result("m", fidelity={"held": fidelity(0.25)}, controls=window))
    window = {"window 64+4": {"recall": recall}}
    put(tmp_path / "b.json", result("m", recall=recall, controls=window))
    rows = summarise(collect(sorted(tmp_path.glob("*.json"))).entries).rows
    assert [row.name for row in rows] == ["m", "window 64+4", "guessing"]
    assert {column.heading for column in rows[1].cells} >= {"KL", "kv-64"}


LONG = "llama-3.1-8b-instruct-mamba2-87-percent-replaced-stepwise-then-logits-then-sft-seed-{}"


def test_long_names_are_folded_and_stay_apart() -> None:
    one, other = (folded(LONG.format(number)) for number in (1, 2))
    assert one != other
    lines = one.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 22 and lines[1].endswith(" ...")
    assert folded("short name") == "short name" and one.startswith("llama-3.1-8b-instruct-")


@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, PHONE])
def test_long_names_fit_a_browser(tmp_path, width) -> None:
    data = "a_very_long_data_set_name_that_somebody_gave_to_the_file_of_held_out_text"
    for number in (1, 2):
        own = {"fidelity": {data: fidelity(0.25 * number)}}
        controls = {"window 64+4": {"fidelity": {data: fidelity(0.75)}}}
        tasks = {data: {"acc": 0.5, "acc_stderr": 0.1}}
        content = result(LONG.format(number), **own, controls=controls, tasks=tasks)
        put(tmp_path / f"{number}.json", content)
    write_report(sorted(tmp_path.glob("*.json")), tmp_path / "page.html", "x")
    found = in_a_browser((tmp_path / "page.html").read_text("utf-8"), tmp_path, width)
    assert found["scrolls"] == found["width"] == width
    assert not found["wide"] and not found["captions"] and found["charts"] == 5
    assert found["cut"] == []


def test_runs_with_other_held_out_text_are_marked(tmp_path) -> None:
    line = {"phase": "logits", "step": 1, "tokens": 5, "kl": 0.5}
    for number, tokens in enumerate((100, 100, 200)):
        put(tmp_path / f"{number}.st.metrics.jsonl", {**line, "eval_tokens": tokens})
    ledgers = sorted(tmp_path.glob("*.jsonl"))
    for paths, marked in ((ledgers[:2], False), (ledgers, True)):
        write_report(paths, tmp_path / "page.html", "x")
        assert ("not the same in all runs" in (tmp_path / "page.html").read_text()) is marked


@pytest.mark.parametrize("given", ["d.st", "d.st.results", "d.st.results/eval-held.json"])
def test_what_was_measured_before_a_change_is_marked_however_it_is_named(tmp_path, given) -> None:
    put(tmp_path / "d.st.results/eval-held.json", result("d.st", fidelity={"held": fidelity(0.5)}))
    (tmp_path / "d.st").write_bytes(b"")
    for digest, marked in (("d1g3st", False), ("another", True)):
        (entry,) = collect([tmp_path / given], lambda _, now=digest: now).entries
        assert ("attention" in dict(entry.source.details)) is marked
