"""A process that has imported every library, and runs each command line in a fork of itself.

A fork costs a tenth of a second where a new process costs five. Requests are lines of JSON on
stdin, answers lines of JSON on stdout. No thread may run here: a fork has only the one that forks.
"""

import atexit
import gc
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import NoReturn

MAIN = "mambactl.cli.main:main"
# what commands import late: a fork would import it every time
LATE = (
    "torch._dynamo", "torch.distributed", "torch.nn.attention.flex_attention", "torch.profiler",
    "transformers.models.llama.modeling_llama", "transformers.models.mamba2.modeling_mamba2",
    "transformers.models.auto.modeling_auto", "transformers.trainer", "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer", "datasets.packaged_modules.json.json", "pyarrow.parquet", "gguf",
    "datasets.packaged_modules.parquet.parquet", "matplotlib.pyplot", "rich.table", "yaml",
    "rich.console", "typer.core", "jinja2.sandbox", "huggingface_hub.hf_api", "accelerate",
)  # fmt: skip
# other threads that may run: the allocator of pyarrow, which knows of forks
THREADS = {"jemalloc_bg_thd"}
# bytes of a file that a command may write: a disk full of rubbish stops other work
LARGEST_FILE = 1 << 30


@dataclass(frozen=True)
class Request:
    """One command line and the most that it may cost."""

    words: list[str]
    folder: str
    # files for descriptors 0, 1 and 2
    streams: tuple[str, str, str]
    cpu_seconds: int
    wall_seconds: float
    # after which a command that does nothing is taken to wait for ever
    idle_seconds: float
    address_space: int
    # where the command line starts: `module:function`
    entry: str = MAIN


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code or the signal that killed it, and what it cost."""

    code: int
    signal: int
    # why it was ended from outside: it took too long, or did nothing for too long
    late: bool
    idle: bool
    cpu_seconds: float
    wall_seconds: float
    # bytes of memory at most, over those of this process
    peak: int


def import_everything() -> None:
    """Import the package, and the libraries that its functions import."""
    import torch

    torch.set_num_threads(1)
    import mambactl

    for module in walk_packages(mambactl.__path__, "mambactl."):
        if not module.name.endswith("__main__") and ".triton" not in module.name:
            import_module(module.name)
    for name in LATE:
        import_module(name)
    # a collection in a fork would copy every page that it marks
    gc.collect()
    gc.freeze()


def serve(libraries: bool) -> None:
    """Answer requests until stdin ends, with or without libraries that are imported before."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if libraries:
        import_everything()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        print(json.dumps(asdict(answer(request))), file=answers, flush=True)


def answer(request: Request) -> Ended:
    """Run one command in a fork."""
    if others := sorted(_threads() - THREADS):
        raise RuntimeError(f"{', '.join(others)} run: a fork would have only one thread")
    size, resident = _memory()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(request, size)
    late, idle = _wait(child, request)
    # what it started is in its session, in groups of its own perhaps
    for process in _ticks(child):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return Ended(
        code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        late=late,
        idle=idle,
        cpu_seconds=used.ru_utime + used.ru_stime,
        wall_seconds=time.monotonic() - start,
        peak=max(0, (used.ru_maxrss << 10) - resident),
    )


def _threads() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {(task / "comm").read_text().strip() for task in tasks if task.name != str(os.getpid())}


def _memory() -> tuple[int, int]:
    """Bytes of this process's address space, and those in memory."""
    pages = [int(word) for word in Path("/proc/self/statm").read_text().split()]
    return pages[0] * resource.getpagesize(), pages[1] * resource.getpagesize()


def _wait(child: int, request: Request) -> tuple[bool, bool]:
    """Wait until a command ends; whether it is late instead, and whether it is idle."""
    descriptor = os.pidfd_open(child)
    start = worked = time.monotonic()
    before: dict[int, int] = {}
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(min(request.idle_seconds, 2) * 500):
            now = time.monotonic()
            if (ticks := _ticks(child)) != before:
                before, worked = ticks, now
            if now - start > request.wall_seconds:
                return True, False
            if now - worked > request.idle_seconds:
                return False, True
    finally:
        os.close(descriptor)
    return False, False


def _ticks(session: int) -> dict[int, int]:
    """Ticks of CPU time that each process of a session took."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # behind the name, which may hold anything: state, parent, group, session, ...
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found[int(path.parent.name)] = int(fields[11]) + int(fields[12])
    return found


def _become(request: Request, size: int) -> NoReturn:
    """Turn this fork into the process of a command; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(request.folder)
        modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
        for descriptor, (path, mode) in enumerate(zip(request.streams, modes, strict=True)):
            os.dup2(os.open(path, mode, 0o600), descriptor)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        # as at the start of Python: what wraps a stream must not be the end of its buffer
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        # SIGXCPU at the first limit, and SIGKILL at the second for who ignores it
        limits = (request.cpu_seconds, request.cpu_seconds + 2)
        resource.setrlimit(resource.RLIMIT_CPU, limits)
        resource.setrlimit(resource.RLIMIT_AS, (size + request.address_space,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["mambactl", *request.words]
        module, _, name = request.entry.partition(":")
        getattr(import_module(module), name)()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # the parent's files and atexit hooks are not this fork's; what it started is
        with suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve("libraries" in sys.argv)
