"""Reclaim: taking folios that look cold off the LRU, and their pages back.

Source: mm/vmscan.c (``try_to_shrink_lruvec``, ``evict_folios``, ``shrink_folio_list``), v6.12. A
batch of up to 64 folios is isolated under the lruvec's lock; each is then looked at by itself: was
it used after all (``folio_referenced``), else it is unmapped, one notifier range a page, written to
swap if its slot has no copy of it, and freed. What was used goes to the youngest generation.

When too few generations are left, reclaim ages first: it walks page tables, as on command.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from simpy import Event

from simkvm.kernel.aging import AgeingWalk
from simkvm.kernel.aging_call import Pass
from simkvm.kernel.folio_list import NOBODY, Ids
from simkvm.kernel.folio_referenced import FolioReferenced
from simkvm.kernel.host_memory import OWN
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.mglru import MIN_LRU_BATCH
from simkvm.kernel.swappable import CACHED, DIRTY, SLOT, WRITEBACK, SwappableMemory
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.pgdat import Pgdat

Steps = Generator[Event, Any, int]
DEF_PRIORITY: Final = 12
SWAP_CLUSTER_MAX: Final = 32  #: pages that a direct reclaimer wants


@dataclass
class ScanControl:
    """What one round of reclaim wants and has got (``struct scan_control``)."""

    nr_to_reclaim: int
    kswapd: bool
    priority: int = DEF_PRIORITY
    reclaimed: int = 0
    scanned: int = 0


class Reclaimer:
    """Reclaim by one task: kswapd, or who allocates."""

    def __init__(self, pgdat: Pgdat, task: Task) -> None:
        self._pgdat = pgdat
        self._task = task
        self._env = pgdat.pages.env
        self._checks: dict[str, FolioReferenced] = {}
        self._walks: dict[str, AgeingWalk] = {}
        self.report = Pass("reclaim", 0)  #: of checks: scanned, young, calls

    # -- rounds ---------------------------------------------------------------------------------

    def direct(self, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        """``try_to_free_pages``: returns how many pages were reclaimed, and when it is done."""
        sc = ScanControl(SWAP_CLUSTER_MAX, kswapd=False)
        for priority in range(DEF_PRIORITY, -1, -1):
            sc.priority = priority
            t_ns = yield from self.shrink_node(sc, t_ns)
            t_ns = yield from self._pgdat.throttle.consider(
                self._task, t_ns, priority, sc.reclaimed, sc.scanned
            )
            if sc.reclaimed >= sc.nr_to_reclaim:
                break
        return sc.reclaimed, t_ns

    def shrink_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """One go over the memcgs (``lru_gen_shrink_node``)."""
        sc.scanned = 0
        self._set_initial_priority(sc)
        for number, lruvec in enumerate(self._pgdat.lruvecs):
            t_ns = yield from self._shrink_lruvec(number, lruvec, sc, t_ns)
            if self._should_abort(sc):
                break
        return t_ns

    def _set_initial_priority(self, sc: ScanControl) -> None:
        """Kswapd starts at the priority at which one go should do (``set_initial_priority``)."""
        if sc.priority != DEF_PRIORITY or sc.nr_to_reclaim < MIN_LRU_BATCH:
            return
        reclaimable = sum(sum(lruvec.sizes) for lruvec in self._pgdat.lruvecs)
        found = reclaimable.bit_length() - 1 - (sc.nr_to_reclaim - 1).bit_length()
        sc.priority = min(max(found, DEF_PRIORITY // 2), DEF_PRIORITY)

    def _should_abort(self, sc: ScanControl) -> bool:
        """Whether enough was reclaimed, by whatever measure (``should_abort_scan``)."""
        if sc.reclaimed >= sc.nr_to_reclaim:
            return True
        return sc.kswapd and self._pgdat.pages.free >= self._pgdat.pages.marks.high

    def _shrink_lruvec(
        self, number: int, lruvec: ListedLruvec, sc: ScanControl, t_ns: int
    ) -> Steps:
        scanned = 0
        while True:
            wanted, total = lruvec.should_run_aging()
            if wanted and sc.priority != DEF_PRIORITY:
                return (yield from self._age(number, lruvec, t_ns))
            target = total >> sc.priority
            if target <= 0:
                return t_ns
            delta, t_ns = yield from self._evict(number, lruvec, sc, t_ns)
            scanned += delta
            if not delta or scanned >= target or self._should_abort(sc):
                return t_ns
            t_ns += self._kvm(number, 0).costs.ageing.resched_ns
            t_ns = yield from self._pgdat.sched.checkpoint(self._task, t_ns)

    def _age(self, number: int, lruvec: ListedLruvec, t_ns: int) -> Steps:
        """``try_to_inc_max_seq``: walk the memcg's page tables, and open a generation."""
        kvms = self._pgdat.kvms[number]
        began_ns = t_ns
        for place, kvm in enumerate(kvms):
            if kvm.name not in self._walks:
                self._walks[kvm.name] = AgeingWalk(kvm, self._task)
            done = yield from self._walks[kvm.name].run(t_ns, opens=place + 1 == len(kvms))
            self._pgdat.passes.append(done)
            t_ns = done.end_ns
        self._task.spend("ageing", t_ns - began_ns)
        return t_ns

    # -- one batch ------------------------------------------------------------------------------

    def _evict(
        self, number: int, lruvec: ListedLruvec, sc: ScanControl, t_ns: int
    ) -> Generator[Event, Any, tuple[int, int]]:
        """``evict_folios``: returns how many folios were looked at, and when it is done."""
        costs = self._kvm(number, 0).costs
        t_ns = yield from reach(self._env, t_ns)
        ids, scanned = lruvec.scan(lruvec.types[0])
        scanned += lruvec.advance_min_seq()
        hold_ns = scanned * costs.reclaim.isolate_ns
        t_ns = lruvec.lock.occupy(self._task.cpu.id, t_ns, hold_ns + costs.line.transfer_ns)
        if lruvec.nr_gens(lruvec.types[0]) == 2:
            scanned = 0
        if len(ids):
            t_ns = yield from self._shrink_folio_list(number, lruvec, ids, sc, t_ns)
        return scanned, t_ns

    def _shrink_folio_list(
        self, number: int, lruvec: ListedLruvec, ids: Ids, sc: ScanControl, t_ns: int
    ) -> Steps:
        """Look at isolated folios one after the other, and put back what stays."""
        found: dict[str, list[int]] = {"freed": [], "active": [], "writeback": [], "gone": []}
        t_ns = yield from self._shrink_each(number, lruvec, ids.tolist(), found, t_ns)
        # What was written by now has missed its rotation: it is tried again, once.
        again = [folio for folio in found["writeback"] if self._is_clean(number, lruvec, folio)]
        found["writeback"] = [folio for folio in found["writeback"] if folio not in again]
        t_ns = yield from self._shrink_each(number, lruvec, again, found, t_ns)
        t_ns = yield from reach(self._env, t_ns)
        lruvec.putback(_array(found["active"]), lruvec.max_seq)
        writing = _array(found["writeback"])
        lruvec.putback(writing, lruvec.max_seq - 1)
        self._rotate_written(number, lruvec, found["writeback"])
        self._account(sc, len(ids), len(found["freed"]), len(found["active"]))
        return t_ns

    def _shrink_each(
        self,
        number: int,
        lruvec: ListedLruvec,
        folios: list[int],
        found: dict[str, list[int]],
        t_ns: int,
    ) -> Steps:
        """Look at ``folios``, and note in ``found`` what became of each."""
        for folio in folios:
            place = lruvec.guest_of(folio)
            kvm, leaf = self._kvm(number, place), folio - int(lruvec.bases[place])
            outcome, t_ns = yield from self._shrink_folio(kvm, leaf, t_ns)
            found[outcome].append(folio)
        return t_ns

    def _is_clean(self, number: int, lruvec: ListedLruvec, folio: int) -> bool:
        """Whether a folio that was written is in the swap cache, clean and unmapped."""
        place = lruvec.guest_of(folio)
        host, leaf = self._pgdat.memory(number, place), folio - int(lruvec.bases[place])
        state = host.fast_swap[leaf] & (CACHED | WRITEBACK | DIRTY)
        return state == CACHED and not host.fast[leaf] & OWN

    def _rotate_written(self, number: int, lruvec: ListedLruvec, folios: list[int]) -> None:
        """Those whose write ended while they were isolated go where eviction looks next."""
        for folio in folios:
            if self._is_clean(number, lruvec, folio):
                lruvec.owner(folio).rotate(folio - int(lruvec.bases[lruvec.guest_of(folio)]))

    def _account(self, sc: ScanControl, scanned: int, freed: int, active: int) -> None:
        sc.scanned += scanned
        sc.reclaimed += freed
        if freed:
            self._pgdat.kswapd_failures = 0
        vmstat = self._pgdat.vmstat
        vmstat.pgactivate += active
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
        """One folio: "freed", "active" (it stays), "writeback" (it is on its way), or "gone"."""
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
        if host.fast[leaf] & OWN:
            t_ns, used = yield from self._referenced(kvm, leaf, t_ns)
            t_ns = yield from reach(self._env, t_ns)
            if used:
                return "active", t_ns
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
            check = self._checks[kvm.name] = FolioReferenced(kvm, self._task)
        check.begin_batch()
        began_ns = t_ns
        self.report.scanned += 1
        t_ns, used = yield from check.check(t_ns, np.array([leaf]), self.report)
        self._task.spend("folio_referenced", t_ns - began_ns)
        return t_ns, used

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


def _array(folios: list[int]) -> Ids:
    return np.array(folios, np.int64) if folios else NOBODY
