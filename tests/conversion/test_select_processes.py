"""`convert --select --nproc N`: the choice, its record and the weights of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fixtures.shared_runs import others_first, together

from mambactl.checkpoint.load import load_lineage
from mambactl.cli.processes import RunFailure, run_processes
from mambactl.commands.convert import plan, run
from mambactl.conversion import ranking
from mambactl.errors import UsageError
from mambactl.options import ConvertConfig

# a process that has used a GPU cannot be forked
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a GPU forbids")


@pytest.fixture(scope="module")
def aligned(llama, text, tmp_path_factory) -> str:
    """A checkpoint in which every layer is replaced."""
    out = tmp_path_factory.mktemp("aligned") / "all.st"
    run(config(ratio=1, by="layer"), llama, out)
    return str(out)


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    """Groups of candidates that this process measured; the main process lets others go first."""
    others_first(monkeypatch)
    scores, done = ranking._Walk.scores, []

    def counted(self, candidates, advance):
        done.append(list(candidates))
        return scores(self, candidates, advance)

    monkeypatch.setattr(ranking._Walk, "scores", counted)
    return done


def config(**fields) -> ConvertConfig:
    return ConvertConfig(device="cpu", max_length=64, **{"select_tokens": 256, **fields})


def asked(way: str, text: str, aligned: str) -> ConvertConfig:
    recall = {"select": "recall", "select_recall": 96}
    ways = {
        "swaps": {"by": "layer", "calibrate": [text], "calibrate_tokens": 512, **recall},
        "addition": {"by": "layer", "mixers_from": aligned, "select_data": [text], **recall},
        "heads": {"by": "head", "ratio": 0.75, "select": "recall", "select_recall": 256},
        "text": {"by": "layer", "calibrate": [text], "select": "kl"},
    }  # fmt: skip
    return config(**ways[way])


@pytest.mark.parametrize(
    "way",
    ["swaps", "addition", *(pytest.param(w, marks=pytest.mark.slow) for w in ("heads", "text"))],
)
def test_processes_choose_what_one_chooses(way, llama, text, aligned, tmp_path, groups):
    """Two processes, and more of them than there is to measure."""
    one = tmp_path / "one.st"
    alone = run(asked(way, text, aligned), llama, one).metrics
    count = 2 if way != "addition" else 3
    groups.clear()

    def work() -> None:
        found = run(asked(way, text, aligned), llama, tmp_path / "several.st")
        rank = os.environ["RANK"]
        (tmp_path / f"{rank}.json").write_text(json.dumps(found.metrics))
        (tmp_path / f"{rank}.groups").write_text(json.dumps(len(groups)))

    assert together(work, tmp_path / "log", False, count) == [0] * count
    assert (tmp_path / "0.json").read_text() == json.dumps(alone)
    measured = [int((tmp_path / f"{rank}.groups").read_text()) for rank in range(count)]
    assert min(measured[:2]) > 0
    several = tmp_path / "several.st"
    records = [load_lineage(str(path)) for path in (one, several)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert weights(one) == weights(several)


def weights(path) -> dict[str, bytes]:
    from mambactl.checkpoint.load import open_checkpoint

    with open_checkpoint(str(path)) as reader:
        return {name: bytes(reader.get(name).numpy().tobytes()) for name in reader.names()}


def test_processes_go_with_a_measurement(llama, text):
    with pytest.raises(UsageError, match="--nproc shares what --select measures"):
        plan(config(calibrate=[text], nproc=2), llama)


KILLED = """
import os, signal, sys
from mambactl.cli import main
from mambactl.conversion import ranking
real = ranking._Walk.scores
def lethal(*given):
    if os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
ranking._Walk.scores = lethal
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_process_ends_all_and_leaves_nothing(llama, text, tmp_path):
    out = tmp_path / "out.st"
    words = ["convert", llama, "--by", "layer", "--select", "kl", "--select-data", text]
    words += ["--device", "cpu", "--max-length", "64", "-o", str(out)]
    command = [sys.executable, "-c", KILLED.format(rank=1), *words]
    with pytest.raises(RunFailure, match="process 1 of the run was killed by SIGKILL"):
        run_processes(command, dict(os.environ), 2)
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-m", "mambactl", *words, "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert done.stderr.count("convert: 2 processes") == done.stderr.count("replaced 2 att") == 1
