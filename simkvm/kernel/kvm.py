"""One virtual machine as the host sees it (``struct kvm``) and everything its paths share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from simpy import Environment, Event

from simkvm.kernel import table_free
from simkvm.kernel.costs import Costs, FreeCosts
from simkvm.kernel.cpu import Cpu
from simkvm.kernel.dirty_logging import DirtyLog
from simkvm.kernel.geometry import Geometry
from simkvm.kernel.host_memory import HostMemory
from simkvm.kernel.mmu_notifier import MmuNotifier, Srcu, unmap_walk
from simkvm.kernel.qrwlock import QueuedRwlock
from simkvm.kernel.rcu import Rcu
from simkvm.kernel.stage2 import Stage2, TableId
from simkvm.kernel.tlb import TlbiPath
from simkvm.kernel.unmap import UnmapCosts
from simkvm.observe.oracle import Oracle
from simkvm.observe.table_memory import TableMemory
from simkvm.scenario.access import Access, Phases, Populate, Trace
from simkvm.scenario.kernel import KernelVariant
from simkvm.scenario.machine import Machine
from simkvm.scenario.schema import Guest

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu


class Kvm:
    """A guest: stage-2 table, lock, notifier, host memory, and the policies of its kernel."""

    def __init__(
        self,
        name: str,
        guest: Guest,
        env: Environment,
        machine: Machine,
        kernel: KernelVariant,
        rcu: Rcu,
        tlbi: TlbiPath,
        memory: TableMemory,
        break_lock: bool,
    ) -> None:
        memory_bytes = guest.memory or guest.vcpus * (guest.memory_per_vcpu or 0)
        self.name = name
        self.env = env
        self.kernel = kernel
        self.rcu = rcu
        self.tlbi = tlbi
        self.memory = memory
        geometry = Geometry(guest.page_size, guest.ipa_bits)
        self.pages = memory_bytes // guest.page_size
        self.leaves = memory_bytes // guest.mapping
        self.leaf_pages = guest.mapping // guest.page_size
        self.folio_leaves = max(1, guest.folio // guest.mapping)
        self.costs = Costs.of(machine, guest.mapping, guest.page_size)
        self.stage2 = Stage2(geometry, guest.ipa_base, self.pages, guest.mapping)
        self.mmu_lock = QueuedRwlock(
            env, self.costs.line, self.costs.handoff_ns, self.costs.next_ns
        )
        self.host = HostMemory(
            env, self.leaves, geometry.entries, self.costs.line, kernel["promotion"] == "two_step"
        )
        self.notifier = MmuNotifier(self, Srcu(env, self.costs.wakeup_ns))
        self.oracle = Oracle(name)
        self.table_free = table_free.POLICIES[kernel["table_free"]]()
        self.deferred_tlbi = (
            kernel["unmap_tlbi"] == "deferred" and machine.tlbirange and machine.fwb
        )
        self._break_lock = break_lock
        self.vcpus: list[Vcpu] = []
        # Shares of the memory may meet inside a block.
        self.shared = guest.vcpus > 1 and (self.leaf_pages > 1 or not _apart(guest.access))
        #: Leaves that vCPUs plan to fault on, and who: only kept if vCPUs share memory.
        self.expected: dict[int, dict[int, Vcpu]] = {}
        self.installing: dict[int, int] = {}  # leaf table -> until when a fault installs it
        self.last_touch_ns = np.full(self.leaves, -1, np.int64)
        self.fast_last_touch = memoryview(self.last_touch_ns)  # type: ignore[arg-type]  # a buffer
        self.table_bytes = geometry.page_bytes
        self.entries = geometry.entries
        #: The dirty-logging ioctls, if this VM has them.
        self.dirty_log: DirtyLog | None = None
        self.unmapped_leaves = 0
        self.tables_allocated = 0
        self.tables_freed = 0
        self.alive = True  #: vCPUs may run
        self._pins = 0
        self._unpinned: Event | None = None
        memory.root(geometry.root_pages * self.table_bytes)

    # -- tables -------------------------------------------------------------------------------

    @property
    def free_costs(self) -> FreeCosts:
        """Costs of freeing a table page."""
        return self.costs.free

    def tables_linked(self, tables: list[TableId], t_ns: int) -> None:
        """A fault linked ``tables`` at ``t_ns``."""
        self.tables_allocated += len(tables)
        self.oracle.allocated(tables, t_ns)
        self.memory.linked(t_ns, len(tables) * self.table_bytes)

    def table_reported_free(self, t_ns: int) -> None:
        """The statistics drop a table at ``t_ns``."""
        self.memory.unreported(t_ns, self.table_bytes)

    def table_freed(self, table: TableId, t_ns: int, deferred: bool) -> None:
        """The page of ``table`` went back to the allocator at ``t_ns``."""
        self.tables_freed += 1
        self.memory.freed(t_ns, self.table_bytes, deferred)
        self.oracle.freed(table, t_ns, deferred)

    def call_rcu(self, t_ns: int, cpu: int, table: TableId) -> None:
        """Leave ``table`` to a callback on ``cpu``."""
        self.memory.deferred(t_ns, self.table_bytes)
        self.rcu.call_rcu(t_ns, cpu, partial(self._rcu_callback, table))

    def _rcu_callback(self, table: TableId, t_ns: int) -> int:
        return self.table_free.callback(self, table, t_ns)

    def leaf_mapped(self, leaf: int, t_ns: int) -> None:
        """A fault mapped ``leaf`` at ``t_ns``: tell the vCPUs that were about to."""
        for vcpu in self.expected.pop(leaf, {}).values():
            vcpu.given(leaf, t_ns)

    # -- unmapping ----------------------------------------------------------------------------

    def unmap_costs(self, t_ns: int) -> UnmapCosts:
        """Costs of a walk that starts at ``t_ns``, by how busy the invalidation path is."""
        steps = self.costs.unmap
        flush_ns = self.tlbi.each_ns(t_ns)
        return UnmapCosts(
            visit_ns=steps.visit_ns,
            descend_ns=steps.descend_ns,
            table_visit_ns=steps.table_visit_ns,
            leaf_ns=steps.leaf_ns,
            leaf_flush_ns=0 if self.deferred_tlbi else flush_ns,
            table_flush_ns=flush_ns,
            table_free_ns=self.table_free.under_lock_ns(self.costs.free),
        )

    def unmap_chunk(self, cpu: int, t_ns: int, first: int, last: int) -> int:
        """Unmap the leaves ``first`` up to ``last`` from ``t_ns`` on, under the write lock.

        Returns when the walk and its invalidation are done.
        """
        for vcpu in self.vcpus:
            vcpu.catch_up(t_ns)
        walk, end = unmap_walk(self, first, last, t_ns)
        for table, at_ns in zip(walk.tables, walk.unlinked_ns, strict=True):
            self.oracle.unlinked(table, t_ns + at_ns, self.stage2.entries_in(table))
            self.table_free.unlinked(self, table, t_ns + at_ns, cpu)
        self.unmapped_leaves += walk.leaves
        if self.deferred_tlbi or walk.leaves or walk.tables:
            for vcpu in self.vcpus:
                vcpu.flushed(t_ns)
        return end

    def lock_break(self, cpu: Cpu, t_ns: int) -> bool:
        """Whether ``cond_resched_rwlock_write`` lets go at ``t_ns``.

        Nobody else runs on the CPUs of the model's actors, so only contention can ask for it.
        """
        return self._break_lock and self.mmu_lock.contended

    def zap_host(self, t_ns: int, first: int, last: int) -> int:
        """Remove the host's mappings of these leaves from ``t_ns`` on; returns when it is done."""
        return t_ns + self.host.zap(first, last) * self.costs.unmap.host_page_ns

    def path_at(self, leaf: int, t_ns: int) -> frozenset[TableId]:
        """Tables, root included, that a walker without lock goes through at ``t_ns``."""
        return self.oracle.still_linked(self.stage2.path(leaf), self.stage2.places(leaf), t_ns)

    # -- the owner's address space ------------------------------------------------------------

    def pin(self) -> None:
        """A walker holds the address space (``mmget``): it cannot be torn down meanwhile."""
        self._pins += 1

    def unpin(self, t_ns: int) -> None:
        """The walker lets go at ``t_ns``."""
        self._pins -= 1
        if not self._pins and self._unpinned is not None:
            waiting, self._unpinned = self._unpinned, None
            waiting._ok = True
            waiting._value = None
            self.env.schedule(waiting, delay=max(0, t_ns - int(self.env.now)))

    def unpinned(self) -> Event | None:
        """None if nobody holds the address space, else the event of the last one letting go."""
        if not self._pins:
            return None
        if self._unpinned is None:
            self._unpinned = Event(self.env)
        return self._unpinned


def _apart(access: Access) -> bool:
    """Whether the vCPUs of a guest that does this never touch the same page."""
    if isinstance(access, Phases):
        return all(_apart(phase) for phase in access.phases)
    return isinstance(access, Populate | Trace)
