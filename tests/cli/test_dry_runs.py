"""Plans as tables, what a stage says last, packages before stdin, and a person's own data."""

import json
import sys

import pytest

from mambactl.cli import pipeline, recipe_page
from mambactl.cli.closing import Closing
from mambactl.cli.own_data import data_settings
from mambactl.cli.plan_tables import MOST_COLUMNS
from mambactl.commands import COMMANDS
from mambactl.errors import ResourceError, UsageError
from mambactl.recipes import load_recipe
from mambactl.requirements import require_packages
from mambactl.units import decimal_size, duration

PLAN = {
    "mixers": ["attention", "mamba2", "mamba2", "attention"],
    "bytes": 2_000_000_000,
    "tokens": 12345,
    "port": 8000,
    "predicted": {"seconds": 192.4, "peak_bytes": 1500},
    "unknown": None,
    "parts": [{"part": "mlp", "parameters": 1000}, {"part": "head", "parameters": 7}],
    "phases": [
        {"name": f"p{n}", "trained": [{"part": "mixers", "lr": 0.5}]}
        | {f"number{k}": n * k for k in range(MOST_COLUMNS)}
        for n in (1, 2)
    ],
}


def test_a_plan_is_tables_for_a_person(cli, fake_stage, monkeypatch) -> None:
    fake_stage("convert")
    module = sys.modules["mambactl.commands.convert"]
    monkeypatch.setattr(module, "plan", lambda config, source: PLAN)
    shown = cli("convert", "m", "--dry-run", "-q")
    assert shown.out == "" and "{" not in shown.err
    for text in (
        "attention, mamba2 x2, attention",
        "2 GB",
        "12,345",
        "8000",
        "3 min 12 s",
        "1.5 kB",
    ):
        assert text in shown.err
    assert "unknown" not in shown.err and "phases p2: trained" in shown.err
    # phases stand side by side where they say more than a line holds
    head = next(line for line in shown.err.splitlines() if line.split()[:1] == ["name"])
    assert head.split() == ["name", "p1", "p2"]
    whole = json.loads(cli("convert", "m", "--dry-run", "--json").out)
    assert whole["phases"] == PLAN["phases"] and whole["unknown"] is None


def test_sizes_and_durations() -> None:
    assert [decimal_size(n) for n in (0, 999, 1500, 2 * 10**12)] == [
        "0 B", "999 B", "1.5 kB", "2,000 GB"
    ]  # fmt: skip
    assert [duration(s) for s in (4.21, 59.99, 192, 19_200)] == [
        "4.2 s", "60.0 s", "3 min 12 s", "5 h 20 min"
    ]  # fmt: skip


def test_the_last_line_has_time_path_and_the_next_command(cli, fake_stage) -> None:
    fake_stage("convert")
    fake_stage("eval")
    last = cli("convert", "m", "-o", "my t.st").err.splitlines()[-1]
    start, _, rest = last.partition(" s, wrote ")
    assert start.startswith("convert: ")
    assert rest == "my t.st; next: mambactl distill 'my t.st' --data FILE"
    assert cli("eval", "m", "--data", "x").err.splitlines()[-1].endswith("mambactl report m")
    assert "next:" not in cli("convert", "m", "-o", "q.st", "-q").err


def test_in_a_pipe_the_next_command_is_there_already(capfd) -> None:
    from mambactl import console

    console.set_verbosity(1)
    Closing(COMMANDS["convert"], 0.0, piped=True).show("m", None)
    console.name_tables("distill")
    try:
        console.table("training", ("phase",), [("align",)])
    finally:
        console.name_tables("")
        console.set_verbosity(0)
    said = capfd.readouterr().err
    assert "convert: " in said and "next:" not in said
    assert "distill: training" in said


def test_packages_are_missed_before_stdin_is_read(cli, monkeypatch) -> None:
    from importlib import util

    found = util.find_spec
    absent = ("lm_eval", "matplotlib", "peft", "wandb")
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in absent else found(name))
    cases = {
        ("eval", "-", "--tasks", "arc_easy"): 'pip install "mambactl[eval]"',
        ("eval", "-", "--data", "x", "--report", "p.html"): 'pip install "mambactl[plots]"',
        ("sft", "-", "--data", "x", "--lora", "8"): 'pip install "mambactl[lora]"',
        ("dpo", "-", "--data", "x", "--log-to", "wandb"): "pip install wandb",
    }
    for line, hint in cases.items():
        # an empty stdin would end with 4
        done = cli(*line)
        assert (done.code, done.out) == (6, "") and hint in done.err, line
    assert cli("eval", "-", "--data", "x").code == 4
    with pytest.raises(ResourceError, match="eval --tasks needs lm-eval"):
        require_packages(["lm_eval"])


