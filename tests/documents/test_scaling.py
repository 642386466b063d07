"""`recipes/scaling.py`: its plan beside GPUs that are free, its runs on two CPU processes."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.shared_runs import together

from mambactl import console
from mambactl.commands import eval as evaluate
from mambactl.commands import generate
from mambactl.evaluation.probes import EvalConfig
from mambactl.files import EMBEDDED_FOLDER
from mambactl.options import GenerateConfig
from tests.performance.sharded import options_of
from tests.performance.sharded_steps import measure

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ("--shape", "tiny-hybrid", "--small", "tiny-hybrid", "--large", "tiny-hybrid")
SIZES = ("--rows", "1", "--length", "96", "--steps", "1", "--prompts", "16", "--batch", "4")
SMALL = ("--device", "cpu", "--gpus", "1,2", *TINY, *SIZES, "--tokens", "8", "--questions", "16")
# eight GPUs of 150 GB, of which somebody uses the fourth
NVIDIA_SMI = """#!/bin/sh
for each in 0 1 2 3 4 5 6 7; do
    test $each = 3 && used=5000 || used=4
    case "$1" in
        *name) echo "NVIDIA H200" ;;
        *uuid*) echo "$each, GPU-$each, $used, 143771" ;;
        *) echo $used ;;
    esac
