"""Figures of matplotlib, which is no dependency of most commands."""

from typing import TYPE_CHECKING

from mambactl.errors import ResourceError
from mambactl.requirements import install_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# dots per inch of a picture
DPI = 150


def literal(text: str) -> str:
    """Text of a user for a label or title, in which matplotlib reads `$...$` as mathematics."""
    return text.replace("$", r"\$")


def new_figure(inches: tuple[float, float]) -> "Figure":
    """An empty figure; ResourceError without matplotlib."""
    try:
        # no window system and no global state: the figure is drawn into a file
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ResourceError(
            "plots need matplotlib, which is missing", install_line("matplotlib")
        ) from None
    figure = Figure(figsize=inches)
    FigureCanvasAgg(figure)
    return figure
