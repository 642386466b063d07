"""`eval` with a second student, errors by layer, a needle, and perplexity by position."""

import json
import random

import pytest
from conftest import WORDS

from mambactl.commands.eval import plan, run
from mambactl.errors import CheckError, UsageError
from mambactl.evaluation.probes import EvalConfig, needle_probe
from mambactl.evaluation.probes.needle_probe import keep_heatmap


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_student):
    return save_student(tmp_path_factory.mktemp("eval") / "student")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    sizes = [40] * 11 + [300, 20, 290]
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=size))}) for size in sizes]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def cpu(**fields):
    return EvalConfig(device="cpu", batch_size=4, **{"max_length": 32, "bootstrap": 200, **fields})


def test_two_students_are_tested_on_the_same_documents(folder, text, tiny_llama_dir, capsys):
    config = cpu(data=[text], against=str(tiny_llama_dir), save_samples=True)
    metrics = run(config, str(folder)).metrics
    assert metrics["against"]["model"] == str(tiny_llama_dir)
    # the other one is the teacher itself
    other = metrics["against"]["fidelity"]["words"]
    assert other["kl"] == pytest.approx(0, abs=1e-9)
    mine = metrics["fidelity"]["words"]
    tests = metrics["against"]["tests"]["words"]
    kl = tests["tests"]["kl"]
    assert kl["difference"] == pytest.approx(mine["kl"]) and kl["p"] < 0.02
    low, high = kl["interval"]
    assert 0 < low < kl["difference"] < high and kl["losses"] == kl["units"] == 14
    assert mine["intervals"]["kl"] == pytest.approx([low, high])
    assert len(mine["samples"]["kl"]) == 14
    assert "controls" not in metrics
    kept = json.loads((folder / "results" / "eval-words.json").read_text("utf-8"))
    assert kept["metrics"] == json.loads(json.dumps(metrics))
    err = capsys.readouterr().err
    assert f"{kl['difference']:+.4f}" in err and "95 % interval" in err
    without = run(cpu(data=[text]), str(folder)).metrics["fidelity"]["words"]
    assert "samples" not in without and without["kl"] == mine["kl"]


def test_errors_by_layer(folder, text, tiny_llama_dir, capsys):
    metrics = run(cpu(data=[text], per_layer=True), str(folder)).metrics
    assert list(metrics["layers"]["words"]) == ["0", "2"]
    assert all(error > 0.1 for error in metrics["layers"]["words"].values())
    assert "relative error of the mixers" in capsys.readouterr().err
    same = {"data": [text], "teacher": str(tiny_llama_dir), "per_layer": True}
    with pytest.raises(UsageError, match="the model has no Mamba layer"):
        plan(cpu(**same), str(tiny_llama_dir))


