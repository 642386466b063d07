"""`eval --nproc N`: the numbers of one process, whatever is measured; killed, nothing is kept."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import WORDS
from fixtures.shared_runs import others_first, together

from mambactl import commands
from mambactl.cli.processes import RunFailure, run_processes
from mambactl.commands.eval import run
from mambactl.errors import CheckError
from mambactl.evaluation.probes import EvalConfig
from mambactl.report import compare

# a process that has used a GPU cannot be forked
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_student):
    return save_student(tmp_path_factory.mktemp("eval-processes") / "student")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    draw = random.Random(0)
    place = tmp_path_factory.mktemp("sets")

    def text(count):
        return " ".join(draw.choices(WORDS, k=count))

    def pair():
        return {
            "prompt": [_said(text(8), "user")],
            "chosen": [_said(text(5))],
            "rejected": [_said(text(4))],
        }

    contents = {
        "words": [{"text": text(n)} for n in (90, 40, 33, 140, 70, 12)],
        "long": [{"text": text(n)} for n in (300, 280, 20)],
        "choice": [
            {"query": text(9), "choices": [text(3), text(2)], "gold": draw.randrange(2)}
            for _ in range(12)
        ],
        "line": [{"context": text(n), "continuation": text(2)} for n in range(3, 14)],
        "pairs": [pair() for _ in range(9)],
    }
    for name, rows in contents.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(lines, "utf-8")
    (place / "prompts.txt").write_text("".join(f"{text(n)}\n" for n in (3, 5, 4, 7, 6)), "utf-8")
    return {path.stem: str(path) for path in place.iterdir()}


def _said(text, role="assistant"):
    return {"role": role, "content": text}


def cpu(**fields):
    sizes = {"batch_size": 2, "max_length": 32, "bootstrap": 50}
    return EvalConfig(device="cpu", **{**sizes, **fields})


def some(sets, other, **fields):
    """A configuration that asks for something of every kind: numbers, texts, answers of tasks."""
    return cpu(
        data=[sets["words"]], recall=[96], recall_rows=5, preferences=[sets["pairs"]],
        generation_agreement=sets["prompts"], generation_tokens=3, save_samples=True,
        tasks=[sets["choice"], sets["line"]], limit=6, log_samples=True, **fields,
    )  # fmt: skip


def everything(sets, other, **fields):
    """A configuration that asks every probe for something, of all models."""
    return cpu(
        data=[sets["words"]], against=other, control="window", control_window=4, per_layer=True,
        recall=[96], recall_rows=5, needle=[200, 230], needle_depths=3, needle_text=[sets["long"]],
        long_context_data=[sets["long"]], position_length=128, preferences=[sets["pairs"]],
        generation_agreement=sets["prompts"], generation_tokens=5, save_samples=True,
        tasks=[sets["choice"], sets["line"]], log_samples=True, **fields,
    )  # fmt: skip


@pytest.fixture
def shared(monkeypatch):
    """Numbers of the batches that this process measured; the main process lets others go first."""
    return others_first(monkeypatch)


def kept(folder):
    """Files of results, without when they were made, how, and by how many."""
    found = {}
    for path in sorted((folder / "results").glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        varying = [content.pop(name) for name in ("created", "command", "date")]
        content["config"].pop("nproc")
        assert all(varying)
        found[path.name] = json.dumps(content)
    return found


@pytest.mark.parametrize("asked", [some, pytest.param(everything, marks=pytest.mark.slow)])
def test_two_processes_find_what_one_finds(folder, sets, tmp_path, shared, asked):
    """Numbers, files of results and samples."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run(asked(sets, str(folder), output_path=str(one)), str(folder)).metrics
    files = kept(folder)

    def work() -> None:
        found = run(asked(sets, str(folder), output_path=str(two)), str(folder))
        rank = os.environ["RANK"]
        (tmp_path / f"{rank}.json").write_text(json.dumps(found.metrics))
        (tmp_path / f"{rank}.done").write_text(str(len(shared)))

    assert together(work, tmp_path / "log", False) == [0, 0]
    assert (tmp_path / "0.json").read_text() == json.dumps(alone)
    assert (tmp_path / "1.json").read_text() == "{}"
    assert all(int((tmp_path / f"{rank}.done").read_text()) > 10 for rank in (0, 1))
    assert [name.replace(str(two), str(one)) for name in kept(folder)] == list(files)
    assert [text.replace(str(two), str(one)) for text in kept(folder).values()] == [*files.values()]
    samples = {path.name: path.read_bytes() for path in one.iterdir()}
    assert samples == {path.name: path.read_bytes() for path in two.iterdir()}
    assert len(samples) == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_answers_that_are_kept_are_asked_for_by_nobody(folder, sets, tmp_path, shared, count):
    def config(name, tasks, **fields):
        return cpu(
            tasks=[sets[task] for task in tasks], use_cache=str(tmp_path / name), limit=5,
            cache_requests=True, needle=[200, 230], needle_depths=3, needle_text=[sets["long"]],
            **fields,
        )  # fmt: skip

    alone = run(config("one", ["choice", "line"]), str(folder)).metrics

    def work() -> None:
        run(config("two", ["choice"]), str(folder))
        rank = os.environ["RANK"]
        for name in ("new", "known"):
            found = run(config("two", ["choice", "line"]), str(folder))
            (tmp_path / f"{rank}.{name}").write_text(json.dumps(found.metrics))

    assert together(work, tmp_path / "log", False, count) == [0] * count
    for name in ("new", "known"):
        assert (tmp_path / f"0.{name}").read_text() == json.dumps(alone)


