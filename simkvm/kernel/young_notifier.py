"""The notifier's questions about youth, for one entry or one run of entries.

Source: virt/kvm/kvm_main.c (``kvm_handle_hva_range``, ``kvm_mmu_notifier_clear_flush_young`` and
its sisters) and arch/arm64/kvm/mmu.c (``kvm_age_gfn``), v6.12. SRCU twice, the memslot,
``mmu_lock``, one walk over the leaves, of which a block is one; the *flush* form, if something was
young, then invalidates the whole VMID before it unlocks. With ``ageing_lock: none`` there is RCU in
place of the lock.

The series of 2023 can do without the lock only where the CPU sets the flag
(``kvm_arch_has_test_clear_young``, <20230526234435.662652-6-yuzhao@google.com>). Elsewhere a call
for a single page falls back to the lock, and a call with a bitmap is told at once that nothing is
young.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.kernel.cmpxchg_race import Loads
from simkvm.kernel.qrwlock import OPEN
from simkvm.kernel.rmap import WITHOUT_MMU_LOCK, Held
from simkvm.kernel.sites import AGE
from simkvm.kernel.task import Task, acquired, reach
from simkvm.observe.oracle import Walk

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Leaves = NDArray[np.int64]


@dataclass
class YoungCalls:
    """Calls about youth that one guest was asked: under ``mmu_lock``, without, and fallen back.

    ``fallback`` calls, which wanted to do without the lock, are among the ``locked`` ones.
    """

    locked: int = 0
    lockless: int = 0
    fallback: int = 0


class YoungNotifier:
    """Calls that ``task`` makes about the leaves of ``kvm``."""

    def __init__(self, kvm: Kvm, task: Task) -> None:
        self.kvm = kvm
        self.task = task
        self._costs = kvm.costs.ageing
        self._lock = kvm.kernel["ageing_lock"]
        self._falls_back = self._lock == "none" and not kvm.test_clear_young
        self._always_flush = kvm.kernel["ageing_flush"] == "per_call"

    def clear(
        self, t_ns: int, first: int, last: int, flush: bool = False
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        """Ask about leaves ``first`` up to ``last`` at ``t_ns`` and clear their flags.

        ``flush``: ask for ``clear_flush_young``. Returns when the call is over, and who was young.
        """
        t_ns = yield from reach(self.kvm.env, t_ns + self._costs.call_ns)
        if self._lock in WITHOUT_MMU_LOCK and not self._falls_back:
            return self._lockless(t_ns, first, last)
        return (yield from self._locked(t_ns, first, last, flush or self._always_flush))

    def test(self, t_ns: int, first: int, last: int) -> Generator[Event, Any, tuple[int, bool]]:
        """Ask about leaves ``first`` up to ``last`` at ``t_ns`` and leave flags (``test_young``).

        Returns when the call is over, and whether one was young.
        """
        kvm = self.kvm
        t_ns = yield from reach(kvm.env, t_ns + self._costs.call_ns)
        walk_ns = self._walk_ns(first, last)
        if self._lock in WITHOUT_MMU_LOCK and not self._falls_back:
            kvm.young_calls.lockless += 1
            self._announce(t_ns, self._visited(first, last), walk_ns)
            return t_ns + walk_ns, bool(kvm.stage2.young(first, last).any())
        found: list[bool] = []

        def section(entry_ns: int) -> tuple[int, int]:
            found.append(kvm.stage2.attached and bool(kvm.stage2.young(first, last).any()))
            return walk_ns, entry_ns + walk_ns

        kvm.young_calls.locked += 1
        kvm.young_calls.fallback += self._falls_back
        take = kvm.mmu_lock.read if self._lock == "read" else kvm.mmu_lock.write
        t_ns = yield from acquired(take(t_ns, self.task.cpu.id, AGE, section))
        return t_ns, found[0]

    def _walk_ns(self, first: int, last: int) -> int:
        """The walk of one call: one for each memslot, an entry after the other."""
        kvm, costs = self.kvm, self._costs
        visits = last - first
        if kvm.stage2.blocks is not None:
            visits = kvm.stage2.leaf_visits(first, last)
        walks = 1 + kvm.memslots.crossed(first, last)
        return walks * costs.walk_ns + max(0, visits - walks) * costs.visit_ns

    def _locked(
        self, t_ns: int, first: int, last: int, flush: bool
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        kvm = self.kvm
        found: list[Leaves] = []
        flushed_ns = 0
        shared = self._lock == "read"

        def section(entry_ns: int) -> tuple[int, int]:
            nonlocal flushed_ns
            self.task.spend("read_lock" if shared else "write_lock", entry_ns - t_ns)
            young, walk_ns = np.empty(0, np.int64), self._walk_ns(first, last)
            if kvm.stage2.attached:
                young = first + np.flatnonzero(kvm.stage2.young(first, last))
                kvm.clear_young(young, entry_ns)
            found.append(young)
            end_ns = entry_ns + walk_ns
            if not flush or not len(young):
                return walk_ns, end_ns
            if not shared:
                return OPEN, end_ns  # what others do until the flush comes first
            flushed_ns = kvm.flush_ns(end_ns, kvm.costs.tlbi_all_ns)
            return flushed_ns - entry_ns, end_ns

        kvm.young_calls.locked += 1
        kvm.young_calls.fallback += self._falls_back
        take = kvm.mmu_lock.read if shared else kvm.mmu_lock.write
        t_ns = yield from acquired(take(t_ns, self.task.cpu.id, AGE, section))
        if flush and len(found[0]):
            t_ns = yield from reach(kvm.env, t_ns)
            if shared:
                kvm.forget_vmid(t_ns)
                return (yield from reach(kvm.env, flushed_ns)), found[0]
            t_ns = yield from reach(kvm.env, kvm.flush_vmid(t_ns))
            kvm.mmu_lock.release(t_ns)
        return t_ns, found[0]

    def _lockless(self, t_ns: int, first: int, last: int) -> tuple[int, Leaves]:
        kvm, costs = self.kvm, self._costs
        block, leaves = kvm.stage2.is_block(first), self._visited(first, last)
        walk_ns = self._walk_ns(first, last)
        self._announce(t_ns, leaves, walk_ns)
        kvm.young_calls.lockless += 1
        end_ns = t_ns + walk_ns
        loads_ns = t_ns + costs.walk_ns + (leaves - first) * costs.visit_ns
        batch = Loads(leaves, lambda: loads_ns, t_ns, end_ns)
        age = kvm.age_block_lockless if block else kvm.age_lockless
        return end_ns, age(batch, t_ns)

    def _visited(self, first: int, last: int) -> Leaves:
        """Leaves of a walk without lock: a block is its first one."""
        block = self.kvm.stage2.is_block(first)
        return np.arange(first, first + 1 if block else last, dtype=np.int64)

    def _announce(self, t_ns: int, leaves: Leaves, walk_ns: int) -> None:
        """Tell of a walk without ``mmu_lock``: the oracle, or who changes a chain."""
        kvm, costs = self.kvm, self._costs
        if self._lock == "none":
            tables = kvm.path_at(int(leaves[0]), t_ns)
            kvm.oracle.walk(Walk(self.task.name, tables, t_ns, walk_ns, walk_ns, 1))
        else:
            kvm.rmap.hold(Held(leaves, t_ns, costs.visit_ns, costs.walk_ns))
