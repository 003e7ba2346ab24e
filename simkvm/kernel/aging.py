"""MGLRU ageing on command: one walk of a guest's host page table, and the notifier calls it makes.

Source: mm/vmscan.c (``run_aging``, ``walk_mm``, ``walk_pte_range``) and virt/kvm/kvm_main.c, v6.12;
the batched form from message 20230526234435.662652-1-yuzhao@google.com, patch 10 of 10. The walk
holds the lock of each host page table for all of its entries, under ``mmap_lock`` for read; it
tries both and skips what it cannot have. For every folio it learns whether the guest used it:

=============== =================================================================================
``ageing_call``  whom the walk asks
=============== =================================================================================
``blind``        nobody: only the host's own accessed flag counts (up to v6.11)
``per_pte``      the secondary MMU, for each present PTE (since v6.12)
``per_folio``    the secondary MMU, once for the PTEs of one large folio (since v7.1)
``bitmap``       windows of 64 PTEs with one call that tests and one that clears (2023 proposal)
=============== =================================================================================

``ageing_lock`` says what a call holds: ``write`` or ``read`` of ``mmu_lock``, or ``none``: only
RCU. A new way to ask is a class with a ``name``, listed in :data:`CALLS`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.kernel.host_memory import OWN, YOUNG
from simkvm.kernel.mglru import MAX_LRU_BATCH, MIN_LRU_BATCH
from simkvm.kernel.qrwlock import FAST
from simkvm.kernel.sites import AGE
from simkvm.kernel.stage2 import AF, VALID
from simkvm.kernel.task import Task, acquired, reach
from simkvm.observe.oracle import Walk

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.scenario.schema import Ageing

#: Calls that have to fit before the next event for it to be worth doing them as arrays.
WORTH: Final = 8

Leaves = NDArray[np.int64]
Steps = Generator[Event, Any, int]


@dataclass
class Pass:
    """One ageing pass over one guest: times, folios scanned and found young, notifier calls."""

    guest: str
    start_ns: int
    end_ns: int = 0
    scanned: int = 0
    young: int = 0
    calls: int = 0
    skipped_tables: int = 0


class AgeingCall:
    """How one host page table is aged. Subclasses ask; this applies the answer."""

    name: ClassVar[str]

    def __init__(self, kvm: Kvm, task: Task) -> None:
        self.kvm = kvm
        self.task = task
        self.env = kvm.env
        self.costs = kvm.costs.ageing
        self.lock = kvm.kernel["ageing_lock"]

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Age ``leaves``, all of one host table, from ``t_ns`` on.

        Returns when it is done, and the leaves that the *guest* used.
        """
        raise NotImplementedError


