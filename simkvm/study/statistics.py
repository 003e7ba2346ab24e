"""Statistics of simulation output without SciPy: intervals and batch means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its confidence interval, in the unit of the values.

    `half_width` is infinite for a single value: one replication says nothing about its own spread.
    """

    mean: float
    half_width: float
    confidence: float
    count: int

    def __contains__(self, value: float) -> bool:
        return abs(value - self.mean) <= self.half_width


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| < t) = confidence for Student's T with a whole number of degrees.

    The probability rises with the angle atan(t / sqrt(degrees)), which a bisection finds.
    Raises ValueError for a confidence outside (0, 1) or fewer than one degree.
    """
    if not 0 < confidence < 1 or degrees < 1:
        raise ValueError(f"no t for a confidence of {confidence} and {degrees} degrees of freedom")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < tan(angle) sqrt(degrees)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for step in range(2 if odd else 1, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * step / (step + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def confidence_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval for the mean of independent values, such as one summary figure over replications.

    Raises ValueError for no values, or for one that is not finite: leaving it out would turn a
    failed replication into a narrower interval.
    """
    count = len(values)
    if count == 0 or not all(math.isfinite(value) for value in values):
        raise ValueError("no values, or one that is not a finite number")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.inf, confidence, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half_width = t_quantile(confidence, count - 1) * math.sqrt(variance / count)
    return Interval(mean, half_width, confidence, count)


def batch_means(values: Sequence[float], batches: int = 20, confidence: float = 0.95) -> Interval:
    """Interval for the mean of one long correlated series, from the means of equal batches.

    The oldest values are left out if they do not fill one. Only right if a batch is much longer
    than the correlation. Raises ValueError for fewer values than batches, or than 2 batches.
    """
    if not 2 <= batches <= len(values):
        raise ValueError(f"{len(values)} values do not make {batches} batches")
    size = len(values) // batches
    starts = range(len(values) % batches, len(values), size)
    means = [math.fsum(values[start : start + size]) / size for start in starts]
    return confidence_interval(means, confidence)
