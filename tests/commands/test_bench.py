"""The `bench` stage: the grid, the baseline, the ratios and the bound."""

import json

import pytest

from mambactl import console
from mambactl.commands import bench
from mambactl.errors import CheckError, ModelError, UsageError
from mambactl.options import BenchConfig
from mambactl.speed import bench_tables, candidates


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
    assert {point["model"] for point in metrics["points"]} == {str(student)}
    assert metrics["config"]["baseline"] == "teacher" and len(metrics["date"]) == 10
    assert metrics["versions"]["torch"] and metrics["bandwidth_bytes_per_second"] > 1e8


@pytest.fixture
def wide(monkeypatch):
    """Headings are not wrapped."""
    monkeypatch.setenv("COLUMNS", "250")
    console.stderr.cache_clear()
    yield
    console.stderr.cache_clear()


@pytest.mark.slow
def test_against_transformers_own_generate(student, capsys, wide):
    """A checkpoint and shapes: one Llama serves all hybrids of it, and long prompts warn."""
    settings = {"baseline": "transformers", "input_len": [8], "output_len": 3}
    result = bench.run(cpu(**settings), str(student)).metrics
    (point,), (other,) = result["points"], result["baseline_points"]
    assert (result["baseline"], other["model"]) == ("transformers", "transformers")
    assert point["first_token_speedup"] == other["first_token_ms"] / point["first_token_ms"]
    ours, theirs = point["decode_tokens_per_second"], other["decode_tokens_per_second"]
    assert point["decode_speedup"] == ours / theirs
    assert point["cache_reduction"] is None
    assert len(result["bandwidths_bytes_per_second"]) == 2
    assert "first ms" in capsys.readouterr().err
    names = ["tiny", "tiny-hybrid"]
    settings |= {"synthetic": names, "output_len": 8190}
    plan = bench.plan(cpu(**settings), None)
    assert plan["synthetic"] == names
    result = bench.run(cpu(**settings | {"output_len": 3}), None).metrics
    assert [point["model"] for point in result["points"]] == names
    assert len(result["baseline_points"]) == 1
    assert all(point["decode_speedup"] for point in result["points"])


def test_lengths_beyond_the_positions_warn(tiny_llama_dir, capsys):
    bench.run(cpu(input_len=[4], output_len=2), str(tiny_llama_dir))
    assert "was made for" not in capsys.readouterr().err
    config = cpu(synthetic=["tiny"], input_len=[8191], output_len=2)
    bench.run(config, None)
    assert "8193 tokens are more than the 8192 tiny was made for" in capsys.readouterr().err


def test_a_native_mamba_has_no_llama():
    with pytest.raises(UsageError, match="tiny-mamba has no attention"):
        bench.run(cpu(synthetic=["tiny-mamba"], baseline="transformers"), None)


def test_training_beside_the_teacher(student, capsys):
    """Both learn the text alone, with everything that trains as fp32 masters."""
    small = {"training": True, "input_len": [16], "batch_size": [2], "compile": False}
    result = bench.run(cpu(baseline="teacher", **small), str(student))
    points = {point["stage"]: point for point in result.metrics["points"]}
    assert list(points) == ["align", "logits", "text", "teacher's text"]
    speeds = [points[name]["tokens_per_second"] for name in ("text", "teacher's text")]
    assert result.metrics["training_speedup"] == speeds[0] / speeds[1]
    # no teacher's pass, and not the teacher's loss
    assert points["text"]["first_loss"] != points["teacher's text"]["first_loss"]
    assert "its teacher's speed" in result.text and "training" in capsys.readouterr().err


def test_training_refuses_the_draft_that_it_would_ignore():
    with pytest.raises(UsageError, match="--training goes without --draft"):
        bench.run(cpu(training=True, draft="ngram"), None)


