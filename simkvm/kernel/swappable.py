"""Host mappings of a guest whose pages may be swapped out.

Beside what the page table says (:mod:`simkvm.kernel.host_memory`) each page has a place in swap, or
none (mm/swap_state.c, mm/memory.c ``do_swap_page``, v6.12):

* ``SLOT``: a swap slot is its own. Without a page of its own that is where its content is.
* ``CACHED``: its page is in the swap cache: in memory, mapped or not, and the slot is still there.
* ``WRITEBACK``: the page is being written to the slot.
* ``DIRTY``: the page in the swap cache is newer than the slot.

Who reads a page in, or is about to evict it, holds its folio lock; a fault that finds it so waits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.host_memory import OWN, PRESENT, YOUNG, HostMemory
from simkvm.kernel.page_alloc import HostPages
from simkvm.kernel.swap import SwapDevice

SLOT: Final = 1
CACHED: Final = 2
WRITEBACK: Final = 4
DIRTY: Final = 8


class SwappableMemory(HostMemory):
    """As :class:`HostMemory`, with its pages counted in ``pages`` and its slots in ``device``."""

    file = False  #: whether its pages are those of a file

    def __init__(
        self,
        env: Environment,
        leaves: int,
        entries: int,
        line: LineCosts,
        two_step: bool,
        pages: HostPages,
        device: SwapDevice | None,
    ) -> None:
        super().__init__(env, leaves, entries, line, two_step)
        self.pages = pages
        self.device = device
        self.swap: NDArray[np.uint8] = np.zeros(leaves, np.uint8)
        self.fast_swap = memoryview(self.swap)  # type: ignore[arg-type]  # a buffer
        self._folio_locks: dict[int, list[Event]] = {}
        self._tables: NDArray[np.bool_] = np.zeros(len(self.present), np.bool_)
        self.thrashing: set[int] = set()  #: leaves read again, a short time after they went
        self.writing: dict[int, object] = {}  #: leaf under writeback -> which one that is

    # -- the folio lock -------------------------------------------------------------------------

    def trylock_folio(self, leaf: int) -> bool:
        """Lock the folio of ``leaf``, unless somebody has."""
        if leaf in self._folio_locks:
            return False
        self._folio_locks[leaf] = []
        return True

    def folio_locked(self, leaf: int) -> bool:
        """Whether somebody has the folio lock of ``leaf``."""
        return leaf in self._folio_locks

    def folio_unlocked(self, leaf: int) -> Event:
        """The event of the folio lock of ``leaf``, which somebody has, being let go of."""
        event = Event(self._env)
        self._folio_locks[leaf].append(event)
        return event

    def unlock_folio(self, leaf: int, t_ns: int) -> None:
        """Let go of it at ``t_ns`` and wake who waits."""
        for event in self._folio_locks.pop(leaf):
            event._ok = True
            event._value = t_ns
            self._env.schedule(event, delay=max(0, t_ns - int(self._env.now)))

    def waiting(self, leaves: NDArray[np.int64], file: bool) -> NDArray[np.bool_]:
        """Which of ``leaves`` eviction passes by: locked, or under writeback."""
        found: NDArray[np.bool_] = (self.swap[leaves] & WRITEBACK) != 0
        if self._folio_locks:
            found |= np.isin(leaves, list(self._folio_locks))
        return found

    # -- pages that come and go -----------------------------------------------------------------

    def lacks_table(self, leaf: int) -> bool:
        """Whether there is no table of the host's own for ``leaf`` yet."""
        return not self._tables[leaf // self.entries]

    def table_linked(self, leaf: int) -> None:
        """A page that was allocated became the host's own table for ``leaf``."""
        self._tables[leaf // self.entries] = True

    @property
    def table_pages(self) -> int:
        """Pages of the host's own tables of this guest."""
        return int(np.count_nonzero(self._tables))

    @property
    def page_count(self) -> int:
        """Pages of guest memory that the host has: mapped ones, and those in the swap cache."""
        return int(np.count_nonzero((self.state & OWN) | (self.swap & CACHED)))

    def map_all(self) -> None:
        """Give every leaf a page, and swap those out that were written first if there are too many.

        What a guest leaves that wrote to all of its memory once, in order of addresses, and has
        been idle since: ageing came by and found nothing young.
        """
        leaves = len(self.state)
        self._tables[:] = True
        self.pages.take(len(self.present))
        self.pages.spoken_for -= len(self.present)
        self.pages.to_map -= leaves
        out = self._without_room(leaves, self.pages.to_map)
        super().map_all()
        if out:
            self._swap_out(np.arange(out))
        self.state &= np.uint8(~YOUNG & 0xFF)
        self.lru.all_old()  # type: ignore[attr-defined]
        self.pages.take(leaves - out)

    def _without_room(self, leaves: int, to_come: int = 0) -> int:
        """Slots for those of ``leaves`` that have no room, above the high watermark; their number.

        Compressed swap takes room itself. ``to_come``: pages of guests that are still to be mapped;
        each has the same part of its memory swapped out.
        """
        pages, device = self.pages, self.device
        room = pages.free - pages.marks.high - pages.spoken_for
        if leaves + to_come <= room:
            return 0
        assert device is not None, "checked before: there is swap for what does not fit"
        room += device.pool_pages
        total, out = leaves + to_come, 0
        while out < total and (lacking := total - out + device.pool_with(out) - room) > 0:
            out = min(total, out + lacking)
        out = -(-out * leaves // total)
        taken = device.allocate(out)
        assert taken == out, "checked before: it holds what does not fit"
        return out

    def populate(self, first: int, last: int, huge: bool) -> int:
        """As :meth:`HostMemory.populate`, before the run begins: what is too much is swapped out.

        As eviction would: what was written first goes first.
        """
        before, tables = self.page_count_of(first, last), self.table_pages
        lacking = super().populate(first, last, huge)
        self._tables[first // self.entries : -(-last // self.entries)] = True
        self.pages.take(self.table_pages - tables)
        came = self.page_count_of(first, last) - before
        out = self._without_room(came)
        if out:
            self._swap_out(first + np.arange(out))
        self.pages.take(came - out)
        return lacking

    def _swap_out(self, leaves: NDArray[np.int64]) -> None:
        self.lru.remove(leaves)
        self.state[leaves] = 0
        self.swap[leaves] = SLOT
        self._recount()

    def swapped_out(self) -> list[tuple[int, int]]:
        """Ranges of leaves whose content is in swap alone."""
        out = np.flatnonzero((self.swap == SLOT) & (self.state == 0))
        cuts = np.flatnonzero(np.diff(out) != 1) + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(out, cuts) if len(run)]

    def _recount(self) -> None:
        tables = np.flatnonzero(self.state & PRESENT) // self.entries
        self.present = np.bincount(tables, minlength=len(self.present)).tolist()

    def zap(self, first: int, last: int) -> int:
        """As :meth:`HostMemory.zap`: what is swapped out goes with it."""
        before = self.page_count_of(first, last)
        swap = self.swap[first:last]
        slots = int(np.count_nonzero(swap & SLOT))
        self._free_slots(slots)
        cached = first + np.flatnonzero((swap & CACHED) > (self.state[first:last] & OWN))
        for leaf in (first + np.flatnonzero(swap & WRITEBACK)).tolist():
            self.writing.pop(leaf, None)
        swap[:] = 0
        self.lru.remove(cached)
        removed = super().zap(first, last)
        self.pages.put(before - self.page_count_of(first, last))
        return removed

    def _free_slots(self, slots: int) -> None:
        if slots and self.device is not None:
            self.device.free(slots)

    def page_count_of(self, first: int, last: int) -> int:
        """As :attr:`page_count`, of the leaves ``first`` up to ``last``."""
        state, swap = self.state[first:last], self.swap[first:last]
        return int(np.count_nonzero((state & OWN) | (swap & CACHED)))

    def give_all_up(self) -> None:
        """The owner was killed: nothing of its memory is left."""
        self.zap(0, len(self.state))

    def free_tables(self) -> None:
        """The end of the address space: its page tables go (``free_pgtables``)."""
        self.pages.put(self.table_pages)
        self._tables[:] = False

    # -- out and in -----------------------------------------------------------------------------

    def unmap_to_swap_cache(self, first: int, last: int) -> int:
        """Eviction unmaps one page, which has a slot: swap entries in place of mappings."""
        state = self.state[first:last]
        there = first + np.flatnonzero(state & OWN)
        for leaf in there.tolist():
            self.present[leaf // self.entries] -= 1
            self.kept[leaf // self.entries] = True
        self.state[there] = 0
        return len(there)

    def swapped_in(self, leaf: int, write: bool) -> None:
        """A page came from its slot for a fault: it may keep the slot, in the swap cache."""
        assert self.device is not None
        if self.device.keeps_slot(write):
            self.fast_swap[leaf] = SLOT | CACHED
        else:
            self.device.free(1)
            self.fast_swap[leaf] = 0

    def written(self, leaf: int) -> None:
        """A write fault makes the page of ``leaf`` newer than its slot, which goes if it can."""
        swap = self.fast_swap[leaf]
        if swap & WRITEBACK:
            self.fast_swap[leaf] = swap | DIRTY
        elif swap & SLOT:
            assert self.device is not None
            self.device.free(1)
            self.fast_swap[leaf] = 0
