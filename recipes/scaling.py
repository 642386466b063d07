"""Scaling of the chain over the GPUs of one host: speed, memory, and what a lost process leaves.

    python recipes/scaling.py --dry-run        what would run on this machine, and what would not
    python recipes/scaling.py                  Llama-3-8B's shape on 1, 2, 4, 8 GPUs: 10 minutes
    python recipes/scaling.py --gpus 1,2 --parts steps,killed
    python recipes/scaling.py --more large=--no-compile
    python recipes/scaling.py --device cpu --gpus 1,2 --shape tiny-hybrid --small tiny-hybrid \\
        --large tiny-hybrid --rows 1 --length 64 --steps 1 --prompts 8 --tokens 8 --questions 8

Parts, each of which uses the commands that a person would:

- steps: `distill` logits, mixers trained (all weights on every GPU) and the whole model (weights
  split), rows as many on each GPU: tokens a second, memory, share of communication, and days of
  20B tokens
- large: one step of alignment and one of logits at a shape that no GPU holds, nothing on disk
- generate, eval: `generate --dataset` and `eval --tasks` on one GPU and on all
- killed: `distill --shard`, one process killed, and half as many that resume
- losses: fp32 losses and weights of all processes beside those of one

Weights are random, so no quality is measured. GPUs that another program uses are not taken. A run
for which there are too few is left out with the reason, and so is what time does not allow. Results
are one JSON object, in OUT/scaling.json from the first run on, and without what each run took in a
line on standard output.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lost_process import LostProcess
from scaling_parts import KINDS, PARTS, ROOT, Command
from stages import Stages, gb, pair, remove
from watch import Row, gpus, parsed, say

from mambactl.cli.processes import MOST_PER_CORE
from mambactl.errors import ExitCode, MambactlError
from mambactl.files import explained, partial_of
from mambactl.ranks import child_environment
from mambactl.speed.shape_table import TABLE, HybridShape

COUNTS = (1, 2, 4, 8)
# of anything: rows, tokens, steps
MOST = 1_000_000
# of a GPU's memory: one that has more in use belongs to somebody
IN_USE = 0.02
# a prediction of `recipe plan` is within 20 % of what is measured
SURELY = 1.25
# seconds that a command takes at least: it imports torch and meets the others
LEAST = 8.0
# how `generate` and `eval` say with -v how long their answers took
TIMED = re.compile(r"(\w+): [\d,]+ in ([\d.]+) s$")


@dataclass(frozen=True)
class Host:
    """Devices that are there: numbers of free GPUs, or processes that a CPU may run."""

    device: str
    free: Sequence[str]
    most: int
    memory: int | None = None

    @classmethod
    def of(cls, device: str) -> "Host":
        """GPUs that nvidia-smi sees, of those that CUDA_VISIBLE_DEVICES allows."""
        if device == "cpu":
            return cls(device, (), MOST_PER_CORE * (os.cpu_count() or 1))
        lines = [line.split(", ") for line in gpus("index,uuid,memory.used,memory.total")]
        # a GPU that is cut into instances tells no numbers
        lines = [line for line in lines if line[2].isdigit() and line[3].isdigit()]
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        if allowed is not None:
            named = allowed.split(",")
            lines = [line for line in lines if {line[0], line[1]} & set(named)]
        sizes = {line[0]: [int(size) for size in line[2:]] for line in lines}
        free = [number for number, (used, total) in sizes.items() if used <= IN_USE * total]
        memory = min((total << 20 for _, total in sizes.values()), default=None)
        return cls("cuda", free, len(free), memory)

    def refuses(self, command: Command) -> str | None:
        """The reason why a command cannot run here."""
        if command.count > self.most:
            what = "processes" if self.device == "cpu" else "GPUs"
            return f"{what} needed: {command.count}, free: {self.most}"
        # some kinds of steps may fit, and the first of them runs
        least = min(filter(None, command.bytes.values()), default=0)
        if self.memory and least > SURELY * self.memory:
            return f"predicted to take {gb(least)} on a GPU of {gb(self.memory)}"
        return None


class Scaling(Stages):
    """Parts one after the other: figures of what ran, and reasons of what did not."""

    def __init__(self, asked: argparse.Namespace, host: Host):
        super().__init__(asked, partial_of(Path(asked.out).absolute() / "work"))
        self.host = host
        self.parts = {name: PARTS[name](asked, self.work) for name in asked.parts}
        self.figures: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._running: tuple[Command, str]
        self._heard: dict[str, dict]

    def plan(self) -> dict[str, list[Command]]:
        """Commands of every part that can run here in the time; others are in `skipped`."""
        found: dict[str, list[Command]] = {}
        room, named = int(self.asked.total / LEAST), set()
        for name, part in self.parts.items():
            refused = {each.name: self.host.refuses(each) for each in part.commands}
            most = max(part.commands, key=lambda each: each.count)
            first = None if part.separate else refused[most.name]
            found[name] = []
            for command in part.commands:
                reason = part.lacks or first or refused[command.name] or self._lost(command)
                if reason is None and len(named | {command.name}) > room:
                    reason = f"{self.asked.total:g} s are too few for so many runs"
                if reason is not None:
                    # what is prepared may be planned for another part
                    if not command.prepares:
                        self.skipped[command.name] = reason
                elif command.name not in named:
                    named.add(command.name)
                    found[name].append(command)
            if all(each.prepares for each in found[name]):
                # nothing follows, as there is no time
                found[name] = []
        return found

    def _lost(self, command: Command) -> str | None:
        """The reason why a command has nothing to follow on."""
        for name in command.follows:
            if name in self.failed or name in self.skipped:
                return f"follows on {name}"
        return None

    def run(self, planned: Mapping[str, Sequence[Command]]) -> None:
        """Run all that was planned."""
        with explained(self.work, "free some space", "choose another --out"):
            # of a run that was killed
            remove(self.work)
            self.work.mkdir(parents=True)
            self.write()
        try:
            for name, commands in planned.items():
                if commands:
                    self.parts[name].prepare()
                for command in commands:
                    self._take(command, name)
        finally:
            remove(self.work)

    def _take(self, command: Command, part: str) -> None:
        reason = self._lost(command)
        if reason is None and self.left < LEAST:
            reason = "no time is left"
        if reason is not None:
            self.skipped[command.name] = reason
            say(f"== {command.name} is left out: {reason}")
            return
        self._running, self._heard = (command, part), {}
        # what a killed run leaves is resumed
        out = None if command.loses else command.out
        line = self._line(command, part)
        self.command(command.name, line, out, self._hear, command.loses)

    def _hear(self, line: str) -> None:
        """Take from a line of a command what it measured, as it may fail at what follows."""
        if found := TIMED.match(line):
            self._heard.setdefault("timed", {})[found[1]] = float(found[2])
        for kind, figures in parsed(line).items():
            if kind in KINDS:
                self._heard.setdefault("parts", {})[kind] = figures

    def keep(self, row: Row) -> None:
        """Add a row with what was heard of it, and the figures that follow from all rows."""
        command, part = self._running
        row.result = {**self._heard, **row.result}
        if command.loses is not None:
            _expect_loss(row, command.loses)
        if row.code:
            self.failed[command.name] = row.note
        rows = {each.stage: each for each in [*self.rows, row]}
        self.figures[part] = self.parts[part].figures(rows)
        super().keep(row)

    def _line(self, command: Command, part: str) -> list[str]:
        """The command line as it is run, with the options that were asked for."""
        more = "" if command.prepares else self.asked.more.get(part, "")
        line = [*command.line, *shlex.split(more)]
        if line[0] != sys.executable:
            line = ["mambactl", *line, "--json"]
        return [*line, "-o", str(command.out)] if command.out else line

    def content(self) -> dict[str, object]:
        """Figures of all parts first."""
        return {**self.summary(), **super().content()}

    def summary(self) -> dict[str, object]:
        """Figures of all parts, what was left out or failed and why, and seconds of everything."""
        return {
            "gpus_free": None if self.host.device == "cpu" else self.host.most,
            "parts": self.figures,
            "skipped": self.skipped,
            "failed": self.failed,
            "seconds": round(self.asked.total - self.left, 1),
        }

    def described(self, planned: Mapping[str, Sequence[Command]]) -> dict[str, object]:
        """The plan as JSON-able data."""
        runs = {
            part: [
                {
                    "name": each.name,
                    "gpus": each.count,
                    "command": shlex.join(self._line(each, part)),
                    "predicted_bytes": dict(each.bytes),
                }
                for each in commands
            ]
            for part, commands in planned.items()
        }
        count = sum(map(len, runs.values()))
        return {
            "gpus_free": None if self.host.device == "cpu" else self.host.most,
            "bytes_of_a_gpu": self.host.memory,
            "runs": runs,
            "skipped": self.skipped,
            "seconds_at_most": self.asked.total,
            "seconds_for_each": round(self.asked.total / count, 1) if count else None,
        }


def _expect_loss(row: Row, lost: LostProcess) -> None:
    """Take a run that ended with its killed process as one that went well, and any other not."""
    if row.code == ExitCode.RESOURCE and lost.found:
        row.code = 0
    elif not row.code:
        row.code, row.note = 1, "it ended before a process could be killed"


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=text[0], epilog=text[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, shapes = parser.add_argument, [name for name, each in TABLE.items() if _serves(each)]
    counts = "numbers of GPUs, 1,2,4,8; default: those of them that are free"
    add("--gpus", type=_counts, metavar="N,N", help=counts)
    add("--parts", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    for name, shape, what in (
        ("shape", "llama3-8b-hybrid-50", "shape of what is timed"),
        ("small", "smollm2-135m-hybrid-50", "shape of what is killed, and of losses"),
        ("large", "llama3-70b-hybrid-50", "shape that no GPU holds"),
    ):
        add(f"--{name}", default=shape, choices=shapes, metavar="SHAPE", help=f"{what} ({shape})")
    for name, count, what in (
        ("steps", 5, "steps that are timed, after two"),
        ("rows", 4, "rows of a step, of each GPU"),
        ("length", 2048, "tokens of a row"),
        ("prompts", 256, "prompts that one GPU answers"),
        ("tokens", 128, "tokens of an answer"),
        ("questions", 1000, "questions with two answers that one GPU scores"),
        ("batch", 32, "rows of generate and eval that are read together"),
    ):
        add(f"--{name}", type=_positive, default=count, metavar="N", help=f"{what} ({count})")
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu: processes, to try it out")
    add("--out", default="runs/scaling", help="folder of scaling.json, and of what is removed")
    add("--limit", type=_seconds, default=240, help="seconds after which a run is stopped (240)")
    add("--total", type=_seconds, default=570, help="seconds after which all is stopped (570)")
    more = "more options of a part: --more 'large=--no-compile'"
    add("--more", type=pair, action="append", default=[], metavar="PART=OPTIONS", help=more)
    add("--dry-run", action="store_true", help="print the plan; nothing is run or written")
    asked = parser.parse_args(arguments)
    asked.more, asked.skip = dict(asked.more), []
    if unknown := asked.more.keys() - PARTS.keys():
        parser.error(f"--more: no part {', '.join(sorted(unknown))}")
    asked.json = str(Path(asked.out) / "scaling.json")
    return asked


def _serves(shape: object) -> bool:
    """True for a student, of which there is a teacher."""
    return isinstance(shape, HybridShape)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 to {MOST:,}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return found


def _counts(text: str) -> list[int]:
    return sorted({_positive(each) for each in text.split(",")})


def _parts(text: str) -> list[str]:
    named = text.split(",")
    if unknown := set(named) - PARTS.keys():
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}")
    return [name for name in PARTS if name in named]


def _prepare_children(host: Host) -> None:
    """Let children find the tests of the checkout, on the devices that are free."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.update(child_environment({"PYTHONPATH": path}))
    # numbers are those of nvidia-smi
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(host.free)}
    os.environ.update(order)
    if host.device == "cpu":
        # sums of another number of threads round differently, and results are compared
        os.environ["OMP_NUM_THREADS"] = "1"


def main(arguments: Sequence[str]) -> int:
    """Measure or plan; 1 where a run failed, 6 where nothing can run here."""
    asked = options(arguments)
    host = Host.of(asked.device)
    usual = [count for count in COUNTS if count <= (2 if asked.device == "cpu" else host.most)]
    asked.gpus = asked.gpus or usual or list(COUNTS)
    scaling = Scaling(asked, host)
    planned = scaling.plan()
    described = scaling.described(planned)
    for name, reason in scaling.skipped.items():
        say(f"{name} is left out: {reason}")
    if asked.dry_run:
        sys.stdout.write(json.dumps(described) + "\n")
        return 0
    if not any(planned.values()):
        say("nothing can run here; --device cpu tries the script out")
        return int(ExitCode.RESOURCE)
    _prepare_children(host)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 0
    try:
        scaling.run(planned)
    except KeyboardInterrupt:
        say(f"stopped: {asked.json} has what was measured until now")
        code = 128 + signal.SIGINT
    except MambactlError as error:
        say(f"error: {error}\nhint: {error.hint}")
        return error.code
    scaling.write()
    sys.stdout.write(json.dumps({"results": asked.json, **scaling.summary()}) + "\n")
    return code or int(bool(scaling.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
