"""What becomes of split blocks when dirty logging ends.

* ``on_fault``: nothing; on arm64 the next fault that could map a block replaces the table
  (:mod:`simkvm.kernel.fault_sized`);
* ``zap``: x86 zaps the tables that could be blocks, under the read lock; faults map the blocks
  (arch/x86/kvm/mmu/tdp_mmu.c, ``kvm_tdp_mmu_zap_collapsible_sptes``, v6.12);
* ``recover``: x86 puts the huge entries back in one go (``kvm_tdp_mmu_recover_huge_pages``, v6.13).
  An entry takes its flags from the first page that its table maps; a table that maps none stays,
  for its range may have been taken back (``tdp_mmu_make_huge_spte``).

A new way is a class with a ``name``, listed in :data:`RECOVER`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from simpy import Event

from simkvm.kernel.apply_range import apply_range
from simkvm.kernel.host_memory import PRESENT
from simkvm.kernel.sites import RECOVER_HUGE
from simkvm.kernel.stage2 import AF, VALID, WRITE
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


class OnFault:
    """Leave it to faults."""

    name: ClassVar[str] = "on_fault"

    def run(self, kvm: Kvm, task: Task, t_ns: int, first: int, last: int) -> Steps:
        """Nothing to do; returns when that is done."""
        yield from ()
        return t_ns


class Recover:
    """Put blocks in the place of the tables that could be some."""

    name: ClassVar[str] = "recover"

    def run(self, kvm: Kvm, task: Task, t_ns: int, first: int, last: int) -> Steps:
        """Walk the slot, then flush once if anything changed; returns when it is done."""
        before = kvm.collapses

        def step(at_ns: int, low: int, high: int) -> int:
            return self._chunk(kvm, task.cpu.id, at_ns, low, high)

        lock = "write" if kvm.kernel["mmu"] == "shadow" else "read"
        t_ns = yield from apply_range(kvm, task, t_ns, first, last, RECOVER_HUGE, step, lock)
        if kvm.collapses == before:
            return t_ns
        return (yield from reach(kvm.env, kvm.flush_ns(t_ns, kvm.costs.tlbi_all_ns)))

    def _chunk(self, kvm: Kvm, cpu: int, t_ns: int, first: int, last: int) -> int:
        if kvm.stage2.blocks is None or not kvm.alive:
            return t_ns
        size = kvm.stage2.block_leaves
        t_ns += kvm.stage2.leaf_visits(first, last) * kvm.costs.unmap.visit_ns
        for leaf in range(first - first % size, last, size):
            if kvm.stage2.table_below(leaf) and kvm.maps_blocks(leaf) and self._fits(kvm, leaf):
                t_ns = self._replace(kvm, cpu, t_ns, leaf)
        return t_ns

    def _fits(self, kvm: Kvm, leaf: int) -> bool:
        """Whether the table for ``leaf``, which a huge page is behind, can make way."""
        return self._first_page(kvm, leaf) is not None

    def _first_page(self, kvm: Kvm, leaf: int) -> int | None:
        first, last = kvm.stage2.block_span(leaf)
        mapped = np.flatnonzero(kvm.stage2.leaf.entries[first:last] & VALID)
        return first + int(mapped[0]) if len(mapped) else None

    def _replace(self, kvm: Kvm, cpu: int, t_ns: int, leaf: int) -> int:
        kvm.collapses += 1
        tables, _ = kvm.stage2.subtree(leaf)
        with kvm.mappings_going(t_ns):
            self._make_huge(kvm, leaf)
        for table in tables:
            kvm.oracle.unlinked(table, t_ns)
        kvm.collapse_free.unlinked(kvm, tables, t_ns, cpu)
        entries = len(tables) * kvm.entries
        return t_ns + kvm.collapse_free.under_lock_ns(kvm.costs.free, len(tables), entries)

    def _make_huge(self, kvm: Kvm, leaf: int) -> None:
        page, stage2 = self._first_page(kvm, leaf), kvm.stage2
        assert page is not None
        flags = stage2.leaf.fast[page]
        stage2.collapse(leaf, flags & WRITE)
        if not flags & AF:
            stage2.clear_young(np.arange(*stage2.block_span(leaf)))


class Zap(Recover):
    """Zap the tables; the next fault in each maps the block."""

    name: ClassVar[str] = "zap"

    def _fits(self, kvm: Kvm, leaf: int) -> bool:
        return bool(kvm.host.fast[leaf] & PRESENT)

    def _make_huge(self, kvm: Kvm, leaf: int) -> None:
        kvm.stage2.collapse(leaf, 0)
        kvm.stage2.break_block(leaf)


RECOVER: dict[str, type[OnFault | Recover]] = {way.name: way for way in (OnFault, Recover, Zap)}
