"""The memslots of a guest: the ranges of its memory that notifier calls and look-ups go by.

Source: virt/kvm/kvm_main.c (``kvm_handle_hva_range``, ``gfn_to_memslot``), v6.12. The slots are
equal parts of one stretch of guest memory, behind which lies one stretch of host memory; what is
left over belongs to the last one, as in memslot_perf_test. A notifier call handles the slots that
its range overlaps one after the other, under one hold of ``mmu_lock``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Range = tuple[int, int]


class Memslots(Sequence[Range]):
    """``count`` equal ranges of ``leaves`` leaves and the rest, as (first, behind the last)."""

    def __init__(self, leaves: int, count: int) -> None:
        self.size = leaves // count  #: leaves in a slot
        self.gone: set[int] = set()  #: slots that were deleted
        self._count = count
        self._leaves = leaves

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Range:  # type: ignore[override]
        if not 0 <= number < self._count:
            raise IndexError(number)
        last = self._leaves if number == self._count - 1 else (number + 1) * self.size
        return number * self.size, last

    def of(self, leaf: int) -> int:
        """Number of the slot that holds ``leaf``."""
        return min(leaf // self.size, self._count - 1)

    def there(self, first: int, last: int) -> bool:
        """Whether any slot that is there overlaps ``first`` up to ``last``."""
        gone = self.gone
        return not gone or any(self.of(low) not in gone for low, _ in self.overlapping(first, last))

    def overlapping(self, first: int, last: int) -> list[Range]:
        """``first`` up to ``last``, cut where slots meet."""
        if self._count == 1:
            return [(first, last)]
        behind = min(last, (self._count - 1) * self.size + 1)
        edges = range((first // self.size + 1) * self.size, behind, self.size)
        return list(zip([first, *edges], [*edges, last], strict=True))

    def crossed(self, first: int, last: int) -> int:
        """How many edges between slots lie inside ``first`` up to ``last``."""
        return self.of(last - 1) - self.of(first)

    def crossed_by(self, leaves: NDArray[np.int64], starts: NDArray[np.int64]) -> int:
        """As :meth:`crossed`, for runs of ``leaves`` that begin at ``starts``, all together."""
        if self._count == 1:
            return 0
        slots = np.minimum(leaves // self.size, self._count - 1)
        edges = np.diff(slots, prepend=-1) > 0
        edges[starts] = False
        return int(np.count_nonzero(edges))
