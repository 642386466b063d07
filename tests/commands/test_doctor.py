"""`doctor` without loading anything: its lines, and its patience with a driver."""

import json
import sys
import time
from pathlib import Path

import pytest

from mambactl.commands.doctor import driver_devices

ANSWER = "0, NVIDIA H200, 143771, 9.0, 570.1"


def program(tmp_path: Path, code: str) -> list[str]:
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!{sys.executable} -S\n{code}\n")
    path.chmod(0o755)
    return [str(path)]


def test_versions_and_devices_of_this_machine(cli) -> None:
    found = json.loads(cli("doctor", "--json").out)
    assert found["packages"]["torch"] != "missing" and found["devices"]["cpu cores"]
    assert "kernels" not in found
    assert "mambactl doctor --deep" in cli("doctor").out


@pytest.mark.parametrize(
    ("value", "said"),
    [("mamba-ssm", "changes nothing on a CPU"), ("mambassm", "is none of auto, reference")],
)
def test_kernels_that_the_environment_asks_for(cli, monkeypatch, value, said) -> None:
    monkeypatch.setenv("MAMBACTL_KERNELS", value)
    assert "MAMBACTL_KERNELS" in (shown := cli("doctor").out)
    assert ("on a CPU it changes nothing" if value == "mamba-ssm" else said) in shown
    done = cli("convert", "no-such-folder/x", "-o", "t.st")
    assert (said in done.err) == (done.code == 2) == (value == "mambassm")


@pytest.mark.parametrize("kept", [False, True])
def test_python_that_keeps_no_bytecode(cli, monkeypatch, kept) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", not kept)
    assert ("unset PYTHONDONTWRITEBYTECODE" in cli("doctor").out) == (not kept)


def test_what_the_driver_says(tmp_path) -> None:
    found = driver_devices(program(tmp_path, f"print({ANSWER!r})"))
    about = "NVIDIA H200, 140 GiB, compute capability 9.0, driver 570.1"
    assert found == {"gpu:0": about}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('No devices were found'); raise SystemExit(6)", "No devices were found"),
        ("raise SystemExit(9)", "exit code 9"),
        ("print('0, a, b')", "0, a, b"),
        ("", "none"),
    ],
)
def test_a_driver_that_names_none(tmp_path, code, said) -> None:
    assert said in driver_devices(program(tmp_path, code))["gpu"]


def test_a_driver_that_hangs_is_not_waited_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mambactl.commands.doctor.PATIENCE", 0.2)
    started = time.monotonic()
    found = driver_devices(program(tmp_path, "import time; time.sleep(60)"))
    assert "did not answer" in found["gpu"] and time.monotonic() - started < 20


def test_no_driver_at_all() -> None:
    assert driver_devices(["no-such-program"]) == {"gpu": "no nvidia-smi here"}
