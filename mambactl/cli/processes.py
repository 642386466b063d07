"""`--nproc N`: this command N times, as one run with one result, one message and one exit code."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mambactl import console
from mambactl.errors import ExitCode, MambactlError, ResourceError, UsageError
from mambactl.files import recipe_folder
from mambactl.options import LaunchConfig, StageConfig
from mambactl.options.fields import settings
from mambactl.ranks import REPORTS, child_environment, processes

# seconds for the other processes to say what they met once one has failed, and to end
GRACE = 5.0
POLL = 0.05
# processes of a core; tests and tries take more than one
MOST_PER_CORE = 4
# of a GPU's memory; the rest is for activations
WEIGHTS_SHARE = 0.6


class Report(NamedTuple):
    """Failure of one process of a run; `echo` marks one that only met the end of another."""

    code: int
    message: str
    hint: str | None
    trace: str | None
    echo: bool


class RunFailure(MambactlError):
    """Failures that the processes of a run reported, with exit code and a bug's traceback."""

    def __init__(self, report: Report):
        super().__init__(report.message, report.hint)
        self.code, self.trace = report.code, report.trace


def launch(config: LaunchConfig, stage: str, models: Sequence[str], flags: Sequence[str]) -> str:
    """Run the stage in `config.nproc` processes on this machine; returns what it says on stdout.

    Raises RunFailure with the exit code of the process that failed first of itself.
    """
    _require_cores(config.processes)
    split = shards(config, models[0])
    how = "weights split over them" if split else "data parallel"
    console.log(f"{stage}: {config.processes} processes, {how}")
    # how many processes there are, each of them knows from its environment
    given = settings(config, config.launcher_options)
    command = [sys.executable, "-m", "mambactl", stage, *models, *flags, *given]
    return run_processes(command, _environment(config, split), config.processes)


def _require_cores(count: int) -> None:
    """Raise UsageError for so many processes that they would only wait for each other."""
    cores = os.cpu_count() or 1
    if count > MOST_PER_CORE * cores:
        raise UsageError(
            f"{count} processes on {cores} cores would wait for each other",
            "give --nproc the number of GPUs, or on a CPU at most that of cores",
        )


