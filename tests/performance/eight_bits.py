"""Decoding with weights of 8 bits beside the same model in bf16: its products, then whole steps.

    python -m tests.performance.eight_bits --weights fp8 --input-len 1024 --output-len 256
    python -m tests.performance.eight_bits --weights int8 --draft draft-llama3-2l -k 4

Needs a GPU. Products are those of one MLP of the shape (default: llama3-8b-hybrid-50), over at
least 240 MB of distinct weights, each compared with the reference; points are those of `bench`, all
tokens checked, with `weights_gain`, the rate of plain decoding over that in bf16.
"""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from mambactl.errors import UsageError
from mambactl.options import BenchConfig
from mambactl.stage_result import StageResult
from tests.performance import command

if TYPE_CHECKING:
    import torch

    from mambactl.speed.limits import Numbers

FIELDS = (
    "weights", "synthetic", "draft", "acceptance", "k", "input_len", "output_len", "batch_size",
    "warmup", "iters",
)  # fmt: skip
PARSER = command.parser("eight_bits", __doc__, FIELDS)
PARSER.set_defaults(synthetic="llama3-8b-hybrid-50", weights="fp8")
ROWS = (1, 2, 4, 8, 16, 40, 160)


def measure(given: Namespace) -> StageResult:
    """Measure every shape that is asked for, in bf16 and in 8 bits."""
    from mambactl.metrics import Metric, times
    from mambactl.models.byte_weights import require_weights
    from mambactl.ranks import placement
    from mambactl.speed import bench_tables
    from mambactl.speed.conditions import conditions
    from mambactl.speed.shape_table import require_shapes
    from tests.performance.byte_products import products
    from tests.performance.verification import require_kernels

    config = command.configured(given)
    if config.weights == "auto":
        raise UsageError("bf16 is measured beside 8 bits", "give --weights fp8, or int8")
    device, dtype = placement(config)
    require_kernels(device)
    require_weights(config.weights, device)
    require_shapes(config.shapes)
    metrics = conditions(config, device, dtype) | {"points": [], "products": []}
    bandwidth = metrics["bandwidth_bytes_per_second"]
    columns = [Metric("weights_gain", "over bf16", better="higher", brief=times)]
    lines = []
    for name in config.synthetic:
        metrics["products"] += products(name, ROWS, bandwidth, config.weights, device)
        before, after = (
            _points(config.model_copy(update={"weights": weights}), name, bandwidth, device, dtype)
            for weights in ("auto", config.weights)
        )
        for point, other in zip(after, before, strict=True):
            rates = point["decode_tokens_per_second"], other["decode_tokens_per_second"]
            point["weights_gain"] = rates[0] / rates[1] if all(rates) else None
            lines.append(f"{name} {rates[1] or 0:.1f} -> {rates[0] or 0:.1f} tokens/s")
        bench_tables.show(f"{name} in bf16", metrics | {"points": before})
        title = f"{name} in {config.weights}"
        bench_tables.show(title, metrics | {"points": after}, columns)
        metrics["points"] += [*before, *after]
    return StageResult(None, metrics, ", ".join(lines))


def _points(
    config: BenchConfig,
    name: str,
    bandwidth: float,
    device: "torch.device",
    dtype: "torch.dtype",
) -> "list[Numbers]":
    """The points of `bench` for one shape and one way of storing weights."""
    from mambactl.commands.bench import measure_points
    from mambactl.speed import candidates
    from mambactl.speed.memory import release
    from mambactl.speed.subject import Grid

    source = candidates.synthetic(config, name, device, dtype)
    subject = source.subject(bandwidth)
    points = measure_points(config, source, subject, Grid.of(config))
    del subject
    release(device)
    return [{**point, "model": f"{name} {config.weights}"} for point in points]


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
