"""Runs a command line on hostile inputs under limits, and names each promise that it breaks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hostile.warm import MAIN, Ended, Request

from mambactl.errors import ExitCode

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
CPU_SECONDS = 20
# a machine that does other work as well takes longer
WALL_SECONDS = 180
# a process that could run gets some time in these
IDLE_SECONDS = 15
MEMORY = 2 * GIB
# more than `MEMORY`: what takes too much shall be seen to do so, without harm to the machine
ADDRESS_SPACE = 3 * GIB
# of output that is looked at
SHOWN = 1 << 20
# in the sandbox: what the library of data sets keeps of files that it read
CACHES = ("home/hub/datasets",)
# in the sandbox: what code of an input would write
SENTINEL = "code-ran"
CODES = {code for code in ExitCode if code not in (ExitCode.BUG, 130, 143)}
# all but tab and line feed
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# commands whose result is text of several lines, and not a path
TEXT = {"generate", "push", "inspect", "doctor", "table", "recipe", "spec-decode"}


@dataclass(frozen=True)
class CommandLine:
    """Words after `mambactl`, what stdin holds, and what the command may write.

    `writes` are beginnings of paths in the folder where it runs.
    """

    words: tuple[str, ...]
    stdin: bytes = b""
    writes: tuple[str, ...] = ("out",)
    # exit codes that are right; all documented ones but that of a bug where it is empty
    codes: frozenset[int] = frozenset()
    # whether the inputs are so small that nothing may run out of memory
    fits: bool = True


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command: its end, its output and the paths that it changed."""

    ended: Ended
    out: str
    err: str
    changed: tuple[str, ...]
    # bytes of all inputs
    size: int


Listing = dict[bytes, tuple[int, int, int]]


class Sandbox:
    """A folder in which commands run: `work` is emptied between them, the rest must not change."""

    def __init__(self, root: Path, libraries: bool = True):
        self.root = root
        self.work = root / "work"
        self.inputs = root / "inputs"
        self._streams = root / "streams"
        self._kept = (self._streams, root / "home", root / "tmp")
        for folder in (self.inputs, *self._kept, root / "home" / "hub"):
            folder.mkdir(parents=True)
        self._server = _start_server(root, libraries)

    def close(self) -> None:
        """End the process that commands are forked from."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def empty(self) -> None:
        """Remove what the last command worked on, and what it left elsewhere."""
        for path in {*self.root.iterdir()} - {self.inputs, *self._kept}:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.work.mkdir()

    def run(self, command: CommandLine, entry: str = MAIN) -> Outcome:
        """Run a command in `work`."""
        stdin, out, err = (self._streams / name for name in ("stdin", "stdout", "stderr"))
        stdin.write_bytes(command.stdin)
        out.unlink(missing_ok=True)
        err.unlink(missing_ok=True)
        before = self._listing()
        size = sum(length for _, length, _ in before.values())
        request = Request(
            list(command.words), str(self.work), (str(stdin), str(out), str(err)),
            CPU_SECONDS, WALL_SECONDS, IDLE_SECONDS, ADDRESS_SPACE + size, entry,
        )  # fmt: skip
        self._server.stdin.write(json.dumps(asdict(request)) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("the process that commands are forked from ended")
        ended = Ended(**json.loads(answer))
        after = self._listing()
        changed = {path for path in before.keys() | after.keys()
                   if before.get(path) != after.get(path)}  # fmt: skip
        texts = [_text(path) for path in (out, err)]
        return Outcome(ended, *texts, tuple(sorted(os.fsdecode(path) for path in changed)), size)

    def _listing(self) -> Listing:
        return dict(_listed(os.fsencode(self.root), os.fsencode(self._streams)))


def _start_server(root: Path, libraries: bool) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "MAMBACTL_CACHE": str(root / "home" / "mambactl-cache"),
        "XDG_CACHE_HOME": str(root / "home" / "cache"),
        "HF_HOME": str(root / "home" / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "PIP_NO_INDEX": "1",
        "MAMBACTL_KERNELS": "reference",
    }
    names = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    server = subprocess.Popen(
        [sys.executable, "-m", "hostile.warm", *(["libraries"] if libraries else [])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | own, cwd=root,
    )  # fmt: skip
    if server.stdout.readline() != "ready\n":
        raise RuntimeError("the process that commands are forked from did not start")
    return server


def _listed(folder: bytes, skipped: bytes) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.path == skipped:
                continue
            status = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                yield entry.path, (status.st_mode, 0, 0)
                yield from _listed(entry.path, skipped)
            else:
                yield entry.path, (status.st_mode, status.st_size, status.st_mtime_ns)


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return file.read(SHOWN).decode("utf-8", "surrogateescape")


def faults(command: CommandLine, outcome: Outcome, sandbox: Path) -> list[str]:
    """The promises of the command line that a command broke, each in a few words."""
    ended = outcome.ended
    found = [*_ending(command, outcome), *_output(command, outcome)]
    if ended.peak > MEMORY + outcome.size:
        found.append(f"{ended.peak / GIB:.1f} GiB of memory")
    places = (*CACHES, *(f"work/{beginning}" for beginning in command.writes))
    allowed = tuple(f"{sandbox}/{place}" for place in places)
    for path in outcome.changed:
        if path == f"{sandbox}/{SENTINEL}":
            found.append("code of an input ran")
        elif not path.startswith(allowed):
            found.append(f"{os.path.relpath(path, sandbox)!r} was changed")
    return found


def _ending(command: CommandLine, outcome: Outcome) -> Iterator[str]:
    ended = outcome.ended
    right = command.codes or CODES
    if ended.late:
        yield f"no end after {WALL_SECONDS} s"
    elif ended.idle:
        yield "waits for ever"
    elif ended.signal == signal.SIGXCPU or ended.cpu_seconds >= CPU_SECONDS:
        yield f"{CPU_SECONDS} s of CPU time"
    elif ended.signal:
        yield f"killed by signal {ended.signal}"
    elif ended.code not in right:
        yield f"exit code {ended.code}, not one of {sorted(int(code) for code in right)}"
    elif command.fits and ended.code == ExitCode.RESOURCE and "out of memory" in outcome.err:
        yield "out of memory on a small input"


def _output(command: CommandLine, outcome: Outcome) -> Iterator[str]:
    if "Traceback (most recent call last)" in outcome.err:
        yield "a traceback"
    # what a model wrote goes into a pipe as it is
    own = "" if command.words[0] == "generate" else outcome.out
    for name, text in (("stdout", own), ("stderr", outcome.err)):
        if control := CONTROL.search(text):
            yield f"the control character {control[0]!r} on {name}"
    if outcome.ended.signal:
        return
    if outcome.ended.code == ExitCode.DONE:
        if command.words[0] not in TEXT and outcome.out.count("\n") > 1:
            yield "more than one line on stdout"
        return
    if outcome.out:
        yield "text on stdout of a command that failed"
    errors = outcome.err.count("\nerror: ") + outcome.err.startswith("error: ")
    errors += len(re.findall(r'(?m)^\{"error": ', outcome.err))
    if errors != 1:
        yield f"{errors} messages that start with `error:`"
