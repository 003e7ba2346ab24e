"""A line of a validation: what something should be, what the model makes of it, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from simkvm.study.store import plain

TOLERANCE = 0.20
"""A published figure counts as met when the simulated one is within this share of it."""

Verdict = Literal["inside", "outside", "equal", "differs", "abstracted", "missing"]


@dataclass(frozen=True)
class TheoryRow:
    """A closed form against the model that should obey it.

    `low` to `high` is the confidence interval of `simulated`, in `unit`, computed from replications
    or batches of this very run. The verdict is "inside" if the closed form lies in it.
    """

    id: str
    about: str
    unit: str
    expected: float
    simulated: float
    low: float
    high: float
    source: str
    """Where the closed form stands: a book or paper with its equation."""

    @property
    def deviation(self) -> float:
        """Simulated over expected, minus 1."""
        return _deviation(self.expected, self.simulated)

    @property
    def half_width(self) -> float:
        """Half the interval over expected; 0 for what is compared exactly."""
        return (self.high - self.low) / 2 / abs(self.expected) if self.high > self.low else 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether theory lies within what the model showed."""
        return "inside" if self.low <= self.expected <= self.high else "outside"


@dataclass(frozen=True)
class PublishedRow:
    """A figure that somebody measured on a real machine and published, and the model's.

    `role` is "fit" for a row to which a constant of its host's profile was fitted, "predicted" for
    all others. `scale` is the share of the published memory that was simulated; times are those of
    the whole. `simulated` is None if the row could not be run, with `note` saying why.
    """

    id: str
    workload: str
    params: str
    metric: str
    arm: str
    unit: str
    measured: float
    simulated: float | None
    role: Literal["fit", "predicted"]
    source: str
    """The message id."""
    bound: Literal["about", "more than"] = "about"
    scale: float = 1.0
    note: str = ""

    @property
    def about(self) -> str:
        """What was measured, on which arm."""
        return f"{self.metric}, {self.arm}"

    @property
    def is_prediction(self) -> bool:
        """Whether the model said something to which nothing was fitted."""
        return self.role == "predicted" and self.simulated is not None

    @property
    def prefix(self) -> str:
        """What stands before the measured figure where it is a bound."""
        return "> " if self.bound == "more than" else ""

    @property
    def deviation(self) -> float | None:
        """Simulated over measured, minus 1."""
        return None if self.simulated is None else _deviation(self.measured, self.simulated)

    @property
    def ratio(self) -> float | None:
        """Simulated over measured."""
        return None if self.deviation is None else 1 + self.deviation

    @property
    def verdict(self) -> Verdict:
        """Whether the model is within `TOLERANCE` of the figure, or above it if that is a bound."""
        if self.deviation is None:
            return "missing"
        if self.bound == "more than":
            return "inside" if self.deviation >= 0 else "outside"
        return "inside" if abs(self.deviation) <= TOLERANCE else "outside"


@dataclass(frozen=True)
class ShapeRow:
    """What a published curve does as a whole, and what the model's does.

    `low` to `high` is what counts as the same, around `measured`: a factor of two on the axis for
    where something happens, 0.25 for an exponent, `TOLERANCE` for a ratio.
    """

    id: str
    about: str
    unit: str
    measured: float
    simulated: float
    low: float
    high: float
    role: Literal["fit", "predicted"]
    source: str

    @property
    def deviation(self) -> float:
        """Simulated over measured, minus 1."""
        return _deviation(self.measured, self.simulated)

    @property
    def verdict(self) -> Verdict:
        """Whether the two curves do the same."""
        return "inside" if self.low <= self.simulated <= self.high else "outside"


@dataclass(frozen=True)
class TraceRow:
    """A count, or the tick-driven length, that a traced kernel showed, and the model's.

    Counts must be equal. Where the model leaves something out on purpose, `abstraction` says what,
    in the words of docs/limits.md, and the verdict is "abstracted" instead of "differs".
    Distributions are compared by a two-sample test: `p_value` is its result, and the verdict is
    "inside" unless the test rejects at `level`.
    """

    id: str
    about: str
    unit: str
    measured: float
    simulated: float
    source: str
    """The trace: set and run."""
    abstraction: str = ""
    p_value: float | None = None
    level: float = 0.01

    @property
    def deviation(self) -> float:
        """Simulated over measured, minus 1."""
        return _deviation(self.measured, self.simulated)

    @property
    def verdict(self) -> Verdict:
        """Whether the model counted the same."""
        if self.p_value is not None:
            agrees: Verdict = "inside" if self.p_value >= self.level else "outside"
            return "abstracted" if agrees == "outside" and self.abstraction else agrees
        if self.simulated == self.measured:
            return "equal"
        return "abstracted" if self.abstraction else "differs"


Row = TheoryRow | PublishedRow | ShapeRow | TraceRow


def document(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as plain mappings, derived figures included; what does not exist is null."""
    return [plain(asdict(row) | _verdict(row)) for row in rows]


def _deviation(reference: float, simulated: float) -> float:
    if reference == 0:
        return 0.0 if simulated == 0 else math.inf
    return simulated / reference - 1


def _verdict(row: Row) -> dict[str, Any]:
    derived: dict[str, Any] = {"deviation": row.deviation, "verdict": row.verdict}
    if isinstance(row, TheoryRow):
        derived["half_width"] = row.half_width
    if isinstance(row, PublishedRow):
        derived["ratio"] = row.ratio
    if isinstance(row, TheoryRow | TraceRow):
        derived["role"] = "predicted"  # nothing is fitted to a closed form or a count
    return derived
