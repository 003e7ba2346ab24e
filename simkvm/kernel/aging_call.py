"""Whom MGLRU's page-table walk asks whether a guest used a page: the calls for one host table.

Source: mm/vmscan.c (``walk_pte_range``) and virt/kvm/kvm_main.c, v6.12; the batched form from
message 20230526234435.662652-1-yuzhao@google.com, patch 10 of 10.

=============== =================================================================================
``ageing_call``  whom the walk asks
=============== =================================================================================
``blind``        nobody: only the host's own accessed flag counts (up to v6.11)
``per_pte``      the secondary MMU, for each present PTE (since v6.12)
``per_pte_twice`` the secondary MMU, once for each present PTE and once more if it was young
``per_folio``    the secondary MMU, once for the PTEs of one large folio (since v7.1)
``bitmap``       windows of 64 PTEs with one call that tests and one that clears (2023 proposal)
=============== =================================================================================

``ageing_lock`` says what a call holds: ``write`` or ``read`` of ``mmu_lock``, ``none`` (only RCU),
or ``rmap_bit``: one reverse-map chain after the other. A new way to ask is a class with a ``name``,
listed in :data:`CALLS`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.kernel.cmpxchg_race import Loads
from simkvm.kernel.mglru import MIN_LRU_BATCH
from simkvm.kernel.qrwlock import FAST
from simkvm.kernel.rmap import WITHOUT_MMU_LOCK, Held
from simkvm.kernel.sites import AGE
from simkvm.kernel.stage2 import AF, VALID
from simkvm.kernel.task import Task, acquired, reach
from simkvm.kernel.young_notifier import YoungNotifier
from simkvm.observe.oracle import Walk

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

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
    idle: int = 0  #: pages that idle page tracking found idle still


class AgeingCall:
    """How one host page table is aged. Subclasses ask; this applies the answer."""

    name: ClassVar[str]

    def __init__(self, kvm: Kvm, task: Task) -> None:
        self.kvm = kvm
        self.task = task
        self.env = kvm.env
        self.costs = kvm.costs.ageing
        self.lock = kvm.kernel["ageing_lock"]
        self.notifier = YoungNotifier(kvm, task)
        #: Whether what a call finds has consequences for the guest there and then.
        self.felt = kvm.software_af or kvm.kernel["ageing_flush"] == "per_call"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Age ``leaves``, all of one host table, from ``t_ns`` on.

        Returns when it is done, and the leaves that the *guest* used.
        """
        raise NotImplementedError

    def ask_huge(
        self, t_ns: int, first: int, last: int, report: Pass
    ) -> Generator[Event, Any, tuple[int, bool]]:
        """Age the huge page that one PMD maps: one call over its leaves ``first`` up to ``last``.

        Where stage 2 maps it by pages the call visits each of them. Returns when it is done, and
        whether the guest used any.
        """
        report.calls += 1
        t_ns, young = yield from self.notifier.clear(t_ns, first, last)
        used = bool(len(young))
        t_ns += self.costs.scan_ns + (self.costs.promote_ns if used else 0)
        return (yield from reach(self.env, t_ns)), used


