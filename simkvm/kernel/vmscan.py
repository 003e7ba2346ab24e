"""Reclaim: taking folios that look cold off the LRU, and their pages back.

Source: mm/vmscan.c (``shrink_folio_list``, ``do_try_to_free_pages``), v6.12. Which folios are
looked at is the LRU's to say (:mod:`simkvm.kernel.lru_gen`). Each is then looked at by itself: was
it used after all (``folio_referenced``), else it is unmapped, one notifier range a page, written to
swap if its slot has no copy of it, and freed.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from simpy import Event

from simkvm.kernel.aging_call import Pass
from simkvm.kernel.classic_lru import Classic
from simkvm.kernel.folio_list import NOBODY, Ids
from simkvm.kernel.folio_referenced import EvictionCheck
from simkvm.kernel.host_memory import OWN
from simkvm.kernel.listed import DEFAULT_SWAPPINESS, FolioLists, ListedLru
from simkvm.kernel.lru_gen import MultiGen
from simkvm.kernel.lru_walk import LRU_GEN_CORE
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.mglru import MAX_LRU_BATCH, MAX_NR_GENS, MIN_NR_GENS
from simkvm.kernel.scan_control import DEF_PRIORITY, SWAP_CLUSTER_MAX, ScanControl
from simkvm.kernel.swappable import CACHED, DIRTY, SLOT, WRITEBACK, SwappableMemory
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.pgdat import Pgdat

__all__ = ["DEF_PRIORITY", "SWAP_CLUSTER_MAX", "Reclaimer", "ScanControl"]

Steps = Generator[Event, Any, int]


class ReclaimOrder(Protocol):
    """What an LRU makes of a round of reclaim."""

    def shrink_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """One go over the memcgs, from ``t_ns`` on; returns when it is done."""
        ...

    def age_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """What comes before a round of kswapd."""
        ...

    def ended(self, sc: ScanControl) -> bool:
        """The last round is over: whether a direct reclaimer spared what it has to take now."""
        ...


class Reclaimer:
    """Reclaim by one task: kswapd, or who allocates.

    ``ignore_references``: whether a page was used is no matter, nor does it count as scanned.
    """

    def __init__(self, pgdat: Pgdat, task: Task, ignore_references: bool = False) -> None:
        self._ignore_references = ignore_references
        self.pgdat = self._pgdat = pgdat
        self.task = self._task = task
        self._env = pgdat.pages.env
        self._checks: dict[str, EvictionCheck] = {}
        self.report = Pass("reclaim", 0)  #: of checks: scanned, young, calls
        self.lru_gen = MultiGen(self)
        classic = not pgdat.lru_gen & LRU_GEN_CORE
        self._order: ReclaimOrder = Classic(self) if classic else self.lru_gen

    # -- rounds ---------------------------------------------------------------------------------

    def direct(self, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        """``try_to_free_pages``: returns how many pages were reclaimed, and when it is done."""
        sc, again = ScanControl(SWAP_CLUSTER_MAX, kswapd=False), True
        while again:
            t_ns = yield from self._rounds(sc, t_ns)
            again = self.ended(sc)
        return sc.reclaimed, t_ns

    def _rounds(self, sc: ScanControl, t_ns: int) -> Steps:
        """Round after round, each harder, until there is enough; returns when it is done."""
        for priority in range(DEF_PRIORITY, -1, -1):
            sc.priority = priority
            began_ns, functions = t_ns, dict[str, int]()
            self._task.functions = functions
            t_ns = yield from self.shrink_node(sc, t_ns)
            self._task.functions = None
            self._pgdat.reclaimed_directly(t_ns - began_ns, functions)
            t_ns = yield from self._pgdat.throttle.consider(
                self._task, t_ns, priority, sc.reclaimed, sc.scanned
            )
            if sc.reclaimed >= sc.nr_to_reclaim:
                break
        return t_ns

    def shrink_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """One go over the memcgs."""
        sc.scanned = 0
        return self._order.shrink_node(sc, t_ns)

    def age_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """What kswapd does before each go."""
        return self._order.age_node(sc, t_ns)

    def ended(self, sc: ScanControl) -> bool:
        """The last go is over: whether all has to be done again, harder."""
        return self._order.ended(sc)

    def cond_resched(self, number: int, t_ns: int) -> Steps:
        """A place where the task may lose its CPU."""
        return self._kvm(number, 0).sched.checkpoint(self._task, t_ns)

    # -- on command -----------------------------------------------------------------------------

    def age_on_command(
        self, lruvec: ListedLruvec, seq: int, t_ns: int, swappiness: int, forced: bool = True
    ) -> Generator[Event, Any, tuple[int, int]]:
        """``run_aging``: returns 0 or the number of an error, and when it is done."""
        if seq < lruvec.max_seq:
            return 0, t_ns
        if seq > lruvec.max_seq:
            return errno.EINVAL, t_ns
        if not forced and lruvec.oldest(swappiness) + MAX_NR_GENS - 1 <= lruvec.max_seq:
            return errno.ERANGE, t_ns
        number = self._pgdat.lruvecs.index(lruvec)
        _, t_ns = yield from self.lru_gen.ageing.try_to_inc_max_seq(
            number, seq, swappiness, forced, t_ns
        )
        return 0, t_ns

    def evict_on_command(
        self,
        lruvec: ListedLruvec,
        min_seq: int,
        nr: int,
        t_ns: int,
        swappiness: int = DEFAULT_SWAPPINESS,
    ) -> Generator[Event, Any, tuple[int, int]]:
        """``run_eviction``: evict generations up to ``min_seq``, ``nr`` pages at most.

        Batches are not cut short. Returns 0 or the number of an error, and when it is done.
        """
        if min_seq + MIN_NR_GENS > lruvec.max_seq:
            return errno.EINVAL, t_ns
        number = self._pgdat.lruvecs.index(lruvec)
        sc = ScanControl(SWAP_CLUSTER_MAX, kswapd=False)
        while min_seq >= lruvec.oldest(swappiness) and sc.reclaimed < nr:
            scanned, t_ns = yield from self.lru_gen.evict_folios(
                number, sc, swappiness, MAX_LRU_BATCH, t_ns
            )
            if not scanned:
                break
            costs = self._kvm(number, 0).costs.ageing
            t_ns = yield from self.cond_resched(number, t_ns + costs.resched_ns)
        return 0, t_ns

    # -- one batch ------------------------------------------------------------------------------

    def shrink_folio_list(
        self, number: int, lruvec: FolioLists, ids: Ids, sc: ScanControl, t_ns: int
    ) -> Steps:
        """Look at isolated folios one after the other, and put back what stays."""
        found: dict[str, list[int]] = {outcome: [] for outcome in OUTCOMES}
        t_ns = yield from self._shrink_each(number, lruvec, ids.tolist(), found, t_ns)
        # What was written by now has missed its rotation: it is tried again, once.
        again = [folio for folio in found["writeback"] if self._is_clean(number, lruvec, folio)]
        found["writeback"] = [folio for folio in found["writeback"] if folio not in again]
        t_ns = yield from self._shrink_each(number, lruvec, again, found, t_ns)
        t_ns = yield from reach(self._env, t_ns)
        used, active, writeback = (_array(found[which]) for which in OUTCOMES[1:4])
        activated = lruvec.settle(used, active, writeback)
        self._rotate_written(number, lruvec, found["writeback"])
        self._account(sc, len(ids), len(found["freed"]), activated)
        return t_ns

    def _shrink_each(
        self,
        number: int,
        lruvec: FolioLists,
        folios: list[int],
        found: dict[str, list[int]],
        t_ns: int,
    ) -> Steps:
        """Look at ``folios``, and note in ``found`` what became of each."""
        for folio in folios:
            place = lruvec.guest_of(folio)
            kvm, leaf = self._kvm(number, place), folio - int(lruvec.bases[place])
            t_ns = yield from self.cond_resched(number, t_ns)
            outcome, t_ns = yield from self._shrink_folio(kvm, leaf, t_ns)
            found[outcome].append(folio)
        return t_ns

    def _is_clean(self, number: int, lruvec: FolioLists, folio: int) -> bool:
        """Whether a folio that was written is in the swap cache, clean and unmapped."""
        place = lruvec.guest_of(folio)
        host, leaf = self._pgdat.memory(number, place), folio - int(lruvec.bases[place])
        state = host.fast_swap[leaf] & (CACHED | WRITEBACK | DIRTY)
        return state == CACHED and not host.fast[leaf] & OWN

    def _rotate_written(self, number: int, lruvec: FolioLists, folios: list[int]) -> None:
        """Those whose write ended while they were isolated go where eviction looks next."""
        for folio in folios:
            if self._is_clean(number, lruvec, folio):
                lruvec.owner(folio).rotate(folio - int(lruvec.bases[lruvec.guest_of(folio)]))

    def _account(self, sc: ScanControl, scanned: int, freed: int, activated: int) -> None:
        sc.scanned += scanned
        sc.reclaimed += freed
        if freed:
            self._pgdat.kswapd_failures = 0
        vmstat = self._pgdat.vmstat
        vmstat.pgactivate += activated
        if self._ignore_references:
            return
        if sc.kswapd:
            vmstat.pgscan_kswapd += scanned
            vmstat.pgsteal_kswapd += freed
        else:
            vmstat.pgscan_direct += scanned
            vmstat.pgsteal_direct += freed

    # -- one folio ------------------------------------------------------------------------------

    def _shrink_folio(
        self, kvm: Kvm, leaf: int, t_ns: int
    ) -> Generator[Event, Any, tuple[str, int]]:
        """One folio: returns which of :data:`OUTCOMES`, and when it is done."""
        host, costs = kvm.host, kvm.costs.reclaim
        assert isinstance(host, SwappableMemory)
        t_ns = yield from reach(self._env, t_ns + costs.scan_ns)
        if not host.fast[leaf] & OWN and not host.fast_swap[leaf] & CACHED:
            return "gone", t_ns  # somebody took it back meanwhile
        if not host.trylock_folio(leaf):
            return "active", t_ns
        outcome, t_ns = yield from self._locked(kvm, host, leaf, t_ns)
        host.unlock_folio(leaf, t_ns)
        return outcome, t_ns

    def _locked(
        self, kvm: Kvm, host: SwappableMemory, leaf: int, t_ns: int
    ) -> Generator[Event, Any, tuple[str, int]]:
        if host.fast_swap[leaf] & WRITEBACK:
            return "writeback", t_ns
        lru = host.lru
        assert isinstance(lru, ListedLru)
        asks = not self._ignore_references
        if asks and host.fast[leaf] & OWN and lru.marked(leaf):
            return "used", t_ns  # a look around saw it, or a fault: nobody is asked
        if host.fast[leaf] & OWN:
            if asks:
                t_ns, used = yield from self._referenced(kvm, leaf, t_ns)
                t_ns = yield from reach(self._env, t_ns)
                if used:
                    return "used", t_ns
            if not host.fast[leaf] & OWN:
                return "gone", t_ns  # somebody gave it up while it was looked at
            if not self._add_to_swap(host, leaf):
                return "active", t_ns
            t_ns = yield from self._unmap(kvm, host, leaf, t_ns)
            t_ns = yield from reach(self._env, t_ns)
        if host.fast[leaf] & OWN:  # a fault was quicker
            return "active", t_ns
        swap = host.fast_swap[leaf]
        if not swap & CACHED:
            return "gone", t_ns
        if swap & DIRTY and host.file:
            return "active", t_ns  # the flusher's to write
        if swap & DIRTY:
            t_ns, written = yield from self._write(host, leaf, t_ns)
            if not written and host.fast_swap[leaf] & CACHED:
                return "writeback", t_ns
        if not host.fast_swap[leaf] & CACHED:
            return "gone", t_ns  # somebody gave it up while it was written
        if host.fast[leaf] & OWN or host.fast_swap[leaf] & DIRTY:
            return "active", t_ns
        return "freed", self._free(kvm, host, leaf, t_ns)

    def _referenced(
        self, kvm: Kvm, leaf: int, t_ns: int
    ) -> Generator[Event, Any, tuple[int, bool]]:
        check = self._checks.get(kvm.name)
        if check is None:
            check = self._checks[kvm.name] = EvictionCheck(kvm, self._task)
        began_ns = t_ns
        self.report.scanned += 1
        t_ns, used = yield from check.check(t_ns, np.array([leaf]), self.report)
        self._task.spend("folio_referenced", t_ns - began_ns)
        return t_ns, used

    def was_referenced(self, number: int, lruvec: FolioLists, folio: int, t_ns: int) -> Steps:
        """Ask about an active folio and clear its flags, whatever the answer."""
        place = lruvec.guest_of(folio)
        kvm, leaf = self._kvm(number, place), folio - int(lruvec.bases[place])
        t_ns = yield from reach(self._env, t_ns + kvm.costs.reclaim.scan_ns)
        if kvm.host.fast[leaf] & OWN:
            t_ns, _ = yield from self._referenced(kvm, leaf, t_ns)
        return t_ns

    def _add_to_swap(self, host: SwappableMemory, leaf: int) -> bool:
        """Give the folio a slot (``add_to_swap``), if it has none; False without any left."""
        swap = host.fast_swap[leaf]
        if swap & SLOT:
            host.fast_swap[leaf] = swap | CACHED
            return True
        if host.device is None or not host.device.allocate(1):
            return False
        host.fast_swap[leaf] = SLOT | CACHED | DIRTY
        return True

    def _unmap(self, kvm: Kvm, host: SwappableMemory, leaf: int, t_ns: int) -> Steps:
        """``try_to_unmap``: one notifier range; swap entries in place of the mapping."""
        began_ns = t_ns

        def change(at_ns: int, first: int, last: int) -> int:
            return at_ns + host.unmap_to_swap_cache(first, last) * kvm.costs.unmap.host_page_ns

        t_ns = yield from kvm.notifier.invalidate(
            self._task, t_ns, leaf, leaf + 1, blockable=False, change=change
        )
        self._task.spend("unmap", t_ns - began_ns)
        return t_ns

    def _write(
        self, host: SwappableMemory, leaf: int, t_ns: int
    ) -> Generator[Event, Any, tuple[int, bool]]:
        """``pageout``: returns when the caller goes on, and whether the page is written by then."""
        device = host.device
        assert device is not None
        began_ns = t_ns
        host.fast_swap[leaf] = (host.fast_swap[leaf] | WRITEBACK) & ~DIRTY
        self._pgdat.vmstat.pswpout += 1
        t_ns, done = yield from device.write(self._task, t_ns, 1)
        self._task.spend("compression" if device.synchronous else "swap_writepage", t_ns - began_ns)
        if done[0] <= t_ns:
            t_ns = yield from reach(self._env, t_ns)
            host.fast_swap[leaf] &= ~WRITEBACK & 0xFF
            return t_ns, True
        if not host.fast_swap[leaf] & WRITEBACK:
            return t_ns, False  # somebody gave it up meanwhile
        token = host.writing[leaf] = object()
        self._env.process(self._end_writeback(host, leaf, token, done[0]))
        return t_ns, False

    def _end_writeback(
        self, host: SwappableMemory, leaf: int, token: object, t_ns: int
    ) -> Generator[Event, Any, None]:
        """The page is on the device: eviction looks at it next (``folio_rotate_reclaimable``)."""
        yield from reach(self._env, t_ns)
        if host.writing.get(leaf) is not token:
            return  # somebody gave the page up meanwhile
        del host.writing[leaf]
        host.fast_swap[leaf] &= ~WRITEBACK & 0xFF
        if not host.fast[leaf] & OWN:
            host.lru.rotate(leaf)  # type: ignore[attr-defined]

    def _free(self, kvm: Kvm, host: SwappableMemory, leaf: int, t_ns: int) -> int:
        """``__remove_mapping``: the page is free, and a shadow in its place."""
        host.fast_swap[leaf] = SLOT
        host.lru.evicted(leaf)  # type: ignore[attr-defined]
        self._pgdat.pages.put(1)
        return t_ns + kvm.costs.reclaim.free_ns

    def _kvm(self, number: int, place: int) -> Kvm:
        return self._pgdat.kvms[number][place]


OUTCOMES: Final = ("freed", "used", "active", "writeback", "gone")
"""Of a folio: its page is free; it stays, because it was used or for another reason; it is being
written; somebody took it back meanwhile."""


def _array(folios: list[int]) -> Ids:
    return np.array(folios, np.int64) if folios else NOBODY
