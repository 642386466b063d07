"""`generate --dataset --nproc N`: the bytes and the counts of one process, killed or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fixtures.shared_runs import together

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.cli.processes import RunFailure, run_processes
from mambactl.commands import generate
from mambactl.data.answers import Answer
from mambactl.errors import OutputError, UsageError
from mambactl.generation import dataset
from mambactl.generation.answer_files import OtherAnswers, WrittenAnswers
from mambactl.generation.dealing import Deal
from mambactl.options import GenerateConfig

# a process that has used a GPU cannot be forked
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")

WORDS = ["old", "new", "red", "blue", "small", "large", "king", "queen", "tree", "bird"]
SAMPLED = {"temperature": 1.0, "samples_per_prompt": 2, "skip_bad_rows": True}
CLOCK = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    """Ten prompts, one of two turns, a repeat and a row that is none."""
    rows = [{"id": n, "prompt": " ".join(WORDS[: n + 1])} for n in range(9)]
    rows.insert(4, {"id": 9, "turns": ["the old house", "the new house"]})
    rows += [{"id": 10, "prompt": "old"}, {"id": 11, "prompt": ""}]
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(prompts: str, **options: object) -> GenerateConfig:
    fields = {"max_new_tokens": 8, "batch_size": 3, "keep_unfinished": True, "skip_bad_rows": True}
    return GenerateConfig(**{"dataset": [prompts], "device": "cpu", **fields, **options})


def answer_all(prompts: str, model: str, folder: Path, **again: bool) -> dict[str, object]:
    """The counts of a greedy run, and of a sampled one of a part."""
    found = {}
    for name, options in {"greedy": {}, "sampled": {**SAMPLED, "shard": "1/2"}}.items():
        out = folder / f"{name}.jsonl"
        metrics = generate.run(config(prompts, **options), model, out, **again).metrics
        found[name] = {key: value for key, value in metrics.items() if key not in CLOCK}
    return found


def test_two_processes_write_the_bytes_of_one(prompts, tiny_llama_dir, tmp_path, monkeypatch):
    """The main one answers its first batch last, so that all others are ahead of it."""
    model, one, two = str(tiny_llama_dir), tmp_path / "one", tmp_path / "two"
    two.mkdir()
    alone = answer_all(prompts, model, one)
    real = dataset._Decoder.answer

    def later(self, batch, meter):
        found = real(self, batch, meter)
        rank = os.environ["RANK"]
        (two / f"{rank}-{len(list(two.glob(f'{rank}-*')))}").touch()
        runs = 1 + (two / "greedy.jsonl").exists()
        deadline = time.monotonic() + 60
        while rank == "0" and len(list(two.glob("1-*"))) < runs and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    monkeypatch.setattr(dataset._Decoder, "answer", later)

    def work() -> None:
        found = answer_all(prompts, model, two)
        if os.environ["RANK"] == "0":
            (two / "counts").write_text(json.dumps(found))

    assert together(work, tmp_path / "log", shard=False) == [0, 0]
    assert json.loads((two / "counts").read_text()) == alone
    assert alone["greedy"]["bad_rows"] == 1
    for name in ("greedy.jsonl", "sampled.jsonl"):
        assert (two / name).read_bytes() == (one / name).read_bytes() != b""
    assert list(two.glob("0-*"))
    assert len(list(two.glob("1-*"))) >= 2
    assert not list(two.glob("*.partial"))


def test_a_batch_waits_for_its_number_and_belongs_to_its_run(tmp_path):
    folder = RunFolder(tmp_path / "a.jsonl", {})
    folder.path.mkdir()
    answers = [(0, Answer(0, ("red",), "eos", 1, 0.0))]
    other = OtherAnswers(folder, "this")
    written = WrittenAnswers(folder, "this")
    with written.file:
        other.add(1, answers, {"tokens": 1})
        OtherAnswers(folder, "an earlier one").add(2, answers, {"tokens": 1})
        torn = folder.batch(3)
        other.add(3, answers, {"tokens": 1})
        torn.write_bytes(torn.read_bytes()[:-1])
        written.gather()
        assert (written.batches, written.left(5)) == (0, [0, 2, 3, 4])
        assert folder.resumable
        written.add(0, answers, {"tokens": 5})
        assert (written.batches, written.left(5)) == (2, [2, 3, 4])
        assert not folder.batch(1).exists()
        with pytest.raises(OutputError, match="batch-00002.jsonl is damaged or gone"):
            written.require_all(5)
    # and is not lost with the process that gathered it
    again = WrittenAnswers(folder, "this")
    with again.file:
        assert (again.batches, dict(again.totals)) == (2, {"tokens": 6})
        assert len(again.file.read()) == 0


def test_one_process_is_dealt_every_batch_in_order():
    deal = Deal()
    assert list(deal.numbers([3, 5, 6])) == [3, 5, 6]
    assert (deal.done(2), deal.done(3), deal.done(), list(deal.others())) == (2, 3, 0, [])


def test_processes_go_with_a_data_set():
    with pytest.raises(UsageError, match="--nproc goes with --dataset"):
        GenerateConfig(prompt="a", nproc=2).require_coherent()


KILLED = """
import os, signal, sys, time
from mambactl.cli import main
from mambactl.generation import dataset
real, calls = dataset._Decoder.answer, []
def lethal(self, batch, meter):
    calls.append(batch)
    if len(calls) == 2 and os.environ["RANK"] == "{rank}":
        open("{marker}", "w").close()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    while len(calls) == 2 and not os.path.exists("{marker}"):
        time.sleep(0.01)
    time.sleep(0.3)
    return real(self, batch, meter)
