"""Ageing that reclaim asks for: walks that pick their page tables, and a new generation.

Source: mm/vmscan.c (``try_to_inc_max_seq``, ``walk_mm``, ``walk_pmd_range``), v6.12. Unlike the
command such a walk looks only at the page tables that the Bloom filter lets pass, and at address
spaces that ran since the last walk. A table in which on average one PTE a cache line was young goes
into the filter of the next walk. What was found young goes to the generation that was the youngest
when the walk began; if that is not the youngest any more the walk is given up.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from simpy import Event

from simkvm.kernel import mmap_lock
from simkvm.kernel.aging import AgeingWalk
from simkvm.kernel.aging_call import CALLS, Leaves, Pass
from simkvm.kernel.listed import DEFAULT_SWAPPINESS
from simkvm.kernel.lrugen import ListedLruGen, ListedLruvec, evictable
from simkvm.kernel.mglru import MAX_LRU_BATCH, suitable_to_scan
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.pgdat import Pgdat

Steps = Generator[Event, Any, int]
LRU_GEN_CORE: Final = 0x1  #: capabilities, the bits of /sys/kernel/mm/lru_gen/enabled
LRU_GEN_MM_WALK: Final = 0x2
LRU_GEN_NONLEAF_YOUNG: Final = 0x4  #: without effect on address spaces that have a notifier
LRU_GEN_SPTE_WALK: Final = 0x8  #: the batched calls of the 2023 series
LRU_GEN_ALL: Final = LRU_GEN_CORE | LRU_GEN_MM_WALK | LRU_GEN_NONLEAF_YOUNG | LRU_GEN_SPTE_WALK
"""As far as the kernel has them."""


class ReclaimWalk(AgeingWalk):
    """Walks one guest for the generation ``seq``; ``forced``: all of it.

    Nobody looks at pages of a type that cannot be evicted (``should_skip_vma``).
    """

    def __init__(self, kvm: Kvm, task: Task, capabilities: int = LRU_GEN_ALL) -> None:
        super().__init__(kvm, task)
        lru = kvm.host.lru
        assert isinstance(lru, ListedLruGen)
        self._lru = lru
        self._lruvec: ListedLruvec = lru._lists
        self._seq = 0
        self._forced = self._skips = False
        if kvm.kernel["ageing_call"] == "bitmap" and not capabilities & LRU_GEN_SPTE_WALK:
            self._call = CALLS["blind"](kvm, task)

    def walk(
        self, seq: int, forced: bool, t_ns: int, swappiness: int = DEFAULT_SWAPPINESS
    ) -> Generator[Event, Any, Pass]:
        """``walk_mm``, from ``t_ns`` on."""
        kvm, vmstat = self.kvm, self._lruvec.vmstat
        self._seq, self._forced = seq, forced
        self._skips = self._lru.of_type not in evictable(swappiness)
        report = Pass(kvm.name, t_ns)
        vmstat.lru_gen_walks += 1
        kvm.pin()
        t_ns = yield from self._walk(t_ns, report)
        if report.young:  # the sizes of generations are brought up to date
            t_ns = yield from reach(self.env, t_ns)
            t_ns = self._lruvec.lock.occupy(self.task.cpu.id, t_ns, self._costs.lru_lock_ns)
        t_ns = yield from reach(self.env, t_ns + self._costs.resched_ns)
        report.end_ns = yield from kvm.sched.checkpoint(self.task, t_ns)
        kvm.unpin(report.end_ns)
        return report

    def _walk(self, t_ns: int, report: Pass) -> Steps:
        kvm = self.kvm
        t_ns = yield from reach(self.env, t_ns)
        if kvm.host.mmap_writer is not None or self._moved():
            return t_ns
        t_ns = kvm.host.mmap_lock.visit(self.task.cpu.id, t_ns, mmap_lock.LOCK)
        t_ns = yield from reach(self.env, t_ns)
        batched = 0
        for table, entries in enumerate(() if self._skips else kvm.host.present):
            if table and table % self._tables_a_pud == 0:
                began_ns = t_ns
                t_ns = yield from self._resched(t_ns, batched >= MAX_LRU_BATCH)
                if t_ns != began_ns:
                    batched = 0
                    if kvm.host.mmap_writer is not None or self._moved():
                        break
            if entries and kvm.alive and self._passes(table):
                t_ns, moved = yield from self._look(t_ns, table, report)
                batched += moved
        kvm.host.mmap_lock.post(self.task.cpu.id, t_ns)
        return t_ns

    def _moved(self) -> bool:
        """Whether another walker opened a generation meanwhile."""
        moved = self._lruvec.max_seq != self._seq
        self._lruvec.vmstat.lru_gen_walks_given_up += moved
        return moved

    def _passes(self, table: int) -> bool:
        return self._forced or self._lruvec.mms.filters.passes(self._seq, self._lru.number, table)

    def _look(self, t_ns: int, table: int, report: Pass) -> Generator[Event, Any, tuple[int, int]]:
        """One page table; if it is worth it, or since v6.14 if it was locked, it is kept in mind.

        Counts entries whether or not there is something in them, as the kernel does.
        """
        kvm, entries = self.kvm, self.kvm.host.entries
        skipped, young = report.skipped_tables, report.young
        t_ns, moved = yield from self._table(t_ns, table, report)
        if report.skipped_tables > skipped:
            dense = self._lruvec.rules.two_step
        else:
            total = min(entries, kvm.leaves - table * entries)
            dense = suitable_to_scan(total, report.young - young)
        if dense:
            self._lruvec.mms.filters.add(self._seq + 1, self._lru.number, table)
        return t_ns, moved

    def _asked(self, leaves: Leaves) -> Leaves:
        return self._lru.askable(leaves)

    def _promote(self, leaves: Leaves) -> int:
        return self._lru.promote(leaves, self._seq)


class CommandWalk(ReclaimWalk):
    """The walk of a command where lruvecs have lists: by force, and it fills the next filter."""

    def run(self, t_ns: int, opens: bool = True) -> Generator[Event, Any, Pass]:
        """As :meth:`AgeingWalk.run`."""
        seq, mms = self._lruvec.max_seq, self._lruvec.mms
        if self._lru.number == 0:
            mms.filters.reset(seq + 1)
        report = Pass(self.kvm.name, t_ns)
        report.end_ns = t_ns
        if self.kvm.walks_page_tables:
            report = yield from self.walk(seq, True, t_ns)
        if opens:
            report.end_ns = yield from self.open_generation(report.end_ns)
        return report


class LruAgeing:
    """Ageing of lruvecs by one task."""

    def __init__(self, pgdat: Pgdat, task: Task) -> None:
        self._pgdat = pgdat
        self._task = task
        self._env = pgdat.pages.env
        self._walks: dict[str, ReclaimWalk] = {}

    def try_to_inc_max_seq(
        self, number: int, seq: int, swappiness: int, forced: bool, t_ns: int
    ) -> Generator[Event, Any, tuple[bool, int]]:
        """Age lruvec ``number`` to have a generation after ``seq``, from ``t_ns`` on.

        Returns whether this task opened it, and when it is done.
        """
        lruvec, began_ns = self._pgdat.generations[number], t_ns
        t_ns = yield from reach(self._env, t_ns)
        if seq <= lruvec.mms.seq:
            return False, t_ns
        if self._walks_page_tables(number):
            ended, t_ns = yield from self._iterate(number, lruvec, seq, swappiness, forced, t_ns)
        else:
            ended = lruvec.mms.skip(seq)
        if ended:
            ended, t_ns = yield from self._inc_max_seq(number, lruvec, seq, swappiness, t_ns)
        self._task.spend("ageing", t_ns - began_ns)
        return ended, t_ns

    def _walks_page_tables(self, number: int) -> bool:
        """Whether the CPU sets accessed flags, and the walks are not switched off."""
        capable = self._pgdat.lru_gen & LRU_GEN_MM_WALK
        return bool(capable) and self._pgdat.kvms[number][0].walks_page_tables

    def _iterate(
        self,
        number: int,
        lruvec: ListedLruvec,
        seq: int,
        swappiness: int,
        forced: bool,
        t_ns: int,
    ) -> Generator[Event, Any, tuple[bool, int]]:
        """Walk address spaces of the memcg as long as there are some to be taken."""
        kvms = self._pgdat.kvms[number]
        while True:

            def wanted(place: int, by_force: bool, at_ns: int = t_ns) -> bool:
                return self._wanted(kvms[place], by_force, at_ns)

            place, ended, forced = lruvec.mms.next(seq, forced, wanted)
            if place is None:
                return ended, t_ns
            done = yield from self._walk_of(kvms[place]).walk(seq, forced, t_ns, swappiness)
            self._pgdat.passes.append(done)
            t_ns = done.end_ns

    def _wanted(self, kvm: Kvm, forced: bool, t_ns: int) -> bool:
        """Whether a walk takes this guest: alive, and by force or if it ran (``get_next_mm``)."""
        if not kvm.alive:
            return False
        touches = sum(vcpu.touches_by(t_ns) for vcpu in kvm.vcpus)
        ran = touches != self._pgdat.walked_at.get(kvm.name)
        if ran or forced:
            self._pgdat.walked_at[kvm.name] = touches
        return ran or forced

    def _walk_of(self, kvm: Kvm) -> ReclaimWalk:
        if kvm.name not in self._walks:
            self._walks[kvm.name] = ReclaimWalk(kvm, self._task, self._pgdat.lru_gen)
        return self._walks[kvm.name]

    def _inc_max_seq(
        self, number: int, lruvec: ListedLruvec, seq: int, swappiness: int, t_ns: int
    ) -> Generator[Event, Any, tuple[bool, int]]:
        """Open the generation, unless somebody did; folios move up 4096 a hold of the lock."""
        costs = self._pgdat.kvms[number][0].costs.ageing
        t_ns = yield from reach(self._env, t_ns)
        if seq < lruvec.max_seq:
            return False, t_ns
        moved = lruvec.inc_max_seq(swappiness)
        while True:
            batch = min(moved, MAX_LRU_BATCH)
            hold_ns = costs.lru_lock_ns + batch * costs.folio_move_ns
            t_ns = lruvec.lock.occupy(self._task.cpu.id, t_ns, hold_ns)
            t_ns = yield from reach(self._env, t_ns)
            moved -= batch
            if not moved:
                return True, t_ns
            t_ns += costs.resched_ns
