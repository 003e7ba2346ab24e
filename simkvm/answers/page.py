"""What the pages share: tables, numbers with their intervals, assumptions, and how they end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Protocol

from simkvm.answers.runs import Runs
from simkvm.scenario.load import MODEL_VERSION
from simkvm.show.sensitivity import figure, setting, together
from simkvm.study.effect import Effect, Tornado
from simkvm.study.sensitivity import Sensitivity
from simkvm.study.statistics import Interval
from simkvm.units import format_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ASSUMPTIONS = 5
DPI = 90
"""Of the figures beside a page: each stays below 100 kB."""


def fill(name: str, **parts: object) -> str:
    """The text of a page: its template with every `$part` filled in. Raises KeyError if one is
    missing.
    """
    text = resources.files("simkvm.answers").joinpath("templates", f"{name}.md")
    return Template(text.read_text(encoding="utf-8")).substitute(parts)


def put(figure: Figure, path: Path) -> None:
    """Write a figure beside a page."""
    from simkvm.show.figures import write

    write(figure, path, DPI)


class Page(Protocol):
    """A page: its file below the folder of documents, and how it is made."""

    path: str

    def write(self, runs: Runs, folder: Path) -> str:
        """Run what it needs, put its figures into `folder`, and return its text."""
        ...


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [headers, [":--", *["--:"] * (len(headers) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: Interval) -> str:
    """A ratio as a change: 1.02 +- 0.003 is "+2.0 % ± 0.3"."""
    change = round(100 * (share.mean - 1), 1) or 0.0  # not -0.0
    half = round(100 * share.half_width, 1) if math.isfinite(share.half_width) else 0
    return f"{change:+.1f} %" + (f" ± {half:.1f}" if half else "")


def times(share: Interval) -> str:
    """A ratio as it is."""
    return f"{share.mean:.3g}" + (f" ± {share.half_width:.2g}" if _told(share) else "")


def duration(span: Interval) -> str:
    """A time in ns, us, ms."""
    said = f" ± {format_duration(span.half_width)}" if _told(span) else ""
    return format_duration(span.mean) + said


def _told(value: Interval) -> bool:
    """Whether a half width says anything: one below a thousandth is left out."""
    return abs(value.mean) / 1000 < value.half_width < math.inf


def assumptions(analysis: Sensitivity, tornado: Tornado) -> str:
    """What a figure hangs on: its span over the estimates, and what moves it furthest."""
    estimates = tornado.among("E")
    ends = [(e.at_low, e.at_high) for e in estimates]
    reached = [x for pair in ends for x in pair if not math.isnan(x)]
    span = ""
    if reached:
        low, high = min([*reached, tornado.value]), max([*reached, tornado.value])
        span = (
            f"With one estimate at a time at its low or high it lies between "
            f"{figure(analysis, low)} and {figure(analysis, high)}; it is "
            f"{figure(analysis, tornado.value)} with all at their values.\n\n"
        )
    headers: list[str] = ["constant", "basis", "low", "value", "high", "at low", "at high"]
    chance = analysis.replications > 1
    rows = [_row(analysis, effect, chance) for effect in tornado.moving[:MOST_ASSUMPTIONS]]
    moved = f"{len(tornado.moving)} of {len(tornado.effects)} constants move it"
    if chance:
        headers.append("chance")
        moved += (
            f", {len(tornado.telling)} of them by more than chance (*chance*: 95 % half width of "
            f"the change from low to high, {analysis.replications} replications; the table is in "
            "the order of what a constant moves beyond that)"
        )
    said = f"{span}{table(headers, rows)}\n\n{moved}."
    if not math.isnan(tornado.lowest + tornado.highest):
        said += f" {together(analysis, tornado)}"
    return said


def _row(analysis: Sensitivity, effect: Effect, chance: bool) -> list[str]:
    parameter = effect.parameter
    numbers = (parameter.low, parameter.value, parameter.high)
    return [
        f"`{parameter.name}`",
        parameter.basis,
        *(setting(parameter, number) for number in numbers),
        figure(analysis, effect.at_low),
        figure(analysis, effect.at_high),
        *([_chance(analysis, effect)] if chance else []),
    ]


def _chance(analysis: Sensitivity, effect: Effect) -> str:
    mark = "" if effect.beyond_chance else " (within chance)"
    return f"± {figure(analysis, effect.half_width)}{mark}"


def bases() -> str:
    """What the letters of a basis mean."""
    return (
        "Basis of a constant: V read in its source, D derived from what was read, R recalled, "
        "E an estimate (`simkvm machines NAME` has the reasons)."
    )


def ending(runs: Runs, command: str) -> str:
    """The commands that make the page's numbers, and what made them when."""
    commands = "\n".join(f"    {line}" for line in runs.commands)
    version = metadata.version("simkvm")
    day = datetime.now(UTC).date().isoformat()
    return (
        f"## How these numbers are made\n\n{commands}\n\nThis page: `{command}`. simkvm {version}, "
        f"model version {MODEL_VERSION}, {day}."
    )
