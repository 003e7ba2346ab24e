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

from simkvm.kernel.host_memory import OWN, PRESENT, YOUNG
from simkvm.kernel.stage2 import VALID, WRITE, TableId
from simkvm.kernel.task import Task, reach

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
        #: How this kernel's fault takes ``mmu_lock``; its section is :meth:`locked`.
        self.take_lock = lock.write if kvm.kernel["fault_lock"] == "write" else lock.read
        self.cache_minimum = kvm.stage2.geometry.cache_minimum
        self.exit_ns = kvm.costs.fault.exit_ns
        self._mmap_lock = kvm.host.mmap_lock
        self._host_state = kvm.host.fast
        self._leaf_state = kvm.stage2.leaf.fast
        self.cached = 0  #: table pages in the memory cache
        self.lacking = False  #: whether the host page has to be installed
        self.ptl_table = -1  #: host table whose lock the fault in flight takes,
        self.ptl_until_ns = 0  #: and until when
        self._leaf = 0
        self._write = False
        self._noted_ns = 0
        #: Whether the fault that :meth:`install` ended left KVM for user space, unresolved.
        self.refused = False
        self.faults = 0
        self.retries = 0

    def arrival_ns(self, exit_ns: int) -> int:
        """When a guest that exits at ``exit_ns`` comes to ``mmap_lock``, its cache topped up."""
        if self.cached < self.cache_minimum:
            return exit_ns + self.exit_ns + (CACHE_CAPACITY - self.cached) * self._costs.object_ns
        return exit_ns + self.exit_ns

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """From ``mmap_lock``, reached at ``t_ns``, to a host page; returns when ``mmu_lock`` is.

        A page that is not there takes GUP's slow path, under ``mmap_lock`` taken again and, at
        its end, the lock of the host's table: :meth:`install` has to follow then.
        """
        kvm, costs = self._kvm, self._costs
        self.faults += 1
        if self.cached < self.cache_minimum:
            self.cached = CACHE_CAPACITY
        self._leaf = leaf
        self._write = write
        state = self._host_state[leaf]
        if state & OWN or (state and not write):
            self.lacking = False
            noted = self._mmap_lock.visit(self._cpu, t_ns, 2) + costs.vma_ns
            self._noted_ns = noted
            return noted + costs.gup_hit_ns
        self.lacking = True
        noted = self._mmap_lock.visit(self._cpu, t_ns, 3) + costs.vma_ns
        self._noted_ns = noted
        gup_ns = costs.gup_alloc_ns
        if not write:
            gup_ns = costs.gup_zero_ns
        elif state:
            gup_ns = costs.gup_copy_ns
        t_ns = noted + gup_ns
        self.ptl_until_ns = t_ns
        self.ptl_table = leaf // kvm.host.entries
        self._mmap_lock.post(self._cpu, t_ns)
        return t_ns

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """At ``t_ns``, the end of GUP's slow path: the host maps the page, and the rest if any.

        The rest is to wait for ageing, which has the host's table locked, or to take the zero page
        back before its copy is there: an invalidation of its own.
        """
        host, leaf = self._kvm.host, self._leaf
        held = None
        wanted_ns = t_ns - self._costs.ptl_ns
        table = self.ptl_table
        if host.aged_table == table or host.left.get(table, 0) > wanted_ns:
            held = host.blocked(leaf, wanted_ns)
        if held is None and not self._host_state[leaf]:
            # host.install(), written out for the page that most faults are about.
            host.present[self.ptl_table] += 1
            if self._write:
                self._host_state[leaf] = PRESENT | YOUNG | OWN
                host.lru.add(leaf)
            else:
                self._host_state[leaf] = PRESENT | YOUNG
            return None
        return self._install_later(t_ns, held)

    def _install_later(self, t_ns: int, held: int | Event | None) -> Generator[Event, Any, int]:
        kvm, costs, leaf = self._kvm, self._costs, self._leaf
        if held is not None:
            self._task.cpu.spin(t_ns)
            freed: int = held if isinstance(held, int) else (yield held)
            t_ns = max(t_ns, freed + kvm.costs.line.transfer_ns + costs.ptl_ns)
            t_ns = yield from reach(self._env, t_ns)
        if self._write and kvm.host.fast[leaf] and not kvm.host.fast[leaf] & OWN:
            t_ns = yield from kvm.notifier.invalidate(self._task, t_ns, leaf, leaf + 1)
            t_ns = yield from reach(self._env, t_ns)
        kvm.host.install(leaf, self._write)
        return t_ns

    def holds_table(self, table: int, t_ns: int) -> bool:
        """Whether this fault holds the lock of host table ``table`` at ``t_ns``."""
        until = self.ptl_until_ns
        return self.ptl_table == table and until - self._costs.ptl_ns <= t_ns < until

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """The section under ``mmu_lock``: returns the hold and when the host is needed next."""
        kvm, costs, leaf = self._kvm, self._costs, self._leaf
        notifier = kvm.notifier
        state = self._host_state[leaf]
        if notifier.in_progress or notifier.moved_ns > self._noted_ns or not state:
            # Without a host page: zapped since the look-up, and the invalidation was noted then.
            self.retries += 1
            return self._again(entry_ns, costs.retry_ns)
        stage2 = kvm.stage2
        if kvm.installing and kvm.installing.get(stage2.leaf_table(leaf), 0) > entry_ns:
            # Another fault is breaking or making an entry on this path.
            return self._again(entry_ns, costs.hold_ns)
        need = VALID | WRITE if self._write else VALID
        if self._leaf_state[leaf] & need == need:
            return self._again(entry_ns, costs.hold_ns)  # another vCPU was first
        hold = costs.hold_ns
        made = stage2.map_leaf(leaf, WRITE if state & OWN else 0)
        if made:
            hold += self._linked(made, entry_ns)
        if kvm.expected:
            kvm.leaf_mapped(leaf, entry_ns)
        return hold, self._vcpu.mapped(entry_ns + hold + costs.enter_ns)

    def _linked(self, made: list[TableId], entry_ns: int) -> int:
        """New tables on the way to the leaf: returns what they add to the hold."""
        kvm, extra_ns = self._kvm, len(made) * self._costs.table_ns
        self.cached -= len(made)
        kvm.tables_linked(made, entry_ns)
        kvm.installing = {table: end for table, end in kvm.installing.items() if end > entry_ns}
        # An entry is locked only between breaking the old one and making the new.
        kvm.installing[kvm.stage2.leaf_table(self._leaf)] = entry_ns + extra_ns
        return extra_ns

    def _again(self, entry_ns: int, hold_ns: int) -> tuple[int, int]:
        """Leave without a mapping; the guest runs into the same fault again, if it is one."""
        return hold_ns, self._vcpu.enter(entry_ns + hold_ns + self._costs.enter_ns)
