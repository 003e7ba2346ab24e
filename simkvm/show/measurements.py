"""Tables of `simkvm import ftrace` and `simkvm calibrate`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from simkvm.measure.calibrate import Calibration, Change
from simkvm.measure.observation import Observation
from simkvm.show.text import NOTHING, named_table, titled_table
from simkvm.units import format_count, format_duration

QUANTITIES = ("min_ns", "p50_ns", "p90_ns", "p99_ns", "max_ns", "mean_ns", "sum_ns")


def observation_report(rows: Sequence[Observation]) -> RenderableType:
    """Times by what and key, then counts."""
    times = [row for row in rows if row.what != "count"]
    counts = [row for row in rows if row.what == "count"]
    parts: list[RenderableType] = []
    if times:
        headers = ("what", "key", "phase", "n", *(name[:-3] for name in QUANTITIES))
        parts.append(titled_table("Times", headers, map(_time_cells, times), left=3))
    if counts:
        cells = [(row.key, row.phase or NOTHING, format_count(row.n)) for row in counts]
        parts.append(titled_table("Counts", ("key", "phase", "n"), cells, left=2))
    return Group(*parts)


def calibration_report(calibration: Calibration, out: str | None) -> RenderableType:
    """What was measured against what is shipped, and why the rest stays."""
    measured = [change for change in calibration.changes if change.measured is not None]
    kept = [change for change in calibration.changes if change.measured is None]
    headers = ("parameter", "shipped", "measured", "ratio", "low", "high", "n", "from")
    parts: list[RenderableType] = [
        titled_table(f"Measured, against {calibration.base}", headers, map(_change_cells, measured))
    ]
    if kept:
        rows = [
            {"parameter": change.parameter, "observation": change.key, "why": change.reason}
            for change in kept
        ]
        parts += [
            Text("As shipped", "bold"),
            named_table(rows, {"parameter": None, "observation": 44, "why": 50}),
        ]
    overhead = format_duration(calibration.overhead_ns)
    others = len(calibration.machine.parameters) - len(calibration.changes)
    said = (
        f"{overhead} a call taken off for the tracer"
        if calibration.overhead_ns
        else "nothing taken off for the tracer: see --overhead"
    )
    parts.append(Text(f"\n{said}; no rule for {others} other parameters, as shipped"))
    if out is not None:
        parts.append(Text(f"{out}: {calibration.machine.name}"))
    return Group(*parts)


def _time_cells(row: Observation) -> tuple[str, ...]:
    times = (getattr(row, name) for name in QUANTITIES)
    return (
        row.what,
        row.key,
        row.phase or NOTHING,
        format_count(row.n),
        *(NOTHING if value is None else format_duration(value) for value in times),
    )


def _change_cells(change: Change) -> tuple[str, ...]:
    value = change.measured or 0.0
    ratio = f"{value / change.shipped:.3g}" if change.shipped else NOTHING
    numbers = (change.low or 0.0, change.high or 0.0)
    return (
        change.parameter,
        format_duration(change.shipped),
        format_duration(value),
        ratio,
        *(format_duration(number) for number in numbers),
        format_count(change.n),
        f"{change.key}{f' ({change.phase})' if change.phase else ''}",
    )
