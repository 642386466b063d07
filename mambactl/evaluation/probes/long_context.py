"""The long-context part of `eval`: a needle in a haystack, and perplexity by position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambactl import console
from mambactl.checkpoint.load import load_tokenizer
from mambactl.data.format import encode_rows
from mambactl.data.sources import load_rows
from mambactl.errors import ResourceError, UsageError
from mambactl.evaluation.fidelity import Variant, predict
from mambactl.evaluation.needle import Grid, make_grid, measure_needle
from mambactl.evaluation.predictions import LONG_BUCKET_STARTS
from mambactl.evaluation.probes.fidelity_probe import bootstrap_of
from mambactl.files import NAMED_FILE, explained, recipe_folder, replacing
from mambactl.generation.decoding import end_tokens
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import EvalConfig
from mambactl.report.heatmap import draw_grids
from mambactl.report.plots import new_figure

Models = Mapping[str, HybridForCausalLM]
# the text of the quick start
HAYSTACK = ("quickstart.jsonl", "quickstart-heldout.jsonl")

# what `position_length` may be
SHORTEST = 128


@dataclass(frozen=True)
class LongInputs:
    """What is read before a model is loaded; `rows` of `position_length` ids by data set."""

    grid: Grid | None
    rows: dict[str, list[np.ndarray]]

    @property
    def names(self) -> list[str]:
        """Parts of the name of the results."""
        grid = [f"needle-{self.grid.lengths[-1]}"] if self.grid else []
        return [*grid, *(f"long-{name}" for name in self.rows)]

    @property
    def plan(self) -> dict[str, Any]:
        """What a dry run says."""
        found: dict[str, Any] = {}
        if self.grid is not None:
            about = {"lengths": self.grid.lengths, "depths": self.grid.depths}
            found["needle"] = {**about, "scoring": self.grid.scoring}
        if self.rows:
            found["long_context"] = {name: len(rows) for name, rows in self.rows.items()}
        return found


def read_long(
    config: EvalConfig, source: str, ours: HybridConfig, labels: Sequence[str]
) -> LongInputs:
    """Make prompts and rows; raises UsageError where text or tokens are too few.

    `labels` are short names of `long_context_data`.
    """
    if not (config.needle or config.long_context_data):
        return LongInputs(None, {})
    tokenizer = load_tokenizer(source, config.trust_remote_code)
    grid = None
    if config.needle:
        if config.needle_plot:
            # asked for by name: say what is missing before hours of work
            new_figure((1, 1))
        specs = config.needle_text or config.data or _packaged()
        grid = make_grid(
            tokenizer,
            load_rows(specs),
            config.needle,
            config.needle_depths,
            config.seed,
            config.needle_scoring,
        )
    rows = {
        label: _long_rows(config, spec, tokenizer)
        for label, spec in zip(labels, config.long_context_data, strict=True)
    }
    longest = max(config.needle + [config.position_length] * bool(rows))
    if ours.attends and longest > ours.max_position_embeddings:
        console.warn(
            f"{longest} tokens are more than the {ours.max_position_embeddings} this model was "
            "made for"
        )
    return LongInputs(grid, rows)


def _packaged() -> list[str]:
    return [str(recipe_folder() / "data" / name) for name in HAYSTACK]


def _long_rows(config: EvalConfig, spec: str, tokenizer: Any) -> list[np.ndarray]:
    """Whole rows only, so that every position is measured on the same documents."""
    size = config.position_length
    examples = encode_rows(load_rows([spec], config.limit), tokenizer)
    documents = [example.input_ids for example in examples]
    most = max(map(len, documents))
    # one row of each document, then the second of each
    starts = range(0, most - size + 1, size)
    rows = [ids[at : at + size] for at in starts for ids in documents if len(ids) >= at + size]
    if not rows:
        raise UsageError(
            f"{spec}: the longest document has {most} tokens, asked was for {size}",
            f"--position-length {most}, or longer text" if most >= SHORTEST else "give longer text",
        )
    return rows[: config.position_rows]


def measure_long(
    config: EvalConfig, inputs: LongInputs, models: Models, teacher: str, tokenizer: Any
) -> dict[str, Any]:
    """Measure every model; `models` has the key `teacher` where there is one."""
    metrics: dict[str, Any] = {}
    if inputs.grid is not None:
        grid = inputs.grid
        cells = len(grid.lengths) * len(grid.depths) * len(models)
        with console.progress("needle", cells) as task:
            scores = {
                name: measure_needle(
                    model, tokenizer, grid, end_tokens(model, tokenizer), config.save_samples,
                    task.advance,
                )
                for name, model in models.items()
            }  # fmt: skip
        about = {"lengths": grid.lengths, "depths": grid.depths, "scoring": grid.scoring}
        metrics["needle"] = {**about, **scores}
    if inputs.rows:
        metrics["long_context"] = {
            name: _positions(config, rows, models, teacher) for name, rows in inputs.rows.items()
        }
    return metrics


def _positions(
    config: EvalConfig, rows: Sequence[np.ndarray], models: Models, teacher: str
) -> dict[str, Any]:
    students = {name: Variant(model) for name, model in models.items() if name != teacher}
    guide = models.get(teacher) or next(iter(models.values()))
    # one row at a time: it is long enough to fill a device
    found = predict(students, guide, rows, config.position_length, batch_size=1)
    about = {"rows": len(rows), "max_length": config.position_length}
    bootstrap = bootstrap_of(config)
    return about | {
        name: found.summary(name, bootstrap, LONG_BUCKET_STARTS, config.save_samples)
        for name in students
    }


def show_long(source: str, metrics: Mapping[str, Any], models: Sequence[str]) -> None:
    """A table per model of the needle, one per long data set."""
    if needle := metrics.get("needle"):
        columns = ("tokens", *(f"{100 * depth:.0f} %" for depth in needle["depths"]))
        for name in models:
            scores = needle[name]["retrieved"]
            lines = [
                (f"{length:,}", *(f"{cell:.0f}" for cell in row))
                for length, row in zip(needle["lengths"], scores, strict=True)
            ]
            mean = needle[name]["mean_retrieved"]
            console.table(f"needle of {source}, {name}: {mean:.3f} retrieved", columns, lines)
    for data, found in metrics.get("long_context", {}).items():
        for name in models:
            if name in found:
                _show_positions(f"{source}, {name}, on {data} by position", found[name])


def _show_positions(title: str, found: Mapping[str, Any]) -> None:
    names = ("kl", "agreement", "perplexity", "teacher_perplexity", "perplexity_ratio")
    lines = [
        (label, f"{bucket['tokens']:,}", *(f"{bucket[name]:.4f}" for name in names))
        for label, bucket in found["by_position"].items()
    ]
    lines.append(("all", f"{found['tokens']:,}", *(f"{found[name]:.4f}" for name in names)))
    short = ("kl", "agreement", "ppl", "teacher ppl", "ratio")
    console.table(title, ("position", "tokens", *short), lines)


def keep_heatmap(
    config: EvalConfig, source: str, needle: Mapping[str, Any], models: Sequence[str],
    results: Path | None,
) -> Path | None:  # fmt: skip
    """Draw the needle beside `results`, or where `needle_plot` says; None where neither is."""
    path = results and results.with_suffix(".png")
    if config.needle_plot:
        path = Path(config.needle_plot).expanduser()
    if path is None:
        console.log("no picture is kept where no results are; --needle-plot FILE draws one")
        return None
    panels = {name: needle[name]["retrieved"] for name in models}
    try:
        with explained(path, *NAMED_FILE), replacing(path) as new:
            title = f"needle in a haystack: {source}"
            draw_grids(panels, needle["lengths"], needle["depths"], title, new)
    except ResourceError as error:
        if config.needle_plot:
            raise
        console.warn(f"no picture: {error} ({error.hint})")
        return None
    console.log(f"drawn in {path}")
    return path
