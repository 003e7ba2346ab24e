"""A stage-2 fault on a host whose memory can run out: it may have to wait for a page.

Source: mm/memory.c (``do_anonymous_page``, ``do_swap_page``), v6.12. A page that is not there needs
one that is free: the allocation may reclaim. A swapped page is read; while it is read its folio is
locked, and who else comes for it waits. One that is still in the swap cache is just mapped again.

Whatever had to be waited for, the host's entry is looked at again, under its table's lock, before
it is changed (``pte_same``): if somebody was quicker the page is given back and GUP begins anew.

KVM looked at the invalidation sequence before all that (``mmu_invalidate_seq``): if anything of the
VM was taken back meanwhile, which under pressure is likely, the fault is taken a second time. Pages
for the vCPU's memory cache are allocated before that look.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.fault import CACHE_CAPACITY, Faulting, FaultPath
from simkvm.kernel.host_memory import OWN, WRPROTECT, YOUNG
from simkvm.kernel.swappable import CACHED, SLOT, SwappableMemory
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


class SwapFaultPath(FaultPath):
    """The fault handler of one vCPU under memory pressure."""

    def __init__(self, kvm: Kvm, vcpu: Faulting, task: Task) -> None:
        super().__init__(kvm, vcpu, task)
        assert isinstance(kvm.host, SwappableMemory)
        assert kvm.pgdat is not None
        self._host: SwappableMemory = kvm.host
        self._pgdat = kvm.pgdat
        #: GUP marks it once, and so does arm64 (kvm_set_pfn_accessed()).
        self._marks = 2 if kvm.kernel.arch == "arm64" else 1
        self.in_flight = 0  #: pages that this fault has allocated and nobody maps yet
        self.asynchronous = False  #: whether a kworker may wait for the page in its place
        self._owed = 0  #: pages for the memory cache that only reclaim can give

    def fill_cache(self) -> None:
        """As :meth:`FaultPath.fill_cache`: its pages were taken before any guest was mapped."""
        self.cached = CACHE_CAPACITY

    def free_cache(self) -> None:
        """The VM is gone, and its vCPU with it."""
        self._pgdat.pages.put(self.cached)
        self.cached = 0

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """As :meth:`FaultPath.look_up`; pages for the memory cache are taken here, if there are."""
        cached = self.cached
        self._owed = CACHE_CAPACITY - cached if cached < self.cache_minimum else 0
        if self._owed and self._pgdat.pages.quickly(t_ns, self._owed):
            cached, self._owed = CACHE_CAPACITY, 0
        t_ns = super().look_up(t_ns, leaf, write)
        self.cached = cached
        if self._owed:
            self.lacking = True
        if self.lacking:
            self.ptl_table = -1  # not before the page is there
        return t_ns

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """As :meth:`FaultPath.locked`: GUP and KVM have marked the page accessed by then."""
        self._host.lru.accessed(self._leaf, self._marks)  # type: ignore[attr-defined]
        return super().locked(entry_ns)

    def _resolve(self, asked_ns: int, t_ns: int, state: int, write: bool) -> int:
        """GUP's slow path begins: :meth:`install` is the rest of it."""
        return t_ns

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """From the look-up of the VMA to a host page that is mapped."""
        return self._bring_in(t_ns)

    def _bring_in(self, t_ns: int) -> Steps:
        """GUP: faults of the host until its page can be had as the guest wants it."""
        host, leaf = self._host, self._leaf
        t_ns = yield from reach(self._env, t_ns)
        if self._owed:
            t_ns = yield from self._top_up(t_ns)
        rest_ns = self._hit_ns  # somebody else may have brought it in
        while self._kvm.alive and not self._hopeless():
            if self.asynchronous and self._would_wait():
                self.not_present = True
                return t_ns
            if host.folio_locked(leaf):
                t_ns = yield from self._wait_for_folio(t_ns)
                continue
            state, swap = host.fast[leaf], host.fast_swap[leaf]
            if state and (not self._write or (state & OWN and not state & WRPROTECT)):
                return t_ns + rest_ns
            rest_ns = 0
            t_ns = yield from self._handle_fault(t_ns, state, swap)
        return t_ns

    def _would_wait(self) -> bool:
        """Whether the page has to be read, or is in the hands of eviction (GUP with FOLL_NOWAIT).

        A synchronous device leaves nothing to wait for: the vCPU reads the page itself.
        """
        host, leaf = self._host, self._leaf
        if host.fast[leaf] or not host.fast_swap[leaf] & SLOT:
            return False
        if host.fast_swap[leaf] & CACHED:
            return host.folio_locked(leaf)
        assert host.device is not None
        return not host.device.synchronous

    def _hopeless(self) -> bool:
        """Whether KVM has given the fault up before it looked for a page."""
        return False

    def _top_up(self, t_ns: int) -> Steps:
        """Reclaim for the memory cache, before KVM notes the sequence."""
        began_ns = t_ns
        t_ns = yield from self._allocate(t_ns, self._owed)
        self.cached += self.in_flight
        self.in_flight = self._owed = 0
        self._noted_ns += t_ns - began_ns
        return t_ns

    def _wait_for_folio(self, t_ns: int) -> Steps:
        """Somebody reads the page in, or is about to evict it: sleep until the folio is free.

        That is a stall (PSI) if it went a short time ago (``folio_wait_bit_common``: a folio of the
        working set that is not up to date).
        """
        sched, thrashing = self._kvm.sched, self._leaf in self._host.thrashing
        sched.sleep(self._task, t_ns)
        at_ns: int = yield self._host.folio_unlocked(self._leaf)
        woken_ns = max(t_ns, at_ns + self._kvm.costs.wakeup_ns)
        woken_ns = yield from reach(self._env, woken_ns)
        woken_ns = yield from sched.wake(self._task, woken_ns)
        if thrashing:
            self._pgdat.stalled(t_ns, woken_ns)
        return woken_ns

    def _beaten_ns(self) -> int:
        """As :meth:`FaultPath._beaten_ns`; a table that is freed is a page of the host's."""
        cached = self.cached
        took_ns = super()._beaten_ns()
        self._pgdat.pages.put(cached - self.cached)
        return took_ns

    # -- one fault of the host ------------------------------------------------------------------

    def _handle_fault(self, t_ns: int, state: int, swap: int) -> Steps:
        """``handle_pte_fault``: the host's entry was ``state`` and ``swap`` when it was read."""
        host, leaf = self._host, self._leaf
        if host.lacks_table(leaf):
            t_ns = yield from self._table_page(t_ns)
            if not self._same(state, swap):  # it is read when there is a table
                return t_ns
        if not state and (swap & SLOT or self._write):
            if not host.trylock_folio(leaf):
                return t_ns
            t_ns = yield from self._new_page(t_ns, state, swap)
            host.unlock_folio(leaf, t_ns)
        elif state & OWN:
            if not host.trylock_folio(leaf):  # eviction leaves it alone meanwhile
                return t_ns
            t_ns = yield from self._reuse(t_ns, state, swap)
            host.unlock_folio(leaf, t_ns)
        elif state:
            t_ns = yield from self._copy(t_ns, state, swap)
        else:
            t_ns = yield from self._lock_table(t_ns + self._costs.gup_zero_ns)
            if self._same(state, swap):
                host.install(leaf, own=False)
        return t_ns

    def _table_page(self, t_ns: int) -> Steps:
        """The host's own table for the leaf, unless somebody is faster (``__pte_alloc``)."""
        t_ns = yield from self._allocate(t_ns)
        if self._kvm.alive and self._host.lacks_table(self._leaf):
            self._host.table_linked(self._leaf)
            self.in_flight = 0
        else:
            self._give_back()
        return t_ns

    def _reuse(self, t_ns: int, state: int, swap: int) -> Steps:
        """A write to a page of its own that is write-protected (``wp_page_reuse``)."""
        t_ns = yield from self._lock_table(t_ns + self._gup_ns(state, self._write))
        if self._same(state, swap):
            self._host.install(self._leaf, own=True)
            self._host.written(self._leaf)
        return t_ns

    def _copy(self, t_ns: int, state: int, swap: int) -> Steps:
        """A write to the zero page, or to one of KSM's (``wp_page_copy``)."""
        kvm, host, leaf = self._kvm, self._host, self._leaf
        t_ns = yield from self._allocate(t_ns)
        end_ns = t_ns + self._gup_ns(state, write=True)
        t_ns = yield from self._lock_table(kvm.dram.write(t_ns, end_ns, self._fill_bytes))

        def change(at_ns: int, first: int, last: int) -> int:
            if self._same(state, swap):
                host.install(leaf, own=True)
                self._pgdat.vmstat.first_faults += 1
                self.in_flight = 0
            return at_ns

        t_ns = yield from kvm.notifier.invalidate(self._task, t_ns, leaf, leaf + 1, change=change)
        self._give_back()
        return t_ns

    def _new_page(self, t_ns: int, state: int, swap: int) -> Steps:
        """A page from swap, from the swap cache, or a fresh one; its folio is locked."""
        kvm, host, leaf, vmstat = self._kvm, self._host, self._leaf, self._pgdat.vmstat
        if swap & CACHED:
            t_ns += self._hit_ns + self._costs.ptl_ns
        else:
            t_ns = yield from self._allocate(t_ns)
            if swap & SLOT:
                t_ns = yield from self._swap_in(t_ns)
            else:
                t_ns = kvm.dram.write(t_ns, t_ns + self._alloc_ns, self._fill_bytes)
        t_ns = yield from self._lock_table(t_ns)
        if not self._same(state, swap):
            self._give_back()
            return t_ns
        host.install(leaf, own=True)
        self.in_flight = 0
        if swap & CACHED:
            vmstat.swap_cache_hits += 1
            if self._write:
                host.written(leaf)
        elif swap & SLOT:
            host.swapped_in(leaf, self._write)
        else:
            vmstat.first_faults += 1
        if host.fast_swap[leaf] & SLOT and not self._write:
            host.fast[leaf] |= WRPROTECT  # a page in the swap cache is mapped read-only
        return t_ns

    def _allocate(self, t_ns: int, pages: int = 1) -> Steps:
        kvm = self._kvm
        began_ns = t_ns
        alloc = self._pgdat.pages.allocate
        t_ns, got = yield from alloc(self._task, t_ns, lambda: kvm.alive, pages)
        self.in_flight = pages if got else 0
        self._pgdat.stalled(began_ns, t_ns)
        return t_ns

    def _give_back(self) -> None:
        """What was allocated is not needed."""
        self._pgdat.pages.put(self.in_flight)
        self.in_flight = 0

    def _swap_in(self, t_ns: int) -> Steps:
        device, vmstat = self._host.device, self._pgdat.vmstat
        assert device is not None
        began_ns = t_ns
        vmstat.pgmajfault += 1
        vmstat.pswpin += not self._host.file
        if self._host.lru.refault(self._leaf):  # type: ignore[attr-defined]
            self._host.thrashing.add(self._leaf)
        t_ns = yield from device.read(self._task, t_ns)
        if self._leaf in self._host.thrashing:
            self._host.thrashing.remove(self._leaf)
            self._pgdat.stalled(began_ns, t_ns)
        return t_ns + self._costs.gup_swap_ns

    # -- the host's entry -----------------------------------------------------------------------

    def _same(self, state: int, swap: int) -> bool:
        """Whether the host's entry is what it was, accessed flag apart (``pte_same``).

        Nothing is mapped any more for a VM that the OOM killer chose (MMF_UNSTABLE).
        """
        host, leaf = self._host, self._leaf
        changed = (host.fast[leaf] ^ state) & ~YOUNG
        moved = (host.fast_swap[leaf] ^ swap) & (SLOT | CACHED)
        return self._kvm.alive and not changed and not moved

    def _lock_table(self, t_ns: int) -> Steps:
        """The lock of the host's own table, let go of at ``t_ns`` if nobody else has it."""
        host, leaf, costs = self._host, self._leaf, self._kvm.costs
        t_ns = yield from reach(self._env, t_ns)
        self._holds_table_until(t_ns)
        held = host.blocked(leaf, t_ns - costs.fault.ptl_ns)
        if held is not None:
            self._task.cpu.spin(t_ns)
            freed: int = held if isinstance(held, int) else (yield held)
            t_ns = max(t_ns, freed + costs.line.transfer_ns + costs.fault.ptl_ns)
            self._holds_table_until(t_ns)
            t_ns = yield from reach(self._env, t_ns)
        return t_ns

    def _holds_table_until(self, t_ns: int) -> None:
        self.ptl_until_ns = t_ns
        self.ptl_table = self._leaf // self._host.entries
