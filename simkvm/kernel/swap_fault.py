"""A stage-2 fault on a host whose memory can run out: it may have to wait for a page.

Source: mm/memory.c (``do_anonymous_page``, ``do_swap_page``), v6.12. A page that is not there needs
one that is free: the allocation may reclaim. A swapped page is read; while it is read its folio is
locked, and who else comes for it waits. One that is still in the swap cache is just mapped again.

KVM looked at the invalidation sequence before all that (``mmu_invalidate_seq``): if anything of the
VM was taken back meanwhile, which under pressure is likely, the fault is taken a second time.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.fault import CACHE_CAPACITY, Faulting, FaultPath
from simkvm.kernel.host_memory import OWN, WRPROTECT
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
        self._copying = False
        #: GUP marks it once, and so does arm64 (kvm_set_pfn_accessed()).
        self._marks = 2 if kvm.kernel.arch == "arm64" else 1

    def fill_cache(self) -> None:
        """As :meth:`FaultPath.fill_cache`; where memory is short its pages count."""
        self.cached = CACHE_CAPACITY
        self._pgdat.pages.take(CACHE_CAPACITY)

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """As :meth:`FaultPath.look_up`; pages for the memory cache are taken here."""
        if self.cached < self.cache_minimum:
            self._pgdat.pages.take(CACHE_CAPACITY - self.cached)
        t_ns = super().look_up(t_ns, leaf, write)
        if self.lacking:
            self.ptl_table = -1  # not before the page is there
        return t_ns

    def _resolve(self, asked_ns: int, t_ns: int, state: int, write: bool) -> int:
        """GUP's slow path begins: :meth:`install` is the rest of it."""
        return t_ns

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """From the look-up of the VMA to a host page that is mapped."""
        return self._bring_in(t_ns)

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """As :meth:`FaultPath.locked`: GUP and KVM have marked the page accessed by then."""
        self._host.lru.accessed(self._leaf, self._marks)  # type: ignore[attr-defined]
        return super().locked(entry_ns)

    def _bring_in(self, t_ns: int) -> Steps:
        host, leaf = self._host, self._leaf
        t_ns = yield from reach(self._env, t_ns)
        while host.folio_locked(leaf):
            t_ns = yield from self._wait_for_folio(t_ns)
        state, swap = host.fast[leaf], host.fast_swap[leaf]
        if state & OWN and not (self._write and state & WRPROTECT):
            t_ns += self._hit_ns  # somebody else brought it in
        elif state & OWN:
            host.trylock_folio(leaf)  # eviction leaves it alone meanwhile
            t_ns = yield from self._settle(t_ns, state)
            host.unlock_folio(leaf, t_ns)
        elif state or not (swap & SLOT or self._write):
            t_ns = yield from self._settle(t_ns, state)
        else:
            host.trylock_folio(leaf)
            t_ns = yield from self._new_page(t_ns, swap)
            host.unlock_folio(leaf, t_ns)
        return t_ns

    def _wait_for_folio(self, t_ns: int) -> Steps:
        """Somebody reads the page in, or is about to evict it: sleep until the folio is free."""
        self._task.cpu.sleep(t_ns)
        at_ns: int = yield self._host.folio_unlocked(self._leaf)
        woken_ns = max(t_ns, at_ns + self._kvm.costs.wakeup_ns)
        self._pgdat.stalled(t_ns, woken_ns)
        self._task.cpu.enter_kernel(woken_ns)
        return (yield from reach(self._env, woken_ns))

    def _settle(self, t_ns: int, state: int) -> Steps:
        """A page that is there, but not to be used like this; or the zero page for a read."""
        host, leaf = self._host, self._leaf
        self._copying = bool(not state & OWN and self._write)  # the zero page, or KSM's
        if self._copying:
            t_ns = yield from self._allocate(t_ns)
        host.table_page(leaf)
        t_ns = yield from reach(self._env, t_ns + self._gup_ns(state, self._write))
        self._holds_table_until(t_ns)
        rest = super().install(t_ns)
        if rest is not None:
            t_ns = yield from rest
        if self._write:
            host.written(leaf)
        return t_ns

    def _map_in_host(self, leaf: int) -> None:
        if self._copying and self._host.fast[leaf] & OWN:
            self._pgdat.pages.put(1)  # another fault's copy was quicker
        super()._map_in_host(leaf)

    def _new_page(self, t_ns: int, swap: int) -> Steps:
        """A page from swap, from the swap cache, or a fresh one; its folio is locked."""
        kvm, host, leaf, vmstat = self._kvm, self._host, self._leaf, self._pgdat.vmstat
        host.table_page(leaf)
        if swap & CACHED:
            vmstat.swap_cache_hits += 1
            t_ns += self._hit_ns
        else:
            t_ns = yield from self._allocate(t_ns)
            if swap & SLOT:
                t_ns = yield from self._swap_in(t_ns)
            else:
                vmstat.first_faults += 1
                end_ns = t_ns + self._alloc_ns
                t_ns = kvm.dram.write(t_ns, end_ns, self._fill_bytes)
        t_ns = yield from self._map(t_ns)
        if swap & CACHED:
            if self._write:
                host.written(leaf)
        elif host.fast_swap[leaf] & SLOT:  # unless it was given up meanwhile
            host.swapped_in(leaf, self._write)
        if host.fast_swap[leaf] & SLOT and not self._write:
            host.fast[leaf] |= WRPROTECT  # a page in the swap cache is mapped read-only
        return t_ns

    def _allocate(self, t_ns: int) -> Steps:
        kvm = self._kvm
        began_ns = t_ns
        t_ns = yield from self._pgdat.pages.allocate(self._task, t_ns, lambda: kvm.alive)
        self._pgdat.stalled(began_ns, t_ns)
        return t_ns

    def _swap_in(self, t_ns: int) -> Steps:
        device, vmstat = self._host.device, self._pgdat.vmstat
        assert device is not None
        began_ns = t_ns
        vmstat.pgmajfault += 1
        vmstat.pswpin += not self._host.file
        t_ns = yield from device.read(self._task, t_ns)
        self._pgdat.stalled(began_ns, t_ns)
        self._host.lru.refault(self._leaf)  # type: ignore[attr-defined]
        return t_ns + self._costs.gup_swap_ns

    def _map(self, t_ns: int) -> Steps:
        """The host's own table: its lock, then the entry."""
        host, leaf, costs = self._host, self._leaf, self._kvm.costs
        t_ns = yield from reach(self._env, t_ns + costs.fault.ptl_ns)
        self._holds_table_until(t_ns)
        held = host.blocked(leaf, t_ns - costs.fault.ptl_ns)
        if held is not None:
            self._task.cpu.spin(t_ns)
            freed: int = held if isinstance(held, int) else (yield held)
            t_ns = max(t_ns, freed + costs.line.transfer_ns + costs.fault.ptl_ns)
            t_ns = yield from reach(self._env, t_ns)
        if host.fast[leaf] & OWN:
            self._pgdat.pages.put(1)  # a copy of the zero page was quicker
        else:
            host.install(leaf, own=True)
        return t_ns

    def _holds_table_until(self, t_ns: int) -> None:
        self.ptl_until_ns = t_ns
        self.ptl_table = self._leaf // self._host.entries
