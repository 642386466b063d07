"""The `bench` stage: the grid, the baseline, the ratios and the bound."""

import json

import pytest

from mambactl.errors import CheckError, UsageError
from mambactl.recipe import BenchConfig
from mambactl.stages import bench


@pytest.fixture(scope="module")
def student(tmp_path_factory, save_student):
    return save_student(tmp_path_factory.mktemp("bench") / "student")


def cpu(**fields):
    small = {"device": "cpu", "input_len": [8, 64], "output_len": 2, "warmup": 0, "iters": 1}
    return BenchConfig(**small | fields)


def test_against_the_teacher_of_the_lineage(student, tiny_llama_dir, capsys):
    result = bench.run(cpu(baseline="teacher", batch_size=[1, 2]), str(student))
    metrics = result.metrics
    assert (result.path, metrics["baseline"]) == (str(student), str(tiny_llama_dir))
    assert (metrics["device"], metrics["dtype"]) == ("cpu", "float32")
    pairs = [(point["input_len"], point["batch_size"]) for point in metrics["points"]]
    assert pairs == [(8, 1), (8, 2), (64, 1), (64, 2)]
    for point, other in zip(metrics["points"], metrics["baseline_points"], strict=True):
        speeds = point["decode_tokens_per_second"], other["decode_tokens_per_second"]
        assert point["decode_speedup"] == speeds[0] / speeds[1]
        assert point["cache_reduction"] == other["cache_bytes"] / point["cache_bytes"]
    # half of the layers stop growing with the context
    assert metrics["points"][2]["cache_reduction"] > metrics["points"][0]["cache_reduction"]
    captured = capsys.readouterr()
    assert captured.out == "" and "64 x 2" in captured.err and "gain" in captured.err
    kept = json.loads((student / "results" / "bench-cpu.json").read_text("utf-8"))
    assert kept["metrics"] == metrics


def point(decode, cache=100):
    return {
        "input_len": 8,
        "batch_size": 1,
        "prefill_tokens_per_second": 10.0,
        "decode_tokens_per_second": decode,
        "cache_bytes": cache,
        "peak_bytes": 1,
    }


def test_ratios_are_above_one_where_the_model_is_better():
    (found,) = bench.compare([point(30.0, cache=50)], [point(20.0, cache=100)])
    assert found["decode_speedup"] == 1.5
    assert found["prefill_speedup"] == 1
    assert found["cache_reduction"] == 2


@pytest.mark.parametrize(
    ("mine", "theirs", "fails"),
    [(30.0, 20.0, False), (20.0, 20.0, True), (None, 20.0, True), (20.0, None, False)],
)
def test_the_bound_on_the_speed_up(student, monkeypatch, mine, theirs, fails):
    measured = iter([[point(mine)], [point(theirs)]])
    monkeypatch.setattr(bench, "throughput", lambda *_, **__: next(measured))
    config = cpu(input_len=[8], baseline="teacher", min_speedup=1.2)
    if not fails:
        assert bench.run(config, str(student)).metrics["points"]
        return
    with pytest.raises(CheckError, match="below 1.2 at 8 x 1") as raised:
        bench.run(config, str(student))
    assert raised.value.code == 7


def test_alone_without_a_baseline(tiny_llama_dir):
    points = bench.run(cpu(input_len=[4]), str(tiny_llama_dir)).metrics["points"]
    assert "decode_speedup" not in points[0]


def test_a_bound_needs_a_baseline(student):
    with pytest.raises(UsageError, match="something to be faster than"):
        bench.run(cpu(min_speedup=2), str(student))


def test_teacher_of_a_model_without_lineage(tiny_llama_dir):
    with pytest.raises(UsageError, match="does not say what it was made from") as raised:
        bench.run(cpu(baseline="teacher"), str(tiny_llama_dir))
    assert "--baseline MODEL" in raised.value.hint


def test_the_plan_reads_headers_only(student, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(bench, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    found = json.loads(json.dumps(bench.plan(cpu(baseline="teacher"), str(student))))
    assert found["baseline"] == str(tiny_llama_dir)
    assert found["input_len"] == [8, 64] and found["cache_bytes_at_most"] > 0
