"""A kworker that takes a page in for a vCPU, which meanwhile goes on: an async page fault.

Source: virt/kvm/async_pf.c (``kvm_setup_async_pf``, ``async_pf_execute``) and
arch/x86/kvm/mmu/mmu.c (``__kvm_faultin_pfn``), v6.12. KVM first asks GUP not to wait. If the page
has to be read, or is about to be evicted, a kworker waits for it instead, with GUP for writing
whatever the guest wanted. Then it kicks the vCPU.

Other than in Linux it is also the kworker that allocates the page and sends the request, which
GUP does on the vCPU before it finds that it would have to wait. The kworker runs on the vCPU's CPU
(``schedule_work()``); its time there is taken from the guest when it is done.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from simpy import Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.fault import Faulting
from simkvm.kernel.mmap_lock import LOCK
from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

PER_VCPU: Final = 64  #: pages that kworkers take in for a vCPU at once (ASYNC_PF_PER_VCPU)


class WorkerCpu(Cpu):
    """What a kworker does on a CPU that another thread is accounted on; ``asleep_ns`` in all."""

    __slots__ = ("_since_ns", "asleep_ns")

    def __init__(self, cpu: Cpu) -> None:
        super().__init__(cpu.id, cpu.node)
        self.asleep_ns = 0
        self._since_ns = -1

    def sleep(self, t_ns: int) -> None:
        """The kworker waits from ``t_ns`` on."""
        super().sleep(t_ns)
        self._since_ns = t_ns

    def enter_kernel(self, t_ns: int) -> None:
        """It goes on at ``t_ns``."""
        super().enter_kernel(t_ns)
        if self._since_ns >= 0:
            self.asleep_ns += t_ns - self._since_ns
            self._since_ns = -1


class AsyncPf(SwapFaultPath):
    """One page, ``leaf``, that a kworker takes in for ``vcpu`` of ``kvm`` on ``cpu``."""

    def __init__(self, kvm: Kvm, vcpu: Faulting, cpu: Cpu, leaf: int) -> None:
        self._worker_cpu = WorkerCpu(cpu)
        super().__init__(kvm, vcpu, Task("kworker", self._worker_cpu))
        self.leaf = self._leaf = leaf
        self._write = True

    def take_in(self, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        """From the kworker's wake-up at ``t_ns`` on.

        Returns when the host maps the page, or its VM is dead, and how long the kworker ran.
        """
        cpu = self._worker_cpu
        t_ns = began_ns = yield from reach(self._env, t_ns)
        cpu.enter_kernel(t_ns)
        self._kvm.kworkers.append(self)
        t_ns = self._mmap_lock.visit(cpu.id, t_ns, LOCK) + self._costs.vma_ns
        self._mmap_lock.post(cpu.id, t_ns)
        t_ns = yield from self._bring_in(t_ns)
        self._kvm.kworkers.remove(self)
        return t_ns, t_ns - began_ns - cpu.asleep_ns + cpu.stolen_ns