done
"""


@pytest.fixture
def scaling(tmp_path: Path, monkeypatch):
    """scaling(option, ...) -> exit code, the object on stdout, and stderr."""
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, dict, str]:
        line = [sys.executable, str(RECIPES / "scaling.py"), "--out", "out", *words]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stdout.count("\n") == (1 if done.stdout else 0)
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    return call


@pytest.fixture
def eight_gpus(tmp_path: Path, monkeypatch) -> None:
    """A machine whose nvidia-smi sees eight GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def recipe(monkeypatch) -> Callable:
    """recipe(name) -> a module of the folder of recipes."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module


def test_a_plan_counts_free_gpus_and_names_what_it_leaves_out(scaling, eight_gpus, tmp_path):
    code, plan, said = scaling("--dry-run", "--gpus", "1,2,4,8")
    assert (code, plan["gpus_free"], plan["bytes_of_a_gpu"]) == (0, 7, 143771 << 20)
    timed = plan["runs"].pop("steps")
    assert [run["gpus"] for run in timed] == [1, 2, 4]
    one, two, _ = (run["command"] for run in timed)
    assert "--parts=logits-mixers " in one and "--parts=logits-mixers,logits-whole" in two
    assert "--model=llama3-8b-hybrid-50" in two and "--together=logits-mixers" in two
    # what compares eight with fewer does not run at all
    assert not any(plan["runs"].values())
    reasons = set(plan["skipped"].values())
    assert reasons == {"GPUs needed: 8, free: 7"} and len(plan["skipped"]) == 12
    assert all(f"{name} is left out: " in said for name in plan["skipped"])
    assert not (tmp_path / "out").exists()


def test_a_plan_takes_the_gpus_that_it_may(scaling, eight_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-2")
    code, plan, _ = scaling("--dry-run", "--more", "eval=--limit 5")
    assert (code, plan["gpus_free"]) == (0, 2)
    names = {part: [run["name"] for run in runs] for part, runs in plan["runs"].items()}
    assert names["killed"][-1] == "distill resumed on 1"
    # both read the model that is made once
    assert [names[part][0] for part in ("generate", "eval")] == [
        "synthetic llama3-8b",
        "eval on 1",
    ]
    assert plan["runs"]["eval"][0]["command"].endswith("--limit 5 --json")
    assert "--limit" not in plan["runs"]["generate"][0]["command"]
    # 70 billion parameters do not fit on two
    [(name, reason)] = plan["skipped"].items()
    assert "llama3-70b-hybrid-50 on 2" in name and reason.startswith("predicted to take 2")


def test_a_plan_leaves_out_what_time_does_not_allow(scaling, eight_gpus):
    code, plan, _ = scaling("--dry-run", "--gpus", "1,2,4", "--total", "17")
    assert code == 0 and sum(map(len, plan["runs"].values())) == 2
    assert [run["gpus"] for run in plan["runs"]["steps"]] == [4, 1]
    late = [reason for reason in plan["skipped"].values() if "17 s are too few" in reason]
    assert len(late) > 5
    # no model is written that nothing reads
    _, plan, _ = scaling("--dry-run", "--gpus", "1,2,4", "--parts", "eval", "--total", "9")
    assert plan["runs"] == {"eval": []} and len(plan["skipped"]) == 3


def test_nothing_runs_without_a_gpu(scaling, eight_gpus, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    code, _, said = scaling("--parts", "steps")
    assert code == 6 and "GPUs needed: 8, free: 0" in said and "nothing can run here" in said
    assert not (tmp_path / "out").exists()


def test_what_it_does_not_know_is_refused(scaling):
    for words in (("--parts", "stepz"), ("--gpus", "0"), ("--more", "x=y"), ("--shape", "tiny")):
        code, found, said = scaling(*words)
        assert (code, found) == (2, {}) and "error: " in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")
def test_two_processes_take_steps_of_a_shape_that_is_nowhere_on_disk(recipe, tmp_path, monkeypatch):
    """Run the whole script, with its processes as forks of this one."""
    module, stages = recipe("scaling"), recipe("stages")

    def forked(name, line, folders, limit, heard, beside):
        options, told = options_of(line[3:]), tmp_path / "found"
        assert options.nproc == 2

        def work() -> None:
            found = json.dumps(measure(options))
            if os.environ["RANK"] == "0":
                told.write_text(found)

        assert together(work, tmp_path / "log", shard=False) == [0, 0]
        return stages.Row(name, " ".join(line), 1.0, 0, stages.Peak(), json.loads(told.read_text()))

    monkeypatch.setattr(stages, "run", forked)
    out = tmp_path / "out"
    asked = module.options([*SMALL, "--parts", "steps,large", "--gpus", "2", "--out", str(out)])
    made = module.Scaling(asked, module.Host.of("cpu"))
    made.run(made.plan())
    assert not made.failed | made.skipped
    kept = json.loads((out / "scaling.json").read_text())
    assert kept["parts"] == json.loads(json.dumps(made.figures))
    steps, large = kept["parts"]["steps"], kept["parts"]["large"]
    assert large["gpus"] == 2 and "--nproc=2" in large["flags"]
    found = {kind: large[kind] for kind in ("align-mixers", "logits-mixers")}
    found["whole"] = steps["logits-whole"]["gpus"]["2"]
    for figures in found.values():
        assert figures["shared"] and figures["recomputed"]
        assert figures["tokens_per_second"] > 0 < figures["predicted_bytes"]
        assert figures["communication"].keys() == {"why"}
    assert not steps["logits-mixers"]["gpus"]["2"]["shared"]
    assert large["align-mixers"]["losses"][-1] < large["align-mixers"]["losses"][0]
    assert [path.name for path in out.iterdir()] == ["scaling.json"]


@pytest.mark.slow
def test_every_part_on_two_processes(scaling, tmp_path, tiny_llama_dir, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / EMBEDDED_FOLDER).symlink_to(tiny_llama_dir)
    monkeypatch.setenv("MAMBACTL_CACHE", str(cache))
    code, found, said = scaling(*SMALL)
    assert code == 0 and not found["failed"] | found["skipped"], said
    parts = found["parts"]
    steps = parts["steps"]
    assert steps["logits-mixers"]["gpus"].keys() == {"1", "2"}
    assert steps["logits-mixers"]["ratio_of"] == [2, 1]
    assert steps["logits-whole"]["gpus"].keys() == {"2"} and "ratio" not in steps["logits-whole"]
    whole = steps["logits-whole"]["gpus"]["2"]
    days = 20e9 / whole["tokens_per_second"] / 86_400
    assert whole["days_of_20B_tokens"] == pytest.approx(days, abs=0.01)
    for part in ("generate", "eval"):
        assert parts[part]["equal"] is True
        one, same, more = parts[part]["per_second"]
        assert parts[part]["ratio"] == pytest.approx(more / one)
        assert parts[part]["ratio_of_the_same_work"] == pytest.approx(same / one)
    killed = parts["killed"]
    assert killed["killed"]["rank"] == 1 and killed["all_stopped"] and killed["equal"]
    assert len(killed["losses"]) == len(killed["losses_after_the_kill"]) == 8
    assert killed["killed"]["line"] < 8 and len(set(killed["losses"])) == 8
    assert all(part["loss_error"] < 1e-4 for part in parts["losses"].values())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scaling.json"]


def test_a_run_that_fails_keeps_what_it_measured_before(recipe, tmp_path, monkeypatch):
    module = recipe("scaling")
    line = 'import sys; print(\'{"logits-mixers": {"tokens_per_second": 5.0}}\', file=sys.stderr)'
    line += '; print(\'{"error": "CUDA out of memory"}\', file=sys.stderr); sys.exit(6)'
    monkeypatch.setattr(recipe("scaling_parts"), "_sharded", lambda *_, **__: [line])
    asked = module.options([*SMALL, "--parts", "steps", "--gpus", "2", "--out", str(tmp_path)])
    made = module.Scaling(asked, module.Host.of("cpu"))
    monkeypatch.setattr(made, "_line", lambda command, part: [sys.executable, "-c", line])
    made.run(made.plan())
    [error] = made.failed.values()
    assert error == "CUDA out of memory"
    assert made.figures["steps"]["logits-mixers"]["gpus"][2]["tokens_per_second"] == 5
    assert made.figures["steps"]["logits-whole"]["gpus"] == {}
    assert json.loads((tmp_path / "scaling.json").read_text())["failed"] == made.failed


RUN = """
import os, subprocess, sys, time
def rank(n):
    code = "import time; time.sleep(60)"
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"RANK": str(n)},
                            process_group=0)
