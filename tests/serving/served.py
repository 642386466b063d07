"""Servers as processes of their own, and requests to them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
# a machine at work takes its time to import torch
PATIENCE = 120


@dataclass
class Served:
    """The URL of the API of a server that runs."""

    url: str

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def metric(self, name: str) -> float:
        """A number of /metrics that has no labels."""
        lines = httpx.get(f"{self.root}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def eventually(self, name: str, value: float, seconds: float = 20) -> bool:
        """Return True if a metric reaches a value in time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.metric(name) == value:
                return True
            time.sleep(0.02)
        return False


def started(model: str, log: Path, *options: str, **environment: str) -> subprocess.Popen:
    """Start a server at a free port; `ready` waits for it."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    variables.pop("MAMBACTL_API_KEY", None) if "MAMBACTL_API_KEY" not in environment else None
    words = ["serve", model, "--device", "cpu", "--port", "0", *options]
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "mambactl", *words],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=variables,
            text=True,
        )


def ready(process: subprocess.Popen, log: Path) -> Served:
    """Wait for the line with the URL."""
    line = process.stdout.readline().strip()
    assert line, log.read_text()
    return Served(line)


@contextmanager
def ending(process: subprocess.Popen) -> Iterator[None]:
    """End a server with the block, whatever happens in it."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.stdout.close()


def events(response: httpx.Response) -> Iterator[dict]:
    """The events of a stream, which has to end as clients expect."""
    last = ""
    for line in response.iter_lines():
        if line:
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                yield json.loads(last)
    assert last == "[DONE]"
