"""Steps of `distill --nproc N --shard` on N GPUs: their speed and memory, after a check of losses.

    python -m tests.performance.sharded --nproc 2
    python -m tests.performance.sharded --nproc 4 --parts logits-whole --rows 2
    python -m tests.performance.sharded --nproc 2 --parts align-mixers,logits-mixers --together
    torchrun --nproc-per-node 2 -m tests.performance.sharded

A part is a stage and what trains in it: align-mixers, logits-mixers, logits-whole. Models are made
on the GPUs from a seed, each process holding its share, and nothing is read or written. Every
process takes `--rows` rows of `--length` random tokens a step. First, losses and weights of a few
fp32 steps at the shape `--check` are compared with those that one process gets from the rows of
all (each process for itself); the command fails where they differ. `--together` keeps all weights
on every GPU (`distill --nproc N`) in all parts or in those it names, which is what one GPU is
compared with for mixers.

Prints JSON: per part `tokens_per_second` of all processes, `seconds` per step (of the slowest
process) and `peak_bytes` (the most of any GPU), and with `--profile N` the share of communication
in N more steps (`communication`). Where one process alone runs out of memory, it says
`out_of_memory` and goes on; of several, all end with that error (exit code 6).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mambactl.cli.main import _report, explain
from mambactl.cli.processes import run_processes
from mambactl.ranks import child_environment, launched, rank
from mambactl.speed.shape_table import TABLE

ROOT = str(Path(__file__).parents[2])
PARTS = ("align-mixers", "logits-mixers", "logits-whole")


def _names(text: str) -> list[str]:
    return text.split(",")


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of a command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.performance.sharded", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes to start, one per GPU")
    parser.add_argument("--model", default="llama3-8b-hybrid-50", choices=TABLE)
    parser.add_argument("--check", default="smollm2-135m-hybrid-50", help="'' checks nothing")
    parser.add_argument("--parts", type=_names, default=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    counts = {"rows": 4, "length": 2048, "warmup": 2, "iters": 5, "profile": 0}
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    which = {"nargs": "?", "type": _names, "const": list(PARTS), "default": []}
    parser.add_argument(
        "--together", **which, help="all weights on every GPU, in some parts or all"
    )
    parser.add_argument("--grad-checkpointing", action="store_true", help="also for mixers")
    parser.add_argument("--only-check", action="store_true", help="time nothing")
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=False)
    parser.set_defaults(compile="auto")
    found = parser.parse_args(arguments)
    if unknown := {*found.parts, *found.together} - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: one of {', '.join(PARTS)}")
    return found


def _failed(error: Exception) -> NoReturn:
    """End this process at once, as one of several may wait for others; all say what it met."""
    code, message, hint = explain(error)
    if type(error).__name__ == "OutOfMemoryError":
        # sizes first; what follows are settings of the allocator
        message = ". ".join(str(error).split(". ")[:3])
    code = _report(error, code, message, hint, ["--json"])
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str]) -> None:
    """Start the processes, or be one of them; the first prints."""
    options = options_of(arguments)
    try:
        if options.nproc > 1 and not launched():
            command = [sys.executable, "-m", "tests.performance.sharded", *arguments]
            # children take no module from the current folder
            path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
            environment = child_environment({"PYTHONPATH": path})
            sys.stdout.write(run_processes(command, environment, options.nproc) + "\n")
            return
        # after what only starts processes
        from tests.performance.sharded_steps import measure

        found = measure(options)
    except Exception as error:
        _failed(error)
    if rank() == 0:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