class Blind(AgeingCall):
    """Ask nobody."""

    name = "blind"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Only the scan itself costs time."""
        end = yield from reach(self.env, t_ns + len(leaves) * self.costs.scan_ns)
        return end, leaves[:0]

    def ask_huge(
        self, t_ns: int, first: int, last: int, report: Pass
    ) -> Generator[Event, Any, tuple[int, bool]]:
        """As :meth:`ask`."""
        return (yield from reach(self.env, t_ns + self.costs.scan_ns)), False


class PerFolio(AgeingCall):
    """One call for the PTEs of one folio that lie in a row."""

    name = "per_folio"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Cut into runs of one folio each and call for every run."""
        size = self.run_leaves()
        starts = run_starts(leaves, size)
        report.calls += len(starts)
        if self.lock in WITHOUT_MMU_LOCK:
            self.kvm.young_calls.lockless += len(starts)
            return (yield from self._lockless(t_ns, leaves, starts, size))
        if self.felt:
            return (yield from self._runs(t_ns, np.split(leaves, starts[1:])))
        self.kvm.young_calls.locked += len(starts)
        if size == 1:
            return (yield from self._locked_singles(t_ns, leaves))
        return (yield from self._locked_runs(t_ns, np.split(leaves, starts[1:])))

    def run_leaves(self) -> int:
        """Leaves that one call may cover."""
        return self.kvm.folio_leaves

    # -- under mmu_lock -----------------------------------------------------------------------

    def _runs(self, t_ns: int, runs: list[Leaves]) -> Generator[Event, Any, tuple[int, Leaves]]:
        """As :meth:`_locked_runs`, where the guest may feel each call."""
        found: list[Leaves] = []
        for run in runs:
            t_ns, young = yield from self.notifier.clear(t_ns, int(run[0]), int(run[-1]) + 1)
            found.append(young)
            t_ns += len(run) * self.costs.scan_ns + (self.costs.promote_ns if len(young) else 0)
        return (yield from reach(self.env, t_ns)), np.concatenate(found)

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
        walks = 1 + kvm.memslots.crossed(int(run[0]), int(run[-1]) + 1)
        hold_ns = walks * costs.walk_ns + (len(run) - walks) * costs.visit_ns

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
        waited_ns = 0

        def section(entry_ns: int) -> tuple[int, int]:
            nonlocal waited_ns
            waited_ns += entry_ns - t_ns
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
        self.task.spend(f"{self.lock}_lock", waited_ns)
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
        self.task.spend(f"{self.lock}_lock", count * atomic_ns)
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
        self, t_ns: int, leaves: Leaves, starts: Leaves, size: int
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Calls without ``mmu_lock``, for runs of up to ``size`` leaves; an event for 64 calls."""
        kvm, costs = self.kvm, self.costs
        found: list[Leaves] = []
        walk_ns = costs.walk_ns + (size - 1) * costs.visit_ns
        again_ns = costs.walk_ns - costs.visit_ns  # a run in two memslots is walked twice
        period_ns = costs.call_ns + walk_ns + size * costs.scan_ns
        edges = [*starts[::MIN_LRU_BATCH].tolist(), len(leaves)]
        for number, low in enumerate(edges[:-1]):
            batch = leaves[low : edges[number + 1]]
            began = starts[number * MIN_LRU_BATCH : (number + 1) * MIN_LRU_BATCH] - low
            calls = len(began)
            t_ns = yield from reach(self.env, t_ns)
            further = len(batch) - calls  # leaves of a run behind its first
            busy_ns = calls * (costs.call_ns + costs.walk_ns) + further * costs.visit_ns
            busy_ns += len(batch) * costs.scan_ns
            if size > 1:
                busy_ns += kvm.memslots.crossed_by(batch, began) * again_ns
            self._announce(batch, t_ns + costs.call_ns, period_ns, walk_ns, calls)
            times = partial(self._loads_ns, t_ns, len(batch), began)
            young = kvm.age_lockless(Loads(batch, times, t_ns, t_ns + busy_ns), t_ns)
            found.append(young)
            t_ns += busy_ns + len(young) * costs.promote_ns
        t_ns = yield from reach(self.env, t_ns)
        return t_ns, np.concatenate(found)

    def _loads_ns(self, t_ns: int, leaves: int, starts: Leaves) -> Leaves:
        """When calls from ``t_ns`` on, begun at ``starts``, come by each of ``leaves`` leaves."""
        costs = self.costs
        first = np.repeat(starts, np.diff(starts, append=leaves))
        calls = np.repeat(np.arange(len(starts)), np.diff(starts, append=leaves))
        into = np.arange(leaves) - first
        at_ns: Leaves = (
            t_ns
            + (calls + 1) * (costs.call_ns + costs.walk_ns)
            + (first - calls + into) * costs.visit_ns
            + first * costs.scan_ns
        )
        return at_ns

    def _announce(
        self, batch: Leaves, start_ns: int, period_ns: int, busy_ns: int, calls: int
    ) -> None:
        """Tell who has to know of the walks to come: the oracle, or who changes a chain."""
        kvm = self.kvm
        if self.lock == "none":
            tables = kvm.path_at(int(batch[0]), start_ns - self.costs.call_ns)
            kvm.oracle.walk(Walk(self.task.name, tables, start_ns, period_ns, busy_ns, calls))
        elif calls == len(batch):
            kvm.rmap.hold(Held(batch, start_ns, period_ns, busy_ns))
        else:
            visit_ns, more_ns = self.costs.visit_ns, period_ns - busy_ns
            for run in np.split(batch, run_starts(batch, self.run_leaves())[1:]):
                kvm.rmap.hold(Held(run, start_ns, visit_ns, visit_ns))
                start_ns += len(run) * visit_ns + more_ns


def run_starts(leaves: Leaves, size: int) -> Leaves:
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


class PerPteTwice(AgeingCall):
    """One call for each present PTE that only tests, and one that clears if it was young.

    How the series stood before one call did both (message
    CADrL8HVRSyS8ZADRTvHZ-QDKBRv1SFvVyJKkr-CW2mzpNjW5Zw@mail.gmail.com compares the two).
    """

    name = "per_pte_twice"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Leaf by leaf."""
        found: list[Leaves] = []
        for leaf in leaves.tolist():
            t_ns, young = yield from self.notifier.test(t_ns, leaf, leaf + 1)
            report.calls += 1
            t_ns += self.costs.scan_ns
            if young:
                t_ns, cleared = yield from self.notifier.clear(t_ns, leaf, leaf + 1)
                report.calls += 1
                found.append(cleared)
                t_ns += self.costs.promote_ns
        t_ns = yield from reach(self.env, t_ns)
        return t_ns, np.concatenate([leaves[:0], *found])

    def ask_huge(
        self, t_ns: int, first: int, last: int, report: Pass
    ) -> Generator[Event, Any, tuple[int, bool]]:
        """A call that tests all of it before the one that clears."""
        report.calls += 1
        t_ns, young = yield from self.notifier.test(t_ns, first, last)
        if young:
            return (yield from super().ask_huge(t_ns, first, last, report))
        return (yield from reach(self.env, t_ns + self.costs.scan_ns)), False