def point(decode, cache=100):
    return {
        "input_len": 8,
        "batch_size": 1,
        "prefill_tokens_per_second": 10.0,
        "decode_tokens_per_second": decode,
        "decode_byte_limit": 100.0,
        "decode_share": 0.1,
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
    [
        pytest.param(30.0, 20.0, False, marks=pytest.mark.slow),
        (20.0, 20.0, True),
        pytest.param(None, 20.0, True, marks=pytest.mark.slow),
        pytest.param(20.0, None, False, marks=pytest.mark.slow),
    ],
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
    (point,) = bench.run(cpu(input_len=[4]), str(tiny_llama_dir)).metrics["points"]
    assert "decode_speedup" not in point and "speculative_speedup" not in point
    assert point["decode_share"] == point["decode_tokens_per_second"] / point["decode_byte_limit"]


def test_a_bound_needs_a_baseline(student):
    with pytest.raises(UsageError, match="something to be faster than"):
        bench.run(cpu(min_speedup=2), str(student))


def test_teacher_of_a_model_without_lineage(tiny_llama_dir):
    with pytest.raises(UsageError, match="does not say what it was made from") as raised:
        bench.run(cpu(baseline="teacher"), str(tiny_llama_dir))
    assert "--baseline MODEL" in raised.value.hint


@pytest.mark.parametrize("missing", ["source", "baseline"])
def test_a_model_that_is_not_there_shows_before_memory_is_measured(
    missing, student, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench, "conditions", lambda *_: pytest.fail("the memory was measured"))
    gone = str(tmp_path / "gone.st")
    config = cpu(baseline=gone if missing == "baseline" else None)
    with pytest.raises(ModelError, match="gone.st does not exist"):
        bench.run(config, gone if missing == "source" else str(student))


@pytest.mark.parametrize("draft", [pytest.param("ngram", marks=pytest.mark.slow), "teacher"])
def test_a_draft_adds_to_every_point(student, tiny_llama_dir, draft, capsys):
    draft = str(tiny_llama_dir) if draft == "teacher" else draft
    config = cpu(draft=draft, k=2, output_len=6, batch_size=[1, 2])
    points = bench.run(config, str(student)).metrics["points"]
    assert len(points) == 4
    for point in points:
        gain = point["speculative_tokens_per_second"] / point["decode_tokens_per_second"]
        assert point["speculative_speedup"] == gain
        assert (point["k"], point["tokens_per_step"] >= 1) == (2, True)
        assert 0 <= point["acceptance"] <= 1
    shown = capsys.readouterr().err
    assert f"with {draft} on cpu" in shown and "tok/step" in shown


def test_a_draft_of_other_tokens_is_refused(student, permuted):
    with pytest.raises(ModelError, match="draft"):
        bench.run(cpu(draft=permuted), str(student))


def test_synthetic_models_one_after_the_other(capsys):
    config = cpu(
        synthetic="tiny,tiny-mamba2", draft="tiny-draft", k=3, acceptance=1.0, output_len=9
    )
    result = bench.run(config, None)
    assert (result.path, result.text) == (None, "tiny,tiny-mamba2")
    found = [(point["model"], point["input_len"]) for point in result.metrics["points"]]
    assert found == [("tiny", 8), ("tiny", 64), ("tiny-mamba2", 8), ("tiny-mamba2", 64)]
    assert [point["tokens_per_step"] for point in result.metrics["points"]] == [4] * 4
    assert json.loads(json.dumps(result.metrics)) == result.metrics
    shown = capsys.readouterr()
    assert shown.out == "" and "tiny-mamba2 with tiny-draft on cpu" in shown.err


@pytest.mark.parametrize(
    ("draft", "model"),
    [pytest.param("tiny-draft", "tiny", marks=pytest.mark.slow), ("head", "tiny-heads")],
)
def test_acceptance_is_what_was_asked_for(draft, model):
    asked = {"draft": draft, "k": 3, "input_len": [8], "output_len": 120}
    for share in (0.3, 0.8):
        config = cpu(synthetic=[model], acceptance=share, batch_size=[8], **asked)
        (point,) = bench.run(config, None).metrics["points"]
        assert point["acceptance"] == pytest.approx(share, abs=0.07)


def test_wrong_tokens_of_a_synthetic_model_fail(monkeypatch):
    real = candidates.build

    def broken(*arguments):
        model = real(*arguments)
        model.lm_head.weight.data.neg_()
        return model

    monkeypatch.setattr(candidates, "build", broken)
    with pytest.raises(CheckError, match="token 0 of row 0") as raised:
        bench.run(cpu(synthetic=["tiny"]), None)
    assert raised.value.code == 7


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"synthetic": ["tinny"]}, "no synthetic model tinny"),
        ({"synthetic": ["tiny"], "draft": "m"}, "no synthetic model m"),
        ({"synthetic": ["tiny"], "baseline": "m"}, "--baseline compares checkpoints"),
    ],
)
def test_what_synthetic_models_cannot_be(fields, sentence):
    for action in (bench.run, bench.plan):
        with pytest.raises(UsageError, match=sentence) as raised:
            action(cpu(**fields), None)
    assert "no synthetic" not in sentence or "mamba-2.8b" in raised.value.hint


def test_the_plan_of_synthetic_models_makes_none(monkeypatch):
    monkeypatch.setattr(candidates, "build", lambda *_: pytest.fail("a model was made"))
    found = bench.plan(cpu(synthetic=["llama3-8b"], draft="draft-llama3-2l"), None)
    sizes = found["parameters_read"]
    assert 7e9 < sizes["llama3-8b"] < 8e9 and sizes["draft-llama3-2l"] < 1e9
    assert found["k"] == "auto" and json.dumps(found)


def test_the_training_table_shows_errors_below_a_per_cent(capsys):
    point = {
        "model": "m", "stage": "align", "batch_size": 1, "input_len": 8, "tokens_per_second": 1.0,
        "milliseconds": 1.0, "peak_bytes": None, "first_loss": 1.0, "last_loss": 0.5,
        "gradient_error": 8e-4,
    }  # fmt: skip
    bench_tables.show_training({"device": "gpu", "dtype": "float32", "points": [point]})
    assert "8.0e-04" in capsys.readouterr().err


def test_the_plan_reads_headers_only(student, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(candidates, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    found = json.loads(json.dumps(bench.plan(cpu(baseline="teacher"), str(student))))
    assert found["baseline"] == str(tiny_llama_dir)
    assert found["input_len"] == [8, 64] and found["cache_bytes_at_most"] > 0
