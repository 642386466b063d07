"""Charts as SVG without a background, in colours that the page sets for light and dark.

matplotlib draws with stand-in colours, which become CSS variables in the SVG: `--ink`, `--grid`,
`--soft` and `--c0` to `--c7`. Letters stay text, in the font of the page.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING

from mambactl.figures import new_figure
from mambactl.json_values import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# about as wide as a phone: text keeps its size there, and two fit side by side elsewhere
INCHES = (4.9, 3.1)
# no common divisor: a colour comes back with another marker
COLOURS = 8
MARKERS = "os^Dv<>"
# the colour of what is no model of its own: a teacher, a guess
NEUTRAL = -1
INK, GRID, SOFT = "#12ab01", "#12ab02", "#12ab03"
_STAND_IN = {INK: "var(--ink)", GRID: "var(--grid)", SOFT: "var(--soft)"} | {
    f"#34cd{n:02x}": f"var(--c{n})" for n in range(COLOURS)
}
TIPS = "tips-"
_LINES = {"solid": "-", "dashed": (0, (4, 2.5)), "dotted": (0, (1, 2))}

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Points (x, y) in the colour and with the marker of number `colour`.

    A `faint` line is drawn thin and without markers; `errors` are 95 % intervals of y (or of x in
    dots), one per point or None.
    """

    name: str
    colour: int
    points: Points
    line: str = "solid"
    faint: bool = False
    errors: Sequence[tuple[float, float] | None] = ()

    def drawn(self) -> Iterator[tuple[float, float, tuple[float, float] | None]]:
        """x, y and interval of every point that has a place on paper."""
        errors = [*self.errors, *[None] * (len(self.points) - len(self.errors))]
        for (x, y), bounds in zip(self.points, errors, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                yield x, y, bounds if bounds and all(map(math.isfinite, bounds)) else None


def colour(number: int) -> str:
    """The stand-in for a series' colour."""
    return SOFT if number == NEUTRAL else f"#34cd{number % COLOURS:02x}"


def marker(number: int) -> str:
    """matplotlib's name of a series' marker."""
    return "" if number == NEUTRAL else MARKERS[number % len(MARKERS)]


def lines(
    series: Iterable[Series], x: str, y: str, log_x: bool = False, log_y: bool = False
) -> str:
    """Curves; every x with a point is a tick of a logarithmic axis."""
    shown = list(series)
    with _drawing() as (figure, axes):
        for each in shown:
            _curve(axes, each)
        _label(axes, x, y)
        if log_y:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        if log_x:
            _ticks_at_points(axes, shown)
        else:
            axes.xaxis.set_major_formatter(lambda value, _: short(value))
        return _svg(figure)


def steps(series: Iterable[Series], labels: Sequence[str], x: str, y: str) -> str:
    """Lines over named positions, with a dot at each: x counts the labels."""
    with _drawing() as (figure, axes):
        for each in series:
            _curve(axes, each)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        axes.set_ylim(bottom=0)
        _label(axes, x, y)
        return _svg(figure)


def dots(
    series: Iterable[Series],
    labels: Sequence[str],
    x: str,
    log_x: bool = False,
    mark: float | None = None,
    height: float | None = None,
) -> str:
    """A row per label, first on top, with a dot per series: points are (value, row).

    A dashed line stands at `mark`; `height` is in inches.
    """
    drawn = list(series)
    height = height or 0.75 + max(0.34 * len(labels), 0.16 * len(labels) * len(drawn))
    with _drawing((INCHES[0], height)) as (figure, axes):
        for number, each in enumerate(drawn):
            # side by side within the row, so that dots do not hide each other
            shift = 0.5 * ((number + 0.5) / len(drawn) - 0.5)
            for value, row, bounds in each.drawn():
                if bounds:
                    axes.hlines(row + shift, *bounds, color=colour(each.colour), lw=1.2)
                tip = f"{each.name}, {labels[int(row)]}: {value:,.4g}"
                axes.plot(
                    [value],
                    [row + shift],
                    marker=marker(each.colour),
                    ms=5.5,
                    ls="",
                    color=colour(each.colour),
                    gid=_tips([tip]),
                )
        if mark is not None:
            axes.axvline(mark, color=SOFT, lw=1.2, ls=_LINES["dashed"])
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        if log_x:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        _label(axes, x, "")
        return _svg(figure)


def histogram(counts: dict[int, int], number: int, x: str, y: str) -> str:
    """Bars at whole numbers, as shares of all, each with its share written above."""
    total = sum(counts.values())
    with _drawing((INCHES[0], 2.4)) as (figure, axes):
        shares = [value / total for value in counts.values()]
        bars = axes.bar(list(counts), shares, width=0.7, color=colour(number))
        axes.bar_label(bars, [f"{100 * share:.0f} %" for share in shares], padding=2, fontsize=8)
        axes.set_xticks(list(counts))
        axes.set_ylim(0, 1.15 * max(shares))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        _label(axes, x, y)
        return _svg(figure)


def heat(
    scores: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], x: str, y: str
) -> str:
    """Scores from 0 to 1 as cells, each with its number in a colour that shows on it."""
    height = 1.0 + 0.36 * len(rows)
    with _drawing((INCHES[0], height)) as (figure, axes):
        axes.grid(False)
        # cells, because a picture inside the picture would be pixels
        wide, high = ([n - 0.5 for n in range(len(names) + 1)] for names in (columns, rows))
        axes.pcolormesh(wide, high, scores, vmin=0, vmax=1, cmap="cividis", ec="face", lw=0.4)
        for row, values in enumerate(scores):
            for column, value in enumerate(values):
                light = value > 0.55
                axes.text(
                    column,
                    row,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#111111" if light else "#ffffff",
                )
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _label(axes, x, y)
        return _svg(figure)


