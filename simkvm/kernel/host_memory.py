"""The host's side of guest memory: its page table, its locks and its generations.

One entry a leaf: a guest backed by huge pages has huge host mappings. Where leaves are pages but
host pages may be huge, ``huge`` says which tables a huge page stands for. Source of the rules:
mm/memory.c (``do_anonymous_page``, ``wp_page_copy``), mm/vmscan.c, v6.12.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.mglru import LruGen

PRESENT: Final = 1
OWN: Final = 2  #: a page of its own; without it a present entry is the shared zero page
YOUNG: Final = 4  #: the host's own accessed flag
IDLE: Final = 8  #: marked by idle page tracking, which the end of the page ends
# From here on what only :mod:`simkvm.kernel.host_change` makes, and a fault has to undo.
MIGRATION: Final = 32  #: a page is on its way to another place: not present, a fault waits
PROT_NONE: Final = 64  #: present, but the next access takes a NUMA hinting fault
WRPROTECT: Final = 128  #: nobody may write: a page of its own protected, or (not OWN) KSM's

LOOK_BACK_NS: Final = 100_000  #: no fault asks later who had a table's lock when it came for it
REMEMBERED: Final = 64  #: tables that ageing let go of, beyond which old ones are forgotten


@dataclass
class TableHold:
    """The lock of one host table: since when somebody has it, and one event for each who waits."""

    from_ns: int
    waiting: list[Event] = field(default_factory=list)


class HostMemory:
    """Host mappings of one guest's ``leaves``; ``entries``: PTEs in one host table."""

    def __init__(
        self, env: Environment, leaves: int, entries: int, line: LineCosts, two_step: bool
    ) -> None:
        self._env = env
        self.entries = entries
        self.state: NDArray[np.uint8] = np.zeros(leaves, np.uint8)
        self.fast = memoryview(self.state)  # type: ignore[arg-type]  # arrays are buffers
        self.present = [0] * (-(-leaves // entries))  #: entries present in each host table
        self.mmap_lock = CacheLine(line)
        self.lru = LruGen(leaves, two_step)
        #: Host tables in whose place one huge page is mapped (a PMD): its pages are all present.
        self.huge: NDArray[np.bool_] = np.zeros(len(self.present), np.bool_)
        self.fast_huge = memoryview(self.huge)  # type: ignore[arg-type]  # a buffer
        #: Host tables of small pages that were zapped: they stay, however empty, and in the place
        #: of one no fault maps a huge page (zap_pte_range(), __handle_mm_fault(), v6.12).
        self.kept: NDArray[np.bool_] = np.zeros(len(self.present), np.bool_)
        self.locked: dict[int, TableHold] = {}  #: host tables whose lock ageing or reclaim has
        self.left: dict[int, int] = {}  #: tables that they let go of lately -> when
        self.children = 0  #: forked processes that share the pages which are write-protected
        #: Who waits for the one that holds ``mmap_lock`` for write; None: nobody holds it so.
        self.mmap_writer: list[Event] | None = None
        self.arrivals: dict[int, list[Event]] = {}  #: faults that wait for a leaf on its way

    # -- what is mapped -----------------------------------------------------------------------

    def install(self, leaf: int, own: bool) -> None:
        """A fault mapped ``leaf``: a page of its own, or the zero page."""
        before = self.fast[leaf]
        if not before:
            self.present[leaf // self.entries] += 1
        if own and not before & OWN:
            self.lru.add(leaf)
        if before >= MIGRATION:  # what the fault was about is settled by it
            before &= ~(PROT_NONE | WRPROTECT if own else PROT_NONE)
        # A read that meets a page of the leaf's own, made meanwhile, leaves it alone.
        self.fast[leaf] = before | PRESENT | YOUNG | (OWN if own else 0)

    def install_huge(self, first: int, last: int) -> None:
        """A fault mapped huge pages over the leaves ``first`` up to ``last``, where nothing was."""
        self.state[first:last] = PRESENT | YOUNG | OWN
        self.lru.add_all(first, last)
        for table in range(first // self.entries, -(-last // self.entries)):
            self.present[table] = min(self.entries, len(self.state) - table * self.entries)
            self.huge[table] = True
            self.kept[table] = False

    def takes_huge(self, first: int, last: int) -> bool:
        """Whether a fault may map a huge page over ``first`` up to ``last``: nothing is there."""
        if self.kept[first // self.entries : -(-last // self.entries)].any():
            return False
        return not self.state[first:last].any()

    def all_huge(self, first: int, last: int) -> bool:
        """Whether huge pages stand for the tables of all leaves from ``first`` up to ``last``."""
        return bool(self.huge[first // self.entries : -(-last // self.entries)].all())

    def map_all(self) -> None:
        """Give every leaf of an empty page table a page of its own."""
        self.state[:] = PRESENT | YOUNG | OWN
        self.present = [self.entries] * len(self.present)
        if rest := len(self.state) % self.entries:
            self.present[-1] = rest
        self.lru.add_all(0, len(self.state))

    def populate(self, first: int, last: int, huge: bool) -> int:
        """Somebody wrote to all of ``first`` up to ``last`` from the host's side.

        ``huge``: with huge pages where a whole one was lacking. Returns how many pages were not
        there before.
        """
        state = self.state[first:last]
        lacking = np.flatnonzero(state == 0)
        own = first + np.flatnonzero((state & OWN) == 0)
        state |= np.uint8(PRESENT | OWN | YOUNG)
        tables, counts = np.unique((first + lacking) // self.entries, return_counts=True)
        for table, count in zip(tables.tolist(), counts.tolist(), strict=True):
            self.present[table] += count
        if huge:
            self.huge[tables[(counts == self.entries) & ~self.kept[tables]]] = True
        self.lru.add_many(own)
        return len(lacking)

    def zap(self, first: int, last: int) -> int:
        """Remove what is mapped in ``first`` up to ``last``; returns how many entries that was.

        A huge page is one entry. One of which a part goes is split first. Migration entries go,
        too, a huge one as a whole, but map nothing.
        """
        if last - first == 1 and self.fast[first] == PRESENT | (self.fast[first] & YOUNG):
            self.fast[first] = 0  # a zero page about to be copied, the commonest of all
            self.present[first // self.entries] -= 1
            self.kept[first // self.entries] = True
            return 1
        self.split(first, last)
        state = self.state[first:last]
        there = np.flatnonzero(state & PRESENT)
        self.lru.remove(first + np.flatnonzero(state & OWN))
        tables, gone = np.unique((first + there) // self.entries, return_counts=True)
        for table, count in zip(tables.tolist(), gone.tolist(), strict=True):
            self.present[table] -= count
        state[:] = 0
        huge = self.huge[tables]
        self.kept[tables[~huge]] = True
        self.huge[first // self.entries : -(-last // self.entries)] = False
        return int(gone[~huge].sum()) + int(np.count_nonzero(huge))

    def split(self, first: int, last: int) -> None:
        """Split the huge pages that the range covers in part (``__split_huge_pmd``)."""
        for table in {first // self.entries, (last - 1) // self.entries}:
            begin = table * self.entries
            if first > begin or last < min(begin + self.entries, len(self.state)):
                self.huge[table] = False

    def settle_huge(self, leaf: int, clear: int) -> None:
        """A fault on the huge page of ``leaf`` clears the flags ``clear`` of all of it."""
        first = leaf - leaf % self.entries
        self.state[first : first + self.entries] &= np.uint8(~clear & 0xFF)

    def table_leaves(self, table: int) -> NDArray[np.int64]:
        """Leaves of host table ``table`` that map a page of their own, in order."""
        first = table * self.entries
        return first + np.flatnonzero(self.state[first : first + self.entries] & OWN)

    # -- the page-table lock ------------------------------------------------------------------

    def lock_table(self, table: int, t_ns: int) -> None:
        """Ageing or reclaim got the lock of ``table``, which nobody else has, at ``t_ns``."""
        self.locked[table] = TableHold(t_ns)

    def unlock_table(self, table: int, t_ns: int) -> None:
        """Who has ``table`` lets go of it at ``t_ns``."""
        for released in self.locked.pop(table).waiting:
            released._ok = True
            released._value = t_ns
            self._env.schedule(released, delay=max(0, t_ns - int(self._env.now)))
        if len(self.left) >= REMEMBERED:
            self.left = {table: at for table, at in self.left.items() if at > t_ns - LOOK_BACK_NS}
        self.left[table] = t_ns

    def contended(self, table: int) -> bool:
        """Whether somebody waits for the lock of ``table``, which somebody has."""
        return bool(self.locked[table].waiting)

    def released(self, table: int) -> Event:
        """The event of ``table``, which somebody has, being let go of; its value is when."""
        # An event of its own: a process that one event resumes does not see the others coming.
        released = Event(self._env)
        self.locked[table].waiting.append(released)
        return released

    def blocked(self, leaf: int, t_ns: int) -> int | Event | None:
        """Who took the lock of ``leaf``'s table before ``t_ns`` and holds it then.

        Returns None if nobody, the time of release if it is past, else the event of it.
        """
        table = leaf // self.entries
        hold = self.locked.get(table)
        if hold is None or hold.from_ns > t_ns:
            until = self.left.get(table, -1)
            return until if until > t_ns else None
        return self.released(table)
