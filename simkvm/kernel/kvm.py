"""One virtual machine as the host sees it (``struct kvm``) and everything its paths share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.guest.accesses import Accesses, Explicit
from simkvm.kernel import table_free
from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.cmpxchg_race import CmpxchgRaces, Loads
from simkvm.kernel.costs import Costs, FreeCosts
from simkvm.kernel.dirty_log import DirtyLog
from simkvm.kernel.dram import Dram
from simkvm.kernel.fault import CACHE_CAPACITY
from simkvm.kernel.file_memory import FileMemory
from simkvm.kernel.geometry import GEOMETRIES
from simkvm.kernel.host_memory import WRPROTECT, HostMemory
from simkvm.kernel.memslot import Refusal
from simkvm.kernel.memslots import Memslots
from simkvm.kernel.mmu import MMUS
from simkvm.kernel.mmu_notifier import MmuNotifier, Srcu, unmap_walk
from simkvm.kernel.qrwlock import QueuedRwlock
from simkvm.kernel.rcu import Rcu
from simkvm.kernel.remote_flush import Ipi
from simkvm.kernel.rmap import RmapLocks
from simkvm.kernel.sched import OwnCpus, Scheduler
from simkvm.kernel.split_cache import SplitCache
from simkvm.kernel.stage2 import AF, BLOCK, VALID, WRITE, Stage2, TableId
from simkvm.kernel.swappable import SwappableMemory
from simkvm.kernel.task import Task
from simkvm.kernel.tlb import TlbiPath
from simkvm.kernel.unmap import UnmapCosts, UnmapWalk
from simkvm.kernel.young_notifier import YoungCalls
from simkvm.observe.oracle import Oracle
from simkvm.observe.table_memory import TableMemory
from simkvm.scenario.access import Access, Phases, Populate, Trace
from simkvm.scenario.kernel import KernelVariant
from simkvm.scenario.machine import Machine
from simkvm.scenario.schema import Guest

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu
    from simkvm.kernel.fault import FaultPath
    from simkvm.kernel.pgdat import Pgdat


NOTHING: NDArray[np.int64] = np.empty(0, np.int64)
FREE = UnmapCosts(0, 0, 0, 0, 0, 0, 0)  #: of a walk whose time is accounted elsewhere


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
        remote_flush: TlbiPath | Ipi,
        memory: TableMemory,
        dram: Dram,
        break_lock: bool,
        block_bytes: int | None = None,
        logged: bool = False,
        pgdat: Pgdat | None = None,
    ) -> None:
        """``block_bytes``: the size of blocks, if the guest may have them and pages as well;
        ``logged``: whether its writes may be logged. ``pgdat``: the host's memory, if it is short.
        """
        memory_bytes = guest.memory or guest.vcpus * (guest.memory_per_vcpu or 0)
        leaf_bytes = guest.mapping if block_bytes is None else guest.page_size
        self.name = name
        self.env = env
        self.kernel = kernel
        self.rcu = rcu
        self.remote_flush = remote_flush
        self.memory = memory
        self.dram = dram
        #: x86 counts mapped leaves in one word of the VM (``kvm_update_page_stats``, v6.12).
        self.pages_stat = CacheLine(LineCosts.of(machine)) if kernel.arch == "x86" else None
        geometry = GEOMETRIES[kernel.arch](guest.page_size, guest.ipa_bits)
        self.pages = memory_bytes // guest.page_size
        self.leaves = memory_bytes // leaf_bytes
        self.leaf_pages = leaf_bytes // guest.page_size
        # Pieces of a huge page that was split are folios of a page.
        self.folio_leaves = max(1, guest.folio // guest.mapping)
        self.memslots = Memslots(self.leaves, guest.memslots)
        self.mmu = MMUS[kernel["mmu"]](kernel, guest.rmap_chain)
        self.costs = self.mmu.costs(Costs.of(machine, leaf_bytes, guest.page_size, guest.memslots))
        blocks = Costs.of(machine, block_bytes or leaf_bytes, guest.page_size, guest.memslots)
        self.block_faults = blocks.fault
        self._block_unmap_ns = blocks.unmap.leaf_ns
        sized = logged or block_bytes is not None
        self.pgdat = pgdat
        self.fault_path = self.mmu.sized_fault if sized else self.mmu.fault
        if pgdat is not None:
            self.fault_path = self.mmu.swap_fault
        self.kworkers: list[FaultPath] = []  #: that take pages in for vCPUs (async page faults)
        self.huge_pages = block_bytes == guest.mapping  #: the host backs it with huge pages
        self.stage2 = Stage2(geometry, guest.ipa_base, self.pages, leaf_bytes, block_bytes)
        self.mmu_lock = QueuedRwlock(
            env, self.costs.line, self.costs.handoff_ns, self.costs.next_ns
        )
        memory_of = (env, self.leaves, geometry.entries, self.costs.line)
        two_step = kernel["promotion"] == "two_step"
        self.host = HostMemory(*memory_of, two_step)
        if pgdat is not None:
            if guest.backing == "file":
                self.host = FileMemory(*memory_of, two_step, pgdat.pages, pgdat.drive)
            else:
                self.host = SwappableMemory(*memory_of, two_step, pgdat.pages, pgdat.swap)
        self.notifier = MmuNotifier(self, Srcu(env, self.costs.wakeup_ns))
        self.rmap = RmapLocks()
        self.oracle = Oracle(name)
        self.table_free = table_free.POLICIES[kernel["table_free"]]()
        self.collapse_free = table_free.COLLAPSE[kernel["collapse_free"]]()
        self.dirty_log = DirtyLog(self, machine)
        self._queue_callback = {"call_rcu": rcu.call_rcu, "call_rcu_hurry": rcu.call_rcu_hurry}[
            kernel["table_callback"]
        ]
        self.deferred_tlbi = (
            kernel["unmap_tlbi"] == "deferred" and machine.tlbirange and machine.fwb
        )
        self.keep_tables = kernel["unmap_tables"] == "keep"
        self.break_lock = break_lock  #: whether contention breaks the lock, if anything does
        self.software_af = not machine.hw_af
        #: Whether the lock-free calls of 2023 work here (``kvm_arch_has_test_clear_young``).
        self.test_clear_young = machine.hw_af or kernel["ageing_call"] != "bitmap"
        self.young_calls = YoungCalls()
        # x86 clears the accessed bit by an atomic AND that cannot fail, where there is one.
        swaps = kernel["ageing_lock"] == "none" and (kernel.arch == "arm64" or self.software_af)
        self.races = CmpxchgRaces(self.costs.ageing.cmpxchg_ns) if swaps else None
        #: Whether MGLRU walks page tables: on arm64 host and guest have the flag, or neither.
        self.walks_page_tables = machine.hw_af or machine.arch != "arm64"
        self.vcpus: list[Vcpu] = []
        self.accesses: Accesses = Explicit(self.vcpus)
        self.sched: Scheduler = OwnCpus()
        self.last_ran: dict[int, int] = {}  #: where CPUs are shared: which vCPU ran on each last
        self.in_ioctl: list[Event] = []  #: one for the end of each fault that no running vCPU takes
        # Shares of the memory may meet inside a block.
        meeting = self.leaf_pages > 1 or block_bytes is not None or not _apart(guest.access)
        self.shared = guest.vcpus > 1 and meeting
        #: Leaves that vCPUs plan to fault on, and who: only kept if vCPUs share memory.
        self.expected: dict[int, dict[int, Vcpu]] = {}
        self.installing: dict[int, int] = {}  # leaf table -> until when a fault installs it
        #: When each leaf was touched last, -1 for never; kept only if somebody asks for it.
        self.last_touch_ns: NDArray[np.int64] = np.empty(0, np.int64)
        self.page_bytes = geometry.page_bytes
        self.table_bytes = geometry.page_bytes
        self.entries = geometry.entries
        self.unmapped_pages = 0
        self.tables_allocated = 0
        self.tables_freed = 0
        self.tables_called_back = 0  #: tables whose callback has run
        self.tables_leaked = 0
        self.collapses = 0
        self.splits = 0
        self.alive = True  #: vCPUs may run
        self.refusals: list[Refusal] = []
        #: What the VMM does with a fault that was refused: (vCPU, when it would run again) -> when
        #: it does. None: it runs the vCPU again at once.
        self.user_exit: Callable[[Vcpu, int], int] | None = None
        self.tree_freed = False  #: the walk of its end is over
        self.split_cache = SplitCache(self, guest.teardown.split_cache if guest.teardown else 0)
        self.waiting: set[TableId] = set()  #: tables that wait for their callback
        self._pins = 0
        self._unpinned: Event | None = None
        memory.root(geometry.root_pages * self.table_bytes)
        self._take_table_pages(geometry.root_pages)

    def prepare_to_map_all(self, vcpus: int) -> None:
        """Before any guest is mapped: pages for memory caches of ``vcpus``, others for tables."""
        if self.pgdat is not None:
            self.pgdat.pages.take(vcpus * CACHE_CAPACITY)
            tables = sum(len(lower.counts) for _, lower, _, _ in self.stage2.steps)
            self.pgdat.pages.spoken_for += tables + len(self.host.present)
            self.pgdat.pages.to_map += self.leaves

    def map_all(self) -> None:
        """Have all of the memory mapped before the run begins, as far as the host has room."""
        self.host.map_all()
        self.host.huge[:] = self.huge_pages
        tables = self.stage2.map_all(WRITE, self.huge_pages)
        self._take_table_pages(len(tables))
        if self.pgdat is not None:
            self.pgdat.pages.spoken_for -= len(tables)
        self.tables_linked(tables, 0)
        if isinstance(self.host, SwappableMemory):
            for first, last in self.host.swapped_out():
                UnmapWalk(self.stage2, first, last, FREE, keep=True)
            self.stage2.clear_young(np.arange(self.leaves))

    def _take_table_pages(self, pages: int) -> None:
        if self.pgdat is not None:
            self.pgdat.pages.take(pages)

    @property
    def tlbi(self) -> TlbiPath:
        """The path of broadcast invalidations, for code that only arm64 has."""
        assert isinstance(self.remote_flush, TlbiPath)
        return self.remote_flush

    @property
    def ipi(self) -> Ipi:
        """Flushes by interrupt, for code that only x86 has."""
        assert isinstance(self.remote_flush, Ipi)
        return self.remote_flush

    def remember_touches(self) -> None:
        """Keep :attr:`last_touch_ns` from now on."""
        if not len(self.last_touch_ns):
            self.last_touch_ns = np.full(self.leaves, -1, np.int64)
        for vcpu in self.vcpus:
            vcpu.remember_touches(self.last_touch_ns)

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
        self._take_table_pages(-1)
        self.memory.freed(t_ns, self.table_bytes, deferred)
        self.oracle.freed(table, t_ns, deferred)

    def call_rcu(self, t_ns: int, cpu: int, table: TableId) -> None:
        """Leave ``table`` to a callback on ``cpu``."""
        self.memory.deferred(t_ns, self.table_bytes)
        self.waiting.add(table)
        self._queue_callback(t_ns, cpu, partial(self._rcu_callback, table))

    def _rcu_callback(self, table: TableId, t_ns: int) -> int:
        self.waiting.discard(table)
        cost_ns = self.table_free.callback(self, table, t_ns)
        self.tables_called_back += 1
        self.oracle.callback_done(table, t_ns)
        return cost_ns

    def call_rcu_for(
        self, t_ns: int, cpu: int, tables: Sequence[TableId], callback: Callable[[int], int]
    ) -> None:
        """Leave ``tables`` to one ``callback`` on ``cpu``, which returns what it costs."""
        self.memory.deferred(t_ns, len(tables) * self.table_bytes)
        self.waiting.update(tables)
        self._queue_callback(t_ns, cpu, partial(self._subtree_callback, tables, callback))

    def _subtree_callback(
        self, tables: Sequence[TableId], callback: Callable[[int], int], t_ns: int
    ) -> int:
        self.waiting.difference_update(tables)
        cost_ns = callback(t_ns)
        self.tables_called_back += len(tables)
        for table in tables:
            self.oracle.callback_done(table, t_ns)
        return cost_ns

    def leaked(self, table: TableId, t_ns: int) -> None:
        """``table`` waited for a callback that forgot it: its page is lost from ``t_ns`` on."""
        self.tables_leaked += 1
        self.memory.leaked(t_ns, self.table_bytes)

    def entry_locked(self, tables: Iterable[int], from_ns: int, until_ns: int) -> None:
        """Faults in these leaf tables meet an entry that is being changed, up to ``until_ns``."""
        kept = {table: end for table, end in self.installing.items() if end > from_ns}
        self.installing = kept | dict.fromkeys(tables, until_ns)

    def maps_blocks(self, leaf: int) -> bool:
        """Whether a fault on ``leaf`` maps a block: a huge page behind it, and no logging."""
        host = self.host
        if not host.fast_huge[leaf // host.entries] or self.dirty_log.logs(leaf):
            return False
        first, last = self.stage2.block_span(leaf)
        if self.memslots.crossed(first, last):
            return False  # ``fault_supports_stage2_huge_mapping``
        if self.stage2.block_leaves == host.entries:
            return True
        return host.all_huge(first, last)

    def host_faults(self) -> list[FaultPath]:
        """Who may fault on the host's mappings: the vCPUs, and kworkers in their place."""
        return [*(vcpu.fault for vcpu in self.vcpus), *self.kworkers]

    def refusal(self, leaf: int, write: bool) -> Refusal | None:
        """Why a fault on ``leaf`` goes to user space, if it does."""
        for refusal in self.refusals:
            if refusal.first <= leaf < refusal.last and (write or refusal.reads):
                return refusal
        return None

    def no_memslot(self, leaf: int) -> bool:
        """Whether ``leaf`` lies in a memslot that is invalid or gone."""
        refusal = self.refusal(leaf, write=False)
        return refusal is not None and refusal.reads

    def leaf_mapped(self, leaf: int, t_ns: int) -> None:
        """A fault mapped ``leaf`` at ``t_ns``: tell the vCPUs that were about to."""
        for vcpu in self.expected.pop(leaf, {}).values():
            vcpu.given(leaf, t_ns)

    def given(self, leaf: int, t_ns: int) -> None:
        """As :meth:`leaf_mapped`, for all that the page or block of ``leaf`` maps."""
        if self.stage2.is_block(leaf):
            self.block_mapped(*self.stage2.block_span(leaf), t_ns)
        else:
            self.leaf_mapped(leaf, t_ns)

    def block_mapped(self, first: int, last: int, t_ns: int) -> None:
        """As :meth:`leaf_mapped`, for all leaves that a block covers."""
        if len(self.expected) < last - first:
            meant = [leaf for leaf in self.expected if first <= leaf < last]
        else:
            meant = [leaf for leaf in range(first, last) if leaf in self.expected]
        for leaf in meant:
            self.leaf_mapped(leaf, t_ns)

    # -- ageing -------------------------------------------------------------------------------

    def huge_page(self, table: int) -> range | None:
        """The leaves of the host's huge page in the place of host table ``table``, if it is one.

        Empty if the huge page began in the place of an earlier table.
        """
        if not self.host.fast_huge[table]:
            return None
        huge = self._huge_around(table)
        return huge if huge.start == table * self.host.entries else range(0)

    def _huge_around(self, table: int) -> range:
        host, entries = self.host, self.host.entries
        first, last = self.stage2.block_span(table * entries)
        tables = range(first // entries, -(-last // entries))
        if len(tables) == 1 or not host.huge[tables.start : tables.stop].all():
            return range(table * entries, min((table + 1) * entries, self.leaves))
        return range(first, last)

    def huge_in_part(self, first: int, last: int) -> list[range]:
        """Huge pages that ``first`` up to ``last`` covers in part: one at either end."""
        entries, found = self.host.entries, []
        for table in sorted({first // entries, (last - 1) // entries}):
            if self.host.fast_huge[table]:
                huge = self._huge_around(table)
                if (first > huge.start or last < huge.stop) and huge not in found:
                    found.append(huge)
        return found

    def block_rights(self, leaf: int) -> int:
        """WRITE if the host lets the block of ``leaf`` be written to."""
        first, last = self.stage2.block_span(leaf)
        return 0 if (self.host.state[first:last] & WRPROTECT).any() else WRITE

    def clear_young(self, leaves: NDArray[np.int64], t_ns: int) -> None:
        """Ageing clears the accessed flags of ``leaves`` (distinct, young) at ``t_ns``."""
        self.stage2.clear_young(leaves)
        if self.software_af and len(leaves):
            self.accesses.cleared(leaves, t_ns)

    def age_lockless(self, batch: Loads, t_ns: int) -> NDArray[np.int64]:
        """A walk without lock from ``t_ns`` on comes by the leaves of ``batch``.

        Clears their accessed flags; returns those that were young. One whose compare-and-swap
        fails counts as young and stays as it is.
        """
        leaves = batch.leaves
        young = (self.stage2.leaf.entries[leaves] & (AF | VALID)) == (AF | VALID)
        failed = None  # nothing changes while a chain is locked
        if self.races is not None:
            failed = self.races.loaded(batch, young)
        seen: NDArray[np.int64] = leaves[young if failed is None else young | failed]
        self.clear_young(seen if failed is None else leaves[young & ~failed], t_ns)
        return seen

    def age_block_lockless(self, batch: Loads, t_ns: int) -> NDArray[np.int64]:
        """As :meth:`age_lockless`, for the one entry that maps the block of ``batch``'s leaf."""
        first, last = self.stage2.block_span(int(batch.leaves[0]))
        used = first + np.flatnonzero(self.stage2.young(first, last))
        failed = None
        if self.races is not None:
            failed = self.races.loaded(batch, np.array([len(used) > 0]))
        if failed is not None and failed[0]:
            return batch.leaves
        self.clear_young(used, t_ns)
        return used

    def flush_vmid(self, t_ns: int) -> int:
        """Invalidate all of the VM's translations at ``t_ns``; returns when that is done."""
        self.forget_vmid(t_ns)
        return self.flush_ns(t_ns, self.costs.tlbi_all_ns)

    def forget_vmid(self, t_ns: int) -> None:
        """What :meth:`flush_vmid` does to the vCPUs."""
        self.accesses.going(t_ns, 0, 0)
        self.accesses.flushed(t_ns, 0, 0)

    def leaf_changes(self, leaf: int, t_ns: int) -> None:
        """A fault is going to change ``leaf`` at ``t_ns``, if it is there and young."""
        if self.races is not None:
            young = self._young_entries(leaf, leaf + 1)
            self.races.stored(young, np.full(len(young), t_ns))

    def leaves_change(self, first: int, last: int, wanted: int = VALID) -> NDArray[np.int64]:
        """Young entries with the flags ``wanted`` that a walk over these leaves will store to."""
        if self.races is None:
            return NOTHING
        return self._young_entries(first, last, wanted)

    def leaves_changed(self, young: NDArray[np.int64], t_ns: int, elapsed_ns: int) -> None:
        """The walk was made from ``t_ns`` on; stores are spread evenly over it."""
        if self.races is not None:
            order = np.arange(1, len(young) + 1)
            self.races.stored(young, t_ns + order * elapsed_ns // (len(young) + 1))

    def _young_entries(self, first: int, last: int, wanted: int = VALID) -> NDArray[np.int64]:
        """Of the leaves' entries those that are young; a block is where its first page is."""
        stage2, low, high = self.stage2, first, last
        if stage2.blocks is not None:
            low, high = stage2.block_span(first)[0], stage2.block_span(last - 1)[1]
        part = stage2.leaf.entries[low:high]
        young = low + np.flatnonzero((part & (wanted | AF)) == (wanted | AF))
        if stage2.blocks is None:
            return young
        block = (stage2.leaf.entries[young] & BLOCK) != 0
        young = young[block | ((young >= first) & (young < last))]
        block = (stage2.leaf.entries[young] & BLOCK) != 0
        return np.unique(np.where(block, young - young % stage2.block_leaves, young))

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
            block_ns=self._block_unmap_ns,
        )

    def unmap_chunk(self, cpu: int, t_ns: int, first: int, last: int) -> int:
        """Unmap the leaves ``first`` up to ``last`` from ``t_ns`` on, under the write lock.

        Returns when the walk and its invalidation are done.
        """
        self.accesses.going(t_ns, first, last)
        young = self.leaves_change(first, last)
        walk, end = unmap_walk(self, first, last, t_ns)
        self.leaves_changed(young, t_ns, walk.elapsed_ns)
        for table, at_ns in zip(walk.tables, walk.unlinked_ns, strict=True):
            self.oracle.unlinked(table, t_ns + at_ns, self.stage2.entries_in(table))
            self.table_free.unlinked(self, table, t_ns + at_ns, cpu)
        self.unmapped_pages += walk.pages * self.leaf_pages
        if self.deferred_tlbi or walk.leaves or walk.tables:
            self.accesses.flushed(t_ns, first, last)
        return end

    def flush_ns(self, t_ns: int, alone_ns: int | None = None) -> int:
        """One invalidation issued at ``t_ns``: when it is done, ``alone_ns`` later at best."""
        if isinstance(self.remote_flush, TlbiPath):
            return self.remote_flush.flush(t_ns, alone_ns)
        now = int(self.env.now)  # whom to interrupt is not known any earlier
        return t_ns + self.remote_flush.flush(self, now) - now

    def forget_translations(self, t_ns: int) -> None:
        """An invalidation at ``t_ns`` empties the vCPUs' TLBs; no mapping goes."""
        for vcpu in self.vcpus:
            vcpu.catch_up(t_ns)
            vcpu.forget_translations()

    @contextmanager
    def mappings_going(self, t_ns: int) -> Iterator[None]:
        """Around a change that takes rights or mappings away, and translations with them."""
        self.accesses.going(t_ns, 0, self.leaves)
        yield
        self.accesses.flushed(t_ns, 0, self.leaves)

    def zap_leaves(self, t_ns: int, first: int, last: int) -> int:
        """Zap the leaves ``first`` up to ``last`` at ``t_ns``; tables stay, nothing is flushed.

        Returns how many pages they mapped, in units of a leaf.
        """
        self.accesses.going(t_ns, first, last)
        removed = UnmapWalk(self.stage2, first, last, FREE, keep=True).pages
        if removed:
            self.accesses.unmapped(t_ns, first, last)
        return removed

    def lock_break(self, task: Task, t_ns: int) -> bool:
        """Whether ``cond_resched_rwlock_write`` lets go at ``t_ns``.

        For contention, where the kernel is preemptible, and for another thread that is to run.
        """
        return task.need_resched or (self.break_lock and self.mmu_lock.contended)

    def let_others_run(self, task: Task, t_ns: int) -> Generator[Event, Any, int]:
        """``cond_resched()`` at ``t_ns``, with no lock held; returns when ``task`` goes on."""
        return (yield from self.sched.checkpoint(task, t_ns + self.costs.ageing.resched_ns))

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
