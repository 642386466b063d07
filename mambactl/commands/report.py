"""`mambactl report`: one HTML page from results that are kept, without measuring anything."""

import os
import shlex
from pathlib import Path

from mambactl import invocation
from mambactl.checkpoint.provenance import header_digest
from mambactl.options.reading import ReportConfig
from mambactl.report.page import write_report
from mambactl.stage_result import StageResult


def run(options: ReportConfig) -> StageResult:
    """Write the page; its absolute path is the text."""
    path = Path(os.path.expanduser(options.out))
    command = shlex.join(invocation.words())
    sources = [Path(os.path.expanduser(each)) for each in options.paths]
    write_report(sources, path, command, options.title or "", header_digest)
    return StageResult(None, text=str(path.absolute()))
