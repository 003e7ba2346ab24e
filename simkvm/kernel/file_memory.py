"""Guest memory that is a shared mapping of a file: its pages are the page cache's.

Source: mm/filemap.c, mm/memory.c (``do_shared_fault``, ``do_read_fault``), mm/rmap.c
(``folio_mkclean``), v6.12. The file is there in full when the run begins, as a snapshot of a VM is,
so the first use of a page reads it. A page that was only read is mapped read-only and clean;
eviction drops it. The first write makes it dirty, and eviction passes it by until it is written
back, after which it is clean and read-only again.

The flags of :mod:`simkvm.kernel.swappable` serve: ``SLOT`` is the page's place in the file, which
it never loses, ``CACHED`` that it is in the page cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.host_memory import OWN, WRPROTECT
from simkvm.kernel.swappable import CACHED, DIRTY, SLOT, WRITEBACK, SwappableMemory

if TYPE_CHECKING:
    from collections.abc import Callable


class FileMemory(SwappableMemory):
    """``device``: the drive of the file."""

    file = True

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.swap[:] = SLOT
        self.dirty = 0  #: pages that are newer than the file
        self.dirty_since_ns = 0  #: when the first of them became so
        self.writeback_index = 0  #: where the next chunk of them begins
        self.dirtied: Callable[[], None] = lambda: None  #: tells who writes back

    def waiting(self, leaves: NDArray[np.int64], file: bool) -> NDArray[np.bool_]:
        """Which of ``leaves`` are locked, dirty or under writeback."""
        dirty: NDArray[np.bool_] = (self.swap[leaves] & DIRTY) != 0
        return super().waiting(leaves, file) | dirty

    def swapped_in(self, leaf: int, write: bool) -> None:
        """A page was read from the file for a fault."""
        self.fast_swap[leaf] = SLOT | CACHED
        if write:
            self.written(leaf)

    def written(self, leaf: int) -> None:
        """A write fault makes the page of ``leaf`` dirty."""
        if not self.fast_swap[leaf] & DIRTY:
            if not self.dirty:
                self.dirty_since_ns = int(self._env.now)
            self.fast_swap[leaf] |= DIRTY
            self.dirty += 1
            self.dirtied()

    def clean(self, first: int, last: int) -> int:
        """Writeback begins: pages are clean, and mapped read-only; returns how many were mapped."""
        swap = self.swap[first:last]
        self.dirty -= int(np.count_nonzero(swap & DIRTY))
        swap &= np.uint8(~DIRTY & 0xFF)
        swap |= np.uint8(WRITEBACK)
        there = first + np.flatnonzero(self.state[first:last] & OWN)
        self.state[there] |= np.uint8(WRPROTECT)
        return len(there)

    def dirty_leaves(self) -> NDArray[np.int64]:
        """Pages to be written back, in the order of the file."""
        return np.flatnonzero((self.swap & (DIRTY | WRITEBACK)) == DIRTY)

    def zap(self, first: int, last: int) -> int:
        """As :meth:`SwappableMemory.zap`; what the file holds stays."""
        self.dirty -= int(np.count_nonzero(self.swap[first:last] & DIRTY))
        removed = super().zap(first, last)
        self.swap[first:last] = SLOT
        return removed

    def _free_slots(self, slots: int) -> None:
        """A file keeps its length."""
