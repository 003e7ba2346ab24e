"""The end of a VM on x86: its roots are zapped under ``mmu_lock``, its tables go by RCU.

Source: arch/x86/kvm/mmu/mmu.c (``kvm_mmu_zap_all``, ``kvm_mmu_commit_zap_page``) and tdp_mmu.c
(``tdp_mmu_zap_root``, ``handle_removed_pt``, ``kvm_tdp_mmu_put_root``, ``kvm_mmu_uninit_tdp_mmu``),
v6.12. The notifier's ``->release`` does it, in both ways in (:mod:`simkvm.kernel.teardown`):

* TDP MMU: passes over the 4 KiB, the 2 MiB and the 1 GiB level, then the root's. A pass goes down
  to its level, may yield before each entry, and zaps what is present there. An entry that is a
  table takes the table with it: its entries are walked at once, and its page is left to RCU.
* Shadow MMU: one page after the other is zapped, with a yield between them; then there is one
  flush, and all pages are freed, still under the lock.

The root itself goes when unregistering has drained the notifier's SRCU; the VM waits for all RCU
callbacks (``rcu_barrier``) before it is gone.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from simpy import Event

from simkvm.kernel.geometry import LAST_LEVEL
from simkvm.kernel.qrwlock import OPEN
from simkvm.kernel.sites import TEARDOWN
from simkvm.kernel.stage2 import BLOCK, TABLE, VALID, TableId
from simkvm.kernel.task import Task, acquired, reach
from simkvm.kernel.teardown import Teardown
from simkvm.kernel.yielding_walk import Array, Walk, YieldingWalker, tree
from simkvm.scenario.kernel import KernelVariant

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]

PART: Final = 1 << 18  #: entries in the arrays of one walk
PIECE: Final = 64  #: tables that count as unlinked together: some 0.1 ms, far below a tick


class ZapRoots(Teardown):
    """As :class:`~simkvm.kernel.teardown.Teardown`, for x86."""

    def __init__(self, kvm: Kvm, task: Task, way: str, at_ns: int, last: bool = True) -> None:
        super().__init__(kvm, task, way, at_ns, last)
        self._in_release = True
        self._walker = YieldingWalker(kvm, True, self._zap, self._let_go)
        self._level = 0  #: that the pass zaps

    def run(self) -> Steps:
        """The whole of it, as one process; returns when it is done."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, self._at_ns)
        if self.task.on_cpu:
            self.task.cpu.enter_kernel(t_ns)
        t_ns = yield from self._stop_vcpus(t_ns)
        if self._way == "process_exit":
            t_ns = yield from self._wait_for_walkers(t_ns)
        t_ns = yield from self._unregister(t_ns)
        if self._way == "process_exit":
            t_ns = yield from reach(kvm.env, kvm.zap_host(t_ns, 0, kvm.leaves))
        if self._last:
            t_ns = yield from self._destroy(t_ns)
        self.done = True
        return t_ns

    # -- in ->release -------------------------------------------------------------------------

    def _free_stage2(self, t_ns: int) -> Steps:
        kvm = self._kvm
        t_ns = began_ns = yield from self._lock(t_ns)
        if kvm.kernel["mmu"] == "shadow":
            t_ns = yield from self._zap_pages(t_ns)
        else:
            t_ns = yield from self._zap_root(t_ns)
        self.walk.elapsed_ns = t_ns - began_ns
        t_ns = yield from reach(kvm.env, t_ns)
        kvm.mmu_lock.release(t_ns)
        self.task.cpu.enter_kernel(t_ns)
        return t_ns

    def _lock(self, t_ns: int) -> Steps:
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, t_ns)
        self.task.cpu.spin(t_ns)
        grant = kvm.mmu_lock.write(t_ns, self.task.cpu.id, TEARDOWN, lambda at: (OPEN, at))
        return (yield from reach(kvm.env, (yield from acquired(grant))))

    def _let_go(self, t_ns: int) -> Steps:
        kvm = self._kvm
        kvm.mmu_lock.release(t_ns)
        self.task.cpu.enter_kernel(t_ns)
        return (yield from self._lock((yield from kvm.let_others_run(self.task, t_ns))))

    # -- the TDP MMU --------------------------------------------------------------------------

    def _zap_root(self, t_ns: int) -> Steps:
        """``tdp_mmu_zap_root``: pass by pass, each in parts that bound the arrays."""
        stage2 = self._kvm.stage2
        start = stage2.geometry.start_level
        passes = [*range(LAST_LEVEL, 0, -1), start]
        for self._level in passes:
            down_to = min(self._level, stage2.leaf_level)
            entries = len(stage2.levels[down_to].entries)
            # Leaves go part by part, tables PIECE by PIECE: when one is unlinked, RCU gets to know.
            piece = PART if self._level >= stage2.leaf_level else PIECE
            for first in range(0, entries, PART):
                last = min(first + PART, entries)
                more = last < entries or self._level > start
                walk = self._pass(down_to, first, last)
                t_ns = yield from self._walker.run(walk, t_ns, more, piece)
        return t_ns

    def _pass(self, level: int, first: int, last: int) -> Walk:
        """The part of a pass over entries ``first`` up to ``last`` of ``level``."""
        kvm, stage2, costs = self._kvm, self._kvm.stage2, self._kvm.costs.unmap
        entries, reached, spent = tree(stage2, level, first, last, costs.visit_ns, costs.descend_ns)
        self.walk.visits += len(entries)
        content = stage2.levels[level].entries[entries]
        if level == self._level:
            # At the level of pages what is not reached stands for a block, one of a later pass.
            spent += (reached & ((content & VALID) != 0)) * np.int64(costs.leaf_ns)
        if level == self._level < stage2.leaf_level:
            removed = np.where(reached, self._tables_below(level)[entries], 0)
            self.walk.visits += int(removed.sum()) * kvm.entries
            table_ns = costs.descend_ns + kvm.entries * costs.visit_ns
            spent += removed * (table_ns + kvm.table_free.under_lock_ns(kvm.costs.free))
        self.walk.longest_ns = max(self.walk.longest_ns, int(spent.max(initial=0)))
        return Walk(entries, np.cumsum(spent), last, reached)

    def _tables_below(self, level: int) -> Array:
        """How many tables hang below each entry of ``level``: those that go with it."""
        stage2 = self._kvm.stage2
        found = np.zeros(len(stage2.levels[level].entries), np.int64)
        for number in range(level, stage2.leaf_level):
            linked = np.flatnonzero(stage2.levels[number].entries & TABLE)
            above = (linked + stage2.first_entry(number)) >> self._bits(level, number)
            np.add.at(found, above - stage2.first_entry(level), 1)
        return found

    def _bits(self, level: int, number: int) -> int:
        return self._kvm.stage2.geometry.index_bits * (number - level)

    def _zap(self, walk: Walk, done: int, stop: int, t_ns: int) -> None:
        """The pass did the entries at ``done`` up to ``stop`` of its walk."""
        kvm, stage2 = self._kvm, self._kvm.stage2
        low, high = walk.entry(done), walk.entry(stop)
        if self._level == stage2.leaf_level:
            for first, last in self._reached(walk, done, stop):
                kvm.zap_leaves(t_ns, first, last)
        elif stage2.blocks is not None and self._level == stage2.blocks.number:
            size = stage2.block_leaves
            kvm.zap_leaves(t_ns, low * size, min(high * size, kvm.leaves))
        for number in range(stage2.leaf_level - 1, self._level - 1, -1):  # children first
            bits, base = self._bits(self._level, number), stage2.first_entry(self._level)
            first, last = (
                max(0, ((entry + base) << bits) - stage2.first_entry(number))
                for entry in (low, high)
            )
            linked = np.flatnonzero(stage2.levels[number].entries[first:last] & TABLE)
            for entry in (first + linked).tolist():
                table = stage2.unlink(number, entry)
                kvm.oracle.unlinked(table, t_ns, stage2.entries_in(table))
                kvm.table_free.unlinked(kvm, table, t_ns, self.task.cpu.id)

    def _reached(self, walk: Walk, done: int, stop: int) -> list[tuple[int, int]]:
        """What to zap at the level of pages: no block, which is for the pass over its own level."""
        if self._kvm.stage2.blocks is None:
            return [(walk.entry(done), walk.entry(stop))]
        steps = np.diff(walk.reached[done:stop].astype(np.int8), prepend=0, append=0)
        begins, ends = (done + np.flatnonzero(steps == step) for step in (1, -1))
        return [
            (walk.entry(begin), walk.entry(end))
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        ]

    # -- the shadow MMU -----------------------------------------------------------------------

    def _zap_pages(self, t_ns: int) -> Steps:
        """``kvm_mmu_zap_all``: page by page; then one flush, and the pages are freed.

        After the lock was let go it starts again with the pages that are left: the other end of
        the VM may have zapped some, and those are its to free.
        """
        kvm, stage2, costs = self._kvm, self._kvm.stage2, self._kvm.costs
        tables, mine = stage2.all_tables(), list[TableId]()
        page_ns = costs.unmap.descend_ns + kvm.entries * costs.unmap.visit_ns
        spent = np.array([page_ns + self._leaves_ns(table) for table in tables], np.int64)
        self.walk.longest_ns = max(self.walk.longest_ns, int(spent.max(initial=0)))

        def apply(walk: Walk, done: int, stop: int, t_ns: int) -> None:
            for table in (tables[number] for number in range(done, stop) if spent[number]):
                self._zap_page(table, t_ns)
                mine.append(table)

        def let_go(t_ns: int) -> Steps:
            t_ns = yield from self._let_go(t_ns)
            left = set(stage2.all_tables()).union(mine)
            spent[[table not in left for table in tables]] = 0
            walk.ends_ns[:] = np.cumsum(spent)
            return t_ns

        numbers = np.arange(len(tables))
        walk = Walk(numbers, np.cumsum(spent), len(tables), numbers >= 0)
        t_ns = yield from YieldingWalker(kvm, True, apply, let_go).run(walk, t_ns, more=False)
        self.walk.visits += len(mine) * kvm.entries
        t_ns = kvm.ipi.flush(kvm, (yield from reach(kvm.env, t_ns)))
        for table in mine:
            t_ns += kvm.table_free.under_lock_ns(costs.free)
            kvm.table_free.unlinked(kvm, table, t_ns, self.task.cpu.id)
        return t_ns

    def _leaves_ns(self, table: TableId) -> int:
        """What zapping the pages, or blocks, that ``table`` maps itself takes."""
        kvm, stage2 = self._kvm, self._kvm.stage2
        level = stage2.levels[table.level]
        first = (table.index << stage2.geometry.index_bits) - level.phase
        entries = level.entries[max(0, first) : first + kvm.entries]
        own = int(np.count_nonzero((entries & (VALID | BLOCK)) == VALID))
        return own * kvm.mmu.chain * kvm.costs.unmap.leaf_ns

    def _zap_page(self, table: TableId, t_ns: int) -> None:
        """All that ``table`` maps; what hung below it went before."""
        kvm, stage2 = self._kvm, self._kvm.stage2
        level = stage2.levels[table.level]
        if level is stage2.leaf or level is stage2.blocks:
            end = stage2.end_of(table) - stage2.first_leaf
            size = kvm.entries * (1 if level is stage2.leaf else stage2.block_leaves)
            kvm.zap_leaves(t_ns, max(0, end - size), min(kvm.leaves, end))
        stage2.unlink(table.level - 1, table.index)
        kvm.oracle.unlinked(table, t_ns, stage2.entries_in(table))

    # -- after unregistering ------------------------------------------------------------------

    def _destroy(self, t_ns: int) -> Steps:
        """Drop the root, wait for every callback: then the VM is gone."""
        kvm, cpu = self._kvm, self.task.cpu
        kvm.stage2.attached = False
        kvm.tree_freed = True
        size = kvm.stage2.geometry.root_pages * kvm.table_bytes

        def freed(at_ns: int) -> int:
            kvm.oracle.root_freed(at_ns)
            kvm.memory.unreported(at_ns, size)
            kvm.memory.freed(at_ns, size, kvm.table_free.deferred)
            return kvm.costs.free.callback_ns

        if kvm.table_free.deferred:
            kvm.memory.deferred(t_ns, size)
            t_ns += kvm.rcu.call_rcu(t_ns, cpu.id, freed)
        else:
            t_ns += kvm.costs.free.free_ns
            freed(t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        kvm.sched.sleep(self.task, t_ns)
        yield kvm.rcu.barrier(t_ns)
        return max(t_ns, int(kvm.env.now))


def teardown_of(kernel: KernelVariant) -> type[Teardown]:
    """Who ends VMs of ``kernel``: x86 zaps roots, arm64 frees a tree."""
    return ZapRoots if kernel["teardown_walk"] == "zap_roots" else Teardown
