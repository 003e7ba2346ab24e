"""One look for every figure: colours of kernels, line styles of call sites, axes with units.

Figures are made without pyplot, so that drawing needs no display, leaves nothing open, and two
threads or notebooks never share a "current figure". `Sheet` and `Panel` show themselves in a
notebook.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar, cast

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2DBase, ScaledTranslation

from simkvm.show.points import AxisOfStudy
from simkvm.units import format_duration, format_size

P = ParamSpec("P")
R = TypeVar("R")

INK = "#222222"
GREY = "#6b6b6b"
BANDS = ("#e4e9f0", "#f2f4f8")
SCREEN_DPI = 110
TABLE_TOP_PT = -38
TABLE_LINE_PT = 11

KERNEL_COLOURS = {
    "linux-6.1": "#8a8a8a",
    "linux-6.3": "#b5651d",
    "linux-6.4": "#8c564b",
    "linux-6.4-yuzhao-v1": "#e69f00",
    "linux-6.4-yuzhao-v2": "#cc79a7",
    "linux-6.4-upton": "#56b4e9",
    "linux-6.4-upton-count-test": "#0b7a75",
    "linux-6.12": "#0072b2",
    "linux-7.1": "#332288",
    "linux-7.1-read-locked": "#009e73",
    "linux-7.1-lockless": "#d55e00",
    "linux-6.12-x86": "#117733",
    "linux-6.15-x86": "#aa4499",
}
"""One colour a shipped variant, the same in every figure; told apart also by people who see no red
or green.
"""

SPARE_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#332288",
    "#8c564b",
    "#117733",
    "#8a8a8a",
)
"""For variants with overrides or names of the user's own, in the order in which they appear."""

LineStyle = Literal["-", "--", "-.", ":"] | tuple[float, tuple[float, ...]]

SITE_LINES: dict[str, LineStyle] = {
    "fault": "-",
    "age": "--",
    "range_start": "-.",
    "range_end": ":",
    "teardown": (0, (6, 1, 1, 1, 1, 1)),
    "memslot": (0, (8, 2)),
}
"""Line style of a call site of mmu_lock wherever sites share a panel."""

LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "figure.titlesize": 12.0,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
}


class Sheet(Figure):
    """A figure that a notebook shows when it is the last value of a cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=SCREEN_DPI)
        return buffer.getvalue()


class Panel(Axes):
    """Axes of a `Sheet`; shown in a notebook as the whole sheet."""

    def _repr_png_(self) -> bytes | None:
        figure = self.get_figure(root=True)
        return figure._repr_png_() if isinstance(figure, Sheet) else None


def in_style(draw: Callable[P, R]) -> Callable[P, R]:
    """Run `draw` under this module's look without touching the caller's matplotlib settings."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(LOOK):
            return draw(*args, **kwargs)

    return styled


def sheet(
    rows: int,
    columns: int,
    width: float,
    height: float,
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Sheet, list[Axes]]:
    """A sheet of panels in a grid, `width` x `height` inches, and the panels row by row."""
    figure = Sheet(figsize=(width, height), layout="constrained")
    grid = figure.subplots(
        rows,
        columns,
        sharex=sharex,
        sharey=sharey,
        squeeze=False,
        subplot_kw={"axes_class": Panel},
    )
    return figure, cast("list[Axes]", list(grid.flat))


def entitle(figure: Figure, title: str, caption: str) -> None:
    """Put what is seen on top, and under it all the caption: machine, seed, what was varied."""
    figure.suptitle(title, x=0.01, ha="left")
    characters = int(figure.get_figwidth() * 16.5)
    text = "\n".join(textwrap.wrap(caption, characters, break_on_hyphens=False))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=GREY)


def variant_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label; shipped kernels keep theirs, others take spare ones in order."""
    names = list(labels)
    shipped = {name: KERNEL_COLOURS[name] for name in names if name in KERNEL_COLOURS}
    free = [colour for colour in SPARE_COLOURS if colour not in shipped.values()] or [INK]
    spare = itertools.cycle(free)
    return {name: shipped.get(name) or next(spare) for name in names}


def duration_axis(axis: Axis, *, log: bool) -> None:
    """Label an axis of nanoseconds in ns, us, ms, s."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_duration(round(value))))
    if log:
        axis.set_major_locator(LogLocator(base=10, numticks=12))
    else:
        axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))


