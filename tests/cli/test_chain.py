"""The command line with the real stages on a tiny Llama: pipes, resume, signals, inspection."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import WORDS

from mambactl.cli import pipeline

MAMBACTL = f"{sys.executable} -m mambactl"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(WORDS[start:] + WORDS[:start])} for start in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pipe_of_four_stages_ends_with_one_path(child, tiny_llama_dir, text, tmp_path) -> None:
    training = "--max-steps 2 --batch-size 1 --max-length 32"
    done = child(
        "bash",
        "-c",
        f"""set -o pipefail
        {MAMBACTL} convert {tiny_llama_dir} --ratio 0.5 --json | tee convert.json \
        | {MAMBACTL} distill - --data {text} {training} -o t.st \
        | {MAMBACTL} eval - --data {text} --max-length 32 \
        | {MAMBACTL} spec-decode --draft ngram --max-new-tokens 4 -p "the old king" --check --json
        """,
    )
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    assert json.loads(done.out)["checkpoint"] == str(tmp_path / "t.st")
    converted = json.loads((tmp_path / "convert.json").read_text())["checkpoint"]
    assert (Path(converted) / "config.json").is_file()
    # distill and eval need no --teacher, and say whom they follow
    for student in (converted, tmp_path / "t.st"):
        assert done.err.count(f"teacher: {tiny_llama_dir} (lineage of {student})\n") == 1
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == []


def test_a_failing_first_stage_gives_three_then_four(child, tmp_path) -> None:
    done = child(
        "bash",
        "-c",
        f"{MAMBACTL} convert ./missing | {MAMBACTL} sft - --data x | {MAMBACTL} eval - --data x;"
        'echo "${PIPESTATUS[@]}"',
    )
    assert done.out == "3 4 4\n"
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_resume_accepts_what_is_done_and_nothing_else(cli, tiny_llama_dir, tmp_path) -> None:
    given = ("convert", str(tiny_llama_dir), "--ratio", "0.5", "-o", "t.st")
    assert cli(*given).out == f"{tmp_path / 't.st'}\n"
    before = (tmp_path / "t.st").stat()
    again = cli(*given, "--resume")
    assert (again.code, again.out) == (0, f"{tmp_path / 't.st'}\n")
    after = (tmp_path / "t.st").stat()
    # not when it was last read: reading it is allowed
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    other = cli(*given, "--resume", "--ratio", "0.75")
    assert (other.code, other.out) == (5, "")
    assert "ratio 0.5 -> 0.75" in other.err
    assert cli(*given).code == 5
    assert cli(*given, "--force").code == 0


def test_inspect_reads_headers(cli, tiny_llama_dir, tmp_path) -> None:
    assert cli("convert", str(tiny_llama_dir), "--form", "portable", "-o", "t.st").code == 0
    shown = cli("inspect", "t.st", "--tensors").out
    for part in ("mamba2 layers", "attention layers", "per token", "convert", "A_log"):
        assert part in shown
    teacher = json.loads(cli("inspect", str(tiny_llama_dir), "--json").out)
    size = ("--batch-size", "3", "--input-len", "300", "-k", "4")
    student = json.loads(cli("inspect", "t.st", *size, "--json").out)
    assert student["stages"] == ["convert"]
    # two of four attention layers are left, and two layers have a state instead
    assert 2 * student["cache"]["bytes_per_token"] == teacher["cache"]["bytes_per_token"] == 1024
    assert student["cache"]["bytes_per_sequence"] > teacher["cache"]["bytes_per_sequence"] == 0
    session, parts = student["session"], student["session"]["bytes"]
    assert (session["rows"], session["capacity"], session["k"]) == (3, 512, 4)
    assert parts["kv"] == 3 * 512 * student["cache"]["bytes_per_token"]
    assert parts.pop("total") == sum(parts.values())
    assert parts["rings"] > 0 and parts["states"] > 0 == parts["windows"]
    shown = cli("inspect", "t.st", *size).out
    assert "3 x 300 tokens, k = 4: memory for 3 x 512" in shown
    assert f"{parts['states']:,}" in shown and "rings of projections" in shown
    assert cli("inspect", "t.st", "-k", "33").code == 2


def test_dry_run_of_the_real_convert_writes_nothing(cli, tiny_llama_dir, tmp_path) -> None:
    done = cli("convert", str(tiny_llama_dir), "--dry-run")
    assert (done.code, done.out) == (0, "")
    assert "convert would run with" in done.err and str(tmp_path) in done.err
    planned = json.loads(cli("convert", str(tiny_llama_dir), "--dry-run", "--json").out)
    assert planned["out"].startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_what_is_live(cli) -> None:
    found = json.loads(cli("doctor", "--deep", "--json").out)
    assert found["kernels"][0] == ["reference (PyTorch)", None]
    assert found["packages"]["torch"] != "missing"
    kernels = dict(found["kernels"])
    assert "prefill, training: mamba-ssm" in kernels
    if not torch.cuda.is_available():
        assert kernels["prefill, training: triton"] == "needs a CUDA device"
        assert kernels["decode: triton, CUDA graphs"] == "needs a CUDA device"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_recipe_hands_signals_to_its_stage_and_waits(number, tmp_path) -> None:
    ready = tmp_path / "ready"
    waiting = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (time.sleep(0.2), print('saved'), sys.exit(9)))\n"
        f"open({str(ready)!r}, 'w').close(); time.sleep(30)"
    )

    def stop_when_ready() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=stop_when_ready)
    sender.start()
    assert pipeline._child([sys.executable, "-c", waiting]) == (9, "saved\n")
    sender.join()
