"""The end of a VM: when its stage-2 tree is freed, and who may still be walking it.

Source: virt/kvm/kvm_main.c (``kvm_destroy_vm``), mm/mmu_notifier.c, mm/mmap.c (``exit_mmap``) and
arch/arm64/kvm/mmu.c (``kvm_free_stage2_pgd``), v6.12. Two ways in:

* ``close_vm``: the VM's file is closed last; unregistering calls ``->release`` inside the
  notifier's SRCU, unlinks the subscription, waits for SRCU, and only then destroys the VM;
* ``process_exit``: the process is killed; ``exit_mmap`` calls ``->release`` before any mapping
  goes. A walker that holds the address space puts that off, as the last reference does the exit.

``root_free`` says where the tree goes: ``in_release`` takes the root away from the VM under
``mmu_lock``, then walks and frees without lock, invalidation or grace period, while other notifier
calls may still run; ``after_unregister`` does the same once SRCU has drained them (message
20230526234435.662652-1-yuzhao@google.com, patch 4 of 10).

Both ways in at once, by two processes, is the order ``both``: the exit of the owner, and somebody
else who drops the last reference. Each calls ``->release`` if it still finds the subscription.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.sites import TEARDOWN
from simkvm.kernel.task import Task, acquired, reach
from simkvm.kernel.teardown_walk import WALKS, Single

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


class Teardown:
    """Ends ``kvm`` at ``at_ns``, by ``way`` (``process_exit`` or ``close_vm``).

    ``last``: nobody else ends it too, or this is who drops the last reference. ``walk``: the walk
    that frees the tree, if it is this end that finds it.
    """

    def __init__(self, kvm: Kvm, task: Task, way: str, at_ns: int, last: bool = True) -> None:
        self._kvm = kvm
        self.task = task
        self._way = way
        self._at_ns = at_ns
        self._last = last
        self._in_release = kvm.kernel["root_free"] == "in_release"
        self._exclusive = kvm.kernel["flush_shadow"] == "mmu_lock"
        self.walk = WALKS.get(kvm.kernel["teardown_walk"], Single)(kvm, task.cpu)
        self.done = False

    @property
    def visits(self) -> int:
        """Entries that the walk looked at."""
        return self.walk.visits

    @property
    def longest_ns(self) -> int:
        """Longest stretch of the walk without a point to reschedule."""
        return self.walk.longest_ns

    @property
    def walk_ns(self) -> int:
        """The whole walk."""
        return self.walk.elapsed_ns

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
        if self._last and not self._in_release:
            t_ns = yield from self._free_stage2(t_ns)
        kvm.sched.sleep(self.task, t_ns)
        self.done = True
        return t_ns

    def _stop_vcpus(self, t_ns: int) -> Steps:
        """No vCPU runs any more when either way in begins; each ends the fault that it is in."""
        kvm = self._kvm
        if kvm.alive:
            kvm.alive = False
            for vcpu in kvm.vcpus:
                vcpu.stop(t_ns)
        for vcpu in kvm.vcpus:
            assert vcpu.process is not None
            if vcpu.process.is_alive:
                yield vcpu.process
        while kvm.in_ioctl:
            yield kvm.in_ioctl[0]  # who is inside an ioctl holds the file, and the address space
        t_ns = max(t_ns, int(kvm.env.now), *(vcpu.finished_ns for vcpu in kvm.vcpus))
        t_ns = yield from kvm.sched.wake(self.task, t_ns)
        return (yield from reach(kvm.env, t_ns))

    def _wait_for_walkers(self, t_ns: int) -> Steps:
        while (held := self._kvm.unpinned()) is not None:
            self._kvm.sched.sleep(self.task, t_ns)
            yield held
            t_ns = max(t_ns, int(self._kvm.env.now))
        return (yield from self._kvm.sched.wake(self.task, t_ns))

    def _unregister(self, t_ns: int) -> Steps:
        """Call ``->release`` under SRCU, unlink the subscription, wait for SRCU."""
        kvm = self._kvm
        if kvm.notifier.subscribed:
            token = kvm.notifier.srcu.enter(t_ns)
            if self._in_release:
                t_ns = yield from self._free_stage2(t_ns)
            kvm.notifier.srcu.leave(token, t_ns)
            kvm.notifier.subscribed = False
        kvm.sched.sleep(self.task, t_ns)
        yield kvm.notifier.srcu.synchronize(t_ns)
        return (yield from kvm.sched.wake(self.task, max(t_ns, int(kvm.env.now))))

    def _free_stage2(self, t_ns: int) -> Steps:
        """``kvm_uninit_stage2_mmu``: whoever finds the root detaches it under the lock and frees.

        The walk holds no lock, nor does what follows; with ``flush_shadow: mmu_lock`` all of it
        does (message 20260504224213.1049426-1-jthoughton@google.com and the answers to it).
        """
        kvm = self._kvm
        self.walk.cpu = self.task.cpu
        mine = False

        def detach(entry_ns: int) -> tuple[int, int]:
            nonlocal mine
            mine, kvm.stage2.attached = kvm.stage2.attached, False
            end = entry_ns + kvm.costs.unmap.bookkeeping_ns
            if self._exclusive:
                end = self.walk.run(end, atomic=True) if mine else end
                end = kvm.split_cache.free_alone(self.task, end)
            return end - entry_ns, end

        t_ns = yield from reach(kvm.env, t_ns)
        self.task.cpu.spin(t_ns)
        t_ns = yield from acquired(kvm.mmu_lock.write(t_ns, self.task.cpu.id, TEARDOWN, detach))
        self.task.cpu.enter_kernel(t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        if self._exclusive:
            return t_ns
        if mine:
            t_ns = yield from reach(kvm.env, self.walk.run(t_ns))
        return (yield from kvm.split_cache.free(self.task, t_ns))
