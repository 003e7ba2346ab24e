"""Published figures that make a curve, and what their curves do: grow, bend, part from one another.

A point may be right by chance and a curve seldom is, so each curve is also asked for its shape:

* how it grows: the exponent of its upper half, d log(value) / d log(x);
* where it knees: the x at which it has doubled, on straight lines between points in logarithms;
* where the ratio of two arms peaks, and how high.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from simkvm.validate.row import TOLERANCE, PublishedRow, ShapeRow

Points = list[tuple[float, float]]
EXPONENT = 0.25  #: by how much an exponent may differ
FACTOR = 2.0  #: by which a place on the axis may differ: the step of the published axes


@dataclass(frozen=True)
class Axis:
    """A set of figures that differ in one number of their parameters: which, and what it is."""

    rows: str
    pattern: str
    label: str
    pairs: tuple[tuple[str, str], ...]
    """Arms whose ratio says something: (the one above, the one below)."""
    title: str
    name: str
    """Of the figure's file."""


@dataclass(frozen=True)
class Curve:
    """One metric of one set on one arm, by x: measured and simulated, in the rows' unit."""

    set_: str
    metric: str
    arm: str
    label: str
    unit: str
    role: Literal["fit", "predicted"]
    source: str
    measured: Points
    simulated: Points


AXES = (
    Axis(
        "A-",
        r"-v (\d+)",
        "vCPUs",
        (("write-locked faults", "parallel faults (read lock)"),),
        "Write-locked and read-locked faults, arm64",
        "parallel-faults",
    ),
    Axis(
        "S-1.",
        r"(\d+) vCPUs",
        "vCPUs",
        (("split on fault", "eager split"),),
        "Splitting blocks under dirty logging, AmpereOne",
        "eager-split",
    ),
    Axis(
        "T-3.",
        r"(\d+) GB",
        "GiB",
        (("TLBI per PTE", "range TLBI"),),
        "Unmapping with and without range invalidation, arm64",
        "range-tlbi",
    ),
    Axis(
        "V4-",
        r"-v (\d+)",
        "vCPUs",
        (("write-locked ageing", "lock-free ageing"), ("write-locked ageing", "no ageing")),
        "Ageing while vCPUs populate, x86",
        "ageing-x86",
    ),
)
"""The curves of the record."""


def curves(rows: Sequence[PublishedRow]) -> list[Curve]:
    """The curves that the rows make, of at least four points each, in the order of the record."""
    return [curve for axis in AXES for curve in _of_axis(axis, rows)]


def shapes(rows: Sequence[PublishedRow]) -> Iterator[ShapeRow]:
    """What each curve does, and each pair of curves."""
    found = curves(rows)
    for curve in found:
        yield _row(curve, "growth", "exponent of the upper half", "", growth, _exponent)
        if doubled(curve.measured) is not None and doubled(curve.simulated) is not None:
            yield _row(curve, "knee", "where it has doubled", curve.label, doubled, _place)
    for axis in AXES:
        for above, below in axis.pairs:
            for metric in dict.fromkeys(c.metric for c in found if c.set_ == axis.rows):
                arms = {c.arm: c for c in found if (c.set_, c.metric) == (axis.rows, metric)}
                if above in arms and below in arms:
                    yield from _parting(arms[above], arms[below])


def growth(points: Points) -> float:
    """Exponent between the middle point and the last."""
    (x0, y0), (x1, y1) = points[(len(points) - 1) // 2], points[-1]
    return math.log(y1 / y0) / math.log(x1 / x0)


def doubled(points: Points) -> float | None:
    """The x at which the value is twice the first one, if it gets there."""
    wanted = 2 * points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < wanted <= y1:
            share: float = math.log(wanted / y0) / math.log(y1 / y0)
            return float(x0 * (x1 / x0) ** share)
    return None


def ratio(above: Points, below: Points) -> Points:
    """One curve over another, where both have a point."""
    under = dict(below)
    return [(x, y / under[x]) for x, y in above if x in under]


def _parting(above: Curve, below: Curve) -> Iterator[ShapeRow]:
    measured = ratio(above.measured, below.measured)
    simulated = ratio(above.simulated, below.simulated)
    name = f"{above.set_.rstrip('-.')}/{above.metric}"
    both = "fit" if above.role == below.role == "fit" else "predicted"
    about = f"{above.arm} over {below.arm}"
    for what, unit, index, around in (
        ("highest at", above.label, 0, _place),
        ("highest", "", 1, _ratio),
    ):
        expected, got = _peak(measured)[index], _peak(simulated)[index]
        low, high = around(expected)
        yield ShapeRow(
            f"{name}/{'peak-at' if index == 0 else 'peak'}",
            f"{about}: {what}",
            unit,
            expected,
            got,
            low,
            high,
            "fit" if both == "fit" else "predicted",
            above.source,
        )


def _peak(points: Points) -> tuple[float, float]:
    return max(points, key=lambda point: point[1])


def _exponent(value: float) -> tuple[float, float]:
    return value - EXPONENT, value + EXPONENT


def _place(value: float) -> tuple[float, float]:
    return value / FACTOR, value * FACTOR


def _ratio(value: float) -> tuple[float, float]:
    return value * (1 - TOLERANCE), value * (1 + TOLERANCE)


def _row(
    curve: Curve,
    what: str,
    about: str,
    unit: str,
    of: Callable[[Points], float | None],
    around: Callable[[float], tuple[float, float]],
) -> ShapeRow:
    measured, simulated = of(curve.measured), of(curve.simulated)
    assert measured is not None
    assert simulated is not None
    low, high = around(measured)
    return ShapeRow(
        f"{curve.set_.rstrip('-.')}/{curve.metric}/{what}",
        f"{curve.arm}: {about}",
        unit,
        measured,
        simulated,
        low,
        high,
        curve.role,
        curve.source,
    )


def _of_axis(axis: Axis, rows: Sequence[PublishedRow]) -> Iterator[Curve]:
    mine = [row for row in rows if row.id.startswith(axis.rows) and row.simulated is not None]
    for metric, arm in dict.fromkeys((row.metric, row.arm) for row in mine):
        chosen = [row for row in mine if (row.metric, row.arm) == (metric, arm)]
        placed = sorted((_x(axis, row), row) for row in chosen)
        if len(placed) < 4:
            continue
        yield Curve(
            axis.rows,
            metric,
            arm,
            axis.label,
            chosen[0].unit,
            "fit" if all(row.role == "fit" for row in chosen) else "predicted",
            chosen[0].source,
            [(x, row.measured) for x, row in placed],
            [(x, row.simulated) for x, row in placed if row.simulated is not None],
        )


def _x(axis: Axis, row: PublishedRow) -> float:
    found = re.search(axis.pattern, row.params)
    if found is None:
        raise ValueError(f"{row.id} does not say {axis.pattern!r}")
    return float(found[1])