def run_processes(command: Sequence[str], environment: dict[str, str], count: int) -> str:
    """Run a command `count` times as the processes of one run; returns the main one's stdout.

    Raises RunFailure when one fails, and ends the others.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory(prefix="mambactl-") as name:
        reports = Path(name)
        shared = {**environment, **meeting, **sizes, REPORTS: name}
        children: list[subprocess.Popen] = []
        with signals_passed_to(children):
            try:
                for rank in range(count):
                    children.append(_start(command, shared, rank, reports))
                failed = _wait(children)
            finally:
                _end(children)
        if failed:
            raise RunFailure(_found(children, failed, reports))
        return (reports / "0.out").read_text("utf-8").strip()


def of_this_run(stage: str, config: StageConfig) -> StageConfig:
    """The configuration with the number of processes that this one was started with.

    Raises UsageError for a stage that several processes cannot share.
    """
    count = processes()
    if count == 1:
        return config
    if not isinstance(config, LaunchConfig):
        raise UsageError(f"{stage} runs in one process, not in {count}", f"mambactl {stage} ...")
    if config.nproc not in (None, count):
        raise UsageError(
            f"--nproc {config.nproc} in a run of {count} processes",
            "leave it out: they are counted",
        )
    return config.model_copy(update={"nproc": count})


@contextmanager
def signals_passed_to(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to children that have process groups of their own."""

    def forward(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shards(config: LaunchConfig, source: str) -> bool:
    """Return True if weights are split; raises a MambactlError for processes that cannot be had."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--nproc {config.processes} does not fit --device {config.device}",
            "use cpu, cuda or auto; CUDA_VISIBLE_DEVICES chooses among GPUs",
        )
    asked = config.splits_weights
    if _on_cpu(config):
        return bool(asked)
    import torch

    from mambactl.checkpoint.contents import describe

    if (there := torch.cuda.device_count()) < config.processes:
        raise ResourceError(
            f"--nproc {config.processes} needs as many GPUs, this machine has {there}",
            f"--nproc {there}, or several machines: recipes/launch/nodes.yaml"
            if there > 1
            else "leave --nproc out, or use --device cpu",
        )
    if asked is not None:
        return asked
    room = WEIGHTS_SHARE * torch.cuda.get_device_properties(0).total_memory
    return config.parameter_bytes * describe(source)["parameters"] > room


def _on_cpu(config: LaunchConfig) -> bool:
    if config.device != "auto":
        return config.device == "cpu"
    import torch

    return not torch.cuda.is_available()


def _environment(config: LaunchConfig, split: bool) -> dict[str, str]:
    environment = child_environment()
    if _on_cpu(config):
        # a GPU that is there would be taken for what is sharded
        environment["CUDA_VISIBLE_DEVICES"] = ""
        cores = os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.processes)))
    return environment | (sharding() if split else {})


def sharding() -> dict[str, str]:
    """The FSDP2 settings of recipes/launch/gpus.yaml as `accelerate launch` hands them on."""
    import yaml

    content = yaml.safe_load((recipe_folder() / "launch" / "gpus.yaml").read_text("utf-8"))
    found = {"ACCELERATE_USE_FSDP": "true"}
    for key, value in content["fsdp_config"].items():
        name = key.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")
        found[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(
    command: Sequence[str], environment: dict[str, str], rank: int, reports: Path
) -> subprocess.Popen:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with (reports / f"{rank}.out").open("wb") as out, (reports / f"{rank}.err").open("wb") as err:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            # the main one speaks for all
            stderr=None if rank == 0 else err,
            env=environment | own,
            # a signal reaches each of them once, through us
            process_group=0,
        )


def _wait(children: Sequence[subprocess.Popen]) -> list[int]:
    """The processes that failed, first ones first, once all ended or had some time to notice."""
    failed: list[int] = []
    deadline = 0.0
    while any(child.poll() is None for child in children):
        if failed and time.monotonic() > deadline:
            break
        time.sleep(POLL)
        if not failed and (failed := _failed(children)):
            deadline = time.monotonic() + GRACE
    return list(dict.fromkeys([*failed, *_failed(children)]))


def _failed(children: Sequence[subprocess.Popen]) -> list[int]:
    return [rank for rank, child in enumerate(children) if child.poll()]


def _end(children: Sequence[subprocess.Popen]) -> None:
    """Kill what is left: without all of them none can go on, nor answer while it waits."""
    for child in children:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                child.kill()
    for child in children:
        child.wait()


def _found(children: Sequence[subprocess.Popen], failed: Sequence[int], reports: Path) -> Report:
    """The report that tells most: not an echo, no bug that may be one, of the lowest rank."""
    given = {}
    for rank in range(len(children)):
        if (file := reports / f"{rank}.json").exists():
            given[rank] = Report(**json.loads(file.read_text("utf-8")))
    if true := [report for report in given.values() if not report.echo]:
        return min(true, key=lambda report: report.code == ExitCode.BUG)
    silent = [rank for rank in failed if rank not in given]
    rank = (silent or failed)[0]
    return _unreported(rank, children[rank].returncode, reports)


def _unreported(rank: int, code: int, reports: Path) -> Report:
    number = -code if code < 0 else code - 128
    if number in (signal.SIGINT, signal.SIGTERM):
        # before it could save anything, or asked for a second time
        return Report(128 + number, f"stopped by {signal.Signals(number).name}", None, None, False)
    tail = (reports / f"{rank}.err").read_text("utf-8", errors="replace")[-4000:]
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    hint = "if memory ran out: a smaller --batch-size, or in training --shard" if code < 0 else None
    message = f"process {rank} of the run {ended}" + (f":\n{tail.rstrip()}" if tail else "")
    return Report(ExitCode.RESOURCE, message, hint, None, False)
