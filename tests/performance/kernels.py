"""The Mamba-2 decode kernel against one that stores a state per token, in steady decoding.

    python -m tests.performance.kernels --dtype bfloat16 --json > kernels.json

Needs a GPU; `recurrence` says what runs. The JSON is that of `bench`, with a row per batch size in
`metrics.kernels`: `mambactl report` shows it.
"""

import sys
from argparse import Namespace
from typing import Any

from mambactl import console
from mambactl.stage_result import StageResult
from tests.performance import command

PARSER = command.parser("kernels", __doc__)


def measure(given: Namespace) -> StageResult:
    """Time both kernels at every batch size, after a check that they agree."""
    from mambactl.ranks import placement
    from mambactl.speed.conditions import conditions
    from tests.performance.verification import require_kernels

    config = command.configured(given)
    device, dtype = placement(config)
    require_kernels(device)
    metrics = conditions(config, device, dtype)
    # imports Triton
    from tests.performance.recurrence import BATCHES, contest

    rows = []
    with console.progress("kernels", len(BATCHES)) as progress:
        for batch in BATCHES:
            rows.append(contest(batch, device, dtype, config.seed))
            progress.advance(status=f"{batch} rows")
    metrics |= {"points": [], "kernels": rows}
    show(metrics)
    best = max(rows, key=lambda row: row["ratio"])
    text = f"replay is {best['ratio']:.2f}x a state per token at {best['batch_size']} rows"
    return StageResult(None, metrics, text)


def show(metrics: dict[str, Any]) -> None:
    """The kernel that replays against the one that stores a state per token."""
    columns = ("rows", "replay us", "MB", "GB/s", "per token us", "MB", "GB/s", "ratio")
    lines = []
    for row in metrics["kernels"]:
        cells = [row["batch_size"]]
        for way in ("fused", "snapshots"):
            cells.append(f"{row[f'{way}_microseconds']:.1f}")
            cells.append(f"{row[f'{way}_bytes'] / 1e6:.1f}")
            cells.append(f"{row[f'{way}_bytes_per_second'] / 1e9:,.0f}")
        lines.append((*cells, f"{row['ratio']:.2f}x"))
    console.table(f"Mamba-2 layer on {metrics['device']} in {metrics['dtype']}", columns, lines)


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
