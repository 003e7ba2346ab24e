"""What ageing costs as a guest grows: the pass, and the vCPUs that share mmu_lock with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

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
from simkvm.units import format_duration, format_rate

LEAST_SPAN = 1.5
"""From the bottom of a panel to its top."""


class Measure(NamedTuple):
    """One column of the summary as a panel shows it."""

    column: str
    title: str
    label: str
    text: Callable[[float], str]


PASS_TIME = Measure("ageing_pass_mean_ns", "Ageing pass", "mean time of a pass", format_duration)
WALL_TIME = Measure("vcpu_wall_ns", "Guest", "time until a vCPU has finished", format_duration)
THROUGHPUT = Measure("touches_per_s", "Guest", "touches by all vCPUs", format_rate)


@style.in_style
def ageing_scaling(results: OneOrMany, *, where: Where | None = None) -> Figure:
    """Time of an ageing pass, and of the guest, against vCPUs: a line a variant, all axes
    logarithmic.

    Where vCPUs never finish (endless patterns, a fixed duration) the right panel shows touches a
    second instead. Replications appear as their mean, with a band from the least to the most.
    Raises InputError if the number of vCPUs was not swept.
    """
    axis = ordered_axis(results, ".vcpus")
    if axis is None:
        raise InputError("this study does not sweep the number of vCPUs", key="ageing_scaling")
    table = along_axis(results, axis, where=where)
    colours = style.variant_colours(dict.fromkeys(table["variant"]))
    width = 2 * style.width_under(max(map(len, colours)) + 14)
    figure, panels = style.sheet(1, 2, width, 4.0 + 0.16 * len(colours))
    for panel, measure in zip(panels, (PASS_TIME, guest_measure(table)), strict=True):
        _panel(panel, table, measure, axis, colours)
    style.entitle(
        figure,
        "Ageing and guest against the number of vCPUs",
        caption(results, along(results, axis, where=where)),
    )
    return figure


def guest_measure(table: pd.DataFrame) -> Measure:
    """Wall time of a vCPU, or throughput where every vCPU runs until the end of the simulation."""
    endless = bool((table["vcpu_wall_ns"] >= table["sim_ns"]).all())
    return THROUGHPUT if endless else WALL_TIME


def ages(results: OneOrMany) -> bool:
    """Whether any point completed an ageing pass."""
    return any(summary_of(result).get("ageing_passes", 0) > 0 for result in listed(results))


def _panel(
    panel: Axes,
    table: pd.DataFrame,
    measure: Measure,
    axis: AxisOfStudy,
    colours: dict[str, str],
) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    style.lines_by_variant(panel, table, measure.column, colours)
    panel.set_title(measure.title)
    panel.set_xlabel(axis.key)
    panel.set_ylabel(measure.label)
    style.axis_ticks(panel.xaxis, axis)
    at = f"{axis.last} vCPUs"
    style.values_under(panel, table, measure.column, colours, at=at, text=measure.text)
    human_log_axis(panel.yaxis, measure)


def _spread(axis: Axis) -> tuple[float, float]:
    """The ends of a y axis, made to span `LEAST_SPAN` at least: noise does not fill it."""
    low, high = axis.get_view_interval()
    wider = math.sqrt(max(LEAST_SPAN * low / high, 1.0))
    return axis.axes.set_ylim(low / wider, high * wider)


def human_log_axis(axis: Axis, measure: Measure) -> None:
    """Ticks at 1, 2 and 5 a decade, or evenly where the curves span too little for that."""
    low, high = _spread(axis)
    close = high < 4 * low
    axis.set_major_locator(
        MaxNLocator(nbins=5) if close else LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12)
    )
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda value, _: measure.text(value))
