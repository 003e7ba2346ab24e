"""How long a drive takes for a request: a floor, and an exponential time on top.

Of a drive two figures are published, the mean of a lone request and what one in 10,000 exceeds.
They fix the two parameters: with E the mean of the exponential part, which exceeds ln(10,000) E
once in 10,000 times,

    mean = floor + E,    p99.99 = floor + ln(10,000) E.

The floor is real: no read of flash is faster than its sensing and transfer. The tail is
lighter than that of a drive which collects garbage while it serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TAIL: Final = math.log(10_000)
BLOCK: Final = 256  #: times drawn at once


@dataclass(frozen=True)
class LatencyLaw:
    """``floor_ns`` and an exponential time of mean ``tail_ns``."""

    floor_ns: float
    tail_ns: float

    @classmethod
    def of(cls, mean_ns: float, p9999_ns: float, outside_ns: float = 0) -> LatencyLaw:
        """The law of these figures, ``outside_ns`` of which are spent outside the drive.

        A drive whose figures leave less than that to it has no floor. Raises ValueError if
        p99.99 is below the mean or above :data:`TAIL` times it.
        """
        if not mean_ns <= p9999_ns <= TAIL * mean_ns:
            raise ValueError(f"no exponential tail has mean {mean_ns} and p99.99 {p9999_ns}")
        tail_ns = (p9999_ns - mean_ns) / (TAIL - 1)
        return cls(max(0.0, mean_ns - tail_ns - outside_ns), tail_ns)


class Latencies:
    """Times of one law, one after the other, in whole ns."""

    __slots__ = ("_drawn", "_law", "_rng")

    def __init__(self, law: LatencyLaw, rng: np.random.Generator) -> None:
        self._law = law
        self._rng = rng
        self._drawn: list[int] = []

    def draw(self, number: int) -> NDArray[np.int64]:
        """The next ``number`` times of the stream, apart from those that :meth:`next` holds."""
        law = self._law
        times = law.floor_ns + self._rng.exponential(law.tail_ns, number)
        drawn: NDArray[np.int64] = times.round().astype("int64")
        return drawn

    def next(self) -> int:
        """One time."""
        if not self._drawn:
            self._drawn = self.draw(BLOCK)[::-1].tolist()
        return self._drawn.pop()
