"""How long mmu_lock is held and waited for: the tails, call site by call site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from simkvm.scenario.errors import InputError
from simkvm.show import style
from simkvm.show.caption import caption
from simkvm.show.distribution import Distribution, distribution, site_figure
from simkvm.show.points import OneOrMany, ResultLike, Where, in_site_order, listed, variants
from simkvm.units import format_count, format_duration

Quantity = Literal["hold", "wait"]
Look = tuple[str, style.LineStyle]

LOWEST_SHARE = 1e-6
STATISTICS = "  mode     count      p50      p99      max"
MARKED = ((0.50, "p50", "o"), (0.99, "p99", "D"))
TITLES = {
    "hold": "How long mmu_lock is held",
    "wait": "How long mmu_lock is waited for",
}


class Curve(NamedTuple):
    """One line of a panel, and what the table under the panel says of it."""

    values: Distribution
    figures: str


def sites_of(results: OneOrMany) -> list[str]:
    """The call sites that took mmu_lock in any of the points, in the order of the panels."""
    return in_site_order(
        site
        for result in listed(results)
        for site in result.histograms.loc[result.histograms["lock"] == "mmu_lock", "site"].unique()
    )


def takes_lock(results: OneOrMany) -> bool:
    """Whether anybody takes mmu_lock in the points that `lock_distribution` shows."""
    shown = (point for group in variants(results).values() for point in group)
    return any((point.locks["lock"] == "mmu_lock").any() for point in shown)


@style.in_style
def lock_distribution(
    results: OneOrMany, quantity: Quantity = "hold", *, where: Where | None = None
) -> Figure:
    """Share of acquisitions that held (or waited) longer: a panel a site, a line a variant.

    Both axes are logarithmic, so that a tail of one in a million is as easy to read as the median;
    p50 and p99 are marked. Under each panel stands who is who, with mode, number of acquisitions,
    p50, p99 and max. `where` selects values of axes ({"vcpus": 8}); ordered axes default to their
    largest value, the host's memory to its smallest, and replications are pooled. Raises
    InputError if no point took the lock.
    """
    groups = variants(results, where=where)
    points = [point for group in groups.values() for point in group]
    sites = sites_of(points)
    if not sites:
        raise InputError("no histogram of mmu_lock in these results", key="lock_distribution")
    columns = min(2, len(sites))
    rows = math.ceil(len(sites) / columns)
    height = rows * (2.9 + 0.16 * len(groups)) + 0.9
    width = style.width_under(max(map(len, groups)) + len(STATISTICS)) * columns
    figure, panels = style.sheet(rows, columns, width, height, sharex=True, sharey=True)
    colours = style.variant_colours(groups)
    found = {
        site: {label: _curve(group, site, quantity) for label, group in groups.items()}
        for site in sites
    }
    bottom = _bottom(curve for of_site in found.values() for curve in of_site.values())
    for panel, (site, of_site) in zip(panels, found.items(), strict=False):
        _site_panel(panel, site, quantity, of_site, colours=colours, bottom=bottom)
    for panel in panels[1::columns] if columns > 1 else []:
        panel.set_ylabel("")
    for panel in panels[len(sites) :]:
        panel.remove()
    style.entitle(figure, f"{TITLES[quantity]}, by call site", caption(results, points))
    return figure


@style.in_style
def lock_sites(result: ResultLike, quantity: Quantity = "hold", *, ax: Axes | None = None) -> Axes:
    """The same for one run, with all call sites in one panel: a line style a site."""
    sites = sites_of(result)
    if not sites:
        raise InputError("no histogram of mmu_lock in this result", key="lock_sites")
    if ax is None:
        figure, (ax,) = style.sheet(1, 1, 6.4, 3.4 + 0.16 * len(sites))
        style.entitle(figure, f"{TITLES[quantity]}, by call site", caption(result, [result]))
    colour = next(iter(style.variant_colours(variants(result)).values()))
    found = {site: _curve([result], site, quantity) for site in sites}
    looks: dict[str, Look] = {site: (colour, style.SITE_LINES.get(site, "-")) for site in sites}
    for site, curve in found.items():
        if curve is not None:
            _tail(ax, curve.values, looks[site], site)
    _scales(ax, quantity, _bottom(found.values()))
    _statistics(ax, found, looks, "site")
    return ax


def _curve(results: Sequence[ResultLike], site: str, quantity: Quantity) -> Curve | None:
    values = distribution(results, site, quantity)
    if values is None:
        return None
    exact = [site_figure(results, site, quantity, figure) or 0 for figure in ("p50", "p99", "max")]
    times = " ".join(f"{format_duration(round(value)):>8}" for value in exact)
    modes = "+".join(values.modes)
    return Curve(values, f"{modes:<5} {format_count(values.total):>8} {times}")


def _site_panel(
    panel: Axes,
    site: str,
    quantity: Quantity,
    found: Mapping[str, Curve | None],
    *,
    colours: Mapping[str, str],
    bottom: float,
) -> None:
    looks: dict[str, Look] = {label: (colours[label], "-") for label in found}
    for i, (label, curve) in enumerate(found.items()):
        if curve is not None:
            _tail(panel, curve.values, looks[label], label, style.line_width(i))
    panel.set_title(site)
    _scales(panel, quantity, bottom)
    panel.xaxis.set_tick_params(labelbottom=True)
    _statistics(panel, found, looks, "variant")


def _bottom(found: Iterable[Curve | None]) -> float:
    """The decade in which the rarest value lies."""
    most = max((curve.values.total for curve in found if curve is not None), default=10)
    return max(10.0 ** math.floor(math.log10(1 / most)), LOWEST_SHARE)


def _tail(ax: Axes, values: Distribution, look: Look, label: str, width: float = 1.5) -> None:
    colour, line = look
    x, y = values.tail()
    ax.plot(x, y, color=colour, linestyle=line, linewidth=width, label=label)
    for share, name, marker in MARKED:
        at = values.quantile_ns(share)
        if at >= 1:
            # With few acquisitions the curve ends above 1%, at the largest one.
            height = max(1 - share, float(y[-1]))
            (mark,) = ax.plot([at], [height], marker, color=colour, zorder=3)
            mark.set(label=f"_{name} {label}", markersize=3.5 + 1.2 * width)


def _scales(ax: Axes, quantity: Quantity, bottom: float) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    style.duration_axis(ax.xaxis, log=True)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(bottom, 1.3)
    ax.yaxis.set_major_locator(LogLocator(base=10, numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: share_text(value)))
    ax.set_xlabel(f"{quantity} time{_beginning(ax, quantity)}")
    ax.set_ylabel("share of acquisitions above")
    for share, name, _ in MARKED:
        ax.axhline(1 - share, color=style.GREY, linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)
        ax.annotate(
            name,
            (1, 1 - share),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=style.GREY,
        )


def _beginning(ax: Axes, quantity: Quantity) -> str:
    curves = (np.asarray(line.get_ydata()) for line in ax.lines)
    late = any(len(y) > 1 and y[0] < 1 for y in curves)
    return f" (lines start at the share that had to {quantity})" if late else ""


def _statistics(
    ax: Axes, found: Mapping[str, Curve | None], looks: Mapping[str, Look], what: str
) -> None:
    """A small table under the panel; it is the legend too, and covers no data."""
    width = max(len(what), *(len(label) for label in found))
    style.line_under(ax, 0, f"{what:<{width}}{STATISTICS}", style.GREY)
    for i, (label, curve) in enumerate(found.items(), start=1):
        colour, look = looks[label]
        text = f"{label:<{width}}  {curve.figures if curve else 'does not take the lock here'}"
        style.line_under(ax, i, text, colour, sample=look if curve else None)


def share_text(share: float) -> str:
    """A share for people: per cent while that is short, then "1 in 10,000"."""
    if share >= 0.001:
        return f"{share * 100:g}%"
    return f"1 in {round(1 / share):,}"
