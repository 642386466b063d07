"""Commands that break one promise each: what the runner has to notice."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def nothing() -> None:
    """Keep every promise."""
    sys.stdout.write("/a/path\n")


def refuses() -> None:
    """Fail as commands fail."""
    _complain("error: there is no model\nhint: give one")
    sys.exit(3)


def raises() -> None:
    """Fail with a traceback."""
    raise ValueError("a bug")


def two_errors() -> None:
    """Say twice what is wrong."""
    _complain("error: one\nerror: two")
    sys.exit(2)


def silent() -> None:
    """Fail without a word."""
    sys.exit(2)


def fails_with_output() -> None:
    """Fail after a line on stdout."""
    sys.stdout.write("/a/path\n")
    refuses()


def unknown_code() -> None:
    """Fail with a code that is not documented."""
    _complain("error: x")
    sys.exit(9)


def two_lines() -> None:
    """Print more than the path."""
    sys.stdout.write("/a/path\n/another\n")


def escapes() -> None:
    """Let a name reach the terminal as it is."""
    _complain("error: there is no \x1b[31mmodel")
    sys.exit(3)


def writes_upwards() -> None:
    """Write beside the folder of the command."""
    Path("../outside").write_text("x")


def changes_an_input() -> None:
    """Change a file that is there."""
    Path("input").write_text("y")


def writes_at_home() -> None:
    """Write into the home folder."""
    (Path.home() / "settings").write_text("x")


def writes_to_out() -> None:
    """Write where it may."""
    Path("out.partial").mkdir()
    Path("out.partial/weights").write_text("x")
    os.rename("out.partial", "out")


def runs_code() -> None:
    """Do what code of an input would do."""
    os.system("touch ../code-ran")


def burns() -> None:
    """Compute for ever."""
    while True:
        pass


def dawdles() -> None:
    """Do a little from time to time."""
    while True:
        sum(range(1_000_000))
        time.sleep(0.2)


def waits() -> None:
    """Wait for ever."""
    time.sleep(1000)


def waits_in_a_thread() -> None:
    """End, but for a thread that does not."""
    threading.Thread(target=time.sleep, args=(1000,)).start()


def grows() -> None:
    """Take more memory than it may, and end well."""
    block = bytearray(300 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])


def exhausts() -> None:
    """Take more than there is."""
    blocks = []
    while True:
        blocks.append(b"x" * (64 << 20))


def out_of_memory() -> None:
    """Blame the machine for what a small input asks for."""
    _complain("error: out of memory\nhint: smaller")
    sys.exit(6)


def waits_for_a_child() -> None:
    """Wait for a process of another group that works, and for one that does not."""
    code = "sum(range(30_000_000))\nimport time\ntime.sleep(1000)"
    subprocess.run([sys.executable, "-c", code], process_group=0, check=False)


def crashes() -> None:
    """Die of a signal."""
    os.abort()
