"""Run a command and watch it: seconds, and the most memory, GPU memory and disk that it took.

Memory is sampled four times a second: of the command with all that it started, of the GPU that had
the most more than before, and of some folders.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PERIOD = 0.25
# last lines of a command that are kept, and among which its error is looked for
TAIL = 12


@dataclass
class Peak:
    """The most bytes that were seen: of processes, of one GPU, and of files."""

    host: int = 0
    gpu: int | None = None
    disk: int = 0

    def see(self, host: int, gpu: int | None, disk: int) -> None:
        """Raise each to what was found."""
        self.host, self.disk = max(self.host, host), max(self.disk, disk)
        if gpu is not None:
            self.gpu = max(self.gpu or 0, gpu)


@dataclass
class Row:
    """One stage: how long it took and what it held, and what it printed as JSON."""

    stage: str
    command: str
    seconds: float
    code: int
    peak: Peak
    result: dict = field(default_factory=dict)
    note: str = ""


class Sampler:
    """Measures a process with its children, the GPUs and some folders while a block runs."""

    def __init__(self, folders: Sequence[Path]):
        self._folders, self._before = folders, gpu_bytes()

    def watch(self, pid: int, peak: Peak, done: threading.Event) -> None:
        """Sample until `done`."""
        while not done.wait(PERIOD):
            self.see(pid, peak)

    def see(self, pid: int | None, peak: Peak) -> None:
        """Take one sample."""
        used = gpu_bytes()
        more = [max(0, now - then) for now, then in zip(used, self._before, strict=False)]
        host = sum(map(process_bytes, tree_of(pid))) if pid is not None else 0
        peak.see(host, max(more, default=None), sum(map(folder_bytes, self._folders)))


def gpus(what: str) -> list[str]:
    """A fact about every GPU, as nvidia-smi names it; none where there is none."""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.splitlines()


def gpu_bytes(which: str = "used") -> list[int]:
    """Bytes in use on every GPU, or its `total`."""
    return [int(line) << 20 for line in gpus(f"memory.{which}") if line.isdigit()]


def tree_of(pid: int) -> list[int]:
    """A process and all that it started."""
    found, waiting = [], [pid]
    while waiting:
        found.append(each := waiting.pop())
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                waiting += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def process_bytes(pid: int) -> int:
    """Memory of a process without files that it maps, which the system can drop."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    own = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(own))


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder on its disk; a file of two names counts once."""
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))
            except OSError:
                continue
            sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def say(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def run(
    name: str,
    words: Sequence[str],
    folders: Sequence[Path],
    limit: float,
    heard: Callable[[str], None] | None = None,
    beside: Callable[[int, threading.Event], None] | None = None,
) -> Row:
    """Run one command to its end, or for `limit` seconds.

    `heard` gets every line of its standard error. `beside` runs in a thread with its process number
    and an event that is set when it has ended.
    """
    say(f"== {name}: {' '.join(words)}")
    sampler, peak, done = Sampler(folders), Peak(), threading.Event()
    line = [sys.executable, "-m", *words] if words[0] == "mambactl" else list(words)
    started = time.monotonic()
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    tail: deque[str] = deque(maxlen=TAIL)
    threads = [
        threading.Thread(target=sampler.watch, args=(process.pid, peak, done)),
        threading.Thread(target=_echo, args=(process.stderr, tail, heard)),
    ]
    if beside is not None:
        threads.append(threading.Thread(target=beside, args=(process.pid, done)))
    timer = threading.Timer(limit, kill_tree, (process.pid,))
    for thread in (*threads, timer):
        thread.start()
    try:
        out = process.stdout.read() if process.stdout else ""
        code = process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        raise
    finally:
        timer.cancel()
        done.set()
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - started
    sampler.see(None, peak)
    row = Row(name, " ".join(words), seconds, code, peak, parsed(out))
    if code:
        row.note = f"stopped after {limit:g} s" if code == -signal.SIGKILL else reason_in(tail)
    return row


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started, which may have groups of their own."""
    for each in tree_of(pid):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _echo(
    lines: Iterable[str], tail: deque[str], heard: Callable[[str], None] | None = None
) -> None:
    for line in lines:
        sys.stderr.write(line)
        tail.append(line.rstrip())
        if heard is not None:
            heard(line)


def reason_in(lines: Sequence[str]) -> str:
    """The error among the last lines of a command, or the last line."""
    told = [parsed(line).get("error") for line in lines]
    return next(filter(None, reversed(told)), lines[-1] if lines else "failed")


def parsed(text: str) -> dict:
    """The object that `--json` printed."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
