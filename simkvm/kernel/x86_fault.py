"""A fault on x86: how it differs from arm64's (:mod:`simkvm.kernel.fault`).

Source: arch/x86/kvm/mmu/mmu.c (``kvm_mmu_faultin_pfn``, ``kvm_tdp_mmu_page_fault``,
``direct_page_fault``) and tdp_mmu.c (``kvm_tdp_mmu_map``), mm/gup.c, virt/kvm/kvm_main.c
(``hva_to_pfn``), v6.12.

* A host page that is there is found by fast GUP, without ``mmap_lock`` and without a look at the
  VMA. Only the slow path, a host fault, takes ``mmap_lock`` for read (GUP uses no per-VMA lock).
* Whether an invalidation is in the way is looked at before GUP and after it, without a lock, and
  once more under ``mmu_lock``: a fault that has to give up anyway does not join the line.
* The TDP MMU installs tables and leaves with one cmpxchg each; an entry that another fault changed
  first, or that is frozen, sends the vCPU back to the guest, and the table it brought is freed.
* The shadow MMU takes ``mmu_lock`` for write and adds the entry to the page's reverse-map chain,
  for which it waits while an ageing walk has the chain locked (:mod:`simkvm.kernel.rmap`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpy import Event

from simkvm.kernel.fault import CACHE_CAPACITY, Faulting, FaultPath
from simkvm.kernel.host_change import usable
from simkvm.kernel.host_memory import MIGRATION, OWN
from simkvm.kernel.mmap_lock import LOCK
from simkvm.kernel.qrwlock import Section
from simkvm.kernel.task import Task

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class TdpFault(FaultPath):
    """The TDP MMU's fault handler of one vCPU."""

    def __init__(self, kvm: Kvm, vcpu: Faulting, task: Task) -> None:
        super().__init__(kvm, vcpu, task)
        self._lock_mmu = self.take_lock
        self.take_lock = self._take_unless_stale
        self._gave_up = False

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """From the cache's top-up, over at ``t_ns``, to a host page; returns when that is there."""
        kvm = self._kvm
        self.faults += 1
        if self.cached < self.cache_minimum:
            self.cached = CACHE_CAPACITY
        self._leaf = leaf
        self._write = write
        self._noted_ns = t_ns
        self.lacking = False
        self._gave_up = kvm.notifier.in_progress > 0 and kvm.notifier.stale(leaf, t_ns)
        if self._gave_up:
            return t_ns
        state = self._host_state[leaf]
        if (state & OWN or (state and not write)) and (state < MIGRATION or usable(state, write)):
            return t_ns + self._hit_ns
        self.lacking = True
        locked_ns = self._mmap_lock.visit(self._task.cpu.id, t_ns, LOCK)
        t_ns = self._resolve(t_ns, locked_ns, state, write)
        self.ptl_until_ns = t_ns
        self.ptl_table = leaf // kvm.host.entries
        self._mmap_lock.post(self._task.cpu.id, t_ns)
        return t_ns

    def _take_unless_stale(self, t_ns: int, cpu: int, site: int, section: Section) -> int | Event:
        """Take ``mmu_lock``, or go back to the guest if that would be for nothing."""
        if self._gave_up or self._kvm.notifier.stale(self._leaf, self._noted_ns):
            self.retries += 1
            return self._vcpu.enter(t_ns + self._costs.retry_ns + self._costs.enter_ns)
        return self._lock_mmu(t_ns, cpu, site, section)

    def _beaten_ns(self) -> int:
        """Its cmpxchg on the upper entry failed: free the table that it brought."""
        self.cached -= 1
        return self._costs.hold_ns + self._kvm.costs.free.free_ns


class ShadowFault(TdpFault):
    """The shadow MMU's: the chain of the page is locked while its entry is added."""

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """As :meth:`FaultPath.locked`, later if somebody has the chain."""
        wait_ns = self._kvm.rmap.wait_ns(self._leaf, entry_ns)
        hold_ns, resume_ns = super().locked(entry_ns + wait_ns)
        return wait_ns + hold_ns, resume_ns
