"""``KVM_PRE_FAULT_MEMORY``: a range is mapped through the fault path before the guest comes to it.

Source: virt/kvm/kvm_main.c (``kvm_vcpu_pre_fault_memory``) and arch/x86/kvm/mmu/mmu.c, v6.12; arm64
has no such call, so there it is a question of what it would give. One leaf after the other, as a
read: memory that the host has not populated gets the zero page, which a write then has to copy.
A leaf whose fault has to be retried is tried again at once. A call maps ``call`` bytes and says
how far it came, so the VMM goes on from there; one that meets no memory slot is made again.

It is made for a vCPU that does not run meanwhile, on a thread and with a memory cache of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender, Steps
from simkvm.kernel import mmap_lock
from simkvm.kernel.sites import PRE_FAULT
from simkvm.kernel.stage2 import VALID
from simkvm.kernel.task import Task, acquired, reach
from simkvm.scenario.contenders import PreFault as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class NoGuest:
    """Stands where a vCPU stands in a fault; after the section there is no guest to enter."""

    def __init__(self, enter_ns: int) -> None:
        self._enter_ns = enter_ns

    def mapped(self, t_ns: int) -> int:
        """The leaf was mapped, and a guest would go on at ``t_ns``; returns when the call does."""
        return t_ns - self._enter_ns

    def enter(self, t_ns: int) -> int:
        """It was not."""
        return t_ns - self._enter_ns

    def forget_translations(self) -> None:
        """There are none."""


class PreFault(Contender):
    """Maps the first ``range`` bytes, from ``start`` on."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        costs = kvm.costs.fault
        self._fault = kvm.fault_path(kvm, NoGuest(costs.enter_ns), task)
        self._lookup_ns = costs.exit_ns - costs.enter_ns  # what is not the exit itself
        leaf = kvm.stage2.leaf_bytes
        self._last = kvm.leaves if spec.range is None else -(-spec.range // leaf)
        self._call = max(1, (spec.call or leaf * self._last) // leaf)
        self.mapped = 0  #: leaves so far
        self.ioctls = 0
        if spec.populated:
            for page in np.flatnonzero(kvm.host.state[: self._last] == 0).tolist():
                kvm.host.install(page, own=True)

    def run(self) -> Generator[Event, Any, None]:
        """Call after call until the range is mapped."""
        t_ns = yield from self.sleep_until(0, self._spec.start)
        user_ns = self.kvm.costs.fault.user_ns
        while self.mapped < self._last and self.kvm.alive:
            self.ioctls += 1
            end = min(self.mapped + self._call, self._last)
            while self.mapped < end and self.kvm.alive and not self.kvm.no_memslot(self.mapped):
                over = Event(self.kvm.env)
                self.kvm.in_ioctl.append(over)
                t_ns = yield from self._fault_in(t_ns, self.mapped)
                self.kvm.in_ioctl.remove(over)
                if over.callbacks:
                    t_ns = yield from reach(self.kvm.env, t_ns)
                    over.succeed()
                t_ns += self.kvm.costs.ageing.resched_ns + self.task.cpu.take_stolen()
                t_ns = yield from reach(self.kvm.env, t_ns)
                t_ns = yield from self.kvm.sched.checkpoint(self.task, t_ns)
                self.mapped += bool(self.kvm.stage2.leaf.fast[self.mapped] & VALID)
            t_ns = yield from reach(self.kvm.env, t_ns + user_ns)
        self.done_ns = t_ns
        self.kvm.sched.sleep(self.task, t_ns)

    def _fault_in(self, t_ns: int, leaf: int) -> Steps:
        """One fault, which may have to be retried."""
        kvm, fault, cpu = self.kvm, self._fault, self.task.cpu
        t_ns = fault.arrival_ns(t_ns) - fault.exit_ns + self._lookup_ns
        t_ns = yield from mmap_lock.wait(kvm, self.task, t_ns)
        t_ns = yield from reach(kvm.env, fault.look_up(t_ns, leaf, write=False))
        if fault.lacking:
            rest = fault.install(t_ns)
            if rest is not None:
                t_ns = yield from rest
        cpu.spin(t_ns)
        t_ns = yield from acquired(fault.take_lock(t_ns, cpu.id, PRE_FAULT, fault.locked))
        cpu.enter_kernel(t_ns)
        return t_ns
