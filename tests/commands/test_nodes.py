"""`recipes/launch/nodes.yaml`: two machines, here two launchers on one, and the loss of one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_sentences

from mambactl.files import recipe_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a launcher would take the GPU"),
]
SIZES = ("--batch-size", "1", "--max-length", "32", "--warmup", "1", "--device", "cpu")


def children(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def launchers(words: list[str], folder: Path) -> list[subprocess.Popen]:
    """One launcher for each of two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = recipe_folder() / "launch" / "nodes.yaml"
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    line += ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    line += ["--main_process_port", str(port)]
    started = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("w") as log:
            ranked = ["--machine_rank", str(rank), "-m", "mambactl", *words]
            run = subprocess.Popen([*line, *ranked], stdout=log, stderr=log, cwd=folder)
        started.append(run)
    return started


@pytest.fixture
def words(tmp_path: Path, save_student, monkeypatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    student = save_student(tmp_path / "student")
    data = write_sentences(tmp_path / "text.jsonl", 1, 40)
    return ["sft", str(student), "--data", data, *SIZES, "--save-every", "2", "-o", "out"]


def test_a_lost_machine_leaves_a_run_that_resumes(words: list[str], tmp_path: Path) -> None:
    long = [*words, "--max-steps", "100", "--resume"]
    one, other = launchers(long, tmp_path)
    try:
        deadline = time.monotonic() + 120
        kept = tmp_path / "out.partial"
        while not list(kept.glob("trainer/checkpoint-*/trainer_state.json")):
            said = (tmp_path / "0.log").read_text()
            assert time.monotonic() < deadline and one.poll() is None, said
            time.sleep(0.1)
        for pid in children(other.pid):
            os.kill(pid, signal.SIGKILL)
        assert one.wait(60) != 0
    finally:
        for each in (one, other):
            each.kill()
            each.wait()
    assert kept.exists() and not (tmp_path / "out").exists()
    again = launchers(long, tmp_path)
    codes = [each.wait(240) for each in again]
    log = (tmp_path / "0.log").read_text()
    assert codes == [0, 0], log
    assert (tmp_path / "out").exists() and not kept.exists()
