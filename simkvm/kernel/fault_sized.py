"""Faults of a guest whose leaves differ in size, or whose writes are logged.

Source: arch/arm64/kvm/mmu.c (``user_mem_abort``) and arch/arm64/kvm/hyp/pgtable.c
(``stage2_map_walker``, ``stage2_map_walk_table_pre``), v6.12. A fault maps a block if the host
maps a huge page and writes are not logged, else a page:

* a write to a page that logging made read-only relaxes the entry in place;
* a write to a block under logging breaks it, installs an empty table and fills in one page; the
  others fault back;
* a fault that could map a block, but meets a table, replaces the table: collapse. What becomes of
  the subtree is the kernel's ``collapse_free``.

Each break of an entry is followed by an invalidation before the new entry is made.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.fault import Faulting, FaultPath
from simkvm.kernel.host_change import copies
from simkvm.kernel.host_memory import MIGRATION, OWN, PROT_NONE, WRPROTECT
from simkvm.kernel.sites import FAULT, PERMISSION_FAULT
from simkvm.kernel.stage2 import AF, VALID, WRITE
from simkvm.kernel.task import Task

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class SizedFaultPath(FaultPath):
    """As :class:`FaultPath`, deciding at each fault what to map."""

    def __init__(self, kvm: Kvm, vcpu: Faulting, task: Task) -> None:
        super().__init__(kvm, vcpu, task)
        self._locks = {"read": kvm.mmu_lock.read, "write": kvm.mmu_lock.write}
        self._relax_lock = kvm.kernel["permission_fault_lock"]
        self._broadcast_relax = kvm.kernel["relax_tlbi"] == "broadcast"
        self._huge = False  # whether this fault installs a huge page in the host
        self._wants_write = False

    # -- the host's page ----------------------------------------------------------------------

    def look_up(self, t_ns: int, leaf: int, write: bool) -> int:
        """As :meth:`FaultPath.look_up`; a guest on huge pages gets one where nothing is mapped."""
        kvm, costs = self._kvm, self._costs
        self._huge = False
        if kvm.huge_pages and not self._host_state[leaf]:
            self._huge = kvm.host.takes_huge(*kvm.stage2.block_span(leaf))
        self._alloc_ns = kvm.block_faults.gup_alloc_ns if self._huge else costs.gup_alloc_ns
        leaves = kvm.stage2.block_leaves if self._huge else 1
        self._fill_bytes = leaves * kvm.leaf_pages * kvm.page_bytes
        self._wants_write = write
        relaxes = self._only_rights(leaf, write)
        self._hit_ns = costs.relax_hit_ns if relaxes else costs.gup_hit_ns
        if relaxes and self._relax_lock == "none" and self._only_logged(leaf):
            return self._fast(t_ns, leaf)
        return super().look_up(t_ns, leaf, write or self._huge)

    def _only_rights(self, leaf: int, write: bool) -> bool:
        """Whether only the right to write lacks, and the host has nothing against that."""
        if not write or self._leaf_state[leaf] & (VALID | WRITE) != VALID:
            return False
        state = self._host_state[leaf]
        return bool(state & OWN) and state < MIGRATION

    def _only_logged(self, leaf: int) -> bool:
        """Whether only logging keeps the entry from being writable (``is_mmu_writable_spte``)."""
        same_size = self._maps_block(leaf) == self._kvm.stage2.is_block(leaf)
        return same_size and self._only_rights(leaf, write=True)

    def _fast(self, t_ns: int, leaf: int) -> int:
        """x86's ``fast_page_fault``: an entry that is there is changed without any look-up."""
        self.faults += 1
        self._leaf, self._write, self._noted_ns, self.lacking = leaf, True, t_ns, False
        return t_ns + self._hit_ns

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """As :meth:`FaultPath.install`."""
        if not self._huge:
            return super().install(t_ns)
        held = self._kvm.host.blocked(self._leaf, t_ns - self._costs.ptl_ns)
        return self._install_later(t_ns, held)

    def _map_in_host(self, leaf: int) -> None:
        host, state = self._kvm.host, self._host_state[leaf]
        if self._huge and host.takes_huge(*self._kvm.stage2.block_span(leaf)):
            host.install_huge(*self._kvm.stage2.block_span(leaf))
            return
        if host.fast_huge[leaf // host.entries] and state >= MIGRATION:
            if self._write and copies(host, state):  # only one page is (``do_huge_pmd_wp_page``)
                host.split(leaf, leaf + 1)
            else:
                host.settle_huge(leaf, PROT_NONE | WRPROTECT if self._write else PROT_NONE)
        super()._map_in_host(leaf)

    # -- under mmu_lock -----------------------------------------------------------------------

    def take(self, t_ns: int) -> int | Event:
        """Take ``mmu_lock``: a pure change of rights may go by another lock than a map."""
        state, leaf = self._leaf_state[self._leaf], self._leaf
        if not (self._wants_write and state & (VALID | WRITE) == VALID):
            return self.take_lock(t_ns, self._task.cpu.id, FAULT, self.locked)
        if self._maps_block(leaf) != self._kvm.stage2.is_block(leaf):
            return self.take_lock(t_ns, self._task.cpu.id, PERMISSION_FAULT, self.locked)
        if self._relax_lock == "none" and self._only_logged(self._leaf):
            return self.locked(t_ns)[1]
        take = self._locks.get(self._relax_lock, self.take_lock)
        return take(t_ns, self._task.cpu.id, PERMISSION_FAULT, self.locked)

    def _maps_block(self, leaf: int) -> bool:
        kvm = self._kvm
        return kvm.stage2.blocks is not None and kvm.maps_blocks(leaf)

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """The section under ``mmu_lock``: returns the hold and when the host is needed next."""
        given_up_ns = self.gives_up_ns(entry_ns)
        if given_up_ns >= 0:
            return self._again(entry_ns, given_up_ns)
        write, leaf = self._wants_write, self._leaf
        state, block = self._leaf_state[leaf], self._maps_block(leaf)
        need = VALID | WRITE if write else VALID
        if state & need == need:
            return self._again(entry_ns, self._costs.hold_ns)  # another vCPU was first
        stage2 = self._kvm.stage2
        if state & VALID and stage2.is_block(leaf) == block:
            end_ns = self._relax(entry_ns, leaf)
        elif block and stage2.table_below(leaf):
            end_ns = self._collapse(entry_ns, leaf)
        elif block:
            end_ns = self._map_block(entry_ns, leaf)
        else:
            end_ns = self._map_page(entry_ns, leaf, write)
        if write:
            self._kvm.dirty_log.mark(leaf)
        return end_ns - entry_ns, self._vcpu.mapped(end_ns + self._costs.enter_ns)

    def _relax(self, t_ns: int, leaf: int) -> int:
        """Make the entry writable, then have the stale translation dropped."""
        kvm = self._kvm
        kvm.leaf_changes(leaf, t_ns + self._costs.relax_hold_ns)
        kvm.stage2.allow_write(leaf)
        if not kvm.software_af:  # the access that follows sets the flag
            self._leaf_state[leaf] |= AF
        if kvm.expected:
            kvm.given(leaf, t_ns)
        end_ns = t_ns + self._costs.relax_hold_ns
        if self._broadcast_relax:
            kvm.forget_translations(t_ns)
            return max(end_ns, kvm.flush_ns(t_ns, alone_ns=0))
        self._vcpu.forget_translations()
        return end_ns

    def _writable(self, leaf: int, write: bool) -> int:
        """Under logging a page that is only read is mapped read-only, so that a write shows.

        The zero page, and one that the host itself protects, are never writable.
        """
        state = self._host_state[leaf]
        if not state & OWN or state >= WRPROTECT:
            return 0
        return WRITE if write or not self._kvm.dirty_log.logs(leaf) else 0

    def _map_page(self, t_ns: int, leaf: int, write: bool) -> int:
        kvm, stage2 = self._kvm, self._kvm.stage2
        end_ns, linked_ns = t_ns + self._costs.hold_ns, t_ns
        if stage2.is_block(leaf):
            kvm.splits += 1
            kvm.leaf_changes(leaf, end_ns)
            end_ns = linked_ns = kvm.flush_ns(end_ns)
            kvm.entry_locked(self._leaf_tables(leaf), t_ns, end_ns)
            with kvm.mappings_going(t_ns):
                stage2.break_block(leaf)
        made = stage2.map_leaf(leaf, self._writable(leaf, write))
        counted_ns = self._counted_ns(end_ns)
        if made:
            end_ns += self._linked(made, linked_ns)
        end_ns += counted_ns
        if kvm.expected:
            kvm.given(leaf, t_ns)
        return end_ns

    def _map_block(self, t_ns: int, leaf: int) -> int:
        kvm, stage2 = self._kvm, self._kvm.stage2
        end_ns = t_ns + kvm.block_faults.hold_ns
        made = stage2.map_block(leaf, kvm.block_rights(leaf))
        counted_ns = self._counted_ns(end_ns)
        if made:
            end_ns += self._linked(made, t_ns)
        end_ns += counted_ns
        kvm.entry_locked(self._leaf_tables(leaf), t_ns, end_ns)
        kvm.given(leaf, t_ns)
        return end_ns

    def _collapse(self, t_ns: int, leaf: int) -> int:
        """Break the table's entry, make the block, and leave the subtree to the free policy."""
        kvm, stage2 = self._kvm, self._kvm.stage2
        kvm.collapses += 1
        tables, _ = stage2.subtree(leaf)
        made_ns = kvm.flush_ns(t_ns + kvm.block_faults.hold_ns, alone_ns=kvm.costs.tlbi_all_ns)
        kvm.forget_translations(t_ns)
        stage2.collapse(leaf, kvm.block_rights(leaf))
        kvm.entry_locked(self._leaf_tables(leaf), t_ns, made_ns)
        for table in tables:
            kvm.oracle.unlinked(table, made_ns)
        kvm.collapse_free.unlinked(kvm, tables, made_ns, self._task.cpu.id)
        kvm.given(leaf, t_ns)
        entries = len(tables) * kvm.entries
        return made_ns + kvm.collapse_free.under_lock_ns(kvm.costs.free, len(tables), entries)

    def _leaf_tables(self, leaf: int) -> range:
        first, last = self._kvm.stage2.block_span(leaf)
        stage2 = self._kvm.stage2
        return range(stage2.leaf_table(first), stage2.leaf_table(last - 1) + 1)