class Blind(AgeingCall):
    """Ask nobody."""

    name = "blind"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Only the scan itself costs time."""
        end = yield from reach(self.env, t_ns + len(leaves) * self.costs.scan_ns)
        return end, leaves[:0]


class PerFolio(AgeingCall):
    """One call for the PTEs of one folio that lie in a row."""

    name = "per_folio"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Cut into runs of one folio each and call for every run."""
        size = self.run_leaves()
        if size == 1:
            report.calls += len(leaves)
            if self.lock == "none":
                return (yield from self._lockless(t_ns, leaves, len(leaves), 1))
            return (yield from self._locked_singles(t_ns, leaves))
        starts = _run_starts(leaves, size)
        report.calls += len(starts)
        if self.lock == "none":
            return (yield from self._lockless(t_ns, leaves, len(starts), size))
        return (yield from self._locked_runs(t_ns, np.split(leaves, starts[1:])))

    def run_leaves(self) -> int:
        """Leaves that one call may cover."""
        return self.kvm.folio_leaves

    # -- under mmu_lock -----------------------------------------------------------------------

    def _locked_runs(
        self, t_ns: int, runs: list[Leaves]
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        found: list[Leaves] = []
        for run in runs:
            t_ns = yield from self._locked_call(t_ns, run, found)
        return t_ns, np.concatenate(found)

    def _locked_call(self, t_ns: int, run: Leaves, found: list[Leaves]) -> Steps:
        """One call that begins at ``t_ns``; returns when it is over and the run scanned."""
        kvm, costs = self.kvm, self.costs
        hold_ns = costs.walk_ns + (len(run) - 1) * costs.visit_ns

        def section(entry_ns: int) -> tuple[int, int]:
            young = run[:0]
            if kvm.stage2.attached:
                young = run[kvm.stage2.young(int(run[0]), int(run[-1]) + 1)]
                kvm.stage2.clear_young(young)
            found.append(young)
            promoted = costs.promote_ns if len(young) else 0
            return hold_ns, entry_ns + hold_ns + promoted + len(run) * costs.scan_ns

        t_ns = yield from reach(self.env, t_ns + costs.call_ns)
        lock = kvm.mmu_lock.write if self.lock == "write" else kvm.mmu_lock.read
        return (yield from acquired(lock(t_ns, self.task.cpu.id, AGE, section)))

    def _locked_singles(
        self, t_ns: int, leaves: Leaves
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """One call for each leaf: the same, without arrays for single leaves."""
        env, kvm, costs, cpu = self.env, self.kvm, self.costs, self.task.cpu.id
        stage2, lock = kvm.stage2, kvm.mmu_lock
        ask = lock.write if self.lock == "write" else lock.read
        entries, hold_ns = stage2.leaf.fast, costs.walk_ns
        old_ns = hold_ns + costs.scan_ns
        young_ns = old_ns + costs.promote_ns
        period_ns = old_ns + costs.call_ns
        found: list[int] = []
        leaf = -1
        more_ns = 0  # up to where the next call, if there is one, reaches the lock

        def section(entry_ns: int) -> tuple[int, int]:
            entry = entries[leaf]
            if entry & AF and entry & VALID and stage2.attached:
                entries[leaf] = entry & ~AF
                found.append(leaf)
                return hold_ns, entry_ns + young_ns + more_ns
            return hold_ns, entry_ns + old_ns + more_ns

        t_ns += costs.call_ns
        todo = leaves.tolist()
        position = 0
        while position < len(todo):
            if t_ns >= env.peek():
                yield env.timeout(t_ns - env._now)
            if (
                self.lock == "write"
                and env.peek() - t_ns > WORTH * period_ns
                and lock.idle_for(cpu, t_ns)
            ):
                done, t_ns = self._alone(t_ns, leaves[position:], period_ns, found)
                position += done
            leaf = todo[position]
            position += 1
            more_ns = costs.call_ns if position < len(todo) else 0
            grant = ask(t_ns, cpu, AGE, section)
            t_ns = grant if isinstance(grant, int) else (yield grant)
        return t_ns, np.array(found, np.int64)

    def _alone(
        self, t_ns: int, leaves: Leaves, period_ns: int, found: list[int]
    ) -> tuple[int, int]:
        """Calls that nobody can come between: as many as are over before the next event.

        Leaves at least one call to do; returns how many were done and when the next reaches the
        lock. Every one of them pays one local atomic to get in.
        """
        kvm, costs = self.kvm, self.costs
        atomic_ns = kvm.costs.line.same_ns
        young = (kvm.stage2.leaf.entries[leaves] & (AF | VALID)) == (AF | VALID)
        if not kvm.stage2.attached:
            young[:] = False
        periods = atomic_ns + period_ns + young * costs.promote_ns
        ends = t_ns + np.cumsum(periods)
        horizon = self.env.peek()
        count = min(int(np.searchsorted(ends, horizon, side="left")), len(leaves) - 1)
        if count < 2:
            return 0, t_ns
        arrivals = ends[:count] - periods[:count]
        rows = np.empty((count, 6), np.int64)
        rows[:] = (AGE, 1, 0, atomic_ns, costs.walk_ns, FAST)
        rows[:, 2] = arrivals
        kvm.mmu_lock.rows += rows.ravel().tolist()
        kvm.mmu_lock.advance(int(arrivals[-1]) + 2 * atomic_ns + costs.walk_ns)
        seen = leaves[:count][young[:count]]
        kvm.stage2.clear_young(seen)
        found += seen.tolist()
        return count, int(ends[count - 1])

    # -- without lock -------------------------------------------------------------------------

    def _lockless(
        self, t_ns: int, leaves: Leaves, runs: int, size: int
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Calls under RCU only, ``runs`` of up to ``size`` leaves; an event for each 64 of them."""
        kvm, costs = self.kvm, self.costs
        found: list[Leaves] = []
        walk_ns = costs.walk_ns + (size - 1) * costs.visit_ns
        period_ns = costs.call_ns + walk_ns + size * costs.scan_ns
        edges = _run_starts(leaves, size)[::MIN_LRU_BATCH].tolist()
        for number, low in enumerate(edges):
            batch = leaves[low : edges[number + 1] if number + 1 < len(edges) else None]
            calls = min(MIN_LRU_BATCH, runs - number * MIN_LRU_BATCH)
            t_ns = yield from reach(self.env, t_ns)
            further = len(batch) - calls  # leaves of a run behind its first
            busy_ns = calls * (costs.call_ns + costs.walk_ns) + further * costs.visit_ns
            busy_ns += len(batch) * costs.scan_ns
            tables = kvm.path_at(int(batch[0]), t_ns)
            kvm.oracle.walk(
                Walk(self.task.name, tables, t_ns + costs.call_ns, period_ns, walk_ns, calls)
            )
            young = batch[(kvm.stage2.leaf.entries[batch] & (AF | VALID)) == (AF | VALID)]
            kvm.stage2.clear_young(young)
            found.append(young)
            t_ns += busy_ns + len(young) * costs.promote_ns
        t_ns = yield from reach(self.env, t_ns)
        return t_ns, np.concatenate(found)


def _run_starts(leaves: Leaves, size: int) -> Leaves:
    """Where runs of consecutive entries of one folio of ``size`` leaves begin."""
    gap = np.diff(leaves, prepend=-2) != 1
    other = np.diff(leaves // size, prepend=-1) != 0
    return np.flatnonzero(gap | other)


class PerPte(PerFolio):
    """One call for each present PTE."""

    name = "per_pte"

    def run_leaves(self) -> int:
        """Each leaf by itself."""
        return 1


class Bitmap(AgeingCall):
    """Windows of 64 PTEs: a call that tests them all, then one that clears the interesting ones."""

    name = "bitmap"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """At most two calls a window; the second is trimmed to the bits that are set."""
        kvm, costs = self.kvm, self.costs
        found: list[Leaves] = []
        windows = np.split(leaves, np.flatnonzero(np.diff(leaves // MIN_LRU_BATCH, prepend=-1))[1:])
        for window in windows:
            t_ns = yield from reach(self.env, t_ns)
            young = window[(kvm.stage2.leaf.entries[window] & (AF | VALID)) == (AF | VALID)]
            t_ns = self._call(t_ns, window, report)
            t_ns += len(window) * costs.scan_ns + len(young) * costs.promote_ns
            if len(young):
                t_ns = self._call(t_ns, young, report)
                kvm.stage2.clear_young(young)
            found.append(young)
        t_ns = yield from reach(self.env, t_ns)
        return t_ns, np.concatenate(found)

    def _call(self, t_ns: int, window: Leaves, report: Pass) -> int:
        """One lock-free call from the first to the last leaf of ``window``."""
        kvm, costs = self.kvm, self.costs
        span = int(window[-1] - window[0]) + 1
        start = t_ns + costs.call_ns
        busy_ns = costs.walk_ns + (span - 1) * costs.visit_ns
        report.calls += 1
        tables = kvm.path_at(int(window[0]), start)
        kvm.oracle.walk(Walk(self.task.name, tables, start, busy_ns, busy_ns, 1))
        return start + busy_ns


CALLS: dict[str, type[AgeingCall]] = {call.name: call for call in (Blind, PerPte, PerFolio, Bitmap)}


class AgeingThread:
    """The user that writes ageing commands to debugfs, over and over, for every guest."""

    def __init__(self, kvms: list[Kvm], task: Task, ageing: Ageing) -> None:
        self._walks = [AgeingWalk(kvm, task) for kvm in kvms]
        self._task = task
        self._ageing = ageing
        self.passes: list[Pass] = []

    def run(self, wanted: Callable[[], bool]) -> Generator[Event, Any, None]:
        """Passes from ``start`` on, ``interval`` apart, until there were enough.

        A pass is finished once begun, but none begins any more when nobody ``wanted`` it: the
        selftest's thread looks for the end of the vCPUs between two commands.
        """
        env, cpu, ageing = self._walks[0].env, self._task.cpu, self._ageing
        costs = self._walks[0].kvm.costs
        t_ns = ageing.start
        rounds = 0
        while ageing.passes is None or rounds < ageing.passes:
            t_ns = yield from reach(env, t_ns)
            if not wanted():
                break
            cpu.enter_kernel(t_ns)
            for walk in self._walks:
                if walk.kvm.notifier.subscribed or walk.kvm.alive:
                    self.passes.append((yield from walk.run(t_ns)))
                    t_ns = self.passes[-1].end_ns
            t_ns += cpu.take_stolen()
            rounds += 1
            if ageing.interval:
                cpu.sleep(t_ns)
                t_ns += ageing.interval + costs.wakeup_ns
            else:
                # Back in user space for the next command: about one switch's worth of work.
                cpu.enter_user(t_ns, t_ns + costs.switch_ns)
                t_ns += costs.switch_ns
        cpu.sleep(t_ns)


class AgeingWalk:
    """Walks one guest's host page table and advances its generations."""

    def __init__(self, kvm: Kvm, task: Task) -> None:
        self.kvm = kvm
        self.task = task
        self.env: Environment = kvm.env
        self._costs = kvm.costs.ageing
        self._call = CALLS[kvm.kernel["ageing_call"]](kvm, task)
        #: Tables in one upper entry: the walk may stop and be resumed only after each.
        self._tables_a_pud = kvm.stage2.geometry.entries if kvm.leaf_pages == 1 else 1

    def run(self, t_ns: int) -> Generator[Event, Any, Pass]:
        """One pass from ``t_ns`` on (``lru_gen`` command ``+``, which scans everything)."""
        kvm, costs = self.kvm, self._costs
        report = Pass(kvm.name, t_ns)
        promoted = 0
        kvm.pin()
        t_ns = yield from reach(self.env, t_ns)
        t_ns = kvm.host.mmap_lock.visit(self.task.cpu.id, t_ns, 1)
        t_ns = yield from reach(self.env, t_ns)
        for table, present in enumerate(kvm.host.present):
            if table and table % self._tables_a_pud == 0:
                t_ns = yield from self._resched(t_ns, promoted >= MAX_LRU_BATCH)
                promoted = 0
            if present and kvm.alive:
                t_ns, moved = yield from self._table(t_ns, table, report)
                promoted += moved
        kvm.host.mmap_lock.post(self.task.cpu.id, t_ns)
        t_ns = yield from reach(self.env, t_ns + costs.lru_lock_ns + costs.resched_ns)
        t_ns += kvm.host.lru.inc_max_seq() * costs.folio_move_ns
        report.end_ns = t_ns = yield from reach(self.env, t_ns)
        kvm.unpin(t_ns)
        return report

    def _resched(self, t_ns: int, flush: bool) -> Steps:
        """Between upper entries: give ``mmap_lock`` back if enough was promoted."""
        costs = self._costs
        if not flush:
            return t_ns
        kvm, cpu = self.kvm, self.task.cpu
        kvm.host.mmap_lock.post(cpu.id, t_ns)
        cpu.enter_kernel(t_ns)
        t_ns = yield from reach(self.env, t_ns + costs.lru_lock_ns + costs.resched_ns)
        return (yield from reach(self.env, kvm.host.mmap_lock.visit(cpu.id, t_ns, 1)))

    def _table(self, t_ns: int, table: int, report: Pass) -> Generator[Event, Any, tuple[int, int]]:
        """One host page table, under its lock."""
        kvm = self.kvm
        t_ns = yield from reach(self.env, t_ns)
        if any(vcpu.fault.holds_table(table, t_ns) for vcpu in kvm.vcpus):
            report.skipped_tables += 1  # a trylock that fails: a fault is installing an entry
            return t_ns, 0
        kvm.host.lock_for_ageing(table, t_ns)
        self.task.cpu.spin(t_ns)
        for vcpu in kvm.vcpus:
            vcpu.catch_up(t_ns)
        leaves = kvm.host.table_leaves(table)
        if not len(leaves):
            kvm.host.unlock(t_ns)
            return t_ns, 0
        report.scanned += len(leaves)
        by_host = leaves[(kvm.host.state[leaves] & YOUNG) != 0]
        kvm.host.state[leaves] &= np.uint8(~YOUNG & 0xFF)
        token = kvm.notifier.srcu.enter(t_ns) if kvm.notifier.subscribed else None
        if token is None:
            t_ns, by_guest = t_ns + len(leaves) * self._costs.scan_ns, leaves[:0]
        else:
            t_ns, by_guest = yield from self._call.ask(t_ns, leaves, report)
            kvm.notifier.srcu.leave(token, t_ns)
        young = np.union1d(by_host, by_guest)
        t_ns += (len(young) - len(by_guest)) * self._costs.promote_ns
        t_ns = yield from reach(self.env, t_ns)
        young = young[(kvm.host.state[young] & OWN) != 0]  # an unmap may have come meanwhile
        report.young += len(young)
        moved = kvm.host.lru.promote(young)
        kvm.host.unlock(t_ns)
        self.task.cpu.enter_kernel(t_ns)
        return t_ns, moved
