"""The report of `simkvm sensitivity`: a row a parameter, the largest swing beyond chance first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from simkvm.scenario.machine import Parameter
from simkvm.show.text import NOTHING, Row, titled_table, wrapped
from simkvm.study.effect import Effect, Tornado
from simkvm.study.sensitivity import Sensitivity
from simkvm.study.store import plain
from simkvm.units import format_count, format_duration, format_rate, format_size

WIDTH = 100
HEADERS = ("parameter", "basis", "low", "value", "high", "at low", "at high", "swing", "share")


def report(analysis: Sensitivity) -> RenderableType:
    """A table for each point or comparison, and what has no effect."""
    parts: list[RenderableType] = []
    for tornado in analysis.tornados:
        parts += _tornado(analysis, tornado)
    return Group(*parts)


def title(analysis: Sensitivity, tornado: Tornado) -> str:
    """What the metric is and is taken of, on one line."""
    place = ", ".join(f"{key}={value}" for key, value in tornado.axes.items())
    value = figure(analysis, tornado.value)
    if 0 < tornado.half_width < math.inf:
        value += f" +- {figure(analysis, tornado.half_width)}"
    return f"{analysis.metric} = {value}" + (f" at {place}" if place else "")


def figure(analysis: Sensitivity, value: float) -> str:
    """A value of the metric for people; of a comparison, a plain ratio."""
    if math.isnan(value):
        return NOTHING
    return f"{value:.4g}" if analysis.over else measured(analysis.metric, value)


def measured(name: str, value: float) -> str:
    """A value in the unit that its column's name ends with."""
    if "_ns" in name:
        return format_duration(value)
    if "_bytes" in name:
        return format_size(value)
    return format_rate(value) if name.endswith("_per_s") else format_count(value)


def together(analysis: Sensitivity, tornado: Tornado) -> str:
    """What all constants do at once, and what it would be if none changed what others do."""
    low, high = (figure(analysis, value) for value in (tornado.lowest, tornado.highest))
    said = f"All at once at the ends that lower it: {low}; at those that raise it: {high}"
    if analysis.over:  # changes of a quotient do not add up, whether or not constants interact
        return f"{said}."
    sums = [figure(analysis, value) for value in tornado.added_up]
    return f"{said} (if the change by each one alone simply added up: {sums[0]} and {sums[1]})."


def setting(parameter: Parameter, value: float) -> str:
    """A value of a parameter, in its own unit."""
    return format_duration(value) if parameter.unit == "ns" else f"{value:g}"


def row(analysis: Sensitivity, effect: Effect) -> tuple[str, ...]:
    """One parameter as the table shows it, under `HEADERS`."""
    parameter = effect.parameter
    numbers = (parameter.low, parameter.value, parameter.high)
    return (
        parameter.name,
        parameter.basis,
        *(setting(parameter, number) for number in numbers),
        figure(analysis, effect.at_low),
        figure(analysis, effect.at_high),
        figure(analysis, effect.swing),
        NOTHING if math.isnan(effect.share) else f"{effect.share:.1%}",
    )


def _tornado(analysis: Sensitivity, tornado: Tornado) -> list[RenderableType]:
    headers: Row = HEADERS
    rows: list[Row] = [row(analysis, effect) for effect in tornado.moving]
    if analysis.replications > 1:
        headers = (*HEADERS, "noise")
        noise = [
            figure(analysis, effect.half_width) + ("" if effect.beyond_chance else " *")
            for effect in tornado.moving
        ]
        rows = [(*line, last) for line, last in zip(rows, noise, strict=True)]
    parts: list[RenderableType] = [titled_table(title(analysis, tornado), headers, rows, left=2)]
    if analysis.replications > 1:
        parts.append(Text("  noise: 95 % half width of the change from low to high; *: within it"))
    if not math.isnan(tornado.lowest + tornado.highest):
        parts.append(Text(f"  {together(analysis, tornado)}"))
    for words, names in (
        ("Changed the run, not the metric", tornado.still),
        ("Used by no run", tornado.unused),
    ):
        if names:
            parts.append(Text(wrapped(f"{words} ({len(names)}): {', '.join(names)}.", WIDTH)))
    return [*parts, Text("")]


def document(analysis: Sensitivity) -> dict[str, Any]:
    """What `--json` prints: the same rows with plain numbers, null where there is none."""
    found = {
        "name": analysis.name,
        "metric": analysis.metric,
        "over": analysis.over,
        "replications": analysis.replications,
        "points": [_point(tornado) for tornado in analysis.tornados],
        "failed": analysis.failed,
    }
    return dict(plain(found))


def _point(tornado: Tornado) -> Mapping[str, Any]:
    return {
        "axes": tornado.axes,
        "value": tornado.value,
        "half_width": tornado.half_width,
        "lowest": tornado.lowest,
        "highest": tornado.highest,
        "rows": [_effect(effect) for effect in tornado.moving],
        "still": tornado.still,
        "unused": tornado.unused,
    }


def _effect(effect: Effect) -> Mapping[str, Any]:
    parameter = effect.parameter
    names: Sequence[str] = ("low", "value", "high", "unit", "basis", "source")
    return {
        "parameter": parameter.name,
        **{name: getattr(parameter, name) for name in names},
        "at_low": effect.at_low,
        "at_high": effect.at_high,
        "swing": effect.swing,
        "share": effect.share,
        "half_width": effect.half_width,
    }
