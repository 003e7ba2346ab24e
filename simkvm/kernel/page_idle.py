"""Idle page tracking: a program marks pages idle, and later reads back which still are.

Source: mm/page_idle.c, v6.12, and its user, access_tracking_perf_test without ``-l``. Reading a bit
that is set, and setting one, are one reverse-map walk each, with one ``clear_young`` notifier call
for each entry of the folio, whatever MGLRU does in this kernel and whether or not the CPU sets
accessed flags. A folio found young loses its idle flag. Bits of tail pages mean nothing.

The program goes through memory by words of 64 bits: it reads a word, which walks for the folios
that are marked, then marks those that are not. (The selftest reads a word for each page of it.)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar, Final

import numpy as np
from simpy import Event

from simkvm.kernel.aging_call import Leaves, Pass
from simkvm.kernel.host_memory import IDLE, OWN
from simkvm.kernel.rmap_walk import Answer, RmapAgeing
from simkvm.kernel.task import reach

WORD: Final = 64  #: pages in one word of the bitmap

Steps = Generator[Event, Any, int]


class PageIdle(RmapAgeing):
    """One pass reads all bits back and marks every page again."""

    name: ClassVar[str] = "page_idle"

    def run(self, t_ns: int, opens: bool = True) -> Generator[Event, Any, Pass]:
        """One pass from ``t_ns`` on; ``idle`` of its report counts pages that were still idle."""
        kvm = self.kvm
        report = Pass(kvm.name, t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        for table, present in enumerate(kvm.host.present):
            if not present:
                continue
            for word in self._words(table):
                if kvm.alive:
                    t_ns = yield from self._word(t_ns, word, report)
        report.end_ns = yield from reach(kvm.env, t_ns)
        return report

    def _words(self, table: int) -> list[Leaves]:
        leaves = self.leaves(table)
        if self.kvm.host.huge[table]:
            return [leaves] if len(leaves) else []
        # A folio is where its head page is.
        heads = leaves // self.kvm.folio_leaves * self.kvm.folio_leaves * self.kvm.leaf_pages
        cuts = np.flatnonzero(np.diff(heads // WORD)) + 1
        return np.split(leaves, cuts) if len(leaves) else []

    def _word(self, t_ns: int, leaves: Leaves, report: Pass) -> Steps:
        """Read one word back, then mark what is not idle."""
        folios = list(self.folios(leaves))
        report.scanned += self.entries(leaves)
        t_ns = yield from self.read(t_ns, folios, report)
        for folio in folios:
            t_ns = yield from self.mark(t_ns, folio, report)
        return t_ns

    def read(self, t_ns: int, folios: Sequence[Leaves], report: Pass) -> Steps:
        """``page_idle_bitmap_read``: look for references to those of ``folios`` that are idle."""
        state = self.kvm.host.state
        for folio in folios:
            if state[folio[0]] & IDLE:
                t_ns, used = yield from self.check(t_ns, folio, report)
                t_ns = yield from self.cond_resched(t_ns)
                if used:
                    state[folio] &= np.uint8(~IDLE & 0xFF)
                    report.young += self.entries(folio)
                elif state[folio[0]] & IDLE:
                    report.idle += self.entries(folio)
        return t_ns

    def mark(self, t_ns: int, folio: Leaves, report: Pass) -> Steps:
        """``page_idle_bitmap_write`` for one folio, unless it is idle or gone."""
        state = self.kvm.host.state
        there = folio[(state[folio] & OWN) != 0]
        if len(there) and not state[there[0]] & IDLE:
            t_ns, _ = yield from self.check(t_ns, there, report)
            t_ns = yield from self.cond_resched(t_ns)
            if not self.gone(there):
                state[there[(state[there] & OWN) != 0]] |= np.uint8(IDLE)
        return t_ns

    def at_entry(self, t_ns: int, first: int, last: int, report: Pass) -> Answer:
        """``page_idle_clear_pte_refs_one``: the host's flag, and one call."""
        by_host = self.host_young(first, last)
        t_ns, by_guest = yield from self.ask(t_ns, first, last, report)
        return t_ns, by_host or by_guest
