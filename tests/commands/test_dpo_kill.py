"""A DPO run that is killed without a word ends where it would have ended."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import WORDS

from mambactl.commands.dpo import run
from mambactl.options import DpoConfig


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_end(save_student, tmp_path):
    student = str(save_student(tmp_path / "student"))
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} {b}", "chosen": f"the {b}", "rejected": f"old {a} night"}
        for a in WORDS[:6]
        for b in WORDS[6:12]
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "max_steps": 40,
        "batch_size": 2,
        "max_length": 32,
        "save_every": 5,
        "lr": 1e-3,
        "eval_share": 0.2,
        "eval_every": 10,
    }
    out = tmp_path / "killed"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in fields.items()]
    command = ["dpo", student, "--data", str(data), "-o", str(out), "--device", "cpu", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "mambactl", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    trainer = tmp_path / "killed.partial" / "trainer"
    while process.poll() is None and not list(trainer.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not out.exists()

    config = DpoConfig(device="cpu", data=[str(data)], **fields)
    resumed = run(config, student, out, resume=True).metrics
    whole = run(config, student, tmp_path / "whole").metrics
    assert resumed["dpo"]["steps"] == whole["dpo"]["steps"] == 40
    for key in ("first_loss", "last_loss"):
        assert resumed["dpo"][key] == pytest.approx(whole["dpo"][key], abs=1e-6)
    for key in ("reward_margin", "kl_to_reference"):
        ours, theirs = (found["held_out"]["pairs"][key] for found in (resumed, whole))
        assert ours == pytest.approx(theirs, abs=1e-6)
    logs = [
        (place / "metrics.jsonl").read_text().splitlines() for place in (out, tmp_path / "whole")
    ]
    assert len(logs[0]) == len(logs[1]) == 40
