"""The first screen of a page, folders of runs, and what a few lines of script do with tables."""

import json
import math

import pytest
from report_page import browser, in_a_browser
from report_results import fidelity, put, result

from mambactl.cli.main import run
from mambactl.errors import UsageError
from mambactl.report.collect import collect, kept_in_run
from mambactl.report.content import Material
from mambactl.report.headline import kept_and_won
from mambactl.report.page import MOST_COLUMNS, write_report
from mambactl.report.quality import POINTS, smoothed

SEQUENCES = {"8192": {"total": 2**20, "teacher_total": 2**22, "share": 0.25}}
MEASURED = {
    "fidelity": {"held": fidelity(0.25) | {"agreement": 0.947}},
    "recall": {"recall": {"mean_recall_ratio": 1.05}},
    "cache": {"dtype": "bfloat16", "sequences": SEQUENCES},
    "generation": {
        "generation": {"samples": [{"prompt": "Hi?", "student": "<Yo>", "teacher": "Hello"}]}
    },
}


def points(rate: float) -> list[dict]:
    return [{"input_len": n, "batch_size": 1, "decode_tokens_per_second": rate} for n in (128, 512)]


@pytest.fixture
def work(tmp_path):
    """A folder as `recipe run` leaves it: results beside the checkpoint, and every record."""
    folder = tmp_path / "runs" / "quick"
    student = str(folder / "distill")
    timed = {"points": points(30.0), "baseline_points": points(20.0), "baseline": "llama"}
    timed |= {"device": "cpu", "dtype": "float32", "date": "2026-11-30"}
    kept = result(student, **MEASURED)
    put(folder / "distill" / "results" / "eval-held.json", kept)
    for name, metrics in (("eval", kept["metrics"]), ("bench", timed)):
        record = {"stage": name, "checkpoint": student, "metrics": metrics}
        put(folder / f"{name}.json", {"command": ["mambactl", name], "result": record})
    for name in ("convert", "distill"):
        put(folder / f"{name}.json", {"command": ["mambactl", name], "result": None})
    put(folder / "notes.json", {"whatever": 1})
    return folder


def test_a_folder_of_a_run_is_read_once_and_named_by_its_run(work) -> None:
    assert [file.name for file in kept_in_run(work)] == [
        "eval-held.json", "bench.json", "convert.json", "distill.json", "eval.json"
    ]  # fmt: skip
    found = collect([work])
    assert [entry.model for entry in found.entries] == ["quick/distill"] * 2
    assert [list(entry.metrics)[0] for entry in found.entries] == ["teacher", "points"]
    with pytest.raises(UsageError, match="nothing measured"):
        collect([work.parent])


def test_a_sentence_a_picture_and_the_teacher(work) -> None:
    section = kept_and_won(Material(collect([work])))
    assert section.text == (
        "quick/distill names the teacher's likeliest next token in 94.7 % of 1,000 positions, "
        "recalls 105.0 % of what the teacher recalls, needs 25.0 % of its cache at 8,192 tokens "
        "and decodes at 1.50x its speed behind 512 tokens "
        "(kept result: cpu, float32, 2026-11-30)."
    )
    (figure,) = section.figures
    assert "quick/distill, agreement: 94.7</title>" in figure.svg and "kept results" in figure.note
    glance, samples = section.tables
    assert [[cell.text for cell in row] for row in glance.rows] == [
        ["quick/distill", "94.7 %", "105.0 %", "1.00 MiB bfloat16", "30.0 tokens/s"],
        ["teacher llama", "100.0 %", "100.0 %", "4.00 MiB bfloat16", "20.0 tokens/s"],
    ]
    assert [cell.text for cell in samples.rows[0]][1:] == ["Hi?", "<Yo>", "Hello"]


def test_commands_take_the_folder_and_its_records(work, monkeypatch, capfd) -> None:
    monkeypatch.chdir(work.parent.parent)
    assert run(["report", "runs/quick", "-o", "page.html"]) == 0
    page = (work.parent.parent / "page.html").read_text()
    assert "<h1>quick/distill</h1>" in page and "&lt;Yo&gt;" in page
    assert page.index('id="kept"') < page.index("<nav") < page.index('id="summary"')
    capfd.readouterr()
    assert run(["table", "runs/quick/bench.json"]) == 0
    assert "| 512 |" in capfd.readouterr().out
    damaged = json.loads((work / "eval.json").read_text())
    damaged["result"]["metrics"]["generation"]["generation"]["samples"] = [{"prompt": 1}]
    put(work / "eval.json", damaged)
    assert run(["report", "runs/quick/eval.json"]) == 2


def test_a_training_curve_is_of_means() -> None:
    noisy = [(n, 1.0 + (-1) ** n) for n in range(4000)]
    curve = smoothed(noisy)
    assert len(curve) <= POINTS and curve[-1][0] == 3999
    assert max(abs(value - 1) for _, value in curve) < 0.2
    assert smoothed([(1, 2.0), (2, math.nan), (3, 4.0)]) == [(1, 2.0), (3, 4.0)]
    assert smoothed([]) == []


def test_wide_tables_are_several(tmp_path) -> None:
    tasks = {f"task{n}": {"acc": 0.5, "acc_stderr": 0.1} for n in range(2 * MOST_COLUMNS)}
    put(tmp_path / "a.json", result("m", tasks=tasks))
    write_report([tmp_path / "a.json"], tmp_path / "page.html", "x")
    page = (tmp_path / "page.html").read_text()
    assert "Tasks (1 of 2)" in page and "Tasks (2 of 2)" in page


SORTED = """<script>
const cells = () => [...document.querySelectorAll("#summary table")][0].tBodies[0].rows;
const names = () => [...cells()].map(row => row.cells[0].textContent).join();
const head = document.querySelectorAll("#summary thead th")[1];
head.click(); const up = names(); head.click();
location.hash = "#source-1";
addEventListener("hashchange", () => {
  document.title = [up, names(), head.ariaSort, document.getElementById("files").open].join(" ");
  if (document.title !== "b,c,a a,c,b descending true") throw new Error(document.title);
});
</script></body>"""


@pytest.mark.skipif(browser() is None, reason="no Chromium")
def test_headings_sort_and_sources_unfold(tmp_path) -> None:
    for name, kl in (("a", 0.5), ("b", 0.125), ("c", 0.25)):
        put(tmp_path / f"{name}.json", result(name, fidelity={"held": fidelity(kl)}))
    write_report(sorted(tmp_path.glob("*.json")), tmp_path / "page.html", "x")
    page = (tmp_path / "page.html").read_text()
    found = in_a_browser(page.replace("</body>", SORTED), tmp_path, 1280)
    assert found["errors"] == []
    wrong = SORTED.replace("b,c,a", "c,b,a")
    assert in_a_browser(page.replace("</body>", wrong), tmp_path, 1280)["errors"]
