"""Results of any other shape are a sentence with the file and the member, never a traceback."""

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from report_results import fidelity, result

from mambactl.errors import UsageError
from mambactl.report import charts
from mambactl.report.bench_table import markdown
from mambactl.report.card_results import markdown as card
from mambactl.report.entries import read_entries
from mambactl.report.kept_results import read_content, read_ledger
from mambactl.report.page import write_report
from mambactl.report.plots import curves

POINT = {
    "model": "m", "batch_size": 1, "input_len": 128, "decode_tokens_per_second": 7.0,
    "decode_byte_limit": 9.0, "cache_bytes": 2**20, "k": 3, "speculative_tokens_per_second": 9.0,
}  # fmt: skip
RECALLED = {"recall": 0.5, "recall_ci": [0.4, 0.6], "chance": 0.1, "teacher": {"recall": 0.9}}
SCORES = {"acc": 0.5, "acc_stderr": 0.1, "alias": "x"}
TEST = {"difference": -0.2, "interval": [-0.3, -0.1], "p": 0.01, "wins": 3, "losses": 1}
# something of every kind
WHOLE = result(
    "runs/m",
    fidelity={"held": fidelity(0.1)},
    long_context={"held": {"max_length": 512, "student": fidelity(0.1)}},
    layers={"held": {"0": 0.1, "3": 0.2}},
    tasks={"arc": SCORES, "mmlu": SCORES},
    task_groups={"mmlu": ["arc"]},
    recall={"kv-64": RECALLED, "kv-128": RECALLED},
    needle={"lengths": [64, 128], "depths": [0.0, 1.0], "student": {"scores": [[1, 0], [0, 1]]}},
    generation={"generation": {"prompts": 3, "exact_match": 0.5}},
    preferences={"pairs": {"pairs": 3, "reward_accuracy": 0.5}},
    controls={"window": {"fidelity": {"held": fidelity(0.3)}}},
    against={
        "model": "runs/n", "fidelity": {"held": fidelity(0.2)},
        "tests": {"held": {"tests": {"kl": TEST}}},
    },
    training={"align": {"steps": 3, "first_loss": 2.0}},
    points=[POINT, POINT | {"input_len": 256}, {"stage": "align", "milliseconds": 3.0}],
    baseline="runs/base", baseline_points=[POINT],
    kernels=[{"batch_size": 1, "ratio": 2.0}],
    loss={"tokens": 8, "milliseconds": 3.0},
    speculative={"accepted_histogram": {"0": 1, "3": 5}},
    draft="d", speedup=1.5, identical=True, dtype="float32",
    config={"synthetic": ["a", "b"], "draft": "d"}, versions={"torch": "2"},
)  # fmt: skip
VALUES = (
    None, True, 3, -1, 10**4000, float("nan"), float("inf"), "word", "", [], [1], ["a"], [[1]],
    [{}], [None], {}, {"a": 1}, {"a": {}}, {"a": {"b": "c"}}, {"1": [1]}, {"a": [{}]},
)  # fmt: skip


@pytest.fixture
def no_charts(monkeypatch) -> None:
    """Drawing takes most of the time, and gets numbers that were read by then."""
    for name in ("lines", "steps", "dots", "histogram", "heat"):
        monkeypatch.setattr(charts, name, lambda *_, **__: "<svg></svg>")


def members(node: Any, path: tuple = ()) -> Iterator[tuple]:
    if not isinstance(node, dict | list):
        return
    for name, inner in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, name)
        yield from members(inner, (*path, name))


def changed(path: tuple, value: Any, drop: bool = False) -> Any:
    content = copy.deepcopy(WHOLE)
    *above, last = path
    node = content
    for name in above:
        node = node[name]
    if drop:
        del node[last]
    else:
        node[last] = value
    return content


def read_by_all(folder, text: str) -> int:
    """The number of readers that refuse a text; any other exception is a failure."""
    refused = 0
    file = folder / "a.json"
    file.write_text(text, "utf-8")
    for read in (
        lambda: write_report([file], folder / "page.html", "x"),
        lambda: markdown([("a.json", read_content(file))]),
        lambda: card(list(read_entries(file)), folder),
    ):
        try:
            read()
        except UsageError as error:
            refused += 1
            assert str(file) in str(error) or "a.json" in str(error) or "nothing" in str(error)
    return refused


def test_what_is_whole_is_read_by_all(tmp_path) -> None:
    assert read_by_all(tmp_path, json.dumps(WHOLE)) == 0


def test_members_may_be_missing(tmp_path, no_charts) -> None:
    for path in list(members(WHOLE))[::2]:
        read_by_all(tmp_path, json.dumps(changed(path, None, drop=True)))


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_members_may_be_anything(tmp_path, no_charts, number) -> None:
    # a share of all members for each value, another one for the next
    paths = list(members(WHOLE))[number % 17 :: 17]
    for path in paths:
        read_by_all(tmp_path, _text(changed(path, VALUES[number])))


def _text(content: Any) -> str:
    # Python writes no number of so many digits
    return json.dumps(content, default=str).replace(json.dumps(str(10**4000)), "9" * 4000)


LINE = {"phase": "logits", "step": 3, "tokens": 30, "loss": 0.5, "kl": 0.1, "eval_tokens": 64}


@pytest.mark.parametrize("value", [*VALUES, "drop"], ids=lambda value: f"{value!r:.12}")
def test_a_ledger_of_another_shape_is_a_sentence(tmp_path, no_charts, value) -> None:
    path = tmp_path / "metrics.jsonl"
    for name in LINE:
        line = {key: item for key, item in LINE.items() if key != name}
        if value != "drop":
            line[name] = value
        path.write_text(f"{json.dumps(LINE)}\n{_text(line)}\n", "utf-8")
        for read in (
            lambda: curves(read_ledger(path)),
            lambda: write_report([path], tmp_path / "page.html", "x"),
        ):
            try:
                read()
            except UsageError as error:
                assert f"{path} is no ledger: line 2" in str(error)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", 1),
        ('{"step": 4, "tok', 1),
        ('{"st\n', None),
        ("\xff\n", None),
        ("[" * 10**5 + "\n", None),
    ],
)
def test_only_the_last_line_of_a_ledger_may_be_torn(tmp_path, text, lines) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{text}", "latin-1")
    if lines:
        assert len(read_ledger(path)) == lines
        return
    with pytest.raises(UsageError, match="is no ledger: line 2 is not JSON"):
        read_ledger(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_only_regular_files_are_read(tmp_path, kind, suffix) -> None:
    path = tmp_path / f"a{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(UsageError, match="is a pipe or device|is a folder|cannot be used"):
        write_report([path], tmp_path / "page.html", "x")
