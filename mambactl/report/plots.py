"""Pictures of training ledgers: the KL to the teacher over the tokens trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mambactl.errors import UsageError
from mambactl.figures import DPI, literal, new_figure
from mambactl.json_values import JsonObject
from mambactl.metrics import KL
from mambactl.report.kept_results import read_ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# phases whose loss is a divergence from the teacher's logits
LOGITS = ("stepwise", "logits", "onpolicy")
INCHES = (7.0, 4.2)


def curves(lines: list[JsonObject]) -> dict[str, list[tuple[int, float]]]:
    """(tokens, nats per token) of `held out`, and of `training` on logits or their KL."""
    return {
        "held out": [(line["tokens"], line[KL.name]) for line in lines if KL.name in line],
        "training": [
            (line["tokens"], line.get("train_kl", line["loss"]))
            for line in lines
            if "loss" in line
            and ("train_kl" in line or str(line.get("phase", "")).startswith(LOGITS))
        ],
    }


def draw(ledgers: Mapping[str, Path], out: Path) -> None:
    """Write a PNG with one colour per ledger: a line for held-out KL, a faint one for the loss.

    Raises UsageError when there is nothing to draw, ResourceError without matplotlib.
    """
    found = {name: curves(read_ledger(path)) for name, path in ledgers.items()}
    if not any(points for kinds in found.values() for points in kinds.values()):
        raise UsageError("nothing to plot: no KL was measured", "train with --eval-data FILE")
    figure, axes = _axes()
    for number, (name, kinds) in enumerate(found.items()):
        name = literal(name)
        colour = f"C{number % 10}"
        if kinds["training"]:
            held = bool(kinds["held out"])
            label = None if held else f"{name} (training loss)"
            axes.plot(
                *zip(*kinds["training"], strict=True), color=colour, lw=0.7, alpha=0.45, label=label
            )
        if kinds["held out"]:
            axes.plot(
                *zip(*kinds["held out"], strict=True), color=colour, marker="o", ms=3, label=name
            )
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("KL to the teacher, nats per token")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    # a format by name: the file is written under another one first
    figure.savefig(out, dpi=DPI, format="png")


def _axes() -> tuple["Figure", "Axes"]:
    figure = new_figure(INCHES)
    return figure, figure.add_subplot()
