"""Reports of `simkvm validate`: a line a row, and how many agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from simkvm.show.text import NOTHING, titled_table
from simkvm.validate.row import PublishedRow, Row, ShapeRow, TheoryRow, TraceRow

R = TypeVar("R", bound=Row)


def report(rows: Sequence[Row]) -> RenderableType:
    """A table for each kind of row that is there, and the verdicts counted."""
    kinds: dict[type[Row], list[Row]] = {}
    for row in rows:
        kinds.setdefault(type(row), []).append(row)
    return Group(*(_KINDS[kind].table(group) for kind, group in kinds.items()), Text(tally(rows)))


def tally(rows: Sequence[Row]) -> str:
    """How many rows got which verdict, and of predictions how many are within the tolerance.

    What was not simulated is no prediction. A bound is one: it is inside above its figure.
    """
    counts = Counter(row.verdict for row in rows)
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    line = f"{len(rows)} rows: {said or 'none'}"
    predicted = [row for row in rows if isinstance(row, PublishedRow) and row.is_prediction]
    if predicted:
        met = [row for row in predicted if row.verdict == "inside"]
        line += f"; of {len(predicted)} predictions {len(met)} inside"
        line += f" ({len(met) / len(predicted):.0%})"
        if bounds := sum(row.bound != "about" for row in met):
            line += f", {bounds} of them a mere bound"
    return line


def figure(value: float | None) -> str:
    """A number with four significant digits."""
    return NOTHING if value is None else f"{value:.4g}"


def _number(value: float) -> str:
    """A count as it is, anything else with four significant digits."""
    return str(int(value)) if value == int(value) else figure(value)


@dataclass(frozen=True)
class Kind(Generic[R]):
    """How rows of one kind are shown: a title, and what stands in which column."""

    title: str
    columns: Mapping[str, Callable[[R], str]]

    def table(self, rows: Sequence[R]) -> RenderableType:
        """Their table; id, what and unit come first."""
        headers = ("id", "what", "unit", *self.columns, "verdict")
        return titled_table(
            self.title,
            headers,
            [
                (
                    row.id,
                    row.about,
                    row.unit,
                    *(of(row) for of in self.columns.values()),
                    row.verdict,
                )
                for row in rows
            ],
            left=3,
        )


_KINDS: dict[type[Row], Kind[Any]] = {
    TheoryRow: Kind[TheoryRow](
        "Theory",
        {
            "theory": lambda row: figure(row.expected),
            "simulated": lambda row: figure(row.simulated),
            "deviation": lambda row: f"{row.deviation:+.1%}",
            "+-": lambda row: f"{row.half_width:.1%}" if row.half_width else "exact",
        },
    ),
    PublishedRow: Kind[PublishedRow](
        "Published measurements",
        {
            "measured": lambda row: f"{row.prefix}{figure(row.measured)}",
            "simulated": lambda row: figure(row.simulated),
            "ratio": lambda row: figure(row.ratio),
            "role": lambda row: row.role,
        },
    ),
    ShapeRow: Kind[ShapeRow](
        "Shapes of the published curves",
        {
            "measured": lambda row: figure(row.measured),
            "simulated": lambda row: figure(row.simulated),
            "low": lambda row: figure(row.low),
            "high": lambda row: figure(row.high),
            "role": lambda row: row.role,
        },
    ),
    TraceRow: Kind[TraceRow](
        "Traces of a real kernel",
        {
            "traced": lambda row: _number(row.measured),
            "simulated": lambda row: _number(row.simulated),
            "p": lambda row: figure(row.p_value),
        },
    ),
}
