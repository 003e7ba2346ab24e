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
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.sites import TEARDOWN
from simkvm.kernel.stage2 import TableId
from simkvm.kernel.task import Task, acquired, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


class Teardown:
    """Destroys ``kvm`` at ``at_ns`` in ``order``."""

    def __init__(self, kvm: Kvm, task: Task, order: str, at_ns: int) -> None:
        self._kvm = kvm
        self._task = task
        self._order = order
        self._at_ns = at_ns
        self._in_release = kvm.kernel["root_free"] == "in_release"
        self._chunked = kvm.kernel["teardown_walk"] == "chunked"
        self.visits = 0
        self.longest_ns = 0  #: longest stretch of the walk without a point to reschedule
        self.done = False

    def run(self) -> Generator[Event, Any, None]:
        """The whole of it, as one process."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, self._at_ns)
        self._task.cpu.enter_kernel(t_ns)
        t_ns = yield from self._stop_vcpus(t_ns)
        if self._order == "process_exit":
            t_ns = yield from self._wait_for_walkers(t_ns)
        t_ns = yield from self._unregister(t_ns)
        if self._order == "process_exit":
            t_ns = yield from reach(kvm.env, kvm.zap_host(t_ns, 0, kvm.leaves))
        if not self._in_release:
            t_ns = yield from self._free_stage2(t_ns)
        self._task.cpu.sleep(t_ns)
        self.done = True

    def _stop_vcpus(self, t_ns: int) -> Steps:
        """No vCPU runs any more when either way in begins; each ends the fault that it is in."""
        kvm = self._kvm
        kvm.alive = False
        for vcpu in kvm.vcpus:
            vcpu.stop(t_ns)
        for vcpu in kvm.vcpus:
            assert vcpu.process is not None
            if vcpu.process.is_alive:
                yield vcpu.process
        t_ns = max(t_ns, int(kvm.env.now), *(vcpu.finished_ns for vcpu in kvm.vcpus))
        self._task.cpu.enter_kernel(t_ns)
        return (yield from reach(kvm.env, t_ns))

    def _wait_for_walkers(self, t_ns: int) -> Steps:
        while (held := self._kvm.unpinned()) is not None:
            self._task.cpu.sleep(t_ns)
            yield held
            t_ns = max(t_ns, int(self._kvm.env.now))
        self._task.cpu.enter_kernel(t_ns)
        return t_ns

    def _unregister(self, t_ns: int) -> Steps:
        """Call ``->release`` under SRCU, unlink the subscription, wait for SRCU."""
        kvm = self._kvm
        token = kvm.notifier.srcu.enter(t_ns)
        if self._in_release:
            t_ns = yield from self._free_stage2(t_ns)
        kvm.notifier.srcu.leave(token, t_ns)
        kvm.notifier.subscribed = False
        self._task.cpu.sleep(t_ns)
        yield kvm.notifier.srcu.synchronize(t_ns)
        t_ns = max(t_ns, int(kvm.env.now))
        self._task.cpu.enter_kernel(t_ns)
        return t_ns

    def _free_stage2(self, t_ns: int) -> Steps:
        """``kvm_free_stage2_pgd``: detach under the lock, then walk and free without it."""
        kvm = self._kvm
        hold_ns = kvm.costs.unmap.bookkeeping_ns

        def detach(entry_ns: int) -> tuple[int, int]:
            kvm.stage2.attached = False
            return hold_ns, entry_ns + hold_ns

        t_ns = yield from reach(kvm.env, t_ns)
        self._task.cpu.spin(t_ns)
        t_ns = yield from acquired(kvm.mmu_lock.write(t_ns, self._task.cpu.id, TEARDOWN, detach))
        self._task.cpu.enter_kernel(t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        return (yield from self._walk(t_ns))

    def _walk(self, t_ns: int) -> Steps:
        """Visit every entry of every table, children first; free each table, then the root."""
        kvm = self._kvm
        began = t_ns
        chunk_ns = 0
        chunk = -1
        for table, leaves in self._tables():
            spent = self._table_ns(leaves)
            here = self._chunk_of(table)
            if self._chunked and here != chunk:
                t_ns += kvm.costs.ageing.resched_ns
                self._task.cpu.context_switch(t_ns)
                chunk, chunk_ns = here, 0
            t_ns += spent
            chunk_ns += spent
            self.longest_ns = max(self.longest_ns, chunk_ns if self._chunked else t_ns - began)
            kvm.oracle.unlinked(table, t_ns)
            kvm.table_reported_free(t_ns)
            kvm.table_freed(table, t_ns, deferred=False)
        roots = kvm.stage2.geometry.root_pages
        self.visits += roots * kvm.entries
        t_ns += roots * (kvm.entries * kvm.costs.unmap.visit_ns + kvm.costs.free.free_ns)
        kvm.oracle.root_freed(t_ns)
        kvm.memory.root_freed(t_ns, roots * kvm.table_bytes)
        kvm.stage2.clear()
        return (yield from reach(kvm.env, t_ns))

    def _tables(self) -> list[tuple[TableId, int]]:
        """Every table with its counted entries, in the order of the walk."""
        stage2 = self._kvm.stage2
        tables = stage2.all_tables()
        order = sorted(tables, key=lambda table: (stage2.end_of(table), -table.level))
        return [(t, int(stage2.levels[t.level].counts[t.index])) for t in order]

    def _chunk_of(self, table: TableId) -> int:
        stage2 = self._kvm.stage2
        return (stage2.end_of(table) - 1) * stage2.leaf_bytes // stage2.geometry.chunk_bytes

    def _table_ns(self, counted: int) -> int:
        kvm = self._kvm
        self.visits += kvm.entries
        entries_ns = kvm.entries * kvm.costs.unmap.visit_ns + counted * kvm.costs.line.same_ns
        return entries_ns + kvm.costs.unmap.descend_ns + kvm.costs.free.free_ns
