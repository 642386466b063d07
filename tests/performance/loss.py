"""The distillation loss through the language-model head: time, memory and distance from fp64.

    python -m tests.performance.loss --dtype bfloat16 --iters 10 --json > loss.json

Sizes are those of an 8B model's head on a GPU, and small ones on a CPU. The JSON is that of
`bench`, with the numbers in `metrics.loss`: `mambactl report` shows it.
"""

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mambactl import console
from mambactl.stage_result import StageResult
from tests.performance import command

if TYPE_CHECKING:
    from torch import Tensor

# rows, width and vocabulary
SIZES = {"cuda": (8192, 4096, 128256), "cpu": (512, 256, 8192)}
ERRORS = ("error_value", "error_hidden_gradient", "error_weight_gradient")


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: integers that are not below `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text} is no integer of at least {least}")
        return int(text)

    return parse


PARSER = command.parser("loss", __doc__, ("warmup", "iters"))
PARSER.add_argument("--tokens", type=at_least(1), help="rows (8192 on a GPU)")
PARSER.add_argument("--hidden", type=at_least(1), help="width (4096 on a GPU)")
PARSER.add_argument("--vocab", type=at_least(2), help="vocabulary (128256 on a GPU)")


def sizes(given: Namespace, kind: str) -> tuple[int, int, int]:
    """Rows, width and vocabulary: those given, else the usual of this kind of device."""
    asked = (given.tokens, given.hidden, given.vocab)
    rows, width, vocabulary = (
        usual if own is None else own for own, usual in zip(asked, SIZES[kind], strict=True)
    )
    return rows, width, vocabulary


def measure(given: Namespace) -> StageResult:
    """Time the package's loss and compare it with a dense one in fp64."""
    from mambactl.ranks import placement
    from mambactl.speed.conditions import conditions
    from tests.performance.head_loss import Size, head_loss

    config = command.configured(given)
    device, dtype = placement(config)
    asked = {"tokens": given.tokens, "hidden": given.hidden, "vocab": given.vocab}
    metrics = conditions(config, device, dtype, **asked)
    size = Size(*sizes(given, device.type))
    with console.progress("loss", 1) as progress:
        row = head_loss(distillation, size, device, dtype, config.warmup, config.iters, config.seed)
        progress.advance()
    metrics |= {"points": [], "loss": row}
    show(metrics)
    rate = row["flops_per_second"] / 1e12
    text = f"{row['milliseconds']:.1f} ms for {size.tokens} tokens, {rate:.3g} TFLOP/s"
    return StageResult(None, metrics, text)


def distillation(
    hidden: "Tensor", weight: "Tensor", targets: "Tensor", mask: "Tensor", *teacher: "Tensor"
) -> "Tensor":
    """The loss of `distill`, all of it from the teacher."""
    from mambactl.train.losses import Teacher, distillation_loss

    return distillation_loss(hidden, weight, targets, mask, Teacher(*teacher)).total


def show(metrics: dict[str, Any]) -> None:
    """A loss through the head: time, memory and errors."""
    row = metrics["loss"]
    shape = f"{row['tokens']} x {row['hidden']} x {row['vocab']}"
    columns = ("ms", "TFLOP/s", "MiB beyond", "error", "of dx", "of dW")
    cells = [
        f"{row['milliseconds']:.2f}",
        f"{row['flops_per_second'] / 1e12:.3g}",
        f"{row['peak_bytes'] / 2**20:,.2f}",
        *(f"{row[key]:.1e}" for key in ERRORS),
    ]
    title = f"KL through a head of {shape} on {metrics['device']} in {metrics['dtype']}"
    console.table(title, columns, [cells])


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
