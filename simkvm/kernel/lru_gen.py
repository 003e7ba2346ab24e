"""Reclaim by the multi-gen LRU: which memcg, how much of it, ageing or eviction.

Source: mm/vmscan.c (``lru_gen_shrink_node``, ``try_to_shrink_lruvec``, ``evict_folios``,
``lru_gen_age_node``), v6.12; since v6.14 where ``promotion`` is ``two_step``. Folios are taken 64
at a time off the oldest generation. When too few generations are left, reclaim ages, except in
its first go, at the default priority.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.listed import FILE
from simkvm.kernel.lru_walk import LruAgeing
from simkvm.kernel.lrugen import ListedLruvec, evictable
from simkvm.kernel.memcg_lru import MEMCG_NR_BINS, NOP, TAIL, YOUNG
from simkvm.kernel.mglru import MAX_LRU_BATCH, MAX_NR_GENS, MIN_LRU_BATCH, MIN_NR_GENS
from simkvm.kernel.scan_control import DEF_PRIORITY, ScanControl
from simkvm.kernel.task import reach

if TYPE_CHECKING:
    from simkvm.kernel.pgdat import Pgdat
    from simkvm.kernel.vmscan import Reclaimer

Steps = Generator[Event, Any, int]


class MultiGen:
    """For one reclaiming task."""

    def __init__(self, reclaimer: Reclaimer) -> None:
        self._reclaimer = reclaimer
        self._pgdat: Pgdat = reclaimer.pgdat
        self._env = reclaimer.pgdat.pages.env
        self.ageing = LruAgeing(reclaimer.pgdat, reclaimer.task)

    # -- a round ----------------------------------------------------------------------------------

    def shrink_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """One go over the memcgs of the old generation (``shrink_many``)."""
        self._set_initial_priority(sc)
        memcgs = self._pgdat.memcg_lru
        gen, first_bin = memcgs.old, memcgs.draw()
        for step in range(MEMCG_NR_BINS):
            fifo = memcgs.fifo[gen][(first_bin + step) % MEMCG_NR_BINS]
            for memcg in list(fifo):  # who is rotated into it meanwhile waits for the next go
                if memcgs.gens[memcg] != gen or memcg not in fifo:
                    continue
                operation, t_ns = yield from self._shrink_one(memcg, sc, t_ns)
                if operation != NOP:
                    memcgs.rotate(memcg, operation)
                if self._should_abort(sc):
                    return t_ns
        return t_ns

    def _shrink_one(
        self, memcg: int, sc: ScanControl, t_ns: int
    ) -> Generator[Event, Any, tuple[int, int]]:
        """Shrink one memcg; returns where it goes in the order of memcgs, and when it is done."""
        lruvec = self._pgdat.generations[memcg]
        aged, t_ns = yield from self._shrink_lruvec(memcg, lruvec, sc, t_ns)
        if aged:
            return YOUNG, t_ns
        if self._sizable(lruvec, sc):
            return NOP, t_ns
        segments = self._pgdat.memcg_lru.segments
        return (TAIL if segments[memcg] != TAIL else YOUNG), t_ns

    def _sizable(self, lruvec: ListedLruvec, sc: ScanControl) -> bool:
        """Whether there is enough to be worth the while (``lruvec_is_sizable``)."""
        types = evictable(self._pgdat.swappiness_now())
        return sum(sum(lruvec.sizes_of(of_type)) for of_type in types) >> max(0, sc.priority) > 0

    def _set_initial_priority(self, sc: ScanControl) -> None:
        """Kswapd starts at the priority at which one go should do (``set_initial_priority``)."""
        if sc.priority != DEF_PRIORITY or sc.nr_to_reclaim < MIN_LRU_BATCH:
            return
        reclaimable = sum(map(self._inactive, self._pgdat.generations))
        found = reclaimable.bit_length() - 1 - (sc.nr_to_reclaim - 1).bit_length()
        sc.priority = min(max(found, DEF_PRIORITY // 2), DEF_PRIORITY)

    def _inactive(self, lruvec: ListedLruvec) -> int:
        """Folios older than the two youngest generations, which count as active."""
        active = {(lruvec.max_seq - age) % MAX_NR_GENS for age in range(MIN_NR_GENS)}
        return sum(
            size
            for of_type in evictable(self._pgdat.swappiness_now())
            for generation, size in enumerate(lruvec.sizes_of(of_type))
            if generation not in active
        )

    def _should_abort(self, sc: ScanControl) -> bool:
        """Whether enough was reclaimed, by whatever measure (``should_abort_scan``)."""
        if sc.reclaimed >= sc.nr_to_reclaim:
            return True
        pages = self._pgdat.pages
        return sc.kswapd and pages.free > pages.marks.high + MIN_LRU_BATCH

    # -- a memcg ----------------------------------------------------------------------------------

    def _shrink_lruvec(
        self, memcg: int, lruvec: ListedLruvec, sc: ScanControl, t_ns: int
    ) -> Generator[Event, Any, tuple[bool, int]]:
        """``try_to_shrink_lruvec``: returns whether it was aged, and when it is done."""
        scanned = 0
        swappiness = self._pgdat.swappiness_now()
        costs = self._pgdat.kvms[memcg][0].costs.ageing
        while True:
            wanted, total = lruvec.should_run_aging(swappiness)
            if wanted and sc.priority != DEF_PRIORITY:
                return (
                    yield from self.ageing.try_to_inc_max_seq(
                        memcg, lruvec.max_seq, swappiness, False, t_ns
                    )
                )
            target = total >> sc.priority
            if target <= 0:
                return False, t_ns
            delta, t_ns = yield from self.evict_folios(memcg, sc, swappiness, target, t_ns)
            scanned += delta
            if not delta or scanned >= target or self._should_abort(sc):
                return False, t_ns
            t_ns = yield from self._reclaimer.cond_resched(memcg, t_ns + costs.resched_ns)

    def evict_folios(
        self, memcg: int, sc: ScanControl, swappiness: int, target: int, t_ns: int
    ) -> Generator[Event, Any, tuple[int, int]]:
        """One batch: returns how many folios were looked at, and when it is done."""
        lruvec, reclaimer = self._pgdat.generations[memcg], self._reclaimer
        costs = self._pgdat.kvms[memcg][0].costs
        most = min(target, MAX_LRU_BATCH) if lruvec.rules.two_step else MAX_LRU_BATCH
        t_ns = yield from reach(self._env, t_ns)
        ids, scanned = lruvec.isolate(swappiness, most)
        hold_ns = scanned * costs.reclaim.isolate_ns + costs.line.transfer_ns
        scanned += lruvec.advance_min_seq(swappiness)
        t_ns = lruvec.lock.occupy(reclaimer.task.cpu.id, t_ns, hold_ns)
        if lruvec.max_seq - lruvec.oldest(swappiness) + 1 == MIN_NR_GENS:
            scanned = 0
        if not len(ids):
            self._pgdat.wake_flusher()  # if it was for dirty pages that there was nothing
        else:
            t_ns = yield from reclaimer.shrink_folio_list(memcg, lruvec, ids, sc, t_ns)
        return scanned, t_ns

    # -- before a round of kswapd -----------------------------------------------------------------

    def age_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """Kill somebody if no generation is older than min_ttl (``lru_gen_age_node``)."""
        yield from ()
        self._set_initial_priority(sc)
        min_ttl_ns = self._pgdat.min_ttl_ns
        if min_ttl_ns and not any(
            self._reclaimable(lruvec, sc, t_ns - min_ttl_ns) for lruvec in self._pgdat.generations
        ):
            self._pgdat.pages.out_of_memory(t_ns)
        return t_ns

    def ended(self, sc: ScanControl) -> bool:
        """No folio is spared for being active."""
        return False

    def _reclaimable(self, lruvec: ListedLruvec, sc: ScanControl, before_ns: int) -> bool:
        seq = lruvec.min_seqs[FILE]
        if lruvec.rules.two_step:
            seq = lruvec.oldest(self._pgdat.swappiness_now())
        return self._sizable(lruvec, sc) and lruvec.birth_ns[seq % MAX_NR_GENS] < before_ns
