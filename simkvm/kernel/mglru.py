"""Generations of the multi-gen LRU, for the folios of guests (mm/vmscan.c, v6.12).

A folio's generation is a sequence number modulo four. Ageing moves what was used to the youngest
generation, then opens a new one; if four exist the oldest is emptied first, by moving its folios
up. A folio that a fault brings in starts in the youngest generation.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_NR_GENS: Final = 2
MAX_NR_GENS: Final = 4
MIN_LRU_BATCH: Final = 64  #: PTEs in a window of the batched notifier calls
MAX_LRU_BATCH: Final = 4096  #: promotions or moves between two looks at need-resched
PTE_BYTES: Final = 8
CACHE_LINE_BYTES: Final = 64


def suitable_to_scan(total: int, young: int) -> bool:
    """Whether of ``total`` PTEs on average one a cache line was young."""
    per_line = min(max(CACHE_LINE_BYTES // PTE_BYTES, 2), 8)
    return young * per_line >= total


class Lruvec:
    """What the guests of one memcg share: which generations there are (``lrugen`` of a lruvec)."""

    def __init__(self) -> None:
        self.max_seq = MIN_NR_GENS + 1  # so from the start there are as many as there can be
        self.min_seq = 0
        self.guests: list[LruGen] = []  #: folios by the guest that they belong to

    def add(self, lru: LruGen) -> None:
        """Charge a guest's folios (none so far) to this memcg instead of its own."""
        lru.lruvec.guests.remove(lru)
        lru.lruvec = self
        self.guests.append(lru)

    @property
    def sizes(self) -> list[int]:
        """Folios in each generation, by its number modulo four."""
        return [sum(sizes) for sizes in zip(*(lru.sizes for lru in self.guests), strict=True)]

    def inc_max_seq(self) -> int:
        """Open a new generation; returns how many folios had to be moved up first."""
        moved = 0
        if self.max_seq - self.min_seq + 1 == MAX_NR_GENS:
            oldest = self.min_seq % MAX_NR_GENS
            moved = sum(lru.empty(oldest) for lru in self.guests)
            self.min_seq += 1
        self.max_seq += 1
        return moved


class LruGen:
    """One guest's ``leaves`` folios; ``two_step``: a first sighting only marks (v7.x).

    The generations are those of ``lruvec``: the guest's own, unless it is charged to another memcg.
    """

    def __init__(self, leaves: int, two_step: bool) -> None:
        self.lruvec = Lruvec()
        self.lruvec.guests.append(self)
        self.sizes = [0] * MAX_NR_GENS
        self._two_step = two_step
        self._generation: NDArray[np.uint8] = np.zeros(leaves, np.uint8)
        self._referenced: NDArray[np.bool_] = np.zeros(leaves, np.bool_)
        self._fast = memoryview(self._generation)  # type: ignore[arg-type]  # a buffer

    def add(self, leaf: int) -> None:
        """A fault brought ``leaf`` in."""
        youngest = self.lruvec.max_seq % MAX_NR_GENS
        self._fast[leaf] = youngest
        self.sizes[youngest] += 1

    def add_all(self, first: int, last: int) -> None:
        """As :meth:`add`, for the leaves ``first`` up to ``last`` of a huge page."""
        youngest = self.max_seq % MAX_NR_GENS
        self._generation[first:last] = youngest
        self.sizes[youngest] += last - first

    def add_many(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, none present) were brought in."""
        youngest = self.max_seq % MAX_NR_GENS
        self._generation[leaves] = youngest
        self.sizes[youngest] += len(leaves)

    def remove(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, all present) were freed."""
        for generation, gone in enumerate(np.bincount(self._generation[leaves], minlength=4)):
            self.sizes[generation] -= int(gone)
        self._referenced[leaves] = False

    def promote(self, leaves: NDArray[np.int64]) -> int:
        """``leaves`` (distinct, all present) were seen young; returns how many moved."""
        if self._two_step:
            first = ~self._referenced[leaves]
            self._referenced[leaves[first]] = True
            leaves = leaves[~first]
        youngest = self.max_seq % MAX_NR_GENS
        moved = int(np.count_nonzero(self._generation[leaves] != youngest))
        self.remove(leaves)
        self._generation[leaves] = youngest
        self.sizes[youngest] += len(leaves)
        return moved

    def inc_max_seq(self) -> int:
        """As :meth:`Lruvec.inc_max_seq`."""
        return self.lruvec.inc_max_seq()

    def empty(self, oldest: int) -> int:
        """Move the folios of generation number ``oldest`` up by one; returns how many."""
        following = (oldest + 1) % MAX_NR_GENS
        moved = self.sizes[oldest]
        if moved:
            # Slots of folios that are not there hold stale numbers: moving them too does no harm.
            self._generation[self._generation == oldest] = following
            self.sizes[following] += moved
            self.sizes[oldest] = 0
        return moved

    @property
    def max_seq(self) -> int:
        """Sequence number of the youngest generation."""
        return self.lruvec.max_seq

    @property
    def min_seq(self) -> int:
        """Sequence number of the oldest generation."""
        return self.lruvec.min_seq

    @property
    def total(self) -> int:
        """Folios in all generations."""
        return sum(self.sizes)
