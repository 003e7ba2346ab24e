"""MGLRU ageing on command: walks of guests' host page tables, and the thread that asks for them.

Source: mm/vmscan.c (``run_aging``, ``walk_mm``, ``inc_max_seq``), v6.12. The walk holds the lock of
each host page table for all of its entries, under ``mmap_lock`` for read; it tries both and skips
what it cannot have. For every folio it learns whether the guest used it
(:mod:`simkvm.kernel.aging_call`), and promotes what was. The walk of the last guest of a memcg
opens a new generation, for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import numpy as np
from simpy import Environment, Event

from simkvm.kernel import mmap_lock
from simkvm.kernel.aging_call import CALLS, Leaves, Pass
from simkvm.kernel.folio_referenced import FolioReferenced
from simkvm.kernel.host_memory import OWN, YOUNG
from simkvm.kernel.mglru import MAX_LRU_BATCH, Lruvec
from simkvm.kernel.page_idle import PageIdle
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.scenario.schema import Ageing

Steps = Generator[Event, Any, int]
PMD_BUNCH: Final = 1 + 64 + 1  #: huge pages that one hold of a PMD table's lock handles


class AgeingMethod(Protocol):
    """A way to age one guest that a user can ask for, by the ``name`` of ``ageing.method``."""

    name: ClassVar[str]

    def __init__(self, kvm: Kvm, task: Task) -> None: ...

    def run(self, t_ns: int, opens: bool = True) -> Generator[Event, Any, Pass]:
        """One pass over the guest from ``t_ns`` on; ``opens``: it is the last of its memcg."""
        ...

    def open_generation(self, t_ns: int) -> Steps:
        """What the last pass over a memcg ends with; returns when it is done."""
        ...

    @property
    def kvm(self) -> Kvm:
        """The guest."""
        ...


class AgeingThread:
    """The user that asks for ageing, over and over, for every memcg.

    One lru_gen command walks the memcg's mms one after the other, all of them: it is a forced scan,
    which does not skip those that have not run since the last one (``iterate_mm_list``).
    """

    def __init__(self, kvms: list[Kvm], task: Task, ageing: Ageing) -> None:
        method = METHODS[ageing.method]
        if method is AgeingWalk and kvms and kvms[0].pgdat is not None:
            from simkvm.kernel.lru_walk import CommandWalk  # which is made of this module's walk

            method = CommandWalk
        by_memcg: dict[Lruvec, list[AgeingMethod]] = {}  # the order of the first guest of each
        for kvm in kvms:
            by_memcg.setdefault(kvm.host.lru.lruvec, []).append(method(kvm, task))
        self._memcgs = list(by_memcg.values())
        self._kvms = kvms
        self.task = task
        self._ageing = ageing
        self.passes: list[Pass] = []

    def run(self, wanted: Callable[[], bool]) -> Generator[Event, Any, None]:
        """Passes from ``start`` on, ``interval`` apart, until there were enough.

        A pass is finished once begun, but none begins any more when nobody ``wanted`` it: the
        selftest's thread looks for the end of the vCPUs between two commands.
        """
        env, sched, task, ageing = self._kvms[0].env, self._kvms[0].sched, self.task, self._ageing
        costs = self._kvms[0].costs
        t_ns = ageing.start
        rounds = 0
        while ageing.passes is None or rounds < ageing.passes:
            t_ns = yield from reach(env, t_ns)
            if not wanted():
                break
            t_ns = yield from sched.wake(task, t_ns)
            for walks in self._memcgs:
                t_ns = yield from self._command(t_ns, walks)
            t_ns += task.cpu.take_stolen()
            rounds += 1
            if ageing.interval:
                sched.sleep(task, t_ns)
                t_ns += ageing.interval + costs.wakeup_ns
            else:
                # Back in user space for the next command: about one switch's worth of work.
                task.cpu.enter_user(t_ns, t_ns + costs.switch_ns)
                t_ns += costs.switch_ns
        sched.sleep(task, t_ns)

    def _command(self, t_ns: int, walks: list[AgeingMethod]) -> Steps:
        """One ageing command (``run_aging``) for the memcg of ``walks``; returns its end."""
        left = len(walks)
        walked = False
        for walk in walks:
            left -= 1
            if walk.kvm.notifier.subscribed or walk.kvm.alive:
                self.passes.append((yield from walk.run(t_ns, opens=left == 0)))
                t_ns, walked = self.passes[-1].end_ns, True
            elif left == 0 and walked:
                t_ns = yield from walk.open_generation(t_ns)
        return t_ns


class AgeingWalk:
    """Walks one guest's host page table and advances the generations of its memcg.

    Where the CPU does not set accessed flags the walk is switched off (``arch_has_hw_pte_young``):
    the command only opens a new generation.
    """

    name: ClassVar[str] = "lru_gen"

    def __init__(self, kvm: Kvm, task: Task) -> None:
        self.kvm = kvm
        self.task = task
        self.env: Environment = kvm.env
        self._costs = kvm.costs.ageing
        self._call = CALLS[kvm.kernel["ageing_call"]](kvm, task)
        #: Tables in one upper entry: the walk may stop and be resumed only after each.
        self._tables_a_pud = kvm.stage2.geometry.entries if kvm.leaf_pages == 1 else 1

    def run(self, t_ns: int, opens: bool = True) -> Generator[Event, Any, Pass]:
        """One pass from ``t_ns`` on (``lru_gen`` command ``+``, which scans everything).

        ``opens``: it ends the memcg's list, so it opens the new generation (``inc_max_seq``).
        """
        kvm, costs = self.kvm, self._costs
        report = Pass(kvm.name, t_ns)
        if kvm.walks_page_tables:
            kvm.pin()
            t_ns = yield from self._walk(t_ns, report)
        t_ns = yield from reach(self.env, t_ns + costs.lru_lock_ns + costs.resched_ns)
        if opens:
            t_ns = yield from self.open_generation(t_ns)
        report.end_ns = t_ns
        if kvm.walks_page_tables:
            kvm.unpin(t_ns)
        return report

    def _walk(self, t_ns: int, report: Pass) -> Steps:
        kvm = self.kvm
        promoted = 0
        t_ns = yield from reach(self.env, t_ns)
        t_ns = kvm.host.mmap_lock.visit(self.task.cpu.id, t_ns, mmap_lock.LOCK)
        t_ns = yield from reach(self.env, t_ns)
        # A trylock that fails, because of a writer, skips the address space.
        present = kvm.host.present if kvm.host.mmap_writer is None else []
        for table, entries in enumerate(present):
            if table and table % self._tables_a_pud == 0:
                t_ns = yield from self._resched(t_ns, promoted >= MAX_LRU_BATCH)
                promoted = 0
            if entries and kvm.alive:
                t_ns, moved = yield from self._table(t_ns, table, report)
                promoted += moved
        kvm.host.mmap_lock.post(self.task.cpu.id, t_ns)
        return t_ns

    def open_generation(self, t_ns: int) -> Steps:
        """``inc_max_seq`` of the memcg's lruvec, which first moves the oldest folios up."""
        moved = self.kvm.host.lru.lruvec.inc_max_seq()
        return (yield from reach(self.env, t_ns + moved * self._costs.folio_move_ns))

    def _resched(self, t_ns: int, flush: bool) -> Steps:
        """Between upper entries: give ``mmap_lock`` back if enough was promoted, or to reschedule.

        (``walk_pud_range``, which has ``walk_page_range`` return for either.)
        """
        costs, kvm, task = self._costs, self.kvm, self.task
        if not flush and not task.need_resched:
            return t_ns
        kvm.host.mmap_lock.post(task.cpu.id, t_ns)
        task.cpu.enter_kernel(t_ns)
        t_ns = yield from reach(self.env, t_ns + costs.lru_lock_ns + costs.resched_ns)
        t_ns = yield from kvm.sched.checkpoint(task, t_ns)
        t_ns = kvm.host.mmap_lock.visit(task.cpu.id, t_ns, mmap_lock.LOCK)
        return (yield from reach(self.env, t_ns))

    def _table(self, t_ns: int, table: int, report: Pass) -> Generator[Event, Any, tuple[int, int]]:
        """One host page table, under its lock."""
        kvm = self.kvm
        t_ns = yield from reach(self.env, t_ns)
        if not self._trylock(t_ns, table, report):
            return t_ns, 0
        leaves = self._asked(kvm.host.table_leaves(table))
        if not len(leaves):
            kvm.host.unlock_table(table, t_ns)
            return t_ns, 0
        if kvm.leaf_pages > 1:
            kvm.host.unlock_table(table, t_ns)
            return (yield from self._huge_leaves(t_ns, table, leaves, report))
        huge = kvm.huge_page(table)
        if huge is not None:
            if not len(huge):
                kvm.host.unlock_table(table, t_ns)
                return t_ns, 0
            return (yield from self._huge_page(t_ns, huge, report))
        return (yield from self._leaves(t_ns, leaves, report))

    def _asked(self, leaves: Leaves) -> Leaves:
        """Of ``leaves`` those whose folios the walk cares for."""
        return leaves

    def _promote(self, leaves: Leaves) -> int:
        """``leaves`` were young; returns how many folios changed their generation."""
        return self.kvm.host.lru.promote(leaves)

    def _trylock(self, t_ns: int, table: int, report: Pass) -> bool:
        """Take the lock of a host table at ``t_ns``, unless a fault is installing an entry."""
        kvm = self.kvm
        held = table in kvm.host.locked
        if held or any(path.holds_table(table, t_ns) for path in kvm.host_faults()):
            report.skipped_tables += 1
            return False
        kvm.host.lock_table(table, t_ns)
        self.task.cpu.spin(t_ns)
        first = table * kvm.host.entries
        kvm.accesses.catch_up(t_ns, first, min(first + kvm.host.entries, kvm.leaves))
        return True

    def _huge_leaves(
        self, t_ns: int, table: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, int]]:
        """Huge pages of one host table, a bunch at a time (``walk_pmd_range_locked``).

        Each bunch takes the table's lock by itself, so that a fault waits for one bunch at most.
        """
        moved = 0
        for first in range(0, len(leaves), PMD_BUNCH):
            t_ns = yield from reach(self.env, t_ns)
            if not self._trylock(t_ns, table, report):
                continue
            bunch = leaves[first : first + PMD_BUNCH]
            bunch = bunch[(self.kvm.host.state[bunch] & OWN) != 0]
            if not len(bunch):
                self.kvm.host.unlock_table(table, t_ns)
                continue
            t_ns, found = yield from self._leaves(t_ns, bunch, report)
            moved += found
        return t_ns, moved

    def _leaves(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, int]]:
        """Leaves of one host table, whose lock is held and let go of at the end."""
        kvm = self.kvm
        report.scanned += len(leaves)
        by_host = leaves[(kvm.host.state[leaves] & YOUNG) != 0]
        kvm.host.state[leaves] &= np.uint8(~YOUNG & 0xFF)
        heard = kvm.notifier.hears(int(leaves[0]), int(leaves[-1]) + 1)
        token = kvm.notifier.srcu.enter(t_ns) if heard else None
        if token is None:
            t_ns, by_guest = t_ns + len(leaves) * self._costs.scan_ns, leaves[:0]
        else:
            t_ns, by_guest = yield from self._call.ask(t_ns, leaves, report)
            kvm.notifier.srcu.leave(token, t_ns)
        young = np.union1d(by_host, by_guest)
        t_ns += (len(young) - len(by_guest)) * self._costs.promote_ns
        t_ns += fetched_lines(by_host, by_guest) * kvm.costs.line.transfer_ns
        t_ns = yield from reach(self.env, t_ns)
        young = young[(kvm.host.state[young] & OWN) != 0]  # an unmap may have come meanwhile
        report.young += len(young)
        moved = self._promote(young)
        kvm.host.unlock_table(int(leaves[0]) // kvm.host.entries, t_ns)
        self.task.cpu.enter_kernel(t_ns)
        return t_ns, moved

    def _huge_page(
        self, t_ns: int, huge: range, report: Pass
    ) -> Generator[Event, Any, tuple[int, int]]:
        """A huge page in a table's place: one entry, and one folio of all its leaves."""
        kvm, first, last = self.kvm, huge.start, huge.stop
        report.scanned += 1
        young = bool((kvm.host.state[first:last] & YOUNG).any())
        kvm.host.state[first:last] &= np.uint8(~YOUNG & 0xFF)
        if kvm.notifier.hears(first, last):
            token = kvm.notifier.srcu.enter(t_ns)
            t_ns, used = yield from self._call.ask_huge(t_ns, first, last, report)
            kvm.notifier.srcu.leave(token, t_ns)
            young = young or used
        t_ns = yield from reach(self.env, t_ns)
        moved = 0
        if young:
            report.young += 1
            own = np.flatnonzero(kvm.host.state[first:last] & OWN)
            moved = self._promote(first + own)
        kvm.host.unlock_table(first // kvm.host.entries, t_ns)
        self.task.cpu.enter_kernel(t_ns)
        return t_ns, moved


def fetched_lines(by_host: Leaves, by_guest: Leaves) -> int:
    """Cache lines that vCPUs' CPUs wrote last and that a walk over one host table has to fetch.

    Of a page that was faulted in since the last walk (``by_host``: the host's own flag is young)
    its ``struct page``, and the host entry; of one that the guest used (``by_guest``) the stage-2
    entry, in which its CPU set the flag. Eight entries share a line.
    """
    entries = len(np.unique(by_host >> 3)) + len(np.unique(by_guest >> 3))
    return len(by_host) + entries


METHODS: Final[dict[str, type[AgeingMethod]]] = {
    "lru_gen": AgeingWalk,
    "page_idle": PageIdle,
    "folio_referenced": FolioReferenced,
}
"""Ways to age a guest, by what ``ageing.method`` calls them."""
