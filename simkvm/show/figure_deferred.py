"""How much page-table memory waits for grace periods: over time, and against the rate of unmaps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simkvm.scenario.errors import InputError
from simkvm.show import style
from simkvm.show.caption import caption
from simkvm.show.points import (
    OneOrMany,
    ResultLike,
    Where,
    along,
    along_axis,
    listed,
    ordered_axis,
    summary_of,
    variants,
)
from simkvm.units import format_duration, format_size

MOST_BANDS = 120
MOST_STEPS = 8_000
PEAK_MARGIN_GRACE_PERIODS = 5

Window = tuple[int, int]


class Steps(NamedTuple):
    """A step function over a window: each value holds until the next t_ns; the last ends it."""

    t_ns: npt.NDArray[np.int64]
    value: npt.NDArray[np.int64]

    def mean(self) -> float:
        """Mean over time."""
        return float(np.average(self.value[:-1], weights=np.diff(self.t_ns)))

    def peak(self) -> tuple[int, int]:
        """When the largest value began, and the value."""
        i = int(np.argmax(self.value))
        return int(self.t_ns[i]), int(self.value[i])


@style.in_style
def deferred_memory(
    results: OneOrMany, window_ns: Window | None = None, *, where: Where | None = None
) -> Figure:
    """Bytes of unlinked tables whose page is not free yet, over time, one panel a variant.

    Grace periods are the light bands behind; mean and peak are of the window shown, which is the
    whole run unless `window_ns` = (start, end) in simulated nanoseconds. Of several replications
    the first is shown. Variants in which no table ever waits have no panel but are named in the
    caption. Raises InputError if the window is empty or nothing was simulated in it.
    """
    first = {label: group[0] for label, group in variants(results, where=where).items()}
    window = window_ns or (0, max(int(summary_of(r)["sim_ns"]) for r in first.values()))
    shown = {label: result for label, result in first.items() if _peak(result) > 0} or first
    figure, panels = style.sheet(len(shown), 1, 9.0, 1.0 + 2.0 * len(shown), sharex=True)
    colours = style.variant_colours(first)
    for panel, (label, result) in zip(panels, shown.items(), strict=True):
        deferred_panel(panel, result, window, colours[label])
        panel.set_title(label)
    _share_size_axis(panels)
    panels[-1].set_xlabel(_time_label(list(shown.values()), window))
    part = "" if window_ns is None else f", {' to '.join(map(format_duration, window_ns))}"
    without = [label for label in first if label not in shown]
    style.entitle(
        figure,
        f"Page-table memory waiting for grace periods{part}",
        caption(results, list(first.values()))
        + (f" · no table ever waits with {', '.join(without)}" if without else ""),
    )
    return figure


@style.in_style
def deferred_peak(results: OneOrMany, *, where: Where | None = None) -> Figure:
    """`deferred_memory` around the highest peak of all variants, some grace periods each side."""
    shown = [group[0] for group in variants(results, where=where).values()]
    highest = max(shown, key=lambda result: int(result.timeline["deferred_bytes"].max()))
    return deferred_memory(results, _around_peak(highest), where=where)


@style.in_style
def deferred_panel(
    ax: Axes, result: ResultLike, window_ns: Window | None = None, colour: str = "#d55e00"
) -> Axes:
    """Draw one run's deferred bytes into `ax`, with grace periods, mean and peak."""
    sim_ns = int(summary_of(result)["sim_ns"])
    window = window_ns or (0, sim_ns)
    steps = steps_in(result.timeline, "deferred_bytes", (window[0], min(window[1], sim_ns)))
    _grace_periods(ax, result.grace_periods, window)
    drawn = thinned(steps, MOST_STEPS)
    t_ns, value = drawn.t_ns, drawn.value
    ax.fill_between(t_ns, value, step="post", color=colour, alpha=0.25, linewidth=0, zorder=2)
    ax.step(t_ns, value, where="post", color=colour, linewidth=1.0, label="deferred", zorder=3)
    ax.set_xlim(*window)
    ax.set_ylim(0, max(steps.peak()[1], 1) * 1.3)
    style.duration_axis(ax.xaxis, log=False)
    style.size_axis(ax.yaxis, log=False)
    ax.grid(visible=False, axis="x")
    ax.set_ylabel("deferred")
    _mean_and_peak(ax, steps, result.timeline, colour)
    return ax


@style.in_style
def deferred_vs_rate(results: OneOrMany, *, where: Where | None = None) -> Figure:
    """Mean and peak deferred bytes against the swept rate, a line a variant; both axes logarithmic.

    Replications appear as their mean, with a band from the least to the most. Variants that never
    defer have no line, and the table says so. Raises InputError if no rate was swept.
    """
    axis = ordered_axis(results, ".rate")
    if axis is None:
        raise InputError("this study sweeps no rate", key="deferred_vs_rate")
    table = along_axis(results, axis, where=where)
    colours = style.variant_colours(dict.fromkeys(table["variant"]))
    width = 2 * style.width_under(max(map(len, colours)) + 14)
    figure, panels = style.sheet(1, 2, width, 4.0 + 0.16 * len(colours), sharey=True)
    for panel, column in zip(panels, ("mean", "peak"), strict=True):
        name = f"deferred_bytes_{column}"
        panel.set_xscale("log")
        panel.set_yscale("log", base=4)
        style.lines_by_variant(panel, table, name, colours)
        panel.set_title(f"{column} over the run")
        panel.set_xlabel(axis.key)
        style.axis_ticks(panel.xaxis, axis)
        style.size_axis(panel.yaxis, log=True)
        style.values_under(panel, table, name, colours, at=axis.last, text=format_size)
    panels[0].set_ylabel("deferred page-table memory")
    style.entitle(
        figure,
        "Page-table memory waiting for grace periods, by rate",
        caption(results, along(results, axis, where=where)),
    )
    return figure


