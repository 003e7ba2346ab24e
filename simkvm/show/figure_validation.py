"""Published curves and the model's, on one axis."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from simkvm.show import style
from simkvm.validate.curves import Curve
from simkvm.validate.row import TOLERANCE

COLOURS = ("#d55e00", "#0072b2", "#009e73")
PANEL_IN = (4.4, 3.6)


@style.in_style
def measured_and_simulated(title: str, curves: Sequence[Curve]) -> Figure:
    """A panel a metric: measured as points with their tolerance, simulated as lines, an arm a
    colour. Arms to which constants were fitted say so.
    """
    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    width, height = PANEL_IN
    figure, panels = style.sheet(1, len(metrics), width * len(metrics), height + 0.4)
    for panel, metric in zip(panels, metrics, strict=True):
        shown = [curve for curve in curves if curve.metric == metric]
        panel.set_title(metric)
        panel.set_xlabel(shown[0].label)
        panel.set_ylabel(shown[0].unit)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        for curve in shown:
            colour = COLOURS[arms.index(curve.arm) % len(COLOURS)]
            xs, ys = zip(*curve.measured, strict=True)
            around = [TOLERANCE * y for y in ys]
            panel.errorbar(xs, ys, around, fmt="o", ms=4, color=colour, capsize=2, lw=0.8)
            label = f"{curve.arm}{' (fit)' if curve.role == 'fit' else ''}"
            panel.plot(*zip(*curve.simulated, strict=True), color=colour, lw=1.6, label=label)
        panel.xaxis.set_major_locator(
            FixedLocator(sorted({x for c in shown for x, _ in c.measured}))
        )
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        panel.legend(loc="upper left", frameon=False)
    style.entitle(figure, title, "points: measured, with 20 % either way; lines: simulated")
    return figure
