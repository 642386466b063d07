"""Ways to run the command line: in this process with made-up stages, or as a child process."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mambactl.cli.main import run
from mambactl.stage_result import StageResult

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd, monkeypatch, tmp_path) -> Callable[..., Outcome]:
    """cli("convert", "x", stdin=text) -> Outcome, in this process and an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(list(arguments))
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def fake_stage(monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """fake_stage(name, text=None, raises=None) -> the calls it gets; it writes a file at `out`."""

    def make(
        name: str, text: str | None = None, raises: BaseException | None = None
    ) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def stage_run(config: Any, source: str, out: Path | None = None, **how: bool):
            calls.append({"config": config, "source": source, "out": out, **how})
            os.write(1, b"noise of a C library\n")
            if raises is not None:
                raise raises
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text("weights")
            return StageResult(str(out or source), {"loss": 1.5}, text)

        def plan(config: Any, source: str) -> dict[str, Any]:
            calls.append({"config": config, "source": source, "planned": True})
            return {"parameters": 12345}

        module = ModuleType(f"mambactl.commands.{name}")
        module.run, module.plan = stage_run, plan
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return make


@pytest.fixture
def child(tmp_path) -> Callable[..., Outcome]:
    """child("bash", "-c", script, NAME="value") -> Outcome of a child process in tmp_path."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def call(*command: str, **env: str) -> Outcome:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment | env,
            timeout=300,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def python(child) -> Callable[..., Outcome]:
    """python("-m", "mambactl", "convert") -> Outcome of a child process with this interpreter."""
    return partial(child, sys.executable)
