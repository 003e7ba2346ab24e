"""Which constants a result hangs on: a bar a parameter, from its metric at low to that at high."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from simkvm.scenario.errors import InputError
from simkvm.show import style
from simkvm.show.sensitivity import figure, setting, title
from simkvm.study.effect import Effect, Tornado
from simkvm.study.sensitivity import Sensitivity

MOST_BARS = 10
TITLE_WIDTH = 52
HEADING_WIDTH = 78
PALE = 0.35
AT_LOW, AT_HIGH = "#0072b2", "#d55e00"
NAMED = {"V": "read", "D": "derived", "R": "recalled", "E": "estimate"}


@style.in_style
def tornado(analysis: Sensitivity, *, about: str = "", most: int = MOST_BARS) -> Figure:
    """A panel a point or comparison, with the `most` parameters that move the metric furthest.

    `about` says in words what the metric is. Raises InputError if nothing moves it anywhere.
    """
    shown = [one for one in analysis.tornados if one.moving]
    if not shown:
        raise InputError(f"no parameter moves {analysis.metric}", key="tornado")
    bars = [min(most, len(one.moving)) for one in shown]
    height = sum(0.9 + 0.26 * count for count in bars) + 0.6
    sheet, panels = style.sheet(len(shown), 1, 8.0, height)
    for panel, one in zip(panels, shown, strict=True):
        _panel(panel, analysis, one, one.moving[:most])
    over = f", as a ratio to {analysis.over}" if analysis.over else ""
    heading = f"{about or analysis.metric + over}: constants that move it"
    style.entitle(sheet, "\n".join(textwrap.wrap(heading, HEADING_WIDTH)), _caption(analysis))
    return sheet


def _panel(panel: Axes, analysis: Sensitivity, one: Tornado, effects: Sequence[Effect]) -> None:
    for place, effect in enumerate(reversed(effects)):
        ends = [(effect.at_low, AT_LOW), (effect.at_high, AT_HIGH)]
        # Where both lie on one side, the shorter bar over the longer one.
        for reached, colour in sorted(ends, key=lambda end: -abs(end[0] - one.value)):
            (bar,) = panel.barh(place, reached - one.value, left=one.value, height=0.62)
            bar.set(color=colour, alpha=1 if effect.beyond_chance else PALE)
    panel.axvline(one.value, color=style.INK, linewidth=0.9)
    panel.set_yticks(range(len(effects)), [_label(effect) for effect in reversed(effects)])
    panel.grid(visible=False, axis="y")
    panel.set_title("\n".join(textwrap.wrap(title(analysis, one), TITLE_WIDTH)))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: figure(analysis, value)))


def _label(effect: Effect) -> str:
    parameter = effect.parameter
    low, high = (setting(parameter, value) for value in (parameter.low, parameter.high))
    return f"{parameter.name}  {low} to {high}  ({NAMED[parameter.basis]})"


def _caption(analysis: Sensitivity) -> str:
    text = "one parameter at a time; blue: the metric at its low, orange: at its high"
    times = analysis.replications
    replicated = f" \u00b7 {times} replications; pale: within chance" if times > 1 else ""
    return f"{analysis.name} \u00b7 {text}{replicated}"
