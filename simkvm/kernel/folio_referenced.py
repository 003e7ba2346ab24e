"""The check that eviction makes before it takes a folio: was it used after all?

Source: mm/rmap.c (``folio_referenced_one``) and mm/vmscan.c (``lru_gen_look_around``), v6.4 and
v6.12; the policy ``eviction_young`` says which form.

* ``clear_flush_young``: for each entry one notifier call that flushes the VMID, under ``mmu_lock``,
  if the guest used the page.
* ``look_around``: for each entry one ``clear_young`` call, without a flush.

If the page was used, there is a look at the others of a window of 64 around it, and those that were
used are promoted: eviction then sorts them and does not check them. With ``look_around`` the guest
is asked for them as the page-table walk asks (``ageing_call``). Where that asks nobody, and with
``clear_flush_young``, only the host's own flags count, for the page (before the guest is asked for
it) as for its neighbours.

A folio that the host maps by a block is asked for with ``clear_flush_young`` in either form, and
nobody looks around.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from simpy import Event

from simkvm.kernel.aging_call import CALLS, Blind, Leaves, Pass
from simkvm.kernel.host_memory import OWN, YOUNG
from simkvm.kernel.lrugen import ListedLruGen
from simkvm.kernel.mglru import MIN_LRU_BATCH, suitable_to_scan
from simkvm.kernel.rmap_walk import Answer, RmapAgeing
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class FolioReferenced(RmapAgeing):
    """One pass checks every folio of the guest, in the order of addresses."""

    name: ClassVar[str] = "folio_referenced"

    def __init__(self, kvm: Kvm, task: Task) -> None:
        super().__init__(kvm, task)
        self._flush = kvm.kernel["eviction_young"] == "clear_flush_young" or kvm.leaf_pages > 1
        self._looks = kvm.leaf_pages == 1
        call = CALLS[kvm.kernel["ageing_call"]]
        # A guest that could only be asked under the lock is no reason to ask for its neighbours.
        asks = not self._flush and call is not Blind and kvm.test_clear_young
        self._neighbours = call(kvm, task) if asks else None
        self._promoted: set[int] = set()

    def run(self, t_ns: int, opens: bool = True) -> Generator[Event, Any, Pass]:
        """One pass from ``t_ns`` on."""
        kvm, costs = self.kvm, self.costs
        report = Pass(kvm.name, t_ns)
        self.begin_batch()
        t_ns = yield from reach(kvm.env, t_ns)
        for table, present in enumerate(kvm.host.present):
            for folio in self.folios(self.leaves(table)) if present and kvm.alive else ():
                if not kvm.alive or int(folio[0]) // kvm.folio_leaves in self._promoted:
                    continue
                entries = self.entries(folio)
                report.scanned += entries
                t_ns, used = yield from self.check(t_ns, folio, report)
                if used:
                    there = folio[(kvm.host.state[folio] & OWN) != 0]
                    report.young += min(len(there), entries)
                    kvm.host.lru.promote(there)
                    t_ns += costs.promote_ns
                t_ns = yield from self.cond_resched(t_ns)
        report.end_ns = yield from reach(kvm.env, t_ns)
        return report

    def begin_batch(self) -> None:
        """Forget which folios were promoted beside others."""
        self._promoted.clear()

    def at_entry(self, t_ns: int, first: int, last: int, report: Pass) -> Answer:
        """One entry: the host's flag, one call, and perhaps the neighbours."""
        block, by_guests = last - first > 1, self._neighbours is not None
        by_host = self.host_young(first, last)
        if by_host and not block and not by_guests:
            t_ns = yield from self._around(t_ns, first, report)
        t_ns, by_guest = yield from self.ask(t_ns, first, last, report, self._flush or block)
        if (by_host or by_guest) and not block and by_guests:
            t_ns = yield from self._around(t_ns, first, report)
        return t_ns, by_host or by_guest

    def _around(self, t_ns: int, leaf: int, report: Pass) -> Generator[Event, Any, int]:
        """Look around, unless somebody waits for the lock of the host's page table."""
        t_ns = yield from reach(self.kvm.env, t_ns)
        if not self._looks or self._contended(t_ns, leaf):
            return t_ns
        began_ns = t_ns
        t_ns = yield from self._look_around(t_ns, leaf, report)
        self.task.spend("look_around", t_ns - began_ns)
        return t_ns

    def _contended(self, t_ns: int, leaf: int) -> bool:
        """Whether a fault waits for the host table that is locked for ``leaf``."""
        table = leaf // self.kvm.host.entries
        return self.kvm.host.contended(table) or self.faults_until(t_ns, table) > 0

    def span(self, leaf: int) -> tuple[int, int]:
        """The 64 leaves around ``leaf``, within its host table and the guest."""
        host = self.kvm.host
        low = leaf // host.entries * host.entries
        high = min(low + host.entries, self.kvm.leaves)
        first = max(low, min(leaf - MIN_LRU_BATCH // 2, high - MIN_LRU_BATCH))
        return first, min(first + MIN_LRU_BATCH, high)

    def window(self, leaf: int) -> Leaves:
        """Of :meth:`span` what is there, without ``leaf`` itself."""
        host = self.kvm.host
        leaves = np.arange(*self.span(leaf), dtype=np.int64)
        others: Leaves = leaves[((host.state[leaves] & OWN) != 0) & (leaves != leaf)]
        return others

    def _look_around(self, t_ns: int, leaf: int, report: Pass) -> Generator[Event, Any, int]:
        leaves = self.window(leaf)
        if not len(leaves):
            return t_ns
        t_ns, young = yield from self._neighbours_of(t_ns, leaves, report)
        self.kvm.host.lru.promote(young)
        folios = young // self.kvm.folio_leaves
        report.young += int(np.count_nonzero(folios != leaf // self.kvm.folio_leaves))
        self._promoted.update(folios.tolist())
        return t_ns

    def _neighbours_of(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Ask for ``leaves``: when that is done, and which of them were young."""
        kvm, state = self.kvm, self.kvm.host.state
        by_host = leaves[(state[leaves] & YOUNG) != 0]
        state[leaves] &= np.uint8(~YOUNG & 0xFF)
        asks = self._neighbours
        if asks is not None and kvm.notifier.hears(int(leaves[0]), int(leaves[-1]) + 1):
            began_ns = t_ns
            t_ns, by_guest = yield from asks.ask(t_ns, leaves, report)
            self.task.spend("notifier", t_ns - began_ns)
        else:
            t_ns, by_guest = t_ns + len(leaves) * self.costs.scan_ns, leaves[:0]
        young = np.union1d(by_host, by_guest)
        t_ns += (len(young) - len(by_guest)) * self.costs.promote_ns
        t_ns = yield from reach(kvm.env, t_ns)
        return t_ns, young[(state[young] & OWN) != 0]


class EvictionCheck(FolioReferenced):
    """The check as eviction makes it, on a host whose memory is short.

    The loop over the window comes by the entry in question once more, with a call of its own
    (7,801 calls of 121 looks around in a trace of Linux 6.12: 120 with 65 each, and a cold one).
    A window in which enough was young puts the page table into the Bloom filter of the next walk.
    """

    def __init__(self, kvm: Kvm, task: Task) -> None:
        super().__init__(kvm, task)
        self._lru = kvm.host.lru
        if not isinstance(self._lru, ListedLruGen):
            self._flush, self._looks, self._neighbours = True, False, None  # the classic LRU

    def _look_around(self, t_ns: int, leaf: int, report: Pass) -> Generator[Event, Any, int]:
        lru = self._lru
        assert isinstance(lru, ListedLruGen)
        lruvec = lru._lists
        seq = lruvec.max_seq
        lruvec.vmstat.look_arounds += 1
        first, last = self.span(leaf)
        leaves = np.arange(first, last, dtype=np.int64)
        leaves = lru.askable(leaves[(self.kvm.host.state[leaves] & OWN) != 0])
        young = leaves[:0]
        if len(leaves):
            t_ns, young = yield from self._neighbours_of(t_ns, leaves, report)
        young = young[young != leaf]
        lru.promote(young, seq)
        report.young += len(young)
        if suitable_to_scan(last - first, 1 + len(young)):
            table = leaf // self.kvm.host.entries
            lruvec.mms.filters.add(seq, lru.number, table)
        return t_ns
