"""`mambactl report`: one HTML page from results that are kept, without measuring anything."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mambactl.cli import io

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH", help="results .json, metrics.jsonl, folder of results, or checkpoint"
    ),
]
Out = Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="page to write (HTML)")]
Title = Annotated[str | None, typer.Option("--title", help="heading of the page")]


def report(paths: Paths, out: Out = "report.html", title: Title = None) -> None:
    """Put measurements on one HTML page that opens without a network.

    \b
    Examples:
      mambactl report runs/a runs/b -o compare.html
      mambactl report bench.json d.st.metrics.jsonl
    """
    with io.guarded_stdout():
        from mambactl.checkpoint.provenance import header_digest
        from mambactl.report.page import write_report

        path = Path(out).expanduser()
        command = shlex.join(["mambactl", *sys.argv[1:]])
        places = [Path(each).expanduser() for each in paths]
        write_report(places, path, command, title or "", header_digest)
    io.write_out(str(path.absolute()))