def defers(results: OneOrMany) -> bool:
    """Whether any table ever waited for a grace period."""
    return any(_peak(result) > 0 for result in listed(results))


def _peak(result: ResultLike) -> float:
    return float(summary_of(result).get("deferred_bytes_peak", 0))


def steps_in(timeline: pd.DataFrame, column: str, window_ns: Window) -> Steps:
    """One column of a timeline between start and end, with the values there first and last.

    Raises InputError if the window is empty or the timeline is.
    """
    start, end = window_ns
    times = timeline["t_ns"].to_numpy(dtype=np.int64)
    values = timeline[column].to_numpy(dtype=np.int64)
    if end <= start or not len(times):
        raise InputError(f"nothing to show from {start} ns to {end} ns", key="window_ns")
    before = int(np.searchsorted(times, start, side="right")) - 1
    first = values[before] if before >= 0 else 0
    inside = (times > start) & (times < end)
    cut = np.concatenate([[first], values[inside]])
    return Steps(
        np.concatenate([[start], times[inside], [end]]), np.append(cut, cut[-1]).astype(np.int64)
    )


def thinned(steps: Steps, most: int) -> Steps:
    """About `most` steps that look the same: of each slice, its lowest and its highest value."""
    if len(steps.t_ns) <= most:
        return steps
    edges = np.linspace(0, len(steps.t_ns), most // 2 + 1).astype(int)
    kept = {0, len(steps.t_ns) - 1}
    for low, high in pairwise(edges):
        part = steps.value[low:high]
        kept |= {int(low + part.argmin()), int(low + part.argmax())}
    index = np.array(sorted(kept))
    return Steps(steps.t_ns[index], steps.value[index])


def _grace_periods(ax: Axes, periods: pd.DataFrame, window: Window) -> None:
    """A band for each grace period, in two tints by turns, and a tick at the top where it ended.

    What stays white had no grace period. A window with too many of them for the eye has no bands.
    """
    seen = _seen(periods, window)
    if len(seen) > MOST_BANDS:
        return
    top = ax.get_xaxis_transform()
    for first, tint in enumerate(style.BANDS):
        some = seen.iloc[first :: len(style.BANDS)]
        spans = list(zip(some["start_ns"], some["end_ns"] - some["start_ns"], strict=True))
        ax.broken_barh(spans, (0, 1), transform=top, color=tint, zorder=0, label="_bands")
    ends = seen["end_ns"]
    ax.vlines(ends, 0.97, 1, transform=top, color=style.GREY, linewidth=0.6, label="_ends")


def _seen(periods: pd.DataFrame, window: Window) -> pd.DataFrame:
    return periods[(periods["end_ns"] > window[0]) & (periods["start_ns"] < window[1])]


def _time_label(results: Sequence[ResultLike], window: Window) -> str:
    most = max(len(_seen(result.grace_periods, window)) for result in results)
    if most > MOST_BANDS:
        return f"simulated time ({most} grace periods, too many to show)"
    return "simulated time (bands: grace periods)"


def _mean_and_peak(ax: Axes, steps: Steps, timeline: pd.DataFrame, colour: str) -> None:
    at, most = steps.peak()
    mean = steps.mean()
    if most == 0:
        nothing = "no table waits for a grace period"
        ax.text(0.5, 0.5, nothing, transform=ax.transAxes, ha="center", color=style.GREY)
        return
    ax.axhline(mean, color=style.INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=4, label="mean")
    ax.annotate(
        f"mean\n{format_size(round(mean))}",
        (1, mean),
        xycoords=("axes fraction", "data"),
        xytext=(4, -2),
        textcoords="offset points",
        va="bottom",  # a mean near 0 would reach down to the last tick's label
        fontsize=8,
        annotation_clip=False,
    )
    ax.plot([at], [most], "v", color=colour, zorder=5, label="peak")
    left = at < sum(ax.get_xlim()) / 2
    ax.annotate(
        _peak_text(at, most, timeline),
        (at, most),
        xytext=(8 if left else -8, 5),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        fontsize=8,
    )


def _peak_text(at: int, most: int, timeline: pd.DataFrame) -> str:
    row = timeline[timeline["t_ns"] <= at].iloc[-1]
    text = (
        f"peak {format_size(most)} at {format_duration(at)}: {int(row['deferred_tables'])} tables"
    )
    real = float(row["table_bytes"])
    return f"{text}, {most / real:.1%} of table memory" if real > 0 else text


def _around_peak(result: ResultLike) -> Window:
    sim_ns = int(summary_of(result)["sim_ns"])
    at, _ = steps_in(result.timeline, "deferred_bytes", (0, sim_ns)).peak()
    periods: Any = result.grace_periods
    if periods.empty:
        return 0, sim_ns
    margin = PEAK_MARGIN_GRACE_PERIODS * int((periods["end_ns"] - periods["start_ns"]).median())
    return max(at - margin, 0), min(at + margin, sim_ns)


def _share_size_axis(panels: list[Axes]) -> None:
    top = max(panel.get_ylim()[1] for panel in panels)
    for panel in panels:
        panel.set_ylim(0, top)
        style.size_axis(panel.yaxis, log=False)