@pytest.mark.slow
def test_one_page_of_several_models_in_two_processes(folder, sets, tiny_llama_dir, tmp_path):
    models = [str(folder), str(tiny_llama_dir)]

    def config(**fields):
        page = str(tmp_path / "page.html")
        return cpu(data=[sets["words"]], teacher=models[1], limit=2, report=page, **fields)

    alone = compare.run(config(), models, command=commands.eval)
    assert (tmp_path / "page.html").exists()
    (tmp_path / "page.html").unlink()

    def work() -> None:
        found = compare.run(config(), models, command=commands.eval)
        if os.environ["RANK"] == "0":
            assert found.metrics == alone.metrics
            with pytest.raises(CheckError, match=r"agreement"):
                compare.run(config(fail_under=["agreement=1.1"]), models, command=commands.eval)
        else:
            assert found.metrics == {}
            compare.run(config(fail_under=["agreement=1.1"]), models, command=commands.eval)

    assert together(work, tmp_path / "log", False) == [0, 0]
    assert (tmp_path / "page.html").exists()


KILLED = """
import os, signal, sys, time
from mambactl.cli import main
from mambactl.evaluation import fidelity
real, calls = fidelity._measure_batch, []
def lethal(*given):
    calls.append(given)
    if os.environ["RANK"] == "{rank}" and len(calls) == 2:
        if "{how}" == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("no more")
    time.sleep(0.3)
    return real(*given)
fidelity._measure_batch = lethal
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(0, "killed"), (1, "killed"), (1, "failed")])
def test_a_process_that_ends_early_ends_all_and_nothing_is_kept(folder, sets, tmp_path, rank, how):
    own = tmp_path / "student"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("results"))
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    words = ["eval", str(own), "--data", sets["words"], "--device", "cpu", "--max-length", "32"]
    words += ["--batch-size", "1", "--report", str(tmp_path / "page.html")]
    command = [sys.executable, "-c", KILLED.format(rank=rank, how=how), *words]
    said = (
        f"process {rank} of the run was killed by SIGKILL" if how == "killed" else "out of memory"
    )
    began = time.monotonic()
    with pytest.raises(RunFailure, match=said):
        run_processes(command, dict(os.environ), 2)
    assert time.monotonic() - began < 60
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_the_command_line_shows_one_run(folder, sets, tmp_path):
    own = tmp_path / "student"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("results"))
    command = [sys.executable, "-m", "mambactl", "eval", str(own), "--data", sets["words"]]
    command += ["--device", "cpu", "--max-length", "32", "--batch-size", "2"]
    single = subprocess.run([*command, "--json"], capture_output=True, text=True)
    several = subprocess.run([*command, "--json", "--nproc", "2"], capture_output=True, text=True)
    assert (single.returncode, several.returncode) == (0, 0), several.stderr
    assert single.stdout == several.stdout
    assert several.stderr.count("eval: 2 processes") == several.stderr.count("kept in") == 1
    assert several.stderr.count("per token") == 1
    command += ["--nproc", "2"]
    failed = subprocess.run(
        [*command, "--fail-under", "agreement=1.1"], capture_output=True, text=True
    )
    assert (failed.returncode, failed.stdout, failed.stderr.count("error:")) == (7, "", 1)
    device = subprocess.run([*command, "--device", "cuda:1"], capture_output=True, text=True)
    assert (device.returncode, device.stderr.count("error:")) == (2, 1)
    assert "--nproc 2 does not fit --device cuda:1" in device.stderr
