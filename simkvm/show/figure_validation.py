"""Published curves and the model's, on one axis."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from simkvm.show import style
from simkvm.validate.curves import Curve
from simkvm.validate.row import TOLERANCE

COLOURS = ("#d55e00", "#0072b2", "#009e73")
PANEL_IN = (4.4, 3.6)
LEAST_WIDTH_IN = 6.4
"""So that the title of a single panel fits."""
WORDS = {
    "aging_pass": ("Ageing pass", "mean time of a pass"),
    "vcpu_wall": ("Guest", "time until the vCPUs have finished"),
    "populate": ("Populate", "time to populate"),
    "dirty_memory": ("Writes under dirty logging", "time of the writes"),
    "write_time": ("Sparse writes", "time of the writes"),
    "unmap": ("Unmap", "time to unmap"),
}
"""What a metric of the record is called: title and label of its panel."""


@style.in_style
def measured_and_simulated(title: str, curves: Sequence[Curve]) -> Figure:
    """A panel a metric: measured as points with their tolerance, simulated as lines, an arm a
    colour. Arms to which constants were fitted say so.
    """
    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    width, height = PANEL_IN
    width = max(width * len(metrics), LEAST_WIDTH_IN)
    figure, panels = style.sheet(1, len(metrics), width, height + 0.4)
    for panel, metric in zip(panels, metrics, strict=True):
        shown = [curve for curve in curves if curve.metric == metric]
        heading, label = WORDS.get(metric, (metric, metric))
        panel.set_title(heading)
        panel.set_xlabel(shown[0].label)
        panel.set_ylabel(f"{label}, {shown[0].unit}")
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
        panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.legend(loc="upper left", frameon=False)
    style.entitle(figure, title, "points: measured, with 20 % either way; lines: simulated")
    return figure
