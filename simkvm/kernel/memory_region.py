"""Memslots change under a running guest: ``KVM_SET_USER_MEMORY_REGION``.

Source: virt/kvm/kvm_main.c (``kvm_set_memslot``) and arch/arm64/kvm/mmu.c
(``kvm_arch_flush_shadow_memslot``), v6.12. A new memslot takes one grace period of ``kvm->srcu``,
expedited, before the call returns. One that is deleted or moved is first made invalid, which
takes one too; then all of it is unmapped under the write lock, chunk by chunk; then the change is
committed, with a second grace period. A fault is a reader of ``kvm->srcu`` from the look-up of its
memslot on, and one that finds no valid memslot is an access to a device for user space (arm64).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.fault import FaultPath
from simkvm.kernel.mmu_notifier import Srcu
from simkvm.kernel.qrwlock import OPEN
from simkvm.kernel.sites import MEMSLOT
from simkvm.kernel.task import Task, acquired, reach
from simkvm.kernel.unmap import chunks

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


class MemoryRegions:
    """Memslots of one guest: which of its leaves have one, and how that changes."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self.srcu = Srcu(kvm.env, kvm.costs.wakeup_ns)
        self._absent: list[tuple[int, int]] = []

    def absent(self, leaf: int) -> bool:
        """Whether ``leaf`` lies in no valid memslot now."""
        return any(first <= leaf < last for first, last in self._absent)

    def create(self, task: Task, t_ns: int) -> Steps:
        """Add a memslot: the new array of memslots, and a grace period for the old one."""
        return (yield from self._swap_active_memslots(task, t_ns))

    def delete(self, task: Task, t_ns: int, first: int, last: int) -> Steps:
        """Delete the memslot of leaves ``first`` up to ``last``."""
        return (yield from self._invalidate(task, t_ns, first, last))

    def move(self, task: Task, t_ns: int, first: int, last: int, back: bool) -> Steps:
        """Move it to another guest-physical address, where nobody touches it, or ``back``.

        On the way back nothing is mapped where it comes from.
        """
        if not back:
            return (yield from self._invalidate(task, t_ns, first, last))
        t_ns = yield from self._swap_active_memslots(task, t_ns)
        t_ns = yield from self._unmap(task, t_ns, 0, 0)
        t_ns = yield from self._swap_active_memslots(task, t_ns)
        self._absent.remove((first, last))
        return t_ns

    def _invalidate(self, task: Task, t_ns: int, first: int, last: int) -> Steps:
        t_ns = yield from reach(self._kvm.env, t_ns)
        self._absent.append((first, last))
        t_ns = yield from self._swap_active_memslots(task, t_ns)
        t_ns = yield from self._unmap(task, t_ns, first, last)
        return (yield from self._swap_active_memslots(task, t_ns))

    def _swap_active_memslots(self, task: Task, t_ns: int) -> Steps:
        """``kvm_swap_active_memslots``: wait until nobody looks at the old ones."""
        t_ns = yield from reach(self._kvm.env, t_ns)
        task.cpu.sleep(t_ns)
        yield self.srcu.synchronize(t_ns)
        t_ns = max(t_ns, int(self._kvm.env.now))
        task.cpu.enter_kernel(t_ns)
        return t_ns

    def _unmap(self, task: Task, t_ns: int, first: int, last: int) -> Steps:
        """``kvm_unmap_stage2_range``: the whole memslot, chunk by chunk, under the write lock."""
        kvm = self._kvm
        parts = chunks(kvm.stage2, first, last)
        entry = end = yield from self._lock(task, t_ns)
        if not parts:
            end += kvm.costs.unmap.visit_ns  # one hole, seen from the root
        for number, (low, high) in enumerate(parts):
            if not kvm.stage2.attached:
                break
            end = kvm.unmap_chunk(task.cpu.id, end, low, high)
            task.cpu.atomic(entry, end)
            if number + 1 == len(parts):
                break
            end = yield from reach(kvm.env, end)
            if kvm.lock_break(task.cpu, end):
                kvm.mmu_lock.release(end)
                task.cpu.context_switch(end)
                end = entry = yield from self._lock(task, end + kvm.costs.ageing.resched_ns)
        end = yield from reach(kvm.env, end)
        kvm.mmu_lock.release(end)
        task.cpu.enter_kernel(end)
        return end

    def _lock(self, task: Task, t_ns: int) -> Steps:
        env = self._kvm.env
        t_ns = yield from reach(env, t_ns)
        task.cpu.spin(t_ns)
        grant = self._kvm.mmu_lock.write(t_ns, task.cpu.id, MEMSLOT, lambda at: (OPEN, at))
        return (yield from reach(env, (yield from acquired(grant))))


class MemslotFaultPath(FaultPath):
    """Faults of a guest whose memslots come and go.

    ``mmio_ns``: a round trip to user space, which takes the access for one to a device.
    """

    def __init__(
        self, kvm: Kvm, vcpu: Vcpu, task: Task, regions: MemoryRegions, mmio_ns: int
    ) -> None:
        super().__init__(kvm, vcpu, task)
        self._regions = regions
        self._mmio_ns = mmio_ns - kvm.costs.fault.exit_ns
        self._token: int | None = None
        self.mmio_exits = 0

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """The memslot first: without one the fault ends in user space."""
        self.refused = self._regions.absent(leaf)
        if self.refused:
            self.lacking = True
            self.mmio_exits += 1
            return t_ns
        self._token = self._regions.srcu.enter(t_ns)
        return super().look_up(t_ns, leaf, write)

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """As for every fault, or user space ignores the access and goes on behind it."""
        return self._access_device(t_ns) if self.refused else super().install(t_ns)

    def _access_device(self, t_ns: int) -> Generator[Event, Any, int]:
        end = yield from reach(self._env, t_ns + self._mmio_ns)
        self._task.cpu.enter_kernel(end)
        self._vcpu.pass_over()
        return end

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """The section under ``mmu_lock``, after which the memslot is not looked at any more."""
        result = super().locked(entry_ns)
        if self._token is not None:
            self._regions.srcu.leave(self._token, entry_ns + result[0])
            self._token = None
        return result
