"""The host's side of guest memory: its page table, its locks and its generations.

One entry a leaf: a guest backed by huge pages has huge host mappings. Source of the rules:
mm/memory.c (``do_anonymous_page``, ``wp_page_copy``), mm/vmscan.c, v6.12.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.mglru import LruGen

PRESENT: Final = 1
OWN: Final = 2  #: a page of its own; without it a present entry is the shared zero page
YOUNG: Final = 4  #: the host's own accessed flag

LOOK_BACK_NS: Final = 100_000  #: no fault asks later who had a table's lock when it came for it
REMEMBERED: Final = 64  #: tables that ageing let go of, beyond which old ones are forgotten


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
        self.aged_table = -1  #: the host table that ageing locked last
        self.left: dict[int, int] = {}  #: tables that it let go of lately -> when
        self._aged_from_ns = 0
        self._aging = False
        self._blocked: list[Event] = []  #: one for each fault that waits for ageing

    # -- what is mapped -----------------------------------------------------------------------

    def install(self, leaf: int, own: bool) -> None:
        """A fault mapped ``leaf``: a page of its own, or the zero page."""
        before = self.fast[leaf]
        if not before:
            self.present[leaf // self.entries] += 1
        if own and not before & OWN:
            self.lru.add(leaf)
        # A read that meets a page of the leaf's own, made meanwhile, leaves it alone.
        self.fast[leaf] = before | PRESENT | YOUNG | (OWN if own else 0)

    def populate(self, first: int, last: int) -> int:
        """Somebody wrote to all of ``first`` up to ``last`` from the host's side.

        Returns how many pages were not there before.
        """
        lacking = first + np.flatnonzero(self.state[first:last] == 0)
        self.state[first:last] |= np.uint8(PRESENT | OWN | YOUNG)
        tables, counts = np.unique(lacking // self.entries, return_counts=True)
        for table, count in zip(tables.tolist(), counts.tolist(), strict=True):
            self.present[table] += count
        self.lru.add_many(lacking)
        return len(lacking)

    def zap(self, first: int, last: int) -> int:
        """Remove what is mapped in ``first`` up to ``last``; returns how many entries that was."""
        if last - first == 1 and self.fast[first] == PRESENT | (self.fast[first] & YOUNG):
            self.fast[first] = 0  # a zero page about to be copied, the commonest of all
            self.present[first // self.entries] -= 1
            return 1
        state = self.state[first:last]
        there = np.flatnonzero(state)
        self.lru.remove(first + np.flatnonzero(state & OWN))
        tables, gone = np.unique((first + there) // self.entries, return_counts=True)
        for table, count in zip(tables.tolist(), gone.tolist(), strict=True):
            self.present[table] -= count
        state[:] = 0
        return len(there)

    def table_leaves(self, table: int) -> NDArray[np.int64]:
        """Leaves of host table ``table`` that map a page of their own, in order."""
        first = table * self.entries
        return first + np.flatnonzero(self.state[first : first + self.entries] & OWN)

    # -- the page-table lock ------------------------------------------------------------------

    def lock_for_ageing(self, table: int, t_ns: int) -> None:
        """Ageing got the lock of ``table`` at ``t_ns``."""
        self.aged_table, self._aged_from_ns, self._aging = table, t_ns, True

    def unlock(self, t_ns: int) -> None:
        """Ageing lets go of its table at ``t_ns``."""
        for released in self._blocked:
            released._ok = True
            released._value = t_ns
            self._env.schedule(released, delay=max(0, t_ns - int(self._env.now)))
        self._blocked.clear()
        self._aging = False
        if len(self.left) >= REMEMBERED:
            self.left = {table: at for table, at in self.left.items() if at > t_ns - LOOK_BACK_NS}
        self.left[self.aged_table] = t_ns

    def blocked(self, leaf: int, t_ns: int) -> int | Event | None:
        """Who took the lock of ``leaf``'s table before ``t_ns`` and holds it then.

        Returns None if nobody, the time of release if it is past, else the event of it.
        """
        table = leaf // self.entries
        if not self._aging or table != self.aged_table or self._aged_from_ns > t_ns:
            until = self.left.get(table, -1)
            return until if until > t_ns else None
        # An event of its own: a process that one event resumes does not see the others coming.
        released = Event(self._env)
        self._blocked.append(released)
        return released