class Bitmap(AgeingCall):
    """Windows of 64 PTEs: a call that tests them all, then one that clears the interesting ones.

    A block is one entry of stage 2 that fills windows by itself: it is visited once and gives one
    bit. Where the CPU does not set the flag nobody asks (``kvm_arch_has_test_clear_young``).
    """

    name = "bitmap"

    def ask(
        self, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """At most two calls a window; the second is trimmed to the bits that are set."""
        kvm, costs = self.kvm, self.costs
        if not kvm.test_clear_young:
            return (yield from reach(self.env, t_ns + len(leaves) * costs.scan_ns)), leaves[:0]
        found: list[Leaves] = []
        of = leaves // max(1, MIN_LRU_BATCH // kvm.leaf_pages)
        for window in np.split(leaves, np.flatnonzero(np.diff(of)) + 1):
            t_ns = yield from reach(self.env, t_ns)
            began_ns = t_ns
            young = window[(kvm.stage2.leaf.entries[window] & (AF | VALID)) == (AF | VALID)]
            t_ns = self._call(t_ns, window, report)
            t_ns += len(window) * costs.scan_ns + len(young) * costs.promote_ns
            if len(young):
                first_ns = t_ns + costs.call_ns + costs.walk_ns
                times = partial(self._loads_ns, first_ns, young)
                t_ns = self._call(t_ns, young, report)
                kvm.age_lockless(Loads(young, times, first_ns, t_ns), began_ns)
            found.append(young)
        t_ns = yield from reach(self.env, t_ns)
        return t_ns, np.concatenate(found)

    def _loads_ns(self, t_ns: int, leaves: Leaves) -> Leaves:
        """When a walk that is at the first of ``leaves`` at ``t_ns`` comes by each."""
        at_ns: Leaves = t_ns + (leaves - leaves[0]) * self.costs.visit_ns
        return at_ns

    def _call(self, t_ns: int, window: Leaves, report: Pass) -> int:
        """One lock-free call from the first to the last leaf of ``window``."""
        kvm, costs = self.kvm, self.costs
        span = int(window[-1] - window[0]) + 1
        start = t_ns + costs.call_ns
        walks = 1 + kvm.memslots.crossed(int(window[0]), int(window[-1]) + 1)
        busy_ns = walks * costs.walk_ns + (span - walks) * costs.visit_ns
        report.calls += 1
        kvm.young_calls.lockless += 1
        tables = kvm.path_at(int(window[0]), start)
        kvm.oracle.walk(Walk(self.task.name, tables, start, busy_ns, busy_ns, 1))
        return start + busy_ns


CALLS: dict[str, type[AgeingCall]] = {
    call.name: call for call in (Blind, PerPte, PerPteTwice, PerFolio, Bitmap)
}
