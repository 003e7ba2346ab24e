"""A closed form and the run that should obey it, not yet run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from simkvm.study.statistics import Interval, batch_means, confidence_interval
from simkvm.validate.row import TheoryRow

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.9996
"""Of each row's interval: of some eighty rows that are drawn, one set in thirty has a wrong one."""

SEED = 20230526
"""Of everything drawn here: the date of the first message about lock-free ageing. Taken once."""


@dataclass(frozen=True)
class Estimate:
    """What a run showed: a figure and the interval that it stands for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClosedForm:
    """One row of the theory, computed when :meth:`row` is called.

    `measure` runs the model; rows that look at one run share it between them.
    """

    id: str
    about: str
    unit: str
    expected: float | Callable[[], float]
    """A function if it depends on what the run met, such as how many arrivals there were."""
    measure: Callable[[], Estimate]
    source: str
    """Book or paper with its equation, or the kernel's rule with its file."""
    drawn: bool = True
    """Whether the run draws anything: what does not is compared exactly."""

    def row(self) -> TheoryRow:
        """Run the model and compare."""
        found = self.measure()
        expected = self.expected() if callable(self.expected) else float(self.expected)
        return TheoryRow(
            self.id,
            self.about,
            self.unit,
            expected,
            found.value,
            found.low,
            found.high,
            self.source,
        )


def exactly(value: float) -> Estimate:
    """What is not drawn has no interval."""
    return Estimate(value, value, value)


def replicated(values: Sequence[float]) -> Estimate:
    """Student's interval around the mean of independent replications."""
    return _around(confidence_interval(values, CONFIDENCE))


def batched(values: Sequence[float]) -> Estimate:
    """The same around the mean of one series that forgets within a twentieth of itself."""
    return _around(batch_means(values, 20, CONFIDENCE))


def _around(interval: Interval) -> Estimate:
    mean, half = interval.mean, interval.half_width
    return Estimate(mean, mean - half, mean + half)


def streams(of: str, count: int) -> list[np.random.Generator]:
    """Generators for `count` replications of the run named `of`, the same in every process."""
    import numpy as np

    return [np.random.default_rng([SEED, crc32(of.encode()), number]) for number in range(count)]
