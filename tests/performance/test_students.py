"""The table of students: every number of it, and what is refused."""

import json

import pytest

from mambactl.errors import OutputError, UsageError
from mambactl.report.collect import collect
from tests.performance import students


def sequences(share):
    parts = {"kv": int(1000 * share), "windows": 20, "rings": 1, "states": 4, "teacher_total": 1000}
    return {"sequences": {"1024": parts | {"share": share + 0.025}, "8192": {"share": share}}}


def text_and_recall(kl, share, mean):
    recall = {
        "kv-256": {"recall": 0.7, "recall_ratio": mean, "intervals": {"recall_ratio": [0.5, 1.5]},
                   "samples": {"recalled": [1, 2]}, "teacher": {"recall": 0.9}},
        "recall": {"mean_recall_ratio": mean, "least_recall_ratio": mean - 0.25,
                   "least_probe": "mqar-256", "intervals": {"mean_recall_ratio": [0.75, 1.25]}},
    }  # fmt: skip
    fidelity = {
        "held": {
            "tokens": 9,
            "kl": kl,
            "agreement": 0.95,
            "perplexity_ratio": 1.004,
            "by_position": {},
        }
    }
    controls = {
        "window 64+4": {"fidelity": {"held": {"kl": 3 * kl}},
                        "recall": {"recall": {"mean_recall_ratio": mean / 2}}},
        "no recurrent": {"fidelity": {"held": {"kl": 2 * kl}}},
    }  # fmt: skip
    return {
        "teacher": "t", "fidelity": fidelity, "recall": recall, "controls": controls,
        "cache": sequences(share),
    }  # fmt: skip


NEEDLE = {
    "needle": {
        "lengths": [512, 2048], "depths": [0, 1],
        "student": {
            "retrieved": [[1, 1], [0, 0.5]], "mean_needle_ratio": 0.975,
            "intervals": {"mean_needle_ratio": [0.95, 1.0]},
            "by_length": {
                "512": {"retrieved": 0.975, "teacher_retrieved": 1.0, "counted": True},
                "2048": {"retrieved": 0.25, "teacher_retrieved": 0.3, "counted": False},
            },
        },
    },
    "tasks": {"piqa": {"acc": 0.6}},
    "task_differences": {
        "mean": {
            "difference": -0.0025, "interval": [-0.0075, 0.0025], "tasks": 7,
            "student": 0.4, "teacher": 0.4025,
        }
    },
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    contents = {
        "half": text_and_recall(0.0075, 0.5, 1.02), "half-long": NEEDLE,
        "quarter": text_and_recall(0.02, 0.25, 0.9),
    }  # fmt: skip
    for name, metrics in contents.items():
        # as `eval --json` prints it
        content = {"stage": "eval", "checkpoint": f"runs/{name}", "metrics": metrics}
        (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return tmp_path


def made(files, *names, **options):
    words = [name.replace("=", f"={files}/") + ".json" for name in names]
    given = students.PARSER.parse_args(words)
    return students.measure(given.__class__(**vars(given) | options)).text


def table_of(text):
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]
    return rows[0][1:], {row[0]: row[1:] for row in rows[2:]}


def test_every_student_is_a_column_and_files_of_one_name_are_one(files):
    names, table = table_of(made(files, "50 %=half", "50 %=half-long", "25 %=quarter"))
    assert names == ["50 %", "25 %"]
    assert table == {
        "KV heads kept": ["50.0 %", "25.0 %"],
        "cache over the teacher's, 1,024 tokens": ["52.5 %", "27.5 %"],
        "cache over the teacher's, 8,192 tokens": ["50.0 %", "25.0 %"],
        "KL": ["0.0075", "0.0200"],
        "agreement": ["95.0 %", "95.0 %"],
        "perplexity ratio": ["1.004", "1.004"],
        "KL of the window control": ["0.0225", "0.0600"],
        "KL with the state set to zero": ["0.0150", "0.0400"],
        "mean recall over the teacher's": ["1.020 [0.750 to 1.250]", "0.900 [0.750 to 1.250]"],
        "lowest of the six": ["0.770 (mqar-256)", "0.650 (mqar-256)"],
        "recall of the window control": ["0.510", "0.450"],
        "recall, kv-256": ["1.020 [0.500 to 1.500]", "0.900 [0.500 to 1.500]"],
        "needle over the teacher's": ["0.975 [0.950 to 1.000]", ""],
        "needles found at 512; by the teacher": ["0.97; 1.00", ""],
        "needles found at 2,048; by the teacher": ["(0.25; 0.30)", ""],
        "difference of tasks to the teacher, points": ["-0.25 [-0.75 to +0.25] (7 tasks)", ""],
    }


def test_the_numbers_are_kept_for_a_report(files):
    out = files / "all.json"
    made(files, "50 %=half", "50 %=half-long", "25 %=quarter", out=str(out), about="Two.")
    kept = json.loads(out.read_text("utf-8"))
    assert kept["about"] == "Two." and [each["name"] for each in kept["students"]] == [
        "50 %",
        "25 %",
    ]
    assert [run["file"] for run in kept["students"][0]["runs"]] == ["half.json", "half-long.json"]
    assert kept["students"][0]["runs"][0]["checkpoint"] == "runs/half"
    assert "samples" not in json.dumps(kept)
    entries = collect([out]).entries
    assert [entry.model for entry in entries] == ["50 %", "25 %"]
    assert entries[0].metrics["needle"] == NEEDLE["needle"]


def test_the_figure_is_the_same_picture_each_time(files):
    pytest.importorskip("matplotlib")
    for cache in (files / "half.json", files / "quarter.json"):
        content = json.loads(cache.read_text("utf-8"))
        for each in content["metrics"]["cache"]["sequences"].values():
            each |= {"total": 1000 * each["share"], "teacher_total": 1000}
        cache.write_text(json.dumps(content), "utf-8")
    first, second = files / "a.png", files / "b.png"
    for out in (first, second):
        made(files, "50 %=half", "25 %=quarter", figure=str(out))
    assert first.read_bytes().startswith(b"\x89PNG") and first.read_bytes() == second.read_bytes()


def test_a_figure_needs_a_cache(files):
    (files / "none.json").write_text(json.dumps({"stage": "eval", "metrics": NEEDLE}), "utf-8")
    with pytest.raises(UsageError, match="no student has a cache"):
        made(files, "n=none", figure=str(files / "c.png"))
    assert not (files / "c.png").exists()


def test_runs_that_contradict_each_other_and_other_files_are_refused(files):
    with pytest.raises(UsageError, match="another file says something else of"):
        made(files, "50 %=half", "50 %=quarter")
    (files / "odd.json").write_text('{"a": 1}', "utf-8")
    with pytest.raises(UsageError, match="holds no measurement"):
        made(files, "50 %=odd")
    with pytest.raises(OutputError):
        made(files, "50 %=half", out=str(files / "none" / "all.json"))
