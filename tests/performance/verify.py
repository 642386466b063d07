"""The cost to the target of reading a whole draft against one token, beside `bench`'s numbers.

    python -m tests.performance.verify t.st --draft d.st --json > verify.json
    python -m tests.performance.verify --synthetic llama3-8b-hybrid-50 -k 4 --input-len 1024

Needs a GPU. Points are those of `bench`, each with `verify_ratio`: the time of a pass over K + 1
tokens that first replays K accepted ones, over that of plain decoding's pass over one.
"""

import sys
from argparse import Namespace
from pathlib import Path

from mambactl.errors import UsageError
from mambactl.stage_result import StageResult
from tests.performance import command

FIELDS = (
    "synthetic", "draft", "acceptance", "k", "input_len", "output_len", "batch_size", "warmup",
    "iters",
)  # fmt: skip
PARSER = command.parser("verify", __doc__, FIELDS)
PARSER.add_argument("model", nargs="?", metavar="MODEL", help="none with --synthetic")


def measure(given: Namespace) -> StageResult:
    """Measure every model that is asked for, one after the other."""
    from mambactl.commands.bench import measure_points
    from mambactl.generation.decoding import require_draft
    from mambactl.metrics import Metric, times
    from mambactl.ranks import placement
    from mambactl.speed import bench_tables, candidates
    from mambactl.speed.conditions import conditions
    from mambactl.speed.memory import release
    from mambactl.speed.shape_table import require_shapes
    from mambactl.speed.subject import Grid
    from tests.performance.verification import require_kernels, verify

    config, model = command.configured(given), given.model
    if bool(config.synthetic) == (model is not None):
        raise UsageError("give a MODEL or --synthetic NAME, one of them", PARSER.format_usage())
    device, dtype = placement(config)
    require_kernels(device)
    if model is None:
        require_shapes(config.shapes)
        sources = [candidates.synthetic(config, name, device, dtype) for name in config.synthetic]
    else:
        require_draft(config, model)
        sources = [candidates.checkpoint(config, model, device, dtype, config.draft)]
    metrics = conditions(config, device, dtype) | {"points": []}
    grid = Grid.of(config)
    for source in sources:
        subject = source.subject(metrics["bandwidth_bytes_per_second"])
        points = measure_points(config, source, subject, grid)
        points = verify(subject, config.k, grid, points)
        del subject
        release(device)
        columns = [Metric("verify_ratio", "verify", better="lower", brief=times)]
        bench_tables.show(source.name, metrics | {"points": points}, columns)
        metrics["points"] += points
    if model is None:
        return StageResult(None, metrics, ",".join(config.synthetic))
    path = Path(model).expanduser()
    return StageResult(str(path.absolute()) if path.exists() else model, metrics)


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
