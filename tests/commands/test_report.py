"""`mambactl report`, `eval A B --compare` and `--report`: one line out, a page on disk."""

import json
import sys
from types import ModuleType

import pytest

from mambactl.stage_result import StageResult


@pytest.fixture
def compared(monkeypatch):
    calls = []

    def run(config, sources, command):
        assert command is sys.modules[command.__name__]
        calls.append((config, list(sources)))
        if len(sources) > 1:
            return StageResult(None, {"models": list(sources)}, "/page.html")
        return StageResult(sources[0], {"report": "/page.html"})

    module = ModuleType("mambactl.report.compare")
    module.run = run
    module.plan = lambda config, sources, command: {"models": list(sources)}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_several_models_give_the_path_of_the_page(cli, compared, fake_stage) -> None:
    fake_stage("eval")
    done = cli("eval", "a", "b", "-", "--compare", "--recall", "64", stdin="c\n")
    assert (done.code, done.out) == (0, "/page.html\n")
    config, sources = compared[0]
    assert (config.recall, sources) == ([64], ["a", "b", "c"])
    found = json.loads(cli("eval", "a", "b", "--compare", "--json").out)
    assert found["metrics"] == {"models": ["a", "b"]} and found["text"] == "/page.html"
    done = cli("eval", "a", "b", "--compare", "--dry-run")
    assert done.out == "" and "models" in done.err and len(compared) == 2


def test_one_model_with_a_report_is_passed_on(cli, compared, fake_stage) -> None:
    fake_stage("eval")
    fake_stage("bench")
    assert cli("eval", "a", "--report", "page.html").out == "a\n"
    assert cli("bench", "a", "--report", "page.html").out == "a\n"
    assert [type(config).__name__ for config, _ in compared] == ["EvalConfig", "BenchConfig"]
    assert cli("eval", "a").out == "a\n" and len(compared) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("eval", "a", "b"), "2 MODELs without --compare"),
        (("eval", "a", "--compare"), "two MODELs or more"),
    ],
)
def test_models_and_the_flag_go_together(cli, compared, words, sentence) -> None:
    done = cli(*words)
    assert (done.code, done.out) == (2, "") and sentence in done.err and compared == []


def test_a_page_of_what_is_kept(cli, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    metrics = {"fidelity": {"held": {"tokens": 9, "kl": 0.25, "agreement": 0.5}}}
    for folder in ("a", "b.st"):
        place = tmp_path / (f"{folder}.results" if folder.endswith(".st") else f"{folder}/results")
        place.mkdir(parents=True)
        content = {"stage": "eval", "checkpoint": folder, "metrics": metrics}
        (place / "eval-held.json").write_text(json.dumps(content), "utf-8")
    done = cli("report", "a", "b.st", "-o", "new/page.html", "--title", "Two <models>")
    assert (done.code, done.out) == (0, f"{tmp_path / 'new' / 'page.html'}\n")
    page = (tmp_path / "new" / "page.html").read_text("utf-8")
    assert "<h1>Two &lt;models&gt;</h1>" in page and page.count("0.2500") >= 4
    assert "b.st.results/eval-held.json" in page


def test_results_of_an_earlier_checkpoint_are_marked(cli, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from mambactl.checkpoint.provenance import header_digest

    (tmp_path / "a.st").write_bytes(b"0" * 64)
    (tmp_path / "a.st.results").mkdir()
    content = {
        "stage": "eval", "checkpoint": "a.st", "metrics": {"recall": {"kv-64": {"recall": 0.5}}},
        "model": {"digest": header_digest(tmp_path / "a.st")},
    }  # fmt: skip
    (tmp_path / "a.st.results" / "eval.json").write_text(json.dumps(content), "utf-8")
    assert cli("report", "a.st").code == 0
    assert "Attention" not in (tmp_path / "report.html").read_text("utf-8")
    (tmp_path / "a.st").write_bytes(b"1" * 64)
    assert cli("report", "a.st").code == 0
    assert "Attention" in (tmp_path / "report.html").read_text("utf-8")


def test_what_cannot_be_shown_or_written_is_a_sentence(cli, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    done = cli("report", "nothing.st")
    assert done.code == 2 and "nothing measured is kept beside nothing.st" in done.err
    metrics = {"recall": {"kv-64": {"recall": 0.5}}}
    (tmp_path / "a.json").write_text(json.dumps({"stage": "eval", "metrics": metrics}), "utf-8")
    done = cli("report", "a.json", "-o", "/proc/page.html")
    assert done.code == 5 and "cannot write /proc/page.html" in done.err


def test_the_page_is_made_without_torch(python, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    metrics = {"recall": {"kv-64": {"recall": 0.5}}}
    (tmp_path / "a.json").write_text(json.dumps({"stage": "eval", "metrics": metrics}), "utf-8")
    code = (
        "import sys; from mambactl.cli.main import run; code = run(['report', 'a.json']);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = python("-c", code)
    assert (done.code, done.out) == (0, f"{tmp_path / 'report.html'}\n"), done.err
