"""The end of `recipe run`: a page of all that was measured, and what to type next."""

import shlex
from pathlib import Path

from mambactl import console
from mambactl.errors import MambactlError
from mambactl.units import duration

PAGE = "report.html"


def write_page(folder: Path, command: str) -> Path | None:
    """Write the page of a run into its folder; where nothing was measured there is none.

    A page that cannot be written, for want of matplotlib say, costs no result: a line says so.
    """
    from mambactl.checkpoint.provenance import header_digest
    from mambactl.report.collect import kept_in_run
    from mambactl.report.entries import read_entries
    from mambactl.report.page import write_report

    page = folder / PAGE
    try:
        files = [file for file in kept_in_run(folder) if file.suffix == ".json"]
        if not any(any(read_entries(file)) for file in files):
            return None
        with console.guarded_stdout(), console.doing("page"):
            write_report([folder], page, command, digest_of=header_digest)
    except MambactlError as error:
        hint = f" ({error.hint})" if error.hint else ""
        console.warn(f"{page} is not written: {error}{hint}")
        return None
    return page


def say_done(name: str, seconds: float, page: Path | None, checkpoint: str | None) -> None:
    """Print how long it took and where the page is; the last line is what to type next."""
    line = f"{name}: {duration(seconds)}"
    console.log(line if page is None else f"{line}, open {page.absolute()}")
    if checkpoint is not None:
        console.log(f"mambactl chat {shlex.quote(checkpoint)}")
