"""The command line of a measurement: options of `bench`, and what `bench` prints, on both streams.

Modules that use this import torch only when they measure.
"""

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from mambactl.cli.main import explain
from mambactl.commands import configure
from mambactl.console import guarded_stdout, secure_streams, set_verbosity, write_json, write_out
from mambactl.errors import ExitCode
from mambactl.options import BenchConfig
from mambactl.stage_result import StageResult

STAGE = "bench"
PLACE = ("device", "dtype", "seed")


def parser(name: str, summary: str | None, fields: Sequence[str] = ()) -> ArgumentParser:
    """A parser of the options that say where, of these other `fields` of `bench`, and of --json."""
    made = ArgumentParser(
        f"python -m tests.performance.{name}",
        description=(summary or "").partition("\n")[0],
        allow_abbrev=False,
    )
    for field in (*fields, *PLACE):
        flags = ["-k"] if field == "k" else []
        text = BenchConfig.model_fields[field].description or ""
        made.add_argument(*flags, f"--{field.replace('_', '-')}", help=text.replace("%", "%%"))
    made.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return made


def configured(given: Namespace) -> BenchConfig:
    """The configuration of `bench` with the options that were given."""
    fields = {key: value for key, value in vars(given).items() if key in BenchConfig.model_fields}
    return configure(STAGE, {key: value for key, value in fields.items() if value is not None})


def run(measure: Callable[[Namespace], StageResult], given: Namespace) -> int:
    """Measure, write one line to stdout, and return the exit code; messages go to stderr."""
    # idle threads that spin make torch on a busy machine several times slower; read at its import
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    secure_streams()
    set_verbosity(1)
    try:
        with guarded_stdout():
            result = measure(given)
    except Exception as error:
        code, message, hint = explain(error)
        if code == ExitCode.BUG:
            traceback.print_exc()
        sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
        return int(code)
    if given.json:
        text = {} if result.text is None else {"text": result.text}
        found = {"stage": STAGE, "checkpoint": result.path, "metrics": result.metrics}
        write_json(found | text)
    else:
        write_out(str(result.path) if result.text is None else result.text)
    return int(ExitCode.DONE)
