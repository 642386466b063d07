"""Pictures of needle grids: one panel per model, length to the right and depth downwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mambactl.figures import DPI, literal, new_figure
from mambactl.present import present

# even to the eye, in grey and to the colour-blind
COLOURS = "cividis"
PANEL, LEGEND, HEIGHT = 0.55, 1.6, 4.2  # inches: per length, beside a grid, of all
FEWEST_LENGTHS = 5


def draw_grids(
    panels: Mapping[str, Sequence[Sequence[float]]],
    lengths: Sequence[int],
    depths: Sequence[float],
    title: str,
    out: Path,
) -> None:
    """Write a PNG of scores 0 to 1, `panels` name -> [lengths][depths]; depths are 0 to 1.

    Raises ResourceError without matplotlib.
    """
    width = (max(len(lengths), FEWEST_LENGTHS) * PANEL + LEGEND) * len(panels)
    figure = new_figure((width, HEIGHT))
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    image = None
    for axes, (name, scores) in zip(every, panels.items(), strict=True):
        by_depth = [list(column) for column in zip(*scores, strict=True)]
        image = axes.imshow(by_depth, vmin=0, vmax=1, cmap=COLOURS, aspect="auto")
        cells = [score for row in scores for score in row]
        axes.set_title(f"{literal(name)}: {sum(cells) / len(cells):.2f}")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=60)
        axes.set_xlabel("tokens")
    every[0].set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    every[0].set_ylabel("depth of the needle")
    figure.suptitle(literal(title))
    figure.tight_layout()
    figure.colorbar(present(image), ax=list(every), label="retrieved")
    # a format by name: the file is written under another one first
    figure.savefig(out, dpi=DPI, format="png")
