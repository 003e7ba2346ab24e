"""What RCU callbacks that free tables take, by the size of a table and what is done with it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simkvm.scenario.errors import InputError
from simkvm.show import style
from simkvm.show.caption import caption
from simkvm.show.points import (
    AxisOfStudy,
    OneOrMany,
    Where,
    along,
    along_axis,
    listed,
    ordered_axis,
    summary_of,
)
from simkvm.units import format_duration

PANELS = {
    "callback_ns_per_table": ("A table", "callback time of one table"),
    "callback_ns_per_unmapped_gib": ("A GiB unmapped", "callback time for each GiB taken back"),
}
"""Columns of the summary, by panel, with title and label."""


@style.in_style
def callback_cost(results: OneOrMany, *, where: Where | None = None) -> Figure:
    """Callback time of a table, and of a GiB unmapped, against the page size: a line a variant.

    A page size is the size of a table, of an eighth as many entries as it has bytes. Raises
    InputError if page sizes were not swept.
    """
    axis = ordered_axis(results, ".page_size")
    if axis is None:
        raise InputError("this study does not sweep the page size", key="callback_cost")
    table = along_axis(results, axis, where=where)
    colours = style.variant_colours(dict.fromkeys(table["variant"]))
    width = 2 * style.width_under(max(map(len, colours)) + 14)
    figure, panels = style.sheet(1, 2, width, 4.0 + 0.16 * len(colours))
    for panel, (column, (title, label)) in zip(panels, PANELS.items(), strict=True):
        panel.set_title(title)
        panel.set_ylabel(label)
        _frame(panel, axis)
        style.lines_by_variant(panel, table, column, colours)
        style.duration_axis(panel.yaxis, log=True)
        at = f"{axis.last} pages"
        style.values_under(panel, table, column, colours, at=at, text=format_duration)
    style.entitle(
        figure,
        "Freeing tables by RCU: time in callbacks",
        caption(results, along(results, axis, where=where)),
    )
    return figure


def _frame(panel: Axes, axis: AxisOfStudy) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(axis.key)
    style.axis_ticks(panel.xaxis, axis)


def frees_in_callbacks(results: OneOrMany) -> bool:
    """Whether a callback freed a table in any point."""
    return any(summary_of(result).get("callbacks", 0) > 0 for result in listed(results))
