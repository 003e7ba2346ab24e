"""Unmapping on x86: leaf entries are zapped, tables stay, and the walk may yield at any entry.

Source: arch/x86/kvm/mmu/tdp_mmu.c (``tdp_mmu_zap_leafs``) and mmu.c (``kvm_unmap_gfn_range``,
``__walk_slot_rmaps``), v6.12. Who lets go of the lock flushes first what was zapped since the last
flush; the rest is flushed once, at the end, still under the lock. However empty, no table goes.
Until its flush a zap does not concern a guest that has the translation; between zap and flush the
model lets guests go on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.stage2 import VALID
from simkvm.kernel.task import Task, reach
from simkvm.kernel.unmap import chunks
from simkvm.kernel.yielding_walk import Walk, YieldingWalker, tree

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


def table_walk(kvm: Kvm, first: int, last: int) -> Walk:
    """The TDP MMU's zap of the leaves ``first`` up to ``last``, as tables are now."""
    stage2, costs = kvm.stage2, kvm.costs.unmap
    level = stage2.leaf_level
    leaves, reached, spent = tree(stage2, level, first, last, costs.visit_ns, costs.descend_ns)
    # Of a block that stands where a table could, its first page says that it is there.
    spent += ((stage2.leaf.entries[leaves] & VALID) != 0) * np.int64(costs.leaf_ns)
    return Walk(leaves, np.cumsum(spent), last, reached)


def rmap_walk(kvm: Kvm, first: int, last: int, t_ns: int) -> Walk:
    """The shadow MMU's, from ``t_ns`` on: head after head, and each entry of a chain."""
    costs = kvm.costs.unmap
    leaves = np.arange(first, last, dtype=np.int64)
    mapped = (kvm.stage2.leaf.entries[first:last] & VALID) != 0
    spent = costs.visit_ns + mapped * (kvm.mmu.chain * costs.leaf_ns)
    begins = t_ns + np.cumsum(spent) - spent
    spent[mapped] += kvm.rmap.waits_of(leaves[mapped], begins[mapped])
    return Walk(leaves, np.cumsum(spent), last, np.ones(last - first, np.bool_))


class ZapLeafs:
    """Unmaps ranges of ``kvm``; ``lock`` takes ``mmu_lock`` and returns the time of entry."""

    def __init__(self, kvm: Kvm, lock: Callable[[Task, int], Steps]) -> None:
        self._kvm = kvm
        self._lock = lock

    def run(
        self, task: Task, entry_ns: int, t_ns: int, first: int, last: int, blockable: bool
    ) -> Steps:
        """Zap the leaves ``first`` up to ``last`` from ``t_ns`` on, under the lock.

        Returns when the last flush is over, with the lock held.
        """
        kvm = self._kvm
        unflushed = 0

        def apply(walk: Walk, done: int, stop: int, t_ns: int) -> None:
            nonlocal unflushed
            removed = kvm.zap_leaves(t_ns, walk.entry(done), walk.entry(stop))
            kvm.unmapped_pages += removed * kvm.leaf_pages
            unflushed += removed

        def let_go(t_ns: int) -> Steps:
            nonlocal unflushed
            if unflushed:
                t_ns = yield from self._flush(t_ns)
                unflushed = 0
            t_ns = yield from reach(kvm.env, t_ns)
            kvm.mmu_lock.release(t_ns)
            task.cpu.enter_kernel(t_ns)
            return (yield from self._lock(task, (yield from kvm.let_others_run(task, t_ns))))

        walker = YieldingWalker(kvm, blockable, apply, let_go)
        for low, high in chunks(kvm.stage2, first, last):  # to bound the arrays, no more
            if kvm.stage2.attached:
                walk = kvm.mmu.walk(kvm, low, high, t_ns)
                t_ns = yield from walker.run(walk, t_ns, more=high < last)
        return (yield from self._flush(t_ns)) if unflushed else t_ns

    def _flush(self, t_ns: int) -> Steps:
        """Flush remotely at ``t_ns``, when nothing before that is left to happen."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, t_ns)
        return kvm.ipi.flush(kvm, t_ns)
