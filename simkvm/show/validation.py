"""Reports of `simkvm validate`: a line a row, and how many agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from simkvm.show.text import NOTHING, titled_table
from simkvm.validate.row import PublishedRow, Row, ShapeRow, TheoryRow, TraceRow


def report(rows: Sequence[Row]) -> RenderableType:
    """A table for each kind of row that is there, and the verdicts counted."""
    kinds: dict[type[Row], list[Row]] = {}
    for row in rows:
        kinds.setdefault(type(row), []).append(row)
    return Group(*(_TABLES[kind](group) for kind, group in kinds.items()), Text(tally(rows)))


def tally(rows: Sequence[Row]) -> str:
    """How many rows got which verdict, and of predictions how many are within the tolerance."""
    counts = Counter(row.verdict for row in rows)
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    line = f"{len(rows)} rows: {said or 'none'}"
    predicted = [row for row in rows if isinstance(row, PublishedRow) and row.role == "predicted"]
    if predicted:
        met = sum(row.verdict == "inside" for row in predicted)
        line += f"; of {len(predicted)} predictions {met} inside ({met / len(predicted):.0%})"
    return line


def figure(value: float | None) -> str:
    """A number with four significant digits."""
    return NOTHING if value is None else f"{value:.4g}"


def _number(value: float) -> str:
    """A count as it is, anything else with four significant digits."""
    return str(int(value)) if value == int(value) else figure(value)


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.1%}"


def _theory(rows: Sequence[Row]) -> RenderableType:
    headers = ("id", "what", "unit", "theory", "simulated", "deviation", "+-", "verdict")
    return titled_table(
        "Theory",
        headers,
        [
            (
                row.id,
                row.about,
                row.unit,
                figure(row.expected),
                figure(row.simulated),
                _share(row.deviation),
                f"{row.half_width:.1%}" if row.half_width else "exact",
                row.verdict,
            )
            for row in rows
            if isinstance(row, TheoryRow)
        ],
        left=3,
    )


def _published(rows: Sequence[Row]) -> RenderableType:
    headers = ("id", "what", "unit", "measured", "simulated", "ratio", "role", "verdict")
    return titled_table(
        "Published measurements",
        headers,
        [
            (
                row.id,
                row.about,
                row.unit,
                f"{'> ' if row.bound == 'more than' else ''}{figure(row.measured)}",
                figure(row.simulated),
                figure(row.ratio),
                row.role,
                row.verdict,
            )
            for row in rows
            if isinstance(row, PublishedRow)
        ],
        left=3,
    )


def _traces(rows: Sequence[Row]) -> RenderableType:
    headers = ("id", "what", "unit", "traced", "simulated", "p", "verdict")
    return titled_table(
        "Traces of a real kernel",
        headers,
        [
            (
                row.id,
                row.about,
                row.unit,
                _number(row.measured),
                _number(row.simulated),
                figure(row.p_value),
                row.verdict,
            )
            for row in rows
            if isinstance(row, TraceRow)
        ],
        left=3,
    )


def _shapes(rows: Sequence[Row]) -> RenderableType:
    headers = ("id", "what", "unit", "measured", "simulated", "low", "high", "role", "verdict")
    return titled_table(
        "Shapes of the published curves",
        headers,
        [
            (
                row.id,
                row.about,
                row.unit,
                figure(row.measured),
                figure(row.simulated),
                figure(row.low),
                figure(row.high),
                row.role,
                row.verdict,
            )
            for row in rows
            if isinstance(row, ShapeRow)
        ],
        left=3,
    )


_TABLES = {TheoryRow: _theory, PublishedRow: _published, ShapeRow: _shapes, TraceRow: _traces}
