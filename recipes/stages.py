"""Stages of a script: commands one after the other, within a time, and a file of what they took."""

import argparse
import json
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from watch import Peak, Row, gpus, run, say

from mambactl.files import replacing


class Stages:
    """Commands that a script runs; `rows` has what each of them took.

    Of the script's options it reads `total` and `limit` (seconds), `skip` and `more` (options of
    stages) and `json`, the file of the figures.
    """

    def __init__(self, asked: argparse.Namespace, work: Path):
        self.asked, self.work, self.started = asked, work, time.monotonic()
        self.rows: list[Row] = []

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.asked.total - (time.monotonic() - self.started)

    def stage(
        self, name: str, words: Sequence[str], out: Path | None, finished: Sequence[Path] = ()
    ) -> Row | None:
        """One command of mambactl; deletes what is `finished` after it, and returns None if it
        failed.
        """
        if name in self.asked.skip:
            return None
        more = shlex.split(self.asked.more.get(name, ""))
        line = ["mambactl", *words, *more, "--json"]
        line += ["-o", str(out), "--force"] if out else []
        row = self.command(name, line, out)
        if row is None or row.code:
            return None
        for path in finished:
            remove(path)
        return row

    def command(
        self,
        name: str,
        line: Sequence[str],
        out: Path | None = None,
        heard: Callable[[str], None] | None = None,
        beside: Callable[[int, threading.Event], None] | None = None,
    ) -> Row | None:
        """One command line; what it left at `out` is deleted if it failed.

        Returns None where no time is left. `heard` and `beside` are those of `watch.run`.
        """
        if (left := self.left) <= 0:
            self.keep(Row(name, "", 0.0, 0, Peak(), note="left out: no time is left"))
            return None
        row = run(name, line, [self.work], min(self.asked.limit, left), heard, beside)
        self.keep(row)
        if row.code:
            say(f"== {name} failed: {row.note}")
            remove(out)
        else:
            say(f"== {name}: {line_of(row)}")
        return row

    def keep(self, row: Row) -> None:
        """Add a row, and write the figures so far."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the figures so far where they are asked for."""
        if self.asked.json:
            with replacing(Path(self.asked.json)) as new:
                new.write_text(json.dumps(self.content(), indent=1), "utf-8")

    def content(self) -> dict[str, object]:
        """Figures and where they were taken."""
        return {
            "options": vars(self.asked),
            "gpus": gpus("name"),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "stages": [asdict(each) for each in self.rows],
        }


def remove(path: Path | None) -> None:
    """Delete a file or folder if it is there, and what a stopped command left of it."""
    if path is None:
        return
    for each in (path, path.with_name(f"{path.name}.partial")):
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink(missing_ok=True)


def line_of(row: Row) -> str:
    """A stage in a line."""
    peak = row.peak
    gpu = "" if peak.gpu is None else f", {gb(peak.gpu)} of GPU memory"
    return f"{row.seconds:.1f} s, {gb(peak.host)} of memory{gpu}, {gb(peak.disk)} of disk"


def gb(count: int | None) -> str:
    """Bytes as GB; nothing for none."""
    return "" if count is None else f"{count / 1e9:.1f} GB"


def pair(text: str) -> tuple[str, str]:
    """A stage and more options for it, of STAGE=OPTIONS."""
    stage, _, words = text.partition("=")
    try:
        shlex.split(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{words}: {error}") from None
    return stage, words
