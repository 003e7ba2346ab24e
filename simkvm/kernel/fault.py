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
from typing import TYPE_CHECKING, Any, Final, Protocol

from simpy import Event

from simkvm.kernel.host_change import arrival, copies, usable
from simkvm.kernel.host_memory import MIGRATION, OWN, PRESENT, WRPROTECT, YOUNG
from simkvm.kernel.mmap_lock import LOCK, UNLOCK
from simkvm.kernel.sites import FAULT
from simkvm.kernel.stage2 import VALID, WRITE, TableId
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

#: Objects in a full memory cache (``KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE`` on arm64).
CACHE_CAPACITY: Final = 40


class Faulting(Protocol):
    """Who takes a fault: a vCPU, or a call of KVM_PRE_FAULT_MEMORY."""

    def mapped(self, t_ns: int) -> int:
        """The leaf is mapped and the guest goes on at ``t_ns``; returns when it is back."""

    def enter(self, t_ns: int) -> int:
        """As :meth:`mapped`, without a mapping: the fault is about to be taken again."""

    def forget_translations(self) -> None:
        """The CPU's own translations of the guest were invalidated."""


class FaultPath:
    """The fault handler of one vCPU, with its memory cache."""

    def __init__(self, kvm: Kvm, vcpu: Faulting, task: Task) -> None:
        self._kvm = kvm
        self._vcpu = vcpu
        self._task = task
        self._env = kvm.env
        self._costs = kvm.costs.fault
        lock = kvm.mmu_lock
        #: How this kernel's fault takes ``mmu_lock``; its section is :meth:`locked`.
        self.take_lock = lock.write if kvm.kernel["fault_lock"] == "write" else lock.read
        self.cache_minimum = kvm.stage2.geometry.cache_minimum
        self.exit_ns = kvm.costs.fault.exit_ns
        self._mmap_lock = kvm.host.mmap_lock
        self._host_state = kvm.host.fast
        self._leaf_state = kvm.stage2.leaf.fast
        self._slots = kvm.memslots
        self.slotted = len(kvm.memslots) > 1
        self._slot = 0  #: memslot that this vCPU used last (``last_used_slot``)
        self.cached = 0  #: table pages in the memory cache
        self.lacking = False  #: whether the host page has to be installed
        self.not_present = False  #: whether a kworker is to do that (async page fault)
        self.ptl_table = -1  #: host table whose lock the fault in flight takes,
        self.ptl_until_ns = 0  #: and until when
        self._leaf = 0
        self._write = False
        self._noted_ns = 0
        self._hit_ns = kvm.costs.fault.gup_hit_ns  #: GUP for a page that is there,
        self._alloc_ns = kvm.costs.fault.gup_alloc_ns  #: and for one that is not,
        self._fill_bytes = kvm.leaf_pages * kvm.page_bytes  #: which is cleared
        self._dram = kvm.dram
        self._pages_stat = kvm.pages_stat
        self.faults = 0
        self.retries = 0
        self.user_exits = 0  #: faults that only user space could resolve

    def fill_cache(self) -> None:
        """The guest has run before: its vCPUs have their memory caches."""

    def arrival_ns(self, exit_ns: int) -> int:
        """When a guest that exits at ``exit_ns`` comes to ``mmap_lock``, its cache topped up."""
        if self.cached < self.cache_minimum:
            return exit_ns + self.exit_ns + (CACHE_CAPACITY - self.cached) * self._costs.object_ns
        return exit_ns + self.exit_ns

    def slot_ns(self, leaf: int) -> int:
        """What finding the memslot of ``leaf`` takes if this vCPU did not use it last."""
        return 0 if self._slots.of(leaf) == self._slot else self._costs.slot_miss_ns

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """From ``mmap_lock``, reached at ``t_ns``, to a host page; returns when ``mmu_lock`` is.

        A page that is not there takes GUP's slow path, under ``mmap_lock`` taken again and, at
        its end, the lock of the host's table: :meth:`install` has to follow then.
        """
        kvm, costs = self._kvm, self._costs
        self.faults += 1
        if self.slotted:
            self._slot = self._slots.of(leaf)
        if self.cached < self.cache_minimum:
            self.cached = CACHE_CAPACITY
        self._leaf = leaf
        self._write = write
        state = self._host_state[leaf]
        if (state & OWN or (state and not write)) and (state < MIGRATION or usable(state, write)):
            self.lacking = False
            noted = self._mmap_lock.visit(self._task.cpu.id, t_ns, LOCK + UNLOCK) + costs.vma_ns
            self._noted_ns = noted
            return noted + self._hit_ns
        self.lacking = True
        noted = self._mmap_lock.visit(self._task.cpu.id, t_ns, LOCK + UNLOCK + LOCK) + costs.vma_ns
        self._noted_ns = noted
        t_ns = self._resolve(t_ns, noted, state, write)
        self.ptl_until_ns = t_ns
        self.ptl_table = leaf // kvm.host.entries
        self._mmap_lock.post(self._task.cpu.id, t_ns)
        return t_ns

    def _resolve(self, asked_ns: int, t_ns: int, state: int, write: bool) -> int:
        """GUP's slow path from ``t_ns`` on: returns its end, by when the page has its content.

        ``asked_ns``: now, when the fault comes to ``mmap_lock``.
        """
        end_ns = t_ns + self._gup_ns(state, write)
        if write and (state < MIGRATION or copies(self._kvm.host, state)):
            return self._dram.write(asked_ns, end_ns, self._fill_bytes)
        return end_ns

    def _gup_ns(self, state: int, write: bool) -> int:
        """GUP's slow path, where the host's entry ``state`` does not do for the access."""
        if not state:
            return self._alloc_ns if write else self._costs.gup_zero_ns
        if not write:
            return self._costs.gup_zero_ns
        return self._costs.gup_copy_ns if state < MIGRATION else self._settling_ns(state)

    def _settling_ns(self, state: int) -> int:
        """GUP's slow path for a write to a page that is there, but not to be written like this."""
        return self._costs.gup_cow_ns if copies(self._kvm.host, state) else self._costs.gup_zero_ns

    def refused(self, t_ns: int, leaf: int, write: bool) -> int | None:
        """Whether the fault that comes to ``mmap_lock`` at ``t_ns`` is none of KVM's.

        None, or when the guest goes on after a visit to user space: no memory slot there is MMIO,
        a write to a mapping that is read-only is -EFAULT. The VMM tries again unless it says else
        (``user_exit`` of the VM).
        """
        refusal = self._kvm.refusal(leaf, write)
        if refusal is None:
            return None
        costs = self._costs
        self.faults += 1
        self.user_exits += 1
        if not refusal.reads:  # found out by GUP, not from the memory slots
            t_ns = self._mmap_lock.visit(self._task.cpu.id, t_ns, LOCK + UNLOCK + LOCK)
            t_ns += costs.vma_ns + costs.gup_hit_ns
        if self.cached < self.cache_minimum:
            self.cached = CACHE_CAPACITY
        t_ns += costs.user_ns
        self._task.cpu.enter_user(t_ns - costs.user_ns, t_ns)
        return t_ns + costs.enter_ns

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """At ``t_ns``, the end of GUP's slow path: the host maps the page, and the rest if any.

        The rest is to wait for ageing, which has the host's table locked, or to take the zero page
        back before its copy is there: an invalidation of its own.
        """
        host, leaf = self._kvm.host, self._leaf
        held = None
        wanted_ns = t_ns - self._costs.ptl_ns
        table = self.ptl_table
        if table in host.locked or host.left.get(table, 0) > wanted_ns:
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
        while kvm.host.fast[leaf] & MIGRATION:
            kvm.sched.sleep(self._task, t_ns)
            moved: int = yield arrival(kvm.host, self._env, leaf)
            t_ns = max(t_ns, moved + kvm.costs.wakeup_ns)
            t_ns = yield from kvm.sched.wake(self._task, t_ns)
            t_ns = yield from reach(self._env, t_ns)
        if self._write and copies(kvm.host, kvm.host.fast[leaf]):
            t_ns = yield from kvm.notifier.split_huge(self._task, t_ns, leaf, leaf + 1)
            t_ns = yield from kvm.notifier.invalidate(self._task, t_ns, leaf, leaf + 1)
            t_ns = yield from reach(self._env, t_ns)
        self._map_in_host(leaf)
        return t_ns

    def _map_in_host(self, leaf: int) -> None:
        self._kvm.host.install(leaf, self._write)

    def holds_table(self, table: int, t_ns: int) -> bool:
        """Whether this fault holds the lock of host table ``table`` at ``t_ns``."""
        until = self.ptl_until_ns
        return self.ptl_table == table and until - self._costs.ptl_ns <= t_ns < until

    def take(self, t_ns: int) -> int | Event:
        """Take ``mmu_lock`` at ``t_ns``; returns what the lock's methods do."""
        return self.take_lock(t_ns, self._task.cpu.id, FAULT, self.locked)

    def gives_up_ns(self, entry_ns: int) -> int:
        """How long a fault that has to be taken again holds the lock; -1 if it goes on."""
        kvm, leaf = self._kvm, self._leaf
        notifier = kvm.notifier
        if not self._host_state[leaf] or (
            (notifier.in_progress or notifier.moved_ns > self._noted_ns)
            and notifier.stale(leaf, self._noted_ns)
        ):
            # Without a host page: zapped since the look-up, and the invalidation was noted then.
            self.retries += 1
            return self._costs.retry_ns
        if kvm.installing and kvm.installing.get(kvm.stage2.leaf_table(leaf), 0) > entry_ns:
            return self._beaten_ns()
        return -1

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """The section under ``mmu_lock``: returns the hold and when the host is needed next."""
        given_up_ns = self.gives_up_ns(entry_ns)
        if given_up_ns >= 0:
            return self._again(entry_ns, given_up_ns)
        kvm, costs, leaf = self._kvm, self._costs, self._leaf
        state, stage2 = self._host_state[leaf], kvm.stage2
        need = VALID | WRITE if self._write else VALID
        if self._leaf_state[leaf] & need == need:
            return self._again(entry_ns, costs.hold_ns)  # another vCPU was first
        hold = costs.hold_ns
        if kvm.races is not None and self._leaf_state[leaf]:
            kvm.leaf_changes(leaf, entry_ns + hold)
        made = stage2.map_leaf(leaf, WRITE if state & OWN and state < WRPROTECT else 0)
        if made:
            hold += self._linked(made, entry_ns)
        if self._pages_stat is not None:
            hold += self._counted_ns(entry_ns + costs.hold_ns)
        if kvm.expected:
            kvm.leaf_mapped(leaf, entry_ns)
        return hold, self._vcpu.mapped(entry_ns + hold + costs.enter_ns)

    def _counted_ns(self, t_ns: int) -> int:
        """x86 counts a leaf that it mapped at ``t_ns``: how long that takes.

        In order of entry to ``mmu_lock``: new tables on the way, which some faults make and most
        do not, come after it in the hold.
        """
        return (
            0
            if self._pages_stat is None
            else self._pages_stat.serve(self._task.cpu.id, t_ns) - t_ns
        )

    def _linked(self, made: list[TableId], entry_ns: int) -> int:
        """New tables on the way to the leaf: returns what they add to the hold."""
        kvm, extra_ns = self._kvm, len(made) * self._costs.table_ns
        self.cached -= len(made)
        kvm.tables_linked(made, entry_ns)
        # An entry is locked only between breaking the old one and making the new.
        kvm.entry_locked([kvm.stage2.leaf_table(self._leaf)], entry_ns, entry_ns + extra_ns)
        return extra_ns

    def _beaten_ns(self) -> int:
        """Another fault is breaking or making an entry on this path: how long finding out takes."""
        return self._costs.hold_ns

    def _again(self, entry_ns: int, hold_ns: int) -> tuple[int, int]:
        """Leave without a mapping; the guest runs into the same fault again, if it is one."""
        return hold_ns, self._vcpu.enter(entry_ns + hold_ns + self._costs.enter_ns)
