"""A log-linear histogram of whole nanoseconds: 32 buckets an octave, mergeable by adding.

A value below 64 has a bucket of its own; above, a bucket is at most 1/32 of its value wide, so a
quantile is off by at most that. (The layout of HdrHistogram.) Each further ``sub_bits`` halves it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

SUB_BITS: Final = 5
Int64s = NDArray[np.int64]


def bucket_of(values: Int64s, sub_bits: int = SUB_BITS) -> Int64s:
    """Bucket numbers of non-negative ``values``."""
    exponent = np.maximum(np.frexp(values.astype(np.float64))[1] - sub_bits - 1, 0).astype(np.int64)
    buckets: Int64s = ((exponent + 1) << sub_bits) + (values >> exponent) - (1 << sub_bits)
    return buckets


def low_of(buckets: Int64s, sub_bits: int = SUB_BITS) -> Int64s:
    """Lowest value of each bucket."""
    octave = np.maximum((buckets >> sub_bits) - 1, 0)
    lows: Int64s = (buckets - (octave << sub_bits)) << octave
    return lows


class Histogram:
    """Counts, and the exact number, sum and largest of what was added."""

    __slots__ = ("counts", "largest", "number", "sub_bits", "total")

    def __init__(self, sub_bits: int = SUB_BITS) -> None:
        self.sub_bits = sub_bits
        self.counts: Int64s = np.zeros(0, np.int64)
        self.number = 0
        self.total = 0
        self.largest = 0

    def add(self, values: Int64s) -> None:
        """Add ``values``."""
        if not len(values):
            return
        found = np.bincount(bucket_of(values, self.sub_bits))
        if len(found) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(found) - len(self.counts)))
        self.counts[: len(found)] += found
        self.number += len(values)
        self.total += int(values.sum())
        self.largest = max(self.largest, int(values.max()))

    def merge(self, other: Histogram) -> None:
        """Add what ``other``, of the same width of buckets, holds."""
        size = max(len(self.counts), len(other.counts))
        self.counts = np.pad(self.counts, (0, size - len(self.counts)))
        self.counts[: len(other.counts)] += other.counts
        self.number += other.number
        self.total += other.total
        self.largest = max(self.largest, other.largest)

    @property
    def mean(self) -> float:
        """Exact mean; 0 if empty."""
        return self.total / self.number if self.number else 0.0

    def quantile(self, q: float) -> int:
        """The value at or below which a share ``q`` lies: a bucket's top, at most the largest."""
        if not self.number:
            return 0
        rank = max(1, int(np.ceil(q * self.number)))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(int(low_of(np.array([bucket + 1]), self.sub_bits)[0]) - 1, self.largest)

    def rows(self) -> list[tuple[int, int, int]]:
        """(low, high, count) of every bucket in use; high is not included."""
        used = np.flatnonzero(self.counts)
        lows, highs = (low_of(each, self.sub_bits) for each in (used, used + 1))
        return list(zip(lows.tolist(), highs.tolist(), self.counts[used].tolist(), strict=True))
