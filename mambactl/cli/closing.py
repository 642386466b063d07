"""The last line of a stage: how long it took, what it wrote, and what to type next."""

import os
import shlex
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from mambactl import console
from mambactl.commands import Command
from mambactl.ranks import is_main
from mambactl.units import duration


def in_pipe() -> bool:
    """True where another program reads stdout through a pipe."""
    try:
        return stat.S_ISFIFO(os.fstat(1).st_mode)
    except OSError:
        return False


@dataclass(frozen=True)
class Closing:
    """Facts from the start of a stage; `piped`: the next command is typed already."""

    command: Command
    started: float
    piped: bool

    def show(self, source: str | None, out: Path | None) -> None:
        """Print the line, where there is more to say than the result itself."""
        if not is_main() or not (out or self.command.next_command):
            return
        name = self.command.name
        line = f"{name}: {duration(time.monotonic() - self.started)}"
        if out is not None:
            line += f", wrote {out}"
        path = source if out is None else str(out)
        if self.command.next_command and path and not self.piped:
            names = {"path": path, "source": source or path}
            quoted = {key: shlex.quote(name) for key, name in names.items()}
            line += f"; next: {self.command.next_command.format(**quoted)}"
        console.log(line)