@contextmanager
def _drawing(inches: tuple[float, float] = INCHES) -> Iterator[tuple["Figure", "Axes"]]:
    new_figure(inches)  # says what is missing before matplotlib is imported here
    from matplotlib import rc_context

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mambactl",
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.formatter.use_mathtext": False,
        "text.parse_math": False,
    }
    with rc_context(style):  # pyright: ignore[reportArgumentType]
        figure = new_figure(inches)
        yield figure, figure.add_subplot()


def _curve(axes: "Axes", each: Series) -> None:
    style: JsonObject = {"lw": 0.7, "alpha": 0.55}
    points = list(each.drawn())
    if not each.faint:
        style = {"marker": marker(each.colour), "lw": 1.6, "ms": 4.5, "clip_on": False}
        style["gid"] = _tips(f"{each.name}: {y:,.4g} at {short(x)}" for x, y, _ in points)
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.plot(xs, ys, color=colour(each.colour), ls=_LINES[each.line], **style)
    for x, _, bounds in points:
        if bounds:
            axes.vlines(x, *bounds, color=colour(each.colour), lw=1)


def _tips(texts: Iterable[str]) -> str:
    """The name of a drawn line, of which `_told` makes the text of each point under the pointer."""
    return f"{TIPS}{json.dumps(list(texts)).encode().hex()}"


def _told(svg: str) -> str:
    """The SVG with a title in every point that has a text."""
    parts = re.split(rf'<g id="{TIPS}([0-9a-f]*)">', svg)
    told = parts[:1]
    for number, (texts, drawn) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        told.append(
            f'<g id="points-{number}">{_with_titles(drawn, json.loads(bytes.fromhex(texts)))}'
        )
    return "".join(told)


def _with_titles(drawn: str, texts: Sequence[str]) -> str:
    """Texts for the first marks in `drawn`, which are those of the line that begins there."""
    marks = re.compile(r"<use ([^>]*)/>")
    if len(marks.findall(drawn.partition('<g id="')[0])) != len(texts):
        # a point without a place on a logarithmic axis, say
        return drawn
    left = iter(texts)
    titled = partial(_titled, left)
    return marks.sub(titled, drawn, count=len(texts))


def _titled(texts: Iterator[str], found: re.Match[str]) -> str:
    return f"<use {found[1]}><title>{escape(next(texts))}</title></use>"


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _ticks_at_points(axes: "Axes", series: Iterable[Series]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = sorted({x for each in series for x, _ in each.points})
    axes.margins(x=0.07)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: short(value))


def _plain_ticks(axis: "Axis") -> None:
    """Numbers as people write them, also between powers of ten where there are few of those."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(lambda value, _: "")


def short(value: float) -> str:
    """A count in few letters: 512, 4k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size and not (letter == "k" and value < 1e4 and value % 1024 and value % 1000):
            # context lengths are powers of two
            unit = 1024 if letter == "k" and value % 1024 == 0 else size
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"


def folded(text: str, width: int = 22) -> str:
    """A label of a chart in three lines at most; names differ at their ends, so both are kept."""
    lines = wrap(text, width, break_on_hyphens=False)
    if len(lines) > 3:
        lines = [lines[0], f"{lines[1][: width - 4]} ...", text[-width:].lstrip()]
    return "\n".join(lines)


def named_apart(svg: str, prefix: str) -> str:
    """The SVG with a prefix before all of its names, which several charts on a page would share."""
    text = re.sub(r'\bid="', f'id="{prefix}', svg)
    return text.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')


def _svg(figure: "Figure") -> str:
    figure.tight_layout(pad=0.4)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # inside HTML neither is needed, and nothing of the page may look like an address
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    # the page sets font and joints; a style element in here would be about all of it
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = _told(re.sub(r"font-family: [^;]*; ", "", text))
    for stand_in, variable in _STAND_IN.items():
        text = text.replace(stand_in, variable)
    return text
