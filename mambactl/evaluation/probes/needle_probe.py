"""`eval --needle`: a sentence to find, by length of the text around it and depth in it."""

from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mambactl import console
from mambactl.errors import MambactlError, ResourceError
from mambactl.evaluation.probes.probe import (
    STUDENT,
    TEACHER,
    Asked,
    Numbers,
    Probe,
    Subject,
    bootstrap_of,
    bounded,
    interval_heading,
)
from mambactl.figures import new_figure
from mambactl.files import NAMED_FILE, explained, recipe_folder, replacing
from mambactl.json_values import AnyObject, JsonObject
from mambactl.metrics import (
    NEEDLE_RATIO,
    NEEDLE_RATIO_LOW,
    RETRIEVED,
    exact,
    span,
    whole_percent,
)
from mambactl.options.evaluation import EvalOptions
from mambactl.options.fields import DataSpecs, NeedleLengths

if TYPE_CHECKING:
    import numpy as np

    from mambactl.evaluation.needle import Grid
    from mambactl.evaluation.statistics import Bootstrap

# the text of the quick start
HAYSTACK = ("quickstart.jsonl", "quickstart-heldout.jsonl")
BY_LENGTH = "by_length"
# what a grid says of itself beside the models
ABOUT = ("lengths", "depths", "texts", "scoring")
# lengths at which the teacher finds a smaller share say nothing of a student
LEAST_FOUND = 0.5
# depths that fit beside each other
WIDEST = 10


class NeedleOptions(EvalOptions):
    """The grid, the text, and how an answer is read."""

    needle: NeedleLengths = Field(
        [], description="find a sentence in texts of so many tokens, 1024,8192"
    )
    needle_depths: int = Field(10, ge=1, le=100, description="places in the text that it stands at")
    needle_texts: int = Field(
        1, ge=1, le=100, description="parts of the text that each place is tried in"
    )
    needle_text: DataSpecs = Field([], description="that text; default: --data, or the packaged")
    needle_scoring: Literal["generate", "argmax"] = Field(
        "generate", description="greedy answers, or whether the right answer is the likeliest"
    )
    needle_plot: str | None = Field(
        None, description="heat map (PNG); default: in results/ of a checkpoint folder"
    )


class NeedleProbe(Probe[NeedleOptions, "Grid", Numbers]):
    """Scores by model, length and depth."""

    name, title = "needle", "Needle in a haystack"
    about = "In per cent, by depth in a text and by its length."
    options = (NeedleOptions,)
    example = "--needle 1024,4096"
    teacher = "welcome"

    def asked(self, config: NeedleOptions) -> bool:
        """True if there are lengths."""
        return bool(config.needle)

    def read(self, config: NeedleOptions, asked: Asked) -> "Grid":
        """Make the prompts; raises UsageError where the text is too short."""
        from mambactl.data.sources import load_rows
        from mambactl.evaluation.needle import make_grid

        if config.needle_plot:
            # asked for by name: say what is missing before hours of work
            new_figure((1, 1))
        specs = config.needle_text or config.data or _packaged()
        asked.longest = max(asked.longest, *config.needle)
        return make_grid(
            asked.tokenizer,
            load_rows(specs),
            config.needle,
            config.needle_depths,
            config.seed,
            config.needle_scoring,
            config.needle_texts,
        )

    def plan(self, inputs: "Grid | None") -> JsonObject:
        """Grid of lengths and depths, for a dry run."""
        return {} if inputs is None else {self.name: _about(inputs)}

    def labels(self, inputs: "Grid") -> list[str]:
        """The longest text."""
        return [f"{self.name}-{inputs.lengths[-1]}"]

    def known(self, inputs: "Grid", teacher: str | None) -> dict[str, Sequence[str]]:
        """Means over the grid."""
        return {self.name: self.bounds if teacher else [RETRIEVED.name]}

    def measure(self, config: NeedleOptions, inputs: "Grid", subject: Subject) -> Numbers:
        """Measure every model, and compare students with the teacher prompt by prompt."""
        from mambactl.evaluation.needle import found_by_prompt, measure_needle, scores_by_depth
        from mambactl.generation.decoding import end_tokens

        prompts = sum(map(len, inputs.prompts)) * len(subject.models)
        scores: dict[str, Numbers] = {}
        by_prompt = {}
        with console.progress(self.name, prompts) as task:
            for name, model in subject.models.items():
                ends = end_tokens(model, subject.tokenizer)
                found = measure_needle(
                    model, subject.tokenizer, inputs, ends, task.advance, subject.dealer
                )
                scores[name] = scores_by_depth(inputs, found, config.save_samples)
                by_prompt[name] = found_by_prompt(found)
        if subject.teacher is not None:
            # a model is its own teacher where no other one was measured
            theirs = by_prompt.pop(TEACHER, by_prompt[STUDENT])
            for name, ours in by_prompt.items():
                scores[name] |= _compare(inputs.lengths, ours, theirs, bootstrap_of(config))
        return {**_about(inputs), **scores}

    def show(self, subject: Subject, found: Numbers) -> None:
        """Print a table per model, many depths from top to bottom, and one of the ratios."""
        for name in subject.models:
            columns, *lines = _cells(found, found[name][RETRIEVED.name])
            mean = found[name][f"mean_{RETRIEVED.name}"]
            title = f"needle of {subject.source}, {name}: {mean:.3f} retrieved"
            console.table(title, columns, lines)
        for name in subject.models:
            if BY_LENGTH in found[name]:
                _show_ratios(subject, name, found[name])

    def draw(self, config: NeedleOptions, source: str, kept: Numbers, path: Path | None) -> None:
        """Draw a heat map of every model."""
        found = kept[self.name]
        keep_heatmap(config, source, found, [name for name in found if name not in ABOUT], path)

    def scores(self, kept: Numbers) -> dict[str, dict[str, float]]:
        """Means over the student's grid."""
        if self.name not in kept:
            return {}
        own = kept[self.name][STUDENT]
        means = {key: f"mean_{key}" for key in self.bounds}
        return {self.name: {key: bounded(own[mean]) for key, mean in means.items() if mean in own}}


