"""A stage-2 fault, from the guest's exit to its next instruction.

Source: arch/arm64/kvm/mmu.c (``kvm_handle_guest_abort``, ``user_mem_abort``), v6.12. In order:
exit, SRCU, memslot; top up the vCPU's memory cache; look the VMA up under ``mmap_lock`` and note
the invalidation sequence; resolve the host page; take ``mmu_lock`` for read (for write before
v6.2); give up if an invalidation runs or ran since the note; else walk and map, breaking and
making single entries that other faults then have to leave alone; unlock, re-enter.

A fault costs two events: one where it meets ``mmap_lock``, one where it meets ``mmu_lock``. The
second also finds the vCPU's next fault, so the time that the guest computes in between is free.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from simpy import Event

from simkvm.kernel.host_memory import OWN
from simkvm.kernel.sites import FAULT
from simkvm.kernel.stage2 import VALID, WRITE
from simkvm.kernel.task import Task

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu
    from simkvm.kernel.kvm import Kvm

#: Objects in a full memory cache (``KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE`` on arm64).
CACHE_CAPACITY: Final = 40


class FaultPath:
    """The fault handler of one vCPU, with its memory cache."""

    def __init__(self, kvm: Kvm, vcpu: Vcpu, task: Task) -> None:
        self._kvm = kvm
        self._vcpu = vcpu
        self._task = task
        self._env = kvm.env
        self._costs = kvm.costs.fault
        self._cpu = task.cpu.id
        lock = kvm.mmu_lock
        self._lock = lock.write if kvm.kernel["fault_lock"] == "write" else lock.read
        self._cache_minimum = kvm.stage2.geometry.cache_minimum
        self.cached = 0
        self._leaf = 0
        self._write = False
        self._noted_ns = 0
        self.faults = 0
        self.retries = 0

    def arrival_ns(self, exit_ns: int) -> int:
        """When a guest that exits at ``exit_ns`` comes to ``mmap_lock``, its cache topped up."""
        arrival = exit_ns + self._costs.exit_ns
        if self.cached < self._cache_minimum:
            arrival += (CACHE_CAPACITY - self.cached) * self._costs.object_ns
        return arrival

    def handle(self, t_ns: int, leaf: int, write: bool) -> Generator[Event, Any, int]:
        """Handle one abort that comes to ``mmap_lock`` at ``t_ns``.

        Returns when the vCPU next needs the host: the guest's run in between is done already.
        """
        env, kvm, costs = self._env, self._kvm, self._costs
        self.faults += 1
        if self.cached < self._cache_minimum:
            self.cached = CACHE_CAPACITY
        self._leaf = leaf
        self._write = write
        state = kvm.host.fast[leaf]
        resolved = state & OWN or (state and not write)
        noted = kvm.host.mmap_lock.visit(self._cpu, t_ns, 2 if resolved else 3)
        self._noted_ns = noted
        t_ns = noted + costs.vma_ns
        if resolved:
            t_ns += costs.gup_hit_ns
            if t_ns >= env.peek():
                yield env.timeout(t_ns - env._now)
        else:
            t_ns = yield from self._resolve(t_ns, state)
        grant = self._lock(t_ns, self._cpu, FAULT, self._locked)
        if isinstance(grant, int):
            return grant
        self._task.cpu.spin(t_ns)
        self._vcpu.alarm = grant
        yield grant
        return self._vcpu.next_ns  # an unmap may have moved it since the grant

    def _resolve(self, t_ns: int, state: int) -> Generator[Event, Any, int]:
        """Make the host map the page: GUP's slow path, under ``mmap_lock`` taken again."""
        env, kvm, costs, leaf = self._env, self._kvm, self._costs, self._leaf
        if not self._write:
            t_ns += costs.gup_zero_ns
        elif state:
            t_ns += costs.gup_copy_ns
        else:
            t_ns += costs.gup_alloc_ns
        lock_ns = t_ns - costs.ptl_ns
        kvm.host.plan_fault(leaf, lock_ns, t_ns)
        kvm.host.mmap_lock.post(self._cpu, t_ns)
        if t_ns >= env.peek():
            yield env.timeout(t_ns - env._now)
        held = kvm.host.blocked(leaf, lock_ns)
        if held is not None:
            self._task.cpu.spin(t_ns)
            freed: int = held if isinstance(held, int) else (yield held)
            t_ns = max(t_ns, freed + kvm.costs.line.transfer_ns + costs.ptl_ns)
            if t_ns >= env.peek():
                yield env.timeout(t_ns - env._now)
        if state:
            # A copy takes the zero page back first: an invalidation of its own.
            t_ns = yield from kvm.notifier.invalidate(self._task, t_ns, leaf, leaf + 1)
        kvm.host.install(leaf, self._write)
        return t_ns

    def _locked(self, entry_ns: int) -> tuple[int, int]:
        """The section under ``mmu_lock``: returns the hold and when the host is needed next."""
        kvm, costs, leaf = self._kvm, self._costs, self._leaf
        notifier = kvm.notifier
        if notifier.in_progress or notifier.moved_ns > self._noted_ns:
            self.retries += 1
            return self._again(entry_ns, costs.retry_ns)
        state = kvm.host.fast[leaf]
        if not state:
            # Zapped between the look-up and here, and the invalidation is not over or was noted.
            self.retries += 1
            return self._again(entry_ns, costs.retry_ns)
        stage2 = kvm.stage2
        if kvm.installing and kvm.installing.get(stage2.leaf_table(leaf), 0) > entry_ns:
            # Another fault is breaking or making an entry on this path.
            return self._again(entry_ns, costs.hold_ns)
        need = VALID | WRITE if self._write else VALID
        if stage2.leaf.fast[leaf] & need == need:
            return self._again(entry_ns, costs.hold_ns)  # another vCPU was first
        hold = costs.hold_ns
        made = stage2.map_leaf(leaf, WRITE if state & OWN else 0)
        if made:
            hold += len(made) * costs.table_ns
            self.cached -= len(made)
            kvm.tables_linked(made, entry_ns)
            kvm.installing = {t: end for t, end in kvm.installing.items() if end > entry_ns}
            kvm.installing[stage2.leaf_table(leaf)] = entry_ns + hold
        return hold, self._vcpu.mapped(entry_ns + hold + costs.enter_ns)

    def _again(self, entry_ns: int, hold_ns: int) -> tuple[int, int]:
        """Leave without a mapping; the guest runs into the same fault again, if it is one."""
        return hold_ns, self._vcpu.enter(entry_ns + hold_ns + self._costs.enter_ns)