def size_axis(axis: Axis, *, log: bool) -> None:
    """Label an axis of bytes in KiB, MiB, GiB, at powers of two."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_size(round(value))))
    low, high = sorted(axis.get_view_interval())
    if log:
        axis.set_major_locator(LogLocator(base=2 if high < 64 * low else 4, numticks=12))
        axis.set_minor_locator(NullLocator())
        return
    axis.set_major_locator(FixedLocator(binary_ticks(low, high)))


def axis_ticks(axis: Axis, swept: AxisOfStudy) -> None:
    """Ticks exactly where points were measured, labelled as the scenario wrote them."""
    names = dict(zip(swept.numbers or (), map(str, swept.values), strict=False))
    axis.set_major_locator(FixedLocator(list(names)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: names.get(value, "")))


def binary_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most `most` multiples of one power of two that lie in [low, high] bytes."""
    if high <= low:
        return [low]
    step = 2.0 ** math.ceil(math.log2((high - low) / (most - 1)))
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def line_width(i: int) -> float:
    """Width of the i-th line of a panel: later ones are thinner, so that equal lines do not hide
    each other.
    """
    return max(2.6 - 0.6 * i, 1.0)


def lines_by_variant(
    ax: Axes, table: pd.DataFrame, column: str, colours: Mapping[str, str]
) -> None:
    """Draw `column` against `x`, a line a variant: the mean of replications, and a band over all of
    them.

    Values that a logarithmic axis cannot show (0, none) are left out.
    """
    for i, (variant, colour) in enumerate(colours.items()):
        rows = table[(table["variant"] == variant) & (table[column] > 0)]
        spread = rows.groupby("x")[column].agg(["mean", "min", "max"])
        width = line_width(i)
        ax.plot(
            *(spread.index, spread["mean"], "o-"),
            color=colour,
            linewidth=width,
            markersize=3.5 + width,
            label=variant,
        )
        if (spread["min"] < spread["max"]).any():
            ax.fill_between(
                spread.index, spread["min"], spread["max"], color=colour, alpha=0.2, linewidth=0
            )


def width_under(characters: int) -> float:
    """Inches that a panel with its axis labels needs for a table of such lines under it."""
    return max(5.0, 1.2 + characters * 4.3 / 72)


def values_under(
    ax: Axes,
    table: pd.DataFrame,
    column: str,
    colours: Mapping[str, str],
    *,
    at: str,
    text: Callable[[float], str],
    smallest: bool = False,
) -> None:
    """The legend as a small table under a panel: each variant with its mean at the largest `x`, or
    the smallest, called `at`. One that is 0 throughout has no line on a logarithmic axis.
    """
    width = max(len("variant"), *(len(variant) for variant in colours))
    line_under(ax, 0, f"{'variant':<{width}}  {'at ' + at:>12}", GREY)
    place = table["x"].min() if smallest else table["x"].max()
    last = table[table["x"] == place].groupby("variant")[column].mean()
    for i, (variant, colour) in enumerate(colours.items(), start=1):
        value = last.get(variant, math.nan)
        shown = "-" if math.isnan(value) else text(value)
        if nothing := bool((table.loc[table["variant"] == variant, column] == 0).all()):
            shown = "0 everywhere"
        line = f"{variant:<{width}}  {shown:>12}"
        line_under(ax, i, line, colour, sample=None if nothing else "-")


def line_under(
    ax: Axes, line: int, text: str, colour: str, sample: LineStyle | None = None
) -> None:
    """Write one line of a table under a panel, where it covers no data; `sample` puts a piece of
    line first.
    """
    height_pt = TABLE_TOP_PT - TABLE_LINE_PT * line
    ax.annotate(
        text,
        (0, 0),
        xycoords="axes fraction",
        xytext=(24, height_pt),
        textcoords="offset points",
        va="center",
        family="DejaVu Sans Mono",
        fontsize=7.0,
        color=colour,
        annotation_clip=False,
    )
    if sample is None:
        return
    corner = ScaledTranslation(0, 0, cast("Affine2DBase", ax.transAxes))
    piece = Line2D(
        [-4 / 72, 18 / 72], [height_pt / 72] * 2, color=colour, linestyle=sample, clip_on=False
    )
    piece.set_transform(cast("Figure", ax.get_figure(root=True)).dpi_scale_trans + corner)
    piece.set_label("_sample")
    ax.add_artist(piece)