ranks = [rank(0), rank(1)]
print(*[each.pid for each in ranks], flush=True)
ranks[1].wait()
time.sleep(0.3)
ranks[0].kill()
"""


def test_a_lost_process_is_killed_after_some_lines_and_the_end_is_timed(recipe, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lost, done = recipe("lost_process").LostProcess(metrics, 1), threading.Event()
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        ranks = run.stdout.readline().split()
        thread = threading.Thread(target=lost, args=(run.pid, done))
        thread.start()
        metrics.write_text("{}\n")
        time.sleep(0.2)
        assert run.poll() is None and not lost.found
        metrics.write_text("{}\n{}\n")
        assert run.wait(20) == 0 and len(ranks) == 2
        thread.join(5)
    assert lost.found["rank"] == 1 and lost.found["line"] == 2
    assert 0.3 <= lost.found["seconds"] < 10


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(recipe, tmp_path):
    row = recipe("watch").run("slow", [sys.executable, "-c", RUN], [tmp_path], 1.0)
    assert row.code == -signal.SIGKILL and row.note == "stopped after 1 s" and row.seconds < 10


def test_seconds_of_answers_are_read_from_what_commands_say(
    recipe, tiny_llama_dir, tmp_path, capsys
):
    parts = recipe("scaling_parts")
    asked = recipe("scaling").options([*SMALL, "--prompts", "3", "--questions", "3"])
    said = []
    for make, run, options in (
        (parts.generate, generate.run, GenerateConfig),
        (parts.evaluate, evaluate.run, EvalConfig),
    ):
        part = make(asked, tmp_path)
        part.prepare()
        flag, data = part.commands[1].line[2:4]
        fields = {flag.strip("-"): [data], "device": "cpu", "batch_size": 2}
        if options is GenerateConfig:
            fields |= {"max_new_tokens": 4, "ignore_eos": True, "keep_unfinished": True}
        console.set_verbosity(2)
        out = [tmp_path / "answers.jsonl"] if options is GenerateConfig else []
        run(options(**fields), str(tiny_llama_dir), *out)
        said += capsys.readouterr().err.splitlines(keepends=True)
    found = list(filter(None, map(recipe("scaling").TIMED.match, said)))
    assert [line[1] for line in found] == ["answers", "likelihoods"]
    assert all(0 < float(line[2]) < 60 for line in found)
    assert [line[0].split()[1] for line in found] == ["3", "6"]