@pytest.mark.parametrize("scoring", ["generate", "argmax"])
def test_a_needle_has_a_table_a_picture_and_a_bound(folder, text, scoring, capsys):
    pytest.importorskip("matplotlib")
    lengths = [200, 256]
    config = cpu(needle=lengths, needle_depths=2, needle_text=[text], needle_scoring=scoring)
    metrics = run(config, str(folder)).metrics
    found = metrics["needle"]
    assert (found["lengths"], found["depths"], found["scoring"]) == (lengths, [0, 1], scoring)
    assert found["student"]["retrieved"] == found["teacher"]["retrieved"] == [[0, 0], [0, 0]]
    results = folder / "results"
    assert (results / "eval-needle-256.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "eval-needle-256.json").is_file()
    assert not list(results.glob("*.partial"))
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["tokens", "0", "%", "100", "%"] in lines and ["200", "0", "0"] in lines
    with pytest.raises(CheckError, match="needle.retrieved is 0"):
        run(config.model_copy(update={"fail_under": ["needle.retrieved>=0.5"]}), str(folder))


def test_a_needle_is_compared_with_the_teacher_prompt_by_prompt(folder, text, monkeypatch, capsys):
    """Lengths at which the teacher finds too little are shown, and no part of the mean."""
    from mambactl.evaluation import needle

    def measured(model, tokenizer, grid, ends, advance, dealer):
        teacher = all(name == "attention" for name in model.config.mixers)
        # of 12 prompts a length, by the rest of their number by 12
        shares = {200: (12, 10), 240: (8, 6), 280: (5, 9)}
        finds = {length: shares[length][0 if teacher else 1] for length in grid.lengths}
        return [
            [{"retrieved": float(index < finds[length])} for index in range(len(prompts))]
            for length, prompts in zip(grid.lengths, grid.prompts, strict=True)
        ]

    monkeypatch.setattr(needle, "measure_needle", measured)
    monkeypatch.setattr(needle_probe, "keep_heatmap", lambda *_: None)
    config = cpu(
        needle=[240, 280, 200], needle_depths=4, needle_texts=3, needle_text=[text],
        needle_scoring="argmax", fail_under=["needle_ratio>=0.7", "needle.needle_ratio_low>=0.3"],
    )  # fmt: skip
    metrics = run(config, str(folder)).metrics["needle"]
    found = metrics["student"]["by_length"]
    assert {length: one["needle_ratio"] for length, one in found.items()} == {
        "200": pytest.approx(10 / 12), "240": 6 / 8, "280": 9 / 5,
    }  # fmt: skip
    assert [one["counted"] for one in found.values()] == [True, True, False]
    assert [one["teacher_retrieved"] for one in found.values()] == pytest.approx(
        [1, 8 / 12, 5 / 12]
    )
    mean, low = metrics["student"]["mean_needle_ratio"], metrics["student"]["mean_needle_ratio_low"]
    assert mean == pytest.approx((10 / 12 + 6 / 8) / 2)
    interval = metrics["student"]["intervals"]["mean_needle_ratio"]
    assert interval[0] == low < mean < interval[1] < 1.1
    assert metrics["student"]["retrieved"][0] == pytest.approx([1, 1, 1, 1 / 3])
    assert "by_length" not in metrics["teacher"] and metrics["texts"] == 3
    err = capsys.readouterr().err
    assert "mean of 2" in err and "(1.8000)" in err and f"{interval[1]:.4f}" in err
    assert ["200", "1", "1", "1", "0.33"] in [line.split() for line in err.splitlines()]
    monkeypatch.setattr(needle_probe, "WIDEST", 3)
    with pytest.raises(CheckError, match="needle.needle_ratio is 0.79"):
        run(config.model_copy(update={"fail_under": ["needle_ratio>=0.8"]}), str(folder))
    # depths go down where they are many
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["tokens", "200", "240", "280"] in lines and ["100", "%", "0.33", "0", "0"] in lines


def test_the_packaged_text_is_the_default_haystack_and_a_picture_goes_where_it_is_asked(
    tiny_llama_dir, tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "needle.png"
    config = cpu(needle=[256], needle_depths=1, needle_plot=str(picture), needle_scoring="argmax")
    metrics = run(config, str(tiny_llama_dir)).metrics
    assert metrics["needle"]["depths"] == [0.5] and "teacher" not in metrics["needle"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_beside_results_or_the_log_says_what_draws_one(
    text, tmp_path, save_student, capsys
):
    pytest.importorskip("matplotlib")
    single = str(save_student(tmp_path / "a.st"))
    config = cpu(needle=[200], needle_depths=1, needle_text=[text], needle_scoring="argmax")
    found = run(config, single).metrics["needle"]
    assert (tmp_path / "a.st.results" / "eval-needle-200.png").is_file()
    assert "no picture" not in capsys.readouterr().err
    # results of a model given by name are not kept
    assert keep_heatmap(config, "some/name", found, ["student"], None) is None
    shown = capsys.readouterr().err
    assert "--needle-plot" in shown and "single file" not in shown


def test_perplexity_by_position_takes_whole_rows_of_long_documents(folder, text, capsys):
    config = cpu(long_context_data=[text], position_length=128, position_rows=3)
    found = run(config, str(folder)).metrics["long_context"]["words"]
    # 300 and 290 words hold two rows each: the first of each, then the second of one
    assert (found["rows"], found["student"]["tokens"]) == (3, 3 * 127)
    buckets = found["student"]["by_position"]
    assert {label: bucket["tokens"] for label, bucket in buckets.items()} == {
        "0-63": 3 * 64, "64-127": 3 * 63,
    }  # fmt: skip
    whole = found["student"]
    assert whole["perplexity_ratio"] == pytest.approx(
        whole["perplexity"] / whole["teacher_perplexity"]
    )
    assert f"{buckets['64-127']['perplexity']:.4f}" in capsys.readouterr().err
    with pytest.raises(UsageError, match="the longest document has 300 tokens, asked was for 512"):
        plan(cpu(long_context_data=[text], position_length=512), str(folder))


def test_what_cannot_be_measured_is_said_first(folder, text):
    with pytest.raises(UsageError, match="compare on text"):
        run(cpu(against=str(folder), recall=[96]), str(folder))
    with pytest.raises(UsageError, match="leaves no room for text"):
        plan(cpu(needle=[32], needle_text=[text]), str(folder))
    found = plan(cpu(needle=[256, 200], needle_depths=3, needle_text=[text]), str(folder))
    assert found["needle"] == {
        "lengths": [200, 256], "depths": [0, 0.5, 1], "texts": 1, "scoring": "generate",
    }  # fmt: skip
