"""The tables of `eval`, with the names that `fail_under` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from mambactl import console
from mambactl.evaluation import fidelity, recall

# whose intervals are shown; results hold those of every number
INTERVALS = ("kl", "agreement", "perplexity_ratio", "ece")

Measured = Mapping[str, Mapping[str, dict[str, Any]]]


def show_fidelity(source: str, teacher: str, measured: Measured) -> None:
    """`measured` is data set -> variant -> numbers; a table per data set where variants differ."""
    title = f"{source} against {teacher}"
    if all(len(found) == 1 for found in measured.values()):
        alone = {data: next(iter(found.values())) for data, found in measured.items()}
        _table(f"{title}, per token", alone)
        return
    for data, found in measured.items():
        _table(f"{title} on {data}, per token", found)


def _table(title: str, columns: Mapping[str, dict[str, Any]]) -> None:
    found = list(columns.values())
    lines = [("tokens", *(f"{one['tokens']:,}" for one in found))]
    for name in fidelity.SCALARS:
        lines.append((name, *(f"{one[name]:.4f}" for one in found)))
        if name in INTERVALS and (cells := _intervals(found, name)):
            lines.append(cells)
    buckets = dict.fromkeys(bucket for one in found for bucket in one["by_position"])
    for name in ("kl", "agreement"):
        for bucket in buckets:
            parts = [one["by_position"].get(bucket) for one in found]
            cells = ("-" if part is None else f"{part[name]:.4f}" for part in parts)
            lines.append((f"{name} at {bucket}", *cells))
    console.table(title, ("", *columns), lines)


def _intervals(found: Sequence[dict[str, Any]], name: str) -> tuple[str, ...]:
    pairs = [one.get("intervals", {}).get(name) for one in found]
    share = next((one["confidence"] for one in found if "intervals" in one), None)
    if share is None:
        return ()
    cells = ("-" if pair is None else "{:.4f} to {:.4f}".format(*pair) for pair in pairs)
    return (f"  {100 * share:g} % interval", *cells)


def show_recall(source: str, measured: Measured, chances: Mapping[str, float]) -> None:
    """`measured` is probe -> model -> numbers; the recall of a guess opens a probe's lines."""
    lines = []
    for probe, found in measured.items():
        lines.append((probe, "chance", f"{chances[probe]:.4f}", *("" for _ in recall.SCALARS[1:])))
        lines += [
            ("", model, *(f"{numbers[name]:.4f}" for name in recall.SCALARS))
            for model, numbers in found.items()
        ]
    console.table(f"recall of {source}", ("probe", "model", *recall.SCALARS), lines)