def _compare(
    lengths: Sequence[int],
    ours: "Sequence[np.ndarray]",
    theirs: "Sequence[np.ndarray]",
    bootstrap: "Bootstrap",
) -> Numbers:
    """Numbers of a student beside the teacher's, by length and over the lengths that count.

    `ours` and `theirs` are 1 where a prompt's needle was retrieved, length by length.
    """
    from mambactl.evaluation.statistics import ratios

    counted = [float(each.mean()) >= LEAST_FOUND for each in theirs]
    each = ratios(ours, theirs, bootstrap).each
    mean = ratios([*compress(ours, counted)], [*compress(theirs, counted)], bootstrap).mean
    by_length = {
        str(length): {
            RETRIEVED.name: float(mine.mean()),
            f"{TEACHER}_{RETRIEVED.name}": float(other.mean()),
            NEEDLE_RATIO.name: found.value,
            "intervals": {NEEDLE_RATIO.name: found.interval},
            "counted": counts,
        }
        for length, mine, other, found, counts in zip(
            lengths, ours, theirs, each, counted, strict=True
        )
    }
    return {
        BY_LENGTH: by_length,
        f"mean_{NEEDLE_RATIO.name}": mean.value,
        f"mean_{NEEDLE_RATIO_LOW.name}": mean.interval and mean.interval[0],
        "intervals": {f"mean_{NEEDLE_RATIO.name}": mean.interval},
        "confidence": bootstrap.confidence,
        "bootstrap": bootstrap.replicates,
        "resampled": "prompts",
    }


def _cells(found: Numbers, scores: Sequence[Sequence[float]]) -> list[tuple[str, ...]]:
    """Heading and lines of a table of scores [lengths][depths]; many depths go down in it."""
    depths = [f"{100 * depth:.0f} %" for depth in found["depths"]]
    rows = [("tokens", *depths)]
    rows += [
        (f"{length:,}", *map(RETRIEVED.brief, row))
        for length, row in zip(found["lengths"], scores, strict=True)
    ]
    return rows if len(depths) <= WIDEST else list(zip(*rows, strict=True))


def _show_ratios(subject: Subject, name: str, found: Numbers) -> None:
    """Print what student and teacher find at every length, and the mean of what counts."""
    lines = [
        (
            f"{int(length):,}",
            exact(one[RETRIEVED.name]),
            exact(one[f"{TEACHER}_{RETRIEVED.name}"]),
            NEEDLE_RATIO.shown(one) if one["counted"] else f"({NEEDLE_RATIO.shown(one)})",
            span(one["intervals"][NEEDLE_RATIO.name], exact) or "-",
        )
        for length, one in found[BY_LENGTH].items()
    ]
    counted = sum(one["counted"] for one in found[BY_LENGTH].values())
    mean = f"mean_{NEEDLE_RATIO.name}"
    value = "-" if found[mean] is None else NEEDLE_RATIO.brief(found[mean])
    interval = span(found["intervals"][mean], exact) or "-"
    lines.append((f"mean of {counted}", "", "", value, interval))
    columns = ("tokens", name, TEACHER, "ratio", interval_heading([found]))
    title = f"needle of {subject.source} over that of {subject.teacher_name}"
    console.table(title, columns, lines)
    if counted < len(found[BY_LENGTH]):
        share = whole_percent(LEAST_FOUND)
        console.log(f"in brackets: the teacher finds fewer than {share}, no part of the mean")


def _about(grid: "Grid") -> JsonObject:
    return {name: getattr(grid, name) for name in ABOUT}


def _packaged() -> list[str]:
    return [str(recipe_folder() / "data" / name) for name in HAYSTACK]


def keep_heatmap(
    config: NeedleOptions,
    source: str,
    needle: AnyObject,
    models: Sequence[str],
    results: Path | None,
) -> Path | None:
    """Draw the needle beside `results`, or where `needle_plot` says; None where neither is."""
    from mambactl.evaluation.heatmap import draw_grids

    path = results and results.with_suffix(".png")
    if config.needle_plot:
        path = Path(config.needle_plot).expanduser()
    if path is None:
        console.log("no picture is kept where no results are; --needle-plot FILE draws one")
        return None
    panels = {name: needle[name][RETRIEVED.name] for name in models}
    try:
        with explained(path, *NAMED_FILE), replacing(path) as new:
            title = f"needle in a haystack: {source}"
            draw_grids(panels, needle["lengths"], needle["depths"], title, new)
    except ResourceError as error:
        if config.needle_plot:
            raise
        console.warn(f"no picture: {error} ({error.hint})")
        return None
    except MambactlError:
        raise
    except Exception as error:
        console.warn_unwritten(path, error)
        return None
    console.log(f"drawn in {path}")
    return path
