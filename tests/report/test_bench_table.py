"""The Markdown table: one row per point of everything that `bench` and `recipe run` print."""

import pytest

from mambactl.errors import UsageError
from mambactl.report.bench_table import markdown

MACHINE = {
    "device": "NVIDIA H200",
    "dtype": "bfloat16",
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "mambactl": "0.1.0"},
    "date": "2026-11-24",
}
SPECULATIVE = {
    "k": 3,
    "speculative_tokens_per_second": 1204.4,
    "tokens_per_step": 2.531,
    "acceptance": 0.7,
    "speculative_speedup": 2.346,
}


def point(model, rate=98.76, share=0.61, **more):
    plain = {"decode_tokens_per_second": rate, "decode_share": share}
    return {"model": model, "input_len": 128, "batch_size": 1, **plain, **more}


def bench(*points, draft=None, **more):
    metrics = MACHINE | {"points": list(points), "config": {"draft": draft}} | more
    return {"stage": "bench", "checkpoint": None, "metrics": metrics}


def test_one_row_per_point_and_one_line_per_machine():
    recipe = {"checkpoint": None, "sections": {
        "bench@a": bench(point("mamba-2.8b", 513.2, **SPECULATIVE), draft="mamba-130m"),
        "bench@b": bench(point("llama3-8b"), point("org/other", None, None)),
        "bench@c": bench(kernels=[{"ratio": 2}]),
        "eval": {"stage": "eval", "metrics": {"kl": 1}},
    }}  # fmt: skip
    text = markdown([("r.json", recipe)])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2] == (
        "| mamba-2.8b | mamba-130m | 3 | 1 | 128 | 513 | 61 % | 1,204 | 2.53 | 2.35x |"
    )
    assert lines[3] == "| llama3-8b |  |  | 1 | 128 | 98.8 | 61 % |  |  |  |"
    assert lines[4] == "| other |  |  | 1 | 128 |  |  |  |  |  |"
    assert lines[5:] == [
        "",
        "Measured on NVIDIA H200, bfloat16, torch 2.11.0, triton 3.6.0, mambactl 0.1.0, "
        "2026-11-24.",
    ]


def test_machines_that_differ_are_all_named():
    other = bench(point("b"), device="cpu")
    text = markdown([("a.json", bench(point("a"))), ("b.json", other), ("c.json", other)])
    assert [line for line in text.splitlines() if line.startswith("Measured")] == [
        text.splitlines()[-2],
        text.splitlines()[-1],
    ]


def test_older_results_and_baselines():
    old = {"stage": "bench", "checkpoint": "/runs/student", "metrics": {"device": "cpu", "points": [
        {"input_len": 8, "batch_size": 2, "decode_tokens_per_second": 5.0},
    ]}}  # fmt: skip
    assert "| student |  |  | 2 | 8 | 5.0 |  |  |  |  |" in markdown([("o.json", old)])
    both = bench(point("student"), baseline_points=[point("teacher", 50.0)])
    assert "| teacher |" in markdown([("b.json", both)])


@pytest.mark.parametrize("content", [{}, {"sections": {}}, bench(), {"metrics": None}])
def test_a_file_without_points_is_named(content):
    with pytest.raises(UsageError, match="e.json has no measured point"):
        markdown([("a.json", bench(point("a"))), ("e.json", content)])
