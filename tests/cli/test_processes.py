"""`--nproc`: several processes look like one, whatever happens to one of them."""

import os
import signal
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from mambactl.checkpoint import contents
from mambactl.cli import processes as program
from mambactl.cli.processes import (
    RunFailure,
    _environment,
    of_this_run,
    run_processes,
    sharding,
    shards,
)
from mambactl.errors import ResourceError, UsageError
from mambactl.files import recipe_folder
from mambactl.options import BenchConfig, DistillConfig, GenerateConfig, SftConfig

FAIL = """
    from mambactl.cli import main as program
    from mambactl.errors import *
    def fail(error):
        program.sys.exit(program._report(error, *program.explain(error), []))
"""


@pytest.fixture
def spread(monkeypatch):
    """spread(script, count) -> stdout of the main one of `count` processes; RANK is `rank`."""
    head = "import os, sys, time, signal\nrank = int(os.environ['RANK'])\n"

    def run(script: str, count: int = 2) -> str:
        code = head + textwrap.dedent(FAIL) + textwrap.dedent(script)
        return run_processes([sys.executable, "-c", code], dict(os.environ), count)

    return run


def test_many_more_processes_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(UsageError, match="99 processes on 2 cores"):
        program.launch(SftConfig(nproc=99), "sft", ["s.st"], [])


def test_one_line_of_the_main_process(spread, capfd):
    line = spread("print(rank, os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'])", 3)
    assert (line, *capfd.readouterr()) == ("0 0 3", "", "")


def test_a_failure_of_all_is_one_message(spread, capfd):
    with pytest.raises(RunFailure, match="no such data") as failure:
        spread("fail(UsageError('no such data', 'look again'))", 3)
    assert (failure.value.code, failure.value.hint) == (2, "look again")
    assert capfd.readouterr().err == ""


def test_a_failure_of_one_ends_all_and_is_told(spread):
    began = time.monotonic()
    script = """
        if rank == 1:
            fail(ResourceError('out of memory', 'smaller'))
        elif rank == 0:
            time.sleep(0.3)
            fail(RuntimeError('Connection closed by peer [127.0.0.1]:1234'))
        time.sleep(600)
    """
    with pytest.raises(RunFailure, match="out of memory") as failure:
        spread(script, 3)
    assert failure.value.code == 6
    assert time.monotonic() - began < 60


def test_a_bug_comes_with_its_own_traceback(spread):
    with pytest.raises(RunFailure) as failure:
        spread("def broken(): return 1 / 0\ntry: broken()\nexcept Exception as e: fail(e)")
    assert failure.value.code == 1
    assert "in broken" in failure.value.trace


def test_a_killed_process_is_named(spread):
    script = "os.kill(os.getpid(), 9) if rank == 1 else fail(RuntimeError('got 0 bytes'))"
    with pytest.raises(RunFailure, match="process 1 of the run was killed by SIGKILL") as failure:
        spread(script)
    assert failure.value.code == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process(spread, tmp_path, number):
    script = f"""
        def stop(number, frame):
            open({str(tmp_path)!r} + f'/{{rank}}', 'w').write('saved')
            os._exit(128 + number)
        signal.signal({int(number)}, stop)
        open({str(tmp_path)!r} + f'/{{rank}}', 'w').close()
        time.sleep(600)
    """

    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(RunFailure, match=f"stopped by {number.name}") as failure:
        spread(script)
    assert failure.value.code == 128 + number
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["saved", "saved"]


def test_the_launch_configurations_are_accelerates_own():
    names = {"one": 1, "gpus": 8, "nodes": 16}
    folder = recipe_folder() / "launch"
    assert {file.stem for file in folder.glob("*.yaml")} == set(names)
    for name, count in names.items():
        config = load_config_from_file(str(folder / f"{name}.yaml"))
        assert config.num_processes == count
        assert (config.distributed_type == "FSDP") == (name != "one")
    both = [
        yaml.safe_load((folder / f"{n}.yaml").read_text())["fsdp_config"] for n in ("gpus", "nodes")
    ]
    assert both[0] == both[1]


def test_sharding_is_what_accelerate_reads(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    for name, value in sharding().items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.transformer_cls_names_to_wrap == ["HybridBlock"]
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"


@pytest.mark.parametrize(("parameters", "split"), [(1.2e9, False), (8e9, True)])
def test_weights_are_split_where_a_gpu_cannot_hold_all(monkeypatch, parameters, split):
    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(contents, "describe", lambda source: {"parameters": parameters})
    assert shards(SftConfig(device="cuda", nproc=8), "model") == split
    assert shards(SftConfig(device="cuda", nproc=8, shard=not split), "model") != split
    assert shards(DistillConfig(device="cuda", nproc=8), "model") == split
    # mixers alone have gradients and moments
    assert not shards(DistillConfig(device="cuda", nproc=8, rest_lr=0.0, stages=["align"]), "model")
    assert not shards(DistillConfig(device="cuda", nproc=8, capture=True), "model")
    with pytest.raises(ResourceError, match="this machine has 8"):
        shards(SftConfig(device="cuda", nproc=9), "model")
    with pytest.raises(UsageError, match="cuda:1"):
        shards(SftConfig(device="cuda:1", nproc=2), "model")


def test_the_number_of_processes_is_that_of_the_run(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert of_this_run("sft", SftConfig()).processes == 4
    assert of_this_run("sft", SftConfig(nproc=4)).processes == 4
    with pytest.raises(UsageError, match="--nproc 2 in a run of 4"):
        of_this_run("sft", SftConfig(nproc=2))
    with pytest.raises(UsageError, match="bench runs in one process, not in 4"):
        of_this_run("bench", BenchConfig())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert of_this_run("sft", SftConfig()).processes == 4
    assert of_this_run("distill", DistillConfig()).processes == 4


def test_the_part_of_a_set_stays_an_option_of_every_process(monkeypatch):
    seen = []
    monkeypatch.setattr(program, "run_processes", lambda command, *_: seen.extend(command) or "a")
    config = GenerateConfig(dataset=["x"], shard="1/3", nproc=2, device="cpu")
    assert program.launch(config, "generate", ["model"], ["-o", "a.jsonl"]) == "a"
    assert {'shard="1/3"', 'dataset=["x"]'} <= set(seen)
    assert not [word for word in seen if "nproc" in word]
    training = SftConfig(data=["x"], shard=True, nproc=2, device="cpu")
    program.launch(training, "sft", ["model"], [])
    assert "shard=true" not in seen


def test_processes_take_no_module_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colorsys.py").write_text("open('ran', 'w').close()\n")
    environment = _environment(SftConfig(data=["x"], device="cpu", nproc=2), split=False)
    assert run_processes([sys.executable, "-c", "import colorsys"], environment, 2) == ""
    assert not (tmp_path / "ran").exists()
