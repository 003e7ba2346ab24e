"""``mprotect`` of a guest's whole memory: the right to write goes, and comes back.

Source: mm/mprotect.c (``change_pud_range``, v6.12: one notifier range) and arch/arm64/kvm/mmu.c
(``user_mem_abort``). ``mmap_lock`` is held for write meanwhile, so faults wait for it; arm64
unmaps stage 2 for this notifier event as for any other. A write fault that then finds the mapping
read-only fails: KVM_RUN returns ``-EFAULT``, and user space decides what becomes of the access.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.fault import FaultPath
from simkvm.kernel.host_memory import OWN
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
#: Told of a write that failed at ``t_ns``; returns when KVM_RUN is called again, and whether the
#: guest goes on behind the access.
Efault = Callable[["Vcpu", int], tuple[int, bool]]


class Protection:
    """Whether the memory of ``kvm`` may be written to, and whether that is being changed.

    ``host_entries``: host entries that map it (fewer than its leaves if memslots share memory);
    ``entry_ns``: changing one.
    """

    def __init__(self, kvm: Kvm, host_entries: int, entry_ns: int) -> None:
        self._kvm = kvm
        self._work_ns = host_entries * entry_ns
        self.writable = True
        self.changing = False
        self._blocked: list[Event] = []

    def mprotect(self, task: Task, t_ns: int, writable: bool) -> Steps:
        """Change it from ``t_ns`` on; returns when ``mmap_lock`` is free again."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, t_ns)
        t_ns = kvm.host.mmap_lock.visit(task.cpu.id, t_ns, 1)
        self.changing, self.writable = True, writable
        t_ns = yield from kvm.notifier.invalidate(
            task, t_ns, 0, kvm.leaves, leaving=kvm.host.mmap_lock, host_step=self._change
        )
        t_ns = yield from reach(kvm.env, t_ns)
        self.changing = False
        for released in self._blocked:
            released._ok = True
            released._value = t_ns
            kvm.env.schedule(released, delay=max(0, t_ns - int(kvm.env.now)))
        self._blocked.clear()
        return t_ns

    def _change(self, t_ns: int, first: int, last: int) -> int:
        """The host's entries; one that is read-only is mapped read-only by the next fault."""
        state = self._kvm.host.state
        present = state[first:last] != 0
        if self.writable:
            state[first:last][present] |= OWN
        else:
            state[first:last] &= ~OWN & 0xFF
        return t_ns + self._work_ns

    def changed(self) -> Event:
        """An event for the end of the change that is going on."""
        event = Event(self._kvm.env)
        self._blocked.append(event)
        return event


class ProtectedFaultPath(FaultPath):
    """Faults of a guest whose memory may be read-only. ``efault``: user space's answer."""

    def __init__(
        self, kvm: Kvm, vcpu: Vcpu, task: Task, protection: Protection, efault: Efault
    ) -> None:
        super().__init__(kvm, vcpu, task)
        self._protection = protection
        self._efault = efault
        self._stopped = False
        self.efaults = 0

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """Up to ``mmap_lock``, where a change of protection stops it."""
        protection = self._protection
        self._stopped = protection.changing or (write and not protection.writable)
        self.refused = False
        if not self._stopped:
            return super().look_up(t_ns, leaf, write)
        self._leaf, self._write = leaf, write
        self.lacking = True
        return t_ns

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """As for every fault, unless it was stopped."""
        return self._resume(t_ns) if self._stopped else super().install(t_ns)

    def _resume(self, t_ns: int) -> Steps:
        protection, vcpu = self._protection, self._vcpu
        while protection.changing:
            self._task.cpu.sleep(t_ns)
            t_ns = yield protection.changed()
            t_ns += self._kvm.costs.wakeup_ns
            self._task.cpu.enter_kernel(t_ns)
            t_ns = yield from reach(self._env, t_ns)
        if self._write and not protection.writable:
            self.refused = True
            self.faults += 1
            self.efaults += 1
            t_ns = self._mmap_lock.visit(self._cpu, t_ns, 2) + self._costs.vma_ns
            t_ns, behind = self._efault(vcpu, t_ns)
            if behind:
                vcpu.pass_over()
            return (yield from reach(self._env, t_ns))
        t_ns = yield from reach(self._env, super().look_up(t_ns, self._leaf, self._write))
        rest = super().install(t_ns) if self.lacking else None
        return t_ns if rest is None else (yield from rest)