def test_own_data_replaces_text_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("")
    recipe = load_recipe("smollm2-135m")
    found = data_settings(recipe, ["mine.jsonl", "org/set@train"], ["org/held"])
    changed = load_recipe("smollm2-135m", found)
    mine = [str(tmp_path / "mine.jsonl"), "org/set@train"]
    assert changed.section("distill").config.data == mine
    assert changed.section("distill@align").config.data == mine
    assert changed.section("distill").config.eval_data == ["org/held"]
    assert changed.section("eval").config.data == ["org/held"]
    # preferences are no text
    for name in ("data", "eval_data"):
        before, after = (getattr(r.section("dpo").config, name) for r in (recipe, changed))
        assert before == after
    with pytest.raises(UsageError, match="no section for --held-out"):
        data_settings(load_recipe("decode-h200"), [], ["org/held"])


def test_models_are_measured_after_the_last_training() -> None:
    for name in ("smollm2-135m", "llama3.2-1b", "llama3.2-3b", "llama3-8b@paper-50"):
        stages = [section.stage for section in load_recipe(name).sections]
        last = max(n for n, stage in enumerate(stages) if stage in ("distill", "sft", "dpo"))
        assert stages.index("eval") > last, name


def test_a_section_is_left_out(cli, tmp_path) -> None:
    given = ("recipe", "run", "smollm2-135m", "--dry-run", "--json")
    lines = json.loads(cli(*given, "--skip", "dpo").out)["commands"]
    assert "dpo" not in lines and lines["eval"][2].endswith("/distill")
    assert json.loads(cli(*given).out)["commands"]["eval"][2].endswith("/dpo")
    wrong = cli(*given, "--skip", "dpu")
    assert wrong.code == 2 and "did you mean dpo?" in wrong.err
    # what others stand on cannot go
    assert cli(*given, "--skip", "distill@align").code == 2


def test_a_recipe_ends_with_a_page_and_the_command_to_talk(cli, tmp_path, monkeypatch) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("stages: {convert: {model: m}, eval: {data: [x]}}")
    fidelity = {"tokens": 10, "kl": 0.5, "agreement": 0.75}

    def child(command: list[str], json_errors: bool = False) -> tuple[int, str]:
        stage = command[3]
        if stage == "convert":
            (tmp_path / "runs" / "one" / "convert").mkdir(parents=True)
        metrics = {"teacher": "m", "fidelity": {"x": fidelity}} if stage == "eval" else {}
        return 0, json.dumps({"stage": stage, "checkpoint": command[4], "metrics": metrics})

    monkeypatch.setattr(pipeline, "_child", child)
    done = cli("recipe", "run", str(path))
    student = tmp_path / "runs" / "one" / "convert"
    page = tmp_path / "runs" / "one" / "report.html"
    *_, before, last = done.err.splitlines()
    assert (done.code, done.out, last) == (0, f"{student}\n", f"mambactl chat {student}")
    assert before.endswith(f", open {page}") and "75.0 %" in page.read_text()
    # a page that cannot be made costs nothing else
    monkeypatch.setattr(
        "mambactl.report.charts.new_figure", lambda inches: require_packages(["no_such_module"])
    )
    again = cli("recipe", "run", str(path), "--resume")
    assert again.code == 0 and "report.html is not written: no_such_module" in again.err


def test_where_nothing_was_measured_there_is_no_page(tmp_path) -> None:
    (tmp_path / "convert.json").write_text('{"command": [], "result": {"metrics": {}}}')
    assert recipe_page.write_page(tmp_path, "x") is None
    assert not (tmp_path / "report.html").exists()


def test_tied_embeddings_count_once(tiny_llama_dir, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from mambactl.checkpoint.contents import describe

    plain, doubled = describe(str(tiny_llama_dir)), tmp_path / "doubled"
    shutil.copytree(tiny_llama_dir, doubled)
    config = json.loads((doubled / "config.json").read_text())
    weights = load_file(doubled / "model.safetensors")
    head = weights.pop("lm_head.weight", None)
    config["tie_word_embeddings"] = True
    (doubled / "config.json").write_text(json.dumps(config))
    embedding = weights["model.embed_tokens.weight"]
    once = plain["parameters"] - (0 if head is None else head.numel())
    for stored in (weights, weights | {"lm_head.weight": embedding.clone()}):
        save_file(stored, doubled / "model.safetensors", metadata={"format": "pt"})
        assert describe(str(doubled))["parameters"] == once


def test_a_shown_plan_needs_no_terminal(python) -> None:
    code = f"from mambactl.cli.plan_tables import show_plan; show_plan('convert', {PLAN!r})"
    done = python("-c", code)
    assert done.code == 0 and "convert would run with" in done.err