dataset._Decoder.answer = lethal
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_leaves_what_any_number_resumes(
    prompts, tiny_llama_dir, tmp_path, rank
):
    model, one, out = str(tiny_llama_dir), tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    sampled = config(prompts, **SAMPLED)
    whole = generate.run(sampled, model, one).metrics
    words = ["generate", model, "--dataset", prompts, "--device", "cpu", "--max-new-tokens", "8"]
    words += ["--batch-size", "3", "--keep-unfinished", "--skip-bad-rows", "--temperature", "1"]
    words += ["--samples-per-prompt", "2", "-o", str(out)]
    command = [sys.executable, "-c", KILLED.format(rank=rank, marker=tmp_path / "second"), *words]
    began = time.monotonic()
    with pytest.raises(RunFailure, match=f"process {rank} of the run was killed by SIGKILL") as end:
        run_processes(command, dict(os.environ), 2)
    assert end.value.code == 6
    assert time.monotonic() - began < 60
    partial = out.with_name("two.jsonl.partial")
    assert not out.exists()
    with pytest.raises(OutputError, match="unfinished run"):
        generate.run(sampled, model, out)
    copy = tmp_path / "three.jsonl"
    shutil.copytree(partial, copy.with_name("three.jsonl.partial"))
    metrics = generate.run(sampled, model, out, resume=True).metrics
    assert out.read_bytes() == one.read_bytes()
    assert {k: v for k, v in metrics.items() if k not in CLOCK} == {
        k: v for k, v in whole.items() if k not in CLOCK
    }
    resumed = together(
        lambda: generate.run(sampled, model, copy, resume=True), tmp_path / "log", False, 3
    )
    assert list(resumed) == [0, 0, 0]
    assert copy.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_the_command_line_shows_one_run(prompts, tiny_llama_dir, tmp_path):
    out = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "mambactl", "generate", str(tiny_llama_dir)]
    command += ["--dataset", prompts, "--device", "cpu", "--max-new-tokens", "8"]
    command += ["--batch-size", "3", "--keep-unfinished", "--nproc", "2", "-o", str(out)]
    bad = subprocess.run(command, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("has an empty prompt") == bad.stderr.count("error:") == 1
    command += ["--skip-bad-rows"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert done.stderr.count(" rows of ") == done.stderr.count("generate: 2 processes") == 1
    generate.run(config(prompts), str(tiny_llama_dir), tmp_path / "one.jsonl")
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    taken = subprocess.run(command, capture_output=True, text=True)
    assert (taken.returncode, taken.stderr.count("error:")) == (5, 1)


@pytest.mark.slow
def test_a_signal_ends_all_and_leaves_a_state(prompts, tiny_llama_dir, tmp_path):
    out = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "mambactl", "generate", str(tiny_llama_dir), "--nproc", "2"]
    command += ["--dataset", prompts, "--device", "cpu", "--max-new-tokens", "200", "--ignore-eos"]
    command += ["--samples-per-prompt", "60", "--temperature", "1", "--skip-bad-rows"]
    command += ["--keep-unfinished", "-o", str(out)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "a.jsonl.partial" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    said, told = run.communicate(timeout=60)
    assert (run.returncode, said) == (143, ""), told
    assert "--resume continues where it stopped" in told
    assert state.exists()
    assert not out.exists()
