"""Several models on one page, results that say how they were made, and the card."""

import json
import shutil

import pytest
from conftest import WORDS

from mambactl.commands import bench
from mambactl.commands import eval as eval_command
from mambactl.errors import CheckError, OutputError, UsageError
from mambactl.evaluation.probes import EvalConfig
from mambactl.options import BenchConfig
from mambactl.report import compare

pytest.importorskip("matplotlib")


@pytest.fixture
def models(tmp_path, save_student):
    return str(save_student(tmp_path / "a")), str(save_student(tmp_path / "b.st"))


@pytest.fixture
def words(tmp_path):
    text = " ".join(WORDS * 2)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": text}) + "\n", "utf-8")
    return str(tmp_path / "words.jsonl")


def cpu(words, tmp_path, **fields):
    return EvalConfig(device="cpu", max_length=32, data=[words],
                      report=str(tmp_path / "new" / "page.html"), **fields)  # fmt: skip


def test_every_model_is_measured_and_kept_and_on_the_page(
    models, words, tmp_path, tiny_llama_dir, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["mambactl", "eval", "a", "b.st", "--compare"])
    ledger = {"phase": "logits", "step": 1, "tokens": 9, "loss": 0.5, "kl": 0.4}
    (tmp_path / "b.st.metrics.jsonl").write_text(json.dumps(ledger) + "\n", "utf-8")
    result = compare.run(cpu(words, tmp_path, control="window"), models, eval_command)
    page = (tmp_path / "new" / "page.html").read_text("utf-8")
    assert result.path is None and result.text == str(tmp_path / "new" / "page.html")
    found = [each["metrics"]["fidelity"]["words"] for each in result.metrics["models"]]
    assert found[0] == found[1] and found[0]["kl"] > 0.001
    paths = (tmp_path / "a/results/eval-words.json", tmp_path / "b.st.results/eval-words.json")
    for path, model in zip(paths, models, strict=True):
        kept = json.loads(path.read_text("utf-8"))
        assert kept["command"] == ["mambactl", "eval", "a", "b.st", "--compare"]
        assert kept["checkpoint"] == model and kept["metrics"]["fidelity"]["words"] == found[0]
        assert len(kept["model"]["digest"]) == 64 and kept["model"]["cache"]["bytes_per_token"] > 0
        assert kept["device"] == "cpu" and kept["versions"]["torch"] and kept["date"]
        assert str(path) in page and kept["model"]["digest"] in page
    assert f"{found[0]['kl']:.4f}" in page and "b.st.metrics.jsonl" in page
    captured = capsys.readouterr()
    assert captured.out == "" and "2 models on words" in captured.err
    # a model of somebody else's has its results beside the page
    monkeypatch.chdir(tmp_path)
    # one of this test's own: other tests keep results beside the shared one
    theirs = tmp_path / "cache" / "theirs"
    monkeypatch.setenv("MAMBACTL_CACHE", str(theirs.parent))
    shutil.copytree(tiny_llama_dir, theirs, ignore=shutil.ignore_patterns("results"))
    result = compare.run(cpu(words, tmp_path, teacher=str(theirs)), [str(theirs)], eval_command)
    assert result.path == str(theirs) and not (theirs / "results").exists()
    (own,) = (tmp_path / "new" / "page.results").iterdir()
    assert json.loads(own.read_text("utf-8"))["metrics"]["fidelity"]["words"]["kl"] == 0
    assert str(own) in (tmp_path / "new" / "page.html").read_text("utf-8")


def test_a_bound_is_checked_when_all_is_measured_and_written(models, words, tmp_path):
    with pytest.raises(CheckError) as raised:
        compare.run(cpu(words, tmp_path, fail_under=["agreement>=1"]), models, eval_command)
    assert all(model in str(raised.value) for model in models)
    assert (tmp_path / "new" / "page.html").exists()


def test_the_card_of_a_folder_holds_the_results(models, words, tmp_path):
    folder = tmp_path / "a"
    before = (folder / "README.md").read_text("utf-8")
    compare.run(cpu(words, tmp_path, control="window"), models[:1], eval_command)
    first = (folder / "README.md").read_text("utf-8")
    kept = json.loads((folder / "results" / "eval-words.json").read_text("utf-8"))["metrics"]
    kl = kept["fidelity"]["words"]["kl"]
    control = kept["controls"]["window 64+4"]["fidelity"]["words"]["kl"]
    low, high = kept["fidelity"]["words"]["intervals"]["kl"]
    assert first.startswith(before.rstrip())
    assert f"| this model | {kl:.4f} ({low:.4f} to {high:.4f}) |" in first
    assert f"| window 64+4 | {control:.4f} (" in first
    assert "`results/eval-words.json`: `" in first
    compare.run(cpu(words, tmp_path, recall=[96], recall_rows=2), models[:1], eval_command)
    second = (folder / "README.md").read_text("utf-8")
    # what was measured before stays, as its file does
    assert second.count("<!-- results -->") == 1 and "| recall | kv-96 | mqar-96 |" in second
    assert second.count("eval-words.json") == 1 and "eval-words+kv-96" in second


@pytest.mark.slow
def test_speeds_of_checkpoints_and_of_shapes(models, tmp_path):
    fields = {"device": "cpu", "input_len": [8, 16], "output_len": 2, "iters": 1, "warmup": 0}
    config = BenchConfig(report=str(tmp_path / "speed.html"), **fields)
    result = compare.run(config, [models[1]], bench)
    assert result.path == models[1] and result.metrics["report"].endswith("speed.html")
    page = (tmp_path / "speed.html").read_text("utf-8")
    assert "b.st.results/bench-cpu.json" in page
    rate = result.metrics["points"][0]["decode_tokens_per_second"]
    assert f"{rate:,.0f}" in page or f"{rate:.1f}" in page
    assert "Cache of one sequence" in page and "tokens/s" in page.lower()
    shapes = config.model_copy(update={"synthetic": ["tiny", "tiny-mamba"], "input_len": [8]})
    result = compare.run(shapes, [None], bench)
    assert result.path is None and result.text == "tiny,tiny-mamba"
    assert (tmp_path / "speed.results" / "bench-tiny-tiny-mamba.json").exists()
    page = (tmp_path / "speed.html").read_text("utf-8")
    assert '<th scope="row">tiny</th>' in page and '<th scope="row">tiny-mamba</th>' in page


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"report": "."}, OutputError, "is a folder"),
        ({"report": "/proc/no/page.html"}, OutputError, "cannot write"),
        ({"report": "/proc/page.html"}, OutputError, "cannot write"),
        ({"data": ["missing.jsonl"]}, UsageError, "missing.jsonl does not exist"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    models, words, tmp_path, monkeypatch, change, error, sentence
):
    from mambactl.commands import eval as stage

    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    config = cpu(words, tmp_path).model_copy(update=change)
    with pytest.raises(error, match=sentence):
        compare.run(config, models, eval_command)


def test_a_model_is_not_compared_with_itself(models, words, tmp_path):
    for call in (compare.run, compare.plan):
        with pytest.raises(UsageError, match="given twice"):
            call(cpu(words, tmp_path), [models[0], f"{models[0]}/"], eval_command)


def test_a_plan_writes_nothing(models, words, tmp_path):
    found = compare.plan(cpu(words, tmp_path), models, eval_command)
    assert len(found["models"]) == 2 and found["report"].endswith("page.html")
    assert not (tmp_path / "new").exists()
