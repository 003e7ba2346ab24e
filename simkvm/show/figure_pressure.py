"""What memory pressure costs a guest's users as the host's memory shrinks: a line a variant."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simkvm.scenario.errors import InputError
from simkvm.show import style
from simkvm.show.caption import caption
from simkvm.show.figure_scaling import Measure, human_log_axis
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
from simkvm.units import format_duration, format_rate, format_size

MEASURES: Final = (
    Measure("requests_per_s", "Requests", "requests a second", format_rate),
    Measure("bytes_per_s", "Work", "bytes sorted a second", format_size),
    Measure("loads_per_s", "Work", "loads a second", format_rate),
    Measure("latency_p999_ns", "Latency, p99.9", "latency at the client", format_duration),
    Measure("vcpu_wall_ns", "Guest", "time until a vCPU has finished", format_duration),
)
"""Panels, of which those are shown that the runs have something to say about."""
MOST_PANELS: Final = 2
TOUCHES: Final = Measure("touches_per_s", "Guest", "touches a second", format_rate)
"""For guests that serve nobody and never end."""


@style.in_style
def under_pressure(results: OneOrMany, *, where: Where | None = None) -> Figure:
    """Throughput and tail latency against the host's memory: a line a variant, logarithmic.

    Replications appear as their mean, with a band from the least to the most. Raises InputError if
    the host's memory was not swept.
    """
    axis = ordered_axis(results, ".memory.size")
    if axis is None:
        raise InputError("this study does not sweep the host's memory", key="under_pressure")
    table = along_axis(results, axis, where=where)
    measures = [m for m in MEASURES if _says_something(table, m)][:MOST_PANELS] or [TOUCHES]
    colours = style.variant_colours(dict.fromkeys(table["variant"]))
    width = len(measures) * style.width_under(max(map(len, colours)) + 14)
    figure, panels = style.sheet(1, len(measures), width, 4.0 + 0.16 * len(colours))
    for panel, measure in zip(panels, measures, strict=True):
        _panel(panel, table, measure, axis, colours)
    style.entitle(
        figure,
        "What guests feel as the host's memory shrinks",
        caption(results, along(results, axis, where=where)),
    )
    return figure


def is_pressed(results: OneOrMany) -> bool:
    """Whether any point took a page from a guest."""
    return any(_stolen(result) for result in map(summary_of, listed(results)))


def _stolen(summary: object) -> bool:
    get = summary.get  # type: ignore[attr-defined]  # a mapping or a Series
    return bool(get("pgsteal_kswapd", 0) or get("pgsteal_direct", 0))


def _says_something(table: pd.DataFrame, measure: Measure) -> bool:
    if measure.column not in table or not (table[measure.column] > 0).any():
        return False
    endless = bool((table["vcpu_wall_ns"] >= table["sim_ns"]).all())
    return measure.column != "vcpu_wall_ns" or not endless


def _panel(
    panel: Axes,
    table: pd.DataFrame,
    measure: Measure,
    axis: AxisOfStudy,
    colours: dict[str, str],
) -> None:
    panel.set_yscale("log")
    style.lines_by_variant(panel, table, measure.column, colours)
    panel.set_title(measure.title)
    panel.set_xlabel(axis.key)
    panel.set_ylabel(measure.label)
    style.axis_ticks(panel.xaxis, axis)
    style.values_under(
        panel, table, measure.column, colours, at="the least", text=measure.text, smallest=True
    )
    human_log_axis(panel.yaxis, measure)
