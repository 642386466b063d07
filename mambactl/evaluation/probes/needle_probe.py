"""`eval --needle`: a sentence to find, by length of the text around it and depth in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mambactl import console
from mambactl.errors import MambactlError, ResourceError
from mambactl.evaluation.probes.probe import STUDENT, Asked, Numbers, Probe, Subject
from mambactl.figures import new_figure
from mambactl.files import NAMED_FILE, explained, recipe_folder, replacing
from mambactl.metrics import RETRIEVED
from mambactl.options.evaluation import EvalOptions
from mambactl.options.fields import DataSpecs, NeedleLengths

if TYPE_CHECKING:
    from mambactl.evaluation.needle import Grid

# the text of the quick start
HAYSTACK = ("quickstart.jsonl", "quickstart-heldout.jsonl")
# what a grid says of itself beside the models
ABOUT = ("lengths", "depths", "scoring")


class NeedleOptions(EvalOptions):
    """The grid, the text, and how an answer is read."""

    needle: NeedleLengths = Field(
        [], description="find a sentence in texts of so many tokens, 1024,8192"
    )
    needle_depths: int = Field(10, ge=1, le=100, description="places in the text that it stands at")
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
        """Whether there are lengths."""
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
        )

    def plan(self, inputs: "Grid | None") -> dict[str, Any]:
        """The grid."""
        return {} if inputs is None else {self.name: _about(inputs)}

    def labels(self, inputs: "Grid") -> list[str]:
        """The longest text."""
        return [f"{self.name}-{inputs.lengths[-1]}"]

    def known(self, inputs: "Grid", teacher: str | None) -> dict[str, Sequence[str]]:
        """Means over the grid."""
        return {self.name: self.bounds}

    def measure(self, config: NeedleOptions, inputs: "Grid", subject: Subject) -> Numbers:
        """Measure every model."""
        from mambactl.evaluation.needle import measure_needle
        from mambactl.generation.decoding import end_tokens

        cells = len(inputs.lengths) * len(inputs.depths) * len(subject.models)
        with console.progress(self.name, cells) as task:
            scores = {
                name: measure_needle(
                    model, subject.tokenizer, inputs, end_tokens(model, subject.tokenizer),
                    config.save_samples, task.advance,
                )
                for name, model in subject.models.items()
            }  # fmt: skip
        return {**_about(inputs), **scores}

    def show(self, subject: Subject, found: Numbers) -> None:
        """Print a table per model."""
        columns = ("tokens", *(f"{100 * depth:.0f} %" for depth in found["depths"]))
        for name in subject.models:
            scores = found[name][RETRIEVED.name]
            lines = [
                (f"{length:,}", *map(RETRIEVED.brief, row))
                for length, row in zip(found["lengths"], scores, strict=True)
            ]
            mean = found[name][f"mean_{RETRIEVED.name}"]
            title = f"needle of {subject.source}, {name}: {mean:.3f} retrieved"
            console.table(title, columns, lines)

    def draw(self, config: NeedleOptions, source: str, kept: Numbers, path: Path | None) -> None:
        """Draw a heat map of every model."""
        found = kept[self.name]
        keep_heatmap(config, source, found, [name for name in found if name not in ABOUT], path)

    def scores(self, kept: Numbers) -> dict[str, dict[str, float]]:
        """Means over the student's grid."""
        if self.name not in kept:
            return {}
        own = kept[self.name][STUDENT]
        return {self.name: {key: own[f"mean_{key}"] for key in self.bounds}}


def _about(grid: "Grid") -> dict[str, Any]:
    return {name: getattr(grid, name) for name in ABOUT}


def _packaged() -> list[str]:
    return [str(recipe_folder() / "data" / name) for name in HAYSTACK]


def keep_heatmap(
    config: NeedleOptions, source: str, needle: Mapping[str, Any], models: Sequence[str],
    results: Path | None,
) -> Path | None:  # fmt: skip
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
